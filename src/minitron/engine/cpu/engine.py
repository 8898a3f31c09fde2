"""Decoding on the CPU: threads that run the compiled step, and the memory it works in.

Neither torch's nor Numba's thread pool is used while decoding. The engine starts threads of its own when it decodes (at
most as many as `torch.get_num_threads()` says, fewer where other programs use the cores, see `team`) and ends them when
it is closed. Prompts are prefilled by steps of MAX_TOKENS tokens. With AVX-512 torch prefills long prompts; its pool
sleeps afterwards, and the engine's threads start after it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...finite import check_logits
from ...pages import SMALL
from ..base import MAX_TOKENS, MOST_STOPS, DecodeEngine, rows_of
from ..buffers import Buffer, address, most_threads, zeros
from ..draws import Draws
from ..kv import KeyValues
from ..matrix import BLOCK, FORMATS, Matrix
from ..mt19937 import TwisterState
from ..parts import EngineWeights, Norm
from . import bf16_products, choice, tables
from . import step as compiled
from .compiled import compiling
from .formats import KINDS, STAGED_BLOCK
from .microkernels import USED as REGISTER_TILES
from .picking import choose_until, next_words, pick
from .placement import IDLE_SECONDS, keep_apart
from .team import Team, interruptions, latest_size
from .threads import SYNC_SIZE
from .tuning import USUAL, Report, Tuning, tuned

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .prefill import Prefill

SHORT_PROMPT, SHORT_PROMPT_OF_LARGE = 32, 8
"""With AVX-512, tokens of a prompt up to which nothing is rounded: of models that stay in the caches, and of larger
ones whose rounded products are faster from fewer tokens on."""
ROUNDED_PROMPT = 256
"""Tokens of a prompt up to which `bf16_products` are faster than torch's, which share the attention of more tokens and
the unpacking of quantized weights."""
ANY_PROMPT = sys.maxsize
NOTHING: tuple[list[int], int, bool] = [], 0, False
RUNS, LEAST_RUN = 32, 128
"""Neurons are computed in at most so many runs, of at least so many neurons."""


class CpuEngine(DecodeEngine):
    """A `DecodeEngine` of compiled code. Close it, or leave its `with` block, to end its threads."""

    name = "cpu"
    chooses = True

    def __init__(
        self,
        weights: EngineWeights,
        capacity: int,
        threads: int | None = None,
        slots: int = 1,
        kv: KeyValues | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """Allocate the cache for `capacity` tokens in each of `slots` slots.

        Args:
            weights: of the model.
            capacity: largest length of a sequence.
            threads: the most that decode; as many as torch has if None.
            slots: number of sequences.
            kv: a cache of another engine with the same layers, to share instead; it must not grow.
            tuning: how weights are read; if None the first step chooses it, see `engine.cpu.tuning`.

        Raises:
            ValueError: the weights are in a dtype that the kernels do not read.
        """
        if weights.format not in FORMATS:
            raise ValueError(f"weights are {weights.format}; the CPU engine reads {', '.join(FORMATS)}")
        assert kv is None or kv.format == weights.plain_format, f"a cache in {kv.format}, not {weights.plain_format}"
        self.weights = weights
        self.threads = threads or most_threads()
        self.kv = KeyValues(weights, capacity, slots) if kv is None else kv
        self._rounds = bf16_products.USED and weights.format != "fp32" and _in_whole_tiles(weights)
        large = weights.nbytes > SMALL and (self._rounds or weights.format == "bf16")
        self._exact_prompt = SHORT_PROMPT_OF_LARGE if large else SHORT_PROMPT
        self._prefill: Prefill | None = None
        self._batch = np.zeros(4, np.int64)
        self._slot_mapping = np.zeros((2, MAX_TOKENS), np.int64)
        self._stops = np.full(MOST_STOPS, -1, np.int64)
        self._draws = np.zeros(choice.COLUMNS, np.int64)
        self._zeros = np.zeros((self.threads, 8), np.int64)
        self._seen = 0
        self._held: tuple[list[int], int, bool] = NOTHING
        """Tokens of a prompt that wait for the next call, their slot, and whether they may be rounded."""
        self._sync = np.zeros(SYNC_SIZE, np.int64)
        self._workers: list[threading.Thread] = []
        self._latest = 0.0
        """When the last step ended."""
        self._team = Team(self.threads)
        self._tuning = tuning
        self._running = 0
        """Threads that are running, this one included; 0 before the first step."""
        self._run_of_neurons = max(LEAST_RUN, -(-weights.constants.intermediate_size // RUNS // 4) * 4)
        self._allocate()

    def _allocate(self) -> None:
        """Allocate what depends on the capacity, and collect the arguments of the compiled step."""
        weights, capacity, slots = self.weights, self.kv.capacity, len(self.kv.lengths)
        constants, run = weights.constants, self._run_of_neurons
        self._tokens = np.zeros(max(MAX_TOKENS, capacity * min(slots, MAX_TOKENS)), np.int64)
        scratch = _scratch(weights, capacity, self.threads, run)
        self._normed, self._logits = scratch[1][0], scratch[9]
        cos, sin = (np.asarray(table) for table in self.kv.rotary)
        sizes = (
            weights.hidden_size,
            constants.intermediate_size,
            weights.vocab_size,
            constants.head_dim,
            capacity,
            run,
            0,
            *self._reading(self._tuning or USUAL),
        )
        extras = (_extras_at(weights.embed), _extras_at(weights.head))
        ends = (address(weights.embed.data), address(weights.head.data), *extras, *_norm_at(weights.norm))
        self._sizes = np.array(sizes, np.int64)
        self._arguments = (
            self._sync,
            (*(np.zeros(0, KINDS[name]) for name in _kinds(weights)), np.zeros(0, _mlp_kind(weights))),
            self._batch,
            self._tokens,
            self._slot_mapping,
            self._stops,
            self._draws,
            self._sizes,
            np.float32(constants.norm_eps),
            _layer_table(weights, self.kv),
            np.array(ends, np.int64),
            scratch,
            cos,
            sin,
            self._zeros,
        )

    def _reading(self, tuning: Tuning) -> tuple[int, int, int, int]:
        """FIXED_SHARES, AHEAD, SHORT and PARTS of the step's sizes."""
        # Parts of a small model are so short that taking one costs more than waiting for the slowest thread. Without
        # layers nothing sets back the counters by which threads take parts.
        fixed = tuning.fixed or self.weights.nbytes <= SMALL or not self.weights.layers
        return int(fixed), tuning.ahead, tuning.short, tuning.parts

    def _apply(self, tuning: Tuning) -> None:
        """Let the next step read weights in this way."""
        if (tuning.threads or self.threads) != self._team.options[0]:
            self._team = Team(tuning.threads or self.threads)
        self._tuning = tuning
        self._sizes[tables.FIXED_SHARES :] = self._reading(tuning)

    def tune(self, again: bool = False) -> Report:
        """Choose how weights are read, see `engine.cpu.tuning.tuned`."""
        self.close()
        _compile(self.weights, self._arguments)
        report = tuned(self.weights, self.threads, compiled.DIGEST, self._trial, again)
        self._apply(report.chosen)
        most = self._team.options[0]
        self._team = Team(most, latest_size(most))
        return report

    def _trial(self, part: EngineWeights) -> CpuEngine:
        return CpuEngine(part, 1, self.threads, tuning=USUAL)

    def time_step(self, tuning: Tuning) -> float:
        """Seconds of a step with the first token of an empty context, which stays empty."""
        self._apply(tuning)
        start = time.perf_counter()
        self._run([0], [0])
        seconds = time.perf_counter() - start
        self.kv.lengths[0] = 0
        return seconds

    @property
    def device(self) -> torch.device:
        """The CPU."""
        import torch

        return torch.device("cpu")

    @property
    def active_neurons(self) -> int:
        """MLP neurons that were not zero, over all decoded tokens and layers."""
        return int(self._zeros[:, 0].sum())

    @property
    def seen_neurons(self) -> int:
        """All MLP neurons, over all decoded tokens and layers."""
        return self._seen

    def release(self, slot: int) -> None:
        """Forget a slot's sequence and make the slot free."""
        self._append_held()
        super().release(slot)

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget all but the first `length` tokens of a slot's sequence."""
        self._append_held()
        super().truncate(length, slot)

    def reserve(self, capacity: int) -> None:
        """Let each slot hold at least `capacity` tokens; see `DecodeEngine.reserve`."""
        self._append_held()
        if self.kv.grow(capacity):
            self.close()  # its threads hold the smaller arrays
            self._allocate()

    def prepare(self, prompt: int | None = None) -> None:
        """Compile what the first calls would compile, or load it from the cache on disk.

        Args:
            prompt: the length of the longest prompt, in tokens; None if prompts of any length may follow.
        """
        self.tune()
        if prompt is None or prompt > self.short_prompt:
            self._prefill_by_torch().prepare()

    @property
    def short_prompt(self) -> int:
        """The largest number of tokens that `prefill` appends in decode steps; for longer prompts it imports torch.

        Without AVX-512, steps are faster than torch at any length.
        """
        if REGISTER_TILES:
            return ANY_PROMPT
        return ROUNDED_PROMPT if self._rounds else self._exact_prompt

    def prefill(self, tokens: list[int], slot: int = 0, more: bool = False) -> None:
        """Append tokens to a slot's sequence; see `DecodeEngine.prefill`."""
        self._append_held()
        if len(tokens) > self.short_prompt:
            self.close()  # torch's threads need the cores
            self._prefill_by_torch().append(tokens, slot)
            return
        rounded = self._rounds and len(tokens) > self._exact_prompt
        whole = len(tokens) // MAX_TOKENS * MAX_TOKENS if more else len(tokens)
        for first in range(0, whole, MAX_TOKENS):
            part = tokens[first : min(first + MAX_TOKENS, whole)]
            self._run(part, [slot] * len(part), len(part), rounded=rounded)
        self._held = tokens[whole:], slot, rounded

    def _append_held(self) -> None:
        """Append the tokens of a prompt that wait for a call, as long as none has appended them with its own."""
        (tokens, slot, rounded), self._held = self._held, NOTHING
        if tokens:
            self._run(tokens, [slot] * len(tokens), len(tokens), rounded=rounded)

    def _run_after_held(self, tokens: list[int], slots: Sequence[int], more: int = 0) -> None:
        """Append each token to the sequence of its slot; those that wait before them, in the same step if it can be."""
        held, slot, rounded = self._held
        if list(slots) != [slot]:
            self._append_held()
            self._run(tokens, slots, more=more)
            return
        self._held = NOTHING
        self._run(held + tokens, [slot] * (len(held) + 1), len(held), more, rounded)

    def _prefill_by_torch(self) -> Prefill:
        if self._prefill is None:
            from .prefill import Prefill

            self._prefill = Prefill(self.weights, self.kv, self.threads)
        return self._prefill

    def step(self, tokens: list[int], slot: int = 0) -> Tensor:
        """Append at most MAX_TOKENS tokens to a slot's sequence; logits (len(tokens), V) fp32 after each.

        The tensor is the engine's own memory, which the next step overwrites.
        """
        import torch

        self._run_after_held(tokens, [slot] * len(tokens))
        return torch.from_numpy(self._logits[: len(tokens)])

    def decode(self, tokens: list[int], slots: list[int]) -> Tensor:
        """Append one token to the sequence of each slot; logits (len(tokens), V) fp32, each as by `step`.

        Weights are read once for MAX_TOKENS sequences.
        """
        import torch

        assert len(set(slots)) == len(slots), f"a slot twice in {slots}"
        parts, hidden = [], []
        for first in range(0, len(tokens), MAX_TOKENS):
            part = tokens[first : first + MAX_TOKENS]
            self._run_after_held(part, slots[first : first + MAX_TOKENS])
            parts.append(self._logits[: len(part)].copy())
            hidden.append(self.hidden)
        self.hidden = np.concatenate(hidden)
        return torch.from_numpy(np.concatenate(parts))

    def greedy(
        self, tokens: list[int], count: int, stops: Collection[int] = (), slots: Sequence[int] = (0,)
    ) -> list[list[int]]:
        """Append one token to the sequence of each slot and then more, each the most probable.

        The result is that of `decode` and `argmax` in turn (the first of equal logits), in less time.

        Args:
            tokens: appended first; at most MAX_TOKENS.
            count: tokens to return for each sequence; at least 1.
            stops: after a step in which any sequence gets one of these, none gets more tokens; at most MOST_STOPS.
            slots: of the sequences.

        Returns:
            at most `count` rows, each a token for each sequence. Those of the last row are not appended yet.

        Raises:
            NotFiniteError: the largest logit of a sequence is NaN or infinite.
        """
        return self._choose(tokens, count, stops, slots, None)

    def draw(
        self, tokens: list[int], count: int, draws: Draws, stops: Collection[int] = (), slots: Sequence[int] = (0,)
    ) -> list[list[int]]:
        """As `greedy`, with tokens chosen by `draws`; its batch has the text of slot s in row s."""
        choice.fill(self._draws, draws, self.threads, slots)
        try:
            return self._choose(tokens, count, stops, slots, draws)
        finally:
            self._draws[choice.ON] = 0

    def verify(
        self, groups: Sequence[list[int]], slots: Sequence[int] = (0,), draws: Sequence[Draws | None] = (None,)
    ) -> list[list[int]]:
        """Append the first token of each group and those further ones that are chosen; see `DecodeEngine.verify`."""
        assert len(draws) == len(groups), f"{len(groups)} groups and {len(draws)} draws"
        self._append_held()
        begins = [self.kv.lengths[slot] for slot in slots]
        self._run(*rows_of(groups, slots))
        found, row = [], 0
        for group, slot, begin, how in zip(groups, slots, begins, draws, strict=True):
            logits = self._logits[row : row + len(group)]
            chosen = choose_until(how, logits, group)
            check_logits(logits[: len(chosen)])
            self.kv.truncate(begin + len(chosen), slot)
            row += len(group)
            found.append(chosen)
        return found

    def random_words(self, twister: TwisterState, out: np.ndarray) -> TwisterState:
        """Write the next random words into `out` (N,) uint32; see `DecodeEngine.random_words`."""
        return next_words(twister, out)

    def pick(self, draws: Draws, logits: np.ndarray) -> np.ndarray:
        """The next tokens (B,) for logits (B, V) float32; see `DecodeEngine.pick`."""
        return pick(draws, logits)

    def _choose(
        self, tokens: list[int], count: int, stops: Collection[int], slots: Sequence[int], draws: Draws | None
    ) -> list[list[int]]:
        M = len(tokens)
        assert len(set(slots)) == len(slots) == M, f"{M} tokens for slots {slots}"
        room = self.kv.capacity - max(self.kv.lengths[slot] for slot in slots) - len(self._held[0])
        assert 0 < count <= room, f"{count} tokens where {room} of {self.kv.capacity} are left"
        self._stops[:] = -1
        self._stops[: len(stops)] = list(stops)
        self._run_after_held(tokens, slots, more=count)
        check_logits(self._logits[:M])  # of the last step: what is NaN once stays so
        rows = int(self._batch[tables.CHOSEN])
        if draws is not None:
            rows += choice.finish(self._draws, draws, slots, self._tokens[rows * M :], self._logits)
        for slot in slots:
            self.kv.lengths[slot] += rows - 1
        self._count((rows - 1) * M)
        return self._tokens[: rows * M].reshape(rows, -1).tolist()

    def _run(
        self, tokens: list[int], slots: Sequence[int], first_logits: int = 0, more: int = 0, rounded: bool = False
    ) -> None:
        """Append each token to the sequence of its slot, in order.

        Args:
            first_logits: the first token whose logits are computed.
            more: tokens that are then chosen, at most.
            rounded: whether the tokens before `first_logits` may be rounded to bf16.
        """
        M = len(tokens)
        assert 0 < M <= MAX_TOKENS, f"{M} tokens in one step"
        known = range(self.weights.vocab_size)
        assert min(tokens) in known, f"token {min(tokens)} is not in the vocabulary"
        assert max(tokens) in known, f"token {max(tokens)} is not in the vocabulary"
        ends = list(self.kv.lengths)
        for m, slot in enumerate(slots):
            self._slot_mapping[:, m] = ends[slot], slot
            ends[slot] += 1
        assert max(ends) <= self.kv.capacity, f"{max(ends)} tokens in a cache of {self.kv.capacity}"
        if self._tuning is None:
            self.tune()
        if self._running != self._team.size:
            self.close()
            self._start(self._team.size)
        self._tokens[:M] = tokens
        self._batch[:] = (M, first_logits, more, 0)
        enough = rounded and first_logits >= bf16_products.LEAST_VECTORS
        self._sizes[tables.ROUNDED] = first_logits if enough else 0
        self._place()
        before, start = interruptions(), time.perf_counter()
        compiled.run(0, self._running, *self._arguments)
        self._latest = time.perf_counter()
        seconds = self._latest - start
        if first_logits == 0:  # the steps of a prompt take longer, and would mislead
            self._team.saw(max(1, int(self._batch[tables.CHOSEN])), seconds, interruptions() > before)
        self.kv.lengths[:] = ends
        if first_logits < M:
            self._count(M - first_logits)
            self.hidden = self._normed[: M - first_logits].copy()

    def _count(self, tokens: int) -> None:
        self._seen += tokens * len(self.weights.layers) * self.weights.constants.intermediate_size

    def _start(self, threads: int) -> None:
        _compile(self.weights, self._arguments)
        self._sync[:] = 0
        placed = threading.Semaphore(0)

        def work(index: int) -> None:
            placed.release()
            compiled.run(index, threads, *self._arguments)

        self._workers = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(1, threads)]
        for worker in self._workers:
            worker.start()
        for _ in self._workers:
            placed.acquire()
        self._running = threads

    def _place(self) -> None:
        """Keep this thread off the processors of the others, where a pause may have brought it to one of them."""
        if self._workers and time.perf_counter() - self._latest > IDLE_SECONDS:
            keep_apart(worker.native_id for worker in self._workers if worker.native_id is not None)

    def close(self) -> None:
        """End the threads; the next step starts new ones."""
        if self._running:
            compiled.run(-1, self._running, *self._arguments)
            for worker in self._workers:
                worker.join()
            self._running, self._workers, self._latest = 0, [], 0.0

    def __enter__(self) -> CpuEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _kinds(weights: EngineWeights) -> tuple[str, ...]:
    """Formats that the step is compiled for: a layer's matrices, keys and values, embedding, head."""
    return weights.format, weights.plain_format, weights.embed.format, weights.head.format


