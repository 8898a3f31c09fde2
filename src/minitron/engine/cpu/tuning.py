"""How threads read weights from memory, chosen by a short measurement on the machine and kept on disk.

What is fastest differs among processors and formats: on one, prefetching costs a fifth of the speed, on another it
doubles it. So the decode step takes these choices as numbers, and when an engine first decodes with a model that is
larger than the caches, a part of the model is timed with a few of them. No bit of a result depends on the choice.

The file lies in the cache folder, one for each processor, number of threads and format; it is measured again when the
kernels change. What is measured while other programs use the cores serves the process that measured it, and is not
kept. A file that cannot be read or written costs a measurement in each process, nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import platform
import statistics
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...files.cache_folder import cache_folder
from ...load_meter import LoadMeter
from ...pages import SMALL
from ..buffers import of_kind
from ..matrix import Matrix
from ..parts import EngineWeights
from .compiled import announced
from .dots import SHORT_ROW
from .formats import AHEAD

EVERY_ROW = 1 << 30
"""`Tuning.short` for rows of any length."""
GAIN = 0.97
"""Another choice replaces the one that is usual so far if it takes at most this share of its time."""
ROUNDS, FEWEST_ROUNDS = 5, 2
SECONDS = 0.35
"""Time after which no further round of a comparison begins, but for the fewest rounds."""
LEAST_BYTES, MOST_BYTES = 96 << 20, 512 << 20
"""Of the part of a model that is timed: four times the largest cache, within these limits."""
_log = logging.getLogger("minitron")
_lock = threading.Lock()
_known: dict[tuple[Any, ...], Report] = {}


@dataclass(frozen=True)
class Tuning:
    """One way to read weights. Results do not depend on it."""

    ahead: int = AHEAD
    """Bytes by which memory is prefetched before it is needed, line by line; 0 for not at all. Negative: whole rows of
    int4 are prefetched so many bytes ahead, and the other matrices not at all."""
    short: int = SHORT_ROW
    """Columns up to which four rows of bf16, fp32 or bf12 are read side by side; longer rows one after the other."""
    parts: int = 4
    """Parts of a matrix for each thread, taken as threads become free."""
    fixed: bool = False
    """Whether each thread has a fixed share of the work instead."""
    threads: int = 0
    """Threads that decode; 0 for as many as may be used."""


USUAL = Tuning()
"""For small models, which stay in the caches."""


@dataclass(frozen=True)
class Report:
    """What was chosen, and why."""

    chosen: Tuning
    measured: tuple[tuple[Tuning, float], ...]
    """Each way that was tried, and its speed in GB/s of weights; empty if nothing was measured."""
    origin: str
    """"measured", "kept" (measured by an earlier process) or "small model"."""
    load: str = ""
    """What other programs took meanwhile, so that this was not kept; empty if the machine was free."""

    def as_json(self) -> dict[str, Any]:
        """The same as JSON has it."""
        measured = [{**dataclasses.asdict(tuning), "gb_per_s": round(rate, 2)} for tuning, rate in self.measured]
        return {
            "origin": self.origin,
            "load": self.load,
            "chosen": dataclasses.asdict(self.chosen),
            "measured": measured,
        }


class Trial(Protocol):
    """An engine whose decode step can be timed."""

    @property
    def active_neurons(self) -> int:
        """MLP neurons that were not zero, over all steps."""
        ...

    @property
    def seen_neurons(self) -> int:
        """All MLP neurons, over all steps."""
        ...

    def time_step(self, tuning: Tuning) -> float:
        """Seconds of one step."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def tuned(
    weights: EngineWeights,
    threads: int,
    version: int,
    open_trial: Callable[[EngineWeights], Trial],
    again: bool = False,
) -> Report:
    """The tuning for a model on this machine: kept from an earlier measurement, or measured now.

    Args:
        weights: of the model.
        threads: that may decode.
        version: of the compiled step.
        open_trial: makes a `Trial` of a part of the model.
        again: measure in any case.
    """
    if weights.nbytes <= SMALL or not weights.layers:
        return Report(USUAL, (), "small model")
    kind = f"{weights.format}{'-gated' if weights.constants.gated else ''}"
    facts = {"processor": processor(), "threads": threads, "kernels": version, "weights": kind}
    key = tuple(facts.values())
    with _lock:  # of several engines that open at once, one measures
        if again or key not in _known:
            path = _path(facts)
            found = None if again else _read(path, facts)
            if found is None:
                found = _measured(weights, threads, open_trial)
                if not found.load:
                    _write(path, facts, found)
            _known[key] = found
        return _known[key]


def _measured(weights: EngineWeights, threads: int, open_trial: Callable[[EngineWeights], Trial]) -> Report:
    with announced(f"measuring how {weights.format} weights are read fastest"):
        part = some_weights(weights, min(MOST_BYTES, max(LEAST_BYTES, 4 * _largest_cache())))
        trial = open_trial(part)
        try:
            with LoadMeter(threads) as meter:
                chosen, seconds = choose(trial.time_step, weights.format, threads)
            size = part.bytes_per_token(trial.active_neurons / max(1, trial.seen_neurons))
        finally:
            trial.close()
    if meter.reason:  # `team` finds the number of threads again whenever the load changes
        chosen = dataclasses.replace(chosen, threads=0)
    rates = tuple((tuning, size / time / 1e9) for tuning, time in seconds.items())
    return Report(chosen, rates, "measured", meter.reason)


# --- the choice --------------------------------------------------------------------------------------------------


