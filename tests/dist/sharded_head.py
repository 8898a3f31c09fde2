"""Losses with the vocabulary split among two processes against those of one: `sharded_head.py STORE_FILE`."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from minitron.ops.head_loss import KINDS, Shard
from minitron.ops.kl import Divergence, linear_divergence, linear_sparse_divergence
from minitron.ops.loss import linear_cross_entropy

SPLIT = 13  # of 30 tokens: unequal parts


def compare(rank: int) -> None:
    """Value and gradients, for every loss."""
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(20, 6).double(), torch.randn(20, 5).double()
    weight, teacher_weight = torch.randn(30, 6).double(), torch.randn(30, 5).double()
    labels = torch.randint(0, 30, (20,))
    labels[3:6] = -100
    ids, shares, entropy = torch.randint(0, 30, (20, 4)), torch.rand(20, 4).double(), torch.rand(20).double()
    top = torch.randint(0, 30, (20,))
    mine = slice(0, SPLIT) if rank == 0 else slice(SPLIT, 30)
    shard = Shard(dist.group.WORLD.group_name, mine.start)  # type: ignore[union-attr]

    def check(loss_of, more: dict) -> None:
        results = []
        for part, where in ((slice(None), None), (mine, shard)):
            h, w = hidden.clone().requires_grad_(), weight[part].clone().requires_grad_()
            found = loss_of(h, w, part, shard=where, **more)
            values = found if isinstance(found, Divergence) else (found,)
            gradients = torch.autograd.grad(values[0] * 3, (h, w))
            results.append((*(v.detach() for v in values), gradients[0], gradients[1] if where else gradients[1][mine]))
        for whole, split in zip(*results, strict=True):
            torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-13)

    for kind in KINDS:
        for temperature, ce_weight in ((1.0, 0.0), (2.0, 0.5)):
            more = {"kind": kind, "temperature": temperature, "ce_weight": ce_weight, "rows_per_chunk": 4}
            check(lambda h, w, p, **o: linear_divergence(h, w, teacher_hidden, teacher_weight[p], labels, **o), more)
    check(lambda h, w, p, **o: linear_sparse_divergence(h, w, ids, shares, entropy, labels, top=top, **o), {})
    check(lambda h, w, p, **o: linear_cross_entropy(h, w, labels, **o), {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    child = os.fork()
    rank = 0 if child else 1
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    compare(rank)
    dist.barrier()
    dist.destroy_process_group()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        print("equal")
