"""``--sway-json`` and ``--sway-markdown``: the files of a run, in one process or several, complete or interrupted."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.plugin.test_compare import NAMED, TWICE, UNITTEST, run
from tests.tiny import make_adapter, make_base

SCHEMA = Path(__file__).parents[2] / "docs" / "pages" / "reference" / "run-record.schema.json"
JSON = "--sway-json=run.json"

SOME = """
def test_better(sway_compare):
    assert sway_compare(FACTS, canned(0.5), canned(0.0), name="better").low > 0
    sway_compare([prompt for prompt, _ in FACTS], NEW, OLD, score=lambda view, asked: [1] * 12, name="all right")

def test_worse(sway_compare):
    assert sway_compare(FACTS, canned(-0.5), canned(0.0), name="worse").high >= 0

def test_given_up(sway_compare):
    sway_compare(FACTS, "new", OLD, name="given up")
    pytest.skip("for now")

def test_compares_nothing(sway_backend):
    sway_backend(NEW)
"""


def written(pytester: pytest.Pytester, name: str = "run.json") -> dict[str, Any]:
    """Return the file that a run wrote, checked against the schema."""
    record: dict[str, Any] = json.loads((pytester.path / name).read_text("utf-8"))
    jsonschema.validate(record, json.loads(SCHEMA.read_text("utf-8")), cls=jsonschema.Draft202012Validator)
    return record


def by_name(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in record["comparisons"]}


@pytest.mark.parametrize("args", [("-p", "no:xdist"), ("-n", "2")], ids=" ".join)
def test_the_json_has_every_row_of_every_comparison(pytester: pytest.Pytester, args: tuple[str, ...]) -> None:
    result = run(pytester, SOME, JSON, *args, specs=NAMED)
    result.assert_outcomes(passed=2, failed=1, skipped=1)
    result.stdout.fnmatch_lines([f"--sway-json: wrote {pytester.path / 'run.json'}"])
    record = written(pytester)
    found = by_name(record)
    assert [(name, each["outcome"], each["verdict"]) for name, each in found.items()] == [
        ("better", "passed", None),
        ("all right", "passed", None),
        ("given up", "skipped", None),
        ("worse", "failed", "refuted"),
    ]
    assert found["worse"]["margin"] == 0
    assert found["worse"]["p"] < found["worse"]["p_holm"] < 0.01
    first = {"question": ["the sun rises for the 0 time in the", " east 0"], "candidate": -1.5, "baseline": -1.0}
    assert (len(found["worse"]["rows"]), found["worse"]["rows"][0]) == (12, first)
    assert found["all right"]["rows"][0]["question"] == "the sun rises for the 0 time in the"
    assert (found["all right"]["mean"], found["all right"]["p"]) == (0.0, 1.0)
    assert record["run"]["exit_status"] == 1
    assert record["run"]["workers"] == (2 if "-n" in args else 0)
    assert set(record["workers"]) == ({"gw0", "gw1"} if "-n" in args else {"main"})
    assert record["specs"]["old"] == {"fields": {"kind": "dummy", "base": "b"}, "digest": None}
    assert record["specs"]["new"]["fields"]["device"] == "auto"
    assert record["devices"] == {}
    assert record["versions"]["pytest"] == pytest.__version__
    assert {"pytest-xdist", "scipy", "numpy"} & set(record["versions"]) >= {"scipy", "numpy"}


def test_tests_with_numbers_are_in_the_order_of_the_numbers(pytester: pytest.Pytester) -> None:
    body = """
@pytest.mark.parametrize("step", [16, 8, 100])
def test_it(sway_compare, step):
    sway_compare(FACTS, NEW, OLD, name=f"checkpoint-{step}")
"""
    run(pytester, body, JSON)
    assert list(by_name(written(pytester))) == ["checkpoint-8", "checkpoint-16", "checkpoint-100"]


def test_comparisons_of_other_threads_follow_in_the_order_of_their_names(pytester: pytest.Pytester) -> None:
    body = """
import threading

@pytest.fixture
def before(sway_compare):
    sway_compare(FACTS, NEW, OLD, name="fixture")

def test_it(before, sway_compare):
    last = threading.Event()

    def late(name, waits_for, done):
        assert waits_for.wait(20)
        sway_compare(FACTS, canned(len(name)), canned(0.0), name=name)
        done.set()

    turns = [threading.Event() for _ in range(4)]
    names = ["step 16", "step 9", "a"]
    threads = [threading.Thread(target=late, args=each) for each in zip(names, turns, turns[1:])]
    for each in threads:
        each.start()
    sway_compare(FACTS, NEW, OLD, name="own 2")
    turns[0].set()
    for each in threads:
        each.join()
    sway_compare(FACTS, NEW, OLD, name="own 1")
