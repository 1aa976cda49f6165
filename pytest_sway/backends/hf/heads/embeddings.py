"""Models for embeddings: a vector for each text, pooled as sentence-transformers pools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from pytest_sway.backends.hf.heads import batches
from pytest_sway.backends.hf.heads.pooling import POOLINGS, Pooling
from pytest_sway.backends.hf.heads.view import HeadView
from pytest_sway.backends.hf.scoring.answer_cache import recalling
from pytest_sway.backends.hf.scoring.engine import no_number
from pytest_sway.backends.text import tokens as tokenisation
from pytest_sway.backends.text.requests import warn_at_call, warn_of_cuts
from pytest_sway.errors import ScoringError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pytest_sway.backends.hf.heads.batches import Text
    from pytest_sway.backends.hf.heads.pooling import Poolings
    from pytest_sway.backends.hf.scoring.engine import Engine

__tracebackhide__ = True

_NO_CONFIGURATION: Final = "the model has no configuration of sentence-transformers (modules.json) beside its weights"
_CHOICES: Final = f"embed(texts, pooling={POOLINGS[0]!r}), or {', '.join(map(repr, POOLINGS[1:]))}"


class EmbeddingView(HeadView):
    """A view of a model for embeddings.

    Args:
        view_id: The view's id.
        backend: Its backend.
        poolings: What the models' sentence-transformers configurations say.
    """

    task: ClassVar[str] = "embeddings"

    def __init__(self, view_id: str, backend: Any, poolings: Poolings) -> None:
        super().__init__(view_id, backend)
        self._poolings = poolings

    def _embedded(self, texts: list[str], pooling: str | None) -> NDArray[np.float32]:
        how = self._how(pooling)
        encoded, cut, max_length = self._run(_encoded, texts, how)
        warn_of_cuts(cut, max_length, "end, as sentence-transformers does")
        found = batches.answered(self._run, _pooled, _vectors, encoded, how)
        return np.stack(found) if found else np.zeros((0, self._run(_size)), dtype=np.float32)

    def _how(self, asked: str | None) -> Pooling:
        own = self._poolings.of(self.id, again=asked is None)
        if asked is None and own is not None and own.mode is not None:
            return own
        if asked is None:
            why = _NO_CONFIGURATION if own is None else own.why
            raise ScoringError(f"{why}. Say how to pool its hidden states: {_CHOICES}.")
        if asked not in POOLINGS:
            raise ScoringError(f"there is no pooling {asked!r}. Say {_CHOICES}.")
        if own is not None and not own.complete:
            warn_at_call(
                f"{own.why}. The hidden states are pooled as you say; what else that file may say, such as to normalize"
                " the vectors, is left out."
            )
        return (own or Pooling(None))._replace(mode=asked, why="")

    def _not_finite(self, label: str) -> str:
        own = self._poolings.of(self.id, again=False)
        known = own is not None and own.mode is not None
        vectors = self.embed(["hello"], pooling=None if known else POOLINGS[0])
        return "" if np.isfinite(vectors).all() else f"the {label} view gave an embedding that is not finite"


def _encoded(engine: Engine, texts: Sequence[str], how: Pooling) -> tuple[list[Text], int, int]:
    """Return the encoded texts, how many of them were cut at their end, and the most tokens of a text."""
    stated = tokenisation.limit_of(engine.tokenizer) if how.limited_by_tokenizer else how.max_length
    most = min(engine.max_length, stated or engine.max_length)
    encoded, cut = [], 0
    for text in texts:
        asked = how.prompt + text
        asked = asked.lower() if how.lower else asked
        encoded.append(batches.encoded(engine.tokenizer, asked))
        if len(encoded[-1].ids) > most:
            encoded[-1] = batches.cut(engine.tokenizer, asked, most)
            cut += 1
        engine.require_known(encoded[-1].ids)
        if not encoded[-1].ids:
            raise ScoringError("a text has no tokens in the model's tokenizer, so there is nothing to embed.")
    return encoded, cut, most


@recalling
def _vectors(engine: Engine, texts: Sequence[Text], how: Pooling) -> list[NDArray[np.float32]]:
    vectors = _pooled(engine, texts, how).float().cpu().numpy()
    if np.isnan(vectors).any():
        raise no_number(engine)
    return list(vectors)


def _pooled(engine: Engine, texts: Sequence[Text], how: Pooling) -> Any:
    """Return a vector for each text, shape ``(texts, size)``, as sentence-transformers' ``Pooling`` computes it."""
    import torch

    pad = max(0, int(getattr(engine.forward.config, "pad_token_id", None) or 0))  # some configs say -1
    inputs = batches.padded_inputs(engine, texts, pad)
    mask = inputs["attention_mask"].unsqueeze(-1)
    states = engine.forward.runner(**inputs).last_hidden_state[:, -mask.shape[1] :]  # after virtual tokens
    if how.mode == "cls":
        pooled = states[:, 0]
    elif how.mode == "last":
        pooled = states[torch.arange(len(texts), device=states.device), mask.sum(1).squeeze(-1) - 1]
    elif how.mode == "max":
        pooled = states.masked_fill(mask == 0, -torch.inf).amax(1)
    else:
        pooled = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=-1) if how.normalize else pooled


def _size(engine: Engine) -> int:
    """Return the size of an embedding by the model's config, of which the part may tell it that reads the text."""
    config = engine.forward.config
    text = getattr(config, "encoder", None) or config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)  # as OPT may project its states
