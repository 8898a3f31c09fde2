"""A guard: a sequence classification head that judges each prompt and each answer of a language model.

Where the head's backbone is the served model itself, its last hidden states are those that decoding computes anyway, so
that a judgement is one small product. Otherwise, if that is wanted, the head runs as a model of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
import torch

from ..checkpoint.hf import read_config
from ..checkpoint.tensors import LazyTensor
from ..checkpoint.weight_files import read_tensors
from ..finite import NotFiniteError
from ..loading import checkpoint_folder
from ..tokenizer import load_tokenizer
from ..tune.encoding import encode_turns, encoder_of
from .classifiers import head_of, load_classifier

if TYPE_CHECKING:
    from .settings import ServeSettings

Array: TypeAlias = np.ndarray[Any, Any]
Action: TypeAlias = Literal["refuse", "flag", "count"]
SCORE = "score.weight"
"""The head's matrix (C, D), in our classes and in those of transformers."""
REFUSAL = "The guard of this server refuses this."
_OF_A_HEAD = (
    "architectures", "id2label", "label2id", "num_labels", "problem_type", "pad_token_id", "bos_token_id",
    "eos_token_id", "dtype", "torch_dtype", "use_cache", "tie_word_embeddings", "transformers_version",
    "_name_or_path", "name_or_path", "output_hidden_states", "output_attentions", "return_dict",
)  # fmt: skip
"""Fields of a configuration that may differ between a head and its language model."""


@dataclass(frozen=True)
class Judgement:
    """What a guard says about a text."""

    label: str
    """The most probable label."""
    prob: float
    """The probability that the text has one of the blocked labels."""
    flagged: bool
    """Whether `prob` reaches the threshold."""


@dataclass(frozen=True)
class Verdicts:
    """From the logits of a head to a judgement."""

    labels: tuple[str, ...]
    blocked: tuple[int, ...]
    """Indices of the labels that block."""
    several: bool
    """Whether a text may have several labels, each with a probability of its own."""
    threshold: float

    def of(self, logits: Array) -> Judgement:
        """The judgement for logits (C,).

        Raises:
            NotFiniteError: one of them is NaN or infinite.
        """
        wide = logits.astype(np.float64)
        if not np.isfinite(wide).all():
            raise NotFiniteError("the head computes NaN or infinity")
        if self.several:
            shares = 1 / (1 + np.exp(-np.clip(wide, -500, 500)))
            prob = float(shares[list(self.blocked)].max())
        else:
            shares = np.exp(wide - wide.max())
            shares /= shares.sum()
            prob = math.fsum(shares[list(self.blocked)])
        return Judgement(self.labels[int(wide.argmax())], min(prob, 1.0), prob >= self.threshold)


class Guard(Protocol):
    """What the scheduler asks."""

    name: str
    action: Action
    """What is done about a flagged text: its request is refused, or the response says so, or it is only counted."""
    shared: bool
    """Whether it reads the served model's hidden states."""

    def judge(self, tokens: Sequence[int], hidden: Array) -> Judgement:
        """The judgement of a text.

        Args:
            tokens: all of its tokens.
            hidden: (D,) float32, the served model's last hidden state at the last token.

        Raises:
            NotFiniteError: the head computes NaN.
        """
        ...


class SharedGuard(Guard):
    """A head over the hidden states of the served model."""

    shared = True

    def __init__(self, name: str, action: Action, weight: Array, verdicts: Verdicts) -> None:
        self.name, self.action, self._weight, self._verdicts = name, action, weight, verdicts

    def judge(self, tokens: Sequence[int], hidden: Array) -> Judgement:
        """See `Guard.judge`."""
        return self._verdicts.of(self._weight @ hidden)


class SeparateGuard(Guard):
    """A head with a backbone of its own: a forward pass for each judgement."""

    shared = False

    def __init__(self, name: str, action: Action, model: Any, encode: Any, verdicts: Verdicts) -> None:
        """Judge by a model; `encode` turns tokens of the served model into its own."""
        self.name, self.action, self._model, self._encode, self._verdicts = name, action, model, encode, verdicts

    def judge(self, tokens: Sequence[int], hidden: Array) -> Judgement:
        """See `Guard.judge`. Of a text that is too long for the head, the end is judged."""
        ids = self._encode(tokens)[-self._model.config.max_position_embeddings :]
        with torch.inference_mode():
            out = self._model(input_ids=torch.tensor([ids], device=self._model.device))
        return self._verdicts.of(out.logits[0].float().cpu().numpy())


def guard_path(settings: ServeSettings, model: str) -> str | None:
    """The head that guards the model of that name; None if none does."""
    found = None
    for given in settings.guard:
        name, mark, path = given.partition("=")
        if not mark:
            found = found or given
        elif name == model:
            found = path
    return found


