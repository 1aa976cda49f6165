"""A loaded base: one model that never runs, its tokenizer, and the side that computes for all who use it."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from pytest_sway.backends.checkpoints.gguf_header import gguf_file
from pytest_sway.backends.checkpoints.hub_files import base_file
from pytest_sway.backends.hf.hygiene.contents import ContentsRecord, PatchRecord
from pytest_sway.backends.hf.hygiene.heap import trim_heap
from pytest_sway.backends.hf.hygiene.weights_watch import measured
from pytest_sway.backends.hf.loading.gguf import load_gguf_tokenizer
from pytest_sway.backends.hf.loading.libraries import quiet_process
from pytest_sway.backends.hf.loading.model import load_model, require_type
from pytest_sway.backends.hf.model.bound_model import BoundModel
from pytest_sway.backends.hf.model.known_skeletons import Skeletons
from pytest_sway.backends.hf.model.pristine import Pristine
from pytest_sway.backends.hf.scoring.answer_cache import AnswerCache, circumstances
from pytest_sway.backends.hf.scoring.trials import Trials
from pytest_sway.backends.hf.sharing.trees import tensors_of
from pytest_sway.backends.libraries.culprits import Asked, named_culprit
from pytest_sway.backends.libraries.tokenizer_faults import FILES, MINIMAL, other_parts
from pytest_sway.backends.local.tokenizer_copies import RustRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sway.spec.model_spec import ModelSpec


__tracebackhide__ = True


class LoadedBase:
    """A base model in memory.

    Args:
        spec: The resolved spec that it is loaded from.
        tokenizer: Its tokenizer.
        load_model: Loads its model, in evaluation mode and frozen.

    Attributes:
        spec: The spec.
        tokenizer: The tokenizer, which no test gets; it shares its object in Rust with those that tests get.
        may_hide_something: Whether the model is of a kind that may compute with more than its modules show.
        pristine: The model, which never runs.
        device: The ``torch.device`` of the model.
        trials: What was found out about the model's passes.
        side: What computes the base's answers.
        memory: What it has answered before; ``None`` to remember nothing.
        skeletons: What PEFT has made of it.
        watches: Watches over its memory, wherever that is used.
        tokenizers: The tokenizers that adapters brought, by the identity of their files; each stays for as long as a
            backend uses it.
        lock: Held while a tokenizer is added.
        is_tried: Whether it was tried, and computes numbers from left to right as far as that shows.
        nbytes: What its parameters and buffers take, each place counted once.
    """

    def __init__(self, spec: ModelSpec, tokenizer: Any, load_model: Callable[[], Any]) -> None:
        model = load_model()
        self.spec = spec
        self.tokenizer = tokenizer
        self.device = model.device
        self.nbytes = measured(tensors_of(model))
        self.may_hide_something = _may_hide_something(spec, model)
        self.pristine = Pristine(model, load_model, trial=self.may_hide_something)
        self.watches = self.pristine.watches
        self.trials = Trials()
        self.is_tried = False
        self.memory: AnswerCache | None = None
        self.side = base_side(self)
        self.skeletons = Skeletons()
        self.tokenizers: WeakValueDictionary[str, RustRecord] = WeakValueDictionary()
        self.lock = threading.Lock()
        self._contents = ContentsRecord(self.pristine.memory.exposed)
        self._rust = RustRecord(tokenizer)
        self._patches = PatchRecord(model)
        trim_heap()

    @property
    def closed(self) -> bool:
        """Whether its last user has left."""
        return self.pristine is None

    def tensors(self) -> dict[str, Any]:
        """Return its parameters and buffers by name, also under each further name of those that are tied."""
        model = self.pristine.model
        named = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
        return {name: tensor.detach() for pairs in named for name, tensor in pairs}

    def changes(self) -> list[str]:
        """One line for each thing that all of its users share and that is no longer as it was."""
        return [*self._contents.changes(), *self._rust.changes()]

    def patches(self) -> list[str]:
        """One line for each thing that was patched for the whole process, and takes part in what the base computes."""
        return self._patches.changes()

    def has_run(self, tree: Any) -> None:
        """Look what a tree's first pass has written to; see `MappedFile`."""
        pristine = self.pristine
        if pristine is not None:
            pristine.memory.has_run(tree)

    def is_patched(self) -> bool:
        """Whether something is patched that takes part in what it computes."""
        return self._patches is not None and bool(self._patches.changes())

    def record_classes(self, model: Any) -> None:
        """Have patches of a model's classes count, too."""
        self._patches.add(model)

    def undo_patches(self) -> None:
        """Put back what was patched."""
        self._patches.restore()

    def recall(self, question: tuple[Any, ...], compute: Callable[[], list[Any]]) -> list[Any]:
        """Return the answers to ``question`` from memory, or from ``compute()``.

        A base that somebody has changed answers nothing from memory, and what it computes is not remembered.
        """
        memory, here = self.memory, circumstances(self.device.type)
        if memory is None or here is None:
            return compute()
        if self.changes() or self.patches():
            memory.forget()
            return compute()
        return memory.answers((*question, here), compute)

    def close(self) -> None:
        """Let go of the model. Its memory comes back once nobody else refers to it."""
        self.side.close()
        self.pristine = self.tokenizer = self.memory = None  # type: ignore[assignment] # nobody uses a closed base
        self._contents = self._rust = self._patches = None  # type: ignore[assignment]
        self.skeletons = Skeletons()


