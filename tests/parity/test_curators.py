"""Keep sets of datatrove's and NeMo Curator's own filters against ours.

`make oracles` runs these. It installs both apart from the test tools; MINITRON_CURATORS names their Python.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curation_texts import many, ordinary

from minitron.curate import quality
from minitron.curate.gopher_kernels import C
from minitron.curate.recipe import C4, FineWeb, GopherQuality, GopherRepetition
from minitron.curate.texts import Texts

PYTHON = os.environ.get("MINITRON_CURATORS")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="MINITRON_CURATORS is not set; `make oracles` installs the curators"),
]
ORACLE = Path(__file__).parents[1] / "samples" / "curators_oracle.py"
COUNT = int(os.environ.get("MINITRON_CURATORS_TEXTS", "20000"))
_SENTENCES = (
    "Der Hund lief schnell durch den Wald.",
    "Le chat dort sur la table rouge.",
    "El ni\u00f1o juega en la calle.",
    "\u041c\u0430\u043b\u044c\u0447\u0438\u043a \u0438\u0434\u0451\u0442 \u0434\u043e\u043c\u043e\u0439.",
    "\u5c0f\u732b\u5728\u684c\u5b50\u4e0a\u7761\u89c9\u3002",
    "\u732b\u306f\u673a\u306e\u4e0a\u3067\u5bdd\u3066\u3044\u308b\u3002",
    "\uace0\uc591\uc774\uac00 \uc790\uace0 \uc788\ub2e4.",
    "\u0627\u0644\u0642\u0637\u0629 \u062a\u0646\u0627\u0645.",
    "\u092c\u093f\u0932\u094d\u0932\u0940 \u0938\u094b \u0930\u0939\u0940 \u0939\u0948\u0964",
    "Kissa nukkuu p\u00f6yd\u00e4ll\u00e4.",
    "\u0397 \u03b3\u03ac\u03c4\u03b1 \u03ba\u03bf\u03b9\u03bc\u03ac\u03c4\u03b1\u03b9.",
    "Kedi masan\u0131n \u00fcst\u00fcnde uyuyor.",
)
_MENU = ("Home", "* item", "- Read more...", "\u2022 a", "Share # #", "We use cookies.", "{", "javascript")
_CODE = "def f{n}(x, y):\n    # add {n}\n    return x + y * {n}\n\n"


def corpus(count: int) -> list[str]:
    """Books, web-like pages, code, twelve languages and adversarial texts."""
    rng = random.Random(11)
    texts = many(count // 4, seed=12)
    book = Path(__file__).parents[2] / "src" / "minitron" / "assets" / "calibration.jsonl.xz"
    with lzma.open(book, "rt", encoding="utf-8") as file:
        whole = "\n".join(json.loads(line)["text"] for line in file)
    while len(texts) < count:
        start, kind = rng.randrange(len(whole) - 4000), rng.random()
        piece = whole[start : start + rng.randint(200, 4000)]
        if kind < 0.4:
            texts.append(piece)
        elif kind < 0.6:
            lines = piece.split("\n")
            menu = rng.choices(_MENU, k=9)
            texts.append("\n".join(rng.sample(lines + menu * rng.randint(1, 4), k=len(lines))))
        elif kind < 0.75:
            texts.append("".join(_CODE.format(n=rng.randint(0, 9)) for _ in range(rng.randint(1, 40))))
        elif kind < 0.9:
            sentences = rng.choices(_SENTENCES, k=rng.randint(1, 3))
            texts.append(" ".join(rng.choices(sentences, k=rng.randint(1, 60))) + "\n" + piece[: rng.randint(0, 300)])
        else:
            texts.append("\n".join([ordinary(rng)] * rng.randint(1, 4)))
    return texts


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return corpus(COUNT)


@pytest.fixture(scope="module")
def theirs(texts: list[str]) -> dict[str, list[Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON or sys.executable, str(ORACLE)], input=json.dumps(texts), capture_output=True, text=True, check=False,
        timeout=3600, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout[done.stdout.index('{"gopher') :])


def disagreements(texts: list[str], theirs: list[Any], ours: list[bool]) -> list[str]:
    """Texts on which the filters differ, apart from those on which the other filter fails."""
    pairs = zip(texts, theirs, ours, strict=True)
    return [text for text, (kept, _), mine in pairs if kept != "error" and kept != mine]


def test_datatrove_keeps_the_same_documents(texts: list[str], theirs: dict[str, list[Any]]) -> None:
    packed = Texts.of(texts)
    counts = quality.measure(packed)
    changed, c4_reasons, _ = quality.c4(packed, C4())
    reasons = {
        "gopher_repetition": quality.gopher_repetition(counts, GopherRepetition()),
        "gopher_quality": quality.gopher_quality(counts, GopherQuality()),
        "c4": c4_reasons,
        "fineweb": quality.fineweb(packed, FineWeb())[0],
    }
    for name, found in reasons.items():
        ours = [reason is None for reason in found]
        assert disagreements(texts, theirs[name], ours) == [], name
        assert 0.02 < np.mean(ours) < 0.98, name  # both answers are tested
        errors = sum(kept == "error" for kept, _ in theirs[name])
        assert errors < 0.05 * len(texts), name
    for after, (kept, text) in zip(changed.to_list(), theirs["c4"], strict=True):
        if kept is True:
            assert after == text


def test_nemo_curator_keeps_the_same_documents_by_the_rules_that_both_have(
    texts: list[str], theirs: dict[str, list[Any]]
) -> None:
    """Its number and length of words count words of punctuation too: those texts are compared that have none."""
    n = quality.measure(Texts.of(texts)).T
    words = np.maximum(n[C.words], 1)
    plain = n[C.words] == n[C.real_words]
    mean = n[C.real_word_characters] / words
    ours = {
        "curator_alphabets": n[C.alpha_words] / words >= 0.8,
        "curator_word_count": (n[C.real_words] >= 50) & (n[C.real_words] <= 100_000),
        "curator_mean_length": (mean >= 3) & (mean <= 10),
    }
    for name, kept in ours.items():
        chosen = np.ones(len(texts), dtype=bool) if name == "curator_alphabets" else plain
        rows = np.flatnonzero(chosen)
        assert len(rows) > len(texts) // 3
        found = disagreements([texts[i] for i in rows], [theirs[name][i] for i in rows], kept[rows].tolist())
        assert found == [], name
