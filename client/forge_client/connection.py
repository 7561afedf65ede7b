"""Which broker the running loop talks to (A1): the one of `connect()`, else of FORGE_BROKER, else an embedded one.

Each event loop has clients of its own, because sockets belong to one thread. Handles ask `current_client` when they
are used first; users call `connect` and `shutdown`.
"""

from __future__ import annotations

import asyncio
import atexit
import os
from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, Final

from forge_contract.addresses import check_address, default_address

# The sockets and the embedded broker are imported when somebody connects: half the time of `import forge_client`
# would go there, and a module that only defines actors never needs them.
if TYPE_CHECKING:
    from forge_client.client import Client
    from forge_client.embedded import EmbeddedBroker

CONNECT_TIMEOUT_S: Final = 5.0


class _Clients:
    """Those of one loop: the connected ones, the latest last, and the one for when nothing was connected."""

    def __init__(self) -> None:
        self.connected: list[Client] = []
        self.default: Client | None = None
        self.opening: asyncio.Lock = asyncio.Lock()

    def __iter__(self) -> Generator[Client]:
        yield from self.connected
        if self.default is not None:
            yield self.default


_by_loop: dict[asyncio.AbstractEventLoop, _Clients] = {}
_left_behind: list[dict[asyncio.AbstractEventLoop, _Clients]] = []  # by a fork: the parent's sockets, not to be touched


def _clients() -> _Clients:
    """Of the running loop. Those of loops that were closed without a goodbye are let go on this occasion."""
    for loop, clients in list(_by_loop.items()):
        if loop.is_closed() and _by_loop.pop(loop, None) is not None:
            for client in clients:
                client.goodbye("its loop was closed")
    return _by_loop.setdefault(asyncio.get_running_loop(), _Clients())


async def current_client() -> Client:
    """The client that calls of the running loop go through; opened at first use.

    Raises BrokerUnreachable, the broker's refusal, or what keeps an embedded broker from starting.
    """
    clients = _clients()
    for client in reversed(clients.connected):
        if client.over is None:
            return client
    async with clients.opening:
        if clients.default is None or clients.default.over is not None:
            address = os.environ.get("FORGE_BROKER")
            if address:
                clients.default = await _open(address, CONNECT_TIMEOUT_S)
            else:
                from forge_client.embedded import embedded_broker

                broker = await asyncio.to_thread(embedded_broker, os.environ)
                clients.default = await _open(broker.address, CONNECT_TIMEOUT_S, embedded=broker)
        return clients.default


async def _open(
    address: str, timeout_s: float, *, detached: bool = False, embedded: EmbeddedBroker | None = None
) -> Client:
    from forge_client.client import Client

    check_address(address, "broker address")
    # Last registered, first run: goodbyes are said before the embedded broker, which registered itself, is ended.
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)
    client = Client(address, detached=detached, embedded=embedded)
    await client.open(timeout_s)
    return client


class connect:
    """Use a running broker: `async with connect("tcp://head:5555") as client:`, or `client = await connect(…)`.

    Without an address: FORGE_BROKER, else the user's own broker at its private ipc address. Inside the block, or until
    `shutdown()`, everything on this loop goes to that broker. `detached`: what is deployed lives on when this
    client ends. Raises BrokerUnreachable when nobody answers for `connect_timeout_s` seconds, VersionMismatch, and
    ConfigError for what is no address.
    """

    def __init__(
        self, address: str | None = None, *, connect_timeout_s: float = CONNECT_TIMEOUT_S, detached: bool = False
    ) -> None:
        self.address = address or default_address(os.environ, os.getuid())
        self._timeout_s = connect_timeout_s
        self._detached = detached
        self._client: Client | None = None

    def __await__(self) -> Generator[object, None, Client]:
        return self._connect().__await__()

    async def _connect(self) -> Client:
        if self._client is None:
            clients = _clients()
            self._client = await _open(self.address, self._timeout_s, detached=self._detached)
            clients.connected.append(self._client)
        return self._client

    async def __aenter__(self) -> Client:
        return await self._connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        client, self._client = self._client, None
        if client is not None:
            clients = _clients()
            if client in clients.connected:
                clients.connected.remove(client)
            await client.shutdown()


async def shutdown() -> None:
    """End everything that was started from this event loop, and the embedded broker if nobody else uses it (A10)."""
    clients = _by_loop.pop(asyncio.get_running_loop(), None)
    if clients is None:
        return
    for client in [*clients]:
        await client.shutdown()
    broker = clients.default.embedded if clients.default is not None else None
    in_use = any(client.embedded is broker and client.over is None for others in _by_loop.values() for client in others)
    if broker is not None and not in_use:
        from forge_client.embedded import end_embedded

        await asyncio.to_thread(end_embedded, broker)


def _at_exit() -> None:
    for clients in _by_loop.values():
        for client in clients:
            client.goodbye("its process ends")


def _after_fork() -> None:
    global _by_loop  # noqa: PLW0603 - the child's are its own
    _left_behind.append(_by_loop)
    _by_loop = {}


os.register_at_fork(after_in_child=_after_fork)
