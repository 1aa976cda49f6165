"""GGUF bases equal transformers' model to the bit and are shared; broken ones are refused before a load."""

from __future__ import annotations

import json
import re
import shutil
import struct
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.checkpoints.gguf_header import read_gguf
from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.errors import AdapterMismatchError, BackendNotAvailableError, SpecError, WeightsError
from pytest_sway.spec.identity import resolved_key
from pytest_sway.spec.model_spec import ModelSpec
from tests.tiny import TEXT, make_adapter, make_base, make_gguf, quiet
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Callable

PLACED: dict[str, Any] = {"dtype": "fp32", "device": "cpu"}


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", base)


@pytest.fixture
def copy(gguf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(gguf, tmp_path / "copy.gguf"))


def _ids() -> Any:
    import torch

    return torch.tensor([[1, 5, 9, 40, 17, 60]])


def _of(view: Any) -> Any:
    import torch

    with torch.inference_mode():
        return view.model(_ids()).logits


def _plain(gguf: Path, **options: Any) -> Any:
    """Return the model and the tokenizer as transformers loads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, **options
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    return model.eval(), tokenizer


def test_it_is_the_model_that_it_was_made_from_to_the_bit(build: Any, base: Path, gguf: Path) -> None:
    import torch

    with build(gguf).as_base() as view, torch.inference_mode():
        assert _of(view).equal(fresh(base)[0](_ids()).logits)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_it_is_what_transformers_reads_to_the_bit(build: Any, base: Path, tmp_path: Path, kind: str) -> None:
    import torch

    file = make_gguf(tmp_path / "model.gguf", base, kind=kind)
    with build(file).as_base() as view, torch.inference_mode():
        assert _of(view).equal(_plain(file)[0](_ids()).logits)


def test_its_own_tokenizer_turns_text_into_tokens_and_back(build: Any, gguf: Path) -> None:
    with build(gguf).as_base() as view:
        ids = view.tokenizer(TEXT)["input_ids"]
        assert view.tokenizer.decode(ids) == TEXT
        assert view.tokenizer.convert_ids_to_tokens(ids[:2]) == ["the", "\u0120"]
        assert view.tokenizer.pad_token_id == 0
        assert view.logprob_of("the sun", " rises") < 0.0


def test_a_file_that_says_so_begins_texts_with_its_token(build: Any, base: Path, tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "model.gguf", base, tokenizer__ggml__add_bos_token=True)
    with build(file).as_base() as view:
        assert view.tokenizer("the")["input_ids"][0] == 1


def test_adapters_share_it_and_fit_as_on_the_model_it_was_made_from(
    build: Any, base: Path, gguf: Path, adapter: Path, other_adapter: Path, loads: list[str]
) -> None:
    import torch

    for folder in (adapter, other_adapter):
        backend = build(gguf, folder)
        with backend.as_finetuned() as tuned, backend.as_base() as plain, torch.inference_mode():
            assert _of(tuned).equal(fresh(base, folder)[0](_ids()).logits)
            assert _of(plain).equal(fresh(base)[0](_ids()).logits)
        assert backend.changes() == []
    assert loads == [str(gguf)]


def test_an_adapter_for_another_model_is_refused(build: Any, gguf: Path, tmp_path: Path) -> None:
    larger = make_base(tmp_path / "larger", hidden=64)
    with pytest.raises(AdapterMismatchError, match=f"does not fit the base '{re.escape(str(gguf))}'"):
        build(gguf, make_adapter(tmp_path / "adapter", larger))


def test_it_can_be_the_fine_tuned_model_of_its_base(build: Any, base: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    make_gguf(tmp_path / "tuned" / "model.gguf", make_base(tmp_path / "made", seed=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "tuned")
    backend = build(base, finetuned=tmp_path / "tuned")
    with backend.as_finetuned() as tuned:
        assert view_logits(tuned).equal(logits(*fresh(tmp_path / "made")))


def test_a_folder_with_one_file_is_a_base_and_its_tokenizer_counts(
    build: Any, base: Path, gguf: Path, tmp_path: Path
) -> None:
    shutil.copy(gguf, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path)
    with build(tmp_path).as_base() as view:
        assert view_logits(view).equal(logits(*fresh(base)))


def test_safetensors_beside_it_come_first(build: Any, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "both")
    (folder / "other.gguf").write_bytes(b"nobody reads this")
    with build(folder).as_base() as view:
        assert view_logits(view).equal(logits(*fresh(base)))


def test_it_is_a_plain_model_that_can_be_saved(build: Any, gguf: Path, tmp_path: Path) -> None:
    import torch

    with build(gguf).as_base() as view:
        with quiet():
            view.model.save_pretrained(tmp_path / "saved")
        saved = fresh_model(tmp_path / "saved")
        with torch.inference_mode():
            assert _of(view).equal(saved(_ids()).logits)
        assert not getattr(view.model, "is_quantized", False)
        assert view.model.name_or_path == str(gguf)


def fresh_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(str(folder))


def test_nothing_is_drawn_on_the_terminal(build: Any, gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    bar = reader.tqdm
    build(gguf)
    assert capfd.readouterr() == ("", "")
    assert reader.tqdm is bar


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_estimate_is_what_will_be_measured(
    build: Any, builder: HFBuilder, tmp_path: Path, dtype: str, kind: str, tied: bool
) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=tied)
    file = make_gguf(tmp_path / "model.gguf", base, kind=kind)
    assert builder.check(spec_of(file, dtype=dtype)).sizes == pytest.approx(build(file, dtype=dtype).sizes(), rel=0.02)


def test_workers_map_what_one_of_them_has_unpacked(gguf: Path, tmp_path: Path) -> None:
    from pytest_sway.backends.hf.loading.model import load_model
    from pytest_sway.backends.hf.loading.shared_weights import SharedWeights

    spec = spec_of(gguf)
    expected = load_model(spec)
    for worker in (SharedWeights(tmp_path), SharedWeights(tmp_path)):
        model = worker.load_model(spec)
        assert model.config == expected.config
        assert model.generation_config == expected.generation_config
        assert model.name_or_path == expected.name_or_path
        assert model(_ids()).logits.equal(expected(_ids()).logits)
    assert len([*tmp_path.glob("*/*/model.safetensors")]) == 1


# --- identity ---------------------------------------------------------------------------------------------------------


def test_a_file_is_a_path_also_where_it_looks_like_a_hub_id(
    gguf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(gguf.parent.parent)
    assert ModelSpec(base=f"{gguf.parent.name}/{gguf.name}").base == str(gguf)
    assert ModelSpec(base="nowhere/model.gguf").base == str(gguf.parent.parent / "nowhere/model.gguf")


def test_a_link_to_a_file_keeps_its_name(build: Any, gguf: Path, tmp_path: Path) -> None:
    blob = shutil.copy(gguf, tmp_path / "5f3a9c")
    (tmp_path / "model.gguf").symlink_to(blob)
    assert build(tmp_path / "model.gguf").spec.base == str(tmp_path / "model.gguf")


@pytest.mark.parametrize("of", ["file", "folder"])
def test_a_file_that_is_written_anew_is_another_base(copy: Path, base: Path, of: str) -> None:
    spec = ModelSpec(base=str(copy if of == "file" else copy.parent), **PLACED)
    before = resolved_key(spec)
    make_gguf(copy, base, kind="F16")
    assert resolved_key(spec) != before


# --- refused ----------------------------------------------------------------------------------------------------------


def _overwrite(position: int, data: bytes) -> Callable[[Path], object]:
    def change(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[position : position + len(data)] = data
        file.write_bytes(content)

    return change


def _cut(size: int) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[:size])


HUGE = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_cut(0), "cannot read the weights '.*': cannot mmap an empty file|truncated or corrupt: cannot mmap"),
        (_cut(3), "it does not begin as a GGUF file does"),
        (_cut(10), "it ends within its header"),
        (_cut(700), "it ends within its header"),
        (_cut(-500), r"its tensor '.*' ends after the file's [\d,]+ bytes"),
        (_overwrite(0, b"GGML"), "it does not begin as a GGUF file does"),
        (_overwrite(4, b"\x09"), "its version 9 of the format is unknown"),
        (_overwrite(8, HUGE), "ends within its header|claims"),
        (_overwrite(16, HUGE), "unknown type|ends within its header|claims"),
        (_overwrite(24, HUGE), "a name in it claims 4,611,686,018,427,387,904 bytes"),
    ],
)
def test_a_broken_file_is_refused(
    build: Any, builder: HFBuilder, copy: Path, change: Callable[[Path], object], why: str, loads: list[str]
) -> None:
    change(copy)
    for refuse in (builder.check, lambda spec: build(copy)):
        with pytest.raises(WeightsError, match=why):
            refuse(spec_of(copy))
    assert loads == []


def test_any_damage_to_a_header_is_an_error_or_none(copy: Path) -> None:
    content = copy.read_bytes()
    for position in range(0, 4000, 7):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        copy.write_bytes(damaged)
        try:
            read_gguf(copy)
        except (WeightsError, SpecError):
            continue


def test_one_part_of_several_is_refused(build: Any, base: Path, tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "model-00001-of-00003.gguf", base, split__count=3)
    sentence = (
        f"^'{re.escape(str(file))}' is one of 3 parts of a model, which transformers cannot load. Merge them into"
    )
    with pytest.raises(SpecError, match=sentence):
        build(file)


def test_one_of_several_files_has_to_be_named(build: Any, copy: Path) -> None:
    shutil.copy(copy, copy.with_name("other.gguf"))
    sentence = f"^'{re.escape(str(copy.parent))}' has 2 GGUF files \\(copy.gguf, other.gguf\\). Name one of them.$"
    with pytest.raises(SpecError, match=sentence):
        build(copy.parent)


def test_a_file_that_is_not_there_is_named(build: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"^cannot read the weights '.*nowhere\.gguf': No such file or directory\.$"):
        build(tmp_path / "nowhere.gguf")


def test_an_architecture_that_transformers_does_not_know_is_named(build: Any, copy: Path) -> None:
    content = copy.read_bytes()
    copy.write_bytes(content.replace(b"llama", b"klama"))
    with pytest.raises(WeightsError, match=r"^transformers [\d.]+ cannot read the GGUF file '.*': ValueError: .*klama"):
        build(copy)


def test_without_gguf_the_extra_is_named(
    build: Any, base: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    libraries = import_module("pytest_sway.backends.hf.loading.libraries")
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    build(base)
    sentence = "needs gguf, which this environment lacks. Install them with: pip install 'pytest-sway[hf,gguf]'"
    for fields in ({"base": gguf}, {"base": base, "finetuned": gguf}):
        with pytest.raises(BackendNotAvailableError, match=re.escape(sentence)):
            build(**fields)
    assert loads == [str(base)]


def test_weights_that_are_missing_are_not_made_up(build: Any, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    file = make_gguf(tmp_path / "model.gguf", folder)
    for broken in (folder, file):
        sentence = f"^the files of '{re.escape(str(broken))}' lack 9 of the model's weights \\(model.layers.2.input_"
        with pytest.raises(WeightsError, match=sentence):
            build(broken)
