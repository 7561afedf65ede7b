"""A real fork server, and its children against a broker made for the test (X2): they are workers like any other, but for the import."""

from __future__ import annotations

import contextlib
import os
import re
import select
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import cloudpickle
import msgpack
import pytest

from forge_contract.messages import OK, READY
from tests.worker.fake_broker import BOUND_S, FakeBroker, assignment_fields

SOURCE = {"name", "class_name", "gpus", "target", "path", "cwd", "trusted"}


class Preloading:
    """The scaler's end, and the server behind it. Leaving the block ends both it and its children."""

    def __init__(self, address: str, target: dict[str, Any], **environ: str) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(BOUND_S)
        self.inode = os.fstat(theirs.fileno()).st_ino
        fields = {name: value for name, value in assignment_fields(target, ()).items() if name in SOURCE}
        source = os.memfd_create("source")
        with open(source, "wb", closefd=False) as stream:
            stream.write(msgpack.packb({"source": fields, "on_gpus": False}))
        os.lseek(source, 0, os.SEEK_SET)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "forge_worker", "--broker", address, "--fork-server", f"{theirs.fileno()},{source}"],
            pass_fds=(theirs.fileno(), source),
            env={**os.environ, **environ},
        )
        theirs.close()
        os.close(source)
        self.pidfds: list[int] = []

    def hear(self) -> dict[str, Any]:
        data, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 1)
        self.pidfds += fds
        return dict(msgpack.unpackb(data))

    def fork(self, launch: int, output: int, *gpus: str) -> None:
        socket.send_fds(self.control, [msgpack.packb({"fork": launch, "gpus": list(gpus)})], [output])
        assert self.hear() == {"forked": launch}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.control.close()
        for pidfd in self.pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        assert self.process.wait(BOUND_S) == 0, "it leaves when the other end is closed"


def by_value(loaded: Any) -> dict[str, Any]:
    return {"code": cloudpickle.dumps(loaded)}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[FakeBroker]:
    with FakeBroker(f"ipc://{tmp_path}/b.sock") as broker:
        yield broker


class Looking:
    async def look(self) -> dict[str, Any]:
        import random

        from forge_worker.fork_server import descriptors

        numpy = sys.modules["numpy"]
        return {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "session": os.getsid(0),
            "random": random.random(),
            "numpy": float(numpy.random.random()),
            "open": sorted(descriptors()),
            "gpus": os.environ["CUDA_VISIBLE_DEVICES"],
            "child signal": signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL,
        }


class After:
    """Unpickled it is `Looking`, after `does` has run, as a module's import would have."""

    def __init__(self, does: Callable[[], None]) -> None:
        self.does = does

    def __reduce__(self) -> tuple[Any, ...]:
        does = self.does

        def load() -> type:
            does()
            return Looking

        return load, ()


def import_numpy() -> None:
    import numpy.random  # noqa: F401


def test_children_are_workers_of_their_own_with_chance_gpus_signals_and_descriptors_of_their_own(
    tmp_path: Path,
) -> None:
    """X2: and their server tells how they end."""
    code = by_value(After(import_numpy))
    address = f"ipc://{tmp_path}/b.sock"
    seen = []
    with Preloading(address, code, OPENBLAS_NUM_THREADS="1") as server:
        assert server.hear() == {"ready": True}
        for launch in (4, 5):
            with FakeBroker(address, incarnation=launch) as broker, (tmp_path / str(launch)).open("wb") as output:
                server.fork(launch, output.fileno(), "3")
                broker.until(lambda broker=broker: bool(broker.hellos), "hello")  # type: ignore[misc]
                assert (broker.hellos[0]["launch"], broker.hellos[0]["gpus"]) == (launch, ["3"])
                broker.assign(code, "look", gpus=["3"])
                broker.expect(READY)
                broker.call(0, (1, ()))
                status, looked = broker.replies(1)[1]
                assert status == OK
                seen.append(looked)
                broker.stop()
                broker.until(lambda: bool(select.select([server.control], [], [], 0)[0]), "end of the child")
                assert server.hear() == {"ended": launch, "why": "exit code 0"}
        one, two = seen
        for looked in seen:
            assert looked["pid"] == looked["session"]
            assert looked["parent"] == server.process.pid
            assert f"socket:[{server.inode}]" not in looked["open"]
            assert looked["gpus"] == "3"
            assert looked["child signal"]
        assert one["random"] != two["random"]
        assert one["numpy"] != two["numpy"]
        assert str(tmp_path / "5") in two["open"]
        assert str(tmp_path / "4") not in two["open"]


def test_children_outlive_their_server_as_workers_outlive_their_broker(broker: FakeBroker, tmp_path: Path) -> None:
    """X2, F10: the broker that comes back has them again."""
    with (tmp_path / "out").open("wb") as output:
        with Preloading(broker.address, by_value(Looking)) as server:
            assert server.hear() == {"ready": True}
            server.fork(4, output.fileno())
            broker.until(lambda: bool(broker.hellos), "hello")
            (pidfd,), server.pidfds = server.pidfds, []
        broker.assign(by_value(Looking), "look")
        broker.expect(READY)
        broker.stop()
        with selectors.DefaultSelector() as ends:
            ends.register(pidfd, selectors.EVENT_READ)
            broker.until(lambda: bool(ends.select(0)), "end of the child")
        os.close(pidfd)


EACH_REASON = """
import gc, socket, sys, threading, types, zmq
from forge_worker.fork_server import descriptors, unfit
known = descriptors()
print(unfit(known))
over = threading.Event()
thread = threading.Thread(target=over.wait, name="a-pool")
thread.start()
print(unfit(known))
over.set()
thread.join()
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True))
print(unfit(known))
del sys.modules["torch"]
opened = socket.socket()
print(unfit(known))
opened.close()
context = zmq.Context()
print(unfit(known))
with context.socket(zmq.PAIR):
    print(unfit(known))
context.term()
print(unfit(known))
"""


def test_each_thing_that_a_copy_could_not_go_on_with_is_a_reason_to_decline() -> None:
    """X2: threads of Python and others, CUDA, sockets, zmq contexts; and none when they are gone again."""
    done = subprocess.run(
        [sys.executable, "-c", EACH_REASON], capture_output=True, text=True, timeout=BOUND_S, check=True
    )
    clean, threads, cuda, opened, context, native, after = done.stdout.splitlines()
    assert (clean, after) == ("", "")
    assert threads == "its import started threads: a-pool"
    assert "initialised CUDA" in cuda
    assert re.match(r"its import opened socket:\[\d+\]", opened)
    assert "zmq context" in context
    assert re.match(r"its import started \d native thread", native)


def an_exit() -> None:
    raise SystemExit("not here")


def test_an_import_that_raises_is_declined_whatever_it_raises() -> None:
    """X2: the workers that are started instead tell their caller."""
    with Preloading("ipc:///nowhere", by_value(After(an_exit))) as server:
        assert server.hear() == {"declined": "its import raised SystemExit: not here"}
