"""Helpers that read the results of runs."""

from __future__ import annotations

from pathlib import Path

from linfusion_cli.core.events import Notice

BASE, DOUBLE = 8, 16  # rows of latents of the two phases
HALF = {"float16", "bfloat16"}


def build_history(*entries: tuple[int, int, str]) -> list[dict]:
    """Return (phase, step, dtype) entries in the form of the report."""
    return [{"phase": phase, "step": step, "dtype": dtype} for phase, step, dtype in entries]


def list_notices(result) -> list[str]:
    return [notice.text for notice in result.listener.of(Notice)]


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
