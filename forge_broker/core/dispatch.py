"""The life of a call: accepted, queued, routed, dispatched, answered. This is the hot path, and all decisions on it.

`broker` hands in what clients and workers say about calls; `lifecycle` tells when a replica has room for the first time
(`pump`) and when it is lost (`release`). Routers decide where; the ledger remembers; we carry over.

Every function takes whole columns where there can be many (C2), and the queues are pumped once per envelope, after it was
taken in whole.
"""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from typing import Any

from forge_broker.core.answers import Answers, Run, packed
from forge_broker.core.clients import Client
from forge_broker.core.columns import fill, read_calls, read_replies
from forge_broker.core.deadlines import Kind
from forge_broker.core.queues import Queue
from forge_broker.core.replicas import Replica
from forge_broker.core.requests import Gather, Request
from forge_broker.core.services import Endpoint, Service, Session
from forge_broker.core.state import State
from forge_broker.core.workers import Worker
from forge_contract.errors import (
    BadCall,
    CallCancelled,
    ForgeError,
    NoHealthyReplicas,
    OutcomeUnknown,
    Overloaded,
    ProtocolError,
    ReplicaLost,
    RouterError,
    SessionClosed,
    UnknownService,
    UnknownSession,
)
from forge_contract.framing import Payload, Payloads, weigh
from forge_contract.messages import DROPPED, FAILED, OK, SEQUENCE_MASK, UNTOUCHED, request_id, sequence_of, show_request

METRICS_EVERY_S = 1.0
PRUNE_FROM = 10_000  # deadlines; below it, looking for outdated ones is not worth it


