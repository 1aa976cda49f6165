"""`Engine`: computes a view's answers, while its model is in the view's state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.peft_adapter import public_name
from pytest_sway.backends.hf.hygiene.finite import not_finite
from pytest_sway.backends.text import tokens as tokenisation
from pytest_sway.backends.text.tokens import Ids
from pytest_sway.errors import ScoringError
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from pytest_sway.backends.hf.scoring.forward import Forward


__tracebackhide__ = True

_NUMBERS: Final = 4
"""The most numbers that an error names."""


Recall = Callable[[tuple[Any, ...], Callable[[], list[Any]]], list[Any]]
"""``recall(question, compute)`` returns the answers to ``question``, from the cache or from ``compute()``."""


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """Computes a view's answers, while its model is in the view's state.

    Attributes:
        model: The model, or the ``PeftModel`` around it.
        tokenizer: The view's tokenizer.
        forward: The model's forward passes.
        recall: Returns cached answers; ``None`` if the model is not an unchanged base.
    """

    model: Any
    tokenizer: Any
    forward: Forward
    recall: Recall | None = None

    @property
    def max_length(self) -> int:
        """The most tokens of a text that the model reads at once, besides an adapter's virtual tokens.

        Raises:
            ScoringError: The virtual tokens leave no room for a text.
        """
        positions, virtual = (
            tokenisation.max_length_of(self.forward.config, self.tokenizer),
            self.forward.virtual_tokens,
        )
        if self.forward.positions is not None:
            positions = min(positions, self.forward.positions)
        if positions <= virtual:
            raise ScoringError(
                f"the adapter's {virtual} virtual tokens leave no room for a text: the model reads at most {positions}"
                " tokens at once."
            )
        return positions - virtual

    def require_known(self, ids: Ids) -> None:
        """Raise `ScoringError` if the model has no embedding for a token."""
        tokenisation.require_known(self.tokenizer, ids, self.forward.embedded)


def no_number(engine: Engine) -> ScoringError:
    """Return the error for an answer that is NaN, with its cause."""
    tensors = dict(engine.model.named_parameters())
    broken = not_finite(tensors)
    if broken:
        return ScoringError(
            f"the model computes NaN: {len(broken)} of its {len(tensors)} weights have NaN or infinite values"
            f" ({some(map(public_name, broken))}). Training diverged, or a file is damaged."
        )
    return ScoringError(
        "the model computes NaN, though all of its weights are finite: an intermediate result is too large for"
        f" {engine.forward.model.dtype}. Try dtype='fp32'; if that does not help, its weights or an adapter's scaling"
        f" are far too large, or a number in its config.json is wrong{_numbers(engine.forward.config)}."
    )


def _numbers(config: Any) -> str:
    """Return, in brackets, the floats in a model's config that are farthest from 1."""
    fields = config.to_dict()
    parts = [fields, *(value for value in fields.values() if isinstance(value, dict))]
    found = {name: value for part in parts for name, value in part.items() if isinstance(value, float) and value}
    far = sorted(found, key=lambda name: -abs(math.log(found[name])) if found[name] > 0 else -math.inf)
    named = ", ".join(f"{name} = {found[name]:g}" for name in far[:_NUMBERS])
    return f" (that of {config.name_or_path!r} has {named})" if named else ""
