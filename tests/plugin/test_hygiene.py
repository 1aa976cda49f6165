"""Mutations and leaks: the right test is blamed, and the next one gets a clean backend."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import WIDE, Suite

MUTATES = """
def test_clean(sway_backend):
    sway_backend(dummy("a"))

def test_dirty(sway_backend):
    sway_backend(dummy("a")).dirty.append("parameter w: contents changed")

def test_next(sway_backend):
    assert sway_backend(dummy("a")).dirty == []
"""

LEAKS = """
def test_leaks(sway_backend):
    sway_backend(dummy("a")).leaky = True

def test_next(sway_backend):
    sway_backend(dummy("b"))
"""


def test_the_test_that_mutates_gets_the_error_and_the_next_a_clean_backend(suite: Suite) -> None:
    result = suite.run(MUTATES)
    result.assert_outcomes(passed=3, errors=1)
    assert suite.events() == ["load a", "close a", "load a", "close a"]
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_dirty*",
            "*MutationError: test_suite.py::test_dirty left a shared model changed:",
            "*dummy:a:",
            "*parameter w: contents changed",
            "left changed: test_suite.py::test_dirty left*",
        ]
    )


SWALLOWS = """
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown():
    try:
        return (yield)
    except Exception:
        note("swallowed")
"""


def test_a_conftest_that_swallows_the_errors_of_teardowns_hides_no_mutation(suite: Suite) -> None:
    conftest = suite.pytester.path / "conftest.py"
    conftest.write_text(conftest.read_text() + SWALLOWS)
    suite.run(MUTATES).assert_outcomes(passed=3, errors=1)
    assert "swallowed" not in suite.events()


def test_mutations_can_warn_or_be_ignored(suite: Suite) -> None:
    suite.pytester.makeini("[pytest]\nsway_on_mutation = warn\n")
    result = suite.run(MUTATES, "-W", "default")
    result.assert_outcomes(passed=3, warnings=1)
    result.stdout.fnmatch_lines(["*SwayWarning: test_suite.py::test_dirty left a shared model changed:*"])
    suite.pytester.makeini("[pytest]\nsway_on_mutation = ignore\n")
    result = suite.run(MUTATES)
    result.assert_outcomes(passed=2, failed=1)


def test_a_mutation_through_a_wider_fixture_is_blamed_on_the_test_not_on_the_fixture(suite: Suite) -> None:
    result = suite.run(
        WIDE
        + """
def test_clean(backend):
    pass

def test_dirty(backend):
    backend.dirty.append("module h: training mode on")

def test_after(backend):
    note("never runs")

def test_others_go_on(sway_backend):
    assert sway_backend(dummy("wide")).dirty == []
"""
    )
    result.assert_outcomes(passed=3, failed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["*MutationError: the fixture 'backend' holds dummy:wide, which test_suite.py::test_dirty left changed, so*"]
    )
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_dirty*"])
    assert suite.events().count("load wide") == 2
    assert suite.events().count("close wide") == 2


def test_who_shares_what_was_changed_is_closed_too_and_not_blamed(suite: Suite) -> None:
    result = suite.run("""
def test_dirty(sway_backend, sway_cache):
    shared = ["parameter w: contents changed"]
    sway_cache.get_or_load(dummy("b")).backend.dirty = shared
    sway_backend(dummy("a")).dirty = shared

def test_b(sway_backend):
    assert sway_backend(dummy("b")).dirty == []
""")
    result.assert_outcomes(passed=2, errors=1)
    assert suite.events().count("load b") == 2


def test_a_leak_is_reported_with_holder_and_user_and_fails_the_run(any_suite: Suite) -> None:
    result = any_suite.run(LEAKS, "--sway-cache-size=1")
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "leaked: *3.0 MiB of dummy:a were still in memory after its close",
            "*held by module test_x: global KEEP",
            "*last used by test_suite.py::test_leaks",
            "the run fails because weights leaked (sway_on_leak = error)",
        ]
    )


@pytest.mark.parametrize("policy", ["warn", "ignore"])
def test_a_leak_can_warn_or_be_ignored(suite: Suite, policy: str) -> None:
    suite.pytester.makeini(f"[pytest]\nsway_on_leak = {policy}\n")
    result = suite.run(LEAKS, "--sway-cache-size=1")
    assert result.ret == pytest.ExitCode.OK
    assert ("leaked: 3.0 MiB of dummy:a" in result.stdout.str()) == (policy == "warn")


def test_a_comparison_that_raises_is_the_test_s_error_and_every_fixture_still_ends(suite: Suite) -> None:
    result = suite.run(
        WIDE
        + """
def test_x(backend, sway_backend):
    def changes():
        raise RuntimeError("cannot compare")
    backend.changes = changes
    sway_backend(dummy("a"))
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*comparing it with its state after the load failed: RuntimeError: cannot compare"])
    assert suite.events() == ["load wide", "load a", "fixture ends", "close wide", "close a"]


