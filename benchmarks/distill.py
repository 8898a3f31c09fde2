"""The losses of distillation at a vocabulary of 256,000: memory and speed; and what sparse caches are worth.

    python benchmarks/distill.py loss                time and memory of loss + gradients, and of others, 256 tokens
    python benchmarks/distill.py memory              the same of ours alone for 4,096 tokens
    python benchmarks/distill.py step                a distillation step against a loop with full logits
    python benchmarks/distill.py sparse --data DIR   held-out KL after training on sampled, top-k and whole targets
    python benchmarks/distill.py loss --smoke        small shapes, seconds; the numbers mean nothing

Memory is the growth of the peak resident size over that of the inputs, in a process of its own per case.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import describe
from model_speed import peak_resident
from torch.nn import functional as F

from minitron import NemotronConfig, NemotronForCausalLM, bundled_model
from minitron.data import BlockStream, PackedBlocks, Source, collate, split_documents, tokenize
from minitron.distill.losses import DistillLoss, DistillOptions
from minitron.distill.schedule import TrainConfig
from minitron.distill.targets import OnlineTeacher
from minitron.distill.teacher_cache import make_codec, open_targets, plan_cache, write_cache
from minitron.distill.train import train
from minitron.ops.kl import linear_divergence
from minitron.ops.loss import linear_cross_entropy
from minitron.tokenizer import load_tokenizer

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


def loss_case(task: dict) -> dict:
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
    labels = torch.randint(0, vocab, (rows,))
    inputs = (hidden[0], heads[0], hidden[1], heads[1], labels)
    before, times = peak_resident(), []
    for _ in range(task["rounds"]):
        hidden[0].grad = heads[0].grad = None
        start = time.perf_counter()
        loss = LOSSES[task["loss"]](*inputs)
        loss.backward()
        times.append(time.perf_counter() - start)
    return {"loss": task["loss"], "rows": rows, "seconds": min(times), "bytes": peak_resident() - before}


# --- a whole step ------------------------------------------------------------------------------------------------


def step_case(task: dict) -> dict:
    torch.manual_seed(0)
    vocab = {"vocab_size": task["vocab"], "num_key_value_heads": 2}
    teacher = NemotronForCausalLM(NemotronConfig(**TEACHER, **vocab)).bfloat16().requires_grad_(False)
    student = NemotronForCausalLM(NemotronConfig(**STUDENT, **vocab)).bfloat16()
    batch = collate([[torch.randint(3, task["vocab"], (task["rows"],)).numpy()]], task["rows"])
    ours = DistillLoss(OnlineTeacher(teacher), DistillOptions(), student.config)
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


# --- sparse targets ----------------------------------------------------------------------------------------------


def sparse(data: str, smoke: bool, steps: int) -> list[dict]:
    """One student per kind of target, from the same weights on the same blocks; held-out KL to the teacher."""
    folder = Path(bundled_model())
    teacher = NemotronForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shape = {**teacher.config.to_dict(), "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}
    settings = TrainConfig(
        steps=steps, batch=8, sequence=128, lr=3e-3, warmup=steps // 10, save_every=0, eval_every=0, dtype="float32"
    )
    rows = []
    with tempfile.TemporaryDirectory() as work:
        out = Path(work)
        tokens = tokenize(Source(data), load_tokenizer(folder), out / "tokens")  # type: ignore[arg-type]
        kept, held = split_documents(tokens, 0.1, 0, data)
        stream = BlockStream([(PackedBlocks(tokens, 128, kept), 1.0)], 0)
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
                write_cache(out / kind, plan_cache(stream, teacher, codec, "", blocks=blocks), stream, teacher)
                size = sum(p.stat().st_size for p in (out / kind).glob("part-*")) / (blocks * 128)
                targets = open_targets(out / kind, stream)
            torch.manual_seed(0)
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
            rows.append({"targets": name, **more, "bytes_per_token": size, "seconds": seconds, **numbers})
            print(json.dumps(rows[-1]), flush=True)
    return rows


# --- the command -------------------------------------------------------------------------------------------------


def in_own_process(kind: str, task: dict, smoke: bool) -> dict:
    if smoke:  # starting processes is most of the time, and the numbers mean nothing
        return (step_case if kind == "step" else loss_case)(task)
    command = [sys.executable, __file__, kind, "--case", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loss", "memory", "step", "sparse"])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--data", help="text for `sparse`")
    parser.add_argument("--steps", type=int, default=400, help="training steps of `sparse`")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps((step_case if args.what == "step" else loss_case)(json.loads(args.case))))
        return
    result: dict = {"machine": describe("cpu", args.smoke)}
    heads = SMOKE_HEADS if args.smoke else HEADS
    if args.what in ("loss", "memory"):
        few, many = (16, 64) if args.smoke else (256, 4096)
        tasks = [(name, few, 2) for name in LOSSES] if args.what == "loss" else [("minitron kl", many, 1)]
        result["weights"], result["shape"] = "random", heads
        result["rows"] = [
            in_own_process("loss", {"loss": name, "rows": rows, "rounds": rounds, **heads}, args.smoke)
            for name, rows, rounds in tasks
        ]
    elif args.what == "step":
        task = {"vocab": heads["vocab"], "rows": 32 if args.smoke else 1024, "rounds": 2}
        result["weights"], result["shape"] = "random", {"student": STUDENT, "teacher": TEACHER, "vocab": task["vocab"]}
        result["rows"] = [
            in_own_process("step", {"loss": name, **task}, args.smoke) for name in ("minitron", "full logits")
        ]
    else:
        result["rows"] = sparse(args.data, args.smoke, args.steps)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
