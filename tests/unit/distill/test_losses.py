"""The losses of the paper against float64 formulas over whole logits and all hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_run import small_stream
from torch import Tensor, nn

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.data.packing import Batch
from minitron.distill.losses import DistillLoss, DistillOptions
from minitron.distill.targets import OnlineTeacher


def model(seed: int, hidden: int, layers: int, **more: Any) -> NemotronForCausalLM:
    torch.manual_seed(seed)
    values = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24, **more}
    ids = {"bos_token_id": None, "eos_token_id": None, "vocab_size": 50}
    config = NemotronConfig(
        hidden_size=hidden, num_hidden_layers=layers, initializer_range=0.3, max_position_embeddings=32, **ids, **values
    )
    made = NemotronForCausalLM(config).double()
    with torch.no_grad():  # norms that matter
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.normal_(std=0.2)
    return made


def pair() -> tuple[NemotronForCausalLM, NemotronForCausalLM]:
    return model(0, 16, 5), model(1, 12, 4)


def batch() -> Batch:
    return small_stream().batches(0, 3, 3)[0]


def scored(values: Tensor, of: Batch) -> Tensor:
    """Rows (n, ...) of positions whose next token is a target, of (B, T, ...)."""
    rows = [values[b, t] for b in range(3) for t in range(values.shape[1] - 1) if of.labels[b, t + 1] != -100]
    return torch.stack(rows)


def logits(net: nn.Module, of: Batch) -> Tensor:
    return scored(net(input_ids=of.input_ids, position_ids=of.position_ids, use_cache=False).logits, of)


def next_tokens(of: Batch) -> Tensor:
    return torch.stack([of.labels[b, t + 1] for b in range(3) for t in range(15) if of.labels[b, t + 1] != -100])


def softmax(x: Tensor) -> Tensor:
    e = (x - x.max(dim=-1, keepdim=True).values).exp()
    return e / e.sum(dim=-1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(dim=-1).mean()


FORMULAS = {
    "forward_kl": lambda s, t: kl(t, s),
    "reverse_kl": lambda s, t: kl(s, t),
    "jsd": lambda s, t: (kl(t, (s + t) / 2) + kl(s, (s + t) / 2)) / 2,
}


def gradients(loss: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (2.0, 0.0), (0.5, 0.7), (1.0, 1.0)])
def test_logit_losses_and_their_gradients_are_the_formulas(kind: str, temperature: float, ce_weight: float) -> None:
    teacher, student = pair()
    of = batch()
    options = DistillOptions(kind=kind, temperature=temperature, ce_weight=ce_weight)
    loss, numbers = DistillLoss(OnlineTeacher(teacher), options, student.config)(student, of)
    s, t = logits(student, of), logits(teacher, of).detach()
    divergence = FORMULAS[kind](softmax(s / temperature), softmax(t / temperature))
    ce = -softmax(s).gather(1, next_tokens(of)[:, None]).log().mean()
    expected = divergence + ce_weight * ce
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(gradients(loss, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    name = "kl" if kind == "forward_kl" else kind
    assert set(numbers) == {name, "ce", "top1"}
    assert numbers[name] == pytest.approx(divergence.item(), rel=1e-12)
    assert numbers["ce"] == pytest.approx(ce.item(), rel=1e-12)
    assert numbers["top1"] == pytest.approx((s.argmax(-1) == t.argmax(-1)).double().mean().item())


def test_a_student_equal_to_its_teacher_has_no_distance() -> None:
    teacher, of = model(0, 16, 5), batch()
    for kind in FORMULAS:
        loss, numbers = DistillLoss(OnlineTeacher(teacher), DistillOptions(kind=kind), teacher.config)(teacher, of)
        assert abs(loss.item()) < (1e-14 if kind == "jsd" else 1e-300)
        assert numbers["top1"] == 1
        assert all(g.abs().max() < 1e-15 for g in gradients(loss, teacher))


def states(net: NemotronForCausalLM, of: Batch, layer: int) -> Tensor:
    """By the paper's words: the output of a block (-1: the embedding), after the layer norm that reads it."""
    out = net.model(
        input_ids=of.input_ids, position_ids=of.position_ids, output_hidden_states=True, use_cache=False
    ).hidden_states
    if layer == len(net.model.layers) - 1:
        return scored(out[-1], of)
    return scored(net.model.layers[layer + 1].input_layernorm(out[layer + 1]), of)


