"""The body of /v1/responses, checked, as the chat request that it stands for. Nothing is stored between requests."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from .schema import (
    MOST_MESSAGES,
    MOST_TOOLS,
    Body,
    Count,
    FunctionName,
    JsonObject,
    Labels,
    Name,
    Number,
    Text,
)


class InputPart(Body):
    """Text of an input message. Images and files are refused."""

    type: Literal["input_text", "output_text", "refusal", "text"]
    text: Text | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None

    @property
    def words(self) -> str:
        """The text, whatever its kind."""
        return self.text or self.refusal or ""


class InputItem(Body):
    """A message, a call that the assistant made, or a call's result."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    id: str | None = None
    status: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Text | list[InputPart] | None = None
    call_id: Name | None = None
    name: Name | None = None
    arguments: Text | None = None
    output: Text | list[InputPart] | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> InputItem:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }[self.type]
        for field in needed:
            if getattr(self, field) is None:
                raise ValueError(f"an item of type {self.type} needs the field {field}")
        return self


class ResponseTool(Body):
    """A function that the model may call; other kinds of tools are refused."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class NamedResponseTool(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: Name


class TextFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: FunctionName | None = None
    description: str | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """Options of the text."""

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ResponsesRequest(Labels):
    """The body of /v1/responses."""

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "context_management": (),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({"effort": "none"},),
        "store": (False,),
        "stream_options": (),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    model: Name
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    stream: bool | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None

    def chat_values(self) -> dict[str, Any]:
        """The body of /v1/chat/completions that asks for the same answer."""
        found: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "parallel_tool_calls": self.parallel_tool_calls,
            "tools": [
                {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
                for tool in self.tools or []
            ],
            "tool_choice": self.tool_choice,
            "response_format": self._format(),
        }
        if isinstance(self.tool_choice, NamedResponseTool):
            found["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        return {name: value for name, value in found.items() if value is not None}

    def _messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        for item in self.input:
            if item.type == "message":
                found.append({"role": item.role, "content": _words(item.content)})
            elif item.type == "function_call_output":
                found.append({"role": "tool", "tool_call_id": item.call_id, "content": _words(item.output)})
            else:
                call = {
                    "id": item.call_id,
                    "type": "function",
                    "function": {"name": item.name, "arguments": item.arguments},
                }
                if not (found and found[-1]["role"] == "assistant"):
                    found.append({"role": "assistant", "content": None})
                found[-1].setdefault("tool_calls", []).append(call)
        return found

    def _format(self) -> dict[str, Any] | None:
        form = None if self.text is None else self.text.format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return {"type": "json_object"}
        schema = {"name": form.name or "answer", "schema": form.schema_ or {}, "strict": form.strict}
        return {"type": "json_schema", "json_schema": schema}


def _words(content: str | list[InputPart] | None) -> str:
    return "".join(part.words for part in content) if isinstance(content, list) else content or ""
