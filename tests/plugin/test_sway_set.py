"""``--sway-set NAME.FIELD=VALUE`` changes or adds named specs for one run."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import Suite

NAMED = """
[tool.pytest.ini_options]
minversion = "8.0"

[tool.pytest-sway.specs]
baseline = { kind = "dummy", base = "a", adapter = "runs/v3" }
candidate = { kind = "dummy", base = "b", adapter = "runs/v3" }
"""
SHOWS = """
def test_x(sway_backend):
    for name in ("baseline", "candidate"):
        print(name, "is", str(sway_backend(name).spec), sway_backend(name).spec.adapter)
"""


@pytest.fixture
def named(suite: Suite) -> Suite:
    suite.pytester.makepyprojecttoml(NAMED)
    return suite


def test_it_changes_a_named_spec_and_the_header_shows_it(named: Suite) -> None:
    result = named.run(SHOWS, "-s", "--sway-set", "candidate.adapter=runs/v4", "--sway-set=candidate.base=c")
    root = named.pytester.path
    result.stdout.fnmatch_lines([f"sway: set candidate.adapter={root}/runs/v4, candidate.base=c"])
    result.stdout.fnmatch_lines(
        [f"*baseline is dummy:a + runs/v3 {root}/runs/v3", f"candidate is dummy:c + runs/v4 {root}/runs/v4"]
    )


def test_relative_folders_start_at_the_root_wherever_pytest_is_started(
    named: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    named.write(SHOWS)
    monkeypatch.chdir(named.pytester.mkdir("elsewhere"))
    result = named.pytester.runpytest_inprocess("..", "-s", "--sway-set=candidate.adapter=runs/v4")
    result.stdout.fnmatch_lines([f"candidate is dummy:b + runs/v4 {named.pytester.path}/runs/v4"])


def test_it_adds_a_spec_that_has_a_base(named: Suite) -> None:
    body = "def test_x(sway_backend):\n    assert str(sway_backend('new').spec) == 'dummy:mine'\n"
    named.run(body, "--sway-set=new.base=mine", "--sway-set=new.kind=dummy").assert_outcomes(passed=1)


def test_a_list_of_adapters_is_json(named: Suite) -> None:
    named.pytester.mkdir("runs")
    named.pytester.makepyprojecttoml(NAMED.replace('kind = "dummy", base = "b"', 'base = "b"'))
    body = "def test_x(sway_cache):\n    print(sway_cache.resolve('candidate'))\n"
    result = named.run(body, "-s", '--sway-set=candidate.adapter=["runs/sft", "runs/dpo"]')
    root = named.pytester.path
    result.stdout.fnmatch_lines([f'sway: set candidate.adapter=[[]"{root}/runs/sft", "{root}/runs/dpo"[]]'])
    result.stdout.fnmatch_lines(["*b + runs/sft + runs/dpo"])


def test_a_list_in_the_file_starts_at_the_root(named: Suite) -> None:
    named.pytester.mkdir("runs")
    lists = NAMED.replace('kind = "dummy", base = "b", adapter = "runs/v3"', 'base = "b", adapter = ["runs/sft", "v3"]')
    named.pytester.makepyprojecttoml(lists)
    body = "def test_x(sway_cache):\n    print(*sway_cache.resolve('candidate').adapter)\n"
    root = named.pytester.path
    named.run(body, "-s").stdout.fnmatch_lines([f"*{root}/runs/sft {root}/v3"])


def test_names_for_a_class_of_the_users_own_stay_as_they_are(named: Suite) -> None:
    named.pytester.makepyprojecttoml(
        NAMED + 'mine = { kind = "custom", base = "llama3.1:8b", adapter = "s3://town/v3", entry_point = "a:B" }'
    )
    body = "def test_x(sway_cache):\n    mine = sway_cache.resolve('mine')\n    print('is', mine.base, mine.adapter)\n"
    named.run(body, "-s").stdout.fnmatch_lines(["*is llama3.1:8b s3://town/v3"])


def test_a_list_may_have_hub_ids_and_addresses(named: Suite) -> None:
    named.pytester.makepyprojecttoml(NAMED.replace('kind = "dummy", base = "b"', 'base = "b"'))
    body = "def test_x(): pass\n"
    result = named.run(body, '--sway-set=candidate.adapter=["org/sft", "hf://org/dpo@v2/a", "./dpo"]')
    shown = f'"org/sft", "hf://org/dpo@v2/a", "{named.pytester.path}/dpo"'
    result.stdout.fnmatch_lines([f"sway: set candidate.adapter=[[]{shown}[]]"])


def test_an_empty_value_removes_a_field_and_the_last_value_wins(named: Suite) -> None:
    result = named.run(
        SHOWS, "-s", "--sway-set=candidate.adapter=", "--sway-set=candidate.base=x", "--sway-set=candidate.base=y"
    )
    result.stdout.fnmatch_lines(["sway: set candidate.adapter=None, candidate.base=y", "candidate is dummy:y None"])


def test_numbers_and_booleans_are_converted(named: Suite) -> None:
    body = """
