"""Build requests in tests from flat values, as job lists have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linfusion_cli.settings.groups import parse_inversion, parse_lora
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.table import SETTINGS, assemble_request, flatten_request

PARSERS = {"lora": parse_lora, "textual_inversion": parse_inversion}


def make_request(**values: Any) -> Request:
    """Return the request with these values; files can be text. Raises UsageError."""
    return assemble_request({name: parse_value(name, value) for name, value in values.items()})


def change_request(request: Request, **values: Any) -> Request:
    """Return the request with other flat values."""
    return make_request(**flatten_request(request) | values)


def parse_value(name: str, value: Any) -> Any:
    """Return the value of a setting; text is parsed where the setting is a file or has several parts."""
    if name in PARSERS:
        return tuple(PARSERS[name](one) if isinstance(one, str) else one for one in value)
    if SETTINGS[name].kind.metavar == "FILE" and isinstance(value, str):
        return Path(value)
    if isinstance(value, tuple):
        return tuple(str(one) if isinstance(one, Path) else one for one in value)
    return value
