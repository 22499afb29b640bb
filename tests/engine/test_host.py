"""CPUs and memory that control groups grant, on files as kernels write them."""

from __future__ import annotations

import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from engine import host

GIB = 1 << 30
MEMINFO = "MemTotal:       24684084 kB\nMemFree:        22763996 kB\nMemAvailable:   16777216 kB\n"  # 16 GiB
V1 = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V2 = "30 23 0:27 {root} /sys/fs/cgroup rw,nosuid,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
UNLIMITED = "9223372036854771712\n"


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def version_1(root: Path, path: str, files: dict[str, str], mounted: str = "/") -> Path:
    """files: below /sys/fs/cgroup."""
    groups = f"4:memory:{path}\n1:cpu,cpuacct:{path}\n0::/\n"
    basic = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": groups,
        "proc/self/mountinfo": V1.format(root=mounted),
    }
    return lay(root, basic | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


def version_2(root: Path, path: str, files: dict[str, str], mounted: str = "/") -> Path:
    basic = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": f"0::{path}\n",
        "proc/self/mountinfo": V2.format(root=mounted),
    }
    return lay(root, basic | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


def test_a_limit_of_version_1_holds_and_files_in_its_cache_are_free(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": UNLIMITED,
        "memory/memory.usage_in_bytes": f"{9 * GIB}\n",
        "memory/docker/abc/memory.limit_in_bytes": f"{1200 << 20}\n",
        "memory/docker/abc/memory.usage_in_bytes": f"{700 << 20}\n",
        "memory/docker/abc/memory.stat": f"inactive_file 1\ntotal_inactive_file {100 << 20}\n",
    }
    assert host.available_memory(version_1(tmp_path, "/docker/abc", files)) == 600 << 20


def test_the_tightest_group_on_the_way_to_the_root_of_version_2_holds(tmp_path: Path) -> None:
    files = {
        "user.slice/memory.max": f"{3 * GIB}\n",
        "user.slice/memory.current": f"{2 * GIB}\n",
        "user.slice/memory.stat": f"anon 5\ninactive_file {GIB // 2}\nactive_file 77\n",
        "user.slice/app.scope/memory.max": "max\n",
        "user.slice/app.scope/memory.current": f"{GIB}\n",
        "other.slice/memory.max": "1\n",
    }
    assert host.available_memory(version_2(tmp_path, "/user.slice/app.scope", files)) == GIB + GIB // 2
    lay(tmp_path / "sys/fs/cgroup", {"user.slice/app.scope/memory.high": f"{GIB + 4096}\n"})
    assert host.available_memory(tmp_path) == 4096


@pytest.mark.parametrize(("path", "mounted"), [("/", "/"), ("/docker/abc", "/docker/abc"), ("/../x", "/a")])
def test_in_a_container_the_mount_is_the_group(tmp_path: Path, path: str, mounted: str) -> None:
    files = {"memory.max": f"{GIB}\n", "memory.current": f"{GIB // 4}\n", "cpu.max": "50000 100000\n"}
    root = version_2(tmp_path, path, files, mounted)
    assert host.available_memory(root) == GIB - GIB // 4
    assert host.num_cpus(root, range(8)) == 1


def test_without_limits_it_is_the_machines_memory(tmp_path: Path) -> None:
    assert host.available_memory(version_2(tmp_path / "2", "/a/b", {})) == 16 * GIB
    files = {"memory/memory.limit_in_bytes": UNLIMITED, "memory/memory.usage_in_bytes": "1\n"}
    assert host.available_memory(version_1(tmp_path / "1", "/gone", files)) == 16 * GIB


def test_more_in_use_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    files = {"a/memory.max": "1000\n", "a/memory.current": "2000\n"}
    assert host.available_memory(version_2(tmp_path, "/a", files)) == 0


def test_a_system_without_proc_has_memory_and_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.available_memory(tmp_path) > 0
    assert host.num_cpus(tmp_path, [0, 1, 2]) == 3
    monkeypatch.delattr("os.sched_getaffinity")
    assert host.num_cpus(tmp_path) >= 1
    monkeypatch.delattr("os.sysconf")
    assert host.available_memory(tmp_path) > 0


@given(
    quota=st.integers(1000, 10_000_000),
    period=st.integers(1000, 1_000_000),
    count=st.integers(1, 64),
    above=st.integers(1, 64),
)
def test_a_quota_is_rounded_up_and_holds_from_any_group(
    tmp_path_factory: pytest.TempPathFactory, quota: int, period: int, count: int, above: int
) -> None:
    expected = max(1, min(count, above, math.ceil(quota / period)))
    tmp_path = tmp_path_factory.mktemp("root")
    files = {
        "a/b/cpu.max": f"{quota} {period}\n",
        "a/cpu.max": f"{above}000 1000\n",
        "cpu.max": "max 100000\n",
    }
    assert host.num_cpus(version_2(tmp_path / "2", "/a/b/c", files), range(count)) == expected
    files = {
        "cpu,cpuacct/a/cpu.cfs_quota_us": f"{quota}\n",
        "cpu,cpuacct/a/cpu.cfs_period_us": f"{period}\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    expected = max(1, min(count, math.ceil(quota / period)))
    assert host.num_cpus(version_1(tmp_path / "1", "/a", files), range(count)) == expected


def test_hyperthreads_of_a_core_count_once_and_the_mask_holds(tmp_path: Path) -> None:
    files = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}\n"
        for cpu in range(8)
    }
    root = lay(tmp_path, files)
    assert host.num_cpus(root, range(8)) == 4
    assert host.num_cpus(root, [1, 5]) == 1
    assert host.num_cpus(root, [1, 2, 6]) == 2


def test_mounts_with_spaces_in_their_names_are_found(tmp_path: Path) -> None:
    mount = "30 23 0:27 / /my\\040groups rw - cgroup2 cgroup2 rw\n"
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": mount,
        "my groups/cpu.max": "100000 100000\n",
    }
    assert host.num_cpus(lay(tmp_path, files), range(4)) == 1


def test_openmp_threads_of_an_engine_wait_only_briefly_unless_somebody_says_otherwise() -> None:
    assert int(host.brief_waiting({"A": "b"})["GOMP_SPINCOUNT"]) < 10_000
    assert host.brief_waiting({"A": "b"})["A"] == "b"
    assert host.brief_waiting({"GOMP_SPINCOUNT": "7"})["GOMP_SPINCOUNT"] == "7"
    assert host.brief_waiting({"OMP_WAIT_POLICY": "active"}) == {"OMP_WAIT_POLICY": "active"}
