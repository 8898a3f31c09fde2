"""The settings of a run: how long it lasts, and the learning rate at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..dtypes import long_name

_CHOICES = {
    "schedule": ("wsd", "cosine", "constant"),
    "dtype": ("auto", "bfloat16", "float32"),
    "optimizer": ("adamw", "adamw8bit", "offload"),
    "recompute": ("none", "mlp", "layers"),
    "on_spike": ("stop", "skip"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Exactly one of `steps`, `tokens` and `hours` says how long it lasts."""

    steps: int | None = None
    """Optimizer steps in all."""
    tokens: int | None = None
    """Tokens in all, at `batch` x `sequence` a step, padding included; the step that reaches them is the last."""
    hours: float | None = None
    """Hours of training in all, without the pauses of a resumed run; the schedule follows the clock."""
    batch: int = 32
    """Sequences per optimizer step."""
    micro_batch: int | None = None
    """Sequences per forward pass; the gradients of `batch / micro_batch` passes are added. All of `batch` if None."""
    sequence: int = 512
    """Tokens per sequence: exactly of packed text, at most of other examples."""
    lr: float = 2e-3
    """Highest learning rate."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """Shape of the learning rate after the warmup: warmup-stable-decay, a half cosine, or level."""
    warmup: int = 100
    """Steps over which the learning rate rises from 0."""
    decay: float = 0.2
    """Share of the run, at its end, in which `wsd` goes down: 0 to 1."""
    final_lr: float = 0.0
    """Learning rate at the end, as a share of `lr`."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay; on matrices only, not on norms and biases."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging factors."""
    clip: float = 1.0
    """Largest norm of the gradient; a longer one is scaled down to it. 0 for no limit."""
    seed: int = 0
    """Determines the initial weights and the order of the data."""
    eval_every: int = 500
    """Steps between held-out losses; 0 for only one, at the end."""
    save_every: int = 500
    """Steps between checkpoints; 0 for only one, at the end."""
    keep: int = 2
    """Newest checkpoints to keep; the one before the decay of `wsd` is kept as well."""
    optimizer: Literal["adamw", "adamw8bit", "offload"] = "adamw"
    """AdamW with averages in fp32, in 8 bits (torchao), or in fp32 in the memory of the CPU (torchao; GPUs only)."""
    recompute: Literal["none", "mlp", "layers"] = "none"
    """What the backward pass recomputes instead of keeping: the squared ReLU, or everything inside a layer."""
    compile: bool = False
    """Compile each layer (torch.compile)."""
    on_spike: Literal["stop", "skip"] = "stop"
    """After a loss or gradient that is not finite, or a spike: end the run, or skip this batch and continue."""
    spike: float = 0.0
    """A gradient longer than this many times its running average is a spike; 0 for no limit."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What matrix products run in, by any name (bf16 is bfloat16); weights and optimizer are in fp32. auto: bfloat16
    where the hardware has it."""

    def __post_init__(self) -> None:
        given = [n for n in ("steps", "tokens", "hours") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, tokens and hours; found: {', '.join(given) or 'none'}")
        for name in (*given, "batch", "keep", "lr"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "greater than 0")
        _require(self.sequence >= 2, "sequence", self.sequence, "at least 2")
        for name in ("warmup", "weight_decay", "clip", "eval_every", "save_every", "spike"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("decay", "final_lr"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        for beta in self.betas:
            _require(0 <= beta < 1, "betas", self.betas, "from 0 to less than 1")
        if long_name(self.dtype) in _CHOICES["dtype"]:
            object.__setattr__(self, "dtype", long_name(self.dtype))
        for name, allowed in _CHOICES.items():
            right = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
            _require(getattr(self, name) in allowed, name, getattr(self, name), right)
        self.at_once()

    def at_once(self, processes: int = 1) -> int:
        """Sequences per forward pass, of each of so many processes.

        Raises:
            ValueError: `batch` cannot be divided so.
        """
        _require(self.batch % processes == 0, "batch", self.batch, f"a multiple of the {processes} processes")
        share = self.batch // processes
        micro = share if self.micro_batch is None else self.micro_batch
        of = "batch" if processes == 1 else f"batch / {processes} processes"
        _require(micro > 0 and share % micro == 0, "micro_batch", micro, f"a divisor of {of}, which is {share}")
        return micro

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, padding included."""
        return self.batch * self.sequence

    @property
    def total_steps(self) -> int | None:
        """Steps of the run; None if it goes by the clock."""
        if self.hours is not None:
            return None
        return self.steps if self.steps is not None else math.ceil((self.tokens or 0) / self.tokens_per_step)


def _require(true: bool, name: str, value: object, right: str) -> None:
    if not true:
        raise ValueError(f"{name} is {value!r}; it must be {right}")


def progress(config: TrainConfig, step: int, seconds: float) -> float:
    """The share of the run, 0 to 1, that is done after `step` steps and `seconds` of training."""
    total = config.total_steps
    done = seconds / (3600 * config.hours) if config.hours is not None else step / (total or 1)
    return min(1.0, done)


def learning_rate(config: TrainConfig, step: int, done: float) -> float:
    """Learning rate of step number `step` (from 0), which begins when the share `done` of the run is done."""
    if config.schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * done))
    elif is_decaying(config, done):
        shape = (1 - done) / config.decay
    else:
        shape = 1.0
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * shape)


def is_decaying(config: TrainConfig, done: float) -> bool:
    """Whether the learning rate of `wsd` is going down."""
    return config.schedule == "wsd" and done > 1 - config.decay
