"""Converted weights are written once, mapped by all workers, and equal to the bit to each worker's own conversion."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.errors import BackendLoadError, SwayWarning
from tests.tiny import make_adapter, make_base, make_tokenizer, quiet
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_sway.backends.hf.loading.shared_weights import SharedWeights
    from pytest_sway.spec.model_spec import ModelSpec

NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base stored in bf16."""
    return make_base(tmp_path_factory.mktemp("half"), dtype="bfloat16")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bases that were loaded and converted without sharing, in order."""
    staging = import_module("pytest_sway.backends.hf.loading.shared_weights")
    load, bases = staging.load_model, []

    def counted(spec: ModelSpec, **where: Any) -> Any:
        if not where:
            bases.append(spec.base)
        return load(spec, **where)

    monkeypatch.setattr(staging, "load_model", counted)
    return bases


@pytest.fixture
def worker(run_folder: Path, converted: list[str]) -> Callable[[], SharedWeights]:
    """Return the shared weights as one worker sees them."""
    from pytest_sway.backends.hf.loading.shared_weights import SharedWeights

    return lambda: SharedWeights(run_folder)


def private(spec: ModelSpec) -> Any:
    from pytest_sway.backends.hf.loading.model import load_model

    return load_model(spec)


def assert_same(model: Any, expected: Any) -> None:
    assert type(model) is type(expected)
    assert vars(model.config) == vars(expected.config)
    assert model.generation_config == expected.generation_config
    assert model.name_or_path == expected.name_or_path
    assert [(n, m.training, set(vars(m))) for n, m in model.named_modules()] == [
        (n, m.training, set(vars(m))) for n, m in expected.named_modules()
    ]
    tensors, others = _tensors(model), _tensors(expected)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert tensor.equal(others[name]), name
        assert tensor.requires_grad is others[name].requires_grad is False, name
    assert _ties(tensors) == _ties(others)


def _tensors(model: Any) -> dict[str, Any]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _ties(tensors: dict[str, Any]) -> list[set[str]]:
    places: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        places.setdefault(tensor.data_ptr(), set()).add(name)
    return [names for names in places.values() if len(names) > 1]


# --- what is mapped is what each would have made ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "computed"), [("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "fp16")]
)
def test_each_worker_gets_the_weights_that_it_would_have_made(
    worker: Callable[[], SharedWeights], tmp_path: Path, converted: list[str], stored: str, computed: str
) -> None:
    spec = spec_of(make_base(tmp_path / "base", dtype=NAMES[stored]), dtype=computed)
    expected = private(spec)
    for _ in range(3):
        assert_same(worker().load_model(spec), expected)
    assert converted == [spec.base]


def _llama(folder: Path, **fields: Any) -> Path:
    return make_base(folder, dtype="bfloat16", **fields)


def _saved(folder: Path, architecture: str, **fields: Any) -> Path:
    import torch
    import transformers

    words = make_tokenizer(folder)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{architecture}Config")(
            vocab_size=words, bos_token_id=1, eos_token_id=2, pad_token_id=0, **fields
        )
        model: Any = getattr(
            transformers, "GPT2LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM"
        )
        model(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
ARCHITECTURES: dict[str, Callable[[Path], Path]] = {
    "tied": lambda folder: _llama(folder, tie_word_embeddings=True),
    "gpt2": lambda folder: _saved(folder, "GPT2", n_embd=32, n_layer=2, n_head=4),
    "gpt_neox": lambda folder: _saved(folder, "GPTNeoX", **_SIZES),
    "opt": lambda folder: _saved(folder, "OPT", **_SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "mixtral": lambda folder: _saved(folder, "Mixtral", **_SIZES, num_key_value_heads=2, num_local_experts=2),
    "gemma2": lambda folder: _saved(folder, "Gemma2", **_SIZES, num_key_value_heads=2, head_dim=8),
    "mamba": lambda folder: _saved(folder, "Mamba", hidden_size=32, state_size=4, num_hidden_layers=2),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_the_same_when_it_is_mapped(
    worker: Callable[[], SharedWeights], tmp_path: Path, converted: list[str], architecture: str
) -> None:
    spec = spec_of(ARCHITECTURES[architecture](tmp_path / "base"))
    expected = private(spec)
    for _ in range(2):
        model = worker().load_model(spec)
        assert_same(model, expected)
        assert logits(model, fresh(tmp_path / "base")[1]).equal(logits(expected, fresh(tmp_path / "base")[1]))
    assert len(converted) == 1


def test_a_sharded_base_is_shared(
    worker: Callable[[], SharedWeights], half: Path, tmp_path: Path, converted: list[str]
) -> None:
    folder = shutil.copytree(half, tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    with quiet():
        fresh(half, dtype="bfloat16")[0].save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    for _ in range(2):
        assert_same(worker().load_model(spec_of(folder)), private(spec_of(folder)))
    assert len(converted) == 1


@pytest.fixture
def pickled_base(base: Path, tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import load_file

    folder = shutil.copytree(base, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_base_in_a_pickle_is_shared_if_the_spec_allows_it(
    worker: Callable[[], SharedWeights], pickled_base: Path, converted: list[str]
) -> None:
    spec = spec_of(pickled_base, allow_pickle=True)
    for _ in range(2):
        assert_same(worker().load_model(spec), private(spec))
    assert len(converted) == 1


def test_a_base_that_cannot_be_loaded_fails_as_ever_and_stops_nobody(
    worker: Callable[[], SharedWeights], half: Path, tmp_path: Path, run_folder: Path
) -> None:
    folder = shutil.copytree(half, tmp_path / "broken")
    (folder / "model.safetensors").rename(folder / "hidden")
    for _ in range(2):
        with pytest.raises(BackendLoadError, match=r"no file named model\.safetensors"):
            worker().load_model(spec_of(folder))
    (folder / "hidden").rename(folder / "model.safetensors")
    assert_same(worker().load_model(spec_of(folder)), private(spec_of(folder)))
    assert len(list(run_folder.glob("*/*/model.safetensors"))) == 1


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from .scale import SCALE

class HomemadeConfig(LlamaConfig):
    model_type = "homemade"

class Homemade(LlamaForCausalLM):
    config_class = HomemadeConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * SCALE
        return output
"""


