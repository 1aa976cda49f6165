"""``sway_compare`` without a baseline: scores that ``--sway-record`` wrote beside the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_adapter, make_base

SUITE = """
import pytest

FACTS = [(f"the sun rises for the {n} time in the", f" east {n}") for n in range(12)]

def canned(tuned=0.0, base=0.0, name="base"):
    def side(shift):
        return {"logprobs": {prompt: {answer: -1.0 + shift * (n + 1)} for n, (prompt, answer) in enumerate(FACTS)}}
    return {"kind": "dummy", "base": name, "answers": {"base": side(base), "finetuned": side(tuned)}}

"""
GOOD = "def test_it(sway_compare):\n    assert sway_compare(FACTS, canned({})).high >= 0\n"


class Recording:
    """A suite that records and compares."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.folder = pytester.path / "test_suite"
        self.file = self.folder / "test_it.json"
        pytester.makepyprojecttoml('[tool.pytest.ini_options]\nminversion = "8.0"\n')

    def run(self, body: str, *args: str) -> pytest.RunResult:
        self.pytester.makepyfile(test_suite=SUITE + body)
        return self.pytester.runpytest_inprocess("-p", "no:cacheprovider", "--tb=short", *args)

    def record(self, body: str, *args: str) -> pytest.RunResult:
        return self.run(body, "--sway-record", *args)

    def read(self, name: str = "test_it") -> Any:
        return json.loads((self.folder / f"{name}.json").read_text("utf-8"))

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Recording:
    return Recording(pytester)


# --- recording --------------------------------------------------------------------------------------------------------


def test_recorded_scores_replace_the_baseline(suite: Recording) -> None:
    result = suite.record(GOOD.format(0.1))
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["sway: recording the scores of tests that pass"])
    result.stdout.fnmatch_lines(["*= sway records =*", "12 scores in test_suite/test_it.json", "review the *"])
    (found,) = suite.read()["comparisons"]
    assert (found["unit"], found["score"], found["base"]["name"]) == ("nats an answer", "logprob_of", "base")
    assert [(row["base"], row["tuned"]) for row in found["rows"]] == [
        (-1.0, round(-0.9 + n / 10, 4)) for n in range(12)
    ]
    result = suite.run(
        "def test_it(sway_compare):\n"
        "    c = sway_compare(FACTS, canned(0.2))\n"
        "    assert (c.baseline, c.drift) == ('recorded', 0.0)\n"
        "    assert c.mean == pytest.approx(0.65)\n"
        "    assert [row.baseline for row in c.rows] == [pytest.approx(-0.9 + n / 10) for n in range(12)]\n"
    )
    result.assert_outcomes(passed=1)
    assert "sway records" not in result.stdout.str()


def test_an_unchanged_candidate_differs_by_exactly_0(suite: Recording) -> None:
    suite.record(GOOD.format(0.123456))
    body = (
        "def test_it(sway_compare):\n    c = sway_compare(FACTS, canned(0.123456))\n    assert c.low == c.high == 0.0\n"
    )
    suite.run(body).assert_outcomes(passed=1)


def test_recording_again_replaces_the_record(suite: Recording) -> None:
    suite.record(GOOD.format(0.1))
    suite.record(GOOD.format(-5.0)).assert_outcomes(passed=1)  # worse than before: the review catches that
    assert suite.read()["comparisons"][0]["rows"][0]["tuned"] == -6.0
    suite.run(GOOD.format(-5.1)).assert_outcomes(failed=1)


def test_a_comparison_with_a_baseline_records_nothing(suite: Recording) -> None:
    body = "def test_it(sway_compare):\n    assert sway_compare(FACTS, canned(0.1), canned()).low > 0\n"
    result = suite.record(body)
    result.assert_outcomes(passed=1)
    assert suite.names() == []
    assert "sway records" not in result.stdout.str()


