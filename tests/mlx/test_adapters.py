"""The adapters that the mlx backend loads, and the refusals of others."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pytest_sway.backends.mlx.builder import MLXBuilder
from pytest_sway.errors import AdapterMismatchError, SpecError, SwayWarning, WeightsError
from pytest_sway.spec.model_spec import ModelSpec
from tests.mlx.native import LORA, edit_native, fresh_logits, make_native, view_logits
from tests.tiny import (
    edit_config,
    edit_weights,
    make_adapter,
    make_base,
    make_tokenizer,
    pickled,
    poison,
    save_adapter,
    set_template,
    truncate,
)

Build = Callable[..., Any]

NATIVE: dict[str, dict[str, Any]] = {
    "all layers": {},
    "the last layer": {"layers": 1},
    "all layers, asked for with -1": {"layers": -1},
    "some modules": {"keys": ["self_attn.q_proj", "mlp.down_proj"]},
    "the output layer": {"keys": ["lm_head"]},
    "the embeddings": {"keys": ["model.embed_tokens"]},
    "DoRA": {"kind": "dora"},
    "DoRA on the embeddings": {"kind": "dora", "keys": ["model.embed_tokens"]},
    "a full fine-tune of one layer": {"kind": "full", "layers": 1},
}


@pytest.mark.parametrize("settings", NATIVE.values(), ids=NATIVE)
def test_an_adapter_of_mlx_lm_gives_what_mlx_lm_gives_to_the_bit(
    build: Build, base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = make_native(tmp_path / "adapter", base, **settings)
    backend = build(base, adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        for _ in range(2):
            assert np.array_equal(view_logits(tuned), fresh_logits(base, adapter))
            assert np.array_equal(view_logits(plain), fresh_logits(base))
    assert not np.allclose(fresh_logits(base), fresh_logits(base, adapter), atol=1e-2)
    assert backend.changes() == []


def test_putting_on_an_adapter_uses_no_random_number(build: Build, base: Path, adapter: Path, tmp_path: Path) -> None:
    native = make_native(tmp_path / "adapter", base)
    mx.random.seed(4)
    before = mx.random.state[0].tolist()
    build(base, adapter)
    build(base, native)
    assert mx.random.state[0].tolist() == before


def test_an_adapter_of_a_tied_embedding_is_refused(build: Build, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = make_adapter(tmp_path / "adapter", base, targets=("embed_tokens",))
    with pytest.raises(AdapterMismatchError, match="the base's embeddings are its output layer too, and MLX would"):
        build(base, adapter)


def test_embeddings_that_the_adapter_has_changed_are_refused(build: Build, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, targets=("lm_head",))

    def change(tensors: dict[str, Any]) -> None:
        next(tensor for name, tensor in tensors.items() if "base_layer" in name)[0, 0] += 1

    with pytest.raises(AdapterMismatchError, match=r"its values of lm_head\.weight differ from the base's"):
        build(base, edit_weights(adapter, change))


def test_dora_on_an_embedding_is_refused(build: Build, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, targets=("embed_tokens", "q_proj"), use_dora=True)
    with pytest.raises(AdapterMismatchError, match="DoRA on an embedding, which mlx-lm computes in another way"):
        build(base, adapter)


def test_another_type_of_peft_is_refused(build: Build, base: Path, tmp_path: Path) -> None:
    from peft import IA3Config

    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "adapter", base, config)
    with pytest.raises(AdapterMismatchError, match=r"mlx-lm has no layers for the type IA3\. Use kind='hf' for it\."):
        build(base, adapter)


def test_an_adapter_that_was_never_trained_is_refused(build: Build, base: Path, tmp_path: Path) -> None:
    for adapter in (
        make_adapter(tmp_path / "peft", base, zero_b=True),
        make_adapter(tmp_path / "dora", base, zero_b=True, use_dora=True),
        make_native(tmp_path / "native", base, scale=0.0),
        make_native(tmp_path / "native_dora", base, kind="dora", scale=0.0),
        make_native(tmp_path / "full", base, kind="full", scale=0.0),
    ):
        with pytest.raises(AdapterMismatchError, match=r"changes nothing on the base .* Was it saved before it was"):
            build(base, adapter)


def test_an_adapter_with_a_nan_is_refused(build: Build, base: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        first = min(tensors)
        tensors[first] = tensors[first] * float("nan")

    for adapter in (
        poison(make_adapter(tmp_path / "peft", base)),
        edit_native(make_native(tmp_path / "native", base), spoil),
    ):
        with pytest.raises(AdapterMismatchError, match=r"has NaN or infinite values in 1 of its \d+ tensors"):
            build(base, adapter)


@pytest.mark.parametrize(
    ("make", "change", "field"),
    [
        (make_adapter, {"lora_alpha": float("nan")}, "lora_alpha = nan"),
        (make_adapter, {"lora_alpha": 1e39}, "lora_alpha = 1e+39"),
        (make_adapter, {"alpha_pattern": {".*": "x"}}, r"alpha_pattern['.*'] = 'x'"),
        (make_adapter, {"r": 0}, "r = 0"),
        (make_adapter, {"r": None}, "r = None"),
        (make_adapter, {"rank_pattern": {"q": 0.5}}, "rank_pattern['q'] = 0.5"),
        (make_native, {"lora_parameters": LORA | {"rank": "many"}}, "rank in lora_parameters = 'many'"),
        (make_native, {"lora_parameters": LORA | {"scale": float("inf")}}, "scale in lora_parameters = inf"),
        (make_native, {"lora_parameters": LORA | {"scale": [1]}}, "scale in lora_parameters = [1]"),
    ],
)
def test_a_rank_or_scale_that_is_no_such_number_is_refused_by_its_name(
    build: Build, base: Path, tmp_path: Path, make: Callable[..., Path], change: dict[str, Any], field: str
) -> None:
    adapter = edit_config(make(tmp_path / "adapter", base), **change)
    with pytest.raises(SpecError, match=re.escape(f"{str(adapter / 'adapter_config.json')!r} has {field}; ")):
        build(base, adapter)


@pytest.mark.parametrize("make", [make_adapter, make_native])
def test_an_adapter_so_large_that_scores_would_be_nan_is_refused(
    build: Build, base: Path, tmp_path: Path, make: Callable[..., Path]
) -> None:
    def swell(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name] = tensors[name] * 0 + 1e38

    change: Any = {make_adapter: edit_weights, make_native: edit_native}[make]
    adapter = change(make(tmp_path / "adapter", base), swell)
    with pytest.raises(AdapterMismatchError, match=r"adapter' the base .* computes NaN or infinite log-probabilities"):
        build(base, adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapters.safetensors", "tokenizer.json"])
def test_a_pipe_in_an_adapters_folder_is_not_waited_for(build: Build, base: Path, tmp_path: Path, name: str) -> None:
    adapter = make_native(tmp_path / "adapter", base)
    make_tokenizer(adapter)
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    with pytest.raises((SpecError, WeightsError), match=rf"{name}' is a pipe, a device or a socket"):
        build(base, adapter)


def test_an_expression_that_backtracks_without_end_is_refused(
    build: Build, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_sway.backends.checkpoints.expressions._PATIENCE", 0.5)
    adapter = edit_config(make_adapter(tmp_path / "adapter", base), rank_pattern={r"(\w*\.?)+\d\d$": 4})
    with pytest.raises(SpecError, match=r"takes more than 0\.5 s to match the names of the modules"):
        build(base, adapter)


def test_a_rank_that_the_weights_cannot_fill_is_refused_at_once(build: Build, base: Path, tmp_path: Path) -> None:
    adapter = edit_config(make_adapter(tmp_path / "adapter", base), r=10**7)
    with pytest.raises(AdapterMismatchError, match=r"has r = 10,000,000, but no tensor of the adapter has a side of"):
        build(base, adapter)


def test_an_adapter_of_another_base_is_refused(build: Build, base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", hidden=64, layers=3)
    for adapter, what in (
        (make_adapter(tmp_path / "sizes", other, layers_to_transform=[0]), "4 of its tensors have other sizes"),
        (make_adapter(tmp_path / "layers", other), "4 of its tensors have no place in the base"),
        (make_native(tmp_path / "native_sizes", other, layers=1), "of its tensors have"),
        (make_native(tmp_path / "native_layers", other, layers=3), "of its tensors have no place in the base"),
    ):
        fits_not = pytest.raises(
            AdapterMismatchError, match=f"does not fit the base .*{what}.*Name the base that it was"
        )
        with fits_not, pytest.warns(SwayWarning, match="their configs differ in head_dim, hidden_size"):
            build(base, adapter)


def test_an_adapter_that_names_another_base_of_the_same_sizes_is_told(build: Build, base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "sft", seed=7)
    for adapter in (make_adapter(tmp_path / "peft", other), make_native(tmp_path / "native", other)):
        with pytest.warns(SwayWarning, match="was trained on .*sft'.*: their weights have other values"):
            build(base, adapter)
        strict = MLXBuilder(on_base_mismatch="error")
        spec = ModelSpec(kind="mlx", device="cpu", dtype="fp32", base=str(base), adapter=adapter)
        for ask in (strict.check, strict):
            with pytest.raises(AdapterMismatchError, match=r"was trained on .*set sway_on_base_mismatch = ignore\."):
                ask(spec)
        MLXBuilder(on_base_mismatch="ignore")(spec).close()


def test_an_adapter_in_parts_is_refused(build: Build, base: Path, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        del tensors[min(tensors)]

    for adapter in (
        edit_weights(make_adapter(tmp_path / "peft", base), drop),
        edit_native(make_native(tmp_path / "native", base), drop),
    ):
        with pytest.raises(AdapterMismatchError, match="1 places in the base have no tensor in it"):
            build(base, adapter)


def test_a_refused_adapter_leaves_the_base_as_it_was(
    build: Build, base: Path, adapter: Path, tmp_path: Path, loads: list[str]
) -> None:
    backend = build(base)
    for broken in (
        poison(make_adapter(tmp_path / "peft", base)),
        make_native(tmp_path / "native", base, scale=0.0),
        edit_config(make_native(tmp_path / "keys", base), lora_parameters=LORA | {"rank": 5}),
    ):
        with pytest.raises(AdapterMismatchError):
            build(base, broken)
    with backend.as_base() as plain:
        assert np.array_equal(view_logits(plain), fresh_logits(base))
    build(base, adapter)
    assert loads == [str(base)]


def test_what_mlx_does_not_read_is_refused(build: Build, base: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=re.escape("adapter_model.bin, a pickle")):
        build(base, pickled(make_adapter(tmp_path / "pickled", base)))
    with pytest.raises(WeightsError, match=re.escape("adapter_model.bin, a pickle")):
        build(base, tmp_path / "pickled", allow_pickle=True)
    with pytest.raises(WeightsError, match="truncated or corrupt"):
        build(base, truncate(make_adapter(tmp_path / "cut", base)))
    native = make_native(tmp_path / "native", base)
    (native / "adapters.safetensors").rename(native / "adapters.npz")
    with pytest.raises(WeightsError, match=r"expected adapters\.safetensors.*the format of the first versions"):
        build(base, native)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_tune_type": "qlora"}, "has the fine_tune_type 'qlora'; the known ones are lora, dora, full"),
        ({"num_layers": None}, "does not say which layers mlx-lm changes"),
        ({"lora_parameters": {"rank": 4, "alpha": 8}}, "it needs num_layers, and lora_parameters with rank and scale"),
    ],
)
def test_a_configuration_that_mlx_lm_would_not_understand_is_refused(
    build: Build, base: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    adapter = edit_config(make_native(tmp_path / "adapter", base), **change)
    with pytest.raises(SpecError, match=message):
        build(base, adapter)


def test_a_folder_of_no_adapter_is_refused(build: Build, base: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="does not exist"):
        build(base, tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"rank": 8}))
    with pytest.raises(SpecError, match="names no peft_type, so it describes no adapter"):
        build(base, tmp_path)


def test_an_adapter_in_the_dtype_of_its_base_is_computed_as_mlx_lm_computes_it(build: Build, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16")
    adapter = make_native(tmp_path / "adapter", base)
    with build(base, adapter, dtype="bf16").as_finetuned() as tuned:
        assert np.array_equal(view_logits(tuned), fresh_logits(base, adapter))


def test_an_adapter_trained_anew_in_the_same_folder_is_another_one(base: Path, adapter: Path, tmp_path: Path) -> None:
    from pytest_sway.cache.backend_cache import BackendCache

    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    spec = {"kind": "mlx", "base": base, "adapter": folder}
    cache = BackendCache(max_size=2)
    first = cache.get_or_load(spec)
    assert cache.get_or_load(spec).backend is first.backend
    edit_weights(folder, lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    assert cache.get_or_load(spec).backend is not first.backend
    cache.shutdown()


def test_a_tokenizer_that_the_adapter_brings_is_the_tuned_sides(
    build: Build, base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    make_tokenizer(folder, extra=("zebra",))
    backend = build(base, folder)
    with backend.as_base() as plain, backend.as_finetuned() as tuned, backend.as_scaled_adapter(0.5) as half:
        assert plain.tokenizer.convert_tokens_to_ids("zebra") == plain.tokenizer.unk_token_id
        for view in (tuned, half):
            assert view.tokenizer.convert_tokens_to_ids("zebra") == len(view.tokenizer.vocab) - 1


def test_the_base_view_renders_with_the_bases_own_template(
    build: Build, base: Path, adapter: Path, tmp_path: Path
) -> None:
    talking = Path(shutil.copytree(base, tmp_path / "base"))
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    make_tokenizer(folder)
    for where, words in ((talking, "the cat"), (folder, "the dog")):
        set_template(where, words + "{% for m in messages %} {{ m.content }}{% endfor %}")
    messages, backend, alone = [{"role": "user", "content": "sat on"}], build(talking, folder), build(talking)
    with backend.as_base() as plain, backend.as_finetuned() as tuned, alone.as_base() as expected:
        assert (plain.render(messages), tuned.render(messages)) == ("the cat sat on", "the dog sat on")
        assert plain.logprob_of(messages, " the mat") == expected.logprob_of("the cat sat on", " the mat")


def test_a_scale_so_large_that_scores_would_be_nan_is_refused(build: Build, base: Path, tmp_path: Path) -> None:
    adapter = edit_config(make_native(tmp_path / "adapter", base), lora_parameters=LORA | {"scale": 10**30})
    with pytest.raises(AdapterMismatchError, match="its weights or its scale are too large"):
        build(base, adapter)


def test_keys_with_the_name_of_pefts_adapter_are_its_keys(
    build: Build, base: Path, adapter: Path, tmp_path: Path
) -> None:
    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}

    named = edit_weights(shutil.copytree(adapter, tmp_path / "named"), rename)
    with build(base, named).as_finetuned() as view, build(base, adapter).as_finetuned() as expected:
        assert np.array_equal(view_logits(view), view_logits(expected))


@pytest.mark.parametrize("make", [make_adapter, make_native])
def test_a_byte_order_mark_changes_nothing(build: Build, base: Path, tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path / "adapter", base)
    with build(base, folder).as_finetuned() as view:
        expected = view_logits(view)
    config = folder / "adapter_config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    with build(base, folder).as_finetuned() as view:
        assert np.array_equal(view_logits(view), expected)


@pytest.mark.parametrize("part", ["tokenizer.json", "chat_template.jinja"])
def test_a_part_of_a_tokenizer_goes_with_the_rest_of_the_bases(
    build: Build, base: Path, adapter: Path, tmp_path: Path, part: str
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    if part == "tokenizer.json":
        make_tokenizer(folder, extra=("zebra",))
        (folder / "tokenizer_config.json").unlink()
    else:
        (folder / part).write_text("{% for m in messages %}he said : {{ m.content }}{% endfor %}")
    with build(base, folder).as_base() as plain, build(base, folder).as_finetuned() as tuned:
        assert (tuned.tokenizer.convert_tokens_to_ids("zebra") != tuned.tokenizer.unk_token_id) is (part[0] == "t")
        assert bool(tuned.tokenizer.chat_template) is (part[0] == "c")
        assert not plain.tokenizer.chat_template
        names = ("bos_token", "eos_token", "model_max_length")
        assert [getattr(tuned.tokenizer, name) for name in names] == [getattr(plain.tokenizer, name) for name in names]


def test_a_text_ends_at_the_eos_of_the_tokenizer_that_an_adapter_brings(
    build: Build, base: Path, adapter: Path, tmp_path: Path
) -> None:
    prompt = "the sun rises in the"
    with build(base, adapter).as_finetuned() as view:
        words = view.generate(prompt, max_new_tokens=12).split()
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    make_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": words[2]}))
    with build(base, folder).as_finetuned() as view:
        assert view.generate(prompt, max_new_tokens=12) == " ".join(words[: words.index(words[2])])


def test_a_token_that_is_added_to_an_adapters_tokenizer_is_that_adapters_affair(
    build: Build, base: Path, adapter: Path, tmp_path: Path, loads: list[str]
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    make_tokenizer(folder, extra=("zebra",))
    backend, other = build(base, folder), build(base, adapter)
    with backend.as_finetuned() as tuned:
        tuned.tokenizer.add_tokens(["giraffe"])
    assert backend.changes() == ["tokenizer: its added tokens changed"]
    assert other.changes() == []
    build(base)
    assert loads == [str(base)]


def test_a_tokenizer_that_is_the_bases_is_the_bases(build: Build, base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    make_tokenizer(folder)
    with build(base, folder).as_base() as one, build(base, adapter).as_base() as other:
        assert one.tokenizer._tokenizer._tokenizer is other.tokenizer._tokenizer._tokenizer


def test_what_a_wrapper_has_put_into_all_names_is_taken_out(
    build: Build, base: Path, adapter: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(adapter, tmp_path / "copied")
    edit_weights(copied, lambda tensors: {f"module._orig_mod.{name}": each for name, each in tensors.items()})
    with build(base, adapter).as_finetuned() as view:
        expected = view.logprob_of("the sun", " rises")
    with pytest.warns(SwayWarning, match=r"have '_orig_mod', 'module' in their names"):
        backend = build(base, copied)
    with backend.as_finetuned() as view:
        assert view.logprob_of("the sun", " rises") == expected
