"""How far gradients of LoRA matrices move when the frozen weights are rounded to bf16, int8 or int4.

Everything is computed in fp64, so that the rounding of the weights is all that differs. Beside it stands how far the
gradients of two batches of the same text are apart, which is what a step of training averages away.

    python studies/quantized_gradients.py [--model bundled] [--smoke]
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.engine.quantize import quantize
from minitron.families import family_of
from minitron.loading import load
from minitron.train.adapters import choose_trained

FORMATS = ("bf16", "int8", "int4")


def rounded(model: Any, format: str) -> Any:
    """A copy whose matrices in the layers are those of a format, in fp64."""
    model = copy.deepcopy(model)
    matrices = {part.name for part in family_of(model.config).layer if part.columns is not None}
    for name, module in model.named_modules():
        if any(name.endswith(f".{each}") for each in matrices):
            weight = module.weight.data
            module.weight.data = quantize(weight.float(), format).dense(torch.float32).to(weight)  # type: ignore[arg-type]
    return model


def gradients(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    """All gradients of the adapters as one vector, and the loss."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = [p.grad.flatten() for name, p in model.named_parameters() if "lora_" in name]
    return torch.cat(found), float(loss.detach())


def adapted(model: Any) -> Any:
    """The model with adapters, both of whose matrices are random, so that both have gradients."""
    model = choose_trained(copy.deepcopy(model), "lora", 8).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = 0.02 / max(1.0, parameter.shape[1] ** 0.5)
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
    return model.eval()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--text", type=Path, default=Path(__file__).parent.parent / "docs" / "training.md")
    parser.add_argument("--smoke", action="store_true", help="few tokens")
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype="fp32", device="cpu")
    model = model.double()
    length, rows = (32, 2) if options.smoke else (256, 4)
    ids: Any = tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    blocks = torch.tensor(ids[: 2 * rows * length]).view(2, rows, length)
    exact, loss = gradients(adapted(model), blocks[0])
    other, _ = gradients(adapted(model), blocks[1])
    print("| frozen weights | loss | relative error of the gradient | cosine |\n| --- | ---: | ---: | ---: |")
    print(f"| fp32 | {loss:.4f} | 0 | 1 |")
    for format in FORMATS:
        found, loss = gradients(adapted(rounded(model, format)), blocks[0])
        print(f"| {format} | {loss:.4f} | {_error(found, exact):.4f} | {_cosine(found, exact):.5f} |")
    print(f"| fp32, another batch | | {_error(other, exact):.4f} | {_cosine(other, exact):.5f} |")


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _cosine(found: Tensor, exact: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(found, exact, dim=0))


if __name__ == "__main__":
    main()
