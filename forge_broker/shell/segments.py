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

_ANCHOR: Final = re.compile(r"forge-[0-9a-f]{16}\Z")


class Segments:
    """Of the broker at this trusted address. Raises OSError where there is no shared memory."""

    def __init__(self, address: str, directory: str = DIRECTORY) -> None:
        self._directory = Path(directory)
        self.id = f"{self._directory.stat().st_dev}:{os.getuid()}"
        # Of the address and nothing else: a successor at it has to know its predecessor's files.
        self.prefix = f"forge-{hashlib.blake2s(f'{os.getuid()} {address}'.encode(), digest_size=8).hexdigest()}"
        self._clear_abandoned()
        self._anchor = os.open(self._directory / self.prefix, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._anchor, fcntl.LOCK_SH)

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

    def _clear_abandoned(self) -> None:
        """What brokers of this user and all their peers left when they were killed together: nobody holds its anchor."""
        for path in self._directory.glob("forge-*"):
            if not _ANCHOR.match(path.name) or path.name == self.prefix:
                continue
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                continue  # another user's, or gone meanwhile
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                for left in (*self._directory.glob(f"{path.name}-*"), path):
                    left.unlink(missing_ok=True)
            finally:
                os.close(descriptor)
