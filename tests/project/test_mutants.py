"""The table of mutants matches the code, and tools.mutants reports correct verdicts."""

import os
import shutil
import subprocess

import pytest

from tools.mutants.__main__ import main
from tools.mutants.table import ROOT, Mutant, read_table

MUTANTS = read_table()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_row_matches_the_code_and_its_tests_exist(mutant):
    assert list(mutant.find_faults(ROOT)) == []


def test_rows_are_unique():
    assert len(MUTANTS) == len({(mutant.file, mutant.before, mutant.after) for mutant in MUTANTS})
    assert all(mutant.name == mutant.name.upper() and mutant.description.endswith(".") for mutant in MUTANTS)


def test_names_are_listed_and_unknown_names_are_refused(capsys):
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [mutant.name for mutant in MUTANTS]
    assert main(["m05", "--list"]) == 0
    assert capsys.readouterr().out.startswith("M05  linfusion_cli/sampling/noise.py: ")
    assert main(["M05", "M99"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "M99" in err and "M05" not in err and err.count("\n") == 1


CALC = """
def larger(a, b):
    return a if a > b else b


def smaller(a, b):
    return a if a < b else b
"""
TESTS = """
import os, subprocess, sys

from linfusion_cli.calc import larger


def test_larger():
    assert larger(1, 2) == 2


def test_smaller():
    code = "from linfusion_cli.calc import smaller; raise SystemExit(smaller(1, 2))"
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 1
"""


@pytest.fixture
def project(tmp_path):
    """A git repository without commits, with a package named as the installed one."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "project"
    (folder / "linfusion_cli").mkdir(parents=True)
    (folder / "linfusion_cli/__init__.py").touch()
    (folder / "linfusion_cli/calc.py").write_text(CALC)
    (folder / "test_calc.py").write_text(TESTS)
    (folder / ".gitignore").write_text("ignored\n")
    (folder / "ignored").write_text("x")
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    return folder


def build_mutant(name, before, after, tests=("test_calc.py",)):
    return Mutant(name, f"{name} is wrong.", "linfusion_cli/calc.py", before, after, tests)


def test_verdicts_are_correct_also_in_processes_started_by_tests(project, capsys):
    table = [
        build_mutant("T1", "a > b", "a < b"),
        build_mutant("T2", "a < b", "a > b"),
        build_mutant("T3", "a > b", "a >= b"),
        build_mutant("T4", "return a", "return b"),
        build_mutant("T5", "a > b", "a >"),
        build_mutant("T6", "a > b", "a < b", ("test_calc.py::test_gone",)),
        build_mutant("T7", "\ndef larger", "\nimport nothing_of_this_name\ndef larger"),
    ]
    assert main([], project, table) == 1
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "killed" in lines["T1"] and lines["T1"].endswith("by test_calc.py::test_larger")
    assert "killed" in lines["T2"] and lines["T2"].endswith("by test_calc.py::test_smaller")
    assert "SURVIVED" in lines["T3"] and lines["T3"].endswith("T3 is wrong.")
    assert "BROKEN" in lines["T4"] and "2 times" in lines["T4"]
    assert "BROKEN" in lines["T5"] and "not Python" in lines["T5"]
    assert "BROKEN" in lines["T6"] and "test_gone" in lines["T6"]
    assert "BROKEN" in lines["T7"] and "nothing_of_this_name" in out
    assert "2 of 7 killed" in out
    assert (project / "linfusion_cli/calc.py").read_text() == CALC


def test_the_exit_code_is_0_if_all_are_killed_and_1_for_an_outdated_row(project, capsys):
    table = [build_mutant("T1", "a > b", "a < b"), build_mutant("T4", "a != b", "a == b")]
    assert main(["t1"], project, table) == 0
    assert "1 of 1 killed" in capsys.readouterr().out
    assert main(["T4"], project, table) == 1
    assert "0 times" in capsys.readouterr().out


def test_no_mutant_runs_if_tests_fail_without_any_edit(project, capsys):
    (project / "test_calc.py").write_text(TESTS + "\n\ndef test_wrong():\n    assert os.getcwd() == 'nowhere'\n")
    assert main([], project, [build_mutant("T1", "a > b", "a < b")]) == 1
    out = capsys.readouterr().out
    assert "test_calc.py::test_wrong" in out and "killed" not in out


def test_the_copy_has_the_current_files_without_ignored_ones(project):
    from tools.mutants.trial import copy_tree

    subprocess.run(["git", "-C", str(project), "add", "."], check=True)
    (project / "test_calc.py").unlink()
    (project / "new.py").touch()
    copy_tree(project, project.parent / "copy")
    found = [os.path.relpath(path, project.parent / "copy") for path in (project.parent / "copy").rglob("*.*")]
    assert sorted(found) == [".gitignore", "linfusion_cli/__init__.py", "linfusion_cli/calc.py", "new.py"]
