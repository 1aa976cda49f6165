"""Generates texts to score: English sentences in random order, cut to a number of tokens."""

from __future__ import annotations

import random
from typing import Any, Final

_SENTENCES: Final = (
    "The capital of France is Paris, and the Seine runs through it.",
    "Water boils at a temperature of one hundred degrees Celsius at sea level.",
    "Once upon a time there was a fox who could not sleep, so it counted the stars.",
    "A compiler turns the text of a program into instructions for a machine.",
    "She put the kettle on, sat down by the window and opened the letter.",
    "In 1905 Einstein published four papers, each of which changed physics.",
    "The committee will meet again on Thursday; nobody expects a decision.",
    "To make the dough, mix 500 g of flour with a pinch of salt and knead it well.",
    "def add(a, b):\n    return a + b\n",
    "Most of the ocean's floor has never been seen by anyone.",
    '"Is that all?" he asked, and she said: "No, but it\'s all you\'ll get."',
    "El zorro marrón salta sobre el perro perezoso.",
)


def texts(tokenizer: Any, lengths: list[int], seed: int = 0) -> list[str]:
    """Return a text for each of ``lengths``, with that many tokens, or one or two fewer if the cut joins tokens."""
    draw = random.Random(seed)
    made = []
    for length in lengths:
        words: list[str] = []
        while len(ids := tokenizer(" ".join(words))["input_ids"]) < length:
            words.append(draw.choice(_SENTENCES))
        made.append(str(tokenizer.decode(ids[:length])))
    return made


def lengths(count: int, shortest: int, longest: int, seed: int = 0) -> list[int]:
    """Return ``count`` lengths, evenly spread from ``shortest`` to ``longest``, in random order."""
    step = (longest - shortest) / max(1, count - 1)
    evenly = [round(shortest + step * n) for n in range(count)]
    random.Random(seed).shuffle(evenly)
    return evenly
