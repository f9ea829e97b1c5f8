"""Programs that tests run and pip does not install: `system-packages.txt` names their packages, which CI installs."""

import shutil
from pathlib import Path

import pytest

PACKAGES_FILE = Path(__file__).parents[1] / "system-packages.txt"


def read_packages() -> dict[str, str]:
    """Program -> the Debian package that has it."""
    lines = [line.split() for line in PACKAGES_FILE.read_text().splitlines() if not line.startswith("#")]
    return {program: package for package, program in lines}


def needs(program: str) -> pytest.MarkDecorator:
    """Skips a test where `program` is missing; raises KeyError for one without a package in the list."""
    package = read_packages()[program]
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is missing (apt install {package})")
