"""What an adapter's folder says about itself: its type, its tensors, and whether its base can be shared.

Neither torch nor PEFT is needed to know that, so it is known before anything is loaded or evicted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.headers import TensorEntry, read_header
from pytest_sway.errors import AdapterMismatchError, SpecError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PICKLED: Final = "adapter_model.bin"

# Fields of a LoraConfig that leave the base's weights and its other adapters alone, whatever their value.
_LOCAL_FIELDS: Final = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
        "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type",
        "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
        "task_type", "use_dora", "use_rslora",
    }
)  # fmt: skip
# Fields that need a base of their own, which is exact again as soon as the adapter is disabled.
_DISABLED_EXACTLY: Final = frozenset({"modules_to_save", "trainable_token_indices"})
# Initialisations that look at no weight of the base and write none.
_PLAIN_INITIALISATIONS: Final = (None, True, False, "gaussian")
# Types that add to what a layer computes, and the part of their tensors' names that shows it.
_ADDITIVE_TYPES: Final = {
    "LORA": "lora_",
    "IA3": "ia3_",
    "LOHA": "hada_",
    "LOKR": "lokr_",
    "OFT": "oft_",
    "BOFT": "boft_",
    "HRA": "hra_",
    "FOURIERFT": "fourierft_",
}
PROMPT_TYPES: Final = frozenset(
    {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE"}
)


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's folder, read but not loaded.

    Attributes:
        folder: The folder.
        config: Its ``adapter_config.json``.
        entries: Its tensors by name; ``None`` where they exist only as a pickle.
    """

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry] | None

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method, such as ``LORA``."""
        return str(self.config["peft_type"])

    @property
    def shareable(self) -> bool:
        """Whether it can live on a base beside other adapters: plain LoRA that brings only LoRA tensors."""
        return self.peft_type == "LORA" and not self._special_fields() and self._brings_only("lora_")

    @property
    def restorable(self) -> bool:
        """Whether disabling it leaves exactly the base.

        One that brings whole embeddings may need a base with more words, and so does not.
        """
        if self.peft_type in PROMPT_TYPES:
            return True
        marker = _ADDITIVE_TYPES.get(self.peft_type)
        if marker is None or self.config.get("bias", "none") != "none" or self.vocabulary is not None:
            return False
        if self.peft_type == "LORA" and not self._special_fields() <= _DISABLED_EXACTLY:
            return False
        return self._brings_only(
            marker, "token_adapter", "trainable_tokens", *(self.config.get("modules_to_save") or ())
        )

    @property
    def through_inner_model(self) -> bool:
        """Whether its layers do all of its work, so that the model inside the ``PeftModel`` can be called directly."""
        return self.peft_type in _ADDITIVE_TYPES and self._special_fields() <= _DISABLED_EXACTLY

    @property
    def vocabulary(self) -> int | None:
        """Rows of the input embeddings that it brings; ``None`` if it brings none."""
        modules = ("embed_tokens", "wte", "word_embeddings", "embed_in")
        names = tuple(f"{module}{part}.weight" for module in modules for part in ("", ".base_layer"))
        for name, entry in (self.entries or {}).items():
            if name.endswith(names) and "lora_" not in name and len(entry.shape) == 2:
                return entry.shape[0]
        return None

    def _special_fields(self) -> frozenset[str]:
        special = {
            name
            for name, value in self.config.items()
            if name not in _LOCAL_FIELDS and value not in (None, False, "", "none", [], {})
        }
        if self.config.get("init_lora_weights") not in _PLAIN_INITIALISATIONS:
            special.add("init_lora_weights")
        return frozenset(special) if self.peft_type == "LORA" else frozenset()

    def _brings_only(self, *markers: str) -> bool:
        return self.entries is not None and all(any(marker in name for marker in markers) for name in self.entries)


def read_adapter(folder: Path, *, allow_pickle: bool = False) -> AdapterFiles:
    """Read what a folder says about its adapter.

    Raises:
        SpecError: There is no such folder, or no adapter in it.
        AdapterMismatchError: The adapter was made for another task than language modelling.
        WeightsError: Its weights are missing, broken, or only there as a pickle that the spec does not allow.
    """
    config = _config(folder)
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise AdapterMismatchError(
            f"the adapter {str(folder)!r} was trained for the task {task}, and pytest-sway tests causal language"
            " models. Name an adapter whose task_type is CAUSAL_LM."
        )
    weights, pickle = folder / WEIGHTS, folder / PICKLED
    if weights.is_file():
        return AdapterFiles(folder, config, read_header(weights))
    if not pickle.is_file():
        raise WeightsError(f"the adapter {str(folder)!r} has no weights: expected {WEIGHTS} beside its {CONFIG}.")
    if not allow_pickle:
        raise WeightsError(
            f"the adapter {str(folder)!r} has its weights only in {PICKLED}, a pickle, which can run code when it is"
            f" read. Save it as safetensors, or set allow_pickle=True in the spec if you trust it."
        )
    return AdapterFiles(folder, config, None)


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise SpecError(f"the adapter {str(folder)!r} {what}. Name the folder that PEFT's save_pretrained wrote.")
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise SpecError(
            f"the adapter folder {str(folder)!r} has no {CONFIG}. Name the folder that PEFT's save_pretrained wrote"
            " (in a training run's output, it may be a checkpoint-* subfolder)."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{str(path)!r} cannot be read as JSON: {error}. Save the adapter again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise SpecError(f"{str(path)!r} names no peft_type, so it describes no adapter. Save the adapter again.")
    return config
