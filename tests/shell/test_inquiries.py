"""How other threads learn what the broker is like."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from forge_broker.shell.inquiries import Inquiries, LoopSilent

BOUND_S = 10.0


class Loop:
    """Answers when its end of the socket has something, as `Server` does, and counts how often."""

    def __init__(self) -> None:
        self.heard, self.bell = socket.socketpair()
        self.heard.settimeout(BOUND_S)
        self.bell.setblocking(False)
        self.inquiries = Inquiries(self.bell)
        self.made = 0

    def turn(self) -> None:
        self.heard.recv(4096)
        self.inquiries.answer({"life": self.life, "nonsense": self.nonsense})

    def life(self) -> int:
        self.made += 1
        return self.made

    def nonsense(self) -> int:
        raise KeyError("a bug")


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.heard.close()
    made.bell.close()


class Asking(threading.Thread):
    def __init__(self, loop: Loop, what: str = "life") -> None:
        super().__init__(daemon=True)
        self.loop, self.what = loop, what
        self.found: object = None
        self.start()

    def run(self) -> None:
        try:
            self.found = self.loop.inquiries.ask(self.what, BOUND_S)
        except Exception as error:
            self.found = error

    def answer(self) -> object:
        self.join(BOUND_S)
        return self.found


def test_one_answer_serves_all_who_ask_meanwhile(loop: Loop) -> None:
    """However many ask, the loop works for one."""
    with pytest.raises(LoopSilent, match=r"not answered for 0\.01 s"):
        loop.inquiries.ask("life", 0.01)  # the loop is busy
    many = [Asking(loop) for _ in range(8)]
    loop.turn()
    # Those that came to it in time have the first answer, and of the others the first makes a second one.
    while any(one.is_alive() for one in many):
        loop.inquiries.answer({"life": loop.life})
    assert {one.answer() for one in many} <= {1, 2, 3}
    assert loop.made <= 3


def test_what_goes_wrong_in_an_answer_is_the_askers(loop: Loop) -> None:
    asking = Asking(loop, "nonsense")
    loop.turn()
    assert isinstance(asking.answer(), KeyError)


def test_who_waits_when_the_broker_ends_is_told_so(loop: Loop) -> None:
    asking = Asking(loop)
    loop.heard.recv(4096)  # it has asked
    loop.inquiries.close()
    assert isinstance(asking.answer(), LoopSilent)
    with pytest.raises(LoopSilent, match="ended"):
        loop.inquiries.ask("life", BOUND_S)


def test_a_bell_that_rings_already_is_not_waited_for(loop: Loop) -> None:
    """The socket is shared with signals, and may be full of them."""
    with suppress(BlockingIOError):
        while True:
            loop.bell.send(bytes(65536))
    asking = Asking(loop)
    while asking.is_alive():
        loop.inquiries.answer({"life": loop.life})
    assert asking.answer() == 1
