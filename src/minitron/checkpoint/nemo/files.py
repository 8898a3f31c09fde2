"""NeMo 2's `context/io.json`: the Python calls that build model, config and tokenizer, as fiddle writes them to JSON.

NeMo restores a checkpoint with `fiddle.build` of this file. Here it is only data: writing needs no fiddle, reading
looks at the arguments of the model's config and imports nothing. Format: `fiddle._src.experimental.serialization`,
version 0.0.1; NeMo's use of it: `nemo/lightning/io/mixin.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..limits import CheckpointError, parse_json, require

_BUILDABLE = ("fiddle._src.config", "Config")
_METADATA = ("fiddle._src.config", "BuildableTraverserMetadata")
_CONTEXT = "nemo.lightning.io.pl.TrainerContext"


@dataclass(frozen=True)
class Reference:
    """Something that is imported by its dotted name: a function, a dtype."""

    name: str


@dataclass(frozen=True)
class Call:
    """`name(**arguments)`, to be called when the checkpoint is loaded; arguments are plain values or the like."""

    name: str
    arguments: dict[str, Any]


def model_context(model: Call) -> bytes:
    """The contents of `io.json` for a model without a trainer."""
    writer = _Writer()
    root = writer.call(Call(_CONTEXT, {"model": model, "trainer": None}), "<root>")
    values = {"root": root, "objects": writer.objects, "refcounts": writer.counts, "version": "0.0.1"}
    return json.dumps(values).encode()


class _Writer:
    """Collects the numbered objects of the file; each is referred to once."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def call(self, call: Call, path: str) -> dict[str, str]:
        names = list(call.arguments)
        items = [[_attribute(name), self.value(call.arguments[name], f"{path}.{name}")] for name in names]
        described = [
            ["fn_or_cls", _pyref(*_split(call.name))],
            [
                "argument_names",
                self.plain("tuple", [[f"Index(index={i})", name] for i, name in enumerate(names)], None),
            ],
            ["argument_tags", self.plain("dict", [], _EMPTY_TUPLE)],
            ["argument_history", self.plain("dict", [], _EMPTY_TUPLE)],
        ]
        traversed = {
            "type": _pyref(*_METADATA),
            "items": [[_attribute(name), value] for name, value in described],
            "metadata": _pyref(*_METADATA),
        }
        metadata = self.add("buildable_traverser_metadata", traversed)
        value = {"type": _pyref(*_BUILDABLE), "items": items, "metadata": metadata, "paths": [path]}
        return self.add(_split(call.name)[1].lower(), value)

    def value(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Call):
            return self.call(value, path)
        if isinstance(value, Reference):
            return {**_pyref(*_split(value.name)), "paths": [path]}
        return {"type": "leaf", "value": value, "paths": [path]}

    def plain(self, kind: str, items: list[list[Any]], metadata: Any) -> dict[str, str]:
        return self.add(kind, {"type": _pyref("builtins", kind), "items": items, "metadata": metadata})

    def add(self, kind: str, value: dict[str, Any]) -> dict[str, str]:
        key = f"{kind}_{1 + sum(name.startswith(kind + '_') for name in self.objects)}"
        self.objects[key] = value
        self.counts[key] = 1
        return {"type": "ref", "key": key}


def _attribute(name: str) -> str:
    return f"Attr(name={name!r})"


def _split(dotted: str) -> tuple[str, str]:
    module, _, name = dotted.rpartition(".")
    return module, name


def _pyref(module: str, name: str) -> dict[str, str]:
    return {"type": "pyref", "module": module, "name": name}


_EMPTY_TUPLE = {"type": _pyref("builtins", "tuple"), "items": [], "metadata": None}


def config_of_context(data: bytes, where: object) -> dict[str, Any]:
    """The arguments of the model's config in an `io.json`, spelled as NeMo's model.yaml spells them.

    Only plain values and names are returned: nested calls and containers (layer specs, communication overlap) say
    nothing about the weights.

    Raises:
        CheckpointError: not such a file, or no `model.config` in it.
    """
    values = parse_json(data, where)
    objects, root = values.get("objects"), values.get("root")
    require(isinstance(objects, dict) and isinstance(root, dict), f"{where}: no objects and root; not NeMo's io.json")
    assert isinstance(objects, dict)
    model = _arguments(root, objects, where)[1].get("model")
    name, arguments = _arguments(_arguments(model, objects, where)[1].get("config"), objects, where)
    found: dict[str, Any] = {"_target_": name}
    for key, value in arguments.items():
        kind = value.get("type") if isinstance(value, dict) else "plain"
        if kind == "plain":
            found[key] = value
        elif kind == "leaf":
            found[key] = value.get("value")
        elif kind == "pyref":
            found[key] = {"_target_": f"{value.get('module')}.{value.get('name')}", "_call_": False}
    return found


def _arguments(node: Any, objects: dict[str, Any], where: object) -> tuple[str, dict[str, Any]]:
    """What a call names, and its arguments; the names stand in the metadata, the items beside them in order."""
    call = _object(node, objects, where)
    metadata = _items(_object(call.get("metadata"), objects, where), where)
    described = dict(zip(("fn_or_cls", "argument_names"), metadata, strict=False))
    target = described.get("fn_or_cls")
    if not isinstance(target, dict):
        raise CheckpointError(f"{where}: a call that names nothing; not NeMo's io.json")
    names = _items(_object(described.get("argument_names"), objects, where), where)
    items = _items(call, where)
    require(len(names) == len(items), f"{where}: {len(names)} names for {len(items)} arguments; corrupted")
    return f"{target.get('module')}.{target.get('name')}", dict(zip(map(str, names), items, strict=True))


def _object(node: Any, objects: dict[str, Any], where: object) -> dict[str, Any]:
    if isinstance(node, dict) and node.get("type") == "ref":
        node = objects.get(str(node.get("key")))
    if not isinstance(node, dict):
        raise CheckpointError(f"{where}: no model.config in it (TrainerContext, model, config); not NeMo's io.json")
    return node


def _items(node: dict[str, Any], where: object) -> list[Any]:
    items = node.get("items")
    good = isinstance(items, list) and all(isinstance(item, list) and len(item) == 2 for item in items)
    require(good, f"{where}: an object without items; not NeMo's io.json")
    assert isinstance(items, list)
    return [item[1] for item in items]
