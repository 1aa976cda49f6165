from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import transformers

from pytest_sway import Chat
from pytest_sway.comparison.token_scores import token_scores
from pytest_sway.errors import ScoringError
from tests.tiny import make_base, set_template
from tests.unit.backends.hf.insides import WAIT, computing_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.role == 'user' and 'he' or 'she' }} said : {{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}she said :{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "hello"},
]
RENDERED = "<s>he said : hello . she said : world . he said : hello . she said :"
BEGUN = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has a chat template and puts BOS before each text."""
    folder = make_base(tmp_path_factory.mktemp("chat"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(tokenizer))
    return folder


def test_messages_are_rendered_by_the_template_up_to_the_answer(build: Any, chat_base: Path) -> None:
    with build(chat_base).as_base() as view:
        assert view.render(MESSAGES) == view.render(iter(MESSAGES)) == RENDERED


def test_messages_stand_for_the_prompt_that_they_render_to(build: Any, chat_base: Path) -> None:
    with build(chat_base).as_base() as view:
        assert view.logprob_of(MESSAGES, " hello") == view.logprob_of(RENDERED, " hello")
        assert view.logprobs_of([(MESSAGES, " hello")]) == [view.logprob_of(RENDERED, " hello")]
        assert view.generate(MESSAGES, max_new_tokens=5) == view.generate(RENDERED, max_new_tokens=5)
        dists = [view.next_token_dist(prompt).logprobs.tolist() for prompt in (MESSAGES, RENDERED)]
        assert dists[0] == dists[1]


def test_the_tokens_of_an_answer_to_messages_add_up_to_its_logprob(build: Any, chat_base: Path) -> None:
    with build(chat_base).as_base() as view:
        (found,) = token_scores(view, [(MESSAGES, " hello world")])
        assert found is not None
        assert found.texts == [" hello", " world"]
        assert found.logprobs == [
            pytest.approx(view.logprob_of(MESSAGES, " hello"), abs=1e-4),
            pytest.approx(view.logprob_of(f"{RENDERED} hello", " world"), abs=1e-4),
        ]


def test_a_turn_that_the_assistant_has_begun_is_continued(build: Any, chat_base: Path) -> None:
    continued = "<s>he said : hello . she said : world"
    with build(chat_base).as_base() as view:
        assert view.render(BEGUN) == continued
        assert view.logprob_of(BEGUN, " .") == view.logprob_of(continued, " .")
        assert view.generate(BEGUN, max_new_tokens=5) == view.generate(continued, max_new_tokens=5)


@pytest.mark.parametrize("content", ["", " \n"])
def test_a_turn_without_content_is_one_that_begins(build: Any, chat_base: Path, content: str) -> None:
    with build(chat_base).as_base() as view:
        assert view.render([*MESSAGES, {"role": "assistant", "content": content}]) == RENDERED
        with pytest.raises(ScoringError, match="the only message is an assistant's without content"):
            view.render([{"role": "assistant", "content": content}])


def test_no_tools_need_no_template_that_reads_them(build: Any, chat_base: Path) -> None:
    with build(chat_base).as_base() as view:
        assert view.render(MESSAGES, tools=None, documents=[]) == RENDERED


def test_a_call_of_a_tool_needs_no_content_and_ends_its_turn(build: Any, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
        "{% endif %} . {% endfor %}{% if add_generation_prompt %}she said :{% endif %}"
    )
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "sun", "arguments": {}}}]}
    with build(set_template(make_base(tmp_path), template)).as_base() as view:
        assert view.render([MESSAGES[0], called]) == "user : hello . assistant : sun . "
        answered = [MESSAGES[0], called, {"role": "tool", "content": "moon"}]
        assert view.render(answered) == "user : hello . assistant : sun . tool : moon . she said :"


def test_there_is_one_bos_before_a_prompt(build: Any, chat_base: Path) -> None:
    with build(chat_base).as_base() as view:
        read: list[list[int]] = []
        computing_model(view).model.embed_tokens.register_forward_pre_hook(
            lambda _, args: read.extend(args[0].tolist())
        )
        view.next_token_dist(MESSAGES)
        view.next_token_dist(RENDERED)
        view.next_token_dist("hello")
        assert [row.count(1) for row in read] == [1, 1]  # the second has the tokens of the first


def test_a_text_is_not_rendered(build: Any, chat_base: Path) -> None:
    with (
        build(chat_base).as_base() as view,
        pytest.raises(ScoringError, match=r"^expected a list of messages with 'role' and 'content'; found 'hello'"),
    ):
        view.render("hello")


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "the list of messages is empty"),
        ({"role": "user", "content": "a"}, "expected a prompt: a text, or a list of messages .*; found "),
        ([{"role": "user"}], r"expected a message with 'role' and 'content'; found \{'role': 'user'\}"),
        (["hello"], r"expected a prompt: one text, or a list of messages; found the texts \['hello'\]"),
        ([{"role": "system", "content": "a"}], "template refuses messages with the roles system: no system role"),
    ],
)
def test_malformed_messages_are_refused(build: Any, chat_base: Path, messages: Any, text: str) -> None:
    with build(chat_base).as_base() as view:
        with pytest.raises(ScoringError, match=text):
            view.render(messages)
        with pytest.raises(ScoringError, match=text):
            view.next_token_dist(messages)


def test_a_tokenizer_without_a_template_says_so(build: Any, base: Path) -> None:
    with build(base).as_base() as view, pytest.raises(ScoringError, match="the tokenizer has no chat template"):
        view.render(MESSAGES)


def test_a_template_that_prints_the_last_message_twice_cannot_be_continued(build: Any, tmp_path: Path) -> None:
    """transformers 4 cuts after the last of both, so there the first one is continued, too."""
    folder = make_base(tmp_path)
    twice = "{% for m in messages %}{{ m.content }} . {% endfor %}{{ messages[-1].content }} the"
    (folder / "chat_template.jinja").write_text(twice)
    with build(folder).as_base() as view:
        if transformers.__version__ < "5":
            assert view.render(BEGUN) == "hello . world . world"
        else:
            with pytest.raises(ScoringError, match=r"prints the last message more than once.* End the messages with a"):
                view.logprob_of(BEGUN, " hello")
        assert view.render(MESSAGES) == "hello . world . hello . hello the"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("whose", ["base", "adapter"])
def test_the_template_that_fails_is_named_with_its_file(
    build: Any, base: Path, adapter: Path, tmp_path: Path, whose: str, place: str
) -> None:
    folders = {"base": base, "adapter": adapter}
    folder = folders[whose] = Path(shutil.copytree(folders[whose], tmp_path / whose))
    if place == "chat_template.jinja":
        (folder / place).write_text("{{ 1 / 0 }}")
    else:
        for name in ("tokenizer.json", place):
            shutil.copy(base / name, folder / name)
        (folder / place).write_text(json.dumps(json.loads((folder / place).read_text()) | {"chat_template": "{{ no("}))
    with build(**folders).as_finetuned() as view, pytest.raises(ScoringError) as caught:
        view.render(MESSAGES)
    named = repr(str(folder / place))
    assert f"The template is {named}." in str(caught.value) or f"chat_template in {named}." in str(caught.value)


def test_a_template_without_end_is_left(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_base(tmp_path)
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    (folder / "chat_template.jinja").write_text(loops)
    monkeypatch.setattr("pytest_sway.backends.text.chat._PATIENCE", 0.2)
    with (
        build(folder).as_base() as view,
        pytest.raises(ScoringError, match=r"takes more than 0.2 s. Fix the template"),
    ):
        view.render(MESSAGES)
    for thread in threading.enumerate():
        if thread.name == "chat template":
            thread.join(WAIT)
            assert not thread.is_alive()


WITH_ARGS = (
    "{% if tools %}tools : {% for t in tools %}{{ t.function.name }} {% endfor %}. {% endif %}"
    "{% for d in documents or [] %}{{ d.text }} . {% endfor %}"
    "{% for m in messages %}{{ m.role }} : {{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}she said :{% if enable_thinking is false %} quiet{% endif %}{% endif %}"
)


def weather(town: str) -> str:
    """Tell the weather.

    Args:
        town: Where.
    """
    return town


@pytest.fixture(scope="module")
def args_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose chat template takes arguments."""
    folder = make_base(tmp_path_factory.mktemp("args"))
    (folder / "chat_template.jinja").write_text(WITH_ARGS)
    return folder


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({}, "user : hello . assistant : world . user : hello . she said :"),
        ({"enable_thinking": False}, "user : hello . assistant : world . user : hello . she said : quiet"),
        ({"tools": [weather]}, "tools : weather . user : hello . assistant : world . user : hello . she said :"),
        (
            {"documents": [{"text": "the sun"}]},
            "the sun . user : hello . assistant : world . user : hello . she said :",
        ),
        ({"tools": None, "documents": []}, "user : hello . assistant : world . user : hello . she said :"),
        ({"continue_final_message": True}, "user : hello . assistant : world . user : hello"),
        ({"add_generation_prompt": False}, "user : hello . assistant : world . user : hello . "),
        ({"chat_template": "{{ messages[0].content }} {{ word }}", "word": "sun"}, "hello sun"),
    ],
)
def test_arguments_reach_the_template_as_in_transformers(
    build: Any, args_base: Path, args: dict[str, Any], text: str
) -> None:
    chat = Chat(MESSAGES, **args)
    how = {"add_generation_prompt": not args.get("continue_final_message")} | args
    with build(args_base).as_base() as view:
        assert view.tokenizer.apply_chat_template(MESSAGES, tokenize=False, **how) == text
        assert view.render(MESSAGES, **args) == view.render(chat) == view.render(Chat(MESSAGES), **args) == text
        pair, prompt = view.logprobs_of([(chat, " hello"), (text, " hello")]), [chat, text]
        assert pair[0] == pytest.approx(pair[1], abs=1e-5)
        assert len(set(view.generate_many(prompt, max_new_tokens=4))) == 1
        assert len({dist.logprobs.tobytes() for dist in view.next_token_dists(prompt)}) == 1


