"""Sampling parameters: how the next token is chosen, and how the recommendations of a checkpoint enter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that bad parameters are refused before anything heavy is imported
    from typing import Protocol

    from transformers import GenerationConfig

    class Recommended(Protocol):
        """What states recommendations, as a `GenerationConfig` does."""

        def to_diff_dict(self) -> dict[str, Any]:
            """The values that are stated, by name."""
            ...


@dataclass(frozen=True)
class SamplingParameters:
    """How the next token is chosen. These values apply, whatever a checkpoint recommends.

    What shapes the distribution applies in this order: penalty, temperature, top-k, top-p, min-p, and then the others.
    """

    max_new_tokens: int = 128
    """Largest number of new tokens; fewer where the context ends."""
    temperature: float = 0.8
    """0 is greedy decoding; 1 the model's own distribution."""
    top_p: float = 1.0
    """Keep the fewest most probable tokens that together have at least this probability."""
    top_k: int = 0
    """Keep this many most probable tokens, and those that tie with the last; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the most probable one's probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already present become less likely."""
    seed: int | None = None
    """Same seed, same machine, same text; None draws a seed."""
    stop: tuple[str, ...] = ()
    """Stop after any of these strings has been written."""
    typical_p: float = 1.0
    """Keep the most typical tokens that together have this probability (Meister et al. 2022)."""
    epsilon_cutoff: float = 0.0
    """Keep tokens of at least this probability; 0 keeps all."""
    eta_cutoff: float = 0.0
    """As `epsilon_cutoff`, lower where the distribution is flat (Hewitt et al. 2022); 0 keeps all."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens occurs twice; 0 allows all."""
    checkpoint: bool = True
    """Whether the other requests of the checkpoint's `generation_config.json` apply, such as stop strings or suppressed
    tokens; see `also_from`. The tokens that end a text always apply."""

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            _check_number(name, getattr(self, name), low, high)
        if self.seed is not None:
            _check_number("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("top_p", "typical_p"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is 0, which keeps no token; it must be greater than 0")
        for name in ("epsilon_cutoff", "eta_cutoff"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name} is 1; it must be below 1 (0 keeps all tokens)")
        if isinstance(self.stop, str):
            raise ValueError(f"stop is {self.stop!r}; it must be a tuple of strings")
        if "" in self.stop:
            raise ValueError("stop contains an empty string, which every text contains")

    @classmethod
    def for_model(
        cls, config: GenerationConfig | Recommended, given: Mapping[str, Any], otherwise: Mapping[str, Any]
    ) -> SamplingParameters:
        """The values of the user, else those that the checkpoint recommends, else `otherwise`, else the defaults.

        Args:
            config: the model's `generation_config`.
            given: the user's values by name; None counts as not given. With `checkpoint` False nothing is recommended.
            otherwise: values by name.

        Raises:
            ValueError: a value is impossible, one of the user's or one of the checkpoint's.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        found: dict[str, Any] = {}
        if chosen.get("checkpoint", True):
            stated = config.to_diff_dict()
            found = {name: stated[name] for name in (*_LIMITS, *_SHAPING) if stated.get(name) is not None}
            if stated.get("do_sample") is False and not set(_SHAPING) & set(chosen):
                found["temperature"] = 0.0
        try:
            cls(**found)
        except ValueError as error:
            raise ValueError(f"the checkpoint's generation_config.json: {error}") from None
        return cls(**{**otherwise, **found, **chosen})

    @property
    def greedy(self) -> bool:
        """Whether the next token is the most probable one, whatever came before."""
        neutral = self.repetition_penalty == 1 and self.no_repeat_ngram_size == 0
        return neutral and self.temperature == 0

    @property
    def effective(self) -> SamplingParameters:
        """These parameters without those that have no effect: greedy decoding does not shape the distribution."""
        neutral = {field.name: field.default for field in fields(self) if field.name in _SHAPING}
        return self if self.temperature > 0 else replace(self, **{**neutral, "temperature": self.temperature})

    def arguments(self, config: GenerationConfig, room: int) -> dict[str, Any]:
        """Arguments of `generate` for at most `room` new tokens.

        transformers fills an argument that is missing, or None in a `GenerationConfig`, from the checkpoint and from
        its own defaults (`top_k` 50), so all are named.
        """
        also = also_from(config)
        found: dict[str, Any] = {} if self.checkpoint else dict.fromkeys(also)
        found |= {name: None for name in config.to_diff_dict() if name in _OTHER_MODES}
        found |= NEUTRAL | _PLAIN_OUTPUT
        settings = asdict(self.effective)
        sampling = self.temperature > 0
        found["do_sample"] = sampling
        for name in _SHAPING:
            found[name] = type(NEUTRAL[name])(settings[name]) if sampling else None
        found["repetition_penalty"] = float(self.repetition_penalty)
        found["no_repeat_ngram_size"] = self.no_repeat_ngram_size
        found["max_new_tokens"] = min(self.max_new_tokens, room)
        found["max_length"] = None
        theirs = _strings(also.get("stop_strings")) if self.checkpoint else ()
        found["stop_strings"] = list(dict.fromkeys((*self.stop, *theirs))) or None
        return found

    def notes(self, config: GenerationConfig) -> list[str]:
        """Sentences on what a checkpoint asks for and does not get, because one text is written token by token."""
        stated = config.to_diff_dict()
        asked = {name: stated[name] for name in _OTHER_MODES if name in stated}
        ignored = {name: value for name, value in asked.items() if value is True or value not in _NO_MODE}
        if not ignored or not self.checkpoint:
            return []
        named = ", ".join(f"{name} {value!r}" for name, value in ignored.items())
        return [f"the checkpoint's generation_config.json asks for {named}, which is ignored"]


NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
}
"""Arguments of `generate` that keep a checkpoint's recommendations and all defaults from shaping the distribution."""
_SHAPING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Fields without effect in greedy decoding."""
_LIMITS: dict[str, tuple[float, float | None]] = {
    "max_new_tokens": (1, None),
    "temperature": (0, None),
    "top_p": (0, 1),
    "top_k": (0, None),
    "min_p": (0, 1),
    "repetition_penalty": (0.001, 1000),
    "typical_p": (0, 1),
    "epsilon_cutoff": (0, 1),
    "eta_cutoff": (0, 1),
    "no_repeat_ngram_size": (0, None),
}
_INTEGERS = ("max_new_tokens", "top_k", "no_repeat_ngram_size", "seed")
_OTHER_MODES = (
    "num_beams",
    "num_return_sequences",
    "num_beam_groups",
    "diversity_penalty",
    "length_penalty",
    "early_stopping",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "token_healing",
    "cache_implementation",
    "low_memory",
)
"""Fields of a generation config that ask for another search than one token after the other."""
_NO_MODE = (None, False, 0, 1)
_PLAIN_OUTPUT = {
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "use_cache": True,
}
_NOT_RULES = ("transformers_version", "do_sample", "max_length", "bos_token_id", "eos_token_id", "pad_token_id")


def also_from(config: GenerationConfig) -> dict[str, Any]:
    """What applies of a checkpoint's requests besides the fields of `SamplingParameters`, by transformers' names."""
    from transformers import GenerationConfig

    known = {*_LIMITS, *_SHAPING, *_OTHER_MODES, *_PLAIN_OUTPUT, *_NOT_RULES}
    documented = vars(GenerationConfig())
    stated = config.to_diff_dict().items()
    return {name: x for name, x in stated if name in documented and name not in known and not name.startswith("_")}


def _strings(value: Any) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _check_number(name: str, value: Any, low: float, high: float | None) -> None:
    kinds = int if name in _INTEGERS else int | float
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be {'an integer' if kinds is int else 'a number'}")
    # Written so that NaN is outside.
    if not (low <= value and (high is None or value <= high) and (isinstance(value, int) or math.isfinite(value))):
        allowed = f"at least {low}, and finite" if high is None else f"from {low} to {high}"
        allowed = allowed.removesuffix(", and finite") if kinds is int else allowed
        raise ValueError(f"{name} is {value}; it must be {allowed}")
