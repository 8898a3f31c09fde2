"""What the stages of a compression share, and how it is opened: everything is checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import fingerprint as fingerprints
from ..checkpoint.hf import check_checkpoint, read_config
from ..data.documents import Source
from ..data.packing import Batch, collate
from ..data.token_cache import TokenFolder
from ..files import is_empty, require_apart
from ..loading import checkpoint_folder
from ..tokenizer import load_tokenizer
from ..train.inputs import TrainingTexts, open_texts
from ..world import World
from .recipe import Recipe, RecipeError
from .stages import RunError, Stages

RECIPE_FILE = "recipe.json"
TOKEN_CACHE = "token-cache"


@dataclass(frozen=True)
class Context:
    """What all stages of a run use and none of them changes. Checkpoints go from stage to stage as arguments."""

    recipe: Recipe
    folder: Path
    """Of the run."""
    checkpoint: Path
    """The recipe's model: the teacher, unless it is corrected first."""
    stages: Stages
    """The record of what each stage found."""
    tokenizer: Any
    texts: TrainingTexts
    device: torch.device
    world: World
    say: Callable[[str], None]
    """Messages of the first process; those of the others are dropped."""
    quiet: bool

    @property
    def out_dtype(self) -> torch.dtype:
        """Of the weights that are written: that of the recipe's model."""
        found = getattr(read_config(self.checkpoint), "dtype", None)
        return found if isinstance(found, torch.dtype) else torch.float32

    @property
    def data_key(self) -> dict[str, float]:
        """Weight of each training text by the key of its tokens; identifies the training text."""
        stream = self.texts.stream
        return {s.cache.key[:16]: w for s, w in zip(stream.sources, stream.weights, strict=True)}

    def fingerprint(self, folder: Path) -> str:
        """That of a checkpoint; the first process reads it."""
        return self.world.first_does(lambda: fingerprints.fingerprint(folder))

    def calibration(self) -> Batch:
        """The first blocks of the training data, in its order."""
        blocks = self.recipe.calibration.blocks
        return self.texts.stream.batches(0, blocks, blocks)[0]

    def scoring(self) -> Batch:
        """Held-out blocks that candidates are scored on: the first of every text in turn."""
        wanted, held = self.recipe.ranking.score_blocks, list(self.texts.heldout.values())
        longest = max(map(len, held))
        pieces = [blocks.pieces(i) for i in range(longest) for blocks in held if i < len(blocks)][:wanted]
        return collate(pieces, self.recipe.train.sequence)


def token_folder(out: Path, cache: Path | TokenFolder | None) -> TokenFolder:
    """Where the tokens of a run are kept: `token-cache` in its folder by default."""
    return cache if isinstance(cache, TokenFolder) else TokenFolder(cache or out / TOKEN_CACHE)


def open_context(
    recipe: Recipe,
    out: Path,
    cache: TokenFolder,
    device: torch.device,
    world: World,
    quiet: bool,
    say: Callable[[str], None],
) -> Context:
    """Check what a recipe names, and open its text. Nothing is written but to the folder of tokens.

    Raises:
        RecipeError, RunError, ValueError: as `run.compress`.
    """

    def tell(text: str) -> None:
        if world.first:
            say(text)

    checkpoint = world.first_then_all(lambda: checkpoint_folder(recipe.model, tell))
    world.first_does(lambda: _check_folders(recipe, out, cache, checkpoint))
    tokenizer: Any = world.first_then_all(lambda: load_tokenizer(checkpoint))
    _check_prompts(recipe, tokenizer, read_config(checkpoint).max_position_embeddings)
    texts = world.first_then_all(
        lambda: open_texts(
            recipe.data, recipe.heldout, recipe.heldout_share, tokenizer, recipe.train, cache, recipe.field,
            recipe.encoding, recipe.skip_bad,
        )
    )  # fmt: skip
    for note in texts.notes:
        tell(f"note: {note}")
    there = len(texts.stream)
    if recipe.calibration.blocks > there:
        tell(
            f"note: calibration: blocks is {recipe.calibration.blocks:,}; the data has {there:,} of "
            f"{recipe.train.sequence} tokens, and all of them are used"
        )
        recipe = replace(recipe, calibration=replace(recipe.calibration, blocks=there))
    stages = Stages(out, tell, texts.stream.origins, world)
    return Context(recipe, out, checkpoint, stages, tokenizer, texts, device, world, tell, quiet)


def _check_folders(recipe: Recipe, out: Path, cache: TokenFolder, checkpoint: Path) -> None:
    """Refuse a damaged checkpoint, and folders that overlap or belong to something else."""
    text = [Path(Source.parse(text).path) for text in (*recipe.data, *recipe.heldout)]
    require_apart(out, [checkpoint, *text])
    require_apart(cache.path, text)
    check_checkpoint(checkpoint)
    context = read_config(checkpoint).max_position_embeddings
    if recipe.train.sequence > context:
        raise RecipeError(f"train: sequence is {recipe.train.sequence}; the model's context is {context}")
    if out.exists() and not is_empty(out, but=(TOKEN_CACHE,)) and not (out / RECIPE_FILE).is_file():
        raise RunError(f"{out} is not empty and is not the folder of a compression (no {RECIPE_FILE}); choose another")


def _check_prompts(recipe: Recipe, tokenizer: Any, context: int) -> None:
    """The report continues the prompts at the end of the run, which is too late to find that it cannot."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise RecipeError("the tokenizer has neither a bos nor an eos token; one of them must precede a text")
    for index, prompt in enumerate(recipe.prompts):
        length = 1 + len(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)
        if length >= context:
            raise RecipeError(f"prompts[{index}] has {length} tokens; the model's context is {context}")
