"""Structured output: JSON schemas and tool calls as grammars, which say at each position which tokens are allowed.

The grammars are llguidance's, whose work is bounded: in states, in steps per token, and in the size of the grammar.
"""

from __future__ import annotations

import json
from typing import Any
from weakref import WeakKeyDictionary

import llguidance
import llguidance.hf
import numpy as np

from .errors import ApiError
from .schema_rewrites import rewritten
from .served import ServedModel
from .token_choice import Array

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON with fixed white space: otherwise a small model may write spaces until its tokens are used up."""
LIMITS: dict[str, Any] = {"initial_lexer_fuel": 1_000_000, "max_lexer_states": 50_000, "max_grammar_size": 500_000}
"""Work of llguidance: to compile a grammar (some 20 ms), states of the lexer (some 100 MB), and symbols."""

_tokenizers: WeakKeyDictionary[ServedModel, Any] = WeakKeyDictionary()


def _tokenizer(model: ServedModel) -> Any:
    """The tokenizer in llguidance's form, made when a grammar is first needed."""
    if model not in _tokenizers:
        ends = sorted(model.chat_ends | model.ends)
        try:
            _tokenizers[model] = llguidance.hf.from_tokenizer(
                model.tokenizer, n_vocab=model.vocabulary, eos_token=ends or None
            )
        except Exception as error:
            raise ApiError(
                f"the model {model.name!r} cannot give structured answers: {error}", param="response_format"
            ) from None
    return _tokenizers[model]


class GrammarMask:
    """A `token_choice.Mask` of a grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> Array:
        """Which tokens may come next, (V,) bool.

        Raises:
            ApiError: the grammar needs more work for this token than is allowed.
        """
        bits = self._matcher.compute_bitmask()
        self._require_sound()
        found = np.unpackbits(np.frombuffer(bits, np.uint8), count=self._vocabulary, bitorder="little")
        return found.view(bool)

    def accept(self, token: int) -> None:
        """Go on after a token."""
        self._matcher.consume_token(token)
        self._require_sound()

    @property
    def ended(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> GrammarMask:
        """The same grammar for another answer."""
        return GrammarMask(self._matcher.deep_copy(), self._vocabulary)

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise ApiError(
                f"the grammar of the answer cannot be followed: {_first_line(self._matcher.get_error())}",
                param="response_format",
                code="grammar_error",
            )


def schema_mask(model: ServedModel, schema: Any, largest: int, param: str) -> GrammarMask:
    """The mask of a JSON schema.

    Args:
        model: whose tokens are masked.
        schema: an object, or True for any JSON.
        largest: bytes that the schema may have.
        param: the field it came in.

    Raises:
        ApiError: the schema is too large, or has something that is not supported.
    """
    _require_size(schema, largest, param)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        rewritten(schema),
        overrides=COMPACT,  # type: ignore[arg-type]
    )
    return _compiled(model, grammar, param)


def lark_mask(model: ServedModel, lark: str, largest: int, param: str) -> GrammarMask:
    """The mask of a grammar in llguidance's form of Lark.

    Raises:
        ApiError: it is too large, or cannot be compiled.
    """
    _require_size(lark, largest, param)
    return _compiled(model, llguidance.LLMatcher.grammar_from_lark(lark), param)


def json_rule(schema: Any) -> str:
    """A JSON schema as a part of a Lark grammar."""
    return f"%json {json.dumps({**rewritten(schema), 'x-guidance': COMPACT})}"


def _require_size(value: Any, largest: int, param: str) -> None:
    size = len(json.dumps(value))
    if size > largest:
        raise ApiError(
            f"{param} has {size} bytes of schema; at most {largest} are allowed", param=param, code="schema_too_large"
        )


def _compiled(model: ServedModel, grammar: str, param: str) -> GrammarMask:
    limits = llguidance.LLParserLimits(**LIMITS)
    matcher = llguidance.LLMatcher(_tokenizer(model), grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise ApiError(
            f"{param} has a schema that is not supported: {_first_line(matcher.get_error())}",
            param=param,
            code="unsupported_schema",
        )
    return GrammarMask(matcher, model.vocabulary)


def _first_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else "no reason is known"
