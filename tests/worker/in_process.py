"""A WorkerLink and an ActorHost in the test's own process and loop, without a socket: what one turn of a worker does is one call.

`say` and `dispatch` bring what a broker says; `turn` carries it out as `runtime` does, and takes what leaves with the turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from forge_contract.framing import Outbox, Payload, decode
from forge_contract.messages import (
    ASSIGN,
    BROKER_NAME,
    DISPATCH,
    DROP,
    RECALL,
    REPLIES,
    WELCOME,
    request_id,
    sequence_of,
    spread,
)
from forge_contract.payload import encode_call
from forge_worker.actor_host import ActorHost
from forge_worker.link import Drop, Recall, Run, WorkerLink
from tests.worker.fake_broker import assignment_fields, read_reply

BOUND_S = 10.0


class InProcess:
    """`instance` with the endpoints named, or `(name, options)`. `replied` holds all replies so far, by sequence."""

    def __init__(self, instance: Any, *endpoints: Any, **fields: Any) -> None:
        self.link = WorkerLink("w-1", 0.0, identity={})
        self.link.flush(0.0)
        self._number = 0
        self._outbox = Outbox()
        self.replied: dict[int, tuple[int, Any]] = {}
        self.envelopes = 0
        self.costs: list[int] = []  # of each envelope's replies
        self.broken: list[Payload] = []
        self._changed = asyncio.Event()
        self._outbox.body.append([WELCOME, {"trusted": True}])
        self.link.receive(self._outbox.seal(BROKER_NAME, 1, 77, 0, 0), 0.0)
        self.say([ASSIGN, {**assignment_fields({"ref": "m:Sample"}, endpoints), **fields}, 0])
        self.link.take()
        assert self.link.assignment is not None
        self.host = ActorHost(
            self.link.assignment,
            instance,
            [getattr(instance, one.name) for one in self.link.assignment.endpoints],
            self.link,
            trusted=True,
            on_reply=self._soon,
            on_broken=self.broken.append,
        )
        self._due = False

    def say(self, *body: list[Any], payloads: tuple[Payload, ...] = ()) -> None:
        self._number += 1
        self._outbox.body.extend(body)
        for payload in payloads:
            self._outbox.attach(payload)
        self.link.receive(self._outbox.seal(BROKER_NAME, 1, 77, self._number, 0), 0.0)

    def dispatch(self, method: int, *calls: tuple[int, tuple[Any, ...]], **columns: Any) -> None:
        """`(sequence, args)`, all in one message; `kwargs=` and `raw=` replace the arguments of one call each."""
        keywords: dict[int, dict[str, Any]] = columns.pop("kwargs", {})
        raw: dict[int, bytes] = columns.pop("raw", {})
        packed: list[Payload] = [
            raw.get(sequence) or encode_call(args, keywords.get(sequence, {}), trusted=True, where="test")
            for sequence, args in calls
        ]
        sizes = [len(one) if isinstance(one, bytes) else -len(one) for one in packed]
        ids = [request_id(1, sequence) for sequence, _ in calls]
        self.say([DISPATCH, 1, method, True, ids, 1, sizes, columns], payloads=tuple(packed))

    def drop(self, *sequences: int) -> None:
        self.say([DROP, [request_id(1, sequence) for sequence in sequences]])

    def recall(self) -> None:
        self.say([RECALL])

    async def turn(
        self, *, halfway: Callable[[], object] | None = None, then: Callable[[], object] | None = None
    ) -> None:
        """In a callback of the loop, as a worker's turns are. `halfway`: between taking in and beginning; `then`: what
        comes in a turn right after it."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def run() -> None:
            try:
                self._turn(halfway)
                if then is not None:
                    then()
                    self._turn()
            except Exception as error:
                ended.set_exception(error)
            else:
                ended.set_result(None)

        asyncio.get_running_loop().call_soon(run)
        await ended

    def _turn(self, halfway: Callable[[], object] | None = None) -> None:
        for instruction in self.link.take():
            if isinstance(instruction, Run):
                self.host.run(instruction)
            elif isinstance(instruction, Drop):
                self.host.drop(instruction.ids)
            elif isinstance(instruction, Recall):
                self.host.give_back()
        if halfway is not None:
            halfway()
        self.host.serve()
        self._flush()

    async def replies(self, count: int) -> dict[int, tuple[int, Any]]:
        """All so far, once there are so many."""
        await self.until(lambda: len(self.replied) >= count)
        return self.replied

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(BOUND_S):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    def _soon(self) -> None:
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._due = False
        for frames in self.link.flush(0.0):
            envelope = decode(frames)
            self.envelopes += 1
            for message in envelope.body:
                assert message[0] == REPLIES
                _, _, ids, _, statuses, sizes, *cost = message
                self.costs += cost or [0]
                payloads = envelope.payloads.take_all(sizes)
                for request, status, payload in zip(ids, spread(statuses, len(ids)), payloads, strict=True):
                    assert sequence_of(request) not in self.replied, "a second reply"
                    self.replied[sequence_of(request)] = status, read_reply(status, payload)
        self._changed.set()
