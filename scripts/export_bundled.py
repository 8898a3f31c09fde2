"""Turn a checkpoint of a run into the bundled model: bf16 weights, tokenizer, and a card with measured numbers.

    python scripts/export_bundled.py RUN/step-N TEXT_FOLDER OUT_FOLDER

TEXT_FOLDER is the output of `bundled_text.py`; its held-out files are measured with the exported bf16 weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from minitron import NemotronForCausalLM
from minitron.checkpoint.resume import STATE_FILE
from minitron.data import PackedBlocks, Source, collate, tokenize
from minitron.distill.train import RUN_FILE, heldout_loss
from minitron.tokenizer import load_tokenizer

PROMPTS = ("Once upon a time there was a little", "The old man looked at the sea", '"Where are you going?" said')
HELDOUT = {"heldout_simple": "Simple stories", "heldout_books": "Classic books"}


def zero_fractions(model: NemotronForCausalLM, blocks: PackedBlocks, count: int = 32) -> list[float]:
    """Share of the inputs of each layer's `down_proj` that squared ReLU made exactly zero."""
    zeros = [0] * len(model.model.layers)
    seen = 0
    real = torch.empty(0)

    def watch(layer: int) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            zeros[layer] += int((inputs[0][real] == 0).sum())

        return hook

    handles = [layer.mlp.down_proj.register_forward_pre_hook(watch(i)) for i, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        for index in range(min(count, len(blocks))):
            batch = collate([blocks.pieces(index)], blocks.block)
            real = batch.labels != -100
            seen += int(real.sum())
            model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [z / (seen * model.config.intermediate_size) for z in zeros]


def write_sample(model: NemotronForCausalLM, tokenizer: Any, prompt: str) -> str:
    """A continuation as `minitron demo` writes it."""
    torch.manual_seed(1)
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=110,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        top_k=0,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True).strip()


def plain_tokenizer_config(path: Path) -> None:
    """Spell the settings so that transformers 4 reads them too, and leave out how the folder was reached."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        values.pop(name, None)
    values["additional_special_tokens"] = values.pop("extra_special_tokens")
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def card(facts: dict[str, Any]) -> str:
    """The model card."""
    template = (Path(__file__).with_name("bundled_card.md")).read_text(encoding="utf-8")
    for name, value in facts.items():
        template = template.replace("{{" + name + "}}", str(value))
    return template


def facts_of(checkpoint: Path, model: NemotronForCausalLM, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What the run folder and the config say."""
    run = json.loads((checkpoint.parent / RUN_FILE).read_text(encoding="utf-8"))["train"]
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["state"]
    rows = [
        f"| {HELDOUT[name]} | {values['nats_per_token']:.3f} | {values['bits_per_byte']:.3f} |"
        for name, values in scores.items()
    ]
    c = model.config
    return {
        "parameters": f"{c.num_parameters() / 1e6:.2f} million",
        "shape": f"{c.num_hidden_layers} layers, hidden size {c.hidden_size}, {c.num_attention_heads} query heads and "
        f"{c.num_key_value_heads} key/value heads of {c.head_dim}, MLP of {c.intermediate_size} with squared ReLU, "
        f"vocabulary {c.vocab_size}, context {c.max_position_embeddings}",
        "steps": f"{state['step']:,}",
        "tokens": f"{state['blocks'] * run['sequence'] / 1e6:.1f} million",
        "hours": f"{state['seconds'] / 3600:.2f}",
        "scores": "\n".join(rows),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    tokenizer: Any = load_tokenizer(args.checkpoint)
    model = NemotronForCausalLM.from_pretrained(args.checkpoint, dtype=torch.bfloat16).eval()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, **ids)
    scores, zeros = {}, []
    with tempfile.TemporaryDirectory() as cache:
        for name in HELDOUT:
            tokens = tokenize(Source(str(args.texts / f"{name}.jsonl")), tokenizer, Path(cache))
            blocks = PackedBlocks(tokens, model.config.max_position_embeddings)
            scores[name] = heldout_loss(model, blocks, 8)
            zeros = zeros or zero_fractions(model, blocks)
    facts = facts_of(args.checkpoint, model, scores)
    facts["zeros"] = "\n".join(f"| {layer} | {100 * share:.1f} % |" for layer, share in enumerate(zeros))
    samples = [write_sample(model, tokenizer, prompt) for prompt in PROMPTS]
    facts["samples"] = "\n\n".join("> " + text.replace("\n", "\n> ") for text in samples)
    facts["credits"] = "; ".join((args.texts / "storybook_credits.txt").read_text(encoding="utf-8").split("\n")).strip(
        "; "
    )
    shutil.rmtree(args.out, ignore_errors=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    plain_tokenizer_config(args.out / "tokenizer_config.json")
    for path in args.out.iterdir():
        path.chmod(0o644)
    (args.out / "README.md").write_text(card(facts), encoding="utf-8")
    print(card(facts))


if __name__ == "__main__":
    main()