def test_an_assistants_turn_is_continued_or_not_as_you_say(build: Any, args_base: Path) -> None:
    with build(args_base).as_base() as view:
        assert view.render(BEGUN) == "user : hello . assistant : world"
        assert view.render(BEGUN, continue_final_message=False) == "user : hello . assistant : world . she said :"
        assert view.render(BEGUN, add_generation_prompt=True) == "user : hello . assistant : world . she said :"
        assert view.render(Chat(BEGUN, enable_thinking=True), add_generation_prompt=False) == (
            "user : hello . assistant : world . "
        )


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"enable_thinkng": False}, "template does not read enable_thinkng, so it would change nothing"),
        ({"tokenize": True}, "tokenize is no argument for a chat template here: messages are rendered as text"),
        ({"tools": weather}, "tools must be a list, with one entry for each; found <function weather"),
        (
            {"chat_template": "{{ messages"},
            r"unexpected end of template.*\. The template is the argument chat_template\.",
        ),
        ({"tools": [len, print]}, "refuses messages with the roles user, assistant, user and the arguments tools: "),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message and add_generation_prompt exclude each other",
        ),
    ],
)
def test_arguments_without_meaning_are_refused(build: Any, args_base: Path, args: dict[str, Any], text: str) -> None:
    with build(args_base).as_base() as view:
        with pytest.raises(ScoringError, match=text):
            view.render(MESSAGES, **args)
        with pytest.raises(ScoringError, match=text):
            view.generate(Chat(MESSAGES, **args), max_new_tokens=1)
