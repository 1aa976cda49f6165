"""Tokenise texts as lm-evaluation-harness does, without torch or a model.

Every question becomes a `Window`: tokens to score, given the tokens before them. Two models are compared on the same
tokens, so their vocabularies are checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.backends.libraries.tokenizer_faults import fault
from pytest_sway.errors import AdapterMismatchError, ScoringError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


DEFAULT_MAX_LENGTH: Final = 2048
"""lm-evaluation-harness's default for a model that names no length."""

_LENGTH_FIELDS: Final = ("n_positions", "max_position_embeddings", "n_ctx")
_UNSET_LENGTH: Final = 10**29  # tokenizers say "no limit" with int(1e30)


Ids = tuple[int, ...]


class Window(NamedTuple):
    """Tokens to score, and the tokens that they are conditioned on.

    Attributes:
        context: Token ids, at least one.
        scored: Token ids whose log-probabilities are wanted, at least one.
    """

    context: tuple[int, ...]
    scored: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens that the model reads: all but the last, which is only predicted."""
        return self.context + self.scored[:-1]


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Return the token ids of ``text``, with the special tokens that the tokenizer puts before it.

    Special tokens that it puts behind the text (``add_eos_token``) are dropped: a text that is scored or continued has
    not ended. lm-evaluation-harness keeps them, and so drops a completion's first token and scores EOS.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        special: Whether to add special tokens.
    """
    ids = _ids(tokenizer, text, special)
    if not special or not _adds_behind(tokenizer, text, ids):
        return ids
    own = _ids(tokenizer, text, False)
    for start in range(len(ids) - len(own) + 1 if own else 0):
        if ids[start : start + len(own)] == own:
            return ids[: start + len(own)]
    return ids if own else ids[: ids[:1] == [tokenizer.bos_token_id]]


def prefix_token(tokenizer: Any, what: str = "the prompt is empty, and") -> int:
    """Return the token that begins a text: BOS, or EOS if there is no BOS.

    Args:
        tokenizer: The tokenizer.
        what: The beginning of the error's sentence.

    Raises:
        ScoringError: The tokenizer has neither.
    """
    token = _bos_or_eos(tokenizer)
    if token is None:
        raise ScoringError(
            f"{what} the tokenizer has no BOS or EOS token to stand in for it. Set bos_token or eos_token in"
            f" tokenizer_config.json of {getattr(tokenizer, 'name_or_path', '')!r}."
        )
    return token


def encode_pair(tokenizer: Any, prompt: str, completion: str, *, rendered: bool = False) -> Window:
    """Tokenise a pair as lm-evaluation-harness's ``TemplateLM.loglikelihood`` and ``_encode_pair`` do; see `encode`.

    The prompt's trailing whitespace goes to the completion. Both are tokenised as one text, and the tokens after the
    prompt's own are the completion's. The token that begins a text stands in for an empty prompt. It is not added again
    if the prompt or the completion begins with it.

    Args:
        tokenizer: The tokenizer.
        prompt: The prompt.
        completion: The completion.
        rendered: Whether a chat template wrote the prompt; it has put in all special tokens.

    Raises:
        ScoringError: The completion has no tokens, or the prompt is empty and there is neither BOS nor EOS.
    """
    context, scored = _pair(tokenizer, prompt, completion, rendered)
    if not scored:
        why = fault(tokenizer, lambda other: not _pair(other, prompt, completion, rendered)[1]) if completion else ""
        raise ScoringError(
            f"the completion {completion!r} has no tokens after the prompt {prompt[-80:]!r} in the model's tokenizer,"
            f" so there is nothing to score.{why}"
        )
    return Window(tuple(context), tuple(scored))


