"""The process that renders chat templates: if an untrusted template loops or swells, only this process ends.

`templates.py` runs it as a script; it needs jinja2 and the standard library only. It reads and writes one JSON object
per line. An unhandled signal ends the process if a template takes too much processor time, even inside one long
operation; the clock on the wall would count a busy machine against it.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any


def environment() -> Any:
    """The environment that Hugging Face's documentation promises to chat templates."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant writes; here it has no effect."""

        tags = {"generation"}  # noqa: RUF012 (so does jinja2)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """A namespace without names that begin with an underscore, which lead to Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            values = dict(*args[1:], **kwargs)
            if any(str(name).startswith("_") for name in values):
                raise jinja2.exceptions.SecurityError("a namespace has no names that begin with an underscore")
            jinja2.utils.Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError("a namespace has no names that begin with an underscore")
            super().__setitem__(name, value)

    def refuse(message: object) -> None:
        raise jinja2.exceptions.TemplateError(str(message))

    def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda layout: datetime.now().strftime(layout),
        "namespace": Namespace,
    }
    return made


@functools.lru_cache(maxsize=1)
def compiled(made: Any, template: str) -> Any:
    """The template, compiled; conversations mostly come with the same one again."""
    return made.from_string(template)


def answer(made: Any, request: dict[str, Any], most_characters: int) -> dict[str, Any]:
    """The rendered text, or the error."""
    try:
        text = compiled(made, request["template"]).render(**request["context"])
    except MemoryError:
        return {"wrong": "memory"}
    except RecursionError:
        return {"wrong": "it calls itself without an end"}
    except Exception as error:  # templates can raise any exception
        return {"wrong": f"{type(error).__name__}: {error}"[:1000]}
    return {"text": text} if len(text) <= most_characters else {"wrong": "memory"}


def main() -> None:
    """Render until the input ends."""
    settings = json.loads(sys.stdin.readline())
    sys.path[:0] = settings["path"]
    made = environment()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    for line in sys.stdin:
        most = settings["memory"] + 16 * len(line)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        signal.setitimer(signal.ITIMER_PROF, settings["seconds"])
        found = answer(made, json.loads(line), most_characters=max(settings["characters"], 16 * len(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
