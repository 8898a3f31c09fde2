"""Other programs that decode the same weights, token by token and greedily: transformers' loop, and llama.cpp."""

from __future__ import annotations

import importlib.util
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..checkpoint.gguf.write import write_gguf
from ..checkpoint.tensors import Checkpoint, from_tensor
from ..family_models import engine_decodes

_log = logging.getLogger("minitron")

GGUF_TYPES = {"bf16": "bf16", "bf12": "bf16", "fp32": "f32", "int8": "q8_0", "int4": "q4_0"}
"""The GGUF type for each of our formats: the same weights, or as many bits for each weight."""


@dataclass
class Run:
    """The times and tokens of a prompt and its continuation."""

    prefill_seconds: float
    """From the call to the first token."""
    seconds_per_token: float
    """Median of those after the first."""
    tokens: list[int]
    """The new ones."""


class Peer(Protocol):
    """A program that can be measured beside the engine."""

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        """Decode greedily, past the end of a text."""
        ...


class TransformersPeer:
    """transformers' `generate`, without the engine if the model is ours."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._off = {"engine": "off"} if engine_decodes(model) else {}

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        """See `Peer`."""
        ids, clock = torch.tensor([prompt]), _Clock()
        start = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
            streamer=clock,
            **self._off,
        )
        return _run(start, clock.times[1:], out[0, len(prompt) :].tolist())  # the first time is the prompt's


class _Clock:
    """A streamer that records when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class LlamaPeer:
    """llama.cpp through llama-cpp-python, on a GGUF file."""

    def __init__(self, gguf: Path, capacity: int, threads: int) -> None:
        """Load it.

        Raises:
            ValueError: llama.cpp does not load the file.
        """
        import llama_cpp  # type: ignore[reportMissingImports] (a peer that may be absent)

        self._library = llama_cpp
        self._llama = llama_cpp.Llama(
            str(gguf),
            n_ctx=capacity,
            n_batch=capacity,
            n_ubatch=min(512, capacity),
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        """See `Peer`."""
        self._llama.reset()
        start = time.perf_counter()
        times, tokens, step = [], [], prompt
        for _ in range(new_tokens):
            self._llama.eval(step)
            tokens.append(int(self._last().argmax()))
            times.append(time.perf_counter())
            step = tokens[-1:]
        return _run(start, times, tokens)

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits (T, V) fp32 after each of a text's tokens, which are evaluated one by one, as when decoding."""
        self._llama.reset()
        rows = torch.empty((len(tokens), self._llama.n_vocab()))
        for index, token in enumerate(tokens):
            self._llama.eval([token])
            rows[index] = torch.from_numpy(self._last())
        return rows

    def _last(self) -> np.ndarray[Any, Any]:
        row = self._library.llama_get_logits_ith(self._llama._ctx.ctx, -1)
        return np.ctypeslib.as_array(row, (self._llama.n_vocab(),))

    def close(self) -> None:
        """Free its memory."""
        self._llama.close()


@contextmanager
def llama_peer(model: Any, format: str, capacity: int, wanted: bool = True) -> Iterator[dict[str, Peer]]:
    """llama.cpp, by name, on a model's weights in the type that goes with `format`; the file is temporary.

    Empty if it is not wanted, if llama-cpp-python or gguf is missing, or if llama.cpp does not load the shape.
    """
    if not wanted or not all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf")):
        yield {}
        return
    tensors = {name: from_tensor(tensor.detach()) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(Checkpoint(model.config, tensors), path, quantization=GGUF_TYPES[format])
        try:
            peer = LlamaPeer(path, capacity, torch.get_num_threads())
        except ValueError:  # heads * head_dim != hidden_size, in versions without the fix for that
            _log.warning("llama.cpp does not load this shape and is skipped")
            yield {}
            return
        try:
            yield {"llama.cpp": peer}
        finally:
            peer.close()


def _run(start: float, times: list[float], tokens: list[int]) -> Run:
    each = np.diff(times).tolist()
    return Run(times[0] - start, statistics.median(each) if each else times[0] - start, tokens)
