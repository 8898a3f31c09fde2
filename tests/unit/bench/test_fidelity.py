"""KL and perplexity of weight formats, against the definition on the model's own logits."""

from __future__ import annotations

import pytest
import torch
from engine_models import some_tokens, tiny_model

from minitron.bench.fidelity import fidelity


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
