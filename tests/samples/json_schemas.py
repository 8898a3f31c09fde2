"""The JSON schemas of a public benchmark (arXiv 2501.10868), and what is checked of each."""

from __future__ import annotations

import gzip
import json
import os
import random
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from jsonschema.validators import validator_for

from minitron.serve.errors import ApiError
from minitron.serve.grammar import GrammarMask, schema_mask
from minitron.serve.served import ServedModel
from minitron.tokenizer import load_tokenizer

DATA = Path(os.environ.get("MINITRON_DATA", Path(__file__).parents[3] / "shared" / "datasets"))
FILE = DATA / "jsonschema" / "dev.jsonl.gz"
LARGEST = 64 << 10
"""The server's default limit on a schema, in bytes."""
LONG = 120
"""Tokens after which a random output tends to its end."""


def read_schemas(file: Path = FILE) -> list[dict[str, Any]]:
    """Rows with an id, a schema, and tests: data that are valid, and data that are not."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def masking_model(folder: Path) -> ServedModel:
    """The part of a served model that grammars need: tokenizer and vocabulary, without weights."""
    tokenizer = load_tokenizer(folder)
    nothing: Any = None
    ends = frozenset({tokenizer.eos_token_id})
    return ServedModel("m", tokenizer, nothing, 4096, len(tokenizer), nothing, "", ends, ends)


@dataclass
class Found:
    """What the checks of one schema have found."""

    accepted: bool = True
    reason: str = ""
    """Why the schema is refused."""
    compile_seconds: float = 0.0
    mask_seconds: list[float] = field(default_factory=list)
    valid: int = 0
    invalid: int = 0
    valid_refused: list[Any] = field(default_factory=list)
    invalid_accepted: list[Any] = field(default_factory=list)
    finished: int = 0
    unfinished: int = 0
    wrong_outputs: list[str] = field(default_factory=list)


def check(model: ServedModel, row: dict[str, Any], outputs: int, seed: int = 0) -> Found:
    """Compile a schema, run its tests through the mask, and validate random outputs."""
    found, schema = Found(), row["schema"]
    start = time.perf_counter()
    try:
        mask = schema_mask(model, schema, LARGEST, "response_format")
    except ApiError as error:
        found.accepted, found.reason = False, error.message
        return found
    finally:
        found.compile_seconds = time.perf_counter() - start
    order = property_order(schema)
    for test in row["tests"]:
        data = ordered(test["data"], order)
        taken = any(follows(mask.copy(), model, text_of(value), found.mask_seconds) for value in (test["data"], data))
        if test["valid"]:
            found.valid += 1
            found.valid_refused += [] if taken else [test["data"]]
        else:
            found.invalid += 1
            found.invalid_accepted += [test["data"]] if taken else []
    chance = random.Random(seed)
    for _ in range(outputs):
        text = random_output(mask.copy(), model, chance, found.mask_seconds)
        if text is None:
            found.unfinished += 1
        else:
            found.finished += 1
            found.wrong_outputs += [] if is_valid(text, schema) else [text]
    return found


def text_of(value: Any) -> str:
    """JSON with the white space of the server's grammars."""
    return json.dumps(value, ensure_ascii=False)


def property_order(schema: Any) -> dict[str, int]:
    """The order in which a schema mentions properties; grammars take the properties of an object in that order."""
    found: dict[str, int] = {}

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            for name in part.get("properties", {}) if isinstance(part.get("properties"), dict) else ():
                found.setdefault(name, len(found))
            for value in part.values():
                walk(value)
        elif isinstance(part, list):
            for value in part:
                walk(value)

    walk(schema)
    return found


def ordered(value: Any, order: dict[str, int]) -> Any:
    """A value with the keys of its objects in that order, unknown ones last."""
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: order.get(key, len(order)))
        return {key: ordered(value[key], order) for key in keys}
    return [ordered(item, order) for item in value] if isinstance(value, list) else value


def follows(mask: GrammarMask, model: ServedModel, text: str, seconds: list[float]) -> bool:
    """Whether a mask allows each token of a text, and the end after it."""
    for token in model.encode(text, special=False):
        allowed = _allowed(mask, seconds)
        if not allowed[token]:
            return False
        mask.accept(token)
    return mask.ended or bool(_allowed(mask, seconds)[list(model.ends)].any())


def random_output(mask: GrammarMask, model: ServedModel, chance: random.Random, seconds: list[float]) -> str | None:
    """A text of random tokens that the mask allows; None if it has no end within three times LONG tokens."""
    tokens: list[int] = []
    closing = _closing(model)
    while not mask.ended:
        allowed = _allowed(mask, seconds)
        choices = np.flatnonzero(allowed)
        if set(choices.tolist()) & model.ends and (len(tokens) > LONG or chance.random() < 0.5):
            break
        near = np.flatnonzero(allowed & closing)
        if len(near) and (len(tokens) > LONG or chance.random() < 0.3):
            choices = near
        token = int(choices[chance.randrange(len(choices))])
        if len(tokens) > 3 * LONG:
            return None
        if token in model.ends:
            break
        tokens.append(token)
        mask.accept(token)
    return model.decode(tokens)


@lru_cache(maxsize=2)
def _closing(model: ServedModel) -> np.ndarray[Any, Any]:
    """Which tokens close strings, objects and lists, or go on to the next item."""
    texts = [model.decode([token]) for token in range(model.vocabulary)]
    return np.array([bool(text) and all(character in '"]}' for character in text.strip()) for text in texts])


def _allowed(mask: GrammarMask, seconds: list[float]) -> np.ndarray[Any, Any]:
    start = time.perf_counter()
    found = mask.allowed()
    seconds.append(time.perf_counter() - start)
    return found


def is_valid(text: str, schema: Any) -> bool:
    """Whether a text is JSON that a schema allows, formats included."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    return bool(kind(schema, format_checker=kind.FORMAT_CHECKER).is_valid(value))
