"""Teach the question-answering head to find a word: a language-model checkpoint gives the backbone.

    python examples/question_answering.py [CHECKPOINT]

Without an argument it starts from the bundled model. The task is made up on the spot (find the animal in a sentence),
so that it is learnt in seconds on a CPU; any data with start and end positions works the same way.
"""

from __future__ import annotations

import random
import sys

import torch

import minitron

ANIMALS = ["cat", "dog", "horse", "bird", "fish", "cow", "hen", "fox"]
SENTENCES = ["The old {} sat by the door.", "Anna saw a {} in the garden.", "In the night the {} ran away."]


def example(tokenizer, rng: random.Random) -> tuple[torch.Tensor, int, int]:
    """Token ids, and the first and last token of the animal."""
    before, after = rng.choice(SENTENCES).split("{}")
    start = len(tokenizer(before.rstrip())["input_ids"])
    end = len(tokenizer(before + (animal := rng.choice(ANIMALS)))["input_ids"]) - 1
    return torch.tensor([tokenizer(before + animal + after)["input_ids"]]), start, end


def main() -> None:
    torch.manual_seed(0)
    path = sys.argv[1] if len(sys.argv) > 1 else minitron.bundled_model()
    tokenizer = minitron.load_tokenizer(path)
    model = minitron.NemotronForQuestionAnswering.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    rng = random.Random(0)
    for step in range(60):
        ids, start, end = example(tokenizer, rng)
        loss = model(ids, start_positions=torch.tensor([start]), end_positions=torch.tensor([end])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.eval()
    ids, start, end = example(tokenizer, random.Random(1))
    with torch.no_grad():
        out = model(ids)
    first, last = out.start_logits.argmax().item(), out.end_logits.argmax().item()
    print(f"sentence: {tokenizer.decode(ids[0], skip_special_tokens=True)}")
    print(f"found:    {tokenizer.decode(ids[0, first : last + 1]).strip()!r}")


if __name__ == "__main__":
    main()
