"""Whether a loaded model is still what it was: a record of it, and what differs from the record."""

from __future__ import annotations

import copy
from itertools import accumulate, chain, compress
from operator import is_
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.adapter import public_name
from pytest_sway.backends.hf.sampling import by_dtype, sample_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_sway.backends.hf.adapter import Adapter

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class TensorsRecord:
    """What some parameters and buffers were like.

    Args:
        owned: For each name, the dictionary that holds the tensor, and its key there.
        kind: What a report calls them.
        rewritten: Identities of tensors whose version moves whenever the model computes.
    """

    def __init__(
        self,
        owned: Mapping[str, tuple[dict[str, Any], str]],
        kind: Mapping[str, str] | str,
        rewritten: frozenset[int] = frozenset(),
    ) -> None:
        self._names = list(owned)
        self._kinds = kind
        self._owners = list(owned.values())
        self._tensors = [container[key] for container, key in self._owners]
        self._versioned = [id(tensor) not in rewritten for tensor in self._tensors]
        self._facts = [
            _facts(tensor, versioned) for tensor, versioned in zip(self._tensors, self._versioned, strict=True)
        ]
        self._summary = self._summarise()
        self._samples = [sample_of(tensor) for tensor in self._tensors]
        self._groups = by_dtype(self._samples)
        self._content = self._contents()

    def changes(self) -> list[str]:
        """One line for each tensor that is no longer as it was."""
        present = [container.get(key) for container, key in self._owners]
        if all(map(is_, present, self._tensors)) and self._summarise() == self._summary:
            return self._content_changes()
        lines = []
        for i, (container, key) in enumerate(self._owners):
            tensor = container.get(key)
            if tensor is not self._tensors[i]:
                lines.append(self._line(i, "replaced" if tensor is not None else "removed"))
            elif (facts := _facts(tensor, self._versioned[i])) != self._facts[i]:
                lines.append(self._line(i, _differing(self._facts[i], facts)))
        return lines or self._content_changes()

    def _summarise(self) -> tuple[list[Any], ...]:
        """What `_facts` tells of all tensors, attribute by attribute, which is quicker.

        The device is left out: a tensor that moves gets other memory.
        """
        tensors = self._tensors
        return (
            [tensor.data_ptr() for tensor in tensors],
            [tensor._version for tensor in compress(tensors, self._versioned)],
            [tensor.requires_grad for tensor in tensors],
            [tensor.dtype for tensor in tensors],
        )

    def _contents(self) -> list[Any]:
        import torch

        return [torch.cat(group) for group in self._groups.values()]

    def _content_changes(self) -> list[str]:
        content = self._contents()
        if all(a.equal(b) for a, b in zip(content, self._content, strict=True)):
            return []
        lines, position = [], dict.fromkeys(range(len(content)), 0)
        groups = list(self._groups)
        for i, sample in enumerate(self._samples):
            group, start = groups.index(sample.dtype), position[groups.index(sample.dtype)]
            position[group] = end = start + sample.numel()
            if not content[group][start:end].equal(self._content[group][start:end]):
                lines.append(self._line(i, "contents changed"))
        return lines

    def _line(self, i: int, what: str) -> str:
        kind = self._kinds if isinstance(self._kinds, str) else self._kinds[self._names[i]]
        return f"{kind} {self._names[i]}: {what}"


def _facts(tensor: Any, versioned: bool) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor._version if versioned else 0, tensor.requires_grad, tensor.dtype, tensor.device)


