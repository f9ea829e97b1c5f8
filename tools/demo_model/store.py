"""Where the work lies between stages, and how it is written: whole or not at all, so that a killed run goes on."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".work" / "demo"
MODEL = ROOT / "linfusion_cli" / "models" / "demo"
log = logging.getLogger("demo_model")


def start_log() -> None:
    """Log to stderr, with the time."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "diffusers", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, scratch, metadata=metadata)
    scratch.replace(path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, copied out of the map."""
    return {k: v.clone() for k, v in load_file(path).items()}


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with scratch.open("wb") as file:
        np.save(file, array)
    scratch.replace(path)


def save_json(path: Path, value: object) -> None:
    """Write JSON under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)


def finished(name: str, result: Path, minutes: float) -> bool:
    """Whether a stage has its result and no budget left; a larger budget than last time lets it go on."""
    state = WORK / f"{name}.safetensors"
    if not (result.exists() and state.exists()):
        return result.exists()
    with safe_open(state, "pt") as file:
        return float(file.get_tensor("seconds")) >= 60 * minutes


class TrainingState:
    """Model, averaged model, optimiser and step count of one stage, saved now and then, found again after a kill."""

    def __init__(self, name: str, models: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, decay: float):
        self.path = WORK / f"{name}.safetensors"
        self.models, self.optimizer, self.decay = models, optimizer, decay
        self.average = {k: v.detach().clone() for k, v in self._weights().items()}
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            self._load()

    def _weights(self) -> dict[str, torch.Tensor]:
        return {f"{name}.{k}": v for name, model in self.models.items() for k, v in model.state_dict().items()}

    def _slots(self) -> dict[str, torch.Tensor]:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {
            f"{i}.{k}": v
            for i, p in enumerate(parameters)
            for k, v in self.optimizer.state.get(p, {}).items()
            if k != "step"
        }

    def _load(self) -> None:
        saved = load_tensors(self.path)
        for name, model in self.models.items():
            model.load_state_dict({k: saved[f"now.{name}.{k}"] for k in model.state_dict()})
        self.average = {k: saved[f"average.{k}"] for k in self.average}
        self.step, self.seconds = int(saved["step"]), float(saved["seconds"])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, parameter in enumerate(parameters):
            if f"slot.{i}.exp_avg" in saved:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": saved[f"slot.{i}.exp_avg"],
                    "exp_avg_sq": saved[f"slot.{i}.exp_avg_sq"],
                }

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the weights; faster at first, so that a short run has a useful one."""
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        weights = self._weights()
        torch._foreach_lerp_([self.average[k] for k in weights], list(weights.values()), 1 - decay)

    def save(self) -> None:
        """Everything, in one file."""
        tensors = {f"now.{k}": v for k, v in self._weights().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        tensors |= {f"slot.{k}": v for k, v in self._slots().items()}
        tensors |= {"step": torch.tensor(self.step), "seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        save_tensors(self.path, tensors)

    def averaged(self, name: str) -> dict[str, torch.Tensor]:
        """Averaged weights of one of the models."""
        return {k.removeprefix(f"{name}."): v for k, v in self.average.items() if k.startswith(f"{name}.")}

    def ticks(
        self, minutes: float, agree: Callable[[float], float], keeps: bool = True, save_every_sec: float = 120.0
    ) -> Iterator[float]:
        """Progress 0..1 until the budget is spent, time of earlier runs counting.

        `agree` makes one time of those of all processes; the one that `keeps` the state saves it on the way and at
        the end.
        """
        last = saved = time.monotonic()
        while self.seconds < 60 * minutes:
            yield self.seconds / (60 * minutes)
            now = time.monotonic()
            self.seconds = agree(self.seconds + now - last)
            last = now
            if keeps and now - saved > save_every_sec:
                self.save()
                saved = now
        if keeps:
            self.save()
