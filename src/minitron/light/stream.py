"""A stream of text pieces, as `text_stream.TextStream`, from the compiled engine alone."""

from __future__ import annotations

import importlib.util
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..characters import require_characters
from ..engine.base import MOST_STOPS
from ..engine.draws import Draws
from ..engine.mt19937 import seeded
from ..engine.parts import EngineWeights
from ..files.links import LinkedFileError, require_own_files
from ..finite import NotFiniteError, explain
from ..load_meter import LoadMeter
from ..sampling_parameters import SamplingParameters
from .settings import NotServedError, PlainConfig, Recommended, read_plain_config, read_recommended, refuse_unless
from .summary import SHORT_SECONDS, Summary
from .tokenizer import LightTokenizer, Pieces
from .weights import read_weights

_DEFAULTS = SamplingParameters()
_IN_ENGINE = (
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"),
    "checkpoint",
)
"""Parameters that the engine takes, or that ask for nothing of a checkpoint that is served."""
BURST_SECONDS = 0.02
"""Time of a burst, whose tokens are shown together; nobody reads faster."""
_FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "README.md", "LICENSE", ".gitattributes", "report.html"),
}
"""Files of a folder that are read, or that no reader looks at when a text is continued."""


@contextmanager
def _without_scipy() -> Iterator[None]:
    """Keep Numba from importing scipy, for matrix products that no kernel here calls: it takes a third of the time in
    which Numba loads its first function. A process that has scipy or torch already keeps Numba as it is."""
    if "scipy" in sys.modules or "torch" in sys.modules or "numba" in sys.modules:
        yield
        return
    sys.modules["scipy"] = None  # type: ignore[assignment] (an import of it fails)
    try:
        yield
    finally:
        del sys.modules["scipy"]


class LightModel:
    """A folder's model and tokenizer, and what it recommends."""

    def __init__(self, folder: Path) -> None:
        """Read and check the files.

        Raises:
            NotServedError: the ordinary path must serve this folder.
        """
        refuse_unless(importlib.util.find_spec("numba") is not None, "no Numba")
        others = sorted(path.name for path in folder.iterdir() if path.name not in _FILES)
        refuse_unless(not others, f"there is {others[:1]}")
        self.folder = folder
        try:
            require_own_files(folder)
            self.config: PlainConfig = read_plain_config(folder)
            self.recommended: Recommended = read_recommended(folder)
            self.tokenizer = LightTokenizer(folder, self.config.vocab_size)
            self.weights: EngineWeights = read_weights(folder, self.config)
        except (OSError, LinkedFileError) as error:
            raise NotServedError(str(error)) from None


class LightStream:
    """An iterator over pieces of text as they are written; `summary` and `text` are complete when it has ended.

    Attributes:
        settings: the sampling parameters that have an effect.
        from_checkpoint: what else applies of the checkpoint's requests: nothing.
        notes: sentences on what the checkpoint asks for and does not get: none.
    """

    def __init__(self, model: LightModel, prompt: str, parameters: SamplingParameters) -> None:
        """Encode the prompt and load the compiled step.

        Raises:
            NotServedError: parameters, or a prompt, that the ordinary path must serve.
        """
        plain = replace(parameters, **{name: getattr(_DEFAULTS, name) for name in _IN_ENGINE})
        refuse_unless(plain == _DEFAULTS, "parameters that the engine does not know")
        self._model = model
        self._ids = model.tokenizer.encode(require_characters(prompt, "the prompt"))
        room = model.config.max_position_embeddings - len(self._ids)
        refuse_unless(len(model.recommended.ends) <= MOST_STOPS, "more ends of a text than the engine looks for")
        refuse_unless(len(self._ids) > 0 and room > 0, "a prompt that is empty or fills the context")
        refuse_unless(all(0 <= token < model.config.vocab_size for token in self._ids), "tokens outside the vocabulary")
        self._count = min(parameters.max_new_tokens, room)
        with _without_scipy():
            from ..engine.cpu.engine import CpuEngine

            self._engine = CpuEngine(model.weights, len(self._ids) + self._count)
            refuse_unless(len(self._ids) - 1 <= self._engine.short_prompt, "a prompt that torch reads faster")
            self._engine.prepare(len(self._ids) - 1)
        self._draws = None
        if not parameters.greedy:
            seed = secrets.randbits(64) if parameters.seed is None else parameters.seed
            seen = [np.array(self._ids, np.int64)]
            self._draws = Draws(parameters.effective, model.config.vocab_size, seen, seeded(seed))
        self.text = ""
        self.settings = parameters.effective
        self.from_checkpoint: dict[str, Any] = {}
        self.notes: list[str] = []
        self.summary: Summary | None = None

    def __iter__(self) -> Iterator[str]:
        start = time.perf_counter()
        pieces = Pieces(self._model.tokenizer)
        first, new = 0.0, 0
        with LoadMeter(self._engine.threads) as meter:
            for tokens in self._checked_bursts():
                first = first or time.perf_counter() - start
                new += len(tokens)
                piece = pieces.put(tokens)
                if piece:
                    self.text += piece
                    yield piece
            seconds = time.perf_counter() - start
        piece = pieces.end()
        if piece:
            self.text += piece
            yield piece
        engine = self._engine
        zeros = 1 - engine.active_neurons / engine.seen_neurons if engine.seen_neurons else None
        load = meter.reason if seconds > SHORT_SECONDS else ""
        self.summary = Summary(len(self._ids), new, seconds, first, engine.name, zeros, load=load)

    def _checked_bursts(self) -> Iterator[list[int]]:
        try:
            yield from self._bursts()
        except NotFiniteError as error:
            from ..loading import load  # slow, and it knows the names of all weights

            raise explain(error, load(self._model.folder, device="cpu").model) from None

    def _bursts(self) -> Iterator[list[int]]:
        """The new tokens, some at a time, the one that ends the text included."""
        engine, ends = self._engine, set(self._model.recommended.ends)
        engine.prefill(self._ids[:-1], more=True)
        last, left, count = self._ids[-1], self._count, 1
        while left:
            start = time.perf_counter()
            some = min(count, left)
            if self._draws is None:
                rows = engine.greedy([last], some, ends)
            else:
                rows = engine.draw([last], some, self._draws, ends)
            count = min(2 * count, max(1, int(BURST_SECONDS * len(rows) / (time.perf_counter() - start))))
            tokens = [row[0] for row in rows]
            yield tokens
            last, left = tokens[-1], left - len(tokens)
            if last in ends:
                return

    def close(self) -> None:
        """End the engine's threads."""
        self._engine.close()

    def __enter__(self) -> LightStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