def _pair(tokenizer: Any, prompt: str, completion: str, rendered: bool) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and those of its completion."""
    context_text = prompt.rstrip()
    completion_text = prompt[len(context_text) :] + completion
    context: list[int] = []
    if context_text:
        special = _wants_special(tokenizer, context_text, rendered)
        context = encode(tokenizer, context_text, special=special)
    if context:
        scored = encode(tokenizer, context_text + completion_text, special=special)[len(context) :]
    else:
        context, scored = [prefix_token(tokenizer)], encode(tokenizer, completion_text, special=False)
        if scored[:1] == context:
            del scored[0]
    return context, scored


def encode_apart(tokenizer: Any, prompt: str, completion: str, *, rendered: bool = False) -> Window:
    """Tokenise a pair for an encoder and a decoder, as lm-evaluation-harness does for sequence-to-sequence models.

    The encoder reads the prompt with all special tokens of the tokenizer, the decoder the completion without any. The
    prompt's trailing whitespace goes to the completion.

    Args:
        tokenizer: The tokenizer.
        prompt: The prompt.
        completion: The completion.
        rendered: Whether a chat template wrote the prompt.

    Raises:
        ScoringError: The completion has no tokens, or the prompt is empty and there is neither BOS nor EOS.
    """
    read = prompt.rstrip()
    scored = _ids(tokenizer, prompt[len(read) :] + completion, False)
    if not scored:
        raise ScoringError(
            f"the completion {completion!r} has no tokens in the model's tokenizer, so there is nothing to score."
        )
    return Window(encode_read(tokenizer, read, rendered=rendered), tuple(scored))


def encode_read(tokenizer: Any, prompt: str, *, rendered: bool = False) -> tuple[int, ...]:
    """Return the ids of a prompt that an encoder reads, with all special tokens; see `encode_apart`.

    Raises:
        ScoringError: The prompt is empty, and the tokenizer has neither BOS nor EOS.
    """
    ids = _ids(tokenizer, prompt, _wants_special(tokenizer, prompt, rendered)) if prompt else []
    return tuple(ids or [prefix_token(tokenizer)])


def encode_prompt(tokenizer: Any, prompt: str, *, rendered: bool = False) -> tuple[int, ...]:
    """Return the ids of a prompt. The token that begins a text stands in for an empty one.

    Raises:
        ScoringError: The prompt is empty, and the tokenizer has neither BOS nor EOS.
    """
    ids = encode(tokenizer, prompt, special=_wants_special(tokenizer, prompt, rendered))
    return tuple(ids or [prefix_token(tokenizer)])


def encode_text(tokenizer: Any, text: str, *, prefix: bool) -> tuple[int, ...]:
    """Return the ids of a text, of which all but the first are to be scored.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        prefix: Begin with the token that begins a text, and with none that the tokenizer adds by default; otherwise
            begin as the tokenizer does.

    Raises:
        ScoringError: ``prefix`` is true, and the tokenizer has neither BOS nor EOS.
    """
    if not prefix:
        return tuple(encode(tokenizer, text))
    first = prefix_token(tokenizer, "a text is scored after a prefix token, and")
    return (first, *encode(tokenizer, text, special=False))


def rolling_windows(ids: Sequence[int], max_length: int) -> Iterator[Window]:
    """Cut a text into windows that together score each of its tokens after the first once.

    This is lm-evaluation-harness's ``loglikelihood_rolling`` with ``context_len=1``. The first window begins with the
    first token. Each later window is conditioned on at least the last token of the one before. The last window may
    score few tokens, and has as much context as fits.

    Args:
        ids: Token ids; the first is only conditioned on.
        max_length: The most tokens that the model reads at once.
    """
    end = min(max_length + 1, len(ids))
    if end > 1:
        yield Window(tuple(ids[:1]), tuple(ids[1:end]))
    while end < len(ids):
        start, end = end, min(end + max_length, len(ids))
        yield Window(tuple(ids[end - max_length - 1 : start]), tuple(ids[start:end]))


def cut_left(window: Window, max_length: int) -> Window:
    """Drop tokens from the left of the context until the model can read the window, as lm-evaluation-harness does.

    Raises:
        ScoringError: There are more scored tokens than the model reads.
    """
    if len(window.scored) > max_length:
        raise ScoringError(
            f"the completion has {len(window.scored)} tokens, but the model reads at most {max_length} at once, by its"
            " config (max_position_embeddings or the like). Score it with rolling_logprob, which cuts a text into"
            " windows."
        )
    surplus = len(window.inputs) - max_length
    return Window(window.context[surplus:], window.scored) if surplus > 0 else window


def max_length_of(config: Any, tokenizer: Any) -> int:
    """Return the most tokens that a model reads at once, as lm-evaluation-harness's ``HFLM`` finds it.

    A length that is not positive, such as XLNet's -1, counts as none.

    Args:
        config: The model's configuration.
        tokenizer: Used if the configuration names no length.
    """
    config = getattr(config, "text_config", None) or config
    lengths = [getattr(config, name, None) for name in _LENGTH_FIELDS]
    found = next((length for length in lengths if length is not None and length > 0), None)
    return int(limit_of(tokenizer) or DEFAULT_MAX_LENGTH) if found is None else int(found)


def limit_of(tokenizer: Any) -> int | None:
    """Return the most tokens of a text that a tokenizer states as ``model_max_length``; ``None`` if it states none."""
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and 0 < limit < _UNSET_LENGTH else None


def require_known(tokenizer: Any, ids: Iterable[int], rows: int | None) -> None:
    """Require that the model has an embedding for each token.

    Args:
        tokenizer: The tokenizer that made the ids.
        ids: Token ids.
        rows: The number of the model's embeddings; ``None`` if unknown.

    Raises:
        ScoringError: A token has no embedding.
    """
    highest = max(ids, default=0)
    if rows is not None and highest >= rows:
        token, known = tokenizer.convert_ids_to_tokens(highest), rows
        why = fault(tokenizer, lambda other: other.get_vocab().get(token, 0) >= known)
        raise ScoringError(
            f"the tokenizer gives token {highest}, {token!r}, but the model has embeddings for only {rows} tokens."
            " Either the tokenizer is another model's, or tokens were added to it without resizing the embeddings and"
            f" saving them with the adapter.{why}"
        )


def token_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Return the text that each token adds after another one: many tokenizers drop the space before a first word."""
    return [_decoded(tokenizer, [i, i])[len(_decoded(tokenizer, [i])) :] for i in ids]


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _adds_behind(tokenizer: Any, text: str, ids: list[int]) -> bool:
    """Whether special tokens may follow a text. It must be quick, since it runs for every text."""
    added, bos = tokenizer.num_special_tokens_to_add(pair=False), tokenizer.bos_token_id
    if added == 1 and ids[:1] == [bos]:
        return bool(text.startswith(tokenizer.decode([bos])))  # then BOS may be the text's own
    return bool(added)


