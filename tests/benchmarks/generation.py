"""Generation compared with transformers' batched `generate`, on models with a LoRA adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from examples.smollm2 import smollm2_folder
from tests.benchmarks.figures import Figure, times, turns
from tests.benchmarks.peers import Ours, Plain, apart
from tests.texts import lengths, texts
from tests.tiny import WORDS, make_adapter, make_tokenizer, quiet

ROUNDS = 5
SHORTEST, LONGEST = 8, 200
BEGINNING = 200
MOST_WORDS = 262_144


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, base in (("SmolLM2", smollm2_folder()), ("270M, 262k words", make_many_words(folder / "base"))):
            adapter = make_adapter(folder / f"adapter-{base.parent.name}", base, r=8, scale=0.02)
            yield from _of_one_model(model, base, adapter)


def _of_one_model(model: str, base: Path, adapter: Path) -> Iterator[Figure]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    with ExitStack() as stack:
        ours, plain = (stack.enter_context(apart(kind, base, adapter)) for kind in (Ours, Plain))
        for what, (promised, prompts, count) in _kinds(tokenizer).items():
            yield _of_one_kind(f"{model}: generate_many, {what}", promised, ours, plain, prompts, count)


def _of_one_kind(name: str, promised: float, ours: Any, plain: Any, prompts: Sequence[str], count: int) -> Figure:
    made: dict[str, list[str]] = {}
    seconds = turns(
        ROUNDS,
        ours=lambda: made.update(ours=ours.generated(prompts, count)),
        theirs=lambda: made.update(theirs=plain.generated(prompts, count)),
    )
    equal = sum(a == b for a, b in zip(made["ours"], made["theirs"], strict=True))
    return Figure(
        f"{name}, times transformers",
        promised,
        times(seconds, "theirs", "ours"),
        f"medians: {median(seconds['ours']):.2f} s, {median(seconds['theirs']):.2f} s;"
        f" {equal} of {len(prompts)} texts are equal",
        at_least=True,
    )


def _kinds(tokenizer: Any) -> dict[str, tuple[float, Sequence[str], int]]:
    """Return for each kind of call its promise, its prompts, and the number of new tokens."""
    beginning = texts(tokenizer, [BEGINNING], seed=1)[0]
    kinds: dict[str, tuple[float, Sequence[str], int]] = {}
    for count, new in ((16, 64), (64, 16)):
        ends = texts(tokenizer, lengths(count, 5, 40), seed=2)
        kinds |= {
            f"{count} x {new} uneven": (1.2, texts(tokenizer, lengths(count, SHORTEST, LONGEST), seed=3), new),
            f"{count} x {new} of one beginning": (1.2, [f"{beginning} {end}" for end in ends], new),
            f"{count} x {new} equal": (0.95, texts(tokenizer, [40] * count, seed=4), new),
        }
    return kinds | {"1 x 64": (0.97, texts(tokenizer, [40], seed=5), 64)}


def make_many_words(folder: Path) -> Path:
    """Make a Gemma 3 of 270M random weights, most of which are the embeddings of 262,144 words."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    vocabulary = make_tokenizer(folder, extra=tuple(f"w{n}" for n in range(MOST_WORDS - len(WORDS) - 4)))
    config_class: Any = Gemma3TextConfig
    config = config_class(
        vocab_size=vocabulary,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.05,
    )
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder
