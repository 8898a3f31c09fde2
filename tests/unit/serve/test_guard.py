"""A guard in the served model's forward pass judges as the head itself does, in all three actions."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("starlette", reason="pip install 'minitron[serve]'")
pytest.importorskip("llguidance", reason="pip install 'minitron[serve]'")
httpx = pytest.importorskip("httpx", reason="pip install 'minitron[serve]'")

from live_server import live_server  # noqa: E402
from served_sequences import CHUNK, random_wanted, run  # noqa: E402

from minitron.assets import bundled_model  # noqa: E402
from minitron.finite import NotFiniteError  # noqa: E402
from minitron.heads import NemotronForSequenceClassification  # noqa: E402
from minitron.loading import load  # noqa: E402
from minitron.serve.guard import REFUSAL, SharedGuard, Verdicts, load_guard  # noqa: E402
from minitron.serve.scheduler import Scheduler  # noqa: E402
from minitron.serve.served import load_models  # noqa: E402
from minitron.serve.settings import ServeSettings  # noqa: E402

LABELS = {0: "fine", 1: "spam", 2: "rude"}
MESSAGES = [{"role": "user", "content": "Tell me a story."}]
TALK = {"model": "half", "messages": MESSAGES, "temperature": 0, "max_tokens": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A head with random weights on the bundled model."""
    torch.manual_seed(3)
    target = tmp_path_factory.mktemp("guard") / "head"
    served = load("bundled-half", dtype="fp32")
    head = NemotronForSequenceClassification.from_pretrained(
        bundled_model("half"), num_labels=3, id2label=LABELS, pad_token_id=0, dtype=torch.float32
    )
    head.score.weight.data.normal_(std=0.3)
    head.save_pretrained(target)
    served.tokenizer.save_pretrained(target)
    return target


def settings(folder, **given) -> ServeSettings:
    values = {"guard": (str(folder),), "guard_block": ("spam",), "slots": 4, **given}
    return ServeSettings(("half=bundled-half",), **values)


@pytest.fixture(scope="module")
def head(folder):
    return NemotronForSequenceClassification.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def served(folder):
    [model] = load_models(settings(folder, guard_action="count", dtype="fp32"), lambda sentence: None)
    yield model
    model.scheduler.engine.close()


def expected(head, tokens: list[int]) -> float:
    with torch.inference_mode():
        return float(head(input_ids=torch.tensor([tokens])).logits[0].double().softmax(-1)[1])


def test_prompts_and_answers_are_judged_as_by_the_head_itself(served, head) -> None:
    """Greedy bursts, sampled steps, ends, limits and a prefix cache: as in one forward pass of the head."""
    chance, prefixes = random.Random(5), []
    engine, guard = served.scheduler.engine, served.scheduler.guard
    assert guard.shared
    wanted = [random_wanted(chance, served.vocabulary, prefixes) for _ in range(24)]
    wanted += [replace(wanted[0], limit=30), replace(wanted[1], ends=frozenset(range(0, served.vocabulary, 5)))]
    sequences = {one.sequence(served.vocabulary): number for number, one in enumerate(wanted)}
    joins: dict[int, list] = {}
    for sequence in sequences:
        joins.setdefault(chance.randint(0, 20), []).append(sequence)
    run(Scheduler(engine, chunk=CHUNK, cache_bytes=1 << 20, guard=guard), sequences, joins)
    answers = 0
    for sequence in sequences:
        found = sequence.judgements
        assert found["prompt"].prob == pytest.approx(expected(head, sequence.prompt), abs=1e-4)
        answer = sequence.tokens[:-1] if sequence.tokens[-1] in sequence.ends else sequence.tokens
        assert ("answer" in found) == bool(answer)
        if answer:
            answers += 1
            assert found["answer"].prob == pytest.approx(expected(head, sequence.prompt + answer), abs=1e-4)
    assert answers > 15


