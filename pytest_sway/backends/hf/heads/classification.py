"""Sequence classifiers and reward models: the logits of whole texts."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pytest_sway.backends.hf.heads import batches
from pytest_sway.backends.hf.heads.view import HeadView
from pytest_sway.backends.hf.scoring.answer_cache import recalling
from pytest_sway.backends.hf.scoring.engine import no_number
from pytest_sway.backends.text.chat import prompt_text
from pytest_sway.errors import ScoringError
from pytest_sway.protocols import Classification

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from pytest_sway.backends.hf.heads.batches import Text
    from pytest_sway.backends.hf.scoring.engine import Engine
    from pytest_sway.protocols import Input

__tracebackhide__ = True


class ClassifierView(HeadView):
    """A view of a sequence classifier or a reward model.

    Texts of similar length share a pass, padded on the right. A causal model's classifier reads its answer at the last
    token that is no padding, so the padding is a token that no text of the pass contains, unless the model's config
    names one. A padded text's logits are within 1e-5 of those that it has alone.
    """

    task: ClassVar[str] = "classification"

    def _classified(self, texts: list[Input]) -> list[Classification]:
        encoded, labels = self._run(_encoded, texts)
        found = batches.answered(self._run, _logits, _classified, encoded)
        return [Classification(logits, labels[: len(logits)]) for logits in found]

    def _not_finite(self, label: str) -> str:
        (answer,) = self.classify(["hello"])
        return "" if np.isfinite(answer.logits).all() else f"the {label} view gave logits that are not finite"


class HeadlessView(ClassifierView):
    """A view of a base whose files have no head, beside a model that has one."""

    def __init__(self, view_id: str, backend: Any, lacking: str) -> None:
        super().__init__(view_id, backend)
        self._lacking = lacking

    def _classified(self, texts: list[Input]) -> list[Classification]:  # noqa: ARG002
        raise ScoringError(
            f"the base has no head of a classifier of its own (its files lack {self._lacking}), so its logits would be"
            " noise; ask as_finetuned(), or name a base that was trained as a classifier."
        )

    def _not_finite(self, label: str) -> str:  # noqa: ARG002
        return ""


def _encoded(engine: Engine, texts: Sequence[Input]) -> tuple[list[Text], tuple[str, ...]]:
    """Return the encoded texts, and the names of the labels."""
    encoded = []
    for text in texts:
        if isinstance(text, tuple):
            encoded.append(batches.encoded(engine.tokenizer, *text))
        else:
            written, rendered = prompt_text(engine.tokenizer, text)
            encoded.append(batches.encoded(engine.tokenizer, written, special=not rendered))
        _require_readable(engine, encoded[-1])
    names = dict(getattr(engine.forward.config, "id2label", None) or {})
    count = max((int(number) for number in names), default=-1) + 1
    return encoded, tuple(str(names.get(i, names.get(str(i), f"LABEL_{i}"))) for i in range(count))


def _require_readable(engine: Engine, text: Text) -> None:
    engine.require_known(text.ids)
    if not text.ids:
        raise ScoringError("a text has no tokens in the model's tokenizer, so there is nothing to classify.")
    if len(text.ids) > engine.max_length:
        raise ScoringError(
            f"a text has {len(text.ids)} tokens, but the model reads at most {engine.max_length} at once. Shorten it:"
            " which part of it matters, only you can tell."
        )


@recalling
def _classified(engine: Engine, texts: Sequence[Text]) -> list[NDArray[np.float32]]:
    logits = _logits(engine, texts).float().cpu().numpy()
    if np.isnan(logits).any():
        raise no_number(engine)
    return list(logits)


def _logits(engine: Engine, texts: Sequence[Text]) -> Any:
    """Return the logits of each text, shape ``(texts, labels)``."""
    import torch

    pad = engine.forward.config.get_text_config().pad_token_id
    if pad is not None and not 0 <= pad < (engine.forward.embedded or pad + 1):
        pad = None  # as -1 in some configs: it has no embedding, and on a GPU that ends the process's use of it
    if pad is None and len(texts) > 1:
        pad = _unused(engine, texts)
        if pad is None:
            return torch.cat([_logits(engine, [text]) for text in texts])
        with _padding(engine.forward.model, pad):
            return engine.forward.runner(**batches.padded_inputs(engine, texts, pad)).logits
    return engine.forward.runner(**batches.padded_inputs(engine, texts, pad or 0)).logits


def _unused(engine: Engine, texts: Sequence[Text]) -> int | None:
    """Return a token of the vocabulary that is in none of the texts; ``None`` if there is none."""
    used = {token for text in texts for token in text.ids}
    return next((token for token in range(engine.forward.embedded or 0) if token not in used), None)


@contextmanager
def _padding(model: Any, pad: int) -> Iterator[None]:
    """Name the padding in a model's config for one pass; without it, a causal classifier refuses a batch."""
    before = model.config
    config = copy.deepcopy(before)
    config.get_text_config().pad_token_id = pad
    model.config = config
    try:
        yield
    finally:
        model.config = before
