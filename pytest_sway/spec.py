"""What to load: `ModelSpec`, the forms it is accepted in, and the keys under which what is loaded is shared.

Two specs with equal keys are served by one backend, so a key holds everything that changes what is loaded and nothing
else. The contents of an adapter's folder are part of it: retraining into the same folder is another adapter.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

from pytest_sway.endpoints import normal_endpoint
from pytest_sway.errors import SpecError
from pytest_sway.reading import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterable

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

Kind = Literal["hf", "mlx", "api", "dummy", "custom"]
Dtype = Literal["auto", "fp16", "bf16", "fp32"]

KINDS: Final = ("hf", "mlx", "api", "dummy", "custom")
DTYPES: Final = ("auto", "fp16", "bf16", "fp32")
_DTYPE_ALIASES: Final = {
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float": "fp32",
}
_DEVICE: Final = re.compile(r"(auto|[a-z]+(:\d+)?)")
GGUF_SUFFIX: Final = ".gguf"
_WEIGHTS: Final = re.compile(r"(.*\.(safetensors|gguf)|pytorch_model.*\.bin)(\.index\.json)?")
"""Files that are looked at whenever a model is asked for, beside its config.json."""
_MODEL_FILES: Final = re.compile(
    r".*\.(safetensors|gguf|model|jinja|py)|pytorch_model.*\.bin|(vocab|merges)\.txt"
    r"|(generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab|chat_template|.*\.index)\.json"
)
"""Files that decide what a model's folder loads, beside its config.json; reports and logs are not among them."""
_HUB_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_ENDPOINTS: Final = ("endpoint", "finetuned_endpoint")
_ENTRY_POINT: Final = re.compile(r"[^\d\W][\w.]*:[^\d\W][\w.]*")

Key: TypeAlias = tuple[Hashable, ...]


class SpecAttributes(Protocol):
    """The least that an object needs to be taken for a spec; dlm-sway's ``ModelSpec`` has it."""

    @property
    def base(self) -> str:
        """A hub id or a folder."""
        ...


