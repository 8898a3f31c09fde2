"""How well names are found: precision, recall and F1 of whole names; and baselines that need no language model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..data.annotated import OUTSIDE, Tagged, entities_of
from .names import TagSet, best_path

Names = set[tuple[int, str, int, int]]


def name_scores(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of tags; a name counts if its type and both borders are right (CoNLL 2003).

    Returns:
        precision, recall and f1 over all names, macro_f1 over their types, and accuracy over the words.
    """
    ours, theirs = _names(predicted), _names(truth)
    kinds = sorted({name[1] for name in ours | theirs})
    words = [(a, b) for one, other in zip(predicted, truth, strict=True) for a, b in zip(one, other, strict=True)]
    precision, recall, f1 = _rates(ours, theirs)
    by_kind = [_rates({n for n in ours if n[1] == kind}, {n for n in theirs if n[1] == kind})[2] for kind in kinds]
    return {
        "f1": f1,
        "precision": precision,
        "recall": recall,
        "macro_f1": float(np.mean(by_kind)) if kinds else 0.0,
        "accuracy": sum(a == b for a, b in words) / max(1, len(words)),
    }


def by_type(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and the number of true names of each type."""
    ours, theirs = _names(predicted), _names(truth)
    out = {}
    for kind in sorted({name[1] for name in ours | theirs}):
        true = {n for n in theirs if n[1] == kind}
        rates = _rates({n for n in ours if n[1] == kind}, true)
        out[kind] = {**dict(zip(("precision", "recall", "f1"), rates, strict=True)), "names": float(len(true))}
    return out


def _names(texts: Sequence[Sequence[str]]) -> Names:
    return {(number, *name) for number, tags in enumerate(texts) for name in entities_of(tags)}


def _rates(ours: Names, theirs: Names) -> tuple[float, float, float]:
    right = len(ours & theirs)
    precision = right / len(ours) if ours else 0.0
    recall = right / len(theirs) if theirs else 0.0
    return precision, recall, 2 * right / (len(ours) + len(theirs)) if right else 0.0


# --- baselines ---------------------------------------------------------------------------------------------------


def name_baselines(train: Sequence[Tagged], test: Sequence[Tagged], tags: TagSet) -> dict[str, dict[str, float]]:
    """Scores on the same rows of a gazetteer, and of logistic regression over features of words where scikit-learn is
    installed."""
    truth = [item.tags for item in test]
    found = {"gazetteer": name_scores(gazetteer(train, test), truth)}
    try:
        learned = _linear(train, test, tags)
    except ModuleNotFoundError as error:
        if error.name != "sklearn":
            raise
        return found
    return {**found, "word features + linear model": name_scores(learned, truth)}


def gazetteer(train: Sequence[Tagged], test: Sequence[Tagged]) -> list[list[str]]:
    """Tags of the test rows: the longest runs of words that are names in the training rows, each with its commonest
    type; a run that is more often no name is none."""
    kinds: dict[tuple[str, ...], Counter[str]] = {}
    for item in train:
        words = item.words
        for kind, first, stop in entities_of(item.tags):
            kinds.setdefault(tuple(words[first:stop]), Counter())[kind] += 1
    longest = max(map(len, kinds), default=0)
    runs: Counter[tuple[str, ...]] = Counter()
    for item in train:
        words = item.words
        for length in range(1, longest + 1):
            runs.update(run for i in range(len(words) - length + 1) if (run := tuple(words[i : i + length])) in kinds)
    known = {run: c.most_common(1)[0][0] for run, c in kinds.items() if 2 * c.total() >= runs[run]}
    out = []
    for item in test:
        words, tags, index = item.words, [OUTSIDE] * len(item.words), 0
        while index < len(words):
            length = next((n for n in range(longest, 0, -1) if tuple(words[index : index + n]) in known), 0)
            kind = known.get(tuple(words[index : index + length]), "")
            for i in range(length):
                tags[index + i] = f"{'I' if i else 'B'}-{kind}"
            index += length or 1
        out.append(tags)
    return out


def _linear(train: Sequence[Tagged], test: Sequence[Tagged], tags: TagSet) -> list[list[str]]:
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression

    index = {name: number for number, name in enumerate(tags.names)}
    vectors = DictVectorizer()
    known = vectors.fit_transform([each for item in train for each in _features(item.words)])
    model = LogisticRegression(max_iter=300, C=1.0)
    model.fit(known, [index[tag] for item in train for tag in item.tags])
    out = []
    for item in test:
        scores = np.full((len(item.words), len(tags.names)), -50.0)
        scores[:, model.classes_] = model.predict_log_proba(vectors.transform(_features(item.words)))
        out.append([tags.names[i] for i in best_path(scores, tags)])
    return out


def _features(words: Sequence[str]) -> list[dict[str, bool]]:
    """What describes each word: itself, its shape and ends, and its neighbours."""

    def shape(word: str) -> str:
        return "".join("X" if c.isupper() else "x" if c.islower() else "9" if c.isdigit() else c for c in word[:8])

    out = []
    for i, word in enumerate(words):
        near = {f"{o}:{words[i + o].lower() if 0 <= i + o < len(words) else ''}" for o in (-2, -1, 1, 2)}
        near |= {f"{o}s:{shape(words[i + o]) if 0 <= i + o < len(words) else ''}" for o in (-1, 1)}
        own = {f"w:{word.lower()}", f"s:{shape(word)}", f"p:{word[:3].lower()}", f"e:{word[-3:].lower()}"}
        out.append(dict.fromkeys(near | own, True))
    return out
