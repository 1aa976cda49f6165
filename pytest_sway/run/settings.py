"""Options and ini values, resolved once into a frozen `SwaySettings`.

An option given on the command line wins over its ini value, and that over the default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import pytest

# As in `pytest_sway.spec`, which a run that uses no backend does not import.
DTYPES: Final = ("auto", "fp16", "bf16", "fp32")
POLICIES: Final = ("error", "warn", "ignore")

_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Compiled when they are first used, which most runs never do.
_MEMORY: Final = r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B?)"
_DEVICE: Final = r"[a-z]+(:\d+)?"
_CONFIDENCE: Final = 0.99
_DRIFT: Final = 0.05


class SwaySettings(NamedTuple):  # cheaper to define than a dataclass, and every run of pytest pays for it
    """What is in force in this run.

    Attributes:
        cache_size: The most backends that are resident in one process, at least 1.
        cache_memory: The most bytes of weights that are resident in one process, or ``None`` for no bound.
        device: What ``auto`` means for devices.
        dtype: What ``auto`` means for dtypes.
        on_mutation: What a test gets that leaves a backend changed.
        on_leak: What the run gets when weights outlive their backend.
        on_base_mismatch: What a test gets whose adapter names another base than its spec.
        reorder: Whether tests of equal models are put together.
        offline: Whether nothing is asked of a hub.
        share_weights: ``auto`` if the workers of a host hold one copy of converted weights, else ``off``.
        score_cache: The most bytes of answers that each base remembers; 0 for none.
        confidence: Of the intervals of ``sway_compare``.
        drift: How far a base may move since its scores were recorded, in their unit.
    """

    cache_size: int
    cache_memory: int | None
    device: str
    dtype: str
    on_mutation: str
    on_leak: str
    on_base_mismatch: str
    reorder: bool
    offline: bool
    share_weights: str
    score_cache: int
    confidence: float
    drift: float

    def fails_run(self, leaks: Sequence[str]) -> bool:
        """Whether ``leaks`` fail a run in which every test passed."""
        return bool(leaks) and self.on_leak == "error"

    def header(self) -> str:
        """One line for pytest's header."""
        memory = "no memory bound" if self.cache_memory is None else f"at most {self.cache_memory / 2**30:.4g} GiB"
        return (
            f"sway: cache of {self.cache_size}, {memory}, device {self.device}, dtype {self.dtype},"
            f" on mutation {self.on_mutation}, on leak {self.on_leak}{'' if self.reorder else ', tests not reordered'}"
            f"{', offline' if self.offline else ''}"
            f"{'' if self.share_weights == 'auto' else ', weights not shared between workers'}"
            f"{'' if self.score_cache else ', answers not remembered'}"
            f"{'' if self.on_base_mismatch == 'warn' else f', on base mismatch {self.on_base_mismatch}'}"
            f"{'' if self.confidence == _CONFIDENCE else f', confidence {self.confidence:.4g}'}"
            f"{'' if self.drift == _DRIFT else f', drift at most {self.drift:.4g}'}"
        )


class _Setting(NamedTuple):
    """One setting: its ini name, and its option where it has one; a flag's default is a bool, its metavar empty."""

    name: str
    default: str | bool
    parse: Callable[[str], Any]
    help: str
    metavar: str | None = None

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    def resolve(self, config: pytest.Config) -> Any:
        """The value in force: the option's, else the ini file's, else the default."""
        text = None if self.metavar is None else config.getoption(self.name)
        origin = self.option
        if text is None:
            origin = f"ini value {self.name}"
            try:
                text = config.getini(self.name)
            except (ValueError, pytest.UsageError) as error:  # pytest's own, for a flag
                raise pytest.UsageError(f"{origin}: must be true or false; {error}.") from None
        try:
            return text if isinstance(text, bool) else self.parse(str(text).strip())
        except ValueError as error:
            raise pytest.UsageError(f"{origin}: {error}; found {text!r}.") from None


