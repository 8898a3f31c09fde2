"""The result of a compression: every model measured alike, and the report."""

from __future__ import annotations

import json
import math
import platform
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ..bench.speeds import measure_speeds
from ..checkpoint.hf import read_config
from ..config import ModelConfig
from ..data.documents import Source, read_texts
from ..evaluate.quick import distance, generation, perplexity
from ..loading import load
from ..prune.architecture import Architecture
from ..prune.scores import Scores
from ..report.facts import (
    CandidateFacts,
    Curve,
    ImportanceFacts,
    ModelFacts,
    QualityFacts,
    Report,
    SampleFacts,
    SpeedFacts,
    StageFacts,
)
from ..report.page import write_report
from ..shapes import describe
from ..text_stream import SamplingParameters, TextStream, encode_prompt
from ..train.log import METRICS_FILE
from ..version import __version__
from .context import Context
from .costs import training_flops

GROUPS = 20
"""Number of groups of documents whose losses give the standard error."""
MOST_DOCUMENTS = 400
SAMPLE_TOKENS = 90
_SHAPE = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size",
)  # fmt: skip


def evaluate_and_report(context: Context, teacher: Path, models: Mapping[str, Path]) -> Path:
    """Measure the teacher and every model, and write `report.json` and `report.html`, in the first process.

    Returns:
        The page.
    """
    world, folders = context.world, {"teacher": teacher, **models}
    marks = {name: context.fingerprint(folder) for name, folder in folders.items()}
    inputs = {"models": marks, "prompts": list(context.recipe.prompts)}
    facts = context.stages.run("evaluate", inputs, lambda _: world.first_does(lambda: _evaluate(context, folders)))
    return world.first_does(lambda: write_report(make_report(context, folders, marks, facts), context.folder))


# --- measuring ---------------------------------------------------------------------------------------------------


def heldout_texts(context: Context) -> dict[str, list[str]]:
    """Held-out documents by the name of their text; at most `MOST_DOCUMENTS` of each, evenly spread."""
    found: dict[str, list[str]] = {}
    recipe = context.recipe
    for path in recipe.heldout:
        texts, _ = read_texts([Source(path, 1.0, recipe.field, recipe.encoding, recipe.skip_bad)])
        found[Path(path).stem] = texts[:: max(1, math.ceil(len(texts) / MOST_DOCUMENTS))]
    if not found:  # a share of the training documents was held out; their tokens are at hand, and become text again
        for name, blocks in context.texts.heldout.items():
            pieces = [piece for i in range(len(blocks)) for piece in blocks.pieces(i)][:MOST_DOCUMENTS]
            found[name] = [context.tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces]
    return {name: [text for text in texts if text.strip()] for name, texts in found.items()}


def _evaluate(context: Context, folders: Mapping[str, Path]) -> dict[str, Any]:
    texts = heldout_texts(context)
    loaded = {name: load(folder, device=str(context.device)) for name, folder in folders.items()}
    reference = loaded["teacher"]
    quality: list[dict[str, Any]] = []
    for name, (model, tokenizer) in loaded.items():
        for text, documents in texts.items():
            context.say(f"evaluate: {name} on {text}")
            value, error = _nats(model, tokenizer, documents)
            quality.append(_row(name, text, "nats per token", value, error))
            whole = perplexity(model, tokenizer, documents)
            quality.append(_row(name, text, "bits per byte", whole.bits_per_byte))
            if name != "teacher":
                found = distance(model, reference.model, tokenizer, documents, reference_tokenizer=reference.tokenizer)
                quality.append(_row(name, text, "KL from the teacher, nats", found.kl_nats_per_token))
                quality.append(_row(name, text, "same most likely token", found.top1_agreement))
        repeats = generation(model, tokenizer, context.recipe.prompts)
        quality.append(_row(name, "greedy continuations", "repeated runs of 4 tokens", repeats.repeated_4grams))
    samples = [
        {"prompt": prompt, "texts": {name: _sample(*found, prompt) for name, found in loaded.items()}}
        for prompt in context.recipe.prompts
    ]
    prompt = encode_prompt(context.tokenizer, context.recipe.prompts[0])
    speed = speeds_of({name: model for name, (model, _) in loaded.items()}, prompt)
    return {"quality": quality, "samples": samples, "speed": speed}


def _row(model: str, text: str, measure: str, value: float, error: float | None = None) -> dict[str, Any]:
    return {"model": model, "text": text, "measure": measure, "value": value, "error": error}


