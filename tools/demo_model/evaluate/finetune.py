"""Fine-tune the shipped UNet, with its own softmax attention, on one kind of scene each.

`merges` uses the fine-tunes to measure how well LinFusion weights trained for the base model work with a fine-tune.
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
from tools.demo_model.evaluate.sample import load_shipped_model
from tools.demo_model.scenes.scene import prepare_scene
from tools.demo_model.scenes.spec import Spec
from tools.demo_model.store import MODEL, WORK, TrainingState, is_finished, load_tensors, log, save_tensors
from tools.demo_model.train import parallel
from tools.demo_model.train.latents import Latents
from tools.demo_model.train.text import TextEncoders, tokenize
from tools.demo_model.train.unet import compute_signal_levels, train_step

FIRST_SCENE, HELD_OUT_SCENE = 60000, 90000  # numbers of scenes not used in training
GROUPS = {"square": (1600, 256), "double": (240, 512)}  # number of scenes, side in pixels
SHARES = {"square": 0.85, "double": 0.15}

Images = np.ndarray


def keep_style(image: Images) -> Images:
    """Return the image unchanged."""
    return image


def posterise(image: Images) -> Images:
    """Reduce [H, W, 3] uint8 to four levels per channel and permute the channels."""
    return ((image[..., [2, 0, 1]].astype(np.uint16) * 4 // 256) * 85).astype(np.uint8)


def mirror(image: Images) -> Images:
    """Replace the right half by the mirrored left half, which makes pixels depend on distant ones."""
    half = image[:, : image.shape[1] // 2]
    return np.concatenate([half, half[:, ::-1]], axis=1)


@dataclass(frozen=True)
class SceneKind:
    """Training set of a fine-tune: which scenes, in which style; and its learning rate."""

    includes: Callable[[Spec], bool]
    style: Callable[[Images], Images]
    learning_rate: float

    def scenes(self, first: int, count: int, side_px: int) -> Iterator[tuple[Images, str]]:
        """Yield image and caption of the first `count` scenes of this kind, starting at number `first`."""
        found = 0
        while found < count:
            spec, words, draw = prepare_scene(first)
            first += 1
            if self.includes(spec):
                found += 1
                yield self.style(draw((side_px, side_px))), words


KINDS = {
    "moon": SceneKind(lambda spec: spec.orb in ("moon", "crescent"), keep_style, 3e-4),
    "print": SceneKind(lambda spec: spec.land == "mountains", posterise, 6e-4),
    "mirror": SceneKind(lambda spec: True, mirror, 6e-4),
}


def get_result_path(kind: str) -> Path:
    """Return the path of the fine-tuned UNet."""
    return WORK / f"finetune_{kind}_done.safetensors"


def finetune(kind: str, minutes: float, processes: int) -> None:
    """Train for `minutes` in total; resume an interrupted training."""
    if not is_finished(f"finetune_{kind}", get_result_path(kind), minutes):
        parallel.run(_train, processes, kind, minutes)


def load_finetuned_pipeline(kind: str) -> StableDiffusionXLPipeline:
    """Load the shipped pipeline in fp32 with the UNet of a fine-tune."""
    pipe, _ = load_shipped_model()
    pipe.unet.load_state_dict(load_tensors(get_result_path(kind)))
    return pipe


def export_model_folder(kind: str) -> Path:
    """Write the fine-tune as a model folder for --model: the shipped model with another UNet, in fp32; return its path.

    LinFusion's weights are not copied: weights in the model folder would count as trained for this model.
    """
    folder = WORK / f"finetune_{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("unet", "linfusion"))
    load_finetuned_pipeline(kind).unet.save_pretrained(folder / "unet")
    return folder


@torch.no_grad()
def _load_latent_groups(pipe: StableDiffusionXLPipeline, kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    groups, first = {}, FIRST_SCENE
    for name, (count, side_px) in GROUPS.items():
        path = WORK / "latents" / f"finetune_{kind}_{name}.safetensors"
        scenes = list(KINDS[kind].scenes(first, count, side_px))
        first += (HELD_OUT_SCENE - FIRST_SCENE) // len(GROUPS)
        if not path.exists():
            save_tensors(path, {"latents": torch.cat([encode(pipe, image) for image, _ in scenes])})
        groups[name] = load_tensors(path)["latents"], tokenize(pipe.tokenizer, [words for _, words in scenes])
    return groups


def _train(rank: int, kind: str, minutes: float) -> None:
    torch.manual_seed(4)
    pipe, _ = load_shipped_model()
    models = nn.ModuleDict({"unet": pipe.unet, "text": _build_text_encoders(pipe)})
    unet = pipe.unet.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=KINDS[kind].learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    groups = _load_latent_groups(pipe, kind)
    state = TrainingState(f"finetune_{kind}", {"unet": unet}, optimizer, decay=0.995)
    torch.manual_seed(1000 * state.step + rank)
    data, levels, recent = Latents(groups, state.step, rank), compute_signal_levels(), []
    for progress in state.iterate_progress(minutes, parallel.mean_over_ranks, rank == 0):
        rate = min(1.0, (state.step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = KINDS[kind].learning_rate * rate
        recent.append(train_step(models, data.next(SHARES), levels))
        parallel.average_gradients(unet.parameters())
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state.update_average()
        if rank == 0 and state.step % 100 == 0:
            log.info("%s: step %d, %.0f s, loss %.4f", kind, state.step, state.seconds, sum(recent) / len(recent))
            recent.clear()
    if rank == 0:
        save_tensors(get_result_path(kind), state.select_average("unet"))


def _build_text_encoders(pipe: StableDiffusionXLPipeline) -> TextEncoders:
    text = TextEncoders(pipe.tokenizer)
    text.first.load_state_dict(pipe.text_encoder.state_dict())
    text.second.load_state_dict(pipe.text_encoder_2.state_dict())
    return text.eval().requires_grad_(False)
