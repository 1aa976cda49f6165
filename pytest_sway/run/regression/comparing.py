"""The fixture ``sway_compare``: opens the views of both sides, scores the questions, and keeps the comparison.

Without a baseline, it uses the scores in the test's record.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from pytest_sway.comparison.comparison import Claim, Comparison, compare
from pytest_sway.comparison.questions import Questions, Score
from pytest_sway.comparison.records import (
    DECIMALS,
    Identity,
    Record,
    check_scale,
    drift_between,
    drift_message,
    recorded,
)
from pytest_sway.comparison.token_scores import TokenScores, extreme_rows, merged, token_scores
from pytest_sway.errors import ComparisonError, NoAdapterError, RecordError, ends_run
from pytest_sway.run.regression.records import Records, base_identity, candidate_identity, made_with
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.system.imports import restore_modules
from pytest_sway.system.wording import shown, visible

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pytest_sway.protocols import View
    from pytest_sway.run.serving.requests import SwayBackend
    from pytest_sway.spec.parsing import SpecLike

__tracebackhide__ = True

SideLike: TypeAlias = "View | SpecLike"
OpensView: TypeAlias = "Callable[[], AbstractContextManager[Any]]"
Backends: TypeAlias = "Callable[[], AbstractContextManager[SwayBackend]]"

_COMPARE: Final = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class SwayCompare(Protocol):
    """The type of the fixture ``sway_compare``."""

    def __call__(
        self,
        questions: Iterable[Any],
        candidate: SideLike,
        baseline: SideLike | None = None,
        *,
        score: Score | None = None,
        name: str | None = None,
    ) -> Comparison:
        """Return how much more ``candidate`` scores than ``baseline`` on the same questions.

        Each side is a view, or a spec in any form, such as a configured name. A spec stands for its fine-tuned view,
        or for its base view if it has neither adapter nor fine-tuned model.

        Args:
            questions: Pairs of a prompt and an answer, or texts, or anything that ``score`` takes. A pair scores the
                answer's log-probability in nats, a text the mean log-probability of its tokens.
            candidate: The model that may replace the baseline.
            baseline: The model that is good enough now. By default, the scores that ``--sway-record`` wrote for this
                test replace it.
            score: A function of a view and the list of questions that returns one number for each question. Better
                answers get larger numbers.
            name: The comparison's name in reports; by default made of the two sides' names.

        Raises:
            SwayError: A side cannot be loaded, or the questions or scores cannot be compared; the message says why.
        """
        ...


@dataclass(slots=True)
class Compared:
    """A comparison of the running test.

    Attributes:
        comparison: The comparison.
        claim: The claim that the test asserted, if known.
        reported: Whether a report of the test has carried its rows.
        tokens: By a row's position, the tokens of the worst and best rows, if requested and known.
        thread: The number of the thread that made it.
    """

    comparison: Comparison
    claim: Claim | None = None
    reported: bool = False
    tokens: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)
    _in_assertion: tuple[Claim | None, bool] | None = None
    """The claim before the assertion that runs, and whether the last claim in the assertion is true."""

    def asserted(self, op: str, left: Any, right: Any) -> None:
        """Note the claim of an assertion, if it is about this comparison. With ``and`` and ``or``, the last counts."""
        claim = self.comparison.claim(op, left, right)
        if claim is not None:
            before = self.claim if self._in_assertion is None else self._in_assertion[0]
            self._in_assertion = before, bool(_COMPARE[op](left, right))
            self.claim = claim

    def settled(self, passed: bool) -> None:
        """Forget the claim of the assertion that has ended if that went otherwise, as in ``assert not c.high < 0``."""
        if self._in_assertion is not None:
            before, is_true = self._in_assertion
            self._in_assertion = None
            if is_true != passed:
                self.claim = before

    def report(self) -> str:
        """Return the text that a failing test shows, in characters that a worker can send."""
        text = "\n".join(self.comparison.report(self.claim))
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of a comparison: an open view, or the spec of a backend whose view is opened.

    Attributes:
        role: ``candidate`` or ``baseline``.
        name: The side's name in reports.
        model: The view or the resolved spec. Equal ones are the same model.
    """

    role: str
    name: str
    model: Any

    def opened(self, stack: ExitStack, backends: Backends) -> tuple[Any, OpensView | None]:
        """Return the side's view, and a function that opens a view of its base, or ``None``.

        The view of a spec is the fine-tuned one, or the base view if there is no other. This is no context manager:
        pytest would show contextlib's code if the spec cannot be loaded.

        Args:
            stack: Closes the view.
            backends: Opens the test's source of backends.
        """
        if not isinstance(self.model, ModelSpec):
            return self.model, None
        backend = stack.enter_context(backends())(self.model)
        try:
            return stack.enter_context(backend.as_finetuned()), backend.as_base
        except NoAdapterError:
            return stack.enter_context(backend.as_base()), None