def test_a_base_that_brings_its_code_is_shared(
    worker: Callable[[], SharedWeights],
    half: Path,
    tmp_path: Path,
    converted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(import_module("transformers.dynamic_module_utils"), "HF_MODULES_CACHE", str(tmp_path / "code"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = shutil.copytree(half, tmp_path / "homemade")
    (folder / "homemade.py").write_text(CODE)
    (folder / "scale.py").write_text("SCALE = 3\n")
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "homemade", "architectures": ["Homemade"]}
    config["auto_map"] = {"AutoConfig": "homemade.HomemadeConfig", "AutoModelForCausalLM": "homemade.Homemade"}
    path.write_text(json.dumps(config))
    spec = spec_of(folder, trust_remote_code=True)
    expected = private(spec)
    tokenizer = fresh(half)[1]
    for _ in range(2):
        model = worker().load_model(spec)
        assert type(model).__name__ == "Homemade"
        assert_same(model, expected)
        assert logits(model, tokenizer).equal(logits(private(spec_of(half)), tokenizer) * 3)
    assert len(converted) == 1


@pytest.fixture
def hub(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A downloaded base in the hub's cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub"
    folder = cache / "models--org--half"
    shutil.copytree(half, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    values = {
        "HF_HUB_OFFLINE": True,
        "_is_offline_mode": True,
        "HF_HUB_CACHE": str(cache),
        "TRANSFORMERS_CACHE": str(cache),
    }
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download", "transformers.utils.hub"):
        for name, value in values.items():
            monkeypatch.setattr(f"{module}.{name}", value, raising=False)
    return "org/half"


def test_a_base_from_a_hub_is_shared(worker: Callable[[], SharedWeights], hub: str, converted: list[str]) -> None:
    from pytest_sway.spec.model_spec import ModelSpec

    spec = ModelSpec(base=hub, device="cpu", dtype="fp32")
    for _ in range(2):
        assert_same(worker().load_model(spec), private(spec))
    assert len(converted) == 1


# --- what is shared, and what is not ----------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_weights_lie_in_the_mapped_file(worker: Callable[[], SharedWeights], half: Path, run_folder: Path) -> None:
    for _ in range(2):  # first the worker that wrote it, then another
        model = worker().load_model(spec_of(half))
        with open("/proc/self/maps") as maps:
            spans = [line.split()[0].split("-") for line in maps if str(run_folder) in line]
        for name, tensor in model.named_parameters():
            assert any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in spans), name
            assert tensor.data_ptr() % 64 == 0, name


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "bf16"},
        {"device": "meta"},
        {"model_kwargs": {"rms_norm_eps": 0.5}},
        {"model_kwargs": {"device_map": {"": "cpu"}}},
        {"model_kwargs": {"attn_implementation": "eager", "rms_norm_eps": 0.5}},
    ],
    ids=str,
)
def test_nothing_is_written_where_nothing_is_to_be_shared(
    worker: Callable[[], SharedWeights], half: Path, run_folder: Path, fields: dict[str, Any]
) -> None:
    worker().load_model(spec_of(half, **fields))
    assert list(run_folder.iterdir()) == []


def test_arguments_that_leave_the_weights_as_they_are_are_loaded_with_a_shared_copy(
    worker: Callable[[], SharedWeights], half: Path, converted: list[str]
) -> None:
    spec = spec_of(half, model_kwargs={"attn_implementation": "eager"})
    for _ in range(2):
        model = worker().load_model(spec)
        assert model.config._attn_implementation == "eager"
        assert_same(model, private(spec))
    assert converted == [spec.base]


