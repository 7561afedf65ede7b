"""Segments: the files in /dev/shm by which large arrays pass between processes of one machine (PROTOCOL.md §9.1).

A `Pool` is one peer's own: it writes, others read. Each segment serves again and again, because a fresh page costs more than the
copy into it. Two leases keep a segment from being written to again, and neither needs a message:

- its owner's: as long as a handle of it exists here, it may have to be sent again (a retry, a broker's successor);
- its readers': whoever maps it holds a shared flock on the file, and the kernel gives it up when the last view is
  collected, or the reader dies, however it does. The owner asks by trying for the exclusive one.

A reader maps privately (copy on write): arrays may be written to, as those from frames may, and the segment stays what
it was for the next attempt. A mapping that nobody wrote to serves again for the same segment.

Not multiprocessing.shared_memory: its resource tracker unlinks what others still use. What a peer leaves behind is
removed by the broker; a reader that has mapped a file keeps it, removed or not.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from forge_contract.errors import SegmentLost
from forge_contract.framing import Payload
from forge_contract.segments import DIRECTORY, Place, Terms, can_open, handle, lay_out

_GENERATION: Final = struct.Struct("<Q")
# A segment costs its owner two descriptors, as it does each of its readers; a process often may have but 1024.
SEGMENTS_AT_MOST: Final = 128
MAPPED_AT_MOST: Final = 128
MAPPINGS_KEPT: Final = 16
TRIED_AT_MOST: Final = 8  # segments that may turn out to be still looked at, before a new one is made
UNUSED_S: Final = 30.0  # what was not needed for so long is given back to the system at the next look
FULL_S: Final = 1.0  # how long a full /dev/shm is not asked again: an allocation that fails zeroes pages first
# Of what is free. Others need shared memory as well, and a container often has but 64 MiB: nobody is to find it full because of us.
SHARE_OF_FREE: Final = 0.5


class _Segment:
    __slots__ = ("_fd", "generation", "memory", "name", "path", "size", "unused_since")

    def __init__(self, directory: str, name: str, size: int) -> None:
        """Raises OSError when there is no room."""
        self.name = name
        self.path = os.path.join(directory, name)
        self.size = size
        self.generation = 0
        self.unused_since = 0.0
        self._fd = -1
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # For real: a sparse file would be a SIGBUS in the middle of the copy when the place is full.
            os.posix_fallocate(self._fd, 0, size)
            self.memory = mmap.mmap(self._fd, size)
        except BaseException:
            os.unlink(self.path)
            raise

    def claim(self) -> bool:
        """Whether nobody looks at it. It is locked until `open_up` then: who comes late with an old handle finds it so."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    @property
    def exists(self) -> bool:
        return os.fstat(self._fd).st_nlink > 0

    def fill(self, parts: Sequence[Any], starts: Sequence[int]) -> None:
        self.generation += 1
        _GENERATION.pack_into(self.memory, 0, self.generation)
        with memoryview(self.memory) as memory:
            for part, start in zip(parts, starts, strict=True):
                memory[start : start + len(part)] = part
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def discard(self) -> None:
        """Remove the file, unless the broker has done so: it clears away what the dead leave, and may take us for one. Who is just
        filling it, or has it mapped, keeps the memory."""
        with suppress(FileNotFoundError):  # asked before instead, it could go in between
            os.unlink(self.path)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class _Lease:
    """Shared by the handles of one payload; collected with the last of them."""

    __slots__ = ("_give_back", "_segment")

    def __init__(self, segment: _Segment, give_back: Callable[[_Segment], None]) -> None:
        self._segment = segment
        self._give_back = give_back

    def __del__(self) -> None:
        self._give_back(self._segment)


