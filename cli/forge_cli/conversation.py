"""One conversation with a broker: connect, ask, say goodbye. What the commands that look and deploy have in common.

Our hello says `detached`: nothing that was deployed ends with a command. Errors pass through to `main`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from forge_cli.terminal import spinner

if TYPE_CHECKING:
    from forge_client.client import Client

T = TypeVar("T")


def converse(
    address: str,
    ask: Callable[[Client], Awaitable[T]],
    *,
    waiting: str = "waiting for the broker",
    patient: bool = False,
) -> T:
    """What `ask` gives, asked over a connection of its own; `waiting` is said meanwhile on a terminal.

    `patient`: wait for a broker that is not there yet, as a script wants that has just started it. Others hear at once that
    nobody listens at an ipc address. Raises BrokerUnreachable, BrokerLost, VersionMismatch, and what `ask` raises.
    """
    import asyncio

    return asyncio.run(_converse(address, ask, waiting, patient))


async def _converse(address: str, ask: Callable[[Client], Awaitable[T]], waiting: str, patient: bool) -> T:
    from forge_client import BrokerUnreachable, connect

    if not patient and not somebody_listens(address):
        raise BrokerUnreachable(address=address, waited_s=0)
    with spinner(f"connecting to {address}"):
        connecting = connect(address, detached=True)
        await connecting
    async with connecting as client:
        with spinner(waiting):
            return await ask(client)


def somebody_listens(address: str) -> bool:
    """False when it is certain that nobody does: no socket at an ipc path, or one left behind by a broker that was killed."""
    import socket

    from forge_contract.addresses import ipc_path

    path = ipc_path(address)
    if path is None:
        return True
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            return False
        except OSError:
            return True  # busy, or not ours to enter: the attempt itself will say more
    return True
