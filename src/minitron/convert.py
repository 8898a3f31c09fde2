"""Convert a checkpoint from one format to another: estimate, convert, verify, report.

Everything streams: the memory needed is a few blocks of one tensor, whatever the size of the model. The readers and
writers are in checkpoint/; this file calls them and verifies the result.
"""

from __future__ import annotations

import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from .checkpoint.detect import detect
from .checkpoint.gguf.write import QUANTIZATIONS, write_gguf
from .checkpoint.hf import DEFAULT_SHARD_BYTES, write_hf
from .checkpoint.limits import CheckpointError, require
from .checkpoint.names import is_norm_weight
from .checkpoint.nemo.write import write_nemo
from .checkpoint.sources import Observed, Observer, open_checkpoint
from .checkpoint.tensors import BLOCK_BYTES, Checkpoint, LazyTensor, raw, write_all
from .checkpoint.tokenizer_verify import require_exact, target_differences, verify_tokenizer
from .config import NemotronConfig
from .dtypes import parse_dtype
from .families import family_of
from .files import new_file, new_folder, written_bytes

TARGETS = ("hf", "nemo", "nemo2", "gguf")
_FOLDERS = ("hf", "nemo2")
_BY_SUFFIX = {".nemo": "nemo", ".gguf": "gguf"}
# Largest root-mean-square error of a block, relative to its root mean square, of normally distributed weights.
_QUANTIZATION_ERROR = {"q8_0": 0.01, "q4_0": 0.15}
_PROBE_BYTES = 800_000_000
_PROBE_TOKENS = 16
_PROBE_IMPORTS = 128 << 20
"""Memory of the model's own imports (measured)."""
_SAMPLE_BYTES = 64 << 20
_WORKING_MEMORY = 128 << 20
"""Memory of the measured conversions beyond the imports: blocks in flight, headers, a tokenizer."""


@dataclass(frozen=True)
class ConversionEstimate:
    """Bytes, memory and time of a conversion, estimated before it starts."""

    source_format: str
    target_format: str
    bytes_read: int
    bytes_written: int
    memory: int
    seconds: float


@dataclass
class ConversionReport:
    """The result of a conversion, as `minitron convert --json` prints it."""

    source: str
    target: str
    source_format: str
    target_format: str
    tensors: int = 0
    parameters: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    seconds_verify: float = 0.0
    peak_memory: int = 0
    verified: bool = False
    texts_compared: int = 0
    probe: dict[str, float] | None = None
    checksums: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ConversionOptions:
    """How to convert."""

    to: str | None = None
    """"hf", "nemo", "nemo2" or "gguf"; None: from the target's name (`.nemo`, `.gguf`, otherwise a HF folder)."""
    dtype: str = "auto"
    """Dtype of the tensors: bf16, fp16 or fp32; "auto" keeps the source's (bf16 where the source is quantized)."""
    quantize: str | None = None
    """GGUF only: f32, f16, bf16, q8_0 or q4_0; None: the dtype."""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    config: str | None = None
    """For a bare Megatron folder: a preset or a config.json."""
    overwrite: bool = False
    verify: bool = True
    lossy: bool = False
    """Convert even if the target tokenizes some texts differently, with a note instead of an error."""

    def __post_init__(self) -> None:
        # llama.cpp writes Q8_0 and BF16; both spellings mean the same.
        for name in ("to", "dtype", "quantize"):
            value = getattr(self, name)
            object.__setattr__(self, name, value.lower() if isinstance(value, str) else value)