SpecLike: TypeAlias = "ModelSpec | Mapping[str, Any] | str | SpecAttributes"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """An immutable description of a base model and what it was tuned to; checked when it is made.

    Field names and meanings are dlm-sway's where it has them.

    Attributes:
        kind: Which backend serves it: ``hf``, ``mlx``, ``api``, ``dummy`` or ``custom``.
        base: A hub id (``org/name``) or the folder of a model; folders are made absolute. For ``kind="api"``, the name
            of the model on its server.
        adapter: The folder of a PEFT adapter, made absolute; ``None`` for the base alone.
        dtype: ``auto``, ``fp16``, ``bf16`` or ``fp32``; torch's names (``bfloat16``) are understood.
        device: ``auto``, or a torch device such as ``cpu`` or ``cuda:0``.
        trust_remote_code: Run the code that a base's repository brings. Not part of the identity.
        revision: The commit, branch or tag of a base on a hub.
        entry_point: ``package.module:Class``, for ``kind="custom"``.
        endpoint: The server's address, for ``kind="api"``.
        allow_pickle: Read weights that exist only in pickle files, which can run code when they are read.
        finetuned: A whole fine-tuned model in an adapter's place, named as ``base`` is; ``None`` where there is none.
        answers: For ``kind="dummy"``, what it answers (see `pytest_sway.answers`): a mapping, which is kept as JSON
            text, or the path of a JSON or TOML file.
        finetuned_endpoint: For ``kind="api"``, the address of the server of ``finetuned``; ``None`` for the base's.
        api_key_env: For ``kind="api"``, the name of the environment variable that holds the key; never the key itself.
        timeout: For ``kind="api"``, the seconds that the server may take for one answer.

    Raises:
        SpecError: A field's value is not one that the field takes.
    """

    kind: Kind = "hf"
    base: str = ""
    adapter: Path | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    entry_point: str | None = None
    endpoint: str | None = None
    allow_pickle: bool = False
    finetuned: str | None = None
    answers: Mapping[str, Any] | str | Path | None = None
    finetuned_endpoint: str | None = None
    api_key_env: str | None = None
    timeout: float = 120.0
    _label: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        self._set("_label", self._described())

    def __hash__(self) -> int:
        return hash((self.base, self.adapter))  # enough to tell most apart; all fields would cost each request 1 us

    def _check(self) -> None:
        self._set("kind", _one_of("kind", self.kind, KINDS))
        dtype = _DTYPE_ALIASES.get(self.dtype, self.dtype) if isinstance(self.dtype, str) else self.dtype
        self._set("dtype", _one_of("dtype", dtype, DTYPES))
        for name in ("trust_remote_code", "allow_pickle"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"spec field {name!r} must be true or false, not {getattr(self, name)!r}.")
        for name in ("revision", "entry_point", *_ENDPOINTS):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise SpecError(f"spec field {name!r} must be a non-empty string or None, not {value!r}.")
            if value is not None and name in _ENDPOINTS:
                self._set(name, normal_endpoint(name, value))
        if self.api_key_env is not None and not _is_variable(self.api_key_env):  # it may be the key: not shown
            raise SpecError(
                "spec field 'api_key_env' must be the name of an environment variable, such as 'SWAY_API_KEY', or None;"
                " the key itself belongs into that variable."
            )
        self._set("timeout", _seconds("timeout", self.timeout))
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise SpecError(
                f"spec field 'device' must be 'auto' or a torch device such as 'cpu' or 'cuda:0', not {self.device!r}."
            )
        self._set("base", _model("base", self.base, self.kind))
        self._set("adapter", _adapter(self.adapter))
        if self.finetuned is not None:
            self._set("finetuned", _model("finetuned", self.finetuned, self.kind))
            if self.adapter is not None:
                raise SpecError(
                    "a spec has either an adapter or a whole fine-tuned model, not both; found adapter"
                    f" {str(self.adapter)!r} and finetuned {self.finetuned!r}. To test an adapter on a fine-tuned"
                    " model, name that model as 'base'."
                )
        self._set("answers", _answers(self.answers, self.kind))
        if self.kind == "custom" and not _ENTRY_POINT.fullmatch(self.entry_point or ""):
            raise SpecError(
                "a spec of kind 'custom' needs entry_point='package.module:Class', the class to build;"
                f" found {self.entry_point!r}."
            )
        if self.kind == "api" and self.endpoint is None:
            raise SpecError("a spec of kind 'api' needs endpoint=, the address of the server.")
        if self.finetuned_endpoint is not None and self.finetuned is None:
            raise SpecError("a spec with 'finetuned_endpoint' needs 'finetuned', the model's name on that server.")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __str__(self) -> str:
        """A short label for people: the kind where it is not ``hf``, the base, the adapter or the fine-tuned model."""
        return self._label

    def _described(self) -> str:
        kind = "" if self.kind == "hf" else f"{self.kind}:"
        adapter = "" if self.adapter is None else f" + {short_name(str(self.adapter))}"
        finetuned = "" if self.finetuned is None else f" -> {short_name(self.finetuned)}"
        return f"{kind}{short_name(self.base)}{adapter}{finetuned}"


_FIELDS: Final = tuple(each.name for each in fields(ModelSpec) if each.init)


def parse_spec(value: SpecLike, *, named: Mapping[str, Any] = MappingProxyType({})) -> ModelSpec:
    """Return the spec that ``value`` stands for.

    Args:
        value: A `ModelSpec`, a mapping of its fields, a name from ``named``, or any object with the same attributes.
        named: Specs by name, from the configuration; each in one of the other forms.

    Raises:
        SpecError: It is none of those, has a field that does not exist, or a value that its field does not take.
    """
    if isinstance(value, ModelSpec):
        return value
    if isinstance(value, Mapping):
        return _from_mapping(value)
    if isinstance(value, str):
        if value not in named:
            known = ", ".join(sorted(named)) or "none are configured"
            raise SpecError(
                f"no spec is named {value!r} (named specs: {known}). Pass a mapping such as"
                " {'base': ..., 'adapter': ...}, or configure the name under [tool.pytest-sway.specs]."
            )
        return parse_spec(named[value])
    if hasattr(value, "base"):
        return _from_mapping({name: getattr(value, name) for name in _FIELDS if hasattr(value, name)})
    raise SpecError(
        f"a spec is a ModelSpec, a mapping of its fields or a configured name; found {type(value).__name__}: {value!r}."
    )


