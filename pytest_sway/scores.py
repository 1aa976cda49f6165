"""More scores for ``sway_compare``: the distance from a reference model, and whether answers are right.

Each function except `divergences` makes a score, for ``sway_compare(questions, candidate, baseline, score=...)``::

    from pytest_sway.scores import exact_match, js_from, kl_from, multiple_choice

`multiple_choice` and `exact_match` count as lm-evaluation-harness 0.4 does.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, Final, Literal, SupportsIndex, TypeAlias, get_args

from pytest_sway.backends.questions import checked_pair, listed
from pytest_sway.comparison.divergence import Divergence, divergence
from pytest_sway.comparison.questions import makes_score
from pytest_sway.errors import ScoringError
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from pytest_sway.comparison.questions import Score
    from pytest_sway.protocols import Prompt, TokenDist, View

__all__ = ["Divergence", "Metric", "divergences", "exact_match", "js_from", "kl_from", "multiple_choice"]

__tracebackhide__ = True

Metric: TypeAlias = Literal["acc", "acc_norm", "acc_bytes"]
"""How the choices of a question are ranked, by lm-evaluation-harness's names."""

_EVERY_TOKEN: Final = 2**20
"""More tokens than any vocabulary has."""

_AT_ONCE: Final = 32
"""The number of prompts whose whole distributions are in memory at once, each 3 MB for a vocabulary of 262,000."""


def divergences(
    prompts: Iterable[Prompt], view: View, reference: View, *, top_k: int | None = None
) -> list[Divergence]:
    """Return, for each prompt, the divergence of a view's next-token distribution from a reference's.

    Args:
        prompts: Texts or lists of messages.
        view: The view to measure.
        reference: The view to measure from, with the same tokens.
        top_k: The number of most probable tokens to use. By default, a model in this process gives its whole
            vocabulary, and a server as many tokens as it allows. If a server refuses without naming its limit, pass 20.

    Raises:
        ScoringError: A side is not a view, or the two number their tokens differently.
    """
    for side in (view, reference):
        _require_view(side)
    asked, found = listed(prompts, "prompts"), list[Divergence]()
    for start in range(0, len(asked), _AT_ONCE):
        some = asked[start : start + _AT_ONCE]
        dists, others = _dists(view, some, top_k), _dists(reference, some, top_k)
        if not found:
            _require_same_tokens(view, dists[0], reference, others[0])
        found += [divergence(*pair) for pair in zip(dists, others, strict=True)]
    return found


@makes_score
def kl_from(reference: View, *, top_k: int | None = None) -> Score:
    """Score prompts by minus the Kullback-Leibler divergence of a side's next token from the reference's, in nats.

    0 means equal, and larger is closer. If distributions are cut, the divergence is a lower bound; see
    `Divergence.kl`.

    Args:
        reference: An open view, such as the base's.
        top_k: As for `divergences`.
    """
    return _closeness("kl", reference, top_k)


@makes_score
def js_from(reference: View, *, top_k: int | None = None) -> Score:
    """Score prompts by minus the Jensen-Shannon divergence between a side's next token and the reference's, in nats.

    0 means equal, larger is closer, and ``-log(2)`` is the least. If distributions are cut, the divergence is a lower
    bound; see `Divergence.js`.

    Args:
        reference: An open view, such as the base's.
        top_k: As for `divergences`.
    """
    return _closeness("js", reference, top_k)


