"""Models with a head that judges texts: labels of sequences, labels of tokens, answers within a context."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ..checkpoint.limits import MAX_CONFIG_BYTES, read_json
from ..loading import checkpoint_folder, pick_device
from ..registration import register
from ..tokenizer import load_tokenizer
from ..tune.labels import encode_turns, encoder_of
from .errors import ApiError

HEADS: Mapping[str, Any] = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}
"""Classes by the end of an architecture's name."""
LONGEST_ANSWER = 64
"""Tokens of an answer within a context."""


@dataclass
class ServedClassifier:
    """A classifier that answers requests. Each text is a batch of its own, so that it does not depend on others."""

    name: str
    tokenizer: Any
    model: Any
    context: int
    labels: list[str]
    engine_name: str = "transformers"
    reason: str = "a classification head"

    def judge(self, index: int, text: str, question: str | None) -> tuple[dict[str, Any], int]:
        """What the head says about a text, as an object of the response, and the number of tokens.

        Raises:
            ApiError: the text is too long, or there is a question for a head that takes none, or none for one that
                does.
        """
        task = _task(type(self.model).__name__)
        answers = task == "ForQuestionAnswering"
        if answers != (question is not None):
            needs = "needs a question" if answers else "takes no question"
            raise ApiError(f"the model {self.name!r} {needs}", param="question")
        encoded = self.tokenizer.backend_tokenizer.encode(*([question, text] if answers else [text]))
        if not 0 < len(encoded.ids) <= self.context:
            raise ApiError(
                f"input {index} has {len(encoded.ids)} tokens; the model {self.name!r} takes 1 to {self.context}",
                param="input",
                code="context_length_exceeded",
            )
        ids = encoded.ids
        if task == "ForSequenceClassification" and encoder_of(self.model.config) is encode_turns:
            [ids] = encode_turns(self.tokenizer, [(text, None)], self.context)
        with torch.inference_mode():
            out = self.model(input_ids=torch.tensor([ids], device=self.model.device))
        if answers:
            found = _answer(out, encoded, text)
        elif task == "ForTokenClassification":
            found = {"tokens": self._tokens(out.logits[0].double(), encoded, text)}
        else:
            found = self._label(out.logits[0].double())
        return {"index": index, **found}, len(encoded.ids)

    def _label(self, logits: torch.Tensor) -> dict[str, Any]:
        several = self.model.config.problem_type == "multi_label_classification" or len(logits) == 1
        probabilities = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        _require_finite(probabilities)
        return {"label": self.labels[best], "probs": probabilities, "num_classes": len(probabilities)}

    def _tokens(self, logits: torch.Tensor, encoded: Any, text: str) -> list[dict[str, Any]]:
        found = []
        for row, (start, end) in zip(logits.softmax(-1).tolist(), encoded.offsets, strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            _require_finite(row)
            if end > start:
                found.append(
                    {
                        "text": text[start:end],
                        "start": start,
                        "end": end,
                        "label": self.labels[best],
                        "prob": row[best],
                    }
                )
        return found


def _answer(out: Any, encoded: Any, text: str) -> dict[str, Any]:
    """The span of the context with the largest sum of its start's and its end's logit, and its probability."""
    start, end = out.start_logits[0].double(), out.end_logits[0].double()
    inside = torch.tensor([sequence == 1 for sequence in encoded.sequence_ids])
    starts, ends = (scores.cpu().masked_fill(~inside, -math.inf).log_softmax(-1) for scores in (start, end))
    both = starts[:, None] + ends[None]
    both = both.triu().masked_fill(torch.ones_like(both).tril(-1).bool(), -math.inf)
    both = both.masked_fill(torch.ones_like(both).triu(LONGEST_ANSWER).bool(), -math.inf)
    best = int(both.argmax())
    first, last = divmod(best, both.shape[1])
    score = float(both[first, last].exp())
    _require_finite([score])
    at, until = encoded.offsets[first][0], encoded.offsets[last][1]
    return {"answer": text[at:until], "start": at, "end": until, "prob": score}


def _require_finite(values: list[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise ApiError("the model computes NaN for this text", status=500, kind="server_error", code="engine_error")


def head_of(folder: Path) -> str | None:
    """The head of a checkpoint that is a classifier; None for a language model."""
    architectures = read_json(folder / "config.json", MAX_CONFIG_BYTES).get("architectures") or ()
    return next((name for name in architectures if _task(name)), None)


def _task(architecture: str) -> str | None:
    return next((end for end in HEADS if architecture.endswith(end)), None)


def load_classifier(name: str, path: str, device: str, say: Callable[[str], object]) -> ServedClassifier | None:
    """The classifier in a checkpoint; None if it is a language model.

    Raises:
        FileNotFoundError, ValueError: it is missing or wrong.
    """
    folder = checkpoint_folder(path, say)
    head = head_of(folder)
    if head is None:
        return None
    register()
    model, info = HEADS[_task(head) or ""].from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder}: tensor {sorted(info['missing_keys'])[0]!r} is missing from the checkpoint")
    tokenizer = load_tokenizer(folder, vocab_size=model.config.vocab_size)
    labels = [model.config.id2label.get(index, f"LABEL_{index}") for index in range(model.config.num_labels)]
    say(f"{name}: {head} with the labels {', '.join(labels)}")
    model = model.to(pick_device(device)).eval()
    return ServedClassifier(name, tokenizer, model, model.config.max_position_embeddings, labels)
