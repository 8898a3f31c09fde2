"""`minitron convert`: Hugging Face, NeMo and GGUF, any to any."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import typer

from ..locate import fetch, locate
from .common import MODEL_HELP, JsonOption, human_bytes, human_count, print_json, quiet_libraries, sentence_errors
from .quiet_option import with_quiet

_Source = typer.Argument(..., help=MODEL_HELP)
_Target = typer.Argument(..., help="What to write: a folder, NAME.nemo or NAME.gguf.")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@sentence_errors
@with_quiet
def convert(
    source: str = _Source,
    target: Path = _Target,
    to: Optional[str] = typer.Option(None, help="hf, nemo, nemo2 or gguf; by default from TARGET's name."),  # noqa: UP045
    dtype: str = typer.Option("auto", help="bf16, fp16 or fp32; auto keeps the source's."),
    quantize: Optional[str] = typer.Option(None, help="GGUF: f32, f16, bf16, q8_0 or q4_0."),  # noqa: UP045
    max_shard_size: str = typer.Option("5GB", help="Hugging Face: largest size of a file."),
    config: Optional[str] = typer.Option(  # noqa: UP045
        None, help="For a bare Megatron folder: a preset such as minitron-4b, or a config.json."
    ),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Replace TARGET, if minitron wrote it and nobody changed it."
    ),
    verify: bool = typer.Option(True, help="Read TARGET back and compare every tensor."),
    lossy: bool = typer.Option(
        False,
        "--lossy",
        help="Convert even if TARGET tokenizes some texts differently, and list the differences.",
    ),
    as_json: bool = JsonOption,
) -> None:
    """Move a checkpoint between Hugging Face, NeMo / Megatron and GGUF, tensor by tensor.

    The format of SOURCE is detected. Memory does not grow with the model. TARGET appears when it is complete.

    Examples:

      minitron convert nvidia-4b.nemo 4b-hf

      minitron convert 4b-hf 4b.gguf --quantize q8_0

      minitron convert 4b-hf 4b.nemo

      minitron convert 4b-hf 4b-nemo2 --to nemo2

      minitron convert megatron/torch_dist 4b-hf --config minitron-4b --dtype bf16
    """
    found = locate(source)
    quiet_libraries()
    from tqdm import tqdm

    from ..convert import ConversionEstimate, ConversionOptions
    from ..convert import convert as run

    options = ConversionOptions(to, dtype, quantize, parse_size(max_shard_size), config, overwrite, verify, lossy)
    bar = tqdm(unit="B", unit_scale=True, desc="converting", leave=False, disable=None)

    def announce(estimate: ConversionEstimate) -> None:
        bar.total = estimate.bytes_read
        bar.refresh()
        typer.echo(
            f"{estimate.source_format} -> {estimate.target_format}: reads {human_bytes(estimate.bytes_read)}, "
            f"writes {human_bytes(estimate.bytes_written)}, about {estimate.seconds:.0f} s "
            f"and {human_bytes(estimate.memory)} of memory",
            err=True,
        )

    with bar:
        report = run(
            found if isinstance(found, Path) else fetch(found), target, options, announce=announce, progress=bar.update
        )
    if as_json:
        print_json(report.as_dict())
    else:
        _print(report)


def _print(report: Any) -> None:
    typer.echo(
        f"{report.target}: {report.tensors} tensors, {human_count(report.parameters)} parameters, "
        f"{human_bytes(report.bytes_written)} in {report.seconds:.1f} s; peak memory {human_bytes(report.peak_memory)}"
    )
    if report.verified:
        typer.echo(f"verified in {report.seconds_verify:.1f} s: names, shapes and values read back as written")
    if report.texts_compared:
        typer.echo(f"tokenizer: the same ids in {report.texts_compared} texts, special tokens inside")
    if report.probe is not None:
        typer.echo(
            f"probe: logits differ by at most {report.probe['max_difference']:.2g}, "
            f"same top token at {report.probe['top1_agreement']:.0%} of positions"
        )
    for note in report.notes:
        typer.echo(f"note: {note}")


def parse_size(text: str) -> int:
    """Bytes in "5GB", "500 MB" or "1000000".

    Raises:
        ValueError: not a size.
    """
    stripped = text.strip().upper().replace("IB", "B")
    number = stripped.rstrip("BKMGT")
    unit = stripped[len(number) :].strip()
    try:
        size = float(number) * _UNITS[unit]
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"--max-shard-size is {text!r}; expected a size such as 5GB or 500MB") from None
    if not 1 <= size < 2**62:
        raise ValueError(f"--max-shard-size is {text!r}; expected a size of at least one byte")
    return int(size)
