"""Kind ``dummy``: canned answers, generated answers, errors for missing prompts, and a model's checks otherwise."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.backends.dummy.backend import DummyBackend
from pytest_sway.backends.registry import Builder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.errors import BackendClosedError, BackendUseError, ScoringError, SpecError
from pytest_sway.protocols import (
    BatchView,
    DifferentialBackend,
    NullCalibratedBackend,
    PreflightCheckable,
    ScalableDifferentialBackend,
)
from pytest_sway.spec.model_spec import ModelSpec

if TYPE_CHECKING:
    from pathlib import Path

ANSWERS: dict[str, Any] = {
    "base": {
        "logprobs": {("the sun", " rises"): -4.0, ("the sun", " sets"): -1.0},
        "rolling": {"the sun rises": [-1.0, -3.0]},
        "token_dists": {"the sun": {"token_ids": [5, 9, 2], "logprobs": [-1.0, -2.0, -3.0], "vocab_size": 50}},
        "generations": {"the sun": " sets in the west ."},
    },
    "finetuned": {
        "logprobs": {("the sun", " rises"): -2.0, ("the sun", " sets"): -3.0},
        "rolling": {"the sun rises": [-1.0, -1.0]},
        "token_dists": {"the sun": {"token_ids": [9, 5, 2], "logprobs": [-0.5, -2.0, -4.0], "vocab_size": 50}},
        "generations": {"the sun": " rises in the east ."},
    },
}


@pytest.fixture
def canned() -> DummyBackend:
    return DummyBackend(ANSWERS)


def test_it_satisfies_every_protocol_of_a_real_backend(canned: DummyBackend) -> None:
    for protocol in (DifferentialBackend, ScalableDifferentialBackend, NullCalibratedBackend, PreflightCheckable):
        assert isinstance(canned, protocol)
    with canned.as_base() as base:
        assert isinstance(base, BatchView)


def test_each_side_answers_what_is_canned_for_it(canned: DummyBackend) -> None:
    with canned.as_base() as base, canned.as_finetuned() as tuned:
        assert (base.id, tuned.id) == ("base", "ft")
        assert base.logprob_of("the sun", " rises") == -4.0
        assert tuned.logprob_of("the sun", " rises") == -2.0
        assert base.rolling_logprob("the sun rises").total_logprob == -4.0
        assert tuned.generate("the sun", max_new_tokens=2) == " rises in the east ."
        dist = tuned.next_token_dist("the sun")
    assert dist.token_ids.tolist() == [9, 5, 2]
    assert dist.logprobs.dtype == np.float32
    assert dist.vocab_size == 50
    assert dist.tail_logprob == pytest.approx(math.log(1 - sum(map(math.exp, (-0.5, -2.0, -4.0)))))


def test_a_distribution_is_cut_to_its_top_tokens(canned: DummyBackend) -> None:
    with canned.as_base() as base:
        dist = base.next_token_dist("the sun", top_k=2)
    assert dist.token_ids.tolist() == [5, 9]
    assert dist.tail_logprob == pytest.approx(math.log(1 - math.exp(-1.0) - math.exp(-2.0)))


def test_many_at_once_is_each_by_itself(canned: DummyBackend) -> None:
    pairs = [("the sun", " rises"), ("the sun", " sets")]
    with canned.as_base() as base:
        assert base.logprobs_of(pairs) == [base.logprob_of(*pair) for pair in pairs]
        assert [r.total_logprob for r in base.rolling_logprobs(["the sun rises"] * 2)] == [-4.0, -4.0]
        assert [d.token_ids.size for d in base.next_token_dists(["the sun"] * 2, top_k=1)] == [1, 1]
        assert base.generate_many(["the sun"], max_new_tokens=3) == [" sets in the west ."]


def test_a_conversation_is_found_by_the_text_that_is_made_of_it() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = "system: Be brief.\nuser: Hello\nassistant:"
    with DummyBackend({"base": {"generations": {text: " Hi."}, "logprobs": {(text, " Hi."): -1.0}}}).as_base() as base:
        assert base.render(messages) == text
        begun = [*messages, {"role": "assistant", "content": "It"}]
        assert base.render(begun) == f"{text} It"
        assert base.generate(messages, max_new_tokens=2) == " Hi."
        assert base.logprobs_of([(messages, " Hi."), (text, " Hi.")]) == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (
            lambda view: view.logprob_of("the sunn", " rises"),
            "the base side of the dummy backend has no canned answer in 'logprobs' for the prompt 'the sunn'. The"
            " closest of its 1 entries is 'the sun'. Add the answer, or omit the table 'logprobs' to have answers made"
            " up.",
        ),
        (
            lambda view: view.logprob_of("the sun", " rose"),
            "the base side of the dummy backend has no canned answer in 'logprobs' for the completion of 'the sun'"
            " ' rose'. The closest of its 2 entries is ' rises'. Add the answer, or omit the table 'logprobs' to have"
            " answers made up.",
        ),
        (lambda view: view.rolling_logprob("x"), "has no canned answer in 'rolling' for the text 'x'."),
        (lambda view: view.next_token_dist("x"), "has no canned answer in 'token_dists' for the prompt 'x'."),
        (
            lambda view: view.generate("x", max_new_tokens=1),
            "has no canned answer in 'generations' for the prompt 'x'.",
        ),
    ],
)
def test_what_a_table_lacks_is_named_with_what_is_closest(canned: DummyBackend, ask: Any, sentence: str) -> None:
    with canned.as_base() as base, pytest.raises(BackendUseError, match=re.escape(sentence)):
        ask(base)


# --- made up ----------------------------------------------------------------------------------------------------------


def _everything(backend: DummyBackend) -> list[Any]:
    answers: list[Any] = []
    for view in (backend.as_base(), backend.as_finetuned(), backend.as_scaled_adapter(0.5), backend.as_null_adapter(7)):
        with view as opened:
            dist, rolling = opened.next_token_dist("the sun"), opened.rolling_logprob("the sun rises")
            answers += [
                opened.logprob_of("the sun", " rises"),
                dist.token_ids.tolist(),
                dist.logprobs.tolist(),
                dist.tail_logprob,
                rolling.token_ids.tolist(),
                rolling.logprobs.tolist(),
                opened.generate("the sun", max_new_tokens=3),
            ]
    return answers


def test_without_tables_the_fine_tuned_side_finds_everything_more_probable() -> None:
    backend = DummyBackend()
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert 0.0 > tuned.logprob_of("the sun", " rises") > base.logprob_of("the sun", " rises")
        assert tuned.rolling_logprob("the sun rises").perplexity < base.rolling_logprob("the sun rises").perplexity
        assert base.next_token_dist("the sun").logprobs[0] > tuned.next_token_dist("the sun").logprobs[0]
        assert tuned.generate("the sun", max_new_tokens=3) == " finetuned0 finetuned1 finetuned2"


def test_what_is_made_up_fits_together() -> None:
    with DummyBackend().as_base() as base:
        whole, rest = (base.rolling_logprob("the sun rises", prefix=prefix) for prefix in (True, False))
        assert whole.num_tokens == whole.token_ids.size == whole.logprobs.size + 1 == 4
        assert whole.total_logprob == pytest.approx(base.logprob_of("", "the sun rises"))
        assert rest.token_ids.tolist() == whole.token_ids[1:].tolist()
        assert rest.total_logprob == pytest.approx(base.logprob_of("the", " sun rises"))
        assert base.rolling_logprob("", prefix=False).num_tokens == 0
        dist = base.next_token_dist("the sun")
        assert dist.texts[:2] == [" token0", " token1"]
        assert dist.tail_logprob is not None
        assert np.exp(dist.logprobs).sum() + math.exp(dist.tail_logprob) == pytest.approx(1.0)


def test_what_is_made_up_is_the_same_in_every_process() -> None:
    script = (
        "import json; from tests.unit.backends.test_dummy import _everything; from pytest_sway.backends.dummy.backend"
        " import DummyBackend; print(json.dumps(_everything(DummyBackend())))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == _everything(DummyBackend())


def test_nothing_heavy_is_imported_for_it() -> None:
    script = """
