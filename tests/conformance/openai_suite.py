"""The openai client against the server at MINITRON_URL: chat, tools, structured output, embeddings, responses."""

from __future__ import annotations

import asyncio
import json
import os

import openai
import pytest
from pydantic import BaseModel

URL = f"{os.environ['MINITRON_URL']}/v1"
MODEL = "scripted"
HELLO = [{"role": "user", "content": "Hello there"}]
JOKES = [{"role": "user", "content": "Tell me a joke"}]
ADD = [{"role": "user", "content": "Add 31 and 11"}]


class Joke(BaseModel):
    """A joke."""

    setup: str
    punchline: str


class Add(BaseModel):
    """Add two numbers."""

    first: int
    second: int


@pytest.fixture(scope="module")
def client():
    return openai.OpenAI(base_url=URL, api_key="none", max_retries=0)


def test_chat(client) -> None:
    found = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
    assert found.choices[0].message.content == "You said: Hello there"
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_chat_streams(client) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "You said: Hello there"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 0


def test_the_stream_helper_accumulates(client) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HELLO) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= set(kinds)
    assert final.choices[0].message.content == "You said: Hello there"


def test_the_async_client(client) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=URL, api_key="none") as several:
            found = await asyncio.gather(
                *(
                    several.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": f"I am {i}"}])
                    for i in range(20)
                )
            )
        return [one.choices[0].message.content for one in found]

    assert asyncio.run(ask()) == [f"You said: I am {i}" for i in range(20)]


def test_structured_output_is_parsed(client) -> None:
    found = client.chat.completions.parse(model=MODEL, messages=JOKES, response_format=Joke)
    assert isinstance(found.choices[0].message.parsed, Joke)
    with client.chat.completions.stream(model=MODEL, messages=JOKES, response_format=Joke) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == found.choices[0].message.parsed


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "Add"}}])
def test_tools(client, choice) -> None:
    tools = [openai.pydantic_function_tool(Add)]
    found = client.chat.completions.parse(model=MODEL, messages=ADD, tools=tools, tool_choice=choice)
    [call] = found.choices[0].message.tool_calls
    assert found.choices[0].finish_reason == "tool_calls"
    assert call.function.parsed_arguments == Add(first=31, second=11)
    with client.chat.completions.stream(model=MODEL, messages=ADD, tools=tools, tool_choice=choice) as stream:
        kinds = [event.type for event in stream]
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls
    assert kinds.count("tool_calls.function.arguments.delta") > 3
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
    back = [*ADD, found.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "42"}]
    assert (
        client.chat.completions.create(model=MODEL, messages=back, tools=tools).choices[0].message.content
        == "It is 42."
    )


def test_completions(client) -> None:
    found = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=5, logprobs=2, echo=True)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text.startswith("a")
    assert len(found.choices[0].logprobs.tokens) == len(found.choices[0].logprobs.token_logprobs)


def test_embeddings_as_base64_which_is_the_default(client) -> None:
    packed = client.embeddings.create(model=MODEL, input=["a fox", "a crow"])
    plain = client.embeddings.create(model=MODEL, input=["a fox", "a crow"], encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    tokens = client.embeddings.create(model=MODEL, input=[[5, 6, 7], [8]])
    assert len(tokens.data) == 2


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == ["scripted", "scripted-too"]
    assert client.models.retrieve("scripted").id == "scripted"


def test_responses(client) -> None:
    found = client.responses.create(model=MODEL, input="Hello there", instructions="Be kind.")
    assert found.output_text == "You said: Hello there"
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    parsed = client.responses.parse(model=MODEL, input=JOKES, text_format=Joke)
    assert isinstance(parsed.output_parsed, Joke)


def test_responses_stream(client) -> None:
    with client.responses.stream(model=MODEL, input="Hello there") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output_text == "You said: Hello there"


def test_responses_call_functions_and_take_the_result(client) -> None:
    tool = openai.pydantic_function_tool(Add)["function"]
    tools = [{"type": "function", **tool}]
    found = client.responses.create(model=MODEL, input=ADD, tools=tools)
    [call] = found.output
    assert json.loads(call.arguments) == {"first": 31, "second": 11}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    back = client.responses.create(model=MODEL, input=[*ADD, *found.output, result], tools=tools)
    assert back.output_text == "It is 42."
    with client.responses.stream(model=MODEL, input=ADD, tools=tools) as stream:
        kinds = [event.type for event in stream]
        [streamed] = stream.get_final_response().output
    assert "response.function_call_arguments.delta" in kinds
    assert streamed.arguments == call.arguments


def test_errors_are_those_of_the_client(client) -> None:
    with pytest.raises(openai.NotFoundError) as found:
        client.chat.completions.create(model="other", messages=HELLO)
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=9)
    assert found.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1 << 20)
    assert found.value.code == "context_length_exceeded"
