"""Runs megatron-core on the CPU: `save FOLDER RANKS` writes a checkpoint, `load FOLDER` reads one and runs it.

A program of its own, because megatron-core wants a process group and three patches to do without a GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys

import torch

SHAPE = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 4, "num_query_groups": 2,
         "kv_channels": 24}  # fmt: skip
VOCABULARY = 384
IDS = [1, 5, 9, 200, 33, 383]


def model(world: int, dtype: torch.dtype):
    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        **SHAPE, use_cpu_initialization=True, normalization="LayerNorm", activation_func=squared_relu,
        add_bias_linear=False, tensor_model_parallel_size=world, params_dtype=dtype, bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype, gradient_accumulation_fusion=False, persist_layer_norm=False, hidden_dropout=0.0,
        masked_softmax_fusion=False, attention_dropout=0.0,
    )  # fmt: skip
    built = GPTModel(
        config, get_gpt_layer_local_spec(normalization="LayerNorm"), vocab_size=VOCABULARY, max_sequence_length=64,
        position_embedding_type="rope", rotary_percent=0.5, share_embeddings_and_output_weights=False,
    )  # fmt: skip
    return built.to(dtype)


def run(rank: int, mode: str, folder: str, world: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["WORKER_PORT"])
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    parallel_state.initialize_model_parallel(world, 1)
    torch.manual_seed(rank)
    if mode == "save":
        built = model(world, torch.bfloat16)
        os.makedirs(f"{folder}/model_weights", exist_ok=True)
        dist_checkpointing.save(built.sharded_state_dict(prefix="model."), f"{folder}/model_weights")
        plain = {name: value for name, value in built.state_dict().items() if isinstance(value, torch.Tensor)}
        torch.save(plain, f"{folder}/rank{rank}.pt")
    else:
        built = model(1, torch.float32).eval()
        loaded = dist_checkpointing.load(built.sharded_state_dict(prefix="model."), f"{folder}/model_weights")
        built.load_state_dict({name.removeprefix("model."): value for name, value in loaded.items()})
        size = len(IDS)
        mask = torch.triu(torch.ones(1, 1, size, size, dtype=torch.bool), 1)
        with torch.no_grad():
            logits = built(torch.tensor([IDS]), torch.arange(size)[None], mask)
        torch.save(logits, f"{folder}/logits.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    mode, folder, world = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1
    torch.multiprocessing.spawn(run, args=(mode, folder, world), nprocs=world)
