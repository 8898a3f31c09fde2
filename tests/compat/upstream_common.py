"""transformers' own common model tests, against our classes or upstream's; `scripts/compat.py` runs them.

$MINITRON_UPSTREAM_TESTS is a folder with the `tests` of a source distribution of transformers, of the release that is
installed; $MINITRON_SUBJECT is "minitron" or "upstream". A distribution has the common tests of models, but neither
those of generation nor of export, from which they inherit: empty classes take their place.
"""

from __future__ import annotations

import os
import random
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from model_samples import CLASSES, SHAPES, UpstreamConfig, upstream

import minitron

SUBJECT = os.environ.get("MINITRON_SUBJECT", "minitron")
VARIANTS = ("gqa", "wide", "biased")


def common_tests() -> type:
    """`ModelTesterMixin` of the unpacked distribution."""
    sys.path.insert(0, str(Path(os.environ["MINITRON_UPSTREAM_TESTS"])))
    absent = {"exporters": ("test_export", "ExportTesterMixin"), "generation": ("test_utils", "GenerationTesterMixin")}
    for folder, (name, cls) in absent.items():
        package, module = ModuleType(f"tests.{folder}"), ModuleType(f"tests.{folder}.{name}")
        package.__path__ = []
        setattr(module, cls, type(cls, (), {}))
        sys.modules |= {package.__name__: package, module.__name__: module}
    from tests.test_modeling_common import ModelTesterMixin  # type: ignore[import-not-found]

    return ModelTesterMixin


class ModelTester:
    """What the common tests ask for configurations and inputs."""

    batch_size, seq_length, is_training = 5, 7, True
    vocab_size, hidden_size, intermediate_size, num_hidden_layers = 99, 32, 48, 2
    num_labels, type_sequence_label_size, num_choices = 3, 3, 4

    def __init__(self, parent: Any, **shape: Any) -> None:
        self.shape = {"num_attention_heads": 4, "num_key_value_heads": 2, **shape}
        self.num_attention_heads = self.shape["num_attention_heads"]
        self.num_key_value_heads = self.shape["num_key_value_heads"]

    def get_config(self) -> Any:
        config = minitron.NemotronConfig if SUBJECT == "minitron" else UpstreamConfig
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_labels")
        return config(
            **{name: getattr(self, name) for name in names},
            **self.shape,
            max_position_embeddings=512,
            initializer_range=0.02,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        ids = torch.tensor([[random.randint(3, self.vocab_size - 1) for _ in range(shape[1])] for _ in range(shape[0])])
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.long).tril()}


def case(variant: str) -> type:
    """A test case of one variant for all five classes."""
    module = minitron if SUBJECT == "minitron" else upstream

    class Case(common_tests(), unittest.TestCase):  # type: ignore[misc]
        all_model_classes = tuple(getattr(module, name) for name in CLASSES)

        def setUp(self) -> None:
            self.model_tester = ModelTester(self, **SHAPES[variant])

        def test_generation_tester_mixin_inheritance(self) -> None:
            self.skipTest("the tests of generation are not in the distribution")

    Case.__name__ = Case.__qualname__ = f"Test_{variant}"
    return Case


if SUBJECT == "minitron":
    minitron.register()
for name in VARIANTS:
    globals()[f"Test_{name}"] = case(name)
