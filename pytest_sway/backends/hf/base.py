"""A loaded base: one model and its tokenizer, with the adapters that are on it."""

from __future__ import annotations

import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from pytest_sway.backends.hf.forward import Forward
from pytest_sway.backends.hf.gguf import load_gguf_tokenizer
from pytest_sway.backends.hf.gguf_files import gguf_file
from pytest_sway.backends.hf.inspection import BaseRecord, TokenizerRecord
from pytest_sway.backends.hf.libraries import forget_layers, quiet_process, seeded
from pytest_sway.backends.hf.memory import WeightsWatch
from pytest_sway.backends.hf.models import load_model
from pytest_sway.backends.hf.recall import AnswerMemory, circumstances
from pytest_sway.backends.hf.sizes import measured
from pytest_sway.backends.hf.state import BASE_STATE, Switch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_sway.backends.hf.adapter import Adapter
    from pytest_sway.backends.hf.grafting import LayerPlan
    from pytest_sway.spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


class LoadedBase:
    """A base model in memory.

    Attributes:
        spec: The resolved spec that it was loaded from.
        shared: Whether it serves several adapters; otherwise it is one adapter's own.
        model: The Hugging Face model, in evaluation mode and frozen; PEFT puts its layers into it.
        tokenizer: Its tokenizer.
        lock: Held while the model computes or is changed.
        switch: What puts the model into a view's state.
        peft_model: The ``PeftModel`` around the model; ``None`` until the first adapter was put on.
        adapters: The adapters that are on it, by their internal names.
        record: What the model was like when it was loaded.
        plans: How adapters are put on, by their configuration.
        watch: Tells whether its weights are still in memory.
        nbytes: What its parameters and buffers take, each place counted once.
        places: By module name, where each module of the model stands: its parent's children and its key there.
        tokenizer_record: What the tokenizer's settings were.
        tokenizers: The records of tokenizers that adapters brought, by the identity of their files; they and their
            tokenizers stay for as long as a backend uses them.
        forward: Its forward passes.
        memory: What it has answered before; ``None`` to remember nothing.
    """

    def __init__(self, spec: ModelSpec, model: Any, tokenizer: Any, *, shared: bool = True) -> None:
        self.spec = spec
        self.shared = shared
        self.model = model
        self.tokenizer = tokenizer
        self.lock = threading.RLock()
        self.switch = Switch()
        self.peft_model: Any = None
        self.adapters: dict[str, Adapter] = {}
        self.tokenizer_record = TokenizerRecord(tokenizer)
        self.tokenizers: WeakValueDictionary[str, TokenizerRecord] = WeakValueDictionary()
        self.forward = Forward(model)
        self.memory: AnswerMemory | None = None
        self.plans: dict[str, list[LayerPlan]] = {}
        self.places = dict(_places(model))
        self._modules = {name: children[key] for name, (children, key) in self.places.items()}
        self.take_stock()

    def take_stock(self, adapter: Adapter | None = None) -> None:
        """Take the base for what it is now: freshly loaded, or with its own adapter, which may have rewritten it."""
        others = frozenset() if adapter is None else frozenset(map(id, adapter.parameters.values()))
        tensors = [t for t in (*self.model.parameters(), *self.model.buffers()) if id(t) not in others]
        self.record = BaseRecord(
            self.model, others, frozenset() if adapter is None else frozenset(_rewritten(self.model))
        )
        self.watch = WeightsWatch(tensors)
        self.nbytes = measured(tensors)

    @property
    def device(self) -> Any:
        """The ``torch.device`` of the model."""
        return self.model.device

    @property
    def closed(self) -> bool:
        """Whether its last user has left."""
        return self.model is None

    def refresh(self) -> None:
        """Take note of adapters that came or went; to be called by whoever put them on or took them off."""
        added = list(self._peft_modules())
        self.switch.refresh(self.peft_model, [module for _, module in added])
        self.record.refresh(self.peft_model, self.adapters, added)

    def tensors(self) -> dict[str, Any]:
        """The base's own parameters and buffers by name, whatever adapters are on it."""
        return {
            f"{name}.{key}": tensor.detach()
            for name, module in self._modules.items()
            for members in (module._parameters, module._buffers)
            for key, tensor in members.items()
            if tensor is not None
        }

    def changes(self) -> list[str]:
        """One line for each thing of the base that is no longer as it was; to be called under its lock."""
        with self.switch.bound(BASE_STATE):
            return [*self.record.note(), *self.tokenizer_record.changes()]

    def recall(self, question: tuple[Any, ...], compute: Callable[[], list[Any]]) -> list[Any]:
        """Return the answers to ``question`` from memory, or from ``compute()``; to be called under its lock.

        A base that somebody has changed answers nothing from memory, and what it computes is not remembered.
        """
        memory, here = self.memory, circumstances(self.device.type)
        if memory is None or here is None:
            return compute()
        if not self.record.intact():
            memory.forget()
            return compute()
        return memory.answers((*question, here), compute)

    def _peft_modules(self) -> Iterator[tuple[str, Any]]:
        """What PEFT has put around and into the model.

        On a shared base, whose adapters are plain LoRA, these are the ``PeftModel``, its tuner, and a layer in the
        place of each targeted module. Elsewhere they may stand anywhere.
        """
        if self.peft_model is None:
            return
        if not self.shared:
            yield from self.peft_model.named_modules()
            return
        yield "", self.peft_model
        yield "base_model", self.peft_model.base_model
        for name, (children, key) in self.places.items():
            if children[key] is not self._modules[name]:
                yield name, children[key]

    def close(self) -> None:
        """Let go of the model. Its memory comes back once nobody else refers to it."""
        with self.lock:
            _remove_hooks(self.model)
            forget_layers()
            self.model = self.tokenizer = self.peft_model = None
            self.switch = Switch()
            self.record = self.forward = self.memory = None  # type: ignore[assignment] # nobody uses a closed base
            self.adapters, self.plans, self.places, self._modules = {}, {}, {}, {}


