"""Scores of classifiers against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from minitron.data.examples import Examples, Labelled
from minitron.tune.labels import LabelSet, probabilities
from minitron.tune.scores import baselines, best_temperature, calibration_error, confusion, roc_auc, score


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(5, 60), st.integers(0, 10**6))
def test_one_label(classes: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, targets = rng.normal(size=(rows, classes)).astype(np.float32), rng.integers(0, classes, rows)
    found = score(logits, targets, "one")
    predicted = logits.argmax(-1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(targets, predicted))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(targets, predicted, average="macro"))
    p = probabilities(logits, "one")
    assert found["nats"] == pytest.approx(metrics.log_loss(targets, p, labels=range(classes)), rel=1e-6)
    assert (
        confusion(predicted, targets, classes)
        == metrics.confusion_matrix(targets, predicted, labels=range(classes)).tolist()
    )
    if classes == 2 and 0 < targets.sum() < rows:
        assert found["roc_auc"] == pytest.approx(metrics.roc_auc_score(targets, p[:, 1]))


def test_ranking_counts_ties_half() -> None:
    scores, targets = np.array([0.1, 0.5, 0.5, 0.5, 0.9]), np.array([0, 1, 0, 1, 1])
    assert roc_auc(scores, targets) == pytest.approx(metrics.roc_auc_score(targets, scores))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_several_labels_and_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, targets = rng.normal(size=(30, 4)), rng.integers(0, 2, (30, 4))
    found = score(logits, targets, "several")
    predicted = logits >= 0
    assert found["micro_f1"] == pytest.approx(metrics.f1_score(targets, predicted, average="micro"))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(targets, predicted, average="macro", zero_division=0))
    assert found["exact"] == pytest.approx(metrics.accuracy_score(targets, predicted))
    numbers = rng.normal(size=30)
    found = score(logits, numbers, "number")
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(numbers, logits[:, 0]))
    assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(numbers, logits[:, 0]))
    assert found["r2"] == pytest.approx(metrics.r2_score(numbers, logits[:, 0]))


def test_calibration() -> None:
    # Ten rows that are 0.75 sure, of which five are right: the error is 0.25.
    p = np.tile([0.75, 0.25], (10, 1))
    assert calibration_error(p, np.array([0, 1] * 5)) == pytest.approx(0.25)
    # Logits that are three times too large are divided by three.
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20000, 3))
    targets = np.array([rng.choice(3, p=row) for row in probabilities(logits, "one")])
    assert best_temperature(3 * logits, targets) == pytest.approx(3, rel=0.05)


def test_baselines_learn_words_and_nothing_from_the_test_rows() -> None:
    train = Examples([Labelled(f"{w} {i}", None, w) for i in range(20) for w in ("cat", "dog", "dog")], ["x"] * 60)
    test = Examples([Labelled("a cat", None, "cat"), Labelled("a dog", None, "dog")], ["y"] * 2)
    found = baselines(train, test, LabelSet.of(train, "one"))
    assert found["commonest label"]["accuracy"] == 0.5
    assert found["TF-IDF + linear model"]["accuracy"] == 1.0
