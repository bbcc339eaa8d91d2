"""What a measurement was taken on."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CPU_FILE = Path("/proc/cpuinfo")
MEMORY_FILE = Path("/proc/meminfo")


def machine_facts(threads: int) -> dict[str, Any]:
    """The CPU, its cores, the threads that were used, memory, system, and the date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _field(CPU_FILE, "model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_bytes": 1024 * int(_field(MEMORY_FILE, "MemTotal").split()[0]),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def _field(file: Path, name: str) -> str:
    """The first line of that name, or an empty text."""
    for line in file.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
