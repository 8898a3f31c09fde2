"""Settings for every test."""

from __future__ import annotations

import os

import torch

# The models of these tests are so small that starting a second thread costs more than it does.
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
