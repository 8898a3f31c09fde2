"""Texts without torch: the same as on the ordinary path, and only of checkpoints that are known to be served."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from text_checkpoint import make_text_checkpoint
from transformers import AutoTokenizer
from transformers.generation.streamers import TextStreamer

import minitron
from minitron.assets import bundled_model
from minitron.cli.generate import UNSTATED
from minitron.engine.weights import from_checkpoint
from minitron.finite import NotFiniteError
from minitron.light.settings import NotServedError
from minitron.light.stream import LightModel, LightStream
from minitron.light.tokenizer import LightTokenizer, Pieces
from minitron.sampling_parameters import SamplingParameters
from minitron.text_stream import TextStream, encode_prompt

PROMPTS = [
    "Once upon a time",
    "The king said: \u201cCome here!\u201d\nAnd",
    "caf\u00e9 \u4f60\u597d \U0001f600 12345",
    "</s> a special token in the text <extra_id_0>",
    "x",
    " two  spaces and a tab\t",
]


def fp32_checkpoint(folder: Path) -> Path:
    return make_text_checkpoint(folder / "fp32")


def changed_model(folder: Path, **changes: Any) -> Path:
    """The tiny checkpoint with another shape and larger weights, in bf16."""
    base = make_text_checkpoint(folder / "changed")
    config = minitron.NemotronConfig.from_pretrained(base)
    values = {**config.to_dict(), **changes}
    torch.manual_seed(3)
    model = minitron.NemotronForCausalLM(minitron.NemotronConfig.from_dict(values)).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(base)
    return base


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "bundled": lambda _: bundled_model(),
    "bundled-half": lambda _: bundled_model("half"),
    "fp32": fp32_checkpoint,
    "biases, tied": lambda folder: changed_model(
        folder, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=12
    ),
    "rotation of 96": lambda folder: changed_model(folder, head_dim=96, partial_rotary_factor=1.0),
}
"""Of 96 channels, torch's frequencies differ in the last bit from exact ones."""


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_texts_are_those_of_the_ordinary_path(name: str, tmp_path: Path) -> None:
    folder = CHECKPOINTS[name](tmp_path)
    light, (model, tokenizer) = LightModel(folder), minitron.load(folder)
    for prompt in PROMPTS:
        given = {"temperature": 0.0, "max_new_tokens": 40}
        parameters = SamplingParameters.for_model(light.recommended, given, UNSTATED)
        assert parameters == SamplingParameters.for_model(model.generation_config, given, UNSTATED)  # type: ignore[arg-type]
        with LightStream(light, prompt, parameters) as ours:
            pieces = list(ours)
        ids = encode_prompt(tokenizer, prompt)
        with TextStream(model, tokenizer, ids, parameters) as theirs:
            for _ in theirs:
                pass
        assert "".join(pieces) == ours.text == theirs.text, prompt
        assert (ours.settings, ours.from_checkpoint, ours.notes) == (theirs.settings, theirs.from_checkpoint, [])
        mine, other = ours.summary, theirs.summary
        assert mine is not None
        assert other is not None
        assert (
            (mine.prompt_tokens, mine.new_tokens)
            == (other.prompt_tokens, other.new_tokens)
            == (len(ids), mine.new_tokens)
        )
        assert (mine.engine, mine.zero_fraction) == (other.engine, other.zero_fraction) == ("cpu", mine.zero_fraction)


SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "top_k": 40},
    {"top_p": 0.5, "min_p": 0.02},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.2, "checkpoint": False},
    {"top_p": 1.0, "temperature": 1.0},
]


