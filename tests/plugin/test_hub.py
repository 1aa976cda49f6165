"""The plugin with an adapter on a hub: what a run shows, and what its second run asks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from pytest_httpserver import HTTPServer

from pytest_sway.report.progress import LoadProgress
from tests.hub import ToyHub, files_of, use_cache, use_hub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SUITE = """
def test_x(sway_backend):
    with sway_backend({spec!r}).as_finetuned() as view:
        assert view.logprob_of("the sun rises in the", " east") < 0

def test_y(sway_backend, request):
    sway_backend({spec!r})
"""


@pytest.fixture(scope="module")
def _server() -> Iterator[HTTPServer]:
    with HTTPServer(threaded=True) as server:
        yield server


@pytest.fixture
def hub(_server: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyHub]:
    use_cache(monkeypatch, tmp_path / "cache")
    toy = ToyHub(_server)
    with use_hub(monkeypatch, toy.url):
        yield toy
    _server.clear()


def test_the_second_run_fetches_nothing_and_asks_once(
    pytester: pytest.Pytester, hub: ToyHub, base: Path, adapter: Path
) -> None:
    commit = hub.push("org/lora", files_of(adapter), branch="v1")
    spec = {"base": str(base), "adapter": "org/lora", "adapter_revision": "v1", "device": "cpu"}
    pytester.makepyfile(SUITE.format(spec=spec))
    name = f"org/lora@{commit[:7]}"
    first = pytester.runpytest_inprocess("-p", "no:xdist")
    first.assert_outcomes(passed=2)
    first.stdout.fnmatch_lines([f"*base* + {name} *1*1*", f"fetched from the hub: {name}, *iB, * s"])
    hub.take_requests()
    second = pytester.runpytest_inprocess("-p", "no:xdist")
    second.assert_outcomes(passed=2)
    second.stdout.no_fnmatch_line("fetched from the hub*")
    assert hub.take_requests() == ["HEAD /org/lora/resolve/v1/adapter_config.json"]


def test_a_fetch_and_a_load_are_shown_on_the_terminal(
    pytester: pytest.Pytester, hub: ToyHub, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    @contextmanager
    def loading(self: LoadProgress, what: str) -> Iterator[None]:
        shown.append(what)
        yield

    monkeypatch.setattr(LoadProgress, "loading", loading)
    commit = hub.push("org/lora", files_of(adapter))
    pytester.makepyfile(SUITE.format(spec={"base": str(base), "adapter": "hf://org/lora", "device": "cpu"}))
    pytester.runpytest_inprocess("-p", "no:xdist").assert_outcomes(passed=2)
    assert shown[0] == "the adapter 'org/lora' from the hub"
    assert shown[1].endswith(f" + org/lora@{commit[:7]}")


def test_a_repository_that_is_not_there_is_asked_for_once_in_a_run(
    pytester: pytest.Pytester, hub: ToyHub, base: Path
) -> None:
    pytester.makepyfile(SUITE.format(spec={"base": str(base), "adapter": "runs/v3", "device": "cpu"}))
    result = pytester.runpytest_inprocess("-p", "no:xdist")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "E*SpecError: the adapter 'runs/v3' is no folder in *",
            "E*(First raised for *::test_x; the load is not repeated.)",
        ]
    )
    assert len(hub.take_requests()) == 1


def test_a_named_adapter_is_a_folder_at_the_root_or_on_a_hub(
    pytester: pytest.Pytester, hub: ToyHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyprojecttoml(
        "[tool.pytest.ini_options]\n"
        + "".join(
            f"[tool.pytest-sway.specs.{name}]\nadapter = 'runs/{name}'\nbase = 'b'\n" for name in ("made", "later")
        )
        + "[tool.pytest-sway.specs.hub]\nadapter = 'org/lora'\nbase = 'b'\n"
    )
    pytester.mkdir("runs").joinpath("made").mkdir()
    pytester.makepyfile(
        """
        def test_x(sway_cache, pytestconfig):
            from pytest_sway.run.named_specs import named_specs
            for spec in named_specs(pytestconfig).values():
                print("adapter:", spec["adapter"])
        """
    )
    monkeypatch.chdir(pytester.mkdir("elsewhere"))
    result = pytester.runpytest_inprocess("..", "-s", "-p", "no:xdist")
    root = pytester.path
    result.stdout.fnmatch_lines([f"*adapter: {root}/runs/made", f"adapter: {root}/runs/later", "adapter: org/lora"])


def test_a_spec_without_a_base_has_a_readable_id_and_says_where_its_base_comes_from(
    pytester: pytest.Pytester, base: Path, adapter: Path
) -> None:
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.parametrize("spec", [{{"adapter": {str(adapter)!r}, "device": "cpu"}}])
        def test_x(sway_backend, spec):
            sway_backend(spec)

        def test_y(sway_backend):
            sway_backend(adapter={str(adapter)!r}, device="cpu")
        """
    )
    result = pytester.runpytest_inprocess("-v", "-p", "no:xdist")
    result.assert_outcomes(passed=2)
    label = f"{base.parent.name}/{base.name} (from adapter_config.json) + {adapter.parent.name}/{adapter.name}"
    result.stdout.fnmatch_lines([f"*::test_x[[]{adapter.parent.name}/{adapter.name}[]] PASSED*", f"{label} *1*1*"])
