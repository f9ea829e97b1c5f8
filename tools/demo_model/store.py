"""The work folder shared by all stages: atomic writes, and training states that survive a kill."""

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
    """Log to stderr with timestamps."""
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
    """Load a safetensors file; return copies of the memory-mapped tensors."""
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


def is_finished(name: str, result: Path, minutes: float) -> bool:
    """Return whether a stage has a result and has used its minutes; a larger budget resumes it."""
    state = WORK / f"{name}.safetensors"
    if not (result.exists() and state.exists()):
        return result.exists()
    with safe_open(state, "pt") as file:
        return float(file.get_tensor("seconds")) >= 60 * minutes


class TrainingState:
    """Models, averaged weights, optimizer state and step count of one stage; saved regularly, loaded at a restart."""

    def __init__(self, name: str, models: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, decay: float):
        self.path = WORK / f"{name}.safetensors"
        self.models, self.optimizer, self.decay = models, optimizer, decay
        self.average = {k: v.detach().clone() for k, v in self._collect_weights().items()}
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            self._load()

    def _collect_weights(self) -> dict[str, torch.Tensor]:
        return {f"{name}.{k}": v for name, model in self.models.items() for k, v in model.state_dict().items()}

    def _collect_optimizer_tensors(self) -> dict[str, torch.Tensor]:
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
    def update_average(self) -> None:
        """Update the exponential moving average; the decay is smaller at first, which makes short runs useful."""
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        weights = self._collect_weights()
        torch._foreach_lerp_([self.average[k] for k in weights], list(weights.values()), 1 - decay)

    def save(self) -> None:
        """Write the complete state to one file."""
        tensors = {f"now.{k}": v for k, v in self._collect_weights().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        tensors |= {f"slot.{k}": v for k, v in self._collect_optimizer_tensors().items()}
        tensors |= {"step": torch.tensor(self.step), "seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        save_tensors(self.path, tensors)

    def select_average(self, name: str) -> dict[str, torch.Tensor]:
        """Return the averaged weights of one model."""
        return {k.removeprefix(f"{name}."): v for k, v in self.average.items() if k.startswith(f"{name}.")}

    def iterate_progress(
        self,
        minutes: float,
        average_seconds: Callable[[float], float],
        saves: bool = True,
        save_every_sec: float = 120.0,
    ) -> Iterator[float]:
        """Yield the progress 0..1 until the budget is used; the time of earlier runs counts.

        `average_seconds` averages the time over all processes. With `saves`, save the state at intervals and at the
        end.
        """
        last = saved = time.monotonic()
        while self.seconds < 60 * minutes:
            yield self.seconds / (60 * minutes)
            now = time.monotonic()
            self.seconds = average_seconds(self.seconds + now - last)
            last = now
            if saves and now - saved > save_every_sec:
                self.save()
                saved = now
        if saves:
            self.save()
