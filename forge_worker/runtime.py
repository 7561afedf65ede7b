"""The worker's child process: one connection, at most one actor, from hello to goodbye. The only place here that acts.

    GREETING ─▶ idle ─(WARM ─▶ imported)─ASSIGN─▶ pinned ─▶ (BEGIN) ─▶ loaded ─READY─▶ serving ─STOP, signal, orphaned─▶ leaving ─▶ exit

The link says what to do, `actor_host` runs the calls, `loading` finds the class; here they meet the socket, the clock,
signals and the process's environment. Everything of the user's runs in this process: `__init__`, `setup`, async
endpoints and `teardown` on the main thread, as torch and signal handling expect, plain endpoints in threads. So the loop
may stand still for as long as a user's code takes; the heartbeat goes on in its own thread and says so.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from forge_client.dealer import Dealer
from forge_client.heartbeat import Heartbeat
from forge_client.identity import draw_name, hello_identity
from forge_client.segments import Pool
from forge_contract.config import BrokerConfig
from forge_contract.errors import BrokerUnreachable, ForgeError, ReplicaLost
from forge_contract.framing import Frame, Payload
from forge_contract.payload import encode_exception
from forge_contract.peer_link import LinkState
from forge_worker.actor_host import ActorHost
from forge_worker.assignment import Assignment, Source, master_environment
from forge_worker.health import IN_A_ROW, until_unhealthy
from forge_worker.hooks import call_optional, is_our_cancel
from forge_worker.last_resort import EXIT_INTERNAL, give_up
from forge_worker.link import (
    Assign,
    Begin,
    Drop,
    Forget,
    Import,
    Instruction,
    Recall,
    Refused,
    Replay,
    Run,
    Stop,
    Warm,
    Welcomed,
    WorkerLink,
)
from forge_worker.loading import find_methods, load_class, make_instance
from forge_worker.machine import LoopLag, choose_master, take_stdin
from forge_worker.outcomes import trimmed
from forge_worker.output import make_output_last
from forge_worker.vitals import Vitals

log = logging.getLogger("forge_worker")

TOLD_AT_MOST: Final = 500  # characters
EXIT_OK: Final = 0
EXIT_DRAINED: Final = 64  # told to stop, and that no other is wanted in our place; our supervisor ends with us
EXIT_NO_BROKER: Final = 69  # EX_UNAVAILABLE: unreachable, vanished, or it refused us

WELCOME_WITHIN_S: Final = 10.0
SIGNAL_GRACE_S: Final = 30.0  # SIGTERM drains (F9); who cannot wait sends another
OWNER_GONE_GRACE_S: Final = 2.0  # our supervisor was killed: somebody wants this machine back
GOODBYE_S: Final = 1.0  # for the last replies to be acknowledged
# For teardown and the interpreter's own end, over the grace of calls. Past it the process is ended with a dump of what it
# was doing: an orphan that hangs in a user's teardown would hold its GPU for ever.
LEAVE_WITHIN_S: Final = 30.0


@dataclass(frozen=True)
class WorkerOptions:
    """The command line of a child, and what a fork server has for it."""

    broker: str
    gpus: tuple[str, ...] = ()
    launch: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    owned: bool = False  # stdin is a supervisor's pipe; its end means the supervisor is gone
    loaded: type | None = None  # the class, imported before we were forked


def main(options: WorkerOptions) -> int:
    """Run one worker to its end; returns the exit code."""
    owner = take_stdin(options.owned)
    make_output_last()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("forge_worker %(levelname)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # a user's basicConfig must not print these twice
    os.environ["FORGE_BROKER"] = options.broker  # what the actor calls, it calls at the same broker
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(options, owner))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _serve(options: WorkerOptions, owner: int | None) -> int:
    try:
        return await Worker(options, owner).serve()
    except Exception:
        log.exception("the worker itself failed; please report this")
        return EXIT_INTERNAL


class Worker:
    """One child's life. `serve()` returns its exit code."""

    def __init__(self, options: WorkerOptions, owner: int | None) -> None:
        self._options = options
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._link = WorkerLink(
            draw_name("worker"),
            time.monotonic(),
            identity=hello_identity(),
            gpus=options.gpus,
            labels=options.labels,
            launch=options.launch,
        )
        self._dealer = Dealer(
            options.broker,
            receive=self._receive,
            turn=self._turn,
            reconnected=self._reconnected,
            disconnected=self._disconnected,
            max_message_bytes=BrokerConfig().max_message_bytes,
        )
        self._pool: Pool | None = (
            None  # for results; never closed while a broker lives, who knows when they have been read
        )
        self._vitals = Vitals(options.gpus)
        self._heartbeat = Heartbeat(options.broker, self._beat)
        self._host: ActorHost | None = None
        self._class = options.loaded  # of a spare, or forked from a process that had it
        self._instance: Any = None
        self._starting: asyncio.Task[None] | None = None
        self._begin: asyncio.Future[Begin] = self._loop.create_future()
        self._over: asyncio.Future[int] = self._loop.create_future()
        self._replays: deque[Replay] = deque()
        self._played = 0
        self._replaying: asyncio.Task[None] | None = None  # after READY
        self._health: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._exit_code = EXIT_OK
        self._broken = False  # the process itself: its sessions' states are not to be trusted
        self._acknowledged = asyncio.Event()  # while leaving: all that was sent
        self._wake: asyncio.TimerHandle | None = None
        self._wake_at = math.inf  # monotonic seconds
        self._orphan: asyncio.TimerHandle | None = None
        self._orphan_grace_s = WELCOME_WITHIN_S
        self._flush_due = False
        self._signals = 0
        self._lag = LoopLag(self._loop)

    async def serve(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            # Not loop.add_signal_handler: it would hear the second signal only when the user's code lets the loop run.
            signal.signal(number, self._signalled)
        if self._owner is not None:
            self._loop.add_reader(self._owner, self._owner_said, self._owner)
        unwelcome = self._loop.call_later(WELCOME_WITHIN_S, self._nobody_answers)
        self._flush()
        try:
            return await self._over
        finally:
            unwelcome.cancel()
            for timer in (self._wake, self._orphan):
                if timer is not None:
                    timer.cancel()
            self._heartbeat.stop()
            if self._pool is not None and self._exit_code == EXIT_NO_BROKER:
                self._pool.close()  # nobody else will
            self._dealer.close(linger_s=GOODBYE_S)

    # The socket's side.

    def _receive(self, frames: list[Frame]) -> None:
        if self._orphan is not None:
            self._orphan.cancel()
            self._orphan = None
        self._link.receive(frames, time.monotonic())
        if self._leaving is not None and not self._link.channel.kept_bytes:
            self._acknowledged.set()

    def _turn(self) -> None:
        self._flush_due = True  # what ends in this turn leaves with it
        try:
            for instruction in self._link.take():
                self._carry_out(instruction)
            if self._host is not None:
                self._host.serve()
        except Exception as error:  # calls are half in: whoever waits for them would wait for ever
            give_up(error)
        self._flush()

    def _carry_out(self, instruction: Instruction) -> None:
        host = self._host
        match instruction:
            case Run():
                if host is None:
                    log.error("a call came before READY: %d requests", len(instruction.ids))
                else:
                    host.run(instruction)
            case Drop():
                if host is not None:
                    host.drop(instruction.ids)
            case Recall():
                if host is not None:
                    host.give_back()
            case Import():
                if host is not None:
                    host.take_state(instruction)
            case Forget():
                if host is not None:
                    host.forget(instruction.sessions)
            case Replay():
                self._replays.append(instruction)
                if host is not None and self._replaying is None:
                    self._replaying = self._loop.create_task(self._replay_later(host))
            case Warm():
                self._warm(instruction.source)
            case Assign() if self._leaving is None:
                self._starting = self._loop.create_task(self._start(instruction.assignment, instruction.arguments))
            case Begin():
                if not self._begin.done():
                    self._begin.set_result(instruction)
            case Stop():
                code = EXIT_OK if instruction.replace else EXIT_DRAINED
                self._leave(code, instruction.reason, instruction.grace_s)
            case Welcomed():
                if self._pool is None and self._link.segments is not None:
                    self._pool = Pool(self._link.segments, self._link.name)
                self._orphan_grace_s = float(instruction.fields.get("orphan_grace_s", self._orphan_grace_s))
                self._heartbeat.start(float(instruction.fields.get("heartbeat_s", BrokerConfig().heartbeat_s)))
                if instruction.recovering and host is not None:
                    host.tell_states()
            case Refused():
                log.error("the broker at %s refused this worker: %s", self._options.broker, instruction.error)
                self._leave(EXIT_NO_BROKER, "refused", 0.0)

    def _flush_soon(self) -> None:
        # At the end of the turn: what other calls finish until then goes into the same envelope (W1).
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        try:
            for frames in self._link.flush(time.monotonic()):
                self._dealer.send(frames)
        except Exception as error:  # no memory for the envelope, or our socket was closed under us
            give_up(error)
        deadline = self._link.next_deadline()
        # A timer that comes too early costs one look; making a new one in every turn would cost more.
        if deadline is not None and deadline < self._wake_at - 0.001:
            if self._wake is not None:
                self._wake.cancel()
            self._wake_at = deadline
            self._wake = self._loop.call_later(max(0.0, deadline - time.monotonic()), self._awake)

    def _awake(self) -> None:
        self._wake, self._wake_at = None, math.inf
        self._flush()

    def _reconnected(self) -> None:
        if self._orphan is not None:
            # Somebody is there again; now it has the grace to say something that tells it is a broker.
            self._orphan.cancel()
            self._orphan = self._loop.call_later(self._orphan_grace_s, self._orphaned)
        self._link.reconnected(time.monotonic())
        self._flush()

    def _disconnected(self) -> None:
        if self._orphan is None and self._link.incarnation:
            self._orphan = self._loop.call_later(self._orphan_grace_s, self._orphaned)

    def _beat(self) -> list[Frame] | None:
        """In the heartbeat's thread."""
        now = time.monotonic()
        lag_s = self._lag.seen(now)
        if lag_s is None:
            return None
        oldest_s = self._host.oldest_s(now) if self._host is not None else 0.0
        segments = {} if self._pool is None else self._pool.vitals
        return self._link.heartbeat({"oldest_s": oldest_s, "lag_s": lag_s, **self._vitals.read(), **segments})

    # Becoming a spare, or a rank.

    def _warm(self, source: Source) -> None:
        """The loop stands still meanwhile, as the import would have it anyway: it belongs on the main thread."""
        os.environ.update(source.environment())
        try:
            self._class = self._class or load_class(source)
        except BaseException as error:  # SystemExit too: whoever looks at the spares is told, whatever it was
            log.error("%s could not be imported for %s", source.class_name, source.label, exc_info=trimmed(error))
            self._give_in("could not import", told(error), self._encoded(error))
            return
        self._link.warmed()

    async def _start(self, assignment: Assignment, arguments: Payload) -> None:
        try:
            os.environ.update(assignment.environment())
            begin = await self._meet(assignment)
            os.environ.update(master_environment(begin.addr, begin.port))
            # A class sent by value is another one each time it is loaded: here it is the one that was.
            cls = self._class or load_class(assignment)
            self._instance = make_instance(cls, assignment, arguments)
            methods = find_methods(self._instance, assignment)
            await call_optional(self._instance, "setup")
            host = ActorHost(
                assignment,
                self._instance,
                methods,
                self._link,
                trusted=self._link.trusted,
                on_reply=self._flush_soon,
                on_broken=self._raised_fatally,
                share=None if self._pool is None else self._pool.share,
            )
            await self._replay(host)
        except asyncio.CancelledError:
            raise  # by a stop; nobody waits for READY any more
        except BaseException as error:  # SystemExit too: the caller of as_service is told, whatever it was
            log.error("%s could not be started", assignment.label, exc_info=trimmed(error))
            self._give_in("could not be started", told(error), self._encoded(error))
            return
        self._host = host
        self._link.ready(self._played)
        self._flush_soon()
        health = getattr(self._instance, "health", None)
        if health is not None and not hasattr(health, "__forge_endpoint__"):  # an endpoint is for its callers
            self._health = self._loop.create_task(self._watch(health, assignment))

    async def _replay(self, host: ActorHost) -> None:
        while self._replays:
            await host.replay(self._replays.popleft())
            self._played += 1

    async def _replay_later(self, host: ActorHost) -> None:
        try:
            await self._replay(host)
        except BaseException as error:
            if is_our_cancel(error):
                raise
            log.error("a replay failed", exc_info=trimmed(error))
            self._give_in("a replay failed", told(error), self._encoded(error))
            return
        self._replaying = None
        self._link.ready(self._played)
        self._flush_soon()

    async def _watch(self, health: Callable[[], Any], assignment: Assignment) -> None:
        raised = await until_unhealthy(health, assignment.health_poll_rate)
        if raised is not None:
            self._give_in("health() failed", told(raised), self._encoded(raised))
        else:
            why = f"health() returned False {IN_A_ROW} times in a row"
            self._give_in("health() failed", ReplicaLost(replica=assignment.label, why=why), None)

    def _raised_fatally(self, exception: Payload) -> None:
        log.error("an exception that breaks the process was raised; it ends, and the replica starts anew")
        why = "an endpoint raised what breaks the process; its caller has the exception"
        self._give_in("an exception broke the process", ReplicaLost(replica="this", why=why), exception)

    def _encoded(self, error: BaseException) -> Payload:
        return encode_exception(trimmed(error), trusted=self._link.trusted)

    async def _meet(self, assignment: Assignment) -> Begin:
        """Where the ranks meet. A single one need not ask anybody."""
        if assignment.rank == 0:
            addr, port = choose_master(self._options.broker)
            if assignment.world == 1:
                return Begin(addr, port)
            self._link.master(addr, port)
            self._flush_soon()
        return await self._begin

    # Leaving.

    def _give_in(self, reason: str, error: ForgeError | None, exception: Payload | None) -> None:
        """We are no good any more, or never were: say so, behind what has ended, and leave."""
        if self._leaving is None:
            self._broken = True
            self._link.unready(error, exception)
            self._flush_soon()
            self._leave(EXIT_OK, reason, 0.0)

    def _leave(self, code: int, reason: str, grace_s: float) -> None:
        """Stop, once: what comes first decides the exit code, but that nobody is wanted in our place is heard later too."""
        if self._leaving is not None:
            if code == EXIT_DRAINED and self._exit_code == EXIT_OK:
                self._exit_code = code
            return
        self._exit_code = code
        for task in (self._health, self._replaying):
            # One of them may be what says so; it ends by itself.
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        faulthandler.dump_traceback_later(grace_s + LEAVE_WITHIN_S, exit=True)
        self._leaving = self._loop.create_task(self._farewell(reason, grace_s))

    async def _farewell(self, reason: str, grace_s: float) -> None:
        try:
            if self._starting is not None and not self._starting.done():
                self._starting.cancel()
                await asyncio.wait([self._starting])
            if self._host is not None:
                await self._host.finish(grace_s, checkpoints=not self._broken)
            failed = await self._tear_down()
            await self._say_bye(f"{reason}; {failed}" if failed else reason)
        finally:
            if not self._over.done():
                self._over.set_result(self._exit_code)

    async def _tear_down(self) -> str:
        """Run the actor's teardown; returns what went wrong with it, or nothing. What never became READY has none."""
        if self._host is None:
            return ""
        try:
            await call_optional(self._instance, "teardown")
        except BaseException as error:
            log.error("teardown of %s failed", type(self._instance).__name__, exc_info=trimmed(error))
            return f"teardown raised {type(error).__name__}: {error}"
        return ""

    async def _say_bye(self, reason: str) -> None:
        if self._link.state is not LinkState.OPEN or self._orphan is not None:
            return  # nobody to say it to
        if self._pool is not None:
            self._pool.freeze()
        self._link.bye(reason)
        self._flush()
        self._acknowledged.clear()
        # A probe is answered at once, so we know that the last replies have arrived before the process ends.
        self._link.reconnected(time.monotonic())
        self._flush()
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._acknowledged.wait()
        except TimeoutError:
            log.warning("the broker has not acknowledged the last %d bytes", self._link.channel.kept_bytes)

    def _signalled(self, number: int, _frame: object) -> None:
        """On the main thread, between two bytecodes of whatever runs there."""
        self._signals += 1
        if self._signals > 1:
            os._exit(128 + number)  # the second time means now
        self._loop.call_soon_threadsafe(self._leave, EXIT_OK, "terminated", SIGNAL_GRACE_S)

    def _owner_said(self, owner: int) -> None:
        try:
            if os.read(owner, 4096):
                return
        except BlockingIOError:
            return
        self._loop.remove_reader(owner)
        self._leave(EXIT_OK, "its supervisor is gone", OWNER_GONE_GRACE_S)

    def _orphaned(self) -> None:
        log.error("the broker at %s has been gone for %s s", self._options.broker, self._orphan_grace_s)
        self._leave(EXIT_NO_BROKER, "orphaned", 0.0)

    def _nobody_answers(self) -> None:
        if not self._link.incarnation:
            error: ForgeError = BrokerUnreachable(address=self._options.broker, waited_s=WELCOME_WITHIN_S)
            log.error("%s", error)
            self._leave(EXIT_NO_BROKER, "unreachable", 0.0)


def told(error: BaseException) -> ForgeError:
    """An exception of the user's as a line for `forge status`: the broker never looks into the exception itself (W2)."""
    return ReplicaLost(replica="this", why=f"{type(error).__name__}: {error}"[:TOLD_AT_MOST])