def load_base(
    spec: ModelSpec, *, shared: bool = True, load_model: Callable[[ModelSpec], Any] = load_model
) -> LoadedBase:
    """Load the base of a resolved spec, in evaluation mode, frozen, on its device.

    Args:
        spec: What to load.
        shared: Whether it will serve several adapters.
        load_model: What loads the model itself.

    Raises:
        WeightsError: Its weights exist only as a pickle that the spec does not allow.
        SpecError: It is an adapter, or contains one.
    """
    tokenizer = load_tokenizer(spec, spec.base)
    model = load_model(spec)
    return LoadedBase(spec, model, tokenizer, shared=shared)


def resize_vocabulary(base: LoadedBase, rows: int) -> None:
    """Give a base, before any adapter is on it, embeddings for ``rows`` tokens; an adapter will bring their values."""
    if base.model.get_input_embeddings().weight.shape[0] == rows:
        return
    with quiet_process(), seeded(base.device):
        base.model.resize_token_embeddings(rows, mean_resizing=False)
    base.model.requires_grad_(False)
    base.take_stock()


def load_tokenizer(spec: ModelSpec, source: str) -> Any:
    """Load a tokenizer from a folder or a hub id; one without a padding token pads with its end token."""
    from transformers import AutoTokenizer

    gguf = gguf_file(spec) if source == spec.base else None
    with quiet_process():
        if gguf is not None:
            tokenizer: Any = load_gguf_tokenizer(spec, gguf)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                source,
                revision=spec.revision if source == spec.base else None,
                trust_remote_code=spec.trust_remote_code,
            )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _places(model: Any) -> Iterator[tuple[str, tuple[dict[str, Any], str]]]:
    for name, module in model.named_modules():
        for key, child in module._modules.items():
            if child is not None:
                yield (f"{name}.{key}" if name else key), (module._modules, key)


def _rewritten(model: Any) -> Iterator[int]:
    """Identities of the ``target_parameters`` of an adapter: PEFT takes them out and puts them back in each pass."""
    layers: Any = import_module("peft.tuners.lora.layer")
    for module in model.modules():
        if isinstance(module, layers.ParamWrapper):
            yield id(module.get_param())


def _remove_hooks(model: Any) -> None:
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
