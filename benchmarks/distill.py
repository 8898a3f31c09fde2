"""The losses of distillation at a vocabulary of 256,000: memory and speed; and what sparse caches are worth.

    python benchmarks/distill.py loss                memory of loss + gradients, and of others, 256 tokens
    python benchmarks/distill.py speed --vocab 64000 seconds of the same in turns, with a smaller vocabulary
    python benchmarks/distill.py memory              the same of ours alone for 4,096 tokens
    python benchmarks/distill.py step                a distillation step against a loop with full logits
    python benchmarks/distill.py cache               a step by a hidden-state cache against one by the teacher
    python benchmarks/distill.py sparse --data DIR   held-out KL after training on sampled, top-k and whole targets
    python benchmarks/distill.py loss --smoke        small shapes, seconds; the numbers mean nothing

Memory is the growth of the peak resident size over its size with the inputs, in a process of its own per case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import describe, peak_resident, reset_peak
from torch.nn import functional as F

from minitron import NemotronConfig, NemotronForCausalLM, bundled_model
from minitron.data.documents import Source
from minitron.data.packing import BlockStream, PackedBlocks, collate, split_documents
from minitron.data.token_cache import TokenCache, tokenize
from minitron.distill.losses import DistillLoss, DistillOptions
from minitron.distill.targets import OnlineTeacher
from minitron.distill.teacher_cache import make_codec, open_targets, plan_cache, write_cache
from minitron.ops.kl import linear_divergence
from minitron.ops.loss import linear_cross_entropy
from minitron.ops.packed_attention import packed_attention_in
from minitron.tokenizer import load_tokenizer
from minitron.train.loop import train
from minitron.train.machine import autocast, keep_freed_memory
from minitron.train.objective import Objective
from minitron.train.schedule import TrainConfig
from minitron.train.trainer import Trainer

HEADS = {"vocab": 256000, "hidden": 3072, "teacher": 6144}
SMOKE_HEADS = {"vocab": 2000, "hidden": 32, "teacher": 64}
# 256,000 tokens: 98M parameters in the two embeddings of a student 192 wide, 3M in its layers.
STUDENT = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
TEACHER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}


# --- loss + gradients --------------------------------------------------------------------------------------------


def textbook_kl(hidden, weight, teacher_hidden, teacher_weight, labels):
    s, t = (hidden @ weight.t()).float(), (teacher_hidden @ teacher_weight.t()).float()
    return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="sum") / len(labels)


LOSSES = {
    "minitron kl": lambda *x: linear_divergence(*x).loss,
    "textbook kl": textbook_kl,
    "minitron ce": lambda h, w, _h, _w, y: linear_cross_entropy(h, w, y),
    "torch ce": lambda h, w, _h, _w, y: F.linear_cross_entropy(h, w, y),
    "torch ce accurate": lambda h, w, _h, _w, y: F.linear_cross_entropy(
        h, w, y, options=torch.nn.LinearCrossEntropyOptions(acc_policy="accurate")
    ),
}


def loss_inputs(task: dict) -> tuple:
    torch.manual_seed(0)
    rows, vocab = task["rows"], task["vocab"]

    def noise(*shape: int):
        out = torch.empty(*shape, dtype=torch.bfloat16)
        for part in out.split(4096):
            part.copy_(torch.randn(part.shape) * shape[-1] ** -0.5)
        return out

    heads = noise(vocab, task["hidden"]).requires_grad_(), noise(vocab, task["teacher"])
    hidden = [torch.randn(rows, width).bfloat16() for width in (task["hidden"], task["teacher"])]
    hidden[0].requires_grad_()
    return hidden[0], heads[0], hidden[1], heads[1], torch.randint(0, vocab, (rows,))


def _seconds_of_loss(name: str, inputs: tuple) -> float:
    inputs[0].grad = inputs[1].grad = None
    return _seconds_of(lambda: LOSSES[name](*inputs).backward())


def loss_case(task: dict) -> dict:
    inputs = loss_inputs(task)
    # Libraries load parts of themselves at the first use.
    small = [x.detach()[:64].requires_grad_(i < 2) for i, x in enumerate(inputs[:4])]
    LOSSES[task["loss"]](*small, inputs[4][:64] % 64).backward()
    del small
    reset_peak()
    before = peak_resident()
    seconds = _seconds_of_loss(task["loss"], inputs)
    return {"loss": task["loss"], "rows": task["rows"], "seconds": seconds, "bytes": peak_resident() - before}


def speed_case(task: dict) -> dict:
    """Losses in turns, in one process: how often as fast ours is, as the median of the rounds' own ratios."""
    inputs = loss_inputs(task)
    times = [{name: _seconds_of_loss(name, inputs) for name in LOSSES} for _ in range(task["rounds"] + 1)][1:]
    result: dict = {"rows": task["rows"], "seconds": {n: statistics.median(t[n] for t in times) for n in LOSSES}}
    for name in LOSSES:
        ours = "minitron kl" if name.endswith("kl") else "minitron ce"
        if name != ours:
            ratios = [t[name] / t[ours] for t in times]
            spread = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            result[f"speedup over {name} (quartiles)"] = spread
    return result


