"""Text from a prompt: checks of the prompt, and a stream of text pieces with their timing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import TextIteratorStreamer

from .characters import require_characters
from .engine_hook import GenerationReport
from .heads import NemotronForCausalLM
from .light.summary import SHORT_SECONDS, Summary, context_room
from .sampling_parameters import SamplingParameters, also_from
from .stop_texts import StopTexts

__all__ = ["SamplingParameters", "Summary", "TextStream", "context_room", "encode_prompt"]


class TextStream:
    """An iterator over pieces of text as they are written; `summary` and `text` are complete when it has ended.

    Closing it, or leaving its `with` block, stops the generation.

    Attributes:
        settings: the sampling parameters that have an effect.
        from_checkpoint: what else applies, by transformers' names: see `sampling_parameters.also_from`.
        notes: sentences on what the checkpoint asks for and does not get.
    """

    def __init__(
        self,
        model: NemotronForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: list[int],
        settings: SamplingParameters,
        stop_ids: tuple[int, ...] = (),
        draft: Any = None,
    ) -> None:
        """Begin to write.

        Args:
            model, tokenizer: the model in evaluation mode, and its tokenizer.
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
        self._report = GenerationReport()
        self._load = ""
        room = context_room(len(prompt_ids), model.config.max_position_embeddings)
        config: Any = model.generation_config
        arguments = settings.arguments(config, room)
        self.settings = settings.effective
        self.from_checkpoint = also_from(config) if settings.checkpoint else {}
        self.notes = settings.notes(config)
        ends = config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        if stop_ids:
            arguments["eos_token_id"] = sorted({*ends, *stop_ids})
        if config.pad_token_id is None:
            arguments["pad_token_id"] = 0  # one row is never padded; this only keeps the library from warning
        self._streamer = _TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        ids = torch.tensor([prompt_ids], device=model.device)
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        if model.device.type == "cpu":  # compiles, and logs that it does, before any text is written
            from .engine.generation import prepare

            prepare(model, draft)
        self._started = time.perf_counter()
        arguments |= {"draft": draft}
        stop = StopTexts(tokenizer, arguments["stop_strings"] or (), len(prompt_ids))
        arguments["stop_strings"] = None  # not left out: the checkpoint's would come back
        arguments["stopping_criteria"] = StoppingCriteriaList([_Stopped(self._stop), stop])
        self._thread = threading.Thread(target=self._run, args=(model, ids, arguments), daemon=True)
        self._thread.start()

    def _run(self, model: NemotronForCausalLM, ids: torch.Tensor, arguments: dict[str, Any]) -> None:
        try:
            from .load_meter import LoadMeter

            with LoadMeter(torch.get_num_threads()) as meter:
                self._output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=self._streamer,
                    report=self._report,
                    **arguments,
                )
            # The system's clocks tick a hundred times a second, which is too coarse for shorter times.
            if model.device.type == "cpu" and time.perf_counter() - self._started > SHORT_SECONDS:
                self._load = meter.reason
        except BaseException as error:  # carried over to the reader's thread
            self._error = error
            self._streamer.end()

    def __iter__(self) -> Iterator[str]:
        for piece in self._streamer:
            if piece:
                self.text += piece
                yield piece
        self._thread.join()
        if self._error is not None:
            raise self._error
        times = self._streamer
        new = self._output.shape[1] - self._prompt_tokens
        report = self._report
        speculation = report.speculation
        self.summary = Summary(
            self._prompt_tokens,
            new,
            times.last - self._started,
            times.first - self._started,
            report.engine,
            report.zero_fraction,
            speculation.acceptance_rate if speculation else None,
            speculation.tokens_per_step if speculation else None,
            self._load,
        )

    def close(self) -> None:
        """Stop after the token in progress."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _TimedStreamer(TextIteratorStreamer):
    """Records when the first and the last new token came; pieces of text come later, at the ends of words."""

    first = last = 0.0

    def put(self, value: torch.Tensor) -> None:
        """The prompt, and then each new token."""
        if not self.next_tokens_are_prompt:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        super().put(value)


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer puts around text.

    Raises:
        ValueError: the prompt is empty, or contains something that is not a character.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; give some text to continue")
    return list(tokenizer(require_characters(prompt, "the prompt"))["input_ids"])  # type: ignore[arg-type]
