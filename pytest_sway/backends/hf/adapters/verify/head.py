"""Find whether a model or its adapter brings all weights of a head, and for how many labels."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.hub_files import config_of
from pytest_sway.backends.checkpoints.peft_adapter import CONFIG, ROOT, read_adapter
from pytest_sway.backends.hf.loading.pickles import with_entries
from pytest_sway.backends.hf.loading.tasks import CLASSES, stored_names
from pytest_sway.errors import AdapterMismatchError, SwayError, WeightsError
from pytest_sway.spec.model_kwargs import as_mapping
from pytest_sway.spec.tasks import OF_PEFT
from pytest_sway.system.imports import import_apart
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.checkpoints.plan import ModelFiles
    from pytest_sway.backends.hf.model.base import LoadedBase
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_PREFIX: Final = r"(base_model\.(model\.)?)?"
"""What PEFT puts before a module's name; for prompts and prefixes, whose base is in no tuner, only the first part."""
_HEAD: Final = re.compile(rf"{_PREFIX}(score|(pre_)?classifier|classification_head|qa_outputs)\.")
_LAST_LAYER: Final = re.compile(rf"{_PREFIX}(score|classifier|(classifier|classification_head)\.out_proj)\.weight")
_DEFAULT_LABELS: Final = 2  # transformers' own


def with_labels(spec: ModelSpec) -> ModelSpec:
    """Return a spec that loads its base with as many labels as its adapter's head has.

    A base without a head does not say how many labels there are, and PEFT does not either. A base with a head of its
    own, and one whose ``model_kwargs`` say it, stay as they are.
    """
    kwargs = as_mapping(spec.model_kwargs)
    if spec.task not in CLASSES or spec.finetuned is not None or {"num_labels", "id2label"} & kwargs.keys():
        return spec
    with suppress(SwayError, ImportError):  # the checks tell what is wrong with the files, or missing
        labels = None
        for folder in spec.adapters:
            files = read_adapter(Path(folder), allow_pickle=spec.allow_pickle)
            if files.entries is None:
                import_apart("torch")
                files = with_entries(files)
            labels = _labels(files.entries or {}) or labels
        if labels is None or labels == _labels_of(config_of(spec)) or _has_head(stored_names(spec) or ()):
            return spec
        return replace(spec, model_kwargs=json.dumps({**kwargs, "num_labels": labels}))
    return spec


def require_head(base: ModelFiles, adapters: Sequence[AdapterFiles]) -> None:
    """Raise if neither a base nor any adapter of the spec can have the head that the spec's task needs.

    Raises:
        AdapterMismatchError: They cannot.
    """
    task = str(base.spec.task)
    classes = base.config.get("architectures")
    if not adapters or task not in CLASSES or base.entries is None or not isinstance(classes, list):
        return
    if any(CLASSES[task] in str(name) for name in classes) or _has_head(base.entries):
        return
    if any(files.entries is None or _has_head(files.entries) for files in adapters):
        return
    raise _no_head(base.spec, adapters[-1])


def require_whole_head(base: LoadedBase, files: AdapterFiles | None) -> None:
    """Raise if some of a head's weights are noise in the model that a backend tests.

    Args:
        base: What an adapter is put on, or the model itself.
        files: The adapter; ``None`` if there is none.

    Raises:
        WeightsError: They are, and there is no adapter.
        AdapterMismatchError: They are, and the adapter does not bring them.
    """
    brought = () if files is None else files.entries or ()
    left = {name for name in base.lacks if ROOT + name not in brought and f"base_model.{name}" not in brought}
    if not left:
        return
    if files is not None:
        raise _no_head(base.spec, files, some(left))
    raise WeightsError(
        f"the files of {base.spec.base!r} lack {len(left)} of the weights of its head for task={base.spec.task!r}"
        f" ({some(left)}), which would become noise. Name a model that was trained for that task, or an adapter that"
        " brings the head."
    )


def _no_head(base: ModelSpec, files: AdapterFiles, lacking: str = "") -> AdapterMismatchError:
    """Return the error for an adapter that does not bring the head that its base lacks.

    Args:
        base: The base's spec.
        files: The adapter's files.
        lacking: The names of weights that are in neither.
    """
    trained = files.config.get("task_type")
    why = f"task_type = {trained!r} in its {CONFIG}" if OF_PEFT.get(str(trained)) == base.task else "the spec"
    found = f" ({lacking})" if lacking else ""
    return AdapterMismatchError(
        f"the adapter {str(files.folder)!r} is put on a {CLASSES[str(base.task)]} model (task={base.task!r}, by {why}),"
        f" but neither it nor the base {base.base!r} has all weights of the head{found}, which would be noise. Name the"
        " base that has them, or save the adapter with the head in modules_to_save."
    )


def _has_head(names: Iterable[str]) -> bool:
    return any(_HEAD.match(name) for name in names)


def _labels(entries: Mapping[str, Any]) -> int | None:
    rows = [entry.shape[0] for name, entry in entries.items() if _LAST_LAYER.fullmatch(name) and len(entry.shape) == 2]
    return rows[0] if rows else None


def _labels_of(config: Mapping[str, Any]) -> int:
    names = config.get("id2label")
    said = config.get("num_labels")
    return len(names) if isinstance(names, dict) else said if isinstance(said, int) else _DEFAULT_LABELS
