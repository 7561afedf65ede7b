"""Calls as they come from clients: checked, entered in the books, and put where they wait or handed to `dispatch`.

Whole columns at a time where there can be many: what may be held as one is for `slices` to accept, the rest is accepted here, each by
itself (C2). The queues are pumped once per message, after it was taken in whole (B1).
"""

from __future__ import annotations

from typing import Any, Final

from forge_broker.core.answers import Answers
from forge_broker.core.batcher import Batcher
from forge_broker.core.claims import Claim
from forge_broker.core.clients import Client
from forge_broker.core.columns import batching, fill, read_calls, read_fanout
from forge_broker.core.deadlines import Kind
from forge_broker.core.dispatch import Dispatch
from forge_broker.core.queues import Queue
from forge_broker.core.replicas import LEAVING
from forge_broker.core.replies import Replies
from forge_broker.core.requests import Gather, Request
from forge_broker.core.returns import Returns
from forge_broker.core.services import Endpoint, Service
from forge_broker.core.slices import Slices
from forge_broker.core.state import State
from forge_contract.errors import (
    BadCall,
    ForgeError,
    OutcomeUnknown,
    Overloaded,
    SessionLost,
    UnknownService,
    UnknownSession,
)
from forge_contract.framing import Payload, Payloads, weigh
from forge_contract.messages import DROPPED, RETURNED, UNTOUCHED, request_id, sequence_of

PRUNE_FROM: Final = 10_000  # deadlines; below it, looking for outdated ones is not worth it


