"""A watched folder: lists are processed when they are completely written, and then moved."""

import signal
from functools import partial
from pathlib import Path

import pytest

from linfusion_cli.batch.watch import watch
from linfusion_cli.core.errors import Stopped
from linfusion_cli.core.events import Notice, Observer, ignore_event
from tests.support.fakes import Listener


@pytest.fixture
def lists(tmp_path):
    """A folder to watch."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def run_watch(folder: Path, polls: list, process, observer: Observer = ignore_event) -> None:
    """Watch `folder` and call one of `polls` between scans; stop the process after the last."""
    remaining = iter(polls)

    def pause(seconds):
        change = next(remaining, None)
        if change is None:
            raise Stopped(signal.SIGTERM)
        change()

    with pytest.raises(Stopped):
        watch(folder, process, pause, observer)


def nothing() -> None:
    """Change nothing between two scans."""


def test_lists_are_processed_when_they_are_complete_and_then_moved(lists):
    processed = []

    def process(path):
        processed.append(path.name)
        return "bad" not in path.name

    (lists / "a.txt").write_text("a")
    for name in (".hidden", "b.part", "c.tmp"):
        (lists / name).write_text("x")
    (lists / "done").mkdir()
    (lists / "done/a.txt").write_text("older")
    (lists / "done/a-2.txt").write_text("older")
    grows = [lambda n=n: (lists / "bad.csv").write_text("x" * n) for n in (1, 2, 3)]
    again = [lambda: (lists / "a.txt").write_text("again")]
    run_watch(lists, [*grows, nothing, *again, nothing, nothing, nothing], process)
    assert processed == ["a.txt", "bad.csv", "a.txt"]
    names = {str(path.relative_to(lists)) for path in lists.rglob("*") if path.is_file()}
    done = {f"done/{name}" for name in ("a.txt", "a-2.txt", "a-3.txt", "a-4.txt")}
    assert names == {".hidden", "b.part", "c.tmp", "failed/bad.csv"} | done
    assert (lists / "done/a.txt").read_text() == "older"


def test_a_list_that_changes_during_processing_is_processed_again(lists):
    processed = []

    def process(path):
        processed.append(path.read_text())
        if len(processed) == 1:
            path.write_text("changed")
        return True

    (lists / "a.txt").write_text("a")
    run_watch(lists, [nothing] * 5, process)
    assert processed == ["a", "changed"] and (lists / "done/a.txt").read_text() == "changed"


def test_a_list_that_cannot_be_moved_is_not_processed_again(lists, monkeypatch):
    processed = []

    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr("linfusion_cli.batch.watch.rename_noreplace", refuse)
    (lists / "a.txt").write_text("a")
    run_watch(lists, [nothing] * 5, lambda path: processed.append(path) or True)
    assert len(processed) == 1


NO_LISTS = ["README.md", "a.png", "b", "c.json", "d.tsv", "e.yaml", "f.txt.bak", "g.jsonl~"]
LISTS = ["a.jsonl", "b.NDJSON", "c.Csv", "d.toml", "e.TXT"]


def test_only_job_lists_are_processed_and_other_files_are_reported_once(lists):
    processed, listener = [], Listener()
    for name in [*NO_LISTS, *LISTS, ".hidden", "h.json.part"]:
        (lists / name).write_text("x")
    (lists / "folder.txt").mkdir()
    run_watch(lists, [nothing] * 6, lambda path: processed.append(path.name) or True, listener)
    assert processed == LISTS
    notices = [notice.text for notice in listener.of(Notice)]
    assert len(notices) == len(NO_LISTS) and all(".ndjson" in text and "\n" not in text for text in notices)
    assert [text.split()[0] for text in notices] == [str(lists / name) for name in NO_LISTS]
    assert all((lists / name).read_text() == "x" for name in NO_LISTS)
    assert {path.name for path in (lists / "done").iterdir()} == set(LISTS) and not list((lists / "failed").iterdir())


def test_other_files_are_reported_again_after_a_change(lists):
    listener = Listener()
    notes = lists / "notes.md"
    grows = [lambda n=n: notes.write_text("x" * n) for n in range(1, 6)]
    run_watch(lists, [*grows, nothing, nothing, nothing], lambda path: True, listener)
    assert len(listener.of(Notice)) == 1
    listener = Listener()
    changes, moves = partial(notes.write_text, "changed"), partial(notes.rename, lists / "notes.txt")
    processed = []
    polls = [nothing, nothing, changes, nothing, nothing, nothing, moves, nothing, nothing]
    run_watch(lists, polls, lambda path: processed.append(path.name) or True, listener)
    assert len(listener.of(Notice)) == 2 and processed == ["notes.txt"]


def test_results_files_are_never_processed_as_lists(lists):
    """The watched folder can also be the output folder."""
    processed, listener = [], Listener()
    for name in ("results.jsonl", "results-3-of-8.jsonl", "Results.JSONL", "my-results.jsonl"):
        (lists / name).write_text('{"list": "a.txt", "prompt": "a hill"}\n')
    run_watch(lists, [nothing, nothing, nothing], lambda path: not processed.append(path.name), listener)
    assert processed == ["my-results.jsonl"] and not listener.events
