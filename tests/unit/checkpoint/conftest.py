from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_samples import random_state, save_reference, tiny_config

from minitron.config import NemotronConfig


@pytest.fixture
def config() -> NemotronConfig:
    return tiny_config()


@pytest.fixture
def hf_folder(tmp_path: Path, config: NemotronConfig) -> Path:
    return save_reference(tmp_path / "hf", config, random_state(config))
