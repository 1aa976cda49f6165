"""Ask a spec's servers whether they have its two models, and whether the models differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_sway.backends.api.connection import NoJsonError, RefusedError
from pytest_sway.backends.api.served_model import ServedModel
from pytest_sway.errors import AdapterMismatchError, ScoringError, SpecError

if TYPE_CHECKING:
    from pytest_sway.backends.api.completions import Candidate
    from pytest_sway.backends.api.connection import Connection
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_PROBE = "1, 2, 3, 4, 5,"
_PROBE_TOP = 5


async def open_models(connection: Connection, spec: ModelSpec) -> tuple[ServedModel, ServedModel | None]:
    """Return the models of ``spec``, after asking their servers for them.

    Raises:
        SpecError: A server does not have a model of that name.
        AdapterMismatchError: Both give the same answers.
        ServerError: A server does not answer, or refuses the request.
    """
    assert spec.endpoint is not None
    base = await _open(connection, spec.endpoint, spec.base)
    if spec.finetuned is None:
        await _fingerprint(base)
        return base, None
    tuned = await _open(connection, spec.finetuned_endpoint or spec.endpoint, spec.finetuned)
    ours, theirs = await _fingerprint(base), await _fingerprint(tuned)
    if ours is not None and ours == theirs:
        raise AdapterMismatchError(
            f"{base} and {tuned} give the same answers, bit for bit, so a test of them would test nothing. Is one model"
            " served under both names, or was the adapter not applied?"
        )
    return base, tuned


async def _open(connection: Connection, endpoint: str, name: str) -> ServedModel:
    """Return one model if its server has it, or does not list its models."""
    try:
        answer = await connection.get(f"{endpoint}/v1/models")
    except RefusedError as refused:
        if refused.status not in (404, 405, 501):
            raise
        answer = None
    except NoJsonError:  # mlx_lm does so if this machine has no hub cache
        answer = None
    listed = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(listed, list):
        return ServedModel(connection, endpoint, name, {})
    served = {entry["id"]: entry for entry in listed if isinstance(entry, dict) and isinstance(entry.get("id"), str)}
    for alias in (name, f"{name}:latest"):  # Ollama lists an untagged name like this
        if alias in served:
            return ServedModel(connection, endpoint, name, served[alias])
    raise SpecError(
        f"the server at {endpoint} has no model {name!r}; it serves {', '.join(map(repr, sorted(served))) or 'none'}."
        " Name one of those, or start the server with the model."
    )


async def _fingerprint(model: ServedModel) -> tuple[Candidate, ...] | None:
    """A model's distribution after a fixed prompt; ``None`` if its server gives no log-probabilities."""
    try:
        completion = await model.complete_scored(_PROBE_TOP, prompt=_PROBE, max_tokens=1)
    except ScoringError:
        return None
    return completion.tokens[0].top or None if completion.tokens else None
