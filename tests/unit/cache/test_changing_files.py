"""A loaded backend has the key of the files that it was loaded from, even if the files change during the load."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from pytest_sway.backends.checkpoints.plan import Plan
from pytest_sway.backends.registry import Builder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.errors import FilesChangedError, WeightsError
from pytest_sway.spec.identity import resolved_key
from pytest_sway.spec.model_spec import ModelSpec
from tests.tiny import edit_config, make_adapter, make_base
from tests.unit.fakes import Call, FakeBuild, InformedFakeBuild, Watched


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The weights file of an adapter in the folder ``x``."""
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(b"old")
    return path


@pytest.fixture
def asked(weights: Path) -> ModelSpec:
    return ModelSpec(kind="dummy", base="org/a", adapter=weights.parent)


def _replace(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)


def test_files_that_are_replaced_while_they_are_loaded_are_loaded_again(
    build: FakeBuild, asked: ModelSpec, weights: Path
) -> None:
    def save_once() -> None:
        if build.loads["a+x"] == 1:
            _replace(weights, b"new")

    build.inside["a+x"] = save_once
    cache = BackendCache(build=build)
    with cache.lease(asked) as backend:
        assert backend is build.built[1]
        assert build.closes["a+x"] == [1, 0]
    with cache.lease(asked) as again:
        assert again is backend
    _replace(weights, b"old")
    with cache.lease(asked) as put_back:
        assert put_back is build.built[2]


def test_files_that_are_put_back_before_the_load_ends_are_loaded_again(
    build: FakeBuild, asked: ModelSpec, weights: Path
) -> None:
    before = os.stat(weights)

    def save_and_put_back() -> None:
        if build.loads["a+x"] == 1:
            weights.write_bytes(b"new")
            weights.write_bytes(b"old")
            os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))

    build.inside["a+x"] = save_and_put_back
    with BackendCache(build=build).lease(asked) as backend:
        assert backend is build.built[1]


def test_files_that_never_rest_are_refused(build: FakeBuild, asked: ModelSpec, weights: Path) -> None:
    build.inside["a+x"] = lambda: _replace(weights, bytes(build.loads["a+x"]))
    cache = BackendCache(build=build)
    with pytest.raises(FilesChangedError, match=r"^the files of dummy:org/a \+ \S+/x changed during each try"):
        cache.acquire(asked)
    assert build.closes["a+x"] == [1, 1, 1]
    assert cache.loaded_keys() == []
    build.inside.clear()
    assert cache.get_or_load(asked).backend is build.built[-1]


def test_who_waits_for_such_a_load_gets_the_second_one_too(build: FakeBuild, asked: ModelSpec, weights: Path) -> None:
    def save_once() -> None:
        if build.loads["a+x"] == 1:
            _replace(weights, b"new")

    gate = build.load_gate("a+x")
    build.inside["a+x"] = save_once
    cache = BackendCache(build=build)
    watched = Watched(cache)
    calls = [Call(partial(cache.acquire, asked))]
    gate.wait()
    calls += [Call(partial(cache.acquire, asked)) for _ in range(3)]
    watched.until_waiting(3)
    gate.open()
    assert {id(call.result().backend) for call in calls} == {id(build.built[-1])}
    assert build.loads["a+x"] == 2


def test_files_that_change_before_the_load_begins_are_loaded_under_their_own_key(
    build: FakeBuild, asked: ModelSpec, weights: Path
) -> None:
    cache = BackendCache(max_size=1, build=build)
    watched = Watched(cache)
    watched.on_wait = lambda: _replace(weights, b"new")
    held = cache.acquire(ModelSpec(kind="dummy", base="org/b"))
    asker = Call(partial(cache.acquire, asked))
    watched.until_waiting(1)
    held.release()
    lease = asker.result()
    assert cache.loaded_keys() == [lease.cached.key]
    assert cache.get_or_load(asked).backend is lease.backend


def test_what_is_refused_because_its_files_change_is_checked_again(
    sharing: InformedFakeBuild, asked: ModelSpec, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_half_of_a_save(asked: ModelSpec) -> Plan:
        monkeypatch.undo()
        _replace(weights, b"new")
        raise WeightsError("truncated")

    monkeypatch.setattr(sharing, "check", check_half_of_a_save)
    with BackendCache(build=sharing).lease(asked) as backend:
        assert backend is sharing.built[0]


def test_what_an_own_backend_does_with_its_files_is_its_own_affair(build: FakeBuild, weights: Path) -> None:
    build.inside["a+x"] = lambda: _replace(weights, b"trained")
    spec = ModelSpec(kind="custom", base="org/a", adapter=weights.parent, entry_point="a:B")
    assert BackendCache(build=build).get_or_load(spec).backend is build.built[0]


def test_a_check_makes_the_next_key_look_again(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    builder = Builder()
    spec = builder.resolve(ModelSpec(base=str(base), adapter=adapter, device="cpu", dtype="fp32"))
    builder.check(spec)
    before = resolved_key(spec)
    builder.check(spec)
    edit_config(adapter, lora_alpha=5)
    assert resolved_key(spec) != before