def _nats(model: Any, tokenizer: Any, documents: Sequence[str]) -> tuple[float, float | None]:
    """Nats per token, and its standard error over groups of documents."""
    parts = [documents[i::GROUPS] for i in range(min(GROUPS, len(documents)))]
    scores = [perplexity(model, tokenizer, part) for part in parts]
    tokens = sum(score.tokens for score in scores)
    mean = sum(score.nats for score in scores) / tokens
    if len(scores) < 2:
        return mean, None
    # Of a ratio of sums: the residuals of the groups, in tokens.
    residuals = [score.nats - mean * score.tokens for score in scores]
    return mean, math.sqrt(len(scores)) * statistics.stdev(residuals) / tokens


def _stream(model: Any, tokenizer: Any, prompt: str, settings: SamplingParameters) -> TextStream:
    stream = TextStream(model, tokenizer, encode_prompt(tokenizer, prompt), settings)
    with stream:
        for _ in stream:
            pass
    return stream


def _sample(model: Any, tokenizer: Any, prompt: str) -> str:
    room = max(1, min(SAMPLE_TOKENS, model.config.max_position_embeddings - len(encode_prompt(tokenizer, prompt)) - 1))
    settings = SamplingParameters(room, temperature=0.7, top_p=0.9, seed=1)
    return _stream(model, tokenizer, prompt, settings).text