def test_a_guard_changes_no_token(served) -> None:
    chance, prefixes = random.Random(6), []
    wanted = [random_wanted(chance, served.vocabulary, prefixes) for _ in range(6)]
    engine, found = served.scheduler.engine, []
    for guard in (None, served.scheduler.guard):
        sequences = {one.sequence(served.vocabulary): number for number, one in enumerate(wanted)}
        found.append(run(Scheduler(engine, chunk=CHUNK, guard=guard), sequences, {0: list(sequences)}))
    assert found[0] == found[1]


class _Scripted(SharedGuard):
    """Flags prompts, or answers, as told."""

    def __init__(self, action: str, prompt: bool, answer: bool, length: int) -> None:
        super().__init__("scripted", action, np.zeros((2, 1)), Verdicts(("fine", "spam"), (1,), False, 0.5))  # type: ignore[arg-type]
        self.flags, self.length = (prompt, answer), length

    def judge(self, tokens, hidden):
        flagged = self.flags[len(tokens) > self.length]
        return self._verdicts.of(np.array([0.0, 9.0 if flagged else -9.0]))


@pytest.fixture(scope="module")
def server():
    with live_server(ServeSettings(("half=bundled-half",), slots=4)) as found:
        yield found


def ask(server, action: str, prompt: bool, answer: bool, path: str = "chat/completions", body=None, **given):
    model = server.context.served.find("half")
    body = body or {**TALK, **given}
    length = len(model.encode(model.render(MESSAGES, None, prompt=True), special=False))
    model.scheduler.guard = _Scripted(action, prompt, answer, length)
    try:
        with httpx.Client(base_url=server.url, timeout=60) as web:
            return web.post(f"/v1/{path}", json=body)
    finally:
        model.scheduler.guard = None


def chunks(response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def test_a_flagged_prompt_is_refused_before_the_first_token(server) -> None:
    [choice] = ask(server, "refuse", prompt=True, answer=False).json()["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert (choice["message"]["content"], choice["message"]["refusal"]) == ("", REFUSAL)
    assert choice["guard"]["prompt"]["flagged"]
    assert "answer" not in choice["guard"]


@pytest.mark.parametrize(("prompt", "answer"), [(True, False), (False, True)])
def test_nothing_of_a_refused_answer_is_streamed(server, prompt: bool, answer: bool) -> None:
    found = chunks(ask(server, "refuse", prompt, answer, stream=True))
    assert "".join(one["delta"].get("content") or "" for one in found) == ""
    assert found[-2]["delta"] == {"refusal": REFUSAL}
    assert found[-1]["finish_reason"] == "content_filter"


@pytest.mark.parametrize("action", ["refuse", "flag", "count"])
def test_an_answer_that_passes_is_that_without_a_guard(server, action: str) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as web:
        plain = web.post("/v1/chat/completions", json=TALK).json()["choices"][0]
    [guarded] = ask(server, action, prompt=False, answer=False).json()["choices"]
    judged = guarded.pop("guard", None)
    assert guarded == plain
    assert (judged is None) == (action == "count")
    streamed = chunks(ask(server, action, prompt=False, answer=False, stream=True))
    assert "".join(one["delta"].get("content") or "" for one in streamed) == plain["message"]["content"]
    assert streamed[-1].get("guard") == judged


def test_a_flag_is_in_the_last_chunk_beside_the_whole_answer(server) -> None:
    found = chunks(ask(server, "flag", prompt=False, answer=True, stream=True))
    assert "".join(one["delta"].get("content") or "" for one in found)
    assert found[-1]["finish_reason"] == "length"
    assert found[-1]["guard"]["answer"] == {"label": "spam", "prob": pytest.approx(1.0, abs=1e-3), "flagged": True}
    assert not found[-1]["guard"]["prompt"]["flagged"]


def test_the_other_routes_refuse_too(server) -> None:
    asked = {"model": "half", "prompt": "Once", "max_tokens": 3}
    [choice] = ask(server, "refuse", True, False, "completions", asked).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "content_filter")
    asked = {"model": "half", "input": "Tell me a story.", "max_output_tokens": 9}
    found = ask(server, "refuse", False, True, "responses", asked).json()
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "content_filter"})
    assert found["guard"]["answer"]["flagged"]


