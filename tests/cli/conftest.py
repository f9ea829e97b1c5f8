import sys

import pytest

from linfusion_cli.cli import app


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Run the program in tmp_path -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["linfusion", *map(str, arguments)])
        code = app.guarded()
        return code, *capsys.readouterr()

    return run
