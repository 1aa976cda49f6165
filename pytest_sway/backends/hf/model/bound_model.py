"""`BoundModel`: one state of a model, such as a base with an `Adapter`."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pytest_sway.backends.hf.hygiene.memory import measured
from pytest_sway.backends.hf.model.skeletons import OwnIdle, Runner, inner_model
from pytest_sway.backends.hf.scoring.engine import Engine
from pytest_sway.backends.hf.scoring.forward import Forward
from pytest_sway.backends.hf.scoring.trials import Trials
from pytest_sway.errors import BackendClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.hf.model.pristine import Pristine, Watches
    from pytest_sway.backends.hf.model.skeletons import Idle, OnSkeleton
    from pytest_sway.backends.hf.scoring.engine import Recall

__tracebackhide__ = True


class Watched(Protocol):
    """The part of a `LoadedBase` that its bound models use."""

    def is_patched(self) -> bool:
        """Return whether a process-wide patch takes part in what the base computes."""
        ...

    def has_run(self, tree: Any) -> None:
        """Check what a tree's first pass has written to."""
        ...


class BoundModel:
    """One state of a model, such as a base with an adapter.

    A tree computes one call at a time. A bound model makes a tree for its first call, and another one only while all of
    its trees are in use. So no call waits for another.

    Args:
        make: Returns a new tree: the ``PeftModel``, or the Hugging Face model if there is no adapter. Its argument says
            whether the tree only computes, so that no test gets it.
        base: The base whose memory the trees share.
        tokenizer: Turns texts into tokens.
        trials: What trials have shown about the passes of its trees.
        through_inner_model: Whether the model inside the ``PeftModel`` computes the same as the ``PeftModel``.
        one_text_at_a_time: Whether a text's result depends on the other texts in its pass.
        recall: Answers from the cache; ``None`` for a bound model without one.
        idle: Keeps runners between calls; ``None`` for an `OwnIdle`.
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
        self._under_patch: Trials | None = None

    def at_first(self, check: Callable[[Any], None]) -> None:
        """Call ``check`` with the Hugging Face model before its first computation; it raises if the model is faulty."""
        self._check = check

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """Yield an engine for one call. Its tree is reused unless the call raises or leaves the tree spent."""
        _, base = self._require_open()
        patched = base.is_patched()  # a patch may write anywhere, so this tree serves one call only
        if not patched:
            self._under_patch = None
            runner = self._idle.take() or self._new_runner(self._trials)
        else:  # other code computes than that which was tried, and what it shows is not told to later runs
            self._under_patch = self._under_patch or Trials(looks_ahead=self._trials.looks_ahead)
            runner = self._new_runner(self._under_patch, to_run=False)
        check = self._check  # another thread may set it to None meanwhile
        if check is not None:
            check(runner.forward.model)
            self._check = None
        yield Engine(runner.forward.runner, self.tokenizer, runner.forward, self._recall)
        self._trials.remember()
        if patched or runner.forward.spent or self._open is None:
            return
        if not runner.has_run:
            runner.has_run = True
            base.has_run(runner.tree)
        self._idle.give(runner)

    def tree(self, *, to_run: bool = False) -> Any:
        """Return a new tree that belongs to the caller.

        Args:
            to_run: The tree only computes; no test gets it.

        Raises:
            BackendClosedError: The view or its backend was closed.
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
        """Return a bound model whose trees are this one's with a change.

        Args:
            change: Changes a new tree in place.
        """

        def make(to_run: bool) -> Any:
            import torch

            tree = self.tree(to_run=to_run)
            with torch.inference_mode(False), torch.no_grad():  # a test may get the tree and train it
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
        """Release all trees."""
        self._open = None
        self._idle.close()

    def _new_runner(self, trials: Trials, *, to_run: bool = True) -> Runner:
        tree = self.tree(to_run=to_run)
        inner = inner_model(tree)
        called = inner if self._through_inner_model else tree
        return Runner(tree, Forward(inner, called, trials, one_text_at_a_time=self._one_text_at_a_time))


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A verified adapter on its base.

    Attributes:
        files: The files that it was loaded from.
        pristine: Makes trees with the adapter.
        own: The tensors that the adapter does not share with the base, by their names in the ``PeftModel``.
        scaling: The largest LoRA scaling; 1 if there is none.
        memory: Tensors that together hold exactly ``own``: the same tensors, or larger ones that they are parts of.
    """

    files: AdapterFiles
    pristine: Pristine | OnSkeleton
    own: dict[str, Any]
    scaling: float
    memory: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its own tensors."""
        return measured(self.memory)

    @property
    def watches(self) -> Watches:
        """Watches over its memory in all trees."""
        return self.pristine.watches