def test_the_metrics_count_what_was_judged(server) -> None:
    def counted(part: str, outcome: str) -> float:
        labels = {"model_name": "half", "part": part, "outcome": outcome}
        registry = server.context.metrics.registry
        return registry.get_sample_value("minitron:guard_judgements_total", labels) or 0.0

    before = counted("prompt", "passed"), counted("answer", "counted")
    ask(server, "count", prompt=False, answer=True)
    assert (counted("prompt", "passed"), counted("answer", "counted")) == (before[0] + 1, before[1] + 1)


def test_a_head_that_computes_nan_ends_the_request_with_an_error(server) -> None:
    model = server.context.served.find("half")
    verdicts = Verdicts(("fine", "spam"), (1,), False, 0.5)
    with pytest.raises(NotFiniteError):
        verdicts.of(np.array([0.0, np.nan]))
    width = model.model.config.hidden_size
    model.scheduler.guard = SharedGuard("broken", "flag", np.full((2, width), np.nan, np.float32), verdicts)
    try:
        with httpx.Client(base_url=server.url, timeout=60) as web:
            found = web.post("/v1/chat/completions", json=TALK)
    finally:
        model.scheduler.guard = None
    assert found.status_code == 500
    assert "guard" in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("several", "logits", "prob"),
    [(False, [0.0, 2.0, 1.0], (np.exp(2) + np.exp(1)) / (1 + np.exp(2) + np.exp(1))), (True, [9.0, 0.0, -1.0], 0.5)],
)
def test_the_probability_is_that_of_the_blocked_labels(several: bool, logits: list[float], prob: float) -> None:
    found = Verdicts(("fine", "spam", "rude"), (1, 2), several, 0.6).of(np.array(logits))
    assert found.prob == pytest.approx(prob)
    assert found.flagged == (prob >= 0.6)


def test_a_backbone_with_other_values_is_refused_or_runs_beside(folder, tmp_path, head) -> None:
    other = tmp_path / "other"
    changed = NemotronForSequenceClassification.from_pretrained(folder)
    changed.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    changed.save_pretrained(other)
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, other)
    said: list[str] = []
    loaded = load("bundled-half")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has other values.*--tune head"):
        load_guard(str(other), "half", loaded.model, loaded.tokenizer, settings(other), said.append)
    allowed = settings(other, guard_separate=True)
    guard = load_guard(str(other), "half", loaded.model, loaded.tokenizer, allowed, said.append)
    assert not guard.shared
    assert "forward pass of its own" in said[-1]
    tokens = [5, 17, 300, 41]
    assert guard.judge(tokens, None).prob == pytest.approx(expected(changed.eval(), tokens), abs=1e-6)
    with pytest.raises(ValueError, match=r"--guard-block ham: the labels of .* are fine, spam, rude"):
        load_guard(
            str(folder), "half", loaded.model, loaded.tokenizer, settings(folder, guard_block=("ham",)), said.append
        )


def test_another_configuration_is_another_backbone(folder) -> None:
    loaded = load("bundled-half")
    loaded.model.config.norm_eps = 1e-3
    with pytest.raises(ValueError, match=r"its norm_eps is 1e-05 and the model's 0\.001"):
        load_guard(str(folder), "half", loaded.model, loaded.tokenizer, settings(folder), lambda sentence: None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guard": ("x",)}, "guard needs guard_block"),
        ({"guard_block": ("spam",)}, "name its checkpoint with --guard"),
        ({"guard_action": "block"}, "guard_action is 'block'; it must be one of refuse, flag, count"),
        ({"guard_threshold": 1.5}, "guard_threshold is 1.5"),
    ],
)
def test_settings_that_make_no_sense(given, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeSettings(**given)
