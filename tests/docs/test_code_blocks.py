"""Every code block of every document.

Python blocks of one document are one program: they run in their order, in one fresh interpreter and an empty folder
with the files of `FILES`, after the replacements of `SMALLER`. Commands are parsed, not executed: options of `minitron`
and of torchrun, targets of `make`, scripts and their options, extras of `pip`. YAML blocks are recipes, JSON blocks are
JSON, text blocks are output. A block that cannot run stands behind `<!-- not run: reason -->`, a reason of `REASONS`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from documents import ROOT, Block, blocks, inline_code
from typer.core import TyperGroup
from typer.main import get_command

import minitron
from minitron.cli import app
from minitron.compress.recipe import load_recipe
from minitron.curate.recipe import load_recipe as load_curation

BLOCKS = blocks()
LANGUAGES = ("python", "console", "yaml", "json", "text")
REASONS = ("needs a GPU", "needs several machines", "needs a download")

# What stands in a document for a large thing, and what the test takes for it.
SMALLER = {
    '"nvidia/Minitron-4B-Base"': "minitron.bundled_model()",
    "PackedBlocks(tokens, 512), 64)": "PackedBlocks(tokens, 64), 4)",
    "TrainConfig(steps=1000, batch=16)": "TrainConfig(steps=2, batch=2)",
}
FILES = ("text.jsonl", "stories/a.jsonl", "my-tokenizer", "importance.safetensors")

VERBS = get_command(app).commands  # type: ignore[attr-defined]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
OWN_FOLDERS = ("benchmarks", "docs", "examples", "recipes", "scripts", "src", "studies", "tests")
WITHOUT_CHECK = ("cd", "cp", "curl", "git", "mkdir", "tensorboard")
"""Programs of others whose options are not looked at."""


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a console block; comments, settings of variables and redirections left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    found = [words[: words.index(">")] if ">" in words else words for words in found]
    for words in found:
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
    return [words for words in found if words]


COMMANDS = [
    pytest.param(words, id=f"{block.where} {' '.join(words)[:60]}")
    for block in BLOCKS
    if block.language == "console" and block.reason is None
    for words in commands(block)
]
PROGRAMS: dict[str, list[Block]] = {}
for found in BLOCKS:
    if found.language == "python" and found.reason is None and "tutorials" not in found.document:  # test_tutorials.py
        PROGRAMS.setdefault(found.document, []).append(found)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_its_language_is_named_and_a_reason_not_to_run_it_is_a_good_one(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block.where}: write ```console, ```python or another of {LANGUAGES}"
    assert block.reason is None or block.reason in REASONS
    if block.language == "text":
        assert not re.search(r"^(minitron|make|python|torchrun|import|from) ", block.text, re.MULTILINE), block.where


# --- programs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `FILES`."""
    from minitron.prune.baselines import magnitude_scores
    from minitron.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("files")
    (folder / "stories").mkdir()
    story = "".join((ROOT / "examples" / "black_beauty.jsonl").open(encoding="utf-8").readlines()[:200])
    for name in ("text.jsonl", "stories/a.jsonl"):
        (folder / name).write_text(story, encoding="utf-8")
    load_tokenizer(minitron.bundled_model()).save_pretrained(folder / "my-tokenizer")
    magnitude_scores(minitron.bundled_model()).save(folder / "importance.safetensors")
    assert all((folder / name).exists() for name in FILES)
    return folder


