"""Calls on their way: routed, dispatched, answered, and given back when a replica goes. This is the hot path, and all decisions on it.

`intake` hands in what clients call, `broker` what workers reply; `lifecycle` tells when a replica has room for the first time
(`pump`) and when it is lost (`release`). Routers decide where; the ledger remembers; we carry over. What becomes of calls that come back
unanswered is for `returns` to say.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby
from operator import attrgetter
from typing import Any

from forge_broker.core.answers import Answers, Run, packed
from forge_broker.core.columns import read_replies
from forge_broker.core.deadlines import Kind
from forge_broker.core.replicas import ALONE, LEAVING, Replica
from forge_broker.core.requests import Request
from forge_broker.core.returns import Returns
from forge_broker.core.services import Endpoint, Service, Session
from forge_broker.core.state import State
from forge_broker.core.workers import Worker
from forge_contract.errors import (
    CallCancelled,
    ForgeError,
    NoHealthyReplicas,
    ProtocolError,
    RouterError,
    SessionLost,
)
from forge_contract.framing import Payload, Payloads
from forge_contract.messages import (
    DROPPED,
    FAILED,
    IMPORT,
    OK,
    SEQUENCE_MASK,
    UNTOUCHED,
    show_request,
)

METRICS_EVERY_S = 1.0


class Dispatch:
    def __init__(self, state: State, answers: Answers, returns: Returns) -> None:
        self._state = state
        self._answers = answers
        self._returns = returns

    # Routing.

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
        if service.cell is not None or service.suspects.length:
            self._isolate(service, now)
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
                    service.wake(replica.parked)
            elif alone and queue.deal is not None:
                for replica, count in queue.deal(pool, queue.length):
                    self._dispatch_mixed(queue.take(count), replica, now)
            else:
                self._route(queue.pop(), service, now)
            if len(ready) > 1:
                ready.rotate(-1)
        if not pool.members:
            self._await_replica(service, now)

    def _isolate(self, service: Service, now: float) -> None:
        """A suspect runs alone (F4): a replica is kept free for it, gets it when it has ended everything else, and is opened again when
        no suspect is left. So its companions are acquitted, or it is convicted."""
        pool = service.pool
        home = self._home_of_suspect(service)
        if service.cell is not None and home is not None and home is not service.cell:
            self._open_cell(service)
        if service.cell is None:
            candidates = [replica for replica in pool if not replica.closed and home in (None, replica)]
            if not candidates:
                return  # a home that is on its way out loses its sessions when it is gone, and then we are asked again
            service.cell = min(candidates, key=lambda replica: replica.active)
            pool.close(service.cell, ALONE)
        cell = service.cell
        if cell.active:
            return
        if not service.suspects.length:
            self._open_cell(service)
            return
        request = service.suspects.pop()
        if request.session is not None:
            service.sessions[request.session].suspects -= 1
            self._move_in(service, service.sessions[request.session], cell)
        self._dispatch([request], cell, now)

    def _open_cell(self, service: Service) -> None:
        cell = service.cell
        assert cell is not None
        service.cell = None
        service.pool.open(cell)
        service.wake(cell.parked)

    def _home_of_suspect(self, service: Service) -> Replica | None:
        """Where the session of the first suspect lives, if it has one that does: it may run there already."""
        suspect = service.suspects.first()
        idx = None if suspect is None or suspect.session is None else service.pins.get(suspect.session)
        return None if idx is None else service.replicas[idx]

    def route_all(self, requests: list[Request], endpoint: Endpoint, now: float) -> int:
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
            self._answers.fail(request, self._answers.overloaded(request.endpoint))
        else:
            replica.parked.push(request)

    def _replica_of_session(self, service: Service, request: Request, now: float) -> Replica | None:
        session: Session = service.sessions[request.session or ""]
        session.unpinned -= 1
        if session.lost:
            lost = SessionLost(session=session.id, service=service.name, why=session.lost)
            self._answers.fail(request, lost)
            return None
        idx = service.pins.get(session.id)
        if idx is not None:
            return service.replicas[idx]
        hints = {**session.hints, **request.hints} if request.hints else session.hints
        replica = self._choose(request.endpoint.pins_with, request, hints, now)
        if replica is not None:
            self._move_in(service, session, replica)
        return replica

    def _move_in(self, service: Service, session: Session, replica: Replica) -> None:
        """Pin a session; its state, if it has one elsewhere, goes before its next call (S3)."""
        if service.pins.get(session.id) == replica.idx:
            return
        service.pin(session.id, replica)
        kept = session.state
        if kept is None:
            return
        for worker in replica.ranks:
            worker.post([IMPORT, session.id, kept.trusted, worker.outbox.attach(kept.payload)])
            self._state.deliver(worker)

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
        if requests and requests[0].endpoint.hang_timeout_s is not None:
            self.watch(replica, requests[0].endpoint, now)
        replica.pool.took(replica, len(keys))  # type: ignore[union-attr]  # it has room, so it is in a pool
        if len(replica.ranks) == 1:
            self._send(requests, replica.ranks[0], now)
            return
        for request in requests:
            request.parts = {}
            for worker in replica.ranks_for(request.rank):
                self._send([request], worker, now)

    def watch(self, replica: Replica, endpoint: Endpoint, now: float) -> None:
        """Look after the calls of an endpoint with a `hang_timeout_s`: one entry for all that this replica runs of it. It looks at the
        oldest, and comes again when the next could be overdue."""
        limit_s = endpoint.hang_timeout_s
        if limit_s is not None and endpoint.id not in replica.hang_watches:
            replica.hang_watches.add(endpoint.id)
            self._state.deadlines.add(now + limit_s, Kind.HANG, (replica, endpoint))

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
        number = worker.channel.received  # of the envelope that this is in
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
                    worker.unsettled.append((number, request, 0))
                    continue
                status = UNTOUCHED if any(part[0] == UNTOUCHED for part in request.parts.values()) else status  # noqa: PLW2901
            del held[key]
            ended += 1
            latency_s += now - request.queued_at
            if request.session is not None and (session := replica.service.sessions.get(request.session)) is not None:
                session.used_at = now  # a call that ran until now was use until now
                session.ran = True
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
                    worker.unsettled.append((number, request.client, request.client.channel.sent + 1))
                del run.calls[key]
                run.bytes += request.size
                run.sequences.append(key & SEQUENCE_MASK)
                run.statuses.append(status)
                run.payloads.append(payload)
            else:
                self.ended(request, replica, status, payload, trusted)
                worker.unsettled.append((number, request, 0))
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
                if service.cell is replica:
                    service.cell = None
                replica.pool.close(replica, LEAVING)  # its worker is leaving: what it got now would come back at once
            self._returns.take_back(replica, untouched, f"{replica.name} gave it back", now, lost=False)
        if service.watchers and not service.metrics_at:
            service.metrics_at = now + METRICS_EVERY_S
            state.deadlines.add(service.metrics_at, Kind.METRICS, service.id)
        if replica.parked.length:
            service.wake(replica.parked)
        self.pump(service, now)

    def ended(self, request: Request, replica: Replica, status: int, payload: Payload, trusted: bool) -> None:
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

    def release(self, replica: Replica, why: str, now: float, convicted: Collection[Request] | None = None) -> None:
        """The replica is lost or stopped: what it held goes back to the front of its queues in its old order (F2). Called when it has
        left the pool. `convicted`: which of its calls may have been its death, None for all that were in flight (F4)."""
        service: Service = replica.service
        if service.cell is replica:
            service.cell = None
        running = self._state.ledger.release(replica)
        replica.active = 0
        self._returns.sessions_of(replica, why, now)
        lost = running if convicted is None else convicted
        self._returns.take_back(replica, running + replica.parked.drain(), why, now, lost=True, convicted=lost)
        self.pump(service, now)

    def evict(self, replica: Replica, now: float) -> None:
        """What waits for a replica that drains and is of no session goes elsewhere; what is of one waits until its state can move (F9)."""
        parked = replica.parked.drain()
        for request in parked:
            if request.session is not None:
                replica.parked.push(request)
        stateless = [request for request in parked if request.session is None]
        self._returns.take_back(replica, stateless, f"{replica.name} is drained", now, lost=False)
        self.pump(replica.service, now)

    def fail_queued(self, service: Service, error: ForgeError) -> None:
        """All that wait for this service, wherever they do."""
        waiting = [*service.queues, *(replica.parked for replica in service.replicas.values())]
        for queue in waiting:
            for request in queue.drain():
                request.holder = None
                self._answers.fail(request, error)
        for session in service.sessions.values():
            session.unpinned = session.suspects = 0

    def _await_replica(self, service: Service, now: float) -> None:
        """Calls wait and no replica is healthy: look again when the oldest has waited for the grace (F8)."""
        if service.unhealthy_since is None:
            service.unhealthy_since = now
        if service.grace_at is None and any(queue.length for queue in service.queues):
            service.grace_at = now + service.config.no_replica_grace_s
            self._state.deadlines.add(service.grace_at, Kind.NO_REPLICA, service.id)

    def give_up_waiting(self, service_id: int, now: float) -> None:
        """The grace of `_await_replica` is over for some."""
        service = self._state.services.get(service_id)
        if service is None:
            return
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
                    self._answers.fail(request, self.no_replicas(service, grace))
                else:
                    oldest = waiting_since if oldest is None else min(oldest, waiting_since)
        if oldest is not None:
            service.grace_at = oldest + grace
            self._state.deadlines.add(service.grace_at, Kind.NO_REPLICA, service.id)

    def no_replicas(self, service: Service, waited_s: float) -> NoHealthyReplicas:
        doing = [
            f"{replica.name} is {replica.state.value}"
            + (f" ({why})" if (why := replica.pending_why or replica.last_error) else "")
            for replica in service.replicas.values()
        ]
        return NoHealthyReplicas(service=service.name, waited_s=waited_s, replicas=doing)
