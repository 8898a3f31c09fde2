"""`minitron finetune --task ner`: names in texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..data.annotated import Tagged, entities_of, tagged
from ..data.examples import Examples
from ..train.adapters import choose_trained
from ..train.stream import Measure
from .models import attention_config, head_model
from .name_scores import by_type, name_baselines, name_scores
from .names import TagSet, TokenLoss, name_rows, predict_tags
from .rows import RowStream
from .task import PREVIEWED, Inputs, Job, split_parts


def name_job(inputs: Inputs) -> Job:
    """Texts with tagged words under a token classification head."""
    options, tokenizer = inputs.options, inputs.tokenizer
    train, valid, test = split_parts(options, tagged(options.tag_names), inputs.seed, named_test=True)
    tags = TagSet.of(train)
    inputs.say(f"encoding {len(train):,} texts")
    rows, notes = name_rows(tokenizer, train, tags, inputs.sequence, options.rows.skip_bad)
    reading = attention_config(options.attention, inputs.folder)
    model, pad = head_model(
        inputs.folder, tokenizer, "token-classification", {**tags.config(), **reading}, inputs.seed, inputs.device
    )
    model = choose_trained(model, options.tune, options.lora_rank, whole=("score",))

    def scored(trained: nn.Module, part: Examples[Tagged]) -> list[list[str]]:
        found = predict_tags(trained, tokenizer, part.items, tags, pad, inputs.sequence)
        return [each for each, _ in found]

    measures: dict[str, Measure] = {}
    if valid is not None:
        held = valid

        def validation(trained: nn.Module) -> Mapping[str, float]:
            return name_scores(scored(trained, held), [item.tags for item in held.items])

        measures["validation"] = validation

    @torch.no_grad()
    def report(trained: nn.Module) -> dict[str, Any]:
        found = {"task": "ner", "labels": list(tags.types), "train_rows": len(train), "attention": options.attention}
        if test is None:
            return found
        inputs.say(f"measuring {len(test):,} test rows and the baselines")
        trained.eval()
        predicted, truth = scored(trained, test), [item.tags for item in test.items]
        return {
            **found,
            "test_rows": len(test),
            "scores": {"model": name_scores(predicted, truth), **name_baselines(train.items, test.items, tags)},
            "by_type": by_type(predicted, truth),
        }

    identity = {"task": "ner", "labels": list(tags.names), "attention": options.attention}
    return Job(model, RowStream(rows, pad, inputs.seed, inputs.sequence), TokenLoss(), identity, measures,
               tuple(map(marked, train.items[:PREVIEWED])), (*train.notes, *notes), report)  # fmt: skip


def marked(item: Tagged) -> str:
    """A text with its names between `[[` and `]]`, each with its type."""
    out, last = "", 0
    for kind, first, stop in entities_of(item.tags):
        begins, ends = item.spans[first][0], item.spans[stop - 1][1]
        out += f"{item.text[last:begins]}[[{item.text[begins:ends]}|{kind}]]"
        last = ends
    return out + item.text[last:]
