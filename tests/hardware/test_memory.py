"""The host's memory: the smallest limit counts, whoever has set it."""

import psutil

from linfusion_cli.hardware import memory

MIB = 1 << 20


def test_the_smallest_limit_counts(tmp_path, monkeypatch):
    """Also one that was set above this process's own cgroup."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "PROC_SELF", tmp_path)
    (tmp_path / "cgroup").write_text("0::/user/job\n")
    (tmp_path / "user" / "job").mkdir(parents=True)
    whole = memory.memory_limit_bytes()
    (tmp_path / "user" / "job" / "memory.max").write_text("max\n")
    assert memory.memory_limit_bytes() == whole
    (tmp_path / "user" / "memory.max").write_text(f"{512 * MIB}\n")
    assert memory.memory_limit_bytes() == 512 * MIB
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    assert memory.memory_limit_bytes() == 100 * MIB
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "40")
    assert memory.memory_limit_bytes() == 512 * MIB
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    assert memory.memory_limit_bytes() == 120 * MIB


def test_what_is_free_is_what_the_tightest_limit_leaves(tmp_path, monkeypatch):
    """Of a cgroup's use, cached files do not count; version 1 names those of the groups below apart."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "PROC_SELF", tmp_path)
    (tmp_path / "cgroup").write_text("0::/job\n")
    (tmp_path / "job").mkdir()
    assert 0 < memory.free_host_bytes() <= psutil.virtual_memory().total
    (tmp_path / "job" / "memory.max").write_text(f"{512 * MIB}\n")
    (tmp_path / "job" / "memory.current").write_text(f"{300 * MIB}\n")
    assert memory.free_host_bytes() == 212 * MIB
    (tmp_path / "job" / "memory.stat").write_text(f"active_file {MIB}\ninactive_file {100 * MIB}\nanon 7\n")
    assert memory.free_host_bytes() == 313 * MIB
    more = f"total_cache 9\ntotal_active_file {2 * MIB}\ntotal_inactive_file {100 * MIB}\ninactive_file 5\n"
    (tmp_path / "job" / "memory.stat").write_text(more)
    assert memory.free_host_bytes() == 314 * MIB
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    assert memory.free_host_bytes() == 0
