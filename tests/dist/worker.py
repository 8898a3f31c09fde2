"""Small runs in one, two and four processes over gloo: `python worker.py FOLDER` writes FOLDER/results.json.

The processes are forked from one that has imported everything, which saves most of the time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "samples"))
from family_samples import kind_config, small_model
from small_run import small_config, small_stream

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.distill.correction import CorrectedTeacher
from minitron.distill.losses import DistillOptions
from minitron.train.parallel import make_world
from minitron.distill.recipe import distill
from minitron.distill.targets import OnlineTeacher
from minitron.families import family_of
from minitron.family_models import causal_lm_class
from minitron.train.loop import train
from minitron.world import join, leave

STEPS = 6


def model(seed: int, **changes: Any) -> NemotronForCausalLM:
    """A model whose heads and neurons two processes can share."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = NemotronConfig(
        **{**shape, "num_key_value_heads": 2, **changes, **special},  # type: ignore[arg-type]
        vocab_size=50,
        max_position_embeddings=32,
        initializer_range=0.1,
    )
    return NemotronForCausalLM(config)


def relative(kind: str) -> Any:
    """A model of another family whose heads and neurons two processes can share."""
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = kind_config(kind, vocab_size=50, num_attention_heads=4, num_key_value_heads=2, **special)
    found = causal_lm_class(family_of(config))(config)
    found.load_state_dict(small_model(config).state_dict())
    return found


def settings(**changes: object) -> Any:
    """Eight sequences a step, two at once, so that two processes add up gradients too."""
    return small_config(STEPS, **{"batch": 8, "micro_batch": 2, "save_every": 3, "dtype": "float32", **changes})


def pretrain(run: Path, tensor: int, until: int | None, kind: str | None = None, **changes: object) -> Any:
    """Next-token training, with a held-out text."""
    stream = small_stream()
    world = make_world(tensor)
    return train(
        model(0) if kind is None else relative(kind),
        stream,
        settings(**changes),
        run,
        heldout={"t": stream.sources[0]},
        world=world,
        quiet=True,
        until=until,
    )


def in_eight_bits(run: Path, tensor: int, until: int | None) -> Any:
    """As `pretrain` with 8-bit averages; matrices are large enough to have some."""
    torch.compile = lambda function, **_: function  # type: ignore[assignment]  # compiling takes a minute
    return train(
        model(0, hidden_size=64, intermediate_size=128),
        small_stream(),
        settings(optimizer="adamw8bit"),
        run,
        world=make_world(tensor),
        quiet=True,
        until=until,
    )


def from_teacher(run: Path, tensor: int, until: int | None, **changes: object) -> Any:
    """Distillation with a trained projection and a teacher that learns beside."""
    stream = small_stream()
    teacher = model(1, hidden_size=24, num_attention_heads=6)
    return distill(
        model(0),
        CorrectedTeacher(teacher) if changes.pop("correct", True) else OnlineTeacher(teacher),
        stream,
        settings(**changes),
        run,
        options=DistillOptions(hidden="mse", layer_map=((0, 0), (1, 1)), embeddings=True),
        heldout={"t": stream.sources[0]},
        world=make_world(tensor),
        quiet=True,
        until=until,
    )


Task = Callable[..., Any]


def _child(rank: int, size: int, port: int, task: Task, arguments: tuple, options: dict, out: Any) -> None:
    torch.set_num_threads(1)
    try:
        if size > 1:
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            join("cpu")
        result = task(*arguments, **options)
        if rank == 0:
            out.put({**vars(result), "checkpoint": str(result.checkpoint), "model": str(result.model)})
        leave()
    except BaseException as error:
        traceback.print_exc()
        out.put({"error": f"{type(error).__name__}: {error}"})


def run(size: int, task: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    """The result of a task in so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    children = [
        context.Process(target=_child, args=(rank, size, port, task, arguments, options, out)) for rank in range(size)
    ]
    for child in children:
        child.start()
    result = out.get()
    for child in children:
        child.join(60)
    return result


def main(folder: Path) -> None:
    """All runs."""
    results = {
        "one": run(1, pretrain, folder / "one", 1, None),
        "two": run(2, pretrain, folder / "two", 1, None),
        "tensor": run(2, pretrain, folder / "tensor", 2, None),
        "grid": run(4, pretrain, folder / "grid", 2, None),
        "distill-one": run(1, from_teacher, folder / "distill-one", 1, None),
        "distill-two": run(2, from_teacher, folder / "distill-two", 1, None),
        "frozen-one": run(1, from_teacher, folder / "frozen-one", 1, None, correct=False),
        "frozen-two": run(2, from_teacher, folder / "frozen-two", 1, None, correct=False),
        "too-many": run(2, pretrain, folder / "too-many", 1, None, batch=8, micro_batch=8),
    }
    for name, sizes in {"2-4": (2, 4), "4-1": (4, 1), "1-2": (1, 2)}.items():
        before = run(sizes[0], pretrain, folder / name, 1, 3)
        results[name] = {"before": before, **run(sizes[1], pretrain, folder / name, 1, None)}
    for kind, size in (("llama-biased", 2), ("qwen2", 2), ("qwen3", 4)):
        results[f"{kind}-one"] = run(1, pretrain, folder / f"{kind}-one", 1, None, kind=kind)
        results[f"{kind}-many"] = run(size, pretrain, folder / f"{kind}-many", 2, None, kind=kind)
    results["8-bit"] = run(2, in_eight_bits, folder / "8-bit", 1, None)
    for size in (2, 1):
        before = run(2, in_eight_bits, folder / f"8-bit-2-{size}", 1, 3)
        results[f"8-bit-2-{size}"] = {"before": before, **run(size, in_eight_bits, folder / f"8-bit-2-{size}", 1, None)}
    before = run(1, in_eight_bits, folder / "8-bit-1-2", 1, 3)
    results["8-bit-1-2"] = {"before": before, **run(2, in_eight_bits, folder / "8-bit-1-2", 1, None)}
    before = run(2, from_teacher, folder / "distill-2-1", 1, 3)
    results["distill-2-1"] = {"before": before, **run(1, from_teacher, folder / "distill-2-1", 1, None)}
    (folder / "results.json").write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