def test_several_comparisons_of_a_test_are_in_one_file(suite: Recording) -> None:
    body = (
        "def test_it(sway_compare):\n"
        "    first, second = sway_compare(FACTS, canned({})), sway_compare(FACTS[:5], canned({}))\n"
        "    third = sway_compare(FACTS, canned({}), name='third')\n"
        "    print(*(f'{{c.n}} {{c.name}} {{c.mean:.4f}}' for c in (first, second, third)), sep='\\n')\n"
    )
    suite.record(body.format(0.1, 0.2, 0.3))
    assert [each["name"] for each in suite.read()["comparisons"]] == ["comparison", "comparison #2", "third"]
    suite.run(body.format(0.2, 0.2, 0.2), "-s").stdout.fnmatch_lines(
        ["*12 dummy:base against recorded 0.6500", "5 dummy:base against recorded 0.0000", "12 third -0.6500"]
    )


def test_names_of_comparisons_are_unique(suite: Recording) -> None:
    calls = ["", "", ", name='comparison #2'", ", name='comparison'"]
    body = "def test_it(sway_compare):\n" + "".join(f"    sway_compare(FACTS, canned(0.1){call})\n" for call in calls)
    suite.record(body)
    names = [each["name"] for each in suite.read()["comparisons"]]
    assert names == ["comparison", "comparison #2", "comparison #2 #2", "comparison #3"]


def test_comparisons_of_threads_are_recorded_in_the_order_of_their_names(suite: Recording) -> None:
    body = (
        "from concurrent.futures import ThreadPoolExecutor\n\n"
        "def test_it(sway_compare):\n"
        "    for name in ('b', 'step 10', 'step 9', 'a'):\n"
        "        with ThreadPoolExecutor(1) as pool:\n"
        "            pool.submit(sway_compare, FACTS, canned(0.1), name=name).result()\n"
        "    sway_compare(FACTS, canned(0.1))\n"
    )
    suite.record(body).assert_outcomes(passed=1)
    names = [each["name"] for each in suite.read()["comparisons"]]
    assert names == ["comparison", "a", "b", "step 9", "step 10"]


@pytest.mark.parametrize("threads", [1, 2])
def test_comparisons_of_threads_need_names(suite: Recording, threads: int) -> None:
    """Also those of one thread: a pool of two may run two calls in one of its threads or in both."""
    body = (
        "from concurrent.futures import ThreadPoolExecutor\n\n"
        "def test_it(sway_compare):\n"
        f"    with ThreadPoolExecutor({threads}) as pool:\n"
        "        made = [pool.submit(sway_compare, FACTS[at:], canned(0.1)) for at in range(2)]\n"
        "    [each.result() for each in made]\n"
    )
    result = suite.record(body)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E *RecordError: two comparisons of test_suite.py::test_it are called 'comparison', and one is made in"
            " another thread than the test's: their record cannot tell them apart, since threads and what a pool runs"
            " in them are in no order. Pass a name= of its own to each.*"
        ]
    )
    assert suite.names() == []


def test_two_workers_record_their_own_tests(suite: Recording) -> None:
    body = (
        "@pytest.mark.parametrize('town', ['Paris', 'paris', 'a/b', 'a_b'])\n"
        "def test_it(sway_compare, town):\n    assert sway_compare(FACTS, canned(len(town))).high >= 0\n"
    )
    result = suite.record(body, "-n", "2")
    result.assert_outcomes(passed=4)
    assert result.stdout.str().count("12 scores in test_suite/") == len(suite.names()) == 4
    suite.run(body, "-n", "2").assert_outcomes(passed=4)
    assert "test_it[a_b].json" in suite.names()


def test_tests_of_classes_whose_names_differ_in_case_have_their_own_files(suite: Recording) -> None:
    body = "".join(
        f"class Test{name}:\n    def test_it(self, sway_compare):\n        sway_compare(FACTS, canned(0.1))\n"
        for name in ("Town", "town")
    )
    suite.record(body).assert_outcomes(passed=2)
    assert len({name.lower() for name in suite.names()}) == 2


