"""What a run measured, stage by stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from linfusion_cli.core.geometry import Size

SCHEMA = 1


@dataclass(frozen=True)
class StageReport:
    """One stretch of work: what it was, how long it took, how much memory it needed at its peak, and what was planned.

    `peak_device_bytes` is None without an accelerator, `peak_host_bytes` where the system does not tell; plans are None
    for work that none was made for.
    """

    name: str
    kind: str  # hash, text, load, denoise, decode, encode, write
    size: Size | None
    seconds: float
    steps: int | None = None
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    planned_seconds: float | None = None
    planned_host_bytes: int | None = None
    planned_device_bytes: int | None = None

    @property
    def steps_per_second(self) -> float | None:
        return self.steps / self.seconds if self.steps and self.seconds else None

    def to_json(self) -> dict[str, Any]:
        size = str(self.size) if self.size else None
        return asdict(self) | {"size": size, "steps_per_second": self.steps_per_second}


@dataclass
class RunReport:
    """The whole run; `output` and the figures of the file are set once it is complete under its final name."""

    request: dict[str, Any]
    settings: dict[str, str]  # setting -> where its value came from
    machine: dict[str, Any]
    versions: dict[str, str]
    plan: dict[str, Any] = field(default_factory=dict)
    weights: list[dict[str, Any]] = field(default_factory=list)  # of every file: use, path, bytes, sha256
    stages: list[StageReport] = field(default_factory=list)
    already_complete: bool = False  # by an earlier run: this one has made nothing
    dtypes: list[dict[str, Any]] = field(default_factory=list)  # with the phase and step where each begins
    resumed_from: str | None = None  # what an earlier run had reached; all other figures are of this one
    checkpoints: dict[str, Any] = field(default_factory=dict)  # count, seconds and bytes of the states saved
    output: str | None = None
    size: Size | None = None
    format: str | None = None
    file_bytes: int | None = None
    already_complete: bool = False  # the file was there, of the same request and weights: nothing was made
    total_seconds: float = 0.0

    @property
    def peak_host_bytes(self) -> int | None:
        return max((stage.peak_host_bytes for stage in self.stages if stage.peak_host_bytes), default=None)

    @property
    def peak_device_bytes(self) -> int | None:
        return max((stage.peak_device_bytes for stage in self.stages if stage.peak_device_bytes), default=None)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, with the schema's number first."""
        values = {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in ("stages", "size")}
        peaks = {"peak_host_bytes": self.peak_host_bytes, "peak_device_bytes": self.peak_device_bytes}
        stages = [stage.to_json() for stage in self.stages]
        return {"schema": SCHEMA} | values | peaks | {"size": str(self.size) if self.size else None, "stages": stages}
