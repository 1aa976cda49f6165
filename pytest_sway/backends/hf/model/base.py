"""`LoadedBase`: a base model that never runs itself, its tokenizer, and the bound model that computes for all users.

`MergedBase` is a base with adapters merged into it, on which another adapter is put.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from pytest_sway.backends.checkpoints.gguf_header import gguf_file
from pytest_sway.backends.checkpoints.hub_files import base_file, config_of
from pytest_sway.backends.hf.hygiene.contents import ContentsRecord, PatchRecord
from pytest_sway.backends.hf.hygiene.memory import measured, trim_heap
from pytest_sway.backends.hf.loading.classes import is_multimodal
from pytest_sway.backends.hf.loading.gguf import load_gguf_tokenizer
from pytest_sway.backends.hf.loading.libraries import quiet_process
from pytest_sway.backends.hf.loading.model import load_model
from pytest_sway.backends.hf.loading.tasks import lacking, require_type
from pytest_sway.backends.hf.model.bound_model import BoundModel
from pytest_sway.backends.hf.model.known_skeletons import Skeletons
from pytest_sway.backends.hf.model.pristine import Pristine
from pytest_sway.backends.hf.model.trial_files import TrialFile
from pytest_sway.backends.hf.scoring.answer_cache import AnswerCache, circumstances
from pytest_sway.backends.hf.scoring.trials import Trials
from pytest_sway.backends.hf.sharing.tensor_parts import parts_of, scales_of
from pytest_sway.backends.hf.sharing.trees import tensors_of
from pytest_sway.backends.libraries.culprits import Asked, named_culprit
from pytest_sway.backends.libraries.tokenizer_faults import FILES, MINIMAL, other_parts
from pytest_sway.backends.local.tokenizer_copies import RustRecord
from pytest_sway.spec.tasks import CAUSAL
from pytest_sway.system.garbage import no_collections

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


class LoadedBase:
    """A base model in memory.

    Args:
        spec: The resolved spec that it is loaded from.
        tokenizer: Its tokenizer.
        pristine: Its model, in evaluation mode and frozen.
        may_hide_something: See the attribute.
        exposed: The tensors of its own for which all trees have the same memory, by name; ``None`` for all such.
        rust: The record of its tokenizer; ``None`` if another base has it.
        lacks: See the attribute.

    Attributes:
        spec: The spec.
        tokenizer: The tokenizer. Tests get copies that share its Rust object.
        may_hide_something: Whether the model may compute with state that its modules do not show.
        pristine: The model, which never runs.
        device: The ``torch.device`` of the model.
        trials: What trials have shown about the model's passes.
        side: The bound model that computes the base's answers.
        memory: The cache of its answers; ``None`` to cache none.
        skeletons: The skeletons of adapters on it.
        watches: Watches over its memory in all trees.
        tokenizers: The tokenizers that adapters brought, by the digest of their files; each lives as long as a backend
            uses it.
        lock: Held while a tokenizer is added.
        lacks: The names of the weights of its head that its files lack, so that they are noise.
        is_tried: Whether a trial was made and found no fault; see `verify_base`.
        nbytes: The bytes of its parameters, their scales and its buffers; shared memory counts once.
    """

    has_tokenizer_of_files = True
    """Whether its tokenizer is the one in the files of its spec."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Any,
        pristine: Pristine,
        *,
        may_hide_something: bool,
        exposed: Mapping[str, Any] | None = None,
        rust: RustRecord | None = None,
        lacks: frozenset[str] = frozenset(),
    ) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.device = pristine.model.device
        self.nbytes = measured(part for whole in pristine.own for part in (whole, *scales_of(whole)))
        self.may_hide_something = may_hide_something
        self.pristine = pristine
        self.watches = pristine.watches
        self.trials = Trials(memory=TrialFile(pristine.model))
        self.lacks = lacks
        self.is_tried = False
        self.memory: AnswerCache | None = None
        self.side = base_side(self)
        self.skeletons = Skeletons()
        self.tokenizers: WeakValueDictionary[str, RustRecord] = WeakValueDictionary()
        self.lock = threading.Lock()
        self._contents = ContentsRecord(pristine.memory.exposed if exposed is None else exposed)
        self._rust = rust
        self._patches = PatchRecord(pristine.model)
        trim_heap()

    @property
    def closed(self) -> bool:
        """Whether its last user has released it."""
        return self.pristine is None

    @property
    def notable_class(self) -> str | None:
        """The name of its model's class, if no task says it: multimodal, or not the one that its config names."""
        if self.spec.task not in (None, CAUSAL):
            return None
        model = self.pristine.model
        name, named = type(model).__name__, config_of(self.spec).get("architectures")
        return name if is_multimodal(model) or (named is not None and named != [name]) else None

    def tensors(self) -> dict[str, Any]:
        """Return its parameters and buffers by name; a tied tensor appears under each of its names."""
        model = self.pristine.model
        named = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
        return {name: tensor.detach() for pairs in named for name, tensor in pairs}

    def changes(self) -> list[str]:
        """Return one line for each change to what its users share."""
        return [*self._contents.changes(), *([] if self._rust is None else self._rust.changes())]

    def watch(self, tree: Any) -> None:
        """Watch the memory of a tree of an adapter on it."""
        self.watches.add(tensors_of(tree))

    def patches(self) -> list[str]:
        """Return one line for each process-wide patch that takes part in what it computes."""
        return self._patches.changes()

    def has_run(self, tree: Any) -> None:
        """Check what a tree's first pass has written to; see `MappedFile`. Some libraries repack weights in it."""
        if self.may_hide_something:
            trim_heap()
        pristine = self.pristine
        if pristine is not None:
            pristine.memory.has_run(tree)

    def is_patched(self) -> bool:
        """Return whether a process-wide patch takes part in what it computes."""
        return self._patches is not None and bool(self._patches.changes())

    def record_classes(self, model: Any) -> None:
        """Also watch the classes of ``model`` for patches."""
        self._patches.add(model)

    def undo_patches(self) -> None:
        """Undo all patches."""
        self._patches.restore()

    def recall(self, question: tuple[Any, ...], compute: Callable[[], list[Any]]) -> list[Any]:
        """Return the answers to ``question`` from the cache, or from ``compute()``.

        While the base is changed or patched, nothing is taken from the cache or added to it.
        """
        memory, here = self.memory, circumstances(self.device.type)
        if memory is None or here is None:
            return compute()
        if self.changes() or self.patches():
            memory.forget()
            return compute()
        return memory.answers((*question, here), compute)

    def close(self) -> None:
        """Release the model. Its memory is freed once nobody else refers to it."""
        self.side.close()
        self.pristine = self.tokenizer = self.memory = None  # type: ignore[assignment] # nobody uses a closed base
        self._contents = self._rust = self._patches = None  # type: ignore[assignment]
        self.skeletons = Skeletons()


