"""Decoding on the CPU against upstream transformers and llama.cpp, beside the bandwidth measured in the same run.

    python benchmarks/decode.py                      the bundled model
    python benchmarks/decode.py --preset minitron-4b --layers 8 --formats bf16,bf12,int8,int4 --zeros 0,0.9
    python benchmarks/decode.py --speculation        the bundled model with drafts, on real prompts
    python benchmarks/decode.py --speculation --widen 16   the same function with 256 times the weights
    python benchmarks/decode.py --batch 1,2,4,8      several prompts at once, beside transformers
    python benchmarks/decode.py --smoke              a small shape; the numbers mean nothing

With --preset weights are random, in the preset's shape and with a declared share of zeros; --layers takes fewer layers
and as much less of the vocabulary, so that each part keeps its share of the bytes. The engine and its peers run in turn
on the same weights; each round gives one ratio and the median of ratios is reported. llama.cpp has the GGUF type that
goes with the format: bf16 for bf16 and bf12, q8_0 for int8, q4_0 for int4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from machine import describe
from transformers.models.nemotron import modeling_nemotron as upstream

import minitron
from minitron import NemotronConfig, NemotronForCausalLM
from minitron.assets import bundled_model
from minitron.bench import measure
from minitron.bench.peers import TransformersPeer, llama_peer
from minitron.bench.roofline import draw_roofline
from minitron.engine.model_weights import weights_of

SMALL = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}


def upstream_twin(model: NemotronForCausalLM) -> torch.nn.Module:
    """transformers' own model on the same tensors."""
    dtype = str(model.dtype).removeprefix("torch.")
    config = transformers.NemotronConfig(**{**model.config.to_dict(), "dtype": dtype})
    with torch.device("meta"):
        twin = upstream.NemotronForCausalLM(config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.model.rotary_emb = upstream.NemotronRotaryEmbedding(config)
    return twin.eval()


BOOK = Path(__file__).parents[1] / "examples" / "black_beauty.jsonl"


def prompts(model: NemotronForCausalLM, name: str, count: int, length: int) -> torch.Tensor:
    """Token ids (count, length): pieces of a book for trained weights, random ones for random weights."""
    if "random" in name:
        return torch.randint(model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))
    tokenizer = minitron.load_tokenizer(bundled_model() if name.startswith("bundled") else name.split(",")[0])
    text = " ".join(json.loads(line)["text"] for line in BOOK.read_text(encoding="utf-8").splitlines())
    ids = tokenizer(text[: 8 * count * length])["input_ids"]
    return torch.tensor(ids[: count * length]).view(count, length)


def rows_of(model: NemotronForCausalLM, weights: str, args: argparse.Namespace) -> list[dict]:
    """One row for each format."""
    prompt = prompts(model, weights, 1, args.prompt)[0].tolist()
    rows = []
    for format in args.formats.split(","):
        packed = weights_of(model, format)
        others = {"transformers": TransformersPeer(upstream_twin(model))} if "transformers" in args.peers else {}
        with llama_peer(model, format, args.prompt + args.tokens, "llama.cpp" in args.peers) as llama:
            found = measure.compare(packed, others | llama, prompt, args.tokens, args.rounds)
        rows.append({"name": f"{format}, {weights}", "weights": weights, "format": format, **found})
        print(_line(rows[-1]), flush=True)
    return rows


HEADER = (
    "| weights | GB/s (of measured) | tokens/s | zeros | of the dense floor | peers: tokens/s, ratio, prefill ratio |"
)


def _line(row: dict) -> str:
    peers = "; ".join(
        f"{name} {peer['tokens_per_s']:.1f}, {peer['times']:.2f}x, {peer['prefill_times']:.2f}x, "
        f"{peer['equal_tokens']}/{row['new_tokens']} tokens equal"
        for name, peer in row["peers"].items()
    )
    rate = f"{row['gb_per_s']:.1f} ({row['of_bandwidth']:.2f} of {row['read_bandwidth_gb_per_s']:.1f})"
    return (
        f"| {row['name']} | {rate} | {row['tokens_per_s']:.2f} | {row['zero_fraction']:.0%} | "
        f"{row['of_dense_floor']:.2f} | {peers} |"
    )


PROMPTS = ("Once upon a time there was a little", "The old man looked at the sea and", "Lily and her brother found a")