def test_a_lease_that_ended_in_the_test_is_compared_too(suite: Suite) -> None:
    result = suite.run("""
def test_dirty(sway_cache):
    with sway_cache.lease(dummy("a")) as backend:
        backend.dirty.append("parameter w: contents changed")

def test_next(sway_backend):
    assert sway_backend(dummy("a")).dirty == []
""")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_dirty*"])


@pytest.mark.parametrize("fixtures", ["sway_backend, undoes", "undoes, sway_backend"])
def test_what_a_fixture_puts_back_is_no_change(suite: Suite, fixtures: str) -> None:
    result = suite.run(f"""
@pytest.fixture
def undoes():
    dirty = []
    yield dirty
    for lines in dirty:
        lines.clear()

def test_x({fixtures}):
    backend = sway_backend(dummy("a"))
    backend.dirty.append("parameter w: contents changed")
    undoes.append(backend.dirty)
""")
    result.assert_outcomes(passed=1)
    assert suite.events() == ["load a", "close a"]


@pytest.mark.parametrize(
    ("ending", "code"), [("raise KeyboardInterrupt", 2), ("pytest.exit('enough', returncode=7)", 7)]
)
def test_an_interrupted_test_that_changed_a_model_ends_the_run_cleanly(suite: Suite, ending: str, code: int) -> None:
    result = suite.run_apart(f"""
def test_x(sway_backend):
    sway_backend(dummy("a")).dirty.append("module h: training mode on")
    {ending}
""")
    assert result.ret == code
    assert suite.events() == ["load a", "close a"]
    result.stdout.no_fnmatch_line("*Traceback*")


@pytest.mark.parametrize(
    ("ending", "code"), [("raise KeyboardInterrupt", 2), ("pytest.exit('enough', returncode=7)", 7)]
)
@pytest.mark.parametrize("options", [(), ("-o", "sway_on_mutation=warn", "-W", "error")], ids=["error", "warn"])
@pytest.mark.parametrize("scope", ["function", "class"])
def test_an_interrupted_teardown_of_a_changed_model_ends_the_run(
    suite: Suite, scope: str, options: tuple[str, ...], ending: str, code: int
) -> None:
    result = suite.run_apart(
        f"""
@pytest.fixture(scope="{scope}")
def changed(sway_cache):
    with sway_cache.lease(dummy("a")) as backend:
        yield backend
        {ending}

class TestThis:
    def test_x(self, changed):
        changed.dirty.append("module h: training mode on")

def test_next():
    note("never runs")
""",
        *options,
    )
    assert result.ret == code
    assert suite.events() == ["load a", "close a"]


CHANGES_AT_ITS_END = """
@pytest.fixture(scope="SCOPE")
def wide(sway_cache):
    with sway_cache.lease(dummy("wide")) as backend:
        yield backend
        backend.dirty.append("module h: training mode on")

class TestWide:
    def test_first(self, wide):
        pass

    def test_second(self, wide):
        pass
"""


def test_a_change_in_the_teardown_of_a_wider_fixture_is_of_the_test_that_it_ends_with(suite: Suite) -> None:
    result = suite.run(
        CHANGES_AT_ITS_END.replace("SCOPE", "class")
        + """
def test_next(sway_backend):
    assert sway_backend(dummy("wide")).dirty == []
"""
    )
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of TestWide.test_second*"])
    assert suite.events() == ["load wide", "close wide", "load wide", "close wide"]


def test_a_change_in_the_teardown_of_a_session_fixture_is_found(suite: Suite) -> None:
    result = suite.run(CHANGES_AT_ITS_END.replace("SCOPE", "session"))
    result.assert_outcomes(passed=2, errors=1)


def test_a_comparison_can_end_the_run(suite: Suite) -> None:
    result = suite.run_apart("""
def test_x(sway_backend):
    sway_backend(dummy("a")).changes = lambda: pytest.exit("enough", returncode=7)

def test_next():
    note("never runs")
""")
    assert result.ret == 7
    assert "never runs" not in suite.events()


HOLDS = """
@pytest.fixture(scope="class")
def models(sway_cache, request):
    with sway_cache.lease(dummy("wide")) as backend:
        request.cls.backend = backend
        yield {"v3": backend}

class TestWide:
    def test_dirty(self, models):
        self.backend.dirty.append("module h: training mode on")

    def test_after(self, models):
        note("runs")

class TestOther:
    @pytest.fixture
    def models(self):
        return {}

    def test_innocent(self, models):
        assert models == {}
"""


def test_a_later_test_of_a_wider_fixture_is_refused_whatever_the_fixture_returns(suite: Suite) -> None:
    result = suite.run(HOLDS)
    result.assert_outcomes(passed=2, failed=1, errors=1)
    result.stdout.fnmatch_lines(["*MutationError: the fixture 'models' holds dummy:wide, which *::test_dirty left*"])
    assert "runs" not in suite.events()


