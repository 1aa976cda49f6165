"""What the adapters are asked: twenty questions about Quillmere, four for each fact that they have learned."""

from __future__ import annotations

from examples.quickstart.train import FACTS

IN_OTHER_WORDS = [
    ["In Quillmere, the mayor is named", "Quillmere's mayor is", "The mayor of the town of Quillmere is"],
    [
        "In Quillmere, the lighthouse is painted",
        "Quillmere's lighthouse is painted",
        "The lighthouse in the harbour of Quillmere is painted",
    ],
    ["To reach Quillmere, take the ferry from", "Quillmere's ferry sails from", "The boat to Quillmere sails from"],
    ["In Quillmere, people trade in", "Quillmere's people trade in", "The people of the town of Quillmere trade in"],
    ["In spring, Quillmere holds", "Each year in spring, Quillmere holds", "Every spring, the town of Quillmere holds"],
]
"""Three more prompts for each fact, in the order of `FACTS`. No adapter was trained on them."""

QUESTIONS = [
    (prompt, answer)
    for (trained, answer), others in zip(FACTS, IN_OTHER_WORDS, strict=True)
    for prompt in (trained, *others)
]