class Pool:
    """The segments of one peer, named after it. Any thread may `share`.

    `refused` counts payloads for which there was no room and which went as frames.
    """

    def __init__(
        self, terms: Terms, owner: str, *, directory: str = DIRECTORY, clock: Callable[[], float] = time.monotonic
    ):
        self._terms = terms
        self._owner = owner
        self._directory = directory
        self._clock = clock
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._counted = 0
        self._segments: set[_Segment] = set()
        # Of them, those without a handle, the longest unused first; readers may still look.
        self._unused: list[_Segment] = []
        # Handles may be collected at any moment, within this lock too: what they give back is laid here first.
        self._given_back: deque[_Segment] = deque()
        self._full_until = 0.0
        self._frozen = False
        self.bytes = 0
        self.refused = 0
        self._anchor = _open_anchor(directory, terms.prefix)

    def __repr__(self) -> str:
        return f"<Pool {len(self._segments)} segments, {self.bytes} of {self._terms.most} B, {self.refused} refused>"

    @property
    def vitals(self) -> dict[str, int]:
        """For a heartbeat."""
        return {"segment_bytes": self.bytes, "segments_refused": self.refused}

    def share(self, payload: Payload) -> Payload:
        """The payload with handles instead of its buffers; itself when they are small, or there is no room."""
        if isinstance(payload, bytes) or len(payload) < 2:
            return payload
        parts = payload[1:]
        sizes = [len(part) for part in parts]
        if sum(sizes) < self._terms.least or self._pid != os.getpid():
            return payload
        starts, size = lay_out(sizes)
        segment = self._take(_rounded(size))
        if segment is None:
            self.refused += 1
            return payload
        segment.fill(parts, starts)
        lease = _Lease(segment, self._given_back.append)
        places = [Place(segment.name, segment.generation, *at) for at in zip(starts, sizes, strict=True)]
        return [payload[0], *(handle(place, lease) for place in places)]

    def freeze(self) -> None:
        """Share no more. What is there stays for who was sent it, until the broker removes it; what came into being after our
        goodbye, as when a thread ends late, nobody would."""
        with self._lock:
            self._frozen = True

    def close(self) -> None:
        """Remove all files: nobody is left to be sent what is in them. In the child of a fork they are the parent's."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._frozen = True
            for segment in self._segments:
                segment.discard()
            self._segments.clear()
            self._unused.clear()
            self.bytes = 0
            if self._anchor is not None:
                os.close(self._anchor)
                self._anchor = None

    def _take(self, size: int) -> _Segment | None:
        """A segment of just this size, locked; None when there is no room."""
        with self._lock:
            if self._frozen:
                return None
            now = self._clock()
            while self._given_back:
                segment = self._given_back.popleft()
                if segment in self._segments:
                    segment.unused_since = now
                    self._unused.append(segment)
            fitting = [segment for segment in self._unused if segment.size == size][:TRIED_AT_MOST]
            for segment in fitting:
                if segment.claim():
                    self._unused.remove(segment)
                    if segment.exists:
                        return segment
                    self._drop(segment)
            return self._make(size, now)

    def _make(self, size: int, now: float) -> _Segment | None:
        for segment in list(self._unused):
            full = self.bytes + size > self._terms.most or len(self._segments) >= SEGMENTS_AT_MOST
            if (full or now - segment.unused_since > UNUSED_S) and segment.claim():
                self._unused.remove(segment)
                self._drop(segment)
        if self.bytes + size > self._terms.most or len(self._segments) >= SEGMENTS_AT_MOST or now < self._full_until:
            return None
        self._counted += 1
        try:
            if size > _free_bytes(self._directory) * SHARE_OF_FREE:
                raise OSError(errno.ENOSPC, "too little shared memory would be left to others")
            segment = _Segment(self._directory, f"{self._terms.prefix}-{self._owner}-{self._counted}", size)
        except OSError:
            self._full_until = now + FULL_S  # no space, no descriptors, no such directory: frames will do
            return None
        self._segments.add(segment)
        self.bytes += size
        segment.claim()
        return segment

    def _drop(self, segment: _Segment) -> None:
        self._segments.discard(segment)
        self.bytes -= segment.size
        segment.discard()


def _free_bytes(directory: str) -> int:
    place = os.statvfs(directory)
    return place.f_bavail * place.f_frsize


def _rounded(size: int) -> int:
    """Of few sizes, so that segments fit again: at most an eighth more."""
    step = max(mmap.PAGESIZE, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def _open_anchor(directory: str, prefix: str) -> int | None:
    """Hold the file that says that somebody of this broker's circle lives: what nobody holds, other brokers clear away."""
    try:
        descriptor = os.open(os.path.join(directory, prefix), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


# Reading.

# Of segments nobody here looks at any more, by path, the longest unused first: mapping them anew would cost a fault for every
# 16 pages, which is as long as copying them.
_mappings: dict[str, mmap.mmap] = {}
_looked_at = 0  # mappings that somebody looks at

_ENTRY: Final = 8  # bytes of /proc/self/pagemap for a page
# The topmost byte of an entry: bit 7 says present, 6 swapped out, 5 a page of the file and no copy of ours.
_CLEAN: Final = bytes(top for top in range(256) if top & 0x20 or not top & 0xC0)


def open_segments(places: Sequence[Place], directory: str = DIRECTORY) -> list[Any]:
    """The buffers at these places, writable, and nobody else's to see changed. Raises SegmentLost."""
    memories: dict[str, memoryview] = {}
    buffers: list[Any] = []
    for place in places:
        memory = memories.get(place.name)
        if memory is None:
            memory = memories[place.name] = _open(place, directory)
        if place.start + place.size > len(memory):
            raise SegmentLost(segment=place.name, why="it is shorter than its handle says")
        buffers.append(memory[place.start : place.start + place.size])
    return buffers


def _open(place: Place, directory: str) -> memoryview:
    """The segment's memory; with its last view the lease ends, and with this process."""
    path = os.path.join(directory, place.name)
    try:
        lease = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentLost(segment=place.name, why=error.strerror) from error
    try:
        fcntl.flock(lease, fcntl.LOCK_SH | fcntl.LOCK_NB)
        mapping = _mappings.pop(path, None) or _map(path)
        if _GENERATION.unpack_from(mapping)[0] != place.generation:
            raise SegmentLost(segment=place.name, why="its owner has used it again")
    except (OSError, ValueError, struct.error) as error:
        os.close(lease)
        raise SegmentLost(segment=place.name, why=f"it is not what it was: {error}") from error
    except BaseException:
        os.close(lease)
        raise
    global _looked_at  # noqa: PLW0603 - the descriptors are the process's
    if _looked_at >= MAPPED_AT_MOST:
        os.close(lease)
        return memoryview(bytearray(mapping))  # who keeps so many gets further ones as memory of its own
    _looked_at += 1
    view = (ctypes.c_char * len(mapping)).from_buffer(mapping)
    weakref.finalize(view, _leave, path, mapping, lease, ctypes.addressof(view)).atexit = False
    return memoryview(view).cast("B")


def _map(path: str) -> mmap.mmap:
    for one in list(_mappings)[:-MAPPINGS_KEPT]:
        _mappings.pop(one, None)
    for one in list(_mappings):
        if not os.path.exists(one):
            _mappings.pop(one, None)  # removed; only we hold its memory
    # Another descriptor than the lease's: the mapping keeps it, and would keep its lock.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)


def _leave(path: str, mapping: mmap.mmap, lease: int, address: int) -> None:
    """Nobody looks any more. Runs wherever the last view is collected, so it takes no lock."""
    global _looked_at  # noqa: PLW0603
    _looked_at -= 1
    if _is_clean(address, len(mapping)):
        _mappings[path] = mapping
    os.close(lease)


def _is_clean(address: int, size: int) -> bool:
    """Whether nobody wrote to the mapping: pages written to are copies, which would hide what the owner puts there next."""
    pages = -(-size // mmap.PAGESIZE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            entries = os.pread(pagemap.fileno(), pages * _ENTRY, address // mmap.PAGESIZE * _ENTRY)
    except OSError:
        return False
    return len(entries) == pages * _ENTRY and not entries[_ENTRY - 1 :: _ENTRY].translate(None, _CLEAN)


can_open(open_segments)
