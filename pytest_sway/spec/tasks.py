"""Tasks: which head a model has, and so which questions its views answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, get_args

from pytest_sway.errors import SpecError

__tracebackhide__ = True

TaskName = Literal["causal", "seq2seq", "classification", "embeddings", "token_classification", "question_answering"]

CAUSAL: Final = "causal"


class Task(NamedTuple):
    """What a model with one kind of head is called, and what it answers.

    Attributes:
        peft: PEFT's name, which an adapter has as its ``task_type``.
        others: What transformers and others call it.
        what: A model with this head, in messages.
        answers: The questions that its views answer.
    """

    peft: str
    others: tuple[str, ...]
    what: str
    answers: tuple[str, ...] = ()


TASKS: Final[Mapping[str, Task]] = {
    "causal": Task(
        "CAUSAL_LM",
        ("text-generation", "causal-lm", "text-generation-with-past"),
        "a causal language model",
        ("logprob_of", "rolling_logprob", "next_token_dist", "generate"),
    ),
    "seq2seq": Task(
        "SEQ_2_SEQ_LM",
        ("text2text-generation", "seq2seq-lm", "summarization", "translation"),
        "a sequence-to-sequence model",
        ("logprob_of", "generate"),
    ),
    "classification": Task(
        "SEQ_CLS",
        ("text-classification", "sequence-classification", "reward", "reward-model", "sentiment-analysis", "classify"),
        "a sequence classifier",
        ("classify",),
    ),
    "embeddings": Task(
        "FEATURE_EXTRACTION",
        ("feature-extraction", "sentence-similarity", "embedding", "embed"),
        "a model for embeddings",
        ("embed",),
    ),
    "token_classification": Task("TOKEN_CLS", ("token-classification", "ner"), "a token classifier"),
    "question_answering": Task("QUESTION_ANS", ("question-answering", "qa"), "a model for question answering"),
}

OF_PEFT: Final[Mapping[str, TaskName]] = {TASKS[name].peft: name for name in get_args(TaskName)}
"""The task of each ``task_type`` of an adapter."""


def checked_task(value: object, kind: str) -> str | None:
    """Return the task of a spec.

    Args:
        value: The field's value; ``None`` leaves it to the adapter.
        kind: The spec's kind.

    Raises:
        SpecError: There is no such task, or models of the kind have no such head.
    """
    if value is None:
        return None
    if not isinstance(value, str) or value not in TASKS:
        close = _meant(value)
        hint = f" Write task={close!r}." if close else ""
        raise SpecError(f"spec field 'task' must be one of {', '.join(TASKS)}; found {value!r}.{hint}")
    if value != CAUSAL and kind != "hf":
        raise SpecError(
            f"a spec of kind {kind!r} is of a causal language model; task={value!r} is for kind='hf', which loads"
            f" {TASKS[value].what}."
        )
    return value


def is_causal(task: str | None) -> bool:
    """Return whether a resolved spec's task is that of a causal language model."""
    return task in (None, CAUSAL)


def _meant(value: object) -> str | None:
    said = str(value).lower().replace("_", "-")
    for name, task in TASKS.items():
        if said in (task.peft.lower().replace("_", "-"), name.replace("_", "-"), *task.others):
            return name
    return None
