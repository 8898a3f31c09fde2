"""A checkpoint as a sequence of layers, of which one is in memory at a time.

`StreamedModel` reads the embedding rows of the tokens that occur, one decoder layer, or a block of the LM head's rows.
`Walk` takes calibration blocks through the layers; between two layers the residual stream of all blocks is kept in
memory, or in files where that would be much or where the walk must survive being killed.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.hf import open_hf
from ..checkpoint.tensors import Checkpoint, LazyTensor
from ..data.packing import Batch
from ..families import EMBEDDING, HEAD, Role
from ..family_models import decoder_layer, final_norm, rotary_of
from ..files import write_text, writing
from ..framework import framework_mask
from ..ops.loss import IGNORE_INDEX
from ..shapes import describe
from ..world import World

TOKENS_AT_ONCE = 2048
"""Tokens in one forward pass of a layer."""
HEAD_BLOCK_BYTES = 1 << 25
"""Bytes of the LM head that are in memory at a time."""
MEMORY_BYTES = 1 << 30
"""Residual streams that are larger than this together are kept in files."""
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


_EMBEDDING = f"{EMBEDDING.name.removeprefix('model.')}.weight"
_HEAD = f"{HEAD.name}.weight"


class StreamError(ValueError):
    """A model or calibration set that cannot be streamed; the message says why."""


def batch_digest(blocks: Batch) -> str:
    """SHA-256 of ids, positions and labels: two calibration sets are the same if this is."""
    digest = hashlib.sha256(repr(tuple(blocks.input_ids.shape)).encode())
    for tensor in (blocks.input_ids, blocks.position_ids, blocks.labels):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def token_counts(blocks: Batch) -> list[int]:
    """Tokens of each block before its padding begins. A block of `data.collate` ends with a label, then pads."""
    used = (blocks.labels != IGNORE_INDEX).int()
    last = used.shape[1] - used.flip(1).argmax(1)
    return torch.where(used.any(1), last, 0).tolist()


def own_blocks(blocks: Batch, world: World) -> Batch:
    """The blocks that this process works on: every `world.size`-th.

    Raises:
        StreamError: there are fewer blocks than processes.
    """
    if world.size == 1:
        return blocks
    if len(blocks.input_ids) < world.size:
        raise StreamError(
            f"{len(blocks.input_ids)} calibration blocks for {world.size} processes; each needs at least one"
        )
    parts = (tensor[world.rank :: world.size] for tensor in (blocks.input_ids, blocks.position_ids, blocks.labels))
    return Batch(*parts, num_items=blocks.num_items)


class StreamedModel:
    """The parts of a checkpoint, each loaded on request; the caller drops them.

    Args:
        source: a checkpoint in the Hugging Face layout, any of the five classes; or one that is open already, its
            tensors cut out of others as they are read (`surgery.pruned`).
        dtype: torch.float32 or torch.float64, in which everything is computed.
        device: where layers run; the residual stream stays on the CPU.
    """

    def __init__(
        self, source: Path | Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        if dtype not in _NUMPY:
            raise StreamError(f"dtype is {dtype}; it must be torch.float32 or torch.float64")
        checkpoint = open_hf(source) if isinstance(source, Path) else source
        self.name = str(source) if isinstance(source, Path) else "the model"
        self.dtype, self.device = dtype, torch.device(device)
        self.config = checkpoint.config
        self.shape = describe(self.config)
        self.config._attn_implementation = "sdpa"
        self._tensors = checkpoint.tensors
        prefixes = ("model.", "transformer.", "")
        self._prefix = next(p for p in prefixes if f"{p}{_EMBEDDING}" in self._tensors)
        self._rotary = rotary_of(self.config).to(self.device)

    @property
    def has_head(self) -> bool:
        """Whether there is an LM head (classification models have none)."""
        return self.config.tie_word_embeddings or _HEAD in self._tensors

    def head(self) -> LazyTensor:
        """The LM head (V, D), not read yet.

        Raises:
            StreamError: the model has none.
        """
        if not self.has_head:
            raise StreamError(f"{self.name}: has no LM head, so it has no loss; choose a score that needs none")
        tied = _HEAD not in self._tensors
        return self._tensors[f"{self._prefix}{_EMBEDDING}" if tied else _HEAD]

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of ids (B, T): (B, T, D). Only the rows of tokens that occur are read."""
        unique, inverse = ids.unique(return_inverse=True)
        runs: list[tuple[int, int]] = []
        for token in unique.tolist():
            if runs and runs[-1][1] == token:
                runs[-1] = (runs[-1][0], token + 1)
            else:
                runs.append((token, token + 1))
        rows = self._tensors[f"{self._prefix}{_EMBEDDING}"].take_rows(runs).load()
        return rows.to(self.dtype)[inverse]

    def layer(self, index: int) -> Any:
        """Decoder layer `index` with its weights, on the device, in evaluation mode."""
        with torch.device("meta"):
            layer = decoder_layer(self.config, index)
        self._load(layer, f"layers.{index}.")
        return layer

    def module(self, layer: torch.nn.Module, role: Role) -> Any:
        """The module of a layer that has a role; see `families`."""
        return layer.get_submodule(self.shape.family.part(role).name)

    def norm(self) -> Any:
        """The final norm."""
        with torch.device("meta"):
            norm = final_norm(self.config)
        self._load(norm, "norm.")
        return norm

    def _load(self, module: torch.nn.Module, prefix: str) -> None:
        names = [name for name, _ in module.named_parameters()]
        state = {name: self.tensor(prefix + name).load().to(self.device, self.dtype) for name in names}
        module.load_state_dict(state, assign=True)
        module.eval().requires_grad_(False)

    def tensor(self, name: str) -> LazyTensor:
        """A tensor of the backbone by its name there, such as `layers.0.mlp.up_proj.weight`."""
        return self._tensors[self.full_name(name)]

    def full_name(self, name: str) -> str:
        """The name in the file of a tensor of the backbone."""
        return self._prefix + name

    def surroundings(self, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
        """Further arguments of a layer for an input (B, T, D): causal mask of packed documents, rotary tables."""
        mask = framework_mask(self.config, hidden, None, None, positions)
        return {"attention_mask": mask, "position_embeddings": self._rotary(hidden, position_ids=positions)}


class Residuals:
    """The residual stream of all blocks before one layer of the model: in memory, or in a file block by block."""

    def __init__(self, blocks: int, tokens: int, width: int, dtype: torch.dtype, path: Path | None) -> None:
        self.shape = (tokens, width)
        self.path, self.dtype = path, dtype
        self._memory = torch.empty(blocks, tokens, width, dtype=dtype) if path is None else None
        self._block_bytes = tokens * width * dtype.itemsize
        if path is not None and not path.exists():
            path.touch()

    def get(self, rows: range) -> Tensor:
        """Blocks `rows`, (len(rows), T, D)."""
        if self._memory is not None:
            return self._memory[rows.start : rows.stop]
        assert self.path is not None
        with self.path.open("rb") as file:
            file.seek(rows.start * self._block_bytes)
            values = np.fromfile(file, dtype=_NUMPY[self.dtype], count=len(rows) * self.shape[0] * self.shape[1])
        return torch.from_numpy(values).view(len(rows), *self.shape)

    def put(self, rows: range, hidden: Tensor) -> None:
        """Store blocks `rows`."""
        if self._memory is not None:
            self._memory[rows.start : rows.stop] = hidden
            return
        assert self.path is not None
        # Read and written, not mapped: mapped pages would count as memory.
        with writing(self.path), self.path.open("r+b") as file:
            file.seek(rows.start * self._block_bytes)
            hidden.cpu().contiguous().numpy().tofile(file)

    def drop(self) -> None:
        """Give back memory or file."""
        self._memory = None
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@contextmanager
def workplace(model: StreamedModel, blocks: Batch, folder: Path | None, streams: int = 1) -> Iterator[Path | None]:
    """Where a walk keeps its streams: `folder`, a temporary folder if they are large, or None for memory.

    When the `with` block succeeds the files are removed; if it fails, they stay in `folder` so that a later
    call continues.
    """
    size = streams * blocks.input_ids.numel() * model.config.hidden_size * model.dtype.itemsize
    with tempfile.TemporaryDirectory(prefix="minitron-streams-") as temporary:
        place = folder if folder is not None else Path(temporary) if size > MEMORY_BYTES else None
        yield place
    if folder is not None and folder.is_dir():
        for pattern in ("stream-*.bin", "layer-*.safetensors", "walk.json"):
            for path in folder.glob(pattern):
                path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


Removed = tuple[int, ...]
"""Layers that a variant skips, ascending."""


@dataclass
class Step:
    """One layer, and the streams that are about to go through it."""

    index: int
    layer: torch.nn.Module
    walk: Walk
    watched: range | None = None
    """Blocks of the whole model's stream that are in the layer; None while another stream is."""

    @torch.no_grad()
    def run(self) -> Iterator[tuple[range, Tensor, Tensor]]:
        """Take every stream through the layer; yields (blocks, input, output) of the whole model's.

        Raises:
            StreamError: an output is not finite.
        """
        for key in self.walk.through(self.index):
            source, target = self.walk.at[key], self.walk.new(self.index + 1, key)
            for rows in self.walk.groups:
                hidden = source.get(rows).to(self.walk.model.device)
                positions = self.walk.blocks.position_ids[rows.start : rows.stop].to(hidden.device)
                self.watched = None if key else rows
                out = self.layer(hidden, **self.walk.model.surroundings(hidden, positions))
                if not torch.isfinite(out).all():
                    raise StreamError(f"layer {self.index}: its output has NaN or infinity")
                target.put(rows, out)
                if not key:
                    yield rows, hidden, out
            self.walk.next[key] = target


class Walk:
    """Calibration blocks on their way through the layers, in the whole model and in variants that skip some.

    Variants that skip different layers share their way up to the first difference, so each layer's
    weights are read once for all of them.

    Args:
        model: the checkpoint.
        blocks: calibration blocks (B, T).
        removals: the variants, each the layers it lacks. The whole model always walks too.
        folder: where residual streams and the state of the walk are kept; in memory if None. A walk whose state is
            found there continues after the last layer that was finished.
        identity: what must be the same to continue; JSON.
        keep: how many earlier states of the whole model's stream to keep, for comparisons across layers.
    """

    def __init__(
        self,
        model: StreamedModel,
        blocks: Batch,
        removals: Sequence[Removed] = (),
        folder: Path | None = None,
        identity: dict[str, Any] | None = None,
        keep: int = 0,
    ) -> None:
        self.model, self.blocks, self.folder, self.keep = model, blocks, folder, keep
        self.removals = [tuple(sorted(removed)) for removed in removals]
        self.count, self.tokens = blocks.input_ids.shape
        at_once = max(1, TOKENS_AT_ONCE // self.tokens)
        self.groups = [range(i, min(i + at_once, self.count)) for i in range(0, self.count, at_once)]
        self.identity = {"tokens": batch_digest(blocks), "dtype": str(model.dtype), **(identity or {})}
        self.identity["removals"] = [list(removed) for removed in self.removals]
        self.at: dict[Removed, Residuals] = {}
        self.next: dict[Removed, Residuals] = {}
        self.earlier: list[Residuals] = []
        """The whole model's stream before the last `keep` layers, oldest first; not the current one."""
        self.done = self._resume()

    @torch.no_grad()
    def steps(self) -> Iterator[Step]:
        """The layers in order. What the caller does with a step is done again if it is killed before the next one."""
        if not self.at:
            self._enter()
        for index in range(self.done, self.model.config.num_hidden_layers):
            yield Step(index, self.model.layer(index), self)
            self._leave(index)

    def through(self, index: int) -> list[Removed]:
        """Streams that go through layer `index`, the whole model's first. A stream is named by what it lacks so far."""
        wanted = {removed[: sum(i < index for i in removed)] for removed in self.removals if index not in removed}
        return sorted({(), *wanted} & set(self.at))

    def _around(self, index: int) -> dict[Removed, Removed]:
        """Streams that a variant takes past layer `index`: new name -> name so far."""
        past = [removed[: sum(i <= index for i in removed)] for removed in self.removals if index in removed]
        return {name: name[:-1] for name in sorted(set(past))}

    def new(self, index: int, key: Removed) -> Residuals:
        """An empty store for a stream before layer `index`."""
        path = None if self.folder is None else self.folder / self._name(index, key)
        return Residuals(self.count, self.tokens, self.model.config.hidden_size, self.model.dtype, path)

    @staticmethod
    def _name(index: int, key: Removed) -> str:
        label = "-".join(map(str, key)) or "whole"
        if len(label) > 100:
            label = hashlib.sha256(label.encode()).hexdigest()
        return f"stream-{index}-{label}.bin"

    def _enter(self) -> None:
        store = self.new(0, ())
        for rows in self.groups:
            hidden = self.model.embed(self.blocks.input_ids[rows.start : rows.stop])
            if not torch.isfinite(hidden).all():
                raise StreamError(f"{self.model.name}: the token embeddings have NaN or infinity")
            store.put(rows, hidden)
        self.at = {(): store}
        self._commit()

    def _leave(self, index: int) -> None:
        """Make the streams behind the layer the current ones, and forget those before it, once that is on disk."""
        after, around = dict(self.next), self._around(index)
        for name, before in around.items():
            after[name] = self._copy(self.at[before], index + 1, name)
        before, self.at, self.next = self.at, after, {}
        self.done = index + 1
        self.earlier.append(before.pop(()))
        forgotten = [*before.values(), *self.earlier[: max(0, len(self.earlier) - self.keep)]]
        self.earlier = self.earlier[max(0, len(self.earlier) - self.keep) :]
        self._commit()
        for store in forgotten:
            store.drop()

    def _copy(self, source: Residuals, index: int, key: Removed) -> Residuals:
        target = self.new(index, key)
        for rows in self.groups:
            target.put(rows, source.get(rows))
        return target

    def _commit(self) -> None:
        if self.folder is None:
            return
        state = {"identity": self.identity, "done": self.done, "streams": [list(key) for key in self.at]}
        state["earlier"] = [store.path.name for store in self.earlier if store.path is not None]
        write_text(self.folder / "walk.json", json.dumps(state))

    def _resume(self) -> int:
        if self.folder is None:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "walk.json"
        if not path.exists():
            return 0
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            found, done = state["identity"], int(state["done"])
            streams, earlier = [tuple(key) for key in state["streams"]], list(state["earlier"])
        except (ValueError, KeyError, TypeError) as error:
            raise StreamError(f"{path}: cannot be read ({error}); delete {self.folder} to start again") from None
        wanted = json.loads(json.dumps(self.identity))
        if found != wanted:
            other = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            raise StreamError(
                f"{path}: belongs to another run ({', '.join(other)} differ); delete {self.folder} to start again"
            )
        size = self.count * self.tokens * self.model.config.hidden_size * self.model.dtype.itemsize
        paths = [self.folder / name for name in earlier]
        for file in (*(self.folder / self._name(done, key) for key in streams), *paths):
            if not file.is_file() or file.stat().st_size != size:
                raise StreamError(f"{file}: missing or truncated; delete {self.folder} to start again")
        self.at = {key: self.new(done, key) for key in streams}
        shape = (self.count, self.tokens, self.model.config.hidden_size, self.model.dtype)
        self.earlier = [Residuals(*shape, path) for path in paths]
        return done
