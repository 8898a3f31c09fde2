"""From a checked request to the sequences of the scheduler."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from ..sampling_parameters import SamplingParameters
from .errors import ApiError
from .generation import too_long
from .scheduler import TextSequence
from .schema import ChatRequest, Message, Sampling, Tool
from .served import ServedModel
from .text_output import TextOutput
from .token_choice import Mask, TokenChooser, TokenRules

TOP_P_OF_ONE_TOKEN = 1e-9


def token_rules(model: ServedModel, request: Sampling, top_logprobs: int | None, choice: int) -> TokenRules:
    """How the tokens of a choice are chosen: by the request, else by the checkpoint, else by OpenAI's defaults.

    Raises:
        ApiError: a value is out of range, or a token of `logit_bias` is not in the vocabulary.
    """
    given: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": max(request.top_p, TOP_P_OF_ONE_TOKEN) if request.top_p is not None else None,
        "top_k": None if request.top_k is None else max(0, request.top_k),
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "seed": None if request.seed is None else (request.seed + choice + 2**63) % 2**64 - 2**63,
    }
    config: Any = model.model.generation_config
    try:
        parameters = SamplingParameters.for_model(config, given, {"temperature": 1.0})
    except ValueError as error:
        raise ApiError(str(error), code="invalid_value") from None
    bias = {int(key): value for key, value in (request.logit_bias or {}).items()}
    model.check_ids(list(bias), "logit_bias")
    return TokenRules(parameters, request.presence_penalty or 0.0, request.frequency_penalty or 0.0, bias, top_logprobs)


def sequences_of(
    model: ServedModel,
    request: Sampling,
    prompts: Sequence[list[int]],
    *,
    limit: int | None,
    ends: frozenset[int],
    seconds: float,
    top_logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    masks: Sequence[Mask] | None = None,
) -> list[TextSequence]:
    """The sequences of a request: `n` for each prompt.

    Args:
        model: which is asked.
        request: how tokens are chosen, and where texts end.
        prompts: token ids.
        limit: largest number of new tokens; as many as the context has room for if None.
        ends: tokens that end a text.
        seconds: time that the request may take.
        top_logprobs: see `TokenRules`.
        prompt_logprobs: see `TextSequence`.
        masks: a grammar for each sequence.

    Raises:
        ApiError: a prompt is empty or too long, or a value is out of range.
    """
    found = []
    for prompt in prompts:
        room = model.context - len(prompt)
        new = room if limit is None else limit
        if not prompt:
            raise ApiError("the prompt has no tokens; give some text", param="prompt")
        if new > room or (room < 1 and limit != 0):
            raise too_long(model, len(prompt), max(1, new))
        for choice in range(request.n or 1):
            rules = token_rules(model, request, top_logprobs, choice)
            mask = None if masks is None else masks[len(found)]
            found.append(
                TextSequence(
                    prompt,
                    TokenChooser(rules, prompt, model.vocabulary, mask),
                    TextOutput(model.decode, prompt, request.stops),
                    new,
                    frozenset() if request.ignore_eos else ends,
                    prompt_logprobs,
                    time.monotonic() + seconds,
                )
            )
    return found


# --- conversations -------------------------------------------------------------------------------------------------


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: text as one string, arguments of calls as values."""
    return [_template_message(index, message) for index, message in enumerate(messages)]


def _template_message(index: int, message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": _text_of(message)}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(index, call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _text_of(message: Message) -> str:
    if isinstance(message.content, list):
        return "".join(part.text or part.refusal or "" for part in message.content)
    return message.content if message.content is not None else message.refusal or ""


def _arguments(index: int, text: str) -> Any:
    """The arguments of a call; text that is not a JSON object stays text, as the model wrote it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def template_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools as chat templates take them; None if there are none, so that no template mentions tools."""
    if not tools:
        return None
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


def rendered(model: ServedModel, messages: Sequence[Message], tools: Sequence[Tool] | None, prompt: bool) -> str:
    """A conversation as text. Where the template takes one system message, those at the beginning are joined.

    Raises:
        ApiError: the template rejects the conversation.
    """
    turns, templates = conversation(messages), template_tools(tools)
    leading = next((index for index, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    try:
        return model.render(turns, templates, prompt)
    except ApiError:
        if leading < 2:
            raise
        joined = "\n\n".join(turn["content"] for turn in turns[:leading])
        return model.render([{**turns[0], "content": joined}, *turns[leading:]], templates, prompt)


def chat_prompt(model: ServedModel, request: ChatRequest) -> list[int]:
    """The token ids of a conversation with the heading of the answer."""
    tools = None if request.tool_choice == "none" else request.tools
    return model.encode(rendered(model, request.messages, tools, prompt=True), special=False)


def chat_limit(request: ChatRequest) -> int | None:
    """The largest number of new tokens."""
    return request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
