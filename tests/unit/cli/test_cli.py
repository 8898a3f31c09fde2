"""The command line as a user meets it: real processes, exit codes, sentences instead of tracebacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from text_checkpoint import make_text_checkpoint
from typer.testing import CliRunner

from minitron.cli import app


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def run(*args: str, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minitron", *args],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
        timeout=240,
    )


def answered(*args: str) -> str:
    """Run in this process, expect success, return what stands on stdout."""
    done = CliRunner().invoke(app, list(args))
    assert done.exit_code == 0, done
    return done.stdout


def refused(*args: str) -> str:
    """Run in this process, expect exit code 2 and one sentence on stderr, nothing on stdout; return the sentence."""
    done = CliRunner().invoke(app, list(args))
    assert done.exit_code == 2, done
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    return done.stderr


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from minitron.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0 and 'generate' in result.stdout, result\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version() -> None:
    from minitron import __version__

    assert run("--version").stdout == f"minitron {__version__}\n"


def test_generate_streams_the_prompt_and_goes_on(checkpoint: Path) -> None:
    done = run("generate", str(checkpoint), "-p", "the cat", "-n", "5", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat")
    assert "tokens/s" in done.stderr


def test_generate_json_is_reproducible_and_reads_stdin(checkpoint: Path) -> None:
    first, second = (
        json.loads(
            run("generate", str(checkpoint), "-p", "-", "-n", "6", "--seed", "5", "--json", stdin="the cat").stdout
        )
        for _ in range(2)
    )
    assert first["text"] == second["text"]
    assert first["prompt"] == "the cat"
    assert 1 <= first["new_tokens"] <= 6
    assert first["settings"]["seed"] == 5


def test_a_refusal_is_one_line_and_exit_code_2_of_the_process() -> None:
    done = run("generate", "no/such/place", "-p", "x")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no/such/place")
    assert len(done.stderr.strip().splitlines()) == 1


def test_inspect_preset_counts_the_published_parameters() -> None:
    facts = json.loads(answered("inspect", "minitron-4b", "--json"))
    assert round(facts["parameters"]["total"] / 1e9, 2) == 4.19  # NVIDIA's model card
    assert facts["weight_bytes"]["bf16"] == 2 * facts["parameters"]["total"]


def test_inspect_works_from_the_config_alone(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint / "config.json", tmp_path)
    facts = json.loads(answered("inspect", str(tmp_path), "--json"))
    assert facts["weights"] == "none"
    whole = json.loads(answered("inspect", str(checkpoint), "--json"))
    assert whole["weights"] == "complete"
    assert whole["parameters"] == facts["parameters"]
    assert "non-embedding" in answered("inspect", str(tmp_path / "config.json"))


def test_chat_replies_to_each_line_and_ends(checkpoint: Path) -> None:
    done = run("chat", str(checkpoint), "-n", "4", "--seed", "1", stdin="hello\n/reset\nhello\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2


class TestRefusals:
    def test_no_such_folder(self) -> None:
        assert "no/such/place" in refused("generate", "no/such/place", "-p", "x")
        assert "minitron-4b" in refused("inspect", "nope")

    def test_empty_prompt(self, checkpoint: Path) -> None:
        assert "prompt is empty" in refused("generate", str(checkpoint), "-p", "  ")

    def test_prompt_longer_than_the_context(self, checkpoint: Path) -> None:
        message = refused("generate", str(checkpoint), "-p", "the cat " * 100)
        assert "max_position_embeddings" in message
        assert "64" in message

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--temperature", "-1"), ("--top-p", "1.5"), ("-n", "0"), ("--dtype", "bf17"), ("--device", "tpu9")],
    )
    def test_impossible_option(self, checkpoint: Path, option: str, value: str) -> None:
        assert value in refused("generate", str(checkpoint), "-p", "the", option, value)

    def test_missing_weights(self, checkpoint: Path, tmp_path: Path) -> None:
        shutil.copytree(checkpoint, tmp_path / "c")
        (tmp_path / "c" / "model.safetensors").unlink()
        assert "safetensors" in refused("generate", str(tmp_path / "c"), "-p", "the")

    def test_truncated_weights(self, checkpoint: Path, tmp_path: Path) -> None:
        shutil.copytree(checkpoint, tmp_path / "c")
        weights = tmp_path / "c" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "model.safetensors" in refused("generate", str(tmp_path / "c"), "-p", "the")

    def test_missing_shard(self, tmp_path: Path) -> None:
        folder = make_text_checkpoint(tmp_path / "sharded", max_shard_size="20KB")
        shards = sorted(folder.glob("model-*.safetensors"))
        assert len(shards) > 1
        shards[1].unlink()
        assert shards[1].name in refused("generate", str(folder), "-p", "the")

    def test_missing_tensor_is_not_filled_with_random_numbers(self, checkpoint: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        shutil.copytree(checkpoint, tmp_path / "c")
        tensors = load_file(tmp_path / "c" / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
        assert "model.layers.0.mlp.up_proj.weight" in refused("generate", str(tmp_path / "c"), "-p", "the")

    @pytest.mark.parametrize(
        ("field", "value", "word"),
        [
            ("model_type", "gpt2", "NemotronForCausalLM"),
            ("model_type", "llama", "partial_rotary_factor"),
            ("num_key_value_heads", 3, "num_key_value_heads"),
            ("hidden_size", 0, "hidden_size"),
            ("hidden_size", 48, "shape"),
            ("num_hidden_layers", "two", "num_hidden_layers"),
        ],
    )
    def test_config_that_cannot_be(
        self, checkpoint: Path, tmp_path: Path, field: str, value: object, word: str
    ) -> None:
        shutil.copytree(checkpoint, tmp_path / "c")
        config = json.loads((checkpoint / "config.json").read_text())
        config[field] = value
        (tmp_path / "c" / "config.json").write_text(json.dumps(config))
        assert word in refused("generate", str(tmp_path / "c"), "-p", "the")
        assert word in refused("inspect", str(tmp_path / "c"))

    def test_config_that_is_not_json(self, checkpoint: Path, tmp_path: Path) -> None:
        shutil.copytree(checkpoint, tmp_path / "c")
        (tmp_path / "c" / "config.json").write_text('{"model_type": ')
        assert "config.json" in refused("inspect", str(tmp_path / "c"))

    def test_tokenizer_with_more_ids_than_the_embedding_has_rows(self, tmp_path: Path) -> None:
        folder = make_text_checkpoint(tmp_path / "c", vocab_size=40)
        assert "vocab_size is 40" in refused("generate", str(folder), "-p", "the")

    def test_no_tokenizer(self, checkpoint: Path, tmp_path: Path) -> None:
        shutil.copytree(checkpoint, tmp_path / "c")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "c" / name).unlink()
        assert "tokenizer" in refused("generate", str(tmp_path / "c"), "-p", "the")

    def test_tokenizer_that_cannot_be_read(self, checkpoint: Path, tmp_path: Path) -> None:
        shutil.copytree(checkpoint, tmp_path / "c")
        (tmp_path / "c" / "tokenizer.json").write_text('{"version": "1.0"')
        assert "tokenizer" in refused("generate", str(tmp_path / "c"), "-p", "the")


def test_ids_and_labels_out_of_range_are_sentences(checkpoint: Path) -> None:
    import minitron

    model, _ = minitron.load(checkpoint)
    with pytest.raises(ValueError, match=r"input_ids contains 9999; it must be 0 to \d+"):
        model(torch.tensor([[1, 9999]]))
    with pytest.raises(ValueError, match=r"labels contains -5; it must be 0 to \d+ or -100"):
        model(torch.tensor([[1, 2]]), labels=torch.tensor([[-5, -100]]))


INTERRUPTED = """
import os, signal, sys
from minitron.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored
if "--dtype" in sys.argv:
    from minitron import text_stream
    owner, name = text_stream._Stopped, "__call__"
