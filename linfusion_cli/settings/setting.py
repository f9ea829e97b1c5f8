"""Define a setting: a dataclass field whose metadata are all facts about it. Everything else is generated from these.

Generated are the options of the commands with their help and completion, the LINFUSION_* variables, the keys of config
files, presets and job lists, the JSON Schemas, the rules for resuming and for complete files, the order of a batch, and
the settings that `decode` ignores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from linfusion_cli.core.geometry import Size
from linfusion_cli.settings import kinds
from linfusion_cli.settings.kinds import Kind

Command = Literal["generate", "upscale", "plan", "batch", "decode"]
Decides = Literal["latents", "file", "nothing"]
Source = Literal["flag", "environment", "config", "preset", "job"]
Network = Literal["unet", "text_encoders", "vae"]
Panel = Literal[
    "Most used",
    "Prompt and guidance",
    "Model",
    "Input images",
    "Sampling",
    "Upscaling",
    "SDXL size conditioning",
    "Memory and device",
    "Output file",
    "Running and scripting",
]
PANELS: tuple[Panel, ...] = get_args(Panel)
RUNS: tuple[Command, ...] = ("generate", "upscale", "plan", "batch")
SINGLE_RUNS: tuple[Command, ...] = ("generate", "upscale", "plan")
ALL_COMMANDS: tuple[Command, ...] = get_args(Command)
ALL_SOURCES: tuple[Source, ...] = get_args(Source)
NETWORKS: tuple[Network, ...] = get_args(Network)
KEY, ITEM, NESTED = "setting", "item", "nested"  # in the metadata of a field
SIMPLE_KINDS = {str: kinds.TEXT, int: kinds.INTEGER, float: kinds.NUMBER, bool: kinds.BOOLEAN, Size: kinds.SIZE}
SIMPLE_KINDS |= {Path: kinds.PATH}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All facts about a setting; `name` is its key in files, from which its flag and variable are derived.

    help: one or two sentences, without the default, which `default_text` describes if it is no constant.
    rank: the position in its panel; settings of the same rank are in the order of the table.
    choices, limits: the valid values, or the range of a number; for a list, of each element.
    names_file: the value must not be blank: it names a file, a model, or a word such as auto.
    repeated: each occurrence of the flag adds a value. per_phase: the last value holds for all later phases.
    decides: what the value changes: the latents, only the file, or neither. A run cannot be resumed with another value
        that decides its latents; an image is complete if all values that decide its latents or its file are the same.
    reloads: the networks that another value loads again: a batch runs jobs with the same values together.
    used_by_decode: False if decoding latents does not depend on it: its files do not have to exist.
    commands: the commands with this option; `argument_of` are those that take it as an argument.
    sources: where it can be set.
    aliases: the names in other tools. Files can use them; for a flag they give a hint.
    completion: what TAB completes: files, models, presets, gpus, these words, or the choices.
    """

    name: str
    default: Any
    kind: Kind
    help: str
    panel: Panel
    rank: int = 0
    default_text: str | None = None
    metavar: str = ""
    short: str = ""
    choices: tuple[str | int, ...] = ()
    limits: tuple[float, float] | None = None
    names_file: bool = False
    repeated: bool = False
    per_phase: bool = False
    decides: Decides = "latents"
    reloads: tuple[Network, ...] = ()
    used_by_decode: bool = True
    commands: tuple[Command, ...] = RUNS
    argument_of: tuple[Command, ...] = ()
    sources: tuple[Source, ...] = ALL_SOURCES
    aliases: tuple[str, ...] = ()
    completion: Literal["", "files", "models", "presets", "gpus"] | tuple[str, ...] = ""

    @property
    def is_switch(self) -> bool:
        """True for a flag without a value."""
        return self.kind is kinds.BOOLEAN

    @property
    def is_required(self) -> bool:
        """True if a request needs a value."""
        return self.default is dataclasses.MISSING

    @property
    def flag(self) -> str:
        """The name on the command line: guidance_scale -> --guidance-scale."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The name of the environment variable."""
        return PREFIX + self.name.upper()


PREFIX = "LINFUSION_"


def setting(default: Any = dataclasses.MISSING, **facts: Any) -> Any:
    """Return the field of a setting, see `Setting`; `kind` is derived from the field's type if it is not given.

    `name` is given if it differs from the field's name, as in groups.
    """
    return dataclasses.field(default=default, kw_only=True, metadata={KEY: facts | {"default": default}})


def group(default: Any = (), *, item: type) -> Any:
    """Return a field that holds a tuple of `item`, a dataclass of settings whose flat values are lists."""
    return dataclasses.field(default=default, kw_only=True, metadata={ITEM: item})


def nested(default: Any = dataclasses.MISSING, *, item: type) -> Any:
    """Return a field that holds one `item`, a dataclass of settings, or None."""
    return dataclasses.field(default=default, kw_only=True, metadata={NESTED: item})


@cache
def list_own_settings(table: type) -> dict[str, Setting]:
    """Return the settings of a dataclass by field, without those of its groups and nested dataclasses."""
    hints = get_type_hints(table)
    own = [field for field in dataclasses.fields(table) if KEY in field.metadata]
    return {field.name: _build_setting(field, hints[field.name]) for field in own}


def list_settings(table: type) -> Iterator[Setting]:
    """Yield the settings of a dataclass and of the groups and dataclasses in its fields, in order."""
    own = list_own_settings(table)
    for field in dataclasses.fields(table):
        if KEY in field.metadata:
            yield own[field.name]
        elif ITEM in field.metadata:
            yield from (_list_values(one) for one in list_settings(field.metadata[ITEM]))
        elif NESTED in field.metadata:
            yield from list_settings(field.metadata[NESTED])


def _build_setting(field: dataclasses.Field, hint: Any) -> Setting:
    facts: dict[str, Any] = {"name": field.name} | dict(field.metadata[KEY])
    kind = facts.get("kind") or derive_kind(hint, facts.get("repeated", False))
    facts["kind"] = kind
    if facts.get("choices") and kind in (kinds.TEXT, kinds.INTEGER):
        facts["kind"] = dataclasses.replace(kind, schema={"enum": list(facts["choices"])})
    return Setting(**facts)


def _list_values(member: Setting) -> Setting:
    """Return the setting of a group's member with the values of all groups: a list."""
    default = () if member.is_required or member.default is None else (member.default,)
    kind = kinds.repeat(member.kind) if member.names_file else kinds.list_of(member.kind)
    return dataclasses.replace(member, default=default, kind=kind, repeated=True)


def derive_kind(hint: Any, repeated: bool = False) -> Kind:
    """Return the kind of the values of a type: a simple type, an optional one, or a tuple of one."""
    if get_origin(hint) is tuple:
        element = derive_kind(get_args(hint)[0])
        return kinds.repeat(element) if repeated else kinds.list_of(element)
    options: Sequence[Any] = [one for one in get_args(hint) if one is not type(None)] or [hint]
    return SIMPLE_KINDS[options[0]]