def _may_hide_something(spec: ModelSpec, model: Any) -> bool:
    """Return whether the model has its own code, quantized weights or a device map."""
    return bool(
        spec.trust_remote_code or getattr(model.config, "quantization_config", None) or hasattr(model, "hf_device_map")
    )


def load_base(spec: ModelSpec, load_model: Callable[[ModelSpec], Any] = load_model) -> LoadedBase:
    """Load the base of a resolved spec in evaluation mode, frozen, on the spec's device.

    Args:
        spec: The resolved spec.
        load_model: Loads the model itself.

    Raises:
        WeightsError: The weights exist only as a pickle that the spec does not allow.
        SpecError: The base is an adapter, or contains one.
    """
    require_type(spec)
    tokenizer, again = load_tokenizer(spec, spec.base), partial(load_model, spec)
    model = again()
    trim_heap()  # before trees are tried, which takes memory, too
    hides = _may_hide_something(spec, model)
    pristine = Pristine(model, again, trial=hides)
    lacks = lacking(spec, model)
    return LoadedBase(spec, tokenizer, pristine, may_hide_something=hides, rust=RustRecord(tokenizer), lacks=lacks)


def load_tokenizer(spec: ModelSpec, source: str) -> Any:
    """Load a tokenizer from a folder or a hub id. If it has no padding token, it pads with its end token."""
    gguf = gguf_file(spec) if source == spec.base else None
    culprit = named_culprit(None if gguf is not None else _tokenizer_asked(spec, source))
    with culprit, quiet_process(), no_collections():
        if gguf is not None:
            tokenizer: Any = load_gguf_tokenizer(spec, gguf)
        else:
            tokenizer = _from_files(spec, source, spec.revision if source == spec.base else None)
        tokenizer("a text")  # a tokenizer that fails for every text fails here, where the error is explained
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
    """Return the bound model of a base without an adapter."""
    pristine = base.pristine
    return BoundModel(
        lambda to_run: pristine.tree(to_run=to_run),
        base,
        base.tokenizer,
        base.trials,
        recall=base.recall,
    )


class MergedBase(LoadedBase):
    """A base with adapters merged into it. It has its own memory for what they change, and the base's for the rest.

    Args:
        below: The base, which outlives it.
        pristine: The merged model. Its own tensors are those that differ from the base's.
        brought: The record of the tokenizer that an adapter brings; ``None`` for the base's.
        lacks: The names of the weights of its head that nobody has brought, so that they are noise.

    Attributes:
        below: The base.
        brought: The record of its tokenizer; ``None`` if that is the base's.
    """

    below: LoadedBase

    def __init__(
        self, below: LoadedBase, pristine: Pristine, brought: RustRecord | None, lacks: frozenset[str] = frozenset()
    ) -> None:
        own = set(map(id, pristine.own))
        super().__init__(
            below.spec,
            below.tokenizer if brought is None else brought.tokenizer,
            pristine,
            may_hide_something=below.may_hide_something,
            exposed={name: tensor for name, tensor in pristine.memory.exposed.items() if id(tensor) in own},
            rust=brought,
            lacks=lacks,
        )
        self.below = below
        self.brought = brought
        self.has_tokenizer_of_files = brought is None
        self._of_base = set(_storages(below.pristine.memory.exposed.values()))

    def watch(self, tree: Any) -> None:
        """Watch the memory of a tree of an adapter on it. Only the base watches what may live as long as the base."""
        self.below.watch(tree)
        self.watches.add(tensor for tensor in tensors_of(tree) if self._of_base.isdisjoint(_storages([tensor])))

    def close(self) -> None:
        """Release the model and the base."""
        super().close()
        self.below = self.brought = None  # type: ignore[assignment] # nobody uses a closed base


def _storages(tensors: Iterable[Any]) -> list[int]:
    return [part.untyped_storage()._cdata for tensor in tensors for _, part in parts_of(tensor)]
