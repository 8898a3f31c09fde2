"""Request by request the answers of lm-evaluation-harness's own Hugging Face backend with upstream transformers.

A few requests per task here; several hundred with `python benchmarks/eval.py agreement` (docs/evaluation.md).
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers.models.nemotron.modeling_nemotron import NemotronForCausalLM as Upstream

import minitron
from minitron.evaluate.harness import MinitronLM
from minitron.evaluate.run import FEWSHOT_SEED, quiet_harness
from minitron.evaluate.suites import TaskPlan, build_tasks

DATA = Path(os.environ.get("MINITRON_DATA", Path(__file__).parents[3] / "shared" / "datasets"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}")


@pytest.fixture(scope="module")
def backends() -> tuple[MinitronLM, HFLM]:
    quiet_harness()
    model, tokenizer = minitron.load(dtype="fp32", device="cpu")
    theirs = Upstream.from_pretrained(minitron.bundled_model(), dtype=torch.float32)
    return MinitronLM(model, tokenizer), HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=4, device="cpu")


def requests_of(task: str, shots: int, limit: int) -> list[Instance]:
    built = build_tasks(TaskPlan(task, shots), DATA)
    found: list[Instance] = []
    for name in list(built)[::29]:
        built[name].set_fewshot_seed(seed=FEWSHOT_SEED)
        built[name].build_all_requests(limit=limit)
        found += built[name].instances
    return found


@needs_data
@pytest.mark.parametrize(
    ("task", "shots"),
    [("mmlu", 5), ("hellaswag", 0), ("hellaswag", 10), ("winogrande", 5), ("arc_challenge", 0)],
)
def test_loglikelihoods(task: str, shots: int, backends: tuple[Any, Any]) -> None:
    requests = requests_of(task, shots, 4)
    ours, theirs = (lm.loglikelihood(requests, disable_tqdm=True) for lm in backends)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]


@needs_data
def test_generations(backends: tuple[Any, Any]) -> None:
    requests = requests_of("gsm8k", 0, 4) + requests_of("humaneval", 0, 4)
    for request in requests:
        request.arguments = (request.args[0], {**request.args[1], "max_gen_toks": 24})
    ours, theirs = (lm.generate_until(requests, disable_tqdm=True) for lm in backends)
    assert ours == theirs


def instance(*args: Any, kind: Any = "loglikelihood") -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


EDGES = [
    ("", "Once upon a time"),  # an empty context becomes the bos token
    ("", "<s>Once"),
    ("A cat ", "sat"),  # the space goes over to the continuation
    ("A cat  \n", "sat on"),
    ("<s>A cat", " sat"),  # bos is there already
    ("A cat" * 400, " sat on the mat"),  # longer than the context
    ("Grüße, 世", "界"),
    (" ", "Once upon a time"),  # white space alone, of every kind
    ("   ", "Once"),
    ("\n\n", "Once upon"),
    ("\t \r\n", " Once upon"),
    ("\u00a0\u2003", "Once"),
    (" ", " "),
    (" " * 400, "Once"),
    ("A cat", "sat"),  # no space at the seam, which may be inside a token
    ("A ca", "t sat on the mat"),
    ("A cat ", " sat"),
    ("A cat", "\n"),
    ("<s> ", "Once"),
    ("<s>", "Once"),
    ("</s>", "Once"),
    (" <s>A", " cat"),
    ("The sea was calm. " * 200 + " \n ", "It was"),
]


def test_edges(backends: tuple[Any, Any]) -> None:
    check_edges(*backends)


@pytest.mark.parametrize("added", ["", "<s>", "<s></s>"])
def test_edges_by_what_a_tokenizer_adds(added: str, backends: tuple[Any, Any]) -> None:
    """No bos, bos, and bos with eos around each text."""
    tokenizer = copy.deepcopy(backends[0].tokenizer)
    start, end = ("<s> " if added else ""), (" </s>" if "</s>" in added else "")
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start}$A{end}", special_tokens=special)
    assert (tokenizer("A").input_ids[0] == tokenizer.bos_token_id) == bool(added)
    ours = MinitronLM(backends[0].model, tokenizer)
    theirs = HFLM(pretrained=backends[1].model, tokenizer=tokenizer, batch_size=4, device="cpu")
    if added:
        check_edges(ours, theirs)
        return
    # The harness asserts that a context has a token; of the white space alone it has none here.
    check_edges(ours, theirs, [pair for pair in EDGES if pair[0].strip() or not pair[0]])
    pairs = [("", " \nOnce"), (" \n", "Once")]
    empty, blank = (ours.loglikelihood([instance(*pair)], disable_tqdm=True)[0] for pair in pairs)
    assert blank == empty


def check_edges(ours_lm: MinitronLM, theirs_lm: HFLM, pairs: list[tuple[str, str]] = EDGES) -> None:
    backends: Any = (ours_lm, theirs_lm)
    requests = [instance(*pair) for pair in pairs]
    ours, theirs = (lm.loglikelihood(requests, disable_tqdm=True) for lm in backends)
    assert [a[0] for a in ours] == pytest.approx([b[0] for b in theirs], abs=1e-4)
    assert [a[1] for a in ours] == [b[1] for b in theirs]
    assert backends[0].truncated[""] >= 1
    for text in ("A cat sat.", "<s>A cat", "", " ", "\n", " <s>"):
        assert backends[0].tok_encode(text) == backends[1].tok_encode(text)


def test_whole_texts(backends: tuple[Any, Any]) -> None:
    requests = [
        instance(text, kind="loglikelihood_rolling")
        for text in ("The sea was calm. " * 200, "A cat.", " ", "\n\n ", "<s>A cat.", "")
    ]
    ours, theirs = (lm.loglikelihood_rolling(requests, disable_tqdm=True) for lm in backends)
    assert ours == pytest.approx(theirs, abs=1e-2)  # a sum over 800 tokens
    tokens = [(("", ""), [5, 6], [7, 8])]
    first, second = (lm._loglikelihood_tokens(tokens, disable_tqdm=True)[0] for lm in backends)
    assert first[0] == pytest.approx(second[0], abs=1e-4)
