"""Adapters with another vocabulary size than their base: PEFT's numbers on a resized base, and an unchanged base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.errors import AdapterMismatchError
from tests.tiny import WORDS, edit_weights, make_base, make_tokenizer, pickled, quiet, save_noise, save_tiny
from tests.unit.backends.hf.reference import fresh

if TYPE_CHECKING:
    from pathlib import Path

N = len(WORDS) + 4
NEW = [N, N + 1]
EMBEDDINGS = ["embed_tokens", "lm_head"]


def make_resized(
    folder: Path,
    base: Path,
    rows: int,
    *,
    words: int | None = None,
    seed: int = 1,
    scale: float = 0.3,
    saved: Any = "auto",
    **fields: Any,
) -> Path:
    """Save an adapter that was trained on a base with a resized vocabulary.

    Args:
        folder: The folder.
        base: The folder of the base.
        rows: Rows of embeddings.
        words: Size of its tokenizer's vocabulary, at least the base's; by default one word for each row.
        seed: Seeds its weights.
        scale: Standard deviation of the noise.
        saved: PEFT's ``save_embedding_layers``.
        fields: Fields of its configuration.
    """
    from peft import LoraConfig

    def resized() -> Any:
        model, _ = fresh(base)
        model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config = LoraConfig(**settings | fields)
    save_noise(resized, config, folder, seed=seed, scale=scale, save_embedding_layers=saved)
    more = max(rows if words is None else words, N) - N
    make_tokenizer(folder, extra=("quark", "lepton", *(f"word{i}" for i in range(more)))[:more])
    return folder


def expected(base: Path, adapter: Path, rows: int) -> Any:
    """Return PEFT's logits on a resized base, for a text with the last word."""
    import torch
    from peft import PeftModel

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, _ = fresh(base)
        model.resize_token_embeddings(rows)
        return _logits(PeftModel.from_pretrained(model, str(adapter)).eval(), rows)


def _logits(model: Any, rows: int) -> Any:
    import torch

    with torch.inference_mode():
        return model(torch.tensor([[4, 5, rows - 1, 6, rows - 2]])).logits


def check(backend: Any, base: Path, adapter: Path, rows: int) -> None:
    model, tokenizer = fresh(base)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert _logits(tuned.model, rows).equal(expected(base, adapter, rows))
        assert _logits(plain.model, N).equal(_logits(model, N))
        assert len(plain.tokenizer) == len(tokenizer)
        assert plain.next_token_dist("the quark").vocab_size == model.config.vocab_size
        assert tuned.next_token_dist("the quark").vocab_size == rows
        assert plain.logprob_of("the", " quark") == plain.logprob_of("the", " <unk>")
        assert tuned.generate("the sun", max_new_tokens=2)
    assert backend.changes() == []


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def spare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with more rows of embeddings than words in its tokenizer."""
    return make_base(tmp_path_factory.mktemp("spare"), vocab_size=N + 20)


MORE: dict[str, dict[str, Any]] = {
    "trained one by one": {"trainable_token_indices": NEW},
    "trained one by one, nothing else saved": {"trainable_token_indices": NEW, "saved": False},
    "trained whole": {"modules_to_save": EMBEDDINGS},
    "targets": {"target_modules": ["q_proj", *EMBEDDINGS]},
    "targets, nothing else saved": {"target_modules": ["q_proj", *EMBEDDINGS], "saved": False},
    "a target, nothing else saved": {"target_modules": ["embed_tokens"], "saved": False},
}


@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("of", ["base", "tied"])
def test_new_words_have_the_numbers_of_peft_on_a_resized_base(
    build: Any, request: pytest.FixtureRequest, tmp_path: Path, kind: str, of: str
) -> None:
    base = request.getfixturevalue(of)
    adapter = make_resized(tmp_path, base, N + 2, **MORE[kind])
    check(build(base, adapter), base, adapter, N + 2)


def test_new_words_have_these_numbers_where_trees_share_what_is_written(
    build: Any, base: Path, tmp_path: Path, exposed: None
) -> None:
    adapter = make_resized(tmp_path, base, N + 2, target_modules=["q_proj", *EMBEDDINGS], saved=False)
    check(build(base, adapter), base, adapter, N + 2)


@pytest.mark.parametrize("fields", [{"modules_to_save": EMBEDDINGS}, {}], ids=["trained whole", "saved only"])
def test_spare_rows_that_an_adapter_does_not_have_are_cut(
    build: Any, spare: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    adapter = make_resized(tmp_path, spare, N, **fields)
    check(build(spare, adapter), spare, adapter, N)


def test_new_words_may_be_in_a_pickle(build: Any, base: Path, tmp_path: Path) -> None:
    adapter = pickled(make_resized(tmp_path, base, N + 2, modules_to_save=EMBEDDINGS))
    check(build(base, adapter, allow_pickle=True), base, adapter, N + 2)


def test_rows_beyond_the_tokenizer_are_kept(build: Any, base: Path, tmp_path: Path) -> None:
    adapter = make_resized(tmp_path, base, N + 5, words=N + 2, modules_to_save=EMBEDDINGS)
    check(build(base, adapter), base, adapter, N + 5)


def test_new_words_in_spare_rows_need_no_others(build: Any, spare: Path, tmp_path: Path) -> None:
    adapter = make_resized(tmp_path, spare, N + 20, words=N + 2, trainable_token_indices=NEW)
    check(build(spare, adapter), spare, adapter, N + 20)


def test_adapters_of_several_numbers_of_words_share_a_base(
    build: Any, base: Path, tmp_path: Path, loads: list[str]
) -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj", *EMBEDDINGS]}
    sizes = [N + 2, N + 5, N + 1, N + 2]
    adapters = [make_resized(tmp_path / str(i), base, rows, seed=i, **fields) for i, rows in enumerate(sizes)]
    backends = [build(base, adapter) for adapter in adapters]
    for backend, adapter, rows in zip(backends, adapters, sizes, strict=True):
        check(backend, base, adapter, rows)
    assert len(loads) == 1


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("architecture", "sizes", "target", "embeddings"),
    [
        ("mamba", _SIZES | {"state_size": 4}, "in_proj", "embeddings"),
        ("rwkv", _SIZES | {"attention_hidden_size": 32}, "key", "embeddings"),
        ("gpt_neox", _SIZES | _HEADS, "query_key_value", "embed_in"),
    ],
)
@pytest.mark.parametrize("how", ["saved only", "one by one"])
def test_embeddings_are_found_whatever_their_name(
    build: Any, tmp_path: Path, architecture: str, sizes: dict[str, int], target: str, embeddings: str, how: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    base = tmp_path / "base"
    make_tokenizer(base)
    config = AutoConfig.for_model(architecture, vocab_size=N, bos_token_id=1, eos_token_id=2, **sizes)
    auto: Any = AutoModelForCausalLM
    save_tiny(lambda: auto.from_config(config), base)
    fields: dict[str, Any] = {} if how == "saved only" else {"trainable_token_indices": {embeddings: NEW}}
    adapter = make_resized(tmp_path / "adapter", base, N + 2, target_modules=[target], **fields)
    check(build(base, adapter), base, adapter, N + 2)


def test_a_trained_word_that_no_tokenizer_has_is_refused(build: Any, base: Path, tmp_path: Path) -> None:
    adapter = make_resized(tmp_path, base, N + 2, words=N, trainable_token_indices=NEW, saved=False)
    text = f"trains the token {N + 1}, but the model has {N} embeddings and the tokenizer {N} tokens. Put the tokenizer"
    with pytest.raises(AdapterMismatchError, match=text):
        build(base, adapter)


# --- in a list of adapters --------------------------------------------------------------------------------------------


def _merged(base: Path, *adapters: tuple[Path, int]) -> Any:
    """Return PEFT's model of adapters, each on a base of its number of rows, merged but for the last."""
    import torch
    from peft import PeftModel

    with quiet(), torch.random.fork_rng(devices=[]):
        model, _ = fresh(base)
        for adapter, rows in adapters:
            torch.manual_seed(0)
            unloaded = model.merge_and_unload() if isinstance(model, PeftModel) else model
            unloaded.resize_token_embeddings(rows)
            model = PeftModel.from_pretrained(unloaded, str(adapter))
    return model.eval()