@makes_score
def multiple_choice(metric: Metric = "acc", *, target_delimiter: str = " ") -> Score:
    """Score questions ``(prompt, choices, label)`` by 1 if the most probable choice is the right one, else 0.

    This is lm-evaluation-harness's accuracy for the output type ``multiple_choice``
    (``ConfigurableTask.process_results`` in ``lm_eval/api/task.py``, 0.4.13). Of equally probable choices, the first
    counts.

    Args:
        metric: How choices are ranked. ``acc`` takes the sum of a choice's log-probabilities, ``acc_norm`` divides it
            by the number of characters, and ``acc_bytes`` by the number of bytes in UTF-8. The delimiter does not
            count.
        target_delimiter: The text between the prompt and a choice.

    Raises:
        ScoringError: The metric is unknown. The score itself raises it for a malformed question.
    """
    if metric not in get_args(Metric):
        raise ScoringError(f"metric is one of {', '.join(get_args(Metric))}; found {shown(metric)}.")

    def length(choice: str) -> int:
        return 1 if metric == "acc" else len(choice) if metric == "acc_norm" else len(choice.encode())

    def score(view: Any, questions: list[Any]) -> list[float]:
        asked = [_checked_choices(question, at, target_delimiter) for at, question in enumerate(questions)]
        pairs = [(prompt, target_delimiter + choice) for prompt, choices, _ in asked for choice in choices]
        many = getattr(view, "logprobs_of", None)
        logprobs = iter(many(pairs) if many else [view.logprob_of(*pair) for pair in pairs])
        right = []
        for _, choices, label in asked:
            ranks = [next(logprobs) / length(choice) for choice in choices]
            right.append(float(ranks.index(max(ranks)) == label))
        return right

    return _named(score, f"multiple_choice({metric!r}, target_delimiter={target_delimiter!r})", "right answers")


