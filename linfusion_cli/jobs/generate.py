"""From a prompt to a file: what `linfusion generate` does."""

from __future__ import annotations

from collections.abc import Mapping

from linfusion_cli.core.events import Observer, nobody
from linfusion_cli.core.report import RunReport
from linfusion_cli.run.pipeline import make_picture
from linfusion_cli.settings.request import GenerateRequest


def generate(request: GenerateRequest, origins: Mapping[str, str], observer: Observer = nobody) -> RunReport:
    """Paint what the prompt says; raises a LinfusionError with nothing left behind."""
    return make_picture(request, None, origins, observer)
