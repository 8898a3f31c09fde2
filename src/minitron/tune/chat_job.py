"""`minitron finetune --task chat`: conversations, of which the assistant's tokens are learned."""

from __future__ import annotations

import torch
from torch import nn

from ..data.examples import conversation
from ..train.adapters import choose_trained
from ..train.objective import next_token_loss
from ..train.stream import Measure
from .conversations import PackedConversations, render_all, show_learned
from .models import language_model
from .task import PREVIEWED, Inputs, Job, split_parts


def chat_job(inputs: Inputs) -> Job:
    """Conversations, packed, with the loss on what the assistant said."""
    tokenizer, options, sequence, seed = inputs.tokenizer, inputs.options, inputs.sequence, inputs.seed
    train, valid, _ = split_parts(options, conversation, seed, named_test=False)
    inputs.say(f"rendering {len(train) + (len(valid) if valid else 0):,} conversations")
    rendered = render_all(tokenizer, train, sequence, options.rows.skip_bad)
    stream = PackedConversations(rendered.turns, sequence, seed, rendered.digest)
    measures: dict[str, Measure] = {}
    notes = list(rendered.notes)
    if valid is not None:
        held = render_all(tokenizer, valid, sequence, options.rows.skip_bad)
        measures["validation"] = _ChatMeasure(PackedConversations(held.turns, sequence, seed, held.digest))
        notes += held.notes
    preview = tuple(show_learned(tokenizer, turns) for turns in rendered.turns[:PREVIEWED])
    notes.append(
        f"{stream.num_learned:,} of {sum(len(t.ids) for t in rendered.turns):,} tokens are learned, in {len(stream):,} "
        f"blocks of {sequence}"
    )
    model = choose_trained(language_model(inputs.folder, inputs.device), options.tune, options.lora_rank)
    return Job(
        model, stream, next_token_loss, {"task": "chat"}, measures, preview, tuple(notes), lambda _: {"task": "chat"}
    )


class _ChatMeasure:
    """The mean negative log-likelihood of what the assistant said: a `Measure`."""

    def __init__(self, packed: PackedConversations) -> None:
        self._packed = packed

    def __call__(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        for number in range(len(self._packed)):
            batch = self._packed.batch([number]).to(device)
            if batch.num_items:
                loss, _ = next_token_loss(model, batch)
                total += loss.double().cpu() * batch.num_items
                count += batch.num_items
        return {"nats_per_token": float(total) / max(1, count)}
