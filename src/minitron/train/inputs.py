"""The inputs of a run: text from paths, and a model from a checkpoint or a shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.hf import check_checkpoint, config_from, read_config
from ..config import ModelConfig, NemotronConfig
from ..data.documents import BadTextError, Source
from ..data.packing import BlockStream, PackedBlocks, split_documents
from ..data.token_cache import Encoder, TokenFolder, tokenize_all
from ..families import family_of
from ..family_models import causal_lm_class
from ..quiet import progress_bars
from ..shapes import describe
from ..world import World
from .meta_loading import unloaded_model
from .schedule import TrainConfig

# The parts of a shape without a sensible default.
_NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")


@dataclass(frozen=True)
class TrainingTexts:
    """Training and held-out text of a run, packed."""

    stream: BlockStream
    heldout: dict[str, PackedBlocks]
    notes: tuple[str, ...] = ()
    """Sentences about text that was skipped."""


_ADVICE = "--skip-bad skips them; --encoding names the encoding of text that is not UTF-8 (cp1252: Western Windows)"


def open_texts(
    data: Sequence[str],
    heldout: Sequence[str],
    share: float,
    tokenizer: Encoder,
    config: TrainConfig,
    cache: Path | TokenFolder,
    field: str = "text",
    encoding: str = "utf-8",
    skip_bad: bool = False,
) -> TrainingTexts:
    """Tokenize (once) and pack texts.

    Args:
        data: `PATH[:WEIGHT]` of text to train on.
        heldout: paths of text that is only measured.
        share: share of the documents of each `data` that is held out as well, 0 to less than 1.
        tokenizer: encodes the text.
        config: for the sequence length and the seed.
        cache: folder of the token caches; runs may share it.
        field: which field or column holds the text, in files that have fields.
        encoding: of files without a byte-order mark.
        skip_bad: skip documents that cannot be used instead of refusing all.

    Raises:
        ValueError, FileNotFoundError: as `data.tokenize_all` and `data.split_documents`.
    """
    if not 0 <= share < 1:
        raise ValueError(f"held-out share is {share}; it must be 0 or more and less than 1")
    sources = [Source.parse(text, field, encoding, skip_bad) for text in data]
    measured = [Source(path, 1.0, field, encoding, skip_bad) for path in heldout]
    try:
        caches = tokenize_all([*sources, *measured], tokenizer, cache)
    except BadTextError as error:
        raise error.with_advice(_ADVICE) from None
    trained: list[tuple[PackedBlocks, float]] = []
    held: dict[str, PackedBlocks] = {}
    for source, tokens in zip(sources, caches, strict=False):
        kept, left_out = split_documents(tokens, share, config.seed, source.path)
        trained.append((PackedBlocks(tokens, config.sequence, kept, config.seed), source.weight))
        if share:
            held[_new_name(f"{Path(source.path).stem}-heldout", held)] = PackedBlocks(tokens, config.sequence, left_out)
    for source, tokens in zip(measured, caches[len(sources) :], strict=True):
        held[_new_name(Path(source.path).stem, held)] = PackedBlocks(tokens, config.sequence)
    notes = dict.fromkeys(note for tokens in caches for note in tokens.notes)
    return TrainingTexts(BlockStream(trained, config.seed), held, tuple(notes))


def _new_name(name: str, taken: Mapping[str, Any]) -> str:
    number = 2
    while name in taken:
        name, number = f"{name.rsplit('~', 1)[0]}~{number}", number + 1
    return name


def fresh_config(
    tokenizer: Any, sequence: int, *, file: Path | None = None, preset: str | None = None, shape: Mapping[str, int]
) -> ModelConfig:
    """The configuration of a new model, from a config.json, a preset, or the numbers in `shape`.

    The vocabulary and the special ids are the tokenizer's, unless the file says otherwise.
    """
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if file is not None:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error})") from None
        return config_from({"model_type": "nemotron", "vocab_size": len(tokenizer), **ids, **values}, file)
    if preset is not None:
        return NemotronConfig.preset(preset, **ids)
    missing = [name for name in _NEEDED if name not in shape]
    if missing:
        raise ValueError(f"the shape of a new model also needs {', '.join(missing)}")
    basis = {"vocab_size": len(tokenizer), "max_position_embeddings": sequence, "initializer_range": 0.02}
    return NemotronConfig(**{**basis, **ids, **shape})  # type: ignore[arg-type]


def new_model(config: ModelConfig, seed: int) -> Any:
    """A model with random weights in fp32 that depend on `seed` alone."""
    torch.manual_seed(seed)
    return causal_lm_class(family_of(config))(config).float()


def saved_model(
    folder: Path,
    device: torch.device | str = "cpu",
    world: World | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The model of a checkpoint folder on a device; a damaged or incomplete one is refused.

    In a world of several processes its weights are read when it is sharded, by `parallel.prepare`, where possible.
    """
    check_checkpoint(folder)
    model = unloaded_model(folder, dtype) if world is not None and world.mesh is not None else None
    if model is not None:
        return model
    config = read_config(folder)
    with progress_bars(describe(config).num_parameters() * dtype.itemsize):
        loaded: Any = causal_lm_class(family_of(config)).from_pretrained(folder, dtype=dtype)
    return loaded.to(device)