@makes_score
def exact_match(
    *,
    max_new_tokens: int,
    until: Sequence[str] = ("\n\n",),
    regexes_to_ignore: Sequence[str] = (),
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_numbers: bool = False,
) -> Score:
    """Score pairs of a prompt and an answer by 1 if the greedy continuation of the prompt is the answer, else 0.

    This is lm-evaluation-harness's ``exact_match`` for the output type ``generate_until``
    (``exact_match_hf_evaluate`` in ``lm_eval/api/metrics.py``, 0.4.13, from Hugging Face's evaluate). The arguments
    below change both texts, in their order. The results must be equal, including blanks.

    Args:
        max_new_tokens: The most tokens of a continuation.
        until: Texts that end a continuation; they are not part of it.
        regexes_to_ignore: Regular expressions whose matches are removed.
        ignore_case: Whether to ignore case.
        ignore_punctuation: Whether to remove ``string.punctuation``.
        ignore_numbers: Whether to remove ``string.digits``.

    Raises:
        ScoringError: ``until`` or ``regexes_to_ignore`` is a single text, or an expression cannot be compiled.
    """
    ends = [end for end in listed(until, "texts") if end]
    patterns = [_compiled(pattern) for pattern in listed(regexes_to_ignore, "regular expressions")]
    left_out = string.punctuation * ignore_punctuation + string.digits * ignore_numbers
    without = str.maketrans("", "", left_out)

    def normal(text: str) -> str:
        for pattern in patterns:
            text = pattern.sub("", text)
        return (text.lower() if ignore_case else text).translate(without)

    def score(view: Any, questions: list[Any]) -> list[float]:
        pairs = [checked_pair(question) for question in questions]
        prompts = [prompt for prompt, _ in pairs]
        many = getattr(view, "generate_many", None)
        texts = (
            many(prompts, max_new_tokens=max_new_tokens)
            if many
            else [view.generate(prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
        )
        for end in ends:
            texts = [text.partition(end)[0] for text in texts]
        return [float(normal(text) == normal(answer)) for text, (_, answer) in zip(texts, pairs, strict=True)]

    how = [f"max_new_tokens={max_new_tokens}", f"until={list(until)}", f"regexes_to_ignore={list(regexes_to_ignore)}"]
    flags = {"case": ignore_case, "punctuation": ignore_punctuation, "numbers": ignore_numbers}
    how += [f"ignore_{name}=True" for name, ignored in flags.items() if ignored]
    return _named(score, f"exact_match({', '.join(how)})", "right answers")


def _closeness(kind: Literal["kl", "js"], reference: View, top_k: int | None) -> Score:
    _require_view(reference)

    def score(view: Any, prompts: list[Any]) -> list[float]:
        return [0.0 - getattr(each, kind) for each in divergences(prompts, view, reference, top_k=top_k)]

    cut = "" if top_k is None else f", top_k={top_k}"
    return _named(score, f"{kind}_from({getattr(reference, 'id', 'reference')}{cut})", "nats")


def _named(score: Score, name: str, unit: str) -> Score:
    """Give a score a distinct name, and the unit that reports show."""
    score.__name__ = score.__qualname__ = name
    score.unit = unit  # type: ignore[attr-defined] # `Questions` reads it
    return score


def _dists(view: Any, prompts: list[Any], top_k: int | None) -> list[TokenDist]:
    many = getattr(view, "next_token_dists", None)
    k = _EVERY_TOKEN if top_k is None else top_k
    return list(many(prompts, top_k=k) if many else [view.next_token_dist(prompt, top_k=k) for prompt in prompts])


def _require_view(side: Any) -> None:
    if callable(getattr(side, "next_token_dist", None)):
        return
    if hasattr(side, "as_base"):
        raise ScoringError(
            "a divergence is between two views, but this is a backend, which has two. Open the view that you mean, as"
            " in `with backend.as_base() as reference:`."
        )
    raise ScoringError(
        f"a divergence is between two open views; found {type(side).__name__}: {shown(side)}. Open a view, as in `with"
        " sway_backend(spec).as_base() as reference:`."
    )


def _require_same_tokens(view: Any, dist: TokenDist, reference: Any, other: TokenDist) -> None:
    """Raise if the two sides are known to number their tokens differently.

    Vocabularies of two sizes agree if the larger one only adds tokens, as an adapter may.
    """
    spelled = [bool((side.token_ids < 0).any()) for side in (dist, other)]
    if spelled[0] != spelled[1]:
        raise ScoringError(
            "a divergence is between two views that number their tokens alike; one of them gives token ids, the other"
            " is a server that gives only their spelling. Use one server for both sides."
        )
    sizes = (dist.vocab_size, other.vocab_size)
    if sizes[0] == sizes[1] or not all(sizes):
        return
    words: list[dict[str, int]] = [
        getattr(getattr(side, "tokenizer", None), "get_vocab", dict)() for side in (view, reference)
    ]
    fewer, more = sorted(words, key=len)
    if not fewer or any(more.get(word) != number for word, number in fewer.items()):
        raise ScoringError(
            f"a divergence is between two views that number their tokens alike; one has a vocabulary of {sizes[0]:,}"
            f" tokens, the other of {sizes[1]:,}, and their common tokens are not known to agree. Use a score that"
            " does not depend on tokens, such as the log-probabilities of answers."
        )


def _checked_choices(question: Any, at: int, delimiter: str) -> tuple[Any, list[str], int]:
    where = f"questions[{at}]"
    if isinstance(question, str | bytes) or not isinstance(question, Sequence) or len(question) != 3:
        raise ScoringError(
            f"a multiple-choice question is (prompt, choices, label), such as ('2 + 2 =', ['3', '4'], 1); {where} is"
            f" {shown(question)}."
        )
    prompt, choices, label = question
    texts = listed(choices, f"choices in {where}")
    if len(texts) < 2:
        raise ScoringError(f"a multiple-choice question has at least 2 choices; {where} has {len(texts)}.")
    for number, choice in enumerate(texts):
        if not isinstance(choice, str) or not choice:
            raise ScoringError(
                f"a choice is a text that is not empty; choices[{number}] of {where} is {shown(choice)}."
            )
        if texts.index(choice) != number:
            raise ScoringError(
                f"choices[{number}] of {where} repeats choices[{texts.index(choice)}] ({shown(choice)}), so both"
                " would be right or wrong. Remove one of them."
            )
        if delimiter[-1:].isspace() and choice[0].isspace():
            raise ScoringError(
                f"choices[{number}] of {where} begins with a blank ({shown(choice)}), but target_delimiter="
                f"{delimiter!r} already puts one before it. Remove the blank, or pass target_delimiter=''."
            )
    if isinstance(label, bool) or not isinstance(label, SupportsIndex) or not 0 <= index(label) < len(texts):
        raise ScoringError(
            f"the label of a question is the position of the right choice, here 0 to {len(texts) - 1}; that of {where}"
            f" is {shown(label)}."
        )
    return prompt, texts, index(label)


def _compiled(pattern: Any) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ScoringError(
            f"regexes_to_ignore has {shown(pattern)}, which is not a regular expression: {error}."
        ) from None
