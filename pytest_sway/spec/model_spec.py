"""`ModelSpec`, an immutable description of what to load."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from pytest_sway.errors import SpecError
from pytest_sway.spec.endpoints import normal_endpoint
from pytest_sway.spec.hub_names import adapter_label, in_subfolder, is_elsewhere, is_on_hub, normal_address, taken_apart
from pytest_sway.spec.kinds import KINDS, ON_HUBS
from pytest_sway.spec.model_kwargs import canonical, form_of, in_short
from pytest_sway.spec.paths import begins_as_path, is_path, resolved_model, resolved_path, short_name
from pytest_sway.spec.tasks import TaskName, checked_task
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from collections.abc import Iterable

__tracebackhide__ = True

Dtype = Literal["auto", "fp16", "bf16", "fp32"]

DTYPES: Final = ("auto", "fp16", "bf16", "fp32")
_DTYPE_ALIASES: Final = {
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float": "fp32",
}
_DEVICE: Final = re.compile(r"(auto|[a-z]+(:\d+)?)")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_MODELS: Final = ("base", "finetuned", "adapter")
_OF_REPOSITORIES: Final = ("revision", "adapter_revision", "adapter_subfolder")
_ENDPOINTS: Final = ("endpoint", "finetuned_endpoint")
_ALWAYS_SHOWN: Final = ("kind", "base", "device", "dtype")
_ENTRY_POINT: Final = re.compile(r"[^\d\W][\w.]*:[^\d\W][\w.]*")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """An immutable description of a base model and its fine-tuned side, checked on creation.

    Fields that dlm-sway's ``ModelSpec`` has too keep their names and meanings.

    Attributes:
        kind: The kind of backend: ``hf``, ``mlx``, ``api``, ``dummy`` or ``custom``.
        base: A hub id (``org/name``) or a model's folder, which is made absolute. For ``kind="api"``, the model's name
            on its server; for ``kind="custom"``, a name that the class knows is kept. Empty for the base that the
            adapter names.
        adapter: The folder of a PEFT adapter, made absolute. For kinds ``hf`` and ``mlx`` also a hub id, as text, if
            there is no such folder; for ``kind="custom"`` also an address, as text. For ``kind="hf"`` also a list of
            these, kept as a tuple: all but the last are merged into the base in this order, and the last is put on. A
            list of one is its only adapter. ``None`` for the base alone.
        dtype: ``auto``, ``fp16``, ``bf16`` or ``fp32``. torch's names, such as ``bfloat16``, work too.
        device: ``auto``, or a torch device such as ``cpu`` or ``cuda:0``.
        trust_remote_code: Run the code in the base's repository. Not part of the cache key.
        revision: The commit, branch or tag of a base on a hub.
        entry_point: ``package.module:Class``, for ``kind="custom"``.
        endpoint: The server's address, for ``kind="api"``.
        allow_pickle: Read weights that exist only as pickle files, which can run code while they load.
        finetuned: A whole fine-tuned model, named as ``base`` is. For ``kind="hf"``, an ``adapter`` beside it is put on
            this model instead of the base.
        answers: For ``kind="dummy"``, its answers (see `pytest_sway.spec.answers`): a mapping, which is kept as JSON
            text, or the path of a JSON or TOML file.
        finetuned_endpoint: For ``kind="api"``, the address of the server of ``finetuned``; ``None`` for the base's.
        api_key_env: For ``kind="api"``, the name of the environment variable that holds the key; never the key itself.
        timeout: For ``kind="api"``, the most seconds that the server may take for one answer.
        adapter_revision: The commit, branch or tag of an adapter on a hub.
        adapter_subfolder: The folder of the adapter in its repository, or in the folder ``adapter``.
        model_kwargs: For ``kind="hf"``, further arguments of transformers' ``from_pretrained``: a mapping of plain
            values, which is kept as JSON text.
        finetuned_model_kwargs: The same for ``finetuned``; ``None`` for the base's.
        task: For ``kind="hf"``, which head the models have: ``causal``, ``seq2seq``, ``classification``,
            ``embeddings``, ``token_classification`` or ``question_answering``. ``None`` for what the last adapter's
            ``task_type`` says, and for ``causal`` without an adapter.

    Raises:
        SpecError: A field has an invalid value.
    """

    kind: str = "hf"
    base: str = ""
    adapter: Path | str | tuple[Path | str, ...] | None = None
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
    adapter_revision: str | None = None
    adapter_subfolder: str | None = None
    model_kwargs: Mapping[str, Any] | str | None = None
    finetuned_model_kwargs: Mapping[str, Any] | str | None = None
    task: TaskName | None = None
    _label: str = field(init=False, repr=False, compare=False)
    _seen: Any = field(init=False, repr=False, compare=False, default=None)
    """The state of the adapter's files, kept by `identity.look_at_adapter` for the next key."""

    def __post_init__(self) -> None:
        self._check()
        self._set("_label", self.described())

    def __hash__(self) -> int:
        return hash((self.base, self.adapter))  # tells most specs apart; all fields would take 1 us

    def _check(self) -> None:
        self._set("kind", _kind(self.kind))
        self._set("task", checked_task(self.task, self.kind))
        self._set("dtype", _dtype(self.dtype))
        for name in ("trust_remote_code", "allow_pickle"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"spec field {name!r} must be true or false, not {getattr(self, name)!r}.")
        self._set("adapter", _only(self.adapter))
        self._set_all(taken_apart({name: getattr(self, name) for name in ("kind", *_MODELS, *_OF_REPOSITORIES)}))
        for name in ("entry_point", *_OF_REPOSITORIES, *_ENDPOINTS):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise SpecError(f"spec field {name!r} must be a non-empty string or None, not {value!r}.")
            if value is not None and name in _ENDPOINTS:
                self._set(name, normal_endpoint(name, value))
        if self.api_key_env is not None and not _is_variable(self.api_key_env):  # don't show it: it may be the key
            raise SpecError(
                "spec field 'api_key_env' must be the name of an environment variable, such as 'SWAY_API_KEY', or None."
                " Put the key itself into that variable."
            )
        self._set("timeout", _seconds("timeout", self.timeout))
        _require_device(self.device)
        adapter = _adapters(self.adapter, self.kind)
        self._set_all(in_subfolder(adapter, self.adapter_revision, self.adapter_subfolder))
        may_be_named = self.adapter is not None and self.finetuned is None  # else the adapter is not of the base
        self._set("base", _model("base", self.base, self.kind, may_be_named=may_be_named))
        if self.finetuned is not None:
            self._set("finetuned", _model("finetuned", self.finetuned, self.kind))
            if self.adapter is not None and self.kind != "hf":
                raise SpecError(
                    f"a spec of kind {self.kind!r} has either an adapter or a whole fine-tuned model, not both; found"
                    f" adapter {str(self.adapter)!r} and finetuned {self.finetuned!r}. To test an adapter on a"
                    " fine-tuned model, name that model as 'base', or use kind='hf'."
                )
        self._set("answers", _answers(self.answers, self.kind))
        self._set("model_kwargs", _model_kwargs("model_kwargs", self.model_kwargs, self.kind))
        theirs = _model_kwargs("finetuned_model_kwargs", self.finetuned_model_kwargs, self.kind)
        self._set("finetuned_model_kwargs", theirs)
        if self.kind == "custom" and not _ENTRY_POINT.fullmatch(self.entry_point or ""):
            raise SpecError(
                "a spec of kind 'custom' needs entry_point='package.module:Class', the class to build;"
                f" found {self.entry_point!r}."
            )
        if self.kind == "api" and self.endpoint is None:
            raise SpecError("a spec of kind 'api' needs endpoint=, the address of the server.")
        if self.finetuned is None:
            self._require_nothing_of_finetuned()

    def _require_nothing_of_finetuned(self) -> None:
        if self.finetuned_endpoint is not None:
            raise SpecError("a spec with 'finetuned_endpoint' needs 'finetuned', the model's name on that server.")
        if self.finetuned_model_kwargs is not None:
            raise SpecError("a spec with 'finetuned_model_kwargs' needs 'finetuned', which is loaded with them.")

    def on_base_of_adapter(self, base: str, revision: str | None) -> ModelSpec:
        """Return this spec, which leaves out the base, on the one that its adapter names; the label says so."""
        spec = replace(self, base=base, revision=revision)
        spec._set("_label", spec.described(" (from adapter_config.json)"))
        return spec

    def _set_all(self, values: Mapping[str, object]) -> None:
        for name, value in values.items():
            self._set(name, value)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __str__(self) -> str:
        """Return a short label: the kind unless it is ``hf``, the base, and the adapter or the fine-tuned model."""
        return self._label

    @property
    def adapters(self) -> tuple[Path | str, ...]:
        """All adapters: those that are merged, in order, then the one that is put on."""
        if self.adapter is None:
            return ()
        return self.adapter if isinstance(self.adapter, tuple) else (self.adapter,)

    def as_dict(self) -> dict[str, Any]:
        """What it is loaded from, as plain values: kind, base, device and dtype, and what else is not the default."""
        return {
            each.name: _plain(value)
            for each in fields(self)
            if each.init and ((value := getattr(self, each.name)) != each.default or each.name in _ALWAYS_SHOWN)
        }

    def described(self, origin: str = "", names: Mapping[str, str] = MappingProxyType({})) -> str:
        """Return a label.

        Args:
            origin: What is said behind the base's name.
            names: Other names for some models, by their resolved paths.
        """
        kind = "" if self.kind == "hf" else f"{self.kind}:"
        labels = [
            names.get(str(each)) or adapter_label(each, self.adapter_revision, self.adapter_subfolder)
            for each in self.adapters
        ]
        if not self.base:
            return f"{kind}{' + '.join(labels)}{in_short(self.model_kwargs, self.task)}"
        theirs = self.model_kwargs if self.finetuned_model_kwargs is None else self.finetuned_model_kwargs
        tuned = "" if self.finetuned is None else names.get(self.finetuned) or short_name(self.finetuned)
        finetuned = f" -> {tuned}{in_short(theirs)}" if tuned else ""
        base = f"{kind}{names.get(self.base) or short_name(self.base)}{in_short(self.model_kwargs, self.task)}"
        return " + ".join((f"{base}{origin}{finetuned}", *labels))


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(map(str, value))
    return str(value) if isinstance(value, Path) else value


