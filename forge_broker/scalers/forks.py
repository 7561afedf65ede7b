"""Workers that are forked instead of started (`preload=True`): the scaler's side of `forge_worker.fork_server`, where the messages are.

One server for each service that wants it. What is to be launched waits until it has imported; if it declines, or ends, that is told
once, and what waited is started the ordinary way. Its children are not ours, so it tells how they end, and each is held by a pidfd:
to be killed by, and to be watched by when the server is gone.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgpack

from forge_broker.core.actions import Launch, Preload
from forge_broker.core.events import LaunchEnded, Preloaded
from forge_contract.exit_status import how_it_ended

MESSAGE_AT_MOST: Final = 1 << 16  # bytes
KILLED_WITHIN_MS: Final = 5000

Told = list[LaunchEnded | Preloaded]


class ForkServer:
    """One service's. `children`: the pidfd of each launch that it has forked and that has not ended."""

    def __init__(self, preload: Preload, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self.service = preload.service
        self.process = process
        self.control = control
        self.ready = False
        self.waiting: dict[int, Launch] = {}  # until it is ready
        self.asked: set[int] = set()
        self.doomed: set[int] = set()  # to be killed as soon as we know whom
        self.children: dict[int, int] = {}


class Forks:
    """`output`: makes a descriptor to print to for a launch, given a label. `plainly`: starts one the ordinary way."""

    def __init__(
        self,
        address: str,
        environ: Mapping[str, str],
        output: Callable[[int, str], int],
        plainly: Callable[[Launch], Told],
    ) -> None:
        self._address = address
        self._environ = environ
        self._output = output
        self._plainly = plainly
        self._servers: dict[int, ForkServer] = {}
        self._orphans: dict[int, int] = {}  # launch → pidfd, of servers that are gone
        self._ending: list[subprocess.Popen[bytes]] = []  # servers that have only to be reaped
        self._selector = selectors.DefaultSelector()

    def fileno(self) -> int:
        """Readable when there is something to `attend` to."""
        return self._selector.fileno()

    def launch(self, launch: Launch, preload: Preload) -> Told:
        server = self._servers.get(preload.service)
        if not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
            return [Preloaded(preload.service, "forking workers takes Linux"), *self._plainly(launch)]
        if server is None:
            try:
                server = self._start(preload)
            except OSError as error:
                return [Preloaded(preload.service, f"could not be started: {error}"), *self._plainly(launch)]
        if not server.ready:
            server.waiting[launch.launch] = launch
            return []
        return self._ask(server, launch)

    def kill(self, launch: int) -> Told | None:
        """None: it is none of ours."""
        pidfd = self._orphans.get(launch)
        for server in self._servers.values():
            if server.waiting.pop(launch, None) is not None:
                return [LaunchEnded(launch, "not started yet, and not wanted any more", [])]
            if launch in server.asked:
                server.doomed.add(launch)
                return []
            pidfd = server.children.get(launch, pidfd)
        if pidfd is None:
            return None
        _kill(pidfd)
        return []

    def unload(self, service: int) -> None:
        """Its service has no worker any more."""
        server = self._servers.pop(service, None)
        if server is not None:
            self._let_go(server)
            server.process.kill()

    def attend(self) -> Told:
        """What servers said, and which of the orphans have ended."""
        told: Told = []
        for key, _ in self._selector.select(0):
            if isinstance(key.data, ForkServer):
                told += self._hear(key.data)
            else:
                self._selector.unregister(key.fd)
                os.close(self._orphans.pop(key.data))
                told.append(LaunchEnded(key.data, "how is not known, for its fork server was gone", []))
        self._ending = [process for process in self._ending if process.poll() is None]
        return told

    def kill_all(self) -> None:
        pidfds = [
            *self._orphans.values(),
            *(fd for server in self._servers.values() for fd in server.children.values()),
        ]
        for pidfd in pidfds:
            _kill(pidfd)
        for service in list(self._servers):
            self.unload(service)
        with selectors.DefaultSelector() as ends:
            for pidfd in self._orphans.values():
                ends.register(pidfd, selectors.EVENT_READ)
            while ends.get_map() and (ended := ends.select(KILLED_WITHIN_MS / 1000)):
                for key, _ in ended:
                    ends.unregister(key.fd)
        for process in self._ending:
            process.wait()

    def close(self) -> None:
        self._selector.close()
        for pidfd in self._orphans.values():
            os.close(pidfd)

    def _start(self, preload: Preload) -> ForkServer:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        source = output = -1
        try:
            # A class by value may be larger than a packet.
            source = os.memfd_create("forge-preload")
            with open(source, "wb", closefd=False) as stream:
                stream.write(msgpack.packb({"source": preload.source, "on_gpus": preload.on_gpus}))
            os.lseek(source, 0, os.SEEK_SET)
            output = self._output(-preload.service, preload.label)
            command = [sys.executable, "-m", "forge_worker", "--broker", self._address]
            process = subprocess.Popen(
                [*command, "--fork-server", f"{theirs.fileno()},{source}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(self._environ),
                start_new_session=True,
                pass_fds=(theirs.fileno(), source),
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            for descriptor in (source, output):
                if descriptor >= 0:
                    os.close(descriptor)
        ours.setblocking(False)
        server = self._servers[preload.service] = ForkServer(preload, process, ours)
        self._selector.register(ours, selectors.EVENT_READ, server)
        return server

    def _ask(self, server: ForkServer, launch: Launch) -> Told:
        output = self._output(launch.launch, launch.label)
        message = msgpack.packb({"fork": launch.launch, "gpus": list(launch.gpus)})
        try:
            socket.send_fds(server.control, [message], [output])
        except OSError as error:  # it is gone, which the next read tells of; or it does not read
            return [LaunchEnded(launch.launch, f"could not be forked: {error}", [])]
        finally:
            os.close(output)
        server.asked.add(launch.launch)
        return []

    def _hear(self, server: ForkServer) -> Told:
        """All that it has said."""
        told: Told = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(server.control, MESSAGE_AT_MOST, 1)
            except BlockingIOError:
                return told
            except ConnectionResetError:
                data, fds = b"", []
            if not data:
                return told + self._gone(server, "its fork server ended")
            message: dict[str, Any] = msgpack.unpackb(data)
            if "ready" in message:
                server.ready = True
                waiting, server.waiting = server.waiting, {}
                told.append(Preloaded(server.service, ""))
                for launch in waiting.values():
                    told += self._ask(server, launch)
            elif "declined" in message:
                return told + self._gone(server, message["declined"])
            elif "forked" in message:
                launch_id = message["forked"]
                server.asked.discard(launch_id)
                server.children[launch_id] = fds[0]
                if launch_id in server.doomed:
                    _kill(fds[0])
            elif "ended" in message:
                launch_id = message["ended"]
                server.asked.discard(launch_id)
                server.doomed.discard(launch_id)
                pidfd = server.children.pop(launch_id, None)
                if pidfd is not None:
                    os.close(pidfd)
                told.append(LaunchEnded(launch_id, message["why"], []))

    def _gone(self, server: ForkServer, why: str) -> Told:
        """It declines, or has ended. What it was asked for and has not told of is not known to run, and counts as ended."""
        self._servers.pop(server.service, None)
        self._let_go(server)
        if (code := server.process.poll()) is not None and why == "its fork server ended":
            why += f" ({how_it_ended(code)})"
        told: Told = [Preloaded(server.service, why)]
        told += [LaunchEnded(launch, why, []) for launch in server.asked]
        for launch in server.waiting.values():
            told += self._plainly(launch)
        return told

    def _let_go(self, server: ForkServer) -> None:
        """It ends when it notices; its children are watched by us from now on."""
        self._selector.unregister(server.control)
        server.control.close()
        self._ending.append(server.process)
        for launch, pidfd in server.children.items():
            self._orphans[launch] = pidfd
            self._selector.register(pidfd, selectors.EVENT_READ, launch)


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return  # it has ended, which is told by itself
