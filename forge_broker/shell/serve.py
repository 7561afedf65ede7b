"""The broker's process: the only place with sockets, a clock, a loop and signals. It turns frames, dead processes and signals into events
for the core, carries out the core's actions, and sleeps until the next deadline.

One turn: drain every socket (bounded), reap, tick, then send one envelope to each peer that has something. A plain loop over the
kernel's poller: `zmq.asyncio` costs several times more per message (measured before the first line of this project), and zmq's own
poller asks every socket several times a turn. The price is that a socket's descriptor tells of a change and not of a state, and that
sending swallows it too: so after each turn, and only then, we ask whether something has come.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
import secrets
import selectors
import signal
import socket as sockets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import zmq
from zmq import zmq_poll
from zmq.backend import Socket as BareSocket

from forge_broker.core.actions import (
    Action,
    Deliver,
    Exit,
    Kill,
    KillPeer,
    Label,
    Launch,
    Look,
    Note,
    Send,
    Sweep,
    Unlink,
    Unload,
    Unwatch,
    Watch,
)
from forge_broker.core.broker import Broker
from forge_broker.core.events import (
    Event,
    ProcessGone,
    Route,
    Stalled,
    Stopped,
    Terminate,
    Unroutable,
    Watched,
    received,
)
from forge_broker.core.state import State
from forge_broker.scalers.local import LocalScaler
from forge_broker.shell.addresses import Bound, bind_all, make_private, release, widen_accepted
from forge_broker.shell.log import Log
from forge_broker.shell.processes import Watches, host_id, is_stopped
from forge_broker.shell.segments import Segments
from forge_contract.addresses import is_loopback
from forge_contract.config import BrokerConfig
from forge_contract.errors import ConfigError

if TYPE_CHECKING:
    from forge_broker.shell.http_door import HttpDoor

# Plain ints: pyzmq's flag enums cost more than the call they are passed to.
_NOBLOCK = int(zmq.NOBLOCK)
_SNDMORE = int(zmq.SNDMORE)
_POLLIN = int(zmq.POLLIN)
_FD = int(zmq.FD)
_send = BareSocket.send  # what pyzmq's own ends in, when it has looked for options of sockets that we have not

DRAIN_AT_MOST: Final = 512  # envelopes of one socket per turn, so that none starves deadlines and the other sockets
UNCOPIED_FROM: Final = 65_536  # bytes; below, copying into libzmq is cheaper than its bookkeeping for ours
STALL_FROM_S: Final = (
    0.05  # a turn of the loop that took longer is told to the core, which shows it in `forge status` (R4)
)
SLEEP_AT_MOST_S: Final = (
    86_400.0  # the kernel's poller takes no more than 24 days; a timeout or a session's patience may be endless
)
LAST_WORDS_MS: Final = 500  # for what is still in the pipes when we exit


class Server:
    """`run` returns the exit code. `ready` is called with the bound addresses once peers may connect."""

    def __init__(self, config: BrokerConfig, *, owner: int | None = None, log_level: str = "info") -> None:
        self._config = config
        self._log = Log(log_level)
        self._owner = owner  # a descriptor that ends with whoever owns us
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._poller = selectors.DefaultSelector()  # ROUTERs, signals, our owner, and the processes we watch
        self._watches = Watches()
        self._waiting: dict[str, None] = {}  # peers with something in their outbox, in order
        self._signals = 0
        self._done = False
        self._bound: list[Bound] = []
        self._accepted: dict[int, zmq.Socket[bytes]] = {}  # by descriptor: what tells of connections over ipc
        self._scaler: LocalScaler | None = None
        self._segments: Segments | None = None
        self._broker: Broker | None = None
        self._http: HttpDoor | None = None

    def run(self, ready: Callable[[list[str]], None]) -> int:
        wake_in, wake_out = sockets.socketpair()
        wake_in.setblocking(False)
        wake_out.setblocking(False)
        signal.set_wakeup_fd(wake_out.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, self._on_signal)
        try:
            self._start(wake_out)
            ready([one.address for one in self._bound])
            self._loop(wake_in)
        finally:
            self._stop()
            signal.set_wakeup_fd(-1)
            wake_in.close()
            wake_out.close()
        return 0

    def _start(self, wake: sockets.socket) -> None:
        config = self._config
        log_dir = None
        if not config.embedded and config.log_dir is not None:
            log_dir = Path(config.log_dir)
            make_private(log_dir)
        self._bound = bind_all(self._context, config)
        for one in self._bound:
            trust = "trusted" if one.trusted else "not trusted"
            self._log.write(Note("info", "listening", {"address": one.address, "trust": trust}))
            if not is_loopback(one.address):
                self._log.write(Note("warning", "reachable from other machines, unencrypted", {"address": one.address}))
        if config.http is not None:
            from forge_broker.shell.http_door import HttpDoor

            self._http = HttpDoor(config, wake, self._log.write)
            if not is_loopback(f"tcp://{config.http}"):
                self._log.write(
                    Note("warning", "reachable from other machines, unencrypted", {"address": self._http.url})
                )
        # Workers we launch come in by the most trusted of our addresses.
        home = max(self._bound, key=lambda one: one.trusted)
        self._segments = _segments(home)
        orphaned = any(one.orphaned for one in self._bound)
        if self._segments is not None and not orphaned:
            self._segments.sweep(())
        self._scaler = LocalScaler(home.address, os.environ, log_dir)
        self._broker = Broker(
            State(
                config,
                incarnation=secrets.randbits(63),
                host=host_id(),
                trusted=[one.trusted for one in self._bound],
                random=random.Random(secrets.randbits(64)),
                unpickle=_unpickle,
                load=load_named,
                now=time.monotonic(),
                segments=self._segments,
                recovering=orphaned,
            )
        )
        if self._http is not None:
            self._http.open()
            self._log.write(Note("info", "serving http", {"url": self._http.url}))
        # What exists now lives as long as we do; a collection every 700 allocations would look at it for every few calls.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)

    def _on_signal(self, number: int, frame: object) -> None:
        if number != signal.SIGCHLD:
            self._signals += 1

    def _loop(self, wake: sockets.socket) -> None:
        assert self._broker is not None
        assert self._scaler is not None
        broker, poller = self._broker, self._poller
        poller.register(wake.fileno(), selectors.EVENT_READ)
        poller.register(self._scaler.fileno(), selectors.EVENT_READ)
        if self._owner is not None:
            poller.register(self._owner, selectors.EVENT_READ)
        routers = [(at, one.socket) for at, one in enumerate(self._bound)]
        for at, router in routers:
            poller.register(int(router.get(_FD)), selectors.EVENT_READ, (at, router))
        self._accepted = {int(one.accepted.get(_FD)): one.accepted for one in self._bound if one.accepted is not None}
        for descriptor, monitor in self._accepted.items():
            poller.register(descriptor, selectors.EVENT_READ)
            widen_accepted(monitor)  # whoever came before we looked
        seen_signals = 0
        unread = routers
        while not self._done:
            timeout: float | None = 0.0
            if not unread:
                deadline = broker.next_deadline()
                timeout = None if deadline is None else min(max(0.0, deadline - time.monotonic()), SLEEP_AT_MOST_S)
            ready = poller.select(timeout)
            now = time.monotonic()
            for at, router in unread:
                self._drain(at, router, now)
            for key, _ in ready:
                if key.data is None:
                    self._other(key.fd, wake, now)
                elif key.data not in unread:
                    at, router = key.data
                    self._drain(at, router, now)
            self._watches.close_over()
            if self._signals > seen_signals:
                seen_signals = self._signals
                if seen_signals > 1 or broker.state.terminating:
                    self._log.write(Note("warning", "ending now", {"why": "a second signal"}))
                    break
                self._log.write(Note("info", "draining; once more to end now", {"why": "a signal"}))
                self._event(Terminate("a signal"), now)
            self._carry_out(broker.tick(now), now)
            self._send_waiting(now)
            turned = time.monotonic()
            if turned - now > STALL_FROM_S:
                self._event(Stalled(turned - now), turned)
                self._send_waiting(turned)
            # Last of all: whatever is sent after this would swallow the news of what has come.
            unread = [one for one in routers if zmq_poll([(one[1], _POLLIN)], 0)]

    def _other(self, descriptor: int, wake: sockets.socket, now: float) -> None:
        """A descriptor that is no ROUTER: a signal, the owner's end, a process that ended, a new connection."""
        assert self._scaler is not None
        if descriptor == wake.fileno():
            wake.recv(4096)
            if self._http is not None and self._broker is not None:
                self._http.answer(self._broker.state, now)
            for told in self._scaler.reap():
                self._event(told, now)
        elif descriptor == self._scaler.fileno():
            for told in self._scaler.attend():
                self._event(told, now)
        elif descriptor == self._owner:
            if not os.read(descriptor, 4096):
                self._poller.unregister(descriptor)
                self._event(Terminate("its owner is gone"), now)
        elif descriptor in self._accepted:
            widen_accepted(self._accepted[descriptor])
        elif descriptor in self._watches:
            self._poller.unregister(descriptor)
            self._event(ProcessGone(self._watches.ended(descriptor)), now)

    def _drain(self, at: int, router: zmq.Socket[bytes], now: float) -> None:
        """Hand every waiting envelope to the core, up to a bound (W8)."""
        assert self._broker is not None
        handle, recv = self._broker.handle, router.recv
        look = [(router, _POLLIN)]
        for _ in range(DRAIN_AT_MOST):
            try:
                routing_id = recv(_NOBLOCK)
            except zmq.Again:
                return  # the descriptor told of something else: a connection, a pipe that has room again
            # A zmq frame knows whether more follow; asking the socket for it costs as much as receiving (2.5 µs, measured).
            part = recv(_NOBLOCK, copy=False)
            frames: list[Any] = [part.bytes]
            while part.more:
                part = recv(_NOBLOCK, copy=False)
                frames.append(part)
            self._carry_out(handle(received(((at, routing_id), frames)), now), now)
            # Cheaper than the exception of one receive too many; and than asking for the option, which pyzmq looks up in an enum.
            if not zmq_poll(look, 0):
                return

    def _event(self, event: Event, now: float) -> None:
        assert self._broker is not None
        self._carry_out(self._broker.handle(event, now), now)

    def _carry_out(self, actions: list[Action], now: float) -> None:
        assert self._scaler is not None
        for action in actions:
            if isinstance(action, Deliver):
                self._waiting[action.name] = None
            elif isinstance(action, Send):
                self._send(action.route, action.frames)
            elif isinstance(action, Note):
                self._log.write(action)
            elif isinstance(action, Unlink):
                if self._segments is not None:
                    self._segments.unlink(action.owner)
            elif isinstance(action, Sweep):
                if self._segments is not None:
                    self._segments.sweep(action.living)
            elif isinstance(action, Watch):
                self._watch(action, now)
            elif isinstance(action, Unwatch):
                for descriptor in self._watches.end(action.name):
                    self._poller.unregister(descriptor)
            elif isinstance(action, Launch):
                for told in self._scaler.launch(action):
                    self._event(told, now)
            elif isinstance(action, Unload):
                self._scaler.unload(action.service)
            elif isinstance(action, Label):
                self._scaler.label(action)
            elif isinstance(action, Kill):
                for told in self._scaler.kill(action.launch):
                    self._event(told, now)
            elif isinstance(action, KillPeer):
                self._kill_peer(action.name)
            elif isinstance(action, Look):
                if is_stopped(action.pid):
                    self._event(Stopped(action.name), now)
            elif isinstance(action, Exit):
                self._done = True

    def _watch(self, watch: Watch, now: float) -> None:
        descriptor = self._watches.open(watch)
        if descriptor is not None:
            self._poller.register(descriptor, selectors.EVENT_READ)
            self._event(Watched(watch.name), now)

    def _kill_peer(self, name: str) -> None:
        descriptor = self._watches.descriptor_of(name)
        if descriptor is not None:
            # Through the pidfd: the pid may be somebody else's by now.
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)

    def _send_waiting(self, now: float) -> None:
        """One envelope for each peer that has something (W1)."""
        assert self._broker is not None
        while self._waiting:
            waiting, self._waiting = self._waiting, {}
            for name in waiting:
                send = self._broker.pack(name, now)
                if send is not None:
                    self._send(send.route, send.frames)

    def _send(self, route: Route, frames: list[Any]) -> None:
        router = self._bound[route[0]].socket
        try:
            _send(router, route[1], _SNDMORE | _NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            # Nothing was sent: the envelope is kept by its link and goes again when the peer is back.
            self._event(Unroutable(route), time.monotonic())
            return
        last = len(frames) - 1
        for at, frame in enumerate(frames):
            flags = _NOBLOCK if at == last else _SNDMORE | _NOBLOCK
            _send(router, frame, flags, len(frame) < UNCOPIED_FROM)

    def _stop(self) -> None:
        if self._http is not None:
            self._http.close()
        if self._scaler is not None:
            self._scaler.kill_all()
            self._scaler.close()
        if self._segments is not None:
            self._segments.close()
        self._watches.close()
        self._poller.close()
        for one in self._bound:
            release(one, linger_ms=LAST_WORDS_MS, directory_too=self._config.embedded)
        self._context.term()


def _segments(home: Bound) -> Segments | None:
    """Shared memory is for trusted peers, and for machines that have it."""
    if not home.trusted:
        return None
    try:
        return Segments(home.address)
    except OSError:
        return None


def _unpickle(code: bytes) -> Any:
    """A custom router. Only the core asks for this, and only for what came in by a trusted address (R4)."""
    import cloudpickle

    return cloudpickle.loads(code)


def load_named(name: str, path: list[str]) -> Any:
    """What "module:qualname" names. Only the core asks for this, and only for what came in by a trusted address (X1). `path`: the import
    path of who named it, after our own."""
    module, _, qualname = name.partition(":")
    added = [entry for entry in path if entry not in sys.path]
    sys.path.extend(added)
    try:
        found: Any = importlib.import_module(module)
    finally:
        sys.path[:] = [entry for entry in sys.path if entry not in added]
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def serve(
    config: BrokerConfig, ready: Callable[[list[str]], None], *, owner: int | None = None, log_level: str = "info"
) -> int:
    """Run a broker until it is told to end; returns the exit code. Raises ConfigError or AddressInUse before it serves."""
    if not config.bind:
        raise ConfigError(where="bind", message="no address to listen on")
    if sys.platform not in ("linux", "darwin"):
        raise ConfigError(where="broker", message=f"{sys.platform} is not supported; Linux and macOS are")
    return Server(config, owner=owner, log_level=log_level).run(ready)
