"""What `minitron serve` is told: the options of the command line, or the same names in a YAML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, get_type_hints

from ..engine_choices import ENGINES

ADAPTERS = ("merged", "shared")
GUARD_ACTIONS = ("refuse", "flag", "count")
ADDRESS_EXAMPLES = "127.0.0.1, localhost or 0.0.0.0"


@dataclass(frozen=True)
class ServeSettings:
    """How to serve. Sizes are in bytes, times in seconds."""

    models: tuple[str, ...] = ("bundled",)
    """Each a checkpoint, or NAME=CHECKPOINT to give it another name. LoRA adapters are checkpoints too."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    api_keys: str | None = None
    """File with one API key a line; every route but /health and /ready then needs one of them."""
    allow_public: bool = False
    """Whether to listen on an address that other machines reach without API keys."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may call the server."""
    dtype: str = "auto"
    """auto, bf16, fp16 or fp32."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    format: str | None = None
    """Format of the weights for decoding: bf16, fp32, bf12 (on a CPU), int8 or int4."""
    threads: int | None = None
    """Threads of torch and of the engine; all cores by default."""
    slots: int = 8
    """Requests that a model answers at the same time."""
    max_context: int | None = None
    """Longest prompt with its answer, in tokens; the model's own context, at most 8192, by default."""
    engine: str = "auto"
    """auto (the fastest one that runs the model), cuda (the one for GPUs, on any device) or off (transformers)."""
    prefill_chunk: int | None = None
    """Prompt tokens between two decode steps; 32 on a CPU and 256 on a GPU by default."""
    prefix_cache: int = 256 << 20
    """Memory of each model's prefix cache; 0 turns it off."""
    max_waiting: int = 128
    """Requests that may wait for a slot of a model; more get status 429."""
    request_seconds: float = 600.0
    """Longest time of a request."""
    body_seconds: float = 30.0
    """Longest time in which a client must have sent a body, or must have taken a piece of an answer."""
    max_body: int = 4 << 20
    """Largest body."""
    max_schema: int = 64 << 10
    """Largest JSON schema or set of tools."""
    drain_seconds: float = 600.0
    """Longest time to finish answers after SIGTERM."""
    adapters: str = "merged"
    """How LoRA adapters run: merged (each a model of its own, in the fastest engine) or shared (over the weights of
    their base model, through transformers)."""
    guard: tuple[str, ...] = ()
    """Sequence classification heads that judge each prompt and each answer: HEAD for all models, or MODEL=HEAD."""
    guard_block: tuple[str, ...] = ()
    """Labels of the guards that block."""
    guard_threshold: float = 0.5
    """Probability of the blocked labels from which on a text is flagged."""
    guard_action: str = "refuse"
    """What happens to a flagged text: refuse, flag (the response says so) or count (only the metrics do)."""
    guard_separate: bool = False
    """Whether a guard whose backbone is not the served model may run in forward passes of its own."""
    log_file: str | None = None
    """File for the log; standard error by default."""
    log_prompts: bool = False
    """Whether the log contains prompts and answers."""

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be from {low} to {high}")
        if not self.models:
            raise ValueError("models is empty; name at least one checkpoint")
        if self.adapters not in ADAPTERS:
            raise ValueError(f"adapters is {self.adapters!r}; it must be one of {', '.join(ADAPTERS)}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine is {self.engine!r}; it must be one of {', '.join(ENGINES)}")
        self._check_guard()
        if self.public and not self.api_keys and not self.allow_public:
            raise ValueError(
                f"host is {self.host!r}, which other machines may reach, and there are no API keys; give a file of "
                f"keys (--api-keys), or --allow-public if something in front of this server checks who calls"
            )

    def _check_guard(self) -> None:
        if self.guard_action not in GUARD_ACTIONS:
            raise ValueError(f"guard_action is {self.guard_action!r}; it must be one of {', '.join(GUARD_ACTIONS)}")
        if self.guard and not self.guard_block:
            raise ValueError("guard needs guard_block: the labels of the head that block, such as --guard-block spam")
        if self.guard_block and not self.guard:
            raise ValueError("guard_block names labels of a guard; name its checkpoint with --guard")

    @property
    def public(self) -> bool:
        """Whether other machines may reach the address."""
        if self.host == "localhost":
            return False
        try:
            return not ip_address(self.host).is_loopback
        except ValueError:
            return True


_LIMITS: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "threads": (1, 1024),
    "slots": (1, 256),
    "max_context": (1, 1 << 24),
    "prefill_chunk": (1, 4096),
    "prefix_cache": (0, 1 << 44),
    "max_waiting": (0, 1 << 16),
    "request_seconds": (0.1, 1e6),
    "body_seconds": (0.1, 1e6),
    "max_body": (1024, 1 << 30),
    "max_schema": (16, 1 << 24),
    "drain_seconds": (0, 1e6),
    "guard_threshold": (0, 1),
}


def read_settings(file: Path | None, given: Mapping[str, Any]) -> ServeSettings:
    """The settings of a YAML file, over which options on the command line take precedence.

    Args:
        file: a mapping of names to values; none if None.
        given: options by name; None counts as not given.

    Raises:
        FileNotFoundError, ValueError: the file is missing or no mapping, a name is unknown, or a value is of another
            type or out of range.
    """
    found = {} if file is None else _read(file)
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        return replace(ServeSettings(allow_public=True), **{"allow_public": False, **found, **chosen})
    except ValueError as error:
        raise ValueError(f"{file}: {error}" if file is not None and not chosen else str(error)) from None


def _read(file: Path) -> dict[str, Any]:
    import yaml

    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; --config names a YAML file of options")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} is {type(values).__name__}; it must be a mapping of options to values")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    kinds = get_type_hints(ServeSettings)
    known = {field.name for field in fields(ServeSettings)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{file}: unknown option {name!r}; known are {', '.join(sorted(known))}")
        values[name] = _typed(value, kinds[name], f"{file}: {name}")
    return values


def _typed(value: Any, kind: Any, where: str) -> Any:
    if kind == tuple[str, ...]:
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{where} is {value!r}; it must be a list of strings")
        return tuple(value)
    allowed = kind if isinstance(kind, type) else tuple(part for part in kind.__args__)
    wanted: Any = (allowed,) if isinstance(allowed, type) else allowed
    wanted = (*wanted, int) if float in wanted else wanted
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join(part.__name__ for part in wanted if part is not type(None))
        raise ValueError(f"{where} is {value!r}; it must be {names}")
    return value
