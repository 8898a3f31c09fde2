"""A teacher's outputs on disk: written once, read by any number of runs over the same blocks.

A cache is a folder: `meta.json` names the teacher and the data, `places.npy` lists the indices of its blocks, and each
`part-N.bin` holds the outputs for a few blocks and a checksum at its end. A part is written under another name and
renamed, and depends on nothing but the metadata, so that writing continues after any interruption and gives the same
bytes. Letters of shapes as in `targets`.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.packing import Batch, BlockStream, collate
from ..files import is_empty, locked, new_file, write_bytes, write_json
from ..finite import check_weights
from ..ops.loss import IGNORE_INDEX, shift_labels
from ..train.text_changes import text_changes
from .target_codecs import CODECS, ENTRY_BYTES, ID_BITS, Codec, Decoded, HiddenCodec
from .targets import DenseTargets, SparseTargets, head_weight, hidden_states

CACHE_VERSION = 1
META_FILE, PLACES_FILE, HEAD_FILE = "meta.json", "places.npy", "head.safetensors"
_CHECKSUM_BYTES = 32


class TargetCacheError(ValueError):
    """A cache of teacher targets that cannot be used; the message names the folder and what would be right."""


def make_codec(kind: str, model: nn.Module, *, samples: int = 50, k: int = 8) -> Codec:
    """The codec for a teacher.

    Raises:
        ValueError: an unknown kind, or a vocabulary that does not fit into 18 bits.
    """
    config: Any = model.config
    if kind == "hidden":
        return HiddenCodec(str(head_weight(model).dtype).removeprefix("torch."), config.hidden_size)
    if kind not in CODECS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(CODECS)}")
    if config.vocab_size > 1 << ID_BITS:
        raise ValueError(f"the vocabulary has {config.vocab_size} tokens; a sparse cache holds at most {1 << ID_BITS}")
    return CODECS[kind](config.vocab_size, samples if kind == "sampled" else k)  # type: ignore[call-arg, arg-type]


# --- which blocks --------------------------------------------------------------------------------------------------


def text_order(stream: BlockStream) -> str:
    """SHA-256 of the blocks of a stream: texts, tokenizer, and how documents are packed."""
    digest = hashlib.sha256(json.dumps([stream.block, [blocks.layout() for blocks in stream.sources]]).encode())
    return digest.hexdigest()


def covered_blocks(stream: BlockStream, blocks: int) -> np.ndarray:
    """Indices of the first `blocks` blocks of a stream, each once, in the order in which they occur."""
    found = (stream.locate(position) for position in range(blocks))
    return np.array(list(dict.fromkeys(stream.firsts[source] + index for source, index in found)), dtype=np.int64)


def batch_of(stream: BlockStream, indices: Sequence[int]) -> Batch:
    """The blocks with some indices."""
    sources = [bisect_right(stream.firsts, index) - 1 for index in indices]
    blocks = [stream.sources[s].pieces(index - stream.firsts[s]) for s, index in zip(sources, indices, strict=True)]
    batch = collate(blocks, stream.block)
    return Batch(batch.input_ids, batch.position_ids, batch.labels, batch.num_items, torch.tensor(indices))


# --- writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachePlan:
    """What a cache holds; the same plan gives the same bytes."""

    codec: Codec
    teacher: str
    """Fingerprint of the teacher."""
    indices: np.ndarray
    order: str
    """`text_order` of the stream."""
    sequence: int
    vocabulary: int
    seed: int = 0
    texts: list[dict[str, Any]] = field(default_factory=list)
    """`origins` of the stream; it explains a difference in `order`."""
    at_once: int = 8
    """Blocks per forward pass."""
    part_blocks: int = 64
    """Blocks per file; a multiple of `at_once`."""

    @property
    def parts(self) -> int:
        """Number of files."""
        return -(-len(self.indices) // self.part_blocks)

    def meta(self) -> dict[str, Any]:
        """The content of `meta.json`."""
        return {
            "version": CACHE_VERSION,
            "kind": self.codec.kind,
            "codec": asdict(self.codec),
            "teacher": self.teacher,
            "text_order": self.order,
            "texts": self.texts,
            "sequence": self.sequence,
            "vocabulary": self.vocabulary,
            "blocks": len(self.indices),
            "places": hashlib.sha256(self.indices.tobytes()).hexdigest(),
            "seed": self.seed,
            "at_once": self.at_once,
            "part_blocks": self.part_blocks,
        }

    def part(self, number: int) -> np.ndarray:
        """Indices of the blocks of a file."""
        return self.indices[number * self.part_blocks : (number + 1) * self.part_blocks]


def plan_cache(
    stream: BlockStream, model: nn.Module, codec: Codec, teacher: str, *, blocks: int | None = None, seed: int = 0
) -> CachePlan:
    """Plan a cache of the first `blocks` blocks of a stream (all of an epoch if None)."""
    config: Any = model.config
    if blocks is not None and blocks < 1:
        raise ValueError(f"blocks is {blocks}; it must be at least 1")
    indices = covered_blocks(stream, blocks or len(stream))
    order, texts = text_order(stream), stream.origins
    return CachePlan(codec, teacher, indices, order, stream.block, config.vocab_size, seed, texts)


@torch.no_grad()
def write_cache(
    folder: Path,
    plan: CachePlan,
    stream: BlockStream,
    model: nn.Module,
    progress: Callable[[int, int], None] | None = None,
    accepted: Callable[[], object] | None = None,
) -> None:
    """Write a cache, or the parts of it that are missing.

    Args:
        folder: created if it does not exist.
        plan: what to write.
        stream: the blocks.
        model: the teacher, on its device.
        progress: called with (files there, files in all).
        accepted: called once the folder passed all checks.

    Raises:
        TargetCacheError: the folder holds another cache, or something else.
        NotFiniteError: the teacher has weights that are NaN or infinite.
        LockedError: another process writes it.
        WriteError: the disk is full or refuses.
    """
    check_weights({"the teacher": model})
    with locked(folder):
        _write_parts(folder, plan, stream, model, progress, accepted)


def _write_parts(
    folder: Path,
    plan: CachePlan,
    stream: BlockStream,
    model: nn.Module,
    progress: Callable[[int, int], None] | None,
    accepted: Callable[[], object] | None,
) -> None:
    _open_folder(folder, plan, model)
    if accepted is not None:
        accepted()
    was_training = model.training
    model.eval()
    try:
        for number in range(plan.parts):
            path = folder / _part_name(number)
            if not path.exists():
                write_bytes(path, _part_bytes(plan, stream, model, number))
            if progress is not None:
                progress(number + 1, plan.parts)
    finally:
        model.train(was_training)


def measure_bytes(plan: CachePlan, stream: BlockStream, model: nn.Module) -> int:
    """Estimated bytes of a cache, from a few blocks and the head."""
    few = plan.indices[: min(4, len(plan.indices))]
    with torch.no_grad():
        size = sum(map(sum, ((len(rows), len(entries)) for rows, entries in _encode(plan, stream, model, few))))
    head = head_weight(model)
    return size * len(plan.indices) // len(few) + (
        head.numel() * head.element_size() if plan.codec.kind == "hidden" else 0
    )


def _open_folder(folder: Path, plan: CachePlan, model: nn.Module) -> None:
    path = folder / META_FILE
    if path.exists():
        before, now = _read_meta(folder), plan.meta()
        differing = [
            f"{name} was {before.get(name)!r}, is {now[name]!r}"
            for name in now
            if before.get(name) != now[name] and name not in ("texts", "text_order", "places")
        ]
        if before.get("text_order") != now["text_order"]:
            differing.append(_other_text(before, now["texts"]))
        if differing:
            raise TargetCacheError(f"{folder} holds another cache; choose another folder: {'; '.join(differing)}")
        return
    if folder.exists() and not is_empty(folder, but=(PLACES_FILE, HEAD_FILE)):  # what an interrupted start leaves
        raise TargetCacheError(f"{folder} is not empty and is not a cache (no {META_FILE}); choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if plan.codec.kind == "hidden":
        with new_file(folder / HEAD_FILE, overwrite=True) as draft:
            save_file({"head": head_weight(model).detach().cpu().contiguous()}, draft)
    with new_file(folder / PLACES_FILE, overwrite=True) as draft, draft.open("wb") as sink:
        np.save(sink, plan.indices)
    write_json(path, plan.meta())  # last, so that its presence means that the rest exists


def _part_name(number: int) -> str:
    return f"part-{number:06}.bin"


def _part_bytes(plan: CachePlan, stream: BlockStream, model: nn.Module, number: int) -> bytes:
    """Rows of all blocks, then entries of all blocks, then the checksum of both."""
    encoded = list(_encode(plan, stream, model, plan.part(number)))
    content = b"".join([*(rows for rows, _ in encoded), *(entries for _, entries in encoded)])
    return content + hashlib.sha256(content).digest()


def _encode(
    plan: CachePlan, stream: BlockStream, model: nn.Module, indices: np.ndarray
) -> Iterator[tuple[bytes, bytes]]:
    device = next(model.parameters()).device
    head = head_weight(model)
    for start in range(0, len(indices), plan.at_once):
        some = indices[start : start + plan.at_once].tolist()
        batch = batch_of(stream, some).to(device)
        hidden, _ = hidden_states(model, batch)
        scored = shift_labels(batch.labels) != IGNORE_INDEX
        for row, index in enumerate(some):
            seed = int.from_bytes(hashlib.sha256(f"{plan.seed} {index}".encode()).digest()[:7], "big")
            yield plan.codec.encode(hidden[row], head, scored[row], seed)


# --- reading -------------------------------------------------------------------------------------------------------


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        if not isinstance(meta, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise TargetCacheError(f"{folder}: not a cache of teacher targets ({META_FILE}: {error})") from None
    if meta.get("version") != CACHE_VERSION:
        raise TargetCacheError(f"{folder}: written as version {meta.get('version')}; this reads {CACHE_VERSION}")
    return meta


def _other_text(meta: Mapping[str, Any], now: list[dict[str, Any]]) -> str:
    """How the text of a cache differs from that of a run."""
    before = meta.get("texts")
    changes = text_changes(before, now)
    if not changes and before == now and all(source.get("files") for source in now):
        changes = "the files are the same, but the seed or the held-out share differs"
    return changes or "another text, tokenizer, seed or held-out share"


class TargetCache:
    """Targets from a cache; see `open_targets`."""

    num_layers = 0

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self.meta = folder, meta
        self.codec: Codec = CODECS[meta["kind"]](**meta["codec"])
        self.vocab_size: int = meta["vocabulary"]
        self.hidden_size = self.codec.width if isinstance(self.codec, HiddenCodec) else 0
        indices = np.load(folder / PLACES_FILE, allow_pickle=False)
        self._slots = {int(index): slot for slot, index in enumerate(indices)}
        self._parts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._head: Tensor | None = None
        if isinstance(self.codec, HiddenCodec):
            self._head = load_file(folder / HEAD_FILE)["head"]

    def targets_for(self, batch: Batch, layers: Sequence[int] = ()) -> DenseTargets | SparseTargets:
        """As of `targets.TeacherTargets`; each file is compared with its checksum when it is first needed.

        Raises:
            TargetCacheError: a block that is not in the cache, or a damaged file.
        """
        if batch.indices is None:
            raise TargetCacheError(f"{self.folder}: only blocks of the stream that was cached have targets")
        blocks = [self._block(index) for index in batch.indices.tolist()]
        device = batch.input_ids.device
        if isinstance(self.codec, HiddenCodec):
            assert self._head is not None
            self._head = self._head.to(device)
            return DenseTargets(self.codec.states(blocks).to(device), self._head)
        found = [self.codec.shares(block) for block in blocks]
        most = max(ids.shape[1] for ids, _ in found)
        ids, shares = (
            torch.from_numpy(np.stack([np.pad(pair[i], ((0, 0), (0, most - pair[i].shape[1]))) for pair in found]))
            for i in (0, 1)
        )
        starts = [self.codec.read_start(block.rows) for block in blocks]
        entropy, top = (torch.from_numpy(np.stack([start[i] for start in starts])) for i in (0, 1))
        return SparseTargets(*(x.to(device) for x in (ids, shares, top, entropy)))

    def _block(self, block: int) -> Decoded:
        slot = self._slots.get(block)
        if slot is None:
            raise TargetCacheError(
                f"{self.folder}: block {block} of the data is not among the {len(self._slots)} in the cache; "
                f"cache more blocks, or train fewer steps"
            )
        number, index = divmod(slot, self.meta["part_blocks"])
        if number not in self._parts:
            self._parts[number] = self._open_part(number)
        rows, entries, ends = self._parts[number]
        return Decoded(rows[index], entries[ends[index] : ends[index + 1]])

    def _open_part(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows (blocks, T, row bytes), entries (n, 3), and where each block's entries start; mapped from disk."""
        path = self.folder / _part_name(number)
        advice = "delete this file and run the command again, which writes what is missing"
        try:
            content = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise TargetCacheError(f"{path}: cannot be read ({error}); {advice}") from None
        body = content[:-_CHECKSUM_BYTES]
        if hashlib.sha256(body.data).digest() != content[-_CHECKSUM_BYTES:].tobytes():
            raise TargetCacheError(f"{path}: its content is not what was written; {advice}")
        blocks = min(self.meta["part_blocks"], self.meta["blocks"] - number * self.meta["part_blocks"])
        size = blocks * self.meta["sequence"] * self.codec.row_bytes
        rows = body[:size].reshape(blocks, self.meta["sequence"], self.codec.row_bytes)
        counts = np.zeros(blocks, np.int64)
        if self.codec.kind == "sampled":
            counts = rows[:, :, -1].sum(axis=1, dtype=np.int64)
        return rows, body[size:].reshape(-1, ENTRY_BYTES), np.concatenate([[0], np.cumsum(counts)])