def _differing(before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    if before[3] != now[3]:
        return f"dtype {before[3]} -> {now[3]}"
    if before[4] != now[4]:
        return f"device {before[4]} -> {now[4]}"
    if before[0] != now[0]:
        return "data replaced"
    if before[1] != now[1]:
        return "contents changed"
    return f"requires_grad {before[2]} -> {now[2]}"


class ModulesRecord:
    """What some modules were like: their children, their hooks, and whether they train."""

    def __init__(self, named_modules: Iterable[tuple[str, Any]]) -> None:
        named = list(named_modules)
        self._names = [name for name, _ in named]
        self._attributes = [module.__dict__ for _, module in named]
        self._hooks = [[attributes[name] for name in _HOOKS if name in attributes] for attributes in self._attributes]
        self._flat_hooks = list(chain.from_iterable(self._hooks))
        self._children = [attributes["_modules"] for attributes in self._attributes]
        self._before = self._summary()
        self._child_ends = list(accumulate(map(len, self._children)))

    def changes(self) -> list[str]:
        """One line for each module that is no longer as it was."""
        if self._summary() == self._before:
            return []
        lines = []
        for i, name in enumerate(self._names):
            before, now = self._detail_before(i), self._detail(i)
            label = f"module {name}" if name else "the model"
            if before[0] != now[0]:
                lines.append(f"{label}: training mode {'on' if now[0] else 'off'}")
            if before[1] != now[1]:
                lines.append(f"{label}: {now[1]} hooks, {before[1]} before")
            if before[2] != now[2]:
                lines.append(f"{label}: its forward was replaced")
            if before[3] != now[3]:
                lines.append(f"{label}: submodules replaced, added or removed")
        return lines

    def _summary(self) -> tuple[list[bool], list[int], list[bool], list[int]]:
        return (
            [attributes["training"] for attributes in self._attributes],
            [len(hooks) for hooks in self._flat_hooks],
            ["forward" in attributes for attributes in self._attributes],
            list(map(id, chain.from_iterable(map(dict.values, self._children)))),
        )

    def _detail(self, i: int) -> tuple[bool, int, bool, list[int]]:
        attributes = self._attributes[i]
        hooks = sum(len(hooks) for hooks in self._hooks[i])
        return attributes["training"], hooks, "forward" in attributes, [id(m) for m in self._children[i].values()]

    def _detail_before(self, i: int) -> tuple[bool, int, bool, list[int]]:
        training, hooks, forwards, children = self._before
        first_hook = sum(map(len, self._hooks[:i]))
        first_child = self._child_ends[i - 1] if i else 0
        own_hooks = hooks[first_hook : first_hook + len(self._hooks[i])]
        return training[i], sum(own_hooks), forwards[i], children[first_child : self._child_ends[i]]


class BaseRecord:
    """What a base was like when it was loaded, and what PEFT has put into it since by our own hand.

    What has been found changed once stays so: an adapter that comes later does not hide it.

    Args:
        model: The base model, just loaded.
        others: Identities of parameters in it that are not the base's.
        rewritten: Identities of parameters whose version moves whenever the model computes.
    """

    def __init__(
        self, model: Any, others: frozenset[int] = frozenset(), rewritten: frozenset[int] = frozenset()
    ) -> None:
        owned: dict[str, tuple[dict[str, Any], str]] = {}
        kinds: dict[str, str] = {}
        for prefix, module in model.named_modules():
            for kind, members in (("parameter", module._parameters), ("buffer", module._buffers)):
                for key, tensor in members.items():
                    if tensor is not None and id(tensor) not in others:
                        name = f"{prefix}.{key}" if prefix else key
                        owned[name], kinds[name] = (members, key), kind
        self._tensors = TensorsRecord(owned, kinds, rewritten)
        self._configs = [
            (name, config, copy.deepcopy(vars(config)))
            for name in ("config", "generation_config")
            if (config := getattr(model, name, None)) is not None
        ]
        self._skeleton = list(model.named_modules())
        self._modules = ModulesRecord(self._skeleton)
        self._forwards: dict[Any, Any] = {type(module): type(module).forward for _, module in self._skeleton}
        self._added: list[tuple[str, Any]] = []
        self._peft_model: Any = None
        self._adapters: frozenset[str] = frozenset()
        self._found: list[str] = []

    def refresh(self, peft_model: Any, adapters: Iterable[str], added: list[tuple[str, Any]]) -> None:
        """Take note of adapters that were put on or taken off by our own hand.

        Args:
            peft_model: The ``PeftModel`` around the model; ``None`` when there is none.
            adapters: The names of the adapters that are on it.
            added: By name, the modules that PEFT has put into the model and that stay when an adapter goes.
        """
        self._peft_model = peft_model
        self._adapters = frozenset(adapters)
        if [id(module) for _, module in self._added] != [id(module) for _, module in added]:
            self._modules = ModulesRecord([*self._skeleton, *added])
        self._added = added

    def note(self) -> list[str]:
        """Return what has changed, and remember it."""
        if not self._found:
            self._found = [*self._adapter_changes(), *self._modules.changes(), *self._tensors.changes()]
            self._found += self._config_changes()
        return self._found

    def intact(self) -> bool:
        """Whether all is as it was; unlike `note`, it remembers nothing of what a test may yet put back."""
        return (
            not self._found
            and all(kind.forward is forward for kind, forward in self._forwards.items())
            and not (self._adapter_changes() or self._modules.changes())
            and not (self._tensors.changes() or self._config_changes())
        )

    def _config_changes(self) -> list[str]:
        lines = []
        for name, config, before in self._configs:
            if vars(config) != before:
                names = {*vars(config), *before}
                changed = sorted(key for key in names if vars(config).get(key) != before.get(key))
                lines.append(f"{name}: {', '.join(changed)} changed")
        return lines

    def _adapter_changes(self) -> list[str]:
        if self._peft_model is None:
            return []
        known = set(self._peft_model.peft_config)
        lines = [f"adapter {name!r}: added" for name in sorted(known - self._adapters)]
        if removed := len(self._adapters - known):
            lines.append(f"adapters: {removed} removed")
        merged = [name for name, module in self._added if module.__dict__.get("merged_adapters")]
        return lines + [f"module {name}: adapter merged into its weights" for name in merged]


class AdapterRecord:
    """What an adapter's own weights and modules were like.

    Args:
        adapter: The adapter, just put on.
    """

    def __init__(self, adapter: Adapter) -> None:
        owned = {public_name(name, adapter.name): owner for name, owner in adapter.owners.items()}
        self._tensors = TensorsRecord(owned, "adapter parameter")
        self._modules = ModulesRecord((public_name(name, adapter.name), module) for name, module in adapter.modules)
        self._scalings = [(scaling, adapter.name, scaling[adapter.name]) for scaling in adapter.scalings]

    def changes(self) -> list[str]:
        """One line for each thing of the adapter that is no longer as it was."""
        scaled = sum(scaling.get(name) != before for scaling, name, before in self._scalings)
        lines = [f"adapter: scaling changed in {scaled} layers"] if scaled else []
        return [*lines, *self._tensors.changes(), *self._modules.changes()]


class TokenizerRecord:
    """What a tokenizer's settings were.

    Attributes:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._before = _settings(tokenizer)

    def changes(self) -> list[str]:
        """One line for each setting that is no longer as it was."""
        now = _settings(self.tokenizer)
        return [
            f"tokenizer: {name} {_short(before)} -> {_short(now[name])}"
            for name, before in self._before.items()
            if now[name] != before
        ]


def _settings(tokenizer: Any) -> dict[str, Any]:
    return {
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "length": len(tokenizer),
        "chat_template": tokenizer.chat_template,
        "model_max_length": tokenizer.model_max_length,
        "add_bos_token": getattr(tokenizer, "add_bos_token", None),
        "add_eos_token": getattr(tokenizer, "add_eos_token", None),
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def summarised(lines: list[str], limit: int = 10) -> list[str]:
    """Return at most ``limit`` lines, and how many more there are."""
    return lines if len(lines) <= limit else [*lines[:limit], f"and {len(lines) - limit} more"]
