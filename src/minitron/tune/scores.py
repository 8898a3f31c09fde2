"""How good a classifier is: accuracy, F1, ranking, calibration; and simple baselines in the same table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.examples import Examples, Labelled
from .labels import LabelSet, Problem, probabilities

BINS = 15
"""Equal bins of confidence of the expected calibration error (Guo et al. 2017)."""


def score(logits: np.ndarray, targets: np.ndarray, problem: Problem, temperature: float = 1.0) -> dict[str, float]:
    """The scores of predictions.

    Args:
        logits: (N, C).
        targets: (N,) integers; (N, C) of 0 and 1 for several labels; (N,) numbers for regression.
        problem: of the labels.
        temperature: divides the logits before the scores of calibration.

    Returns:
        For one label: accuracy, macro_f1, nats (mean negative log-likelihood), ece, and roc_auc if there are two
        labels. For several: micro_f1, macro_f1, exact (all labels right). For a number: mae, rmse, r2.
    """
    if problem == "number":
        return _number_scores(logits[:, 0].astype(np.float64), targets.astype(np.float64))
    p = probabilities(logits, problem, temperature)
    if problem == "several":
        predicted = p >= 0.5
        truth = targets.astype(bool)
        return {
            "micro_f1": _f1(predicted.ravel(), truth.ravel()),
            "macro_f1": float(np.mean([_f1(predicted[:, c], truth[:, c]) for c in range(p.shape[1])])),
            "exact": float((predicted == truth).all(-1).mean()),
        }
    predicted = logits.argmax(-1)
    chosen = p[np.arange(len(p)), targets]
    found = {
        "accuracy": float((predicted == targets).mean()),
        "macro_f1": macro_f1(predicted, targets),
        "nats": float(-np.log(np.maximum(chosen, 1e-300)).mean()),
        "ece": calibration_error(p, targets),
    }
    if p.shape[1] == 2 and 0 < targets.sum() < len(targets):
        found["roc_auc"] = roc_auc(logits[:, 1].astype(np.float64) - logits[:, 0], targets)
    return found


def _number_scores(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    errors = predicted - targets
    spread = float(((targets - targets.mean()) ** 2).mean())
    found = {"mae": float(np.abs(errors).mean()), "rmse": float(np.sqrt((errors**2).mean()))}
    return {**found, "r2": 1 - float((errors**2).mean()) / spread} if spread > 0 else found


def _f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    both = float((predicted & truth).sum())
    total = float(predicted.sum() + truth.sum())
    return 2 * both / total if total else 0.0


def macro_f1(predicted: np.ndarray, targets: np.ndarray) -> float:
    """The mean F1 over the classes that are predicted or true."""
    classes = np.union1d(predicted, targets)
    return float(np.mean([_f1(predicted == c, targets == c) for c in classes]))


def calibration_error(p: np.ndarray, targets: np.ndarray) -> float:
    """The expected calibration error: by how much confidence differs from accuracy, over bins of confidence."""
    confidence, right = p.max(-1), p.argmax(-1) == targets
    bins = np.minimum((np.ceil(confidence * BINS) - 1).clip(0).astype(int), BINS - 1)
    sums = [np.bincount(bins, weights=w, minlength=BINS) for w in (confidence, right.astype(float))]
    return float(np.abs(sums[0] - sums[1]).sum() / len(p))


def roc_auc(scores: np.ndarray, targets: np.ndarray) -> float:
    """The probability that a positive scores above a negative, ties counted half."""
    order = np.argsort(scores, kind="stable")
    _, starts, counts = np.unique(scores[order], return_index=True, return_counts=True)
    ranks = np.empty(len(scores))
    ranks[order] = np.repeat(starts + (counts + 1) / 2, counts)
    positives = targets.astype(bool)
    n = int(positives.sum())
    return float((ranks[positives].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def best_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """The temperature at which logits (N, C) give the least negative log-likelihood of targets (N,), 0.05 to 20."""

    def nats(log_temperature: float) -> float:
        p = probabilities(logits, "one", float(np.exp(log_temperature)))
        return float(-np.log(np.maximum(p[np.arange(len(p)), targets], 1e-300)).mean())

    # The likelihood has one maximum over 1 / temperature, so a golden section finds it.
    low, high = np.log(0.05), np.log(20.0)
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if nats(a) < nats(b) else (a, high)
    return float(np.exp((low + high) / 2))


def confusion(predicted: np.ndarray, targets: np.ndarray, count: int) -> list[list[int]]:
    """How often each true label (row) was predicted as each label (column)."""
    table = np.zeros((count, count), int)
    np.add.at(table, (targets, predicted), 1)
    return table.tolist()


# --- baselines ---------------------------------------------------------------------------------------------------


def baselines(train: Examples[Labelled], test: Examples[Labelled], labels: LabelSet) -> dict[str, dict[str, float]]:
    """Scores of what needs no language model, on the same rows: the commonest label (or the mean), and TF-IDF with
    logistic regression (or ridge regression), where scikit-learn is installed."""
    targets = [np.array([labels.number(i.label, p) for i, p in zip(part.items, part.places, strict=True)])
               for part in (train, test)]  # fmt: skip
    found = {"commonest label" if labels.problem != "number" else "mean": score(
        _constant(targets[0], len(test), labels), targets[1], labels.problem)}  # fmt: skip
    texts = [[f"{item.text} {item.pair or ''}" for item in part.items] for part in (train, test)]
    try:
        learned = _bag_of_words(texts, targets[0], labels)
    except ModuleNotFoundError as error:
        if error.name != "sklearn":
            raise
        return found
    return {**found, "TF-IDF + linear model": score(learned, targets[1], labels.problem)}


def _constant(targets: np.ndarray, rows: int, labels: LabelSet) -> np.ndarray:
    """Logits that know how common each label is and nothing of the text."""
    if labels.problem == "number":
        return np.full((rows, 1), targets.mean())
    if labels.problem == "several":
        shares = targets.mean(0).clip(1e-6, 1 - 1e-6)
        return np.tile(np.log(shares / (1 - shares)), (rows, 1))
    counts = np.bincount(targets, minlength=len(labels.names))
    return np.tile(np.log(np.maximum(counts, 1e-9) / len(targets)), (rows, 1))


def _bag_of_words(texts: Sequence[Sequence[str]], targets: np.ndarray, labels: LabelSet) -> np.ndarray:
    """Logits of a linear model over TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1)
    known, new = words.fit_transform(texts[0]), words.transform(texts[1])
    model: Any
    if labels.problem == "number":
        return Ridge().fit(known, targets).predict(new)[:, None]
    if labels.problem == "several":
        model = OneVsRestClassifier(LogisticRegression(max_iter=1000)).fit(known, targets)
        shares = np.asarray(model.predict_proba(new)).clip(1e-9, 1 - 1e-9)
        return np.log(shares / (1 - shares))
    model = LogisticRegression(max_iter=1000, C=10).fit(known, targets)
    out = np.full((len(texts[1]), len(labels.names)), -30.0)
    out[:, model.classes_] = model.predict_log_proba(new)
    return out