def load_guard(
    path: str, name: str, model: Any, tokenizer: Any, settings: ServeSettings, say: Callable[[str], object]
) -> Guard:
    """The guard of a served model.

    Args:
        path: the head's checkpoint.
        name: of the served model.
        model: the served model.
        tokenizer: the served model's.
        settings: what is blocked, and what is done about it.
        say: called with a sentence about how it runs.

    Raises:
        FileNotFoundError, ValueError: the head is missing or wrong, its labels are not those that are blocked, or its
            backbone is not the served model and the settings do not allow another one.
    """
    folder = checkpoint_folder(path, say)
    head = head_of(folder)
    if head is None or not head.endswith("ForSequenceClassification"):
        raise ValueError(f"--guard {path}: it must be a sequence classification head; found {head or 'no head'}")
    config: Any = read_config(folder)
    verdicts = _verdicts(path, config, settings)
    action: Any = settings.guard_action
    if encoder_of(config) is not encode_turns:
        say(f"{path} was trained on plain texts; here it reads conversations as the chat template writes them (--chat)")
    tensors = read_tensors(folder)
    why = _why_not_shared(config, tensors, load_tokenizer(folder, vocab_size=config.vocab_size), model, tokenizer)
    if not why:
        say(f"{name}: guarded by {path} in its own forward pass, whose weights are equal; {_summary(settings)}")
        return SharedGuard(path, action, tensors[SCORE].load().float().numpy(), verdicts)
    if not settings.guard_separate:
        raise ValueError(
            f"--guard {path}: it cannot share the forward pass of {name!r}, because {why}; train it with `minitron "
            f"finetune --task classify --tune head` on that model, or let it run beside with --guard-separate, slower"
        )
    classifier = load_classifier(path, path, settings.device, say)
    assert classifier is not None, "its architecture is a head"
    say(f"{name}: guarded by {path} in a forward pass of its own, because {why}; {_summary(settings)}")
    return SeparateGuard(path, action, classifier.model, _encoder(tokenizer, classifier.tokenizer), verdicts)


def _summary(settings: ServeSettings) -> str:
    blocked = " or ".join(settings.guard_block)
    return f"{settings.guard_action}s what is {blocked} with a probability of {settings.guard_threshold:g} or more"


def _verdicts(path: str, config: Any, settings: ServeSettings) -> Verdicts:
    labels = tuple(config.id2label[index] for index in range(config.num_labels))
    for label in settings.guard_block:
        if label not in labels:
            raise ValueError(f"--guard-block {label}: the labels of {path} are {', '.join(labels)}")
    several = config.problem_type == "multi_label_classification" or len(labels) == 1
    if config.problem_type == "regression":
        raise ValueError(f"--guard {path}: it predicts a number; a guard needs a head with labels")
    blocked = tuple(labels.index(label) for label in settings.guard_block)
    return Verdicts(labels, blocked, several, settings.guard_threshold)


def _encoder(served: Any, own: Any) -> Callable[[Sequence[int]], list[int]]:
    if served.get_vocab() == own.get_vocab():
        return list
    return lambda tokens: list(own(served.decode(list(tokens), skip_special_tokens=True))["input_ids"])


# --- is the head's backbone the served model? ------------------------------------------------------------------------


def _why_not_shared(config: Any, tensors: dict[str, LazyTensor], own_tokenizer: Any, model: Any, tokenizer: Any) -> str:
    """Why a head cannot read a model's hidden states; empty if every weight of its backbone is the model's."""
    if next(model.parameters()).is_meta:
        return "the model was loaded in a format for generation only (--format)"
    ours, theirs = model.config.to_dict(), config.to_dict()
    for field in sorted(ours):
        if field not in _OF_A_HEAD and ours[field] != theirs.get(field):
            return f"its {field} is {theirs.get(field)!r:.80} and the model's {ours[field]!r:.80}"
    if own_tokenizer.get_vocab() != tokenizer.get_vocab():
        return "its tokenizer has another vocabulary"
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("lm_head.")}
    backbone = {name: tensor for name, tensor in tensors.items() if not name.startswith(("score.", "lm_head."))}
    if SCORE not in tensors or "score.bias" in tensors:
        return "its head is not one matrix named score.weight"
    for name in sorted(weights.keys() | backbone.keys()):
        if name not in weights or name not in backbone:
            return f"only one of them has a {name}"
        if not _equal(weights[name], backbone[name].load()):
            return f"its {name} has other values"
    return ""


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whichever dtypes."""
    wide = torch.promote_types(ours.dtype, theirs.dtype)
    return ours.shape == theirs.shape and torch.equal(ours.detach().cpu().to(wide), theirs.to(wide))
