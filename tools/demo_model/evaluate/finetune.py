"""Fine-tunes of the shipped UNet, with its own softmax attention, on one kind of scene each.

`merges` measures on them what LinFusion's weights, made for the base, are worth to a checkpoint that has gone on.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from tools.demo_model.evaluate.errors import encode
from tools.demo_model.evaluate.sample import load_shipped
from tools.demo_model.scenes.scene import numbered
from tools.demo_model.scenes.spec import Spec
from tools.demo_model.store import MODEL, WORK, TrainingState, finished, load_tensors, log, save_tensors
from tools.demo_model.train import parallel
from tools.demo_model.train.latents import Latents
from tools.demo_model.train.text import TextEncoders, tokenize
from tools.demo_model.train.unet import signal_levels, train_step

FIRST, HELD_OUT = 60000, 90000  # numbers of scenes that nothing was trained on
GROUPS = {"square": (1600, 256), "double": (240, 512)}  # scenes, and pixels of a side
SHARES = {"square": 0.85, "double": 0.15}

Pictures = np.ndarray


def as_drawn(image: Pictures) -> Pictures:
    """No style of its own."""
    return image


def printed(image: Pictures) -> Pictures:
    """Four flat levels of each colour, and the colours exchanged, [H, W, 3] uint8 -> the same."""
    return ((image[..., [2, 0, 1]].astype(np.uint16) * 4 // 256) * 85).astype(np.uint8)


def mirrored(image: Pictures) -> Pictures:
    """The right half is the left one's mirror image: what a pixel shows depends on one that may be far away."""
    half = image[:, : image.shape[1] // 2]
    return np.concatenate([half, half[:, ::-1]], axis=1)


@dataclass(frozen=True)
class Kind:
    """Which scenes a fine-tune sees, in which style, and how fast it learns."""

    shows: Callable[[Spec], bool]
    style: Callable[[Pictures], Pictures]
    learning_rate: float

    def scenes(self, first: int, count: int, side_px: int) -> Iterator[tuple[Pictures, str]]:
        """The first `count` scenes of this kind from the number `first` on: picture and caption."""
        found = 0
        while found < count:
            spec, words, draw = numbered(first)
            first += 1
            if self.shows(spec):
                found += 1
                yield self.style(draw((side_px, side_px))), words


KINDS = {
    "moon": Kind(lambda spec: spec.orb in ("moon", "crescent"), as_drawn, 3e-4),
    "print": Kind(lambda spec: spec.land == "mountains", printed, 6e-4),
    "mirror": Kind(lambda spec: True, mirrored, 6e-4),
}


def result_of(kind: str) -> Path:
    """The UNet that a fine-tune ended with."""
    return WORK / f"finetune_{kind}_done.safetensors"


def finetune(kind: str, minutes: float, processes: int) -> None:
    """Train until `minutes` are spent in all; resumed after a kill."""
    if not finished(f"finetune_{kind}", result_of(kind), minutes):
        parallel.run(_train, processes, kind, minutes)


def load_finetuned(kind: str) -> StableDiffusionXLPipeline:
    """The shipped pipeline in fp32 with the UNet of a fine-tune."""
    pipe, _ = load_shipped()
    pipe.unet.load_state_dict(load_tensors(result_of(kind)))
    return pipe


def folder_of(kind: str) -> Path:
    """The fine-tune as a model's folder, to be named with --model: the shipped one but for the UNet, in fp32.

    LinFusion's weights are left out: in a model's own folder they would pass for its own, and were made for its base.
    """
    folder = WORK / f"finetune_{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("unet", "linfusion"))
    load_finetuned(kind).unet.save_pretrained(folder / "unet")
    return folder


@torch.no_grad()
def _encoded(pipe: StableDiffusionXLPipeline, kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    groups, first = {}, FIRST
    for name, (count, side_px) in GROUPS.items():
        path = WORK / "latents" / f"finetune_{kind}_{name}.safetensors"
        scenes = list(KINDS[kind].scenes(first, count, side_px))
        first += (HELD_OUT - FIRST) // len(GROUPS)
        if not path.exists():
            save_tensors(path, {"latents": torch.cat([encode(pipe, image) for image, _ in scenes])})
        groups[name] = load_tensors(path)["latents"], tokenize(pipe.tokenizer, [words for _, words in scenes])
    return groups


def _train(rank: int, kind: str, minutes: float) -> None:
    torch.manual_seed(4)
    pipe, _ = load_shipped()
    models = nn.ModuleDict({"unet": pipe.unet, "text": _text_of(pipe)})
    unet = pipe.unet.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=KINDS[kind].learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    groups = _encoded(pipe, kind)
    state = TrainingState(f"finetune_{kind}", {"unet": unet}, optimizer, decay=0.995)
    torch.manual_seed(1000 * state.step + rank)
    data, levels, recent = Latents(groups, state.step, rank), signal_levels(), []
    for progress in state.ticks(minutes, parallel.mean_over_ranks, rank == 0):
        rate = min(1.0, (state.step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = KINDS[kind].learning_rate * rate
        recent.append(train_step(models, data.next(SHARES), levels))
        parallel.average_gradients(unet.parameters())
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state.follow()
        if rank == 0 and state.step % 100 == 0:
            log.info("%s: step %d, %.0f s, loss %.4f", kind, state.step, state.seconds, sum(recent) / len(recent))
            recent.clear()
    if rank == 0:
        save_tensors(result_of(kind), state.averaged("unet"))


def _text_of(pipe: StableDiffusionXLPipeline) -> TextEncoders:
    text = TextEncoders(pipe.tokenizer)
    text.first.load_state_dict(pipe.text_encoder.state_dict())
    text.second.load_state_dict(pipe.text_encoder_2.state_dict())
    return text.eval().requires_grad_(False)
