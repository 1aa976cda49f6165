"""Check from files alone whether an adapter fits a base: the task of any, and LoRA's modules and sizes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.peft_adapter import CONFIG, NAME, ROOT
from pytest_sway.errors import AdapterMismatchError
from pytest_sway.spec.tasks import OF_PEFT, is_causal
from pytest_sway.system.wording import shown, some

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

BODIES: Final = ("model.language_model.", "language_model.model.", "model.text_model.", "language_model.", "model.")
"""Where classes of transformers have their text model, without its output layer; the longest names first.

It is ``model.layers`` in a causal language model, and in the multimodal class of some types before transformers 4.52;
``model.language_model.layers`` in a multimodal class; and ``language_model.model.layers`` in most of these before 4.52.
"""
HEADS: Final = ("language_model.lm_head.", "lm_head.", "embed_out.")
"""Where they have its output layer; the last one is GPT-NeoX's before transformers 5."""

# Types of models whose files name tensors as the loaded model does. Others rename, split or fuse them on loading.
_NAMED_AS_LOADED: Final = frozenset(
    {"gemma", "gemma2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
)
_FACTOR: Final = re.compile(re.escape(ROOT) + rf"(.+)\.lora_([AB])(?:\.{NAME})?\.weight")

_CLASSIFIER: Final = re.compile(r"base_model\.model\.(score|(pre_)?classifier|classification_head|qa_outputs|v_head)\.")


def require_task(files: AdapterFiles, kind: str, task: str | None) -> None:
    """Raise if an adapter was certainly trained for a head that the spec's models do not have.

    Args:
        files: The adapter's files.
        kind: The spec's kind.
        task: The resolved spec's task.

    Raises:
        AdapterMismatchError: It was, or for a task that PEFT does not have.
    """
    trained: Any = files.config.get("task_type")
    if trained not in (None, *OF_PEFT):
        raise AdapterMismatchError(
            f"the adapter {str(files.folder)!r} was trained for the task {trained[:80]} (task_type in its {CONFIG}),"
            f" which PEFT does not have. Its tasks are {', '.join(OF_PEFT)}."
        )
    if not is_causal(task):
        return
    if trained not in (None, "CAUSAL_LM"):
        other = OF_PEFT[trained]
        advice = f"Leave 'task' out of the spec, or write task={other!r}."
        if kind != "hf":
            advice = f"Name an adapter whose task_type is CAUSAL_LM, or use kind='hf', which has task={other!r}."
        raise AdapterMismatchError(
            f"the adapter {str(files.folder)!r} was trained for the task {trained} (task_type in its {CONFIG}), but the"
            f" spec's models are causal language models. {advice}"
        )
    head = next((name for name in files.entries or () if _CLASSIFIER.match(name)), None)
    if trained is None and head is not None:
        raise AdapterMismatchError(
            f"the adapter {str(files.folder)!r} has the head of a classifier ({shown(head)}), and its {CONFIG} has no"
            " task_type, so it is put on a causal language model. Write task='classification', or another task, in the"
            " spec, or name an adapter that was trained on a language model."
        )


def check_fit(spec: ModelSpec, files: AdapterFiles, base: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> None:
    """Raise if the adapter certainly does not fit. The load finds what headers can't tell.

    Args:
        spec: The spec.
        files: The adapter's files.
        base: The tensors of the base's files, by name.
        config: The base's ``config.json``.

    Raises:
        AdapterMismatchError: Modules that the adapter changes are missing in the base, or have other sizes.
    """
    if files.peft_type != "LORA" or files.entries is None or config.get("quantization_config"):
        return
    factors = list(_factors(files.entries))
    if (
        config.get("model_type") in _NAMED_AS_LOADED
        and is_causal(spec.task)
        and any(name.startswith("model.layers.") for name in base)
        and not files.config.get("layer_replication")  # this renumbers the layers
    ):
        changed = {module for module, _, _ in factors if not f"{module}.".startswith(HEADS)}
        missing = sorted(m for m in changed if not {f"{m}.weight", f"{_in_causal_model(m)}.weight"} & base.keys())
        if missing:
            raise AdapterMismatchError(
                f"the adapter {str(files.folder)!r} does not fit the base {spec.base!r}: {len(missing)} of the"
                f" {len({m for m, _, _ in factors})} modules that its tensors change are not in the base"
                f" ({some(missing)}). Name the base that it was trained on."
            )
    if files.config.get("use_bdlora"):
        return  # its matrices are blocks, smaller than the base's
    text = config.get("text_config")
    words = [each.get("vocab_size") for each in (config, text) if isinstance(each, dict)]
    wrong = sorted(set(_of_other_size(factors, base, words)))
    if wrong:
        raise AdapterMismatchError(
            f"the adapter {str(files.folder)!r} does not fit the base {spec.base!r}: {len(wrong)} of its tensors have"
            f" other sizes than the base's modules ({some(wrong)}). Name the base that it was trained on."
        )


def _in_causal_model(module: str) -> str:
    """Return the name that a module of a text model has in a causal language model."""
    body = next((body for body in BODIES if module.startswith(body)), None)
    return module if body is None else f"model.{module.removeprefix(body)}"


def _factors(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, str, TensorEntry]]:
    for name, entry in entries.items():
        match = _FACTOR.fullmatch(name)
        if match and len(entry.shape) == 2:
            yield match[1], match[2], entry


def _of_other_size(
    factors: list[tuple[str, str, TensorEntry]], base: Mapping[str, TensorEntry], words: Collection[Any]
) -> Iterator[str]:
    for module, letter, entry in factors:
        weight = base.get(f"{module}.weight")
        if weight is None or not weight.floating or len(weight.shape) != 2:
            continue
        if letter == "B" and weight.shape[0] in words:
            continue  # the output layer is resized to the adapter's vocabulary
        size = entry.shape[1] if letter == "A" else entry.shape[0]
        # GPT-2's layers store their weights transposed, so either side may match
        if size not in weight.shape:
            yield f"{module}.lora_{letter} is for {size} features, the base has {' x '.join(map(str, weight.shape))}"
