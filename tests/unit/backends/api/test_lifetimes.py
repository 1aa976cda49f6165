"""Views, threads and closes: running requests end when they should."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from werkzeug import Request, Response

from pytest_sway import ModelSpec
from pytest_sway.backends.api.builder import build_api
from pytest_sway.backends.api.connection import CONCURRENT_REQUESTS
from pytest_sway.errors import BackendClosedError, ServerError, SpecError, ViewClosedError
from tests.unit.backends.api.conftest import Build
from tests.unit.backends.api.toy import Toy, reply

PATIENCE = 60.0
"""Seconds after which a test that waits for an event fails."""


class Gate:
    """Holds answers back until the test opens it, and counts those that wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self.waiting = 0
        self.most = 0

    def __call__(self, _request: Request) -> Response:
        with self._changed:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._open, PATIENCE)
            self.waiting -= 1
        return reply({"choices": [{"text": "through"}]})

    def wait_for(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.waiting >= number, PATIENCE)

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()


def _threads() -> set[threading.Thread]:
    """Return all threads except those of the toy server."""
    return {thread for thread in threading.enumerate() if "process_request" not in thread.name}


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def test_requests_for_many_go_out_together_but_not_all_at_once(
    build: Build, toy: Toy, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    number = CONCURRENT_REQUESTS + 4
    with build().as_base() as view:
        toy.canned += [gate] * number
        answers = pool.submit(view.generate_many, ["the"] * number, max_new_tokens=1)
        gate.wait_for(CONCURRENT_REQUESTS)
        gate.open()
        assert answers.result(PATIENCE) == ["through"] * number
    assert gate.most == CONCURRENT_REQUESTS


def test_the_first_error_cancels_the_rest(build: Build, toy: Toy, gate: Gate) -> None:
    def refuse(_request: Request) -> Response:
        gate.wait_for(3)
        return Response("no", 400)

    with build().as_base() as view:
        toy.canned += [gate, gate, gate, refuse]
        with pytest.raises(ServerError, match="answered 400 Bad Request: no"):  # while the other requests still wait
            view.generate_many(["the"] * 4, max_new_tokens=1)
        assert gate.waiting == 3
        gate.open()
        assert view.generate("the", max_new_tokens=1)


def test_several_threads_ask_through_one_backend(build: Build, toy: Toy, pool: ThreadPoolExecutor) -> None:
    backend = build()
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        expected = [(base.logprob_of("the", " sun"), tuned.logprob_of("the", " sun"))] * 8

        def both(_: int) -> tuple[float, float]:
            return base.logprob_of("the", " sun"), tuned.logprob_of("the", " sun")

        assert list(pool.map(both, range(8))) == expected


def test_a_close_ends_the_requests_under_way(build: Build, toy: Toy, gate: Gate, pool: ThreadPoolExecutor) -> None:
    backend = build()
    sentence = (
        "^the backend of api:base -> tuned was used after it was closed, by eviction or at the end of the session"
    )
    with backend.as_base() as view:
        toy.canned += [gate]
        answer = pool.submit(view.generate, "the", max_new_tokens=1)
        gate.wait_for(1)
        backend.close()
        with pytest.raises(BackendClosedError, match=sentence):
            answer.result(PATIENCE)
        with pytest.raises(BackendClosedError, match=sentence):
            view.generate("the", max_new_tokens=1)
    with pytest.raises(BackendClosedError, match=sentence), backend.as_base():
        pass
    assert repr(backend) == "<ApiBackend api:base -> tuned, closed>"


def test_a_close_ends_the_wait_for_another_attempt(toy: Toy, pool: ThreadPoolExecutor) -> None:
    waiting = threading.Event()

    async def sleep(_seconds: float) -> None:
        import asyncio

        waiting.set()
        await asyncio.Event().wait()

    backend = build_api(ModelSpec(kind="api", base="base", endpoint=toy.url), sleep=sleep)
    with backend.as_base() as view:
        toy.canned += [Response("", 500)]
        answer = pool.submit(view.generate, "the", max_new_tokens=1)
        assert waiting.wait(PATIENCE)
        backend.close()
        with pytest.raises(BackendClosedError):
            answer.result(PATIENCE)


def test_closing_twice_is_harmless_and_leaves_no_thread(build: Build) -> None:
    before = _threads()
    backend = build()
    assert _threads() > before
    backend.close()
    backend.close()
    assert _threads() == before


def test_a_close_that_was_interrupted_leaves_no_thread_and_no_connection(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _threads()
    backend = build()
    client = backend._connection._client

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend._loop._thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.close()
    backend.close()
    assert _threads() == before
    assert client.is_closed


def test_a_backend_is_closed_within_another_event_loop(build: Build) -> None:
    backend = build()

    async def close() -> None:
        backend.close()

    asyncio.run(close())
    with pytest.raises(BackendClosedError), backend.as_base():
        pass


def test_a_build_that_fails_leaves_no_thread(build: Build) -> None:
    before = _threads()
    with pytest.raises(SpecError, match="has no model"):
        build(base="other")
    assert _threads() == before


def test_a_view_is_closed_at_the_end_of_its_block(build: Build) -> None:
    backend = build()
    with backend.as_base() as view:
        pass
    sentence = r"^the view 'base' was used after its `with` block\. Keep what it returned, or open another view\.$"
    uses: list[Callable[[], Any]] = [
        lambda: view.logprob_of("the", " sun"),
        lambda: view.rolling_logprob("the"),
        lambda: view.next_token_dist("the"),
        lambda: view.generate("the", max_new_tokens=1),
        lambda: view.logprobs_of([]),
    ]
    for use in uses:
        with pytest.raises(ViewClosedError, match=sentence):
            use()
    view.close()
    assert repr(view).endswith(", closed>")


def test_an_interrupt_of_the_waiting_thread_ends_its_request(
    build: Build, toy: Toy, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = Future.exception

    def interrupted(future: Future[Any], timeout: float | None = None) -> Any:
        if threading.current_thread() is not threading.main_thread():  # the event loop's name lookups use it too
            return wait(future, timeout)
        monkeypatch.setattr(Future, "exception", wait)
        gate.wait_for(1)
        raise KeyboardInterrupt

    with build().as_base() as view:
        toy.canned += [gate]
        monkeypatch.setattr(Future, "exception", interrupted)
        with pytest.raises(KeyboardInterrupt):
            view.generate("the", max_new_tokens=1)
        gate.open()
        assert view.generate("the", max_new_tokens=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_finds_it_closed(build: Build) -> None:
    backend = build()
    with backend.as_base() as view:
        child = os.fork()
        if child == 0:
            try:
                view.generate("the", max_new_tokens=1)
            except BackendClosedError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert view.generate("the", max_new_tokens=1)


def test_one_connection_serves_request_after_request() -> None:
    connections = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            connections.append(self.client_address)
            super().setup()

        def do_GET(self) -> None:
            self._answer(b'{"data": [{"id": "base"}]}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(b'{"choices": [{"text": "again"}]}')

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        backend = build_api(ModelSpec(kind="api", base="base", endpoint=f"http://127.0.0.1:{server.server_port}"))
        with backend.as_base() as view:
            for _ in range(5):
                assert view.generate("the", max_new_tokens=1) == "again"
        backend.close()
        server.shutdown()
        thread.join()
    assert len(connections) == 1