def comparing(
    backends: Backends,
    resolve: Callable[[SpecLike], ModelSpec],
    *,
    records: Records,
    confidence: float,
    drift: float,
    made: Callable[[Compared], None],
    tokens: bool = False,
) -> SwayCompare:
    """Return the fixture ``sway_compare`` of one test.

    Args:
        backends: Opens the test's source of backends. A backend is leased only while its side is scored, so that a
            test can compare more models than the cache holds.
        resolve: Converts any form of a spec to a `ModelSpec`.
        records: The test's records.
        confidence: The confidence level of the intervals.
        drift: How far a base may move from its recorded scores.
        made: Called with each comparison.
        tokens: Whether to ask the worst and best questions again for the log-probability of each token.
    """

    def side(asked: Any, role: str) -> _Side:
        if _is_view(asked):
            return _Side(role, visible(str(getattr(asked, "id", role))), asked)
        if isinstance(asked, str | Mapping) or hasattr(asked, "base"):
            spec = resolve(asked)
            return _Side(role, asked if isinstance(asked, str) else str(spec), spec)
        raise ComparisonError(_no_side(asked, role))

    def scores(questions: Questions, side: _Side) -> list[float]:
        with ExitStack() as stack:
            view, _ = side.opened(stack, backends)
            return questions.scored_by(view, side.name)

    def sway_compare(
        questions: Iterable[Any],
        candidate: SideLike,
        baseline: SideLike | None = None,
        *,
        score: Score | None = None,
        name: str | None = None,
    ) -> Comparison:
        restore_modules()  # a pytest run inside this test may have removed numpy, which cannot be imported twice
        _check_name(name)
        checked = Questions(questions, score)
        new = side(candidate, "candidate")
        if baseline is None:
            return with_record(checked, new, name)
        new, old = _told_apart(new, side(baseline, "baseline"))
        same = new.model == old.model
        found = scores(checked, new)
        comparison = compare(
            checked,
            (new.name, found),
            (old.name, found if same else scores(checked, old)),
            confidence=confidence,
            name=name,
            same=same,
        )
        made(Compared(comparison, tokens=_tokens(comparison, new, old, backends) if tokens else {}))
        return comparison

    def with_record(questions: Questions, new: _Side, name: str | None) -> Comparison:
        key = records.name(name)
        before = None if records.recording else records.before(key)
        if before is not None:
            before.rows_of(questions, records.where)  # report errors before the load
        now = scored(questions, new, key, before)
        then = before or now
        rows = then.rows_of(questions, records.where)
        comparison = compare(
            questions,
            (new.name, [row.tuned for row in now.rows]),
            ("recorded", [row.tuned for row in rows]),
            confidence=confidence,
            name=name,
            same=before is None,
            drift=drift_between(questions, rows, now.rows),
            step=10.0**-DECIMALS,
        )
        made(Compared(comparison, tokens=_tokens(comparison, new, None, backends) if tokens else {}))
        if comparison.drift is not None and abs(comparison.drift) > drift:
            raise RecordError(drift_message(comparison, drift, then, now, records.where))
        if before is None:
            records.add(now)
        return comparison

    def scored(questions: Questions, new: _Side, key: str, before: Record | None) -> Record:
        """Score the candidate and its base, and return their record."""
        spec = new.model if isinstance(new.model, ModelSpec) else None
        with ExitStack() as stack:
            view, open_base = new.opened(stack, backends)
            base = None if spec is None or open_base is None else base_identity(spec)
            if before is not None:
                before.check_base(base, records.where)
            tuned = questions.scored_by(view, new.name)
            if before is None:
                check_scale(questions, tuned)
            with nullcontext() if open_base is None else open_base() as control:
                scores = None if control is None else questions.scored_by(control, "the base")
        candidate = Identity(new.name) if spec is None else candidate_identity(new.name, spec)
        return recorded(questions, tuned, scores, name=key, base=base, candidate=candidate, made_with=made_with(spec))

    return sway_compare


