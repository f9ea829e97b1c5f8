"""How torch shares out a card's memory: options in the environment, which must be there before CUDA starts.

With expandable segments torch reserves little more than is in use; with its older way up to half as much again.
torch reads the first of three variables that is set, and no other: VARIABLES lists them in that order. Releases before
2.9 do not know the third, and 2.9 takes `expandable_segments` from it without effect.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from linfusion_cli.core.errors import UsageError, first_line

Segments = Literal["expandable", "native"]

VARIABLES = OLD, HIP, NEW = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
NEW_IS_READ, NEW_IS_HEEDED = (2, 9), (2, 10)  # the first releases that do
EXPANDABLE, SHARE = "expandable_segments", "per_process_memory_fraction"
OPTION = r"(\w+):(\[[^\[\]]*\]|[^,:\[\]]+)"
# What torch says of options that it does not understand; C++ names its number parsers and no more.
COMPLAINT = re.compile(
    r"ConfigTokenizer|AllocatorConfig|CachingAllocator option|CachingAllocator settings|allocator (?:config|backend)"
    r"|True/False argument|^sto(?:i|ul|ull|d)$|garbage_collect_threshold|[Rr]oundups|register threads"
    r"|expecting \w+ value"
)
UNSUPPORTED = re.compile(r"(?:CUDA|HIP) driver error: (?:operation )?not supported")


class _Added:
    """The variable that `configure` extended, and what it held before; None where nothing was added."""

    variable: str | None = None
    before = ""


def configure() -> None:
    """Ask torch for expandable segments, beside what the user asked for, and unless the user has chosen otherwise.

    To be called before torch is imported. Options that cannot be understood stay as they are, for torch to name.
    """
    before = os.environ.get(read_variable() or "", "")
    options = options_of(before)
    if not is_supported() or options is None or EXPANDABLE in options or options.get("backend", "native") != "native":
        return
    _Added.variable, _Added.before = target_variable(), before
    os.environ[_Added.variable] = with_option(before, f"{EXPANDABLE}:True")


def segments() -> Segments:
    """What torch does with the options of the present environment: segments that grow, or many of fixed sizes.

    True of the running process if the environment has not changed since CUDA started. Another backend, such as
    cudaMallocAsync, counts as native.
    """
    variable = read_variable()
    if not is_supported() or variable is None or (variable == NEW and torch_release() < NEW_IS_HEEDED):
        return "native"
    options = options_of(os.environ[variable]) or {}
    is_native = options.get("backend", "native") == "native"
    return "expandable" if is_native and options.get(EXPANDABLE) == "True" else "native"


def share() -> float:
    """The share of a card's memory that the user lets torch have, 1.0 where nothing is said."""
    options = options_of(os.environ.get(read_variable() or "", "")) or {}
    try:
        return min(1.0, max(0.0, float(options.get(SHARE, 1.0))))
    except ValueError:  # torch says so when it reads it
        return 1.0


def fall_back(error: Exception) -> bool:
    """After `error` at the start of CUDA: take `configure` back where it was the reason, and say whether it was.

    Some virtual GPUs refuse what expandable segments are made of.
    """
    if _Added.variable is None or not UNSUPPORTED.match(str(error)):
        return False
    import torch

    options = with_option(_Added.before, f"{EXPANDABLE}:False")
    os.environ[_Added.variable], _Added.variable = options, None
    set_options = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # since torch 2.9
    (set_options or torch.cuda.memory._set_allocator_settings)(options)
    return True


def complaint(error: Exception) -> UsageError | None:
    """`error` at the start of CUDA as one of the user's options, if torch names one, else None."""
    variable = read_variable()
    if variable is None or not COMPLAINT.search(first_line(error)):
        return None
    reason = f"{variable}={os.environ[variable]!r} is not understood by torch: {first_line(error).rstrip('.')}."
    return UsageError(reason, "Correct the variable, or unset it.")


def read_variable() -> str | None:
    """The variable from which torch takes its options: the first that is set, even to nothing. None if none is."""
    known = VARIABLES if torch_release() >= NEW_IS_READ else VARIABLES[:2]
    return next((name for name in known if name in os.environ), None)


def target_variable() -> str:
    """The variable to which an option is added so that torch heeds it, with all that the user has set."""
    variable = read_variable()
    if variable in (None, NEW):
        return NEW if torch_release() >= NEW_IS_HEEDED else OLD
    return variable


def is_supported() -> bool:
    """Whether this build of torch has expandable segments: those for Windows do not, nor for ROCm before 7."""
    build = _torch_version()
    return sys.platform == "linux" and build != "" and "rocm" not in build


def torch_release() -> tuple[int, int]:
    """The installed torch's major and minor number, found without importing it."""
    match = re.match(r"(\d+)\.(\d+)", _torch_version())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def options_of(text: str) -> dict[str, str] | None:
    """The options of a variable, of which the last of a name counts; None where this is no list of options."""
    compact = "".join(text.split()).strip(",")
    is_list = re.fullmatch(rf"(?:{OPTION}(?:,+{OPTION})*)?", compact)
    return dict(re.findall(OPTION, compact)) if is_list else None


def with_option(text: str, option: str) -> str:
    """`text` with one option more."""
    return f"{text.rstrip(', ')},{option}" if text.strip(", ") else option
