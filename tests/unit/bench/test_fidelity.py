"""KL and perplexity of weight formats, against the definition on the model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import some_tokens, tiny_model
from family_samples import kind_config, small_model

from minitron.bench.fidelity import fidelity, loop_differences
from minitron.families import family_of
from minitron.family_models import causal_lm_class


def test_fidelity() -> None:
    model = tiny_model(torch.float32)
    pieces = [some_tokens(20, seed=1), some_tokens(13, seed=2)]
    peers = {"torch": lambda tokens: model(torch.tensor([tokens])).logits[0].detach()}
    plain, lossless, fine, coarse, peer = fidelity(model, pieces, ("fp32", "int8", "int4"), peers)
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(model(torch.tensor([piece])).logits[0, :-1], torch.tensor(piece[1:]))
            for piece in pieces
        ]
    expected = torch.exp((losses[0] * 19 + losses[1] * 12) / 31)
    assert plain.perplexity == pytest.approx(float(expected), rel=1e-4)
    assert plain.tokens == 31
    assert plain.kl == lossless.kl == 0
    assert 0 < fine.kl < coarse.kl
    assert plain.same_best == peer.same_best == 1
    assert (peer.format, peer.nbytes) == ("torch", 0)
    assert abs(peer.kl) < 1e-9
    assert coarse.nbytes < fine.nbytes < plain.nbytes


def test_loops_that_differ_are_judged_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    config = kind_config("qwen3")
    model = causal_lm_class(family_of(config))(config).eval()
    model.load_state_dict(small_model(config).state_dict())
    prompts = [some_tokens(length, seed=length) for length in (5, 9, 3)]
    assert loop_differences(model, prompts, 6, rows=2) == []
    generate = type(model).generate

    def with_wrong_engine(self: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        found = generate(self, ids, **options)
        if options["engine"] == "auto" and len(ids) == 1:  # the last batch: the third of its new tokens is another
            found[0, -4] = (found[0, -4] + 1) % config.vocab_size
        return found

    monkeypatch.setattr(type(model), "generate", with_wrong_engine)
    (difference,) = loop_differences(model, prompts, 6, rows=2)
    assert (difference.prompt, difference.position) == (2, 2)
    monkeypatch.undo()
    text = model.generate(torch.tensor([prompts[2]]), max_new_tokens=3, do_sample=False, engine="off")
    with torch.inference_mode():
        logits = small_model(config).double()(text[:, :-1]).logits[0, -1]
    best = int(text[0, -1])
    assert difference.gap == pytest.approx(float(logits[(best + 1) % config.vocab_size] - logits[best]), rel=1e-4)
    assert difference.gap < 0
    assert not difference.near_tie
