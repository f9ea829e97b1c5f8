"""Classifiers for generated images, fitted to drawn scenes with known content and independent of the model.

The time of day is classified by the mean colour, a sun or moon by the brightest disc, the land by a small CNN.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import fft
from torch import Tensor, nn

Array = np.ndarray
HALF_PX = 128
RADII_PX = (6, 7.5, 9, 10.5, 12)  # of a disc in a 256 px image reduced to half its size
SECTORS = 8
LANDS = ("mountains", "hills", "sea", "plain")


@dataclass(frozen=True)
class ColourJudge:
    """Quadratic discriminant on mean colours: `means` [K, 3] and `covariances` [K, 3, 3] of the classes."""

    classes: tuple[str, ...]
    means: Array
    covariances: Array

    @staticmethod
    def fit(colours: Array, labels: list[str]) -> "ColourJudge":
        """Fit to mean colours [n, 3] with their classes."""
        classes = tuple(sorted(set(labels)))
        groups = [colours[np.array(labels) == name] for name in classes]
        return ColourJudge(classes, np.stack([g.mean(axis=0) for g in groups]), np.stack([np.cov(g.T) for g in groups]))

    def classify(self, colours: Array) -> list[str]:
        """Return the most likely class of each of the mean colours [n, 3]."""
        away = colours[:, None] - self.means
        distance = np.einsum("nki,kij,nkj->nk", away, np.linalg.inv(self.covariances), away)
        best = (distance + np.log(np.linalg.det(self.covariances))).argmin(axis=1)
        return [self.classes[i] for i in best]


def compute_mean_colours(images: Array) -> Array:
    """Return the mean colours [n, 3] in 0..1 of images [n, H, W, 3] uint8."""
    return images.mean(axis=(1, 2)) / 255


@cache
def _build_disc_kernels(radius: float) -> tuple[Array, int]:
    """Return the spectra of kernels for the sectors of a disc and of the ring around it, and the kernels' radius."""
    reach = int(1.9 * radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    away, angle = np.hypot(x, y), np.floor((np.arctan2(y, x) / (2 * np.pi) % 1) * SECTORS)
    ring = (away > 1.35 * radius) & (away < 1.85 * radius)
    parts = [[part & (angle == sector) for sector in range(SECTORS)] for part in (away < 0.85 * radius, ring)]
    kernels = np.stack([mask / mask.sum() for masks in parts for mask in masks]).astype(np.float32)
    return fft.rfft2(kernels, s=(HALF_PX, HALF_PX)), reach


def compute_disc_score(image: Array) -> float:
    """Return the contrast -1..1 of the brightest disc in [256, 256, 3] uint8 to its surroundings.

    This is the darkest sector of the disc minus the brightest sector of the ring, in the colour channel with the
    largest contrast: on a golden morning the sun differs from the sky only in blue.
    """
    half = image.reshape(HALF_PX, 2, HALF_PX, 2, 3).mean(axis=(1, 3), dtype=np.float32) / 255
    spectra = fft.rfft2(half, axes=(0, 1))
    return max(_compute_disc_contrast(spectra[..., colour], radius) for colour in range(3) for radius in RADII_PX)


def _compute_disc_contrast(spectrum: Array, radius: float) -> float:
    kernels, reach = _build_disc_kernels(radius)
    # crop positions at which the kernel wraps around the border
    means = fft.irfft2(spectrum * kernels, s=(HALF_PX, HALF_PX))[:, 2 * reach :, 2 * reach :]
    return float((means[:SECTORS].min(axis=0) - means[SECTORS:].max(axis=0)).max())


def find_threshold(positives: Array, negatives: Array) -> float:
    """Return the threshold that separates two sets of scores with the fewest errors."""
    cuts = np.sort(np.concatenate([positives, negatives]))
    errors = [(positives < cut).mean() + (negatives >= cut).mean() for cut in cuts]
    least = np.flatnonzero(np.array(errors) == min(errors))
    low, high = cuts[max(least[0] - 1, 0)], cuts[least[-1]]
    return float((low + high) / 2)


def shrink_images(images: Array) -> Tensor:
    """Reduce images [n, H, W, 3] uint8 to the input of LandJudge, [n, 3, 64, 64] in -1..1."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(tensor, size=(64, 64), mode="area")


class LandJudge(nn.Module):
    """CNN of four strided convolutions and a linear layer that classifies the land."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 32, 48, 64)
        layers = [
            part
            for before, after in zip(widths, widths[1:], strict=False)
            for part in (nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.SiLU())
        ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64 * 16, len(LANDS))

    def forward(self, small: Tensor) -> Tensor:
        """Return logits [n, lands] for images [n, 3, 64, 64]."""
        return self.head(self.body(small).flatten(1))

    @torch.no_grad()
    def classify(self, images: Array) -> list[str]:
        """Return the most likely land of each of the images [n, H, W, 3] uint8."""
        return [LANDS[i] for i in self(shrink_images(images)).argmax(dim=1)]


def train_land_judge(small: Tensor, labels: list[str], steps: int = 500, batch: int = 64) -> LandJudge:
    """Train the CNN on drawn scenes [n, 3, 64, 64] with a fixed seed."""
    torch.manual_seed(4)
    judge, wanted = LandJudge(), torch.tensor([LANDS.index(name) for name in labels])
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        pick = torch.randint(len(small), (batch,))
        images = small[pick].flip(-1) if torch.rand(()) < 0.5 else small[pick]
        loss = F.cross_entropy(judge(images + 0.1 * torch.randn_like(images)), wanted[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def compute_spread(images: Array) -> float:
    """Return the mean RMS distance, in 0..1, of all pairs of images [n, H, W, 3] uint8 reduced 8 times."""
    n, height, width, _ = images.shape
    small = images.reshape(n, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4), dtype=np.float32) / 255
    flat = small.reshape(n, -1)
    squares = (flat**2).mean(axis=1)
    between = squares[:, None] + squares - 2 * flat @ flat.T / flat.shape[1]
    return float(np.sqrt(np.maximum(between[np.triu_indices(n, 1)], 0)).mean())