def convert(
    source: Path,
    target: Path,
    options: ConversionOptions | None = None,
    *,
    announce: Callable[[ConversionEstimate], object] = lambda _: None,
    progress: Callable[[int], object] = lambda _: None,
) -> ConversionReport:
    """Convert `source` to `target` and verify the result.

    Args:
        source: a Hugging Face folder, `.nemo` file or folder, NeMo 2 or Megatron folder, or GGUF file.
        target: the output; a folder for "hf" and "nemo2", a file for "nemo" and "gguf". All or nothing: it appears, and
            replaces an old one, when it is verified.
        options: see `ConversionOptions`.
        announce: called with the estimate before anything is written.
        progress: called with the number of bytes of each converted block.

    Raises:
        CheckpointError: the source cannot be read, a format lacks what is needed, or the verification finds a
            difference.
        TargetError: the target exists already, overlaps with the source, or holds files of others.
        WriteError: the disk is full or cannot be written.
    """
    options = options or ConversionOptions()
    kind = target_format(target, options)
    report = ConversionReport(str(source), str(target), detect(source), kind)
    new = new_folder if kind in _FOLDERS else new_file
    sources = [source, *([Path(options.config).expanduser()] if options.config else [])]
    with _one_thread(), new(target, overwrite=options.overwrite, sources=sources) as draft:
        _convert(source, draft, kind, options, report, announce, progress)
    report.peak_memory = _peak_memory()
    return report


def _convert(
    source: Path,
    draft: Path,
    kind: str,
    options: ConversionOptions,
    report: ConversionReport,
    announce: Callable[[ConversionEstimate], object],
    progress: Callable[[int], object],
) -> None:
    """Write and verify a draft; temporary files are next to it."""
    scratch = draft.parent
    with open_checkpoint(source, scratch, _config(options.config)) as opened:
        checkpoint = prepare(opened, options, kind)
        inexact = require_exact(target_differences(checkpoint, kind), lossy=options.lossy)
        announce(estimate(report.source_format, checkpoint, draft, kind, options))
        observer = Observer(progress)
        begin = time.perf_counter()
        report.notes = [*checkpoint.notes, *inexact, *_write(observer.watch(checkpoint), draft, kind, options)]
        report.seconds = time.perf_counter() - begin
        if observer.not_finite:
            report.notes.append(
                f"NaN or infinite values in {len(observer.not_finite)} tensors: {observer.not_finite[:5]}"
            )
        _describe(report, checkpoint, draft, observer)
        if options.verify:
            verify(checkpoint, observer, draft, kind, options, report, scratch)


def target_format(target: Path, options: ConversionOptions) -> str:
    """The format to write: as requested, or from the target's name.

    Raises:
        CheckpointError: an unknown format; a target's name that means another one; `quantize` for a format other than
            GGUF.
    """
    suffix = target.suffix.lower()
    kind = options.to or _BY_SUFFIX.get(suffix, "hf")
    require(kind in TARGETS, f"--to is {kind!r}, expected one of {', '.join(TARGETS)}")
    if options.to is None:
        # "Minitron-4.19B" is a valid name of a folder, "model.bin" is a mistake.
        known = suffix in _BY_SUFFIX or target.is_dir() or not re.fullmatch(r"\.[a-z]\w{0,11}", suffix)
        require(
            known,
            f"{target}: {target.suffix} is not a format that can be written; expected a folder's name (Hugging Face), "
            f"NAME.gguf or NAME.nemo, or --to {', '.join(TARGETS)}",
        )
    meant = _BY_SUFFIX.get(suffix, kind)
    require(meant == kind, f"{target}: the name is that of a {meant} file, and --to is {kind}; change one of them")
    if options.quantize is not None:
        require(kind == "gguf", f"--quantize {options.quantize} is for GGUF; the target is {kind}")
        require(
            options.quantize in QUANTIZATIONS,
            f"--quantize is {options.quantize!r}, expected one of {', '.join(QUANTIZATIONS)}",
        )
    try:
        parse_dtype(options.dtype, "--dtype")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return kind


def prepare(checkpoint: Checkpoint, options: ConversionOptions, kind: str) -> Checkpoint:
    """The checkpoint in the requested dtype, with the chat template that belongs to its special tokens."""
    dtype = parse_dtype(options.dtype)
    if dtype is None and any("dequantized" in note for note in checkpoint.notes):
        dtype = torch.bfloat16
    tensors = dict(checkpoint.tensors)
    if checkpoint.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if dtype is not None:
        # GGUF keeps vectors in float32, so rounding them on the way would only lose precision.
        tensors = {n: t if kind == "gguf" and len(t.shape) == 1 else t.to(dtype) for n, t in tensors.items()}
        checkpoint.config.dtype = dtype
    texts = dict(checkpoint.texts)
    if _wants_chat_template(checkpoint):
        from .assets import chat_template

        texts["chat_template.jinja"] = chat_template()
    return replace(checkpoint, tensors=tensors, texts=texts)


