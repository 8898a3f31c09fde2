"""Decoding in each weight format, beside the bandwidth measured in the same run.

    python benchmarks/formats.py --layers 8        eight layers and the head of the 4B shape, 6 GB of memory, minutes
    python benchmarks/formats.py --smoke           a small shape; the numbers mean nothing

The weights are random: a few hundred rows of each matrix over and over, good for timing and nothing else. A share of
zero neurons is declared and made with a bias.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from statistics import NormalDist

import torch
from machine import describe

from minitron import NemotronConfig
from minitron.bench.measure import read_bandwidth
from minitron.engine.cpu.engine import CpuEngine
from minitron.engine.matrix import FORMATS, Matrix
from minitron.engine.quantize import quantize_blocks
from minitron.engine.weights import EngineWeights, LayerWeights, Norm, constants_from_config, head_format

TILE = 288


def matrix(rows: int, columns: int, format: str, std: float) -> Matrix:
    """A random matrix of `TILE` different rows."""
    tile = (torch.randn((min(rows, TILE), columns), generator=torch.Generator().manual_seed(rows)) * std).bfloat16()
    once = quantize_blocks([tile], (len(tile), columns), format)
    times = -(-rows // len(tile))
    data = torch.cat([once.data] * times)[:rows]
    extras = once.extras
    if extras is not None:
        n = len(tile)
        starts, listed = extras[n : 2 * n + 1], extras[2 * n + 1 :].view(-1, 2)
        each = starts.diff().repeat(times)[:rows]
        starts = torch.nn.functional.pad(each.cumsum(0, dtype=torch.int32), (1, 0))
        listed = listed.repeat(times, 1)[: int(starts[-1])]
        extras = torch.cat([extras[:n].repeat(times)[:rows], starts, listed.flatten()])
    return Matrix(format, (rows, columns), data, extras)


def random_weights(config: NemotronConfig, format: str, zeros: float) -> EngineWeights:
    """Weights of a model, with embedding and head tied, whose neurons are zero in a share of cases."""
    D, F, std = config.hidden_size, config.intermediate_size, config.initializer_range
    H: int = config.head_dim  # type: ignore[assignment]
    N, K = config.num_attention_heads, config.num_key_value_heads
    norm = Norm(torch.ones(D), torch.zeros(D))
    threshold = -1e9 if zeros == 0 else std * D**0.5 * NormalDist().inv_cdf(zeros)
    shapes = {"q": (N * H, D), "k": (K * H, D), "v": (K * H, D), "o": (D, N * H), "up": (F, D), "down": (F, D)}
    layers = [
        LayerWeights(
            N,
            K,
            attention_norm=norm,
            mlp_norm=norm,
            qkv_bias=None,
            o_bias=None,
            up_bias=torch.full((F,), -threshold),
            down_bias=None,
            **{name: matrix(*shape, format, std) for name, shape in shapes.items()},
        )
        for _ in range(config.num_hidden_layers)
    ]
    head = matrix(config.vocab_size, D, head_format(format), std)
    return EngineWeights(constants_from_config(config), format, head, head, norm, layers)


def seconds_per_token(weights: EngineWeights, tokens: int) -> tuple[float, float]:
    """Median over greedy tokens after a few, and the share of neurons that were not zero."""
    with CpuEngine(weights, tokens + 8) as engine:
        token = [1]
        times = []
        for _ in range(tokens + 4):
            start = time.perf_counter()
            token = engine.greedy(token, 1)[0]
            times.append(time.perf_counter() - start)
        return statistics.median(times[4:]), engine.active_neurons / engine.seen_neurons


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minitron-4b")
    parser.add_argument("--layers", type=int, default=8, help="layers of the preset")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of each measurement")
    parser.add_argument("--zeros", type=float, nargs="*", default=[0.0, 0.5, 0.9])
    parser.add_argument("--formats", nargs="*", default=[f for f in FORMATS if f != "fp32"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    small = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 512} if arguments.smoke else {}
    config = NemotronConfig.preset(arguments.preset, num_hidden_layers=arguments.layers, **small)
    rows = []
    for format in arguments.formats:
        for zeros in arguments.zeros:
            weights = random_weights(config, format, zeros)
            bandwidth = read_bandwidth(3)
            seconds, active = seconds_per_token(weights, arguments.tokens)
            bandwidth = max(bandwidth, read_bandwidth(3))
            size = weights.bytes_per_token(active)
            floor = weights.bytes_per_token() / bandwidth / 1e9
            rows.append(
                {
                    "format": format,
                    "zeros": round(1 - active, 3),
                    "tokens_per_s": 1 / seconds,
                    "bytes_per_token": size,
                    "gb_per_s": size / seconds / 1e9,
                    "bandwidth_gb_per_s": bandwidth,
                    "of_bandwidth": size / seconds / 1e9 / bandwidth,
                    "of_dense_floor": floor / seconds,
                    "times_first": 1 / seconds / rows[0]["tokens_per_s"] if rows else 1.0,
                }
            )
            if not arguments.json:
                cells = (f"{name} {x:.3g}" if isinstance(x, float) else x for name, x in rows[-1].items())
                print("  ".join(cells), flush=True)
            del weights
    if arguments.json:
        print(json.dumps({"machine": describe(smoke=arguments.smoke), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
