"""The heart beats in a thread of its own (F1, W9)."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import zmq

from forge_client.heartbeat import Heartbeat

BOUND_MS = 10_000


def test_beats_come_while_the_main_thread_is_busy(tmp_path: Path) -> None:
    """F1"""
    address = f"ipc://{tmp_path}/b.sock"
    threads: set[int] = set()

    def beat() -> list[bytes]:
        threads.add(threading.get_ident())
        return [b"beat", b""]

    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    with router:
        router.set(zmq.RCVTIMEO, BOUND_MS)
        router.bind(address)
        heart = Heartbeat(address, beat)
        heart.start(0.01)
        heart.start(0.01)
        for _ in range(3):
            assert router.recv_multipart()[1:] == [b"beat", b""]
        heart.stop()
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_a_beat_that_has_nothing_to_say_sends_nothing(tmp_path: Path) -> None:
    asked = threading.Event()

    def beat() -> None:
        asked.set()

    address = f"ipc://{tmp_path}/b.sock"
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    with router:
        router.bind(address)
        heart = Heartbeat(address, beat)
        heart.start(0.01)
        assert asked.wait(BOUND_MS / 1000)
        heart.stop()
        assert not router.poll(0)


def test_with_nobody_there_beats_are_dropped_and_stop_is_quick(tmp_path: Path) -> None:
    beats = threading.Semaphore(0)

    def beat() -> list[bytes]:
        beats.release()
        return [b"beat", b""]

    heart = Heartbeat(f"ipc://{tmp_path}/nobody.sock", beat)
    heart.start(0.001)
    for _ in range(5):
        assert beats.acquire(timeout=BOUND_MS / 1000)
    before = time.monotonic()
    heart.stop()
    assert time.monotonic() - before < 5.0
