"""The quick suite: perplexity and bits per byte of any text, distance between two checkpoints, generation metrics.

No task data and no library beyond torch and transformers; seconds on a small model. The report of a compression uses
these functions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..sampling_parameters import NEUTRAL
from ..tokenizer import tokenizer_difference
from .scoring import logit_chunks, pair_scores

ROW_TOKENS = 2048
"""Approximate number of tokens in one forward pass."""


# --- windows -----------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A piece of a document in the model's context: `ids[i]` is followed by `targets[i]`."""

    ids: list[int]
    targets: list[int]
    scored: int
    """How many targets at the end are scored; those before them were scored in the previous window."""


def check_stride(stride: int | None, window: int, name: str = "") -> None:
    """Refuse a stride that does not fit a window.

    Args:
        stride: None stands for the window itself.
        name: the name of the model whose context the window is, if there is one.

    Raises:
        ValueError: the stride is not from 1 to `window`.
    """
    if stride is not None and not 1 <= stride <= window:
        what = f"the context of {name}" if name else "the window"
        raise ValueError(f"stride is {stride}; it must be from 1 to {what}, {window}")


def sliding_windows(ids: Sequence[int], prefix: int, window: int, stride: int) -> Iterator[Window]:
    """Cut a document into windows in which every token of it is a scored target exactly once.

    The first token is predicted from `prefix`. A window has at most `window` inputs and scores at most `stride`
    targets; all of them but those of the first window have at least `window - stride` tokens before them.

    Raises:
        ValueError: a stride that is not from 1 to `window`.
    """
    check_stride(stride, window)
    whole = [prefix, *ids]
    done = 0
    while done < len(ids):
        end = min(len(ids), window if done == 0 else done + stride)
        start = max(0, end - window)
        yield Window(whole[start:end], whole[start + 1 : end + 1], end - done)
        done = end


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before the first token of a text: `bos`, or `eos` where there is none.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)  # type: ignore[arg-type]
    raise ValueError("the tokenizer has neither a bos nor an eos token; a text must begin with one of them")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[arg-type]


def _all_windows(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int | None,
    stride: int | None,
) -> list[Window]:  # fmt: skip
    if isinstance(texts, str):
        raise TypeError("texts is one string; give a list of texts")
    context: int = model.config.max_position_embeddings
    window = context if window is None else window
    if not 1 <= window <= context:
        raise ValueError(f"window is {window}; it must be from 1 to the model's context, {context}")
    stride = window if stride is None else stride
    prefix = prefix_token(tokenizer)
    return [w for text in texts for w in sliding_windows(_encode(tokenizer, text), prefix, window, stride)]