@pytest.mark.parametrize("measure", ["cosine", "mse"])
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("layer_map", [None, ((4, 3), (0, 1))])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_hidden_state_losses_are_the_formulas(measure: str, embeddings: bool, layer_map: Any, alpha: Any) -> None:
    teacher, student = pair()
    of = batch()
    options = DistillOptions(hidden=measure, embeddings=embeddings, layer_map=layer_map, alpha=alpha)
    whole = DistillLoss(OnlineTeacher(teacher), options, student.config).double()
    loss, numbers = whole(student, of)
    assert whole.projection is not None
    between = torch.zeros((), dtype=torch.float64)
    pairs = ((2, 1),) if layer_map is None else layer_map  # the third from the end of 5 and of 4 layers
    for t_layer, s_layer in (*pairs, *([(-1, -1)] if embeddings else [])):
        s = states(student, of, s_layer) @ whole.projection.weight.t()
        t = states(teacher, of, t_layer).detach()
        if measure == "cosine":
            between = between + (1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))).mean()
        else:
            between = between + ((s - t) ** 2).mean()
    distance = kl(softmax(logits(teacher, of)).detach(), softmax(logits(student, of)))
    weight = (distance / between).detach() if alpha is None else alpha
    expected = distance + weight * between
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert numbers["hidden"] == pytest.approx(between.item(), rel=1e-12)
    assert numbers["alpha"] == pytest.approx(float(weight), rel=1e-12)
    for net in (student, whole):
        for ours, theirs in zip(gradients(loss, net), gradients(expected, net), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    teacher, student = pair()
    options = DistillOptions(hidden="cosine", alpha=2.0, ce_weight=0.5)
    whole = DistillLoss(OnlineTeacher(teacher), options, student.config).double()
    (together,) = small_stream().batches(0, 4, 4)
    loss, numbers = whole(student, together)
    parts = [whole(student, part) for part in small_stream().batches(0, 4, 1)]
    assert sum(part.item() for part, _ in parts) == pytest.approx(loss.item(), rel=1e-12)
    for name, value in numbers.items():
        assert sum(more[name] for _, more in parts) == pytest.approx(value.item(), rel=1e-12)


def test_the_teacher_gets_no_gradient_and_keeps_its_mode() -> None:
    teacher, student = pair()
    teacher.train()
    loss, _ = DistillLoss(OnlineTeacher(teacher), DistillOptions(hidden="mse"), student.config).double()(
        student, batch()
    )
    loss.backward()
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_hidden_states_survive_gradient_checkpointing() -> None:
    teacher, student = pair()
    whole = DistillLoss(OnlineTeacher(teacher), DistillOptions(hidden="cosine"), student.config).double()
    plain = gradients(whole(student, batch())[0], student)
    student.train()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    loss, _ = whole(student, batch())
    loss.backward()
    for ours, theirs in zip([p.grad for p in student.parameters()], plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "kl"}, "kind is 'kl'; it must be one of forward_kl, reverse_kl, jsd"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be greater than 0"),
        ({"ce_weight": -1.0}, "ce_weight is -1.0; it must be 0 or more"),
        ({"hidden": "l1"}, "hidden is 'l1'; it must be one of cosine, mse, or None"),
        ({"embeddings": True}, "set hidden to cosine or mse"),
    ],
)
def test_options_that_cannot_be_are_refused(values: dict, says: str) -> None:
    with pytest.raises(ValueError, match=r"it must be|set hidden") as error:
        DistillOptions(**values)
    assert says in str(error.value)


def test_models_that_do_not_fit_are_refused() -> None:
    teacher, _ = pair()
    with pytest.raises(ValueError, match="the teacher has 50 tokens and the student 60"):
        DistillLoss(OnlineTeacher(teacher), DistillOptions(), NemotronConfig(vocab_size=60))
    with pytest.raises(
        ValueError, match=r"has \d layers and the student 2: name pairs of layers, such as --layer-map \d:1"
    ):
        DistillLoss(OnlineTeacher(teacher), DistillOptions(hidden="mse"), model(0, 8, 2).config)
    with pytest.raises(ValueError, match=r"layer map 2:3 does not fit; .* the student's 0 to 1"):
        DistillLoss(OnlineTeacher(teacher), DistillOptions(hidden="mse", layer_map=((2, 3),)), model(0, 8, 2).config)
    teacher.lm_head = nn.Linear(16, 50, bias=True).double()
    with pytest.raises(ValueError, match="needs a plain linear layer without bias"):
        DistillLoss(OnlineTeacher(teacher), DistillOptions(), teacher.config)(teacher, batch())
