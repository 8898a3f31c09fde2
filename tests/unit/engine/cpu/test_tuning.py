"""How weights are read: the choice on simulated machines, its file, and that no bit depends on it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_models import some_tokens, tiny_model
from numba import njit, types
from typer.testing import CliRunner

from minitron.cli import app
from minitron.engine.cpu import tuning
from minitron.engine.cpu.dots import row_dot
from minitron.engine.cpu.engine import CpuEngine
from minitron.engine.cpu.formats import LEAF
from minitron.engine.cpu.lanes import total
from minitron.engine.cpu.tuning import EVERY_ROW, USUAL, Report, Tuning, choose, readings, some_weights, tuned
from minitron.engine.matrix import FORMATS, Format
from minitron.engine.quantize import quantize
from minitron.engine.weights import EngineWeights, from_model


def machine(pace: Callable[[Tuning], float]) -> tuple[Callable[[Tuning], float], list[Tuning]]:
    """A simulated machine whose step takes `pace` seconds, and the list of what was timed."""
    timed: list[Tuning] = []

    def time_step(option: Tuning) -> float:
        timed.append(option)
        return pace(option)

    return time_step, timed


def test_the_usual_choice_stays_where_nothing_is_clearly_faster() -> None:
    time_step, timed = machine(lambda option: 1.0 if option == USUAL else 0.98)
    for format in FORMATS:
        assert choose(time_step, format, threads=8)[0] == USUAL
    assert len(set(timed)) > 8


@pytest.mark.parametrize(
    "best",
    [
        Tuning(ahead=0, short=0, parts=1),
        Tuning(ahead=1024, short=0, fixed=True),
        Tuning(ahead=0, short=EVERY_ROW, threads=4),
    ],
)
def test_the_fastest_choice_is_found(best: Tuning) -> None:
    def pace(option: Tuning) -> float:
        alike = sum(getattr(option, name) == getattr(best, name) for name in ("ahead", "short"))
        shares = (option.parts, option.fixed) == (best.parts, best.fixed)
        return 1.0 - 0.1 * alike - 0.1 * shares - 0.1 * (option.threads == best.threads)

    chosen, seconds = choose(machine(pace)[0], "bf16", threads=8)
    assert chosen == best
    assert seconds[best] == min(seconds.values())


def test_rows_of_integers_are_always_read_one_after_the_other() -> None:
    time_step, timed = machine(lambda option: 1.0)
    choose(time_step, "int4", threads=1)
    assert {option.short for option in timed} == {USUAL.short}
    assert {option.threads for option in timed} == {0}


def test_one_slow_round_does_not_decide() -> None:
    rounds: dict[Tuning, int] = {}

    def pace(option: Tuning) -> float:
        rounds[option] = rounds.get(option, -1) + 1  # the first one warms up
        return (1.0 if option == USUAL else 0.5 if option.ahead == 512 else 2.0) + 50.0 * (rounds[option] == 2)

    assert choose(machine(pace)[0], "int8", threads=1)[0].ahead == 512


class FreeMachine:
    """A meter of a machine on which nothing else runs; `reason` may be set."""

    reason = ""

    def __init__(self, threads: int) -> None: ...

    def __enter__(self) -> FreeMachine:
        return self

    def __exit__(self, *_: object) -> None: ...


class FakeTrial:
    """An engine that is twice as fast without prefetching."""

    active_neurons, seen_neurons = 1, 2
    opened = 0

    def __init__(self, part: EngineWeights) -> None:
        type(self).opened += 1
        self.part = part

    def time_step(self, tuning: Tuning) -> float:
        return 1.0 if tuning.ahead == 0 else 2.0

    def close(self) -> None: ...


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for a process that has tuned nothing, where every model counts as large."""
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SMALL", 0)
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "LoadMeter", FreeMachine)
    monkeypatch.setattr(FakeTrial, "opened", 0)
    return tmp_path / "cache" / "tuning"


def fake(weights: EngineWeights, version: int = 1, again: bool = False) -> Report:
    return tuned(weights, 2, version, FakeTrial, again)


def new_process() -> None:
    tuning._known.clear()