def _batches(windows: list[Window]) -> Iterator[list[Window]]:
    """Batches of windows sorted by length, each of about `ROW_TOKENS` tokens."""
    ordered = sorted(windows, key=lambda w: -len(w.ids))
    while ordered:
        count = max(1, ROW_TOKENS // len(ordered[0].ids))
        yield ordered[:count]
        ordered = ordered[count:]


class _Scored(NamedTuple):
    hidden: Tensor  # (N, D), positions whose target is scored
    targets: Tensor  # (N,)


def _scored_hidden(model: Any, batch: list[Window]) -> _Scored:
    """Hidden states at scored positions. Padding is at the end of each row, where causal attention never reads it."""
    length = len(batch[0].ids)
    ids = torch.tensor([w.ids + [0] * (length - len(w.ids)) for w in batch], device=model.device)
    hidden = model.model(ids, use_cache=False).last_hidden_state
    parts = [hidden[row, len(w.ids) - w.scored : len(w.ids)] for row, w in enumerate(batch)]
    targets = [token for w in batch for token in w.targets[len(w.targets) - w.scored :]]
    return _Scored(torch.cat(parts), torch.tensor(targets, device=model.device))


# --- perplexity --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts texts."""

    texts: int
    tokens: int
    """Tokens of the texts; each was predicted once."""
    bytes: int
    """Length of the texts in UTF-8."""
    nats: float
    """Sum of negative log-probabilities over all tokens."""

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-probability of a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per token: `exp(nats_per_token)`, infinite where that overflows."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, float]:
        """All figures, for JSON."""
        return asdict(self) | {
            "nats_per_token": self.nats_per_token,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


@torch.inference_mode()
def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    window: int | None = None,
    stride: int | None = None,
) -> TextScore:
    """Score texts one by one with a sliding window.

    Args:
        texts: documents; each follows the tokenizer's bos (or eos) token, which is not scored.
        window: largest number of tokens that the model sees at a time; its whole context if None.
        stride: tokens scored per window. `window` (the default) is fastest; a smaller one gives each token at least
            `window - stride` tokens of context and costs `window / stride` times as much.

    Raises:
        ValueError: a window or stride out of range; no text with a token in it; a tokenizer without bos and eos.
    """
    windows = _all_windows(model, tokenizer, texts, window, stride)
    if not windows:
        raise ValueError("there is no text to score: no text has a token in it")
    nats, count = 0.0, 0
    for batch in _batches(windows):
        hidden, targets = _scored_hidden(model, batch)
        found = pair_scores(model.lm_head, hidden, torch.arange(len(targets), device=hidden.device), targets)
        nats -= found.log_probs.double().sum().item()
        count += len(targets)
    return TextScore(len(texts), count, sum(len(text.encode("utf-8")) for text in texts), nats)


# --- two checkpoints ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """Distance of a model's predictions from a reference model's, over the tokens of the same texts."""

    tokens: int
    kl_nats_per_token: float
    """Mean of KL(reference || model) over positions."""
    top1_agreement: float
    """Share of positions at which both models find the same token most probable."""
    nats_per_token: float
    """Of the model."""
    reference_nats_per_token: float


def require_same_tokens(
    tokenizer: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase, texts: Sequence[str] = (),
    names: tuple[str, str] = ("the model", "the reference"),
) -> None:  # fmt: skip
    """Refuse to compare two models token by token if their tokenizers differ.

    Raises:
        ValueError: the tokenizers differ; the message says where.
    """
    what = tokenizer_difference(tokenizer, reference, texts, names)
    if what is not None:
        raise ValueError(
            f"the tokenizers of {names[0]} and {names[1]} differ: {what}. KL divergence and agreement compare models "
            f"token by token; evaluate these by themselves: bits per byte can be compared"
        )


@torch.inference_mode()
def distance(
    model: Any,
    reference: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    window: int | None = None,
    stride: int | None = None,
    reference_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Distance:
    """KL divergence and agreement of two models with the same tokenizer; other arguments as in `perplexity`.

    Args:
        reference_tokenizer: the reference model's own, which must agree with `tokenizer`. Omit it only if the two
            models are known to share one: the numbers are meaningless if an id means different tokens in the two.

    Raises:
        ValueError: tokenizers that differ, vocabularies of different sizes, and whatever `perplexity` refuses.
    """
    if reference_tokenizer is not None:
        require_same_tokens(tokenizer, reference_tokenizer, texts)
    sizes = model.config.vocab_size, reference.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens; they must share one")
    shorter = min(model, reference, key=lambda m: m.config.max_position_embeddings)
    windows = _all_windows(shorter, tokenizer, texts, window, stride)
    if not windows:
        raise ValueError("there is no text to score: no text has a token in it")
    totals = torch.zeros(4, dtype=torch.float64)
    count = 0
    for batch in _batches(windows):
        ours, targets = _scored_hidden(model, batch)
        theirs = _scored_hidden(reference, batch).hidden
        pairs = zip(logit_chunks(model.lm_head, ours), logit_chunks(reference.lm_head, theirs), strict=True)
        for (part, logits), (_, reference_logits) in pairs:
            q, p = logits.log_softmax(-1), reference_logits.to(logits.device).log_softmax(-1)
            wanted = targets[part, None]
            sums = (
                (p.exp() * (p - q)).sum(-1),
                q.argmax(-1) == p.argmax(-1),
                -q.gather(1, wanted),
                -p.gather(1, wanted),
            )
            totals += torch.stack([x.double().sum().cpu() for x in sums])
        count += len(targets)
    return Distance(count, *(totals / count).tolist())


# --- generation --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationScore:
    """Repetition in greedy continuations. A damaged model repeats itself."""

    prompts: int
    new_tokens: int
    distinct_1: float
    """Distinct tokens over all tokens."""
    distinct_2: float
    """Distinct pairs of adjacent tokens over all such pairs."""
    repeated_4grams: float
    """Share of 4-grams that occurred earlier in the same continuation."""
    ended: float
    """Share of continuations that ended with an end token."""


def generation(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 64
) -> GenerationScore:
    """Continue prompts greedily and count repetitions.

    Raises:
        ValueError: no prompt; one that leaves no room in the context.
    """
    if not prompts:
        raise ValueError("there is no prompt to continue")
    runs = [_continue(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]
    ends = _end_ids(model)
    grams = {n: [tuple(run[i : i + n]) for run in runs for i in range(len(run) - n + 1)] for n in (1, 2)}
    fours = [[tuple(run[i : i + 4]) for i in range(len(run) - 3)] for run in runs]
    repeats = sum(sum(count - 1 for count in Counter(run).values()) for run in fours)
    return GenerationScore(
        prompts=len(runs),
        new_tokens=sum(map(len, runs)),
        distinct_1=_share(len(set(grams[1])), len(grams[1])),
        distinct_2=_share(len(set(grams[2])), len(grams[2])),
        repeated_4grams=_share(repeats, sum(map(len, fours))),
        ended=_share(sum(bool(run) and run[-1] in ends for run in runs), len(runs)),
    )


def _continue(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> list[int]:
    ids = torch.tensor([[prefix_token(tokenizer), *_encode(tokenizer, prompt)]], device=model.device)
    room = model.config.max_position_embeddings - ids.shape[1]
    if room < 1:
        raise ValueError(f"the prompt {prompt[:40]!r}... has {ids.shape[1]} tokens, which fill the model's context")
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=min(max_new_tokens, room),
        pad_token_id=0 if model.config.pad_token_id is None else model.config.pad_token_id,
        **NEUTRAL,
    )
    return out[0, ids.shape[1] :].tolist()


def _end_ids(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
    return {ends} if isinstance(ends, int) else set(ends or ())


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


# --- all together ------------------------------------------------------------------------------------------------


def quick_suite(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    reference: Any | None = None,
    prompts: Sequence[str] = (),
    window: int | None = None,
    stride: int | None = None,
    reference_tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, dict[str, float]]:
    """All of the above, for JSON: `text`, and `distance` and `generation` if a reference and prompts are given.

    Raises:
        ValueError: whatever `perplexity`, `distance` and `generation` refuse.
    """
    if reference_tokenizer is not None:  # before the time for the texts is spent
        require_same_tokens(tokenizer, reference_tokenizer, texts)
    result = {"text": perplexity(model, tokenizer, texts, window, stride).as_dict()}
    if reference is not None:
        result["distance"] = asdict(distance(model, reference, tokenizer, texts, window, stride))
    if prompts:
        result["generation"] = asdict(generation(model, tokenizer, prompts))
    return result
