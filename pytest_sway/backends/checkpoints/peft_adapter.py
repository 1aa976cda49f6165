"""Read an adapter's folder: its type, its tensors, and whether its base can be shared.

This needs neither torch nor PEFT, so it happens before anything is loaded or evicted.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pytest_sway.backends.checkpoints.bounds import require_own_tensors, require_types
from pytest_sway.backends.checkpoints.peft_types import (
    ADDITIVE_TYPES,
    LOCAL_LORA_FIELDS,
    PLAIN_INITIALISATIONS,
    PROMPT_TYPES,
    RESTORABLE_LORA_FIELDS,
    UNWRITING_LORA_FIELDS,
    UNWRITING_TYPES,
    WHOLE_TEXT_TYPES,
    refusal,
    unmergeable,
)
from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry, read_header
from pytest_sway.errors import SpecError, SwayWarning, WeightsError
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


__tracebackhide__ = True

T = TypeVar("T")

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PICKLED: Final = "adapter_model.bin"
OF_BASE: Final = (".base_layer.", ".original_module.")
"""Parts of the names that PEFT gives to the base's own tensors inside its layers."""

ROOT: Final = "base_model.model."
"""PEFT's prefix of the names of the base's modules."""
NAME: Final = "default"
"""PEFT's default name for an adapter."""

