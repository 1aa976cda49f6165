"""The classes of transformers for each task, and what a model computes whatever its head is."""

from __future__ import annotations

import inspect
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.backends.checkpoints.hub_files import base_file, config_of
from pytest_sway.backends.checkpoints.sizes import base_entries
from pytest_sway.backends.hf.loading.classes import text_class, why_no_text
from pytest_sway.backends.hf.loading.libraries import seeded
from pytest_sway.backends.hf.loading.pickles import names_in_base
from pytest_sway.errors import SpecError
from pytest_sway.spec.tasks import CAUSAL, TASKS
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from contextlib import AbstractContextManager

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


class _Auto(NamedTuple):
    """The names of transformers' auto class of a task, and of its mapping from configs to classes."""

    name: str
    mapping: str


_AUTO: Final = {
    "causal": _Auto("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "seq2seq": _Auto("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    "classification": _Auto("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    "embeddings": _Auto("AutoModel", "MODEL_MAPPING"),
    "token_classification": _Auto("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"),
    "question_answering": _Auto("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING"),
}
CLASSES: Final[Mapping[str, str]] = {
    "classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
"""How the classes of transformers end that have a head of their own beside the body, by task."""

_ENCODERS: Final = _Auto("AutoModelForTextEncoding", "MODEL_FOR_TEXT_ENCODING_MAPPING")
_WITH_DECODERS: Final = ("t5", "mt5", "umt5")
"""Types of models that embed texts by their encoder alone."""

_DECODED: Final = "decoder_input_ids"
"""The argument of a model with a decoder beside an encoder."""

_POOLER: Final = "pooler."
"""Part of the names of a layer that encoders are often saved without; no embedding here needs it."""


def auto_class(spec: ModelSpec, config: Mapping[str, Any]) -> Any:
    """Return the auto class of transformers that loads a spec's models.

    Args:
        spec: The resolved spec.
        config: The fields of the model's ``config.json``.
    """
    import transformers

    if (spec.task or CAUSAL) == CAUSAL:
        return text_class(config, trust_remote_code=spec.trust_remote_code)
    return getattr(transformers, _auto_of(spec).name)


def require_type(spec: ModelSpec) -> None:
    """Raise if a base's config names a type without a class for the spec's task. A config on the hub is not fetched.

    Raises:
        SpecError: transformers does not know the type, or has no such class for it.
    """
    import transformers

    config, path = config_of(spec), base_file(spec, "config.json")
    known: Any = transformers.CONFIG_MAPPING
    kind = config.get("model_type")
    if kind is None or (config.get("auto_map") and spec.trust_remote_code):
        return
    if not isinstance(kind, str) or kind not in known:
        raise SpecError(
            f"{str(path)!r} has model_type = {shown(kind)}, which the installed transformers"
            f" {transformers.__version__} does not know. Upgrade transformers, or save the model again."
        )
    what, other = what_is_loaded(spec), other_task(spec, config)
    if (spec.task or CAUSAL) == CAUSAL:
        why = why_no_text(config)
    elif known[kind] not in getattr(transformers, _auto_of(spec).mapping):
        why = f"has model_type = {kind!r}, and transformers has no {what} of that type"
    elif spec.task == "seq2seq" and not _has_decoder(known[kind]):
        why = f"has model_type = {kind!r}, whose models have no decoder beside an encoder of texts"
    else:
        why = ""
    if why:
        further = f": {other}. Change the task, or name" if other else ". Name"
        raise SpecError(f"{str(path)!r} {why}{further} the folder of a {what}.")


def task_of(config: Mapping[str, Any]) -> str | None:
    """Return the task whose class a model's config names in its ``architectures``; ``None`` if there is none."""
    import transformers

    said, known = config.get("architectures"), transformers.CONFIG_MAPPING
    kind: Any = config.get("model_type")
    if not isinstance(said, list) or kind not in known:
        return None
    for task, auto in _AUTO.items():
        mapping: Any = getattr(transformers, auto.mapping)
        made: Any = mapping.get(known[kind], ())
        if not {each.__name__ for each in (made if isinstance(made, tuple) else (made,))} & set(map(str, said)):
            continue
        if task != "seq2seq" or _has_decoder(known[kind]):
            return task
        return None if why_no_text(config) else CAUSAL
    return None


def _has_decoder(config_class: Any) -> bool:
    """Return whether transformers' "sequence-to-sequence" model of a type is one; it lists some models of sounds so."""
    import transformers

    classes: Any = transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    return _DECODED in inspect.signature(classes[config_class].forward).parameters


def _auto_of(spec: ModelSpec) -> _Auto:
    if spec.task != "embeddings":
        return _AUTO[spec.task or CAUSAL]
    config = config_of(spec)
    return _ENCODERS if config.get("model_type") in _WITH_DECODERS or _is_encoder(config) else _AUTO["embeddings"]


def _is_encoder(config: Mapping[str, Any]) -> bool:
    """Return whether a model's config names the class of an encoder, which may be half of its type's own class."""
    import transformers

    known: Any = transformers.CONFIG_MAPPING
    encoders: Any = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    kind, named = config.get("model_type"), config.get("architectures")
    if not isinstance(named, list) or not isinstance(kind, str) or kind not in known or known[kind] not in encoders:
        return False
    return encoders[known[kind]].__name__ in named


def what_is_loaded(spec: ModelSpec) -> str:
    """Return what a model of a spec's task is called in messages, without its article."""
    return TASKS[spec.task or CAUSAL].what.partition(" ")[2]


def other_task(spec: ModelSpec, config: Mapping[str, Any]) -> str:
    """Return a clause that names the task of a model's own class; empty if it is the spec's, or unknown.

    Args:
        spec: The resolved spec.
        config: The model's ``config.json``.
    """
    task = task_of(config)
    if task in (None, spec.task or CAUSAL):
        return ""
    return f"its config.json names {config['architectures'][0]}, which is loaded with task={task!r}"


# --- weights that the files of a base may lack -----------------------------------------------------------------------


def same_noise(spec: ModelSpec) -> AbstractContextManager[None]:
    """Let transformers fill weights that a base's files lack with the same noise at each load."""
    import torch

    return seeded(torch.device("cpu")) if _may_lack(spec) else nullcontext()


def needed(spec: ModelSpec, model: Any, missing: Collection[str]) -> list[str]:
    """Return those of the weights that a load did not find which the base's files may not lack.

    They may lack a head of their own, which an adapter brings, and a pooler.
    """
    if not _may_lack(spec) or (spec.task in CLASSES and stored_names(spec) is None):
        return list(missing)
    own = _head_of(spec, model)
    return [name for name in missing if name not in own]


def lacking(spec: ModelSpec, model: Any) -> frozenset[str]:
    """Return the names of a loaded head's weights that the base's files lack, so that they are noise."""
    stored = stored_names(spec) if spec.task in CLASSES else None
    if stored is None:
        return frozenset()
    return frozenset(name for name in _head_of(spec, model) if not _stored(name, stored))


def _may_lack(spec: ModelSpec) -> bool:
    return spec.task == "embeddings" or spec.task in CLASSES


def _head_of(spec: ModelSpec, model: Any) -> set[str]:
    """The names of the weights of a model's head and pooler."""
    body = model.base_model_prefix
    apart = spec.task in CLASSES and bool(body) and hasattr(model, body)
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return {name for name in names if _POOLER in name or (apart and not name.startswith(f"{body}."))}


def stored_names(spec: ModelSpec) -> Collection[str] | None:
    """Return the names of the weights in a base's files; ``None`` if none that the spec allows are on this machine."""
    entries = base_entries(spec)
    if entries is not None:
        return entries
    return names_in_base(spec) if spec.allow_pickle else None


def _stored(name: str, names: Collection[str]) -> bool:
    """Whether a file has a weight, with the name of its body before it or not."""
    return name in names or any(each.endswith(f".{name}") or name.endswith(f".{each}") for each in names)


# --- what a model computes -------------------------------------------------------------------------------------------


def numbers(model: Any, ids: Sequence[int], called: Any = None) -> Any:
    """Return the first thing that a model computes for one text: logits, or hidden states.

    Args:
        model: The Hugging Face model.
        ids: Token ids of the text.
        called: What to call: the ``PeftModel`` around the model, or the model itself by default.

    Returns:
        Shape ``(positions, numbers)``, or ``(1, numbers)`` where there is one answer for a text.
    """
    import torch

    further: dict[str, Any] = {}
    taken = inspect.signature(model.forward).parameters
    if _DECODED in taken:
        prompts = getattr(getattr(called, "active_peft_config", None), "is_prompt_learning", False)
        if "use_cache" in taken and not prompts:
            further["use_cache"] = False  # with a cache, FSMT's decoder sees later tokens, or fails
        ids = _ended(model, ids)
        if model.can_generate():  # other models make their decoder's input of the text
            further[_DECODED] = torch.tensor([list(ids)], device=model.device)
    output = (model if called is None else called)(input_ids=torch.tensor([list(ids)], device=model.device), **further)
    first = output.logits if hasattr(output, "logits") else output[0]
    return first[0].unsqueeze(-1) if first.dim() == 2 and hasattr(output, "end_logits") else first.flatten(0, -2)


def needs_another_text(model: Any, ids: Sequence[int]) -> bool:
    """Return whether a model that does not run with one text runs if its decoder is given one, too."""
    import torch

    if _DECODED not in inspect.signature(model.forward).parameters or model.can_generate():
        return False
    text = torch.tensor([list(_ended(model, ids))], device=model.device)
    with suppress(Exception):  # an unknown architecture may raise anything
        model(input_ids=text, use_cache=False, **{_DECODED: text})
        return True
    return False


def _ended(model: Any, ids: Sequence[int]) -> Sequence[int]:
    """Return a text with the model's end token, where a classifier such as BART's reads its answer."""
    end = model.config.eos_token_id
    return (*ids, end) if isinstance(end, int) and end not in ids else ids