def choose(time_step: Callable[[Tuning], float], format: str, threads: int) -> tuple[Tuning, dict[Tuning, float]]:
    """The fastest of some tunings, and the median seconds of each that was tried.

    First how rows are read is compared, then how the work is divided, then the number of threads, each with the best of
    what came before.
    """
    seconds: dict[Tuning, float] = {}
    best = _fastest(time_step, USUAL, readings(format), seconds)
    shares = (dataclasses.replace(best, parts=1), dataclasses.replace(best, fixed=True))
    best = _fastest(time_step, best, shares, seconds)
    if threads > 1:
        best = _fastest(time_step, best, (dataclasses.replace(best, threads=threads // 2),), seconds)
    return best, seconds


def readings(format: str) -> Iterable[Tuning]:
    """The ways to read rows of a format, other than the usual one."""
    distances = (0, 512, 1024, 2048, AHEAD, 2 * AHEAD)
    if format in ("int8", "int4"):  # rows are always read one after the other
        rows = (-2 * AHEAD, -4 * AHEAD) if format == "int4" else ()
        return [Tuning(ahead) for ahead in (*distances, *rows) if ahead != AHEAD]
    return [Tuning(ahead, 0) for ahead in distances] + [Tuning(0, EVERY_ROW), Tuning(AHEAD, EVERY_ROW)]


def _fastest(
    time_step: Callable[[Tuning], float], usual: Tuning, others: Iterable[Tuning], seconds: dict[Tuning, float]
) -> Tuning:
    """The fastest; `usual` unless another one is clearly faster. Medians over interleaved rounds go to `seconds`."""
    options = [usual, *others]
    times: dict[Tuning, list[float]] = {option: [] for option in options}
    begin = time.perf_counter()
    for option in options:
        time_step(option)  # pages that were never read before
    for round_ in range(ROUNDS):
        if round_ >= FEWEST_ROUNDS and time.perf_counter() - begin > SECONDS:
            break
        for option in options:
            times[option].append(time_step(option))
    found = {option: statistics.median(values) for option, values in times.items()}
    seconds.update(found)
    best = min(options, key=found.__getitem__)
    return best if found[best] <= GAIN * found[usual] else usual


# --- the part of a model that is timed ---------------------------------------------------------------------------


def some_weights(weights: EngineWeights, size: int) -> EngineWeights:
    """The first layers and the first rows of embedding and head: at least `size` bytes, in the model's proportions.

    Nothing is copied but bf12's lists of escapes.
    """
    share = min(1.0, size / weights.bytes_per_token())
    layers = max(1, math.ceil(share * len(weights.layers)))
    rows = min(weights.vocab_size, math.ceil(share * weights.vocab_size / 64) * 64)
    embed = _first_rows(weights.embed, rows)
    head = embed if weights.constants.tied else _first_rows(weights.head, rows)
    constants = dataclasses.replace(weights.constants, num_layers=layers)
    return dataclasses.replace(weights, constants=constants, embed=embed, head=head, layers=weights.layers[:layers])


def _first_rows(matrix: Matrix, rows: int) -> Matrix:
    extras = matrix.extras
    if extras is not None:
        N = matrix.shape[0]
        table = np.asarray(extras)
        escapes = 2 * int(table[N + rows])
        first = 2 * N + 1
        parts = (table[:rows], table[N : N + rows + 1], table[first : first + escapes])
        extras = of_kind(np.concatenate(parts), extras)
    return dataclasses.replace(matrix, shape=(rows, matrix.shape[1]), data=matrix.data[:rows], extras=extras)


def _largest_cache() -> int:
    """Bytes of the largest cache of the first processor, where the system says it; otherwise 0."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text(encoding="ascii").strip()
            sizes.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1:], 0))
        except (OSError, ValueError):
            continue
    return max(sizes)


# --- the file ----------------------------------------------------------------------------------------------------


@functools.cache
def processor() -> str:
    """The processor, as far as the system and LLVM name it, with the target that kernels are compiled for."""
    from llvmlite.binding import get_host_cpu_name
    from numba import config

    wanted = ("model name", "cpu family", "model", "stepping")
    facts = []
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in wanted:
                facts.append(value.strip())
            elif not line.strip():  # the next processor follows
                break
    except OSError:
        facts.append(platform.processor())
    return ", ".join([*facts, getattr(config, "CPU_NAME", None) or get_host_cpu_name()])


def _path(facts: dict[str, Any]) -> Path:
    digest = zlib.crc32(facts["processor"].encode())
    return cache_folder("tuning") / f"{facts['weights']}-{facts['threads']}-threads-{digest:08x}.json"


def _read(path: Path, facts: dict[str, Any]) -> Report | None:
    """What was kept for the same facts; None if there is no such file or it is not whole."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if any(kept[name] != value for name, value in facts.items()):
            return None
        measured = tuple((_tuning(each), float(each["gb_per_s"])) for each in kept["measured"])
        return Report(_tuning(kept["chosen"]), measured, "kept")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _tuning(values: dict[str, Any]) -> Tuning:
    """Raises ValueError, KeyError or TypeError where the values are not those of a tuning."""
    fields = {field.name: values[field.name] for field in dataclasses.fields(Tuning)}
    fixed = fields.pop("fixed")
    numbers = {**fields, "ahead": abs(fields["ahead"])}
    if type(fixed) is not bool or any(type(number) is not int or number < 0 for number in numbers.values()):
        raise ValueError(f"no tuning: {values}")
    if not 1 <= fields["parts"] <= 64 or numbers["ahead"] > 1 << 20:
        raise ValueError(f"no tuning: {values}")
    return Tuning(**fields, fixed=fixed)


def _write(path: Path, facts: dict[str, Any], report: Report) -> None:
    from ...files.drafts import write_json  # small models, which start fastest, need none of this

    try:
        write_json(path, {**facts, **report.as_json()})
    except (OSError, ValueError) as error:  # a WriteError or TargetError
        _log.debug("%s is not kept: %s", path, error)
