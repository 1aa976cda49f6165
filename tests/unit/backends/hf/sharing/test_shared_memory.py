"""The memory of trees: lazy clones, mapped files, or exposed memory; a write stays in its tree."""

from __future__ import annotations

import copy
import ctypes
import os
import sys
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pytest_sway.backends.hf.sharing import tensor_memory
from pytest_sway.backends.hf.sharing.mapped_files import FilePart, never_written, page_flags
from pytest_sway.backends.hf.sharing.shared_memory import SharedMemory
from pytest_sway.backends.hf.sharing.tensor_memory import Method, address_of, way_of
from pytest_sway.backends.hf.sharing.trees import tensors_of
from tests.tiny import TEXT, make_adapter, make_base, quiet
from tests.unit.backends.hf.insides import adapter_in, base_in, computing_model, engine_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
PAGE = 4096


def _memory(tensor: Any) -> tuple[int, int]:
    return address_of(tensor), tensor.untyped_storage().nbytes()


def _model() -> Any:
    """Return a model with layers of a few pages, one of them used twice, and small and large buffers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    model[2].weight = model[0].weight
    model.register_buffer("small", torch.ones(5))
    model.register_buffer("large", torch.ones(2**15))
    return model.requires_grad_(False).eval()


def _mapped(model: Any, path: Path) -> Any:
    """Move a model's weights to a privately mapped file, each on pages of its own."""
    tensors = {id(tensor): tensor for tensor in tensors_of(model) if tensor.nbytes >= 256}
    places, content = {}, bytearray()
    for key, tensor in tensors.items():
        places[key] = len(content)
        content += tensor.numpy().tobytes()
        content += bytes(-len(content) % PAGE)
    path.write_bytes(content)
    storage_class: Any = torch.UntypedStorage
    storage = storage_class.from_file(str(path), shared=False, nbytes=len(content))
    for key, tensor in tensors.items():
        part = storage[places[key] : places[key] + tensor.nbytes]
        tensor.data = torch.empty(0, dtype=tensor.dtype).set_(part, 0, tensor.shape, tensor.stride())
    return model


@pytest.fixture(params=["lazy clones", pytest.param("a mapped file", marks=LINUX)])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return _model() if request.param == "lazy clones" else _mapped(_model(), tmp_path / "weights")


def _state(model: Any) -> dict[str, list[Any]]:
    return {name: tensor.detach().clone().tolist() for name, tensor in model.state_dict().items()}


def _in_place(tensor: Any) -> None:
    with torch.no_grad():
        tensor.add_(1)


def _out(tensor: Any) -> None:
    with torch.no_grad():
        torch.add(tensor, 1, out=tensor)


def _one_element(tensor: Any) -> None:
    with torch.no_grad():
        tensor[3, 5] = 9.0


def _step(tensor: Any) -> None:
    tensor.requires_grad_(True)
    tensor.grad = torch.ones_like(tensor)
    torch.optim.AdamW([tensor], lr=0.1).step()
    tensor.requires_grad_(False)


def _by_address(tensor: Any) -> None:
    ctypes.memset(tensor.data_ptr(), 0, 256)


def _through_storage(tensor: Any) -> None:
    tensor.untyped_storage()[0] = 77


def _through_numpy(tensor: Any) -> None:
    tensor.detach().numpy()[1] = 7.0


def _by_dlpack(tensor: Any) -> None:
    from_dlpack: Any = import_module("torch.utils.dlpack").from_dlpack
    from_dlpack(tensor.detach().__dlpack__())[1] = 7.0


def _across_processes(tensor: Any) -> None:
    tensor.share_memory_()
    tensor.data.fill_(3.0)


WRITES: dict[str, Callable[[Any], object]] = {
    "in place": _in_place,
    "with out=": _out,
    "one element": _one_element,
    "through .data": lambda tensor: tensor.data.mul_(2),
    "through a view": lambda tensor: tensor.data.view(-1)[7:9].zero_(),
    "through numpy": _through_numpy,
    "through the storage": _through_storage,
    "the whole storage": lambda tensor: tensor.untyped_storage().fill_(7),
    "by its address": _by_address,
    "by DLPack": _by_dlpack,
    "by an optimizer": _step,
    "by an initialisation": nn.init.zeros_,
    "in memory of several processes": _across_processes,
    "by new data": lambda tensor: setattr(tensor, "data", tensor.data * 2),
    "by a copy": lambda tensor: tensor.data.copy_(torch.zeros(64, 64)),
}