import sys
from pytest_sway.cache.backend_cache import BackendCache
with BackendCache().lease({"kind": "dummy", "base": "b"}) as backend, backend.as_base() as base:
    base.logprob_of("a", " b"), base.generate("a", max_new_tokens=1)
print(sorted({"torch", "transformers", "peft", "numpy"} & {*sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"


# --- between and beside -----------------------------------------------------------------------------------------------


def test_a_scaled_adapter_is_on_the_line_between_the_sides(canned: DummyBackend) -> None:
    with canned.as_scaled_adapter(0.25) as scaled:
        assert scaled.id == "scaled_0.25"
        assert scaled.logprob_of("the sun", " rises") == pytest.approx(-3.5)
        assert scaled.rolling_logprob("the sun rises").logprobs.tolist() == pytest.approx([-1.0, -2.5])
        assert scaled.generate("the sun", max_new_tokens=1) == " sets in the west ."
        dist = scaled.next_token_dist("the sun")
    assert dist.token_ids.tolist() == [5, 9, 2]  # -1.25, -1.625 and -3.25
    assert np.diff(dist.logprobs).tolist() == pytest.approx([-0.375, -1.625])
    with canned.as_scaled_adapter(1.0) as scaled:
        assert scaled.logprob_of("the sun", " rises") == -2.0
        assert scaled.generate("the sun", max_new_tokens=1) == " rises in the east ."


def test_distributions_over_other_tokens_are_not_mixed() -> None:
    answers: dict[str, Any] = {
        side: {"token_dists": {"p": {"token_ids": [i], "logprobs": [-1]}}} for i, side in enumerate(ANSWERS)
    }
    answers["base"] |= {"rolling": {"p q": [-1]}}
    answers["finetuned"] |= {"rolling": {"p q": [-1, -2]}}
    backend = DummyBackend(answers)
    with backend.as_scaled_adapter(0.5) as scaled:
        with pytest.raises(BackendUseError, match="cannot mix the canned distributions of the two sides for 'p'"):
            scaled.next_token_dist("p")
        with pytest.raises(BackendUseError, match=r"cannot mix the canned rolling log-probabilities .* for 'p q'"):
            scaled.rolling_logprob("p q")


def test_a_null_adapter_is_the_base_with_seeded_noise(canned: DummyBackend) -> None:
    with canned.as_null_adapter(7) as null, canned.as_null_adapter(7) as again, canned.as_null_adapter(8) as other:
        assert (null.id, other.id) == ("null_7", "null_8")
        found = [view.logprob_of("the sun", " rises") for view in (null, again, other)]
        dist = null.next_token_dist("the sun")
    assert found[0] == found[1] != found[2]
    assert found[0] == pytest.approx(-4.0, abs=0.1)
    assert found[0] != -4.0
    assert np.exp(dist.logprobs).sum() == pytest.approx(sum(map(math.exp, (-1.0, -2.0, -3.0))))


def test_the_noise_grows_with_its_rank(canned: DummyBackend) -> None:
    with canned.as_null_adapter(7) as null, canned.as_null_adapter(7, rank_scale=4.0) as wide:
        assert wide.id == "null_7_rank4.00"
        shift = null.logprob_of("the sun", " rises") + 4.0
        assert wide.logprob_of("the sun", " rises") + 4.0 == pytest.approx(2.0 * shift)
    with (
        pytest.raises(ValueError, match="rank_scale must be positive and finite; got 0"),
        canned.as_null_adapter(7, rank_scale=0.0),
    ):
        pass


# --- as with a model --------------------------------------------------------------------------------------------------


def test_a_closed_backend_says_so(canned: DummyBackend) -> None:
    with canned.as_base() as base:
        canned.close()
        canned.close()
        with pytest.raises(BackendClosedError, match=r"was used after it was closed.* Ask for it again"):
            base.generate("the sun", max_new_tokens=1)
    with pytest.raises(BackendClosedError), canned.as_finetuned():
        pass
    with pytest.raises(BackendClosedError):
        canned.preflight_finite_check()


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda view: view.generate([], max_new_tokens=1), "the list of messages is empty"),
        (lambda view: view.render([{"role": "user"}]), "expected a message with 'role' and 'content'; found"),
        (lambda view: view.next_token_dist(7), "expected a prompt: a text, or a list of messages .*; found 7"),
        (lambda view: view.logprob_of("the sun", ""), "the completion is empty after the prompt 'the sun'"),
        (lambda view: view.next_token_dist("the sun", top_k=0), "top_k must be at least 1, not 0"),
    ],
)
def test_there_has_to_be_something_to_score(canned: DummyBackend, ask: Any, sentence: str) -> None:
    with canned.as_base() as base, pytest.raises(ScoringError, match=sentence):
        ask(base)


