"""Chooses the views of a backend by its task."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.heads.classification import ClassifierView, HeadlessView
from pytest_sway.backends.hf.heads.embeddings import EmbeddingView, Poolings
from pytest_sway.backends.hf.heads.seq2seq import Seq2SeqView
from pytest_sway.backends.hf.heads.view import QuestionAnsweringView, TokenClassifierView
from pytest_sway.backends.hf.view import HFView
from pytest_sway.spec.tasks import CAUSAL
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sway.backends.checkpoints.plan import Plan
    from pytest_sway.backends.hf.model.base import LoadedBase
    from pytest_sway.backends.local.pooled_view import PooledView

__tracebackhide__ = True

_VIEWS: Final[dict[str, type[PooledView]]] = {
    view.task: view for view in (HFView, Seq2SeqView, TokenClassifierView, QuestionAnsweringView)
}


def views_of(plan: Plan, base: LoadedBase) -> Callable[[str, Any], PooledView]:
    """Return what makes a view of a backend from the view's id and the backend.

    Args:
        plan: The backend's plan.
        base: Its base.
    """
    task = plan.spec.task or CAUSAL
    if task == EmbeddingView.task:
        return partial(_embedding, _poolings(plan))
    if task == ClassifierView.task:
        return partial(_classifier, some(base.lacks))
    return _VIEWS[task]


def _classifier(lacking: str, view_id: str, backend: Any) -> PooledView:
    if lacking and view_id == "base":
        return HeadlessView(view_id, backend, lacking)
    return ClassifierView(view_id, backend)


def _embedding(poolings: Poolings, view_id: str, backend: Any) -> PooledView:
    return EmbeddingView(view_id, backend, poolings)


def _poolings(plan: Plan) -> Poolings:
    models = [model.spec for model in plan.models if not model.merged]
    return Poolings(models, None if plan.read is None else plan.read.folder)
