"""The table of wrong edits fits the code, and the program that tries them tells the truth."""

import os
import shutil
import subprocess

import pytest

from tools.mutants.__main__ import main
from tools.mutants.table import ROOT, Mutant, read_table

MUTANTS = read_table()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_row_fits_the_code_and_its_tests_are_there(mutant):
    assert list(mutant.faults(ROOT)) == []


def test_rows_are_told_apart():
    assert len(MUTANTS) == len({(mutant.file, mutant.before, mutant.after) for mutant in MUTANTS})
    assert all(mutant.name == mutant.name.upper() and mutant.what.endswith(".") for mutant in MUTANTS)


def test_names_are_listed_and_those_that_are_not_there_are_refused(capsys):
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
    """A tree that git has not seen yet, with a package of the name of the one that is installed."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    folder = tmp_path / "project"
    (folder / "linfusion_cli").mkdir(parents=True)
    (folder / "linfusion_cli/__init__.py").touch()
    (folder / "linfusion_cli/calc.py").write_text(CALC)
    (folder / "test_calc.py").write_text(TESTS)
    (folder / ".gitignore").write_text("ignored\n")
    (folder / "ignored").write_text("x")
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    return folder


def mutant(name, before, after, tests=("test_calc.py",)):
    return Mutant(name, f"{name} is wrong.", "linfusion_cli/calc.py", before, after, tests)


def test_each_verdict_is_true_also_in_processes_that_tests_start(project, capsys):
    table = [
        mutant("T1", "a > b", "a < b"),
        mutant("T2", "a < b", "a > b"),
        mutant("T3", "a > b", "a >= b"),
        mutant("T4", "return a", "return b"),
        mutant("T5", "a > b", "a >"),
        mutant("T6", "a > b", "a < b", ("test_calc.py::test_gone",)),
        mutant("T7", "\ndef larger", "\nimport nothing_of_this_name\ndef larger"),
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


def test_all_killed_is_0_and_one_that_fits_no_more_is_1(project, capsys):
    table = [mutant("T1", "a > b", "a < b"), mutant("T4", "a != b", "a == b")]
    assert main(["t1"], project, table) == 0
    assert "1 of 1 killed" in capsys.readouterr().out
    assert main(["T4"], project, table) == 1
    assert "0 times" in capsys.readouterr().out


def test_nothing_is_tried_where_tests_fail_without_any_edit(project, capsys):
    (project / "test_calc.py").write_text(TESTS + "\n\ndef test_wrong():\n    assert os.getcwd() == 'nowhere'\n")
    assert main([], project, [mutant("T1", "a > b", "a < b")]) == 1
    out = capsys.readouterr().out
    assert "test_calc.py::test_wrong" in out and "killed" not in out


def test_the_tree_that_is_tried_is_the_one_on_the_disk_without_ignored_files(project):
    from tools.mutants.trial import copy_tree

    subprocess.run(["git", "-C", str(project), "add", "."], check=True)
    (project / "test_calc.py").unlink()
    (project / "new.py").touch()
    copy_tree(project, project.parent / "copy")
    found = [os.path.relpath(path, project.parent / "copy") for path in (project.parent / "copy").rglob("*.*")]
    assert sorted(found) == [".gitignore", "linfusion_cli/__init__.py", "linfusion_cli/calc.py", "new.py"]
