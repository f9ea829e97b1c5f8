"""Configure torch's GPU memory allocator through environment variables, before CUDA starts.

With expandable segments, torch reserves little more memory than it uses; with native segments up to 50 % more.
torch reads only the first variable of VARIABLES that is set. Releases before 2.9 do not know the third one, and 2.9
ignores `expandable_segments` in it.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Literal

from linfusion_cli.core.errors import UsageError, first_line

Segments = Literal["expandable", "native"]

VARIABLES = CUDA_VARIABLE, HIP_VARIABLE, COMMON_VARIABLE = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
COMMON_READ_SINCE, COMMON_EFFECTIVE_SINCE = (2, 9), (2, 10)  # torch releases
EXPANDABLE, MEMORY_FRACTION = "expandable_segments", "per_process_memory_fraction"
OPTION = r"(\w+):(\[[^\[\]]*\]|[^,:\[\]]+)"
# torch's messages for invalid options; for an invalid number, C++ gives only the name of its parser.
OPTION_ERROR = re.compile(
    r"ConfigTokenizer|AllocatorConfig|CachingAllocator option|CachingAllocator settings|allocator (?:config|backend)"
    r"|True/False argument|^sto(?:i|ul|ull|d)$|garbage_collect_threshold|[Rr]oundups|register threads"
    r"|expecting \w+ value"
)
UNSUPPORTED = re.compile(r"(?:CUDA|HIP) driver error: (?:operation )?not supported")


class _AddedOption:
    """The variable that `configure` has extended (None if it has not), and its previous value."""

    variable: str | None = None
    before = ""


def configure() -> None:
    """Enable expandable segments in addition to the user's options, unless the user has set this option or a backend.

    Call this before the first import of torch. Invalid options stay as they are: torch reports them.
    """
    before = os.environ.get(find_variable() or "", "")
    options = parse_options(before)
    if not is_supported() or options is None or EXPANDABLE in options or options.get("backend", "native") != "native":
        return
    _AddedOption.variable, _AddedOption.before = choose_variable(), before
    os.environ[_AddedOption.variable] = append_option(before, f"{EXPANDABLE}:True")


def detect_segments() -> Segments:
    """Return the segments that torch uses with the current environment: growing ones, or many of fixed sizes.

    The environment must not have changed since CUDA started. Other backends, such as cudaMallocAsync, count as native.
    """
    variable = find_variable()
    if (
        not is_supported()
        or variable is None
        or (variable == COMMON_VARIABLE and torch_release() < COMMON_EFFECTIVE_SINCE)
    ):
        return "native"
    options = parse_options(os.environ[variable]) or {}
    is_native = options.get("backend", "native") == "native"
    return "expandable" if is_native and options.get(EXPANDABLE) == "True" else "native"


def memory_fraction() -> float:
    """Return the fraction of the GPU's memory that the user allows torch to use; 1.0 by default."""
    options = parse_options(os.environ.get(find_variable() or "", "")) or {}
    try:
        return min(1.0, max(0.0, float(options.get(MEMORY_FRACTION, 1.0))))
    except ValueError:  # torch reports it
        return 1.0


def disable_expandable_segments(error: Exception) -> bool:
    """Undo `configure` if it caused `error` at the start of CUDA, and return whether it did.

    Some virtual GPUs do not support the memory mapping that expandable segments need.
    """
    if _AddedOption.variable is None or not UNSUPPORTED.match(str(error)):
        return False
    import torch

    options = append_option(_AddedOption.before, f"{EXPANDABLE}:False")
    os.environ[_AddedOption.variable], _AddedOption.variable = options, None
    set_options = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # since torch 2.9
    (set_options or torch.cuda.memory._set_allocator_settings)(options)
    return True


def translate_option_error(error: Exception) -> UsageError | None:
    """Return a UsageError if `error` at the start of CUDA is about an allocator option of the user, else None."""
    variable = find_variable()
    if variable is None or not OPTION_ERROR.search(first_line(error)):
        return None
    reason = f"torch rejects {variable}={os.environ[variable]!r}: {first_line(error).rstrip('.')}."
    return UsageError(reason, "Correct or unset the variable.")


def find_variable() -> str | None:
    """Return the variable that torch reads: the first one that is set, even if it is empty. None if none is set."""
    known = VARIABLES if torch_release() >= COMMON_READ_SINCE else VARIABLES[:2]
    return next((name for name in known if name in os.environ), None)


def choose_variable() -> str:
    """Return the variable to extend: torch must apply the user's options in it as well as the added one."""
    variable = find_variable()
    if variable in (None, COMMON_VARIABLE):
        return COMMON_VARIABLE if torch_release() >= COMMON_EFFECTIVE_SINCE else CUDA_VARIABLE
    return variable


def is_supported() -> bool:
    """Return whether this build of torch supports expandable segments.

    Builds for Windows do not. Builds for ROCm do since ROCm 7 only, and count as unsupported.
    """
    build = _torch_version()
    return sys.platform == "linux" and build != "" and "rocm" not in build


def torch_release() -> tuple[int, int]:
    """Return major and minor version of the installed torch, without importing it."""
    match = re.match(r"(\d+)\.(\d+)", _torch_version())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _torch_version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def parse_options(text: str) -> dict[str, str] | None:
    """Parse a variable into name -> value (the last one of a name counts), or None if it is not a list of options."""
    compact = "".join(text.split()).strip(",")
    is_list = re.fullmatch(rf"(?:{OPTION}(?:,+{OPTION})*)?", compact)
    return dict(re.findall(OPTION, compact)) if is_list else None


def append_option(text: str, option: str) -> str:
    """Return the value of a variable with `option` added at its end."""
    return f"{text.rstrip(', ')},{option}" if text.strip(", ") else option
