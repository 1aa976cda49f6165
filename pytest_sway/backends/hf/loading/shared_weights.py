"""One copy of converted weights per host: the first worker that needs them writes them, and all map that file.

safetensors in the dtype that is computed in are mapped by every process, so a host holds them once. With a conversion,
each process would make and hold its own. So it is made once: loaded as ever, written into a folder of this run under a
lock that a dying process lets go, loaded back from there and compared to the bit, and only then given its name. The
comparison is a fifth of that (0.4 of 2.0 s for SmolLM2-135M), once in a run: no test of ours has tried the weights of
every architecture. What goes wrong on the way costs memory and time, never a result: the worker loads a copy of its
own, and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.gguf_header import gguf_file
from pytest_sway.backends.checkpoints.hub_files import base_file
from pytest_sway.backends.checkpoints.sizes import base_entries
from pytest_sway.backends.hf.hygiene.heap import collect
from pytest_sway.backends.hf.loading.model import load_model
from pytest_sway.backends.hf.loading.safetensors_writer import raw_bytes, write_tensors
from pytest_sway.backends.libraries.process import PROCESS_STATE
from pytest_sway.errors import SwayError, SwayWarning
from pytest_sway.spec.identity import base_key
from pytest_sway.spec.paths import short_name
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded
from pytest_sway.system.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_ONE_THREAD: Final = "HF_DEACTIVATE_ASYNC_LOAD"  # of transformers 5, which reads it for each load; 4 has no threads
_STORED: Final = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
_SOURCES: Final = frozenset({".json", ".safetensors", ".bin", ".py"})
"""Suffixes of the files that a model is loaded from."""


class SharedWeights:
    """Loads models so that all processes that share a folder hold one copy of what had to be converted.

    Args:
        folder: A folder of this run on this host, to which its workers can write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._refused: set[Path] = set()

    def load_model(self, spec: ModelSpec) -> Any:
        """Load the model of a resolved spec's base, equal to the bit to what `models.load_model` gives.

        Raises:
            SwayError: As there.
        """
        place = self._place(spec)
        if place is None or place in self._refused:
            return load_model(spec)
        try:
            return self._mapped(spec, place)
        except Exception as error:
            why = _reason(error)
        model = load_model(spec)  # which raises what is wrong with the base itself
        self._refused.add(place)
        warnings.warn(
            f"the weights of {short_name(spec.base)}, converted to {spec.dtype}, are not shared between workers:"
            f" {why}. Each worker holds a copy of its own, as with sway_share_weights = off.",
            SwayWarning,
            stacklevel=2,
        )
        return model

    def _place(self, spec: ModelSpec) -> Path | None:
        """The folder of a model's shared copy, there or not; ``None`` if nothing of it is to be shared."""
        if spec.device.partition(":")[0] != "cpu" or sys.platform == "win32":  # where weights are read, not mapped
            return None
        if _source(spec) is None:
            load_model(spec)  # downloads it; what is to be done depends on its files
        return self._folder / _identity(spec) if _needs_conversion(spec) else None

    def _mapped(self, spec: ModelSpec, place: Path) -> Any:
        if not place.is_dir():
            with _turn(place.with_suffix(".lock")):
                if not place.is_dir():
                    return _convert(spec, place)
        return load_model(spec, converted=place / _name(spec))


