"""`ApiBuilder`: check a spec without a server, then ask the servers for its models, and whether these differ."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.api.connection import NoJsonError, RefusedError
from pytest_sway.backends.api.served_model import ServedModel
from pytest_sway.backends.checkpoints.plan import Plan
from pytest_sway.backends.contract import Build
from pytest_sway.errors import AdapterMismatchError, BackendNotAvailableError, ScoringError, SpecError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pytest_sway.backends.api.backend import ApiBackend
    from pytest_sway.backends.api.completions import Candidate
    from pytest_sway.backends.api.connection import Connection
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


REQUIRED: Final = ("httpx", "tenacity")


def check_api(spec: ModelSpec) -> None:
    """Check ``spec`` without asking a server.

    Raises:
        BackendNotAvailableError: A library is not installed.
        SpecError: It names an adapter's folder, which no server has, or a variable that holds no key.
        AdapterMismatchError: Its two models are the same.
    """
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        raise BackendNotAvailableError(
            f"using {spec} needs {', '.join(missing)}, which this environment lacks."
            " Install them with: pip install 'pytest-sway[api]'"
        )
    if spec.adapter is not None:
        raise SpecError(
            f"a spec of kind 'api' names models on a server, not folders; found adapter {str(spec.adapter)!r}."
            " Serve the adapter (vLLM: --enable-lora --lora-modules NAME=FOLDER), and put its name into 'finetuned'."
        )
    if spec.finetuned == spec.base and spec.finetuned_endpoint in (None, spec.endpoint):
        raise AdapterMismatchError(
            f"the spec's fine-tuned model is its base, {spec.base!r} on {spec.endpoint}, so a test of it would test"
            " nothing. Name the fine-tuned model in 'finetuned', or its server in 'finetuned_endpoint'."
        )
    from pytest_sway.backends.api.connection import Key

    Key(spec.api_key_env).require()


class ApiBuilder(Build):
    """Builds backends of kind ``api``."""

    def check(self, spec: ModelSpec) -> Plan:
        """Check ``spec`` without asking a server; see `check_api`."""
        check_api(spec)
        return replace(Plan.of(spec), sizes={})  # there are no weights here

    def build(self, plan: Plan) -> ApiBackend:
        """Ask the servers for the models that the plan's spec names; see `build_api`."""
        return build_api(plan.spec)


def build_api(spec: ModelSpec, *, sleep: Callable[[float], Awaitable[Any]] | None = None) -> ApiBackend:
    """Ask the servers for the models that ``spec`` names, and return a backend of them.

    Args:
        spec: A spec of kind ``api`` that passed `check_api`.
        sleep: Waits before a request is tried again; ``asyncio.sleep`` by default.

    Raises:
        SpecError: A server does not have a model of that name.
        AdapterMismatchError: Both models give the same answers.
        ServerError: A server does not answer, or refuses the request.
    """
    from pytest_sway.backends.api.backend import ApiBackend
    from pytest_sway.backends.api.connection import Connection, Key
    from pytest_sway.backends.api.event_loop import EventLoopThread

    connection = Connection(timeout=spec.timeout, key=Key(spec.api_key_env), sleep=sleep)
    loop = EventLoopThread(f"pytest-sway {spec}")
    try:
        base, tuned = loop.run(open_models(connection, spec))
    except BaseException:
        loop.close(connection.close)
        raise
    return ApiBackend(spec, loop, connection, base, tuned)


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