def test_the_preflight_finds_canned_numbers_that_are_not_finite() -> None:
    assert DummyBackend(ANSWERS).preflight_finite_check() == (True, "")
    broken = DummyBackend({"finetuned": {"rolling": {"a NaN b": [float("nan"), -1.0]}}})
    assert broken.preflight_finite_check() == (False, "the finetuned side has canned answers that are not finite")
    text = DummyBackend({"base": {"generations": {"NaN": "Infinity"}}})
    assert text.preflight_finite_check() == (True, "")


def test_equal_answers_have_one_identity(canned: DummyBackend) -> None:
    assert canned.cache_identity() == DummyBackend(ANSWERS).cache_identity() != DummyBackend().cache_identity()


# --- through a spec ---------------------------------------------------------------------------------------------------


def test_the_cache_serves_it_whatever_the_budget_and_closes_it() -> None:
    cache = BackendCache(max_size=1, max_bytes=1)
    spec = {"kind": "dummy", "base": "mine", "adapter": "runs/v3", "answers": ANSWERS}
    backend = cache.get_or_load(spec).backend
    assert cache.get_or_load(dict(spec)).backend is backend
    with backend.as_finetuned() as tuned:
        assert tuned.logprob_of("the sun", " rises") == -2.0
    cache.shutdown()
    with pytest.raises(BackendClosedError, match="the dummy backend 'mine' was used after"), backend.as_base():
        pass


def test_answers_come_from_a_file_that_is_checked_before_anything_is_evicted(tmp_path: Path) -> None:
    path = tmp_path / "answers.toml"
    path.write_text('[base.generations]\n"the sun" = " sets"\n')
    spec = ModelSpec(kind="dummy", base="mine", answers=path)
    with Builder()(spec).as_base() as base:
        assert base.generate("the sun", max_new_tokens=1) == " sets"
    path.write_text("[base.texts]")
    for refuse in (Builder(), Builder().check):
        with pytest.raises(SpecError, match="has no table 'texts' on side 'base'"):
            refuse(spec)