def _convert(spec: ModelSpec, place: Path) -> Any:
    """Load a model, write what all will map, and return the model that maps it; to be called in turn.

    Raises:
        ValueError: It is not the same when it is read back.
    """
    with _in_this_thread():
        model = load_model(spec)
    if place.name != _identity(spec):  # somebody saves into its folder just now: nobody knows what was loaded
        return model
    unfinished = place.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a worker that died
    try:
        folder = unfinished / _name(spec)
        _write(spec, model, folder)
        mapped = load_model(spec, converted=folder)
        if difference := _difference(model, mapped):
            raise ValueError(f"what is read back differs in {difference}")
        unfinished.rename(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    del model
    collect("cpu")
    return mapped


# --- what is shared, and under which name -----------------------------------------------------------------------------


def _source(spec: ModelSpec) -> Path | None:
    """The folder of the base's files; ``None`` if they are not on this machine yet."""
    gguf = gguf_file(spec)
    if gguf is not None:
        return gguf.parent
    config = base_file(spec, "config.json")
    return None if config is None else config.parent


def _name(spec: ModelSpec) -> str:
    """The folder's own name, which becomes part of the names of the modules of a base that brings code."""
    source = _source(spec)
    return "model" if source is None else source.name


def _needs_conversion(spec: ModelSpec) -> bool:
    if gguf_file(spec) is not None:
        return True
    config = base_file(spec, "config.json")
    try:
        if config is None or json.loads(read_bounded(config, CONFIG_BYTES)).get("quantization_config"):
            return False
        entries = base_entries(spec)
    except (SwayError, OSError, ValueError, AttributeError, RecursionError):
        return False  # the load itself will say what is wrong
    return entries is None or any(e.floating and e.dtype != _STORED[spec.dtype] for e in entries.values())


def _identity(spec: ModelSpec) -> str:
    """A name for what is loaded, which changes with the base's files and with the libraries that read them."""
    source = _source(spec)
    files = () if source is None else sorted(p for p in source.iterdir() if p.suffix in _SOURCES)
    states = [(p.name, st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino) for p in files for st in (p.stat(),)]
    libraries = version("torch"), version("transformers")
    identity = (base_key(spec), spec.trust_remote_code, str(source), states, libraries)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


# --- the copy ---------------------------------------------------------------------------------------------------------


@contextmanager
def _in_this_thread() -> Iterator[None]:
    """Have transformers convert in this thread: of what other threads free, glibc keeps up to a tenth of a model."""
    with PROCESS_STATE:
        before = os.environ.get(_ONE_THREAD)
        os.environ[_ONE_THREAD] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_ONE_THREAD]
            else:
                os.environ[_ONE_THREAD] = before


def _write(spec: ModelSpec, model: Any, folder: Path) -> None:
    """Write a model's weights as they are in memory, beside the files of its base that say how to use them."""
    folder.parent.mkdir()  # not its parents: where the run's folder is gone, the run has ended
    folder.mkdir()
    if gguf_file(spec) is None:
        _copy_settings(spec, folder)
    else:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    distinct = {(t.data_ptr(), t.shape, t.stride()): name for name, t in reversed(model.state_dict().items())}
    tensors = model.state_dict()
    write_tensors(folder / "model.safetensors", {name: tensors[name] for name in distinct.values()})


def _copy_settings(spec: ModelSpec, folder: Path) -> None:
    source = _source(spec)
    assert source is not None
    code = source.rglob("*.py") if spec.trust_remote_code else ()
    for file in (source / "config.json", source / "generation_config.json", *code):
        if file.is_file():
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _difference(model: Any, copy: Any) -> str | None:
    """What of a model is not the same in its copy; ``None`` if all is."""
    for what, before, now in (
        ("its class", type(model), type(copy)),
        ("its config", model.config, copy.config),
        ("its generation_config", *(getattr(m, "generation_config", None) for m in (model, copy))),
    ):
        if before != now:
            return what
    tensors, others = _tensors(model), _tensors(copy)
    if tensors.keys() != others.keys() or _places(tensors) != _places(others):
        return "the names of its tensors"
    different = [name for name in set(_places(tensors).values()) if not _equal(tensors[name], others[name])]
    return f"{len(different)} tensors, such as {min(different)}" if different else None


def _tensors(model: Any) -> dict[str, Any]:
    named = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return {name: tensor for pairs in named for name, tensor in pairs}


def _places(tensors: Mapping[str, Any]) -> dict[str, str]:
    """For each tensor, the first one at the same place in memory: itself, unless it is tied."""
    first: dict[tuple[int, int], str] = {}
    return {name: first.setdefault((t.data_ptr(), t.nbytes), name) for name, t in tensors.items()}


def _equal(a: Any, b: Any) -> bool:
    return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and raw_bytes(a).equal(raw_bytes(b))


# --- taking turns -----------------------------------------------------------------------------------------------------


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which the system lets go when its holder dies.

    Not filelock's, which makes the folder of a run that has ended anew, and nobody would remove that.

    Raises:
        OSError: The file system has no locks, or the folder is gone.
    """
    import fcntl  # not on Windows

    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        fcntl.flock(lock, fcntl.LOCK_UN)  # also where a child that was forked meanwhile has the descriptor
    finally:
        os.close(lock)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}; the environment variable TMPDIR names another place"
    return f"{type(error).__name__}: {redacted(str(error)).rstrip('.')}"
