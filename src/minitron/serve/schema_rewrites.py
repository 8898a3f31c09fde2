"""JSON schemas with the keywords that the grammar compiler knows; the same values are valid."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

_TIMES = ("date-time", "time", "date", "duration")
_HOSTS = ("email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uuid")
_LINKS = ("uri", "uri-reference", "iri", "iri-reference", "uri-template", "json-pointer", "relative-json-pointer")
FORMATS = frozenset((*_TIMES, *_HOSTS, *_LINKS, "regex"))
"""Formats of JSON Schema. Any other one is a note that changes nothing (JSON Schema Validation, 7.2.3)."""
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
REAL_DATE = f"^(?:[0-9]{{4}}-(?:(?:0[13-9]|1[0-2])-[0-9]{{2}}|02-(?:[01][0-9]|2[0-8]))|{_LEAP}-02-29)"
"""Beginning of a date without a 29 February in a common year, which the compiler's formats allow."""
MOST_DEPENDENCIES = 4
"""Of one schema: each doubles it."""
DEEPEST_REFERENCE = 16
DATA = ("const", "enum", "default", "examples", "example")
"""Keywords whose values are no schemas."""
OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose values map names to schemas."""


def rewritten(schema: Any) -> Any:
    """A schema that allows the same values, in other words where the compiler does not know those of `schema`.

    - A format that is none of JSON Schema's is left out.
    - `oneOf` becomes `anyOf` where no value can be of two of its parts.
    - `dependencies` and `dependentRequired` on names become alternatives.
    - A date must exist.
    """
    return _rewritten(schema, schema)


def _rewritten(schema: Any, root: Any) -> Any:
    if isinstance(schema, list):
        return [_rewritten(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in DATA:
            found[key] = value
        elif key in OF_SCHEMAS and isinstance(value, dict):
            found[key] = {name: _rewritten(part, root) for name, part in value.items()}
        else:
            found[key] = _rewritten(value, root)
    _rewrite_format(found)
    if _are_disjoint(found.get("oneOf"), root) and "anyOf" not in found:
        found["anyOf"] = found.pop("oneOf")
    _rewrite_dependencies(found)
    return found


def _rewrite_format(schema: dict[str, Any]) -> None:
    form = schema.get("format")
    if not isinstance(form, str):
        return
    if form not in FORMATS:
        del schema["format"]
    elif form in ("date", "date-time") and isinstance(schema.get("allOf", []), list):
        schema["allOf"] = [*schema.get("allOf", []), {"pattern": REAL_DATE}]


def _rewrite_dependencies(schema: dict[str, Any]) -> None:
    """If a is there, so is b: either both are there, or a is not."""
    for key in ("dependencies", "dependentRequired"):
        needed = schema.get(key)
        if not isinstance(needed, dict) or len(needed) > MOST_DEPENDENCIES:
            continue
        if not isinstance(schema.get("allOf", []), list):
            continue
        if not all(isinstance(names, list) and all(isinstance(one, str) for one in names) for names in needed.values()):
            continue
        del schema[key]
        alternatives = [
            {"anyOf": [{"required": [name, *names]}, {"properties": {name: False}}]} for name, names in needed.items()
        ]
        if alternatives:
            schema["allOf"] = [*schema.get("allOf", []), *alternatives]


# --- parts of which no value can be of two ------------------------------------------------------------------------


def _are_disjoint(parts: Any, root: Any) -> bool:
    if not isinstance(parts, list):
        return False
    resolved = [_resolved(part, root) for part in parts]
    return all(_differ(first, second, root) for first, second in combinations(resolved, 2))


def _resolved(schema: Any, root: Any) -> Any:
    """What a reference within the document means; other keywords beside it only make it narrower."""
    for _ in range(DEEPEST_REFERENCE):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        schema = root
        for name in reference[2:].split("/"):
            name = name.replace("~1", "/").replace("~0", "~")
            if not isinstance(schema, dict) or name not in schema:
                return {}
            schema = schema[name]
    return {}


def _differ(first: Any, second: Any, root: Any) -> bool:
    """Whether it is certain that no value is of both schemas."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return first is False or second is False
    kinds = _kinds(first), _kinds(second)
    if None not in kinds and not kinds[0] & kinds[1]:  # type: ignore[operator]
        return True
    values = _values(first), _values(second)
    if None not in values:
        return not any(one == other for one in values[0] for other in values[1])  # type: ignore[union-attr]
    if not kinds[0] == kinds[1] == {"object"}:
        return False
    return any(
        _differ(_resolved(one, root), _resolved(other, root), root) for one, other in _common_properties(first, second)
    )


def _common_properties(first: dict[str, Any], second: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The schemas of the properties that both require."""
    required = [schema.get("required", []) for schema in (first, second)]
    properties = [schema.get("properties", {}) for schema in (first, second)]
    if not all(isinstance(part, list) for part in required) or not all(isinstance(part, dict) for part in properties):
        return
    for name in required[0]:
        if isinstance(name, str) and name in required[1] and name in properties[0] and name in properties[1]:
            yield properties[0][name], properties[1][name]


def _kinds(schema: dict[str, Any]) -> set[str] | None:
    """The types that a schema allows, integers among the numbers; None if it names none."""
    kinds = schema.get("type")
    names = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else None
    if names is None:
        return None
    return {"number" if name == "integer" else str(name) for name in names}


def _values(schema: dict[str, Any]) -> list[Any] | None:
    """The values that a schema lists; None if it lists none. Numbers and booleans that are equal count as equal."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None
