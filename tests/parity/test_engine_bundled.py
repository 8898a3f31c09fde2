"""The bundled model's greedy text by the engine, and by the reference in fp32 on the same weights."""

from __future__ import annotations

import pytest

import minitron
from minitron.bench.fidelity import greedy_differences

WHO = ("The little girl", "An old man", "A small dog", "Tom and his sister", "The king", "One day a bird", "Lily")
DID = ("went to", "saw", "wanted to find", "was afraid of", "had never been in")
WHAT = ("the dark forest", "a big red ball", "the sea", "her mother", "a house on the hill", "the snow")
PROMPTS = [f"{who} {did} {what}" for who in WHO for did in DID for what in WHAT][::2]
NEW_TOKENS = 24
ROUNDING = 2.0**-7
"""Relative: keys and values are kept in bf16 by the engine and in fp32 by the reference."""


@pytest.mark.slow
def test_greedy_tokens_are_the_references() -> None:
    try:
        folder = minitron.bundled_model()
    except FileNotFoundError:
        pytest.skip("the bundled model is not in this checkout")
    model, tokenizer = minitron.load(folder)
    prompts = [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    differences = greedy_differences(model, prompts, NEW_TOKENS)
    # Where they differ, the reference itself finds the two tokens equally good, to the rounding of the cache.
    assert all(found.gap < ROUNDING for found in differences), differences
    assert len(differences) <= 0.01 * len(PROMPTS) * NEW_TOKENS, differences
