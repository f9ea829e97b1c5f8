"""Fixtures of the image tests that tests of output files need, too."""

from tests.images.conftest import info

__all__ = ["info"]
