"""The smallest limit of the host memory counts."""

import psutil

from linfusion_cli.hardware import host_memory

MIB = 1 << 20


def test_the_smallest_limit_counts(tmp_path, monkeypatch):
    """Limits of parent cgroups count, too."""
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    monkeypatch.setattr(host_memory, "PROC_SELF", tmp_path)
    (tmp_path / "cgroup").write_text("0::/user/job\n")
    (tmp_path / "user" / "job").mkdir(parents=True)
    whole = host_memory.memory_limit_bytes()
    (tmp_path / "user" / "job" / "memory.max").write_text("max\n")
    assert host_memory.memory_limit_bytes() == whole
    (tmp_path / "user" / "memory.max").write_text(f"{512 * MIB}\n")
    assert host_memory.memory_limit_bytes() == 512 * MIB
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    assert host_memory.memory_limit_bytes() == 100 * MIB
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "40")
    assert host_memory.memory_limit_bytes() == 512 * MIB
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    assert host_memory.memory_limit_bytes() == 120 * MIB


def test_what_is_free_is_what_the_tightest_limit_leaves(tmp_path, monkeypatch):
    """Cached files of a cgroup count as free; cgroup v1 has separate totals that include child groups."""
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    monkeypatch.setattr(host_memory, "PROC_SELF", tmp_path)
    (tmp_path / "cgroup").write_text("0::/job\n")
    (tmp_path / "job").mkdir()
    assert 0 < host_memory.free_host_bytes() <= psutil.virtual_memory().total
    (tmp_path / "job" / "memory.max").write_text(f"{512 * MIB}\n")
    (tmp_path / "job" / "memory.current").write_text(f"{300 * MIB}\n")
    assert host_memory.free_host_bytes() == 212 * MIB
    (tmp_path / "job" / "memory.stat").write_text(f"active_file {MIB}\ninactive_file {100 * MIB}\nanon 7\n")
    assert host_memory.free_host_bytes() == 313 * MIB
    more = f"total_cache 9\ntotal_active_file {2 * MIB}\ntotal_inactive_file {100 * MIB}\ninactive_file 5\n"
    (tmp_path / "job" / "memory.stat").write_text(more)
    assert host_memory.free_host_bytes() == 314 * MIB
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    assert host_memory.free_host_bytes() == 0
