"""What the kernel knows of processes on this machine: who we are, and when a peer's process ends (F1).

Where there is no pidfd (macOS) nobody is watched, and silence decides.
"""

from __future__ import annotations

import os
from pathlib import Path

from forge_broker.core.actions import Watch


def host_id() -> str:
    """This machine, since its last boot; the same string that peers put into their hello."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return os.uname().nodename


def pid_namespace() -> int:
    """0 where there is none to be told apart."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def start_time(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 when it cannot be told. A pid alone may have been given to another process."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def is_stopped(pid: int) -> bool:
    """Whether the process is in state T: stopped by a signal, as by Ctrl-Z. Of a watched peer the pid is its own until it is reaped."""
    fields = _stat(pid)
    return bool(fields) and fields[0] == "T"


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the command's name; none where there is no such process, or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    # The command's name, in parentheses, may hold anything; the numbers come after the last one.
    return stat.rpartition(")")[2].split()


class Watches:
    """The pidfds of peers, by descriptor."""

    def __init__(self) -> None:
        self._host = host_id()
        self._namespace = pid_namespace()
        self._names: dict[int, str] = {}
        self._over: list[int] = []  # of who has left, open until `close_over`

    def open(self, watch: Watch) -> int | None:
        """A descriptor that becomes readable when the process ends; None when it is not on this machine, or not what it says it is."""
        if watch.host != self._host or watch.pid_namespace != self._namespace or not hasattr(os, "pidfd_open"):
            return None
        try:
            descriptor = os.pidfd_open(watch.pid)
        except OSError:
            return None
        if start_time(watch.pid) != watch.started:
            os.close(descriptor)
            return None
        self._names[descriptor] = watch.name
        return descriptor

    def ended(self, descriptor: int) -> str:
        """The peer behind a readable descriptor, which is closed."""
        os.close(descriptor)
        return self._names.pop(descriptor)

    def end(self, name: str) -> list[int]:
        """Nobody watches this peer any more: its descriptors, which stay open until `close_over`. Closed at once, their numbers could be
        given to others, of whom the poller seemed to have told in this turn."""
        found = [descriptor for descriptor, other in self._names.items() if other == name]
        for descriptor in found:
            del self._names[descriptor]
        self._over += found
        return found

    def close_over(self) -> None:
        """All that the poller told of has been looked at."""
        for descriptor in self._over:
            os.close(descriptor)
        self._over.clear()

    def descriptor_of(self, name: str) -> int | None:
        return next((descriptor for descriptor, other in self._names.items() if other == name), None)

    def __contains__(self, descriptor: int) -> bool:
        return descriptor in self._names

    def close(self) -> None:
        self.close_over()
        for descriptor in self._names:
            os.close(descriptor)
        self._names.clear()