def test_what_a_busy_machine_says_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_step(self: FakeTrial, tuning: Tuning) -> float:
        return 1.0 if tuning.threads == 1 else 2.0

    monkeypatch.setattr(FakeTrial, "time_step", time_step)
    monkeypatch.setattr(FreeMachine, "reason", "other programs used 1.0 of 2 cores")
    weights = from_model(tiny_model(torch.bfloat16))
    busy = fake(weights)
    assert (busy.origin, busy.load) == ("measured", "other programs used 1.0 of 2 cores")
    assert busy.chosen.threads == 0  # one thread was faster only because of the others
    assert fake(weights) is busy  # in this process
    assert not list(cache.glob("*")) if cache.exists() else True
    monkeypatch.setattr(FreeMachine, "reason", "")
    new_process()
    assert (fake(weights).origin, fake(weights).chosen.threads) == ("measured", 1)
    new_process()
    assert (fake(weights).origin, fake(weights).chosen.threads) == ("kept", 1)


def test_a_choice_is_measured_once_and_kept(cache: Path) -> None:
    weights = from_model(tiny_model(torch.bfloat16))
    first = fake(weights)
    assert (first.origin, first.chosen.ahead) == ("measured", 0)
    assert fake(weights) is first
    new_process()
    second = fake(weights)
    assert (second.origin, second.chosen) == ("kept", first.chosen)
    assert [each[0] for each in second.measured] == [each[0] for each in first.measured]
    assert FakeTrial.opened == 1
    rates = dict(first.measured)
    assert rates[first.chosen] == pytest.approx(weights.bytes_per_token(0.5) / 1e9)
    assert fake(weights, again=True).origin == "measured"
    assert FakeTrial.opened == 2


def test_each_format_and_number_of_threads_has_its_own_choice(cache: Path) -> None:
    model = tiny_model(torch.bfloat16)
    fake(from_model(model))
    fake(from_model(model, "int8"))
    tuned(from_model(model), 1, 1, FakeTrial)
    assert FakeTrial.opened == len(list(cache.glob("*.json"))) == 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: "no JSON",
        lambda kept: "[]",
        lambda kept: json.dumps({**kept, "kernels": 2}),
        lambda kept: json.dumps({**kept, "processor": "another"}),
        lambda kept: json.dumps({**kept, "chosen": {**kept["chosen"], "ahead": -(1 << 21)}}),
        lambda kept: json.dumps({**kept, "chosen": {**kept["chosen"], "short": -1}}),
        lambda kept: json.dumps({**kept, "chosen": {**kept["chosen"], "parts": 0}}),
        lambda kept: json.dumps({**kept, "chosen": {**kept["chosen"], "threads": 1.5}}),
        lambda kept: json.dumps({**kept, "chosen": {"ahead": 0}}),
        lambda kept: json.dumps({name: value for name, value in kept.items() if name != "measured"}),
    ],
)
def test_a_file_that_is_old_or_spoiled_is_measured_anew(cache: Path, spoil: Callable[[dict], str]) -> None:
    weights = from_model(tiny_model(torch.bfloat16))
    fake(weights)
    (path,) = cache.glob("*.json")
    good = path.read_text(encoding="utf-8")
    path.write_text(spoil(json.loads(good)), encoding="utf-8")
    new_process()
    assert fake(weights).origin == "measured"
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(good)


def test_a_cache_folder_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.parent.write_text("a file in the way", encoding="utf-8")
    weights = from_model(tiny_model(torch.bfloat16))
    assert fake(weights).origin == "measured"
    new_process()
    assert fake(weights).origin == "measured"


