"""Scores, embeddings and token counts against the model and the tokenizer asked directly."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron.curate import scoring
from minitron.curate.recipe import QualityScore, RecipeError, Semantic, recipe_from
from minitron.curate.run import curate
from minitron.curate.semantic import semantic_duplicates
from minitron.curate.texts import Texts
from minitron.loading import load

STORY = "Once upon a time there was a little girl who lived in a small house near the forest with her mother. "
NOISE = "zq xv ;;] 83 jjk qpw 0x9 vbn ### lkw zzx qrt mnb 7$ vvv kkq wwz pqx "
TEXTS = [STORY * 3, NOISE * 3, "a", "The cat sat on the mat and looked at the bird."]


def test_bits_per_byte_are_those_of_the_model() -> None:
    model, tokenizer = load("bundled")
    found = scoring.scorer(QualityScore("bundled", max_score=3.0))(Texts.of(TEXTS))
    for text, bits in zip(TEXTS, found.tolist(), strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) < 2:
            assert math.isnan(bits)
            continue
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total = -sum(float(logits[i, ids[i + 1]]) for i in range(len(ids) - 1))
        size = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
        assert bits == pytest.approx(total / math.log(2) / size, rel=1e-4)
    assert found[0] < 2 < found[1]


def test_neighbours_make_no_difference() -> None:
    score = scoring.scorer(QualityScore("bundled", max_score=3.0))
    alone = np.concatenate([score(Texts.of([text])) for text in TEXTS])
    assert alone.tobytes() == score(Texts.of(TEXTS)).tobytes()


def test_a_classifier_gives_the_probability_of_its_label(tmp_path: Path) -> None:
    from minitron.config import NemotronConfig
    from minitron.heads import NemotronForSequenceClassification

    _, tokenizer = load("bundled")
    config = NemotronConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = NemotronForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    settings = QualityScore(str(tmp_path / "judge"), label="good")
    score = scoring.scorer(settings)
    assert (score.name, score.lowest) == ("probability", 0.5)
    ids = tokenizer(STORY, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = float(model(input_ids=ids).logits.double().softmax(-1)[0, 1])
    assert float(score(Texts.of([STORY]))[0]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"quality_score\.label is 'great'; .* has the labels: bad, good"):
        scoring.scorer(QualityScore(str(tmp_path / "judge"), label="great"))


def test_a_run_removes_what_a_model_finds_unlikely_and_counts_tokens(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    values = {
        "quality_score": {"model": "bundled", "max_score": 2.5},
        "tokens": {"tokenizer": "bundled"},
        "output": {"format": "jsonl"},
    }
    report = curate([str(source)], tmp_path / "out", recipe_from(values))
    assert report.stages["quality_score"].removed == {"high bits per byte": 1}
    _, tokenizer = load("bundled")
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    assert report.stages["read"].tokens_out == sum(lengths)
    assert report.stages["exact"].tokens_out == sum(lengths) - lengths[1]
    rows = [json.loads(line) for line in (tmp_path / "out" / "shards" / "000000.jsonl").open()]
    assert [row["tokens"] for row in rows] == [lengths[0], *lengths[2:]]
    assert [row["quality_score"] is None for row in rows] == [False, True, False]


def test_a_score_without_a_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="give max_score"):
        scoring.scorer(QualityScore("bundled"))
    with pytest.raises(RecipeError, match=r"quality_score\.model is missing"):
        recipe_from({"quality_score": {}})


def test_semantic_duplicates_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(40, 16))
    rows = np.concatenate([centers + 0.05 * scale * rng.normal(size=(40, 16)) for scale in (0, 1, 2, 5)])
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    sizes, digests = rng.integers(1, 50, len(rows)), rng.integers(0, 2**60, (len(rows), 2)).astype(np.uint64)
    alive = rng.random(len(rows)) < 0.9
    import minitron.curate.semantic as semantic

    for block in (7, 1024):
        semantic.BLOCK = block
        removed = semantic_duplicates(rows, digests, sizes, alive, 0.97)
        order = sorted(np.flatnonzero(alive), key=lambda i: (-sizes[i], *digests[i]))
        staying: list[int] = []
        for i in order:
            best = max((float(rows[i].astype(np.float64) @ rows[k].astype(np.float64)) for k in staying), default=-1.0)
            assert (int(i) in removed) == (best >= 0.97)
            if i in removed:
                assert removed[int(i)][1] == pytest.approx(best, abs=1e-5)
                assert removed[int(i)][0] in staying
            else:
                staying.append(int(i))
    assert 20 < len(removed) < len(rows)


def test_embeddings_are_means_of_hidden_states(tmp_path: Path) -> None:
    model, tokenizer = load("bundled")
    found = scoring.embeddings(Texts.of(TEXTS), Semantic("bundled"))
    ids = tokenizer(TEXTS[3], add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        mean = model.model(input_ids=ids).last_hidden_state[0].double().mean(0)
    assert np.allclose(found[3].astype(np.float64), (mean / mean.norm()).numpy(), atol=2e-3)
    source = tmp_path / "in.jsonl"
    texts = [*TEXTS, STORY * 3 + "And so on."]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = curate(
        [str(source)], tmp_path / "out", recipe_from({"semantic": {"model": "bundled", "similarity": 0.99}})
    )
    assert report.stages["semantic"].removed == {"similar to a longer document": 1}