# --- a whole step ------------------------------------------------------------------------------------------------


def step_case(task: dict) -> dict:
    torch.manual_seed(0)
    vocab = {"vocab_size": task["vocab"], "num_key_value_heads": 2}
    teacher = NemotronForCausalLM(NemotronConfig(**TEACHER, **vocab)).bfloat16().requires_grad_(False)
    student = NemotronForCausalLM(NemotronConfig(**STUDENT, **vocab)).bfloat16()
    batch = collate([[torch.randint(3, task["vocab"], (task["rows"],)).numpy()]], task["rows"])
    ours = DistillLoss(OnlineTeacher(teacher), DistillOptions(), student.config)
    reset_peak()
    before, times = peak_resident(), []
    for _ in range(task["rounds"]):
        student.zero_grad()
        start = time.perf_counter()
        if task["loss"] == "minitron":
            loss, _ = ours(student, batch)
        else:  # as in the distillation examples of transformers: whole logits of both, KL in fp32
            with torch.no_grad():
                t = teacher(batch.input_ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            s = student(batch.input_ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            loss = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
        loss.backward()
        times.append(time.perf_counter() - start)
    return {
        "loop": task["loss"],
        "rows": task["rows"],
        "seconds": min(times),
        "tokens_per_second": task["rows"] / min(times),
        "bytes_over_the_models": peak_resident() - before,
        "value": loss.item(),
    }


# --- a cache against the teacher ---------------------------------------------------------------------------------


def random_stream(vocab: int, tokens: int, sequence: int) -> BlockStream:
    random = np.random.default_rng(0)
    lengths = random.integers(50, 500, tokens // 275 + 1)
    ids = random.integers(3, vocab, lengths.sum()).astype(np.uint32)
    cache = TokenCache(ids, np.concatenate([[0], np.cumsum(lengths)]), lengths, "random")
    return BlockStream([(PackedBlocks(cache, sequence), 1.0)], 0)


def cache_case(task: dict) -> dict:
    """Seconds per step with the teacher and with its cache in turns, and what writing the cache took and takes."""
    torch.manual_seed(0)
    keep_freed_memory()
    if task["pair"] == "bundled":
        teacher = NemotronForCausalLM.from_pretrained(bundled_model(), dtype=torch.bfloat16)
        half = {**teacher.config.to_dict(), "num_hidden_layers": 3, "hidden_size": 224, "intermediate_size": 704}
        config = NemotronConfig(**half)
    else:
        shared = {"vocab_size": task["vocab"], "num_key_value_heads": 2}
        teacher = NemotronForCausalLM(NemotronConfig(**TEACHER, **shared)).bfloat16()
        config = NemotronConfig(**STUDENT, **shared)
    teacher.requires_grad_(False)
    sequence, batch = task["sequence"], task["batch"]
    stream = random_stream(config.vocab_size, batch * sequence, sequence)
    settings = TrainConfig(steps=1000, batch=batch, sequence=sequence)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "cache"
        plan = plan_cache(stream, teacher, make_codec("hidden", teacher), "")
        start = time.perf_counter()
        with autocast(torch.device("cpu"), settings.dtype):
            write_cache(folder, plan, stream, teacher)
        written = time.perf_counter() - start
        size = sum(path.stat().st_size for path in folder.glob("part-*"))
        jobs = []
        for targets in (OnlineTeacher(teacher), open_targets(folder, stream)):
            objective = Objective(NemotronForCausalLM(config), DistillLoss(targets, DistillOptions(), config))
            jobs.append(Trainer(objective, stream, settings, Path(work)))
        with packed_attention_in(*(trainer.model for trainer in jobs)):
            times = [[_seconds_of(trainer.step) for trainer in jobs] for _ in range(task["rounds"] + 1)][1:]
    online, cached = (statistics.median(column) for column in zip(*times, strict=True))
    tokens = batch * sequence
    written_per_step = written * tokens / (len(plan.indices) * sequence)
    saved = online - cached
    return {
        "pair": task["pair"],
        "tokens": tokens,
        "online_s": online,
        "cached_s": cached,
        "speedup": statistics.median(a / b for a, b in times),
        "writing_s_per_step": written_per_step,
        "bytes_per_token": size / (len(plan.indices) * sequence),
        # A cache that is written in one pass has paid for itself after so many passes over the text.
        "passes_until_it_pays": written_per_step / saved if saved > 0 else None,
    }


def _seconds_of(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# --- sparse targets ----------------------------------------------------------------------------------------------


def sparse(data: str, smoke: bool, steps: int, seed: int) -> list[dict]:
    """One student per kind of target, from the same weights on the same blocks; held-out KL to the teacher."""
    folder = Path(bundled_model())
    teacher = NemotronForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shape = {**teacher.config.to_dict(), "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}
    settings = TrainConfig(
        steps=steps,
        batch=8,
        sequence=128,
        lr=3e-3,
        warmup=steps // 10,
        save_every=0,
        eval_every=0,
        seed=seed,
        dtype="float32",
    )
    rows = []
    with tempfile.TemporaryDirectory() as work:
        out = Path(work)
        tokens = tokenize(Source(data), load_tokenizer(folder), out / "tokens")  # type: ignore[arg-type]
        kept, held = split_documents(tokens, 0.1, 0, data)
        stream = BlockStream([(PackedBlocks(tokens, 128, kept), 1.0)], seed)
        heldout = PackedBlocks(tokens, 128, held)
        blocks = min(len(stream), steps * 8)
        for name, kind, more in (
            ("whole (online)", None, {}),
            ("whole (hidden states)", "hidden", {}),
            ("sampled, 50", "sampled", {"samples": 50}),
            ("top-k, equal bytes", "topk", {}),
        ):
            targets, size = OnlineTeacher(teacher), 0.0
            if kind is not None:
                if kind == "topk":  # as many tokens as fit into the bytes of the samples
                    more = {"k": max(1, int((rows[-1]["bytes_per_token"] - 5) / 5))}
                codec = make_codec(kind, teacher, **more)
                plan = plan_cache(stream, teacher, codec, "", blocks=blocks, seed=seed)
                write_cache(out / kind, plan, stream, teacher)
                size = sum(p.stat().st_size for p in (out / kind).glob("part-*")) / (blocks * 128)
                targets = open_targets(out / kind, stream)
            torch.manual_seed(seed)
            student = NemotronForCausalLM(NemotronConfig(**shape))
            start = time.perf_counter()
            loss = DistillLoss(targets, DistillOptions(), student.config)
            train(student, stream, settings, out / f"run-{kind}", loss=loss, quiet=True)
            seconds = time.perf_counter() - start
            measure = DistillLoss(OnlineTeacher(teacher), DistillOptions(), student.config)
            with torch.no_grad():
                student.eval()
                several = [heldout.pieces(i) for i in range(min(len(heldout), 8 if smoke else 256))]
                _, numbers = measure(student, collate(several, 128))
            measured = {key: float(value) for key, value in numbers.items()}
            rows.append(
                {"targets": name, "seed": seed, **more, "bytes_per_token": size, "seconds": seconds, **measured}
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


# --- the command -------------------------------------------------------------------------------------------------


CASES = {"loss": loss_case, "speed": speed_case, "memory": loss_case, "step": step_case, "cache": cache_case}


def in_own_process(kind: str, task: dict, smoke: bool) -> dict:
    if smoke:  # starting processes is most of the time, and the numbers mean nothing
        return CASES[kind](task)
    command = [sys.executable, __file__, kind, "--case", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loss", "speed", "memory", "step", "cache", "sparse"])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--data", help="text for `sparse`")
    parser.add_argument("--steps", type=int, default=400, help="training steps of `sparse`")
    parser.add_argument("--seeds", type=int, default=1, help="runs of `sparse`, each of all targets")
    parser.add_argument("--vocab", type=int, help="another vocabulary than 256,000")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(CASES[args.what](json.loads(args.case))))
        return
    result: dict = {"machine": describe("cpu", args.smoke)}
    heads = dict(SMOKE_HEADS if args.smoke else HEADS)
    heads["vocab"] = args.vocab or heads["vocab"]
    if args.what in ("loss", "memory"):
        few, many = (16, 64) if args.smoke else (256, 4096)
        tasks = [(name, few) for name in LOSSES] if args.what == "loss" else [("minitron kl", many)]
        result["weights"], result["shape"] = "random", heads
        result["rows"] = [
            in_own_process("loss", {"loss": name, "rows": rows, **heads}, args.smoke) for name, rows in tasks
        ]
    elif args.what == "speed":
        result["weights"], result["shape"] = "random", heads
        task = {"rows": 16 if args.smoke else 256, "rounds": 1 if args.smoke else 5, **heads}
        result["rows"] = [in_own_process("speed", task, args.smoke)]
    elif args.what == "step":
        task = {"vocab": heads["vocab"], "rows": 32 if args.smoke else 1024, "rounds": 2}
        result["weights"], result["shape"] = "random", {"student": STUDENT, "teacher": TEACHER, "vocab": task["vocab"]}
        result["rows"] = [
            in_own_process("step", {"loss": name, **task}, args.smoke) for name in ("minitron", "full logits")
        ]
    elif args.what == "cache":
        size = {"sequence": 32, "batch": 2, "rounds": 1} if args.smoke else {"sequence": 512, "batch": 2, "rounds": 5}
        result["rows"] = [
            in_own_process("cache", {"pair": pair, "vocab": heads["vocab"], **size, **more}, args.smoke)
            for pair, more in (("bundled", {} if args.smoke else {"batch": 8}), ("100M", {}))
        ]
    else:
        result["steps"] = args.steps
        result["rows"] = [row for seed in range(args.seeds) for row in sparse(args.data, args.smoke, args.steps, seed)]
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
