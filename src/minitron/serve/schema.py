"""Requests in OpenAI's form, checked. Every body that a client sends becomes one of these models, or an error.

The rule for fields: what is known and can be honoured is; a field of the API that asks for something this server does
not do is refused by name unless its value asks for nothing (`store: false`, `modalities: ["text"]`); a field that
nobody knows is refused too. Nothing is ignored silently. Labels that change no answer (`user`, `metadata`) are
accepted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..characters import first_surrogate
from .errors import ApiError, shown

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_MESSAGES = 4096
MOST_TOOLS = 128
MOST_INPUTS = 2048
LONGEST_STOP = 256
LONGEST_NAME = 256
MOST_TOP_LOGPROBS = 20
DEEPEST = 64
"""Levels of nesting in a body."""

Text = Annotated[str, Field(max_length=1 << 22)]
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1 << 31)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=1 << 31)]], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
JsonObject = dict[str, Any]

M = TypeVar("M", bound="Body")


class Body(BaseModel):
    """A part of a request. Values are not converted: "1" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields of the API that are not supported, with the values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = dict(values)
        for name, neutral in cls.REFUSED.items():
            if name in kept and kept.pop(name) not in (None, *neutral):
                allowed = f"; leave it out, or give {' or '.join(map(json.dumps, neutral))}" if neutral else ""
                raise ValueError(f"{name} is not supported by this server{allowed}")
        return kept


class Labels(Body):
    """Fields that change no answer."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: JsonObject | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None


class StreamOptions(Body):
    """What a stream contains besides the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(Labels):
    """How the next token is chosen. None leaves the choice to the checkpoint, or to OpenAI's default."""

    model: Name
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=1000)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the text."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @model_validator(mode="after")
    def _check_stream_options(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given without stream: true; leave it out")
        return self

    @model_validator(mode="after")
    def _check_logit_bias(self) -> Sampling:
        for key in self.logit_bias or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"logit_bias has the key {shown(key)}; keys are token ids such as '1234'")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


# --- chat ----------------------------------------------------------------------------------------------------------


class ContentPart(Body):
    """Text of a message. Images, audio and files are refused."""

    type: Literal["text", "refusal"]
    text: Text | None = None
    refusal: Text | None = None
    prompt_cache_breakpoint: JsonObject | None = None

    @model_validator(mode="after")
    def _check_text(self) -> ContentPart:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} needs the field {self.type}, a string")
        return self


class CalledFunction(Body):
    """Name and arguments, JSON in a string, of a call."""

    name: Name
    arguments: Text

    # Clients parse what they get, and send the values back beside the text.
    parsed_arguments: Any = None


class ToolCall(Body):
    """A call that the assistant made earlier in the conversation."""

    id: Name
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None


class Message(Body):
    """One turn of a conversation."""

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {"audio": (), "function_call": ()}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(min_length=1, max_length=1024)] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: Name | None = None

    # Fields that servers put into their answers, and clients beside them, and that are sent back.
    annotations: list[JsonObject] | None = None
    reasoning_content: str | None = None
    parsed: Any = None
    provider_specific_fields: JsonObject | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message with the role tool needs a tool_call_id")
        if self.role != "assistant" and self.tool_calls:
            raise ValueError(f"a message with the role {self.role} has tool_calls; only the assistant's may")
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError(f"a message with the role {self.role} needs content, a string or a list of text parts")
        return self


class Function(Body):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: Name


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """The schema of a structured answer."""

    name: FunctionName
    description: str | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer: text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given with the type json_schema, and with no other")
        return self


class ChatRequest(Sampling):
    """The body of /v1/chat/completions."""

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "audio": (),
        "function_call": (),
        "functions": (),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is given without logprobs: true; give both")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ; give max_completion_tokens alone")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("tools has two functions of one name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {shown(self.tool_choice.function.name)}, which is not among tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is required, and tools is empty")
        return self


# --- other routes --------------------------------------------------------------------------------------------------


class CompletionRequest(Sampling):
    """The body of /v1/completions."""

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {"suffix": ("",)}

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_INPUTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise ValueError(f"best_of is {self.best_of}; this server supports only best_of equal to n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0 without echo: true, which asks for nothing; it must be at least 1")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class EmbeddingsRequest(Labels):
    """The body of /v1/embeddings."""

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {"dimensions": ()}

    model: Name
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """Each input, as text or as token ids."""
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]  # type: ignore[list-item]
        return list(self.input)  # type: ignore[arg-type]


