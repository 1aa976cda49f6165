"""`ApiBuilder`: check a spec without a server, then ask the servers for its models."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.plan import Plan
from pytest_sway.backends.contract import Build
from pytest_sway.errors import AdapterMismatchError, BackendNotAvailableError, SpecError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pytest_sway.backends.api.backend import ApiBackend
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
    from pytest_sway.backends.api.opening import open_models

    connection = Connection(timeout=spec.timeout, key=Key(spec.api_key_env), sleep=sleep)
    loop = EventLoopThread(f"pytest-sway {spec}")
    try:
        base, tuned = loop.run(open_models(connection, spec))
    except BaseException:
        loop.close(connection.close)
        raise
    return ApiBackend(spec, loop, connection, base, tuned)
