"""How much memory a run takes, computed before anything is loaded, and the settings with which it would fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ..config import ModelConfig
from ..memory import available_memory
from ..ops.loss import CHUNK_VALUES
from ..ops.packed_attention import kept_bytes
from ..shapes import describe
from ..world import World
from .machine import uses_bfloat16
from .run_folder import TrainError
from .schedule import TrainConfig

# The share of free memory that a run may plan with: neither allocators nor this arithmetic are exact.
_USABLE = 0.95


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process at the peak of a step."""

    weights: int
    """Weights, and gradients and optimizer state of those that are trained; with bfloat16 a copy to compute with."""
    teacher: int
    """Weights of the teacher, and its gradients and optimizer state if it is trained too."""
    activations: int
    """What the forward pass of `micro_batch` sequences keeps for the backward pass."""
    loss: int
    """Chunks of logits and the gradient of the LM head."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.teacher + self.activations + self.loss


def activation_bytes(shape: ModelConfig, tokens: int, width: int, recompute: str) -> int:
    """Bytes that the layers keep for the backward pass.

    Args:
        shape: the model.
        tokens: of one forward pass.
        width: bytes of a value in matrix products, 2 or 4; the residual stream is in fp32.
        recompute: as of `TrainConfig`.
    """
    sizes = describe(shape)
    hidden, neurons, queries, keys = (sizes.size(axis) for axis in ("channels", "neurons", "queries", "keys"))
    stream = 4 * hidden  # the residual stream, as the norm's input
    norm = 4 * hidden if width == 4 else (4 + width) * hidden  # its normalized copy, and that one's cast
    attention = norm + stream + width * (3 * queries + 2 * keys)  # q, the output twice in the worst case, k, v
    if sizes.family.has("query_norm"):
        attention += (4 + width) * (queries + keys)
    # The input of the activation and its output; of a gated MLP also the other factor and the product.
    gated = 2 if sizes.family.gated else 1
    mlp = norm + stream + gated * width * neurons * (1 if recompute == "mlp" else 2)
    if recompute == "layers":
        return tokens * (shape.num_hidden_layers * stream + attention + mlp)
    return tokens * shape.num_hidden_layers * (attention + mlp)


def attention_bytes(shape: ModelConfig, sequences: int, length: int, recompute: str) -> int:
    """Bytes of attention weights that the layers keep for the backward pass on a CPU, see `ops.packed_attention`."""
    layers = 1 if recompute == "layers" else shape.num_hidden_layers
    return layers * kept_bytes(sequences, shape.num_attention_heads, length)


def estimate_memory(
    shape: ModelConfig,
    config: TrainConfig,
    teacher: ModelConfig | None = None,
    *,
    bfloat16: bool = False,
    correct_teacher: bool = False,
    trained: int | None = None,
    processes: int = 1,
    on_cpu: bool = False,
) -> MemoryEstimate:
    """The memory of one process of a run.

    Args:
        shape: the model that is trained; its weights, gradients and AdamW averages are in fp32.
        config: the settings.
        teacher: a teacher that runs beside it, in the dtype of the matrix products.
        bfloat16: whether matrix products run in it.
        correct_teacher: whether the teacher is trained too.
        trained: parameters that are trained; all if None.
        processes: how many share weights and optimizer state (FSDP2).
        on_cpu: whether it runs on a CPU, where attention keeps its weights for the backward pass.
    """
    width = 2 if bfloat16 else 4
    count = describe(shape).num_parameters()
    free = count if trained is None else trained
    averages = {"adamw": 8, "adamw8bit": 2, "offload": 0}[config.optimizer]
    weights = (4 * count + (4 + averages) * free) // processes + (2 * count if bfloat16 else 0)
    tokens = config.at_once(processes) * config.sequence
    models = [shape, teacher] if teacher is not None and correct_teacher else [shape]
    activations = sum(activation_bytes(model, tokens, width, config.recompute) for model in models)
    if on_cpu:
        sequences = config.at_once(processes)
        activations += sum(attention_bytes(m, sequences, config.sequence, config.recompute) for m in models)
    chunk = min(CHUNK_VALUES, tokens * shape.vocab_size)
    loss = 4 * 4 * chunk + 4 * shape.vocab_size * shape.hidden_size + 8 * tokens * shape.hidden_size
    beside = 0
    if teacher is not None:
        theirs = describe(teacher).num_parameters()
        beside = (16 * theirs // processes if correct_teacher else width * theirs) + 4 * tokens * teacher.hidden_size
    return MemoryEstimate(weights, beside, activations, loss)


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free on the device, or for this process on a CPU; None if that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() if device.type == "cpu" else None


def require_fit(
    shape: ModelConfig,
    config: TrainConfig,
    teacher: ModelConfig | None,
    free: int | None,
    *,
    bfloat16: bool = False,
    correct_teacher: bool = False,
    trained: int | None = None,
    processes: int = 1,
    on_cpu: bool = False,
) -> MemoryEstimate:
    """The memory of a run, if that much is free.

    Args:
        free: bytes; None if it is not known, and then anything fits.

    The others are those of `estimate_memory`.

    Raises:
        TrainError: it does not fit; the message says how much it takes and which settings would fit.
    """

    def estimate_of(settings: TrainConfig) -> MemoryEstimate:
        return estimate_memory(
            shape,
            settings,
            teacher,
            bfloat16=bfloat16,
            correct_teacher=correct_teacher,
            trained=trained,
            processes=processes,
            on_cpu=on_cpu,
        )

    estimate = estimate_of(config)
    if free is None or estimate.total <= free * _USABLE:
        return estimate
    fitting = _setting_that_fits(config, processes, lambda settings: estimate_of(settings).total <= free * _USABLE)
    gigabytes: Mapping[str, float] = {name: value / 1e9 for name, value in vars(estimate).items()}
    raise TrainError(
        f"this needs about {estimate.total / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: "
        f"{gigabytes['weights']:.1f} for weights and optimizer, {gigabytes['teacher']:.1f} for the teacher, "
        f"{gigabytes['activations']:.1f} for {config.at_once(processes)} x {config.sequence} tokens at once, "
        f"{gigabytes['loss']:.1f} for the loss. "
        + (f"It would fit with {fitting}" if fitting else "No setting makes it fit; take more processes or a cache")
    )


def require_memory(
    shape: ModelConfig,
    config: TrainConfig,
    device: torch.device,
    world: World,
    teacher: ModelConfig | None = None,
    *,
    correct_teacher: bool = False,
    trained: int | None = None,
) -> MemoryEstimate:
    """`require_fit` with what is free now; on a CPU, processes of one machine share its memory."""
    free = available_bytes(device)
    if device.type == "cpu" and free is not None:
        free //= world.local_size
    return require_fit(
        shape,
        config,
        teacher,
        free,
        bfloat16=uses_bfloat16(device, config.dtype),
        correct_teacher=correct_teacher,
        trained=trained,
        processes=world.data_size,
        on_cpu=device.type == "cpu",
    )


def _setting_that_fits(config: TrainConfig, processes: int, fits: Callable[[TrainConfig], bool]) -> str | None:
    """The smallest change with which a run fits, as options of the command line."""
    share = config.batch // processes
    now = config.at_once(processes)
    divisors = [n for n in range(now, 0, -1) if share % n == 0]
    for optimizer in dict.fromkeys((config.optimizer, "adamw8bit")):
        for recompute in dict.fromkeys((config.recompute, "mlp", "layers")):
            for micro in divisors:
                settings = replace(config, optimizer=optimizer, recompute=recompute, micro_batch=micro)
                if fits(settings):
                    changes = [f"--micro-batch {micro}"] if micro != now else []
                    changes += [f"--recompute {recompute}"] if recompute != config.recompute else []
                    changes += [f"--optimizer {optimizer}"] if optimizer != config.optimizer else []
                    return " ".join(changes)
    return None
