from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_sway.backends.text.stopping import ends_of, has_stopped, stopped_text


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level tokenizer: a stop text can begin and end inside of tokens, and a character can take several."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["st", "op", "top", "stop", "topp", "ed", "Ċ"]
    merges = [("s", "t"), ("o", "p"), ("t", "op"), ("s", "top"), ("top", "p"), ("e", "d")]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*letters, *words]))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=made, eos_token="<|im_end|>")


def ids_of(tokenizer: Any, *tokens: str) -> list[int]:
    """Return the ids of tokens; a text that is no token is cut into its own."""
    vocabulary = tokenizer.get_vocab()
    return [
        each
        for token in tokens
        for each in ([vocabulary[token]] if token in vocabulary else tokenizer(token).input_ids)
    ]


@pytest.mark.parametrize(
    ("tokens", "stop", "text"),
    [
        (("a", "stop", "b"), ["stop"], "a"),
        (("a", "st", "op", "b"), ["stop"], "a"),
        (("a", "s", "topp", "ed"), ["stop"], "a"),  # it ends inside of a token
        (("a", "stop", "p"), ["top"], "as"),  # it begins inside of one
        (("a", "€", "b"), ["€"], "a"),  # three tokens are one character
        (("€", "st", "op"), ["t"], "€s"),
        (("a", "b", "c"), ["bc", "b"], "a"),  # `b` is there first
        (("a", "b", "c"), ["c", "ab"], ""),
        (("a", "<|im_end|>", "b"), ["<|im_end|>"], "a"),
        (("a", "b", "Ċ", "<|im_end|>"), ["\n<|im_end|>"], "ab"),
        (("a", "b", "<|im_end|>", "Ċ"), ["b<|im_end|>\n"], "a"),
        (("<|im_end|>", "a", "<|im_end|>", "b"), ["a<|im"], ""),
        (("a", "<|im_end|>", "b"), ["ab"], ""),
        (("a", "b"), ["nowhere"], "ab"),
        (("a", "<|im_end|>"), [], "a"),
    ],
)  # fmt: skip
def test_new_tokens_end_before_the_stop_text_that_they_complete_first(
    tokenizer: Any, tokens: tuple[str, ...], stop: list[str], text: str
) -> None:
    ids = ids_of(tokenizer, *tokens)
    assert stopped_text(tokenizer, ids, stop) == text
    assert stopped_text(tokenizer, ids + ids_of(tokenizer, "Ċ"), stop) == text + "\n" * (
        not stop or stop == ["nowhere"]
    )


@pytest.mark.parametrize("stop", ["stop", "€", "p\n", "<|im_end|>"])
def test_generation_ends_with_the_token_that_completes_a_stop_text(tokenizer: Any, stop: str) -> None:
    ids = ids_of(tokenizer, "some text of many letters, ", "st", "€", "topp", "s", "topp", "Ċ", "€", "<|im_end|>", "a")
    ends = [count for count in range(1, len(ids) + 1) if has_stopped(tokenizer, ids[:count], [stop])]
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert stop in tokenizer.decode(ids[: ends[0]], skip_special_tokens=False)
    assert stop not in tokenizer.decode(ids[: ends[0] - 1], skip_special_tokens=False)
    assert stopped_text(tokenizer, ids, [stop]) == whole[: whole.index(stop)]


@pytest.mark.parametrize("stop", ["\ufffd", "a\ufffd", "\ufffd\ufffd", "\ufffd😀"])
def test_the_first_bytes_of_a_character_are_no_stop_text(tokenizer: Any, stop: str) -> None:
    ids = ids_of(tokenizer, "a", "€", "a", "😀", "a", "ж", "b")
    assert not [count for count in range(1, len(ids) + 1) if has_stopped(tokenizer, ids[:count], [stop])]
    assert stopped_text(tokenizer, ids, [stop]) == "a€a😀aжb"


def test_the_first_bytes_of_a_character_that_decode_one_by_one_are_no_stop_text() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "a": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=made)
    ids = [1, *(byte + 2 for byte in "😀".encode()), 1]
    assert not [count for count in range(1, len(ids) + 1) if has_stopped(tokenizer, ids[:count], ["\ufffd"])]
    assert stopped_text(tokenizer, ids, ["\ufffd"]) == "a😀a"


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_character_that_was_written_as_unknown_is_a_stop_text(tokenizer: Any, count: int) -> None:
    ids = ids_of(tokenizer, "a", "\ufffd" * count, "€", "b")
    stop = "\ufffd" * count
    ends = [end for end in range(1, len(ids) + 1) if has_stopped(tokenizer, ids[:end], [stop])]
    assert ends
    assert tokenizer.decode(ids[: ends[0]]).startswith(f"a{stop}")
    assert stopped_text(tokenizer, ids, [stop]) == "a"
    assert stopped_text(tokenizer, ids[: ends[0]], [stop]) == "a"


def test_a_text_that_ends_inside_of_a_character_ends_before_it_if_asked(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "a", "€")[:-1]
    assert stopped_text(tokenizer, ids, ["\ufffd"]) == "a"
    assert stopped_text(tokenizer, ids, ["nowhere"]) == "a\ufffd"


@pytest.mark.parametrize(
    ("configured", "eos", "ends"),
    [(None, None, ()), (None, 5, (5,)), (4, None, (4,)), (4, 5, (4, 5)), ([4, 6], 5, (4, 6, 5)), ((5, 4), 5, (5, 4))],
)
def test_a_text_ends_at_the_configured_tokens_and_at_the_tokenizers_own(
    configured: Any, eos: int | None, ends: tuple[int, ...]
) -> None:
    assert ends_of(configured, SimpleNamespace(eos_token_id=eos)) == ends