"""
    run(pytester, body, JSON, "--junitxml=junit.xml").assert_outcomes(passed=1)
    found = written(pytester)["comparisons"]
    names = ["fixture", "own 2", "own 1", "a", "step 9", "step 16"]
    assert [each["name"] for each in found] == names
    # Each has its own rows: 1 for each letter of its name, times the number of the question.
    assert [each["rows"][0]["candidate"] - each["rows"][0]["baseline"] for each in found] == [0, 0, 0, 1, 6, 7]
    text = (pytester.path / "junit.xml").read_text()
    assert sorted(names, key=lambda name: text.index(f"&quot;{name}&quot;")) == names


def test_loads_hits_evictions_and_closes_are_events(pytester: pytest.Pytester) -> None:
    body = """
def test_one(sway_backend):
    for base in ("a", "a", "a", "b"):
        sway_backend({"kind": "dummy", "base": base})

def test_two(sway_backend):
    for base in ("b", "c"):
        sway_backend({"kind": "dummy", "base": base})
"""
    run(pytester, body, JSON, "--sway-cache-size=2")
    record = written(pytester)
    events = [(each["event"], each["spec"], each["count"]) for each in record["workers"]["main"]["events"]]
    # A repeated request within a test uses the test's lease and does not reach the cache.
    assert events == [
        ("load", "dummy:a", 1),
        ("load", "dummy:b", 1),
        ("hit", "dummy:b", 1),
        ("evict", "dummy:a", 1),
        ("close", "dummy:a", 1),
        ("load", "dummy:c", 1),
        ("close", "dummy:b", 1),
        ("close", "dummy:c", 1),
    ]
    assert record["comparisons"] == []
    moments = [each["at"] for each in record["workers"]["main"]["events"]]
    assert moments == sorted(moments)
    assert moments[-1] <= record["run"]["seconds"]


def test_a_real_model_has_digest_device_versions_and_bytes(pytester: pytest.Pytester, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    spec = f'{{ base = "{base}", adapter = "{adapter}", device = "cpu" }}'
    result = run(
        pytester,
        'def test_it(sway_backend):\n    sway_backend("tuned")\n',
        JSON,
        specs=f"[tool.pytest-sway.specs]\ntuned = {spec}\n",
    )
    result.assert_outcomes(passed=1)
    record = written(pytester)
    assert record["specs"]["tuned"]["fields"]["adapter"] == str(adapter)
    assert len(record["specs"]["tuned"]["digest"]) == 64
    assert set(record["devices"]) == {"cpu"}
    assert {"torch", "transformers", "peft"} <= set(record["versions"])
    load, close = record["workers"]["main"]["events"]
    assert load["bytes"] == load["resident_bytes"] > 0
    assert load["seconds"] > 0
    assert close["resident_bytes"] == 0


@pytest.mark.parametrize("args", [("-n", "1", "--dist", "load"), ("-n", "2")], ids=" ".join)
def test_comparisons_reported_before_a_worker_was_killed_are_there(
    pytester: pytest.Pytester, args: tuple[str, ...]
) -> None:
    body = """
import os

def test_a(sway_compare):
    sway_compare(FACTS, canned(0.5), canned(0.0), name="before")

def test_b(sway_compare):
    sway_compare(FACTS, canned(0.5), canned(0.0), name="lost")
    os._exit(9)

def test_c(sway_compare):
    sway_compare(FACTS, canned(0.5), canned(0.0), name="after")
"""
    result = run(pytester, body, JSON, "--sway-markdown=run.md", "--sway-html=run.html", *args)
    result.assert_outcomes(passed=2, failed=1)
    record = written(pytester)
    assert list(by_name(record)) == ["before", "after"]
    assert [len(each["rows"]) for each in record["comparisons"]] == [12, 12]
    (crashed,) = [name for name, worker in record["workers"].items() if worker["error"]]
    assert record["workers"][crashed]["error"].startswith("crashed (")
    loads = [event for worker in record["workers"].values() for event in worker["events"] if event["event"] == "load"]
    assert {event["spec"] for event in loads} == {"dummy:shifted 0.5", "dummy:shifted 0.0"}
    assert record["run"]["exit_status"] == 1
    lines = (pytester.path / "run.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if " | passed | 12 | " in line] == ["| before", "| after"]
    assert lines[0] == "## sway comparisons"
    assert lines[-2].startswith("shown")  # the legend below the table
    assert sections_of((pytester.path / "run.html").read_text("utf-8")) == ["before", "after"]


def sections_of(page: str) -> list[str]:
    """Return the headings of a page's comparisons; the page must be whole."""
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    return re.findall(r"<summary><h3>([^<]*)</h3>", page)


