"""Distillation in a training loop of your own: `transformers.Trainer` with this package's loss.

python examples/distill_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

import minitron
from minitron.data.packing import Batch
from minitron.distill.losses import DistillLoss, DistillOptions
from minitron.distill.targets import OnlineTeacher


class DistillTrainer(Trainer):
    """A trainer whose loss is the distance to a teacher; `distance` is any `DistillLoss`."""

    def __init__(self, *args, distance: DistillLoss, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.distance, self.numbers = distance, {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, labels = inputs["input_ids"], inputs["labels"]
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        count = num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != -100).sum()
        loss, self.numbers = self.distance(model, Batch(ids, positions, labels, int(count)))
        return (loss, {"loss": loss}) if return_outputs else loss


folder = minitron.bundled_model()
tokenizer = AutoTokenizer.from_pretrained(folder)
teacher = minitron.NemotronForCausalLM.from_pretrained(folder, dtype=torch.float32)
shape = {**teacher.config.to_dict(), "num_hidden_layers": 1}
student = minitron.NemotronForCausalLM(minitron.NemotronConfig(**shape))
student.load_state_dict({k: v for k, v in teacher.state_dict().items() if k in student.state_dict()})

texts = ["Once upon a time there was a dog.", "The girl found a red ball in the garden and smiled."] * 8
rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts).input_ids]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    padded = {"input_ids": tokenizer.eos_token_id, "labels": -100}
    return {k: torch.tensor([r[k] + [p] * (length - len(r[k])) for r in rows]) for k, p in padded.items()}


with tempfile.TemporaryDirectory() as out:
    plan = {"per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 1e-3, "report_to": "none"}
    settings = TrainingArguments(out, use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=4, **plan)
    distance = DistillLoss(OnlineTeacher(teacher), DistillOptions(), student.config)
    trainer = DistillTrainer(student, settings, train_dataset=rows, data_collator=collate, distance=distance)
    trainer.train()
    print({name: round(float(value), 3) for name, value in trainer.numbers.items()})
