"""Text from a prompt without torch and transformers, whose imports take longer than a short text.

It serves plain requests for plain checkpoints: a Nemotron model in the Hugging Face layout with one file of weights in
bf16 or fp32 and a fast tokenizer, on the CPU. Every file is held to a list of what is known to be served. Anything else
raises `NotServedError`, and the caller takes the ordinary path (`loading`, `text_stream`), which writes the same text
or says what is wrong with the checkpoint.
"""

from __future__ import annotations

from types import ModuleType

from ..submodules import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
