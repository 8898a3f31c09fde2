"""What a model is made of at one moment, so that a later call sees at once whether somebody has changed it.

Before a text, the engine looks at every module and builds its tables of weights. That takes longer than the first token
of a small model. Where neither a module, an attribute, a setting nor a tensor was replaced, the answers are the same.

Numbers within tensors are not looked at: the engine shares matrices with the model, and compares what it copies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

MOST_BYTES = 1 << 30
"""Larger models are looked at anew at each call, for a snapshot keeps tensors that the caller has replaced since."""

UNREAD = frozenset(("last_generation", "generation_config"))
"""Attributes of a model that change with calls of `generate`, and that the engine's weights do not depend on."""

_Place = tuple[Any, ...]


class Snapshot:
    """The modules, attributes, settings and tensors of a model. It holds all of them, but not the model itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._kind = type(model)
        self._own = _read_attributes(model)
        self._modules = [module for module in model.modules() if module is not model]
        self._kinds = list(map(type, self._modules))
        self._dicts: list[dict[Any, Any]] = []
        self._lists: list[list[Any]] = []
        self._seen: set[int] = set()
        self._tensors: list[Tensor] = []
        self._add(self._own.values())
        self._add(list(map(vars, self._modules)))
        self._keys = list(map(tuple, self._dicts))
        self._lengths = list(map(len, self._lists))
        self._items = list(self._read_items())
        self._ids = list(map(id, self._items))
        self._places = list(map(_place, self._tensors))

    def _add(self, values: Collection[Any]) -> None:
        """Note containers, settings and tensors among values, and what these contain."""
        for value in values:
            if isinstance(value, Tensor | dict | list | PreTrainedConfig) and id(value) not in self._seen:
                self._seen.add(id(value))
                if isinstance(value, Tensor):
                    self._tensors.append(value)
                elif isinstance(value, list):
                    self._lists.append(value)
                    self._add(value)
                elif isinstance(value, PreTrainedConfig):
                    self._add([vars(value)])
                else:
                    self._dicts.append(value)
                    self._add(value.values())

    def _read_items(self) -> Iterator[Any]:
        """All that the containers hold."""
        return chain(chain.from_iterable(map(dict.values, self._dicts)), chain.from_iterable(self._lists))

    @property
    def vectors(self) -> list[Tensor]:
        """Parameters and buffers that are no matrices."""
        return [tensor for tensor in self._tensors if tensor.dim() != 2]

    def holds(self, model: PreTrainedModel) -> bool:
        """Whether the model consists of the same objects, and its tensors of the same memory.

        It is asked at each call, about a thousand containers: each line is one loop in C.
        """
        own = _read_attributes(model)
        return (
            type(model) is self._kind
            and own.keys() == self._own.keys()
            and all(map(is_, own.values(), self._own.values()))
            and list(map(tuple, self._dicts)) == self._keys
            and list(map(len, self._lists)) == self._lengths
            and list(map(id, self._read_items())) == self._ids
            and all(map(is_, map(type, self._modules), self._kinds))
            and list(map(_place, self._tensors)) == self._places
        )


def _read_attributes(model: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(model).items() if name not in UNREAD}


def _place(tensor: Tensor) -> _Place:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, type(tensor)