def test_x(sway_backend):
    spec = sway_backend("candidate").spec
    assert (spec.timeout, spec.trust_remote_code) == (7.5, True)
"""
    settings = ("--sway-set=candidate.timeout=7.5", "--sway-set=candidate.trust_remote_code=true")
    named.run(body, *settings).assert_outcomes(passed=1)


def test_it_reaches_into_model_kwargs(suite: Suite) -> None:
    suite.pytester.makepyprojecttoml("""
[tool.pytest-sway.specs.v3]
base = "org/base"
model_kwargs = { attn_implementation = "sdpa", quantization_config = { load_in_8bit = true } }
""")
    body = """
from pytest_sway.run.named_specs import named_specs
from pytest_sway.spec.parsing import parse_spec

def test_x(pytestconfig):
    quantized = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    specs = named_specs(pytestconfig)
    assert parse_spec(specs["v3"]) == parse_spec({"base": "org/base", "model_kwargs": quantized})
"""
    result = suite.run(
        body,
        "--sway-set=v3.model_kwargs.attn_implementation=",
        "--sway-set=v3.model_kwargs.quantization_config.load_in_8bit=",
        "--sway-set=v3.model_kwargs.quantization_config.load_in_4bit=true",
        "--sway-set=v3.model_kwargs.quantization_config.bnb_4bit_quant_type=nf4",
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(['sway: set v3.model_kwargs.attn_implementation=None, *.bnb_4bit_quant_type="nf4"'])


def test_the_header_tells_a_text_from_a_truth_value_and_removed_from_null(suite: Suite) -> None:
    keys = "--sway-set=v3.base=org/base", "--sway-set=v3.model_kwargs.gone=", "--sway-set=v3.model_kwargs.none=null"
    truths = [f"--sway-set=v3.model_kwargs.{each}" for each in ("a=False", 'b="False"', "c=TRUE", "d=false")]
    result = suite.run("def test_x(): pass", *keys, *truths)
    shown = (f"v3.model_kwargs.{each}" for each in ("gone=None", "none=null", "a=false", 'b="False"', "c=true"))
    result.stdout.fnmatch_lines([f"sway: set v3.base=org/base, {', '.join(shown)}, v3.model_kwargs.d=false"])


@pytest.mark.parametrize(
    ("settings", "values", "kept"),
    [
        (("a.b=1", "a="), "a.b=None, v3.model_kwargs.a=None", None),
        (("a.b=1", "a=x"), 'a.b=None, v3.model_kwargs.a="x"', '{"a": "x"}'),
        (("a.b.c=1", "d=2", "a.b.c="), "a.b.c=None, v3.model_kwargs.d=2", '{"d": 2}'),
        (("a.b=1", "a.c=2", "a.b="), "a.b=None, v3.model_kwargs.a.c=2", '{"a": {"c": 2}}'),
        (("c=1", "a.c="), "c=1, v3.model_kwargs.a.c=None", '{"c": 1}'),
    ],
)
def test_a_later_change_may_replace_or_empty_what_an_earlier_one_made(
    suite: Suite, settings: tuple[str, ...], values: str, kept: str | None
) -> None:
    body = f"def test_x(sway_cache):\n    assert sway_cache.resolve('v3').model_kwargs == {kept!r}\n"
    result = suite.run(body, "--sway-set=v3.base=b", *(f"--sway-set=v3.model_kwargs.{each}" for each in settings))
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"sway: set v3.base=b, v3.model_kwargs.{values}"])


def test_to_remove_what_is_not_there_leaves_the_bases_arguments_to_the_finetuned_model(suite: Suite) -> None:
    body = "def test_x(sway_cache):\n    assert sway_cache.resolve('v3').finetuned_model_kwargs is None\n"
    settings = ("base=b", "finetuned=f", "model_kwargs.a=1", "finetuned_model_kwargs.a=")
    suite.run(body, *(f"--sway-set=v3.{each}" for each in settings)).assert_outcomes(passed=1)


@pytest.mark.parametrize("field", ["base", "finetuned"])
@pytest.mark.parametrize(
    ("given", "rooted"),
    [
        ("models/x.gguf", True),
        ("models/llama/7b", True),
        ("x.gguf", True),
        ("models/here", True),
        ("models/7b", False),
        ("gpt2", False),
        ("hf://org/name", False),
    ],
)
def test_a_model_that_cannot_be_a_hub_id_starts_at_the_root(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, field: str, given: str, rooted: bool
) -> None:
    root = suite.pytester.path
    (root / "models/here").mkdir(parents=True)
    suite.write("def test_x(): pass")
    monkeypatch.chdir(suite.pytester.mkdir("elsewhere"))
    settings = (f"--sway-set=v3.{each}" for each in ("base=org/base", f"{field}={given}"))
    result = suite.pytester.runpytest_inprocess("..", "--rootdir=..", *settings)
    shown = f"{root}/{given}" if rooted else given.removeprefix("hf://")
    result.stdout.fnmatch_lines([f"sway: set *v3.{field}={shown}"])


def test_a_file_that_a_custom_backend_loads_starts_at_the_root(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    root = suite.pytester.path
    (root / "models").mkdir()
    (root / "models/base.bin").touch()
    suite.write("def test_x(): pass")
    monkeypatch.chdir(suite.pytester.mkdir("elsewhere"))
    settings = ("kind=custom", "entry_point=a:B", "base=models/base.bin", "finetuned=models/other.bin")
    result = suite.pytester.runpytest_inprocess("..", "--rootdir=..", *(f"--sway-set=v3.{each}" for each in settings))
    result.stdout.fnmatch_lines([f"sway: set *v3.base={root}/models/base.bin, v3.finetuned=models/other.bin"])


def test_a_change_goes_into_no_value_that_is_no_mapping(suite: Suite) -> None:
    suite.write("def test_x(): pass")
    settings = ("base=b", "model_kwargs.use_cache=false", "model_kwargs.use_cache.x=")
    result = suite.pytester.runpytest_inprocess(*(f"--sway-set=v3.{each}" for each in settings))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*v3.model_kwargs.use_cache.x is to go into 'use_cache', which is no mapping: False*"])


def test_an_empty_adapter_is_refused_and_an_empty_base_is_the_adapters(suite: Suite) -> None:
    suite.pytester.makepyprojecttoml("""
