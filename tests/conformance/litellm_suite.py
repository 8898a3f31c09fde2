"""LiteLLM as a client of the server at MINITRON_URL."""

from __future__ import annotations

import json
import os

import litellm
import pytest

litellm.telemetry = False
ASKED = {"api_base": f"{os.environ['MINITRON_URL']}/v1", "api_key": "none", "num_retries": 0}
CHAT = {**ASKED, "model": "openai/scripted"}
HELLO = [{"role": "user", "content": "Hello there"}]
SCHEMA = {
    "type": "object",
    "properties": {"setup": {"type": "string"}, "punchline": {"type": "string"}},
    "required": ["setup", "punchline"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"first": {"type": "integer"}, "second": {"type": "integer"}},
            "required": ["first", "second"],
        },
    },
}


def test_chat() -> None:
    found = litellm.completion(**CHAT, messages=HELLO, temperature=0, max_tokens=50)
    assert found.choices[0].message.content == "You said: Hello there"
    assert found.usage.total_tokens > 0


def test_streams() -> None:
    chunks = list(litellm.completion(**CHAT, messages=HELLO, stream=True, stream_options={"include_usage": True}))
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content == "You said: Hello there"


def test_tools() -> None:
    messages = [{"role": "user", "content": "Add 31 and 11"}]
    found = litellm.completion(**CHAT, messages=messages, tools=[TOOL], tool_choice="auto")
    message = found.choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == {"first": 31, "second": 11}
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "42"}
    back = litellm.completion(**CHAT, messages=[*messages, message, result], tools=[TOOL])
    assert back.choices[0].message.content == "It is 42."


def test_structured_output() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "joke", "schema": SCHEMA, "strict": True}}
    found = litellm.completion(**CHAT, messages=[{"role": "user", "content": "A joke"}], response_format=form)
    assert set(json.loads(found.choices[0].message.content)) == {"setup", "punchline"}


def test_text_completion_embeddings_and_responses() -> None:
    found = litellm.text_completion(**ASKED, model="text-completion-openai/scripted", prompt="Once", max_tokens=5)
    assert found.choices[0].text
    vectors = litellm.embedding(**ASKED, model="openai/scripted", input=["a fox", "a crow"])
    assert len(vectors.data) == 2
    answered = litellm.responses(**ASKED, model="openai/scripted", input="Hello there")
    assert answered.output[0].content[0].text == "You said: Hello there"


def test_errors() -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**CHAT, "model": "openai/other"}, messages=HELLO)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**CHAT, messages=HELLO, max_tokens=1 << 20)
