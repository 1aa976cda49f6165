"""`HFBuilder`: builds backends from specs. Backends with the same base share it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pytest_sway.backends.hf.check import check_spec, require_fit
from pytest_sway.backends.hf.loading.libraries import import_libraries
from pytest_sway.backends.hf.loading.pickles import with_entries
from pytest_sway.backends.hf.loading.placement import resolve_placement
from pytest_sway.backends.hf.scoring.answer_cache import DEFAULT_BYTES, AnswerCache
from pytest_sway.backends.local.pooled_builder import PooledBuilder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.checkpoints.plan import ModelFiles, Plan
    from pytest_sway.backends.hf.backend import HFBackend
    from pytest_sway.backends.hf.loading.shared_weights import SharedWeights
    from pytest_sway.backends.hf.model.base import LoadedBase
    from pytest_sway.backends.hf.model.bound_model import BoundModel
    from pytest_sway.backends.local.pool import PoolLease
    from pytest_sway.backends.local.pooled_backend import Loaded
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


class HFBuilder(PooledBuilder["LoadedBase"]):
    """Builds backends of kind ``hf``. Backends whose specs agree on the base share one loaded base.

    Args:
        on_base_load: Called after each base load with the base's name and the load's duration in seconds.
        share_weights: A folder through which processes on this host share one copy of converted weights; ``None`` to
            share none.
        score_cache: The most bytes of answers that each base caches; 0 to cache none.
        on_recall: Called when a base answers from its cache, with the base's name, the number of answers, and the
            seconds that computing them took.
        on_base_mismatch: What to do if an adapter's config names another base: ``error``, ``warn`` or ``ignore``.
        located: Finds a spec's adapter and base on this machine.
    """

    def __init__(
        self,
        on_base_load: Callable[[str, float], None] | None = None,
        *,
        share_weights: Path | None = None,
        score_cache: int = DEFAULT_BYTES,
        on_recall: Callable[[str, int, float], None] | None = None,
        on_base_mismatch: str = "warn",
        located: Callable[[ModelSpec], ModelSpec] | None = None,
    ) -> None:
        super().__init__(on_base_load, on_base_mismatch=on_base_mismatch, located=located)
        self._score_cache = score_cache
        self._on_recall = on_recall
        self._share_weights = share_weights
        self._shared_weights: SharedWeights | None = None

    placed = staticmethod(resolve_placement)

    _checked = staticmethod(check_spec)

    def _assemble(self, plan: Plan, shares: list[PoolLease[LoadedBase]]) -> HFBackend:
        files: AdapterFiles | None = plan.read
        import_libraries(*(model.spec for model in plan.models), adapter=files is not None)
        import torch

        from pytest_sway.backends.hf.adapters.verify.finetuned import verify_finetuned
        from pytest_sway.backends.hf.adapters.verify.head import require_whole_head
        from pytest_sway.backends.hf.backend import HFBackend
        from pytest_sway.backends.hf.heads.opening import views_of
        from pytest_sway.backends.hf.model.verify_base import verify_base
        from pytest_sway.backends.local.pooled_backend import Loaded

        if files is not None:
            files = _with_entries(plan.models[-1], files)
        with torch.inference_mode(False):  # tensors made in a test's inference mode would not count writes
            base = below = self._clean_base(plan.models[0], shares)
            verify_base(base)
            for model in plan.models[1:]:
                if model.merged:
                    below = self._merged(model, below, shares)
                else:
                    below = self._clean_base(model, shares)
                    verify_finetuned(base, below)
                    verify_base(below, "fine-tuned model")
            require_whole_head(below, files)
            loaded = Loaded(list(shares), base.side, None if below is base else below.side)
            if files is not None:
                _put_on(loaded, below, files)
        return HFBackend(plan, loaded, self._pool.withdraw, views_of(plan, base))

    def _merged(self, model: ModelFiles, below: LoadedBase, shares: list[PoolLease[LoadedBase]]) -> LoadedBase:
        """Claim a base with adapters merged into it. One that shares the memory of another base is made anew."""
        from pytest_sway.backends.hf.adapters.merge import merge
        from pytest_sway.backends.hf.model.base import MergedBase

        def load() -> LoadedBase:
            return merge(below, [_with_entries(model, files) for files in model.merged])

        def is_usable(base: LoadedBase) -> bool:
            return isinstance(base, MergedBase) and base.below is below and not base.changes()

        return self._claimed(model.key, shares, load, is_usable)

    def _base_loader(self) -> Callable[..., LoadedBase]:
        """Return the function that loads a base, with shared weights if this run has a folder for them."""
        from pytest_sway.backends.hf.model.base import load_base

        if self._share_weights is None:
            return load_base
        if self._shared_weights is None:
            from pytest_sway.backends.hf.loading.shared_weights import SharedWeights

            self._shared_weights = SharedWeights(self._share_weights)
        return partial(load_base, load_model=self._shared_weights.load_model)

    def _load_base(self, spec: ModelSpec) -> LoadedBase:
        base = self._base_loader()(spec)
        if self._score_cache:
            base.memory = AnswerCache(self._score_cache, partial(self._recalled, self._name_of(base, spec)))
        return base

    def _name_of(self, base: LoadedBase, spec: ModelSpec) -> str:
        notable = base.notable_class
        return super()._name_of(base, spec) + (f" ({notable})" if notable else "")

    @staticmethod
    def _close_base(base: LoadedBase) -> None:
        from pytest_sway.backends.hf.hygiene.memory import collect, return_memory

        device, watches = base.device.type, base.watches.all()
        base.close()
        # A collection takes as long as ten questions, and is needed only for weights in a cycle of references.
        (collect if any(watch.alive() for watch in watches) else return_memory)(device)

    def _recalled(self, name: str, answers: int, seconds: float) -> None:
        if self._on_recall is not None:
            self._on_recall(name, answers, seconds)


def _with_entries(base: ModelFiles, files: AdapterFiles) -> AdapterFiles:
    """Return an adapter's files with the names of its tensors; those of a pickle are checked now."""
    if files.entries is None:
        files = with_entries(files)
        require_fit(base, files)
    return files


def _put_on(loaded: Loaded[BoundModel], base: LoadedBase, files: AdapterFiles) -> None:
    """Put an adapter on its base, which is the backend's, a fine-tuned model or a merged one."""
    from pytest_sway.backends.hf.adapters.attach import attach, explained
    from pytest_sway.backends.hf.adapters.overlays import tuned_side
    from pytest_sway.backends.hf.adapters.verify.effect import verify_effect
    from pytest_sway.backends.hf.hygiene.contents import ContentsRecord
    from pytest_sway.backends.hf.model.tokenizers import adapter_tokenizer
    from pytest_sway.backends.hf.model.verify_base import verify_model

    rust = adapter_tokenizer(base, files)
    tokenizer = base.tokenizer if rust is None else rust.tokenizer
    adapter = attach(base, files, tokenizer)
    with explained(base, files, tokenizer):
        tuned = tuned_side(base, adapter, tokenizer)
        if not base.is_tried:
            tuned.at_first(partial(verify_model, base))
        verify_effect(base, tuned, adapter.files)
    exposed = {name: tensor for name, tensor in adapter.own.items() if adapter.pristine.exposes(name, tensor)}
    loaded.tuned, loaded.adapter, loaded.rust = tuned, adapter, rust
    loaded.contents = ContentsRecord(exposed, "adapter: ")
