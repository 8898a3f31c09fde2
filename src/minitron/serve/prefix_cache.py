"""Keys and values of prompts that came before, in a tree over chunks of token ids.

Only whole chunks are kept, as the prefill computed them: a chunk's keys and values depend on its tokens and those
before it alone, so that copying them gives the same bits as computing them again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from ..engine.buffers import Buffer

Chunk = tuple[int, ...]


class _Node:
    def __init__(self, parent: _Node | None, chunk: Chunk, rows: list[Buffer]) -> None:
        self.parent, self.chunk, self.rows = parent, chunk, rows
        self.children: dict[Chunk, _Node] = {}
        self.nbytes = sum(part.nbytes for part in rows)


class PrefixCache:
    """At most `limit` bytes of keys and values; what was used least recently goes first."""

    def __init__(self, chunk: int, limit: int) -> None:
        """Make an empty cache of chunks of `chunk` tokens; a limit of 0 keeps nothing."""
        self.chunk, self.limit = chunk, limit
        self.nbytes = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._root = _Node(None, (), [])
        # A node is always more recent than its children, so the oldest is one without children.
        self._nodes: OrderedDict[_Node, None] = OrderedDict()
        self.nbytes = 0

    def find(self, tokens: Sequence[int]) -> list[list[Buffer]]:
        """What is known of the whole chunks at the beginning of some tokens, in order; each as `KeyValues.read`."""
        path = self._path(tokens)
        self._touch(path)
        return [node.rows for node in path]

    def insert(self, tokens: Sequence[int], read: Callable[[], list[Buffer]]) -> None:
        """Keep the last chunk of some tokens, a whole number of chunks, if those before it are known.

        Args:
            tokens: from the beginning of a sequence.
            read: gives the last chunk's keys and values.
        """
        assert len(tokens) % self.chunk == 0, f"{len(tokens)} tokens are no whole number of chunks of {self.chunk}"
        path = self._path(tokens)
        if len(path) == len(tokens) // self.chunk - 1:
            parent = path[-1] if path else self._root
            node = _Node(parent, tuple(tokens[-self.chunk :]), read())
            parent.children[node.chunk] = node
            self._nodes[node] = None
            self.nbytes += node.nbytes
            path.append(node)
        self._touch(path)
        while self.nbytes > self.limit:
            self._drop(next(iter(self._nodes)))

    def _path(self, tokens: Sequence[int]) -> list[_Node]:
        node, path = self._root, []
        for first in range(0, len(tokens) - self.chunk + 1, self.chunk):
            found = node.children.get(tuple(tokens[first : first + self.chunk]))
            if found is None:
                break
            path.append(found)
            node = found
        return path

    def _touch(self, path: list[_Node]) -> None:
        for node in reversed(path):
            self._nodes.move_to_end(node)

    def _drop(self, node: _Node) -> None:
        assert not node.children, "a chunk is dropped before those that follow it"
        assert node.parent is not None
        del node.parent.children[node.chunk]
        del self._nodes[node]
        self.nbytes -= node.nbytes