class Intake:
    def __init__(
        self, state: State, answers: Answers, returns: Returns, dispatch: Dispatch, slices: Slices, replies: Replies
    ) -> None:
        self._state = state
        self._answers = answers
        self._returns = returns
        self._dispatch = dispatch
        self._slices = slices
        self._replies = replies
        self._prune_at = PRUNE_FROM

    def came_back(self, client: Client) -> None:
        """Under its old id: what still runs of it from before is in the ledger, and no new call may stand for it there."""
        client.last_sequence = self._state.ledger.last_sequence(client.id)

    def calls(self, client: Client, message: list[Any], payloads: Payloads, now: float) -> None:
        """CALLS: accept each item, then see who has room."""
        endpoint_id, sequences, sizes, columns = read_calls(message)
        state = self._state
        endpoint = state.endpoints.get(endpoint_id)
        error = self._refusal(client, endpoint)
        if endpoint is None or error is not None:
            payloads.take_all(sizes)
            for sequence in sequences:
                unknown = UnknownService(name=f"of endpoint {endpoint_id}", known=[])
                self._answers.reject(client, sequence, error or unknown, endpoint)
            return
        if not sequences:
            return
        new = min(sequences) > client.last_sequence and len(set(sequences)) == len(sequences)
        client.last_sequence = max(client.last_sequence, *sequences)
        if new and min(sizes) >= 0 and self._slices.may_hold(endpoint, columns):
            packed = payloads.take_packed(sizes)
            at = self._slices.accept(client, endpoint, sequences, sizes, packed, columns, now)
            if at == len(sequences):
                return
            packed = packed[sum(sizes[:at]) :]
            sequences, sizes, payloads = sequences[at:], sizes[at:], Payloads(packed, ())
        self._one_by_one(client, endpoint, sequences, payloads.take_all(sizes), columns, now)

    def _one_by_one(
        self,
        client: Client,
        endpoint: Endpoint,
        sequences: list[int],
        taken: list[Payload],
        columns: dict[str, Any],
        now: float,
    ) -> None:
        """Accept these, each a Request."""
        state = self._state
        base = request_id(client.id, 0)
        calls = client.calls
        timeout = columns.get("timeout")
        repeated = "again" in columns
        accepted = len(calls)
        held = 0
        stateless: list[Request] = []
        claimed: list[tuple[Request, Claim]] = []
        for at, (sequence, payload) in enumerate(zip(sequences, taken, strict=True)):
            size = len(payload) if type(payload) is bytes else weigh(payload)
            key = base + sequence
            if key in calls:
                state.counters["reused_ids"] += 1
                continue
            request = Request(key, client, endpoint, payload, size, now)
            if columns:
                fill(request, columns, at)
                if endpoint.batcher is not None:
                    request.batching = batching(columns, at)
                if request.rank is not None and not 0 <= request.rank < endpoint.service.config.world:
                    why = f"rank {request.rank} of a mesh of {endpoint.service.config.world}"
                    bad = BadCall(endpoint=endpoint.full_name, why=why)
                    self._answers.reject(client, sequence, bad, endpoint)
                    continue
                if timeout is not None:
                    self._set_deadline(request, timeout[at] if isinstance(timeout, list) else timeout, now)
            if repeated and (claim := state.claims.pop(key, None)) is not None:
                claimed.append((request, claim))
            elif repeated and endpoint.at_most_once:
                why = "the broker died, and nobody says that it ran"
                unknown = OutcomeUnknown(endpoint=endpoint.full_name, why=why)
                self._answers.reject(client, sequence, unknown, endpoint)
                continue
            elif request.session is None:
                stateless.append(request)
            elif not self._push_session(request, now):
                continue
            calls[key] = request
            held += size
        client.accepted += len(calls) - accepted
        client.held_bytes += held
        state.held_bytes += held
        for request, claim in claimed:
            self._reclaim(request, claim, now)
        service = endpoint.service
        # Else a later item of this envelope may have to come first, or with it.
        in_order = "priority" not in columns and endpoint.batcher is None
        if stateless and in_order and not service.ready and not endpoint.queue.length:
            # Nobody waits: what `pump` would do, at once.
            del stateless[: self._dispatch.route_all(stateless, endpoint, now)]
        self._enqueue(stateless, endpoint, now)
        self._dispatch.pump(service, now)

    def _reclaim(self, request: Request, claim: Claim, now: float) -> None:
        """A call that was sent to our predecessor, and that a replica runs or has ended (F10): it is not run again; or gave back."""
        replica = claim.replica
        wanted = [request.rank] if request.rank is not None else list(range(len(replica.ranks)))
        request.attempt = claim.attempt
        request.started_at = now
        if len(replica.ranks) > 1:
            request.parts = {rank: part for rank, part in claim.parts.items() if rank in wanted}
        known = all(rank in claim.parts for rank in wanted)
        ends = {claim.parts[rank][0] for rank in wanted} if known else set()
        if UNTOUCHED in ends or RETURNED in ends:
            if UNTOUCHED in ends and replica.pool is not None:
                replica.pool.close(replica, LEAVING)  # as `Replies` does: its worker is on its way out
            why = f"{replica.name} gave it back"
            self._returns.take_back(replica, [request], why, now, lost=False, recalled=UNTOUCHED not in ends)
        elif known:
            status, payload, trusted = claim.parts[wanted[0]]
            if request.parts is not None or status == DROPPED:
                self._replies.ended(request, replica, status, payload, trusted)
            else:
                self._answers.answer(request, status, payload, trusted)
            for worker in claim.told.values():  # it keeps this until the client has it; or we keep what it has left
                worker.unsettled.append((worker.channel.received, request, 0))
        elif claim.reserved and all(rank in claim.parts or rank in claim.running for rank in wanted):
            request.holder = replica
            request.batch = claim.batch
            self._state.ledger.held[replica.key][request.id] = request
            claim.reserved = False
            self._dispatch.watch(replica, request.endpoint, now)
        else:
            # It may have run in part; the replica is gone, and with it what the others knew.
            request.holder = replica
            self._returns.take_back(replica, [request], "it did not come back to the broker", now, lost=True)
        if claim.reserved:
            claim.give_up()

    def _enqueue(self, requests: list[Request], endpoint: Endpoint, now: float) -> None:
        """Into the endpoint's queue, or its batchers' lanes, as many as its limit allows."""
        service, batcher = endpoint.service, endpoint.batcher
        limit = service.config.max_queued_requests
        for request in requests:
            queue = endpoint.queue if batcher is None else batcher.lane_of(request)
            waiting: Queue | Batcher = queue if batcher is None else batcher
            if waiting.length >= limit:
                # This envelope's calls have not been pumped yet: they may leave room.
                self._dispatch.pump(service, now)
                if batcher is not None:
                    queue = batcher.lane_of(request)  # it may have been given up, empty
            if waiting.length < limit:
                queue.push(request)
                service.wake(queue)
            else:
                self._answers.fail(request, self._answers.overloaded(endpoint))

    def fanout(self, client: Client, message: list[Any], payloads: Payloads, now: float) -> None:
        """FANOUT: the call goes to every replica that is healthy now, once, and nowhere else (A5)."""
        endpoint_id, (sequence,), (size,), columns = read_fanout(message)
        payload = payloads.take(size)
        state = self._state
        endpoint = state.endpoints.get(endpoint_id)
        error = self._refusal(client, endpoint)
        key = request_id(client.id, sequence)
        if endpoint is None or error is not None:
            unknown = UnknownService(name=f"of endpoint {endpoint_id}", known=[])
            self._answers.reject(client, sequence, error or unknown, endpoint)
            return
        if key in client.calls:
            state.counters["reused_ids"] += 1
            return
        service = endpoint.service
        if any(replica.parked.length >= service.config.max_queued_requests for replica in service.pool):
            self._answers.reject(client, sequence, self._answers.overloaded(endpoint), endpoint)
            return
        size = len(payload) if type(payload) is bytes else weigh(payload)
        gather = Gather(key, client, endpoint, payload, size, now)
        service.open_replays += endpoint.replay_last
        client.calls[key] = gather
        client.last_sequence = max(client.last_sequence, sequence)
        client.accepted += 1
        client.held_bytes += size
        state.held_bytes += size
        timeout = columns.get("timeout")
        self._set_deadline(gather, timeout[0] if isinstance(timeout, list) else timeout, now)
        for replica in service.pool:
            child = Request(key, client, endpoint, payload, 0, now)
            child.gather = gather
            child.deadline = gather.deadline
            gather.children[replica.idx] = child
            replica.parked.push(child)
            service.wake(replica.parked)
        if not gather.children:
            self._answers.fail(gather, self._dispatch.no_replicas(service, 0.0))
            return
        self._dispatch.pump(service, now)

    # Acceptance.

    def _refusal(self, client: Client, endpoint: Endpoint | None) -> ForgeError | None:
        """Why no call of this client to this endpoint can be accepted now, if none can."""
        config = self._state.config
        if endpoint is None:
            return None
        if endpoint.service.stopping is not None:
            error: ForgeError = endpoint.service.stopping
            return error
        if client.channel.kept_bytes > config.link_bytes:
            return Overloaded(
                what=f"the link of {client.name}", limit_name="link_bytes", limit=config.link_bytes, retry_after_s=0.5
            )
        if self._state.held_bytes > config.max_queue_bytes:
            return Overloaded(
                what="the broker", limit_name="max_queue_bytes", limit=config.max_queue_bytes, retry_after_s=0.5
            )
        return None

    def _set_deadline(self, call: Request | Gather, timeout_s: float | None, now: float) -> None:
        if timeout_s is None:
            return
        call.deadline = now + timeout_s
        deadlines = self._state.deadlines
        deadlines.add(call.deadline, Kind.CALL, call.id)
        if len(deadlines) >= self._prune_at:
            # Most calls are answered long before their time is up: 50,000 calls/s with a timeout of a minute would leave
            # three million entries behind.
            deadlines.prune(self._is_awaited)
            self._prune_at = 2 * len(deadlines) + PRUNE_FROM

    def _is_awaited(self, kind: Kind, key: Any) -> bool:
        if kind is not Kind.CALL:
            return True
        client = self._state.clients.get(key >> 40)
        return client is not None and key in client.calls

    def _push_session(self, request: Request, now: float) -> bool:
        """Into the queue of its session's replica, or with those that have none yet. False: rejected."""
        service: Service = request.endpoint.service
        session = service.sessions.get(request.session or "")
        sequence = sequence_of(request.id)
        if session is None:
            unknown = UnknownSession(service=service.name, session=request.session)
            self._answers.reject(request.client, sequence, unknown, request.endpoint)
            return False
        if session.lost:
            error = SessionLost(session=session.id, service=service.name, why=session.lost)
            self._answers.reject(request.client, sequence, error, request.endpoint)
            return False
        session.used_at = now
        idx = service.pins.get(session.id)
        # While an older call of the session waits for a replica, newer ones queue up behind it, or they would overtake it.
        queue = service.unpinned if idx is None or session.unpinned else service.replicas[idx].parked
        if session.suspects:
            queue = service.suspects
        if queue.length >= service.config.max_queued_requests:
            overloaded = self._answers.overloaded(request.endpoint)
            self._answers.reject(request.client, sequence, overloaded, request.endpoint)
            return False
        session.unpinned += queue is service.unpinned
        session.suspects += queue is service.suspects
        queue.push(request)
        service.wake(queue)
        return True