def _one_of(name: str, value: object, valid: Iterable[str], *, hint: str = "") -> str:
    valid = tuple(valid)
    if value not in valid:
        raise SpecError(f"spec field {name!r} must be one of {', '.join(valid)}; found {value!r}.{hint}")
    return str(value)


def _kind(value: object) -> str:
    if value in ("peft", "transformers", "lora"):
        raise SpecError(f"spec field 'kind' is 'hf' for transformers and PEFT, not {value!r}.")
    return _one_of("kind", value, tuple(KINDS))


def _require_device(value: object) -> None:
    if (type(value).__module__, type(value).__name__) == ("torch", "device"):
        raise SpecError(f"spec field 'device' is a text: write {str(value)!r}, not torch.{value!r}.")
    if not isinstance(value, str) or not _DEVICE.fullmatch(value):
        raise SpecError(
            f"spec field 'device' must be 'auto' or a torch device such as 'cpu' or 'cuda:0', not {value!r}."
        )


def _dtype(value: object) -> str:
    name = str(value).removeprefix("torch.")
    if type(value).__module__ == "torch" and name in _DTYPE_ALIASES:
        raise SpecError(f"spec field 'dtype' is a text: write {name!r}, not torch.{name}.")
    if not isinstance(value, str):
        return _one_of("dtype", value, DTYPES)
    form = form_of(value)
    return _one_of("dtype", _DTYPE_ALIASES.get(name, value), DTYPES, hint="" if form is None else f" {form}")


