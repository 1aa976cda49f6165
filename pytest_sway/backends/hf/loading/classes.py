"""Chooses the class of transformers that loads a base.

A base is loaded by the class that its config.json names (``architectures``), if that is a causal language model or a
multimodal model, which takes images or sounds besides text. Some types have both: ``Qwen3_5ForCausalLM`` loads the text
model alone from the files of ``Qwen3_5ForConditionalGeneration``. If the config names neither, the causal language
model of its type comes first.

Llama 4 is loaded as its text model: its multimodal class in transformers 5.24 fails for text.

A multimodal model is asked about text alone. Its other parts, such as a vision tower, are loaded and shared like all
weights, and compute nothing. No list says which of these models give logits for token ids alone: `verify_base` tries it
once the model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.sharing.trees import modules_of
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__tracebackhide__ = True

_WAYS: Final = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
    ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),  # sounds, too; since transformers 5
)
"""transformers' functions that load a model that writes text, and the classes that each chooses from."""
_AS_TEXT: Final = frozenset({"Llama4ForConditionalGeneration"})
"""Multimodal classes that their type's causal language model replaces."""
_OF_SPEECH: Final = "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"


def text_class(config: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
    """Return the ``AutoModel...`` that loads the model of a ``config.json``.

    Args:
        config: Its fields.
        trust_remote_code: Whether the base's own code may run.
    """
    import transformers

    own = config.get("auto_map") if trust_remote_code else None
    if isinstance(own, dict):
        names = [name for name, _ in _WAYS if name in own]
    else:
        ways = dict(_ways(config.get("model_type")))
        named = _architectures(config)
        names = [name for name, classes in ways.items() if classes & named - _AS_TEXT] or list(ways)
    return getattr(transformers, names[0] if names else "AutoModelForCausalLM")


def why_no_text(config: Mapping[str, Any]) -> str:
    """Return a sentence on why transformers has no class that writes text for a ``config.json``; empty if it has one.

    Args:
        config: Its fields, with a ``model_type`` that transformers knows.
    """
    kind, named = config.get("model_type"), _architectures(config)
    ways = dict(_ways(kind))
    if not ways:
        return (
            f"has model_type = {kind!r}, and transformers has no causal language model of that type, nor a multimodal"
            " model that writes text: it may be an encoder, or a model of images or sounds alone"
        )
    speech = _class_names(str(kind), _OF_SPEECH) & named
    if speech and not any(classes & speech for classes in ways.values()):
        named_first = shown(config["architectures"])
        return f"has architectures = {named_first}, a model that writes down speech and takes no text alone"
    return ""


def has_parts(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is of a type with a text model as one of its parts."""
    import transformers

    known: Any = transformers.CONFIG_MAPPING
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in known and "text_config" in (known[kind].sub_configs or ())


def is_multimodal(model: Any) -> bool:
    """Return whether a loaded model has a text model as one of its parts."""
    return model.config.get_text_config() is not model.config


def text_parts(model: Any) -> tuple[str, ...]:
    """Return how the names in a multimodal model's text model and output layer begin; empty if that is unknown.

    Args:
        model: A loaded model; for one that is not multimodal the result is empty.
    """
    config = model.config
    if "text_config" not in (config.sub_configs or ()) or getattr(config, "is_encoder_decoder", False):
        return ()
    names = {id(module): name for name, module in modules_of(model)}
    try:
        first, head = (names.get(id(each)) for each in (model.get_input_embeddings(), model.get_output_embeddings()))
    except (AttributeError, NotImplementedError):  # a model with its own code may not name them
        return ()
    kind = config.get_text_config().model_type
    configs = {name: getattr(module, "config", None) for name, module in modules_of(model) if name}
    around = [name for name, its in configs.items() if getattr(its, "model_type", None) == kind]
    body = min((name for name in around if f"{first}.".startswith(f"{name}.")), key=len, default="")
    return tuple(f"{part}." for part in (body, head) if part) if body else ()


def _ways(kind: object) -> Iterator[tuple[str, set[str]]]:
    """Yield each way in which transformers can load a type, with the names of the classes."""
    import transformers
    from transformers.models.auto import modeling_auto

    known: Any = transformers.CONFIG_MAPPING
    if not isinstance(kind, str) or kind not in known:
        return
    for name, table in _WAYS:
        registered = getattr(modeling_auto, table, ())
        if known[kind] in registered:
            yield name, _class_names(kind, f"{table}_NAMES")


def _class_names(kind: str, table: str) -> set[str]:
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, table, {}).get(kind, ())
    return {names} if isinstance(names, str) else set(names)


def _architectures(config: Mapping[str, Any]) -> set[str]:
    named = config.get("architectures")
    return {name for name in named if isinstance(name, str)} if isinstance(named, list) else set()
