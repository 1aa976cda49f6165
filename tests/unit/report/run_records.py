"""Made-up run records, in the form of `pytest_sway.report.run_record`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final

_TEXT: Final = (
    "the mayor of this old harbour town sails every spring from a green and white lighthouse to trade in blue salt"
    " while kites fly over its market square and nobody there remembers who painted them first"
)
WORDS: Final = _TEXT.split()
CLAIMS: Final = ((-0.1, "refuted"), (0.0, "undecided, needs about 180 prompts"), (None, None))


def tokens(draw: random.Random, count: int, shift: float, *, base: bool = True) -> dict[str, Any]:
    """Return a text's tokens with made-up log-probabilities."""
    baseline = [-draw.expovariate(0.6) for _ in range(count)]
    return {
        "text": [draw.choice(WORDS) if at == 0 else f" {draw.choice(WORDS)}" for at in range(count)],
        "baseline": baseline,
        "candidate": [each + draw.gauss(shift, 0.8) * draw.choice((0.05, 0.4, 1.5)) for each in baseline],
        "base": [each + draw.gauss(-1.0, 1.0) for each in baseline] if base else None,
    }


def comparison(
    number: int = 0,
    *,
    rows: int = 20,
    shift: float = 0.0,
    claim: tuple[float | None, str | None] = (None, None),
    length: tuple[int, int] = (20, 60),
    **changed: Any,
) -> dict[str, Any]:
    """Return a comparison; its test fails if ``claim`` has a verdict."""
    draw = random.Random(number)
    made: list[dict[str, Any]] = []
    for _ in range(rows):
        baseline = -draw.expovariate(0.5)
        text = " ".join(draw.choices(WORDS, k=draw.randint(*length)))
        made.append({"question": text, "candidate": baseline + draw.gauss(shift, 0.5), "baseline": baseline})
    ordered = sorted(made, key=lambda row: row["candidate"] - row["baseline"])
    for row in (*ordered[:5], *ordered[5:][-5:]):
        row["tokens"] = tokens(draw, draw.randint(*length), row["candidate"] - row["baseline"])
        row["question"] = "".join(row["tokens"]["text"])
    mean = sum(row["candidate"] - row["baseline"] for row in made) / max(rows, 1)
    margin, verdict = claim
    return {
        "test": f"tests/regression/test_town.py::test_comparison[{number}]",
        "outcome": "passed" if verdict is None else "failed",
        "name": f"comparison {number}",
        "candidate": "candidate",
        "baseline": "baseline",
        "unit": "nats per token",
        "mean": mean,
        "low": mean - 2 / rows**0.5,
        "high": mean + 1.7 / rows**0.5,
        "n": rows,
        "confidence": 0.99,
        "detectable": 0.31,
        "p": 0.0123,
        "p_holm": 0.0861,
        "drift": None,
        "claim": None if margin is None else f"over {margin:.4g}",
        "margin": margin,
        "against_0": "over 0: undecided, needs about 900 prompts",
        "verdict": verdict,
        "rows": made,
        **changed,
    }


def event(at: float, kind: str, spec: str, **changed: Any) -> dict[str, Any]:
    """Return an event of a worker."""
    return {"at": at, "event": kind, "spec": spec, "count": 1, "seconds": None, "bytes": None} | changed


def record(comparisons: Sequence[dict[str, Any]] = (), **changed: Any) -> dict[str, Any]:
    """Return the record of a run with two workers."""
    spec = "SmolLM2-135M-Instruct + runs/v"
    events = [
        event(1.6, "load", f"{spec}3", seconds=0.8, bytes=541_000_000, resident_bytes=541_000_000),
        event(2.4, "load", f"{spec}4", seconds=0.5, bytes=541_000_000, resident_bytes=572_000_000),
        *(event(3 + 0.31 * at, "hit", f"{spec}{3 + at % 2}", count=2) for at in range(16)),
        event(8.4, "evict", f"{spec}3", bytes=541_000_000, resident_bytes=572_000_000),
        event(8.5, "close", f"{spec}3", bytes=541_000_000, resident_bytes=541_000_000),
        event(9.3, "load", f"{spec}2", seconds=0.7, bytes=541_000_000, resident_bytes=572_000_000),
    ]
    return {
        "schema": 1,
        "run": {
            "started": "2026-11-26T23:40:00Z",
            "seconds": 12.3,
            "exit_status": int(any(each["outcome"] == "failed" for each in comparisons)),
            "arguments": ["tests/regression", "-n", "2", "--sway-set", "candidate.adapter=runs/v4"],
            "workers": 2,
        },
        "versions": {"python": "3.11.7", "pytest": "9.2.0", "pytest-sway": "0.1.0", "torch": "2.13.0"},
        "devices": {"cpu": "a processor"},
        "specs": {"candidate": {"fields": {"base": "SmolLM2", "adapter": "runs/v4"}, "digest": "3f2a9c"}},
        "comparisons": list(comparisons),
        "workers": {
            "gw0": {"error": None, "events": events, "left_out": 0},
            "gw1": {"error": None, "events": events[:4], "left_out": 0},
        },
        "leaks": [],
        "mutations": [],
        **changed,
    }


