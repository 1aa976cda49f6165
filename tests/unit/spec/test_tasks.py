"""The task of a spec: its names, other kinds, its label and its part of the key."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from pytest_sway import ModelSpec
from pytest_sway.errors import SpecError
from pytest_sway.spec.identity import base_key
from pytest_sway.spec.tasks import OF_PEFT, TASKS, TaskName


def test_each_task_has_a_name_for_type_checkers() -> None:
    assert tuple(TASKS) == get_args(TaskName)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        *((peft, name) for peft, name in OF_PEFT.items()),
        ("text-classification", "classification"),
        ("reward", "classification"),
        ("sequence_classification", "classification"),
        ("translation", "seq2seq"),
        ("feature-extraction", "embeddings"),
        ("ner", "token_classification"),
        ("qa", "question_answering"),
    ],
)
def test_other_names_get_the_right_one(said: str, meant: str) -> None:
    fields: dict[str, Any] = {"task": said}
    with pytest.raises(
        SpecError, match=rf"must be one of causal, seq2seq, .*; found '{said}'\. Write task='{meant}'\.$"
    ):
        ModelSpec(base="org/name", **fields)


@pytest.mark.parametrize("value", ["summing", 3, ["causal"]])
def test_what_is_no_task_is_refused(value: Any) -> None:
    with pytest.raises(SpecError, match=r"spec field 'task' must be one of causal, .* found "):
        ModelSpec(base="org/name", task=value)


@pytest.mark.parametrize("kind", ["api", "mlx", "dummy", "custom"])
def test_other_kinds_have_causal_language_models_only(kind: Any) -> None:
    further: dict[str, Any] = {"endpoint": "http://localhost:1"} if kind == "api" else {}
    further |= {"entry_point": "a:B"} if kind == "custom" else {}
    assert ModelSpec(kind=kind, base="b", task="causal", **further).task == "causal"
    what = f"^a spec of kind '{kind}' is of a causal language model; task='embeddings' is for kind='hf'"
    with pytest.raises(SpecError, match=what):
        ModelSpec(kind=kind, base="b", task="embeddings", **further)


def test_a_task_is_in_the_label_and_in_the_plain_values_where_it_says_something() -> None:
    spec = ModelSpec(base="org/name", adapter="org/a", task="classification")
    assert str(spec) == "org/name (classification) + org/a"
    assert spec.as_dict()["task"] == "classification"
    assert str(ModelSpec(base="org/name", task="causal")) == "org/name"
    assert "task" not in ModelSpec(base="org/name").as_dict()


def test_two_tasks_are_two_bases_and_causal_is_the_default() -> None:
    keys = {task: base_key(ModelSpec(base="org/name", task=task)) for task in (None, *get_args(TaskName))}
    assert len(set(keys.values())) == len(TASKS)
    assert keys[None] == keys["causal"]