def test_small_models_need_no_measurement(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = from_model(tiny_model(torch.bfloat16))
    monkeypatch.setattr(tuning, "SMALL", weights.nbytes)
    assert fake(weights) == Report(USUAL, (), "small model")
    assert not cache.exists()


@pytest.mark.parametrize("format", FORMATS)
def test_the_first_rows_of_a_matrix_are_its_own(format: Format) -> None:
    values = torch.randn(256, 100, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    values[::7, 3] *= 1e-30  # bf12 lists these apart
    matrix = quantize(values, format)
    part = tuning._first_rows(matrix, 64)
    assert part.shape == (64, 100)
    torch.testing.assert_close(part.dense(torch.float32), matrix.dense(torch.float32, 0, 64), rtol=0, atol=0)


def test_a_part_of_a_model_keeps_its_proportions() -> None:
    weights = from_model(tiny_model(torch.bfloat16, num_hidden_layers=4, vocab_size=640))
    half = some_weights(weights, int(weights.bytes_per_token() / 2))
    assert (len(half.layers), half.constants.num_layers, half.vocab_size) == (2, 2, 320)
    assert some_weights(weights, 1 << 30).bytes_per_token() == weights.bytes_per_token()
    tied = from_model(tiny_model(torch.bfloat16, vocab_size=640, tie_word_embeddings=True))
    part = some_weights(tied, 1)
    assert part.head is part.embed


WAYS = [
    Tuning(ahead=0),
    Tuning(ahead=512, short=0),
    Tuning(ahead=0, short=0, parts=1),
    Tuning(ahead=0, short=EVERY_ROW),
    Tuning(ahead=8192, short=EVERY_ROW, fixed=True),
    Tuning(ahead=-8192),
    Tuning(threads=1),
]


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_no_bit_depends_on_how_weights_are_read(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron.engine.cpu import engine as engine_file

    monkeypatch.setattr(engine_file, "SMALL", 0)  # so that parts are taken in turn
    shape = {"hidden_size": 320, "intermediate_size": 1200, "vocab_size": 700}
    weights = from_model(tiny_model(torch.bfloat16, **shape), format)  # type: ignore[arg-type]
    tokens = some_tokens(12, 700)

    def bits(way: Tuning) -> np.ndarray:
        with CpuEngine(weights, 32, threads=2, tuning=way) as engine:
            rows = [engine.step([token]).numpy().view(np.int32).copy() for token in tokens]
        return np.concatenate(rows)

    expected = bits(USUAL)
    for way in WAYS:
        assert np.array_equal(bits(way), expected), way


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86 instructions")
def test_only_int4_prefetches_whole_rows() -> None:
    for kind, expected in ((types.uint8, True), (types.int8, False), (types.uint16, False)):
        signature = types.float32(types.Array(kind, 1, "C"), types.Array(types.float32, 1, "C"), types.intp, types.intp)
        compiled = njit(signature, **LEAF)(
            lambda row, staged, columns, ahead: total(row_dot(row, staged, columns, ahead))
        )
        assert ("prefetcht1" in compiled.inspect_asm(signature.args)) == expected, kind
    negative = {format: any(way.ahead < 0 for way in readings(format)) for format in FORMATS}
    assert negative == {format: format == "int4" for format in FORMATS}


def test_an_engine_tunes_itself_before_its_first_step(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = from_model(tiny_model(torch.bfloat16))
    with CpuEngine(weights, 32, threads=2, tuning=USUAL) as engine:
        expected = engine.greedy([5], 8)
    with CpuEngine(weights, 32, threads=2) as engine:
        assert engine.greedy([5], 8) == expected
        assert engine.kv.lengths[0] == 8
        (kept,) = cache.glob("*.json")
        assert engine._tuning == Tuning(**json.loads(kept.read_text(encoding="utf-8"))["chosen"])
        # A choice of fewer threads is followed.
        engine._apply(replace(USUAL, threads=1))
        assert engine.greedy([5], 8, slots=[0])
        assert engine._running == 1


def test_bench_shows_the_choice_and_measures_again_when_asked(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(torch.bfloat16)
    monkeypatch.setattr("minitron.loading.load", lambda *_, **__: type("Loaded", (), {"model": model}))
    monkeypatch.setattr("minitron.bench.measure.BANDWIDTH_BYTES", 1 << 20)
    command = ["bench", str(tmp_path), "--prompt-tokens", "5", "-n", "3", "--rounds", "1", "--peers", "none"]
    origins = []
    for extra in ([], [], ["--retune"]):
        new_process()
        done = CliRunner().invoke(app, [*command, "--json", *extra])
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)["tuning"]
        origins.append(found["origin"])
        assert len(found["measured"]) > 8
        assert all(each["gb_per_s"] > 0 for each in found["measured"])
    assert origins == ["measured", "kept", "measured"]
    lines = CliRunner().invoke(app, command).stdout.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("tuning "))
    assert "measured earlier on this machine" in lines[at] or "measured in this run" in lines[at]
    assert sum("GB/s  " in line for line in lines[at:]) == len(found["measured"])
