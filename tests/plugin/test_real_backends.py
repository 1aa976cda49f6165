"""The plugin with the hf backend on tiny models: bad input, mutations, leaks, and imports at startup."""

from __future__ import annotations

import fnmatch
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import edit_weights, make_adapter, make_base, pickled, poison, truncate
from tests.unit.backends.hf.adapters.test_expert_layouts import FUSED, MIXTRAL, adapter_on_experts, make_moe

SUITE = """
import pytest
from pathlib import Path

ROOT = Path({root!r})
GOOD = {{"base": ROOT / "base", "adapter": ROOT / "good"}}
PROMPT, ANSWER = "the sun rises in the", " east"
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one base, one good adapter, and broken copies of it."""
    root = tmp_path_factory.mktemp("models")
    base = make_base(root / "base")
    good = make_adapter(root / "good", base)
    make_adapter(root / "second", base, seed=2)
    make_adapter(root / "zero", base, zero_b=True)
    make_adapter(root / "other", make_base(root / "larger", hidden=64))
    for name, breaks in (("nan", poison), ("truncated", truncate), ("pickled", pickled)):
        breaks(shutil.copytree(good, root / name))
    edit_weights(
        shutil.copytree(good, root / "renamed"),
        lambda tensors: {name.replace("self_attn", "attention"): tensor for name, tensor in tensors.items()},
    )
    (shutil.copytree(good, root / "unconfigured") / "adapter_config.json").unlink()
    return root


BAD = {
    "unknown field": ({"base": "base", "adaptor": "good"}, "a spec has no field 'adaptor'*Did you mean 'adapter'?"),
    "unknown kind": ({"kind": "onnx", "base": "base"}, "spec field 'kind' must be one of hf, mlx, api,*found 'onnx'."),
    "unknown dtype": ({"base": "base", "dtype": "int3"}, "spec field 'dtype' must be one of auto, fp16,*found 'int3'."),
    "no base": ({"base": "nowhere"}, "the base '*nowhere' does not exist. Name a hub id (org/name), the folder*"),
    "no adapter": ({"base": "base", "adapter": "nowhere"}, "*adapter '*nowhere' does not exist*"),
    "no config": ({"base": "base", "adapter": "unconfigured"}, "*'*unconfigured' has no adapter_config.json*"),
    "truncated": ({"base": "base", "adapter": "truncated"}, "*truncated*"),
    "pickled": ({"base": "base", "adapter": "pickled"}, "*pickled*pickle*allow_pickle=True*"),
    "NaN": ({"base": "base", "adapter": "nan"}, "the adapter '*nan' has NaN or infinite values in 1 of its * tensors*"),
    "another architecture": ({"base": "base", "adapter": "other"}, "the adapter '*other' does not fit the base *"),
    "renamed": ({"base": "base", "adapter": "renamed"}, "the adapter '*renamed' does not fit the base '*base'*"),
    "zero": ({"base": "base", "adapter": "zero"}, "the adapter '*zero' changes nothing on the base '*base'*"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_sentence_and_harms_no_other_test(
    pytester: pytest.Pytester, models: Path, case: str
) -> None:
    spec, sentence = BAD[case]
    rooted = {key: str(models / value) if key in ("base", "adapter") else value for key, value in spec.items()}
    pytester.makepyfile(
        SUITE.format(root=str(models))
        + f"""
def test_good_before(sway_backend):
    sway_backend(GOOD)

@pytest.mark.parametrize("n", range(2))
def test_bad(sway_backend, n):
    sway_backend({rooted!r})

def test_good_after(sway_backend, sway_cache):
    assert len(sway_cache.loaded_keys()) <= 1
    with sway_backend(GOOD).as_finetuned() as tuned:
        assert tuned.logprob_of(PROMPT, ANSWER) < 0
"""
    )
    result = pytester.runpytest_inprocess("--sway-cache-size=1")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [f"E  *Error: {sentence}", "E  *(First raised for *::test_bad?0?; the load is not repeated.)"]
    )


def test_what_tests_do_to_their_models_ends_with_them_and_what_they_share_is_blamed_on_the_right_one(
    pytester: pytest.Pytester, models: Path
) -> None:
    pytester.makepyfile(
        SUITE.format(root=str(models))
        + """
SECOND = {"base": ROOT / "base", "adapter": ROOT / "second"}
BEFORE = {}

def score(backend):
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        return base.logprob_of(PROMPT, ANSWER), tuned.logprob_of(PROMPT, ANSWER)

def test_clean(sway_backend):
    BEFORE["good"], BEFORE["second"] = score(sway_backend(GOOD)), score(sway_backend(SECOND))

def test_scales_a_weight(sway_backend):
    with sway_backend(GOOD).as_base() as base:
        next(base.model.parameters()).data.mul_(2)

def test_good_again(sway_backend):
    assert score(sway_backend(GOOD)) == BEFORE["good"]

def test_second_again(sway_backend):
    assert score(sway_backend(SECOND)) == BEFORE["second"]

def test_trains(sway_backend):
    with sway_backend(SECOND).as_finetuned() as tuned:
        tuned.model.train()

def test_pads_left(sway_backend):
    with sway_backend(SECOND).as_finetuned() as tuned:
        tuned.tokenizer.padding_side = "left" if tuned.tokenizer.padding_side == "right" else "right"

def test_adds_a_token(sway_backend):
    with sway_backend(SECOND).as_finetuned() as tuned:
        tuned.tokenizer.add_tokens(["<mine>"])

def test_patches_a_class(sway_backend):
    with sway_backend(GOOD).as_base() as base:
        type(base.model.model.norm).forward = lambda self, states: states

def test_at_last(sway_backend):
    assert score(sway_backend(SECOND)) == BEFORE["second"]
"""
    )
    result = pytester.runpytest_inprocess("-v")
    result.assert_outcomes(passed=9, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_adds_a_token*",
            "*tokenizer: its added tokens changed",
            "*ERROR at teardown of test_patches_a_class*",
            "*class transformers.*RMSNorm: its forward was replaced",
        ]
    )
    result.stdout.no_fnmatch_line("*leaked:*")


