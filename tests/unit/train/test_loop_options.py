"""What the loop can do besides: skip spikes, keep less in memory, other optimizers, a teacher that learns."""

from __future__ import annotations

import copy
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_distillation import small_teacher
from small_run import small_config, small_model, small_stream
from torch import nn

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.data.packing import Batch, collate
from minitron.distill.correction import CorrectedTeacher, CorrectingLoss
from minitron.distill.losses import DistillLoss, DistillOptions
from minitron.distill.recipe import require_same_tokens
from minitron.distill.targets import OnlineTeacher
from minitron.ops.packed_attention import packed_attention_in
from minitron.train.adapters import choose_trained
from minitron.train.loop import train
from minitron.train.memory import activation_bytes, estimate_memory, require_fit
from minitron.train.objective import Objective, next_token_loss
from minitron.train.optimizers import load_state, make_optimizer, set_rate, state_tensors
from minitron.train.parallel import prepare
from minitron.train.run_folder import TrainError
from minitron.train.schedule import TrainConfig
from minitron.world import World

# --- spikes ------------------------------------------------------------------------------------------------------


def poisoned(steps: set[int], factor: float):
    """The usual loss, times `factor` in those steps (from 1), of two passes each."""
    calls = [0]

    def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        calls[0] += 1
        value, numbers = next_token_loss(model, batch)
        return value * (factor if (calls[0] + 1) // 2 in steps else 1.0), numbers

    return loss


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_no_number_is_left_out_and_told(
    tmp_path: Path, factor: float, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_config(6, on_spike="skip", save_every=3, dtype="float32")
    model = small_model()
    result = train(model, small_stream(), config, tmp_path / "run", loss=poisoned({2, 4}, factor), quiet=True)
    assert result.skipped == 2
    assert all(p.isfinite().all() for p in model.parameters())
    assert "step 4: the loss is" in capfd.readouterr().err
    # The same as if the optimizer had not been asked in these steps: the data went on, the weights did not.
    plain, stream = small_model(), small_stream()
    optimizer = make_optimizer([(1.0, list(plain.parameters()))], config)
    for step in range(6):
        if step + 1 not in {2, 4}:
            for batch in stream.batches(4 * step, 4, 2):
                next_token_loss(plain, batch)[0].backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            set_rate(optimizer, 3e-3 * min(1, (step + 1) / 5) * min(1.0, (1 - step / 6) / 0.2))
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_a_spike_is_judged_by_the_usual_gradient(tmp_path: Path) -> None:
    config = small_config(60, on_spike="skip", spike=20.0, save_every=0)
    result = train(small_model(), small_stream(), config, tmp_path / "a", loss=poisoned({55}, 1e4), quiet=True)
    assert result.skipped == 1
    stopping = replace(config, on_spike="stop")
    with pytest.raises(TrainError, match=r"step 55: the loss is .* times the usual, so training stopped\. .*on_spike"):
        train(small_model(), small_stream(), stopping, tmp_path / "b", loss=poisoned({55}, 1e4), quiet=True)


def test_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    config = small_config(30, on_spike="skip", save_every=0)
    with pytest.raises(TrainError, match=r"step 13: .* after 10 updates in a row were skipped"):
        train(small_model(), small_stream(), config, tmp_path, loss=poisoned(set(range(3, 40)), math.nan), quiet=True)


# --- memory ------------------------------------------------------------------------------------------------------


def kept_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes that autograd keeps for the backward pass of the layers, weights left out, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        keep.append(value)
        return value

    keep: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)  # type: ignore[operator]
    return sum(kept.values())


def wide_model() -> NemotronForCausalLM:
    torch.manual_seed(0)
    shape = {**small_model().config.to_dict(), "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    return NemotronForCausalLM(NemotronConfig(**{**shape, "head_dim": 16, "num_attention_heads": 4}))


@pytest.mark.parametrize("recompute", ["mlp", "layers"])
def test_recomputation_gives_the_same_gradients_bit_for_bit_and_keeps_less(recompute: str) -> None:
    batch = small_stream().batches(0, 4, 4)[0]
    plain, frugal = wide_model().train(), wide_model().train()
    prepare(Objective(frugal, next_token_loss), small_config(1, recompute=recompute), World())
    expected, found = next_token_loss(plain, batch)[0], next_token_loss(frugal, batch)[0]
    assert torch.equal(expected, found)
    expected.backward()
    found.backward()
    for (name, left), right in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert left.grad is not None
        assert torch.equal(left.grad, right.grad), name  # type: ignore[arg-type]
    neurons = 4 * 4 * 4 * 16 * 256  # layers, bytes, blocks, tokens, neurons: one tensor of them in each layer
    saved = kept_bytes(plain, batch) - kept_bytes(frugal, batch)
    assert saved == neurons if recompute == "mlp" else saved > 2 * neurons
    prepare(Objective(frugal, next_token_loss), small_config(1), World())  # and back again
    assert kept_bytes(frugal, batch) == kept_bytes(plain, batch)


def test_compiled_layers_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured as graphs, packed attention between them; code for a processor takes too long to make here."""
    monkeypatch.setattr(nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", captured(self)))
    graphs: list[torch.fx.GraphModule] = []

    def captured(module: nn.Module):
        def note(graph: torch.fx.GraphModule, _: object):
            graphs.append(graph)
            return graph

        return torch.compile(module._call_impl, backend=note)

    torch.manual_seed(0)
    shape = NemotronConfig(60, 32, 64, 2, 4, num_key_value_heads=2, max_position_embeddings=128)
    plain = NemotronForCausalLM(shape).train()
    compiled = copy.deepcopy(plain)
    prepare(Objective(compiled, next_token_loss), small_config(1, compile=True), World())
    batch = collate([[torch.randint(0, 60, (n,)).numpy() for n in (70, 58)]], 128)
    with packed_attention_in(plain, compiled):
        expected, found = next_token_loss(plain, batch)[0], next_token_loss(compiled, batch)[0]
        expected.backward()
        found.backward()
    assert len(graphs) >= 2
    torch.testing.assert_close(found, expected)
    for (name, left), right in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("recompute", ["none", "mlp", "layers"])
def test_the_arithmetic_of_activations_is_near_what_autograd_keeps(recompute: str) -> None:
    batch = small_stream().batches(0, 4, 4)[0]
    model = wide_model().train()
    prepare(Objective(model, next_token_loss), small_config(1, recompute=recompute), World())
    counted = activation_bytes(model.config, 4 * 16, 4, recompute)
    measured = kept_bytes(model, batch)
    if recompute == "layers":  # the arithmetic adds one layer's worth, which exists in the backward pass only
        counted -= activation_bytes(model.config, 4 * 16, 4, "none") // 4
    assert counted == pytest.approx(measured, rel=0.35)


def test_a_run_that_cannot_fit_says_what_would() -> None:
    student, teacher = NemotronConfig.preset("minitron-4b"), NemotronConfig.preset("nemotron-4-15b")
    config = TrainConfig(steps=1, batch=32, sequence=4096)
    need = estimate_memory(student, replace(config, micro_batch=1), teacher, bfloat16=True)
    assert need.teacher == pytest.approx(31.3e9, rel=0.02)  # 15.63 billion parameters in bfloat16
    assert need.weights == pytest.approx(4.19e9 * 18, rel=0.01)
    with pytest.raises(TrainError, match=r"needs about .* GB of memory and 139.0 GB .*fit with --micro-batch"):
        require_fit(student, config, teacher, 139_000_000_000, bfloat16=True)
    with pytest.raises(TrainError, match=r"No setting makes it fit; take more processes or a cache"):
        require_fit(student, config, teacher, 20_000_000_000, bfloat16=True)
    fitting = replace(config, micro_batch=1, recompute="layers")
    assert require_fit(student, fitting, teacher, 139_000_000_000, bfloat16=True).total < 139e9
    assert require_fit(student, config, teacher, None).total > 139e9


# --- optimizers --------------------------------------------------------------------------------------------------


def test_8_bit_averages_come_back_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # compiling takes a minute here
    config = small_config(1, optimizer="adamw8bit")

    def fresh() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(64, 128)
        return layer, make_optimizer([(0.5, list(layer.parameters()))], config)

    def steps(layer: nn.Linear, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            layer(torch.randn(4, 64)).square().mean().backward()
            set_rate(optimizer, 1e-2)
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = fresh()
    steps(whole, optimizer, range(6))
    half, optimizer = fresh()
    steps(half, optimizer, range(3))
    tensors = state_tensors(optimizer, half.named_parameters())
    assert tensors["exp_avg/codes.weight"].dtype == torch.uint8
    again, optimizer = fresh()
    again.load_state_dict(half.state_dict())
    load_state(optimizer, again.named_parameters(), {name: value.clone() for name, value in tensors.items()})
    steps(again, optimizer, range(3, 6))
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.bias, whole.bias)


def test_offloading_without_a_gpu_is_refused() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(TrainError, match="'offload' moves state from a GPU"):
        make_optimizer([(1.0, list(small_model().parameters()))], small_config(1, optimizer="offload"))


# --- teacher correction ------------------------------------------------------------------------------------------


def test_a_teacher_beside_the_student_gets_the_gradient_of_its_own_loss() -> None:
    student, teacher, apart = small_model(), small_teacher(), small_teacher()
    batch = small_stream().batches(0, 4, 4)[0]
    loss = CorrectingLoss(DistillLoss(CorrectedTeacher(teacher), DistillOptions(), student.config))
    value, numbers = loss(student, batch)
    value.backward()
    own, _ = next_token_loss(apart, batch)
    own.backward()
    assert numbers["teacher_ce"] == pytest.approx(own.item(), rel=1e-6)
    for (name, left), right in zip(teacher.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-7, msg=name)
    # The student's part is that of a teacher who does not learn.
    other = small_model()
    expected, _ = DistillLoss(OnlineTeacher(apart), DistillOptions(), other.config)(other, batch)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, left), right in zip(student.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(left.grad, right[1].grad, rtol=1e-4, atol=1e-7, msg=name)  # type: ignore[union-attr]


def test_the_teachers_learning_rate_is_a_share_of_the_students() -> None:
    student, teacher = small_model(), small_teacher()
    loss = CorrectingLoss(DistillLoss(CorrectedTeacher(teacher), DistillOptions(), student.config), 0.2)
    optimizer = make_optimizer(Objective(student, loss).groups(), small_config(1))
    set_rate(optimizer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in student.parameters()} == {1e-3}
    assert {rates[id(p)] for p in teacher.parameters()} == {1e-3 * 0.2}


def test_adapters_are_made_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_trained(small_model(), "lora")


def test_what_is_trained_is_chosen() -> None:
    norms = choose_trained(small_model(), "norms")
    assert {name for name, p in norms.named_parameters() if p.requires_grad} == {
        name for name, _ in norms.named_parameters() if "norm" in name
    }
    with pytest.raises(TrainError, match="tune is 'bias'; it must be one of full, norms, head, lora"):
        choose_trained(small_model(), "bias")
    with pytest.raises(TrainError, match="tune 'head' needs a model with a head of its own"):
        choose_trained(small_model(), "head")
    with pytest.raises(TrainError, match="rank of the adapters is 0"):
        choose_trained(small_model(), "lora", 0)


# --- what belongs together ---------------------------------------------------------------------------------------


class Words:
    """A tokenizer of whole words."""

    def __init__(self, words: list[str], bos: int = 0, cut: str = " ") -> None:
        self.words, self.bos_token_id, self.eos_token_id, self.cut = words, bos, 1, cut

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)

    def __call__(self, texts: list[str], add_special_tokens: bool):
        return type("Ids", (), {"input_ids": [[len(part) for part in text.split(self.cut)] for text in texts]})


def test_tokenizers_that_differ_are_refused_with_what_differs() -> None:
    ours = Words(["a", "b"])
    require_same_tokens(ours, Words(["a", "b"]), "S", "T")
    for theirs, says in (
        (Words(["a", "c"]), "token 'b' is 1 in the student's and None in the teacher's"),
        (Words(["a", "b"], bos=1), "bos_token_id is 0 in the student's and 1 in the teacher's"),
        (Words(["a", "b"], cut="x"), "into different tokens"),
    ):
        with pytest.raises(TrainError, match="the tokenizers of S and T differ: ") as error:
            require_same_tokens(ours, theirs, "S", "T")
        assert says in str(error.value)


def test_operations_are_those_of_the_published_comparison() -> None:
    """15B forward 28.1 and 4B training 20.4 GFLOP per token without attention; minitron.md 5.2."""
    teacher, student = NemotronConfig.preset("nemotron-4-15b"), NemotronConfig.preset("minitron-4b")
    assert student.training_flops_per_token(1) == pytest.approx(20.4e9, rel=0.01)
    assert student.training_flops_per_token(1, teacher) == pytest.approx(48.5e9, rel=0.01)


def test_mfu_is_speed_times_operations_over_the_peak(tmp_path: Path) -> None:
    config = small_config(2, save_every=0)
    train(small_model(), small_stream(), config, tmp_path / "r", quiet=True, peak_flops=1e9, flops_per_token=1e4)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["mfu"] == pytest.approx(row["tokens_per_second"] * 1e-5) for row in rows)
