"""Render conversations with chat templates that may be untrusted, in bounded time and memory.

Every template is rendered here. transformers renders in the caller's own process, where nothing stops a template with
nested loops. Here a separate process does it, which stops by itself and is restarted.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS = 1.0
"""Of the processor, for one conversation."""
MEMORY = 160 << 20
"""Memory of the rendering process, including Python's own; 16 times the conversation is added."""
CHARACTERS = 8 << 20
_CHILD = Path(__file__).with_name("template_child.py")
_TAG = "CONTINUED-HERE"


class ChatTemplateError(ValueError):
    """A chat template that does not finish, or that rejects this conversation."""


class _Renderer:
    """The rendering process, started when it is first needed and restarted after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def render(self, template: str, context: Mapping[str, Any]) -> str:
        request = json.dumps({"template": template, "context": dict(context)}, default=str)
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                raise ChatTemplateError(self._end_of(process))
        found = json.loads(line)
        if "text" in found:
            return found["text"]
        if found["wrong"] == "memory":
            raise ChatTemplateError(_needs_memory())
        raise ChatTemplateError(f"the chat template cannot be rendered: {found['wrong']}")

    def _running(self) -> subprocess.Popen[str]:
        # A fork of this process must not write into its parent's pipes.
        if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
            self._process, self._owner = _start(), os.getpid()
        return self._process

    def _end_of(self, process: subprocess.Popen[str]) -> str:
        self._process = None
        code = process.wait()
        _close(process)
        if code == -signal.SIGPROF:
            return f"the chat template took more than {SECONDS} s for one conversation and was stopped"
        return _needs_memory() if code else "the process that renders chat templates ended"

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            _close(self._process)
            self._process = None


def _needs_memory() -> str:
    return f"the chat template needs more than {MEMORY >> 20} MB for one conversation and was stopped"


def _close(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _start() -> subprocess.Popen[str]:
    import jinja2
    import markupsafe

    found = {str(Path(module.__file__ or "").parents[1]) for module in (jinja2, markupsafe)}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    settings = {"path": sorted(found), "seconds": SECONDS, "memory": MEMORY, "characters": CHARACTERS}
    assert process.stdin is not None
    process.stdin.write(json.dumps(settings) + "\n")
    return process


_renderer = _Renderer()
atexit.register(_renderer.close)


def render_conversation(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **context: Any,
) -> str:
    """Render a conversation as text with the tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: messages with `role` and `content`.
        tools: JSON schemas.
        add_generation_prompt: end with the heading of the assistant's turn.
        continue_final_message: end where the text of the last message ends.
        **context: further variables for the template.

    Raises:
        ChatTemplateError: the template takes too long or too much memory, or rejects the conversation.
    """
    template = tokenizer.get_chat_template(None, tools=list(tools) if tools else None)
    messages = [dict(message) for message in messages]
    if continue_final_message and messages:
        messages[-1]["content"] = f"{messages[-1]['content']}{_TAG}"
    values = {
        **tokenizer.special_tokens_map,
        "messages": messages,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **context,
    }
    text = _renderer.render(template, values)
    if not continue_final_message:
        return text
    if _TAG not in text:
        raise ChatTemplateError("the chat template drops the final message, so it cannot be continued")
    return text[: text.rindex(_TAG)]


def conversation_ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """Token ids of a conversation; see `render_conversation`."""
    text = render_conversation(tokenizer, messages, **options)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
