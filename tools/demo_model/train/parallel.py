"""Training in several processes of one thread each.

Threads within an operation meet thousands of times a step; on a machine that does other work too, each meeting waits
for the slowest. Processes meet once a step.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tools.demo_model.store import start_log


def run(work: Callable[..., None], processes: int, *arguments: object) -> None:
    """Call `work(rank, *arguments)` in each process and wait for all."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (work, processes, Path(folder) / "meeting", arguments), nprocs=processes)


def _enter(rank: int, work: Callable[..., None], processes: int, meeting: Path, arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    start_log()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def mean_over_ranks(value: float) -> float:
    """The mean of a number, the same in every process."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(shared)
    return shared.item() / dist.get_world_size()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))
