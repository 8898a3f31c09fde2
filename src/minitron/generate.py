"""Text from a prompt: settings, checks of the prompt, and a stream of text pieces with their timing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import TextIteratorStreamer

from .decoding import GenerationReport
from .model import NemotronForCausalLM


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    """Tokens to write at most; fewer where the context ends."""
    temperature: float = 0.8
    """0 is greedy decoding; 1 the model's own distribution."""
    top_p: float = 1.0
    """Keep the most probable tokens that together have this probability."""
    top_k: int = 0
    """Keep this many most probable tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this share of the most probable one's probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already present become less likely."""
    seed: int | None = None
    """Same seed, same machine, same text; None draws one."""
    stop: tuple[str, ...] = ()
    """Stop after any of these strings has been written."""

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (1, None),
            "temperature": (0, None),
            "top_p": (0, 1),
            "top_k": (0, None),
            "min_p": (0, 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                allowed = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name} is {value}; it must be {allowed}")
        if self.top_p == 0:
            raise ValueError("top_p is 0, which keeps no token; it must be greater than 0")
        if "" in self.stop:
            raise ValueError("stop contains an empty string, which every text contains")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be greater than 0")

    def generation_config(self, base: GenerationConfig, room: int) -> GenerationConfig:
        """These settings over `base`, for at most `room` new tokens."""
        config = GenerationConfig.from_dict(base.to_dict())
        config.max_new_tokens = min(self.max_new_tokens, room)
        config.max_length = None
        config.do_sample = self.temperature > 0
        config.temperature = self.temperature if self.temperature > 0 else None
        config.top_p = self.top_p if config.do_sample else None
        config.top_k = (self.top_k or None) if config.do_sample else None
        config.min_p = (self.min_p or None) if config.do_sample else None
        config.repetition_penalty = self.repetition_penalty
        config.stop_strings = list(self.stop) or None
        return config


@dataclass(frozen=True)
class Summary:
    """What a finished generation took."""

    prompt_tokens: int
    new_tokens: int
    seconds: float
    """From the call to the last token, prompt included."""
    first_token_seconds: float
    """From the call to the first piece of text."""
    engine: str
    """What decoded: "cpu", "reference" or "transformers"; see `decoding.GenerationReport`."""
    zero_fraction: float | None
    """Share of MLP neurons that were exactly zero and whose weights were not read; None if nobody counted."""
    acceptance_rate: float | None = None
    """Share of drafted tokens that stayed; None without speculation."""
    tokens_per_step: float | None = None
    """Tokens that a step of the model gave; None without speculation."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens over all the time."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens after the first piece of text, over the time since then: without prompt and compilation."""
        rest = self.seconds - self.first_token_seconds
        return (self.new_tokens - 1) / rest if rest > 0 else 0.0


class TextStream:
    """An iterator over pieces of text as they are written; `summary` and `text` are there when it has ended.

    Closing it, or leaving its `with` block, stops the generation.
    """

    def __init__(
        self,
        model: NemotronForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: list[int],
        settings: SamplingSettings,
        stop_ids: tuple[int, ...] = (),
        draft: Any = None,
    ) -> None:
        """Begin to write.

        Args:
            model, tokenizer: which; the model in evaluation mode.
            prompt_ids: at least one token.
            settings: how tokens are chosen.
            stop_ids: tokens that end the text, besides the model's own.
            draft: see `NemotronForCausalLM.generate`.
        """
        self.text = ""
        self.summary: Summary | None = None
        self._prompt_tokens = len(prompt_ids)
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._output: Any = None
        self._report: GenerationReport | None = None
        room = context_room(len(prompt_ids), model.config.max_position_embeddings)
        config = settings.generation_config(model.generation_config, room)  # type: ignore[arg-type]
        if stop_ids:
            ends = config.eos_token_id
            ends = [ends] if isinstance(ends, int) else list(ends or [])
            config.eos_token_id = sorted({*ends, *stop_ids})
        if config.pad_token_id is None:
            config.pad_token_id = 0  # one row is never padded; this only keeps the library from warning
        self._streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        ids = torch.tensor([prompt_ids], device=model.device)
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        self._started = time.perf_counter()
        words: dict[str, Any] = {"draft": draft}
        if settings.stop:
            words["tokenizer"] = tokenizer  # looks the strings up in the vocabulary
        self._thread = threading.Thread(target=self._run, args=(model, ids, config, words), daemon=True)
        self._thread.start()

    def _run(
        self, model: NemotronForCausalLM, ids: torch.Tensor, config: GenerationConfig, words: dict[str, Any]
    ) -> None:
        try:
            self._output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=self._streamer,
                stopping_criteria=StoppingCriteriaList([_Stopped(self._stop)]),
                **words,
            )
            self._report = model.last_generation
        except BaseException as error:  # carried over to the reader's thread
            self._error = error
            self._streamer.end()

    def __iter__(self) -> Iterator[str]:
        first = None
        for piece in self._streamer:
            if piece:
                first = first or time.perf_counter()
                self.text += piece
                yield piece
        self._thread.join()
        if self._error is not None:
            raise self._error
        ended = time.perf_counter()
        new = self._output.shape[1] - self._prompt_tokens
        report = self._report
        speculation = report.speculation if report else None
        self.summary = Summary(
            self._prompt_tokens,
            new,
            ended - self._started,
            (first or ended) - self._started,
            report.engine if report else "transformers",
            report.zero_fraction if report else None,
            speculation.acceptance_rate if speculation else None,
            speculation.tokens_per_step if speculation else None,
        )

    def close(self) -> None:
        """Stop after the token in progress."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer puts around text.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; give some text to go on from")
    return list(tokenizer(prompt)["input_ids"])  # type: ignore[arg-type]


def context_room(prompt_tokens: int, context: int) -> int:
    """New tokens that fit behind a prompt.

    Raises:
        ValueError: none does.
    """
    room = context - prompt_tokens
    if room < 1:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens; the model's context (max_position_embeddings) is {context}, "
            f"so a prompt may have at most {context - 1}"
        )
    return room
