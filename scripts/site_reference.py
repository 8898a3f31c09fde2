"""Pages of the site that are made from the commands, the docstrings, the recipes and the reports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def commands() -> str:
    """Every verb with its help and its options."""
    from typer.core import TyperGroup
    from typer.main import get_command

    from minitron.cli import app

    root: Any = get_command(app)
    text = ["# Command line", "", "Made from the commands themselves; `minitron VERB --help` shows the same.", ""]
    listed: list[tuple[str, Any]] = []
    for verb, command in root.commands.items():
        if isinstance(command, TyperGroup):
            listed += [(f"{verb} {name}", below) for name, below in command.commands.items()]
        else:
            listed.append((verb, command))
    text += ["| verb | what it does |", "| --- | --- |"]
    for verb, command in listed:
        text.append(f"| [`{verb}`](#{_anchor(verb)}) | {_cell(_paragraphs(command)[0])} |")
    for verb, command in listed:
        text += ["", f"## minitron {verb} {{ #{_anchor(verb)} }}", "", *_command(command)]
    return "\n".join(text) + "\n"


def _anchor(verb: str) -> str:
    return verb.replace(" ", "-")


def _paragraphs(command: Any) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", (command.help or "").replace("\b", "").strip())]


def _command(command: Any) -> list[str]:
    text = []
    examples: list[str] = []
    for paragraph in _paragraphs(command):
        if paragraph == "Examples:" or examples:
            examples.append(paragraph)
        else:
            text += [" ".join(paragraph.split()), ""]
    if len(examples) > 1:
        lines = [re.sub(r"\s+", " ", example.replace("\\\n", " ")) for example in examples[1:]]
        text += ["```console", *lines, "```", ""]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    text += ["| argument or option | default | meaning |", "| --- | --- | --- |"]
    for parameter in (*arguments, *options):
        names = [parameter.metavar or parameter.name.upper()] if parameter in arguments else _names(parameter)
        required = "required" if parameter.required else _default(parameter)
        cell = ", ".join(f"`{name}`" for name in names)
        text.append(f"| {cell} | {required} | {_cell(parameter.help or '')} |")
    return text


def _names(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


def _default(parameter: Any) -> str:
    value = parameter.default
    if value is None or value is False or value == [] or callable(value) or "Sentinel" in type(value).__name__:
        return ""
    return _cell(f"`{value}`")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def python() -> str:
    """`minitron.__all__`, and every name of the package that a document names: these are the interface."""
    from minitron import _LAZY, __all__

    text = ["# Python", "", "The public names of `minitron`, then every other name that a document uses.", ""]
    for name in sorted(_LAZY, key=str.lower):
        text += _entry(f"minitron.{_LAZY[name]}.{name}", f"minitron.{name}")
    text += ["## `minitron.__version__`", "", "The version of the package.", ""]
    known = {f"minitron.{module}.{name}" for name, module in _LAZY.items()}
    rooms = {f"minitron.{name}" for name in __all__ if _is_module(f"minitron.{name}")}
    for dotted in sorted((documented_names() | rooms) - known):
        text += _entry(dotted, dotted)
    return "\n".join(text) + "\n"


def _entry(dotted: str, shown: str) -> list[str]:
    return [f"::: {dotted}", "    options:", f"      heading: {shown}", ""]


def documented_names() -> set[str]:
    """Names such as `minitron.prune.importance.collect_statistics` in the documents' inline code, that exist."""
    found = set()
    for path in (*ROOT.glob("docs/*.md"), ROOT / "README.md"):
        if path.name in ("decisions.md", "deprecations.md", "tour.md"):  # these name internal things too
            continue
        for match in re.finditer(r"`(minitron(?:\.[A-Za-z_]\w*)+)", path.read_text(encoding="utf-8")):
            dotted = match[1]
            parts = dotted.split(".")
            if _is_module(dotted) or (len(parts) > 2 and _defined(dotted)):
                found.add(dotted)
    return found


def _module(dotted: str) -> Path | None:
    path = ROOT / "src" / Path(*dotted.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def _is_module(dotted: str) -> bool:
    return _module(dotted) is not None


def _defined(dotted: str) -> bool:
    module, _, name = dotted.rpartition(".")
    file = _module(module)
    return file is not None and bool(
        re.search(rf"^(?:class|def) {name}\b|^{name}\b.*=", file.read_text(encoding="utf-8"), re.MULTILINE)
    )


def recipes() -> str:
    """The recipes that come with the package."""
    text = [
        "# Recipes",
        "",
        "They come with the package, and `minitron compress --recipe NAME` takes them by name.",
        "",
    ]
    for file in sorted((ROOT / "src/minitron/assets/recipes").glob("*.yaml")):
        text += [f"## {file.stem}", "", "```yaml", file.read_text(encoding="utf-8").rstrip(), "```", ""]
    return "\n".join(text)


def reports() -> str:
    """Reports that the commands wrote."""
    text = [
        "# Reports",
        "",
        "`minitron compress` and `minitron curate` write a page about each run: one file without outside parts.",
        "",
    ]
    for page in sorted((ROOT / "docs/reports").glob("*/*.html")):
        inside = page.relative_to(ROOT / "docs").as_posix()
        title = re.search(r"<title>(.*?)</title>", page.read_text(encoding="utf-8"), re.DOTALL)
        text.append(f"- [{' '.join((title[1] if title else page.stem).split())}](../{inside})")
    return "\n".join(text) + "\n"
