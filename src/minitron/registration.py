"""`register()`: transformers uses the classes of this package for models of type "nemotron"."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .config import NemotronConfig
from .heads import (
    NemotronForCausalLM,
    NemotronForQuestionAnswering,
    NemotronForSequenceClassification,
    NemotronForTokenClassification,
)
from .model import NemotronModel, NemotronPreTrainedModel

# The projections that PEFT adapts by default in similar decoders.
LORA_TARGET_MODULES = ["q_proj", "v_proj"]

_CLASSES = (
    (AutoModel, NemotronModel),
    (AutoModelForCausalLM, NemotronForCausalLM),
    (AutoModelForSequenceClassification, NemotronForSequenceClassification),
    (AutoModelForQuestionAnswering, NemotronForQuestionAnswering),
    (AutoModelForTokenClassification, NemotronForTokenClassification),
)


def register() -> None:
    """Make transformers use the classes of this package for Nemotron models, until the process ends.

    Afterwards `AutoConfig`, `AutoModel...` and pipelines build them from any checkpoint of model type "nemotron",
    `from transformers import NemotronForCausalLM` imports them, and PEFT, where it is installed, knows which
    projections LoRA adapts by default. Calling it again has no effect.
    """
    AutoConfig.register(NemotronConfig.model_type, NemotronConfig, exist_ok=True)
    for auto, model in _CLASSES:
        auto.register(NemotronConfig, model, exist_ok=True)
    for module in _transformers_modules():
        for cls in (NemotronConfig, NemotronPreTrainedModel, *(model for _, model in _CLASSES)):
            setattr(module, cls.__name__, cls)
    if importlib.util.find_spec("peft") is not None:
        from peft.utils import constants  # type: ignore[import-not-found]

        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(
            NemotronConfig.model_type, LORA_TARGET_MODULES
        )


def _transformers_modules() -> list[ModuleType]:
    """All module objects of the package transformers that importers may hold.

    It replaces itself in `sys.modules` while it is imported, so that a module that imported it early may hold another
    object than a module that imports it now.
    """
    held = [sys.modules["transformers"]]
    for module in list(sys.modules.values()):
        other = getattr(module, "__dict__", {}).get("transformers")
        if isinstance(other, ModuleType) and other.__name__ == "transformers" and other not in held:
            held.append(other)
    return held
