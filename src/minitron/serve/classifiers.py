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
from ..data.annotated import Question
from ..loading import checkpoint_folder, pick_device
from ..registration import register
from ..tokenizer import load_tokenizer
from ..tune.answer_job import NO_ANSWER
from ..tune.answers import predict_spans
from ..tune.encoding import encode_turns, encoder_of, is_padding
from ..tune.labels import PROBLEM_TYPES
from ..tune.models import pad_id, stored_temperature
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

    def judge(
        self, index: int, text: str, question: str | None, pair: str | None = None, calibrated: bool = False
    ) -> tuple[dict[str, Any], int]:
        """What the head says about a text, as an object of the response, and the number of tokens.

        Args:
            index: of the text in the request.
            text: the text, or the context of a question.
            question: for a question answerer.
            pair: the second text, for a sequence classifier of pairs.
            calibrated: divide the logits of labels by the stored temperature.

        Raises:
            ApiError: the text is too long or empty, or something is given that this head does not take, or missing that
                it needs.
        """
        task = _task(type(self.model).__name__)
        self._check_fields(task, question, pair, calibrated)
        if task == "ForSequenceClassification":
            return self._judge_sequence(index, text, pair, calibrated)
        encoded = self.tokenizer.backend_tokenizer.encode(*([text] if question is None else [question, text]))
        self._check_length(index, len(encoded.ids))
        if question is not None and hasattr(self.model.config, NO_ANSWER):
            return {"index": index, **self._trained_answer(question, text)}, len(encoded.ids)
        with torch.inference_mode():
            out = self.model(input_ids=torch.tensor([encoded.ids], device=self.model.device))
        if question is not None:
            found = _answer(out, encoded, text)
        else:
            found = {"tokens": self._tokens(out.logits[0].double(), encoded, text)}
        return {"index": index, **found}, len(encoded.ids)

    def _check_fields(self, task: str | None, question: str | None, pair: str | None, calibrated: bool) -> None:
        answers, labels = task == "ForQuestionAnswering", task == "ForSequenceClassification"
        if answers != (question is not None):
            needs = "needs a question" if answers else "takes no question"
            raise ApiError(f"the model {self.name!r} {needs}", param="question")
        for field, given in (("pair", pair is not None), ("calibrated", calibrated)):
            if given and not labels:
                raise ApiError(f"the model {self.name!r} takes no {field}: it is no sequence classifier", param=field)

    def _check_length(self, index: int, count: int) -> None:
        if not 0 < count <= self.context:
            raise ApiError(
                f"input {index} has {count} tokens; the model {self.name!r} takes 1 to {self.context}",
                param="input",
                code="context_length_exceeded",
            )

    def _judge_sequence(self, index: int, text: str, pair: str | None, calibrated: bool) -> tuple[dict[str, Any], int]:
        config, encode = self.model.config, encoder_of(self.model.config)
        if encode is encode_turns:  # cuts messages, so they are counted before
            count = sum(len(self.tokenizer.backend_tokenizer.encode(each).ids) for each in (text, pair or ""))
            self._check_length(index, count)
            [ids] = encode(self.tokenizer, [(text, pair)], self.context)
        else:
            try:
                [ids] = encode(self.tokenizer, [(text, pair)], self.context + 1)
            except ValueError as error:
                raise ApiError(f"input {index}: {error}", param="input") from None
            count = len(ids)
            self._check_length(index, count)
        if not set(ids) - {config.pad_token_id} or is_padding(self.tokenizer, text):
            raise ApiError(f"input {index} has no tokens but padding", param="input")
        try:
            temperature = stored_temperature(vars(config), self.name) if calibrated else 1.0
        except ValueError as error:
            raise ApiError(str(error), param="calibrated") from None
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([ids], device=self.model.device)).logits[0].double()
        return {"index": index, **self._label(logits / temperature)}, count

    def _label(self, logits: torch.Tensor) -> dict[str, Any]:
        if self.model.config.problem_type == PROBLEM_TYPES["number"]:
            _require_finite(logits.tolist())
            return {"value": logits[0].item()}
        several = self.model.config.problem_type == PROBLEM_TYPES["several"] or len(logits) == 1
        probabilities = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        _require_finite(probabilities)
        return {"label": self.labels[best], "probs": probabilities, "num_classes": len(probabilities)}

    def _trained_answer(self, question: str, context: str) -> dict[str, Any]:
        """The answer of a model that `minitron finetune` trained, as `minitron predict` gives it."""
        config, asked = self.model.config, Question(context, question.strip(), (), None)
        pad = pad_id(self.tokenizer) if config.pad_token_id is None else config.pad_token_id
        [span] = predict_spans(self.model, self.tokenizer, [asked], pad, self.context, bool(getattr(config, NO_ANSWER)))
        _require_finite([span.score])
        return {"answer": span.text, "start": span.start, "end": span.start + len(span.text), "prob": span.score}

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