[tool.pytest.ini_options]
[tool.pytest-sway.specs]
bare = { base = "b", adapter = "" }
listed = { base = "b", adapter = ["runs/v3", ""] }
led = { base = "", adapter = "./runs/v3" }
""")
    body = """
from pytest_sway.errors import SpecError
from pytest_sway.run.named_specs import named_specs
from pytest_sway.spec.parsing import parse_spec

@pytest.mark.parametrize("name", ["bare", "listed"])
def test_adapter(pytestconfig, name):
    with pytest.raises(SpecError, match="'adapter' must be the folder of a PEFT adapter, .*; found ''"):
        parse_spec(named_specs(pytestconfig)[name])

def test_base(pytestconfig):
    assert parse_spec(named_specs(pytestconfig)["led"]).base == ""
"""
    suite.run(body).assert_outcomes(passed=3)


def test_answers_may_be_json(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
def test_x(sway_backend):
    with sway_backend("canned").as_base() as base:
        assert base.generate("hello", max_new_tokens=1) == " you"
""")
    result = pytester.runpytest_inprocess(
        "--sway-set=canned.kind=dummy",
        "--sway-set=canned.base=mine",
        '--sway-set=canned.answers={"base": {"generations": {"hello": " you"}}}',
    )
    result.assert_outcomes(passed=1)


