"""The head split among processes gives the loss, and the gradients, of the whole head."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_two_processes_with_a_part_of_the_vocabulary_each(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("sharded_head.py")), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "equal", done.stderr
