"""`minitron finetune --task dpo` and `--task reward`: preferences."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..checkpoint.fingerprint import fingerprint
from ..data.examples import Conversation, Examples
from ..data.preferences import Preference, preference
from ..train.adapters import choose_trained
from ..train.stream import Measure
from .encoding import REPLIES
from .models import head_model, language_model, pad_id
from .pairs import Pair, PairStream, encode_pairs, pad_pairs, pairs_digest, show_pair
from .preferences import PreferenceLoss, RewardLoss, reply_log_probabilities, rewards, with_reference
from .task import PREVIEWED, Inputs, Job, split_parts

Scores = Callable[[nn.Module, Sequence[Pair]], dict[str, float]]


def dpo_job(inputs: Inputs) -> Job:
    """Preferences learned by the language model itself, measured against itself before training."""
    options = inputs.options
    parts, notes, _ = _encoded(inputs)
    pad = pad_id(inputs.tokenizer)
    model = language_model(inputs.folder, inputs.device)
    if not options.preview:
        parts = _with_references(inputs, model, parts, pad)
    model = choose_trained(model, options.tune, options.lora_rank)
    loss = PreferenceLoss(options.preference_loss, options.beta, options.sft_weight)
    identity = {"task": "dpo", "loss": options.preference_loss, "beta": options.beta, "sft_weight": options.sft_weight}

    @torch.no_grad()
    def scored(trained: nn.Module, pairs: Sequence[Pair]) -> dict[str, float]:
        found = []
        for batch in _batches(trained, pairs, pad):
            losses, margins = loss.of_log_probabilities(reply_log_probabilities(trained, batch), batch)
            found.append(torch.stack([losses, margins, (margins > 0).float()]).cpu())
        means = torch.cat(found, 1).double().mean(1).tolist()
        return {"accuracy": means[2], "margin": means[1], "loss": means[0]}

    def before(pairs: Sequence[Pair]) -> dict[str, float]:
        likelier = [pair.reference[0] > pair.reference[1] for pair in pairs if pair.reference is not None]
        return {"accuracy": float(np.mean(likelier))}

    return _job(inputs, model, loss, identity, parts, notes, pad, scored, {"likelier reply before training": before})


def reward_job(inputs: Inputs) -> Job:
    """Preferences learned by a head with one output, the reward of a reply."""
    options = inputs.options
    parts, notes, messages = _encoded(inputs)
    config = {"num_labels": 1, "problem_type": "regression", "id2label": {0: "value"}, "label2id": {"value": 0},
              "text_format": REPLIES[messages]}  # fmt: skip
    model, pad = head_model(
        inputs.folder, inputs.tokenizer, "sequence-classification", config, inputs.seed, inputs.device
    )
    model = choose_trained(model, options.tune, options.lora_rank, whole=("score",))

    @torch.no_grad()
    def scored(trained: nn.Module, pairs: Sequence[Pair]) -> dict[str, float]:
        found = [torch.stack(rewards(trained, batch).chunk(2)).cpu() for batch in _batches(trained, pairs, pad)]
        chosen, rejected = torch.cat(found, 1).double()
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        return {
            "accuracy": float((chosen > rejected).double().mean()),
            "margin": float((chosen - rejected).mean()),
            "loss": float(loss),
        }

    return _job(inputs, model, RewardLoss(), {"task": "reward"}, parts, notes, pad, scored, {})


Parts = tuple[list[Pair], list[Pair], list[Pair]]


def _encoded(inputs: Inputs) -> tuple[Parts, list[str], bool]:
    """Pairs for training, validation and test (empty where there are none), notes, and whether they are messages."""
    options = inputs.options
    parts = split_parts(options, preference, inputs.seed, named_test=True)
    inputs.say(f"encoding {sum(len(part) for part in parts if part is not None):,} pairs")
    notes: list[str] = [*parts[0].notes]

    def encode(part: Examples[Preference] | None) -> list[Pair]:
        if part is None:
            return []
        pairs, found = encode_pairs(inputs.tokenizer, part, inputs.sequence, options.rows.skip_bad)
        notes.extend(found)
        return pairs

    train, valid, test = (encode(part) for part in parts)
    return (train, valid, test), notes, isinstance(parts[0].items[0].chosen, Conversation)


def _with_references(inputs: Inputs, model: nn.Module, parts: Parts, pad: int) -> Parts:
    model.eval()
    base = fingerprint(inputs.folder)

    def known(pairs: list[Pair]) -> list[Pair]:
        if not pairs:
            return pairs
        key = hashlib.sha256(f"{base} {pad} {pairs_digest(pairs)}".encode()).hexdigest()[:32]
        return with_reference(model, pairs, pad, inputs.cache / f"{key}.f64")

    inputs.say(f"log-probabilities of {sum(map(len, parts)):,} pairs before training ({inputs.cache})")
    train, valid, test = map(known, parts)
    model.train()
    return train, valid, test


def _batches(model: nn.Module, pairs: Sequence[Pair], pad: int, at_once: int = 4) -> Any:
    device = next(model.parameters()).device
    return (pad_pairs(pairs[i : i + at_once], pad).to(device) for i in range(0, len(pairs), at_once))


def _job(
    inputs: Inputs,
    model: nn.Module,
    loss: nn.Module,
    identity: dict[str, Any],
    parts: Parts,
    notes: Sequence[str],
    pad: int,
    scored: Scores,
    baselines: Mapping[str, Callable[[Sequence[Pair]], dict[str, float]]],
) -> Job:
    train, valid, test = parts
    task = identity["task"]
    measures: dict[str, Measure] = {"validation": lambda trained: scored(trained, valid)} if valid else {}

    def report(trained: nn.Module) -> dict[str, Any]:
        found = {"task": task, "train_rows": len(train)}
        if not test:
            return found
        inputs.say(f"measuring {len(test):,} test pairs")
        trained.eval()
        longer = float(np.mean([len(pair.chosen.ids) > len(pair.rejected.ids) for pair in test]))
        others = {name: measure(test) for name, measure in baselines.items()}
        scores = {"model": scored(trained, test), **others, "longer reply": {"accuracy": longer}}
        return {**found, "test_rows": len(test), "scores": scores}

    preview = tuple(show_pair(inputs.tokenizer, pair) for pair in train[:PREVIEWED])
    stream = PairStream(train, pad, inputs.seed, inputs.sequence)
    return Job(model, stream, loss, identity, measures, preview, tuple(notes), report)
