"""The broker's part in shared memory (PROTOCOL.md §9.1): it names the files, removes those of the dead, and reads one where a peer
cannot. It makes none. The segments themselves are `forge_client.segments`' business."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from forge_contract.errors import ForgeError
from forge_contract.segments import ALIGN, DIRECTORY, VANISHED, read_handle

_ANCHOR: Final = re.compile(r"forge-[0-9a-f]{16}(?=-[cw]-|\Z)")  # with which the files of one circle begin


class Segments:
    """Of the broker at this trusted address. Raises OSError where there is no shared memory."""

    def __init__(self, address: str, directory: str = DIRECTORY) -> None:
        self._directory = Path(directory)
        self.id = f"{self._directory.stat().st_dev}:{os.getuid()}"
        # Of the address and nothing else: a successor at it has to know its predecessor's files.
        self.prefix = f"forge-{hashlib.blake2s(f'{os.getuid()} {address}'.encode(), digest_size=8).hexdigest()}"
        self._clear_abandoned()
        self._anchor = self._hold_anchor()

    def read(self, frame: Any) -> Any:
        """The buffer that a handle stands for: VANISHED if it is gone. One copy."""
        try:
            place = read_handle(frame)
            with (self._directory / place.name).open("rb", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                buffer = bytearray(place.size)
                whole = os.preadv(file.fileno(), [buffer], place.start) == place.size
                if whole and int.from_bytes(os.pread(file.fileno(), ALIGN, 0)[:8], "little") == place.generation:
                    return buffer
        except (OSError, ForgeError):
            return VANISHED  # who is sent this raises what there is to say, for the call it belongs to
        return VANISHED

    def unlink(self, owner: str) -> None:
        """Remove the files of a peer."""
        for path in self._directory.glob(f"{self.prefix}-{owner}-*"):
            path.unlink(missing_ok=True)

    def sweep(self, living: Collection[str]) -> None:
        """Remove the files of all peers but these."""
        for path in self._directory.glob(f"{self.prefix}-*"):
            if path.name.removeprefix(f"{self.prefix}-").rpartition("-")[0] not in living:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove everything."""
        self.sweep(())
        (self._directory / self.prefix).unlink(missing_ok=True)
        os.close(self._anchor)

    def _hold_anchor(self) -> int:
        while True:
            anchor = os.open(self._directory / self.prefix, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(anchor, fcntl.LOCK_SH)
            if os.fstat(anchor).st_nlink:
                return anchor
            os.close(anchor)  # another broker was just removing it

    def _clear_abandoned(self) -> None:
        """What brokers of this user and all their peers left when they were killed together: nobody holds its anchor. Where there
        is none, a broker ended and removed it, and a peer made another segment before it heard of that."""
        ours = (path.name for path in self._directory.glob("forge-*") if _is_ours(path))
        found = map(_ANCHOR.match, ours)
        for prefix in {one[0] for one in found if one is not None} - {self.prefix}:
            path = self._directory / prefix
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except OSError:
                continue  # another user's
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                for left in (*self._directory.glob(f"{path.name}-*"), path):
                    left.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def _is_ours(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid()
    except FileNotFoundError:
        return False  # gone meanwhile
