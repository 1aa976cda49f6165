"""Read an adapter's folder, in mlx-lm's own form or in PEFT's.

Both have an ``adapter_config.json``: PEFT's names a ``peft_type``, and mlx-lm's a ``fine_tune_type`` or
``lora_parameters``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.lora_fit import require_task
from pytest_sway.backends.checkpoints.peft_adapter import CONFIG, read_adapter, warn_of_names
from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry, read_header
from pytest_sway.backends.mlx.adapters.conversion import refuse_inexact
from pytest_sway.errors import SpecError, WeightsError
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__tracebackhide__ = True

WEIGHTS: Final = "adapters.safetensors"
PEFT_WEIGHTS: Final = "adapter_model.safetensors"
FINE_TUNE_TYPES: Final = ("lora", "dora", "full")
LARGEST_FLOAT32: Final = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's folder, read but not loaded.

    Attributes:
        folder: The folder.
        peft: Whether PEFT wrote it.
        config: Its ``adapter_config.json``.
        entries: Its tensors by name.
    """

    folder: Path
    peft: bool
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]

    @property
    def weights(self) -> Path:
        """The path of its tensors' file."""
        return self.folder / (PEFT_WEIGHTS if self.peft else WEIGHTS)

    @property
    def fine_tune_type(self) -> str:
        """The method by mlx-lm's name: ``lora``, ``dora`` or ``full``."""
        if self.peft:
            return "dora" if self.config.get("use_dora") else "lora"
        return str(self.config.get("fine_tune_type", "lora"))


def read_mlx_adapter(folder: Path) -> AdapterFiles:
    """Read an adapter's folder, except for the values of its tensors.

    Raises:
        SpecError: There is no such folder, it has no adapter, or mlx-lm cannot load that adapter.
        WeightsError: Its weights are missing, broken, or only there in an unknown format.
        AdapterMismatchError: It is one of PEFT's that cannot be converted exactly.
    """
    config = _config(folder)
    if config is None or "peft_type" in config:
        files = read_adapter(folder)  # raises for all else that can be wrong with a folder
        require_task(files, "mlx", None)
        assert files.entries is not None
        warn_of_names(files)
        refuse_inexact(files)
        _check_numbers(folder / CONFIG, files.config)
        return AdapterFiles(folder, True, files.config, files.entries)
    _check_config(folder, config)
    weights = folder / WEIGHTS
    if not weights.is_file():
        hint = (
            f" Its {weights.stem}.npz has the format of the first versions of mlx-lm, which is not supported; train it"
            " again."
            if weights.with_suffix(".npz").is_file()
            else ""
        )
        raise WeightsError(f"the adapter {str(folder)!r} has no weights: expected {WEIGHTS} beside its {CONFIG}.{hint}")
    return AdapterFiles(folder, False, config, read_header(weights))


def _config(folder: Path) -> dict[str, Any] | None:
    """Return the configuration if it is one; PEFT's reader has messages for everything else."""
    try:
        config = json.loads(read_bounded(folder / CONFIG, CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    is_adapter = isinstance(config, dict) and {"peft_type", "fine_tune_type", "lora_parameters"} & config.keys()
    return config if is_adapter else None


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("fine_tune_type", "lora")
    if kind not in FINE_TUNE_TYPES:
        raise SpecError(
            f"the adapter {str(folder)!r} has the fine_tune_type {kind!r}; the known ones are"
            f" {', '.join(FINE_TUNE_TYPES)}. Save the adapter again with a current mlx-lm."
        )
    if kind == "full":
        return
    path, layers, parameters = folder / CONFIG, config.get("num_layers"), config.get("lora_parameters")
    if not isinstance(layers, int) or not isinstance(parameters, dict) or not {"rank", "scale"} <= parameters.keys():
        raise SpecError(
            f"{str(path)!r} does not say which layers mlx-lm changes: it needs num_layers, and lora_parameters with"
            " rank and scale. Save the adapter again with a current mlx-lm."
        )
    _require_rank(path, "rank in lora_parameters", parameters["rank"])
    _require_number(path, "scale in lora_parameters", parameters["scale"])


def _check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    """Raise unless the ranks and alphas in PEFT's configuration are valid numbers."""
    _require_rank(path, "r", config.get("r"))
    _require_number(path, "lora_alpha", config.get("lora_alpha"))
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        _require_rank(path, f"rank_pattern[{shown(pattern)}]", rank)
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        _require_number(path, f"alpha_pattern[{shown(pattern)}]", alpha)


def _require_rank(path: Path, field: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise _unfit(path, field, value, "a whole number of 1 or more")


def _require_number(path: Path, field: str, value: Any) -> None:
    if type(value) not in (int, float) or not abs(value) <= LARGEST_FLOAT32:
        raise _unfit(path, field, value, "a number that float32 holds")


def _unfit(path: Path, field: str, value: Any, wanted: str) -> SpecError:
    return SpecError(f"{str(path)!r} has {field} = {shown(value)}; it must be {wanted}. Save the adapter again.")