def _may_hide_something(spec: ModelSpec, model: Any) -> bool:
    """Whether a model is of a kind that may compute with more than its modules show."""
    return bool(
        spec.trust_remote_code or getattr(model.config, "quantization_config", None) or hasattr(model, "hf_device_map")
    )


def load_base(spec: ModelSpec, load_model: Callable[[ModelSpec], Any] = load_model) -> LoadedBase:
    """Load the base of a resolved spec, in evaluation mode, frozen, on its device.

    Args:
        spec: What to load.
        load_model: What loads the model itself.

    Raises:
        WeightsError: Its weights exist only as a pickle that the spec does not allow.
        SpecError: It is an adapter, or contains one.
    """
    require_type(spec)
    return LoadedBase(spec, load_tokenizer(spec, spec.base), partial(load_model, spec))


def load_tokenizer(spec: ModelSpec, source: str) -> Any:
    """Load a tokenizer from a folder or a hub id; one without a padding token pads with its end token."""
    gguf = gguf_file(spec) if source == spec.base else None
    with named_culprit(None if gguf is not None else _tokenizer_asked(spec, source)), quiet_process():
        if gguf is not None:
            tokenizer: Any = load_gguf_tokenizer(spec, gguf)
        else:
            tokenizer = _from_files(spec, source, spec.revision if source == spec.base else None)
        tokenizer("a text")  # what fails for any text fails here, where it is explained
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_asked(spec: ModelSpec, source: str) -> Asked | None:
    config = base_file(spec if source == spec.base else replace(spec, base=source), "config.json")
    folder = config.parent if config is not None else Path(source)
    if spec.trust_remote_code or not folder.is_dir():
        return None

    def attempt(folder: Path) -> None:
        with quiet_process():
            _from_files(spec, str(folder))("a text")

    return Asked("the tokenizer", folder, FILES, attempt, others=other_parts, minimal=MINIMAL)


def _from_files(spec: ModelSpec, source: str, revision: str | None = None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=spec.trust_remote_code)


def base_side(base: LoadedBase) -> BoundModel:
    """Return the side of a base as it is."""
    pristine = base.pristine
    return BoundModel(
        lambda to_run: pristine.tree(to_run=to_run),
        base,
        base.tokenizer,
        base.trials,
        recall=base.recall,
    )
