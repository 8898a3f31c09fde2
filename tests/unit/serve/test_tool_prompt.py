"""Tools for a ChatML template without a section for them; the template is that of SmolLM2 (Apache-2.0)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jinja2
import pytest

pytest.importorskip("llguidance", reason="pip install 'minitron[serve]'")

from minitron.serve.tool_calls import HERMES, ToolCallParser, merged, tool_format
from minitron.serve.tool_prompt import needs_prompt, with_tool_prompt

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


def rendered(messages, tools) -> str:
    found = with_tool_prompt(messages, tools)
    return jinja2.Template(SMOLLM2).render(messages=found, add_generation_prompt=True)


def test_only_chatml_without_tools_needs_a_prompt() -> None:
    assert needs_prompt(SMOLLM2)
    assert not needs_prompt(SMOLLM2 + "{% for tool in tools %}{% endfor %}")
    assert not needs_prompt("{{ messages }}")
    assert not needs_prompt(None)
    assert tool_format(SimpleNamespace(name="m", tokenizer=SimpleNamespace(chat_template=SMOLLM2))) is HERMES


def test_tools_stand_in_the_one_system_turn() -> None:
    for messages in ([{"role": "user", "content": "Hi"}], [{"role": "system", "content": "Be brief."}]):
        text = rendered(messages, [TOOL])
        assert text.count("<|im_start|>system") == 1
        tools = text.split("<tools>\n")[1].split("\n</tools>")[0]
        assert json.loads(tools) == TOOL
    assert "Be brief.\n\nYou may call functions" in text


def test_without_tools_a_conversation_stays_as_it_is() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert with_tool_prompt(messages, None) == messages


def test_the_parser_reads_back_how_a_call_is_written() -> None:
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "It rains."},
    ]
    text = rendered(messages, [TOOL])
    assert "<|im_start|>user\n<tool_response>\nIt rains.\n</tool_response><|im_end|>" in text
    answer = text.split("Rain?<|im_end|>\n<|im_start|>assistant\n")[1].split("<|im_end|>")[0]
    parser = ToolCallParser(HERMES)
    message = merged(parser.push(answer) + parser.finish())
    assert message["content"] == "Let me see."
    found = [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in message["tool_calls"]]
    assert found == [("weather", {"city": "Köln"})] * 2