@pytest.mark.parametrize("document", PROGRAMS)
def test_the_programs_of_a_document_run(document: str, files: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(files, here)
    text = ""
    for block in PROGRAMS[document]:
        text += "\n" * (block.line - text.count("\n")) + block.text  # errors name the line of the document
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    program = f"exec(compile({text!r}, {document!r}, 'exec'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_replacement_is_used() -> None:
    text = "".join(block.text for document in PROGRAMS.values() for block in document)
    text += "".join(block.text for block in BLOCKS if block.language == "python")
    unused = [large for large in SMALLER if large not in text]
    assert unused in ([], ['"nvidia/Minitron-4B-Base"'])


# --- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_understood(words: list[str]) -> None:
    program = Path(words[0]).name
    if program == "minitron":
        parse_verb(words[1:])
    elif program == "torchrun":
        parse_torchrun(words[1:])
    elif program == "make":
        assert set(words[1:]) <= TARGETS
    elif program == "pip":
        check_pip(words[1:])
    elif program in ("python", "python3"):
        check_python(words[1:])
    else:
        assert program in WITHOUT_CHECK, f"{program}: no check of this program"
    for word in words:
        if word.split("/")[0] in OWN_FOLDERS and "/" in word:
            assert (ROOT / word).exists(), f"{word}: no such file in the repository"


def parse_verb(words: list[str]) -> None:
    """Refuse what the command line would refuse before it looks at files."""
    verb, *rest = words
    assert verb in VERBS, f"minitron has no verb {verb!r}"
    command = VERBS[verb]
    while isinstance(command, TyperGroup):  # `minitron guard init`
        assert rest[0] in command.commands, f"minitron {verb} has no verb {rest[0]!r}"
        command, rest = command.commands[rest[0]], rest[1:]
    context = command.make_context(verb, list(rest))
    assert not context.args


def parse_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    launch = get_args_parser().parse_args(words)
    assert launch.module
    assert launch.training_script == "minitron"
    assert launch.rdzv_backend == "c10d" or launch.nnodes == "1:1"
    verb, *rest = launch.training_script_args
    context = VERBS[verb].make_context(verb, rest)
    assert context.params["out"] is not None  # every process must write to the same run folder
    parse_verb(launch.training_script_args)


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for word in words[1:]:
        extras = re.fullmatch(r"(?:minitron|\.)\[(.*)\]", word)
        if extras:
            assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()


def check_python(words: list[str]) -> None:
    """A script of ours with options that its text has, a module with one of its verbs, or `-m venv`."""
    if words[0] == "-m":
        if words[1] == "minitron":
            parse_verb(words[2:])
        else:
            assert words[1] in ("venv", "pytest", "pip")
        return
    script = ROOT / words[0].removeprefix("../")  # the cards' commands are for a folder within the checkout
    assert script.is_file(), f"{words[0]}: no such file"
    text = script.read_text(encoding="utf-8")
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word.split("=")[0]}"' in text, f"{words[0]} has no option {word}"


def test_some_commands_are_for_several_machines() -> None:
    nodes = [words for parameter in COMMANDS for words in parameter.values if "--nnodes" in words]
    assert len(nodes) >= 2


# --- recipes and data ----------------------------------------------------------------------------------------------


def test_recipes_and_values_load(tmp_path: Path) -> None:
    for block in BLOCKS:
        if block.language == "json":
            json.loads(block.text)
        if block.language == "yaml":
            path = tmp_path / "recipe.yaml"
            path.write_text(block.text, encoding="utf-8")
            (load_curation if block.document.endswith("curation.md") else load_recipe)(path)


# --- names within sentences ----------------------------------------------------------------------------------------


def test_names_of_the_package_are_there_after_importing_it() -> None:
    """`minitron.prune.importance` and the like, in one interpreter that has imported nothing else."""
    pattern = re.compile(r"minitron(\.[A-Za-z_]\w*)+(?=$|\()")
    names = {match[0]: document for document, text in inline_code() if (match := pattern.match(text))}
    assert {"minitron.prune.importance", "minitron.evaluate.quick", "minitron.DistillLoss"} <= set(names)
    program = f"""
import minitron, sys
for name, document in {names!r}.items():
    try:
        eval(name)
    except AttributeError as error:
        sys.exit(f"{{document}}: {{name}}: {{error}}")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_verbs_and_options_within_sentences_exist() -> None:
    for document, text in inline_code():
        match = re.match(r"minitron ([a-z][\w-]*)(?: |$)", text)
        if match is None:
            continue
        assert match[1] in VERBS, f"{document}: {text}"
        known = {name for option in VERBS[match[1]].params for name in (*option.opts, *option.secondary_opts)}
        for option in re.findall(r"(?<!\S)--[a-z][\w-]*", text):
            assert option in {*known, "--help"}, f"{document}: {text}: no such option"


def test_a_typo_would_be_noticed() -> None:
    for words in (["prune", "a", "b", "--parms", "4B"], ["prune", "a"], ["prune", "a", "b", "--samples", "many"]):
        with pytest.raises(Exception, match=r"^(No such option: --parms|Missing |Input should be a valid integer)"):
            parse_verb(words)
