"""Writing GGUF files for llama.cpp: gains of norms in float32, matrices as bf16, f16, f32, q8_0 or q4_0.

The `gguf` package writes the header; tensors are converted and written a block of rows at a time. A shape that
llama.cpp cannot load (heads * head_dim != hidden_size in versions without the fix) is written right all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from minitron.families import family_of
from minitron.shapes import describe

from ...files import new_file, require_space
from ..limits import require
from ..names import hf_to_gguf, is_norm_weight
from ..tensors import Checkpoint, LazyTensor, ahead, from_tensor, raw, write_all
from ..tokenizer_verify import require_exact
from .read import _gguf
from .rotary_rows import INTERLEAVED, interleaved, is_rotated
from .settings import add_keys, llama3_factors, yarn_options
from .tokenizer import Vocabulary
from .vocab import EOS_IDS_KEY, HF_JSON_KEY, vocabulary_of

QUANTIZATIONS = ("f32", "f16", "bf16", "q8_0", "q4_0")
_WORKERS = 2
_CHUNK_ROWS_BYTES = 1 << 19  # of float32: a chunk and its temporaries stay in the processor's cache


@dataclass(frozen=True)
class _Plan:
    """One tensor of the file: its name, its ggml type, its bytes per row, how a block becomes bytes."""

    name: str
    source: LazyTensor
    kind: Any
    nbytes: int
    encode: Callable[[torch.Tensor], memoryview]


def write_gguf(
    checkpoint: Checkpoint,
    target: Path,
    *,
    quantization: str = "bf16",
    overwrite: bool = False,
    name: str = "",
    lossy: bool = True,
) -> list[str]:
    """Write a GGUF file; all or nothing; memory: one block of one tensor. Returns notes for the user.

    Args:
        checkpoint: a causal language model under Hugging Face names.
        target: the file.
        quantization: type of the matrices: "f32", "f16", "bf16", "q8_0" or "q4_0". Vectors are float32. A matrix whose
            rows are not a multiple of the block (32) stays f16; with q4_0 the output matrix is q8_0.
        overwrite: replace an existing file.
        name: `general.name` in the file.
        lossy: write a tokenizer even if llama.cpp tokenizes some texts differently, with a note.

    Raises:
        CheckpointError: an activation or RoPE type that llama.cpp does not have; texts that it
            would read otherwise, unless `lossy`.
        TargetError: the target is there and `overwrite` is false.
        WriteError: no room on the disk.
    """
    gguf = _gguf()
    require(
        quantization in QUANTIZATIONS, f"quantization is {quantization!r}, expected one of {', '.join(QUANTIZATIONS)}"
    )
    vocabulary = vocabulary_of(checkpoint)
    inexact = require_exact(vocabulary.differences, lossy=lossy) if vocabulary else []
    plans = _plans(checkpoint, quantization, gguf)
    require_space(target, sum(plan.nbytes for plan in plans))
    writer = gguf.GGUFWriter(path=None, arch=family_of(checkpoint.config).gguf)
    add_keys(writer, checkpoint.config, quantization, name or target.stem, gguf)
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_vocabulary(writer, vocabulary)
    for plan in plans:
        writer.add_tensor_info(plan.name, list(plan.source.shape), np.dtype(np.float32), plan.nbytes, plan.kind)
    with new_file(target, overwrite=overwrite) as draft:
        try:
            writer.write_header_to_file(draft)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            file = writer.fout[0]
            writer.write_padding(file, file.tell())
            _write_tensors(writer, file, plans)
        finally:
            writer.close()
    return [*inexact, *_notes(checkpoint.config, vocabulary)]


def _notes(config: Any, vocabulary: Vocabulary | None) -> list[str]:
    notes = list(vocabulary.notes) if vocabulary else ["no tokenizer in the source: the file has no vocabulary"]
    shape = describe(config)
    narrow = shape.heads * shape.head_dim != shape.hidden
    if narrow and shape.family.gguf == "nemotron":
        notes.append(
            f"{shape.heads} heads of {shape.head_dim} are not hidden_size ({shape.hidden}); "
            "llama.cpp before its fix for this shape (#23343) refuses to load it, the file is right"
        )
    options = yarn_options(config)
    if options:
        notes.append(f"llama.cpp does not read yarn's betas from a {shape.family.title} file; run it with {options}")
    return notes


def _write_tensors(writer: Any, file: BinaryIO, plans: list[_Plan]) -> None:
    left = {plan.name: plan.nbytes for plan in plans}
    for plan, data in _encoded(plans):
        write_all(file, data)
        left[plan.name] -= len(data)
        if not left[plan.name]:
            writer.write_padding(file, plan.nbytes)


def _encoded(plans: list[_Plan]) -> Iterator[tuple[_Plan, memoryview]]:
    """Every block of every tensor as bytes, in order; the next ones are read and converted meanwhile."""
    blocks = ((plan, block) for plan in plans for block in plan.source.blocks())
    waiting: deque[tuple[_Plan, Future[memoryview]]] = deque()
    with ThreadPoolExecutor(_WORKERS) as pool:
        for plan, block in ahead(blocks):
            waiting.append((plan, pool.submit(plan.encode, block)))
            if len(waiting) > _WORKERS:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def _plans(checkpoint: Checkpoint, quantization: str, gguf: Any) -> list[_Plan]:
    shape, tensors = describe(checkpoint.config), dict(checkpoint.tensors)
    head, written_twice = "lm_head.weight", shape.family.gguf == "nemotron"
    if shape.tied:
        tensors.pop(head, None)
        if written_twice:  # llama.cpp takes the embedding where a relative's file has no head
            tensors[head] = tensors["model.embed_tokens.weight"]
        else:
            head = "model.embed_tokens.weight"
    plans = []
    for name, tensor in tensors.items():
        kind = quantization
        if len(tensor.shape) == 1:
            kind = "f32"
        elif kind.startswith("q") and tensor.shape[-1] % 32:
            kind = "f16"
        elif kind == "q4_0" and name == head:
            kind = "q8_0"
        if shape.family.gguf in INTERLEAVED and is_rotated(name):
            tensor = interleaved(tensor, shape.head_dim)
        encode = _fold_one if shape.family.norm.offset and is_norm_weight(name) else _ENCODERS[kind]
        ggml = gguf.GGMLQuantizationType[kind.upper()]
        block, size = gguf.GGML_QUANT_SIZES[ggml]
        plans.append(
            _Plan(hf_to_gguf(name), tensor, ggml, tensor.nbytes // tensor.dtype.itemsize // block * size, encode)
        )
    if shape.rope.get("rope_type") == "llama3":
        factors = from_tensor(torch.from_numpy(llama3_factors(shape.rope, shape.head_dim)).float())
        plans.append(
            _Plan("rope_freqs.weight", factors, gguf.GGMLQuantizationType.F32, factors.nbytes, _ENCODERS["f32"])
        )
    return plans


def _fold_one(block: torch.Tensor) -> memoryview:
    """LayerNorm1P stores gamma - 1, llama.cpp wants gamma; in float32, since bf16 would round it."""
    return raw(block.float() + 1.0)


def q8_0(block: torch.Tensor) -> memoryview:
    """ggml's Q8_0: per 32 values a float16 scale and 32 signed bytes; bit for bit what the gguf package writes."""
    values = block.reshape(-1, 32)
    out = torch.empty((values.shape[0], 34), dtype=torch.uint8)
    step = _CHUNK_ROWS_BYTES // 128
    for start in range(0, values.shape[0], step):
        chunk = values[start : start + step].float()
        scale = chunk.abs().amax(dim=1, keepdim=True).div_(127.0)
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        chunk.mul_(inverse)
        # C's roundf: halves away from zero. Adding the float below 0.5 and cutting off is exactly that.
        chunk.add_(torch.copysign(_BELOW_HALF, chunk))
        part = out[start : start + step]
        part[:, :2] = scale.to(torch.float16).view(torch.uint8)
        part[:, 2:] = chunk.to(torch.int8).view(torch.uint8)
    return raw(out)


