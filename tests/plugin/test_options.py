"""Options and ini values, the header, and errors for bad values."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_sway.plugin import HEADER, INI, OPTIONS, REPORTS, asks_for_offline
from pytest_sway.run import settings
from pytest_sway.run.settings import resolve_settings
from tests.plugin.conftest import Suite

PASSES = """
def test_x(sway_cache):
    print("size", sway_cache.max_size, "bytes", sway_cache.max_bytes)
"""


def test_each_setting_that_is_declared_is_read() -> None:
    assert INI.keys() == settings._SETTINGS.keys() >= OPTIONS.keys()
    assert tuple(REPORTS) == settings.REPORTS


@pytest.mark.parametrize("name", INI)
def test_the_help_of_a_setting_names_its_default(name: str) -> None:
    found = re.search(r"\(default: ([^)]+)\)$", INI[name])
    assert found is not None
    setting = settings._SETTINGS[name]
    meant = {"no bound": None, "the best": "auto", "fp32 on a CPU": "auto", "true": True, "false": False}
    default = meant[found[1]] if found[1] in meant else setting.parse(found[1])
    assert default == setting.default


def test_the_header_without_settings_is_that_of_the_defaults() -> None:
    config: Any = SimpleNamespace(getoption=lambda name, default=None: None, getini=lambda name: None)
    assert resolve_settings(config).header() == HEADER


def test_the_header_shows_what_is_in_force(suite: Suite) -> None:
    result = suite.run(PASSES, "--sway-cache-size=3", "--sway-cache-memory=8GiB", "--sway-dtype=bf16")
    result.stdout.fnmatch_lines(
        ["sway: cache of 3, at most 8 GiB, device auto, dtype bf16, on mutation error, on leak error"]
    )


def test_an_option_wins_over_its_ini_value_and_that_over_the_default(suite: Suite) -> None:
    assert "size 2 bytes None" in suite.run(PASSES, "-s").stdout.str()
    suite.pytester.makeini("[pytest]\nsway_cache_size = 4\nsway_cache_memory = 1.5 GiB\n")
    assert "size 4 bytes 1610612736" in suite.run(PASSES, "-s").stdout.str()
    assert (
        "size 5 bytes 1000" in suite.run(PASSES, "-s", "--sway-cache-size=5", "--sway-cache-memory=1000").stdout.str()
    )


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5", ""])
def test_a_bad_cache_size_ends_the_run_before_it_starts(suite: Suite, value: str) -> None:
    result = suite.run(PASSES, f"--sway-cache-size={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [f"ERROR: --sway-cache-size: must be a whole number of backends, at least 1; found '{value}'."]
    )


@pytest.mark.parametrize("value", ["lots", "-1GiB", "0", "8 elephants", "0.1B", "9" * 400])
def test_a_bad_memory_size_ends_the_run_before_it_starts(suite: Suite, value: str) -> None:
    result = suite.run(PASSES, f"--sway-cache-memory={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            "ERROR: --sway-cache-memory: must be a size in bytes, or with a unit of KB, MB, GB, KiB, MiB or GiB, such"
            f" as 8GiB; found '{value}'."
        ]
    )


@pytest.mark.parametrize(
    ("ini", "message"),
    [
        ("sway_cache_size = 0", "sway_cache_size: must be a whole number of backends, at least 1; found '0'."),
        ("sway_dtype = int3", "sway_dtype: must be one of auto, fp16, bf16, fp32; found 'int3'."),
        ("sway_device = G!", "sway_device: must be auto or a torch device such as cpu, cuda:0 or mps; found 'G!'."),
        ("sway_on_leak = shout", "sway_on_leak: must be one of error, warn, ignore; found 'shout'."),
        ("sway_score_cache = on", "sway_score_cache: must be a size in bytes, or with a unit of KB, MB, GB, KiB, MiB or"
         " GiB, such as 8GiB, or off; found 'on'."),
        ("sway_score_cache =", "sway_score_cache: must be a size such as 64MiB, or off; found ''."),
        ("sway_share_weights = on", "sway_share_weights: must be one of auto, off; found 'on'."),
        ("sway_on_mutation = shout", "sway_on_mutation: must be one of error, warn, ignore; found 'shout'."),
    ],
)  # fmt: skip
def test_a_bad_ini_value_is_named_as_such(suite: Suite, ini: str, message: str) -> None:
    suite.pytester.makeini(f"[pytest]\n{ini}\n")
    result = suite.run(PASSES)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: ini value {message}" in result.stderr.str()


@pytest.mark.skipif(int(pytest.__version__.partition(".")[0]) < 9, reason="pytest 8 has no native table")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sway_cache_size = 3", 'sway_cache_size: must be text in [tool.pytest], as in sway_cache_size = "..."; '),
        ('sway_reorder = "no"', "sway_reorder: must be true or false; "),
        ('sway_offline = "no"', "sway_offline: must be true or false; "),
    ],
)
def test_a_value_of_another_type_in_pytests_own_table_is_named_as_such(suite: Suite, line: str, message: str) -> None:
    suite.pytester.makepyprojecttoml(f"[tool.pytest]\n{line}\n")
    result = suite.run(PASSES)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: ini value {message}" in result.stderr.str()


@pytest.mark.parametrize("kind", [TypeError, ValueError, pytest.UsageError])
def test_each_error_of_pytest_for_an_ini_value_is_an_error_of_usage(kind: type[Exception]) -> None:
    def getini(name: str) -> str:
        raise kind(f"{name} is 3")

    config: Any = SimpleNamespace(
        getoption=lambda name, default=None: None,
        getini=getini,
        known_args_namespace=SimpleNamespace(sway_offline=False),
    )
    with pytest.raises(pytest.UsageError, match=r"sway_cache_size: must be text in .*; sway_cache_size is 3\."):
        resolve_settings(config)
    assert not asks_for_offline(config)


def test_the_header_says_so_when_answers_are_not_remembered(suite: Suite) -> None:
    suite.pytester.makeini("[pytest]\nsway_score_cache = off\n")
    suite.run(PASSES).stdout.fnmatch_lines(["sway: cache of 2, *, answers not remembered"])


def test_auto_means_what_the_options_say(suite: Suite) -> None:
    result = suite.run(
        """
def test_x(sway_backend):
    spec = sway_backend(dummy("a")).spec
    assert (spec.device, spec.dtype) == ("cuda:1", "bf16")
    spec = sway_backend({**dummy("a"), "device": "cpu", "dtype": "fp32"}).spec
    assert (spec.device, spec.dtype) == ("cpu", "fp32")
""",
        "--sway-device=cuda:1",
        "--sway-dtype=bf16",
    )
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize("table", ['specs = "v3"', 'specs.v3 = "v3"'])
def test_malformed_named_specs_are_an_error_of_each_test_that_uses_a_backend(suite: Suite, table: str) -> None:
    suite.pytester.makepyprojecttoml(f"[tool.pytest-sway]\n{table}\n")
    result = suite.run("def test_x(sway_backend): pass\n\ndef test_y(sway_cache): pass\n\ndef test_z(): pass")
    result.assert_outcomes(errors=2, passed=1)
    assert len([line for line in result.outlines if line.startswith("E ") and "must hold one table" in line]) == 2
    result.stdout.fnmatch_lines_random(
        [
            "*SpecError: *pyproject.toml: ?tool.pytest-sway.specs? must hold one table of fields for each name, such as"
            " v3 = { base = ..., adapter = ... }; found 'v3'."
        ]
    )
