"""YAML, read as plain values: every limit is checked while the text is scanned, before anything is built from it.

PyYAML works character by character in Python, resolves numbers of any length (`1:1:1:...` in base 60, too) and
compares nothing with a limit. Real files (NeMo's model_config.yaml, model.yaml, recipes) have a few hundred short
values.
"""

from __future__ import annotations

from typing import Any

from .limits import (
    MAX_ODD_KEYS,
    MAX_YAML_BYTES,
    MAX_YAML_DEPTH,
    MAX_YAML_NODES,
    MAX_YAML_SCALAR,
    MAX_YAML_TEXT,
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
            digits, tags that would build Python objects, a key given twice (with both lines), not a mapping.
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
    pending, count, odd_keys, text = [root], 0, 0, 0
    while pending:
        node = pending.pop()
        count += 1
        require(count <= MAX_YAML_NODES, f"{where}: more than {MAX_YAML_NODES:,} YAML nodes (aliases are followed)")
        require(node.tag in _PLAIN_TAGS, f"{where}: not YAML of plain values (the tag {shown(node.tag)})")
        if isinstance(node.value, str):
            text += len(node.value)
            require(text <= MAX_YAML_TEXT, f"{where}: more than {MAX_YAML_TEXT:,} characters (aliases are followed)")
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
    lines: dict[str, int] = {}
    for key in keys:
        line = key.start_mark.line + 1
        if not isinstance(key.value, str):
            raise CheckpointError(f"{where}, line {line}: a YAML key that is a list or a mapping, expected a text")
        if key.value in lines:
            raise CheckpointError(
                f"{where}, line {line}: the key {shown(key.value)} is given twice in one mapping, first on line "
                f"{lines[key.value]}"
            )
        lines[key.value] = line
    return sum(key.tag != _TAG + "str" for key in keys)
