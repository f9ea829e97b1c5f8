"""Train in several single-threaded processes.

Threads within an operation synchronise thousands of times per step, and each time the slowest one delays all others if
the machine is busy. Processes synchronise once per step.
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
    """Call `work(rank, *arguments)` in each process and wait for all processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run_rank, (work, processes, Path(folder) / "rendezvous", arguments), nprocs=processes)


def _run_rank(
    rank: int, work: Callable[..., None], processes: int, rendezvous: Path, arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    start_log()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def mean_over_ranks(value: float) -> float:
    """Return the mean of `value` over all processes."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(shared)
    return shared.item() / dist.get_world_size()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))
