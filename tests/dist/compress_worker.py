"""`minitron` as torchrun starts it; where FAILS_IN names a process, training fails there, and in no other.

`python -m torch.distributed.run ... compress_worker.py VERB ...`
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from minitron.cli import main
from minitron.train.trainer import Trainer

torch.set_num_threads(1)
if os.environ.get("FAILS_IN") == os.environ.get("RANK", "0"):

    def step(self: Any) -> dict[str, float]:
        raise ValueError("the floor is wet")

    Trainer.step = step  # type: ignore[method-assign]
sys.argv[0] = "minitron"
main()
