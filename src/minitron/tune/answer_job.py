"""`minitron finetune --task qa`: answers within texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..data.annotated import Question, question
from ..data.examples import Examples
from ..train.adapters import choose_trained
from ..train.stream import Measure
from .answer_scores import answer_scores, sentence_baseline
from .answers import SpanLoss, answer_rows, predict_spans
from .models import attention_config, head_model
from .rows import RowStream
from .task import PREVIEWED, Inputs, Job, split_parts

NO_ANSWER = "has_unanswerable"
"""Field of the configuration: whether questions without an answer were learned."""


def answer_job(inputs: Inputs) -> Job:
    """Questions about texts under a question answering head."""
    options, tokenizer = inputs.options, inputs.tokenizer
    train, valid, test = split_parts(options, question, inputs.seed, named_test=True)
    if not any(item.answers for item in train.items):
        raise ValueError("no question of the training rows has an answer, so there is nothing to learn")
    no_answer = not all(item.answers for item in train.items)
    inputs.say(f"encoding {len(train):,} questions")
    rows = answer_rows(tokenizer, train, inputs.sequence)
    config = {NO_ANSWER: no_answer, **attention_config(options.attention, inputs.folder)}
    model, pad = head_model(inputs.folder, tokenizer, "question-answering", config, inputs.seed, inputs.device)
    model = choose_trained(model, options.tune, options.lora_rank, whole=("qa_outputs",))

    def scored(trained: nn.Module, part: Examples[Question]) -> dict[str, float]:
        spans = predict_spans(trained, tokenizer, part.items, pad, inputs.sequence, no_answer)
        return answer_scores([span.text for span in spans], part.items)

    measures: dict[str, Measure] = {}
    if valid is not None:
        held = valid

        def validation(trained: nn.Module) -> Mapping[str, float]:
            return scored(trained, held)

        measures["validation"] = validation

    @torch.no_grad()
    def report(trained: nn.Module) -> dict[str, Any]:
        found = {"task": "qa", "train_rows": len(train), "attention": options.attention, NO_ANSWER: no_answer}
        if test is None:
            return found
        inputs.say(f"measuring {len(test):,} test questions and the baseline")
        trained.eval()
        scores = {"model": scored(trained, test), "most similar sentence": sentence_baseline(test.items)}
        return {**found, "test_rows": len(test), "scores": scores}

    many = len(rows) - len(train)
    notes = [*train.notes, *([f"texts that are longer than a window add {many:,} windows"] if many else [])]
    identity = {"task": "qa", "no_answer": no_answer, "attention": options.attention}
    return Job(model, RowStream(rows, pad, inputs.seed, inputs.sequence), SpanLoss(), identity, measures,
               tuple(map(marked, train.items[:PREVIEWED])), tuple(notes), report)  # fmt: skip


def marked(item: Question) -> str:
    """A question and its text, the answer between `[[` and `]]`."""
    if item.start is None:
        return f"{item.question}\n{item.context}\n[[no answer]]"
    stop = item.start + len(item.answers[0])
    return f"{item.question}\n{item.context[: item.start]}[[{item.answers[0]}]]{item.context[stop:]}"
