"""Open a checkpoint in any format, and watch its tensors while they are read."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from minitron.config import NemotronConfig
from minitron.locate import fetch, locate

from .detect import ADAPTER_CONFIG, detect
from .gguf.read import open_gguf
from .hf import open_hf
from .limits import CheckpointError, require
from .lora import merge_adapter, read_adapter_config
from .nemo.read import config_beside, open_nemo
from .tensors import Checkpoint, LazyTensor, raw


@contextmanager
def open_checkpoint(path: Path, scratch: Path, config: NemotronConfig | None = None) -> Iterator[Checkpoint]:
    """A checkpoint in any format, readable while the block runs.

    Raises:
        CheckpointError: see the readers: hf.py, lora.py, nemo_read.py, gguf_read.py.
    """
    kind = detect(path)
    if kind == "hf":
        yield open_hf(path)
    elif kind == "lora":
        with open_checkpoint(adapted_model(path), scratch) as base:
            yield merge_adapter(path, base)
    elif kind == "gguf":
        yield open_gguf(path)
    else:
        if config is None and kind == "megatron":
            config = config_beside(path)
        with open_nemo(path, scratch, config) as checkpoint:
            yield checkpoint


def adapted_model(folder: Path) -> Path:
    """The base model of the LoRA adapter in `folder`: as its config names it, from here or from the adapter's folder.

    Raises:
        CheckpointError: the base model cannot be found, or is an adapter itself.
    """
    name = read_adapter_config(folder).base
    beside = folder / name
    try:
        found = locate(beside if beside.exists() else name)
        found = found if isinstance(found, Path) else fetch(found)
    except OSError as error:  # it does not exist, its name is too long, or access is denied
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path: {error}") from None
    kind = detect(found)
    require(kind != "lora", f"{folder / ADAPTER_CONFIG}: base_model_name_or_path: {found} is an adapter itself")
    return found


@dataclass
class Observed:
    """What was observed of a tensor while it was read from start to end."""

    rows: int = 0
    crc: int = 0
    finite: bool = True
    in_order: bool = True


@dataclass
class Observer:
    """Checksums, checks for NaN and infinity, and progress, from the blocks as they are read."""

    progress: Callable[[int], object] = lambda _: None
    seen: dict[str, Observed] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def watch(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same checkpoint, every tensor of which reports here when it is read."""
        return replace(checkpoint, tensors={n: self._watched(n, t) for n, t in checkpoint.tensors.items()})

    def _watched(self, name: str, tensor: LazyTensor) -> LazyTensor:
        def rows(start: int, stop: int) -> torch.Tensor:
            block = tensor.rows(start, stop)
            with self._lock:
                self._note(name, block, start, stop)
            return block

        return LazyTensor(tensor.shape, tensor.dtype, rows)

    def _note(self, name: str, block: torch.Tensor, start: int, stop: int) -> None:
        entry = self.seen.setdefault(name, Observed())
        if stop <= entry.rows:
            return  # read again: a tied matrix that a format stores twice
        if start < entry.rows:  # whole heads are read where a format reorders their rows
            block, start = block[entry.rows - start :], entry.rows
        entry.in_order &= start == entry.rows
        entry.rows = stop
        entry.crc = zlib.crc32(raw(block), entry.crc)
        entry.finite &= all_finite(block)
        self.progress(block.nbytes)

    @property
    def not_finite(self) -> list[str]:
        """Names of tensors with NaN or infinite values."""
        return sorted(name for name, entry in self.seen.items() if not entry.finite)


_EXPONENTS = {
    torch.bfloat16: (np.int16, np.uint16, 0x7F80, 0xFF80),
    torch.float16: (np.int16, np.uint16, 0x7C00, 0xFC00),
    torch.float32: (np.int32, np.uint32, 0x7F800000, 0xFF800000),
}


def all_finite(block: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; ten times faster than `torch.isfinite(block).all()`.

    As signed integers the positive non-finite values are the largest, as unsigned ones the negative ones are.
    """
    if not block.numel():
        return True
    if block.dtype not in _EXPONENTS:
        return bool(torch.isfinite(block).all())
    signed, unsigned, positive, negative = _EXPONENTS[block.dtype]
    data = np.frombuffer(raw(block), dtype=unsigned)
    return bool(data.view(signed).max() < positive and data.max() < negative)
