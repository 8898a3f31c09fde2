"""The process that runs the tests of a problem. The program runs in another sandbox; its function is asked for values.

Nothing of the program is executed here, and the program never sees the tests: only arguments go to it, and only plain
values come back (`values.py`). Arguments are copies, so that a program cannot change what the tests compare with.
"""

import builtins
import itertools
from collections.abc import Callable
from typing import Any

from .values import decode, encode, is_exact, receive, send

MOST_CHARACTERS = 500
_ITERATION_ENDS = (StopIteration, StopAsyncIteration)  # in a test's loop they would end it early


class ProgramError(Exception):
    """The program raised an exception, sent something that is not an answer, or has ended."""


class UnsentArgumentError(Exception):
    """The tests call the program with an argument that cannot be sent to it."""


class ProgramEndedError(ProgramError):
    """No further answer will come."""


def judge(job: dict[str, Any], requests: int, answers: int) -> dict[str, Any]:
    """Run the tests against the function that the program offers.

    Args:
        job: `prompt`, Python source with the helpers that tests may use; `tests`, which define `check`; `entry_point`.
        requests, answers: descriptors to write calls to and to read values from.

    Returns:
        `passed` and `reason`; `ended` if the program ended before it answered; `invalid` if the tests cannot run.
    """
    candidate = _candidate(requests, answers)
    try:
        namespace: dict[str, Any] = {"__name__": "tests"}
        exec(compile(job["prompt"], "<prompt>", "exec"), namespace)
        namespace[job["entry_point"]] = candidate
        exec(compile(job["tests"], "<tests>", "exec"), namespace)
        check = namespace["check"]
    except BaseException as error:
        return {"passed": False, "reason": _words(error), "invalid": True}
    try:
        _answer_of(answers, 0)  # that the program was loaded
        check(candidate)
    except UnsentArgumentError as error:
        return {"passed": False, "reason": f"{error}", "invalid": True}
    except BaseException as error:
        return {"passed": False, "reason": f"failed: {_words(error)}", "ended": isinstance(error, ProgramEndedError)}
    return {"passed": True, "reason": "passed"}


def _words(error: BaseException) -> str:
    text = f"{error}" if isinstance(error, ProgramError) else f"{type(error).__name__}: {error}"
    return text[:MOST_CHARACTERS]


def _candidate(requests: int, answers: int) -> Callable[..., Any]:
    numbers = itertools.count(1)

    def candidate(*arguments: Any, **named: Any) -> Any:
        number = next(numbers)
        positional = [_argument(value) for value in arguments]
        call = {"call": number, "arguments": positional, "named": {k: _argument(value) for k, value in named.items()}}
        try:
            send(requests, call)
        except BrokenPipeError:
            raise ProgramEndedError("the program ended before it was asked") from None
        return _answer_of(answers, number)

    return candidate


def _argument(value: object) -> Any:
    encoded = encode(value)
    if not is_exact(encoded):
        raise UnsentArgumentError(f"an argument cannot be sent to the program, in {value!r}"[:500])
    return encoded


def _answer_of(answers: int, number: int) -> Any:
    """The value that the program returns for a call.

    Raises:
        Exception: the program's exception, of the same type if that is a built-in one, otherwise `ProgramError`.
    """
    try:
        message = receive(answers)
        if message is None:
            raise ProgramEndedError("the program ended before it answered")
        if type(message.get("call")) is not int or message["call"] != number:
            raise ValueError("an answer to another call")
        if "raised" not in message:
            return decode(message["value"])
        name, text = str(message["raised"])[:MOST_CHARACTERS], str(message.get("text"))[:MOST_CHARACTERS]
    except (ValueError, TypeError, KeyError, RecursionError, ArithmeticError) as error:
        raise ProgramError(f"the program sent no valid value: {error}") from None
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _ITERATION_ENDS):
        try:
            found = kind(text)
        except TypeError:  # UnicodeDecodeError takes more
            found = ProgramError(f"{name}: {text}")
        raise found
    raise ProgramError(f"{name}: {text}")
