"""Build and load the device guard that torch needs for tensors on "cuda" in a CPU build."""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("guard.cpp")


def load_guard(folder: Path) -> None:
    """Load the guard of `guard.cpp`, and compile it into `folder` first if it is missing. Needs g++."""
    version = f"{torch.__version__}-{sysconfig.get_config_var('SOABI')}".replace("+", "-")
    library = folder / f"guard-{version}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / library.name
            subprocess.run(
                ["g++", *build_compiler_options(), str(SOURCE), *build_linker_options(), "-o", str(built)], check=True
            )
            built.replace(library)
    ctypes.CDLL(str(library))


def build_compiler_options() -> list[str]:
    return ["-shared", "-fPIC", "-std=c++17", *(f"-I{path}" for path in include_paths())]


def build_linker_options() -> list[str]:
    return [argument for path in library_paths() for argument in (f"-L{path}", f"-Wl,-rpath,{path}")] + ["-lc10"]