def _wants_chat_template(checkpoint: Checkpoint) -> bool:
    from .chat import SYSTEM_MARK, TURN_MARK

    made = checkpoint.texts.get("tokenizer.json", "")
    has_one = "chat_template.jinja" in {*checkpoint.files, *checkpoint.texts}
    return not has_one and SYSTEM_MARK in made and TURN_MARK in made


def _config(name: str | None) -> NemotronConfig | None:
    from .checkpoint.hf import read_config, read_config_file
    from .presets import PRESETS

    if name is None:
        return None
    if name in PRESETS:
        return NemotronConfig.preset(name)
    path = Path(name).expanduser()
    return read_config_file(path) if path.is_file() else read_config(path)


def _write(checkpoint: Checkpoint, target: Path, kind: str, options: ConversionOptions) -> list[str]:
    if kind == "hf":
        write_hf(checkpoint, target, max_shard_bytes=options.max_shard_bytes)
        return []
    if kind == "gguf":
        return write_gguf(checkpoint, target, quantization=_quantization(checkpoint, options), lossy=options.lossy)
    write_nemo(checkpoint, target, form=kind)
    if "tokenizer.model" not in checkpoint.files and kind == "nemo":
        return ["no SentencePiece model in the source: NeMo will need to be told where its tokenizer is"]
    return []


def _quantization(checkpoint: Checkpoint, options: ConversionOptions) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
    return options.quantize or names.get(checkpoint.get("model.embed_tokens.weight").dtype, "f32")


def _describe(report: ConversionReport, checkpoint: Checkpoint, target: Path, observer: Observer) -> None:
    report.tensors = len(checkpoint.tensors)
    report.parameters = sum(t.nbytes // t.dtype.itemsize for t in checkpoint.tensors.values())
    report.bytes_written = written_bytes(target)
    report.checksums = {name: f"{entry.crc:08x}" for name, entry in observer.seen.items()}


# --- before ------------------------------------------------------------------------------------------------------


def estimate(
    source_format: str, checkpoint: Checkpoint, target: Path, kind: str, options: ConversionOptions
) -> ConversionEstimate:
    """Bytes, memory and time. The time is extrapolated from converting one block to a temporary file next to the
    target."""
    bytes_read = checkpoint.nbytes
    bytes_written = bytes_read
    if kind == "gguf":
        per_value = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32}[
            _quantization(checkpoint, options)
        ]
        bytes_written = round(sum(t.nbytes / t.dtype.itemsize for t in checkpoint.tensors.values()) * per_value)
    slow = {"q8_0": 2.0, "q4_0": 4.0}.get(options.quantize or "", 1.0)
    rate = _sample_rate(checkpoint, target.absolute().parent)
    seconds = bytes_read / rate * slow * (2.0 if options.verify else 1.0)
    memory = _peak_memory() + _WORKING_MEMORY
    if options.verify and _probe_bytes(checkpoint) <= _PROBE_BYTES:
        memory += _probe_bytes(checkpoint) + _PROBE_IMPORTS
    return ConversionEstimate(source_format, kind, bytes_read, bytes_written, memory, seconds)


def _sample_rate(checkpoint: Checkpoint, folder: Path) -> float:
    """Bytes per second of reading a block and writing it to the target's disk."""
    largest = max(checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes)
    begin, done = time.perf_counter(), 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for block in largest.blocks():
            write_all(cast("BinaryIO", file), raw(block))
            done += block.nbytes
            if done >= _SAMPLE_BYTES:
                break
        os.fsync(file.fileno())
    return max(1.0, done / (time.perf_counter() - begin))


def _peak_memory() -> int:
    """Peak memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def _one_thread() -> Iterator[None]:
    """Reading, converting and writing overlap in threads of our own; torch's would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- after -------------------------------------------------------------------------------------------------------


