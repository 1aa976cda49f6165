"""The fixture ``sway_compare``: opens the views of both sides, has them answer, and keeps what was compared.

Without a baseline, the scores in the test's record take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from pytest_sway.comparison.comparison import Claim, Comparison, compare
from pytest_sway.comparison.questions import Questions, Score
from pytest_sway.comparison.records import Identity, Record, check_scale, drift_between, drift_message, recorded
from pytest_sway.comparison.token_scores import TokenScores, extreme_rows, merged, token_scores
from pytest_sway.errors import ComparisonError, NoAdapterError, RecordError
from pytest_sway.run.regression.records import Records, base_identity, candidate_identity, made_with
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.system.wording import shown, visible

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pytest_sway.protocols import View
    from pytest_sway.run.session import SwayBackend
    from pytest_sway.spec.parsing import SpecLike

__tracebackhide__ = True

SideLike: TypeAlias = "View | SpecLike"
OpensView: TypeAlias = "Callable[[], AbstractContextManager[Any]]"
Backends: TypeAlias = "Callable[[], AbstractContextManager[SwayBackend]]"


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

        Each side is a view, or a spec in any form, also a configured name: then it is the fine-tuned view of its
        backend, or the base view where the spec has no adapter.

        Args:
            questions: Pairs of a prompt and an answer, which score the answer's log-probability in nats; or texts,
                which score the mean log-probability of their tokens; or anything that ``score`` takes.
            candidate: What may replace the baseline.
            baseline: What is good enough now; left out, the scores that ``--sway-record`` has written for this test.
            score: A function of a view and the list of questions that gives one number for each, more for a better
                answer.
            name: What reports call the comparison; by default after its sides.

        Raises:
            SwayError: A side cannot be had, or the questions or scores cannot be compared; the message says why.
        """
        ...


@dataclass(slots=True)
class Compared:
    """A comparison of the running test.

    Attributes:
        comparison: It.
        claim: What the test has asserted of it, as far as that is known.
        reported: Whether a report of the test has carried its rows.
        tokens: Those of the worst and best rows, by the row's position, where they were asked for and are known.
    """

    comparison: Comparison
    claim: Claim | None = None
    reported: bool = False
    tokens: Mapping[int, dict[str, Any]] = field(default_factory=dict)

    def asserted(self, op: str, left: object, right: object) -> None:
        """Note a failing assertion, if it is about this comparison."""
        self.claim = self.comparison.claim(op, left, right) or self.claim

    def passed(self, explanation: str) -> None:
        """Note an assertion that has passed, if it is about this comparison."""
        self.claim = self.comparison.claim_in(explanation) or self.claim

    def report(self) -> str:
        """What a failing test shows of it, in characters that a worker can send."""
        text = "\n".join(self.comparison.report(self.claim))
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True, slots=True)
class _Side:
    """What is compared: a view, or the spec of a backend of which one is opened.

    Attributes:
        name: What reports call it.
        model: The view or the resolved spec; equal ones are one model.
    """

    name: str
    model: Any

    @contextmanager
    def view(self, backends: Backends) -> Iterator[Any]:
        """Give the side's view: of a spec the fine-tuned one, or the base's where it has no other."""
        with self.view_and_base(backends) as (view, _):
            yield view

    @contextmanager
    def view_and_base(self, backends: Backends) -> Iterator[tuple[Any, OpensView | None]]:
        """Give the side's view, and what opens a view of the base beside it, if there is one."""
        if not isinstance(self.model, ModelSpec):
            yield self.model, None
            return
        with ExitStack() as stack:
            backend = stack.enter_context(backends())(self.model)
            try:
                view, base = stack.enter_context(backend.as_finetuned()), backend.as_base
            except NoAdapterError:
                view, base = stack.enter_context(backend.as_base()), None
            yield view, base


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
        backends: Gives what gets the test its backends. A side's is kept only while it is scored, so that a test can
            compare more models than the cache holds.
        resolve: Makes a spec of all of its forms.
        records: What the test has recorded before.
        confidence: Of the intervals.
        drift: How far a base may move since it was recorded.
        made: Is told of each comparison.
        tokens: Whether the worst and best questions are asked again for each of their tokens.
    """

    def side(asked: Any, role: str) -> _Side:
        if _is_view(asked):
            return _Side(str(getattr(asked, "id", role)), asked)
        if isinstance(asked, str | Mapping) or hasattr(asked, "base"):
            spec = resolve(asked)
            return _Side(asked if isinstance(asked, str) else str(spec), spec)
        raise ComparisonError(_no_side(asked, role))

    def scores(questions: Questions, side: _Side) -> list[float]:
        with side.view(backends) as view:
            return questions.scored_by(view, side.name)

    def sway_compare(
        questions: Iterable[Any],
        candidate: SideLike,
        baseline: SideLike | None = None,
        *,
        score: Score | None = None,
        name: str | None = None,
    ) -> Comparison:
        _check_name(name)
        checked = Questions(questions, score)
        new = side(candidate, "candidate")
        if baseline is None:
            return with_record(checked, new, name)
        old = side(baseline, "baseline")
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
            before.rows_of(questions, records.where)  # what is wrong with them is wrong before the load
        now = scored(questions, new, key, before)
        then = before or now
        rows = then.rows_of(questions, records.where)
        comparison = compare(
            questions,
            (new.name, [row.tuned for row in now.rows]),
            ("recorded", [row.tuned for row in rows]),
            confidence=confidence,
            name=name,
            drift=drift_between(questions, rows, now.rows),
        )
        made(Compared(comparison, tokens=_tokens(comparison, new, None, backends) if tokens else {}))
        if comparison.drift is not None and abs(comparison.drift) > drift:
            raise RecordError(drift_message(comparison, drift, then, now, records.where))
        if before is None:
            records.add(now)
        return comparison

    def scored(questions: Questions, new: _Side, key: str, before: Record | None) -> Record:
        """What a candidate and its base score now."""
        spec = new.model if isinstance(new.model, ModelSpec) else None
        with new.view_and_base(backends) as (view, open_base):
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


def _tokens(comparison: Comparison, new: _Side, old: _Side | None, backends: Backends) -> dict[int, dict[str, Any]]:
    """The tokens of the worst and best rows, by their position; of the baseline's where it is no record."""
    places = extreme_rows(comparison.rows)
    asked = [comparison.rows[at].question for at in places]
    # The baseline first: its backend was used last, and a small cache holds it still.
    baseline, _ = _scored(old, asked, backends)
    candidate, base = _scored(new, asked, backends, with_base=True)
    found = zip(places, merged(candidate, baseline, base), strict=True)
    return {at: tokens for at, tokens in found if tokens is not None}


def _scored(
    side: _Side | None, asked: Sequence[Any], backends: Backends, *, with_base: bool = False
) -> tuple[list[TokenScores | None], list[TokenScores | None]]:
    """The tokens of questions on a side's view and, if they are wanted and it has a base beside it, on that."""
    unknown: list[TokenScores | None] = [None] * len(asked)
    if side is None:
        return unknown, unknown
    if not isinstance(side.model, ModelSpec):
        return token_scores(side.model, asked), unknown
    with suppress(Exception), backends() as open_backend:  # no report is worth a failing test
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
            f"the {role} is a backend, which has two views. Open the one that you mean, as in `with"
            f" backend.as_finetuned() as {role}:`, or pass its spec."
        )
    what = f"{type(found).__name__}: {shown(found)}"
    return f"the {role} of a comparison is a view, a spec or a configured name; found {what}."