@pytest.mark.parametrize("rows", [(N + 2, N + 5), (N + 5, N + 2), (N + 2, N)], ids=str)
def test_the_last_adapter_that_has_embeddings_decides_about_the_number_of_words(
    build: Any, base: Path, tmp_path: Path, rows: tuple[int, int]
) -> None:
    adapters = [
        make_resized(tmp_path / str(i), base, n, seed=i, modules_to_save=EMBEDDINGS) for i, n in enumerate(rows)
    ]
    with build(base, adapters).as_finetuned() as tuned:
        found = _logits(tuned.model, rows[-1])
        assert len(tuned.tokenizer) == rows[-1]
    assert found.equal(_logits(_merged(base, *zip(adapters, rows, strict=True)), rows[-1]))


def test_an_adapter_with_fewer_words_than_the_tokenizer_of_the_one_before_it_is_refused(
    build: Any, base: Path, tmp_path: Path
) -> None:
    more = make_resized(tmp_path / "more", base, N + 2, modules_to_save=EMBEDDINGS)
    fewer = make_resized(tmp_path / "fewer", base, N, modules_to_save=EMBEDDINGS)
    for file in fewer.glob("tokenizer*"):
        file.unlink()
    text = (
        rf"fewer' has embeddings for {N} tokens, but it is put on an adapter whose tokenizer has {N + 2}, so it was not"
    )
    with pytest.raises(AdapterMismatchError, match=text):
        build(base, [more, fewer])


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("rows", [N + 2, N - 5])
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": EMBEDDINGS}])
def test_an_untrained_adapter_of_another_number_of_words_is_told(
    build: Any, base: Path, tmp_path: Path, rows: int, fields: dict[str, Any]
) -> None:
    adapter = make_resized(tmp_path, base, rows, scale=0.0, **fields)
    with pytest.raises(AdapterMismatchError, match=r"changes nothing on the base .*Was it saved before it was trained"):
        build(base, adapter)


def test_an_adapter_that_trains_new_words_alone_is_accepted(build: Any, base: Path, tmp_path: Path) -> None:
    def only_words(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()

    adapter = make_resized(tmp_path, base, N + 2, trainable_token_indices={"embed_tokens": NEW})
    with build(base, edit_weights(adapter, only_words)).as_finetuned() as view:
        assert _logits(view.model, N + 2).allclose(expected(base, adapter, N + 2), rtol=0, atol=1e-5)
