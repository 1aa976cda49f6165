"""Tests' changes to their own models end with them; a change of a shared part is blamed on the right test."""

from __future__ import annotations

from pathlib import Path

import pytest

SUITE = """
import pytest

SPEC = {{"base": {base!r}, "adapter": {adapter!r}}}
PROMPT, ANSWER = "The capital of France is", " Paris"
CLEAN = []


def score(backend):
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        return base.logprob_of(PROMPT, ANSWER), tuned.logprob_of(PROMPT, ANSWER)


def scales_in_place(view):
    view.model.get_base_model().model.layers[7].mlp.up_proj.weight.data.mul_(1.5)

def steps_an_optimizer(view):
    import torch
    weight = view.model.get_base_model().model.norm.weight
    weight.requires_grad_(True)
    ids = view.tokenizer(PROMPT, return_tensors="pt").input_ids
    view.model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD([weight], lr=1e-3).step()
    weight.requires_grad_(False)
    weight.grad = None

def merges(view):
    view.model.merge_adapter()

def adds_an_adapter(view):
    from peft import LoraConfig
    view.model.add_adapter("mine", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

def resizes(view):
    view.model.get_base_model().resize_token_embeddings(49200)

def trains(view):
    view.model.train()

def hooks(view):
    view.model.get_base_model().model.layers[3].register_forward_hook(lambda *args: None)

def halves(view):
    view.model.half()

def pads_left(view):
    side = view.tokenizer.padding_side
    view.tokenizer.padding_side = "left" if side == "right" else "right"

def adds_a_token(view):
    view.tokenizer.add_tokens(["<mine>"])


MUTATIONS = [scales_in_place, steps_an_optimizer, merges, adds_an_adapter, resizes, trains, hooks, halves, pads_left,
             adds_a_token]


def test_clean(sway_backend):
    CLEAN.append(score(sway_backend(SPEC)))

@pytest.mark.parametrize("turn", range(2 * len(MUTATIONS)))
def test_turn(sway_backend, turn):
    backend = sway_backend(SPEC)
    if turn % 2:
        assert score(backend) == CLEAN[0]
        return
    with backend.as_finetuned() as view:
        MUTATIONS[turn // 2](view)
"""


@pytest.mark.filterwarnings("ignore")
def test_it_ends_with_the_test_and_only_what_is_shared_is_blamed(
    pytester: pytest.Pytester, base: Path, adapters: list[Path]
) -> None:
    pytester.makepyfile(SUITE.format(base=str(base), adapter=str(adapters[0])))
    result = pytester.runpytest_inprocess("-W", "ignore")
    result.assert_outcomes(passed=21, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_turn?18?*", "*tokenizer: its added tokens changed"])
    result.stdout.no_fnmatch_line("*leaked:*")
