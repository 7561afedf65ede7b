"""The socket under a link, against a plain ROUTER: nothing is left lying, nothing blocks, connections are watched."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from forge_client.dealer import ENVELOPES_A_TURN, LARGE_BYTES, Dealer, widen
from forge_contract.addresses import SEND_BUFFER_BYTES

BOUND_S = 10.0


class Peer:
    """A dealer and what happened to it."""

    def __init__(self, address: str, receive: Callable[[list[Any]], None] | None = None) -> None:
        self.happened: list[str] = []
        self.received: list[list[Any]] = []
        self.changed = asyncio.Event()
        self.dealer = Dealer(
            address,
            receive=receive or self._receive,
            turn=lambda: self._note("turn"),
            reconnected=lambda: self._note("reconnected"),
            disconnected=lambda: self._note("disconnected"),
            max_message_bytes=1 << 30,
        )

    def _receive(self, frames: list[Any]) -> None:
        self.received.append(frames)
        self._note("envelope")

    def _note(self, what: str) -> None:
        self.happened.append(what)
        self.changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(BOUND_S):
            while not holds():
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/b.sock"


def bound(address: str) -> zmq.Socket[bytes]:
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.set(zmq.LINGER, 0)
    router.set(zmq.SNDHWM, 0)
    router.set(zmq.RCVTIMEO, int(BOUND_S * 1000))
    router.bind(address)
    return router


@pytest.fixture
async def router(address: str) -> AsyncIterator[zmq.Socket[bytes]]:
    with bound(address) as router:
        yield router


async def test_a_header_is_bytes_and_what_follows_it_are_views(router: zmq.Socket[bytes], address: str) -> None:
    """W1: large frames are not copied, in either direction."""
    peer = Peer(address)
    large = bytes(LARGE_BYTES)
    peer.dealer.send([b"header", b"document", memoryview(large), b"tail"])
    identity, *frames = await asyncio.to_thread(router.recv_multipart)
    assert frames == [b"header", b"document", large, b"tail"]
    router.send_multipart([identity, *frames])
    await peer.until(lambda: bool(peer.received))
    (got,) = peer.received
    assert [type(frame) for frame in got] == [bytes, memoryview, memoryview, memoryview]
    assert [bytes(frame) for frame in got] == frames
    peer.dealer.close()


async def test_a_flood_is_taken_whole_in_bounded_turns(router: zmq.Socket[bytes], address: str) -> None:
    """W8: the descriptor is edge-triggered, so what is left must be looked for."""
    peer = Peer(address)
    peer.dealer.send([b"hello", b""])
    identity, *_ = await asyncio.to_thread(router.recv_multipart)
    count = 5 * ENVELOPES_A_TURN + 1
    for number in range(count):
        router.send_multipart([identity, b"%d" % number, b""])
    await peer.until(lambda: len(peer.received) == count and peer.happened[-1] == "turn")
    assert [int(frames[0]) for frames in peer.received] == list(range(count))
    longest = max(len(run) for run in " ".join(peer.happened).replace("envelope ", "e").split("turn"))
    assert longest <= ENVELOPES_A_TURN + 1
    peer.dealer.close()


async def test_what_comes_while_sending_is_not_left_lying(router: zmq.Socket[bytes], address: str) -> None:
    """W9: a send swallows the edge of the descriptor."""
    peer = Peer(address)
    for number in range(300):
        peer.dealer.send([b"%d" % number, b""])
        identity, head, _ = await asyncio.to_thread(router.recv_multipart)
        router.send_multipart([identity, head, b""])
        peer.dealer.send([b"more", b""])
        await asyncio.to_thread(router.recv_multipart)
        await peer.until(lambda number=number: len(peer.received) == number + 1)  # type: ignore[misc]
    assert [int(frames[0]) for frames in peer.received] == list(range(300))
    peer.dealer.close()


async def test_an_error_in_receive_does_not_stop_the_others(router: zmq.Socket[bytes], address: str) -> None:
    seen: list[bytes] = []
    done = asyncio.Event()

    def receive(frames: list[Any]) -> None:
        seen.append(frames[0])
        if frames[0] == b"last":
            done.set()
        elif frames[0] == b"bad":
            raise ValueError("a fault of ours")

    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    peer = Peer(address, receive)
    peer.dealer.send([b"hello", b""])
    identity, *_ = await asyncio.to_thread(router.recv_multipart)
    for head in (b"bad", b"good", b"last"):
        router.send_multipart([identity, head, b""])
    async with asyncio.timeout(BOUND_S):
        await done.wait()
    assert seen == [b"bad", b"good", b"last"]
    assert [str(error) for error in reported] == ["a fault of ours"]
    peer.dealer.close()


async def test_a_new_connection_is_told_but_not_the_first(address: str) -> None:
    """W4"""
    first = bound(address)
    peer = Peer(address)
    peer.dealer.send([b"hello", b""])
    await asyncio.to_thread(first.recv_multipart)
    first.close()
    await peer.until(lambda: "disconnected" in peer.happened)
    assert "reconnected" not in peer.happened
    with bound(address) as second:
        await peer.until(lambda: "reconnected" in peer.happened)
        peer.dealer.send([b"again", b""])
        _, head, _ = await asyncio.to_thread(second.recv_multipart)
        assert head == b"again"
    peer.dealer.close()


async def test_nothing_is_called_after_close(router: zmq.Socket[bytes], address: str) -> None:
    peer = Peer(address)
    peer.dealer.send([b"hello", b""])
    identity, *_ = await asyncio.to_thread(router.recv_multipart)
    router.send_multipart([identity, b"too late", b""])
    peer.dealer.close()
    peer.dealer.close()
    before = list(peer.happened)
    peer.dealer.send([b"dropped", b""])
    for _ in range(5):
        await asyncio.sleep(0)
    assert peer.happened == before
    assert "closed" in repr(peer.dealer)


async def test_a_lingering_close_still_delivers(address: str) -> None:
    """A goodbye has to arrive."""
    peer = Peer(address)
    peer.dealer.send([b"bye", b""])
    peer.dealer.close(linger_s=BOUND_S)
    with bound(address) as router:
        _, head, _ = await asyncio.to_thread(router.recv_multipart)
    assert head == b"bye"


async def test_an_address_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(zmq.ZMQError):
        Peer("carrier-pigeon://roof")


def allowed(size: int) -> int:
    """Bytes of a send buffer: what one gets who asks for so many."""
    return min(size, 2 * int(Path("/proc/sys/net/core/wmem_max").read_text()))


def send_buffer_of_the_connection_to(path: str) -> int:
    """Bytes, of this process's end of it."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            stream = socket.socket(fileno=descriptor)
        except OSError:
            continue  # no socket
        try:
            if stream.getpeername() == path:
                return stream.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        except OSError:
            continue  # not connected
        finally:
            stream.detach()
    raise AssertionError(f"no connection to {path}")


async def test_a_connection_over_ipc_has_room_for_large_frames(router: zmq.Socket[bytes], address: str) -> None:
    peer = Peer(address)
    peer.dealer.send([b"header"])
    identity, *frames = await asyncio.to_thread(router.recv_multipart)
    router.send_multipart([identity, *frames])
    await peer.until(lambda: bool(peer.received))
    assert send_buffer_of_the_connection_to(address.removeprefix("ipc://")) == allowed(SEND_BUFFER_BYTES)
    peer.dealer.close()


def send_buffer(stream: socket.socket) -> int:
    return stream.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def test_tcp_is_left_to_the_kernel() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as stream:
        before = send_buffer(stream)
        widen(stream.fileno())
        assert send_buffer(stream) == before


def test_a_descriptor_that_was_closed_or_is_something_else_by_now_is_left_alone() -> None:
    reading, writing = os.pipe()
    widen(writing)
    os.write(writing, b"still open")
    assert os.read(reading, 16) == b"still open"
    os.close(writing)
    widen(writing)
    assert os.read(reading, 16) == b""  # nobody holds the other end: it was not copied and kept
    os.close(reading)
