"""The requests of the runs: small, and one of each kind with a different state."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

STEPS = ("--steps", "5", "--checkpoint-every")
SMALL = ("--preset", "demo", *STEPS, "0")
OLD = b"an older file"


@dataclass(frozen=True)
class Request:
    """Arguments of the program and the files that it writes; the first is the image."""

    arguments: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def replaces(self) -> bool:
        return "--overwrite" in self.arguments

    @property
    def saves_each_step(self) -> bool:
        return self.arguments[self.arguments.index("--checkpoint-every") + 1] == "0"

    def create_folder(self, folder: Path) -> Path:
        """Create a folder with the input files of the request."""
        folder.mkdir()
        if self.arguments[0] == "upscale":
            Image.fromarray(SOURCE).save(folder / "source.png")
        if self.replaces:
            (folder / self.files[0]).write_bytes(OLD)
        return folder


SOURCE = (np.indices((96, 128, 1)).sum(axis=0) * np.array([1, 2, 0.5]) % 256).astype(np.uint8)
ALL_CALLS = ("phases", "overwrite")  # requests that together make every kind of call
LAKE = ("generate", "a lake at dawn", "--preset", "demo", "--size", "256x192", "--base-size", "128x96", "-o", "a.png")
REQUESTS = {
    "png": Request((*LAKE, *STEPS, "0"), ("a.png",)),
    "seldom": Request((*LAKE, *STEPS, "3600"), ("a.png",)),
    "phases": Request(
        (
            "generate",
            "hills",
            *SMALL,
            "--size",
            "240x236",
            "--base-size",
            "64",
            "--scheduler",
            "euler-a",
        )
        + ("--upscaler", "sdedit", "--save-phases", "--preview", "p.jpg", "-o", "a.tif"),
        ("a.tif", "a-64x64.tif", "a-128x128.tif", "p.jpg"),
    ),
    "overwrite": Request(
        (
            "generate",
            "the sea",
            *SMALL,
            "--size",
            "192",
            "--base-size",
            "96",
            "--scheduler",
            "dpmpp-2m-sde",
        )
        + ("--bits", "16", "--overwrite", "-o", "a.tif"),
        ("a.tif",),
    ),
    "upscale": Request(
        (
            "upscale",
            "source.png",
            "--prompt",
            "a lake",
            *SMALL,
            "--size",
            "256",
            "--scheduler",
            "dpmpp-2m",
        )
        + ("--compression", "none", "-o", "a.tif"),
        ("a.tif",),
    ),
}
