"""YAML, read as plain values: every limit is checked while the text is scanned, before anything is built from it.

PyYAML works character by character in Python, resolves numbers of any length (`1:1:1:...` in base 60, too) and
compares nothing with a limit. Real files (NeMo's model_config.yaml, model.yaml) have a few hundred short values.
"""

from __future__ import annotations

from typing import Any

from .limits import (
    MAX_ODD_KEYS,
    MAX_YAML_BYTES,
    MAX_YAML_DEPTH,
    MAX_YAML_NODES,
    MAX_YAML_SCALAR,
    CheckpointError,
    require,
    shown,
)

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + kind for kind in ("map", "seq", "str", "int", "float", "bool", "null", "merge", "timestamp")}


def parse_yaml(data: bytes, where: object) -> dict[str, Any]:
    """The YAML mapping in `data`, plain types only.

    Raises:
        CheckpointError: too long, too many or too deeply nested values (aliases are followed), numbers of too many
            digits, tags that would build Python objects, duplicate keys, not a mapping.
    """
    try:
        import yaml
    except ImportError:
        raise CheckpointError(f"{where}: reading YAML needs PyYAML: pip install 'minitron[nemo]'") from None
    require(len(data) <= MAX_YAML_BYTES, f"{where}: {len(data):,} bytes of YAML, expected at most {MAX_YAML_BYTES:,}")
    try:
        loader = _bounded(yaml.SafeLoader, where)(data)
        node = loader.get_single_node()
        _check_nodes(node, where)
        value = loader.construct_document(node)
    except CheckpointError:
        raise
    except Exception as error:  # PyYAML's constructors raise anything (`!!float ""`: IndexError); all mean the same
        sentence = " ".join(str(error).split())
        raise CheckpointError(f"{where}: not YAML of plain values ({sentence})") from None
    require(isinstance(value, dict), f"{where}: found a YAML {type(value).__name__}, expected a mapping")
    return value


def _bounded(base: Any, where: object) -> Any:
    """A loader class that stops at the first value too many or the first level too deep, while the text is scanned."""

    class Bounded(base):
        events = depth = 0

        def get_event(self) -> Any:
            event = super().get_event()
            self.events += 1
            require(self.events <= MAX_YAML_NODES, f"{where}: more than {MAX_YAML_NODES:,} YAML values")
            name = type(event).__name__
            self.depth += name in ("MappingStartEvent", "SequenceStartEvent")
            self.depth -= name in ("MappingEndEvent", "SequenceEndEvent")
            require(
                self.depth <= MAX_YAML_DEPTH, f"{where}: not YAML of plain values (more than {MAX_YAML_DEPTH} levels)"
            )
            return event

    return Bounded


def _check_nodes(root: Any, where: object) -> None:
    """Refuse too many nodes (an aliased one counts as often as it is referred to), long numbers, and duplicate keys."""
    pending, count, odd_keys = [root], 0, 0
    while pending:
        node = pending.pop()
        count += 1
        require(count <= MAX_YAML_NODES, f"{where}: more than {MAX_YAML_NODES:,} YAML nodes (aliases are followed)")
        require(node.tag in _PLAIN_TAGS, f"{where}: not YAML of plain values (the tag {shown(node.tag)})")
        if isinstance(node.value, str):
            short = node.tag == _TAG + "str" or len(node.value) <= MAX_YAML_SCALAR
            require(short, f"{where}: a YAML number of {len(node.value):,} characters: {shown(node.value)}")
            continue
        children = node.value
        if children and isinstance(children[0], tuple):
            odd_keys += _check_keys([key for key, _ in children], where)
            require(odd_keys <= MAX_ODD_KEYS // 10, f"{where}: {odd_keys:,} YAML keys that are no texts")
            children = [part for pair in children for part in pair]
        pending.extend(children)


def _check_keys(keys: list[Any], where: object) -> int:
    """The number of keys that are no texts; a key must be a single value, and there once."""
    seen: set[str] = set()
    for key in keys:
        require(isinstance(key.value, str), f"{where}: a YAML key that is a list or a mapping, expected a text")
        require(key.value not in seen, f"{where}: the YAML key {shown(key.value)} stands twice in one mapping")
        seen.add(key.value)
    return sum(key.tag != _TAG + "str" for key in keys)
