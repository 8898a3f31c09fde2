"""Opens checkpoints, one path a line on stdin, and answers with what came of it and what it cost, as JSON."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from minitron.checkpoint.hf import check_checkpoint
from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.sources import open_checkpoint


def open_all(path: Path) -> None:
    """What the verbs do before anything else: `check_checkpoint` (transformers loads then), and our own reader."""
    if (path / "config.json").is_file():
        check_checkpoint(path)
    with tempfile.TemporaryDirectory() as scratch, open_checkpoint(path, Path(scratch)) as checkpoint:
        for tensor in checkpoint.tensors.values():
            for _ in tensor.blocks():
                pass


def peak() -> int:
    """Bytes of the most memory this process has had since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def forget_peak() -> int:
    """Start to measure anew; the memory held now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def main() -> None:
    """Serve until stdin ends."""
    limit = 4 << 30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # so that a failing case does not take the machine with it
    for line in sys.stdin:
        path = Path(json.loads(line))
        before, begin = forget_peak(), time.process_time()
        try:
            open_all(path)
            kind, text = "opened", ""
        except CheckpointError as error:
            kind, text = "refused", str(error)
        except BaseException as error:
            kind, text = "failed", f"{type(error).__name__}: {str(error)[:500]}"
        answer = {"kind": kind, "text": text, "seconds": time.process_time() - begin, "bytes": peak() - before}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
