"""Calls on their way to a replica: routed, dispatched, and taken back when it goes. This is the hot path, and all decisions on it.

`intake` hands in what clients call; `replies` (room is free again) and `lifecycle` (a replica has come) call `pump`, and `lifecycle` tells
when one is lost (`release`). Routers decide where; the ledger remembers; we carry over. What becomes of calls that come back unanswered
is for `returns` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import groupby
from math import inf
from typing import Any, Final

from forge_broker.core.answers import Answers
from forge_broker.core.batcher import Lane, next_of
from forge_broker.core.deadlines import Kind
from forge_broker.core.queues import Queue
from forge_broker.core.replicas import ALONE, Replica
from forge_broker.core.requests import Batch, Request, Slice
from forge_broker.core.returns import Returns
from forge_broker.core.services import Endpoint, Service, Session
from forge_broker.core.state import State
from forge_broker.core.workers import Worker
from forge_contract.errors import ForgeError, NoHealthyReplicas, ProtocolError, RouterError, SessionLost
from forge_contract.messages import IMPORT, show_request

LOOK_S: Final = 0.01  # after so long with calls that wait and nobody with room, `ahead` looks how fast they are


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
        3. of a batcher's lane: if it is ripe, a batch is taken and the endpoint's router chooses for all of it, else the lane leaves the
           rotation until it is;
        4. any other: the endpoint's router chooses; a full choice parks the call in that replica's queue.
        """
        pool = service.pool
        ready = service.ready
        if service.cell is not None or service.suspects.length:
            self._isolate(service, now)
        # Replicas' own queues do not compete with each other for room: with none but them in the rotation, each may give all it can.
        # (What is woken meanwhile is such a queue.)
        shared = sum(queue.replica is None for queue in ready)
        while ready and pool.roomy:
            queue = ready[0]
            alone = not shared or len(ready) == 1
            if not queue.length or not self._take_turn(queue, service, alone, now):
                queue.waiting = False
                ready.popleft()
                shared -= queue.replica is None
            elif len(ready) > 1:
                ready.rotate(-1)
        if ready:
            self.look_soon(service, now)
        if not pool.members:
            self._await_replica(service, now)

    def look_soon(self, service: Service, now: float) -> None:
        """Calls wait, or were sent ahead, and nobody has room: `ahead` is to look, unless it will."""
        if service.ahead_s and not service.looking:
            service.looking = True
            self._state.deadlines.add(now + LOOK_S, Kind.AHEAD, service.id)

    def _take_turn(self, queue: Queue, service: Service, alone: bool, now: float) -> bool:
        """One turn of a queue that has something, while somebody has room. False: it has nothing to give for now. `alone`: no other queue
        waits for its turn, so that it may give more than one call."""
        owner = queue.replica
        if owner is not None:
            return owner.has_room and self._serve_parked(queue, owner, alone, now)
        if isinstance(queue, Lane):
            return self._flush(queue, service, now)
        if queue is service.unpinned:
            (request,) = queue.take(1)
            replica = self._replica_of_session(service, request, now)
            if replica is not None:
                # Even with room: an older call of its session may be parked there, and must not be overtaken.
                replica.parked.push(request)
                service.wake(replica.parked)
        elif queue.deal is not None:
            for replica, count in queue.deal(service.pool, queue.length if alone else 1):
                self._dispatch_mixed(queue.take(count), replica, now)
        else:
            self._follow(queue.take(1), service, self._dispatch, now)
        return True

    def _isolate(self, service: Service, now: float) -> None:
        """A suspect runs alone (F4): a replica is kept free for it, gets it when it has ended everything else, and is opened again when
        no suspect is left. So its companions are acquitted, or it is convicted."""
        pool = service.pool
        home = self._home_of_suspect(service)
        if (
            service.cell is not None
            and home is not None
            and home is not service.cell
            and not self._is_tried(service.cell)
        ):
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
        (request,) = service.suspects.take(1)
        if request.session is not None:
            service.sessions[request.session].suspects -= 1
            self._move_in(service, service.sessions[request.session], cell)
        self._dispatch([request], cell, now)

    def _is_tried(self, cell: Replica) -> bool:
        """Whether a suspect runs there, rather than what has to end before one may."""
        alone = cell.service.config.max_attempts - 1
        running = self._state.ledger.held[cell.key].values()
        return any(type(one) is Request and one.deaths == alone for one in running)

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
            self._follow([request], service, self._dispatch, now)
            routed += 1
        return routed

    def _follow(
        self,
        requests: list[Request],
        service: Service,
        dispatch: Callable[[list[Request], Replica, float], None],
        now: float,
    ) -> None:
        """Stateless calls, one or a batch, while somebody has room: where the router says, asked once, by the hints of the first."""
        first = requests[0]
        replica = self._choose(first.endpoint.router, first, first.hints, now)
        if isinstance(replica, RouterError):
            for request in requests:
                self._answers.fail(request, replica)
            return
        if service.pool.roomy >> replica.idx & 1:
            dispatch(requests, replica, now)
            return
        # It wants one that has no room.
        limit = replica.service.config.max_queued_requests
        for request in requests:
            if replica.parked.length >= limit:
                self._answers.fail(request, self._answers.overloaded(request.endpoint))
            else:
                replica.parked.push(request)

    # Batches.

    def _flush(self, lane: Lane, service: Service, now: float) -> bool:
        """A batch of this lane leaves, if it is ripe: one decision of the router for all (B2), by the hints of the first."""
        reason = lane.ripe(now)
        if not reason:
            self._look_again(service, lane, lane.flush_at)
            return False
        batch = lane.batch()
        if reason == "size" and len(batch) < lane.batcher.size:
            reason = "weight"  # enough calls wait, but the next is too heavy
        self._tell(batch, lane, reason, now)
        self._follow(batch, service, self._dispatch_batch, now)
        return True

    def batch_due(self, key: tuple[Service, Queue], now: float) -> None:
        """A batch may be to leave."""
        service, queue = key
        queue.timer_at = inf
        service.wake(queue)
        self.pump(service, now)

    def _serve_parked(self, queue: Queue, owner: Replica, alone: bool, now: float) -> bool:
        """What waits for this replica, which has room. False: it waits for company."""
        service: Service = owner.service
        if not service.batches:
            self._dispatch_mixed(queue.take(owner.free if alone else 1), owner, now)
            return True
        requests, lane, reason, again = next_of(queue, now)
        if not requests:
            self._look_again(service, queue, again)
            return False
        for request in requests:
            queue.remove(request)
        if lane is None:
            self._dispatch(requests, owner, now)
        else:
            if requests[0].session is not None:  # else it was counted when it came here
                self._tell(requests, lane, reason, now)
            self._dispatch_batch(requests, owner, now)
        return True

    def _tell(self, batch: list[Request], lane: Lane, reason: str, now: float) -> None:
        """Why this batch leaves (B3): a figure, and where it is less than full a line in the story of each of its calls (C5). What a
        batch is full by, and an eager one, are the ordinary path."""
        batcher, waited_s = lane.batcher, now - batch[0].queued_at
        batcher.stats.left(reason, len(batch), waited_s)
        if reason in ("timeout", "deadline"):
            text = f"left in a batch of {len(batch)} (of {batcher.size}) {waited_s * 1000:.1f} ms after its first call: {reason}"
            for request in batch:
                self._state.story.tell(now, show_request(request.id), text)

    def _look_again(self, service: Service, queue: Queue, when: float) -> None:
        if when < queue.timer_at:
            queue.timer_at = when
            self._state.deadlines.add(when, Kind.BATCH, (service, queue))

    def _dispatch_batch(self, requests: list[Request], replica: Replica, now: float) -> None:
        """Calls that run together on a replica with room for one more (B2)."""
        batch = Batch(0)
        requests = self._enter(requests, replica, now)
        batch.open = len(requests)
        if not requests:
            return
        replica.pool.took(replica, 1)  # type: ignore[union-attr]  # it has room, so it is in a pool
        for request in requests:
            request.batch = batch
            request.parts = {} if len(replica.ranks) > 1 else None
        for worker in replica.ranks:
            worker.add_batch(requests, requests[0].endpoint)
            self._state.deliver(worker)

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
        if isinstance(replica, RouterError):
            self._answers.fail(request, replica)
            return None
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

    def _choose(self, router: Any, request: Request, hints: dict[str, Any] | None, now: float) -> Replica | RouterError:
        """Ask the router. Whatever it does wrong fails this call, or its batch, and nothing else (R3)."""
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
        return RouterError(router=repr(router), endpoint=endpoint.full_name, why=why)

    def _dispatch_mixed(self, held: list[Any], replica: Replica, now: float) -> None:
        """What a queue gave, Requests and Slices, in order. Endpoints may share it."""
        if len(held) == 1 and type(held[0]) is Slice:
            self.slice(held[0], replica, now)
            return
        for (kind, _), some in groupby(held, _kind):
            if kind is Slice:
                for one in some:
                    self.slice(one, replica, now)
            else:
                self._dispatch(list(some), replica, now)

    def _dispatch(self, requests: list[Request], replica: Replica, now: float) -> None:
        """Calls of one endpoint to a replica with room for them; the books are kept once for all."""
        requests = self._enter(requests, replica, now)
        replica.pool.took(replica, len(requests))  # type: ignore[union-attr]  # it has room, so it is in a pool
        if len(replica.ranks) == 1:
            self._send(requests, replica.ranks[0], now)
            return
        for request in requests:
            request.parts = {}
            for worker in replica.ranks_for(request.rank):
                self._send([request], worker, now)

    def _enter(self, requests: list[Request], replica: Replica, now: float) -> list[Request]:
        """Into the ledger, all but those whose id is in use there."""
        held = self._state.ledger.held[replica.key]
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
        return requests

    def watch(self, replica: Replica, endpoint: Endpoint, now: float) -> None:
        """Look after the calls of an endpoint with a `hang_timeout_s`: one entry for all that this replica runs of it. It looks at the
        oldest, and comes again when the next could be overdue."""
        limit_s = endpoint.hang_timeout_s
        if limit_s is not None and endpoint.id not in replica.hang_watches:
            replica.hang_watches.add(endpoint.id)
            self._state.deadlines.add(now + limit_s, Kind.HANG, (replica, endpoint))

    def slice(self, one: Slice, replica: Replica, now: float, *, shape: int | None = None) -> None:
        """Calls held as one (C2), by nobody as yet, to a replica of one rank with room for them. `shape`: they are a batch, of calls of
        that shape."""
        state = self._state
        client, endpoint = one.client, one.endpoint
        one.holder, one.held = replica, state.ledger.held[replica.key]
        one.started_at = now
        room = len(one.left)
        if shape is not None:
            one.batch, one.batching = Batch(room), (shape, None, 1.0)
            room = 1
        stands = dict.fromkeys(one.left, one)
        one.held.update(stands)
        client.calls.update(stands)
        if endpoint.hang_timeout_s is not None:
            self.watch(replica, endpoint, now)
        replica.pool.took(replica, room)  # type: ignore[union-attr]  # it has room, so it is in a pool
        worker = replica.ranks[0]
        worker.add_slice(one)
        state.deliver(worker)

    def _send(self, requests: list[Request], worker: Worker, now: float) -> None:
        if requests:
            worker.add_dispatch(requests, requests[0].endpoint, now)
            self._state.deliver(worker)

    def _reuses(self, request: Request, held: dict[int, Request | Slice]) -> bool:
        """An id used again while the replica still ends the call that had it: fencing could not tell the two apart."""
        if request.id not in held:
            return False
        why = f"id {show_request(request.id)} is still in use by a call that was given up"
        self._answers.fail(request, ProtocolError(why))
        return True

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
        parked = replica.parked.drain()
        given_back = [request for request in parked if request.attempt]
        if given_back:
            # By a worker that was lost before it had given back all: the others ran beside them, and may be younger.
            parked = [request for request in parked if not request.attempt]
            running = sorted(running + given_back, key=lambda request: (request.queued_at, request.id))
        self._returns.take_back(replica, running + parked, why, now, lost=True, convicted=lost)
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
        if not service.wanted and service.sizing.policy is not None:
            self._state.woken.add(service)
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


def _kind(one: Request | Slice) -> tuple[type, Endpoint]:
    return type(one), one.endpoint