def test_an_interrupted_run_writes_its_comparisons(pytester: pytest.Pytester) -> None:
    body = """
def test_a(sway_compare):
    sway_compare(FACTS, NEW, OLD, name="before")

def test_b():
    pytest.exit("enough")
"""
    run(pytester, body, JSON)
    record = written(pytester)
    assert list(by_name(record)) == ["before"]
    assert record["run"]["exit_status"] == pytest.ExitCode.INTERRUPTED


def test_a_test_with_a_failed_subtest_has_failed(pytester: pytest.Pytester) -> None:
    body = f"""{UNITTEST}
        with self.subTest("worse"):
            assert self.compare(FACTS, NEW, OLD).low > 1
"""
    run(pytester, body, JSON)
    assert [each["outcome"] for each in written(pytester)["comparisons"]] == ["failed"]


def test_the_last_try_of_a_test_that_is_run_again_counts(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(TWICE)
    body = """
TRIES = []

def test_it(sway_compare):
    TRIES.append(1)
    for _ in TRIES[1:]:
        sway_compare(FACTS, canned(0.1), canned(0.0), name="last")
    assert sway_compare(FACTS, canned(0.1 * len(TRIES)), canned(0.0), name="first or last").low > 0
"""
    run(pytester, body, JSON, "--sway-markdown=run.md").assert_outcomes(passed=1)
    found = written(pytester)["comparisons"]
    assert [(each["name"], len(each["rows"]), round(each["mean"], 3)) for each in found] == [
        ("last", 12, 0.65),
        ("first or last", 12, 1.3),
    ]
    assert (pytester.path / "run.md").read_text().count("| first or last |") == 1


def test_a_run_of_only_the_failed_tests_has_its_own_record(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml(f'[tool.pytest.ini_options]\nminversion = "8.0"\n{NAMED}')
    cache = ("-o", "cache_dir=cache", "-p", "cacheprovider")
    run(pytester, SOME, *cache, JSON, specs=NAMED)
    again = pytester.runpytest_inprocess(*cache, "--lf", "--sway-json=again.json")
    again.assert_outcomes(failed=1)
    whole, part = by_name(written(pytester)), by_name(written(pytester, "again.json"))
    assert list(part) == ["worse"]
    assert {**part["worse"], "p_holm": None} == {**whole["worse"], "p_holm": None}
    assert part["worse"]["p_holm"] < whole["worse"]["p_holm"]


def test_two_runs_in_one_process_each_write_their_own(pytester: pytest.Pytester) -> None:
    run(pytester, SOME, JSON, "-k", "better", specs=NAMED)
    run(pytester, SOME, "--sway-json=other.json", "-k", "worse", specs=NAMED)
    assert list(by_name(written(pytester))) == ["better", "all right"]
    assert list(by_name(written(pytester, "other.json"))) == ["worse"]


def test_markdown_is_appended_by_one_process(pytester: pytest.Pytester) -> None:
    (pytester.path / "summary.md").write_text("# Mine\n")
    run(pytester, SOME, "--sway-markdown=summary.md", "-n", "2", specs=NAMED)
    text = (pytester.path / "summary.md").read_text()
    assert text.startswith("# Mine\n## sway comparisons\n")
    assert text.count("## sway comparisons\n") == 1
    lines = text.splitlines()
    assert lines[5].startswith("| worse | failed | 12 | -3.25 |")
    assert lines[5].endswith("| nats an answer | over 0&#58; refuted |")
    worst = lines.index("### worse") + 6
    assert lines[worst] == "| -6 | -7 | -1 | the sun rises for the 11 time in the east 11 |"
    assert len(lines) == worst + 10 + 1


def test_a_report_carries_rows_only_for_a_file(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
def pytest_runtest_logreport(report):
    print("rows of", report.when, len(getattr(report, "sway_rows", "")) > 99)
""")
    body = "def test_it(sway_compare):\n    sway_compare(FACTS, NEW, OLD)\n"
    result = run(pytester, body, "-s", JSON)
    result.stdout.fnmatch_lines(["*rows of setup False", "*rows of call True", "*rows of teardown False"])
    result = run(pytester, body, "-s", "--junitxml=junit.xml")
    assert "True" not in result.stdout.str()


def test_texts_that_need_escaping_arrive(pytester: pytest.Pytester) -> None:
    body = r"""
def test_it(sway_compare):
    asked = [("lone \ud800", " a"), ("nul \0 and \x1b[31m", " b"), ({"role": "user"}, "c"), object]
    score = lambda view, asked: [0.5, 0.25, 1.5, 2.5]
    assert sway_compare(asked, NEW, OLD, score=score, name="odd").low < 0
"""
    result = run(pytester, body, JSON, "--sway-markdown=run.md", "-n", "1")
    result.assert_outcomes(failed=1)
    (found,) = written(pytester)["comparisons"]
    assert [row["question"] for row in found["rows"]] == [
        ["lone \ud800", " a"],
        ["nul \0 and \x1b[31m", " b"],
        ["{'role': 'user'}", "c"],
        "<class 'object'>",
    ]
    assert "lone &#92;ud800 a" in (pytester.path / "run.md").read_text()


def test_secrets_are_in_no_file(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hf_secretsecret")
    body = """
def test_it(sway_compare):
    asked = [("hf_secretsecret", " a"), ("b", " hf_secretsecret")]
    assert sway_compare(asked, NEW, OLD, name="hf_secretsecret").low > 0
"""
    run(pytester, body, JSON, "--sway-markdown=run.md", "--junitxml=junit.xml").assert_outcomes(failed=1)
    for name in ("run.json", "run.md"):
        assert "secretsecret" not in (pytester.path / name).read_text()
    assert written(pytester)["comparisons"][0]["rows"][0]["question"] == ["***", " a"]


BAD = {
    "missing/run.json": "the folder '*/missing' does not exist; create it first; found 'missing/run.json'.",
    "": "must be the path of a file, not empty; found ''.",
    ".": "must be the path of a file, not of a folder; found '.'.",
    "test_suite.py/run.json": "the folder '*/test_suite.py' does not exist; create it first; found *",
    "x" * 300: "'*x' cannot be written (File name too long); found '*",
    "~nobody_has_it/run.json": "the folder '*/~nobody_has_it' does not exist; create it first; found '~*'.",
    "/dev/null": "must be the path of a regular file, which can be replaced; found '/dev/null'.",
}


@pytest.mark.parametrize("path", BAD)
def test_a_file_that_cannot_be_written_ends_the_run_before_it_begins(pytester: pytest.Pytester, path: str) -> None:
    result = run(pytester, "def test_it():\n    pass\n", f"--sway-json={path}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --sway-json: {BAD[path]}"])
    assert [each for each in pytester.path.iterdir() if each.suffix in (".json", ".tmp")] == []


def test_a_pipe_takes_no_report_that_replaces_a_file(pytester: pytest.Pytester) -> None:
    ends = os.pipe()
    try:
        result = run(pytester, "def test_it():\n    pass\n", f"--sway-json=/dev/fd/{ends[1]}")
    finally:
        for end in ends:
            os.close(end)
    result.stderr.fnmatch_lines(["ERROR: --sway-json: must be the path of a regular file, which can be replaced; *"])


def test_a_folder_without_write_permission_is_a_usage_error(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    result = run(pytester, "def test_it():\n    pass\n", "--sway-markdown=run.md")
    result.stderr.fnmatch_lines(["ERROR: --sway-markdown: '*' cannot be written; found 'run.md'."])


def test_two_reports_need_two_files(pytester: pytest.Pytester) -> None:
    result = run(pytester, "def test_it():\n    pass\n", JSON, "--sway-markdown=./run.json")
    result.stderr.fnmatch_lines(["ERROR: --sway-markdown: another report is written to this file; found './run.json'."])


def test_a_file_that_cannot_be_written_at_the_end_fails_the_run(pytester: pytest.Pytester) -> None:
    (pytester.path / "out").mkdir()
    body = "def test_it():\n    import shutil\n    shutil.rmtree('out')\n"
    result = run(pytester, body, "--sway-json=out/run.json", "--sway-markdown=run.md")
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["--sway-json: */out/run.json cannot be written: No such file or directory", "--sway-markdown: wrote */run.md"]
    )


@pytest.mark.parametrize("option", ["--collect-only", "--fixtures", "--markers"])
def test_a_call_that_runs_no_tests_keeps_the_file_of_the_previous_run(pytester: pytest.Pytester, option: str) -> None:
    (pytester.path / "run.json").write_text("before")
    run(pytester, SOME, JSON, option)
    assert (pytester.path / "run.json").read_text() == "before"


@pytest.mark.parametrize(
    "broken", ["[tool.pytest-sway", "[tool.pytest-sway.specs]\nv3 = {base = '~nobody-here/base'}\n"]
)
def test_a_report_is_written_although_the_named_specs_cannot_be_read(pytester: pytest.Pytester, broken: str) -> None:
    (pytester.path / "pytest.ini").write_text("[pytest]\n")
    (pytester.path / "pyproject.toml").write_text(broken)
    pytester.makepyfile("def test_x(): pass")
    pytester.runpytest_inprocess("-c", "pytest.ini", "--sway-json=run.json").assert_outcomes(passed=1)
    assert written(pytester)["run"]["exit_status"] == 0