def _from_mapping(values: Mapping[str, Any]) -> ModelSpec:
    for name in values:
        if name not in _FIELDS:
            close = difflib.get_close_matches(str(name), _FIELDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise SpecError(f"a spec has no field {name!r}; its fields are {', '.join(_FIELDS)}.{hint}")
    try:
        spec, steady = _memoised(tuple(values.items()))
    except TypeError:  # an unhashable value: let the checks of ModelSpec name the field
        steady = False
    return spec if steady else ModelSpec(**values)


@lru_cache(maxsize=256)
def _memoised(items: tuple[tuple[str, Any], ...]) -> tuple[ModelSpec, bool]:
    """The spec of a mapping, since resolving its paths costs more than a warm request may; and whether it stays so.

    A path through ``~``, a link or the working folder can be led elsewhere at any time, and a hub id can become the
    name of a folder.
    """
    values = dict(items)
    spec = ModelSpec(**values)
    paths = {name: getattr(spec, name) for name in ("base", "adapter", "finetuned", "answers")}
    return spec, all(_leads_nowhere_else(values[name], path) for name, path in paths.items() if path is not None)


def _leads_nowhere_else(given: Any, path: Path | str) -> bool:
    return os.path.isabs(given) and str(path) == os.path.normpath(given)


def _one_of(name: str, value: object, valid: Iterable[str]) -> str:
    valid = tuple(valid)
    if value not in valid:
        raise SpecError(f"spec field {name!r} must be one of {', '.join(valid)}; found {value!r}.")
    return str(value)


def _is_variable(value: object) -> bool:
    """Whether it looks like a variable's name, and unlike a key that somebody put in its place."""
    return isinstance(value, str) and bool(_VARIABLE.fullmatch(value)) and (value.isupper() or value in os.environ)


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SpecError(f"spec field {name!r} must be a number of seconds above 0; found {value!r}.")
    return float(value)


def _model(field: str, value: object, kind: Kind) -> str:
    if isinstance(value, os.PathLike):
        return str(_resolved_model(value))
    if not isinstance(value, str) or not value.strip():
        needs = "a spec needs 'base'," if field == "base" else f"spec field {field!r} must be"
        raise SpecError(f"{needs} a hub id or the folder of a model; found {value!r}.")
    if kind in ("api", "dummy"):  # a name, whatever it looks like
        return value
    if is_path(value) or Path(value).is_dir():
        return str(_resolved_model(value))
    return value


def _adapter(value: object) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        raise SpecError(f"spec field 'adapter' must be the folder of a PEFT adapter or None; found {value!r}.")
    return _resolved(value)


def _answers(value: object, kind: Kind) -> str | Path | None:
    if value is None:
        return None
    if kind != "dummy":
        raise SpecError(f"spec field 'answers' is for kind='dummy', which has no model; found it with kind={kind!r}.")
    from pytest_sway.answers import canonical

    if isinstance(value, Mapping) or (isinstance(value, str) and value.lstrip().startswith("{")):
        return canonical(value)
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        raise SpecError(
            f"spec field 'answers' must be a mapping, or the path of a JSON or TOML file of one; found {value!r}."
        )
    return _resolved(value)


def is_path(base: str) -> bool:
    """Whether a base is written as a folder or a GGUF file, not as a hub id such as ``org/name``."""
    return (
        base.startswith(("/", "~", "."))
        or base.endswith(GGUF_SUFFIX)
        or os.path.isabs(base)
        or not _HUB_ID.fullmatch(base)
    )


def _resolved_model(path: str | os.PathLike[str]) -> Path:
    """A file's own link is not followed: in a hub's cache, it leads to one whose name says nothing of GGUF."""
    path = Path(path)
    return _resolved(path.parent) / path.name if path.suffix == GGUF_SUFFIX else _resolved(path)


def _resolved(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (RuntimeError, ValueError, OSError) as error:  # an unknown user's ~, a null byte, a loop of links
        raise SpecError(f"the path {os.fspath(path)!r} cannot be resolved: {str(error).rstrip('.')}.") from error


def short_name(text: str) -> str:
    """Return the last two parts of a path or hub id: enough for a person, and short."""
    return "/".join(text.rstrip(os.sep).split(os.sep)[-2:]).lstrip("/")


# --- identity ---------------------------------------------------------------------------------------------------------


def cache_key_for(spec: ModelSpec, *, adapter_path: Path | None = None) -> Key:
    """Return the identity of what ``spec`` loads.

    The key begins ``(kind, base, str(adapter) or None, dtype, device)``, with the device and dtype that ``auto`` stands
    for on this machine; asking that imports torch when the kind needs it and it is installed. It goes on with every
    other field that changes what is loaded, and with the state of the files.

    Args:
        spec: What is asked for.
        adapter_path: An adapter that takes the place of the spec's own.
    """
    from pytest_sway.backends import resolve  # upwards, and only here: what `auto` means is the backends' to say

    return resolved_key(resolve(with_adapter(spec, adapter_path)))


def resolved_key(spec: ModelSpec) -> Key:
    """Return the identity of a spec whose device and dtype are already those that will be used."""
    adapter = None if spec.adapter is None else str(spec.adapter)
    return (
        *_settings(spec),
        _answers_identity(spec.answers),
        _model_identity(spec.base),
        None if spec.finetuned is None else _model_identity(spec.finetuned),
        None if adapter is None else _adapter_digest(adapter, _adapter_signature(adapter)),
    )


@lru_cache(maxsize=256)
def _settings(spec: ModelSpec) -> Key:
    """What a spec's own fields add to its key, whatever the files hold that they name."""
    return (
        spec.kind,
        spec.base,
        None if spec.adapter is None else str(spec.adapter),
        spec.dtype,
        spec.device,
        spec.revision,
        spec.entry_point,
        spec.endpoint,
        spec.allow_pickle,
        spec.finetuned,
        spec.finetuned_endpoint,
        spec.api_key_env,
        spec.timeout,
    )


def state_of_files(spec: ModelSpec) -> Hashable:
    """Return what changes whenever somebody writes to the files of a spec, also where they hold the same afterwards.

    It says nothing of the kinds whose files are others' to read and write.
    """
    if spec.kind not in ("hf", "mlx", "dummy"):
        return None
    return (
        _model_signature(spec.base, _MODEL_FILES),
        None if spec.finetuned is None else _model_signature(spec.finetuned, _MODEL_FILES),
        None if spec.adapter is None else _adapter_signature(str(spec.adapter)),
        _stats((str(spec.answers),)) if isinstance(spec.answers, Path) else None,
    )


def base_key(spec: ModelSpec) -> Key:
    """Return the identity of the base of a resolved spec: equal for all adapters that can share it."""
    return resolved_key(base_spec(spec))


def base_spec(spec: ModelSpec) -> ModelSpec:
    """Return the spec of the base alone."""
    if spec.adapter is None and spec.finetuned is None:
        return spec
    return replace(spec, adapter=None, finetuned=None, finetuned_endpoint=None)


def finetuned_spec(spec: ModelSpec) -> ModelSpec | None:
    """Return the spec of the fine-tuned model as a base of its own; ``None`` where there is none.

    The revision is the base's, and so is not the fine-tuned model's.
    """
    return None if spec.finetuned is None else replace(spec, base=spec.finetuned, finetuned=None, revision=None)


def with_adapter(spec: ModelSpec, adapter_path: Path | str | None) -> ModelSpec:
    """Return ``spec`` with ``adapter_path`` in its adapter's place, or as it is where that is ``None``."""
    return spec if adapter_path is None else replace(spec, adapter=adapter_path)  # type: ignore[arg-type] # checked


def _answers_identity(answers: Mapping[str, Any] | str | Path | None) -> Hashable:
    if not isinstance(answers, Path):
        return answers if answers is None else str(answers)
    return (str(answers), _file_digest(str(answers), _stats((str(answers),))))


_Signature: TypeAlias = tuple[tuple[int, int, int, int], ...]

_IDENTITY_FILES: Final = re.compile(
    r".*\.(safetensors|jinja|model|txt)|(?!trainer_state).*\.json|(adapter_model|new_embeddings).*\.bin"
)
"""Files that decide what an adapter's folder loads; a checkpoint's optimizer state and README do not."""


def _model_signature(model: str, files: re.Pattern[str] = _WEIGHTS) -> _Signature | None:
    """The state of files that a local model is loaded from; their contents are too much to read."""
    if not os.path.isabs(model):
        return None
    if model.endswith(GGUF_SUFFIX):
        return _stats((model,))
    return _stats((f"{model}/config.json", *_listed(model, files)))


def _model_identity(model: str) -> Hashable:
    """What tells one state of a local model from another, at each request.

    Its config.json and its weights are looked at each time. Its other files are looked at when the folder itself has
    changed, as it does when a file is replaced, added or removed, and after `look_again`: it would take as long again
    to look at all of them each time.
    """
    if not os.path.isabs(model) or model.endswith(GGUF_SUFFIX):
        return _model_signature(model)
    try:
        folder = os.stat(model)
    except OSError:
        return _model_signature(model)
    looked_at, others = _model_folder(model, folder.st_mtime_ns, folder.st_ino)
    return _stats(looked_at), others


def look_again() -> None:
    """Have all files of local models be looked at once more, at the next request for each: some may be written to."""
    _model_folder.cache_clear()


@lru_cache(maxsize=256)
def _model_folder(model: str, mtime_ns: int, inode: int) -> tuple[tuple[str, ...], _Signature]:
    """The files to look at each time, and the state that all others were in when the folder changed."""
    looked_at = (f"{model}/config.json", *_files(model, _WEIGHTS, mtime_ns, inode))
    return looked_at, _stats(_files(model, _MODEL_FILES, mtime_ns, inode))


def _adapter_signature(folder: str) -> _Signature:
    """The state of the files that an adapter is loaded from."""
    return _stats(_listed(folder, _IDENTITY_FILES))


def _listed(folder: str, names: re.Pattern[str]) -> tuple[str, ...]:
    """The paths of a folder's files of such names; none if there is no such folder."""
    try:
        listed = os.stat(folder)
        return _files(folder, names, listed.st_mtime_ns, listed.st_ino)
    except OSError:
        return ()


def _stats(paths: tuple[str, ...]) -> _Signature:
    signature = []
    for path in paths:
        try:
            st = os.stat(path)
        except OSError:
            signature.append((0, 0, 0, 0))
        else:
            signature.append((st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino))
    return tuple(signature)


_TEMPLATES: Final = "additional_chat_templates"
"""The folder inside of a tokenizer's where transformers puts chat templates that have names."""


@lru_cache(maxsize=256)
def _files(folder: str, names: re.Pattern[str], _mtime_ns: int, _inode: int) -> tuple[str, ...]:
    """They are the same until the folder's modification time changes."""
    with os.scandir(folder) as entries:
        found = [e.path for e in entries if e.is_file() and names.fullmatch(e.name)]
    return (*sorted(found), *sorted(str(path) for path in Path(folder, _TEMPLATES).glob("*.jinja")))


_MOST_DIGESTED: Final = 2**30
"""Bytes, which take a second or two; most adapters have far less."""


@lru_cache(maxsize=256)
def _file_digest(path: str, signature: _Signature) -> str:
    """A digest of a file's content, which is read again only when its signature has changed.

    For a file that takes long to read, the signature itself stands, as for the files of a model.
    """
    if any(size > _MOST_DIGESTED for size, *_ in signature):
        return str(signature)
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unreadable"


@lru_cache(maxsize=256)
def _adapter_digest(folder: str, signature: _Signature) -> str | None:
    """A digest of the contents of an adapter's files; they are read again only when their signature has changed."""
    if not signature:
        return None
    digest = hashlib.sha256()
    for path in _listed(folder, _IDENTITY_FILES):
        digest.update(f"{os.path.basename(path)}\0{_file_digest(path, _stats((path,)))}".encode())
    return digest.hexdigest()