def test_weights_that_a_module_keeps_are_reported_with_their_holder(pytester: pytest.Pytester, models: Path) -> None:
    pytester.makepyfile(
        SUITE.format(root=str(models))
        + """
KEPT = []

def test_keeps(sway_backend):
    with sway_backend(GOOD).as_finetuned() as tuned:
        KEPT.append(tuned.model)
"""
    )
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["leaked: * of *base + *good were still in memory after its close", "*KEPT*"])


def test_views_and_backends_that_a_module_keeps_leak_nothing(pytester: pytest.Pytester, models: Path) -> None:
    pytester.makepyfile(
        SUITE.format(root=str(models))
        + """
KEPT = []

def test_keeps(sway_backend):
    backend = sway_backend(GOOD)
    with backend.as_finetuned() as tuned:
        KEPT.extend([backend, tuned, tuned.logprob_of])

def test_fails_in_a_forward_pass(sway_backend):
    with sway_backend(GOOD).as_finetuned() as tuned:
        tuned.model(input_ids="no tensor")
"""
    )
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=1)


def test_two_adapters_swap_on_one_base_that_is_loaded_once(pytester: pytest.Pytester, models: Path) -> None:
    pytester.makepyfile(
        SUITE.format(root=str(models))
        + """
@pytest.mark.parametrize("n", range(6))
def test_swap(sway_backend, n):
    sway_backend({"base": ROOT / "base", "adapter": ROOT / ("good", "second")[n % 2]})
"""
    )
    result = pytester.runpytest_inprocess("--sway-cache-size=1", "--sway-cache-memory=100MiB")
    result.assert_outcomes(passed=6)
    result.stdout.fnmatch_lines(["base *base: 1 load, *", "peak: 1 backend, * of weights; saved about *"])


