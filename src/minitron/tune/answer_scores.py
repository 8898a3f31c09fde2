"""How well questions are answered: SQuAD's exact match and F1; and a baseline that needs no language model."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..data.annotated import Question

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\w+")


def normalized(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation, articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truth: str) -> float:
    """1 if both are the same when normalized, else 0."""
    return float(normalized(answer) == normalized(truth))


def word_f1(answer: str, truth: str) -> float:
    """F1 of the words that both have, as often as both have them; for no answer 1 if both are empty, else 0."""
    ours, theirs = normalized(answer).split(), normalized(truth).split()
    if not ours or not theirs:
        return float(ours == theirs)
    both = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * both / (len(ours) + len(theirs)) if both else 0.0


def answer_scores(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Mean exact match and F1, each against the answer that fits best; and the same over the questions that have an
    answer and those that have none, where there are both kinds."""

    def best(answer: str, truth: Question) -> tuple[float, float]:
        texts = [text for text in truth.answers if normalized(text)] or [""]
        return max(exact_match(answer, t) for t in texts), max(word_f1(answer, t) for t in texts)

    rows = np.array([best(a, q) for a, q in zip(answers, questions, strict=True)])
    has = np.array([bool(q.answers) for q in questions])
    found = {"exact_match": float(rows[:, 0].mean()), "f1": float(rows[:, 1].mean())}
    if has.any() and not has.all():
        found["f1_answered"] = float(rows[has, 1].mean())
        found["f1_unanswered"] = float(rows[~has, 1].mean())
    return found


def sentence_baseline(questions: Sequence[Question]) -> dict[str, float]:
    """Scores of answering with the sentence of the text that shares most words with the question, rare ones first."""
    counts: Counter[str] = Counter()
    for item in questions:
        counts.update(set(_words(item.context)))
    answers = []
    for item in questions:
        asked = set(_words(item.question))
        sentences = _SENTENCE_END.split(item.context)
        answers.append(max(sentences, key=lambda s: sum(1 / (1 + counts[w]) for w in asked & set(_words(s)))))
    return answer_scores(answers, questions)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