def speeds_of(models: Mapping[str, Any], prompt: Sequence[int]) -> list[dict[str, Any]]:
    """Greedy decoding of each model in turn, round by round, and the load of the machine."""
    shortest = min(model.config.max_position_embeddings for model in models.values())
    speeds, load = measure_speeds(models, [*prompt, *prompt][: max(2, min(len(prompt), shortest // 2))])
    rows = []
    for name, speed in speeds.items():
        sizes = describe(models[name].config)
        width = models[name].dtype.itemsize
        rows.append(
            {
                "model": name,
                "tokens_per_second": speed.tokens_per_second,
                "quartiles": list(speed.quartiles),
                "bytes_per_token": sizes.parameters_read_per_token() * width,
                "weight_bytes": sizes.num_parameters() * width,
                "engine": speed.engine,
                "first_token_seconds": speed.first_token_seconds,
                "load": load,
            }
        )
    return rows


# --- the report --------------------------------------------------------------------------------------------------


def make_report(context: Context, folders: Mapping[str, Path], marks: Mapping[str, str], facts: Any) -> Report:
    """All that a run knows about itself.

    Args:
        folders: checkpoints by name, that of the teacher first.
        marks: their fingerprints.
        facts: what the stage `evaluate` found.
    """
    recipe, teacher = context.recipe, read_config(folders["teacher"])
    models = [_model_facts(name, folder) for name, folder in folders.items()]
    quality = [QualityFacts(**row) for row in facts["quality"]]
    last = list(folders)[-1]
    return Report(
        title=f"{Path(recipe.model).name}, compressed",
        summary=_summary(models, quality, last),
        models=models,
        importance=_importance(context),
        candidates=_candidates(context, teacher),
        curves=_curves(context, teacher),
        quality=quality,
        speed=[SpeedFacts(**{**row, "quartiles": tuple(row["quartiles"])}) for row in facts["speed"]],
        samples=[SampleFacts(**row) for row in facts["samples"]],
        stages=_stage_rows(context),
        commands=_commands(context),
        versions={
            "minitron": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "Python": platform.python_version(),
            "machine": _machine(context),
        },
        hashes={**marks, **{f"text {key}": f"weight {weight:g}" for key, weight in context.data_key.items()}},
        notes=[
            *_stage_notes(context),
            "Samples: temperature 0.7, top-p 0.9, seed 1, not selected. Speed: greedy, one prompt, this machine.",
        ],
    )


def _machine(context: Context) -> str:
    processes = f", {context.world.size} processes" if context.world.size > 1 else ""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {context.device}{processes}"


def _stage_notes(context: Context) -> list[str]:
    """Sentences of stages about their results."""
    return [note for facts in context.stages.facts.values() for note in facts.get("notes", [])]


def _model_facts(name: str, folder: Path) -> ModelFacts:
    config = read_config(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    sizes = describe(config)
    shape = {key: getattr(config, key, sizes.head_dim) for key in _SHAPE}  # Qwen2 need not state its head_dim
    role = "teacher" if name == "teacher" else "student"
    return ModelFacts(name, role, shape, sizes.parameter_counts(), sizes.num_non_embedding_parameters(), size)


def _summary(models: Sequence[ModelFacts], quality: Sequence[QualityFacts], last: str) -> list[str]:
    teacher, student = models[0], models[-1]
    sentences = [
        f"{last} has {student.non_embedding / teacher.non_embedding:.1%} of the teacher's parameters without "
        f"embeddings, {sum(student.parts.values()) / sum(teacher.parts.values()):.1%} of all."
    ]
    for text in dict.fromkeys(row.text for row in quality if row.measure == "nats per token"):
        values = {r.model: r.value for r in quality if r.text == text and r.measure == "nats per token"}
        change = values[last] / values["teacher"] - 1
        sentences.append(
            f"On {text}: {values[last]:.3f} nats per token, the teacher {values['teacher']:.3f} ({change:+.1%})."
        )
    return sentences


def _importance(context: Context) -> ImportanceFacts | None:
    path = context.folder / context.recipe.target_name(0) / "importance" / "importance.safetensors"
    if not path.is_file():
        return None
    scores = Scores.load(path)

    def falling(values: torch.Tensor) -> list[float]:
        ordered = (values / values.max().clamp(min=1e-300)).sort(descending=True).values
        indices = torch.linspace(0, len(ordered) - 1, min(128, len(ordered))).round().long()
        return [round(x, 4) for x in ordered[indices].tolist()]

    heads = [[round(x, 4) for x in (h / h.max().clamp(min=1e-300)).tolist()] for h in scores.heads]
    layers = (scores.layers - scores.layers.min().clamp(max=0)).clamp(min=0)
    layers = [round(x, 4) for x in (layers / layers.max().clamp(min=1e-300)).tolist()]
    return ImportanceFacts([falling(n) for n in scores.neurons], heads, falling(scores.channels), layers)


def _candidates(context: Context, source: ModelConfig) -> list[CandidateFacts]:
    rows: list[CandidateFacts] = []
    for index in range(len(context.recipe.targets)):
        name = context.recipe.target_name(index)
        found = context.stages.facts
        ranked = found.get(f"{name}/rank", {"shapes": {}, "losses": {}})
        labels = {str(sorted(shape.items())): label for label, shape in ranked["shapes"].items()}
        longest = max((int(step) for losses in ranked["losses"].values() for step in losses), default=0)
        for row in found.get(f"{name}/score", {}).get("candidates", []):
            config = Architecture.from_dict(row["shape"], name).config(source)
            label = labels.get(str(sorted(row["shape"].items())))
            losses = {} if row["loss"] is None else {"0": row["loss"]}
            outcome = "not retrained"
            if label is not None:
                losses = ranked["losses"][label]
                last = max(map(int, losses))
                outcome = "not chosen" if last == longest else f"dropped after {last:,} tokens"
            if row["shape"] == found[f"{name}/prune"]["shape"]:
                outcome = "chosen"
            title = str(Architecture.from_dict(row["shape"], name))
            title = f"{name}: {title}" if len(context.recipe.targets) > 1 else title
            sizes = describe(config).num_parameters(), describe(config).num_non_embedding_parameters()
            rows.append(CandidateFacts(title, *sizes, losses, outcome))
    return rows


def _curves(context: Context, teacher: ModelConfig) -> list[Curve]:
    found: list[Curve] = []
    config = context.recipe.train
    runs = [("correct", "teacher", context.folder / "correct" / "run")]
    names = [context.recipe.target_name(i) for i in range(len(context.recipe.targets))]
    runs += [("distill", name, context.folder / name / "distill" / "run") for name in names]
    for stage, name, run in runs:
        path = run / METRICS_FILE
        if not path.is_file():
            continue
        student = read_config(run / "model")
        per_token = training_flops(student, teacher if stage == "distill" else None, 1, config.sequence)
        for text, points in _heldout_points(path).items():
            tokens = [step * config.tokens_per_step for step, _ in points]
            flops = [n * per_token for n in tokens]
            found.append(Curve(stage, f"{name}, {text}", tokens, flops, [loss for _, loss in points]))
    return found


def _heldout_points(path: Path) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if key.startswith("heldout/") and key.endswith("/nats_per_token"):
                points.setdefault(key.split("/")[1], {})[row["step"]] = value
    return {text: sorted(found.items()) for text, found in points.items()}


_WHAT = {
    "correct": "the teacher is fine-tuned on the data",
    "importance": "one forward pass scores heads, neurons, channels and layers",
    "score": "loss of every shape right after pruning",
    "rank": "the best shapes are retrained, the worse half dropped at each rung; the teacher runs once for all",
    "prune": "the chosen shape is cut out",
    "distill": "retraining by the original teacher, forward KL of the logits",
    "evaluate": "held-out text, speed and samples of every model",
}  # fmt: skip


def _stage_rows(context: Context) -> list[StageFacts]:
    rows = []
    for name, facts in context.stages.facts.items():
        what = _WHAT[name.rsplit("/", 1)[-1]]
        seconds = context.stages.seconds[name]
        rows.append(StageFacts(name, int(facts.get("tokens", 0)), float(facts.get("flops", 0.0)), seconds, what))
    return rows


def _commands(context: Context) -> list[str]:
    return [f"minitron compress --recipe {shlex.quote('recipe.json')} OUT   # recipe.json is next to this page"]
