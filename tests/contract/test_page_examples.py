"""The examples of the page, as they stand there, with a folder for the repository's name, in a process of their own.

Three differences: `minitron.register()` goes first, the device is the CPU, and `NemotronConfig()` is built on the
meta device because 15 billion parameters do not fit here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from model_samples import CLASSES, build

QUICKSTART = """
    import torch
    from transformers import AutoTokenizer, AutoModelForCausalLM

    # Load the tokenizer and model
    model_path = PATH
    tokenizer  = AutoTokenizer.from_pretrained(model_path)

    device = 'cpu'
    dtype  = torch.bfloat16
    model  = AutoModelForCausalLM.from_pretrained(model_path, torch_dtype=dtype, device_map=device)

    # Prepare the input text
    prompt = 'Complete the paragraph: our solar system is'
    inputs = tokenizer.encode(prompt, return_tensors='pt').to(model.device)

    # Generate the output
    outputs = model.generate(inputs, max_length=20)

    # Decode and print the output
    output_text = tokenizer.decode(outputs[0])
    print(output_text)

    assert type(model).__module__ == "minitron.heads"
    assert model.dtype == torch.bfloat16
    assert output_text.startswith(prompt)
"""

CONFIG = """
    import torch
    with torch.device("meta"):
        from transformers import NemotronModel, NemotronConfig

        # Initializing a Nemotron nemotron-15b style configuration
        configuration = NemotronConfig()

        # Initializing a model from the nemotron-15b style configuration
        model = NemotronModel(configuration)

        # Accessing the model configuration
        configuration = model.config

    assert type(model).__module__ == "minitron.model"
    assert configuration.num_key_value_heads == 48
"""

CAUSAL = """
    from transformers import AutoTokenizer, NemotronForCausalLM

    model = NemotronForCausalLM.from_pretrained(PATH)
    tokenizer = AutoTokenizer.from_pretrained(PATH)

    prompt = "Hey, are you conscious? Can you talk to me?"
    inputs = tokenizer(prompt, return_tensors="pt")

    # Generate
    generate_ids = model.generate(inputs.input_ids, max_length=30)
    text = tokenizer.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]

    assert type(model).__module__ == "minitron.heads"
    assert text.startswith(prompt)
"""

TOKENS = """
    from transformers import AutoTokenizer, NemotronForTokenClassification
    import torch

    tokenizer = AutoTokenizer.from_pretrained(PATH)
    model = NemotronForTokenClassification.from_pretrained(PATH)

    inputs = tokenizer(
        "HuggingFace is a company based in Paris and New York", add_special_tokens=False, return_tensors="pt"
    )

    with torch.no_grad():
        logits = model(**inputs).logits

    predicted_token_class_ids = logits.argmax(-1)

    # Note that tokens are classified rather then input words which means that
    # there might be more predicted token classes than words.
    # Multiple token classes might account for the same word
    predicted_tokens_classes = [model.config.id2label[t.item()] for t in predicted_token_class_ids[0]]

    labels = predicted_token_class_ids
    loss = model(**inputs, labels=labels).loss

    assert type(model).__module__ == "minitron.heads"
    assert set(predicted_tokens_classes) <= {"LABEL_0", "LABEL_1"}
    assert 0 < loss.item() < 1
"""

EXAMPLES = {"quickstart": QUICKSTART, "config": CONFIG, "causal": CAUSAL, "token classification": TOKENS}


def run(code: str, *first: str) -> subprocess.CompletedProcess[str]:
    code = "\n".join([*first, textwrap.dedent(code)])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_pages_examples_run(page_checkpoint: Path) -> None:
    # One process for all of them: importing torch and transformers is what takes the time.
    path = f"PATH = {str(page_checkpoint)!r}"
    steps = [
        f"def example_{i}():\n{textwrap.indent(textwrap.dedent(code), '    ')}"
        for i, code in enumerate(EXAMPLES.values())
    ]
    calls = [f"print('RUN', {name!r}); example_{i}()" for i, name in enumerate(EXAMPLES)]
    done = run("", "import minitron; minitron.register()", path, *steps, *calls)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("RUN") == len(EXAMPLES)


def test_registering_before_and_after_transformers_is_imported() -> None:
    code = """
        import transformers
        import transformers.models.auto.modeling_auto
        from transformers import AutoModelForCausalLM, pipeline
        import minitron
        assert transformers.NemotronForCausalLM.__module__.startswith("transformers.")
        minitron.register()
        minitron.register()
        from transformers import NemotronForCausalLM, NemotronConfig, NemotronPreTrainedModel
        assert NemotronForCausalLM is transformers.NemotronForCausalLM is minitron.NemotronForCausalLM
        assert NemotronConfig is minitron.NemotronConfig
        from transformers import AutoConfig, LlamaConfig, AutoModel
        assert type(AutoConfig.for_model("nemotron")) is minitron.NemotronConfig
        assert type(AutoConfig.for_model("llama")) is LlamaConfig
    """
    done = run(code)
    assert done.returncode == 0, done.stderr


AUTO = dict(
    zip(
        CLASSES,
        (
            "AutoModel",
            "AutoModelForCausalLM",
            "AutoModelForSequenceClassification",
            "AutoModelForQuestionAnswering",
            "AutoModelForTokenClassification",
        ),
        strict=True,
    )
)


@pytest.mark.parametrize("name", CLASSES)
def test_auto_classes_give_ours(name: str, registered: None, tmp_path: Path) -> None:
    import transformers

    import minitron

    saved = build(name)
    saved.save_pretrained(tmp_path)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is minitron.NemotronConfig
    auto = getattr(transformers, AUTO[name])
    for model in (auto.from_pretrained(tmp_path), auto.from_config(saved.config)):
        assert type(model) is getattr(minitron, name)
    assert torch.equal(auto.from_pretrained(tmp_path).base_model.norm.weight, saved.base_model.norm.weight)
