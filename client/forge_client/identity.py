"""Who this process is, for a hello (PROTOCOL.md §5): enough for a broker on the same machine to hold just this process.

A pid alone is no identity: another container may use the same one, and a new process may get it once it is free. With
the machine's boot id, the pid namespace and the start time it is. Where there is no /proc (macOS) the last two are 0,
which tells the broker to go by silence instead of by pidfd.
"""

from __future__ import annotations

import os
import secrets
import socket
import uuid
from pathlib import Path
from typing import Any

from forge_contract.segments import DIRECTORY


def draw_name(role: str) -> str:
    """A peer's name: `c-` or `w-` and 16 hex digits. One for each socket, so that a fork never shares its parent's."""
    return f"{role[0]}-{secrets.token_hex(8)}"


def hello_identity() -> dict[str, Any]:
    """host, pid, pid_namespace, started, hostname, shared_memory of the calling process."""
    return {
        "host": boot_id(),
        "pid": os.getpid(),
        "pid_namespace": pid_namespace(),
        "started": started_ticks(os.getpid()),
        "hostname": socket.gethostname(),
        "shared_memory": shared_memory_id(),
    }


def boot_id() -> str:
    """The same for all processes of one machine until it boots again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return str(uuid.UUID(int=uuid.getnode()))  # no boot id here; the machine's network address stands for it


def pid_namespace() -> int:
    """The inode of this process's pid namespace; 0 where there are none."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def shared_memory_id() -> str:
    """The same for processes of one machine that can open each other's segments: containers may have a /dev/shm each.
    Empty where there is none."""
    try:
        return f"{os.stat(DIRECTORY).st_dev}:{os.getuid()}"
    except OSError:
        return ""


def started_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 where that cannot be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    # Field 22, counted behind the command: that is in parentheses and may hold spaces and parentheses itself.
    return int(stat.rpartition(b")")[2].split()[19])
