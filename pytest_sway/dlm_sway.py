"""`for_probes`, which runs dlm-sway's probes on a cached backend with the same raw values as dlm-sway's own backend.

dlm-sway 0.1 computes ``rolling_logprob`` without a prefix token, so a text's first token has no score. pytest-sway
follows lm-evaluation-harness, which scores it. Two probes use ``rolling_logprob``: ``external_perplexity`` and
``section_internalization``. All others need no adjustment.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_sway.protocols import NullCalibratedBackend, ScalableDifferentialBackend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.protocols import DifferentialBackend, RollingLogprob, TokenDist

__tracebackhide__ = True


def for_probes(backend: DifferentialBackend) -> DifferentialBackend:
    """Wrap ``backend`` so that ``rolling_logprob`` of its views follows dlm-sway's convention.

    The wrapper can scale the adapter or replace it by noise if ``backend`` can. It works as long as ``backend`` does.

    Args:
        backend: A backend from ``sway_backend(spec)``.
    """
    if isinstance(backend, NullCalibratedBackend) and isinstance(backend, ScalableDifferentialBackend):
        return _AdapterProbed(backend)
    return _Probed(backend)


class _ProbedView:
    """A view with dlm-sway's ``rolling_logprob``."""

    def __init__(self, view: Any) -> None:
        self._view = view
        self.id = view.id

    def generate(
        self, prompt: str, *, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> str:
        return str(
            self._view.generate(prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        )

    def logprob_of(self, prompt: str, completion: str) -> float:
        return float(self._view.logprob_of(prompt, completion))

    def rolling_logprob(self, text: str) -> RollingLogprob:
        rolling: RollingLogprob = self._view.rolling_logprob(text, prefix=False)
        return rolling

    def next_token_dist(self, prompt: str, *, top_k: int = 256) -> TokenDist:
        dist: TokenDist = self._view.next_token_dist(prompt, top_k=top_k)
        return dist

    def close(self) -> None:
        self._view.close()


class _Probed:
    """A differential backend as dlm-sway's probes expect it."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.safe_for_concurrent_views = bool(getattr(backend, "safe_for_concurrent_views", False))

    @contextmanager
    def as_base(self) -> Iterator[_ProbedView]:
        with self._backend.as_base() as view:
            yield _ProbedView(view)

    @contextmanager
    def as_finetuned(self) -> Iterator[_ProbedView]:
        with self._backend.as_finetuned() as view:
            yield _ProbedView(view)

    def preflight_finite_check(self) -> tuple[bool, str]:
        check = getattr(self._backend, "preflight_finite_check", None)
        found: tuple[bool, str] = check() if check is not None else (True, "")
        return found

    def cache_identity(self) -> str:
        return str(self._backend.cache_identity())


class _AdapterProbed(_Probed):
    """A `_Probed` backend whose adapter can be scaled and replaced by noise."""

    @contextmanager
    def as_scaled_adapter(self, lam: float) -> Iterator[_ProbedView]:
        with self._backend.as_scaled_adapter(lam) as view:
            yield _ProbedView(view)

    @contextmanager
    def as_null_adapter(self, seed: int, *, init_scale: float = 0.02, rank_scale: float = 1.0) -> Iterator[_ProbedView]:
        with self._backend.as_null_adapter(seed, init_scale=init_scale, rank_scale=rank_scale) as view:
            yield _ProbedView(view)
