"""A Llama's forward pass, written by hand for speed on a CPU, as a reference for `next_token_dists`.

It frees tensors as soon as possible, works in place where it can, and computes only the needed positions in the last
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn import functional


def last_logits(model: Any, batch: Sequence[Sequence[int]]) -> Any:
    """Return the logits after each sequence, shape ``(sequences, vocabulary)``.

    Args:
        model: A ``LlamaForCausalLM`` without biases, whose rotary embeddings are not scaled.
        batch: Token ids of each.
    """
    config, body = model.config, model.model
    size = config.hidden_size // config.num_attention_heads
    edges = [*accumulate(map(len, batch), initial=0)]
    angles = torch.cat([torch.arange(len(ids)) for ids in batch])[:, None] * body.rotary_emb.inv_freq
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    states = functional.embedding(torch.tensor([token for ids in batch for token in ids]), body.embed_tokens.weight)
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        normed = _normed(states, layer.input_layernorm)
        query, key, value = (
            functional.linear(normed, module.weight).view(len(normed), -1, size)
            for module in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attended = _attended(_turned(query, cos, sin), _turned(key, cos, sin), value, edges)
        if layer is body.layers[-1]:
            last = torch.tensor([end - 1 for end in edges[1:]])
            states, attended = states[last], attended[last]
        states += functional.linear(attended, attention.o_proj.weight)
        normed = _normed(states, layer.post_attention_layernorm)
        gated = functional.silu(functional.linear(normed, mlp.gate_proj.weight), inplace=True)
        states += functional.linear(gated.mul_(functional.linear(normed, mlp.up_proj.weight)), mlp.down_proj.weight)
    return functional.linear(_normed(states, body.norm), model.lm_head.weight)


def _normed(states: Any, norm: Any) -> Any:
    squares = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_().div_(states.shape[-1])
    return (states * squares.add_(norm.variance_epsilon).rsqrt_()).mul_(norm.weight)


def _turned(heads: Any, cos: Any, sin: Any) -> Any:
    turned = torch.empty_like(heads)
    (one, other), (first, second) = heads.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(one, cos, out=first).addcmul_(other, sin, value=-1)
    torch.mul(other, cos, out=second).addcmul_(one, sin)
    return turned


def _attended(query: Any, key: Any, value: Any, edges: Sequence[int]) -> Any:
    attended = torch.empty_like(query)
    for start, end in pairwise(edges):
        one, other, third = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        output = functional.scaled_dot_product_attention(one, other, third, is_causal=True, enable_gqa=True)
        attended[start:end] = output[0].transpose(0, 1)
    return attended.flatten(1)
