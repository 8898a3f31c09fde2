"""Whether an untested release of transformers generates correctly, checked before the first `generate`.

A release may rename or rearrange what passes between `generate` and a model: the cache, the mask, the positions. Then
the text would be wrong without an error. So a tiny model in fp32, which shares all code with the caller's, generates a
few tokens with a cache from a batch that is padded on the left, and every step is compared with a full forward pass
without a cache, row by row. It takes some hundredths of a second, once for each architecture, attention implementation
and process.
"""

from __future__ import annotations

import warnings
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .config import NemotronConfig, config_class
from .families import FAMILIES
from .family_models import causal_lm_class
from .framework import TESTED, installed

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PROMPTS = ([7, 31, 12, 5, 44, 23], [3, 58, 19])
NEW_TOKENS = 4
TOLERANCE = 1e-3
"""Largest difference of logits, relative to the largest logit. fp32 differs by some 1e-6, a lost cache or a wrong
position by some 1e-1."""
IMPLEMENTATIONS = ("eager", "sdpa")

_checking: ContextVar[bool] = ContextVar("minitron_checking_release", default=False)


class UntestedReleaseError(RuntimeError):
    """The installed release of transformers does not generate what the model computes."""


def require(model: Any) -> None:
    """Check the installed release of transformers, once for each architecture and attention implementation.

    Raises:
        UntestedReleaseError: its cached steps differ from full forward passes, or cannot be computed.
    """
    if _checking.get():
        return
    implementation = model.config._attn_implementation
    _require(implementation if implementation in IMPLEMENTATIONS else "sdpa", model.config.model_type, installed())


@cache
def _require(implementation: str, model_type: str, version: str) -> None:
    before = _checking.set(True)
    try:
        difference, reached = cached_step_difference(implementation, model_type)
        reason = f"the logits of a cached step differ from those of a full forward pass by {difference:.1%}"
    except Exception as error:
        difference, reached, reason = float("nan"), True, f"a tiny model cannot generate: {error}"
    finally:
        _checking.reset(before)
    if not difference <= TOLERANCE:
        raise UntestedReleaseError(
            f"transformers {version} is installed, and this version of minitron does not generate correctly with it: "
            f"{reason}. "
            f"It was tested with transformers {', '.join(TESTED)}; install one of these"
        )
    if not reached:
        warnings.warn(
            f"transformers {version} does not call minitron's engine, so its own slower loop generates; minitron was "
            f"tested with transformers {', '.join(TESTED)}",
            stacklevel=2,
        )


@torch.no_grad()
def cached_step_difference(implementation: str, model_type: str = NemotronConfig.model_type) -> tuple[float, bool]:
    """The difference between logits of generated tokens and of full forward passes, relative to the largest logit.

    Returns:
        The largest difference over steps and rows, and whether `generate` offered the request to the engine.
    """
    model = tiny_model(implementation, model_type)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
    )
    out: Any = model.generate(ids, attention_mask=ids != 0, generation_config=settings, engine="off")
    steps = torch.stack(out.logits, dim=1)  # (rows, new tokens, V)
    largest = 0.0
    for row, prompt in enumerate(PROMPTS):
        text = [*prompt, *out.sequences[row, longest:].tolist()]
        full: Tensor = model(torch.tensor([text]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        largest = max(largest, ((steps[row] - full).abs().max() / full.abs().max()).item())
    return largest, model.last_generation is not None


def tiny_model(implementation: str, model_type: str = NemotronConfig.model_type) -> Any:
    """Two layers in fp32 on the CPU, of fixed weights large enough that every earlier token counts."""
    family = FAMILIES[model_type]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the caller's random numbers stay as they are
        config = config_class(family)(**SHAPE, attn_implementation=implementation)
        model = causal_lm_class(family)(config).float().eval()
        noise = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=noise)
    return model
