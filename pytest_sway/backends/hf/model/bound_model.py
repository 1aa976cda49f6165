"""`BoundModel`: one state of a model, such as the base with an adapter; each computes on trees of its own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from pytest_sway.backends.hf.model.peft_model import inner_model
from pytest_sway.backends.hf.model.skeletons import OwnIdle, Runner
from pytest_sway.backends.hf.scoring.engine import Engine
from pytest_sway.backends.hf.scoring.forward import Forward
from pytest_sway.backends.hf.scoring.trials import Trials
from pytest_sway.errors import BackendClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_sway.backends.hf.model.skeletons import Idle
    from pytest_sway.backends.hf.scoring.engine import Recall

__tracebackhide__ = True


class Watched(Protocol):
    """What of a `LoadedBase` the sides on it ask and tell."""

    def is_patched(self) -> bool:
        """Whether something is patched that takes part in what it computes."""
        ...

    def has_run(self, tree: Any) -> None:
        """Look what a tree's first pass has written to."""
        ...


class BoundModel:
    """One state of a model.

    A tree computes one call at a time. So a side makes a tree for its first call, and another one only while all that
    it has are in use: no call waits for another.

    Args:
        make: Returns a new tree: the ``PeftModel``, or the Hugging Face model where there is no adapter. Its argument
            says whether the tree only computes, and no test gets it.
        base: The base whose memory its trees share.
        tokenizer: What turns its texts into tokens.
        trials: What was found out about the passes of its trees.
        through_inner_model: Whether the model inside of a ``PeftModel`` computes the same.
        one_text_at_a_time: Whether what it computes for a text depends on all that is in the same pass.
        recall: Answers from memory; ``None`` for a side that remembers none.
        idle: Where its runners wait for the next call; ``None`` for a place of its own.
    """

    def __init__(
        self,
        make: Callable[[bool], Any],
        base: Watched,
        tokenizer: Any,
        trials: Trials | None = None,
        *,
        through_inner_model: bool = True,
        one_text_at_a_time: bool = False,
        recall: Recall | None = None,
        idle: Idle | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._open: tuple[Callable[[bool], Any], Watched] | None = make, base
        self._trials = Trials() if trials is None else trials
        self._through_inner_model = through_inner_model
        self._one_text_at_a_time = one_text_at_a_time
        self._recall = recall
        self._idle: Idle = OwnIdle() if idle is None else idle
        self._check: Callable[[Any], None] | None = None

    def at_first(self, check: Callable[[Any], None]) -> None:
        """Have a check be asked about the Hugging Face model that first computes, and raise what is wrong with it."""
        self._check = check

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """Give what computes; it is dropped when it is spent, and after an error, which leaves a tree in any state."""
        _, base = self._require_open()
        patched = base.is_patched()  # what runs then may write anything, and nobody else computes on it
        runner = self._new_runner(to_run=False) if patched else self._idle.take() or self._new_runner()
        if self._check is not None:
            self._check(runner.forward.model)
            self._check = None
        yield Engine(runner.forward.runner, self.tokenizer, runner.forward, self._recall)
        if patched or runner.forward.spent or self._open is None:
            return
        if not runner.has_run:
            runner.has_run = True
            base.has_run(runner.tree)
        self._idle.give(runner)

    def tree(self, *, to_run: bool = False) -> Any:
        """Return a new tree, which is the caller's.

        Args:
            to_run: It only computes, and no test gets it.

        Raises:
            BackendClosedError: It was closed.
        """
        make, _ = self._require_open()
        return make(to_run)

    def _require_open(self) -> tuple[Callable[[bool], Any], Watched]:
        now = self._open
        if now is None:
            raise BackendClosedError(
                "a view was used in one thread while it, or its backend, was closed in another. End the threads of a"
                " test before the test ends, or ask for the backend again with sway_backend(spec)."
            )
        return now

    def changed(self, change: Callable[[Any], None]) -> BoundModel:
        """Return a side whose trees are this one's with a change.

        Args:
            change: Makes it, on a new tree.
        """

        def make(to_run: bool) -> Any:
            import torch

            tree = self.tree(to_run=to_run)
            with torch.inference_mode(False), torch.no_grad():  # it may be handed to a test that trains it
                change(tree)
            return tree

        return BoundModel(
            make,
            self._require_open()[1],
            self.tokenizer,
            self._trials,
            through_inner_model=self._through_inner_model,
            one_text_at_a_time=self._one_text_at_a_time,
        )

    def close(self) -> None:
        """Let go of all trees."""
        self._open = None
        self._idle.close()

    def _new_runner(self, *, to_run: bool = True) -> Runner:
        tree = self.tree(to_run=to_run)
        inner = inner_model(tree)
        called = inner if self._through_inner_model else tree
        return Runner(tree, Forward(inner, called, self._trials, one_text_at_a_time=self._one_text_at_a_time))
