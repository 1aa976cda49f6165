"""Loads broken files next to a good backend, within bounds of time and memory, and compares the results with PEFT's."""

from __future__ import annotations

import re
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.errors import SwayError
from tests.tiny import TEXT, make_base, quiet
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.fuzz.inputs import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, Broken
from tests.unit.backends.hf.reference import fresh, logits
from tests.unit.backends.hf.zoo import SPECIMENS, train

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS: Final = 5.0
"""The most CPU seconds of the thread for an input."""
_PATIENCE: Final = 30.0
"""CPU seconds of the process after which an input is aborted."""
_MEMORY: Final = 3 * 2**30
"""The most bytes that an input may allocate."""
_LONGEST: Final = 3_000
"""The most characters of an error."""
_LACKING: Final = "needs what this environment lacks"
_OF_LIBRARY: Final = re.compile(r"pip install|librar|package|module|is not available")
"""Libraries' messages about a missing library, which contain its name."""
_MESSAGES: Final = ({"role": "user", "content": "hello"},)
_OF_TOKENIZER: Final = (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE)


class TakesForEverError(BaseException):
    """Raised in an input that does not end; no library catches it."""


class Arena:
    """A good backend, and folders into which broken files are put.

    Args:
        folder: The folder for all files.
        kinds: The PEFT types of the adapters.
    """

    def __init__(self, folder: Path, kinds: tuple[str, ...]) -> None:
        self._scratch = folder / "scratch"
        self._folders = {"base": make_base(folder / "base")}
        for specimen in SPECIMENS:
            if specimen.kind in kinds and specimen.kind not in self._folders and not specimen.base:
                model, tokenizer = fresh(self._folders["base"])
                self._folders[specimen.kind] = train(specimen, model, tokenizer, folder / specimen.kind)
        self.files = {
            name: {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
            for name, folder in self._folders.items()
        }
        self._builder = HFBuilder()
        self._good = self._builder(spec_of(self._folders["base"], self._folders["LORA"]))
        self._right = self._good_answers()

    def close(self) -> None:
        self._good.close()

    def complaint(self, broken: Broken) -> str | None:
        """Return the complaint about an input's result; ``None`` if the result is right."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        shutil.copytree(self._folders[broken.folder], self._scratch)
        (self._scratch / broken.file).write_bytes(broken.content)
        if broken.folder != "base" and broken.file in _OF_TOKENIZER:
            for name in (TOKENIZER, TOKENIZER_CONFIG):  # an adapter's tokenizer is complete except for the broken file
                if name != broken.file:
                    shutil.copy(self._folders["base"] / name, self._scratch / name)
        found = self._found(broken)
        answers = zip(self._good_answers(), self._right, strict=True)
        if self._good.changes() or any(not now.equal(then) for now, then in answers):
            return f"the good backend beside it is another: {self._good.changes()} (besides: {found})"
        return found

    def _found(self, broken: Broken) -> str | None:
        base, adapter = self._folders["base"], None
        if broken.folder == "base":
            base = self._scratch
        else:
            adapter = self._scratch
        started = time.thread_time()
        answers: list[Any] = []
        error: BaseException | None = None
        try:
            with _bounds():
                spec = spec_of(base, adapter)
                backend = self._builder(spec)
                try:
                    answers = _answers(backend, adapter is not None)
                finally:
                    backend.close()
        except (Exception, TakesForEverError) as raised:
            error = raised
        seconds = time.thread_time() - started
        if isinstance(error, TakesForEverError) or seconds > SECONDS:
            return f"takes {seconds:.1f} s"
        if isinstance(error, SwayError):
            return self._unnamed(broken, str(error))
        if error is not None:
            return f"a raw {type(error).__name__}: {str(error)[:300]}"
        return _otherwise(base, adapter, answers)

    def _unnamed(self, broken: Broken, text: str) -> str | None:
        """Return what an error fails to name: the file or its field."""
        if len(text) > _LONGEST:
            return f"an error of {len(text)} characters: {text[:300]}"
        if str(self._scratch) not in text or not re.search(rf"(?<!\w){re.escape(broken.file)}(?!\w)", text):
            return f"an error that does not name the file {broken.file}: {text[:600]}"
        if broken.names and not any(name in text for name in broken.names):
            return f"an error that does not name {' or '.join(broken.names)[:200]}: {text[:600]}"
        if _LACKING in text and not _OF_LIBRARY.search(text):
            return f"an error that names no library: {text[:600]}"
        return None

    def _good_answers(self) -> list[Any]:
        return [logits for _, logits in _answers(self._good, True)]


def _answers(backend: Any, tuned: bool) -> list[Any]:
    """Return the token ids and logits of a text on both sides of a backend."""
    import torch

    found: list[Any] = []
    for opened in (backend.as_base, *((backend.as_finetuned,) if tuned else ())):
        with opened() as view:
            view.logprob_of("the sun", " rises")
            if getattr(view.tokenizer, "chat_template", None):
                view.logprob_of(list(_MESSAGES), " world")
            ids = view.tokenizer(TEXT)["input_ids"]
            with _same_noise(), torch.inference_mode():
                found.append((ids, view.model(torch.tensor([ids])).logits))
    return found


def _otherwise(base: Path, adapter: Path | None, answers: list[Any]) -> str | None:
    """Return how answers differ from those of a model that transformers and PEFT load."""
    import torch
    from transformers import AutoTokenizer

    try:
        model, tokenizer = fresh(base)
        references = [(model, tokenizer)]
        if adapter is not None:
            if (adapter / TOKENIZER_CONFIG).is_file():
                with quiet():
                    tokenizer = AutoTokenizer.from_pretrained(str(adapter))
            torch.manual_seed(0)
            references.append((fresh(base, adapter)[0], tokenizer))
        sides = ("base", "tuned")[: len(references)]
        for (ids, found), (model, tokenizer), side in zip(answers, references, sides, strict=True):
            if ids != tokenizer(TEXT)["input_ids"]:
                return f"the {side} side has other ids than transformers': {ids}"
            with _same_noise():
                right = logits(model, tokenizer)
            if found.shape != right.shape or not torch.allclose(found, right, rtol=0, atol=1e-5):
                return f"the {side} side has other logits, by {float((found - right).abs().max())}"
    except Exception as error:
        return f"is served, and transformers and PEFT refuse it: {type(error).__name__}: {str(error)[:300]}"
    return None


@contextmanager
def _same_noise() -> Iterator[None]:
    """Seed the random numbers of each pass, which types such as PVeRA draw."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def _bounds() -> Iterator[None]:
    """Abort an input that does not end, and refuse one that takes all memory; only in the main thread."""
    import resource

    def stop(*_: object) -> None:
        raise TakesForEverError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, _PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, handler)
