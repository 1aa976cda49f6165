"""Options and ini values, resolved once into `SwaySettings`.

An option given on the command line wins over its ini value, and that over the default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import pytest

# Repeated from `pytest_sway.spec`, so that a run without a backend does not import it.
DTYPES: Final = ("auto", "fp16", "bf16", "fp32")
POLICIES: Final = ("error", "warn", "ignore")

_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LETTERS: Final = "bgikmBGIKM"
_DIGITS: Final = 20
"""More than any number of bytes has."""
_CONFIDENCE: Final = 0.99
_DRIFT: Final = 0.05


@dataclass(frozen=True, slots=True)
class SwaySettings:
    """The settings of this run.

    Attributes:
        cache_size: The most backends that are resident in one process, at least 1.
        cache_memory: The most bytes of weights that are resident in one process, or ``None`` for no bound.
        device: The device that ``auto`` stands for.
        dtype: The dtype that ``auto`` stands for.
        on_mutation: The policy if a test leaves a backend changed.
        on_leak: The policy if weights are still in memory after their backend was closed.
        on_base_mismatch: The policy if an adapter names another base than its spec.
        reorder: Whether tests of the same model run together.
        offline: Whether no hub is asked for anything.
        share_weights: ``auto`` if the workers of a machine share one copy of converted weights, else ``off``.
        score_cache: The most bytes of answers that each base remembers; 0 for none.
        confidence: The confidence of the intervals of ``sway_compare``, from 0.5 to 0.9999.
        drift: The most that a base may move from its recorded scores, in their unit.
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
        """Return the line for pytest's header."""
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


def parse_cache_size(text: str) -> int:
    """Parse a whole number of backends, at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError("must be a whole number of backends, at least 1")
    return int(text)


def parse_memory(text: str) -> int | None:
    """Parse bytes or a number with a unit, such as ``8GiB``; return bytes, or ``None`` (no bound) for an empty text."""
    if not text:
        return None
    number = text.rstrip(_LETTERS).rstrip()  # no regular expression, which takes longer to compile
    whole, point, part = number.partition(".")
    unit = _UNITS.get(text[len(number) :].strip().upper(), 0)
    is_number = len(whole) < _DIGITS and whole.isdecimal() and (part.isdecimal() if point else True)
    size = int(float(number) * unit) if is_number else 0
    if size < 1:
        raise ValueError("must be a size in bytes, or with a unit of KB, MB, GB, KiB, MiB or GiB, such as 8GiB")
    return size


def parse_score_cache(text: str) -> int:
    """Parse bytes as `parse_memory` does; return 0 for ``off``."""
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
    """Parse a number from 0.5 to 0.9999. For 0.999999, scipy does not return."""
    try:
        confidence = float(text)
    except ValueError:
        confidence = 0.0
    if not 0.5 <= confidence <= 0.9999:
        raise ValueError("must be a number from 0.5 to 0.9999, such as 0.99")
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
    """Check that the text is ``auto`` or a torch device."""
    kind, colon, number = text.partition(":")
    is_kind = kind.isascii() and kind.isalpha() and kind.islower()
    if not is_kind or (colon and not number.isdecimal()):
        raise ValueError("must be auto or a torch device such as cpu, cuda:0 or mps")
    return text


def one_of(*valid: str) -> Callable[[str], str]:
    """Return a parser that accepts only the words ``valid``."""

    def parse(text: str) -> str:
        if text not in valid:
            raise ValueError(f"must be one of {', '.join(valid)}")
        return text

    return parse


class _Setting(NamedTuple):
    """How to read a setting, whose option and ini value `pytest_sway.plugin` declares."""

    default: Any
    parse: Callable[[str], Any]


_SETTINGS: Final = {
    "sway_cache_size": _Setting(2, parse_cache_size),
    "sway_cache_memory": _Setting(None, parse_memory),
    "sway_device": _Setting("auto", parse_device),
    "sway_dtype": _Setting("auto", one_of(*DTYPES)),
    "sway_on_mutation": _Setting("error", one_of(*POLICIES)),
    "sway_on_leak": _Setting("error", one_of(*POLICIES)),
    "sway_on_base_mismatch": _Setting("warn", one_of(*POLICIES)),
    "sway_reorder": _Setting(True, bool),
    "sway_offline": _Setting(False, bool),
    "sway_share_weights": _Setting("auto", one_of("auto", "off")),
    "sway_score_cache": _Setting(2**26, parse_score_cache),
    "sway_confidence": _Setting(_CONFIDENCE, parse_confidence),
    "sway_drift": _Setting(_DRIFT, parse_drift),
}

REPORTS: Final = ("sway_json", "sway_markdown", "sway_html")
"""The files that a run can write, by the destination of their option."""


def option_of(name: str) -> str:
    """The option whose destination is ``name``."""
    return "--" + name.replace("_", "-")


def resolve_settings(config: pytest.Config) -> SwaySettings:
    """Return the settings of this run.

    Raises:
        pytest.UsageError: A setting has an invalid value.
    """
    return SwaySettings(**{name.removeprefix("sway_"): _resolve(config, name) for name in _SETTINGS})


def _resolve(config: pytest.Config, name: str) -> Any:
    """Return the value of the option, else of the ini file, else the default."""
    setting = _SETTINGS[name]
    given = config.getoption(name, None)  # some settings have no option
    origin = option_of(name)
    if given is None:
        origin = f"ini value {name}"
        try:
            given = config.getini(name)
        except (TypeError, ValueError, pytest.UsageError) as error:  # pytest itself parses flags
            is_flag = isinstance(setting.default, bool)
            form = "true or false" if is_flag else f'text in [tool.pytest], as in {name} = "..."'
            raise pytest.UsageError(f"{origin}: must be {form}; {error}.") from None
    if given is None or isinstance(given, bool):
        return setting.default if given is None else given
    try:
        return setting.parse(str(given).strip())
    except ValueError as error:
        raise pytest.UsageError(f"{origin}: {error}; found {given!r}.") from None


def asks_for_reports(config: pytest.Config) -> bool:
    """Return whether the run writes any file, here or, in a worker, at its controller."""
    return any(config.getoption(name) is not None for name in REPORTS)