def _is_variable(value: object) -> bool:
    """Whether it looks like a variable's name, not like a key that was put here by mistake."""
    return isinstance(value, str) and bool(_VARIABLE.fullmatch(value)) and (value.isupper() or value in os.environ)


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < sys.float_info.max:
        raise SpecError(f"spec field {name!r} must be a number of seconds above 0; found {value!r}.")
    return float(value)


def _model(field: str, value: object, kind: str, *, may_be_named: bool = False) -> str:
    if value in (None, "") and may_be_named and kind in ON_HUBS:
        return ""
    if isinstance(value, os.PathLike):
        return str(resolved_model(value))
    if not isinstance(value, str) or not value.strip():
        needs = "a spec needs 'base'," if field == "base" else f"spec field {field!r} must be"
        raise SpecError(f"{needs} a hub id or the folder of a model; found {shown(value)}.")
    if kind in ("api", "dummy"):  # a name, even if it looks like a path
        return value
    if kind == "custom":  # whose class may know other names than a hub's
        is_local = begins_as_path(value) or os.path.exists(value)
    else:
        is_local = is_path(value) or Path(value).is_dir()
    return str(resolved_model(value)) if is_local else value


def _adapters(value: object, kind: str) -> Path | str | tuple[Path | str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        return _adapter(value, kind)
    if not value:
        raise SpecError("spec field 'adapter' is an empty list. Name the adapters in it, or None for the base alone.")
    if len(value) > 1 and kind != "hf":
        raise SpecError(
            f"a spec of kind {kind!r} takes no list of adapters, since only kind='hf' merges them. Merge them yourself"
            " (PEFT's merge_and_unload), and name the merged model."
        )
    return tuple(_adapter(normal_address("adapter", each), kind) for each in value)


def _only(value: object) -> object:
    """Return the only adapter of a list of one, so that the other fields are about it; other values as they are."""
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str | os.PathLike):
        return value[0]
    return value


def _adapter(value: object, kind: str) -> Path | str:
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        raise SpecError(
            "spec field 'adapter' must be the folder of a PEFT adapter, a hub id, a list of these or None; found"
            f" {value!r}."
        )
    if isinstance(value, str) and (is_elsewhere(value) if kind == "custom" else kind in ON_HUBS and is_on_hub(value)):
        return value
    return resolved_path(value)


def _model_kwargs(field: str, value: object, kind: str) -> str | None:
    if value is None:
        return None
    if kind != "hf":
        raise SpecError(
            f"spec field {field!r} is for kind='hf', whose models transformers loads; found it with kind={kind!r}."
        )
    kept = canonical(field, value)
    return None if kept == "{}" and field == "model_kwargs" else kept  # for 'finetuned', none is not the base's


def _answers(value: object, kind: str) -> str | Path | None:
    if value is None:
        return None
    if kind != "dummy":
        raise SpecError(f"spec field 'answers' is for kind='dummy', which has no model; found it with kind={kind!r}.")
    from pytest_sway.spec import answers

    if isinstance(value, Mapping) or (isinstance(value, str) and value.lstrip().startswith("{")):
        return answers.canonical(value)
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        raise SpecError(
            f"spec field 'answers' must be a mapping, or the path of a JSON or TOML file of one; found {value!r}."
        )
    return resolved_path(value)