@pytest.mark.parametrize(
    "failing",
    [
        "    assert False\n",
        "    pytest.skip('no')\n",
        "    pytest.xfail('no')\n",
        "    assert c.low > 0\n",
    ],
)
def test_nothing_is_recorded_of_a_test_that_does_not_pass(suite: Recording, failing: str) -> None:
    suite.record("def test_it(sway_compare):\n    c = sway_compare(FACTS, canned(0.1))\n" + failing)
    assert suite.names() == []


def test_nothing_is_recorded_of_a_test_that_should_have_failed(suite: Recording) -> None:
    suite.record("@pytest.mark.xfail(strict=True)\n" + GOOD.format(0.1)).assert_outcomes(failed=1)
    assert suite.names() == []


def test_nothing_is_recorded_of_a_test_of_which_a_subtest_fails(suite: Recording) -> None:
    suite.record(
        """
import unittest

class TestIt(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def compare(self, sway_compare):
        self.compare = sway_compare

    def test_it(self):
        self.compare(FACTS, canned(0.1))
        for number in (1, 2, 3):
            with self.subTest(number):
                assert number != 2
"""
    )
    assert suite.names() == []


def test_nothing_is_recorded_of_a_test_whose_teardown_fails(suite: Recording) -> None:
    suite.record(
        "@pytest.fixture\ndef broken():\n    yield\n    raise OSError('no')\n\n"
        "def test_it(broken, sway_compare):\n    sway_compare(FACTS, canned(0.1))\n"
    ).assert_outcomes(passed=1, errors=1)
    assert suite.names() == []


def test_a_failing_test_keeps_its_record(suite: Recording) -> None:
    suite.record(GOOD.format(0.1))
    before = suite.file.read_bytes()
    suite.record(GOOD.format(0.2) + "    assert False\n").assert_outcomes(failed=1)
    assert suite.file.read_bytes() == before


def test_a_record_that_cannot_be_written_is_an_error_and_the_old_one_stays(
    suite: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite.record(GOOD.format(0.1))
    before = suite.file.read_bytes()

    def read_only(self: Path, target: Path) -> Path:
        raise PermissionError(30, "Read-only file system", str(target))

    monkeypatch.setattr(Path, "replace", read_only)
    result = suite.record(GOOD.format(0.2))
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "E *RecordError: the scores of test_suite.py::test_it cannot be recorded: test_suite/test_it.json cannot be"
            " written (Read-only file system). Run --sway-record in a checkout that you can write to."
        ]
    )
    assert (suite.file.read_bytes(), suite.names()) == (before, ["test_it.json"])


def test_a_file_where_the_folder_belongs_is_an_error(suite: Recording) -> None:
    suite.folder.write_text("in the way")
    result = suite.record(GOOD.format(0.1))
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["E *RecordError: the scores of * cannot be recorded: test_suite/test_it.json cannot*"])


# --- comparing with a record ------------------------------------------------------------------------------------------


def test_without_a_record_the_error_says_how_to_make_one(suite: Recording) -> None:
    result = suite.run(GOOD.format(0.1))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E *RecordError: sway_compare got no baseline, and no scores are recorded for"
            " test_suite.py::test_it: test_suite/test_it.json does not exist. Run the test with --sway-record on a"
            " candidate that is good enough, review the file and commit it; or pass a baseline.",
            "E *See RecordError in the docs of pytest-sway: reference/errors.md#recorderror",
        ]
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            "[*FACTS, ('new', ' east')], canned(0.1)",
            "*test_it.json has no score of questions?12? ('new east'): 1 of 13 *",
        ),
        ("FACTS, canned(0.1, name='other')", "*was recorded on another base: base, but the candidate's is other.*"),
        ("FACTS, canned(0.1), score=ones", "*has another score: 'logprob_of', but the test asks for 'ones'.*"),
        ("FACTS, canned(0.1), name='new'", "*has no comparison 'new'; it has 'comparison'. To record anew*"),
    ],
)
def test_a_record_of_another_question_base_score_or_name_is_an_error(suite: Recording, call: str, message: str) -> None:
    suite.record(GOOD.format(0.1))
    result = suite.run(
        "def ones(view, questions):\n    return [1.0] * len(questions)\n\n"
        f"def test_it(sway_compare):\n    sway_compare({call})\n"
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"E *RecordError: {message}"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "* is cut off or was edited by hand: it is not valid JSON *"),
        (lambda text: text.replace("-0.9000", "-0.8000"), "* was changed after it was recorded, *its checksum does*"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "* has schema 2, and this pytest-sway reads 1. *"),
    ],
)
def test_a_damaged_record_is_an_error_and_recording_mends_it(suite: Recording, damage: Any, message: str) -> None:
    suite.record(GOOD.format(0.1))
    whole = suite.file.read_text()
    suite.file.write_text(damage(whole))
    result = suite.run(GOOD.format(0.1))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"E *RecordError: test_suite/test_it.json{message}"])
    suite.record(GOOD.format(0.1)).assert_outcomes(passed=1)
    assert suite.file.read_text() == whole


