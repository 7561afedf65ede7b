"""A process that has a service's class imported and forks workers (`preload=True`, X2): they start without an import.

    python -m forge_worker --fork-server CONTROL,SOURCE --broker ADDRESS

The broker's local scaler starts it, one for a service. SOURCE is a descriptor with what to import, CONTROL one end of a socket, on
which messages are msgpack maps: we say `ready`, or `declined` and why; for each `fork` that comes, with the descriptor to print to, we say
`forked`, with a pidfd, and when the child ends, `ended` with its code. When the other end is closed we leave; our children do as
any workers do whose broker is gone.

A fork copies one thread, all memory and every descriptor. So it is only right for a process that has nothing else: what the import may
have begun that a copy could not go on with (threads, CUDA, sockets) makes us decline, and workers start the ordinary way.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import selectors
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import msgpack
import zmq

from forge_contract.exit_status import how_it_ended
from forge_worker import runtime
from forge_worker.assignment import Source
from forge_worker.loading import load_class
from forge_worker.outcomes import trimmed

log = logging.getLogger("forge_worker")

MESSAGE_AT_MOST: Final = 1 << 16  # bytes
ENDING_S: Final = 0.1  # a thread that was joined is the kernel's for a moment longer
_DEVICES: Final = ("/dev/nvidia", "/dev/kfd", "/dev/dri")


def main(control: int, source: int, broker: str) -> int:
    """Serve forks; in a child, be that worker. Returns the exit code of either."""
    handler = logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    log.propagate = False
    with socket.socket(fileno=control) as told, open(source, "rb") as stream:
        wanted = msgpack.unpackb(stream.read())
        options = _Server(told, broker).serve(Source.read(wanted["source"]), on_gpus=wanted["on_gpus"])
    if options is None:
        return 0
    log.removeHandler(handler)
    return runtime.main(options)


def unfit(known: frozenset[str]) -> str:
    """Why this process must not be forked after its import; nothing when it may. `known`: descriptors from before it."""
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if threads:
        return f"its import started threads: {', '.join(threads)[:200]}"
    over = time.monotonic() + ENDING_S
    while (more := len(os.listdir("/proc/self/task")) - 1) and time.monotonic() < over:
        time.sleep(0.005)
    if more:
        return (
            f"its import started {more} native thread{'s' if more > 1 else ''}, as numeric libraries do for their pools "
            "(OPENBLAS_NUM_THREADS=1 or the like keeps some from it)"
        )
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "its import initialised CUDA, which no child could use"
    opened = [what for what in descriptors() - known if what.startswith(("socket:", *_DEVICES))]
    if opened:
        return f"its import opened {', '.join(sorted(opened))[:200]}, which children would share"
    # By their types: isinstance would ask each object, and a lazy one of the user's would begin to work.
    if any(issubclass(type(one), zmq.Context) and not one.closed for one in gc.get_objects()):
        return "its import made a zmq context, which no child could use"
    return ""


def descriptors() -> frozenset[str]:
    """What is open here, as the kernel names it."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one by which we look
            found.add(os.readlink(entry))
    return frozenset(found)


def reseed() -> None:
    """Every child has its own chance. What a module made for itself (`random.Random()`, `numpy.random.default_rng()`) is beyond us."""
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.seed()


class _Server:
    def __init__(self, control: socket.socket, broker: str) -> None:
        self._control = control
        self._broker = broker
        self._class: type | None = None
        self._children: dict[int, int] = {}  # pid → launch

    def serve(self, source: Source, *, on_gpus: bool) -> runtime.WorkerOptions | None:
        """Until the other end closes: None. In a child: what it is to be."""
        with contextlib.suppress(ImportError):
            import uvloop  # noqa: F401 -- the workers' loop, if it is there: better imported once
        if not on_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = (
                ""  # as its children will see it; those with GPUs are pinned after the fork
            )
        known = descriptors()
        try:
            self._class = load_class(source)
            why = unfit(known)
        except BaseException as error:  # SystemExit too; a worker's import will tell its caller
            log.error("%s could not be imported", source.class_name, exc_info=trimmed(error))
            why = f"its import raised {type(error).__name__}: {error}"[:500]
        if why:
            self._say({"declined": why})
            return None
        # What is there now is the same in all children: a collector that looked at it would have each page copied.
        gc.collect()
        gc.freeze()
        self._say({"ready": True})
        return self._loop()

    def _loop(self) -> runtime.WorkerOptions | None:
        wake_in, wake_out = socket.socketpair()
        wake_in.setblocking(False)
        wake_out.setblocking(False)
        signal.set_wakeup_fd(wake_out.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        with selectors.DefaultSelector() as selector, wake_in, wake_out:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(wake_in, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if wake_in in ready:
                    wake_in.recv(4096)
                    self._reap()
                if self._control in ready:
                    data, fds, _, _ = socket.recv_fds(self._control, MESSAGE_AT_MOST, 1)
                    if not data:
                        return None
                    child = self._fork(msgpack.unpackb(data), fds[0])
                    if child is not None:
                        return child

    def _fork(self, wanted: dict[str, Any], output: int) -> runtime.WorkerOptions | None:
        launch = int(wanted["fork"])
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(output)
            self._say({"ended": launch, "why": f"could not be forked: {error}"})
            return None
        if pid == 0:
            _begin_anew(output)
            return runtime.WorkerOptions(self._broker, tuple(wanted["gpus"]), launch, loaded=self._class)
        os.close(output)
        self._children[pid] = launch
        pidfd = os.pidfd_open(pid)  # its own until we reap it
        try:
            self._say({"forked": launch}, pidfd)
        finally:
            os.close(pidfd)
        return None

    def _reap(self) -> None:
        for pid, launch in list(self._children.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._children[pid]
                self._say({"ended": launch, "why": how_it_ended(os.waitstatus_to_exitcode(status))})

    def _say(self, message: dict[str, Any], *fds: int) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the other end is gone: the next read says so
            socket.send_fds(self._control, [msgpack.packb(message)], fds)


def _begin_anew(output: int) -> None:
    """In the child: as if it had been started. What the server has open is closed by who opened it, on the way out."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    reseed()
