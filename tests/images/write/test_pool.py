import os

from linfusion_cli.images.write import pool


def test_threads_follow_the_cpus_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert pool.count_default_threads() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(200)))
    assert pool.count_default_threads() == pool.MAX_THREADS
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert pool.count_default_threads() == 1
