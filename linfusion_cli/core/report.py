"""The report of a run: settings, measurements of each stage, and totals."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from linfusion_cli.core.events import StageKind
from linfusion_cli.core.geometry import Size

SCHEMA = 2


@dataclass(frozen=True)
class StageReport:
    """Duration and peak memory of one stage, measured and planned.

    None stands for `peak_device_bytes` without a GPU, `peak_host_bytes` if the system does not report it, planned
    values of stages without an estimate, and `phase` (an index) and its name of stages that belong to the whole run.
    """

    kind: StageKind
    phase_name: str | None
    size: Size | None
    seconds: float
    steps: int | None = None
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    planned_seconds: float | None = None
    planned_host_bytes: int | None = None
    planned_device_bytes: int | None = None
    phase: int | None = None

    @property
    def steps_per_second(self) -> float | None:
        """Speed of the stage, or None if it has no steps."""
        return self.steps / self.seconds if self.steps and self.seconds else None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, with the speed added."""
        size = str(self.size) if self.size else None
        return asdict(self) | {"size": size, "steps_per_second": self.steps_per_second}


@dataclass
class RunReport:
    """The report of a whole run; `output`, `size`, `format` and `file_bytes` are set when the file is complete."""

    request: dict[str, Any]  # what decides the image
    execution: dict[str, Any]  # files, device and budgets
    settings: dict[str, str]  # setting -> source of its value
    machine: dict[str, Any]
    versions: dict[str, str]
    plan: dict[str, Any] = field(default_factory=dict)
    weights: list[dict[str, Any]] = field(default_factory=list)  # per file: use, path, bytes, sha256
    stages: list[StageReport] = field(default_factory=list)
    already_complete: bool = False  # the file of the same request and weights existed: nothing was generated
    dtypes: list[dict[str, Any]] = field(default_factory=list)  # each with the phase and step where it starts
    resumed_from: str | None = None  # progress of an earlier run; all other values are those of this run
    checkpoints: dict[str, Any] = field(default_factory=dict)  # count, seconds and bytes of the saved states
    output: str | None = None
    size: Size | None = None
    format: str | None = None
    file_bytes: int | None = None
    total_seconds: float = 0.0

    @property
    def peak_host_bytes(self) -> int | None:
        """Largest peak of host memory of all stages, or None if none was measured."""
        return max((stage.peak_host_bytes for stage in self.stages if stage.peak_host_bytes), default=None)

    @property
    def peak_device_bytes(self) -> int | None:
        """Largest peak of GPU memory of all stages, or None if none was measured."""
        return max((stage.peak_device_bytes for stage in self.stages if stage.peak_device_bytes), default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values, with the schema version first."""
        values = {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in ("stages", "size")}
        peaks = {"peak_host_bytes": self.peak_host_bytes, "peak_device_bytes": self.peak_device_bytes}
        stages = [stage.to_json() for stage in self.stages]
        return {"schema": SCHEMA} | values | peaks | {"size": str(self.size) if self.size else None, "stages": stages}