class ClassifyRequest(Labels):
    """The body of /classify: texts for a classification head, or contexts with a question for a question answerer."""

    model: Name
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS)]
    pair: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS)] | None = None
    """The second text of each input, for a sequence classifier of pairs."""
    question: Text | None = None
    calibrated: bool = False
    """Divide a sequence classifier's logits by the temperature that `minitron finetune` stored."""

    @model_validator(mode="after")
    def _check_pairs(self) -> ClassifyRequest:
        if self.pair is not None and (
            isinstance(self.pair, str) != isinstance(self.input, str) or len(self.inputs) != len(self.pairs)
        ):
            raise ValueError("pair must be one text where input is one, and a list of as many texts where it is a list")
        return self

    @property
    def inputs(self) -> list[str]:
        """Each text."""
        return [self.input] if isinstance(self.input, str) else self.input

    @property
    def pairs(self) -> Sequence[str | None]:
        """The second text of each input."""
        if self.pair is None:
            return [None] * len(self.inputs)
        return [self.pair] if isinstance(self.pair, str) else self.pair


class TokenizeRequest(Body):
    """The body of /tokenize: a text or a conversation."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_input(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, le=1 << 31)]], Field(max_length=1 << 20)]


# --- parsing -------------------------------------------------------------------------------------------------------


def parse(kind: type[M], body: bytes) -> M:
    """The request that a body is.

    Raises:
        ApiError: the body is no JSON object, or a field is unknown, missing, of another type or out of range.
    """
    values = json_value(body)
    if not isinstance(values, dict):
        raise ApiError(f"the body is {type(values).__name__} {shown(values)}; it must be a JSON object")
    return validated(kind, values)


def validated(kind: type[M], values: dict[str, Any]) -> M:
    """The request of some values.

    Raises:
        ApiError: a field is unknown, missing, of another type or out of range.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explained(error) from None


def json_value(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ApiError: it is not UTF-8 or not JSON, has NaN or an infinity, a lone surrogate, an enormous number, or is
            nested too deeply.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(
            f"the body is not UTF-8: byte 0x{body[error.start]:02x} at position {error.start}", code="invalid_utf8"
        ) from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ApiError(f"the body is nested too deeply; at most {DEEPEST} levels are allowed") from None
    except ValueError as error:  # includes JSONDecodeError and integers of thousands of digits
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    _check_values(value, "the body", DEEPEST)
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _check_values(value: Any, where: str, depth: int) -> None:
    if depth == 0:
        raise ApiError(f"the body is nested too deeply; at most {DEEPEST} levels are allowed")
    if isinstance(value, str):
        at = first_surrogate(value)
        if at is not None:
            raise ApiError(f"{where} has a lone surrogate at character {at + 1}, which stands for no character")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_values(key, "a key", depth)
            _check_values(item, key, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_values(item, where, depth - 1)


def _explained(error: ValidationError) -> ApiError:
    """The first problem as a sentence. Of alternatives of a union, the one that got furthest is the one meant."""
    problems = error.errors(include_url=False, include_context=False)
    of_one_field = all(problem["loc"][:1] == problems[0]["loc"][:1] for problem in problems)
    problem = max(problems, key=lambda problem: len(problem["loc"])) if of_one_field else problems[0]
    path = [part for part in problem["loc"] if isinstance(part, int) or _is_field(part)]
    where = ".".join(map(str, path))
    kind, message = problem["type"], problem["msg"]
    if kind == "extra_forbidden":
        message = f"unknown field {where!r}"
        return ApiError(message, param=where, code="unknown_parameter")
    if kind == "missing":
        return ApiError(f"the field {where!r} is missing", param=where, code="missing_required_parameter")
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        return ApiError(f"{where}: {message}" if where else message, param=where or None, code="invalid_value")
    message = message[0].lower() + message[1:]
    return ApiError(f"{where} is {shown(problem['input'])}: {message}", param=where, code="invalid_value")


def _is_field(part: str) -> bool:
    """Whether a part of a pydantic location is a field's name, and not the name of an alternative of a union."""
    alternatives = ("str", "int", "float", "bool", "none", "nullable")
    return part not in alternatives and part.isidentifier() and not part[:1].isupper()