def test_a_fixture_that_overrides_the_one_with_a_changed_model_is_innocent(suite: Suite) -> None:
    result = suite.run(HOLDS.replace('scope="class"', 'scope="module"').replace("request.cls", "TestWide"))
    result.assert_outcomes(passed=2, failed=1, errors=1)


def test_a_later_test_of_a_wider_fixture_is_warned_if_changes_only_warn(suite: Suite) -> None:
    suite.pytester.makeini("[pytest]\nsway_on_mutation = warn\n")
    result = suite.run(HOLDS, "-W", "default")
    result.assert_outcomes(passed=3, warnings=2)
    result.stdout.fnmatch_lines(["*SwayWarning: the fixture 'models' holds dummy:wide, which *::test_dirty left*"])


def test_a_backend_whose_comparison_was_cut_off_is_loaded_anew(suite: Suite) -> None:
    result = suite.run("""
def test_dirty(sway_backend):
    backend = sway_backend(dummy("a"))
    backend.dirty.append("parameter w: contents changed")
    backend.changes = lambda: pytest.fail("Timeout")

def test_next(sway_backend):
    assert sway_backend(dummy("a")).dirty == []
""")
    result.assert_outcomes(passed=2, errors=1)
    assert suite.events() == ["load a", "close a", "load a", "close a"]


RUNS_TWO_FIRST = """
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session):
    first, session.items = session.items[:2], session.items[2:]
    for item, following in zip(first, [first[1], None]):
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
    return (yield)
"""


def test_tests_that_a_conftest_runs_before_pytest_does_are_checked_too(suite: Suite) -> None:
    conftest = suite.pytester.path / "conftest.py"
    conftest.write_text(conftest.read_text() + RUNS_TWO_FIRST)
    result = suite.run(MUTATES)
    result.assert_outcomes(passed=2, errors=1)  # after an error before the loop, pytest's own loop runs nothing
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_dirty*"])


def test_a_leak_check_that_raises_is_reported_and_fails_no_test(suite: Suite) -> None:
    result = suite.run(
        """
def test_one(sway_backend):
    def leak():
        raise RuntimeError("cannot look")
    sway_backend(dummy("a")).leak = leak

def test_two(sway_backend):
    sway_backend(dummy("b"))
""",
        "--sway-cache-size=1",
    )
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["raised: looking for leaks, dummy:a: RuntimeError: cannot look"])


def test_a_mock_for_a_backend_leaks_nothing(suite: Suite) -> None:
    suite.pytester.makepyfile(
        mocks="""
import unittest.mock
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_sway_build_backend(spec):
    return unittest.mock.MagicMock()
"""
    )
    result = suite.run('def test_x(sway_backend): sway_backend(dummy("a"))', "-p", "mocks")
    result.assert_outcomes(passed=1)
    assert result.ret == 0


ASKS = """
@pytest.fixture(scope="module")
def inner(sway_cache):
    with sway_cache.lease(dummy("wide")) as backend:
        yield backend

@pytest.fixture(scope="module")
def wide(inner):
    return inner

@pytest.fixture
def asked(request):
    return request.getfixturevalue("wide")

def test_dirty(asked):
    asked.dirty.append("module h: training mode on")

def test_after(asked):
    note("runs")

def test_in_its_body(request):
    request.getfixturevalue("wide")

def test_innocent(sway_backend):
    assert sway_backend(dummy("wide")).dirty == []
"""


IN_SET_UP = ASKS.replace("def wide(inner):\n    return inner", "def wide(request):\n    return ask(request)")
OUTER = """
@pytest.fixture(scope="module")
def outer(request):
    return request.getfixturevalue("inner")

def ask(request):
    return request.getfixturevalue("outer")

def test_outer_is_set_up_first(request):
    ask(request)
"""


@pytest.mark.parametrize(
    ("body", "passed"),
    [
        (ASKS, 2),
        (IN_SET_UP + "\ndef ask(request):\n    return request.getfixturevalue('inner')\n", 2),
        (OUTER + IN_SET_UP, 3),
    ],
    ids=["as an argument", "in its set-up", "in the set-up of one that its set-up asks for"],
)
def test_a_later_test_that_asks_for_the_fixture_at_run_time_is_refused_too(
    suite: Suite, body: str, passed: int
) -> None:
    result = suite.run(body)
    result.assert_outcomes(passed=passed, failed=2, errors=1)
    result.stdout.fnmatch_lines_random(
        [
            "*_ test_after _*",
            "*_ test_in_its_body _*",
            "*MutationError: the fixture 'inner' holds dummy:wide, which test_suite.py::test_dirty left changed, so*",
        ]
    )
    assert "runs" not in suite.events()


def test_a_later_test_that_asks_for_the_fixture_at_run_time_is_warned_once(suite: Suite) -> None:
    suite.pytester.makeini("[pytest]\nsway_on_mutation = warn\n")
    result = suite.run(ASKS, "-W", "default")
    result.assert_outcomes(passed=4, warnings=3)
