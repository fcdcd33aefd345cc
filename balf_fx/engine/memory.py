"""How much memory there is, and the option that takes some of it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from balf_fx.calibration.batches import MEMORY
from balf_fx.errors import OptionError

SHARE = 0.5
"""Default of the option `memory`."""

KINDS = 2
"""What shares the memory evenly: statistics, with the weights and spectra beside them, and values that are kept. The
values of the batch that is being run take the place of either."""

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def check_memory(memory: Any) -> None:
    """Check the option `memory`; errors as in `bytes_of`."""
    bytes_of(memory, free=0)


def bytes_of(memory: Any, free: int | None = None) -> int:
    """The number of bytes of a size as in `size_of`, or of 0.25 or "0.25", a share of what is free.

    Args:
        free: the bytes that are free; None to look.

    Raises:
        OptionError: it is neither a number of bytes nor a share in (0, 1).
    """
    share = _share(memory)
    if share is not None:
        return int(share * (free_memory() if free is None else free))
    return size_of(memory, "memory", ", or a share of the memory that is free, such as 0.25")


def size_of(size: Any, name: str, otherwise: str = "") -> int:
    """The number of bytes of 2147483648, "2147483648" or "2GiB".

    Args:
        name: what it is, for messages.
        otherwise: what else it may be, for messages.

    Raises:
        OptionError: it is no number of bytes.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", str(size).lower())
    if not isinstance(size, str) or found is None or _share(size) is not None:
        raise OptionError(f"{name} must be a number of bytes, such as 2147483648 or '2G'{otherwise}, not {size!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def _share(memory: Any) -> float | None:
    """A share in (0, 1), as a number or in words; None if it is something else."""
    share = memory if isinstance(memory, float) else None
    if isinstance(memory, str):
        with contextlib.suppress(ValueError):
            share = float(memory)
    return share if share is not None and 0 < share < 1 else None


def free_memory(root: Path = Path("/")) -> int:
    """The bytes of memory that this process may still take without swapping.

    On Linux, what the kernel counts as available, or what the process's control groups leave of their limits if that is
    less; elsewhere all memory of the machine, and if even that is not known, four times 2 GiB.

    Args:
        root: the root of the file system.
    """
    found = [*_available(root), *_left_of_limits(root)]
    if found:
        return max(min(found), 0)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return 4 * MEMORY


def _available(root: Path) -> Iterator[int]:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if found is not None:
        yield int(found[1]) << 10


def _left_of_limits(root: Path) -> Iterator[int]:
    """What each control group of the process leaves, of version 2 and of version 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, own = line.split(":", 2)
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        if controllers and "memory" not in controllers.split(","):
            continue
        group = top / own.lstrip("/")
        for each in (group, *group.parents):
            limit, used = (_text(each / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():
                cached = re.search(r"^(?:total_)?inactive_file (\d+)", _text(each / "memory.stat"), re.MULTILINE)
                yield int(limit) - int(used) + (0 if cached is None else int(cached[1]))
            if each == top:
                break


def _text(path: Path) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