_WRAPPERS: Final = (
    re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."),
    re.compile(r"^(module)\."),
)
_ADAPTER: Final = re.compile(
    r"(?:(?<=\.lora_[AB])|(?<=\.lora_embedding_[AB])|(?<=\.lora_magnitude_vector))"
    r"\.(?!(?:default|weight|bias)(?:\.|$))([^.]{1,100})(?=\.(?:weight|bias)$|$)"
    r"|\.modules_to_save\.(?!default\.)([^.]{1,100})(?=\.)"
)
"""Matches the adapter's name in a LoRA tensor's, or in that of a module saved whole; PEFT itself reads its default name
in those of LoRA."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's folder, read but not loaded.

    Attributes:
        folder: The folder.
        config: Its ``adapter_config.json``.
        entries: Its tensors by PEFT's name, in the file's order; ``None`` where they exist only as a pickle.
        taken_out: Parts that the names have in the file, and not in PEFT.
        renamed: Other names of tensors in the loaded base, by PEFT's name.
    """

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry] | None
    taken_out: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    def named(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Return the tensors of its file by the names of `entries`."""
        return {self.renamed.get(name, name): tensor for name, tensor in with_peft_names(tensors).items()}

    @property
    def weights(self) -> Path:
        """The path of its safetensors file."""
        return self.folder / WEIGHTS

    @property
    def stored(self) -> Path:
        """The path of its weights' file, in whichever form they are there."""
        return self.weights if self.weights.is_file() else self.folder / PICKLED

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method, such as ``LORA``."""
        return str(self.config["peft_type"])

    @property
    def plain(self) -> bool:
        """Whether it is plain LoRA: it has only LoRA tensors, and loading it writes nothing to the base."""
        return self.peft_type == "LORA" and not self._special_fields() and self._brings_only("lora_")

    @property
    def additive(self) -> bool:
        """Whether it only adds to its base, so that the base is exact without it.

        An adapter with layers of the base's own does not: PEFT saves those if the vocabulary was changed.
        """
        if self.peft_type in PROMPT_TYPES:
            return True
        marker = ADDITIVE_TYPES.get(self.peft_type)
        if marker is None or self.config.get("bias", "none") != "none" or self._brings_any(*OF_BASE):
            return False
        if self.peft_type == "LORA" and not self._special_fields() <= RESTORABLE_LORA_FIELDS:
            return False
        return self._brings_only(
            marker, "token_adapter", "trainable_tokens", *(self.config.get("modules_to_save") or ())
        )

    @property
    def told_by_weights(self) -> bool:
        """Whether its weights alone show that it changes anything."""
        # With "orthogonal", two nonzero factors have a product of zero.
        return self.plain and self.config.get("init_lora_weights") != "orthogonal"

    @property
    def rewrites_targets(self) -> bool:
        """Whether loading it rewrites the base weights that it targets, as far as is known."""
        start = self.config.get("init_lora_weights")
        rewriting = isinstance(start, str) and start.startswith(("pissa", "olora"))
        return self.peft_type == "LORA" and (rewriting or self.config.get("kasa_config") is not None)

    @property
    def may_rewrite_anything(self) -> bool:
        """Whether loading it may write to any of the base's weights."""
        if self.peft_type == "LORA":
            return not self._special_fields() <= UNWRITING_LORA_FIELDS | {"init_lora_weights", "kasa_config"}
        return self.peft_type not in PROMPT_TYPES | UNWRITING_TYPES

    @property
    def through_inner_model(self) -> bool:
        """Whether its layers do all of its work, so that the model inside the ``PeftModel`` may be called directly."""
        if self.one_text_at_a_time:
            return False
        return self.peft_type in ADDITIVE_TYPES and self._special_fields() <= RESTORABLE_LORA_FIELDS

    @property
    def one_text_at_a_time(self) -> bool:
        """Whether its answer for a text depends on all other tokens in the same pass, padding included."""
        return self.peft_type in WHOLE_TEXT_TYPES or self._padding_may_invoke

    @property
    def looks_ahead(self) -> bool:
        """Whether a token may change the results of those before it: aLoRA starts at its last invocation."""
        return self.one_text_at_a_time or bool(self.config.get("alora_invocation_tokens"))

    @property
    def _padding_may_invoke(self) -> bool:
        """Whether the invocation of an aLoRA adapter may end in padding, which repeats a text's last token."""
        tokens = self.config.get("alora_invocation_tokens")
        return isinstance(tokens, list) and len(tokens) > 0 and tokens[-1] in (tokens[-2:-1] or tokens)

    def _special_fields(self) -> frozenset[str]:
        special = {
            name for name, value in self.config.items() if name not in LOCAL_LORA_FIELDS and not _is_unset(name, value)
        }
        if self.config.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
            special.add("init_lora_weights")
        return frozenset(special) if self.peft_type == "LORA" else frozenset()

    def _brings_any(self, *markers: str) -> bool:
        return any(marker in name for marker in markers for name in self.entries or ())

    def _brings_only(self, *markers: str) -> bool:
        return self.entries is not None and all(any(marker in name for marker in markers) for name in self.entries)


def _is_unset(name: str, value: Any) -> bool:
    """Whether a field is unset. An empty object is not: PEFT reads some as a configuration."""
    return (
        value is None
        or value is False
        or (name, value) in (("bias", "none"), ("modules_to_save", []), ("target_parameters", []))
    )


def read_adapter(folder: Path, *, allow_pickle: bool = False) -> AdapterFiles:
    """Read an adapter's folder, except for the values of its tensors.

    Raises:
        SpecError: There is no such folder, it has no adapter, or the adapter is of a kind that cannot be served.
        WeightsError: Its weights are missing, broken, or a pickle that the spec does not allow.
    """
    config = read_config(folder)
    refused = refusal(config)
    if refused is not None:
        raise SpecError(f"the adapter {str(folder)!r} {refused[:400]}.")
    weights, pickle = folder / WEIGHTS, folder / PICKLED
    if weights.is_file():
        entries = read_header(weights)
        _, parts = peft_names(entries)
        return checked(AdapterFiles(folder, config, with_peft_names(entries), tuple(parts)))
    if not pickle.is_file():
        raise WeightsError(f"the adapter {str(folder)!r} has no weights: expected {WEIGHTS} beside its {CONFIG}.")
    if not allow_pickle:
        raise only_pickled(f"the adapter {str(folder)!r}")
    return AdapterFiles(folder, config, None)


def require_mergeable(files: AdapterFiles, number: int) -> None:
    """Raise if PEFT cannot merge an adapter into its base.

    Args:
        files: The adapter's files.
        number: Its place in the spec's list, from 1.

    Raises:
        SpecError: It cannot be merged.
    """
    why = unmergeable(files.config)
    if why is not None:
        raise SpecError(not_merged(files.folder, number, why))


def not_merged(folder: Path, number: int, why: str) -> str:
    """Return the message about an adapter that cannot be merged."""
    return (
        f"the adapter {str(folder)!r} is number {number} of the spec's list, and all but the last are merged into the"
        f" base, but it cannot be merged: {why}. Name it last, or alone."
    )


def checked(files: AdapterFiles) -> AdapterFiles:
    """Return an adapter with known tensors, unless PEFT cannot put them on a language model.

    Raises:
        WeightsError: The tensors are empty, or have names that a wrapper has left.
    """
    require_own_tensors(files.stored, files.entries or {}, prunes=files.peft_type == "ADALORA")
    return files


def only_pickled(adapter: str) -> WeightsError:
    """Return the error for an adapter without safetensors, where the spec allows no pickle."""
    return WeightsError(
        f"{adapter} has its weights only in {PICKLED}, a pickle, which can run code when it is read. Save it as"
        " safetensors, or set allow_pickle=True in the spec if you trust it."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return what the ``adapter_config.json`` of a folder says.

    Raises:
        SpecError: There is no such folder, or no config of an adapter in it.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise SpecError(
            f"the adapter {str(folder)!r} {what}. Name the folder that PEFT's save_pretrained wrote, or the id of an"
            " adapter on a hub (org/name)."
        )
    path = folder / CONFIG
    try:
        config = json.loads(read_bounded(path, CONFIG_BYTES))
    except FileNotFoundError:
        whole = " It holds a whole model; name it as 'finetuned'." if (folder / "config.json").is_file() else ""
        raise SpecError(
            f"the adapter folder {str(folder)!r} has no {CONFIG}. Name the folder that PEFT's save_pretrained wrote"
            f" (in a training run's output, it may be a checkpoint-* subfolder).{whole}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{str(path)!r} cannot be read as JSON: {error}. Save the adapter again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise SpecError(f"{str(path)!r} names no peft_type, so it describes no adapter. Save the adapter again.")
    require_types(path, config)
    return config


def is_adapters(name: str) -> bool:
    """Return whether a name in the ``PeftModel`` belongs to something that came with the adapter."""
    return f".{NAME}." in f".{name}."


def without_name(name: str) -> str:
    """Return a parameter's or module's name without PEFT's adapter name."""
    return name.replace(f".{NAME}", "")


def public_name(name: str) -> str:
    """Return a parameter's or module's name without all that PEFT adds to it."""
    return without_name(name.removeprefix(ROOT))


def peft_names(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return each tensor's name as ``save_pretrained`` writes it, and the parts that were taken out of all names.

    torch.compile, DataParallel, DeepSpeed, FSDP and activation checkpointing put a part of their own into the names of
    a model that they wrap, and ``model.state_dict()`` has the adapter's name. If all names have such a part, and are
    PEFT's without it, only one adapter can be meant. Otherwise they stay as they are.
    """
    names = own = list(names)
    parts: list[str] = []
    for pattern in (*_WRAPPERS, _ADAPTER):
        if not (own and pattern.search(own[0])):
            continue
        found = [[str(match[match.lastindex or 0]) for match in pattern.finditer(name)] for name in own]
        known = sorted({part for each in found for part in each})
        if known and all(found) and (pattern is not _ADAPTER or len(known) == 1):
            own = [pattern.sub("", name) for name in own]
            parts += known
    if not parts or len(set(own)) < len(own) or not all(name.startswith(ROOT) for name in own):
        return {name: name for name in names}, []
    return dict(zip(names, own, strict=True)), parts


def with_peft_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors of an adapter's file by `peft_names`."""
    names, _ = peft_names(tensors)
    return {names[name]: tensor for name, tensor in tensors.items()}


def warn_of_names(files: AdapterFiles) -> None:
    """Warn if parts of the names in an adapter's file were taken out."""
    if files.taken_out:
        warnings.warn(
            f"the tensors of the adapter {str(files.folder)!r} have {', '.join(map(repr, files.taken_out))} in their"
            " names, from a wrapper of the model or as the adapter's name. They were read without; PEFT alone does not"
            " read them.",
            SwayWarning,
            stacklevel=3,
        )
