"""A configuration of NeMo Guardrails that works offline in front of `minitron serve`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..files import new_folder, write_text

TEMPLATES = "guardrails"


@dataclass(frozen=True)
class GuardOptions:
    """Which rails stand in front of which server."""

    server: str = "http://127.0.0.1:8000"
    """Where `minitron serve` answers, without /v1."""
    model: str = "bundled"
    """The model that answers, by the name under which it is served."""
    classifier: str | None = None
    """A served classification head that reads each message and each answer."""
    labels: tuple[str, ...] = ()
    """Labels of the classifier that block."""
    threshold: float = 0.5
    """The probability from which on a label blocks."""
    dialog: bool = True
    """Whether messages near an example get a written answer, by embeddings of `embeddings`."""
    embeddings: str | None = None
    """The served model whose embeddings are compared; `model` if None."""
    similarity: float = 0.75
    """The least cosine similarity at which a message counts as one of the examples."""
    self_check: bool = False
    """Whether the model itself is asked about each message and each answer."""
    key_variable: str | None = None
    """The environment variable that holds the server's API key."""

    def __post_init__(self) -> None:
        address = urlsplit(self.server)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"--server is {self.server!r}; it must be an address such as http://127.0.0.1:8000")
        if address.path.rstrip("/"):
            raise ValueError(f"--server is {self.server!r}; give it without a path, such as http://{address.netloc}")
        for option, value in (("--threshold", self.threshold), ("--similarity", self.similarity)):
            if not 0 <= value <= 1:
                raise ValueError(f"{option} is {value}; it must be between 0 and 1")
        if self.classifier and not self.labels:
            raise ValueError("--classifier needs --block LABEL: without one it never blocks anything")
        if self.labels and not self.classifier:
            raise ValueError("--block names labels of a classifier; name it with --classifier")
        if self.key_variable and not re.fullmatch(r"[A-Za-z_]\w*", self.key_variable):
            raise ValueError(f"--api-key-env is {self.key_variable!r}; it must be the name of a variable")
        if self.classifier and self.key_variable and address.scheme != "https":
            raise ValueError(
                f"--server is {self.server!r}: NeMo Guardrails sends a key to a classifier over https only; "
                "give an https address, or serve the classifier without a key on this machine"
            )


def render(options: GuardOptions) -> dict[str, str]:
    """The files of the configuration by their names."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("minitron", f"assets/{TEMPLATES}"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    values = {**vars(options), "server": options.server.rstrip("/"), "embeddings": options.embeddings or options.model}
    names = ["config.yml", "run.py", *(["rails.co"] if options.dialog else [])]
    names += ["prompts.yml"] if options.self_check else []
    return {
        name: environment.get_template(f"{name}.jinja").render(values | {"labels": list(options.labels)})
        for name in names
    }


def write_guardrails(folder: Path, options: GuardOptions, overwrite: bool = False) -> list[Path]:
    """Write the configuration into a new folder, all of it or nothing.

    Returns:
        the files.

    Raises:
        TargetError: the folder holds something that must not be replaced.
    """
    files = render(options)
    with new_folder(folder, overwrite=overwrite) as draft:
        for name, text in files.items():
            write_text(draft / name, text)
    return [folder / name for name in files]
