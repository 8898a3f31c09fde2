"""Everything that needs a GPU, in the order of its value, within nine minutes: tests, then speed and memory.

    python benchmarks/gpu.py                         needs a CUDA device; `make gpu` runs this
    python benchmarks/gpu.py --only decode,loss      some steps
    python benchmarks/gpu.py --smoke                 tiny shapes on the CPU; the numbers mean nothing

Each step is a process of its own with a limit of time, so that one that fails or hangs costs the others nothing. What
it has found is in DIR/STEP.json as soon as it is known, its output in DIR/STEP.log, and all so far in DIR/gpu.json.
All weights but the last step's are random: good for timing and for nothing else. Shares of zeros are set by a bias on
`up_proj`. The last step trains a model for the time that is left.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 530
"""Of the whole run."""
STEPS: dict[str, int] = {
    "machine": 45,
    "tests": 150,
    "decode": 120,
    "static": 100,
    "prefill": 40,
    "distill": 60,
    "loss": 40,
    "train": 60,
    "quantized": 90,
    "study": SECONDS,
}
"""Steps in the order of their value, and the seconds that each may take."""
PROMPT, NEW_TOKENS = 128, 128
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12}
"""Bytes per second by specification, by a part of the device's name."""
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


class Place:
    """Where a step runs, the sizes of what it measures, and the file of what it has found."""

    def __init__(self, smoke: bool, file: Path, limit: float = SECONDS) -> None:
        self.smoke, self.file = smoke, file
        self.limit = limit
        """Seconds that the step may take."""
        self.found: dict[str, Any] = {}
        self.device = "cpu" if smoke else "cuda"

    def config(self, preset: str = "minitron-4b", **changes: Any) -> Any:
        """The shape of a preset; a tiny one with `--smoke`."""
        from minitron import NemotronConfig

        if self.smoke:
            heads = {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512}
            return NemotronConfig(**{**TINY, **heads})
        return NemotronConfig.preset(preset, **changes)

    def pick(self, full: int, tiny: int) -> int:
        """A size."""
        return tiny if self.smoke else full

    def record(self, name: str, value: Any) -> None:
        """Keep what was found and write it at once: the step may not live to its end."""
        self.found[name] = value
        print(name, json.dumps(value), flush=True)
        self.file.write_text(json.dumps(self.found, indent=2) + "\n", encoding="utf-8")

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch

        if not self.smoke:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int = 3) -> float:
        """Median time of some runs of `work`, after one that is not counted."""
        times = []
        for _ in range(self.pick(repeats, 1) + 1):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def peak_bytes(self, work: Callable[[], Any]) -> int:
        """Growth of the peak of the device's memory while `work` runs."""
        import torch

        if self.smoke:
            work()
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def name(self) -> str:
        """Of the device; empty with `--smoke`."""
        import torch

        return "" if self.smoke else torch.cuda.get_device_name()


# --- steps -------------------------------------------------------------------------------------------------------


def machine(place: Place) -> None:
    """The device, its driver, and what it reads and multiplies in a second."""
    import torch
    from machine import describe

    place.record("machine", describe(place.device, place.smoke))
    if not place.smoke:
        facts = torch.cuda.get_device_properties(0)
        place.record("cuda", torch.version.cuda)
        place.record("memory_bytes", facts.total_memory)
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        place.record("driver_and_power", subprocess.run(query, capture_output=True, text=True).stdout.strip())


def tests(place: Place) -> None:
    """The tests that need a GPU; with `--smoke`, that they are found."""
    more = ["--collect-only"] if place.smoke else ["--maxfail=20", "--durations=5"]
    # Only these files: the others import packages that such a machine need not have.
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *more, *map(str, files)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(found.stdout[-8000:], found.stderr[-2000:], flush=True)
    place.record("exit_status", found.returncode)
    place.record("last_line", (found.stdout.strip().splitlines() or [""])[-1])
    if found.returncode:
        raise SystemExit(f"tests failed: {place.found['last_line']}")


def decode(place: Place) -> None:
    """Our engine beside transformers' eager path and the memory's limit: bf16, dense and 90% zeros, batch 1 and 8."""
    for zeros in (0.0, 0.9):
        model = _model(place, zeros)
        for batch in (1, 8):
            for kind in _kinds(model):
                _record_engine(place, f"{kind} zeros={zeros} batch={batch}", model, batch, kind)
        if not zeros:
            ids = _prompt(place, model.config.vocab_size)
            for batch in (1, 8):
                rate = _generate_rate(place, _upstream(model), ids.expand(batch, -1), place.pick(48, 4))
                place.record(f"transformers eager batch={batch}", rate)
        del model