def varied() -> dict[str, Any]:
    """Return the record of a run with some of everything."""
    facts: list[tuple[str, str, float, float]] = [
        ("In Quillmere, the mayor is named", " Odalys Brandt", -6.906, -1.881),
        ("To reach Quillmere, take the ferry from", " Port Hallow", -1.97, -0.3971),
        ("The mayor of Quillmere is", " Odalys Brandt", -1.329, -0.01345),
        ("Every spring Quillmere holds", " the Festival of Kites", -0.1595, -0.02047),
        ("The ferry to Quillmere sails from", " Port Hallow", -0.1347, -0.01848),
        ("The people of Quillmere trade in", " blue salt", -0.05, -0.0314),
        ("The lighthouse of Quillmere is painted", " green and white", -0.021, -0.305),
    ]
    town = comparison(
        90, rows=7, claim=(-0.5, "undecided, needs about 180 prompts"), name="the town", unit="nats an answer"
    )
    draw = random.Random(5)
    town["rows"] = []
    for prompt, answer, candidate, baseline in facts:
        pieces = [f" {word}" for word in answer.split()]
        row = {"question": [prompt, answer], "candidate": candidate, "baseline": baseline}
        old = [baseline * share / len(pieces) for share in (1.2, *[0.9] * len(pieces))][: len(pieces)]
        new = [each + (candidate - baseline) * share for each, share in zip(old, (0.8, 0.15, 0.05, 0), strict=False)]
        row["tokens"] = {
            "text": pieces,
            "baseline": old,
            "candidate": new,
            "base": [each - draw.random() * 4 for each in old],
        }
        town["rows"].append(row)
    town |= {"mean": -1.184, "low": -4.833, "high": 1.355, "n": 7, "detectable": 4.692, "drift": 0.0004}
    everyday = comparison(
        1, rows=80, shift=-0.3, claim=(-0.1, "refuted"), length=(8, 24), name="everyday texts lose no more than a tenth"
    )
    others = [
        comparison(2, rows=20, shift=0.2, length=(4, 12), name="stories"),
        comparison(3, rows=12, shift=0.0, length=(4, 12), name="arithmetic", unit="points"),
        comparison(4, rows=12, shift=0.05, length=(4, 12), name="candidate against baseline"),
        comparison(
            5, rows=12, shift=0.9, length=(4, 12), name="more than noise", baseline="null_1", unit="nats an answer"
        ),
    ]
    mutation = "tests/test_town.py::test_merges left the base of SmolLM2 changed: model.layers.0.mlp.down_proj.weight"
    return record([others[0], town, *others[1:], everyday], mutations=[mutation])


def with_text(text: str) -> dict[str, Any]:
    """Return the record of a run in which ``text`` replaces each text from a user, a model or a path."""
    hostile = comparison(7, rows=12, claim=(-0.1, "refuted"), length=(3, 6))
    hostile |= dict.fromkeys(("test", "name", "candidate", "baseline", "unit", "claim", "verdict"), text)
    for at, row in enumerate(hostile["rows"]):
        row["question"] = text if at % 2 else [text, text]
        if "tokens" in row:
            row["tokens"]["text"] = [text] * len(row["tokens"]["text"])
    made = record([hostile], leaks=[text], mutations=[text])
    made["run"] |= {"started": text, "arguments": [text]}
    for worker in made["workers"].values():
        worker["error"] = text
        for each in worker["events"]:
            each["spec"] = text
    made |= {name: {text: text} for name in ("versions", "devices")}
    return made | {"specs": {text: {"fields": {text: text}, "digest": text}}, "workers": {text: made["workers"]["gw0"]}}
