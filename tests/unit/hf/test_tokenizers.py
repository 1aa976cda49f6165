from __future__ import annotations

import gc
import json
import shutil
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from tests.tiny import make_base, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def copied(tmp_path: Path, adapter: Path) -> Path:
    return shutil.copytree(adapter, tmp_path / "copied")


def test_the_bases_own_tokenizer_in_the_adapters_folder_is_shared(build: Any, base: Path, copied: Path) -> None:
    make_tokenizer(copied)
    plain, backend = build(base), build(base, copied)
    with plain.as_base() as a, backend.as_finetuned() as b:
        assert a.tokenizer is b.tokenizer


def test_another_tokenizer_serves_both_views_of_its_backend(build: Any, base: Path, copied: Path) -> None:
    make_tokenizer(copied)
    path = copied / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    plain, backend = build(base), build(base, copied)
    with plain.as_base() as a, backend.as_base() as b, backend.as_finetuned() as c:
        assert b.tokenizer is c.tokenizer is not a.tokenizer
        assert (a.tokenizer.padding_side, c.tokenizer.padding_side) == ("right", "left")
    assert backend.changes() == []


def test_adapters_with_equal_tokenizers_share_them(build: Any, base: Path, copied: Path, tmp_path: Path) -> None:
    make_tokenizer(copied, extra=("quark",))
    twin = shutil.copytree(copied, tmp_path / "twin")
    with build(base, copied).as_finetuned() as a, build(base, twin).as_finetuned() as b:
        assert a.tokenizer is b.tokenizer
        assert len(a.tokenizer) == 92


def test_an_adapters_tokenizer_goes_with_the_last_backend_that_uses_it(
    build: Any, base: Path, copied: Path, tmp_path: Path
) -> None:
    make_tokenizer(copied, extra=("quark",))
    twin = shutil.copytree(copied, tmp_path / "twin")
    plain, first, second = build(base), build(base, copied), build(base, twin)
    with first.as_base() as view:
        tokenizer = weakref.ref(view.tokenizer)
    first.close()
    assert tokenizer() is not None
    second.close()
    gc.collect()
    assert tokenizer() is None
    assert plain.changes() == []


def _adds_specials(folder: Path, *pieces: str) -> Path:
    """Have a model's tokenizer put special tokens around each text; ``A`` stands for the text."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    ids = {"<s>": 1, "</s>": 2}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if piece == "A" else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in pieces
    ]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()},
    }
    path.write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("before", [(), ("<s>",)], ids=["without BOS", "with BOS"])
def test_eos_that_a_tokenizer_adds_changes_no_number(
    build: Any, tmp_path_factory: pytest.TempPathFactory, before: tuple[str, ...]
) -> None:
    plain = _adds_specials(make_base(tmp_path_factory.mktemp("plain")), *before, "A")
    ends = _adds_specials(make_base(tmp_path_factory.mktemp("ends")), *before, "A", "</s>")
    prompt, completion = "the sun rises in the", " east and sets"
    with build(plain).as_base() as expected, build(ends).as_base() as view:
        assert view.tokenizer(prompt)["input_ids"][-1] == 2
        assert view.logprob_of(prompt, completion) == expected.logprob_of(prompt, completion)
        assert view.next_token_dist(prompt).token_ids.tolist() == expected.next_token_dist(prompt).token_ids.tolist()
        assert view.generate(prompt, max_new_tokens=4) == expected.generate(prompt, max_new_tokens=4)
        for prefix in (True, False):
            ours, theirs = (v.rolling_logprob(prompt, prefix=prefix) for v in (view, expected))
            assert ours.token_ids.tolist() == theirs.token_ids.tolist()
            assert ours.total_logprob == theirs.total_logprob
        assert view.logprob_of(prompt, " east</s>") == expected.logprob_of(prompt, " east</s>")
