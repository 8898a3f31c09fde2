"""Compile every Triton kernel for GPUs that this machine need not have, and say what each takes.

    python scripts/compile_kernels.py [--smoke]

A kernel that passes the interpreter's tests may still not compile, or may need more registers or shared memory than
there are; this finds it without a GPU. It says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minitron.engine.cuda.kernels import attention, linear, mlp
from minitron.ops import loss_kernels

CAPABILITIES = (80, 89, 90)
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Shared memory of one program at most, by compute capability."""

_FLOATS = "*fp32"
_INTEGERS = dict.fromkeys(
    ("M", "N", "K", "F", "D", "S", "V", "stride", "parts", "slot_stride", "capacity", "start"), "i32"
)
_NUMBERS = dict.fromkeys(("eps", "scale", "inverse", "ce_weight"), "fp32")
_INDICES = {"index": "*i32", "counts": "*i32", "slots": "*i64", "positions": "*i64", "labels": "*i64"}


def cases(smoke: bool) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """(kernel, types of pointers that are not to fp32, constants)."""
    for format, stored in (("plain", "*bf16"), ("int8", "*u8"), ("int4", "*u8")):
        for rows in (1, 16, 32):
            if smoke and (format, rows) != ("int4", 1):
                continue
            matrices = dict.fromkeys(("weight", "gate", "up"), stored) | {"values": "*bf16"}
            scales = dict.fromkeys(("scales", "gate_scales", "up_scales"), "*bf16")
            absent = dict.fromkeys(scales, None) if format == "plain" else {}
            sizes = {"FORMAT": format, "DTYPE": tl.bfloat16, "ROWS": rows, **linear.tiles(rows), **absent}
            for kernel in (linear._linear, mlp._up, mlp._gated):
                yield kernel, {**matrices, **scales}, {**sizes, "NORM": 1 if rows < 32 else 0}
            down = {"BLOCKS": mlp.BLOCKS_AT_ONCE, "LISTED": mlp.LISTED_AT_ONCE, "BLOCK_D": mlp.DOWN_COLUMNS}
            yield mlp._down, {**matrices, **scales}, {**sizes, **down, "BLOCK": linear.tiles(rows)["BLOCK_N"]}
    yield linear._normalize, {"out": "*bf16"}, {"NORM": 1, "DTYPE": tl.bfloat16, "BLOCK_K": 1024}
    yield mlp._add_up, {}, {"BLOCK_D": 256}
    heads = {"GROUPS": 8, "HEADS": 24, "HEAD": 128, "HALF": 32, "CHANNELS": 128, "query_gain": None, "key_gain": None}
    for dtype in ("*bf16",) if smoke else ("*bf16", "*fp16", "*fp32"):
        cache = {"keys": dtype, "values": dtype, "out": dtype}
        stages = {"num_stages": 1, "num_warps": 8} if dtype == "*fp32" else {"num_stages": 2}
        for fused in (True,) if smoke else (True, False):
            yield (
                attention._attend,
                cache,
                {**heads, **stages, "QUERIES": 16, "KEYS": attention.BLOCK_KEYS, "FUSED": fused},
            )
        yield attention._write, cache, heads
        yield attention._join, cache, {"HEAD": 128, "CHANNELS": 128, "PARTS": attention.MOST_PARTS}
    logits = {"student": "*bf16", "teacher": "*bf16"}
    for kind in (2,) if smoke else range(4):
        some = {"KIND": kind, "BLOCK": loss_kernels._BLOCK, "num_warps": 8, **({} if kind else {"teacher": None})}
        yield loss_kernels._statistics, logits, {**some, "SOFT": kind % 2 == 0}
        yield loss_kernels._gradient, logits, {**some, "CE": True}


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int) -> dict[str, Any]:
    """What a kernel takes on GPUs of a compute capability."""
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    fixed = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {**_INTEGERS, **_NUMBERS, **_INDICES, **pointers}
    signature = {name: "constexpr" if name in fixed else types.get(name, _FLOATS) for name in kernel.arg_names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or signature[name] == "i32"
    }
    source = ASTSource(kernel, signature, fixed, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found = {
        "kernel": kernel.__name__,
        "capability": capability,
        "shared_bytes": made.metadata.shared,
        **resources(made),
    }
    return found | {
        name: str(value) for name, value in constants.items() if name in ("FORMAT", "ROWS", "KIND", "FUSED")
    }


def resources(made: Any) -> dict[str, int]:
    """Registers of a thread, and bytes of its own memory, to which registers spill."""
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(reader), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    patterns = {"registers": r"REG:(\d+)", "local_bytes": r"LOCAL:(\d+)", "stack_bytes": r"STACK:(\d+)"}
    return {name: int(re.findall(pattern, said)[-1]) for name, pattern in patterns.items()}


def main() -> int:
    """Compile, print a line of JSON for each, and fail if one takes more than there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few kernels for one kind of GPU")
    smoke = parser.parse_args().smoke
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set, so nothing is compiled; unset it", file=sys.stderr)
        return 2
    bad = 0
    for capability in (90,) if smoke else CAPABILITIES:
        for kernel, pointers, constants in cases(smoke):
            row = compiled(kernel, pointers, constants, capability)
            fits = row["shared_bytes"] <= SHARED_BYTES[capability]
            bad += not fits
            print(json.dumps({**row, "fits": fits}), flush=True)
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
