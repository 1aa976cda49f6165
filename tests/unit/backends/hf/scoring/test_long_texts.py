"""Texts longer than the model's context, unknown tokens, and large vocabularies."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.errors import ScoringError, SwayWarning
from tests.tiny import TEXT, WORDS, make_base, make_tokenizer, quiet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LONG = " ".join((WORDS * 20)[:700])  # the model's context has 256 tokens


def test_a_long_text_rolls_through_windows(build: Any, base: Path) -> None:
    with build(base).as_base() as view:
        whole = view.rolling_logprob(LONG)
        assert whole.num_tokens == len(whole.token_ids) == 701
        ids = view.tokenizer(LONG)["input_ids"]
        parts = [
            view.logprob_of("", view.tokenizer.decode(ids[:256])),
            view.logprob_of(view.tokenizer.decode(ids[255:256]), " " + view.tokenizer.decode(ids[256:512])),
            view.logprob_of(view.tokenizer.decode(ids[443:512]), " " + view.tokenizer.decode(ids[512:])),
        ]
    assert whole.total_logprob == pytest.approx(sum(parts), rel=1e-5)
    sums = [float(part.sum()) for part in np.split(whole.logprobs, [256, 512])]
    assert sums == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert", "roberta-prelayernorm"])
@pytest.mark.parametrize("pad", [0, 1])
def test_positions_that_begin_behind_the_padding_token_are_not_counted(
    build: Any, tmp_path: Path, kind: str, pad: int
) -> None:
    base = _decoder(tmp_path, kind, pad, positions=16)
    reads = 16 - pad - 1
    words = [word for word in WORDS if word.isalpha()]
    with build(base).as_base() as view:
        longest = " ".join(words[:reads])
        assert np.isfinite(view.logprob_of("", longest))
        with pytest.warns(SwayWarning, match=f"the model reads at most {reads} tokens of them"):
            assert np.isfinite(view.logprob_of(longest, f" {words[0]} {words[1]}"))
        rolled = view.rolling_logprob(" ".join(words[: 2 * reads]))
        assert rolled.num_tokens == 2 * reads + 1
        assert np.isfinite(rolled.total_logprob)
        with pytest.raises(ScoringError, match=f"but the model reads at most {reads} at once"):
            view.logprob_of("", " ".join(words[: reads + 1]))
        with pytest.raises(ScoringError, match=f"the model reads at most {reads} tokens at once"):
            view.generate("the", max_new_tokens=reads)


def _decoder(folder: Path, kind: str, pad: int, positions: int) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tokens = {"vocab_size": make_tokenizer(folder), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad}
    config = AutoConfig.for_model(kind, **sizes, **tokens, max_position_embeddings=positions, is_decoder=True)
    model_class: Any = AutoModelForCausalLM
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class.from_config(config).save_pretrained(folder)
    return folder


def test_a_long_text_rolls_without_a_prefix_too(build: Any, base: Path) -> None:
    with build(base).as_base() as view:
        whole = view.rolling_logprob(LONG, prefix=False)
        head = view.rolling_logprob(" ".join(LONG.split()[:257]), prefix=False)
    assert whole.logprobs.shape == (699,)
    np.testing.assert_allclose(whole.logprobs[:256], head.logprobs, atol=2e-4)


def test_a_long_prompt_loses_its_beginning_and_the_test_is_told(build: Any, base: Path) -> None:
    words = LONG.split()
    with build(base).as_base() as view:
        with pytest.warns(SwayWarning, match="2 of the prompts .* at most 256 tokens") as caught:
            scores = view.logprobs_of([(LONG, " east"), (LONG, " west"), ("the sun", " east")])
        assert caught[0].filename == __file__
        assert scores[0] == pytest.approx(view.logprob_of(" ".join(words[-256:]), " east"), abs=2e-4)
        with pytest.warns(SwayWarning, match="1 of the prompts are too long") as caught:
            dist = view.next_token_dist(LONG, top_k=3)
        assert caught[0].filename == __file__
        np.testing.assert_array_equal(dist.token_ids, view.next_token_dist(" ".join(words[-256:]), top_k=3).token_ids)


def test_a_completion_longer_than_the_model_reads_is_an_error(build: Any, base: Path) -> None:
    with (
        build(base).as_base() as view,
        pytest.raises(ScoringError, match="the completion has 700 tokens, but the model reads at most 256 at once"),
    ):
        view.logprob_of("the", " " + LONG)


def test_a_token_without_an_embedding_is_named(build: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path)
    make_tokenizer(base, extra=("poseidon",))
    with build(base).as_base() as view:
        uses: list[Callable[[], object]] = [
            lambda: view.rolling_logprob("the poseidon"),
            lambda: view.logprob_of("the", " poseidon"),
            lambda: view.next_token_dist("the poseidon"),
            lambda: view.generate("the poseidon", max_new_tokens=1),
        ]
        for use in uses:
            with pytest.raises(ScoringError, match=r"gives token .*, 'poseidon', but the model has embeddings"):
                use()
        assert view.rolling_logprob(TEXT).num_tokens


_PEAK = """
import resource, sys
from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.spec.model_spec import ModelSpec

with HFBuilder()(ModelSpec(base=sys.argv[1], device="cpu", dtype="fp32")).as_base() as view:
    view.rolling_logprob("the sun rises")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = view.rolling_logprob(" ".join(["the"] * 2047)).num_tokens
    assert found == 2048, found
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print("peft" in sys.modules)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What another process says that has scored a long text at a large vocabulary."""
    base = make_base(
        tmp_path_factory.mktemp("large"), vocab_size=262_144, layers=1, max_position_embeddings=4096,
        tie_word_embeddings=True,
    )  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", _PEAK, str(base)], capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_a_text_of_2048_tokens_needs_little_memory_at_a_vocabulary_of_262144(told: list[str]) -> None:
    assert int(told[0]) * 1024 < 400 * 10**6


def test_a_base_without_an_adapter_imports_no_peft(told: list[str]) -> None:
    assert told[1] == "False"