def speculation(new_tokens: int, widen: int, draft_folder: Path | None = None) -> list[dict]:
    """Drafts on the bundled model's own text, greedy and sampled."""
    model, tokenizer = minitron.load()
    drafts: dict = {"lookup": "lookup", "int4": "self"}
    if draft_folder is not None:
        drafts[draft_folder.name] = minitron.load(draft_folder).model
    if widen > 1:
        model = measure.widened(model, widen)
    rows = []
    for name, draft in drafts.items():
        for sampled in (False, True):
            ratios, kept, drafted, steps, tokens, same = [], 0, 0, 0, 0, True
            for seed, text in enumerate(PROMPTS * 2):
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                how = {"max_new_tokens": new_tokens, "do_sample": sampled, "temperature": 0.8, "eos_token_id": -1}
                seconds, texts = [], []
                for extra in ({}, {"draft": draft}):
                    torch.manual_seed(seed)
                    start = time.perf_counter()
                    texts.append(model.generate(ids, pad_token_id=0, **how, **extra))
                    seconds.append(time.perf_counter() - start)
                found = model.last_generation.speculation
                kept, drafted = kept + found.kept, drafted + found.drafted
                steps, tokens = steps + found.steps, tokens + found.tokens
                same = same and torch.equal(*texts)
                if seed:  # the first one warms up
                    ratios.append(seconds[0] / seconds[1])
            rows.append(
                {
                    "widened": widen,
                    "draft": name,
                    "sampled": sampled,
                    "acceptance_rate": kept / max(1, drafted),
                    "tokens_per_step": tokens / steps,
                    "times_plain": statistics.median(ratios),
                    "same_text": same,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


class StepClock(transformers.StoppingCriteria):
    """Notes when each step of a batch is done, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def batches(model: NemotronForCausalLM, name: str, args: argparse.Namespace) -> list[dict]:
    """Tokens per second over all texts of a batch, decoding only: the engine's beside transformers'."""
    twin, rows = upstream_twin(model), []
    for size in map(int, args.batch.split(",")):
        ids = prompts(model, name, size, args.prompt)

        def rate(which: torch.nn.Module, ids: torch.Tensor = ids) -> float:
            clock = StepClock()
            how = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0, "max_new_tokens": args.tokens}
            which.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[clock], **how)  # type: ignore[operator]
            # Over all of them: the engine decodes several tokens before it asks after each.
            return len(ids) * (len(clock.times) - 1) / (clock.times[-1] - clock.times[0])

        works = {"engine": lambda: rate(model), "transformers": lambda: rate(twin)}
        for work in works.values():
            work()
        found = measure.interleaved(works, args.rounds)
        ratios = [ours / theirs for ours, theirs in zip(found["engine"], found["transformers"], strict=True)]
        rows.append(
            {
                "weights": name,
                "batch": size,
                "tokens_per_s": statistics.median(found["engine"]),
                "transformers_tokens_per_s": statistics.median(found["transformers"]),
                "times": statistics.median(ratios),
                "times_range": [min(ratios), max(ratios)],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="random weights in a published shape")
    parser.add_argument("--layers", type=int, help="with --preset: fewer layers and as much less vocabulary")
    parser.add_argument("--model", type=Path, help="a checkpoint; the bundled model if neither is given")
    parser.add_argument("--zeros", default="0,0.9", help="with --preset: declared shares of zero MLP neurons")
    parser.add_argument("--formats", default="bf16", help="bf16, fp32, bf12, int8, int4, with commas")
    parser.add_argument("--peers", default="transformers,llama.cpp", help="which, if installed; none")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--speculation", action="store_true", help="drafts on the bundled model instead")
    parser.add_argument("--widen", type=int, default=1, help="the same function with so many times the width")
    parser.add_argument("--batch", help="sizes of batches, with commas: several prompts at once instead")
    parser.add_argument("--draft", type=Path, help="with --speculation: a checkpoint that drafts, too")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--plot", type=Path, help="draw the roofline")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.smoke:
        args.prompt, args.tokens, args.rounds = 16, 4, 2
    result: dict = {"machine": describe(smoke=args.smoke)}
    if args.speculation:
        result["speculation"] = speculation(16 if args.smoke else args.tokens, args.widen, args.draft)
    elif args.batch:
        result["batches"] = [row for model, name in _models(args) for row in batches(model, name, args)]
    else:
        print(HEADER)
        print("| --- " * HEADER.count(" |") + "|")
        result["rows"] = _tables(args)
        if args.plot:
            draw_roofline(result["rows"], args.plot)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _tables(args: argparse.Namespace) -> list[dict]:
    return [row for model, name in _models(args) for row in rows_of(model, name, args)]


def _models(args: argparse.Namespace) -> Iterator[tuple[NemotronForCausalLM, str]]:
    """What is to be measured, one after the other, and what it is called."""
    if not args.preset and not args.smoke:
        model, name = minitron.load(args.model).model, str(args.model or "bundled model")
        if args.widen > 1:
            model, name = measure.widened(model, args.widen), f"{name}, {args.widen} times as wide"
        yield model, name
        return
    config, name = (NemotronConfig(**SMALL), "small shape") if args.smoke else (_preset(args), args.preset)
    if args.layers and not args.smoke:
        name += f" with {args.layers} layers"
    for zeros in args.zeros.split(","):
        yield measure.random_model(config, float(zeros)), f"{name}, random, {float(zeros):.0%} zeros"


def _preset(args: argparse.Namespace) -> NemotronConfig:
    config = NemotronConfig.preset(args.preset)
    return config if args.layers is None else measure.shortened(config, args.layers)


if __name__ == "__main__":
    main()