def test_a_base_that_is_saved_again_into_its_folder_is_shared_anew(
    worker: Callable[[], SharedWeights], tmp_path: Path
) -> None:
    spec = spec_of(make_base(tmp_path / "base", dtype="bfloat16"))
    shared = worker()
    shared.load_model(spec)
    config = (tmp_path / "base" / "config.json").stat()
    make_base(tmp_path / "other", dtype="bfloat16", seed=5)
    shutil.copyfile(tmp_path / "other" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    assert (tmp_path / "base" / "config.json").stat() == config
    assert_same(shared.load_model(spec), private(spec))


def test_a_base_that_is_saved_while_it_is_loaded_is_not_shared(
    worker: Callable[[], SharedWeights], tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = import_module("pytest_sway.backends.hf.loading.shared_weights")
    spec = spec_of(make_base(tmp_path / "base", dtype="bfloat16"))
    load = staging.load_model

    def load_while_it_is_saved(spec: ModelSpec, **where: Any) -> Any:
        model = load(spec, **where)
        (tmp_path / "base" / "config.json").touch()
        return model

    monkeypatch.setattr(staging, "load_model", load_while_it_is_saved)
    assert_same(worker().load_model(spec), private(spec))
    assert not any(path.is_dir() for path in run_folder.iterdir())


@pytest.mark.parametrize(
    "fields", [{}, {"modules_to_save": ["embed_tokens"]}, {"bias": "all"}, {"init_lora_weights": "pissa"}], ids=str
)
def test_adapters_are_the_same_on_a_shared_copy_and_write_nothing_into_it(
    half: Path, tmp_path: Path, run_folder: Path, fields: dict[str, Any]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", half, **fields)
    digests = set()
    for _ in range(2):
        builder = HFBuilder(share_weights=run_folder)
        backend = builder(spec_of(half, adapter))
        with backend.as_base() as plain, backend.as_finetuned() as tuned:
            assert view_logits(plain).equal(logits(*fresh(half)))
            assert view_logits(tuned).equal(logits(*fresh(half, adapter)))
            tuned.logprob_of("the sun", " rises")
        assert backend.changes() == []
        backend.close()
        assert backend.leak() is None
        digests.add(_digest(run_folder))
    assert len(digests) == 1


def test_writes_to_a_tests_own_weights_reach_no_other_test(
    worker: Callable[[], SharedWeights], half: Path, run_folder: Path
) -> None:
    import torch

    model, other = worker().load_model(spec_of(half)), worker().load_model(spec_of(half))
    before = _digest(run_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert _digest(run_folder) == before
    assert_same(other, private(spec_of(half)))


@pytest.mark.usefixtures("exposed")
def test_a_change_of_a_shared_copy_is_found_where_trees_cannot_copy_it(
    half: Path, run_folder: Path, adapter: Path
) -> None:
    HFBuilder(share_weights=run_folder)(spec_of(half, adapter)).close()
    backend = HFBuilder(share_weights=run_folder)(spec_of(half, adapter))
    before = _digest(run_folder)
    with backend.as_base() as view:
        next(view.model.parameters()).data.mul_(2)
    assert backend.changes() == ["model.embed_tokens.weight: contents changed"]
    assert _digest(run_folder) == before
    backend.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_a_test_writes_into_its_own_tree_of_a_shared_copy_stays_there(
    half: Path, run_folder: Path, adapter: Path
) -> None:
    backend = HFBuilder(share_weights=run_folder, score_cache=0)(spec_of(half, adapter))
    before = _digest(run_folder)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        scores = plain.logprob_of("the sun", " rises"), tuned.logprob_of("the sun", " rises")
        for view in (plain, tuned):
            for parameter in view.model.parameters():
                parameter.data.mul_(2)
        assert (plain.logprob_of("the sun", " rises"), tuned.logprob_of("the sun", " rises")) == scores
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert view_logits(plain).equal(logits(*fresh(half)))
        assert view_logits(tuned).equal(logits(*fresh(half, adapter)))
    assert backend.changes() == []
    assert _digest(run_folder) == before
    backend.close()


def test_a_shared_copy_counts_as_many_bytes_as_a_private_one(half: Path, run_folder: Path) -> None:
    backends = [HFBuilder(share_weights=folder)(spec_of(half)) for folder in (run_folder, None)]
    assert backends[0].sizes() == backends[1].sizes()
    for backend in backends:
        backend.close()


def _digest(run_folder: Path) -> str:
    (path,) = run_folder.glob("*/*/model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("before", [{}, {"HF_DEACTIVATE_ASYNC_LOAD": "0"}], ids=str)
def test_the_environment_stays_what_it_was(
    worker: Callable[[], SharedWeights], half: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, str]
) -> None:
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    worker().load_model(spec_of(half))
    assert dict(os.environ) == environment


# --- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))


@pytest.fixture
def failing_disk() -> Iterator[None]:
    """Writes beyond 20,000 bytes fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("disk", "why"), [("full_disk", os.strerror(errno.ENOSPC)), ("failing_disk", os.strerror(errno.EFBIG))]
)
def test_without_room_each_keeps_its_own_copy_and_says_so_once(
    request: pytest.FixtureRequest,
    worker: Callable[[], SharedWeights],
    half: Path,
    run_folder: Path,
    disk: str,
    why: str,
) -> None:
    request.getfixturevalue(disk)
    first, second = worker(), worker()
    sentence = f"the weights of .*, converted to fp32, are not shared between workers: {why}.*TMPDIR"
    with pytest.warns(SwayWarning, match=sentence):
        assert_same(first.load_model(spec_of(half)), private(spec_of(half)))
    assert not [path for path in run_folder.iterdir() if path.is_dir()]
    with pytest.warns(SwayWarning, match=sentence):
        assert_same(second.load_model(spec_of(half)), private(spec_of(half)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(second.load_model(spec_of(half)), private(spec_of(half)))


def test_a_copy_that_is_read_back_otherwise_goes_to_nobody(
    worker: Callable[[], SharedWeights], half: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = import_module("pytest_sway.backends.hf.loading.shared_weights")
    write = staging.write_tensors

    def write_wrongly(path: Path, tensors: dict[str, Any]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        write(path, tensors | {name: tensors[name] * 2})

    monkeypatch.setattr(staging, "write_tensors", write_wrongly)
    with pytest.warns(SwayWarning, match="differs in 1 tensors, such as model.layers.1.mlp.up_proj.weight"):
        assert_same(worker().load_model(spec_of(half)), private(spec_of(half)))
    assert not list(run_folder.glob("*/*/model.safetensors"))


def test_a_folder_that_is_gone_costs_a_copy(worker: Callable[[], SharedWeights], half: Path, run_folder: Path) -> None:
    run_folder.rmdir()
    with pytest.warns(SwayWarning, match=r"are not shared between workers: No such file"):
        assert_same(worker().load_model(spec_of(half)), private(spec_of(half)))


def test_a_copy_that_is_spoilt_later_costs_a_copy(
    worker: Callable[[], SharedWeights], half: Path, run_folder: Path
) -> None:
    worker().load_model(spec_of(half))
    (path,) = run_folder.glob("*/*/model.safetensors")
    path.unlink()
    with pytest.warns(SwayWarning, match="are not shared between workers"):
        assert_same(worker().load_model(spec_of(half)), private(spec_of(half)))


WRITER = """
import sys
from pathlib import Path

from pytest_sway.backends.hf.loading import shared_weights as staging
from pytest_sway.spec.model_spec import ModelSpec

def write(path, tensors):
    path.write_bytes(b"half of it")
    print("writing", flush=True)
    sys.stdin.readline()
    path.unlink()
    write_tensors(path, tensors)

write_tensors, staging.write_tensors = staging.write_tensors, write
staging.SharedWeights(Path(sys.argv[1])).load_model(ModelSpec(base=sys.argv[2], device="cpu", dtype="fp32"))
print("done", flush=True)
"""


@pytest.fixture
def writer(half: Path, run_folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another worker that pauses while writing; a line on its input resumes it."""
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(run_folder), str(half)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    yield child
    child.kill()
    child.communicate()


def test_a_worker_that_waits_gets_what_another_one_writes(
    worker: Callable[[], SharedWeights], half: Path, converted: list[str], writer: subprocess.Popen[str]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(worker().load_model, spec_of(half))
        output, _ = writer.communicate("go on\n", timeout=60)
        assert output == "done\n"
        assert_same(waiting.result(60), private(spec_of(half)))
    assert converted == []


def test_a_writer_that_dies_neither_hangs_nor_misleads_the_next(
    worker: Callable[[], SharedWeights], half: Path, converted: list[str], writer: subprocess.Popen[str]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(worker().load_model, spec_of(half))
        assert converted == []
        writer.send_signal(signal.SIGKILL)
        assert_same(waiting.result(60), private(spec_of(half)))
    assert converted == [str(half)]
    assert_same(worker().load_model(spec_of(half)), private(spec_of(half)))
    assert converted == [str(half)]


def test_two_bases_are_written_at_the_same_time(
    worker: Callable[[], SharedWeights], tmp_path: Path, writer: subprocess.Popen[str]
) -> None:
    other = spec_of(make_base(tmp_path / "other", dtype="bfloat16", seed=3))
    assert_same(worker().load_model(other), private(other))
    assert writer.poll() is None