_BELOW_HALF = torch.tensor(0.49999997)


def q4_0(block: torch.Tensor) -> memoryview:
    """ggml's Q4_0 by the gguf package, in pieces that bound its temporaries."""
    gguf = _gguf()
    values = block.reshape(-1, 32)
    step = _CHUNK_ROWS_BYTES // 128
    parts = [
        gguf.quants.quantize(values[start : start + step].float().numpy(), gguf.GGMLQuantizationType.Q4_0)
        for start in range(0, values.shape[0], step)
    ]
    return np.concatenate(parts).reshape(-1).data


_ENCODERS: dict[str, Callable[[torch.Tensor], memoryview]] = {
    "f32": lambda block: raw(block.float()),
    "f16": lambda block: raw(block.to(torch.float16)),
    "bf16": lambda block: raw(block.to(torch.bfloat16)),
    "q8_0": q8_0,
    "q4_0": q4_0,
}


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """The tokenizer's keys."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges or [""])  # llama.cpp wants the key, empty or not
    for name, number in vocabulary.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    # Always written: what llama.cpp does without these keys depends on the kind of tokenizer.
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if len(vocabulary.eos_ids) > 1:
        writer.add_array(EOS_IDS_KEY, vocabulary.eos_ids)
    _add_templates(writer, vocabulary.chat_templates)
    if vocabulary.hf_json:
        writer.add_string(HF_JSON_KEY, vocabulary.hf_json)


def _add_templates(writer: Any, templates: dict[str, str]) -> None:
    """Chat templates under their own names (the gguf package would rewrite the names)."""
    if "default" in templates:
        writer.add_string("tokenizer.chat_template", templates["default"])
    named = {name: text for name, text in templates.items() if name != "default"}
    for name, text in named.items():
        writer.add_string(f"tokenizer.chat_template.{name}", text)
    if named:
        writer.add_array("tokenizer.chat_templates", sorted(named))