def test_a_tree_has_the_models_contents_and_no_copy_of_its_memory(model: Any) -> None:
    memory = SharedMemory(model)
    tree = memory.tree()
    assert _state(tree) == _state(model)
    assert memory.exposed == {}
    ways = {name: memory._ways[id(tensor)] for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert ways.pop("small") is Method.COPIED
    assert len({isinstance(way, FilePart) for way in ways.values()}) == 1
    assert all(isinstance(way, FilePart) or way is Method.LAZY_CLONE for way in ways.values())
    assert tree[0].weight is tree[2].weight
    assert not any(parameter.requires_grad for parameter in tree.parameters())


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_stays_in_its_tree(model: Any, write: str, tmp_path: Path) -> None:
    memory, before, files = SharedMemory(model), _state(model), _files(tmp_path)
    first, second = memory.tree(), memory.tree()
    WRITES[write](first[0].weight)
    assert _state(first) != before
    assert _state(second) == before
    assert _state(model) == before
    assert _state(memory.tree()) == before
    assert _files(tmp_path) == files


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_to_one_place_of_a_tied_tensor_is_in_the_other(model: Any, write: str) -> None:
    tree = SharedMemory(model).tree()
    WRITES[write](tree[2].weight)
    assert tree[0].weight.equal(tree[2].weight)
    assert not tree[0].weight.equal(model[0].weight)


def test_a_write_to_the_original_does_not_reach_a_tree(model: Any) -> None:
    tree, before = SharedMemory(model).tree(), _state(model)
    model[0].weight.data.mul_(2)
    model.small.mul_(2)
    assert _state(model) != before
    assert _state(tree) == before


def test_buffers_are_a_trees_own(model: Any) -> None:
    memory = SharedMemory(model)
    first, second = memory.tree(), memory.tree()
    first.small.mul_(2)
    first.large.mul_(2)
    assert second.small.tolist() == model.small.tolist() == [1.0] * 5
    assert second.large.equal(model.large)


def test_tensors_that_are_views_of_one_storage_are_so_in_a_tree() -> None:
    whole = torch.arange(4096.0)
    model = nn.Module()
    model.first = nn.Parameter(whole[:2048].view(32, 64), requires_grad=False)
    model.second = nn.Parameter(whole[1024:3072].view(32, 64).t(), requires_grad=False)
    tree = SharedMemory(model).tree()
    assert tree.first.untyped_storage()._cdata == tree.second.untyped_storage()._cdata
    assert (tree.second.stride(), tree.second.storage_offset()) == ((1, 64), 1024)
    tree.first.data[16:] = -1.0
    assert tree.second.equal(torch.cat([torch.full((1024,), -1.0), torch.arange(2048.0, 3072.0)]).view(32, 64).t())
    assert model.second.equal(torch.arange(1024.0, 3072.0).view(32, 64).t())


def test_attributes_of_a_parameter_go_along() -> None:
    model = _model()
    model[0].weight.role = "first"
    assert SharedMemory(model).tree()[0].weight.role == "first"


def test_a_tree_made_in_inference_mode_is_like_any_other() -> None:
    memory = SharedMemory(_model())
    with torch.inference_mode():
        tree = memory.tree()
    assert not any(tensor.is_inference() for tensor in tensors_of(tree))
    assert tree[0].weight.requires_grad_(True).requires_grad


# --- mapped files -----------------------------------------------------------------------------------------------------


@LINUX
def test_a_mapped_file_that_was_replaced_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    model = _mapped(_model(), path)
    memory, before = SharedMemory(model), _state(model)
    assert isinstance(memory._ways[id(model[0].weight)], FilePart)
    (tmp_path / "other").write_bytes(bytes(path.stat().st_size))
    os.replace(tmp_path / "other", path)
    assert _state(memory.tree()) == before
    path.unlink()
    tree = memory.tree()
    assert _state(tree) == before
    tree[0].weight.data.mul_(2)
    assert _state(memory.tree()) == before


@LINUX
@pytest.mark.parametrize("gone", [True, False], ids=["deleted", "replaced"])
def test_a_mapped_file_replaced_before_sharing_is_moved_to_memory(tmp_path: Path, gone: bool) -> None:
    path = tmp_path / "weights"
    model = _mapped(_model(), path)
    before = _state(model)
    (tmp_path / "other").write_bytes(bytes(path.stat().st_size))
    path.unlink() if gone else os.replace(tmp_path / "other", path)
    memory = SharedMemory(model)
    assert memory._ways[id(model[0].weight)] is Method.LAZY_CLONE
    first, second = memory.tree(), memory.tree()
    first[0].weight.data.mul_(2)
    assert _state(first) != before
    assert _state(second) == _state(model) == before


@LINUX
def _resident_pages(tensor: Any) -> int:
    """Return the number of a tensor's pages in this process's memory."""
    start, nbytes = address_of(tensor) // PAGE, tensor.nbytes // PAGE
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        told = memoryview(os.pread(pagemap.fileno(), 8 * nbytes, 8 * start)).cast("Q")
    return sum(page >> 63 for page in told)


@LINUX
def test_what_reading_a_file_has_brought_into_memory_goes_when_trees_are_to_be_made_of_it(tmp_path: Path) -> None:
    model, plain = _mapped(_model(), tmp_path / "weights"), _model()
    assert torch.equal(model[1].weight, plain[1].weight)  # reads each page
    assert _resident_pages(model[1].weight) == 4
    SharedMemory(model)
    assert _resident_pages(model[1].weight) == 0
    assert torch.equal(model[1].weight, plain[1].weight)


@LINUX
def test_another_mapping_of_the_file_keeps_its_pages(tmp_path: Path) -> None:
    model = _mapped(_model(), tmp_path / "weights")
    runs = SharedMemory(model).tree(to_run=True)
    runs(torch.ones(1, 64))
    before = _resident_pages(runs[1].weight)
    storage_class: Any = torch.UntypedStorage
    size = (tmp_path / "weights").stat().st_size
    again = storage_class.from_file(str(tmp_path / "weights"), shared=False, nbytes=size)
    other = nn.Linear(64, 64, bias=False).requires_grad_(False)
    other.weight.data = torch.empty(0).set_(again, 0, (64, 64), (64, 1))
    assert other.weight.isfinite().all()  # reads each page
    SharedMemory(other)
    assert _resident_pages(other.weight) == 0
    assert _resident_pages(runs[1].weight) == before == 4


@LINUX
def test_what_was_written_to_a_mapped_file_before_trees_are_made_of_it_stays(tmp_path: Path) -> None:
    model = _mapped(_model(), tmp_path / "weights")
    model[1].weight[0, 0] = 7.0
    tree = SharedMemory(model).tree()
    assert model[1].weight[0, 0] == 7.0
    assert tree[1].weight[0, 0] == 7.0
    assert torch.equal(tree[0].weight, _model()[0].weight)


def test_a_file_is_closed_with_the_last_that_needs_it(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    model = _mapped(_model(), path)
    memory = SharedMemory(model)
    tree = memory.tree()

    def opened() -> int:
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return sum(os.path.realpath(link) == str(path.resolve()) for link in links)

    assert opened() == 1
    del memory
    assert opened() == 0
    assert _state(tree) == _state(model)


# --- what was written, and what was not -------------------------------------------------------------------------------


def _shared_names(tree: Any, ways: dict[int, Any]) -> set[str]:
    named = (*tree.named_parameters(), *tree.named_buffers())
    return {name for name, tensor in named if id(tensor) in ways}


ALL = {"0.weight", "0.bias", "1.weight", "1.bias", "small", "large"}


@pytest.mark.parametrize("write", WRITES)
def test_what_was_written_to_is_settled_as_a_trees_own_and_all_else_shared(model: Any, write: str) -> None:
    memory, known = SharedMemory(model), dict[int, Any]()
    tree = memory.tree(known, isolated=True)
    WRITES[write](tree[1].weight)
    tree.small.add_(1)
    written = tree[1].weight.detach().clone()
    ways = memory.settle(tree, known)
    assert _shared_names(tree, ways) == ALL - {"1.weight", "small"}
    assert tree[1].weight.equal(written)
    assert tree[0].weight is tree[2].weight
    expected = _state(model) | {"1.weight": written.tolist(), "small": [2.0] * 5}
    assert _state(tree) == expected


def test_a_tree_that_nobody_wrote_to_is_settled_as_shared(model: Any) -> None:
    memory, known = SharedMemory(model), dict[int, Any]()
    tree = memory.tree(known, isolated=True)
    assert _shared_names(tree, memory.settle(tree, known)) == ALL


def test_what_was_written_with_the_same_contents_shares_its_memory_again(model: Any) -> None:
    memory, known = SharedMemory(model), dict[int, Any]()
    tree = memory.tree(known, isolated=True)
    tree[1].weight.data.mul_(2)
    tree[1].weight.data.div_(2)
    ways = memory.settle(tree, known)
    assert _shared_names(tree, ways) == ALL
    assert _state(tree) == _state(model)
    if ways[id(tree[1].weight)] is Method.LAZY_CLONE:
        assert address_of(tree[1].weight) == address_of(model[1].weight)


def test_a_parameter_that_was_replaced_is_the_trees_own(model: Any) -> None:
    memory, known = SharedMemory(model), dict[int, Any]()
    tree = memory.tree(known, isolated=True)
    tree[1].weight = nn.Parameter(torch.zeros(9, 64))
    assert _shared_names(tree, memory.settle(tree, known)) == ALL - {"1.weight"}
    assert tree[1].weight.shape == (9, 64)


def test_trees_of_a_settled_tree_are_isolated_too(model: Any) -> None:
    memory, known = SharedMemory(model), dict[int, Any]()
    tree = memory.tree(known, isolated=True)
    tree[1].weight.data.mul_(2)
    again = SharedMemory(tree, memory.settle(tree, known))
    before = _state(tree), _state(model)
    first, second = again.tree(), again.tree()
    assert _state(first) == before[0]
    for parameter in first.parameters():
        parameter.data.fill_(7)
    assert (_state(second), _state(model)) == before


# --- exposed memory ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("exposed")
def test_trees_of_exposed_memory_see_what_is_written_but_for_small_buffers() -> None:
    model = _model()
    memory = SharedMemory(model)
    assert memory.exposed.keys() == ALL - {"small"}
    first, second = memory.tree(), memory.tree()
    assert first[0].weight is not second[0].weight
    first[0].weight.data.fill_(7)
    first.small.fill_(7)
    assert bool((second[0].weight == 7).all())
    assert second.small.tolist() == [1.0] * 5


@pytest.mark.usefixtures("exposed")
@pytest.mark.parametrize("write", WRITES)
def test_an_isolated_tree_of_exposed_memory_keeps_what_is_written(write: str) -> None:
    model = _model()
    memory, known, before = SharedMemory(model), dict[int, Any](), _state(model)
    tree = memory.tree(known, isolated=True)
    WRITES[write](tree[1].weight)
    assert _state(model) == before
    ways = memory.settle(tree, known)
    assert _shared_names(tree, ways) == ALL - {"1.weight"}
    assert address_of(tree[0].weight) == address_of(model[0].weight)


class Quantized(nn.Parameter):
    """A parameter of its own class, like bitsandbytes' weights, with additional attributes that it copies with it."""

    quant_state: Any
    module: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Quantized:
        made: Any = torch.Tensor._make_subclass(Quantized, self.data.clone(), False)
        vars(made).update(vars(self))
        made.quant_state = copy.deepcopy(self.quant_state)
        result: Quantized = made
        return result


class _QuantState:
    def __init__(self) -> None:
        self.absmax = torch.ones(3)
        self.code = self.offset = self.state2 = None


def test_a_tensor_of_a_class_of_its_own_is_exposed_and_keeps_its_class() -> None:
    model = _model()
    weight: Any = torch.Tensor._make_subclass(Quantized, torch.ones(64, 64), False)
    weight.quant_state = _QuantState()
    model[1].weight = weight
    memory = SharedMemory(model)
    assert memory.exposed.keys() == {"1.weight"}
    tree = memory.tree()
    assert type(tree[1].weight) is Quantized
    assert tree[1].weight is not weight
    assert tree[1].weight.quant_state is not weight.quant_state
    assert tree[1].weight.quant_state.absmax is weight.quant_state.absmax
    tree[1].weight.quant_state.absmax = None
    assert weight.quant_state.absmax is not None


@pytest.fixture
def quantized() -> Any:
    """A model whose weight and module refer to each other and to one state, like bitsandbytes'."""
    model: Any = _model()
    model[1].weight = weight = torch.Tensor._make_subclass(Quantized, torch.ones(64, 64), False)
    weight.quant_state = model[1].quant_state = _QuantState()
    weight.quant_state.state2 = _QuantState()
    weight.module = model[1]
    return model


def _is_closed(tree: Any, of: Any) -> bool:
    """Whether a tree's quantized weight and module refer to each other, and share only tensors with another tree's."""
    state, others = tree[1].quant_state, of[1].quant_state
    return (
        tree[1].weight.module is tree[1]
        and tree[1].weight.quant_state is state
        and (state is not others and state.state2 is not others.state2)
        and (state.absmax is others.absmax and state.state2.absmax is others.state2.absmax)
    )


def test_a_module_refers_to_what_its_weight_of_the_same_tree_has(quantized: Any) -> None:
    assert _is_closed(SharedMemory(quantized).tree(), quantized)


@pytest.mark.parametrize("isolated", [False, True])
def test_that_is_so_too_for_a_tree_of_a_tree_that_was_written_to(quantized: Any, isolated: bool) -> None:
    memory, known = SharedMemory(quantized), dict[int, Any]()
    tree = memory.tree(known, isolated=isolated)
    ways = memory.settle(tree, known)
    assert tree[1].weight.module is tree[1]
    assert address_of(tree[1].weight) == address_of(quantized[1].weight)
    assert _is_closed(tree, quantized)
    assert _is_closed(SharedMemory(tree, ways).tree(), tree)


def test_a_tensor_that_a_quantized_weight_refers_to_is_shared_like_every_other(quantized: Any) -> None:
    quantized[1].weight.other = quantized[0].weight
    tree = SharedMemory(quantized).tree()
    assert tree[1].weight.other is tree[0].weight
    with torch.no_grad():
        tree[0].weight.add_(1)
    assert not tree[0].weight.equal(quantized[0].weight)


# --- what torch has to have, and whether it copies --------------------------------------------------------------------


def _is_lazy(tensor: Any) -> bool:
    internals: Any = torch._C
    return bool(internals._is_cow_tensor(tensor))


def test_torch_has_what_lazy_clones_need() -> None:
    internals: Any = torch._C
    tensor = torch.arange(8.0)
    clone = torch._lazy_clone(tensor)
    assert _is_lazy(clone)
    assert internals._data_address(clone) == internals._data_address(tensor)
    assert _is_lazy(clone), "asking for the address copies nothing"
    clone.add_(1)
    assert not _is_lazy(clone)
    assert tensor.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("dtype", "way"),
    [
        (torch.float32, Method.LAZY_CLONE),
        (torch.bfloat16, Method.LAZY_CLONE),
        (torch.float8_e4m3fn, Method.EXPOSED),
        (torch.int32, Method.EXPOSED),
        (torch.uint8, Method.EXPOSED),
    ],
)
def test_off_the_cpu_quantized_weights_are_exposed_since_foreign_kernels_take_their_address(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, way: Method
) -> None:
    monkeypatch.setattr(tensor_memory, "_CLONED_LAZILY", ("cpu", "meta"))  # "meta" in the place of a CUDA device
    assert way_of(torch.empty(64, dtype=dtype, device="meta"), None, quantized=True) is way
    assert way_of(torch.empty(64, dtype=dtype, device="meta"), None) is Method.LAZY_CLONE
    assert way_of(torch.empty(64, dtype=dtype), None, quantized=True) is Method.LAZY_CLONE


def test_taking_the_address_as_foreign_kernels_do_ends_a_lazy_clone() -> None:
    clone = torch._lazy_clone(torch.ones(8, dtype=torch.int32))
    clone.data_ptr()
    assert not _is_lazy(clone)


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A base that its load converts."""
    return make_base(tmp_path / "half", dtype="bfloat16")


def _copied_names(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not _is_lazy(parameter)]


def _use(view: Any) -> None:
    view.logprobs_of([(TEXT, " and"), (TEXT, " the"), ("the", " sun")])
    view.rolling_logprob(TEXT)
    view.next_token_dists([TEXT, "the"], top_k=3)
    view.generate_many([TEXT, "the"], max_new_tokens=3)
    view.generate(TEXT, max_new_tokens=3, temperature=1.0)


def test_scoring_and_generating_copy_no_memory_of_a_converted_base(build: Any, half: Path, adapter: Path) -> None:
    backend = build(half, adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned, backend.as_scaled_adapter(0.5) as scaled:
        for view in (plain, tuned, scaled):
            _use(view)
            assert _copied_names(engine_of(view).model) == []
            assert view_logits(view).isfinite().all()
            assert _copied_names(view.model) == []


def test_a_null_view_copies_no_memory_but_the_adapters(build: Any, half: Path, adapter: Path) -> None:
    with build(half, adapter).as_null_adapter(1) as view:
        _use(view)
        assert [name for name in _copied_names(engine_of(view).model) if "lora_" not in name] == []


def test_an_adapter_that_is_put_on_copies_no_memory_of_a_converted_base(build: Any, half: Path, tmp_path: Path) -> None:
    base_memory = None
    kinds: list[dict[str, Any]] = [{}, {"seed": 5}, {"use_dora": True}, {"bias": "all"}]
    for number, fields in enumerate(kinds):
        backend = build(half, make_adapter(tmp_path / str(number), half, **fields))
        pristine = base_in(backend).pristine.model
        base_memory = base_memory or {address_of(tensor) for tensor in pristine.parameters()}
        model = adapter_in(backend).pristine.model
        shared = {address_of(tensor) for name, tensor in model.named_parameters() if "lora_" not in name}
        assert shared == base_memory, fields


def _written(model: Any) -> list[str]:
    with page_flags() as flags:
        assert flags is not None
        named = model.named_parameters()
        return [name for name, p in named if "lora_" not in name and not never_written(*_memory(p), flags)]


def _require_mapped(backend: Any) -> None:
    ways = base_in(backend).pristine.memory._ways.values()
    if not any(isinstance(way, FilePart) for way in ways):
        pytest.skip("this transformers does not map its files")


def test_a_base_that_is_mapped_from_its_file_has_no_page_written(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    _require_mapped(backend)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        for view in (plain, tuned):
            _use(view)
            assert _written(computing_model(view)) == []
            next(iter(view.model.parameters())).data.mul_(2)
            assert _written(view.model) != []
            assert _written(computing_model(view)) == []


def test_what_computes_shares_one_mapping_of_the_file(
    build: Any, base: Path, adapter: Path, other_adapter: Path
) -> None:
    backends = [build(base, adapter), build(base, other_adapter)]
    _require_mapped(backends[0])
    places = set()
    for backend in backends:
        with backend.as_base() as plain, backend.as_finetuned() as tuned:
            for view in (plain, tuned):
                _use(view)
                places.add(address_of(computing_model(view).get_input_embeddings().weight))
            assert address_of(tuned.model.get_input_embeddings().weight) not in places
    assert len(places) == 1


@LINUX
@pytest.mark.parametrize("writes", [False, True])
def test_what_runs_has_a_mapping_of_its_own_until_the_first_has_run_and_written_nothing(
    tmp_path: Path, writes: bool
) -> None:
    memory = SharedMemory(_mapped(_model(), tmp_path / "weights"))
    first, meanwhile = memory.tree(to_run=True), memory.tree(to_run=True)
    if writes:
        _in_place(first[1].weight)
    memory.has_run(meanwhile)
    also_meanwhile = memory.tree(to_run=True)
    memory.has_run(first)
    later = memory.tree(to_run=True)
    places = [address_of(tree[1].weight) for tree in (first, meanwhile, also_meanwhile, later)]
    assert len(set(places)) == (4 if writes else 3)
    assert (address_of(later[1].weight) == address_of(first[1].weight)) is not writes
    assert _state(later) == _state(memory.tree())


# --- a model whose trees cannot share ---------------------------------------------------------------------------------


@pytest.fixture(params=["its objects", "its computing"])
def unshareable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create models whose trees would share an object with them, or would compute other numbers."""
    if request.param == "its objects":
        monkeypatch.setattr("pytest_sway.backends.hf.model.pristine.shares_objects", lambda tree, original: True)
    else:
        monkeypatch.setattr("pytest_sway.backends.hf.model.base._may_hide_something", lambda spec, model: True)
        monkeypatch.setattr("pytest_sway.backends.hf.model.pristine._agree", lambda one, other: False)


def _spoil(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(7)


@pytest.mark.usefixtures("unshareable")
def test_a_model_whose_trees_cannot_share_is_loaded_for_each_and_right(
    build: Any, base: Path, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    backends = build(base, adapter), build(base, other_adapter)
    rewriting = make_adapter(tmp_path, base, init_lora_weights="pissa")
    third = build(base, rewriting)
    assert not base_in(backends[0]).pristine.shares
    assert not any(adapter_in(backend).pristine.shares for backend in (*backends, third))
    with (
        backends[0].as_base() as plain,
        backends[0].as_finetuned() as tuned,
        backends[1].as_finetuned() as other,
        third.as_finetuned() as last,
    ):
        scores = [view.rolling_logprob(TEXT).total_logprob for view in (plain, tuned, other, last)]
        for view, folder in ((plain, None), (tuned, adapter), (other, other_adapter), (last, rewriting)):
            assert view_logits(view).equal(logits(*fresh(base, folder)))
            _spoil(view.model)
        assert [view.rolling_logprob(TEXT).total_logprob for view in (plain, tuned, other, last)] == scores
    for backend in (*backends, third):
        assert backend.changes() == []
        backend.close()
        assert backend.leak() is None


@pytest.mark.usefixtures("unshareable")
def test_an_adapter_that_starts_at_random_is_the_same_on_each_tree_and_leaves_the_random_state_alone(
    build: Any, base: Path, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path, base, r=2, init_lora_weights="pissa_niter_1")
    backend = build(base, folder)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with backend.as_finetuned() as first, backend.as_finetuned() as second:
        with quiet():
            found = view_logits(first), view_logits(second)
        assert torch.get_rng_state().equal(state)
        assert found[0].equal(found[1])


def test_a_model_that_cannot_be_copied_is_loaded_for_each_tree() -> None:
    import threading

    from pytest_sway.backends.hf.model.pristine import Pristine

    def load() -> Any:
        model: Any = _model()
        model.lock = threading.Lock()
        return model

    model = load()
    pristine = Pristine(model, load)
    assert not pristine.shares
    first, second = pristine.tree(), pristine.tree()
    assert _state(first) == _state(second) == _state(model)
    first[0].weight.data.mul_(2)
    assert _state(second) == _state(model)


def test_a_model_that_holds_what_cannot_be_copied_is_loaded_for_each_tree() -> None:
    from pytest_sway.backends.hf.model.pristine import Pristine

    loaded: list[Any] = []

    def load() -> Any:
        model: Any = _model()
        model[0].lock = threading.Lock()
        loaded.append(model)
        return model

    pristine = Pristine(load(), load)
    assert not pristine.shares
    assert pristine.tree() is loaded[1]
    assert pristine.tree() is loaded[2]


def test_watches_forget_what_is_gone() -> None:
    from pytest_sway.backends.hf.model.pristine import Pristine

    pristine = Pristine(_model(), _model)
    kept = [pristine.tree() for _ in range(3)]
    for _ in range(200):
        pristine.tree()
    watches = pristine.watches.all()
    assert len(watches) <= 20
    assert sum(1 for watch in watches if watch.alive()) == 1 + len(kept)
    del kept
    assert sum(1 for watch in pristine.watches.all() if watch.alive()) == 1


def test_a_deep_copy_of_a_tree_is_a_model_like_any_other(model: Any) -> None:
    tree = SharedMemory(model).tree()
    copied = copy.deepcopy(tree)
    copied[0].weight.data.mul_(2)
    assert _state(tree) == _state(model)
