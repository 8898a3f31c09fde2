"""The whole platform on a laptop: raw text to a served, guarded model of half the size, and a page about it.

    python examples/platform/run.py runs/platform

Raw text with dirt in it is curated; a small model is trained on what is left, compressed to half, taught a style of
conversation and a guard, evaluated, served, and asked by the openai client. Every stage is a command that is shown.
About five minutes on two cores. The same command again continues an interrupted run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the files beside this one

import page
import texts
from stages import Platform, Stage

from minitron.files import write_json, write_text

BOOK = Path(__file__).parents[1] / "black_beauty.jsonl"
RECIPE = """preset: plain
max_bad: 0.02
normalize: {unicode: NFC, control_characters: true, repair: true}
boilerplate: true
personal_data: true
language: {keep: [en]}
gopher_repetition: true
gopher_quality: {min_words: 30}
exact: {documents: true}
near: {similarity: 0.8}
shuffle: {seed: 1}
output: {format: jsonl}
"""
QUESTIONS = ("Tell me a story about a fox.", "What happened to the owl at the mill?")
SPAM = "Send your card number now and win a ring worth 900 dollars!"


@dataclass(frozen=True)
class Size:
    """What decides how long it takes."""

    stories: int
    hidden: int
    layers: int
    steps: int
    batch: int
    sequence: int
    half: int
    """Parameters without embeddings of the compressed model, at most."""
    compress_tokens: int
    chats: int
    chat_epochs: int
    mails: int
    guard_epochs: int


FULL = Size(6000, 128, 4, 250, 16, 128, 361_000, 150_000, 1000, 2, 600, 30)
SMOKE = Size(150, 32, 2, 6, 4, 128, 12_600, 2048, 24, 1, 40, 2)


def main() -> int:
    """Run all stages that are not done, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="run folder")
    parser.add_argument("--smoke", action="store_true", help="very small, some seconds: whether everything runs")
    parser.add_argument("--until", help="stop after this stage")
    given = parser.parse_args()
    run(given.out.absolute(), SMOKE if given.smoke else FULL, given.until)
    return 0


def run(out: Path, size: Size, until: str | None = None) -> Platform:
    """Run the stages in a folder."""
    platform = Platform(out)
    settings = asdict(size)
    for name, title, work, outputs in (
        ("raw", "write raw text with dirt in it", raw, ["**/*.jsonl"]),
        ("curate", "make clean text of it", curate, ["clean/shards/*"]),
        ("train", "train a model from nothing", train, ["run/model/model.safetensors"]),
        ("compress", "make it half as large", compress, ["run/half/distill/run/model/model.safetensors"]),
        ("chat", "teach it a style of conversation", chat, ["run/model/model.safetensors"]),
        ("guard", "teach a head to tell spam from requests", guard, ["run/model/model.safetensors"]),
        ("evaluate", "compare the models on held-out stories", evaluate, ["losses.json"]),
        ("serve", "serve it with the guard and ask it by the openai client", serve, ["answers.json"]),
    ):

        def do(stage: Stage, work: Any = work) -> None:
            work(platform, stage, size)

        platform.stage(name, title, settings, do, outputs)
        if name == until:
            return platform
    target = out / "index.html"
    write_text(target, page.render(platform.stages, settings))
    print(f"page: {target}")
    return platform