else:
    from minitron.light import tokenizer
    owner, name = tokenizer.Pieces, "_next"
left, ask = 20, getattr(owner, name)
def interrupt(*args, **kwargs):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGINT)
    return ask(*args, **kwargs)
setattr(owner, name, interrupt)
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("path", [[], ["--dtype", "bf16"]], ids=["light", "ordinary"])
def test_an_interrupted_text_is_kept(path: list[str], as_json: bool) -> None:
    command = ["generate", "-p", "Once upon a time", "-n", "400", "--temperature", "1.2", "--seed", "1", *path]
    command += ["--json"] * as_json
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *command], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 130, done
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().endswith("interrupted")
    if as_json:
        found = json.loads(done.stdout)
        assert found["interrupted"] is True
        assert len(found["text"]) > 20
    else:
        assert done.stdout.startswith("Once upon a time")
        assert len(done.stdout) > 40


def test_speculation(checkpoint: Path, tmp_path: Path) -> None:
    command = ["generate", str(checkpoint), "-p", "the cat the cat the cat", "--temperature", "0", "--json", "-n", "20"]
    plain = json.loads(answered(*command))
    assert plain["tokens_per_step"] is None
    for draft in ("lookup", str(checkpoint)):
        found = json.loads(answered(*command, "--speculate", draft))
        assert found["text"] == plain["text"]
        assert found["tokens_per_step"] >= 1
        assert 0 <= found["acceptance_rate"] <= 1
    assert "no such file or folder" in refused(*command, "--speculate", "nowhere")
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"] = {f"x{word}" if word == "cat" else word: n for word, n in words["model"]["vocab"].items()}
    words["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(words))
    assert "its tokenizer has other tokens" in refused(*command, "--speculate", str(other))


def test_a_bundled_model_by_name() -> None:
    child = json.loads(answered("inspect", "bundled-half", "--json"))
    assert (
        child["architecture"]["hidden_size"] < json.loads(answered("inspect", "--json"))["architecture"]["hidden_size"]
    )
    command = ["generate", "bundled", "-p", "One day the old king", "--temperature", "0", "--json", "-n", "24"]
    plain, drafted = (json.loads(answered(*command, *more)) for more in ([], ["--speculate", "default"]))
    assert drafted["text"] == plain["text"]
    assert drafted["tokens_per_step"] >= 1
