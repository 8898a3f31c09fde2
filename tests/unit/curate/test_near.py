"""Near duplicates: estimates against exact Jaccard, the S-curve, planted copies, and independence of the order."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from curation_texts import ordinary

from minitron.curate.near import _shared_bands, band_keys, near_duplicates
from minitron.curate.recipe import Near
from minitron.curate.texts import Texts
from minitron.curate.word_kernels import grams, jaccard, signatures


def python_words(text: str) -> list[str]:
    words, word = [], ""
    for character in text + " ":
        if character.isalnum():
            word += character.lower()[0]
        elif character not in "'\u2019\u02bc" and word:
            words.append(word)
            word = ""
    return words


def python_grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = python_words(text)
    size = min(n, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)} if words else set()


def pair(rng: random.Random, words: int, changed: int) -> tuple[str, str]:
    """A text of distinct words, and one in which some are replaced."""
    first = [f"w{rng.randrange(10**9)}" for _ in range(words)]
    second = list(first)
    for index in rng.sample(range(words), changed):
        second[index] = f"v{rng.randrange(10**9)}"
    return " ".join(first), " ".join(second)


def test_grams_are_those_of_words_without_case_and_punctuation() -> None:
    texts = [
        "Don't STOP, me now!",
        "dont stop me now",
        "a",
        "",
        "...",
        "\u00c9t\u00e9 \u4f60\u597d, x1",
        "one two three four five six",
    ]
    sets = grams(Texts.of(texts), 3)
    assert (sets[0] == sets[1]).all()
    for text, found in zip(texts, sets, strict=True):
        assert len(found) == len(python_grams(text, 3)), text
    rng = random.Random(1)
    made = [ordinary(rng) for _ in range(60)]
    ours = grams(Texts.of(made), 3)
    theirs = [python_grams(text, 3) for text in made]
    for i in range(0, 60, 2):
        expected = len(theirs[i] & theirs[i + 1]) / len(theirs[i] | theirs[i + 1])
        assert jaccard(ours[i], ours[i + 1]) == pytest.approx(expected, abs=1e-12)


def test_signatures_estimate_jaccard_within_the_binomial_bound() -> None:
    rng = random.Random(2)
    pairs = [pair(rng, 300, changed) for changed in (0, 3, 6, 12, 25, 40, 60) for _ in range(30)]
    texts = Texts.of([text for both in pairs for text in both])
    k = 256
    signed, sets = signatures(texts, 5, k), grams(texts, 5)
    total = 0.0
    for i in range(0, len(texts), 2):
        true = jaccard(sets[i], sets[i + 1])
        estimate = (signed[i] == signed[i + 1]).mean()
        deviation = math.sqrt(true * (1 - true) / k)
        assert abs(estimate - true) <= 5 * deviation + 1e-12, (true, estimate)
        total += (estimate - true) / max(deviation, 1e-9) if deviation else 0.0
    assert abs(total) / math.sqrt(180) < 4  # unbiased: the sum of 180 independent normal errors


def test_candidates_follow_the_s_curve() -> None:
    rng = random.Random(4)
    settings = Near()
    pairs = [pair(rng, 220, changed) for changed in (2, 4, 6, 8, 10, 12, 16) for _ in range(60)]
    texts = Texts.of([text for both in pairs for text in both])
    keys, sets = band_keys(texts, settings), grams(texts, settings.ngram)
    expected = variance = found = 0.0
    for i in range(0, len(texts), 2):
        s = jaccard(sets[i], sets[i + 1])
        p = 1 - (1 - s**settings.rows) ** settings.bands
        expected, variance = expected + p, variance + p * (1 - p)
        found += (keys[i] == keys[i + 1]).any()
    assert 0.2 * len(pairs) < expected < 0.9 * len(pairs)
    assert abs(found - expected) < 5 * math.sqrt(variance)


def decide(texts: list[str], settings: Near) -> dict[int, tuple[int, float]]:
    packed = Texts.of(texts)
    sets = grams(packed, settings.ngram)
    digests = np.asarray([[hash_of(text), 0] for text in texts], dtype=np.uint64)
    return near_duplicates(
        band_keys(packed, settings), digests, packed.sizes(), np.ones(len(texts), dtype=bool), lambda i: sets[i],
        settings.similarity,
    )  # fmt: skip


def hash_of(text: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def test_planted_duplicates_are_found_and_nothing_else_is_removed() -> None:
    rng = random.Random(5)
    settings = Near()
    similar = [pair(rng, 400, 4) for _ in range(150)]  # Jaccard about 0.9
    apart = [pair(rng, 400, 40) for _ in range(150)]  # below 0.5
    texts = [text for both in [*similar, *apart] for text in both]
    sets = grams(Texts.of(texts), 5)
    removed = decide(texts, settings)
    near = [i for i in range(0, 300, 2) if jaccard(sets[i], sets[i + 1]) >= 0.9]
    assert len(near) > 50
    found = sum(i in removed or i + 1 in removed for i in near)
    assert found >= 0.99 * len(near)
    for text, (other, similarity) in removed.items():
        assert text // 2 == other // 2
        assert similarity == jaccard(sets[text], sets[other]) >= 0.75
        assert other not in removed
    assert not any(i in removed for i in range(300, 600))


def test_of_a_cluster_the_longest_stays_and_the_order_does_not_matter() -> None:
    rng = random.Random(6)
    base = [f"w{i}" for i in range(300)]
    cluster = [" ".join(base + [f"more{i}" for i in range(extra)]) for extra in (3, 0, 12, 7)]
    texts = [*cluster, *(ordinary(rng) * 3 for _ in range(20))]
    removed = decide(texts, Near())
    assert {text: other for text, (other, _) in removed.items()} == {0: 2, 1: 2, 3: 2}
    expected = {texts[i] for i in removed}
    for seed in range(5):
        shuffled = random.Random(seed).sample(texts, len(texts))
        assert {shuffled[i] for i in decide(shuffled, Near())} == expected


def test_no_chain_of_similar_texts_removes_a_text_without_a_similar_one_that_stays() -> None:
    words = [f"w{i}" for i in range(400)]
    chain = []
    for step in range(12):
        chain.append(" ".join(words) + " " + "x" * step)
        words[step * 30 : step * 30 + 4] = [f"v{step}-{i}" for i in range(4)]
    sets = grams(Texts.of(chain), 5)
    removed = decide(chain, Near())
    assert 0 < len(removed) < 11
    for text, (other, similarity) in removed.items():
        assert other not in removed
        assert jaccard(sets[text], sets[other]) == similarity >= 0.75


def test_shared_bands() -> None:
    keys = np.asarray([[1, 5], [2, 5], [1, 6], [3, 7]], dtype=np.uint64)
    assert _shared_bands(keys, np.arange(4)).tolist() == [[True, True], [False, True], [True, False], [False, False]]


def test_a_run_removes_near_duplicates_and_says_of_what(tmp_path: Path) -> None:
    import json

    from minitron.curate.recipe import recipe_from
    from minitron.curate.run import curate

    rng = random.Random(7)
    texts = [" ".join(f"w{rng.randrange(10**6)}" for _ in range(200)) for _ in range(30)]
    texts += [text.upper() + " more" for text in texts[:5]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = curate([str(path)], tmp_path / "out", recipe_from({"near": {}}))
    assert report.stages["near"].removed == {"similar to a longer document": 5}
    example = report.stages["near"].examples["similar to a longer document"][0]
    assert example["place"] == "line 1"
    assert "line 31]" in example["text"]
