"""Commands that several processes run together, where torchrun has started them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

_STARTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets in the environment of each process."""


@contextmanager
def joined(wanted: bool = True) -> Iterator[int]:
    """Join the processes that torchrun has started, for the context; yields the rank of this one, 0 if it is alone."""
    several = wanted and set(_STARTED) <= set(os.environ) and os.environ["WORLD_SIZE"] != "1"
    if not (several and dist.is_available()) or dist.is_initialized():
        yield _rank_and_size()[0]
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def own_share(indices: Sequence[int], batch_size: int) -> list[int]:
    """The samples of every n-th batch, for n processes: those of this one."""
    rank, size = _rank_and_size()
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return [index for batch in batches[rank::size] for index in batch]


def share_weights(model: nn.Module) -> None:
    """Give the model of each process the weights of the first: they may be random."""
    if _rank_and_size()[1] > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def _rank_and_size() -> tuple[int, int]:
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
