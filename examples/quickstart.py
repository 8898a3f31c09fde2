"""The quickstart of the transformers page "Nemotron", with a local checkpoint path.

python examples/quickstart.py [CHECKPOINT]
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import minitron

minitron.register()

model_path = sys.argv[1] if len(sys.argv) > 1 else str(minitron.bundled_model())
tokenizer = AutoTokenizer.from_pretrained(model_path)

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16
model = AutoModelForCausalLM.from_pretrained(model_path, torch_dtype=dtype).to(device)

# Prepare the input text
prompt = "Complete the paragraph: our solar system is"
inputs = tokenizer.encode(prompt, return_tensors="pt").to(model.device)

# Generate the output
outputs = model.generate(inputs, max_length=40)

# Decode and print the output
print(tokenizer.decode(outputs[0]))