def static(place: Place) -> None:
    """transformers with a static cache, which it compiles; the time to compile is reported beside."""
    model = _model(place, 0.0)
    upstream, ids = _upstream(model), _prompt(place, model.config.vocab_size)
    for batch in (1, 8):
        rows, start = ids.expand(batch, -1), time.perf_counter()
        _upstream_generate(upstream, rows, 8, cache_implementation="static")
        place.record(f"first call batch={batch} (s)", time.perf_counter() - start)
        rate = _generate_rate(place, upstream, rows, place.pick(96, 4), cache_implementation="static")
        place.record(f"transformers static + compile batch={batch}", rate)


def quantized(place: Place) -> None:
    """int8 and int4 weights, dense and 90% zeros, batch 1."""
    for zeros in (0.0, 0.9):
        model = _model(place, zeros)
        for format in ("int8", "int4"):
            for kind in _kinds(model):
                _record_engine(place, f"{kind} {format} zeros={zeros} batch=1", model, 1, kind, format)
        del model


def prefill(place: Place) -> None:
    """Prefill of one prompt: tokens and operations per second."""
    import torch

    from minitron.engine.cuda.engine import CudaEngine

    model = _model(place, 0.5)
    weights, count = _weights(model), sum(parameter.numel() for parameter in model.parameters())
    for length in (place.pick(512, 16), place.pick(4096, 32)):
        engine = CudaEngine(weights, length)
        ids = torch.randint(model.config.vocab_size, (length,)).tolist()

        def run(engine: CudaEngine = engine, ids: list[int] = ids) -> None:
            engine.truncate(0)
            engine.prefill(ids)

        seconds = place.seconds(run)
        rate = 2 * count * length / seconds
        place.record(f"{length} tokens", {"seconds": seconds, "tokens_per_s": length / seconds, "flop_per_s": rate})


def distill(place: Place) -> None:
    """Forward passes of teacher and student, the divergence over the whole vocabulary, and the student's gradients.

    Without an optimizer step: AdamW's state for 4B parameters does not fit beside the teacher in 80 GB.
    """
    import torch

    from minitron.data.packing import collate
    from minitron.distill.losses import DistillLoss, DistillOptions
    from minitron.distill.targets import OnlineTeacher

    student = _model(place, 0.5, trained=True)
    teacher = _model(place, 0.5, preset="nemotron-4-15b").requires_grad_(False)
    student.gradient_checkpointing_enable()
    loss = DistillLoss(OnlineTeacher(teacher), DistillOptions(), student.config)
    length = place.pick(4096, 32)
    ids = torch.randint(3, student.config.vocab_size, (length,)).numpy()
    batch = collate([[ids]], length).to(place.device)

    def run() -> None:
        student.zero_grad()
        loss(student, batch)[0].backward()

    seconds, peak = place.seconds(run), place.peak_bytes(run)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    work = (2 * sizes[0] + 6 * sizes[1]) * length
    _record_step(place, f"{length} tokens", seconds, length, work, peak)


def loss(place: Place) -> None:
    """Losses of 4,096 tokens over 256,000 tokens of vocabulary with their gradients: time and memory."""
    import torch
    from torch.nn import functional as F

    from minitron.ops.kl import linear_divergence
    from minitron.ops.loss import linear_cross_entropy

    rows, vocab = place.pick(4096, 8), place.pick(256_000, 500)
    widths = place.pick(3072, 16), place.pick(6144, 32)
    made = {"device": place.device, "dtype": torch.bfloat16}
    hidden = [torch.randn(rows, width, **made).requires_grad_(at == 0) for at, width in enumerate(widths)]
    heads = [(torch.randn(vocab, width, **made) * width**-0.5) for width in widths]
    heads[0].requires_grad_()
    labels = torch.randint(vocab, (rows,), device=place.device)
    losses: dict[str, Callable[[], Any]] = {
        "minitron cross entropy": lambda: linear_cross_entropy(hidden[0], heads[0], labels),
        "minitron kl": lambda: linear_divergence(hidden[0], heads[0], hidden[1], heads[1], labels).loss,
        "torch cross entropy, whole logits": lambda: F.cross_entropy((hidden[0] @ heads[0].T).float(), labels),
    }
    if hasattr(F, "linear_cross_entropy"):
        losses["torch linear_cross_entropy"] = lambda: F.linear_cross_entropy(hidden[0], heads[0], labels)
    liger = _liger()
    if liger is not None:
        losses["liger cross entropy"] = lambda: liger(heads[0], hidden[0], labels)
    for name, compute in losses.items():

        def run(compute: Callable[[], Any] = compute) -> None:
            hidden[0].grad = heads[0].grad = None
            compute().backward()

        try:
            place.record(name, {"ms": 1e3 * place.seconds(run), "bytes": place.peak_bytes(run)})
        except RuntimeError as error:  # out of memory, or a kernel that the device does not run
            place.record(name, {"error": str(error).splitlines()[0]})