def verify(
    checkpoint: Checkpoint,
    observer: Observer,
    target: Path,
    kind: str,
    options: ConversionOptions,
    report: ConversionReport,
    scratch: Path,
) -> None:
    """Read the target back and compare: names, shapes, a checksum per tensor; ids of texts; logits if the model fits.

    Raises:
        CheckpointError: something differs.
    """
    begin = time.perf_counter()
    quantization = _quantization(checkpoint, options) if kind == "gguf" else None
    with open_checkpoint(target, scratch, checkpoint.config if kind != "hf" else None) as written:
        differing = set(checkpoint.tensors) ^ set(written.tensors)
        require(not differing, f"{target}: verification failed: {sorted(differing)[:3]} are on one side only")
        for name, tensor in checkpoint.tensors.items():
            _compare(name, tensor, written.get(name), observer.seen[name], quantization, target)
        report.texts_compared = verify_tokenizer(checkpoint, written, target, lossy=options.lossy)
        report.verified = True
        report.probe = probe(checkpoint, written)
    exact = kind != "gguf" or quantization == "f32"
    if report.probe is not None and exact and report.probe["max_difference"] > _PROBE_TOLERANCE:
        raise CheckpointError(
            f"{target}: logits differ by {report.probe['max_difference']:.3g}; the config is not the same"
        )
    report.seconds_verify = time.perf_counter() - begin


_PROBE_TOLERANCE = 1e-4


def _compare(
    name: str, source: LazyTensor, written: LazyTensor, seen: Observed, quantization: str | None, target: Path
) -> None:
    shapes = f"{target}: verification failed: {name} has shape {written.shape}, expected {source.shape}"
    require(source.shape == written.shape, shapes)
    where = f"{target}: verification failed: {name}"
    if quantization is not None and len(source.shape) == 1:
        # Vectors pass through float32, norm weights with 1 added; both end in the dtype of the matrices.
        limit = 2.0**-7 if written.dtype != torch.float32 else 2.0**-22
        near = torch.allclose(
            source.load().float(),
            written.load().float(),
            rtol=limit,
            atol=2.0**-22 * is_norm_weight(name),
            equal_nan=True,
        )
        require(near, f"{where}: values differ")
        return
    if quantization in _QUANTIZATION_ERROR and written.dtype == torch.float32:
        first, second = next(source.blocks()).float(), next(written.blocks(BLOCK_BYTES * 4 // source.dtype.itemsize))
        error = (first - second).square().mean().sqrt() / first.square().mean().sqrt().clamp_min(1e-30)
        good = not bool(torch.isfinite(first).all()) or error <= _QUANTIZATION_ERROR[quantization]
        require(good, f"{where}: quantization lost {error:.1%}")
        return
    again = Observer()
    watched = again._watched(name, written)
    dtype = written.dtype if quantization is None else source.dtype
    for _ in watched.blocks():
        pass
    if written.dtype == source.dtype == dtype and seen.in_order:
        require(
            again.seen[name].crc == seen.crc, f"{where}: checksum {again.seen[name].crc:08x}, expected {seen.crc:08x}"
        )
    else:
        require(_equal(source.to(written.dtype), written), f"{where}: values differ")


def _equal(one: LazyTensor, two: LazyTensor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.blocks(), two.blocks(), strict=True))


def probe(source: Checkpoint, written: Checkpoint) -> dict[str, float] | None:
    """Logits of both checkpoints for the same ids, in float32; None if the model would take too much memory.

    This shows that the configs agree where it matters: rotary width and base, epsilon, activation.
    """
    if _probe_bytes(source) > _PROBE_BYTES:
        return None
    ids = torch.randint(source.config.vocab_size, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    first, second = _logits(source, ids), _logits(written, ids)
    return {
        "max_difference": float((first - second).abs().nan_to_num().max()),
        "top1_agreement": float((first.argmax(-1) == second.argmax(-1)).float().mean()),
    }


def _probe_bytes(checkpoint: Checkpoint) -> int:
    """Memory of a model and of its copy while it is loaded, in float32."""
    return sum(t.nbytes // t.dtype.itemsize for t in checkpoint.tensors.values()) * 4 * 2


def _logits(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    from .family_models import causal_lm_class

    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    config.dtype = torch.float32
    model = causal_lm_class(family_of(config))(config)
    state = {name: tensor.load().float() for name, tensor in checkpoint.tensors.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    with torch.no_grad():
        return model.eval()(ids).logits