def parse_cache_size(text: str) -> int:
    """A whole number of backends, at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError("must be a whole number of backends, at least 1")
    return int(text)


def parse_memory(text: str) -> int | None:
    """Bytes, from a number with a unit, such as ``8GiB``; ``None`` for an empty text: no bound."""
    if not text:
        return None
    match = re.fullmatch(_MEMORY, text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ValueError("must be a size in bytes, or with a unit of KB, MB, GB, KiB, MiB or GiB, such as 8GiB")
    return size


def parse_score_cache(text: str) -> int:
    """Bytes, as in `parse_memory`; 0 for ``off``."""
    if text == "off":
        return 0
    try:
        size = parse_memory(text)
    except ValueError as error:
        raise ValueError(f"{error}, or off") from None
    if size is None:
        raise ValueError("must be a size such as 64MiB, or off")
    return size


def parse_confidence(text: str) -> float:
    """A probability between 0.5 and 1."""
    try:
        confidence = float(text)
    except ValueError:
        confidence = 0.0
    if not 0.5 <= confidence < 1.0:
        raise ValueError("must be a number from 0.5 to under 1, such as 0.99")
    return confidence


def parse_drift(text: str) -> float:
    """A bound of 0 or more, also infinite."""
    try:
        drift = float(text)
    except ValueError:
        drift = -1.0
    if not drift >= 0.0:
        raise ValueError("must be a number of 0 or more, such as 0.05, or inf for no bound")
    return drift


def parse_device(text: str) -> str:
    """``auto`` or a torch device."""
    if text != "auto" and not re.fullmatch(_DEVICE, text):
        raise ValueError("must be auto or a torch device such as cpu, cuda:0 or mps")
    return text


def one_of(*valid: str) -> Callable[[str], str]:
    """A parser that takes one of the words given."""

    def parse(text: str) -> str:
        if text not in valid:
            raise ValueError(f"must be one of {', '.join(valid)}")
        return text

    return parse


_SETTINGS: Final = (
    _Setting(
        "sway_cache_size",
        "2",
        parse_cache_size,
        "the most model backends that are loaded at one time, in each process (default: 2)",
        "N",
    ),
    _Setting(
        "sway_cache_memory",
        "",
        parse_memory,
        "the most memory that loaded weights may take, in each process, such as 8GiB (default: no bound)",
        "SIZE",
    ),
    _Setting("sway_device", "auto", parse_device, "what device 'auto' in a spec means (default: the best)", "DEVICE"),
    _Setting(
        "sway_dtype",
        "auto",
        one_of(*DTYPES),
        f"what dtype 'auto' in a spec means: {', '.join(DTYPES)} (default: fp32 on a CPU)",
        "DTYPE",
    ),
    _Setting(
        "sway_on_mutation",
        "error",
        one_of(*POLICIES),
        f"what a test gets that leaves a shared model changed: {', '.join(POLICIES)} (default: error)",
    ),
    _Setting(
        "sway_on_leak",
        "error",
        one_of(*POLICIES),
        f"what the run gets when weights outlive their backend: {', '.join(POLICIES)} (default: error)",
    ),
    _Setting(
        "sway_on_base_mismatch",
        "warn",
        one_of(*POLICIES),
        f"what a test gets whose adapter was trained on another base: {', '.join(POLICIES)} (default: warn)",
    ),
    _Setting(
        "sway_reorder",
        True,
        bool,
        "put tests together that use equal models, and under --dist loadgroup on equal workers (default: true)",
    ),
    _Setting("sway_offline", False, bool, "ask nothing of a hub: use what is on this machine (default: false)", ""),
    _Setting(
        "sway_share_weights",
        "auto",
        one_of("auto", "off"),
        "one copy of converted weights for all pytest-xdist workers of a host: auto, off (default: auto)",
    ),
    _Setting(
        "sway_score_cache",
        "64MiB",
        parse_score_cache,
        "the most memory for what each base model has answered, which all its adapters share; off (default: 64MiB)",
    ),
    _Setting(
        "sway_confidence",
        str(_CONFIDENCE),
        parse_confidence,
        f"the confidence of the intervals that sway_compare gives (default: {_CONFIDENCE})",
    ),
    _Setting(
        "sway_drift",
        str(_DRIFT),
        parse_drift,
        f"how far the base may move since scores were recorded, in their unit (default: {_DRIFT})",
    ),
)


def add_options(parser: pytest.Parser) -> None:
    """Declare every option and ini value."""
    group = parser.getgroup("sway", "pytest-sway: fine-tuned models")
    for setting in _SETTINGS:
        if setting.metavar is not None:
            form: dict[str, Any] = {"metavar": setting.metavar} if setting.metavar else {"action": "store_true"}
            group.addoption(setting.option, dest=setting.name, default=None, help=setting.help, **form)
        flag: Any = "bool" if isinstance(setting.default, bool) else None
        parser.addini(setting.name, setting.help, type=flag, default=setting.default)
    group.addoption(
        "--sway-set",
        action="append",
        metavar="NAME.FIELD=VALUE",
        help="change or make a named spec for this run, such as candidate.adapter=runs/v4; may be repeated",
    )
    group.addoption(
        "--sway-record",
        action="store_true",
        help="record the scores of comparisons without a baseline, of each test that passes, in a file beside it",
    )


def resolve_settings(config: pytest.Config) -> SwaySettings:
    """Return what is in force.

    Raises:
        pytest.UsageError: A value is not one that its setting takes.
    """
    return SwaySettings(**{setting.name.removeprefix("sway_"): setting.resolve(config) for setting in _SETTINGS})


def asks_for_offline(early_config: pytest.Config) -> bool:
    """Return whether a run is to be offline, before its options are resolved; a bad value is reported then."""
    if early_config.known_args_namespace.sway_offline:
        return True
    try:
        return bool(early_config.getini("sway_offline"))
    except (ValueError, pytest.UsageError):
        return False