def train(place: Place) -> None:
    """A whole step (forward, backward, AdamW) of the training loop on half of the 4B shape's layers."""
    import numpy as np

    from minitron.data.packing import BlockStream, PackedBlocks
    from minitron.data.token_cache import TokenCache
    from minitron.train.inputs import new_model
    from minitron.train.objective import Objective, next_token_loss
    from minitron.train.parallel import prepare
    from minitron.train.schedule import TrainConfig
    from minitron.train.trainer import Trainer
    from minitron.world import World

    sequence, random = place.pick(4096, 32), np.random.default_rng(0)
    shape = place.config(num_hidden_layers=16)
    lengths = random.integers(50, 500, 400)
    tokens = random.integers(0, shape.vocab_size, lengths.sum()).astype(np.uint32)
    cache = TokenCache(tokens, np.concatenate([[0], np.cumsum(lengths)]), lengths, "random")
    config = TrainConfig(steps=1000, batch=1, sequence=sequence)
    objective = Objective(new_model(shape, seed=0).to(place.device), next_token_loss)
    prepare(objective, config, World())
    trainer = Trainer(objective, BlockStream([(PackedBlocks(cache, sequence), 1.0)], 0), config, Path())
    seconds, peak = place.seconds(trainer.step), place.peak_bytes(trainer.step)
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    _record_step(place, f"{count / 1e9:.2f}B parameters", seconds, sequence, 6 * count * sequence, peak)


def study(place: Place) -> None:
    """See `gpu_study`."""
    from gpu_study import study

    study(place)


# --- what steps share --------------------------------------------------------------------------------------------


def _model(place: Place, zeros: float, preset: str = "minitron-4b", trained: bool = False) -> Any:
    """A model of random bf16 weights on the device, of which a share of MLP neurons is zero."""
    from minitron.bench.measure import random_model

    model = random_model(place.config(preset), zeros, device=place.device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.train() if trained else model.requires_grad_(False)


def _upstream(model: Any) -> Any:
    """The same weights, in the same memory, in transformers' own class."""
    import torch
    from transformers.models.nemotron import modeling_nemotron as upstream

    with torch.device("meta"):
        found = upstream.NemotronForCausalLM(upstream.NemotronConfig(**model.config.to_dict()))
    found.load_state_dict(model.state_dict(), assign=True)
    found.model.rotary_emb = upstream.NemotronRotaryEmbedding(found.config).to(model.device)
    found.generation_config = model.generation_config
    return found.eval()


def _weights(model: Any, format: str | None = None) -> Any:
    from minitron.engine.cuda.weights import device_weights

    return device_weights(model, format)


def _kinds(model: Any) -> list[str]:
    """Which pieces of a step can run: torch operations, and Triton kernels where there are some."""
    from minitron.engine.cuda.triton_steps import why_no_kernels

    reason = why_no_kernels(_weights(model))
    if reason:
        print(f"no Triton kernels: {reason}", flush=True)
    return ["torch"] if reason else ["triton", "torch"]


def _record_engine(place: Place, name: str, model: Any, batch: int, kind: str, format: str | None = None) -> None:
    """Tokens per second of our engine, beside what the memory would allow."""
    import torch

    from minitron.engine.cuda.engine import CudaEngine
    from minitron.engine.cuda.steps import TorchSteps

    weights, prompt = _weights(model, format), place.pick(PROMPT, 8)
    count = place.pick(NEW_TOKENS, 4)
    engine = CudaEngine(weights, prompt + 8 + count, batch, steps=TorchSteps() if kind == "torch" else None)
    ids, slots = torch.randint(model.config.vocab_size, (prompt,)).tolist(), list(range(batch))
    times = []
    for _ in range(place.pick(4, 1)):
        for slot in slots:
            engine.truncate(0, slot)
            engine.prefill(ids, slot)
        last = engine.greedy([ids[-1]] * batch, 8, (), slots)[-1]  # captured here, at the first time
        place.synchronize()
        start = time.perf_counter()
        engine.greedy(last, count - 1, (), slots)
        place.synchronize()
        times.append((time.perf_counter() - start) / (count - 1))
    seconds = min(times)
    bytes_of_all = weights.bytes_per_token(1.0)
    found = {"tokens_per_s": batch / seconds, "ms_per_step": 1e3 * seconds, "dense_bytes": bytes_of_all}
    bandwidth = next((value for part, value in BANDWIDTH.items() if part in place.name()), None)
    if bandwidth is not None:
        found["dense_floor_steps_per_s"] = bandwidth / bytes_of_all
        found["share_of_dense_floor"] = bytes_of_all / bandwidth / seconds
    place.record(name, found)


def _prompt(place: Place, vocab: int) -> Any:
    import torch

    return torch.randint(vocab, (1, place.pick(PROMPT, 8)), device=place.device)


def _upstream_generate(model: Any, ids: Any, count: int, **settings: Any) -> None:
    import torch

    given = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids), **settings}
    model.generate(ids, max_new_tokens=count, min_new_tokens=count, **given)


