"""Run NeMo Guardrails against the configuration that `minitron guard init` writes.

    python scripts/guardrails.py       what `make guardrails` runs; a minute, after its packages are installed

It runs tests in which every rail acts against a stand-in server, and then examples/guardrails/run.py against
`minitron serve` itself.

NeMo Guardrails cannot be installed beside transformers 5 (its fastembed wants huggingface-hub below 2), so it gets an
environment of its own, `.venv-guardrails`, and talks to the server over HTTP, as its users do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv-guardrails"
REQUIREMENTS = ["nemoguardrails==0.24.1", "openai>=1"]
TESTS = ["tests/parity/test_nemo_guardrails.py"]


def main() -> int:
    """Make the environment if it is missing and run the tests; 0 if all of them passed."""
    python, ready = HOME / "bin/python", HOME / ".ready"
    if not ready.exists():
        venv.create(HOME, clear=True, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            print(f"{REQUIREMENTS[0]} cannot be installed here, so its tests did not run: {reason}")
            return 1
        ready.touch()
    environment = {**os.environ, "MINITRON_GUARDRAILS": str(python)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    example = [sys.executable, "examples/guardrails/run.py", "--python", str(python)]
    return code or subprocess.run(example, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
