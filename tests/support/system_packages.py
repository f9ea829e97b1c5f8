"""Programs that tests run but pip does not install; `system-packages.txt` lists their packages, which CI installs."""

import shutil
from pathlib import Path

import pytest

PACKAGES_FILE = Path(__file__).parents[1] / "system-packages.txt"


def read_packages() -> dict[str, str]:
    """Return {program: Debian package}."""
    lines = [line.split() for line in PACKAGES_FILE.read_text().splitlines() if not line.startswith("#")]
    return {program: package for package, program in lines}


def needs(program: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test if `program` is missing; raises KeyError if it is not in the list."""
    package = read_packages()[program]
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is missing (apt install {package})")