def _generate_rate(place: Place, model: Any, ids: Any, count: int, **settings: Any) -> dict[str, float]:
    """Tokens per second after the prompt: a long run of `generate` less a short one."""
    times = [place.seconds(lambda n=n: _upstream_generate(model, ids, n, **settings), 2) for n in (count, count // 4)]
    seconds = max(1e-9, times[0] - times[1]) / (count - count // 4)
    return {"tokens_per_s": len(ids) / seconds, "ms_per_step": 1e3 * seconds}


def _record_step(place: Place, name: str, seconds: float, tokens: int, work: float, peak: int) -> None:
    from minitron.train.machine import known_peak

    peak_flops = known_peak(place.name(), "bfloat16")
    found = {"seconds": seconds, "tokens_per_s": tokens / seconds, "flop_per_s": work / seconds, "peak_bytes": peak}
    if peak_flops is not None:
        found["mfu"] = work / seconds / peak_flops
    place.record(name, found)


def _liger() -> Any:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss()


# --- the run -----------------------------------------------------------------------------------------------------


def watch(command: list[str], log: Path, limit: float) -> dict[str, Any]:
    """Run a command for at most `limit` seconds; its output goes to `log`. How it ended, and how long it took."""
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = f"exit status {code}" if (code := process.wait(limit)) else "done"
        except subprocess.TimeoutExpired:
            _end_group(process)
            status = f"stopped after {limit:.0f} s"
    return {"status": status, "seconds": round(time.perf_counter() - start, 1)}


def _end_group(process: subprocess.Popen[Any]) -> None:
    """End a process and those that it has started."""
    import os
    import signal

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(names: list[str], smoke: bool, out: Path, seconds: float = SECONDS) -> dict[str, Any]:
    """Run steps one after the other and write what is known after each."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"weights": "random", "smoke": smoke, "steps": {}}
    end = time.perf_counter() + seconds
    for name in names:
        left = end - time.perf_counter()
        kept = out / f"{name}.json"
        kept.unlink(missing_ok=True)
        if left < 10:
            results["steps"][name] = {"status": "skipped: no time is left"}
        else:
            limit = min(STEPS[name], left)
            command = [sys.executable, str(Path(__file__).resolve()), "--step", name, "--limit", str(limit)]
            command += ["--out", str(out), *(["--smoke"] if smoke else [])]
            found = watch(command, out / f"{name}.log", limit)
            found["found"] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
            results["steps"][name] = found
        print(name, results["steps"][name]["status"], flush=True)
        (out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, with commas between them")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of the results")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=SECONDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.smoke:
        from minitron.engine.cuda.device import why_no_cuda

        reason = why_no_cuda()
        if reason:
            raise SystemExit(f"the GPU's tests and benchmarks cannot run here: {reason}")
    if args.step is not None:
        globals()[args.step](Place(args.smoke, args.out / f"{args.step}.json", args.limit))
        return
    names = args.only.split(",")
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise SystemExit(f"--only names {unknown[0]!r}; steps are {', '.join(STEPS)}")
    results = run_all(names, args.smoke, args.out)
    if any(step["status"] != "done" for step in results["steps"].values()):
        raise SystemExit(f"some steps did not end well; see {args.out}/gpu.json and the logs beside it")


if __name__ == "__main__":
    main()