@pytest.mark.parametrize("name", ["bundled", "fp32"])
def test_a_seed_gives_the_text_of_the_ordinary_path(name: str, tmp_path: Path) -> None:
    folder = CHECKPOINTS[name](tmp_path)
    light, (model, tokenizer) = LightModel(folder), minitron.load(folder)
    for index, wanted in enumerate(SAMPLED):
        for seed in (0, 7, -1, 2**63 + index):
            given = {**wanted, "seed": seed, "max_new_tokens": 30}
            parameters = SamplingParameters.for_model(light.recommended, given, UNSTATED)
            assert parameters == SamplingParameters.for_model(model.generation_config, given, UNSTATED)  # type: ignore[arg-type]
            with LightStream(light, PROMPTS[index], parameters) as ours:
                list(ours)
            with TextStream(model, tokenizer, encode_prompt(tokenizer, PROMPTS[index]), parameters) as theirs:
                list(theirs)
            assert ours.text == theirs.text, (wanted, seed)
            assert (ours.settings, ours.from_checkpoint) == (theirs.settings, theirs.from_checkpoint)


def test_without_a_seed_texts_differ(plain: Path) -> None:
    light, parameters = LightModel(plain), SamplingParameters(temperature=1.0, max_new_tokens=20)
    texts = set()
    for _ in range(4):
        with LightStream(light, "the cat", parameters) as stream:
            texts.add("".join(stream))
    assert len(texts) > 1


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_are_those_of_the_ordinary_reader(name: str, tmp_path: Path) -> None:
    folder = CHECKPOINTS[name](tmp_path)
    ours, theirs = LightModel(folder).weights, from_checkpoint(folder)

    def same(a: Any, b: Any) -> bool:
        if a is None or b is None:
            return a is b
        return a.tobytes() == b.contiguous().view(torch.uint8).numpy().tobytes() if b.ndim else False

    assert ours.format == theirs.format
    assert (ours.head is ours.embed) is (theirs.head is theirs.embed)
    assert ours.constants.inv_freq.tobytes() == theirs.constants.inv_freq.tobytes()
    ours.constants.inv_freq = theirs.constants.inv_freq
    assert ours.constants == theirs.constants
    assert same(ours.embed.data, theirs.embed.data)
    assert same(ours.head.data, theirs.head.data)
    assert same(ours.norm.gain, theirs.norm.gain)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert (a.num_heads, a.num_key_value_heads) == (b.num_heads, b.num_key_value_heads)
        assert all(same(x.data, y.data) for x, y in zip(a.matrices, b.matrices, strict=True))
        for field in ("qkv_bias", "o_bias", "up_bias", "down_bias"):
            assert same(getattr(a, field), getattr(b, field)), field
        for norm in ("attention_norm", "mlp_norm"):
            assert same(getattr(a, norm).gain, getattr(b, norm).gain)
            assert same(getattr(a, norm).offset, getattr(b, norm).offset)