def test_tests_are_ordered_by_the_changed_specs(named: Suite) -> None:
    body = """
@pytest.mark.sway_spec("baseline")
def test_1(): pass

@pytest.mark.sway_spec(dummy("other"))
def test_2(): pass

@pytest.mark.sway_spec("candidate")
def test_3(): pass
"""

    def order(*args: str) -> list[str]:
        lines = named.run(body, "--collect-only", "-q", *args).outlines
        return [line.rpartition("::")[2] for line in lines if "::" in line]

    assert order() == ["test_1", "test_2", "test_3"]
    assert order("--sway-set=candidate.base=a") == ["test_1", "test_3", "test_2"]


def test_workers_get_the_changes(named: Suite) -> None:
    body = """
@pytest.mark.parametrize("number", range(2))
def test_x(sway_backend, number):
    assert sway_backend("candidate").spec.adapter.name == "v4"
"""
    named.run(body, "-n", "2", "--sway-set=candidate.adapter=runs/v4").assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "candidate.adaptr=runs/v4",
            "--sway-set candidate.adaptr: a spec has no field 'adaptr'; those of kind 'dummy' are kind, base, *"
            " Did you mean 'adapter'? (Named specs: baseline, candidate.)",
        ),
        (
            "candidate.adaptr=",
            "--sway-set candidate.adaptr: a spec has no field 'adaptr'; * Did you mean 'adapter'? (*",
        ),
        ("candidate.as_dict=", "--sway-set candidate.as_dict: a spec has no field 'as_dict'; those of kind 'dummy' *"),
        ("candidate._seen=", "--sway-set candidate._seen: a spec has no field '_seen'; those of kind 'dummy' are *"),
        (
            "candidate.adapter=[runs/sft,runs/v4]",
            "--sway-set: the value of candidate.adapter begins as a list, which is JSON, such as *a*, *b*; found"
            " '?runs/sft,runs/v4?'.",
        ),
        (
            "candidate.adapter={runs/sft}",
            "--sway-set: the value of candidate.adapter begins as a mapping, which is JSON, such as {*}; found *",
        ),
        ('candidate.adapter={"a": "b"}', "--sway-set candidate.adapter: spec field 'adapter' must be the folder *"),
        (
            "candidate.model_kwargs.max_memory={0: 1GB}",
            "--sway-set: the value of candidate.model_kwargs.max_memory begins as a mapping, which is JSON, *",
        ),
        (
            "candidat.adapter=runs/v4",
            "--sway-set candidat.adapter: no spec is named 'candidat' (named specs: baseline, candidate). To add a"
            " spec, set its base, too: --sway-set candidat.base=...",
        ),
        ("candidate.dtype=int3", "--sway-set candidate.dtype: spec field 'dtype' must be one of *; found 'int3'. (*"),
        ("candidate.timeout=long", "--sway-set candidate.timeout: spec field 'timeout' must be a number of seconds *"),
        ("candidate.allow_pickle=maybe", "--sway-set candidate.allow_pickle: spec field 'allow_pickle' must be true *"),
        ("candidate.api_key_env=sk-12345", "--sway-set candidate.api_key_env: spec field 'api_key_env' must be the *"),
        ("v3.model_kwargs.quantization_config.bits.x=1", "--sway-set *: no spec is named 'v3' *"),
        (
            "candidate.model_kwargs.device_map=auto",
            "--sway-set candidate.model_kwargs.device_map: spec field 'model_kwargs' is for kind='hf', *",
        ),
        ("adapter=v4", "--sway-set: must be NAME.FIELD=VALUE, such as candidate.adapter=runs/v4; found 'adapter'."),
        ("candidate.adapter", "--sway-set: must be NAME.FIELD=VALUE, *; found 'candidate.adapter'."),
        ("", "--sway-set: must be NAME.FIELD=VALUE, *; found ''."),
    ],
)
def test_a_bad_change_ends_the_run_before_it_starts(named: Suite, setting: str, message: str) -> None:
    result = named.run(SHOWS, f"--sway-set={setting}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message}"])
    assert "sk-12345" not in result.stderr.str() + result.stdout.str()


def test_a_malformed_table_ends_a_run_that_changes_it(suite: Suite) -> None:
    suite.pytester.makepyprojecttoml('[tool.pytest-sway]\nspecs = "v3"\n')
    result = suite.run(SHOWS, "--sway-set=candidate.base=a")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --sway-set: *pyproject.toml: ?tool.pytest-sway.specs? must hold one table *"])