def test_a_folder_in_a_records_place_is_an_error(suite: Recording) -> None:
    suite.file.mkdir(parents=True)
    result = suite.run(GOOD.format(0.1))
    result.stdout.fnmatch_lines(["E *RecordError: test_suite/test_it.json cannot be read (*). To record anew*"])


def test_fewer_questions_are_compared_with_their_own_scores(suite: Recording) -> None:
    suite.record(GOOD.format(0.1))
    body = "def test_it(sway_compare):\n    assert sway_compare(FACTS[4:8], canned(0.2)).mean == pytest.approx(0.65)\n"
    suite.run(body).assert_outcomes(passed=1)


def test_recording_right_answers_compares_a_model_with_itself(suite: Recording) -> None:
    body = """
def right(view, questions):
    return [n % 2 for n, _ in enumerate(questions)]

def test_it(sway_compare):
    c = sway_compare(FACTS, canned(0.1), score=right)
    assert c.high >= 0
    if {recording}:
        assert (c.low, c.high) == (0.0, 0.0)
    else:
        assert c.low < 0.0 < c.high
"""
    suite.record(body.replace("{recording}", "True")).assert_outcomes(passed=1)
    suite.run(body.replace("{recording}", "False")).assert_outcomes(passed=1)


# --- drift ------------------------------------------------------------------------------------------------------------


def test_a_base_that_has_moved_fails_the_test_and_not_the_adapter(suite: Recording) -> None:
    suite.record(GOOD.format(0.1))
    result = suite.run("def test_it(sway_compare):\n    assert sway_compare(FACTS, canned(0.1, base=0.1)).high >= 0\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E *RecordError: the base itself has moved: it scores 0.65 nats an answer more than when"
            " test_suite/test_it.json was recorded, and sway_drift allows 0.05. Device, dtype and versions are the"
            " same: other hardware or edited files of the base cause this, not the adapter. Run as when it was"
            " recorded, raise sway_drift, or record again a candidate that was good enough (--sway-record).",
            "dummy:base against recorded: dummy:base - recorded = +0 nats an answer",
            "the base itself has moved by +0.65 since it was recorded",
        ]
    )


def test_the_bound_of_the_drift_is_a_setting(suite: Recording) -> None:
    suite.record(GOOD.format(0.1))
    body = (
        "def test_it(sway_compare):\n    assert sway_compare(FACTS, canned(0.1, -0.1)).drift == pytest.approx(-0.65)\n"
    )
    for bound in ("0.66", "inf"):
        result = suite.run(body, "-o", f"sway_drift={bound}")
        result.assert_outcomes(passed=1)
        result.stdout.fnmatch_lines([f"sway: *, drift at most {bound}"])
    suite.run(body, "-o", "sway_drift=0.64").assert_outcomes(failed=1)
    for bound in ("much", "-1", "nan"):
        result = suite.run(body, "-o", f"sway_drift={bound}")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert "ERROR: ini value sway_drift: must be a number of 0 or more, such as 0.05, or inf" in result.stderr.str()


