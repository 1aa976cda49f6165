"""A real llama-cpp-python server, and the same models in the hf backend."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.smollm2 import smollm2_folder, smollm2_gguf
from pytest_sway import ModelSpec
from pytest_sway.backends.registry import Builder
from tests.api.gguf_files import MODULES, write_adapter, write_float32
from tests.tiny import make_adapter

KEY = "a-key-of-this-test-alone"
BOS = "<|im_start|>"
"""The server puts this token before each text; the hf backend does not."""

_READY_SECONDS = 120.0


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWAY_API_KEY", KEY)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return make_adapter(folder, smollm2_folder(), r=8, targets=tuple(MODULES), scale=0.02)


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Iterator[str]:
    """The address of a server with three models.

    ``base`` and ``tuned`` compute in float32, with a BOS before each text; ``quantised`` is the original 4-bit file,
    without BOS.
    """
    folder = tmp_path_factory.mktemp("server")
    weights = write_float32(smollm2_gguf(), folder / "base.gguf", tokenizer__ggml__add_bos_token=True)
    lora = write_adapter(adapter, folder / "lora.gguf")
    common = {"n_ctx": 256, "verbose": False, "type_k": 0, "type_v": 0}  # a cache of float32, too
    models = [
        {"model": str(weights), "model_alias": "base", **common},
        {"model": str(weights), "model_alias": "tuned", "lora_path": str(lora), **common},
        {"model": str(smollm2_gguf()), "model_alias": "quantised", **common},
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "config.json"
    config.write_text(json.dumps({"host": "127.0.0.1", "port": port, "api_key": KEY, "models": models}))
    log = folder / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "llama_cpp.server", "--config_file", str(config)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/v1/models", server, log)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            httpx.get(url, headers={"Authorization": f"Bearer {KEY}"}).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.1)  # between polls, since the server does not announce that it listens
    pytest.fail(f"the server did not start (exit status {server.poll()}):\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def _builder() -> Builder:
    return Builder()


@pytest.fixture(scope="session")
def build(_builder: Builder) -> Iterator[Callable[..., Any]]:
    """Builds backends, each once, and closes them at the end."""
    built: dict[ModelSpec, Any] = {}

    def make(**fields: Any) -> Any:
        spec = ModelSpec(**fields)
        if spec not in built:
            built[spec] = _builder(spec)
        return built[spec]

    yield make
    for backend in built.values():
        backend.close()


@pytest.fixture
def served(build: Callable[..., Any], endpoint: str) -> Any:
    return build(kind="api", base="base", finetuned="tuned", endpoint=endpoint)


@pytest.fixture
def local(build: Callable[..., Any], adapter: Path) -> Any:
    return build(base=str(smollm2_folder()), adapter=adapter, dtype="fp32", device="cpu")
