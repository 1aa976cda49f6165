"""A hub with toy repositories, which counts what it is asked, and a hub's cache that is laid out by hand."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

Files = dict[str, bytes]
_SETTINGS = ("huggingface_hub.constants", "huggingface_hub.file_download", "transformers.utils.hub")
"""Where settings are kept; before huggingface_hub 1 and transformers 5, in copies too."""
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_PROXIES = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def commit_of(name: str) -> str:
    """A commit's hash."""
    return hashlib.sha1(name.encode()).hexdigest()


def files_of(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class ToyHub:
    """Answers as huggingface.co does.

    Attributes:
        commits: The files of each commit, by repository and commit.
        refs: The commits of branches, by repository and branch.
        requests: What was asked, as ``METHOD path``, without what the hub answers itself.
        refuses: Gives the answer to a request in the hub's place; ``None`` to leave it to the hub.
    """

    def __init__(self, server: HTTPServer) -> None:
        self.commits: dict[tuple[str, str], Files] = {}
        self.refs: dict[tuple[str, str], str] = {}
        self.requests: list[str] = []
        self.refuses: Callable[[Request], Response | None] = lambda request: None
        self.url = server.url_for("").rstrip("/")
        server.expect_request(re.compile(".*")).respond_with_handler(self._answer)

    def push(self, repository: str, files: Files, *, branch: str = "main") -> str:
        """Put files on a branch as a new commit, whose hash is returned."""
        commit = commit_of(f"{repository} {branch} {len(self.commits)}")
        self.commits[repository, commit] = files
        self.refs[repository, branch] = commit
        return commit

    def take_requests(self) -> list[str]:
        taken, self.requests = self.requests, []
        return taken

    def _answer(self, request: Request) -> Response:
        self.requests.append(f"{request.method} {request.path}")
        refused = self.refuses(request)
        return self._found(request) if refused is None else refused

    def _found(self, request: Request) -> Response:
        parts = request.path.strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        parts = parts[2:] if listing else parts
        repository, what, revision, inside = "/".join(parts[:2]), parts[2], parts[3], "/".join(parts[4:])
        if repository not in {name for name, _ in self.commits}:
            return error(401, "RepoNotFound", "Repository not found")
        commit = self.refs.get((repository, revision), revision)
        files = self.commits.get((repository, commit))
        if files is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if listing:
            return _listing(request, what, files, commit, inside)
        if inside not in files:
            return error(404, "EntryNotFound", "Entry not found", commit)
        content = files[inside]
        etag = hashlib.sha1(content).hexdigest()
        return Response(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": commit})


def _listing(request: Request, what: str, files: Files, commit: str, inside: str) -> Response:
    if what == "revision":
        return _json({"id": "toy", "sha": commit, "siblings": [{"rfilename": name} for name in files]})
    start = f"{inside}/" if inside else ""
    below = {name: content for name, content in files.items() if name.startswith(start)}
    if request.args.get("recursive", "False").lower() in ("true", "1"):
        return _json([_entry(name, content) for name, content in below.items()])
    folders = {name[len(start) :].partition("/")[0] for name in below if "/" in name[len(start) :]}
    return _json(
        [{"type": "directory", "path": f"{start}{name}", "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        + [_entry(name, content) for name, content in below.items() if "/" not in name[len(start) :]]
    )


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}


def _json(value: Any) -> Response:
    return Response(json.dumps(value), content_type="application/json")


def error(status: int, code: str = "", message: str = "", commit: str = "") -> Response:
    """An answer as huggingface.co refuses."""
    headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
    return Response("", status, {name: value for name, value in headers.items() if value})


def cut(content: bytes) -> Response:
    """An answer that ends before it is complete."""

    def half() -> Iterator[bytes]:
        yield content[: len(content) // 2]

    return Response(half(), headers={"Content-Length": str(len(content)), "Connection": "close"})


def lay_out(cache: Path, repository: str, commit: str, files: Files, *, branch: str | None = "main") -> Path:
    """Write files into a hub's cache as huggingface_hub lays them out, and return their snapshot."""
    storage = cache / f"models--{repository.replace('/', '--')}"
    snapshot = storage / "snapshots" / commit
    shutil.rmtree(snapshot, ignore_errors=True)
    for name, content in files.items():
        blob, pointer = storage / "blobs" / hashlib.sha1(content).hexdigest(), snapshot / name
        for path in (blob, pointer):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        pointer.symlink_to(blob)
    if branch is not None:
        (storage / "refs").mkdir(exist_ok=True)
        (storage / "refs" / branch).write_text(commit)
    return snapshot


# --- huggingface_hub, which has read its settings when it was imported ------------------------------------------------


def use_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have huggingface_hub use a folder as its cache, without a token and offline."""
    for name in _SECRETS:
        monkeypatch.delenv(name, raising=False)
    _set(monkeypatch, HF_HUB_CACHE=str(folder), TRANSFORMERS_CACHE=str(folder), HF_TOKEN_PATH=str(folder / "no token"))
    _set(monkeypatch, HF_HUB_OFFLINE=True, _is_offline_mode=True)


@contextmanager
def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> Iterator[None]:
    """Have huggingface_hub ask a server in the place of huggingface.co, and not wait between its attempts."""
    for name in _PROXIES:
        monkeypatch.delenv(name, raising=False)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    _set(monkeypatch, ENDPOINT=url, HUGGINGFACE_CO_RESOLVE_ENDPOINT=url, HUGGINGFACE_CO_URL_TEMPLATE=template)
    _set(monkeypatch, HF_HUB_OFFLINE=False, _is_offline_mode=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    _forget_connections()
    try:
        yield
    finally:
        _forget_connections()


def _set(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    for module in map(import_module, _SETTINGS):
        for name in values.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, values[name])


def _forget_connections() -> None:
    """Before its version 1, huggingface_hub keeps connections that know whether they are offline."""
    reset = getattr(sys.modules.get("huggingface_hub.utils"), "reset_sessions", None)
    if reset is not None:
        reset()