def open_targets(folder: Path, stream: BlockStream, teacher: str | None = None) -> TargetCache:
    """Open a finished cache for a stream.

    Args:
        folder: the cache.
        stream: the blocks of the run.
        teacher: fingerprint of the expected teacher, if there is one.

    Raises:
        TargetCacheError: no cache, an unfinished one, or one of another teacher, tokenizer, text or order.
    """
    meta = _read_meta(folder)
    if meta["sequence"] != stream.block:
        raise TargetCacheError(f"{folder}: made for blocks of {meta['sequence']} tokens; the run has {stream.block}")
    if meta["text_order"] != text_order(stream):
        raise TargetCacheError(
            f"{folder}: made from other data ({_other_text(meta, stream.origins)}); give the same data "
            f"settings, or cache the teacher on these"
        )
    if teacher is not None and meta["teacher"] != teacher:
        raise TargetCacheError(
            f"{folder}: made by another teacher (fingerprint {meta['teacher'][:12]}, the given one has {teacher[:12]})"
        )
    parts = -(-meta["blocks"] // meta["part_blocks"])
    there = sum((folder / _part_name(number)).exists() for number in range(parts))
    if there < parts:
        raise TargetCacheError(f"{folder}: {there} of {parts} files are written; the command that began it continues")
    return TargetCache(folder, meta)
