"""Fine-tuning on the CPU beside TRL: tokens/s and memory, for conversations (SFTTrainer) and preferences (DPOTrainer).

    python benchmarks/finetune.py --model smollm2 --tune lora
    python benchmarks/finetune.py --task dpo --vocabulary 256000 --rounds 1
    python benchmarks/finetune.py --smoke            a tiny model, seconds; the numbers mean nothing

Each side is a process of its own, so that its peak memory is its own. The sides take turns, a step each; ratios are
medians of the rounds' own. All sides learn the same rows in fp32, about as many tokens a step; what is counted are
tokens of the rows, without padding. `trl` has TRL's defaults, which recompute the layers in the backward pass
(gradient checkpointing); `trl-kept` keeps the activations, as this package does; `trl-packed` also packs rows.
`--vocabulary` takes a random Nemotron model with so many tokens in place of MODEL.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import describe, peak_resident

SIDES = ("minitron", "trl", "trl-kept", "trl-packed")
TOPICS = Path(__file__).parents[1] / "examples" / "topics.jsonl"
MEAN_TOKENS = 128
"""Of a row, about: rows of a step of TRL are `--tokens` over this; pairs count double."""


def main() -> None:
    """Measure and print, or be one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("chat", "dpo"), default="chat")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--vocabulary", type=int, help="a random model with so many tokens")
    parser.add_argument("--tune", choices=("full", "lora"), default="full")
    parser.add_argument("--tokens", type=int, default=1024, help="of a step, about")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="minitron first; by default all of the task")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.smoke:
        given.model, given.tokens, given.sequence, given.rounds, given.rows = "bundled-half", 256, 128, 1, 20
    if given.side is not None:
        _answer(_minitron_steps(given) if given.side == "minitron" else _trl_steps(given))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = _compare(given, Path(folder))
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _compare(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    (folder / "rows").mkdir()
    for name, rows in _rows(given.task, given.sequence, given.rows).items():
        (folder / f"rows/{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    _write_model(given, folder / "model")
    names = given.sides or (SIDES if given.task == "chat" else SIDES[:3])
    options = [f"--{name}={getattr(given, name)}" for name in ("task", "tune", "tokens", "sequence", "rounds")]
    sides = {name: _Side(name, folder, options) for name in names}
    found: dict[str, dict[str, Any]] = {name: side.answer() for name, side in sides.items()}
    rounds = []
    for number in range(given.rounds + 1):
        order = names[:: 1 if number % 2 else -1]
        rounds.append({name: sides[name].step() for name in order})
        times = ", ".join(f"{name} {step['tokens'] / step['seconds']:.1f}" for name, step in rounds[-1].items())
        print(f"round {number}, tokens/s: {times}", file=sys.stderr)
    speeds = {name: [each[name]["tokens"] / each[name]["seconds"] for each in rounds[1:]] for name in names}
    for name, side in sides.items():
        found[name] |= {"tokens_per_s": statistics.median(speeds[name]), "peak_bytes": side.end()["peak_bytes"],
                        "tokens": [each[name]["tokens"] for each in rounds[1:]]}  # fmt: skip
    for name in names[1:]:
        ratios = [ours / theirs for ours, theirs in zip(speeds["minitron"], speeds[name], strict=True)]
        found[name]["minitron_speed_ratio"] = statistics.median(ratios)
        found[name]["minitron_memory_ratio"] = found["minitron"]["peak_bytes"] / found[name]["peak_bytes"]
    how = {name: getattr(given, name) for name in ("task", "model", "vocabulary", "tune", "sequence", "rounds")}
    return {"machine": describe("cpu", smoke=True), **how, "sides": found}


class _Side:
    """A process that takes a step when it is asked to."""

    def __init__(self, name: str, folder: Path, options: list[str]) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--side", name, "--folder", str(folder), *options],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Its next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        raise SystemExit(f"a side ended early:\n{self.log.read_text()[-3000:]}")

    def end(self) -> dict[str, Any]:
        """What it says at its end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        found = self.answer()
        self.process.wait()
        return found


def _rows(task: str, sequence: int, count: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of random words, as long as those of chats: (this package's form, TRL's form)."""
    words = sorted({word for line in TOPICS.read_text(encoding="utf-8").splitlines() for word in line.split()[1:]})
    words = [word for word in words if word.isalpha()]
    draw = random.Random(0)

    def said(role: str, median: int) -> dict[str, str]:
        length = min(int(median * draw.lognormvariate(0, 0.7)) + 1, sequence // 5)
        return {"role": role, "content": " ".join(draw.choices(words, k=length))}

    asked = [said("user", 30) for _ in range(count)]
    if task == "dpo":
        rows: list[dict[str, Any]] = [
            {"prompt": [turn], "chosen": [said("assistant", 60)], "rejected": [said("assistant", 60)]} for turn in asked
        ]
        return {"minitron": rows, "trl": rows}
    replies = [said("assistant", 60) for _ in asked]
    return {
        "minitron": [{"messages": [turn, reply]} for turn, reply in zip(asked, replies, strict=True)],
        "trl": [{"prompt": [turn], "completion": [reply]} for turn, reply in zip(asked, replies, strict=True)],
    }


def _write_model(given: argparse.Namespace, folder: Path) -> None:
    """A checkpoint in fp32 with its tokenizer, which every side loads."""
    from minitron import NemotronConfig
    from minitron.loading import checkpoint_folder
    from minitron.tokenizer import load_tokenizer
    from minitron.train.inputs import new_model, saved_model

    source = checkpoint_folder("bundled" if given.vocabulary else given.model)
    if given.vocabulary:
        shape = NemotronConfig(given.vocabulary, 128, 512, 2, 4, 32, 2, max_position_embeddings=given.sequence)
        model: Any = new_model(shape, seed=0)
    else:
        model = saved_model(source, "cpu")
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)


# --- a side ------------------------------------------------------------------------------------------------------


def _answer(steps: Iterator[dict[str, Any]]) -> None:
    """Take a step for each line of stdin, of which the first prepares; then the peak of memory."""
    answers, sys.stdout = sys.stdout, sys.stderr  # where libraries print
    for found in steps:
        print(json.dumps(found), file=answers, flush=True)
    print(json.dumps({"peak_bytes": peak_resident()}), file=answers, flush=True)


def _minitron_steps(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import torch

    from minitron.data.examples import RowFormat
    from minitron.ops.packed_attention import packed_attention_in
    from minitron.tokenizer import load_tokenizer
    from minitron.train.machine import keep_freed_memory
    from minitron.train.objective import Objective
    from minitron.train.parallel import prepare
    from minitron.train.schedule import TrainConfig
    from minitron.train.trainer import Trainer
    from minitron.tune.job import prepare_job
    from minitron.tune.task import Inputs, TuneOptions
    from minitron.world import World

    keep_freed_memory()
    started = time.perf_counter()
    folder = given.folder / "model"
    options = TuneOptions(given.task, (str(given.folder / "rows/minitron.jsonl"),), share=0.0, rows=RowFormat(),
                          tune=given.tune)  # fmt: skip
    job = prepare_job(
        Inputs(folder, load_tokenizer(folder), options, given.sequence, 0, torch.device("cpu"), lambda _: None,
               given.folder / "cache")
    )  # fmt: skip
    batch = given.tokens // (given.sequence if given.task == "chat" else 2 * MEAN_TOKENS)
    config = TrainConfig(steps=1000, batch=batch, sequence=given.sequence, lr=1e-4, warmup=0, dtype="float32")
    objective = Objective(job.model.train(), job.loss)
    prepare(objective, config, World())
    trainer = Trainer(objective, job.stream, config, Path())
    yield {"preparation_s": time.perf_counter() - started}
    with packed_attention_in(*objective.trained_models()):
        for _ in sys.stdin:
            tokens = sum(map(_row_tokens, job.stream.batches(trainer.state.blocks, batch, batch)))
            start = time.perf_counter()
            trainer.step()
            yield {"seconds": time.perf_counter() - start, "tokens": tokens}


def _row_tokens(batch: Any) -> int:
    """Tokens without padding; that of a packed block is the piece after the last learned token."""
    if hasattr(batch, "attention_mask"):
        return int(batch.attention_mask.sum())
    learned = (batch.labels != -100).long()
    return int(sum(int(row.nonzero()[-1]) + 1 for row in learned))


def _trl_steps(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """TRL's trainer in a thread, which waits before each step until it is asked for."""
    import queue
    import threading

    asked: queue.Queue[bool] = queue.Queue()
    done: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()

    def work() -> None:
        try:
            _train_with_trl(given, asked, done)
        except BaseException as error:
            done.put(error)
            raise

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result() -> dict[str, Any]:
        found = done.get()
        if isinstance(found, BaseException):
            raise SystemExit(1)
        return found

    yield result()
    for _ in sys.stdin:
        asked.put(True)
        yield result()


def _train_with_trl(given: argparse.Namespace, asked: Any, done: Any) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    started = time.perf_counter()
    folder = given.folder / "model"
    rows = [json.loads(line) for line in (given.folder / "rows/trl.jsonl").read_text().splitlines()]
    packed = given.side == "trl-packed"
    each = given.sequence if packed else MEAN_TOKENS * (1 if given.task == "chat" else 2)
    own: dict[str, Any] = {"packing": packed, "completion_only_loss": True} if given.task == "chat" else {}
    settings = (SFTConfig if given.task == "chat" else DPOConfig)(
        output_dir=str(given.folder / given.side), per_device_train_batch_size=given.tokens // each,
        max_steps=given.rounds + 1, max_length=given.sequence, learning_rate=1e-4, bf16=False, use_cpu=True,
        gradient_checkpointing=given.side == "trl", save_strategy="no", report_to=[], disable_tqdm=True,
        seed=0, **own,
    )  # fmt: skip
    counted = {"tokens": 0, "start": 0.0}
    base: Any = SFTTrainer if given.task == "chat" else DPOTrainer

    class Counted(base):
        def training_step(self, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
            mask = inputs.get("attention_mask")
            counted["tokens"] = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            return super().training_step(model, inputs, *args, **more)

    class Asked(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            asked.get()
            counted["start"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.put({"seconds": time.perf_counter() - counted["start"], "tokens": counted["tokens"]})

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if given.tune == "lora" else None
    trainer = Counted(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args=settings,
        train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora, callbacks=[Asked()],
    )  # fmt: skip
    done.put({"preparation_s": time.perf_counter() - started})
    trainer.train()


if __name__ == "__main__":
    main()
