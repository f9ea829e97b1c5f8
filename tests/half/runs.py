"""What the tests of this folder ask of a run, and of the files that it makes."""

from __future__ import annotations

from pathlib import Path

from linfusion_cli.core.events import Notice

BASE, DOUBLE = 8, 16  # rows of latents of the two phases
HALF = {"float16", "bfloat16"}


def history(*entries: tuple[int, int, str]) -> list[dict]:
    return [{"phase": phase, "step": step, "dtype": dtype} for phase, step, dtype in entries]


def notices(made) -> list[str]:
    return [notice.text for notice in made.listener.of(Notice)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