def raw(platform: Platform, stage: Stage, size: Size) -> None:
    """Stories, a book and web pages; held-out stories; conversations; mails."""
    stage.facts["planted"] = texts.write_raw(stage.folder / "text", size.stories, BOOK)
    texts.write_heldout(stage.folder / "heldout.jsonl", max(8, size.stories // 60))
    texts.write_chats(stage.folder / "chats.jsonl", size.chats)
    texts.write_mails(stage.folder / "mails.jsonl", size.mails)


def curate(platform: Platform, stage: Stage, size: Size) -> None:
    """Clean shards, and what is left of the dirt in them."""
    recipe = stage.folder / "curate.yaml"
    write_text(recipe, RECIPE)
    source = platform.out / "raw/text"
    words = ["curate", source, "-o", stage.folder / "clean", "--recipe", recipe, "--workers", 1]
    report = platform.minitron(stage, *words)
    clean = [file.read_text(encoding="utf-8") for file in sorted((stage.folder / "clean/shards").iterdir())]
    stage.facts["stages"] = [
        {"name": name, "documents": row["documents_out"]} for name, row in report["stages"].items()
    ]
    stage.facts["left"] = page.dirt_left("".join(clean))


def train(platform: Platform, stage: Stage, size: Size) -> None:
    """A Nemotron model with the bundled tokenizer."""
    result = platform.minitron(
        stage, "train", "--data", platform.out / "curate/clean/shards", "--heldout", platform.out / "raw/heldout.jsonl",
        "--tokenizer", "bundled", "--layers", size.layers, "--hidden-size", size.hidden, "--intermediate-size",
        4 * size.hidden, "--heads", 4, "--kv-heads", 2, "--steps", size.steps, "--batch", size.batch, "--sequence",
        size.sequence, "--warmup", size.steps // 10, "--eval-every", max(2, size.steps // 6), "--save-every",
        max(2, size.steps // 6), "--lr", "4e-3", "--out", stage.folder / "run",
    )  # fmt: skip
    stage.facts |= {"tokens": result["tokens"], "heldout": result["heldout"]}


def compress(platform: Platform, stage: Stage, size: Size) -> None:
    """Half of it, found among several shapes, retrained by its teacher."""
    small = size.compress_tokens < 10_000
    recipe: dict[str, Any] = {
        "model": "../train/run/model",
        "data": ["../curate/clean/shards"],
        "heldout": ["../raw/heldout.jsonl"],
        "targets": [{"non_embedding_params": size.half, "name": "half"}],
        "calibration": {"blocks": 4 if small else 64},
        "ranking": {
            "scored": 4 if small else 8, "most": 2, "tokens": 512 if small else 40_000, "rungs": [0.5],
            "score_blocks": 2 if small else 8,
        },
        "train": {
            "tokens": size.compress_tokens, "batch": size.batch, "sequence": size.sequence, "lr": 2e-3,
            "schedule": "cosine", "warmup": 2, "eval_every": 20, "save_every": 20,
        },
        "prompts": ["Anna had a brave fox"],
    }  # fmt: skip
    if small:
        recipe["ranking"]["grid"] = {
            "layers": [1, 2],
            "heads": [4],
            "groups": [2],
            "hidden": [24, 32],
            "ffn": [64, 72, 76, 80, 128],
        }
    file = stage.folder / "recipe.yaml"
    write_json(file, recipe)  # JSON is YAML
    platform.minitron(stage, "compress", "--recipe", file, stage.folder / "run")


def chat(platform: Platform, stage: Stage, size: Size) -> None:
    """Answers that begin with "Gladly!" and end with "The end."."""
    platform.minitron(
        stage, "finetune", platform.out / "compress/run/half/distill/run/model", "--task", "chat", "--data",
        platform.out / "raw/chats.jsonl", "--epochs", size.chat_epochs, "--batch", 16, "--sequence", 128, "--lr",
        "2e-3", "--out", stage.folder / "run",
    )  # fmt: skip


def guard(platform: Platform, stage: Stage, size: Size) -> None:
    """A classifier on the chat model's own hidden states."""
    report = platform.minitron(
        stage, "finetune", platform.out / "chat/run/model", "--task", "classify", "--data",
        platform.out / "raw/mails.jsonl", "--tune", "head", "--chat", "--epochs", size.guard_epochs, "--batch", 32,
        "--sequence", 128, "--lr", "0.02", "--out", stage.folder / "run",
    )  # fmt: skip
    stage.facts["scores"] = report["scores"]


def evaluate(platform: Platform, stage: Stage, size: Size) -> None:
    """Losses of the three language models on the same held-out text."""
    models = {
        "trained": platform.out / "train/run/model",
        "half": platform.out / "compress/run/half/distill/run/model",
        "chat": platform.out / "chat/run/model",
    }
    report = platform.minitron(
        stage, "eval", *models.values(), "--suite", "quick", "--data", platform.out / "raw/heldout.jsonl",
        "--limit", 8 if size.stories < 1000 else 60,
    )  # fmt: skip
    rows = [row["text"] for row in report["models"]]
    kept = ("nats_per_token", "bits_per_byte", "perplexity")
    losses = {name: {key: row[key] for key in kept if key in row} for name, row in zip(models, rows, strict=True)}
    stage.facts["losses"] = losses
    write_json(stage.folder / "losses.json", losses)


def serve(platform: Platform, stage: Stage, size: Size) -> None:
    """Two questions that are answered and one message that is refused, by OpenAI's own client."""
    import openai

    words = ["serve", f"stories={platform.out / 'chat/run/model'}", "--guard", platform.out / "guard/run/model"]
    words += ["--guard-block", "spam", "--port", 0]
    stage.commands.append("minitron " + " ".join(platform.relative(str(word)) for word in words))
    answers = []
    with server([str(word) for word in words]) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        for question in (*QUESTIONS, SPAM):
            reply = client.chat.completions.create(
                model="stories",
                messages=[{"role": "user", "content": question}],
                seed=1,
                max_tokens=60,
                temperature=0.3,
            )  # fmt: skip
            choice = reply.choices[0]
            answers.append(
                {"question": question, "answer": choice.message.content, "finish_reason": choice.finish_reason}
            )
    stage.facts["answers"] = answers
    write_json(stage.folder / "answers.json", answers)


@contextmanager
def server(words: list[str]) -> Iterator[str]:
    """`minitron serve` as a process of its own; gives its address."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = subprocess.Popen(
            [sys.executable, "-m", "minitron", *words, "--log-file", str(log)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            yield _address(process)
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "listening on " in line:
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return line.split("listening on ")[1].split()[0]
    raise SystemExit("the server ended before it listened:\n" + "".join(said))


if __name__ == "__main__":
    sys.exit(main())
