from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.backends.local.tokenizer_copies import copied_for_test
from pytest_sway.errors import ScoringError, SpecError
from tests.tiny import TEXT, make_base, make_tokenizer
from tests.unit.backends.hf.insides import engine_of, tokenizer_in
from tests.unit.backends.hf.reference import fresh


@pytest.fixture
def copied(tmp_path: Path, adapter: Path) -> Path:
    return shutil.copytree(adapter, tmp_path / "copied")


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a chat template."""
    folder = make_base(tmp_path_factory.mktemp("chatting"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} .{% endfor %}")
    return folder


def _rust(view: Any) -> Any:
    return view.tokenizer.backend_tokenizer


def test_the_bases_own_tokenizer_in_the_adapters_folder_is_shared(build: Any, base: Path, copied: Path) -> None:
    make_tokenizer(copied)
    plain, backend = build(base), build(base, copied)
    with plain.as_base() as a, backend.as_finetuned() as b:
        assert _rust(a) is _rust(b)


def test_each_view_has_a_tokenizer_of_its_own_for_as_long_as_it_is_open(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_base() as a, backend.as_finetuned() as b:
        tokenizer = a.tokenizer
        assert tokenizer is a.tokenizer
        assert tokenizer is not b.tokenizer
        tokenizer.padding_side = "left"
        assert (a.tokenizer.padding_side, b.tokenizer.padding_side) == ("left", "right")
    with backend.as_base() as c:
        assert c.tokenizer is not tokenizer
        assert c.tokenizer.padding_side == "right"
    assert type(tokenizer) is type(fresh(base)[1])
    assert backend.changes() == []


def test_a_call_of_a_tests_tokenizer_in_the_middle_of_the_views_own_cuts_nothing(
    build: Any, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build(base, adapter).as_finetuned() as view:
        own, engines = view.tokenizer, engine_of(view).tokenizer
        begin, begun = engines.set_truncation_and_padding, []

        def begin_and_let_another_in(**settings: Any) -> None:
            begin(**settings)
            begun.append(own([TEXT, "the sun"], padding="max_length", truncation=True, max_length=4)["input_ids"])

        monkeypatch.setattr(engines, "set_truncation_and_padding", begin_and_let_another_in)
        found = view.rolling_logprob(TEXT, prefix=False).token_ids.tolist()
        assert begun
        assert begun[0][0] == found[:4]
        assert found == own(TEXT)["input_ids"]


def test_tests_share_one_vocabulary_with_the_views_and_notice_when_they_change_it(build: Any, base: Path) -> None:
    backend = build(base)
    with backend.as_base() as view, backend.as_base() as other:
        assert _rust(view) is _rust(other)
        assert _rust(view).to_str() == engine_of(view).tokenizer.backend_tokenizer.to_str()
        assert backend.changes() == []
        view.tokenizer.add_tokens(["quark"])
        assert backend.changes() == ["tokenizer: its added tokens changed"]
        assert "quark" not in engine_of(view).tokenizer.get_vocab()


def test_a_tokenizer_whose_tokens_would_get_other_numbers_is_shared_as_a_whole(base: Path) -> None:
    from tokenizers import models

    tokenizer: Any = fresh(base)[1]
    rust = tokenizer.backend_tokenizer
    tokenizer.add_tokens(["quark"])
    vocabulary = rust.get_vocab(with_added_tokens=False)
    rust.model = models.WordLevel({**vocabulary, "lepton": len(vocabulary)}, unk_token="<unk>")
    made = copied_for_test(tokenizer)
    assert made.backend_tokenizer is rust
    assert made.convert_tokens_to_ids("quark") == len(vocabulary)


def test_the_base_view_has_the_bases_own_tokenizer_and_the_tuned_view_the_adapters(
    build: Any, base: Path, copied: Path
) -> None:
    make_tokenizer(copied, extra=("quark",))
    path = copied / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    plain, backend = build(base), build(base, copied)
    with plain.as_base() as a, backend.as_base() as b, backend.as_finetuned() as c:
        assert _rust(b) is _rust(a)
        assert _rust(c) is not _rust(b)
        assert [view.tokenizer.padding_side for view in (a, b, c)] == ["right", "right", "left"]
        assert [len(view.tokenizer) for view in (a, b, c)] == [91, 91, 92]
        assert b.logprob_of("the quark", " rises") == a.logprob_of("the <unk>", " rises")
        assert b.tokenizer.decode([91]) == ""
        assert c.tokenizer.decode([91]) == "quark"
    assert backend.changes() == []


def test_the_base_view_has_the_bases_own_chat_template(build: Any, base: Path, copied: Path) -> None:
    make_tokenizer(copied)
    (copied / "chat_template.jinja").write_text("{% for m in messages %}he said : {{ m.content }} {% endfor %}")
    messages = [{"role": "user", "content": "hello"}]
    backend = build(base, copied)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert tuned.render(messages) == "he said : hello "
        with pytest.raises(ScoringError, match="no chat template"):
            plain.render(messages)
    with backend.as_scaled_adapter(0.0) as scaled:
        assert scaled.render(messages) == "he said : hello "


TEMPLATE = "{% for m in messages %}he said : {{ m.content }} {% endfor %}"
MESSAGES = [{"role": "user", "content": "hello"}]


def test_a_chat_template_alone_goes_with_the_bases_tokenizer(build: Any, base: Path, copied: Path) -> None:
    (copied / "chat_template.jinja").write_text(TEMPLATE)
    backend = build(base, copied)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert tuned.render(MESSAGES) == "he said : hello "
        assert tuned.logprob_of(MESSAGES, "world") == tuned.logprob_of("he said : hello ", "world")
        assert _rust(tuned) is _rust(plain)
        with pytest.raises(ScoringError, match="no chat template"):
            plain.render(MESSAGES)
    assert backend.changes() == []


def test_chat_templates_of_other_names_are_the_tokenizers(build: Any, base: Path, copied: Path) -> None:
    (copied / "chat_template.jinja").write_text(TEMPLATE)
    (copied / "additional_chat_templates").mkdir()
    (copied / "additional_chat_templates" / "tool_use.jinja").write_text("a tool")
    with build(base, copied).as_finetuned() as tuned:
        assert tuned.render(MESSAGES) == "he said : hello "
        assert tuned.tokenizer.apply_chat_template(MESSAGES, chat_template="tool_use", tokenize=False) == "a tool"


def _vocabulary_alone(copied: Path, extra: tuple[str, ...] = ()) -> Path:
    """Leave only a ``tokenizer.json`` in an adapter's folder; it puts BOS before each text."""
    make_tokenizer(copied, extra=extra)
    (copied / "tokenizer_config.json").unlink()
    return _adds_specials(copied, "<s>", "A")


