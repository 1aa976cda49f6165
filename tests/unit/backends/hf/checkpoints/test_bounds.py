"""Files that would hang a load, or take all memory, are refused before it, by file and field."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.backends.checkpoints.safetensors_header import read_header
from pytest_sway.backends.registry import cache_key_for
from pytest_sway.errors import AdapterMismatchError, SpecError, SwayError, WeightsError
from pytest_sway.system.reading import CONFIG_BYTES
from tests.tiny import edit_config, edit_weights, pickled, save_adapter
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.mended import run_command_in, tensors_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits
from tests.unit.backends.hf.zoo import PEFT_VERSION

SECONDS = 5.0
"""CPU seconds of the thread."""


@pytest.fixture
def folders(tmp_path: Path, base: Path, adapter: Path) -> dict[str, Path]:
    """Copies of the base and the adapter, to be broken."""
    copies = {"base": tmp_path / "a base", "adapter": tmp_path / "an adapter"}
    for source, copy in zip((base, adapter), copies.values(), strict=True):
        shutil.copytree(source, copy)
    return copies


@pytest.fixture
def refusal(folders: dict[str, Path], build: Any) -> Callable[[], SwayError]:
    """Build from the broken folders, and return the error, which must come in time."""

    def ask() -> SwayError:
        started = time.thread_time()
        with pytest.raises(SwayError) as caught:
            build(folders["base"], folders["adapter"])
        assert time.thread_time() - started < SECONDS
        return caught.value

    return ask


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


FILES = [
    ("adapter", "adapter_config.json"),
    ("adapter", "adapter_model.safetensors"),
    ("adapter", "tokenizer_config.json"),
    ("adapter", "tokenizer.json"),
    ("adapter", "chat_template.jinja"),
    ("base", "config.json"),
    ("base", "generation_config.json"),
    ("base", "model.safetensors"),
    ("base", "model.safetensors.index.json"),
    ("base", "tokenizer.json"),
    ("base", "tokenizer_config.json"),
    ("base", "chat_template.jinja"),
]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize("replace", [_pipe, _device])
@pytest.mark.parametrize(("folder", "name"), FILES)
def test_a_pipe_or_device_in_a_files_place_is_named(
    folders: dict[str, Path],
    refusal: Callable[[], SwayError],
    folder: str,
    name: str,
    replace: Callable[[Path], None],
) -> None:
    replace(folders[folder] / name)
    error = refusal()
    assert isinstance(error, SpecError | WeightsError)
    assert f"{str(folders[folder] / name)!r} is a pipe, a device or a socket, not a regular file." in str(error)


@pytest.mark.parametrize(("folder", "name"), [file for file in FILES if not file[1].endswith(".safetensors")])
def test_a_file_that_is_far_too_large_is_named(
    folders: dict[str, Path], refusal: Callable[[], SwayError], folder: str, name: str
) -> None:
    with (folders[folder] / name).open("ab") as file:
        file.truncate(10**9)  # a sparse file, which takes no room on the disk
    sentence = f"{str(folders[folder] / name)!r} has 1,000,000,000 bytes; no such file needs more than"
    assert sentence in str(refusal())


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="what a process reads is counted on Linux alone")
@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/other.jinja"])
@pytest.mark.parametrize("folder", ["base", "adapter"])
def test_a_chat_template_of_a_billion_characters_is_refused_unread(
    folders: dict[str, Path], refusal: Callable[[], SwayError], folder: str, name: str
) -> None:
    path = folders[folder] / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    os.truncate(path, 10**9)  # a sparse file, which takes no room on the disk
    before = _bytes_read()
    assert f"{str(path)!r} has 1,000,000,000 bytes; no such file needs more than" in str(refusal())
    assert _bytes_read() - before < 10**8


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar, which includes reads from the page cache


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("whose", "name"), [(whose, name) for whose, name in FILES if name.endswith(".json") and "adapter" not in name]
)
def test_a_byte_order_mark_that_transformers_does_not_read_is_named(
    folders: dict[str, Path], refusal: Callable[[], SwayError], whose: str, name: str, encoding: str
) -> None:
    (folders[whose] / name).write_text("{}", encoding)
    text = f"{folders[whose] / name}' begins with a byte order mark, which transformers cannot read"
    assert text in str(refusal())


def test_a_config_up_to_the_bound_is_parsed_in_time(folders: dict[str, Path], refusal: Callable[[], SwayError]) -> None:
    path = folders["adapter"] / "adapter_config.json"
    path.write_text("[" * (CONFIG_BYTES - 1))
    assert "adapter_config.json' cannot be read as JSON" in str(refusal())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"r": 10**7}, "r = 10,000,000"),
        ({"rank_pattern": {"q_proj": 10**7}}, "rank_pattern['q_proj'] = 10,000,000"),
        ({"peft_type": "SHADOW", "update_hidden_size": 10**7}, "update_hidden_size = 10,000,000"),
        ({"peft_type": "OFT", "oft_block_size": -(10**9)}, "oft_block_size = -1,000,000,000"),
        ({"peft_type": "SHADOW", "shadow_intermediate_size": 1e9}, "shadow_intermediate_size = 1,000,000,000.0"),
        ({"peft_type": "P_TUNING", "num_transformer_submodules": 2**31}, "num_transformer_submodules = 2,147,483,648"),
    ],
)
def test_a_rank_that_the_weights_cannot_fill_is_refused(
    folders: dict[str, Path], refusal: Callable[[], SwayError], fields: dict[str, Any], field: str
) -> None:
    edit_config(folders["adapter"], **fields)
    error = refusal()
    assert isinstance(error, AdapterMismatchError)
    assert f"adapter_config.json' has {field}, but no tensor of the adapter" in str(error)
    assert "has a side of more than" in str(error)


WITHOUT_END = r"([a-z_.]+)+[0-9]*([a-z_.]+)+!"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": WITHOUT_END},
        {"exclude_modules": WITHOUT_END},
        {"rank_pattern": {WITHOUT_END: 4}},
        {"alpha_pattern": {WITHOUT_END: 4}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_an_expression_that_backtracks_without_end_is_refused(
    folders: dict[str, Path], refusal: Callable[[], SwayError], monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr("pytest_sway.backends.checkpoints.expressions._PATIENCE", 1.0)
    edit_config(folders["adapter"], **fields)
    error = refusal()
    assert isinstance(error, SpecError)
    assert f"as {next(iter(fields))}, which takes more than 1 s to match the names of the modules" in str(error)


def test_an_expression_of_endless_length_is_refused(folders: dict[str, Path], refusal: Callable[[], SwayError]) -> None:
    edit_config(folders["adapter"], target_modules="a|" * 10**6)
    assert "has an expression of 2,000,000 characters as target_modules" in str(refusal())


@pytest.mark.parametrize("expression", [r".*\.(q|v)_proj", r"(\w+\.)+(q|v)_proj", r"(?:.*?(?:layers).*?)*[qv]_proj"])
def test_repeats_that_come_to_an_end_are_served(folders: dict[str, Path], build: Any, expression: str) -> None:
    edit_config(folders["adapter"], target_modules=expression)
    config = json.loads((folders["adapter"] / "adapter_config.json").read_text())
    assert config["target_modules"] == expression
    with build(folders["base"], folders["adapter"]).as_finetuned() as view:
        assert view.logprob_of("the sun", " rises") < 0


def test_the_check_takes_nothing_from_the_cache(folders: dict[str, Path], refusal: Callable[[], SwayError]) -> None:
    from pytest_sway.backends.registry import Builder

    edit_config(folders["adapter"], r=10**7)
    with pytest.raises(AdapterMismatchError):
        Builder().check(spec_of(folders["base"], folders["adapter"]))


@pytest.mark.parametrize(
    ("field", "value", "takes"),
    [
        ("r", "8", "a whole number"),
        ("r", [8], "a whole number"),
        ("r", True, "a whole number"),
        ("lora_alpha", "16", "a whole number or a number"),
        ("target_modules", {"q_proj": 1}, "a text or a list"),
        ("target_modules", [["q_proj"]], "a text or a list"),
        ("modules_to_save", "lm_head", "a list"),
        ("rank_pattern", ["q_proj"], "an object"),
        ("layers_to_transform", "0", "a whole number or a list"),
        ("use_dora", "yes", "true or false"),
        ("bias", 0, "a text"),
        ("task_type", 7, "a text"),
        ("target_modules", ["x" * 10**6, 7], "a text or a list"),
    ],
)
def test_a_field_of_another_type_is_named(
    folders: dict[str, Path], refusal: Callable[[], SwayError], field: str, value: object, takes: str
) -> None:
    edit_config(folders["adapter"], **{field: value})
    error = str(refusal())
    assert f"adapter_config.json' has {field} = " in error
    assert f"; it must be {takes}." in error
    assert len(error) < 600


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern = {'q_proj': nan}"),
        ({"runtime_config": {"scale": [1.0, float("-inf")]}}, "runtime_config = {'scale': [1.0, -inf]}"),
    ],
)
def test_a_setting_that_is_no_number_is_named(
    folders: dict[str, Path], refusal: Callable[[], SwayError], fields: dict[str, Any], sentence: str
) -> None:
    edit_config(folders["adapter"], **fields)
    error = refusal()
    assert isinstance(error, SpecError)
    assert f"adapter_config.json' has {sentence}; a setting must be finite." in str(error)


@pytest.mark.parametrize("field", ["init_lora_weights", "target_modules", "an unknown field"])
def test_a_setting_that_is_nested_without_end_is_named(
    folders: dict[str, Path], refusal: Callable[[], SwayError], field: str
) -> None:
    deep: Any = 1
    for _ in range(400):
        deep = [{"a": deep}]
    edit_config(folders["adapter"], **{field: deep})
    error = refusal()
    assert isinstance(error, SpecError)
    assert f"adapter_config.json' has {field} = " in str(error)
    assert "which is nested in more than 32 levels, deeper than any setting." in str(error)


LEFT: dict[str, tuple[Callable[[str], str], str, str]] = {
    "compiled": (lambda name: f"_orig_mod.{name}", "_orig_mod.", "torch.compile"),
    "a compiled base": (
        lambda name: name.replace("model.model.", "model._orig_mod.model."),
        "_orig_mod.",
        "torch.compile",
    ),
    "parallel": (lambda name: f"module.{name}", "module.", "DataParallel"),
    "parallel and compiled": (lambda name: f"_orig_mod.module.{name}", "_orig_mod.", "torch.compile"),
    "FSDP": (
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
        "_fsdp_wrapped_module.",
        "FSDP",
    ),
    "checkpointing": (
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        "_checkpoint_wrapped_module.",
        "activation checkpointing",
    ),
}


@pytest.mark.parametrize(("rename", "left", "whose"), LEFT.values(), ids=LEFT)
def test_what_a_wrapper_has_left_in_some_names_is_named_with_a_command_that_mends_the_file(
    folders: dict[str, Path],
    refusal: Callable[[], SwayError],
    build: Any,
    adapter: Path,
    rename: Callable[[str], str],
    left: str,
    whose: str,
) -> None:
    edit_weights(
        folders["adapter"],
        lambda tensors: {rename(name) if at else name: tensor for at, (name, tensor) in enumerate(tensors.items())},
    )
    error = refusal()
    assert isinstance(error, WeightsError)
    assert f"{whose} puts {left!r} into the names of a model that it wraps" in str(error)
    assert "Save the adapter again, unwrapped: " in str(error)
    assert "save_pretrained(folder" in str(error)
    run_command_in(error, in_a_shell=whose == "FSDP")
    assert tensors_of(folders["adapter"]) == tensors_of(adapter)
    with build(folders["base"], folders["adapter"]).as_finetuned() as view:
        assert view.logprob_of("the sun", " rises") < 0


def test_a_pickle_with_such_names_is_made_a_mended_safetensors_file(
    folders: dict[str, Path], build: Any, adapter: Path
) -> None:
    rename = LEFT["FSDP"][0]
    edit_weights(folders["adapter"], lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    pickled(folders["adapter"])
    with pytest.raises(WeightsError, match=r"FSDP puts '_fsdp_wrapped_module\.' into the names") as caught:
        build(folders["base"], folders["adapter"], allow_pickle=True)
    run_command_in(caught.value)
    assert tensors_of(folders["adapter"]) == tensors_of(adapter)
    build(folders["base"], folders["adapter"])


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {f"_orig_mod.{name}": tensor.clone() for name, tensor in tensors.items()},
        lambda tensors: {f"_orig_mod.{name.removeprefix('base_model.')}": tensor for name, tensor in tensors.items()},
    ],
    ids=["twice", "of no PEFT model"],
)
def test_a_file_that_no_shorter_names_would_mend_is_to_be_saved_again(
    folders: dict[str, Path], refusal: Callable[[], SwayError], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    edit_weights(folders["adapter"], change)
    text = str(refusal())
    assert "Save the adapter again, unwrapped: " in text
    assert "python -c" not in text


@pytest.mark.parametrize("change", [lambda tensors: {}, lambda tensors: {k: t[:0] for k, t in tensors.items()}])
def test_a_file_without_values_is_named(
    folders: dict[str, Path], refusal: Callable[[], SwayError], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    edit_weights(folders["adapter"], change)
    assert "adapter_model.safetensors' holds no values" in str(refusal())


def test_the_head_of_a_classifier_without_a_task_is_named(
    folders: dict[str, Path], refusal: Callable[[], SwayError]
) -> None:
    edit_config(folders["adapter"], task_type=None)
    edit_weights(
        folders["adapter"],
        lambda tensors: tensors | {"base_model.model.score.weight": next(iter(tensors.values())).clone()},
    )
    assert "has the head of a classifier ('base_model.model.score.weight')" in str(refusal())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**7),
        ("num_labels", 10**9),
        ("hidden_size", 10**9),
        ("intermediate_size", 10**9),
        ("num_key_value_heads", 10**9),
    ],
)
def test_a_size_that_the_bases_weights_cannot_fill_is_refused(
    folders: dict[str, Path], build: Any, field: str, value: int
) -> None:
    _edit(folders["base"] / "config.json", **{field: value})
    started = time.thread_time()
    with pytest.raises(WeightsError) as caught:
        build(folders["base"])
    assert time.thread_time() - started < SECONDS
    counted = f"config.json' has {field} = {value}, but the model's files have 21 tensors, too few for that."
    assert counted in str(caught.value) or "have other sizes than its config.json asks for (" in str(caught.value)


@pytest.mark.parametrize("words", [10**7, 10**9])
def test_more_words_than_any_of_the_bases_tensors_has_rows_are_refused(
    folders: dict[str, Path], refusal: Callable[[], SwayError], loads: list[str], words: int
) -> None:
    _edit(folders["base"] / "config.json", vocab_size=words)
    assert f"config.json' has vocab_size = {words}, but no side of the model's tensors is larger than" in str(refusal())
    assert loads == []


@pytest.mark.parametrize("count", [-1, -(10**9)])
def test_fewer_layers_than_none_are_refused(folders: dict[str, Path], build: Any, loads: list[str], count: int) -> None:
    _edit(folders["base"] / "config.json", num_hidden_layers=count)
    with pytest.raises(WeightsError, match=rf"config.json' has num_hidden_layers = {count}; it must not be neg"):
        build(folders["base"])
    assert loads == []


def test_a_rank_that_a_pickles_weights_cannot_fill_is_refused(
    folders: dict[str, Path], build: Any, loads: list[str]
) -> None:
    edit_config(pickled(folders["adapter"]), r=10**7)
    with pytest.raises(AdapterMismatchError, match=r"has r = 10,000,000, but no tensor of the adapter"):
        build(folders["base"], folders["adapter"], allow_pickle=True)
    assert loads == []


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("LoKrConfig", {}),
        ("LoKrConfig", {"rank_pattern": {"q_proj": 40}}),
        *([("DeftConfig", {})] if PEFT_VERSION >= (0, 20) else []),
    ],
    ids=str,
)
def test_a_rank_above_every_side_is_served_where_peft_makes_no_longer_tensors(
    build: Any, base: Path, tmp_path: Path, kind: str, pattern: dict[str, Any]
) -> None:
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", r=100, target_modules=["q_proj", "v_proj"], **pattern)
    folder = save_adapter(tmp_path, base, config)
    entries = read_header(folder / "adapter_model.safetensors").values()
    assert max(side for entry in entries for side in entry.shape) < 40
    with build(base, folder).as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, folder)))


def test_an_adapter_of_absurd_size_is_not_digested(folders: dict[str, Path], refusal: Callable[[], SwayError]) -> None:
    spec = spec_of(folders["base"], folders["adapter"])
    with (folders["adapter"] / "adapter_model.safetensors").open("ab") as file:
        file.truncate(10**13)  # a sparse file, which takes no room on the disk
    started = time.thread_time()
    before = cache_key_for(spec)
    assert time.thread_time() - started < 1.0
    assert "truncated or corrupt" in str(refusal())
    os.utime(folders["adapter"] / "adapter_model.safetensors", (1, 1))
    assert cache_key_for(spec) != before


def test_a_long_name_is_not_repeated_whole(folders: dict[str, Path], refusal: Callable[[], SwayError]) -> None:
    edit_weights(
        folders["adapter"], lambda tensors: {f"{name}{'x' * 10**5}": tensor for name, tensor in tensors.items()}
    )
    assert len(str(refusal())) < 2000
