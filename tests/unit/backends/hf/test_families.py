"""Families of architectures: trees compute the plain model's numbers in any thread, and share its memory."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.backends.hf.sharing.mapped_files import MappedFiles
from pytest_sway.backends.hf.sharing.tensor_memory import address_of
from pytest_sway.backends.hf.sharing.trees import shares_objects, tensors_of
from pytest_sway.errors import SpecError
from tests.tiny import quiet, save_noise
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.families import LEFT_OUT, NOT_CAUSAL, families, make_family, targets_of
from tests.unit.backends.hf.insides import WAIT, base_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_sway.backends.hf.backend import HFBackend
    from pytest_sway.backends.hf.model.pristine import Pristine

TEXTS = ((5, 17, 30, 8, 44, 61, 12, 9, 23, 33, 3, 50), (9, 6))
"""Token ids, since some families replace the tokenizer by one of their own class, which does not know its words."""
SMALL_BUFFER = 2**16


@dataclass
class Family:
    """A tiny model of one family.

    Attributes:
        name: The family's name.
        folder: The folder of the model.
        plain: The model from transformers, frozen, since torch multiplies in another order if gradients are needed.
        expected: Its logits for each of `TEXTS`.
        backend: The model from pytest-sway.
        contents: A copy of its parameters and buffers after the load.
    """

    name: str
    folder: Path
    plain: Any
    expected: list[Any]
    backend: HFBackend
    contents: dict[str, Any]

    @property
    def pristine(self) -> Pristine:
        return base_in(self.backend).pristine


@pytest.fixture(scope="module")
def module_builder() -> HFBuilder:
    return HFBuilder()


@pytest.fixture(scope="module", params=families())
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, module_builder: HFBuilder
) -> Iterator[Family]:
    folder = make_family(tmp_path_factory.mktemp("family"), request.param)
    model_class: Any = transformers.AutoModelForCausalLM
    with quiet():
        plain = model_class.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    backend = module_builder(spec_of(folder))
    contents = {name: tensor.clone() for name, tensor in base_in(backend).tensors().items()}
    gc.freeze()  # saves time in the garbage collection of each close
    yield Family(request.param, folder, plain, [_logits(plain, text) for text in TEXTS], backend, contents)
    backend.close()
    gc.unfreeze()


def _logits(model: Any, text: tuple[int, ...] = TEXTS[0]) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([text])).logits


def _place(tensor: Any, files: MappedFiles) -> object:
    """Return a key that is equal for tensors that share memory: an address, or a part of a file."""
    address = address_of(tensor)
    return files.part_of(address, tensor.untyped_storage().nbytes()) or address


def test_trees_compute_as_the_plain_model(family: Family) -> None:
    assert family.pristine.shares
    for tree in (family.pristine.tree(), family.pristine.tree()):
        assert not shares_objects(tree, family.pristine.model)
        for text, expected in zip(TEXTS, family.expected, strict=True):
            assert not expected.isnan().any()
            assert _logits(tree, text).equal(expected)


def test_trees_in_threads_compute_as_in_turn(family: Family) -> None:
    trees = family.pristine.tree(), family.pristine.tree()
    start, found = threading.Barrier(len(trees)), dict[tuple[int, int], Any]()

    def compute(i: int) -> None:
        start.wait(WAIT)
        for turn in range(4):
            found[i, turn] = _logits(trees[i], TEXTS[(i + turn) % 2])

    threads = [threading.Thread(target=compute, args=(i,)) for i in range(len(trees))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert len(found) == 8
    assert all(logits.equal(family.expected[(i + turn) % 2]) for (i, turn), logits in found.items())


def test_a_tree_takes_no_memory_but_for_small_buffers(family: Family) -> None:
    tree, model = family.pristine.tree(), family.pristine.model
    buffers, files = {id(buffer) for buffer in model.buffers()}, MappedFiles()
    for original, tensor in zip(tensors_of(model), tensors_of(tree), strict=True):
        if _place(original, files) != _place(tensor, files):
            assert id(original) in buffers
            assert tensor.nbytes <= SMALL_BUFFER


def test_an_adapter_computes_as_peft_does_and_the_base_as_without_it(
    family: Family, module_builder: HFBuilder, tmp_path: Path
) -> None:
    adapter, expected = _adapter(family, tmp_path)
    assert not expected.equal(family.expected[0])
    backend = module_builder(spec_of(family.folder, adapter))
    with backend.as_finetuned() as tuned, backend.as_base() as base:
        assert _logits(tuned.model).equal(expected)
        assert _logits(base.model).equal(family.expected[0])
    assert backend.changes() == []
    backend.close()
    assert backend.leak() is None


def _adapter(family: Family, folder: Path) -> tuple[Path, Any]:
    """Save a LoRA adapter of noise; return its folder, and PEFT's logits with it."""
    from peft import LoraConfig, PeftModel

    config = LoraConfig(r=2, target_modules=targets_of(family.name), task_type="CAUSAL_LM")
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        plain = save_noise(lambda: family.plain, config, folder).unload()
        loaded: Any = PeftModel.from_pretrained(plain, str(folder))
        expected = _logits(loaded.eval())
        loaded.unload()
    return folder, expected


def test_all_that_was_done_left_the_pristine_model_as_it_was(family: Family) -> None:
    now = base_in(family.backend).tensors()
    assert now.keys() == family.contents.keys()
    assert all(_bits(now[name]).equal(_bits(before)) for name, before in family.contents.items())
    assert family.backend.changes() == []


def _bits(tensor: Any) -> Any:
    return tensor.detach().reshape(-1).view(torch.uint8)


def test_the_table_has_most_families_that_transformers_has() -> None:
    assert len(families()) >= 88
    assert len(LEFT_OUT) < len(families()) / 5


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_family_whose_tokens_see_later_ones_is_refused(build: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="is not a causal language model"):
        build(make_family(tmp_path, name))
