"""Stage `vae`: train a small AutoencoderKL with SDXL's block types on crops of the scenes."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from tools.demo_model.store import WORK, TrainingState, load_tensors, log, save_json, save_tensors
from tools.demo_model.train import parallel
from tools.demo_model.train.draw import load_shards
from tools.demo_model.train.vae_start import COLOUR_SCALE, init_as_thumbnail

RESULT = WORK / "vae_done.safetensors"
# side of the crop, batch size, share of the batches
CROPS = ((128, 3, 0.75), (192, 1, 0.1), (256, 1, 0.15))
LEARNING_RATE = 6e-4


def build_vae(scaling_factor: float = 1.0) -> AutoencoderKL:
    """Build a VAE with factor 8 and 4 latent channels; full-resolution layers are narrow, as they dominate the cost."""
    return AutoencoderKL(
        block_out_channels=(12, 24, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=256,
        scaling_factor=scaling_factor,
        force_upcast=False,
    )


def load_vae() -> AutoencoderKL:
    """Load the trained VAE in fp32 for inference."""
    tensors = load_tensors(RESULT)
    vae = build_vae(float(tensors.pop("scaling_factor")))
    vae.load_state_dict(tensors)
    return vae.eval().requires_grad_(False)


def to_input(pixels: np.ndarray) -> Tensor:
    """Convert [B, H, W, 3] uint8 to [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Crops:
    """Draw random crops of all drawn scenes, flipped at random."""

    def __init__(self, seed: int, rank: int):
        self.rng = np.random.default_rng((seed, rank))
        self.sides = np.random.default_rng(seed)  # same seed in all processes: all get crops of equal cost
        self.square, self.large = load_shards("square"), load_shards("large")

    def next(self) -> Tensor:
        """Draw one batch [B, 3, S, S]."""
        side, count, _ = CROPS[self.sides.choice(len(CROPS), p=[share for *_, share in CROPS])]
        return to_input(np.stack([self._one(side) for _ in range(count)]))

    def _one(self, side: int) -> np.ndarray:
        pool = self.large if self.large and self.rng.random() < 0.2 else self.square
        shard = pool[self.rng.integers(len(pool))]
        image = shard[self.rng.integers(len(shard))]
        top, left = (int(self.rng.integers(n - side + 1)) for n in image.shape[:2])
        crop = image[top : top + side, left : left + side]
        return crop[:, ::-1] if self.rng.random() < 0.5 else crop


def compute_loss(vae: AutoencoderKL, pixels: Tensor, progress: float) -> Tensor:
    """Return the loss: colours and edges at four scales, mean colour and a small KL term.

    During the first 40 % of the training a further term keeps three latent channels close to the mean colours.
    """
    posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    error = decoded - pixels
    loss = error.abs().mean() + 8 * error.square().mean() + 0.5 * _compute_edge_loss(error)
    for _ in range(3):
        error = F.avg_pool2d(error, 2)
        loss = loss + 0.5 * error.abs().mean() + 0.25 * _compute_edge_loss(error)
    loss = loss + 0.5 * error.mean(dim=(2, 3)).abs().mean() + 1e-7 * posterior.kl().mean() / pixels.shape[-1] ** 2 * 64
    tie = max(0.0, 1 - progress / 0.4)
    if tie > 0:
        # three latent channels start as a thumbnail reduced 8 times; the decoder then learns details in addition
        loss = loss + tie * (posterior.mean[:, :3] - COLOUR_SCALE * F.avg_pool2d(pixels, 8)).abs().mean()
    return loss


def _compute_edge_loss(error: Tensor) -> Tensor:
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def train_vae(minutes: float, processes: int) -> None:
    """Train for `minutes`, measure on held-out scenes and save."""
    if not RESULT.exists():
        parallel.run(_train, processes, minutes)


def _train(rank: int, minutes: float) -> None:
    torch.manual_seed(1)
    vae = build_vae().train()
    init_as_thumbnail(vae, to_input(load_shards("square")[0][:16]))
    vae.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.001)
    state = TrainingState("vae", {"vae": vae}, optimizer, decay=0.995)
    crops = Crops(state.step + 1, rank)
    torch.manual_seed(1000 * state.step + rank)
    for progress in state.iterate_progress(minutes, parallel.mean_over_ranks, rank == 0):
        rate = LEARNING_RATE * min(1, (state.step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = rate
        loss = compute_loss(vae, crops.next(), progress)
        optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(vae.parameters())
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        state.update_average()
        if rank == 0 and state.step % 50 == 0:
            log.info("vae: step %d, %.0f s, loss %.4f", state.step, state.seconds, loss.item())
        if rank == 0 and state.step % 250 == 0:
            log.info(
                "vae: held-out %s", measure_reconstruction(_build_averaged_vae(state), load_shards("held_out")[0][:16])
            )
    if rank == 0:
        _finish(_build_averaged_vae(state))


def _build_averaged_vae(state: TrainingState) -> AutoencoderKL:
    vae = build_vae()
    vae.load_state_dict(state.select_average("vae"))
    return vae.eval()


@torch.no_grad()
def _finish(vae: AutoencoderKL) -> None:
    figures = measure_reconstruction(vae, np.concatenate(load_shards("held_out")))
    log.info("vae: %s", figures)
    save_json(WORK / "vae.json", figures)
    latents = torch.cat([vae.encode(to_input(shard[::8])).latent_dist.mean for shard in load_shards("square")[:20]])
    factor = torch.tensor(1 / latents.std().item())
    save_tensors(RESULT, vae.state_dict() | {"scaling_factor": factor})


@torch.no_grad()
def measure_reconstruction(vae: AutoencoderKL, images: np.ndarray) -> dict[str, float]:
    """Return the PSNR in dB of the VAE and of enlarged 8 times smaller thumbnails, and mean colour errors in 1/255."""
    pixels = to_input(images)
    decoded = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) for x in pixels.split(8)])
    small = F.interpolate(pixels, scale_factor=1 / 8, mode="area")
    enlarged = F.interpolate(small, scale_factor=8, mode="bicubic").clamp(-1, 1)
    off = (decoded - pixels).mean(dim=(2, 3)).abs() * 127.5
    return {
        "psnr": _psnr(decoded, pixels),
        "psnr_thumbnail": _psnr(enlarged, pixels),
        "mean_off": round(off.mean().item(), 2),
        "mean_off_worst": round(off.max().item(), 2),
    }


def _psnr(image: Tensor, truth: Tensor) -> float:
    error = ((image - truth) / 2).square().mean(dim=(1, 2, 3))
    return round((-10 * torch.log10(error)).mean().item(), 2)
