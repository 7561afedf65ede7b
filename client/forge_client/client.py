"""One event loop's connection to a broker: socket, link, heartbeat, timers, and the futures of its calls.

There is one per loop and broker, made by `connection`. The handles (`service`, `actor_handle`) append calls to its
link and `touch` it; at the end of the turn everything goes out in one envelope, and results resolve futures in a
loop, without a task or callback for each. What is said on the wire is the link's business, what a reply means the readers'.

Two clocks guard a call's timeout: the broker's, whose answer says how far the call got, and a moment later ours, for when
there is no broker to answer. One heap and one timer of the loop serve all calls.

A broker that is away is waited for, `orphan_grace_s` long: what is unanswered is kept by the link and said again to the
one that comes back (F10). An embedded broker that dies comes back because we start it anew.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import mmap
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Any, Final

from forge_client.binding import Binding
from forge_client.call import Call, GivenUp, Waiter
from forge_client.dealer import Dealer
from forge_client.embedded import EmbeddedBroker, Watch
from forge_client.heartbeat import Heartbeat
from forge_client.identity import draw_name, hello_identity
from forge_client.link import ClientLink, Declared
from forge_client.replies import Reader
from forge_client.segments import Pool
from forge_contract.config import BrokerConfig
from forge_contract.errors import (
    BrokerLost,
    BrokerUnreachable,
    CallTimeout,
    ForgeError,
    OutcomeUnknown,
    PayloadTooLarge,
    ServiceStopped,
    UnknownService,
    from_wire,
)
from forge_contract.framing import Frame, Payload, encode
from forge_contract.huge_pages import NEVER_KEPT_FROM
from forge_contract.messages import HEARTBEAT, OK
from forge_contract.payload import decode_exception, decode_small, payload_size
from forge_contract.peer_link import LinkState

_log = logging.getLogger("forge_client")
_now = time.monotonic

GUARD_S: Final = 0.25  # how much later than the broker's our own clock ends a call: its answer says more
BYE_LINGER_S: Final = 1.0
# Answered calls stay in the heap of timeouts until their time; past this surplus they are swept out together.
SWEEP_FROM: Final = 1024
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")

Why = Callable[[], Exception]  # makes the error anew for each who gets it


class Client:
    """Made and closed by `connection`. To be used on the loop it was made on."""

    def __init__(self, address: str, *, detached: bool = False, embedded: EmbeddedBroker | None = None) -> None:
        self.address = address
        self.embedded = embedded
        self.loop = asyncio.get_running_loop()
        self.over: Why | None = None  # why nothing can be sent any more
        self._bindings: dict[int, Binding] = {}
        self._timeouts: list[tuple[float, int, float]] = []  # (when, sequence, the timeout that passed)
        self._incarnations: set[int] = set()  # of brokers whose service ids are good here: each the other's successor
        self._lost_at: float | None = None  # while the broker is away: when we stop waiting
        self._grace_s = 10.0
        self._lag_s = 0.0
        self.flush_due = False  # at the end of this turn: `touch` has been called
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._opened: asyncio.Future[None] = self.loop.create_future()
        self.link = ClientLink(draw_name("client"), _now(), hello=hello_identity(), listener=self, detached=detached)
        # What every call's future has until it is answered; kept, because bound methods and contexts are made anew each time.
        self.when_done = GivenUp(self.link.unanswered, self._drop).done
        self.context = copy_context()
        self._dealer = Dealer(
            address,
            receive=self._receive,
            turn=self.touch,
            reconnected=self._reconnected,
            disconnected=self._disconnected,
            max_message_bytes=BrokerConfig.max_message_bytes,
        )
        self._pool: Pool | None = None
        self._heartbeat = Heartbeat(address, self._beat)
        self._loop_end = self._until_the_loop_ends()
        _enter(self._loop_end)
        self._watch = None if embedded is None else Watch(embedded, self.loop, self._broker_lost)

    def __repr__(self) -> str:
        state = "closed" if self.over else self.link.state.value
        return (
            f"<Client {self.link.client:06x} of {self.address} {state}, {len(self.link.unanswered)} calls unanswered>"
        )

    @property
    def trusted(self) -> bool:
        """Whether our broker trusts the address we came in by: code by value and pickles may travel."""
        return self.link.trusted

    @property
    def incarnation(self) -> int:
        return self.link.incarnation

    def continues(self, incarnation: int) -> bool:
        """Whether what ran under that broker runs under ours: it is ours, or ours has taken over from it."""
        return incarnation in self._incarnations

    async def open(self, timeout_s: float) -> None:
        """Say hello and wait for the welcome. Raises BrokerUnreachable, or the broker's refusal."""
        self.touch()
        try:
            await asyncio.wait_for(asyncio.shield(self._opened), timeout_s)
        except TimeoutError:
            error = BrokerUnreachable(address=self.address, waited_s=timeout_s)
            self._end(lambda: error)
            raise error from None
        except BaseException:
            self._end(lambda: BrokerLost(address=self.address, why="connecting was given up"))
            raise

    # Calls.

    def touch(self) -> None:
        """Send what has gathered at the end of this turn of the loop."""
        if not self.flush_due and self.over is None:
            self.flush_due = True
            self.loop.call_soon(self._flush)

    def new_call(self) -> Call:
        """The future of a call that is submitted next. Cancelling it, as cancelling a task that awaits it does, cancels the call."""
        return self.watch(self.loop.create_future())

    def watch(self, call: Call) -> Call:
        """The call itself, whose cancellation we shall hear of."""
        call.add_done_callback(self.when_done, context=self.context)
        return call

    def own(self, payload: Payload, label: str, *, share: bool = True) -> Payload:
        """The payload, judged by size and made independent of the caller's memory: arrays were set aside uncopied, and
        what the caller changes after the call must not change what is sent, now or again after a reconnect. `share`: it
        may lie in shared memory, for it is needed until its answer and no longer. Raises PayloadTooLarge."""
        size = payload_size(payload)
        if size > self.link.max_payload_bytes:
            raise PayloadTooLarge(what=f"the arguments of {label}", size=size, limit=self.link.max_payload_bytes)
        if isinstance(payload, bytes):
            return payload
        if share and self._pool is not None:
            payload = self._pool.share(payload)
        return [part if isinstance(part, bytes) else _copied(part) for part in payload]

    def guard(self, seq: int, deadline: float, timeout_s: float) -> None:
        """End this call by our own clock if the broker has not."""
        heap = self._timeouts
        if len(heap) > SWEEP_FROM + 2 * len(self.link.unanswered):
            heap[:] = [entry for entry in heap if entry[1] in self.link.unanswered]
            heapq.heapify(heap)
        heapq.heappush(heap, (deadline + GUARD_S, seq, timeout_s))

    def _drop(self, seq: int) -> None:
        """Nobody waits for this call any more."""
        self.link.cancel(seq)
        self.touch()

    async def control(self, op: str, fields: dict[str, Any], payload: Payload = b"") -> dict[str, Any]:
        """Ask the broker (PROTOCOL.md §7, operations of CONTROL) and wait for its answer; a payload of it is there as `payload`.

        Raises the broker's error, or the user's exception that made it fail; BrokerLost.
        """
        return await self.control_soon(op, fields, payload)

    def control_soon(self, op: str, fields: dict[str, Any], payload: Payload = b"") -> asyncio.Future[dict[str, Any]]:
        """The same; it is said to the broker before anything said after it, awaited or not."""
        if self.over is not None:
            raise self.over()
        answer: asyncio.Future[dict[str, Any]] = self.loop.create_future()
        self.link.control(op, fields, payload, (answer, op))
        self.touch()
        return answer

    async def deploy(self, spec: dict[str, Any], payload: Payload) -> Binding:
        """Start a service; returns when all its replicas are HEALTHY. Cancelled, it leaves nothing started."""
        answer = self.control_soon("deploy", {"spec": spec}, payload)
        try:
            binding = self.bind(await answer, started_here=True)
        except asyncio.CancelledError:
            # The answer may have come in the very turn in which we were cancelled. If not, `answer` sees to it.
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self.stop_unwanted(answer.result()["service"])
            raise
        if not binding.detached:
            binding.keep_deed(spec, payload, owner=self.link.client, trusted=self.trusted)
        return binding

    def stop_unwanted(self, service: int) -> None:
        """Stop a service whose starter went away before it had the handle."""
        self._bindings.pop(service, None)
        if self.over is None:
            self.control_soon("stop", {"service": service}).add_done_callback(_seen)

    def bind(self, description: dict[str, Any], *, started_here: bool = False) -> Binding:
        """What this client knows of a service; the same object for all its handles."""
        service = int(description["service"])
        binding = self._bindings.get(service)
        if binding is None:
            binding = self._bindings[service] = Binding(self, description)
        binding.started_here |= started_here
        return binding

    # The end.

    async def shutdown(self) -> None:
        """Stop what this client started, say goodbye, close."""
        if self.over is None:
            started = [one for one in self._bindings.values() if one.started_here and not one.detached]
            for outcome in await asyncio.gather(*(one.stop() for one in started), return_exceptions=True):
                if isinstance(outcome, BaseException) and not isinstance(outcome, (BrokerLost, ServiceStopped)):
                    _log.warning("stopping a service at shutdown: %s: %s", type(outcome).__name__, outcome)
        self.goodbye("shutdown")
        await self._loop_end.aclose()

    def goodbye(self, reason: str) -> None:
        """Leave at once: the broker ends what we started. Also from where the loop is closed already."""
        if self.over is not None:
            return
        self.link.bye(reason)
        for frames in self.link.flush(_now()):
            self._dealer.send(frames)
        self._end(
            lambda: ServiceStopped(service="the service", why=": the client that used it has ended"), BYE_LINGER_S
        )

    async def _until_the_loop_ends(self) -> AsyncGenerator[None]:
        """asyncio.run closes all asynchronous generators of its loop before the loop itself: the one moment at which
        a client whose user forgot it can still say goodbye."""
        try:
            yield
        finally:
            self.goodbye("its loop has ended")

    def _end(self, why: Why, linger_s: float = 0.0) -> None:
        if self.over is not None:
            return
        self.over = why
        self._heartbeat.stop()
        if self._watch is not None:
            self._watch.close()
        self._dealer.close(linger_s)
        self.link.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fail(*self.link.give_up(), why, quietly=linger_s > 0)
        if self._pool is not None:
            self._pool.close()
        if not self._opened.done():
            self._opened.set_exception(why())
            self._opened.exception()  # whoever opens us is told, or has told us

    def _fail(self, calls: list[Waiter], controls: list[Any], why: Why, *, quietly: bool = False) -> None:
        bindings = list(self._bindings.values())
        self._bindings.clear()
        for binding in bindings:
            binding.ended(why)
        if self.loop.is_closed():
            return  # nobody is left to be told
        for waiting, _ in (*calls, *controls):
            if not waiting.done():
                waiting.set_exception(why())
                if quietly:
                    waiting.exception()  # we leave by ourselves: that nobody awaits it is no news

    # Turns of the loop.

    def _receive(self, frames: list[Frame]) -> None:
        self.link.receive(frames, _now())

    def _flush(self) -> None:
        self.flush_due = False
        if self.over is not None:
            return
        now = _now()
        send = self._dealer.send
        for frames in self.link.flush(now):
            send(frames)
        if self._lost_at is not None or not self.link.heard:
            self._wait_or_rejoice(now)
        self._arm(now)

    def _wait_or_rejoice(self, now: float) -> None:
        """Workers wait so long for their broker and then leave; whatever we wait for is lost with them."""
        if self.link.heard:
            self._lost_at = None
        elif self._lost_at is None and self.link.welcomes:
            self._lost_at = now + self._grace_s

    def _arm(self, now: float) -> None:
        """One timer for all. One that is armed too early stays: it looks again when it fires, which is cheaper than
        moving it in every turn."""
        wanted = self.link.next_deadline()
        if self._timeouts and (wanted is None or self._timeouts[0][0] < wanted):
            wanted = self._timeouts[0][0]
        if self._lost_at is not None and (wanted is None or self._lost_at < wanted):
            wanted = self._lost_at
        if wanted is None or (self._timer is not None and self._timer_at <= wanted):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = wanted
        self._timer = self.loop.call_later(max(0.0, wanted - now), self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = _now()
        self._lag_s = max(0.0, now - self._timer_at)
        if self._lost_at is not None and self._lost_at <= now:
            if self._lag_s < self._grace_s / 2:
                self._broker_lost(f"nothing was heard of it for {self._grace_s:g} s")
                return
            # The loop was held up so long that we, not the broker, were away; what it said lies in the socket.
            self._lost_at = now + self._grace_s
        while self._timeouts and self._timeouts[0][0] <= now:
            _, seq, timeout_s = heapq.heappop(self._timeouts)
            waiter: Waiter | None = self.link.unanswered.get(seq)
            if waiter is not None and not waiter[0].done():
                self.link.cancel(seq)
                state = "no answer from the broker"
                call, reader = waiter
                call.set_exception(CallTimeout(endpoint=reader.label, timeout_s=timeout_s, state=state))
        self._flush()

    def _reconnected(self) -> None:
        self.link.reconnected(_now())
        self.touch()

    def _disconnected(self) -> None:
        self.link.disconnected(_now())
        self.touch()

    def _broker_lost(self, why: str) -> None:
        self._end(lambda: BrokerLost(address=self.address, why=why))

    def _beat(self) -> list[Frame] | None:
        """In the heartbeat's thread: reads numbers, changes nothing."""
        link = self.link
        if link.state is not LinkState.OPEN:
            return None
        fields = {"oldest_s": 0.0, "lag_s": self._lag_s, "rss": _resident_bytes()}
        if self._pool is not None:
            fields |= self._pool.vitals
        return encode(link.name, link.channel.epoch, link.incarnation, 0, 0, [[HEARTBEAT, fields]])

    # What the link tells (`link.Listener`).

    def welcomed(self, fields: dict[str, Any]) -> None:
        self._incarnations |= {self.incarnation, *fields.get("predecessors", ())}
        for binding in self._bindings.values():
            binding.incarnation = self.incarnation
        self._grace_s = float(fields.get("orphan_grace_s") or self._grace_s)
        if self._pool is None and self.link.segments is not None:
            self._pool = Pool(self.link.segments, self.link.name)
        self._heartbeat.start(float(fields.get("heartbeat_s") or BrokerConfig.heartbeat_s))
        if not self._opened.done():
            self._opened.set_result(None)

    def refused(self, error: ForgeError) -> None:
        if not self._opened.done():
            self._opened.set_exception(error)
        self._end(lambda: from_wire(error.to_wire()))

    def lost(self, waiters: list[Any], controls: list[Any]) -> None:
        why = "a broker that knows nothing of our calls answers in its place"
        self._incarnations.clear()
        self._fail(waiters, controls, lambda: BrokerLost(address=self.address, why=why))

    def unsure(self, waiters: list[Any]) -> None:
        for call, reader in waiters:
            if not call.done():
                call.set_exception(OutcomeUnknown(endpoint=reader.label, why="the broker died while it ran"))

    def declares(self) -> Declared | None:
        bindings = self._bindings.values()
        if not bindings:
            return None
        deeds = [binding.deed for binding in bindings if binding.deed is not None]
        replays = [one for binding in bindings if not binding.over for one in binding.replays.items()]
        return Declared(
            services=[deed for deed, _ in deeds],
            sessions=[row for binding in bindings for row in binding.declared_sessions()],
            replays=[endpoint for endpoint, _ in replays],
            payloads=[payload for _, payload in (*deeds, *replays)],
        )

    def results(self, trusted: bool, waiters: list[Any], statuses: list[int], payloads: list[Payload]) -> None:
        alike = len(payloads) > 1 and not any(statuses)
        values = decode_small(payloads, trusted=trusted) if alike else None
        if values is None:
            for waiter, status, payload in zip(waiters, statuses, payloads, strict=True):
                if waiter is not None:
                    call, reader = waiter
                    self._settle(call, reader, trusted, status, payload)
            return
        when_done = self.when_done
        for waiter, value, payload in zip(waiters, values, payloads, strict=True):
            if waiter is None:
                continue
            call, reader = waiter
            if type(reader) is not Reader:  # a value alone is not what it makes of a reply
                self._settle(call, reader, trusted, OK, payload)
                continue
            call.remove_done_callback(when_done)
            try:
                call.set_result(value)
            except asyncio.InvalidStateError:
                continue  # cancelled in this very turn

    def _settle(self, call: Call, reader: Reader, trusted: bool, status: int, payload: Payload) -> None:
        """Give one call its reply, whatever that is."""
        if call.done():
            return
        call.remove_done_callback(self.when_done)
        try:
            value = reader.one(status, payload, trusted)
        except Exception as error:
            # Its own frames say nothing to the caller, and would keep this whole batch in memory.
            call.set_exception(error.with_traceback(None))
        else:
            call.set_result(value)

    def parts(
        self, trusted: bool, waiter: Any, points: list[list[int]], statuses: list[int], payloads: list[Payload]
    ) -> None:
        if waiter is None:
            return
        call, reader = waiter
        call.remove_done_callback(self.when_done)
        try:
            value = reader.parts(trusted, points, statuses, payloads)
        except Exception as error:
            if not call.done():
                call.set_exception(error.with_traceback(None))
        else:
            if not call.done():
                call.set_result(value)

    def answer(self, waiter: Any, ok: bool, fields: dict[str, Any], payload: Payload | None) -> None:
        if waiter is None:
            return
        answer, op = waiter
        if answer.done():
            if op == "deploy" and ok and "service" in fields:
                self.stop_unwanted(fields["service"])
        elif ok:
            answer.set_result(fields if payload is None else {**fields, "payload": payload})
        elif payload:
            trusted = fields.get("trusted") is True
            try:
                error: BaseException = decode_exception(payload, trusted=trusted)
            except ForgeError as unreadable:
                error = unreadable
            answer.set_exception(error if isinstance(error, Exception) else from_wire(fields.get("error")))
        else:
            answer.set_exception(from_wire(fields.get("error")))

    def notice(self, topic: str, fields: dict[str, Any]) -> None:
        if topic == "pending":
            # Visible without asking (A3): a program that waits for a GPU that never comes should say so by itself.
            name = fields.get("name") or fields.get("service")
            _log.warning("%s: replica %s is pending: %s", name, fields.get("replica"), fields.get("why"))
            return
        binding = self._bindings.get(fields.get("service", 0))
        if binding is None:
            return
        binding.notice(topic, fields)
        if topic == "stopped":
            del self._bindings[binding.service]


def _enter(generator: AsyncGenerator[None]) -> None:
    """Run an asynchronous generator to its first yield, which awaits nothing; its loop then knows of it."""
    try:
        generator.__anext__().send(None)
    except StopIteration:
        return


def _seen(done: asyncio.Future[Any]) -> None:
    if (
        not done.cancelled()
        and isinstance(done.exception(), Exception)
        and not isinstance(done.exception(), UnknownService)
    ):
        _log.warning("stopping a service nobody waits for: %s", done.exception())


def _copied(part: Frame) -> Frame:
    """On huge pages when it is so large that its memory is made for it alone."""
    if len(part) < NEVER_KEPT_FROM:
        return bytes(part)
    memory = mmap.mmap(-1, len(part), flags=mmap.MAP_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    memory[:] = part
    return memoryview(memory).toreadonly()


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * _PAGE
    except OSError:
        return 0  # no /proc here
