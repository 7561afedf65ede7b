"""Binding the broker's addresses: private directories, locks, trust (W6, W9). Called once, at the start.

libzmq lets a second broker bind an ipc path that is in use: it removes the first one's socket and takes over in silence. A lock
file beside the socket forbids that, and says who holds it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket as sockets
import stat
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from forge_contract.addresses import SEND_BUFFER_BYTES, ipc_path, is_loopback
from forge_contract.config import BrokerConfig
from forge_contract.errors import AddressInUse, ConfigError


class Bound(NamedTuple):
    socket: zmq.Socket[bytes]
    address: str  # with the port, where `*` was asked for
    trusted: bool
    lock: int | None  # the lock file's descriptor, held as long as the socket
    orphaned: bool = False  # the last one that held it ended without a word: killed, or the machine was
    accepted: zmq.Socket[bytes] | None = None  # over ipc: tells of each connection, with its descriptor


def bind_all(context: zmq.Context[zmq.Socket[bytes]], config: BrokerConfig) -> list[Bound]:
    """One ROUTER per address. Raises AddressInUse or ConfigError; what was bound before it is released then."""
    bound: list[Bound] = []
    try:
        for address in config.bind:
            bound.append(_bind(context, address, config))
    except BaseException:
        for one in bound:
            release(one)
        raise
    return bound


def release(bound: Bound, *, linger_ms: int = 0, directory_too: bool = False) -> None:
    """`linger_ms`: for what is still in the pipes. `directory_too`: an embedded broker's directory was made for it alone and
    goes with it; elsewhere the lock file stays, since removing it would let two brokers hold two files of one name."""
    _close(bound.socket, bound.accepted, linger_ms)
    path = ipc_path(bound.address)
    if path is not None:
        Path(path).unlink(missing_ok=True)
    if bound.lock is not None:
        os.ftruncate(bound.lock, 0)  # we leave in order: nobody has to recover what we had
        os.close(bound.lock)
    if path is not None and directory_too:
        Path(f"{path}.lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody put a file of theirs into it
            Path(path).parent.rmdir()


def _bind(context: zmq.Context[zmq.Socket[bytes]], address: str, config: BrokerConfig) -> Bound:
    if not is_loopback(address) and not config.insecure:
        raise ConfigError(
            where="bind",
            message=f"{address} can be reached from other machines, and this release has no encryption or keys: anyone who "
            "reaches it could call your services. Bind 127.0.0.1, or say --insecure if the network is yours alone",
        )
    path = ipc_path(address)
    lock = None
    trusted = orphaned = False
    if path is not None:
        trusted = make_private(Path(path).parent)
        lock, orphaned = _lock(Path(f"{path}.lock"), address)
    socket = context.socket(zmq.ROUTER)
    for option, value in (
        (zmq.ROUTER_MANDATORY, 1),
        (zmq.SNDHWM, 0),
        (zmq.RCVHWM, 0),
        (zmq.MAXMSGSIZE, config.max_message_bytes),
        (zmq.LINGER, 0),
        (zmq.HEARTBEAT_IVL, 1000),
        (zmq.HEARTBEAT_TIMEOUT, 5000),
        (zmq.IPV6, int("[" in address)),
    ):
        socket.setsockopt(option, value)
    # Before anybody can connect.
    accepted: zmq.Socket[bytes] | None = None if path is None else socket.get_monitor_socket(zmq.EVENT_ACCEPTED)
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        _close(socket, accepted)
        if lock is not None:
            os.close(lock)
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(address=address, holder="") from error
        raise ConfigError(where="bind", message=f"{address}: {error.strerror}") from error
    last = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(last, bytes)
    return Bound(socket, last.rstrip(b"\0").decode(), trusted, lock, orphaned, accepted)


def _close(socket: zmq.Socket[bytes], accepted: zmq.Socket[bytes] | None, linger_ms: int = 0) -> None:
    if accepted is not None:
        socket.disable_monitor()
        accepted.close(linger=0)
    socket.close(linger=linger_ms)


def widen_accepted(accepted: zmq.Socket[bytes]) -> None:
    """Give each connection that it tells of its SEND_BUFFER_BYTES, until it tells no more: its descriptor, as all of libzmq's, says only
    that something has happened."""
    while True:
        try:
            descriptor = recv_monitor_message(accepted, zmq.NOBLOCK)["value"]
        except zmq.Again:
            return
        with contextlib.suppress(OSError):  # closed by now
            stream = sockets.socket(fileno=descriptor)
            try:
                stream.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, SEND_BUFFER_BYTES // 2)  # Linux doubles it
            finally:
                stream.detach()


def make_private(directory: Path) -> bool:
    """Make the directory if it is missing; whether only its owner, who is us, may enter it."""
    try:
        # One by one: `parents=True` gives those the umask's mode, and the log directory's parent is the socket's directory.
        for missing in reversed([one for one in (directory, *directory.parents) if not one.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise ConfigError(where="bind", message=f"{directory} cannot be made or entered: {error.strerror}") from error
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def _lock(path: Path, address: str) -> tuple[int, bool]:
    """The lock, and whether its last holder left its pid in it, as one does that is killed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 32).decode(errors="replace").strip()
        os.close(descriptor)
        raise AddressInUse(address=address, holder=f" (pid {holder})" if holder else "") from error
    orphaned = bool(os.read(descriptor, 1))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor, orphaned
