"""The callers of `chaos`: each keeps calls outstanding, knows what the answers must be, and writes down what it saw.

`chaos` has some in its own process; others run in a child of it, `python -m bench.chaos_callers`, on another address. The child stops
asking when its stdin ends, waits for what is unanswered, and exits.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, Final

if not __package__:  # run as a plain script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.chaos_actor import BALLAST
from bench.chaos_history import History
from forge_client import (
    BrokerLost,
    CallCancelled,
    CallTimeout,
    ForgeError,
    OutcomeUnknown,
    Service,
    connect,
    get_service,
)
from forge_client.client import Client

UNKNOWN: Final = (OutcomeUnknown, CallTimeout, CallCancelled, BrokerLost)
"""After these nobody can say whether the call ran."""

SESSION_CALLS: Final = 60
AT_ONCE: Final = 3
"""Calls of one session that are sent before the first is answered: without that there is no order to keep."""

CONNECT_S: Final = 30.0
"""Over the proxy, which may break this connection, too."""

PAUSE_S: Final = 0.05
"""After a failure, or a caller whose every call is refused would do nothing but write that down."""

Sent = tuple[str, Awaitable[Any] | None]


class Callers:
    """Callers of one service, on the running loop. `numbers` make the ids of their calls.

    `over` is set by the first BrokerLost. For the owner of the service, on the broker's own machine, that is a promise broken: it goes
    on asking, and every call fails. With `may_end` it is what may happen to somebody whose network was away for longer than the
    recovery window: they stop, what they had asked is unknown, and their owner connects again.
    """

    def __init__(
        self,
        service: Service,
        client: Client,
        history: History,
        label: str,
        numbers: Iterator[int],
        *,
        may_end: bool = False,
    ) -> None:
        self._service = service
        self._client = client
        self._history = history
        self._label = label
        self._numbers = numbers
        self._may_end = may_end
        self._stopping = False
        self.over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, *, sessions: int, plain: int, once: int) -> None:
        loops = [self._in_sessions() for _ in range(sessions)]
        loops += [self._one_by_one("plain") for _ in range(plain)]
        loops += [self._one_by_one("once") for _ in range(once)]
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def stop(self, settle_s: float) -> int:
        """Ask nothing new and wait for what is unanswered; the number of callers that still waited when the time was up."""
        self._stopping = True
        _, waiting = await asyncio.wait(self._tasks, timeout=settle_s)
        for task in waiting:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        # Replies of calls that were answered before: what reached this process twice, below the futures.
        self._history.write("refused", "plain", value=self._client.link.refused_replies)
        return len(waiting)

    def _goes_on(self) -> bool:
        return not (self._stopping or (self._may_end and self.over.is_set()))

    async def _one_by_one(self, kind: str) -> None:
        while self._goes_on():
            sent = self._send(kind)
            if not await self._outcome(kind, sent):
                await asyncio.sleep(PAUSE_S)

    async def _in_sessions(self) -> None:
        while self._goes_on():
            session = self._service.session()
            if not await self._control("open", session.session_id, session.__aenter__()):
                await asyncio.sleep(PAUSE_S)
                continue
            n = 0
            well = True
            while well and n < SESSION_CALLS and self._goes_on():
                numbers = range(n + 1, n + AT_ONCE + 1)
                burst = [(number, self._send("session", session.session_id, number)) for number in numbers]
                for number, sent in burst:
                    well &= await self._outcome("session", sent, session.session_id, number)
                n += AT_ONCE
            await self._control("close", session.session_id, session.__aexit__(None, None, None))
            if not well:
                await asyncio.sleep(PAUSE_S)

    def _send(self, kind: str, session: str = "", n: int = 0) -> Sent:
        number = next(self._numbers)
        call = f"{self._label}-{number}"
        self._history.write("invoke", kind, call, session, n)
        service = self._service
        try:
            if kind == "session":
                return call, service.add.route(call, n)
            if kind == "once":
                return call, service.once.route(call)
            # One in eight carries what goes through shared memory; of these and of the others every second goes in a batch.
            if number % 8 == 0:
                return call, (service.carry_together if number % 16 else service.carry).route(call, BALLAST)
            return call, (service.work_together if number % 2 else service.work).route(call)
        except ForgeError as error:
            # Raised before anything travelled, so it certainly did not run.
            lost = isinstance(error, BrokerLost)
            if lost:
                self.over.set()
            self._history.write(
                "info" if lost and self._may_end else "fail", kind, call, session, n, detail=_told(error)
            )
            return call, None

    async def _outcome(self, kind: str, sent: Sent, session: str = "", n: int = 0) -> bool:
        call, answer = sent
        if answer is None:
            return False
        try:
            value = _judged(await answer)
        except UNKNOWN as error:
            if isinstance(error, BrokerLost):
                self.over.set()
            self._history.write("info", kind, call, session, n, detail=_told(error))
            return False
        except Exception as error:  # any type: that it came is what is to be judged
            self._history.write("fail", kind, call, session, n, detail=_told(error))
            return False
        self._history.write("ok", kind, call, session, n, value)
        return True

    async def _control(self, op: str, session: str, doing: Awaitable[Any]) -> bool:
        call = f"{self._label}-{next(self._numbers)}-{op}"
        self._history.write("invoke", "control", call, session)
        return await self._outcome("control", (call, _nothing(doing)), session)


def _judged(value: int | bytes) -> int:
    """What is written down for it. Raises ValueError for ballast that came back otherwise than it was sent."""
    if isinstance(value, int):
        return value
    if value != BALLAST:
        raise ValueError("the ballast came back otherwise than it was sent")
    return 0


async def _nothing(doing: Awaitable[Any]) -> int:
    await doing
    return 0


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


async def _child(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def on_stdin() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            loop.remove_reader(sys.stdin.fileno())
            ended.set()

    history = History(options.history, options.label)
    numbers = itertools.count(1)
    loop.add_reader(sys.stdin.fileno(), on_stdin)
    while not ended.is_set():
        async with connect(options.address, connect_timeout_s=CONNECT_S, detached=True) as client:
            service = await get_service(options.service)
            callers = Callers(service, client, history, options.label, numbers, may_end=True)
            callers.start(sessions=options.sessions, plain=options.plain, once=options.once)
            waiting = [asyncio.create_task(event.wait()) for event in (ended, callers.over)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
            if callers.over.is_set():
                history.write("note", "reconnect", detail=str(client))
            await callers.stop(options.settle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True)
    parser.add_argument("--service", required=True, help="its name")
    parser.add_argument("--history", required=True, type=Path, help="a directory")
    parser.add_argument("--label", default="child", help="what its calls' ids begin with")
    parser.add_argument("--sessions", type=int, default=0)
    parser.add_argument("--plain", type=int, default=0)
    parser.add_argument("--once", type=int, default=0)
    parser.add_argument("--settle", type=float, default=30.0, help="seconds for what is unanswered when stdin ends")
    asyncio.run(_child(parser.parse_args()))


if __name__ == "__main__":
    main()
