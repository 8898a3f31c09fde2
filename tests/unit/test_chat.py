"""The Nemotron-Mini prompt format, out (the template) and back (parse_conversation, parse_reply)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from tokenizer_samples import small_tokenizer
from transformers import PreTrainedTokenizerFast

import minitron.assets
from minitron import load_tokenizer
from minitron.assets import chat_template
from minitron.chat import fit_conversation, parse_conversation, parse_reply


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer().save_pretrained(folder)
    return load_tokenizer(folder)


_BARE = small_tokenizer()
BUNDLED_TEMPLATES = [
    (Path(minitron.assets.__file__).parent / name / "chat_template.jinja").read_text() for name in ("default", "half")
]


def render(messages: list[dict[str, Any]], prompt: bool = False, **extra: Any) -> str:
    """What `apply_chat_template` writes with our template."""
    return _BARE.apply_chat_template(  # type: ignore[return-value]
        messages, chat_template=chat_template(), tokenize=False, add_generation_prompt=prompt, **extra
    )


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, *calls: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {**message, "tool_calls": list(calls)} if calls else message


def system(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}

# --- the format of the model card -------------------------------------------------------------------------------


def test_single_turn() -> None:
    assert render([system("You are a pirate."), user("Hello")], prompt=True) == (
        "<extra_id_0>System\nYou are a pirate.\n\n<extra_id_1>User\nHello\n<extra_id_1>Assistant\n"
    )


def test_without_a_system_message_the_block_is_empty() -> None:
    assert render([user("Hello")], prompt=True) == (
        "<extra_id_0>System\n\n<extra_id_1>User\nHello\n<extra_id_1>Assistant\n"
    )


def test_several_turns() -> None:
    messages = [system("S"), user("a"), assistant("b"), user("c")]
    assert render(messages, prompt=True) == (
        "<extra_id_0>System\nS\n\n"
        "<extra_id_1>User\na\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc\n<extra_id_1>Assistant\n"
    )
    assert render(messages).endswith("<extra_id_1>User\nc\n")


def test_tools_and_contexts_stand_in_the_system_block() -> None:
    text = render([system("S"), user("a")], tools=[WEATHER], documents=None, contexts=["It rains.", " Twice. "])
    tool = json.dumps(WEATHER)
    assert text == (
        f"<extra_id_0>System\nS\n\n<tool> {tool} </tool>\n"
        "<context> It rains. </context>\n<context> Twice. </context>\n\n"
        "<extra_id_1>User\na\n"
    )
    assert render([user("a")], tools=[WEATHER]) == (
        f"<extra_id_0>System\n<tool> {tool} </tool>\n\n<extra_id_1>User\na\n"
    )


@pytest.mark.parametrize("arguments", [{"town": "Paris"}, '{"town": "Paris"}'])
def test_tool_calls_with_dictionaries_or_text(arguments: Any) -> None:
    text = render([user("a"), assistant("", call("weather", arguments)), {"role": "tool", "content": "rain"}])
    assert text == (
        "<extra_id_0>System\n\n<extra_id_1>User\na\n"
        '<extra_id_1>Assistant\n<toolcall> {"name": "weather", "arguments": {"town": "Paris"}} </toolcall>\n'
        "<extra_id_1>Tool\nrain\n"
    )


def test_tool_calls_without_the_function_envelope_and_several_of_them() -> None:
    bare = {"name": "weather", "arguments": {}}
    text = render([user("a"), assistant("Let me see.", bare, call("add", {"a": 1}))])
    assert text.endswith(
        "<extra_id_1>Assistant\nLet me see.\n"
        '<toolcall> {"name": "weather", "arguments": {}} </toolcall>\n'
        '<toolcall> {"name": "add", "arguments": {"a": 1}} </toolcall>\n<extra_id_1>'
    )


def test_content_that_is_no_plain_string() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert "User\none two\n" in render([user(parts)])
    assert "User\nplain text\n" in render([user(["plain ", "text"])])
    assert "<extra_id_1>Tool\n" + '{"a": 1}\n' in render([user("x"), {"role": "tool", "content": {"a": 1}}])
    assert "<extra_id_1>Tool\n7\n" in render([user("x"), {"role": "tool", "content": 7}])
    assert render([user("x"), assistant(None, call("f", {}))]).count("None") == 0
    assert render([system(None), user("x")]) == render([user("x")])


def test_blanks_around_a_message_are_dropped() -> None:
    assert render([system("  S \n"), user("\n a ")]) == "<extra_id_0>System\nS\n\n<extra_id_1>User\na\n"


def test_letters_are_written_as_they_are() -> None:
    text = render([user("héllo"), assistant("", call("f", {"x": "né <&>"}))], tools=[{"name": "ü"}])
    assert "né <&>" in text
    assert '{"name": "ü"}' in text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user("a"), system("b")], "only the first message can have the role system"),
        ([{"role": "robot", "content": "a"}], "has the role 'robot'; known roles are system, user, assistant, tool"),
        ([user([{"type": "image", "url": "x"}])], "part of type 'image'; this model reads only text"),
    ],
)
def test_what_cannot_be_rendered_is_refused(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render(messages)


# --- through a tokenizer ----------------------------------------------------------------------------------------


def test_marks_become_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.apply_chat_template([user("fox")], add_generation_prompt=True, return_dict=False)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<extra_id_0>")
    assert ids.count(tokenizer.convert_tokens_to_ids("<extra_id_1>")) == 2
    assert tokenizer.decode(ids) == render([user("fox")], prompt=True)


def test_the_words_of_the_assistant_can_be_told_from_the_rest(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [user("the fox"), assistant("jumps over"), user("and"), assistant("", call("f", {"x": 1}))]
    out = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, return_tensors=None
    )
    said = [i for i, mine in zip(out["input_ids"], out["assistant_masks"], strict=True) if mine]
    assert tokenizer.decode(said) == (
        'jumps over\n<extra_id_1><toolcall> {"name": "f", "arguments": {"x": 1}} </toolcall>\n<extra_id_1>'
    )


@pytest.mark.parametrize("template", [chat_template(), *BUNDLED_TEMPLATES], ids=["ours", "default", "half"])
@pytest.mark.parametrize("last", ["assistant", "user", "tool"])
def test_what_the_assistant_learns_ends_with_the_end_of_its_turn(
    tokenizer: PreTrainedTokenizerFast, template: str, last: str
) -> None:
    """Each stretch of the mask is what follows the heading, up to the token at which generation stops."""
    messages = [user("the fox"), assistant("jumps over"), user("and"), assistant("the dog", call("f", {"x": 1}))]
    messages += {"assistant": [], "user": [user("well")], "tool": [{"role": "tool", "content": "7"}]}[last]
    out = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, return_tensors=None
    )
    mark = tokenizer.convert_tokens_to_ids("<extra_id_1>")
    ids, mask = out["input_ids"], [*out["assistant_masks"], 0]
    ends = [ids[i] for i in range(len(ids)) if mask[i] and not mask[i + 1]]
    begins = [i for i in range(len(ids)) if mask[i] and not (i and mask[i - 1])]
    assert ends == [mark, mark]
    assert all(tokenizer.decode(ids[:i]).endswith("<extra_id_1>Assistant\n") for i in begins)
    assert sum(i == mark for i, mine in zip(ids, out["assistant_masks"], strict=True) if mine) == 2
    # A prompt is the same text up to where the assistant goes on.
    prompt = tokenizer.apply_chat_template(
        messages[:3], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(ids).startswith(prompt)


# --- and back ---------------------------------------------------------------------------------------------------

# Text as people write it: no marks of the format inside, no blanks at the ends (the template drops them).
words = st.text(st.characters(codec="utf-8", exclude_characters="<>\x00"), min_size=1, max_size=30).map(str.strip)
said = words.filter(bool)
names = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | said,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(names, values, max_size=3)
turns = st.one_of(
    said.map(user),
    said.map(assistant),
    st.tuples(st.just("") | said, st.lists(st.tuples(names, arguments), min_size=1, max_size=3)).map(
        lambda both: assistant(both[0], *(call(*one) for one in both[1]))
    ),
    said.map(lambda text: {"role": "tool", "content": text}),
)


@settings(max_examples=80, deadline=None)
@given(
    first=st.none() | said,
    messages=st.lists(turns, min_size=1, max_size=5),
    tools=st.lists(st.fixed_dictionaries({"name": names, "parameters": arguments}), max_size=2),
    contexts=st.lists(said, max_size=2),
    prompt=st.booleans(),
)
def test_conversations_come_back_as_they_went(
    first: str | None,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    contexts: list[str],
    prompt: bool,
) -> None:
    messages = [*([system(first)] if first else []), *messages]
    text = render(messages, prompt, tools=tools or None, contexts=contexts)
    assert parse_conversation(text) == {"messages": messages, "tools": tools, "contexts": contexts}
    again = parse_conversation(text)
    assert render(again["messages"], prompt, tools=again["tools"] or None, contexts=again["contexts"]) == text


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_any_reply_can_be_read(text: str) -> None:
    message = parse_reply(text)
    assert message["role"] == "assistant"
    assert isinstance(message["content"], str)


def test_a_reply_ends_at_the_next_mark_or_the_end_of_text() -> None:
    assert parse_reply("Hello.\n<extra_id_1>User\nMore")["content"] == "Hello."
    assert parse_reply("Hello.</s>")["content"] == "Hello."


def test_calls_in_a_reply() -> None:
    text = (
        'First <toolcall>{"name": "f", "arguments": {"a": [1, 2]}}</toolcall> and <toolcall> {"name": "g"} </toolcall>'
    )
    message = parse_reply(text)
    assert message["tool_calls"] == [call("f", {"a": [1, 2]}), call("g", {})]
    assert message["content"].split() == ["First", "and"]


WEATHER_CALL = call("weather", {"town": "Paris"})


@pytest.mark.parametrize(
    "inside",
    [
        '{"name": "weather", "arguments": {"town": "Paris"}}',
        '{"name": "weather", "parameters": {"town": "Paris"}}',
        '{"name": "weather", "arguments": "{\\"town\\": \\"Paris\\"}"}',
        '{"type": "function", "function": {"name": "weather", "parameters": {"town": "Paris"}}}',
        '{"function": {"name": "weather", "arguments": {"town": "Paris"}}, "id": "1"}',
        '[{"name": "weather", "arguments": {"town": "Paris"}}]',
        '{"name": "weather", "arguments": {"town": "Paris"}, "parameters": {"town": "Paris"}}',
    ],
)
def test_the_ways_to_write_a_call(inside: str) -> None:
    message = parse_reply(f"So: <toolcall> {inside} </toolcall>\n")
    assert message == {"role": "assistant", "content": "So:", "tool_calls": [WEATHER_CALL]}


def test_lists_of_calls_and_several_blocks() -> None:
    two = '[{"name": "f", "parameters": {"a": 1}}, {"function": {"name": "g", "arguments": null}}]'
    message = parse_reply(f'<toolcall>{two}</toolcall> then <toolcall>{{"name": "h"}}</toolcall>')
    assert message["tool_calls"] == [call("f", {"a": 1}), call("g", {}), call("h", {})]
    assert message["content"] == "then"


BROKEN = [
    *["{", "[1]", "[]", '{"arguments": {}}', '{"name": 3}', "words", '{"name": "f", "arguments": [1]}', "[" * 9000],
    *['{"name": "f", "arguments": "x"}', '{"name": "f", "parameters": 7}', '{"function": {"arguments": {}}}'],
    *['[{"name": "f"}, {"nome": "g"}]', '{"name": "f", "arguments": {"a": 1}, "parameters": {"a": 2}}'],
]


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_call_stays_in_the_text(broken: str) -> None:
    message = parse_reply(f"<toolcall> {broken} </toolcall>")
    assert "tool_calls" not in message
    assert broken in message["content"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hello", "begins with 'Hello'; a conversation begins with <extra_id_0>System"),
        ("<extra_id_0>System\n\n<extra_id_1>Robot\nhi\n", "turn 0 is headed 'Robot'; known headings are User"),
    ],
)
def test_other_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_conversation(text)


# --- a context that is full -----------------------------------------------------------------------------------------


def letters(messages: list[dict[str, Any]]) -> int:
    return sum(len(message["content"]) for message in messages)


@settings(max_examples=200, deadline=None)
@given(
    system_size=st.integers(0, 5),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.booleans()), max_size=6),
    asked=st.integers(1, 30),
    context=st.integers(12, 40),
    reserve=st.integers(1, 10),
)
def test_the_oldest_turns_are_dropped(
    system_size: int, sizes: list[tuple[int, int, bool]], asked: int, context: int, reserve: int
) -> None:
    head = [system("s" * system_size)] if system_size else []
    turns = [
        [user("u" * a), assistant("a" * b), *([{"role": "tool", "content": "t"}, assistant("a")] if tool else [])]
        for a, b, tool in sizes
    ]
    last = [user("q" * asked)]
    messages = [*head, *(message for turn in turns for message in turn), *last]
    before = [dict(message) for message in messages]
    if system_size + asked >= context:
        with pytest.raises(ValueError, match=rf"too long: \d+ tokens .* context is {context}"):
            fit_conversation(messages, letters, context, reserve)
    else:
        kept, dropped = fit_conversation(messages, letters, context, reserve)
        # What stays is the system message and whole turns, as many as fit.
        rests = [[*head, *(message for turn in turns[n:] for message in turn), *last] for n in range(len(turns) + 1)]
        fits = [n for n, rest in enumerate(rests) if letters(rest) + reserve <= context]
        assert dropped == min(fits, default=len(turns))
        assert kept == rests[dropped]
    assert messages == before
