"""Does an adapter change what its base computes? The models themselves are asked, where weights alone cannot tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.libraries import no_warnings
from pytest_sway.backends.hf.verification import without_effect

if TYPE_CHECKING:
    from pytest_sway.backends.hf.adapter import Adapter
    from pytest_sway.backends.hf.sides import Side

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_TOKENS: Final = 16
_ROWS: Final = 4096
_ROUNDING: Final = 2.0**-17
"""What float32 leaves uncertain of logits, as a part of the largest. Untrained PiSSA, OLoRA, HRA, DEFT, OSF and FRoD,
whose zero is a difference of large numbers, come to at most 1.4e-6 on SmolLM2-135M and on tiny models; one step of
training at a rate of 1e-5 comes to 2.7e-5 at least."""


def verify_effect(base: Side, tuned: Side, adapter: Adapter) -> None:
    """Raise unless the tuned side computes other logits than the base, for tokens from all over the vocabulary.

    In half precision only equal logits count as the same: rounding is as large there as what little training does.

    Args:
        base: The base.
        tuned: The same with the adapter.
        adapter: The adapter, on a base of its own.

    Raises:
        AdapterMismatchError: They compute the same.
    """
    ids = _probe(base, adapter)
    plain, changed = _logits(base, ids), _logits(tuned, ids)
    if plain.shape == changed.shape and _same(plain, changed) and not _embeds_otherwise(base, tuned):
        why = f"for {len(ids)} tokens from all over the vocabulary the logits stay the same"
        raise without_effect(base.base.spec, adapter.files, why)


def _probe(base: Side, adapter: Adapter) -> list[int]:
    """Tokens spread over the vocabulary, after those without which an adapter of the kind aLoRA sleeps."""
    words = base.base.model.get_input_embeddings().weight.shape[0]
    return [*(adapter.files.config.get("alora_invocation_tokens") or ()), *range(0, words, max(1, words // _TOKENS))]


def _logits(side: Side, ids: list[int]) -> Any:
    import torch

    base = side.base
    with base.lock, no_warnings(), base.switch.bound(side.state), torch.inference_mode():
        return torch.stack(base.forward.logits(side.runner, [(ids, len(ids))], lambda logits, *_: logits))


def _same(plain: Any, changed: Any) -> bool:
    import torch

    if plain.dtype != torch.float32 or changed.dtype != torch.float32:
        return bool(plain.equal(changed))
    return bool((plain - changed).abs().max() <= plain.abs().max() * _ROUNDING)


def _embeds_otherwise(base: Side, tuned: Side) -> bool:
    """Whether any token is embedded otherwise: most are in no probe."""
    import torch

    words = base.base.model.get_input_embeddings().weight.shape[0]
    for start in range(0, words, _ROWS):
        ids = torch.arange(start, min(start + _ROWS, words), device=base.base.device)
        if not _embedded(base, ids).equal(_embedded(tuned, ids)):
            return True
    return False


def _embedded(side: Side, ids: Any) -> Any:
    import torch

    base = side.base
    with base.lock, no_warnings(), base.switch.bound(side.state), torch.inference_mode():
        return base.model.get_input_embeddings()(ids)