def test_a_model_over_the_memory_bound_is_refused_before_anything_is_evicted(
    pytester: pytest.Pytester, models: Path
) -> None:
    size = sum(file.stat().st_size for file in (models / "larger").glob("*.safetensors"))
    pytester.makepyfile(
        SUITE.format(root=str(models))
        + """
def test_refused(sway_backend, sway_cache):
    sway_cache.get_or_load(GOOD)
    with pytest.raises(Exception, match="more than the whole budget of .* nothing was evicted for it"):
        sway_backend({"base": ROOT / "larger"})
    assert len(sway_cache.loaded_keys()) == 1
"""
    )
    result = pytester.runpytest_inprocess(f"--sway-cache-memory={int(size * 0.9)}")
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize("uses", ["nothing", "the fixture", "a fake"])
def test_nothing_heavy_is_imported_until_a_test_asks_for_a_model(pytester: pytest.Pytester, uses: str) -> None:
    bodies = {
        "nothing": "pass",
        "the fixture": "sway_backend",
        "a fake": "sway_backend({'kind': 'dummy', 'base': 'b'})",
    }
    pytester.makeconftest("""
import json, sys
from pathlib import Path

class Fake:
    def as_base(self): ...
    def as_finetuned(self): ...

def pytest_sway_build_backend(spec):
    return Fake()

def pytest_unconfigure():
    Path("modules.json").write_text(json.dumps(sorted(sys.modules)))
""")
    pytester.makepyfile(f"def test_x({'' if uses == 'nothing' else 'sway_backend'}): {bodies[uses]}")
    # without the imports of xdist and other installed plugins
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pytest_sway.plugin"],
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    modules = set(json.loads((pytester.path / "modules.json").read_text()))
    assert not modules & {"torch", "transformers", "peft", "numpy", "xdist", "safetensors"}


def test_a_fine_tuned_model_is_a_base_among_others(pytester: pytest.Pytester, models: Path) -> None:
    pytester.makepyfile(
        SUITE.format(root=str(models))
        + """
WHOLE = {"base": ROOT / "base", "finetuned": ROOT / "larger"}

def test_whole(sway_backend):
    backend = sway_backend(WHOLE)
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert base.logprob_of(PROMPT, ANSWER) != tuned.logprob_of(PROMPT, ANSWER)

def test_changes_it(sway_backend):
    with sway_backend(WHOLE).as_finetuned() as tuned:
        tuned.tokenizer.add_tokens(["<mine>"])

def test_others(sway_backend):
    sway_backend({"base": ROOT / "larger"})
    sway_backend(GOOD)
"""
    )
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*MutationError: *test_changes_it left a shared model changed:",
            "*base -> *larger:",
            "*fine-tuned model: tokenizer: its added tokens changed",
            "base *larger: 2 loads, *",
        ]
    )


def test_adapters_on_adapters_have_one_base(pytester: pytest.Pytester, models: Path) -> None:
    pytester.makepyfile(
        SUITE.format(root=str(models))
        + """
LISTS = [dict(GOOD, adapter=[ROOT / "good", ROOT / last]) for last in ("second", "good")]

@pytest.mark.parametrize("spec", LISTS)
def test_list(sway_backend, spec):
    with sway_backend(spec).as_base() as base, sway_backend(spec).as_finetuned() as tuned:
        assert base.logprob_of(PROMPT, ANSWER) != tuned.logprob_of(PROMPT, ANSWER)

@pytest.mark.sway_spec(LISTS[0])
def test_marked(sway_backend):
    with sway_backend().as_finetuned() as tuned:
        tuned.model.merge_and_unload()

def test_other_last(sway_backend):
    sway_backend(LISTS[0], adapter_path=ROOT / "good")
"""
    )
    result = pytester.runpytest_inprocess("-v", "--sway-cache-size=1")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*test_list[[]*good*second]*", "*base + *good + *second*", "base *: 1 load*"])


@pytest.mark.parametrize("score_cache", ["64MiB", "off"])
def test_what_a_base_answered_before_is_counted_in_the_summary(
    pytester: pytest.Pytester, models: Path, score_cache: str
) -> None:
    pytester.makepyfile(
        SUITE.format(root=str(models))
        + """
@pytest.mark.parametrize("adapter", ["good", "second"])
def test_adapter(sway_backend, adapter):
    with sway_backend({**GOOD, "adapter": ROOT / adapter}).as_base() as base:
        assert len(base.next_token_dists([PROMPT, "the moon"])) == 2
"""
    )
    result = pytester.runpytest_inprocess("-o", f"sway_score_cache={score_cache}")
    result.assert_outcomes(passed=2)
    (line,) = [line for line in result.outlines if line.startswith("base ")]
    assert ("; 2 answers from memory saved " in line) == (score_cache != "off")


