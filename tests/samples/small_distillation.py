"""A small distillation in a process of its own, for tests that kill it: `python small_distillation.py RUN STEPS`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from small_run import small_config, small_model, small_stream

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.distill.correction import CorrectedTeacher
from minitron.distill.losses import DistillOptions
from minitron.distill.recipe import distill
from minitron.train.loop import Result


def small_teacher() -> NemotronForCausalLM:
    """Wider than the student, and with its vocabulary."""
    torch.manual_seed(1)
    shape = {**small_model().config.to_dict(), "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
    shape["head_dim"] = 8
    return NemotronForCausalLM(NemotronConfig(**shape))


def small_distillation(run: Path, steps: int) -> Result:
    """Distil or continue: two forward passes a step, dropout, a projection, and a teacher that learns beside."""
    options = DistillOptions(hidden="cosine", layer_map=((1, 1),))
    return distill(
        small_model(dropout=0.1),
        CorrectedTeacher(small_teacher()),
        small_stream(),
        small_config(steps),
        run,
        options=options,
        quiet=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    small_distillation(Path(sys.argv[1]), int(sys.argv[2]))
    print("finished")
