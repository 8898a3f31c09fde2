"""Turn a finished run of training or distillation into a bundled model: bf16 weights, tokenizer, card with numbers.

    python scripts/export_bundled.py RUN TEXT_FOLDER OUT_FOLDER
    python scripts/export_bundled.py COMPRESSION/half/distill/run TEXT_FOLDER OUT_FOLDER --card bundled_half_card.md

TEXT_FOLDER is the output of `bundled_text.py`; its held-out files are measured with the exported bf16 weights. The card
has the losses as text and, for programs, as a model index.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from torch import Tensor
from transformers import GenerationConfig

from minitron import NemotronForCausalLM, bundled_model
from minitron.assets import stated_losses
from minitron.data.documents import Source
from minitron.data.packing import PackedBlocks, collate
from minitron.data.token_cache import tokenize
from minitron.tokenizer import load_tokenizer
from minitron.train.export import MODEL_FOLDER
from minitron.train.loop import RUN_FILE, heldout_loss
from minitron.train.resume import STATE_FILE, newest_whole

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


def card(name: str, facts: dict[str, Any]) -> str:
    """The model card after the template of that name beside this file."""
    template = (Path(__file__).with_name(name)).read_text(encoding="utf-8")
    for name, value in facts.items():
        template = template.replace("{{" + name + "}}", str(value))
    return template


def model_index(name: str, scores: dict[str, dict[str, float]]) -> str:
    """The losses in the form that `huggingface_hub.ModelCard` reads."""
    results = [
        EvalResult("text-generation", dataset, HELDOUT[dataset], measure, round(values[measure], 4))
        for dataset, values in scores.items()
        for measure in ("nats_per_token", "bits_per_byte")
    ]
    return yaml.safe_dump({"model-index": eval_results_to_model_index(name, results)}, sort_keys=False).strip()


def comparison(scores: dict[str, dict[str, float]]) -> str:
    """How far above the bundled model's losses, as its card states them, these are."""
    parent = stated_losses(bundled_model())
    parts = [
        f"{values['nats_per_token'] / parent[HELDOUT[name]] - 1:.1%} on {HELDOUT[name].lower()}"
        for name, values in scores.items()
    ]
    return f"Above its parent, in nats per token: {', '.join(parts)}."


def facts_of(folder: Path, model: NemotronForCausalLM, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What the run folder and the config say."""
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["train"]
    newest, _ = newest_whole(folder)
    if newest is None:
        raise SystemExit(f"{folder}: no checkpoint step-N in it; expected the folder of a finished run")
    state = json.loads((newest / STATE_FILE).read_text(encoding="utf-8"))["state"]
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
        "index": model_index(f"minitron-bundled-{c.num_parameters() / 1e6:.1f}m", scores),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--card", default="bundled_card.md", help="template of the card, beside this script")
    args = parser.parse_args()
    source = args.run / MODEL_FOLDER
    tokenizer: Any = load_tokenizer(source)
    model = NemotronForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, **ids)
    scores, zeros = {}, []
    with tempfile.TemporaryDirectory() as cache:
        for name in HELDOUT:
            tokens = tokenize(Source(str(args.texts / f"{name}.jsonl")), tokenizer, Path(cache))
            blocks = PackedBlocks(tokens, model.config.max_position_embeddings)
            scores[name] = heldout_loss(model, blocks, 8)
            zeros = zeros or zero_fractions(model, blocks)
    facts = facts_of(args.run, model, scores)
    facts["comparison"] = comparison(scores)
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
    text = card(args.card, facts)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
