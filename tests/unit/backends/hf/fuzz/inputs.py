"""Generates broken files. Each depends only on a seed and a number."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Files = Mapping[str, Mapping[str, bytes]]
    """The contents of good files, by folder name and file name."""

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
BASE_CONFIG: Final = "config.json"
BASE_WEIGHTS: Final = "model.safetensors"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
SPECIAL_TOKENS: Final = "special_tokens_map.json"
TEMPLATE: Final = "chat_template.jinja"


@dataclass(frozen=True)
class Broken:
    """A broken file that replaces a good one.

    Attributes:
        folder: Its folder, by the name in `Files`.
        file: Its name.
        content: Its content.
        names: The possible names of the changed field or tensor; empty if more than one changed.
        what: The change, in words.
    """

    folder: str
    file: str
    content: bytes
    names: tuple[str, ...]
    what: str

    def __str__(self) -> str:
        return f"{self.folder}/{self.file}: {self.what}"


# --- values -----------------------------------------------------------------------------------------------------------

SIZES: Final = (-1, 0, 1, 2, 3, 5, 33, 10**4, 10**7, 10**9, 2**31, 2**63, 10**30, -(10**9))
FRACTIONS: Final = (0.0, -0.0, 0.5, -0.5, 1e-9, 1e30, 1e308, float("nan"), float("inf"), float("-inf"))
TEXTS: Final = (
    "", " ", "8", "none", "null", "all", "True", "q_proj", "v_proj", "lm_head", "all-linear", ".*", "(", "[", "*",
    "([a-z]+)+", "layers", "gaussian", "LORA", "CAUSAL_LM", "\0", "\ud800", "ü" * 40, "../..", "/", "x" * 10**5,
)  # fmt: skip
NESTED: Final[tuple[Any, ...]] = (
    [], [None], [True], [0], [1, "q_proj"], ["q_proj"], ["q_proj", "q_proj"], [["q_proj"]], [[0, 1]], [[1, 0]],
    [[0, 10**7]], [-1], [10**9], [0.5], [""], [{}], ["x"] * 10**4,
    {}, {"": 1}, {"a": 1}, {"q_proj": 1}, {"q_proj": "1"}, {"q_proj": None}, {"q_proj": -1}, {"q_proj": 10**7},
    {"q_proj": [1]}, {"(": 1}, {"embed_tokens": [5]}, {"embed_tokens": [10**9]}, {"base_model_class": "x"},
    {"type": "linear"}, {"rope_type": "linear"}, {"rope_type": "linear", "factor": "2"}, {"__class__": {"a": []}},
    {str(number): number for number in range(10**4)},
)  # fmt: skip
WORDS_OF_FIELDS: Final[Mapping[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA", "ADALORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "XLORA", "LN_TUNING", "lora", "Lora"),
    "task_type": ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION", "causal_lm"),
    "bias": ("none", "all", "lora_only"),
    "init_lora_weights": ("gaussian", "pissa", "pissa_niter_x", "pissa_niter_999999999", "olora", "loftq", "mica"),
    "hidden_act": ("silu", "relu", "gelu"),
    "model_type": ("llama", "gpt2", "bert", "t5", "clip", "llava", "mamba", "mistral", "qwen2_vl", "timm_wrapper"),
    "architectures": (["LlamaForCausalLM"], ["BertModel"], ["T5ForConditionalGeneration"], ["LlavaForCausalLM"]),
    "dtype": ("float16", "bfloat16", "float64", "int8", "complex64", "torch.float32", "auto"),
    "tokenizer_class": ("LlamaTokenizer", "BertTokenizer", "T5Tokenizer", "PreTrainedTokenizer", "TokenizersBackend"),
}  # fmt: skip


def _value(draw: random.Random, field: str, now: Any) -> Any:
    """Draw a JSON value to replace another."""
    kind = draw.randrange(8)
    if kind == 0 and field in WORDS_OF_FIELDS:
        return draw.choice(WORDS_OF_FIELDS[field])
    if kind <= 2:
        return draw.choice(SIZES)
    if kind == 3:
        return draw.choice(FRACTIONS)
    if kind <= 5:
        return draw.choice(TEXTS) if draw.random() < 0.7 else draw.choice((None, True, False))
    if kind == 6:
        return draw.choice(NESTED)
    return draw.choice((_deep(draw.choice((2, 50, 500)), now), [now], {"x": now}, str(now)))


def _deep(levels: int, inner: Any) -> Any:
    for level in range(levels):
        inner = [inner] if level % 2 else {"a": inner}
    return inner


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "something very deep"
    return text if len(text) <= 120 else f"{text[:120]}... ({len(text)} characters)"


# --- JSON -------------------------------------------------------------------------------------------------------------


def _object(draw: random.Random, folder: str, file: str, content: bytes, *more: str) -> Broken:
    """Return an object with one field changed, duplicated or removed."""
    fields: dict[str, Any] = json.loads(content)
    field = draw.choice([*fields, *more, "an unknown field"])
    way = draw.random()
    if way < 0.85 or field not in fields:
        value = _value(draw, field, fields.get(field))
        return Broken(folder, file, _json(fields | {field: value}), (field,), f"{field} = {_shown(value)}")
    if way < 0.95:
        del fields[field]
        return Broken(folder, file, _json(fields), (field,), f"no {field}")
    twice = json.dumps(fields)[:-1] + f", {json.dumps(field)}: {json.dumps(_value(draw, field, fields[field]))}}}"
    return Broken(folder, file, twice.encode(errors="surrogatepass"), (field,), f"{field} twice")


def _tree(draw: random.Random, folder: str, file: str, content: bytes) -> Broken:
    """Return a tree with one node changed or removed."""
    tree = json.loads(content)
    parent: Any = {"": tree}
    key: Any = ""
    path, node = "", tree
    while isinstance(node, dict | list) and node and (not path or draw.random() < 0.75):
        parent = node
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        node = parent[key]
        path += f"/{key}"
    value = _value(draw, str(key), node)
    top = (path.split("/")[1],) if path else ()
    if draw.random() < 0.15:
        del parent[key]
        return Broken(folder, file, _json(tree), top, f"no {path}")
    parent[key] = value
    return Broken(folder, file, _json(tree), top, f"{path} = {_shown(value)}")


def _json(value: Any) -> bytes:
    return json.dumps(value).encode(errors="surrogatepass")


def _bytes(draw: random.Random, folder: str, file: str, content: bytes) -> Broken:
    """Return heavily damaged bytes of a file."""
    if draw.random() < 0.5:
        wholes = (
            b"", b" ", b"null", b"[]", b"{}", b'"x"', b"7", b"NaN", b"{" * 10**5, b"[" * 10**6, b'{"a":' * 10**5,
            b"\0" * 64, b"\xff\xfe" + "{}".encode("utf-16-le"), b"\x80\x81", b'{"a": 1} {"b": 2}',
            b'{"a": ' + b"9" * 10**5 + b"}",
        )  # fmt: skip
        whole = draw.choice(wholes)
        return Broken(folder, file, whole, (), f"{len(whole)} bytes {whole[:40]!r}")
    cut = draw.randrange(len(content) or 1)
    if draw.random() < 0.5:
        return Broken(folder, file, content[:cut], (), f"cut off at byte {cut}")
    length = draw.choice((1, 1, 2, 8))
    noise = draw.randbytes(length)
    return Broken(folder, file, content[:cut] + noise + content[cut + length :], (), f"{noise!r} at byte {cut}")


# --- safetensors ------------------------------------------------------------------------------------------------------

DTYPES: Final[tuple[Any, ...]] = (
    "F32", "F16", "BF16", "F64", "I32", "U32", "I64", "BOOL", "F8_E4M3", "F4", "C64", "F128", "", 7, None, [],
)  # fmt: skip


def _safetensors(draw: random.Random, folder: str, file: str, content: bytes) -> Broken:
    """Return a weights file with a changed header or length."""
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    name = draw.choice([each for each in header if each != "__metadata__"])
    if draw.random() < 0.4:
        damage = draw.choice((_length, _length, _cut, _noise))
        broken, what = damage(draw, content)
        return Broken(folder, file, broken, () if damage is _noise else ("header", "bytes"), what)
    if draw.random() < 0.1:
        raw = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[draw.choice(list(header))])}}}"
        return Broken(folder, file, _framed(raw.encode(), data), (name,), f"{name} twice")
    way = draw.choice((_dtype, _shape, _offsets, _entry, _name, _metadata))
    before = {**header}
    what, data = way(draw, header, name, data)
    changed = (repr(new)[1:-1][:49] for new in header if header[new] is not before.get(new))
    # PEFT names some tensors as in the wrapped model
    names = ("__metadata__",) if way is _metadata else (name, name.removeprefix("base_model."), *changed)
    if not header.keys() - {"__metadata__"}:
        names = (*names, "0 tensors")  # an empty file has no tensor to name
    return Broken(folder, file, _framed(_json(header), data), names, what)


def _framed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _dtype(draw: random.Random, header: dict[str, Any], name: str, data: bytes) -> tuple[str, bytes]:
    header[name]["dtype"] = dtype = draw.choice(DTYPES)
    return f"the dtype of {name} is {dtype!r}", data


def _shape(draw: random.Random, header: dict[str, Any], name: str, data: bytes) -> tuple[str, bytes]:
    shape = header[name]["shape"]
    shapes: tuple[Any, ...] = (
        shape[::-1], [*shape, 1], [1, *shape], [2**31, *shape], [0], [], [-1, *shape[1:]], [0.5], ["4"], None, "4", {},
        [1] * 100, [1] * 63, [2**62, 4], [10**30], [[4]], [True, *shape], [*shape, 10**9],
    )  # fmt: skip
    header[name]["shape"] = new = draw.choice(shapes)
    return f"the shape of {name} is {new!r}", data


def _offsets(draw: random.Random, header: dict[str, Any], name: str, data: bytes) -> tuple[str, bytes]:
    start, end = header[name]["data_offsets"]
    places: tuple[Any, ...] = (
        [end, start], [start, end + 4], [start + 4, end + 4], [start, start], [0, end], [-1, end], [0, 2**63], [start],
        [start, 10**30], [0.0, 4.0], ["0", "4"], None, {}, [start, end, end], [True, end], [2**64 - 4, 2**64],
    )  # fmt: skip
    header[name]["data_offsets"] = new = draw.choice(places)
    return f"the place of {name} is {new!r}", data


def _entry(draw: random.Random, header: dict[str, Any], name: str, data: bytes) -> tuple[str, bytes]:
    entries: tuple[Any, ...] = (None, [], {}, 7, "x", header[name] | {"more": 1}, {"dtype": "F32"})
    if draw.random() < 0.3:  # removes a tensor with its data
        start, end = header.pop(name)["data_offsets"]
        for entry in header.values():
            if "data_offsets" in entry and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [place - (end - start) for place in entry["data_offsets"]]
        return f"no {name}", data[:start] + data[end:]
    header[name] = new = draw.choice(entries)
    return f"the entry of {name} is {new!r}", data


def _name(draw: random.Random, header: dict[str, Any], name: str, data: bytes) -> tuple[str, bytes]:
    names = (
        "", " ", name + "x", name.replace("lora_A", "lora_B"), name.upper(), "x" * 10**5, "\0", "ü", "../../x", "a.b.c",
        f"_orig_mod.{name}", f"module.{name}", name.replace("model.", "", 1), name.replace("0", "10000000"),
        "_flat_param", "__metadata__", name.replace(".weight", ".bias"), "\ud800",
    )  # fmt: skip
    new = draw.choice(names)
    header[new] = header.pop(name)
    return f"{name} is named {new[:80]!r}", data


def _metadata(draw: random.Random, header: dict[str, Any], _: str, data: bytes) -> tuple[str, bytes]:
    metadatas: tuple[Any, ...] = (
        None, {}, [], 7, "pt", {"format": "tf"}, {"format": "mlx"}, {"format": "flax"}, {"format": 5}, {"format": None},
        {"format": "pt", "x": "y" * 10**6}, {"format": ["pt"]}, {"format": "pt", "x": {"y": 1}}, {"": ""},
        {f"{number}": "x" for number in range(10**4)} | {"format": "pt"},
    )  # fmt: skip
    header["__metadata__"] = new = draw.choice(metadatas)
    return f"its metadata are {_shown(new)}", data


def _length(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    (length,) = struct.unpack("<Q", content[:8])
    lengths = (0, 1, 2, length - 1, length + 1, length + 8, length // 2, 10**8, 2**31, 2**63, 2**64 - 1, len(content))
    new = draw.choice(lengths)
    return struct.pack("<Q", new) + content[8:], f"the length of the header is {new}"


def _cut(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    if draw.random() < 0.2:
        return content + b"\0" * 8, "eight bytes more"
    cut = draw.choice((0, 1, 7, 8, 9, len(content) - 1, draw.randrange(len(content))))
    return content[:cut], f"cut off at byte {cut}"


def _noise(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    (length,) = struct.unpack("<Q", content[:8])
    place, noise = draw.randrange(8 + length), draw.randbytes(draw.choice((1, 1, 1, 4)))
    return content[:place] + noise + content[place + len(noise) :], f"{noise!r} at byte {place}"


# --- chat templates ---------------------------------------------------------------------------------------------------

# A template that makes 10**9 characters takes gigabytes, and times out like an endless one.
TEMPLATES: Final = (
    "", " ", "{", "{{", "{{ messages", "{% for", "{% endfor %}", "{{ messages[99]['content'] }}", "{{ nothing }}",
    "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}model {% endif %}",
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**7 }}", "{{ messages.__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "{{ '%9999999d' % 1 }}", "x" * 10**5,
    "{{ cycler.__init__.__globals__ }}", "{% set x = namespace() %}{{ x.y }}", "{{ 10**10**8 }}", "\0", "{#" * 10**4,
    "{{ range(10**9) | list | length }}", "{% if " + "(" * 5000 + "1" + ")" * 5000 + " %}{% endif %}",
)  # fmt: skip


def _template(draw: random.Random, folder: str) -> Broken:
    template = draw.choice(TEMPLATES)
    return Broken(folder, TEMPLATE, template.encode(), (), f"{template[:80]!r}")


# --- by kind ----------------------------------------------------------------------------------------------------------


def _adapter_config(draw: random.Random, files: Files) -> Broken:
    folder = draw.choice([name for name in files if name != "base"])
    content = files[folder][ADAPTER_CONFIG]
    damage = _bytes if draw.random() < 0.05 else _object
    return damage(draw, folder, ADAPTER_CONFIG, content)


def _adapter_weights(draw: random.Random, files: Files) -> Broken:
    folder = draw.choice([name for name in files if name != "base"])
    return _safetensors(draw, folder, ADAPTER_WEIGHTS, files[folder][ADAPTER_WEIGHTS])


def _base_config(draw: random.Random, files: Files) -> Broken:
    content = files["base"][BASE_CONFIG]
    if draw.random() < 0.07:
        return _bytes(draw, "base", BASE_CONFIG, content)
    more = ("quantization_config", "auto_map", "rope_scaling", "num_labels", "text_config", "layer_types", "n_layer")
    return _object(draw, "base", BASE_CONFIG, content, *more)


def _base_weights(draw: random.Random, files: Files) -> Broken:
    return _safetensors(draw, "base", BASE_WEIGHTS, files["base"][BASE_WEIGHTS])


def _tokenizer(draw: random.Random, files: Files) -> Broken:
    """Return a broken tokenizer file, of the base or of an adapter."""
    folder = draw.choice(("base", "LORA"))
    file = draw.choice((TOKENIZER, TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_CONFIG, SPECIAL_TOKENS, TEMPLATE))
    if file == TEMPLATE:
        return _template(draw, folder)
    content = files["base"].get(file, b'{"eos_token": "</s>", "pad_token": {"content": "<pad>", "lstrip": false}}')
    if draw.random() < 0.1:
        return _bytes(draw, folder, file, content)
    if file == TOKENIZER:
        return _tree(draw, folder, file, content)
    more = ("chat_template", "added_tokens_decoder", "extra_special_tokens", "add_bos_token", "add_eos_token")
    return _object(draw, folder, file, content, *more)


KINDS: Final[Mapping[str, Callable[[random.Random, Files], Broken]]] = {
    "adapter_config": _adapter_config,
    "adapter_weights": _adapter_weights,
    "base_config": _base_config,
    "base_weights": _base_weights,
    "tokenizer": _tokenizer,
}


def broken(kind: str, seed: int, number: int, files: Files) -> Broken:
    """Return one input; equal arguments give equal inputs."""
    return KINDS[kind](random.Random(f"{kind} {seed} {number}"), files)
