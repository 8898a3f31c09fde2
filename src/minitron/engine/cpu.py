"""Decoding on the CPU: threads that run the compiled step, and the memory it works in.

Neither torch's nor Numba's thread pool is used while decoding: the engine starts threads of its own for one
generation (as many as `torch.get_num_threads()` says, so the usual settings hold) and ends them with it. Long prompts
are read by torch, whose pool sleeps afterwards; the engine's threads start after that.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.gemv import NEURON_BLOCK
from . import step as compiled
from .reference import ReferenceEngine
from .threads import SYNC_SIZE
from .weights import WEIGHT_DTYPES, EngineWeights, Norm

MAX_TOKENS = 8
"""New tokens in one step; more are read by torch, whose matrix products then win."""

_log = logging.getLogger("minitron")


class CpuEngine:
    """Sequences, one in each slot: `read` tokens whose logits nobody wants, `step` over those whose are.

    Close it, or leave its `with` block, to end its threads.
    """

    def __init__(self, weights: EngineWeights, capacity: int, threads: int | None = None, slots: int = 1) -> None:
        """Take the memory for `capacity` tokens in each of `slots` sequences.

        Raises:
            ValueError: the weights are in a dtype that the kernels do not read.
        """
        if weights.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"weights are {weights.dtype}; the CPU engine reads bfloat16 and float32")
        self.weights = weights
        self.threads = threads or torch.get_num_threads()
        self._reader = ReferenceEngine(weights, capacity, slots)
        self.kv = self._reader.kv
        self._job = np.zeros(3, np.int64)
        self._tokens = np.zeros(MAX_TOKENS, np.int64)
        self._zeros = np.zeros(2, np.int64)
        self._sync = np.zeros(SYNC_SIZE, np.int64)
        self._workers: list[threading.Thread] = []
        self._running = False
        self._slot = 0
        self._spaces = _spaces(weights, capacity, self.threads)
        self._logits = torch.from_numpy(self._spaces[7])
        cos, sin = (table.numpy() for table in self._reader.rotary)
        config = weights.config
        sizes = (
            config.hidden_size,
            config.intermediate_size,
            weights.embed.shape[0],
            config.head_dim,
            capacity,
            int(weights.dtype == torch.bfloat16),
        )
        self._layers = _layer_table(weights, self._reader)
        self._shared = (
            self._sync,
            self._job,
            self._tokens,
            np.array(sizes, np.int64),
            np.float32(config.norm_eps),
            self._layers,
            np.array([_at(weights.embed), _at(weights.head), *_norm_at(weights.norm)], np.int64),
            self._spaces,
            cos,
            sin,
            self._zeros,
        )

    @property
    def active_neurons(self) -> int:
        """MLP neurons that were not zero, over all calls of `step` and layers."""
        return int(self._zeros[0])

    @property
    def seen_neurons(self) -> int:
        """MLP neurons, over all calls of `step` and layers."""
        return int(self._zeros[1])

    def read(self, tokens: list[int], slot: int = 0) -> None:
        """Append tokens to a sequence."""
        if len(tokens) > MAX_TOKENS:
            self.close()  # torch's threads want the cores
            self._reader.read(tokens, slot)
        elif tokens:
            self._run(tokens, slot, first_logits=len(tokens))

    def step(self, tokens: list[int], slot: int = 0) -> Tensor:
        """Append at most MAX_TOKENS tokens and return the logits (len(tokens), V) fp32 after each.

        The tensor is the engine's own memory: it is overwritten by the next step.
        """
        self._run(tokens, slot, first_logits=0)
        return self._logits[: len(tokens)]

    def step_each(self, tokens: list[int], slots: list[int]) -> Tensor:
        """Append a token to each of several sequences; logits (len(tokens), V) fp32."""
        return torch.cat([self.step([token], slot).clone() for token, slot in zip(tokens, slots, strict=True)])

    def _run(self, tokens: list[int], slot: int, first_logits: int) -> None:
        begin = self.kv.lengths[slot]
        M, end = len(tokens), begin + len(tokens)
        assert 0 < M <= MAX_TOKENS, f"{M} tokens in one step"
        assert end <= self.kv.capacity, f"{end} tokens in a cache of {self.kv.capacity}"
        known = range(self.weights.embed.shape[0])
        assert min(tokens) in known, f"token {min(tokens)} is not in the vocabulary"
        assert max(tokens) in known, f"token {max(tokens)} is not in the vocabulary"
        if not self._running:
            self._start()
        self._use(slot)
        self._tokens[:M] = tokens
        self._job[:] = (M, begin, first_logits)
        compiled.run(0, self.threads, *self._shared)
        self.kv.lengths[slot] = end

    def _use(self, slot: int) -> None:
        """Let the next step work on the keys and values of a slot."""
        if slot != self._slot:
            for column, tensors in ((compiled.KEYS, self.kv.keys), (compiled.VALUES, self.kv.values)):
                self._layers[:, column] = [tensor[slot].data_ptr() for tensor in tensors]
            self._slot = slot

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        self._reader.truncate(length, slot)

    def _start(self) -> None:
        _compile(self._shared)
        self._sync[:] = 0
        self._workers = [
            threading.Thread(target=compiled.run, args=(index, self.threads, *self._shared), daemon=True)
            for index in range(1, self.threads)
        ]
        for worker in self._workers:
            worker.start()
        self._running = True

    def close(self) -> None:
        """End the threads; the next step starts new ones."""
        if self._running:
            compiled.run(-1, self.threads, *self._shared)
            for worker in self._workers:
                worker.join()
            self._running = False

    def __enter__(self) -> CpuEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _compile(shared: tuple[Any, ...]) -> None:
    """Load the compiled step from the cache or compile it, and say so if that takes long."""
    if compiled.run.signatures:  # done before in this process
        return
    note = threading.Timer(1.0, _log.warning, ["compiling the decode kernels, once per machine and version ..."])
    note.daemon = True
    note.start()
    try:
        compiled.run(-1, 1, *shared)
    finally:
        note.cancel()
        note.join()


def _spaces(weights: EngineWeights, capacity: int, threads: int) -> tuple[np.ndarray, ...]:
    """Scratch memory of the step: residual stream, per thread its normalized copy, qkv, attended, hidden neurons and
    the lists of active ones, logits, per thread attention scores."""
    config, M = weights.config, MAX_TOKENS
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    heads = max((layer.num_heads for layer in weights.layers), default=1)
    all_heads = max((layer.num_heads + 2 * layer.num_key_value_heads for layer in weights.layers), default=1)
    each = max((layer.num_heads // layer.num_key_value_heads for layer in weights.layers), default=1)
    return (
        np.zeros((M, D), np.float32),
        np.zeros((threads, M, D), np.float32),
        np.zeros(M * all_heads * H, np.float32),  # type: ignore[operator]
        np.zeros(M * heads * H, np.float32),  # type: ignore[operator]
        np.zeros((M, F), np.float32),
        np.zeros((M, F), np.int32),
        np.zeros((M, -(-F // NEURON_BLOCK)), np.int32),
        np.zeros((M, weights.embed.shape[0]), np.float32),
        np.zeros((threads, each * capacity), np.float32),
    )


def _layer_table(weights: EngineWeights, reader: ReferenceEngine) -> np.ndarray:
    table = np.zeros((len(weights.layers), compiled.LAYER_COLUMNS), np.int64)
    for index, layer in enumerate(weights.layers):
        biases = (layer.qkv_bias, layer.o_bias, layer.up_bias, layer.down_bias)
        table[index] = (
            *_norm_at(layer.attention_norm),
            *_norm_at(layer.mlp_norm),
            *(0 if bias is None else _at(bias) for bias in biases),
            *(_at(matrix) for matrix in layer.matrices),
            _at(reader.kv.keys[index]),
            _at(reader.kv.values[index]),
            layer.num_heads,
            layer.num_key_value_heads,
        )
    return table


def _at(tensor: Tensor) -> int:
    assert tensor.is_contiguous(), tensor.shape
    return tensor.data_ptr()


def _norm_at(norm: Norm) -> tuple[int, int]:
    return _at(norm.gain), _at(norm.offset)