LIGHT = """
import sys
from minitron.cli import main
try:
    main()
finally:
    print([name for name in ("torch", "transformers", "safetensors", "scipy") if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("options", [["--temperature", "0"], ["--seed", "1"]])
def test_the_command_imports_neither_torch_nor_transformers(options: list[str]) -> None:
    command = [sys.executable, "-c", LIGHT, "generate", "-p", "Once upon a time", "-n", "5", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
    assert done.stderr.strip().endswith("[]"), done.stderr


def test_pieces_are_those_of_transformers_streamer() -> None:
    folder = bundled_model()
    light, tokenizer = LightTokenizer(folder, 4096), AutoTokenizer.from_pretrained(folder)
    texts = ["one two\nthree  four\n\n", "\u4f60\u597d \u041c\u0438\u0440 \U0001f600 na\u00efve", "\n", " \n x", "word"]
    sequences = [tokenizer(text)["input_ids"] for text in texts]
    sequences += [torch.randint(4096, (60,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(40)]
    for ids in sequences:
        streamed: list[str] = []
        theirs = TextStreamer(tokenizer, skip_special_tokens=True)  # type: ignore[arg-type]
        theirs.on_finalized_text = lambda text, stream_end=False, into=streamed: into.append(text)  # type: ignore[method-assign]
        ours = Pieces(light)
        for token in ids:
            theirs.put(torch.tensor([token]))
            assert ours.put([token]) == streamed[-1]
        theirs.end()
        assert ours.end() == streamed[-1]


@pytest.mark.parametrize("text", [*PROMPTS, "", "\r\n\u00a0", "<s><pad>"])
def test_ids_are_those_of_transformers(text: str) -> None:
    folder = bundled_model()
    light, tokenizer = LightTokenizer(folder, 4096), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert light.encode(text) == ids
    assert light.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


# --- what is not served ------------------------------------------------------------------------------------------


def edit(name: str, **values: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file; `...` removes one."""

    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        found = {key: value for key, value in {**found, **values}.items() if value is not ...}
        (folder / name).write_text(json.dumps(found))

    return change


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header of the weights, which keeps its length by spaces."""

    def edited(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        found = json.loads(data[8 : 8 + length])
        change(found)
        text = json.dumps(found, separators=(",", ":")).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return edited


def entry(**values: Any) -> Callable[[Path], None]:
    return header(lambda found: found["model.layers.0.mlp.up_proj.weight"].update(values))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def link(folder: Path) -> None:
    outside = folder.parent / "outside.json"
    shutil.move(folder / "tokenizer.json", outside)
    (folder / "tokenizer.json").symlink_to(outside)


CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
ROPE = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
NOT_SERVED: dict[str, Callable[[Path], None]] = {
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "config is a list": lambda folder: (folder / CONFIG).write_text("[]"),
    "another architecture": edit(CONFIG, model_type="llama"),
    "another class": edit(CONFIG, architectures=["NemotronForSequenceClassification"]),
    "unknown key": edit(CONFIG, forward=1),
    "quantized": edit(CONFIG, quantization_config={}),
    "pruned heads": edit(CONFIG, pruned_heads={"0": [1]}),
    "another activation": edit(CONFIG, hidden_act="gelu"),
    "fp16": edit(CONFIG, dtype="float16", torch_dtype="float16"),
    "two dtypes": edit(CONFIG, torch_dtype="bfloat16"),
    "no dtype": edit(CONFIG, dtype=...),
    "no head_dim": edit(CONFIG, head_dim=...),
    "a size that is true": edit(CONFIG, num_hidden_layers=True),
    "a size that is a text": edit(CONFIG, vocab_size="512"),
    "a size of zero": edit(CONFIG, hidden_size=0),
    "a negative size": edit(CONFIG, intermediate_size=-64),
    "a huge size": edit(CONFIG, num_hidden_layers=1 << 40),
    "unequal groups": edit(CONFIG, num_key_value_heads=3),
    "eps of zero": edit(CONFIG, norm_eps=0.0),
    "eps that is infinite": lambda folder: (folder / CONFIG).write_text(
        (folder / CONFIG).read_text().replace("1e-05", "1e999")
    ),
    "scaled rotation": edit(CONFIG, rope_parameters={**ROPE, "rope_type": "linear", "factor": 2.0}),
    "unscaled rotation with a factor": edit(CONFIG, rope_parameters={**ROPE, "rope_type": "default", "factor": 2.0}),
    "two bases": edit(CONFIG, rope_theta=5000.0),
    "odd rotation": edit(
        CONFIG,
        partial_rotary_factor=0.4,
        rope_parameters={**ROPE, "rope_type": "default", "partial_rotary_factor": 0.4},
    ),
    "pad outside": edit(CONFIG, pad_token_id=512),
    "no generation config": lambda folder: (folder / GENERATION).unlink(),
    "beams": edit(GENERATION, num_beams=4),
    "suppressed tokens": edit(GENERATION, suppress_tokens=[5]),
    "stop strings": edit(GENERATION, stop_strings=["x"]),
    "no end": edit(GENERATION, eos_token_id=...),
    "an end that is a text": edit(GENERATION, eos_token_id="3"),
    "a temperature of another kind": edit(GENERATION, temperature="hot"),
    "negative temperature": edit(GENERATION, temperature=-1.0),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer cut": lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"'),
    "a class with code": edit(TOKENIZER, auto_map={"AutoTokenizer": ["a.B", None]}),
    "another class of tokenizer": edit(TOKENIZER, tokenizer_class="LlamaTokenizer"),
    "a prefix space": edit(TOKENIZER, add_prefix_space=True),
    "spaces cleaned up": edit(TOKENIZER, clean_up_tokenization_spaces=True),
    "an end that is an ordinary token": edit(TOKENIZER, eos_token="a"),
    "more special tokens": edit(TOKENIZER, additional_special_tokens=["<new>"]),
    "special tokens that are a text": edit(TOKENIZER, additional_special_tokens="<s>"),
    "a fixed length": edit(
        "tokenizer.json", truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    ),
    "special_tokens_map": lambda folder: (folder / "special_tokens_map.json").write_text("{}"),
    "an adapter beside": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "other weights beside": lambda folder: (folder / "pytorch_model.bin").write_bytes(b""),
    "an index beside": lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
    "a link": link,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut": cut,
    "weights empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "header too long": lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60)),
    "another dtype": entry(dtype="F16"),
    "another shape": entry(shape=[32, 64]),
    "a shape of true": entry(shape=[64, True]),
    "offsets of another size": entry(data_offsets=[0, 12]),
    "offsets that are texts": entry(data_offsets=["0", "8192"]),
    "an overlap": entry(data_offsets=[0, 8192]),
    "an entry more": header(lambda found: found.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
    "an entry less": header(lambda found: found.pop("model.norm.bias")),
    "weights of another framework": header(lambda found: found.update(__metadata__={"format": "tf"})),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_checkpoint(tmp_path_factory.mktemp("light") / "plain")


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_not_known_is_left_to_the_ordinary_path(name: str, plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(plain, folder)
    LightModel(folder)
    NOT_SERVED[name](folder)
    with pytest.raises(NotServedError):
        LightModel(folder)


@pytest.mark.parametrize("vocab_size", [40, 511, 513])
def test_another_vocabulary(vocab_size: int, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "c")
    edit(CONFIG, vocab_size=vocab_size)(tmp_path / "c")
    with pytest.raises(NotServedError):
        LightModel(tmp_path / "c")


@pytest.mark.parametrize(
    ("prompt", "parameters"),
    [
        ("the cat " * 40, {}),  # fills the context
        ("the", {"temperature": 0.5, "typical_p": 0.5}),
        ("the", {"temperature": 0.5, "epsilon_cutoff": 0.1}),
        ("the", {"temperature": 0.5, "eta_cutoff": 0.1}),
        ("the", {"no_repeat_ngram_size": 2}),
        ("the", {"stop": ("cat",)}),
    ],
)
def test_requests_that_are_not_served(plain: Path, prompt: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(NotServedError):
        LightStream(LightModel(plain), prompt, SamplingParameters(**{"temperature": 0, **parameters}))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_numbers_that_are_not_finite_are_named(plain: Path, tmp_path: Path, name: str) -> None:
    model, tokenizer = minitron.load(plain)
    with torch.no_grad():
        model.get_parameter(name)[0] = torch.nan
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stream = LightStream(LightModel(tmp_path), "the cat", SamplingParameters(temperature=0))
    with stream, pytest.raises(NotFiniteError, match=rf"{name.replace('.', '[.]')} are NaN"):
        list(stream)


def test_infinite_weights_of_skipped_rows_are_left_to_the_ordinary_path(plain: Path, tmp_path: Path) -> None:
    model, tokenizer = minitron.load(plain)
    for value in (torch.nan, torch.inf, -torch.inf):
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 5] = value
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype).save_pretrained(tmp_path)
            tokenizer.save_pretrained(tmp_path)
            with pytest.raises(NotServedError, match=r"down_proj\.weight that are not finite"):
                LightModel(tmp_path)
