"""How long a user waits: from the shell to the first new text, for help, for an error, and for a call of `generate`.

    python benchmarks/startup.py                interleaved rounds, files warm
    python benchmarks/startup.py --rounds 9
    python benchmarks/startup.py --smoke        one round: does it run?

Prints JSON: medians in seconds; for each command the median ratio to `import torch` of the same round; milliseconds
that a call spends outside the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from minitron.assets import bundled_model

PROMPT = "Once upon a time"
_MINITRON = [sys.executable, "-m", "minitron"]
_TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
sys.stdout.write(sys.argv[2])
inputs = tokenizer(sys.argv[2], return_tensors="pt")
inputs.pop("token_type_ids", None)
model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
"""


def commands() -> dict[str, tuple[list[str], bool]]:
    """For each name a command, and whether its time ends with the first text after the prompt instead of its end."""

    def code(text: str) -> tuple[list[str], bool]:
        return [sys.executable, "-c", text], False

    def generate(*options: str) -> tuple[list[str], bool]:
        return [*_MINITRON, "generate", "-p", PROMPT, "-n", "5", *options], True

    return {
        "import torch": code("import torch"),
        "python": code("pass"),
        "import typer": code("import typer._adapters"),
        "import numpy": code("import numpy"),
        "import numba": code("import numba"),
        "import tokenizers": code("import tokenizers"),
        "minitron --help": ([*_MINITRON, "--help"], False),
        "minitron generate --help": ([*_MINITRON, "generate", "--help"], False),
        "a missing folder": ([*_MINITRON, "generate", "no/such/folder", "-p", "x"], False),
        "an unknown option": ([*_MINITRON, "generate", "--nothing"], False),
        "first text, greedy": generate("--temperature", "0"),
        "first text, sampled": generate("--seed", "1"),
        "first text, greedy, by torch": generate("--temperature", "0", "--dtype", "bf16"),
        "first text, greedy, transformers": (
            [sys.executable, "-c", _TRANSFORMERS, str(bundled_model()), PROMPT],
            True,
        ),
    }


def seconds(command: list[str], first_text: bool) -> float:
    """From the start of a process to its end, or until it has written more than the prompt."""
    start = time.perf_counter()
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        needed, written, taken = len(PROMPT.encode()), b"", 0.0
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            written += piece
            if first_text and not taken and len(written.strip()) > needed:
                taken = time.perf_counter() - start
        process.wait()
    if first_text and not taken:
        raise RuntimeError(f"{command} wrote {written!r}")
    return taken or time.perf_counter() - start


def overheads(rounds: int) -> dict[str, float]:
    """Milliseconds of calls that write one token, beside those of the engine alone: medians of interleaved rounds.

    Before each is a pause, as between calls of a person: threads of the engine before spin for some milliseconds.
    """
    import torch

    import minitron
    from minitron.engine.cpu.engine import CpuEngine
    from minitron.engine.model_weights import weights_of
    from minitron.light.stream import LightModel, LightStream
    from minitron.sampling_parameters import SamplingParameters

    model, tokenizer = minitron.load(device="cpu")
    light, one = LightModel(bundled_model()), SamplingParameters(temperature=0, max_new_tokens=1)
    ids: list[int] = tokenizer(PROMPT)["input_ids"]  # type: ignore[assignment]
    engine = CpuEngine(weights_of(model), 64)

    def in_engine() -> None:
        engine.truncate(0)
        engine.prefill(ids[:-1])
        engine.greedy(ids[-1:], 1)

    def in_light() -> None:
        with LightStream(light, PROMPT, one) as stream:
            list(stream)

    works: dict[str, Callable[[], Any]] = {
        "prompt and token in an open engine": in_engine,
        "engine opened": lambda: CpuEngine(engine.weights, 64).prepare(len(ids)),
        "stream without torch": in_light,
        "model.generate": lambda: model.generate(torch.tensor([ids]), max_new_tokens=1, do_sample=False),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds + 1):
        for name, work in works.items():
            time.sleep(0.05)
            start = time.perf_counter()
            work()
            if index:
                found[name].append(1000 * (time.perf_counter() - start))
    engine.close()
    return {name: round(statistics.median(times), 2) for name, times in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="words; commands whose names have none of them are left out")
    parser.add_argument("--smoke", action="store_true", help="one round")
    options = parser.parse_args()
    rounds = 1 if options.smoke else options.rounds
    chosen = {
        name: command
        for name, command in commands().items()
        if name == "import torch" or not options.only or any(word in name for word in options.only)
    }
    found: dict[str, list[float]] = {name: [] for name in chosen}
    for index in range(rounds + (not options.smoke)):
        for name, (command, first_text) in chosen.items():
            taken = seconds(command, first_text)
            if index or options.smoke:  # the first round warms the files
                found[name].append(taken)
    ratios = {
        name: [taken / torch for taken, torch in zip(times, found["import torch"], strict=True)]
        for name, times in found.items()
    }
    print(
        json.dumps(
            {
                "rounds": rounds,
                "seconds": {name: round(statistics.median(times), 3) for name, times in found.items()},
                "of import torch": {name: round(statistics.median(times), 2) for name, times in ratios.items()},
                "milliseconds of a call": {} if options.only else overheads(3 if options.smoke else 4 * rounds),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