def _told_apart(new: _Side, old: _Side) -> tuple[_Side, _Side]:
    """Return both sides with names that differ, unless they are one object or spec.

    Views of two specs are told apart by their specs, and what still has one name by its role.
    """
    if new.name == old.name and new.model != old.model:
        new, old = (replace(each, name=str(getattr(each.model, "label", each.name))) for each in (new, old))
        if new.name == old.name:
            new, old = (replace(each, name=f"{each.name} ({each.role})") for each in (new, old))
    return new, old


def _tokens(comparison: Comparison, new: _Side, old: _Side | None, backends: Backends) -> dict[int, dict[str, Any]]:
    """Return the tokens of the worst and best rows by position, with the baseline's unless it is a record."""
    places = extreme_rows(comparison.rows)
    asked = [comparison.rows[at].question for at in places]
    # The baseline comes first: its backend was used last, so that even a small cache still holds it.
    baseline, _ = _scored(old, asked, backends)
    candidate, base = _scored(new, asked, backends, with_base=True)
    found = zip(places, merged(candidate, baseline, base), strict=True)
    return {at: tokens for at, tokens in found if tokens is not None}


def _scored(
    side: _Side | None, asked: Sequence[Any], backends: Backends, *, with_base: bool = False
) -> tuple[list[TokenScores | None], list[TokenScores | None]]:
    """Return the tokens of questions on a side's view and, with ``with_base``, on its base if it has one."""
    unknown: list[TokenScores | None] = [None] * len(asked)
    if side is None:
        return unknown, unknown
    if not isinstance(side.model, ModelSpec):
        return token_scores(side.model, asked), unknown
    with _harmless(), backends() as open_backend:
        backend = open_backend(side.model)
        try:
            with backend.as_finetuned() as view:
                found = token_scores(view, asked)
        except NoAdapterError:
            with backend.as_base() as view:
                return token_scores(view, asked), unknown
        if not with_base:
            return found, unknown
        with backend.as_base() as view:
            return found, token_scores(view, asked)
    return unknown, unknown


@contextmanager
def _harmless() -> Iterator[None]:
    """Suppress errors but that of ``pytest.exit``: a report must not fail a test."""
    try:
        yield
    except Exception as error:
        if ends_run(error):
            raise


def _check_name(name: object) -> None:
    """Raise unless a comparison can be called so in tables and records."""
    if name is not None and not (isinstance(name, str) and name.strip() and name == visible(name)):
        raise ComparisonError(
            f"name= is what reports call the comparison, a text on one line, such as 'the town'; found {shown(name)}."
        )


def _is_view(side: object) -> bool:
    return any(callable(getattr(side, name, None)) for name in ("logprob_of", "rolling_logprob", "generate"))


def _no_side(found: object, role: str) -> str:
    if found is None:
        return (
            f"sway_compare needs a {role}: pass a view, a spec or a configured name, such as"
            " sway_compare(questions, candidate, baseline)."
        )
    if hasattr(found, "as_finetuned"):
        return (
            f"the {role} is a backend, which has two views. Open the view that you mean, as in `with"
            f" backend.as_finetuned() as {role}:`, or pass the backend's spec."
        )
    what = f"{type(found).__name__}: {shown(found)}"
    return f"the {role} of a comparison must be a view, a spec or a configured name; found {what}."