def _bos_or_eos(tokenizer: Any) -> int | None:
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return None if token is None else int(token)


def _wants_special(tokenizer: Any, text: str, rendered: bool) -> bool:
    if rendered:
        return False
    token = _bos_or_eos(tokenizer)
    return token is None or not text.startswith(tokenizer.decode([token]))


def require_same_tokens(base: ModelSpec, ours: Any, tuned: ModelSpec, theirs: Any) -> None:
    """Raise unless every token of the base has the same id in the fine-tuned model.

    Args:
        base: The base's spec.
        ours: The base's tokenizer.
        tuned: The fine-tuned model's spec.
        theirs: The fine-tuned model's tokenizer.

    Raises:
        AdapterMismatchError: Some tokens have other ids.
    """
    numbers, others = ours.get_vocab(), theirs.get_vocab()
    moved = sorted((i, token) for token, i in numbers.items() if others.get(token) != i)
    if moved:
        i, token = moved[0]
        there = f"id {others[token]}" if token in others else "none"
        raise AdapterMismatchError(
            f"the fine-tuned model {tuned.base!r} cannot be compared with the base {base.base!r}:"
            f" {len(moved):,} of the base's {len(numbers):,} tokens have other ids in it ({token!r} has id {i} in the"
            f" base, {there} in it). Name the base that it was fine-tuned from."
        )
