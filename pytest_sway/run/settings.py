"""Options and ini values, resolved once into `SwaySettings`.

An option given on the command line wins over its ini value, and that over the default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# Repeated from `pytest_sway.spec`, so that a run without a backend does not import it.
DTYPES: Final = ("auto", "fp16", "bf16", "fp32")
POLICIES: Final = ("error", "warn", "ignore")

_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LETTERS: Final = "bgikmBGIKM"
_DIGITS: Final = 20
"""More than any number of bytes has."""
_CONFIDENCE: Final = 0.99
_DRIFT: Final = 0.05


class SwaySettings:  # every run of pytest defines it: no dataclass, which takes longer
    """The settings of this run.

    Args:
        values: The attributes.

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

    def __init__(self, values: Mapping[str, Any]) -> None:
        vars(self).update(values)

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


class _Setting:
    """One setting: an ini value, and an option if ``metavar`` is not ``None``. A flag's metavar is empty."""

    def __init__(
        self, name: str, default: str | bool, parse: Callable[[str], Any], text: str, metavar: str | None = None
    ) -> None:
        self.name, self.default, self.parse, self.help, self.metavar = name, default, parse, text, metavar

    @property
    def option(self) -> str:
        return option_of(self.name)

    def resolve(self, config: pytest.Config) -> Any:
        """Return the value of the option, else of the ini file, else the default."""
        text = None if self.metavar is None else config.getoption(self.name)
        origin = self.option
        if text is None:
            origin = f"ini value {self.name}"
            try:
                text = config.getini(self.name)
            except (TypeError, ValueError, pytest.UsageError) as error:  # pytest itself parses flags
                is_flag = isinstance(self.default, bool)
                form = "true or false" if is_flag else f'text in [tool.pytest], as in {self.name} = "..."'
                raise pytest.UsageError(f"{origin}: must be {form}; {error}.") from None
        try:
            return text if isinstance(text, bool) else self.parse(str(text).strip())
        except ValueError as error:
            raise pytest.UsageError(f"{origin}: {error}; found {text!r}.") from None


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


_SETTINGS: Final = (
    _Setting(
        "sway_cache_size",
        "2",
        parse_cache_size,
        "the most backends loaded at one time, in each process (default: 2)",
        "N",
    ),
    _Setting(
        "sway_cache_memory",
        "",
        parse_memory,
        "the most memory for loaded weights, in each process, such as 8GiB (default: no bound)",
        "SIZE",
    ),
    _Setting("sway_device", "auto", parse_device, "the device of specs with 'auto' (default: the best)", "DEVICE"),
    _Setting(
        "sway_dtype",
        "auto",
        one_of(*DTYPES),
        f"the dtype of specs with 'auto': {', '.join(DTYPES)} (default: fp32 on a CPU)",
        "DTYPE",
    ),
    _Setting(
        "sway_on_mutation",
        "error",
        one_of(*POLICIES),
        f"if a test leaves a shared model changed: {', '.join(POLICIES)} (default: error)",
    ),
    _Setting(
        "sway_on_leak",
        "error",
        one_of(*POLICIES),
        f"if weights stay in memory after their backend was closed: {', '.join(POLICIES)} (default: error)",
    ),
    _Setting(
        "sway_on_base_mismatch",
        "warn",
        one_of(*POLICIES),
        f"if an adapter was trained on another base: {', '.join(POLICIES)} (default: warn)",
    ),
    _Setting(
        "sway_reorder",
        True,
        bool,
        "run tests of the same model together, and with pytest-xdist in few workers (default: true)",
    ),
    _Setting("sway_offline", False, bool, "use only files on this machine and ask no hub (default: false)", ""),
    _Setting(
        "sway_share_weights",
        "auto",
        one_of("auto", "off"),
        "share converted weights among the pytest-xdist workers of a machine: auto, off (default: auto)",
    ),
    _Setting(
        "sway_score_cache",
        "64MiB",
        parse_score_cache,
        "the most memory for the remembered answers of each base, or off (default: 64MiB)",
    ),
    _Setting(
        "sway_confidence",
        str(_CONFIDENCE),
        parse_confidence,
        f"the confidence of the intervals of sway_compare (default: {_CONFIDENCE})",
    ),
    _Setting(
        "sway_drift",
        str(_DRIFT),
        parse_drift,
        f"how far the base may move since scores were recorded, in their unit (default: {_DRIFT})",
    ),
)


REPORTS: Final = {
    "sway_json": "write the run's comparisons, every row of them, and its loads to a file, as JSON",
    "sway_markdown": "append the table of comparisons, and the worst texts of failures, to a file, as Markdown",
    "sway_html": "write a page to look at, with the differences, tokens and loads, to a file, as HTML",
}
"""The files that a run can write, by the destination of their option."""


def option_of(name: str) -> str:
    """The option whose destination is ``name``."""
    return "--" + name.replace("_", "-")


def add_options(parser: pytest.Parser) -> None:
    """Declare every option and ini value."""
    group = parser.getgroup("sway", "pytest-sway: fine-tuned models")
    for setting in _SETTINGS:
        if setting.metavar is not None:
            form: dict[str, Any] = {"metavar": setting.metavar} if setting.metavar else {"action": "store_true"}
            group.addoption(setting.option, dest=setting.name, default=None, help=setting.help, **form)
        flag: Any = "bool" if isinstance(setting.default, bool) else None
        parser.addini(setting.name, setting.help, type=flag, default=setting.default)
    for name, text in REPORTS.items():
        group.addoption(option_of(name), dest=name, default=None, metavar="PATH", help=text)
    group.addoption(
        "--sway-set",
        action="append",
        metavar="NAME.FIELD=VALUE",
        help="change or add a named spec for this run, such as candidate.adapter=runs/v4; may be repeated",
    )
    group.addoption(
        "--sway-record",
        action="store_true",
        help="record the scores of comparisons without a baseline, of each test that passes, in a file beside it",
    )


def resolve_settings(config: pytest.Config) -> SwaySettings:
    """Return the settings of this run.

    Raises:
        pytest.UsageError: A setting has an invalid value.
    """
    return SwaySettings({setting.name.removeprefix("sway_"): setting.resolve(config) for setting in _SETTINGS})


def asks_for_reports(config: pytest.Config) -> bool:
    """Return whether the run writes any file, here or, in a worker, at its controller."""
    return any(config.getoption(name) is not None for name in REPORTS)


def asks_for_offline(early_config: pytest.Config) -> bool:
    """Return whether a run should be offline, before its settings are resolved; a bad value is reported then."""
    if early_config.known_args_namespace.sway_offline:
        return True
    try:
        return bool(early_config.getini("sway_offline"))
    except (TypeError, ValueError, pytest.UsageError):
        return False