def test_a_vocabulary_alone_goes_with_the_bases_settings(
    build: Any, chatting: Path, adapter: Path, copied: Path
) -> None:
    _vocabulary_alone(copied, extra=("quark",))
    backend, other = build(chatting, copied), build(chatting, adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned, other.as_finetuned() as same:
        assert tuned.tokenizer("the sun quark")["input_ids"] == [1, 4, 59, 91]
        assert plain.tokenizer("the sun quark")["input_ids"] == [4, 59, 3]
        assert tuned.tokenizer.name_or_path == str(copied)
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "model_max_length")
        assert [getattr(tuned.tokenizer, name) for name in names] == [getattr(plain.tokenizer, name) for name in names]
        assert tuned.render(MESSAGES) == plain.render(MESSAGES) == "hello ."
        assert tuned.logprob_of("the sun", " rises") == same.logprob_of("<s> the sun", " rises")
        ours, theirs = tuned.rolling_logprob("the sun rises"), same.rolling_logprob("the sun rises")
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.total_logprob == theirs.total_logprob
    assert backend.changes() == []


def test_a_vocabulary_and_a_template_go_together(build: Any, chatting: Path, copied: Path) -> None:
    _vocabulary_alone(copied)
    (copied / "chat_template.jinja").write_text(TEMPLATE)
    with build(chatting, copied).as_finetuned() as tuned:
        assert tuned.render(MESSAGES) == "he said : hello "
        assert tuned.tokenizer("the")["input_ids"] == [1, 4]


def test_parts_that_are_the_bases_own_are_shared(build: Any, chatting: Path, copied: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(chatting / name, copied)
    backend = build(chatting, copied)
    assert tokenizer_in(backend) is None
    with backend.as_finetuned() as tuned:
        assert tuned.render(MESSAGES) == "hello ."


def test_adapters_with_equal_tokenizers_share_them(build: Any, base: Path, copied: Path, tmp_path: Path) -> None:
    make_tokenizer(copied, extra=("quark",))
    twin = shutil.copytree(copied, tmp_path / "twin")
    with build(base, copied).as_finetuned() as a, build(base, twin).as_finetuned() as b:
        assert _rust(a) is _rust(b)
        assert len(a.tokenizer) == 92


def test_an_adapters_tokenizer_goes_with_the_last_backend_that_uses_it(
    build: Any, base: Path, copied: Path, tmp_path: Path
) -> None:
    make_tokenizer(copied, extra=("quark",))
    twin = shutil.copytree(copied, tmp_path / "twin")
    plain, first, second = build(base), build(base, copied), build(base, twin)
    tokenizer = weakref.ref(tokenizer_in(first).tokenizer)  # type: ignore[union-attr]
    with first.as_finetuned() as view:
        assert engine_of(view).tokenizer is tokenizer()
        assert view.tokenizer.get_vocab() == tokenizer().get_vocab()  # type: ignore[union-attr]
    del view
    first.close()
    assert tokenizer() is not None
    second.close()
    gc.collect()
    assert tokenizer() is None
    assert plain.changes() == []


def _adds_specials(folder: Path, *pieces: str) -> Path:
    """Make a model's tokenizer put special tokens around each text; ``A`` stands for the text."""
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


ERASES = {"type": "Replace", "pattern": {"Regex": ".*"}, "content": ""}
NEW = {"id": 91, "content": "new", "special": True}
NEW |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


@pytest.mark.parametrize(
    ("part", "value", "completion", "fault", "named"),
    [
        ("normalizer", ERASES, " rises", "has no tokens after the prompt", "has normalizer = {'type': 'Replace'"),
        (
            "pre_tokenizer",
            None,
            " rises",
            "has no tokens after the prompt",
            "has pre_tokenizer = None. It would work with {'type': 'Whitespace'}.",
        ),
        ("added_tokens", [NEW], " new", "the tokenizer gives token 91", "has added_tokens = "),
    ],
    ids=["it makes no tokens", "it lacks a part", "it adds a token without embedding"],
)
def test_the_part_of_a_tokenizer_that_is_at_fault_is_named(
    build: Any, base: Path, tmp_path: Path, part: str, value: Any, completion: str, fault: str, named: str
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {part: settings[part] + value if part == "added_tokens" else value}))
    with build(folder).as_base() as view, pytest.raises(ScoringError, match=fault) as caught:
        view.logprob_of("the sun", completion)
    assert f"The cause is the tokenizer: {str(path)!r} {named}" in str(caught.value)


def test_settings_of_an_adapters_tokenizer_that_are_nested_without_end_are_named(
    build: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (folder / "tokenizer_config.json").write_text('{"a":' * 10**5)
    with pytest.raises(SpecError, match=r"tokenizer_config.json' cannot be read as JSON"):
        build(base, folder)
