"""What becomes of calls whose replica gave them back or was lost: tried again, failed, or kept as dead letters (F2, F3, F4); and of its
sessions (S3). `dispatch` takes them out of the ledger and pumps the queues afterwards.
"""

from __future__ import annotations

from collections.abc import Collection

from forge_broker.core.answers import Answers
from forge_broker.core.batcher import Lane
from forge_broker.core.dead_letters import DeadLetter
from forge_broker.core.queues import Queue
from forge_broker.core.replicas import Replica
from forge_broker.core.requests import Request
from forge_broker.core.services import Endpoint, Service, Session
from forge_broker.core.state import State
from forge_contract.errors import OutcomeUnknown, PoisonedRequest, ReplicaLost, SessionClosed, SessionLost
from forge_contract.framing import weigh
from forge_contract.messages import UNTOUCHED, show_request
from forge_contract.segments import is_handle


class Returns:
    def __init__(self, state: State, answers: Answers) -> None:
        self._state = state
        self._answers = answers

    def take_back(
        self,
        replica: Replica,
        requests: list[Request],
        why: str,
        now: float,
        *,
        lost: bool,
        recalled: bool = False,
        convicted: Collection[Request] = (),
    ) -> None:
        """What a replica gave back, or lost: that which may run again does (F2, F3), the other callers learn what is known. `convicted`:
        those that may have been its death. `recalled`: they were sent ahead, and nothing has happened to them that is worth a line."""
        convicts = set(map(id, convicted))
        why = f"{replica.name} was lost: {why}" if lost else why
        again: list[Request] = []
        for request in requests:
            # Lost in flight it may have run; given back it has not, unless another rank of a mesh ran it.
            ran = lost and request.holder is replica
            if request.parts:
                ran = ran or any(part[0] != UNTOUCHED for part in request.parts.values())
            request.parts = None
            request.batch = None
            if request.session is not None:
                replica.service.used([request.session], now)
            if request.answered:
                continue
            if request.gather is not None and (
                lost or ran or len(request.gather.children) + len(request.gather.parts) == 1
            ):
                self._answers.fail(request, ReplicaLost(replica=replica.name, why=why))
            elif request.gather is not None:
                # Drained before it began: it is one of the healthy no more, and they are whom a fan-out is for.
                self._answers.gathered(request.gather, replica.idx, {})
            elif ran and request.endpoint.at_most_once:
                self._answers.fail(request, OutcomeUnknown(endpoint=request.endpoint.full_name, why=why))
            else:
                request.deaths += ran and id(request) in convicts
                again.append(request)
        self._return(replica.service, again, why, now, "loss" if lost else "drain", recalled=recalled)

    def _return(
        self, service: Service, requests: list[Request], why: str, now: float, flush: str, *, recalled: bool
    ) -> None:
        """To the front of their queues, in this order; those of a service that stops, or a session that is over, fail instead."""
        back: dict[int, tuple[Queue, list[Request]]] = {}
        alone = service.config.max_attempts - 1
        # With a suspect its whole session waits to run alone, or calls of it would overtake each other.
        held_back = {request.session for request in requests if request.deaths == alone and request.session is not None}
        for request in requests:
            request.holder = None
            if not recalled:
                self._state.story.tell(
                    now, show_request(request.id), f"back to its queue after attempt {request.attempt}: {why}"
                )
            session = None if request.session is None else service.sessions.get(request.session)
            if service.stopping is not None:
                self._answers.fail(request, service.stopping)
            elif request.deaths >= service.config.max_attempts:
                self._bury(request, why, now)
            elif request.session is not None and session is None:
                closed = SessionClosed(session=request.session, service=service.name, why="")
                self._answers.fail(request, closed)
            elif session is not None and session.lost:
                self._answers.fail(request, SessionLost(session=session.id, service=service.name, why=session.lost))
            else:
                request.endpoint.stats.retries += request.attempt > 0 and not recalled
                if request.deaths == alone:
                    self._state.story.tell(now, show_request(request.id), "a suspect: its next attempt runs alone")
                queue = self._queue_of(request, session, request.deaths == alone or request.session in held_back)
                back.setdefault(id(queue), (queue, []))[1].append(request)
        for queue, returned in back.values():
            queue.push_front(returned)
            if isinstance(queue, Lane):
                queue.hurry(flush, now)
            service.wake(queue)
        for request in [request for request in service.unpinned if request.session in held_back] if held_back else []:
            session = service.sessions[request.session or ""]
            service.unqueue(request)
            session.suspects += 1
            service.suspects.push(request)

    def _queue_of(self, request: Request, session: Session | None, alone: bool) -> Queue:
        service: Service = request.endpoint.service
        if session is None:
            if alone:
                return service.suspects
            endpoint: Endpoint = request.endpoint
            return endpoint.queue if endpoint.batcher is None else endpoint.batcher.lane_of(request)
        if alone or session.suspects:
            session.suspects += 1
            return service.suspects
        idx = service.pins.get(session.id)
        if idx is not None:
            # Given back by a worker that is leaving: the session stays until its state can move, and so does what it asked later.
            parked: Queue = service.replicas[idx].parked
            return parked
        session.unpinned += 1
        return service.unpinned

    def _bury(self, request: Request, why: str, now: float) -> None:
        """Poison: it was running on too many replicas as they died, the last time alone (F4)."""
        state = self._state
        name = show_request(request.id)
        service: Service = request.endpoint.service
        state.story.tell(now, name, f"kept as a dead letter after {request.deaths} deaths")
        state.note("warning", "poisoned request", request=name, endpoint=request.endpoint.full_name, why=why)
        state.counters["poisoned"] += 1
        payload = request.payload
        if state.segments is not None and not isinstance(payload, bytes):
            # The letter outlives the call, and with it the client's lease.
            payload = [state.segments.read(part) if is_handle(part) else part for part in payload]
        lines = [f"{entry.when - now:+.3f} s  {entry.text}" for entry in state.story.of(name)]
        state.dead.add(
            DeadLetter(
                id=name,
                service=service.name,
                endpoint=request.endpoint.name,
                attempts=request.deaths,
                died_at=now,
                why=why,
                payload=payload,
                trusted=request.trusted,
                size=len(payload) if isinstance(payload, bytes) else weigh(payload),
                story=lines,
            )
        )
        self._answers.fail(request, PoisonedRequest(endpoint=request.endpoint.full_name, attempts=request.deaths))

    # Sessions.

    def sessions_of(self, replica: Replica, why: str, now: float) -> None:
        """Its sessions lose their pin. Whose state is kept moves with it; the others start afresh, or are lost (S3)."""
        service: Service = replica.service
        for sid in [sid for sid, idx in service.pins.items() if idx == replica.idx]:
            service.unpin(sid)
            session = service.sessions[sid]
            self._state.story.tell(now, sid, f"lost its replica {replica.name}: {why}")
            if session.state is not None or sid in service.fresh:
                continue
            service.fresh.add(sid)
            if service.config.on_session_loss == "raise":
                session.lost = f"{replica.name} was lost: {why}"
                if session.suspects:  # for their cell nobody asks again whose they are
                    for request in [request for request in service.suspects if request.session == sid]:
                        service.unqueue(request)
                        self._answers.fail(request, SessionLost(session=sid, service=service.name, why=session.lost))
