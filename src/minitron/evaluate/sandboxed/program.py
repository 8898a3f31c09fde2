"""The process that runs a program: it answers calls of one function, over two pipes.

The program may take over this process. It then decides which values the judge gets, as it does anyway.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from .values import decode, encode, receive, send

MOST_CHARACTERS = 500


def serve(source: str, entry_point: str, requests: int, answers: int) -> None:
    """Run a program, then call its function `entry_point` for each request until there are no more.

    Args:
        requests: descriptor to read from; a message holds a number, `call`, and the encoded `arguments` and `named`.
        answers: descriptor to write to; a message holds the number, and `value` or `raised` and `text`.
    """
    sys.setrecursionlimit(10_000)
    namespace: dict[str, Any] = {"__name__": "program"}
    first = _outcome(lambda: exec(compile(source, "<program>", "exec"), namespace), 0)
    send(answers, first)
    if "raised" in first:
        return
    while (request := receive(requests)) is not None:
        send(answers, _outcome(lambda request=request: _call(namespace, entry_point, request), request["call"]))


def _call(namespace: dict[str, Any], entry_point: str, request: dict[str, Any]) -> Any:
    if entry_point not in namespace:
        raise NameError(f"name {entry_point!r} is not defined")
    named = {name: decode(value) for name, value in request["named"].items()}
    return namespace[entry_point](*(decode(value) for value in request["arguments"]), **named)


def _outcome(action: Callable[[], Any], number: int) -> dict[str, Any]:
    try:
        return {"call": number, "value": encode(action())}
    except BaseException as error:
        return {"call": number, "raised": type(error).__name__, "text": str(error)[:MOST_CHARACTERS]}


def run(job: dict[str, Any], requests: int, answers: int) -> None:
    """Run a job and end the process."""
    serve(job["program"], job["entry_point"], requests, answers)
    os._exit(0)
