"""dlm-sway in the same environment: both plugins load, both work, and each accepts the other's specs and backends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_adapter, make_base

pytest.importorskip("dlm_sway", reason="the neighbour is not installed in this environment")

SUITE = """
from pathlib import Path

import pytest

ROOT = Path({root!r})


@pytest.mark.sway(spec=str(ROOT / "sway.yaml"))
def test_theirs(): ...


def test_ours_takes_their_spec_and_satisfies_their_protocols(sway_backend):
    from dlm_sway.core.model import ModelSpec
    from dlm_sway.core import scoring

    backend = sway_backend(ModelSpec(base=str(ROOT / "base"), adapter=ROOT / "adapter"))
    assert isinstance(backend, scoring.DifferentialBackend)
    assert isinstance(backend, scoring.ScalableDifferentialBackend)
    assert isinstance(backend, scoring.NullCalibratedBackend)
    assert isinstance(backend, scoring.PreflightCheckable)
    assert backend.preflight_finite_check() == (True, "")
    with backend.as_finetuned() as view:
        assert isinstance(view, scoring.ScoringModel)
    assert backend is sway_backend({{"base": ROOT / "base", "adapter": ROOT / "adapter"}})


def test_their_probe_runs_on_our_backend(sway_backend):
    from dlm_sway.backends import build
    from dlm_sway.core.model import ModelSpec
    from dlm_sway.core.result import Verdict
    from dlm_sway.probes.base import RunContext, build_probe

    spec = ModelSpec(base=str(ROOT / "base"), adapter=ROOT / "adapter")
    probe, probe_spec = build_probe({{"name": "dk", "kind": "delta_kl", "prompts": ["the sun", "the cat sat"]}})
    ours = probe.run(probe_spec, RunContext(backend=sway_backend(spec), seed=0, top_k=16))
    theirs = probe.run(probe_spec, RunContext(backend=build(spec), seed=0, top_k=16))
    assert ours.verdict != Verdict.ERROR
    assert ours.raw == pytest.approx(theirs.raw, abs=1e-4)
"""

YAML = """
version: 1
models:
  base: {{kind: hf, base: "{root}/base"}}
  ft: {{kind: hf, base: "{root}/base", adapter: "{root}/adapter"}}
suite:
  - {{name: dk, kind: delta_kl, prompts: ["the sun rises in the", "the cat sat"]}}
"""


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Runs pytest in pytest with all installed plugins."""
    monkeypatch.delenv("PYTEST_ADDOPTS")
    return pytester


def test_both_plugins_work_side_by_side(pytester: pytest.Pytester, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    (tmp_path / "sway.yaml").write_text(YAML.format(root=tmp_path))
    pytester.makepyfile(SUITE.format(root=str(tmp_path)))
    result = pytester.runpytest_subprocess("-v", "-W", "ignore::DeprecationWarning", timeout=300)
    assert result.parseoutcomes().get("passed", 0) >= 3
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*test_theirs::dk PASSED*", "*base *base: 1 load, *"])


@pytest.mark.parametrize(("switched_off", "there"), [("sway", {"ours"}), ("pytest-sway", {"theirs"})])
def test_each_plugin_is_switched_off_by_its_own_name(
    pytester: pytest.Pytester, switched_off: str, there: set[str]
) -> None:
    shown = pytester.runpytest_subprocess("--markers", "-p", f"no:{switched_off}").stdout.str()
    markers = {"ours": "@pytest.mark.sway_spec(", "theirs": "@pytest.mark.sway("}
    assert {whose for whose, marker in markers.items() if marker in shown} == there
