"""Check the values of a request. All invalid values are reported together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from linfusion_cli.core.errors import ConfigError, LinfusionError, UsageError
from linfusion_cli.settings.setting import ITEM, KEY, NESTED, Setting, list_own_settings

MAX_PX = 1_000_000
CONTROL_PHASES = ("base", "all")
ARGUMENTS = {"prompt": "The prompt", "image": "The image"}


class InvalidSettings(UsageError):
    """Several settings are invalid; `errors` has one error for each."""

    def __init__(self, errors: Sequence[LinfusionError]):
        numbered = " ".join(f"({number}) {error}" for number, error in enumerate(errors, 1))
        super().__init__(f"{len(errors)} settings are invalid: {numbered}")
        self.errors = errors
        if all(isinstance(error, ConfigError) for error in errors):
            self.exit_code = ConfigError.exit_code


def raise_all(errors: Iterable[LinfusionError]) -> None:
    """Raise the error, or one error that lists all; do nothing if there are none."""
    errors = list(dict.fromkeys(errors))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InvalidSettings(errors)


def list_errors(error: LinfusionError) -> list[LinfusionError]:
    """Return the errors that `raise_all` combined."""
    return list(error.errors) if isinstance(error, InvalidSettings) else [error]


def check_request(request: Any) -> None:
    """Raise UsageError for a Request with invalid values: one error that lists all of them."""
    raise_all([*find_invalid_values(request), *find_invalid_request(request)])


def find_invalid_values(table: Any) -> Iterator[UsageError]:
    """Yield an error for each value of a dataclass of settings that its setting does not allow."""
    for setting, value in list_values(table):
        yield from find_invalid_value(setting, value)


def list_values(table: Any) -> Iterator[tuple[Setting, Any]]:
    """Yield each setting of a dataclass with its value, including groups and nested dataclasses."""
    own = list_own_settings(type(table))
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        if KEY in field.metadata:
            yield own[field.name], value
        elif ITEM in field.metadata:
            for one in value:
                yield from list_values(one)
        elif NESTED in field.metadata and value is not None:
            yield from list_values(value)


def find_invalid_value(setting: Setting, value: Any) -> Iterator[UsageError]:
    """Yield an error if `value`, or an element of a tuple, is outside the choices or limits, or blank."""
    if setting.per_phase and not value:
        yield build_error(setting.name, "", "Give at least one value.")
    if value is None:
        return
    for one in value if isinstance(value, tuple) else (value,):
        if setting.choices and one not in setting.choices:
            yield build_error(setting.name, one, f"Use {describe_choices(setting)}.")
        if setting.limits and not setting.limits[0] <= one <= setting.limits[1]:  # also for NaN
            yield build_error(setting.name, one, f"Use {setting.limits[0]} to {setting.limits[1]}.")
        if setting.names_file and not one.strip():
            yield build_error(setting.name, one, "Name a file, a folder, or a hub id.")


def describe_choices(setting: Setting) -> str:
    """Return the choices of a setting as the end of a hint."""
    return f"one of {', '.join(map(str, setting.choices))}{', or one per phase' if setting.per_phase else ''}"


def find_invalid_request(request: Any) -> Iterator[UsageError]:
    """Yield an error for each value with conditions of its own."""
    for name in ("prompt", "negative_prompt"):
        if not is_text(getattr(request, name)):
            yield build_error(name, getattr(request, name), "It is not valid UTF-8.")
    if len(request.cosine) != 3:
        yield build_error("cosine", request.cosine, "Give three exponents, such as 3,1,1.")
    interval = request.guidance_interval
    if interval and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):  # also for NaN
        yield build_error("guidance_interval", interval, "Give two noise levels, such as 0.28,5.42 or 0.28,inf.")
    corner = request.crop_top_left
    if len(corner) != 2 or not all(0 <= side <= MAX_PX for side in corner):
        yield build_error("crop_top_left", corner, "Use TOP,LEFT.")
    for phase in request.control_phases or ("",):
        if phase not in CONTROL_PHASES and not phase.isdecimal():
            hint = f"Use {', '.join(CONTROL_PHASES)}, or numbers of phases: 0 is the first."
            yield build_error("control_phases", phase, hint)
    for name in ("vram", "ram"):
        if getattr(request.execution, name) == 0:
            yield build_error(name, 0, "Use a size such as 12GiB.")
    yield from find_invalid_source(request)


def find_invalid_source(request: Any) -> Iterator[UsageError]:
    """Yield an error for each setting that does not allow upscaling an image."""
    if request.source is None:
        return
    if request.upscaler == "none":
        yield build_error("upscaler", request.upscaler, "Use demofusion or sdedit to upscale an image.")
    try:
        request.source.background_rgb()
    except UsageError as error:
        yield error


def build_error(name: str, value: object, hint: str) -> UsageError:
    """Return the error for a value of a setting."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)
    return UsageError(f"{flag(name)} {text} is not possible.", hint, name)


def flag(name: str) -> str:
    """Return the name of a setting in messages: guidance_scale -> --guidance-scale."""
    return ARGUMENTS.get(name) or "--" + name.replace("_", "-")


def is_text(value: str) -> bool:
    """Return whether `value` has no lone surrogates: Python decodes bytes that are not UTF-8 to these."""
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in value)
