"""Who speaks to the core in a simulation: one client for all callers, and a worker for each process that the core wants launched.

What is rare (hello, deploy, ready, bye) goes as envelopes, byte by byte as PROTOCOL.md says. What there is for each call goes as
messages, through `Core`, which hands them to the parts that an envelope's messages are handed to: the bytes are spared, and nothing else.
An hour of 100 calls a second is 360,000 calls, and half of what one costs the core is its envelopes.
"""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

from forge_broker.core.actions import Action
from forge_broker.core.broker import Broker
from forge_broker.core.clients import Client
from forge_broker.core.links import Link
from forge_broker.core.workers import Worker
from forge_broker.simulator.model import Drawer, ServiceModel
from forge_contract.framing import Outbox, Payloads, decode
from forge_contract.messages import (
    BROKER_NAME,
    DISPATCH,
    DROPPED,
    OK,
    REPLIES,
    RESULTS,
    RETURNED,
    UNTOUCHED,
    Message,
)

_NONE: Final = Payloads(b"", ())  # arguments and results have no bytes here, so all messages can share it


class Core(Broker):
    """A broker that takes and gives messages of calls without their envelopes."""

    def heard_calls(self, client: Client, message: Message, now: float) -> list[Action]:
        self.intake.calls(client, message, _NONE, now)
        return self._settled(now)

    def heard_replies(self, worker: Worker, message: Message, now: float) -> list[Action]:
        self.replies.take(worker, message, _NONE, now)
        return self._settled(now)

    def taken(self, link: Link) -> tuple[list[Message], Payloads]:
        """What is to go to this peer, instead of `pack`. It counts as sent and acknowledged."""
        link.delivering = False
        link.close_group()
        number = link.channel.next_number()
        outbox = link.outbox
        body = outbox.body
        for message in body:
            kind = message[0]
            if kind != DISPATCH and (kind != RESULTS or message[3] != OK):
                envelope = decode(outbox.seal(BROKER_NAME, link.channel.epoch, link.incarnation, number, 0))
                return envelope.body, envelope.payloads
        link.outbox = Outbox()
        return body, _NONE


class Run(NamedTuple):
    """Calls that a worker begins and ends together: one, a batch, or several that take equally long."""

    ids: list[int]
    attempt: int
    places: int  # of what it runs at once


class ModelWorker:
    """A process with one replica in it. It says what it would say, and asks its owner, the world, to be called when a run is over."""

    def __init__(
        self,
        name: str,
        launch: int,
        model: ServiceModel,
        drawer: Drawer,
        *,
        in_calls: bool,
        limit: int,
        interruptible: bool,
    ) -> None:
        self.name = name
        self.launch = launch
        self.sent = 0
        self.epoch = 0  # of its replica
        self.leaving = False
        self._in_calls = in_calls  # a batch is one run
        self._places = min(limit, model.parallel or limit)
        self._alike = not model.spread
        self._drawer = drawer
        self._interruptible = interruptible
        self._running = 0  # places taken
        self._waiting: deque[Run] = deque()
        self._runs: dict[int, Run] = {}  # that are running, by their first call
        self._dropped: set[int] = set()  # calls that run, and that nobody waits for any more

    @property
    def idle(self) -> bool:
        return not self._runs and not self._waiting

    @property
    def running(self) -> int:
        """Places that are taken."""
        return self._running

    def dispatched(self, message: Message) -> list[tuple[Run, float]]:
        """DISPATCH: what begins now, each with how long it takes."""
        ids, attempts, columns = message[4], message[5], message[7]
        if self._in_calls:
            at = 0
            for size in columns.get("batches") or [1] * len(ids):
                self._wait(ids[at : at + size], attempts, at, 1)
                at += size
        elif len(ids) > 1 and not (self._alike and type(attempts) is int and self._running + len(ids) <= self._places):
            for at, key in enumerate(ids):
                self._wait([key], attempts, at, 1)
        else:
            self._wait(ids, attempts, 0, len(ids))
        return self._begin()

    def _wait(self, ids: list[int], attempts: int | list[int], at: int, places: int) -> None:
        self._waiting.append(Run(ids, attempts if type(attempts) is int else attempts[at], places))  # type: ignore[index]

    def _begin(self) -> list[tuple[Run, float]]:
        waiting = self._waiting
        begun = []
        while waiting and not self.leaving and self._running + waiting[0].places <= self._places:
            run = waiting.popleft()
            self._running += run.places
            self._runs[run.ids[0]] = run
            begun.append((run, self._drawer.batch_s(len(run.ids)) if self._in_calls else self._drawer.call_s()))
        return begun

    def ended(self, run: Run) -> tuple[list[Message], list[tuple[Run, float]]]:
        """A run is over: what the worker says, and what begins now."""
        dropped = self._dropped
        del self._runs[run.ids[0]]
        if not dropped:
            self._running -= run.places
            return [self._reply(run.ids, run.attempt, OK)], self._begin()
        gone = [key for key in run.ids if key in dropped]
        kept = [key for key in run.ids if key not in dropped]
        dropped.difference_update(gone)
        said = [self._reply(kept, run.attempt, OK)] if kept else []
        if self._interruptible:
            self._running -= run.places - len(gone)  # their places were free when they were dropped
        else:
            said += [self._reply(gone, run.attempt, DROPPED)] if gone else []
            self._running -= run.places
        return said, self._begin()

    def drops(self, message: Message) -> tuple[list[Message], list[tuple[Run, float]]]:
        """DROP: what is said at once, and what begins in its place."""
        said: list[Message] = []
        unwanted = set(message[1])
        for run in list(self._waiting):
            gone = [key for key in run.ids if key in unwanted]
            if not gone:
                continue
            unwanted.difference_update(gone)
            said.append(self._reply(gone, run.attempt, DROPPED))
            place = self._waiting.index(run)
            left = [key for key in run.ids if key not in gone]
            if left:
                self._waiting[place] = Run(left, run.attempt, run.places if self._in_calls else len(left))
            else:
                del self._waiting[place]
        for run in self._runs.values():
            gone = [key for key in run.ids if key in unwanted and key not in self._dropped]
            self._dropped.update(gone)
            if gone and self._interruptible:
                said.append(self._reply(gone, run.attempt, DROPPED))
                self._running -= len(gone)
        return said, self._begin()

    def stops(self) -> list[Message]:
        """STOP: nothing new begins; what has not begun is given back."""
        self.leaving = True
        return self._give_back(UNTOUCHED)

    def recalls(self) -> list[Message]:
        """RECALL: what has not begun is given back, for others to run."""
        return self._give_back(RETURNED)

    def _give_back(self, status: int) -> list[Message]:
        back = [self._reply(run.ids, run.attempt, status) for run in self._waiting]
        self._waiting.clear()
        return back

    def _reply(self, ids: list[int], attempt: int, status: int) -> Message:
        return [REPLIES, self.epoch, ids, attempt, status, [0] * len(ids)]