class Dispatch:
    def __init__(self, state: State, answers: Answers) -> None:
        self._state = state
        self._answers = answers
        self._prune_at = PRUNE_FROM

    # From clients.

    def calls(self, client: Client, message: list[Any], payloads: Payloads, now: float) -> None:
        """CALLS: accept each item, then see who has room."""
        endpoint_id, sequences, sizes, columns = read_calls(message)
        taken = payloads.take_all(sizes)
        state = self._state
        endpoint = state.endpoints.get(endpoint_id)
        error = self._refusal(client, endpoint)
        if endpoint is None or error is not None:
            for sequence in sequences:
                self._answers.reject(
                    client, sequence, error or UnknownService(name=f"of endpoint {endpoint_id}", known=[])
                )
            return
        base = request_id(client.id, 0)
        calls = client.calls
        queue = endpoint.queue
        service = endpoint.service
        timeout = columns.get("timeout")
        in_order = "priority" not in columns  # else a later item of this envelope may have to come first
        accepted = len(calls)
        held = 0
        stateless: list[Request] = []
        for at, (sequence, payload) in enumerate(zip(sequences, taken, strict=True)):
            size = len(payload) if type(payload) is bytes else weigh(payload)
            key = base + sequence
            if key in calls:
                state.counters["reused_ids"] += 1
                continue
            request = Request(key, client, endpoint, payload, size, now)
            if columns:
                fill(request, columns, at)
                if request.rank is not None and not 0 <= request.rank < endpoint.service.config.world:
                    why = f"rank {request.rank} of a mesh of {endpoint.service.config.world}"
                    self._answers.reject(client, sequence, BadCall(endpoint=endpoint.full_name, why=why))
                    continue
                if timeout is not None:
                    self._set_deadline(request, timeout[at] if isinstance(timeout, list) else timeout, now)
            if request.session is None:
                stateless.append(request)
            elif not self._push_session(request, now):
                continue
            calls[key] = request
            held += size
        client.accepted += len(calls) - accepted
        client.held_bytes += held
        state.held_bytes += held
        if stateless:
            routed = 0
            if in_order and not service.ready and not queue.length:
                routed = self._route_all(stateless, endpoint, now)  # nobody waits: what `pump` would do, at once
            self._enqueue(stateless[routed:], endpoint, now)
        self.pump(service, now)

    def _enqueue(self, requests: list[Request], endpoint: Endpoint, now: float) -> None:
        """Into the endpoint's queue, as many as its limit allows."""
        queue = endpoint.queue
        limit = endpoint.service.config.max_queued_requests
        for request in requests:
            if queue.length < limit or self._make_room(endpoint, now):
                queue.push(request)
            else:
                self._answers.fail(request, self._overloaded(endpoint))
        self.wake(endpoint.service, queue)

    def fanout(self, client: Client, message: list[Any], payloads: Payloads, now: float) -> None:
        """FANOUT: the call goes to every replica that is healthy now, once, and nowhere else (A5)."""
        endpoint_id, (sequence,), (size,), columns = read_calls(
            [message[0], message[1], [message[2]], [message[3]], message[4]] if len(message) == 5 else message
        )
        payload = payloads.take(size)
        state = self._state
        endpoint = state.endpoints.get(endpoint_id)
        error = self._refusal(client, endpoint)
        key = request_id(client.id, sequence)
        if endpoint is None or error is not None:
            self._answers.reject(client, sequence, error or UnknownService(name=f"of endpoint {endpoint_id}", known=[]))
            return
        if key in client.calls:
            state.counters["reused_ids"] += 1
            return
        service = endpoint.service
        if any(replica.parked.length >= service.config.max_queued_requests for replica in service.pool):
            self._answers.reject(client, sequence, self._overloaded(endpoint))
            return
        size = len(payload) if type(payload) is bytes else weigh(payload)
        gather = Gather(key, client, endpoint, size, now)
        client.calls[key] = gather
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
            self.wake(service, replica.parked)
        if not gather.children:
            self._answers.fail(gather, self._no_replicas(service, 0.0))
            return
        self.pump(service, now)

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

    def _overloaded(self, endpoint: Endpoint) -> Overloaded:
        limit = endpoint.service.config.max_queued_requests
        self._state.counters["overloaded"] += 1
        return Overloaded(what=endpoint.full_name, limit_name="max_queued_requests", limit=limit, retry_after_s=0.5)

    def _make_room(self, endpoint: Endpoint, now: float) -> bool:
        """The queue is at its limit, but this envelope's calls have not been pumped yet: they may leave room."""
        self.wake(endpoint.service, endpoint.queue)
        self.pump(endpoint.service, now)
        return endpoint.queue.length < endpoint.service.config.max_queued_requests

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
            self._answers.reject(
                request.client, sequence, UnknownSession(service=service.name, session=request.session)
            )
            return False
        session.used_at = now
        idx = service.pins.get(session.id)
        # While an older call of the session waits for a replica, newer ones queue up behind it, or they would overtake it.
        queue = service.unpinned if idx is None or session.unpinned else service.replicas[idx].parked
        if queue.length >= service.config.max_queued_requests:
            self._answers.reject(request.client, sequence, self._overloaded(request.endpoint))
            return False
        if queue is service.unpinned:
            session.unpinned += 1
        queue.push(request)
        self.wake(service, queue)
        return True

    # Routing.

    def wake(self, service: Service, queue: Queue) -> None:
        """Put a queue into the rotation of the pump, if it has anything."""
        if not queue.waiting and queue.length:
            queue.waiting = True
            service.ready.append(queue)

    def pump(self, service: Service, now: float) -> None:
        """Dispatch as long as somebody waits and somebody has room. The queues take turns, one call each (R1).

        Called at the end of every envelope that brought calls or freed room, and when a replica becomes healthy. The head of a queue is
        1. of a replica's own queue: dispatched if that replica has room, else the queue leaves the rotation until it has;
        2. of a session without a replica: its replica is chosen and pinned, and it joins that replica's own queue;
        3. any other: the endpoint's router chooses; a full choice parks the call in that replica's queue.
        """
        pool = service.pool
        ready = service.ready
        unpinned = service.unpinned
        while ready and pool.roomy:
            queue = ready[0]
            owner = queue.replica
            if not queue.length or (owner is not None and not owner.has_room):
                queue.waiting = False
                ready.popleft()
                continue
            alone = len(ready) == 1
            if owner is not None:
                self._dispatch_mixed(queue.take(owner.limit - owner.active if alone else 1), owner, now)
            elif queue is unpinned:
                request = queue.pop()
                replica = self._replica_of_session(service, request, now)
                if replica is not None:
                    # Even with room: an older call of its session may be parked there, and must not be overtaken.
                    replica.parked.push(request)
                    self.wake(service, replica.parked)
            elif alone and queue.deal is not None:
                for replica, count in queue.deal(pool, queue.length):
                    self._dispatch_mixed(queue.take(count), replica, now)
            else:
                self._route(queue.pop(), service, now)
            if len(ready) > 1:
                ready.rotate(-1)
        if not pool.members:
            self._await_replica(service, now)

    def _route_all(self, requests: list[Request], endpoint: Endpoint, now: float) -> int:
        """Stateless calls of one endpoint, from the first on while somebody has room: how many found a replica."""
        service: Service = endpoint.service
        pool = service.pool
        routed = 0
        if endpoint.queue.deal is not None and len(requests) > 1:
            for replica, count in endpoint.queue.deal(pool, len(requests)):
                self._dispatch(requests[routed : routed + count], replica, now)
                routed += count
            return routed
        for request in requests:
            if not pool.roomy:
                break
            self._route(request, service, now)
            routed += 1
        return routed

    def _route(self, request: Request, service: Service, now: float) -> None:
        """A stateless call, while somebody has room: where the router says."""
        replica = self._choose(request.endpoint.router, request, request.hints, now)
        if replica is None:
            return  # the router failed it
        if service.pool.roomy >> replica.idx & 1:
            self._dispatch([request], replica, now)
        elif replica.parked.length >= service.config.max_queued_requests:
            self._answers.fail(request, self._overloaded(request.endpoint))
        else:
            replica.parked.push(request)

    def _replica_of_session(self, service: Service, request: Request, now: float) -> Replica | None:
        session: Session = service.sessions[request.session or ""]
        session.unpinned -= 1
        idx = service.pins.get(session.id)
        if idx is not None:
            return service.replicas[idx]
        hints = {**session.hints, **request.hints} if request.hints else session.hints
        replica = self._choose(request.endpoint.pins_with, request, hints, now)
        if replica is not None:
            service.pin(session.id, replica)
        return replica

    def _choose(self, router: Any, request: Request, hints: dict[str, Any] | None, now: float) -> Replica | None:
        """Ask the router. Whatever it does wrong fails this call and nothing else (R3)."""
        endpoint: Endpoint = request.endpoint
        service = endpoint.service
        pool = service.pool
        try:
            if endpoint.takes_hints:
                chosen = router.get_replica(pool, request.session, service.pins, hints=hints)
            else:
                chosen = router.get_replica(pool, request.session, service.pins)
        except Exception as error:
            why = f"raised {type(error).__name__}: {error}"
        else:
            if type(chosen) is Replica and chosen.pool is pool:
                return chosen
            why = f"returned {chosen!r:.100}, which is none of the healthy replicas"
        self._state.story.tell(now, show_request(request.id), f"router {router!r} {why}")
        self._answers.fail(request, RouterError(router=repr(router), endpoint=endpoint.full_name, why=why))
        return None

    def _dispatch_mixed(self, requests: list[Request], replica: Replica, now: float) -> None:
        """Those of a queue that endpoints share, in order."""
        for _, some in groupby(requests, attrgetter("endpoint")):
            self._dispatch(list(some), replica, now)

    def _dispatch(self, requests: list[Request], replica: Replica, now: float) -> None:
        """Calls of one endpoint to a replica with room for them; the books are kept once for all."""
        state = self._state
        held = state.ledger.held[replica.key]
        keys = [request.id for request in requests]
        if not held.keys().isdisjoint(keys):
            requests = [request for request in requests if not self._reuses(request, held)]
            keys = [request.id for request in requests]
        for request in requests:
            request.attempt += 1
            request.started_at = now
            request.holder = replica
        held.update(zip(keys, requests, strict=True))
        replica.pool.took(replica, len(keys))  # type: ignore[union-attr]  # it has room, so it is in a pool
        if len(replica.ranks) == 1:
            self._send(requests, replica.ranks[0], now)
            return
        for request in requests:
            request.parts = {}
            for worker in replica.ranks_for(request.rank):
                self._send([request], worker, now)

    def _send(self, requests: list[Request], worker: Worker, now: float) -> None:
        if requests:
            worker.add_dispatch(requests, requests[0].endpoint, now)
            self._state.deliver(worker)

    def _reuses(self, request: Request, held: dict[int, Request]) -> bool:
        """An id used again while the replica still ends the call that had it: fencing could not tell the two apart."""
        if request.id not in held:
            return False
        why = f"id {show_request(request.id)} is still in use by a call that was given up"
        self._answers.fail(request, ProtocolError(why))
        return True

    # From workers.

    def replies(self, worker: Worker, message: list[Any], payloads: Payloads, now: float) -> None:
        """REPLIES: each is taken out of the ledger or refused (fenced, W3), and the freed room is given away."""
        epoch, ids, attempts, statuses, sizes = read_replies(message)
        taken = payloads.take_all(sizes)
        state = self._state
        replica: Replica | None = worker.replica
        if replica is None:
            state.ledger.fenced += len(ids)
            return
        held = state.ledger.held[replica.key]
        current = epoch == replica.epoch
        ended = succeeded = 0
        latency_s = 0.0
        untouched: list[Request] = []
        trusted = worker.trusted
        run = Run()  # of ordinary ends, all of one client: nearly always all of them
        for key, attempt, status, payload in zip(ids, attempts, statuses, taken, strict=True):
            request = held.get(key)
            if request is None or request.attempt != attempt or not current:
                state.ledger.fenced += 1
                state.story.tell(now, show_request(key), f"refused a reply of attempt {attempt} from {worker.name}")
                continue
            if request.parts is not None:
                if request.rank not in (None, worker.rank):
                    state.ledger.fenced += 1
                    continue
                request.parts[worker.rank] = (status, payload, trusted)
                if len(request.parts) < (1 if request.rank is not None else len(replica.ranks)):
                    continue
                status = UNTOUCHED if any(part[0] == UNTOUCHED for part in request.parts.values()) else status  # noqa: PLW2901
            del held[key]
            ended += 1
            latency_s += now - request.queued_at
            if request.session is not None and (session := replica.service.sessions.get(request.session)) is not None:
                session.used_at = now  # a call that ran until now was use until now
            if request.answered:
                continue
            if status == OK:
                succeeded += 1
            if status == UNTOUCHED:
                untouched.append(request)
            elif request.parts is None and request.gather is None and status != DROPPED:
                if request.client is not run.client:
                    self._answers.answer_run(run, trusted)
                    run = Run(request.client)
                del run.calls[key]
                run.bytes += request.size
                run.sequences.append(key & SEQUENCE_MASK)
                run.statuses.append(status)
                run.payloads.append(payload)
            else:
                self._ended(request, replica, status, payload, trusted)
        self._answers.answer_run(run, trusted)
        if not ended:
            return
        replica.stats.ended(succeeded, ended - succeeded - len(untouched), latency_s, now)
        service: Service = replica.service
        if replica.pool is not None:
            replica.pool.gave(replica, ended)
        else:
            replica.active -= ended
        if untouched:
            if replica.pool is not None:
                replica.pool.close(replica)  # its worker is leaving: what it got now would come back at once
            self._take_back(replica, untouched, f"{replica.name} gave it back", now, lost=False)
        if service.watchers and not service.metrics_at:
            service.metrics_at = now + METRICS_EVERY_S
            state.deadlines.add(service.metrics_at, Kind.METRICS, service.id)
        if replica.parked.length:
            self.wake(service, replica.parked)
        self.pump(service, now)

    def _ended(self, request: Request, replica: Replica, status: int, payload: Payload, trusted: bool) -> None:
        """All ranks that run this call have ended it: answer, or add the part to its fan-out."""
        parts = request.parts
        gather = request.gather
        if parts is None and gather is None:
            assert status == DROPPED  # `replies` answers the ordinary ones itself
            why = f"{replica.name} dropped it"
            self._answers.fail(request, CallCancelled(endpoint=request.endpoint.full_name, why=why))
            return
        service: Service = replica.service
        found = parts or {0: (status, payload, trusted)}
        if any(part[0] == DROPPED for part in found.values()):
            dropped = packed(CallCancelled(endpoint=request.endpoint.full_name, why=f"{replica.name} dropped it"))
            found = {rank: (FAILED, dropped, True) if part[0] == DROPPED else part for rank, part in found.items()}
        if gather is None and request.rank is not None:
            self._answers.answer(request, *found[request.rank])
            return
        if service.kind == "service" and service.config.return_first_rank_result:
            wrong = [rank for rank in sorted(found) if found[rank][0] != OK]
            found = {0: found[wrong[0]] if wrong else found[0]}
            if gather is None:
                self._answers.answer(request, *found[0])
                return
        points = {(replica.idx, rank): part for rank, part in found.items()}
        if gather is None:
            self._answers.answer_parts(request, points)
        else:
            self._answers.gathered(gather, replica.idx, points)

    # When replicas come and go.

    def release(self, replica: Replica, why: str, now: float) -> None:
        """The replica is lost or stopped: what it held goes back to the front of its queues in its old order, attempt + 1 (F2). Called
        when it has left the pool; its sessions lose their pin."""
        state = self._state
        service: Service = replica.service
        running = state.ledger.release(replica)
        replica.active = 0
        replica.leaving = False
        for session in [session for session, idx in service.pins.items() if idx == replica.idx]:
            service.unpin(session)
            state.story.tell(now, session, f"lost its replica {replica.name}: {why}")
        self._take_back(replica, running + replica.parked.drain(), f"{replica.name} was lost: {why}", now, lost=True)

    def _take_back(self, replica: Replica, requests: list[Request], why: str, now: float, *, lost: bool) -> None:
        """What a replica gave back, or lost: that which may run again does (F2, F3), the other callers learn what is known."""
        again: list[Request] = []
        for request in requests:
            # Lost in flight it may have run; given back it has not, unless another rank of a mesh ran it.
            ran = lost and request.holder is replica
            if request.parts:
                ran = ran or any(part[0] != UNTOUCHED for part in request.parts.values())
            request.parts = None
            if request.answered:
                continue
            if request.gather is not None:
                self._answers.fail(request, ReplicaLost(replica=replica.name, why=why))
            elif ran and request.endpoint.at_most_once:
                self._answers.fail(request, OutcomeUnknown(endpoint=request.endpoint.full_name, why=why))
            else:
                again.append(request)
        self._return(replica.service, again, why, now)

    def _return(self, service: Service, requests: list[Request], why: str, now: float) -> None:
        """To the front of their queues, in this order; those of a service that stops, or a session that is over, fail instead."""
        back: dict[int, tuple[Queue, list[Request]]] = {}
        for request in requests:
            request.holder = None
            self._state.story.tell(
                now, show_request(request.id), f"back to its queue after attempt {request.attempt}: {why}"
            )
            if service.stopping is not None:
                self._answers.fail(request, service.stopping)
                continue
            queue: Queue = request.endpoint.queue
            if request.session is not None:
                session = service.sessions.get(request.session)
                if session is None:
                    closed = SessionClosed(session=request.session, service=service.name, why="")
                    self._answers.fail(request, closed)
                    continue
                queue = service.unpinned
                session.unpinned += 1
            back.setdefault(id(queue), (queue, []))[1].append(request)
        for queue, returned in back.values():
            queue.push_front(returned)
            self.wake(service, queue)
        self.pump(service, now)

    def fail_queued(self, service: Service, error: ForgeError) -> None:
        """All that wait for this service, wherever they do."""
        waiting = [*service.queues, *(replica.parked for replica in service.replicas.values())]
        for queue in waiting:
            for request in queue.drain():
                request.holder = None
                self._answers.fail(request, error)
        for session in service.sessions.values():
            session.unpinned = 0

    def _await_replica(self, service: Service, now: float) -> None:
        """Calls wait and no replica is healthy: look again when the oldest has waited for the grace (F8)."""
        if service.unhealthy_since is None:
            service.unhealthy_since = now
        if service.grace_at is None and any(queue.length for queue in service.queues):
            service.grace_at = now + service.config.no_replica_grace_s
            self._state.deadlines.add(service.grace_at, Kind.NO_REPLICA, service.id)

    def give_up_waiting(self, service: Service, now: float) -> None:
        """The grace of `_await_replica` is over for some."""
        service.grace_at = None
        if service.pool.members or service.unhealthy_since is None:
            return
        grace = service.config.no_replica_grace_s
        oldest: float | None = None
        for queue in service.queues:
            for request in list(queue):
                waiting_since = max(request.queued_at, service.unhealthy_since)
                if now - waiting_since >= grace - 1e-6:
                    service.unqueue(request)
                    self._answers.fail(request, self._no_replicas(service, grace))
                else:
                    oldest = waiting_since if oldest is None else min(oldest, waiting_since)
        if oldest is not None:
            service.grace_at = oldest + grace
            self._state.deadlines.add(service.grace_at, Kind.NO_REPLICA, service.id)

    def _no_replicas(self, service: Service, waited_s: float) -> NoHealthyReplicas:
        doing = [
            f"{replica.name} is {replica.state.value}"
            + (f" ({why})" if (why := replica.pending_why or replica.last_error) else "")
            for replica in service.replicas.values()
        ]
        return NoHealthyReplicas(service=service.name, waited_s=waited_s, replicas=doing)