def _in_whole_tiles(weights: EngineWeights) -> bool:
    """Whether `bf16_products` can multiply every matrix of the layers."""
    constants, D = weights.constants, weights.hidden_size
    unit = bf16_products.COLUMNS if constants.gated else bf16_products.SUMMED_COLUMNS
    widths = [constants.intermediate_size, *(constants.head_dim * layer.num_heads for layer in weights.layers)]
    return D % unit == 0 and all(width % bf16_products.COLUMNS == 0 for width in widths)


def _mlp_kind(weights: EngineWeights) -> np.dtype:
    """Which MLP the step is compiled for."""
    return tables.GATED if weights.constants.gated else tables.RELU2


def _compile(weights: EngineWeights, arguments: tuple[Any, ...]) -> None:
    """Load the compiled step from the cache or compile it."""
    kinds = _kinds(weights)
    others = sorted({kind for kind in kinds[2:] if kind != weights.format})
    gated = "a gated MLP, " if _mlp_kind(weights) == tables.GATED else ""
    also = f" ({' and '.join(others)} embedding or head)" if others else ""
    with compiling(f"the decode kernels for {weights.format} weights{also}, {gated}{kinds[1]} cache"):
        compiled.run(-1, 1, *arguments)


def _scratch(weights: EngineWeights, capacity: int, threads: int, run: int) -> tuple[np.ndarray, ...]:
    """Scratch memory of the step.

    Per thread the residual stream, its normalized copy and, twice, vectors staged for products; qkv, attended heads
    and their projection; hidden neurons, lists of active ones and sums of runs of neurons; logits; per thread
    attention scores; gates. Of the MLP only what its kind needs.
    """
    D, F, H, M = weights.hidden_size, weights.constants.intermediate_size, weights.constants.head_dim, MAX_TOKENS
    heads = max((layer.num_heads for layer in weights.layers), default=1)
    all_heads = max((layer.num_heads + 2 * layer.num_key_value_heads for layer in weights.layers), default=1)
    each = max((layer.num_heads // layer.num_key_value_heads for layer in weights.layers), default=1)
    padded = -(-D // BLOCK) * BLOCK
    gated = _mlp_kind(weights) == tables.GATED
    longest = max(D, heads * H, F if gated else 0)
    shapes = (
        (threads, M, padded),
        (threads, M, D),
        (threads, 2, max(M, each), -(-longest // BLOCK) * STAGED_BLOCK),
        (M * all_heads * H,),
        (M * heads * H,),
        (M, D),
        (M, F),
        (0 if gated else M, F),
        (0 if gated else -(-F // run), M, padded),
        (M, weights.vocab_size),
        (threads, each * capacity),
        (M if gated else 0, F),
    )
    # Aligned to cache lines: sixteen numbers that lie in two lines take twice as long.
    return tuple(
        np.asarray(zeros(shape, "int32" if index == 7 else "fp32", weights.embed.data))
        for index, shape in enumerate(shapes)
    )


def _layer_table(weights: EngineWeights, kv: KeyValues) -> np.ndarray:
    table = np.zeros((len(weights.layers), tables.LAYER_COLUMNS), np.int64)
    for index, layer in enumerate(weights.layers):
        biases = (layer.qkv_bias, layer.o_bias, layer.up_bias, layer.down_bias)
        matrices = [layer.q, layer.k, layer.v, layer.o, layer.up, layer.down, layer.gate]
        table[index] = (
            *_norm_at(layer.attention_norm),
            *_norm_at(layer.mlp_norm),
            *(_at(bias) for bias in biases),
            *(_at(None if matrix is None else matrix.data) for matrix in matrices),
            *(_extras_at(matrix) for matrix in matrices),
            address(kv.keys[index]),
            address(kv.values[index]),
            layer.num_heads,
            layer.num_key_value_heads,
            _at(layer.query_norm),
            _at(layer.key_norm),
            _at(layer.gate_bias),
        )
    return table


def _extras_at(matrix: Matrix | None) -> int:
    return 0 if matrix is None else _at(matrix.extras)


def _at(buffer: Buffer | None) -> int:
    """The address of a buffer; 0 if there is none."""
    return 0 if buffer is None else address(buffer)


def _norm_at(norm: Norm) -> tuple[int, int]:
    return address(norm.gain), _at(norm.offset)
