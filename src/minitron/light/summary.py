"""The numbers of a finished generation, and the room that a context leaves for one."""

from __future__ import annotations

from dataclasses import dataclass

SHORT_SECONDS = 0.3
"""Shorter generations do not tell whether other programs were running."""


@dataclass(frozen=True)
class Summary:
    """The numbers of tokens and the times of a finished generation."""

    prompt_tokens: int
    new_tokens: int
    seconds: float
    """From the call to the last token, prompt included."""
    first_token_seconds: float
    """From the call to the first new token: the prefill. Compilation before it does not count."""
    engine: str
    """The engine that decoded: "cpu", "reference" or "transformers"; see `engine_hook.GenerationReport`."""
    zero_fraction: float | None
    """Share of MLP neurons that were exactly zero and whose weights were not read; None if they were not counted."""
    acceptance_rate: float | None = None
    """Share of drafted tokens that were accepted; None without speculation."""
    tokens_per_step: float | None = None
    """Tokens for each step of the model; None without speculation."""
    load: str = ""
    """Other load on the machine, which makes the times unreliable; empty if the machine was free."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole time."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens after the first over the time since then: without prompt and compilation. 0 for one token."""
        rest = self.seconds - self.first_token_seconds
        return (self.new_tokens - 1) / rest if rest > 0 and self.new_tokens > 1 else 0.0


def context_room(prompt_tokens: int, context: int) -> int:
    """The number of new tokens that fit into the context after a prompt.

    Raises:
        ValueError: the prompt fills the context.
    """
    room = context - prompt_tokens
    if room < 1:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens; the model's context (max_position_embeddings) is {context}, "
            f"so a prompt may have at most {context - 1}"
        )
    return room
