"""`minitron prune`: a smaller checkpoint out of a larger one, for a budget, a shape or a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..locate import locate
from .common import MODEL_HELP, JsonOption, print_json, quiet_libraries, sentence_errors
from .quiet_option import with_quiet

# Typer reads the annotations at run time, where it wants Optional.
# ruff: noqa: UP045


@sentence_errors
@with_quiet
def prune(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    params: Optional[str] = typer.Option(None, help="Budget: at most so many parameters, e.g. 4B."),
    non_embedding_params: Optional[str] = typer.Option(None, help="Budget: the same without embeddings, e.g. 2.6B."),
    memory: Optional[str] = typer.Option(None, help="Budget: at most so many bytes of weights and cache, e.g. 6GB."),
    speed: Optional[str] = typer.Option(None, help="Budget: decoding at least so fast on this machine, e.g. 20tok/s."),
    keep: Optional[str] = typer.Option(
        None, help="The shape: heads=24,groups=8,ffn=9216,hidden=3072,layers=32; with a budget: axes that stay fixed."
    ),
    plan: Annotated[Optional[Path], typer.Option(help="Cut by this plan.json.")] = None,
    sort: bool = typer.Option(False, "--sorted", help="Keep everything, most important first; smaller is a prefix."),
    grid: str = typer.Option("auto", help="Shapes to consider: auto, paper-4b or paper-8b."),
    tolerance: float = typer.Option(0.05, help="Search window: share below the budget (speed: above it)."),
    rank: str = typer.Option("loss", help="How candidates are ranked: loss or kl (to MODEL)."),
    candidates: Optional[int] = typer.Option(None, help="Most candidates to rank, spread evenly over their sizes."),
    depth: str = typer.Option("influence", help="How layers are scored: influence, loss, distance or greedy."),
    contiguous: bool = typer.Option(False, "--contiguous", help="Remove neighbouring layers only."),
    merge_heads: bool = typer.Option(
        False, "--merge-heads", help="Merge queries of heads that go into heads that stay."
    ),
    compensate: bool = typer.Option(False, "--compensate", help="After the cut, fit norms and projections to MODEL."),
    calibration: Optional[str] = typer.Option(None, help="Text for importance; bundled passages by default."),
    heldout: Optional[str] = typer.Option(None, help="Text for ranking and losses; else parts of --calibration."),
    scores: Annotated[Optional[Path], typer.Option(help="importance.safetensors of an earlier run on MODEL.")] = None,
    samples: int = typer.Option(128, help="Most blocks of calibration text."),
    sequence: int = typer.Option(512, help="Tokens of a block."),
    seed: int = typer.Option(0, help="Seed of the draw of blocks."),
    dtype: Optional[str] = typer.Option(None, help="For --memory and --speed: bf16, fp32, int8 or int4; else MODEL's."),
    context: Optional[int] = typer.Option(
        None, help="Tokens in the cache for --memory (else all) and --speed (else 0)."
    ),
    measure: bool = typer.Option(True, help="Compare loss and speed of MODEL and OUT."),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Replace OUT, if minitron wrote it and nothing in it was changed."
    ),
    as_json: bool = JsonOption,
) -> None:
    """Cut a smaller model out of MODEL: layers, heads, key/value groups, MLP neurons and channels.

    Everything streams: MODEL need not fit into memory. OUT is a standard checkpoint; in OUT/pruning are the plan, the
    importance scores and the candidates, in OUT/README.md what was done. The weights are not retrained. An interrupted
    run continues when the same command is given again.

    Examples:

      minitron prune nemotron-15b nemotron-8b --grid paper-8b --calibration text.jsonl

      minitron prune Minitron-8B-Base small --memory 6GB --dtype int4 --context 4096

      minitron prune Minitron-8B-Base small --keep heads=24,ffn=9216,hidden=3072

      minitron prune Minitron-8B-Base small --plan edited-plan.json

      minitron prune bundled small --non-embedding-params 1.5M --rank kl
    """
    locate(model)
    quiet_libraries()
    from ..loading import checkpoint_folder
    from ..prune.pipeline import PruneJob, PruneOptions

    options = PruneOptions(
        plan=plan, keep=keep, params=params, non_embedding_params=non_embedding_params, memory=memory, speed=speed,
        grid=grid, sort=sort, tolerance=tolerance, dtype=dtype, context=context, rank=rank, candidates=candidates,
        depth=depth, contiguous=contiguous, merge_heads=merge_heads, compensate=compensate, calibration=calibration,
        heldout=heldout, scores=scores, samples=samples, sequence=sequence, seed=seed, measure=measure,
        overwrite=overwrite,
    )  # fmt: skip
    with _Bars() as bars:
        result = PruneJob(checkpoint_folder(model, bars.say), out, options, bars.say, bars.show).run()
    if as_json:
        print_json(result.as_dict())
        return
    for row in result.candidates[:10]:
        shape = ", ".join(f"{axis} {value}" for axis, value in row["architecture"].items())
        typer.echo(f"{row['score'] if row['score'] is not None else float('nan'):8.4f}  {shape}")
    typer.echo(result.table())
    for note in result.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"{result.out}: cut in {result.seconds:.1f} s, plan {result.plan[:12]}")


class _Bars:
    """Sentences and one progress bar at a time, on stderr."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.stage = ""

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def say(self, text: str) -> None:
        """Print a sentence."""
        self._close()
        typer.echo(text, err=True)

    def show(self, stage: str, done: int, total: int) -> None:
        """Show the progress of a stage."""
        from tqdm import tqdm

        if stage != self.stage:
            self._close()
            large = total > 10**6
            self.bar = tqdm(
                total=total, desc=stage, leave=False, disable=None, unit="B" if large else "", unit_scale=large
            )
            self.stage = stage
        self.bar.update(done - self.bar.n)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar, self.stage = None, ""
