"""One conversation with a broker: connect, ask, say goodbye. What the commands that look and deploy have in common.

Our hello says `detached`: nothing that was deployed ends with a command. Errors pass through to `main`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final, TypeVar

from forge_cli.terminal import spinner

if TYPE_CHECKING:
    import socket
    from asyncio import AbstractEventLoop

    from forge_client.client import Client

_REACH_S: Final = 1.0
_UCRED_BYTES: Final = 12  # struct ucred: pid, uid, gid

T = TypeVar("T")


def converse(
    address: str,
    ask: Callable[[Client], Awaitable[T]],
    *,
    waiting: str = "waiting for the broker",
    patient: bool = False,
    loop: Callable[[], AbstractEventLoop] | None = None,
) -> T:
    """What `ask` gives, asked over a connection of its own; `waiting` is said meanwhile on a terminal (nothing: `ask` shows itself).

    `patient`: wait for a broker that is not there yet, as a script wants that has just started it. Others hear at once that
    nobody listens there. `loop`: makes the event loop, for who needs another than the usual one. Raises BrokerUnreachable,
    BrokerLost, VersionMismatch, and what `ask` raises.
    """
    import asyncio

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(_converse(address, ask, waiting, patient))


async def _converse(address: str, ask: Callable[[Client], Awaitable[T]], waiting: str, patient: bool) -> T:
    from forge_client import BrokerUnreachable, connect

    if not patient and not somebody_listens(address):
        raise BrokerUnreachable(address=address, waited_s=0)
    with spinner(f"connecting to {address}"):
        connecting = connect(address, detached=True)
        await connecting
    async with connecting as client:
        with spinner(waiting) if waiting else nullcontext():
            return await ask(client)


def somebody_listens(address: str) -> bool:
    """False when it is certain that nobody does: a port that refuses, no socket at an ipc path, or one left behind by a broker
    that was killed."""
    try:
        with _reach(address):
            return True
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        return False
    except OSError:
        return True  # busy, not ours to enter, a name nobody knows: the attempt itself will say more


def process_behind(address: str) -> int | None:
    """The pid of the broker at an ipc address, as the kernel knows it; None where it cannot be told: tcp, another system or
    container, nobody there."""
    import socket
    import struct

    if not (address.startswith("ipc://") and hasattr(socket, "SO_PEERCRED")):
        return None
    try:
        with _reach(address) as probe:
            found = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED_BYTES)
    except OSError:
        return None
    pid: int = struct.unpack("3i", found)[0]
    return pid or None  # 0: it is in another pid namespace


def _reach(address: str) -> socket.socket:
    """A bare connection, without a word of the protocol. Raises OSError."""
    import socket

    from forge_contract.addresses import ipc_path

    path = ipc_path(address)
    if path is None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        if not port.isdecimal():
            raise OSError(f"{address} names no port")
        return socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S)
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.settimeout(_REACH_S)
        probe.connect(str(path))
    except BaseException:
        probe.close()
        raise
    return probe