def test_the_drift_error_names_changed_settings(suite: Recording) -> None:
    suite.record(GOOD.format(0.1))
    body = "def test_it(sway_compare):\n    sway_compare(FACTS, {**canned(0.1, 0.1), 'dtype': 'bf16'})\n"
    suite.run(body).stdout.fnmatch_lines(["E * versions cause this (dtype was auto, is bf16), not the adapter. *"])


def test_a_comparison_with_a_baseline_has_no_drift(suite: Recording) -> None:
    body = "def test_it(sway_compare):\n    assert sway_compare(FACTS, canned(0.1), canned()).drift is None\n"
    suite.run(body).assert_outcomes(passed=1)


def test_a_view_has_no_base(suite: Recording) -> None:
    body = (
        "def test_it(sway_backend, sway_compare):\n"
        "    with sway_backend(canned({})).as_finetuned() as tuned:\n"
        "        c = sway_compare(FACTS, tuned)\n"
        "    assert c.drift is None\n"
        "    print(c.name, c.mean)\n"
    )
    suite.record(body.format(0.1)).assert_outcomes(passed=1)
    assert suite.read()["comparisons"][0]["base"] is None
    suite.run(body.format(0.1), "-s").stdout.fnmatch_lines(["*ft against recorded 0.0"])
    result = suite.run(GOOD.format(0.1))
    result.stdout.fnmatch_lines(
        ["E *RecordError: *test_it.json has no scores of a base, since the recorded candidate *"]
    )


def test_the_fixture_belongs_to_one_test(suite: Recording) -> None:
    result = suite.run(
        "KEPT = []\n\n"
        "def test_a(sway_compare):\n    KEPT.append(sway_compare)\n\n"
        "def test_b():\n    KEPT[0](FACTS, canned(0.1))\n\n"
        "@pytest.fixture(scope='module')\ndef wide(sway_compare):\n    return sway_compare\n\n"
        "def test_c(wide):\n    pass\n"
    )
    result.assert_outcomes(passed=1, failed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ScopeMismatch: You tried to access the function scoped fixture sway_compare with a module scoped *",
            "E *RecordError: sway_compare was called after the end of its test test_suite.py::test_a, whose record*",
        ]
    )


# --- real files -------------------------------------------------------------------------------------------------------


def test_a_base_is_recognised_by_its_weights_in_any_folder(suite: Recording, tmp_path: Path) -> None:
    base, other = make_base(tmp_path / "base"), make_base(tmp_path / "other", seed=1)
    adapter = make_adapter(tmp_path / "adapter", base)
    body = (
        "TEXTS = ['the sun rises in the east .', 'paris is the capital of france', 'hello world']\n\n"
        "def test_it(sway_compare):\n"
        f"    c = sway_compare(TEXTS, {{{{'base': {{!r}}, 'adapter': {str(adapter)!r}}}}})\n"
        "    assert (c.mean, c.low, c.high, c.drift, c.unit) == (0.0, 0.0, 0.0, 0.0, 'nats per token')\n"
    )
    suite.record(body.format(str(base))).assert_outcomes(passed=1)
    (found,) = suite.read()["comparisons"]
    assert len(found["base"]["digest"]) == len(found["candidate"]["digest"]) == 64
    assert {"device", "dtype", "torch", "transformers", "peft", "pytest-sway"} <= found["made_with"].keys()
    moved = base.rename(tmp_path / "moved")
    suite.run(body.format(str(moved)), "-o", "sway_on_base_mismatch=ignore").assert_outcomes(passed=1)
    result = suite.run(body.format(str(other)), "-o", "sway_on_base_mismatch=ignore")
    result.stdout.fnmatch_lines(
        ["E *RecordError: *was recorded on another base: *base (digest *), but the candidate's *"]
    )


def test_a_spec_without_an_adapter_has_no_drift(suite: Recording, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    body = (
        "TEXTS = ['the sun rises in the east .', 'hello world']\n\n"
        f"def test_it(sway_compare):\n    assert sway_compare(TEXTS, {{'base': {str(base)!r}}}).drift is None\n"
    )
    suite.record(body).assert_outcomes(passed=1)
    suite.run(body).assert_outcomes(passed=1)
