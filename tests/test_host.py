"""The memory and processors that the machine and its containers leave to a process."""

import os
from pathlib import Path

import psutil
import pytest

from ftaccum.runtime.host import free_on_host, usable_cpus

GB = 1_000_000_000
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


class Machine:
    """A folder with a `/proc/self` and a tree of control groups."""

    def __init__(self, folder: Path, version: int, path: str, root: str = "/") -> None:
        """Args:
        path: of the process's group.
        root: of the part of all groups that is mounted.
        """
        self.proc, self._mount = folder / "proc", folder / "cgroup"
        self._names = V1 if version == 1 else V2
        self.proc.mkdir()
        kind = "cgroup cgroup rw,memory" if version == 1 else "cgroup2 cgroup2 rw,nsdelegate"
        unrelated = f"22 1 0:21 / {folder}/sys rw,nosuid shared:7 - sysfs sysfs rw\n"
        unrelated += f"23 1 0:22 / {folder}/cpu rw shared:8 - cgroup cgroup rw,cpu,cpuacct\n"
        (self.proc / "mountinfo").write_text(f"{unrelated}31 23 0:28 {root} {self._mount} rw,relatime - {kind}\n")
        line = f"4:memory:{path}\n0::/\n" if version == 1 else f"0::{path}\n"
        (self.proc / "cgroup").write_text(f"5:cpu,cpuacct:/elsewhere\n{line}")

    def group(self, name: str, limit: int | str, used: int, cache: int = 0) -> None:
        folder = self._mount / name
        folder.mkdir(parents=True, exist_ok=True)
        limit_file, used_file, cache_entry = self._names
        (folder / limit_file).write_text(f"{limit}\n")
        (folder / used_file).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_anon 5\n{cache_entry} {cache}\nactive_file 3\n")


@pytest.fixture(autouse=True)
def _a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(available=500 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_cached_files_counts_as_free(version: int, tmp_path: Path) -> None:
    machine = Machine(tmp_path, version, "/")
    machine.group(".", limit=16 * GB, used=15 * GB, cache=13 * GB)
    assert free_on_host(machine.proc) == 14 * GB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tightest", ["slice", "slice/job", "slice/job/step"])
def test_the_smallest_limit_of_nested_groups_applies(version: int, tightest: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, version, "/slice/job/step")
    for name in ("slice", "slice/job", "slice/job/step", "slice/other"):
        machine.group(name, limit=64 * GB, used=10 * GB, cache=GB)
    machine.group("slice/other", limit=2 * GB, used=GB)
    machine.group(tightest, limit=20 * GB, used=10 * GB, cache=GB)
    assert free_on_host(machine.proc) == 11 * GB


def test_a_soft_limit_applies(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 2, "/service")
    machine.group("service", limit="max", used=2 * GB)
    (tmp_path / "cgroup" / "service" / "memory.high").write_text("8000000000\n")
    assert free_on_host(machine.proc) == 6 * GB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("path", ["/docker/abc", "/docker/abc/init", "/elsewhere"])
def test_a_container_sees_its_own_group_as_the_root(version: int, path: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, version, path, root="/docker/abc")
    machine.group(".", limit=8 * GB, used=GB)
    assert free_on_host(machine.proc) == 7 * GB


@pytest.mark.parametrize(("version", "unlimited"), [(1, 2**63 - 4096), (2, "max")])
def test_without_a_limit_the_memory_of_the_machine_applies(version: int, unlimited: int | str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, version, "/job")
    machine.group("job", limit=unlimited, used=3 * GB)
    assert free_on_host(machine.proc) == 500 * GB
    assert free_on_host(tmp_path / "nowhere") == 500 * GB


def test_a_group_beyond_its_limit_has_nothing_free(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 2, "/job")
    machine.group("job", limit=GB, used=2 * GB)
    assert free_on_host(machine.proc) == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes have no affinity here")
def test_processors_that_the_process_may_not_use_do_not_count() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [min(before)])
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cpus() == len(before)
