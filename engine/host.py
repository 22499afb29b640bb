"""What the host grants this process: CPUs and memory, within the limits of its control groups. Without torch.

Control groups of version 1 and 2 are read from the process's own up to the root. Each limit on the way
counts. Read below `root`; what is not there does not limit.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

_ROOT = Path("/")
# GNU's runtime counts turns of its loop (about 50 microseconds in all), Intel's counts milliseconds.
_BRIEF_WAITING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}
_UNKNOWN_MEMORY = 1 << 30  # bytes that are taken to be free where nothing tells


def num_cpus(root: Path = _ROOT, allowed: Collection[int] | None = None) -> int:
    """Cores that this process may keep busy: those of its affinity mask, hyperthreads counted once, and no
    more than its quota, rounded up.

    allowed: numbers of the mask's CPUs, asked of the system where None.
    """
    if allowed is None:
        affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
        allowed = range(os.cpu_count() or 1) if affinity is None else affinity(0)
    cores = {_siblings(root, cpu) for cpu in allowed}
    quotas = [math.ceil(quota) for quota in _quotas(root)]
    return max(1, min([len(cores), *quotas]))


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that can be taken without swapping, within the limits of control groups. What the kernel could
    free counts."""
    return max(0, min([_machine_memory(root), *_group_memory(root)]))


def brief_waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process whose OpenMP threads, which are torch's, soon give up their cores while
    they wait for each other: by default they keep them for milliseconds. What somebody has set stays."""
    if "OMP_WAIT_POLICY" in environment:
        return dict(environment)
    return {**_BRIEF_WAITING, **environment}


def _siblings(root: Path, cpu: int) -> str:
    """The same for all hyperthreads of a core."""
    text = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return str(cpu) if text is None else text.strip()


def _quotas(root: Path) -> Iterator[float]:
    """CPUs' worth of time that each group around this process allows it."""
    for group in _groups(root, None):
        quota, _, period = (_read(group / "cpu.max") or "").partition(" ")
        if quota.isdigit() and (length := _number(period)):
            yield int(quota) / length
    for group in _groups(root, "cpu"):
        allowed, length = (_integer(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if allowed is not None and length and allowed > 0:
            yield allowed / length


def _machine_memory(root: Path) -> int:
    found = re.search(r"^MemAvailable: *(\d+) kB", _read(root / "proc/meminfo") or "", re.MULTILINE)
    if found is not None:
        return int(found[1]) << 10
    try:
        # Not Linux, or a very old one: assume that half of the machine's memory is free.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return _UNKNOWN_MEMORY


def _group_memory(root: Path) -> Iterator[int]:
    """Bytes that each group around this process has left. Contents of files, unless used lately, are free."""
    for group in _groups(root, None):
        limits = (_integer(group / name) for name in ("memory.max", "memory.high"))
        cached = _statistic(group / "memory.stat", "inactive_file")
        for limit in limits:
            if limit is not None:
                yield limit - (_integer(group / "memory.current") or 0) + cached
    for group in _groups(root, "memory"):
        limit = _integer(group / "memory.limit_in_bytes")
        cached = _statistic(group / "memory.stat", "total_inactive_file")
        if limit is not None:
            yield limit - (_integer(group / "memory.usage_in_bytes") or 0) + cached


def _groups(root: Path, controller: str | None) -> Iterator[Path]:
    """Folders of this process's group and those above it. controller: of version 1; None for version 2."""
    path = _group_path(root, controller)
    if path is None:
        return
    for mount, mounted in _mounts(root, controller):
        # In a container the mount may show only a part of the tree, or the path may lie outside of it.
        inside = path.removeprefix(mounted) if f"{path}/".startswith(f"{mounted}/") else ""
        parts = [part for part in inside.split("/") if part not in ("", "..")]
        for count in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:count])


def _group_path(root: Path, controller: str | None) -> str | None:
    """This process's group: "" for the root of the hierarchy."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" if controller is None else controller in controllers.split(","):
            return path.rstrip("/")
    return None


def _mounts(root: Path, controller: str | None) -> Iterator[tuple[Path, str]]:
    """Where the hierarchy is mounted, and which group lies there."""
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kinds) < 3:
            continue
        if controller is None:
            fits = kinds[0] == "cgroup2"
        else:
            fits = kinds[0] == "cgroup" and controller in kinds[2].split(",")
        if fits:
            mounted, mount = (_unescaped(field) for field in fields[3:5])
            yield root / mount.lstrip("/"), mounted.rstrip("/")


def _unescaped(field: str) -> str:
    """mountinfo writes spaces and similar characters as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _statistic(path: Path, name: str) -> int:
    found = re.search(rf"^{name} (\d+)$", _read(path) or "", re.MULTILINE)
    return 0 if found is None else int(found[1])


def _integer(path: Path) -> int | None:
    return _number(_read(path) or "")


def _number(text: str) -> int | None:
    """None where the file holds no number, but "max" or nothing."""
    try:
        return int(text)
    except ValueError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None
