"""`minitron bench`: how fast this machine decodes, against what its memory allows and against transformers."""

from __future__ import annotations

import statistics
from typing import Any, Optional

import typer

from .common import JsonOption, ModelArgument, human_bytes, print_json, quiet_libraries, sentence_errors


@sentence_errors
def bench(
    model: Optional[str] = ModelArgument,  # noqa: UP045 (typer reads this annotation at run time)
    preset: Optional[str] = typer.Option(None, help="Random weights in a published shape, e.g. minitron-4b."),  # noqa: UP045
    zeros: float = typer.Option(0.9, help="With --preset: share of MLP neurons that shall be zero."),
    prompt_tokens: int = typer.Option(32, help="Length of the prompt (random tokens)."),
    new_tokens: int = typer.Option(32, "--new-tokens", "-n", help="Tokens to decode per round."),
    rounds: int = typer.Option(5, help="Rounds; engine and transformers take turns."),
    against_transformers: bool = typer.Option(True, help="Measure transformers' generate on the same weights too."),
    as_json: bool = JsonOption,
) -> None:
    """Measure decoding on the CPU: tokens/s, bytes per token, GB/s against the bandwidth measured in the same run.

    Examples:

      minitron bench

      minitron bench --preset minitron-4b --zeros 0.9 --rounds 3

      minitron bench path/to/checkpoint --json
    """
    if model is not None and preset is not None:
        raise ValueError("MODEL and --preset were both given; give one of them")
    for name, value in (("prompt-tokens", prompt_tokens), ("new-tokens", new_tokens), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    quiet_libraries()
    import torch

    from ..config import NemotronConfig
    from ..engine.measure import random_model
    from ..engine.requests import why_not_model
    from ..loading import load

    if preset is not None:
        subject, weights = random_model(NemotronConfig.preset(preset), zeros), f"random, {zeros:.0%} zeros declared"
    else:
        subject, weights = load(model, device="cpu").model, str(model or "bundled")
    reason = why_not_model(subject)
    if reason:
        raise ValueError(f"the engine does not run this model: {reason}")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(subject.config.vocab_size, (prompt_tokens,), generator=generator).tolist()
    result = _measure(subject, prompt, new_tokens, rounds, against_transformers)
    result = {"model": preset or str(model or "bundled"), "weights": weights, **result}
    if as_json:
        print_json(result)
    else:
        _print_table(result)


def _measure(model: Any, prompt: list[int], new_tokens: int, rounds: int, against: bool) -> dict[str, Any]:
    import torch

    from ..engine import measure

    found: list[measure.Decoding] = []

    def engine() -> float:
        found.append(measure.decode(model, prompt, new_tokens))
        return found[-1].seconds_per_token

    works = {"engine": engine}
    if against:
        works["transformers"] = lambda: measure.transformers_seconds_per_token(model, prompt, new_tokens)
    for work in works.values():
        work()  # packing, compiling, caches
    found.clear()
    bandwidths = [measure.read_bandwidth()]
    times = measure.interleaved(works, rounds)
    bandwidths.append(measure.read_bandwidth())
    bandwidth = max(bandwidths)
    seconds = statistics.median(times["engine"])
    bytes_read = statistics.median(run.bytes_per_token for run in found)
    dense = measure.weights_of(model).bytes_per_token()
    result = {
        "threads": torch.get_num_threads(),
        "dtype": str(model.model.embed_tokens.weight.dtype).removeprefix("torch."),
        "read_bandwidth_gb_per_s": bandwidth,
        "prompt_tokens": len(prompt),
        "prefill_tokens_per_s": len(prompt) / statistics.median(run.prefill_seconds for run in found),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "tokens_per_s": 1 / seconds,
        "zero_fraction": statistics.median(run.zero_fraction for run in found),
        "bytes_per_token": bytes_read,
        "dense_bytes_per_token": dense,
        "gb_per_s": bytes_read / seconds / 1e9,
        "of_bandwidth": bytes_read / seconds / 1e9 / bandwidth,
        "of_dense_floor": dense / bandwidth / 1e9 / seconds,
    }
    if against:
        ratios = [theirs / ours for ours, theirs in zip(times["engine"], times["transformers"], strict=True)]
        result["transformers_tokens_per_s"] = 1 / statistics.median(times["transformers"])
        result["times_transformers"] = statistics.median(ratios)
    return result


def _print_table(result: dict[str, Any]) -> None:
    lines = [
        ("model", f"{result['model']} ({result['weights']}; {result['dtype']}, {result['threads']} threads)"),
        ("read bandwidth", f"{result['read_bandwidth_gb_per_s']:.1f} GB/s, measured in this run"),
        ("prompt", f"{result['prefill_tokens_per_s']:.0f} tokens/s at {result['prompt_tokens']} tokens"),
        ("decoding", f"{result['tokens_per_s']:.1f} tokens/s, median of {result['rounds']} rounds"),
        ("zeros seen", f"{result['zero_fraction']:.1%} of the MLP neurons"),
        (
            "weights read",
            f"{human_bytes(result['bytes_per_token'])} per token, {human_bytes(result['dense_bytes_per_token'])} dense",
        ),
        ("rate", f"{result['gb_per_s']:.1f} GB/s, {result['of_bandwidth']:.0%} of the bandwidth"),
        ("dense floor", f"{result['of_dense_floor']:.2f} times the tokens/s that reading all weights would allow"),
    ]
    if "times_transformers" in result:
        lines.append(
            (
                "transformers",
                f"{result['transformers_tokens_per_s']:.1f} tokens/s; the engine is "
                f"{result['times_transformers']:.2f} times as fast (median of ratios)",
            )
        )
    for name, value in lines:
        typer.echo(f"{name:15} {value}")
