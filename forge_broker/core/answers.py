"""The one reply of every request (PROTOCOL.md §7): out of the books, into its client's outbox.

`dispatch` and `sessions` decide what the reply is; here it is made sure that there is exactly one, and that the parts of a fan-out become
one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgpack

from forge_broker.core.clients import Client
from forge_broker.core.requests import Gather, Request
from forge_broker.core.services import Endpoint, Replay
from forge_broker.core.state import State
from forge_contract.errors import (
    CallCancelled,
    CallTimeout,
    ForgeError,
    NoHealthyReplicas,
    OutcomeUnknown,
    Overloaded,
    PoisonedRequest,
    ReplicaLost,
)
from forge_contract.framing import Payload
from forge_contract.messages import FAILED, OK, PARTS, RAISED, SEQUENCE_MASK, sequence_of

Part = tuple[int, Payload, bool]
"""Status, payload, trusted."""

ANSWERED: Final = {OK: "ok", RAISED: "raised", FAILED: "failed"}
"""How a call ended that a replica answered, as its endpoint counts it."""

_OUTCOMES_BY_ERROR: Final[dict[type[ForgeError], str]] = {
    CallCancelled: "cancelled",
    CallTimeout: "timed_out",
    NoHealthyReplicas: "no_replicas",
    OutcomeUnknown: "lost",
    Overloaded: "overloaded",
    PoisonedRequest: "poisoned",
    ReplicaLost: "lost",
}


def outcome_of(error: ForgeError) -> str:
    """How a call ended that the broker answered itself."""
    return _OUTCOMES_BY_ERROR.get(type(error), "refused")


class Run:
    """Ordinary replies to calls of one client, gathered by `Replies` so that the books are kept once for all of them. Who adds
    one takes the call out of `calls` itself."""

    __slots__ = ("bytes", "calls", "client", "payloads", "sequences", "statuses")

    def __init__(self, client: Client) -> None:
        self.client = client
        self.calls = client.calls
        self.bytes = 0  # arguments of the calls that are answered
        self.sequences: list[int] = []
        self.statuses: list[int] = []
        self.payloads: list[Payload] = []


class Answers:
    def __init__(self, state: State) -> None:
        self._state = state

    def reject(self, client: Client, sequence: int, error: ForgeError, endpoint: Endpoint | None = None) -> None:
        """Answered before it was accepted: it was never in our books. `endpoint`: whose call it would have been, where there is one."""
        if endpoint is not None:
            endpoint.stats.outcomes[outcome_of(error)] += 1
        client.add_results([sequence], [FAILED], [packed(error)], True)
        self._state.deliver(client)

    def overloaded(self, endpoint: Endpoint) -> Overloaded:
        """What a call of a full queue is told."""
        self._state.counters["overloaded"] += 1
        limit = endpoint.service.config.max_queued_requests
        return Overloaded(what=endpoint.full_name, limit_name="max_queued_requests", limit=limit, retry_after_s=0.5)

    def answer(
        self, call: Request | Gather, status: int, payload: Payload, trusted: bool, outcome: str | None = None
    ) -> None:
        """The one reply of this call; of a part of a fan-out, that part. `outcome`: what it counts as, where the status does not say."""
        if type(call) is Request and call.gather is not None:
            idx = next(idx for idx, child in call.gather.children.items() if child is call)
            self.gathered(call.gather, idx, {(idx, 0): (status, payload, trusted)})
            return
        client: Client = call.client
        self.settle(call, client, outcome or ANSWERED[status])
        client.add_results([call.id & SEQUENCE_MASK], [status], [payload], trusted)
        if not client.delivering:
            self._state.deliver(client)

    def answer_run(self, run: Run, trusted: bool) -> None:
        """The one reply of each of these."""
        client = run.client
        client.answered += len(run.sequences)
        client.held_bytes -= run.bytes
        self._state.held_bytes -= run.bytes
        client.add_results(run.sequences, run.statuses, run.payloads, trusted)
        self._state.deliver(client)

    def fail(self, call: Request | Gather, error: ForgeError) -> None:
        """Answer with one of our own errors."""
        self.answer(call, FAILED, packed(error), True, outcome_of(error))

    def gathered(self, gather: Gather, idx: int, points: dict[tuple[int, int], Part]) -> None:
        gather.parts.update(points)
        del gather.children[idx]
        if gather.children:
            return
        endpoint: Endpoint = gather.endpoint
        if endpoint.replay_last and all(status == OK for status, _, _ in gather.parts.values()):
            endpoint.service.replays.pop(endpoint.method, None)
            endpoint.service.replays[endpoint.method] = Replay(gather.payload, gather.client.trusted)
        self.answer_parts(gather, gather.parts)

    def answer_parts(self, call: Request | Gather, parts: dict[tuple[int, int], Part]) -> None:
        client: Client = call.client
        points = sorted(parts)
        found = [parts[point] for point in points]
        self.settle(call, client, _worst(status for status, _, _ in found))
        client.post(
            [
                PARTS,
                all(trusted for _, _, trusted in found),
                sequence_of(call.id),
                [list(point) for point in points],
                [status for status, _, _ in found],
                [client.outbox.attach(payload) for _, payload, _ in found],
            ]
        )
        self._state.deliver(client)

    def settle(self, call: Request | Gather, client: Client, outcome: str) -> None:
        """Out of the books: it is answered, or nobody waits for it any more."""
        call.endpoint.stats.outcomes[outcome] += 1
        del client.calls[call.id]
        client.answered += 1
        client.held_bytes -= call.size
        self._state.held_bytes -= call.size
        if type(call) is Gather and call.endpoint.replay_last:
            call.endpoint.service.open_replays -= 1
            self._state.replayed.add(call.endpoint.service)


def _worst(statuses: Iterable[int]) -> str:
    """A call of several parts is ok when all of them are."""
    return ANSWERED[max(statuses, default=OK)]


def packed(error: ForgeError) -> bytes:
    packed: bytes = msgpack.packb(error.to_wire())
    return packed