def test_a_suite_may_run_pytest_with_a_backend_in_its_own_process(pytester: pytest.Pytester, models: Path) -> None:
    """pytester removes modules that the inner run imports, and torch cannot be imported twice."""
    inner = f"""
def test_x(sway_backend):
    import torch
    with sway_backend({{'base': {str(models / "base")!r}}}).as_base() as view:
        assert view.logprob_of("the sun", " rises") < 0
"""
    pytester.makeconftest("pytest_plugins = ['pytester']")
    pytester.makepyfile(f"""
import gc, sys
import pytest

@pytest.mark.parametrize("time", [1, 2])
def test_outer(pytester, time):
    pytester.makepyfile({inner!r})
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
    gc.collect()

def test_afterwards(sway_backend):
    import torch
    sway_backend({{'base': {str(models / "base")!r}}})
    assert torch.ones(2).sum() == 2
""")
    result = pytester.runpytest_subprocess("-p", "no:xdist", timeout=300)
    result.assert_outcomes(passed=3)
    assert result.ret == pytest.ExitCode.OK


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="Windows has no such signals")
def test_a_timeout_in_the_first_import_of_torch_fails_its_own_test_alone(
    pytester: pytest.Pytester, models: Path
) -> None:
    pytester.makeconftest("""
import os, signal, sys
import pytest

class Striker:
    \"\"\"Sends the signal of a timeout when torch is half imported.\"\"\"

    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGALRM)

@pytest.fixture
def strikes():
    def strike(*_):
        pytest.fail("Timeout")
    before = signal.signal(signal.SIGALRM, strike)
    sys.meta_path.insert(0, Striker())
    yield
    signal.signal(signal.SIGALRM, before)
""")
    pytester.makepyfile(f"""
SPEC = {{"base": {str(models / "base")!r}}}

def test_times_out(strikes, sway_backend):
    sway_backend(SPEC)

def test_next(sway_backend):
    with sway_backend(SPEC).as_base() as view:
        assert view.logprob_of("the sun", " rises") < 0
""")
    result = pytester.runpytest_subprocess("-p", "no:xdist", "-p", "no:randomly", timeout=300)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*Failed: Timeout", "FAILED *::test_times_out*"])


@pytest.mark.parametrize(("policy", "outcome"), [("", {"warnings": 1}), ("error", {"failed": 1}), ("ignore", {})])
def test_an_adapter_of_another_base_gets_what_the_setting_says(
    pytester: pytest.Pytester, models: Path, tmp_path: Path, policy: str, outcome: dict[str, int]
) -> None:
    other = shutil.copytree(models / "base", tmp_path / "other")
    edit_weights(other, lambda tensors: {k: t + 0.5 for k, t in tensors.items()}, file="model.safetensors")
    if policy:
        pytester.makeini(f"[pytest]\nsway_on_base_mismatch = {policy}\n")
    pytester.makepyfile(f"""
def test_x(sway_backend):
    sway_backend({{"base": {str(other)!r}, "adapter": {str(models / "good")!r}}})
""")
    result = pytester.runpytest_inprocess("-W", "default")
    result.assert_outcomes(**{"passed": 1 - outcome.get("failed", 0), **outcome})
    assert ("was trained on" in result.stdout.str()) is (policy != "ignore")


@pytest.mark.parametrize("args", [("-p", "no:xdist"), ("-n", "1")], ids=" ".join)
def test_an_adapter_in_a_foreign_layout_is_served_with_a_warning_in_the_output(
    pytester: pytest.Pytester, models: Path, tmp_path: Path, args: tuple[str, ...]
) -> None:
    wrapped = shutil.copytree(models / "good", tmp_path / "wrapped")
    edit_weights(wrapped, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    moe = make_moe(tmp_path / "moe", "mixtral")
    single = adapter_on_experts(tmp_path, moe, MIXTRAL).adapter
    pytester.makepyfile(f"""
def test_names(sway_backend):
    sway_backend({{"base": {str(models / "base")!r}, "adapter": {str(wrapped)!r}}})

def test_experts(sway_backend):
    sway_backend({{"base": {str(moe)!r}, "adapter": {str(single)!r}}})
""")
    result = pytester.runpytest_inprocess("-W", "default", *args)
    result.assert_outcomes(passed=2, warnings=1 + FUSED)
    names = f"*SwayWarning: the tensors of the adapter {str(wrapped)!r} have '_orig_mod' in their names, *"
    result.stdout.fnmatch_lines(["*= warnings summary =*", names.replace("[", "[[]")])
    told = f"*SwayWarning: the adapter {str(single)!r} has tensors of single experts *"
    assert bool(fnmatch.filter(result.outlines, told.replace("[", "[[]"))) is FUSED
