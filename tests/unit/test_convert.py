"""`minitron convert`, end to end on small checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_samples import data_folder, random_state, save_reference, sentencepiece_model, tiny_config
from safetensors.torch import load_file
from typer.testing import CliRunner

from minitron.checkpoint.detect import detect
from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.sources import all_finite
from minitron.checkpoint.spm import read_spm, tokenizer_config, tokenizer_json
from minitron.cli import app
from minitron.cli.convert import parse_size
from minitron.convert import ConversionOptions, convert

runner = CliRunner()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = tiny_config(vocab_size=420, pad_token_id=0)
    folder = save_reference(tmp_path / "source", config, random_state(config, torch.bfloat16))
    model = read_spm(sentencepiece_model(tmp_path, add_dummy_prefix=False).read_bytes(), "spm")
    (tmp_path / "spm.model").rename(folder / "tokenizer.model")
    (folder / "tokenizer.json").write_text(tokenizer_json(model))
    (folder / "tokenizer_config.json").write_text(tokenizer_config(model, 64))
    return folder


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("way", ["nemo", "nemo2", "gguf"])
def test_there_and_back(tmp_path: Path, source: Path, way: str) -> None:
    middle = tmp_path / {"nemo": "m.nemo", "nemo2": "m", "gguf": "m.gguf"}[way]
    there = convert(source, middle, ConversionOptions(to=way))
    back = convert(middle, tmp_path / "back", ConversionOptions(max_shard_bytes=20_000))
    for report in (there, back):
        assert report.verified
        assert report.probe is not None
        assert report.probe["max_difference"] <= (1e-4 if way == "gguf" else 0)
        assert not any("NaN" in note for note in report.notes)
    expected, found = state_of(source), state_of(tmp_path / "back")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        loose = way == "gguf" and name.endswith("norm.weight")
        torch.testing.assert_close(found[name], tensor, rtol=2**-8 if loose else 0, atol=6e-8 if loose else 0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "f16", "f32"])
def test_quantize(tmp_path: Path, source: Path, kind: str) -> None:
    report = convert(source, tmp_path / "m.gguf", ConversionOptions(quantize=kind.upper()))  # as llama.cpp spells it
    assert report.verified
    assert detect(tmp_path / "m.gguf") == "gguf"
    again = convert(tmp_path / "m.gguf", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == (
        "bfloat16" if kind.startswith("q") else {"f16": "float16", "f32": "float32"}[kind]
    )
    assert again.verified


def test_dtype(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out", ConversionOptions(dtype="fp32"))
    expected, found = state_of(source), state_of(tmp_path / "out")
    assert all(found[name].dtype == torch.float32 for name in expected)
    assert all(torch.equal(found[name], expected[name].float()) for name in expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_old_spellings_are_normalised(tmp_path: Path, source: Path) -> None:
    path = source / "config.json"
    values = json.loads(path.read_text())
    for key in ("head_dim", "partial_rotary_factor", "rope_parameters", "norm_eps", "dtype", "torch_dtype"):
        values.pop(key, None)
    path.write_text(json.dumps({**values, "kv_channels": 12, "rope_percent": 0.25, "layer_norm_eps": 1e-6}))
    convert(source, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["head_dim"], values["partial_rotary_factor"], values["norm_eps"]) == (12, 0.25, 1e-6)
    assert values["rope_parameters"]["partial_rotary_factor"] == 0.25


def test_nan_is_reported(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    report = convert(save_reference(tmp_path / "source", config, state), tmp_path / "out.nemo")
    assert any("NaN" in note and "layers.1.mlp.up_proj" in note for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_all_finite_against_torch(dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf"), float("-inf"), -0.0, torch.finfo(dtype).max, torch.finfo(dtype).min):
        block = torch.randn(50).to(dtype)
        block[7] = value
        assert all_finite(block) == bool(torch.isfinite(block).all())
    assert not all_finite(-torch.full((3,), float("nan"), dtype=dtype))
    assert all_finite(torch.empty(0, dtype=dtype))


def test_a_corrupted_draft_is_found_and_what_was_there_stays(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import minitron.convert as module

    write = module._write

    def damage(checkpoint: object, draft: Path, *args: object) -> list[str]:
        notes = write(checkpoint, draft, *args)  # type: ignore[arg-type]
        path = draft / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        return notes

    monkeypatch.setattr(module, "_write", damage)
    says = rf"^{tmp_path / 'out'}: verification failed: .* checksum .* expected"
    with pytest.raises(CheckpointError, match=says):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "spm.vocab"]
    monkeypatch.setattr(module, "_write", write)
    convert(source, tmp_path / "out")
    before = state_of(tmp_path / "out")
    monkeypatch.setattr(module, "_write", damage)
    with pytest.raises(CheckpointError, match=says):
        convert(source, tmp_path / "out", ConversionOptions(overwrite=True))
    after = state_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_command_line(tmp_path: Path, source: Path) -> None:
    result = runner.invoke(app, ["convert", str(source), str(tmp_path / "m.nemo"), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["verified"] is True
    assert report["tensors"] == len(report["checksums"]) == len(state_of(source))
    assert "reads" in result.stderr
    assert "of memory" in result.stderr
    result = runner.invoke(app, ["convert", str(tmp_path / "m.nemo"), str(tmp_path / "back")])
    assert result.exit_code == 0, result.output
    assert "verified" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["/no/such", "out"], "no such file"),
        (["SOURCE", "SOURCE"], "is there already"),
        (["SOURCE", "OUT", "--to", "onnx"], "expected one of hf, nemo"),
        (["SOURCE", "OUT", "--quantize", "q8_0"], "is for GGUF"),
        (["SOURCE", "OUT.gguf", "--quantize", "q3_x"], "expected one of f32"),
        (["SOURCE", "OUT", "--dtype", "int3"], "it must be auto, bf16"),
        (["SOURCE", "OUT", "--max-shard-size", "much"], "such as 5GB"),
    ],
)
def test_wrong_usage_is_a_sentence(tmp_path: Path, source: Path, arguments: list[str], sentence: str) -> None:
    words = {"SOURCE": str(source), "OUT": str(tmp_path / "out"), "OUT.gguf": str(tmp_path / "out.gguf")}
    result = runner.invoke(app, ["convert", *[words.get(each, each) for each in arguments]])
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from minitron.cli import app; "
        "r = CliRunner().invoke(app, ['convert', '--help']); "
        "assert r.exit_code == 0 and 'q8_0' in r.output; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "500 MB", "1000", "1.5kb", "2GiB")] == [
        5 * 10**9, 5 * 10**8, 1000, 1500, 2 * 10**9,
    ]  # fmt: skip
    for text in ("", "GB", "-1GB", "1XB", "nan", "inf"):
        with pytest.raises(ValueError, match="max-shard-size"):
            parse_size(text)


def test_a_foreign_model_is_refused(tmp_path: Path, source: Path) -> None:
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match="model_type is 'gpt2'; the architectures that minitron works with are"):
        convert(source, tmp_path / "out")


def test_bare_megatron_folder_with_a_config(tmp_path: Path) -> None:
    folder = data_folder()
    if folder is None:
        pytest.skip("checkpoints written by megatron-core are not at hand (MINITRON_DATA)")
    convert(folder / "nemo" / "tiny_nemotron_torch_dist.nemo", tmp_path / "first")
    bare = folder / "nemo" / "tp1_fp32" / "torch_dist"
    with pytest.raises(CheckpointError, match="--config"):
        convert(bare, tmp_path / "second")
    convert(bare, tmp_path / "second", ConversionOptions(config=str(tmp_path / "first")))
    first, second = state_of(tmp_path / "first"), state_of(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first)
