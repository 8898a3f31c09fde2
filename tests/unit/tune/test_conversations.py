"""What a chat model learns: the assistant's tokens and no others, for every template whose renderings are prefixes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import small_tokenizer

from minitron.assets import chat_template
from minitron.data.examples import Conversation, Examples
from minitron.ops.loss import IGNORE_INDEX
from minitron.tune.conversations import (
    ConversationError,
    PackedConversations,
    Turns,
    render_all,
    render_turns,
    show_learned,
)

CHATML = (
    "{% for m in messages %}<extra_id_0>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }} {{ c.function.arguments }}]{% endfor %}<extra_id_1>\n{% endfor %}"
    "{% if add_generation_prompt %}<extra_id_0>assistant\n{% endif %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<extra_id_0>{{ m.role }}<extra_id_2>\n\n{{ m.content | trim }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<extra_id_1>{% endfor %}"
    "{% if add_generation_prompt %}<extra_id_0>assistant<extra_id_2>\n\n{% endif %}"
)
TEMPLATES = {"nemotron": chat_template(), "chatml": CHATML, "llama3": LLAMA3}


def tokenizer_with(template: str) -> Any:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {name: tokenizer_with(template) for name, template in TEMPLATES.items()}
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30).map(
    lambda text: f"x{text.strip()}y"  # templates trim what is said
)


@st.composite
def conversations(draw: Any) -> Conversation:
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(WORDS)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(WORDS)})
        if draw(st.booleans()):
            function = {"name": "look", "arguments": '{"at": 1}'}
            call = {"id": "1", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": draw(WORDS), "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(WORDS), "tool_call_id": "1"})
        messages.append({"role": "assistant", "content": draw(WORDS)})
    return Conversation(tuple(messages))


def said(name: str, message: dict[str, Any]) -> str:
    """What the assistant writes for a message, to the end of its turn, by the template's own rules."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    if name == "nemotron":
        lines = [f'<toolcall> {{"name": "{c["name"]}", "arguments": {c["arguments"]}}} </toolcall>\n' for c in calls]
        return f"{message['content']}\n{''.join(lines)}<extra_id_1>"
    if name == "chatml":
        return message["content"] + "".join(f"[{c['name']} {c['arguments']}]" for c in calls) + "<extra_id_1>"
    import json

    return message["content"] + "".join(json.dumps(c) for c in calls) + "<extra_id_1>"


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(conversation=conversations())
def test_what_is_learned_is_what_the_assistant_said(name: str, conversation: Conversation) -> None:
    tokenizer = TOKENIZERS[name]
    turns = render_turns(tokenizer, conversation)
    edges = np.flatnonzero(np.diff(turns.learned.astype(int), prepend=0, append=0)).reshape(-1, 2)
    learned = [tokenizer.decode(turns.ids[a:b]) for a, b in edges]
    assert learned == [said(name, m) for m in conversation.messages if m["role"] == "assistant"]
    assert turns.dropped == 0


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_long_conversation_is_cut_after_a_turn(name: str) -> None:
    pair = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."})
    whole = render_turns(TOKENIZERS[name], Conversation(pair * 3))
    for most in range(len(render_turns(TOKENIZERS[name], Conversation(pair)).ids), len(whole.ids) + 3):
        cut = render_turns(TOKENIZERS[name], Conversation(pair * 3), most)
        assert len(cut.ids) <= most
        assert np.array_equal(cut.ids, whole.ids[: len(cut.ids)])
        ends = int(np.flatnonzero(cut.learned)[-1])
        assert not whole.learned[ends + 1 : ends + 2].any()  # the end of a turn, not its middle
        assert cut.dropped == 6 - 2 * (np.diff(cut.learned.astype(int), prepend=0) == 1).sum()
    with pytest.raises(ConversationError, match="its first turn of the assistant ends beyond 3 tokens"):
        render_turns(TOKENIZERS[name], Conversation(pair), 3)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% else %}gone{% endif %}"
        "{% endfor %}"
    )
    messages = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    with pytest.raises(ConversationError, match=r"before message 4 \(assistant: 'd'\): 'agonec' stands"):
        render_turns(tokenizer_with(template), Conversation(tuple(messages)))


def test_places_and_what_is_shown() -> None:
    tokenizer = TOKENIZERS["chatml"]
    good = Conversation(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}))
    shown = show_learned(tokenizer, render_turns(tokenizer, good))
    assert shown == "<extra_id_0>user\nHi<extra_id_1>\n<extra_id_0>assistant\n[[Yo<extra_id_1>]]\n"
    long = Conversation(({"role": "user", "content": "Hi " * 50}, {"role": "assistant", "content": "Yo"}))
    examples = Examples([good, long], ["a.jsonl, line 1", "a.jsonl, line 2"])
    with pytest.raises(ConversationError, match=r"a\.jsonl, line 2: its first turn of the assistant ends beyond 40"):
        render_all(tokenizer, examples, 40, skip_bad=False)
    found = render_all(tokenizer, examples, 40, skip_bad=True)
    assert len(found.turns) == 1
    assert "1 conversations were skipped: a.jsonl, line 2" in found.notes[0]
    with pytest.raises(ConversationError, match="no chat template"):
        render_all(small_tokenizer(), examples, 40, skip_bad=False)


def packed(seed: int = 0, lengths: tuple[int, ...] = (5, 9, 3, 12, 7, 4, 6)) -> PackedConversations:
    rng = np.random.default_rng(0)
    turns = [Turns(rng.integers(1, 99, n).astype(np.int32), rng.random(n) < 0.5) for n in lengths]
    return PackedConversations(turns, 16, seed, "digest")


def test_packing_keeps_every_learned_token_once_and_apart() -> None:
    stream = packed()
    (batch,) = stream.batches(0, len(stream), len(stream))
    assert batch.num_items == int((batch.labels != IGNORE_INDEX).sum())
    scored = batch.labels != IGNORE_INDEX
    assert torch.equal(batch.labels[scored], batch.input_ids[scored])
    assert not scored[batch.position_ids == 0].any()  # nothing is predicted from another conversation
    rng = np.random.default_rng(0)
    wanted = 0
    for n in (5, 9, 3, 12, 7, 4, 6):
        rng.integers(1, 99, n)
        wanted += int((rng.random(n) < 0.5)[1:].sum())
    assert batch.num_items == wanted


def test_the_stream_repeats_itself_and_shares_out() -> None:
    first, second = packed(), packed()
    whole = list(first.batches(3, 8, 2))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(whole, second.batches(3, 8, 2), strict=True))
    parts = [b for number in (0, 1) for b in first.batches(3, 8, 2, share=(number, 2))]
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(whole, parts, strict=True))
    assert {b.num_items for b in whole + parts} == {sum(int((b.labels != IGNORE_INDEX).sum()) for b in whole)}
