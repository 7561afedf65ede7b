"""Sessions: opened and closed by their client, pinned to a replica at their first call, ended when unused for long (S2).

Where a session is pinned stands in `Service.pins`; which of its calls goes where is `dispatch`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from forge_broker.core.answers import Answers
from forge_broker.core.clients import Client
from forge_broker.core.columns import read_states
from forge_broker.core.deadlines import Kind
from forge_broker.core.replicas import Replica
from forge_broker.core.services import Checkpoint, Service, Session
from forge_broker.core.state import State
from forge_broker.core.workers import Worker
from forge_contract.errors import SessionClosed
from forge_contract.framing import Payload, Payloads, weigh


class Sessions:
    def __init__(self, state: State, answers: Answers) -> None:
        self._state = state
        self._answers = answers

    def open(self, service: Service, client: Client, sid: str, hints: dict[str, Any], now: float) -> None:
        """Idempotent: a session that is open stays as it is."""
        if sid not in service.sessions:
            session = service.sessions[sid] = Session(sid, service, client, hints, now)
            service.fresh.add(sid)
            client.sessions.add(session)
            if service.config.session_ttl_s is not None:
                self._state.deadlines.add(now + service.config.session_ttl_s, Kind.SESSION, session)

    def close(self, service: Service, sid: str, why: str, now: float) -> None:
        """Idempotent. What waits under it fails; what runs, runs on and is answered."""
        session = service.sessions.get(sid)
        if session is not None:
            self.close_all([session], why, now)

    def close_all(self, sessions: Iterable[Session], why: str, now: float) -> None:
        """`close` for many: each queue is looked through once, however many sessions end together."""
        by_service: dict[Service, list[Session]] = {}
        for session in sessions:
            by_service.setdefault(session.service, []).append(session)
        for service, closing in by_service.items():
            self._fail_waiting(service, closing, why)
            for session in closing:
                self._end(service, session)

    def _fail_waiting(self, service: Service, closing: list[Session], why: str) -> None:
        ids = {session.id for session in closing}
        homes = {service.pins[sid] for sid in ids if sid in service.pins}
        for queue in (service.unpinned, service.suspects, *(service.replicas[idx].parked for idx in homes)):
            for request in [request for request in queue if request.session in ids]:
                queue.remove(request)
                request.holder = None
                closed = SessionClosed(session=request.session, service=service.name, why=f": {why}")
                self._answers.fail(request, closed)

    def _end(self, service: Service, session: Session) -> None:
        del service.sessions[session.id]
        service.fresh.discard(session.id)
        idx = service.pins.get(session.id)
        service.unpin(session.id)
        self.drop_checkpoint(session)
        for worker in [] if idx is None else service.replicas[idx].ranks:
            if worker is not None:
                worker.add_forget(session.id)
                self._state.deliver(worker)
        session.client.sessions.discard(session)

    def drop_checkpoint(self, session: Session) -> None:
        if session.state is not None:
            self._state.checkpoint_bytes -= session.state.size
            session.state = None

    def checkpoints(self, worker: Worker, message: list[Any], payloads: Payloads, now: float) -> None:
        """STATES: what sessions know after the calls answered so far. Raises ProtocolError."""
        ids, taken = read_states(message, payloads)
        replica: Replica | None = worker.replica
        for sid, payload in zip(ids, taken, strict=True):
            session = None if replica is None else replica.service.sessions.get(sid)
            # One that is closed meanwhile, or lives elsewhere: an old state must not overwrite a newer one.
            if session is not None and replica is not None and replica.service.pins.get(sid) == replica.idx:
                self.keep(session, payload, worker.trusted, now)

    def keep(self, session: Session, payload: Payload, trusted: bool, now: float) -> None:
        """A checkpoint, within the broker's limit."""
        state = self._state
        self.drop_checkpoint(session)
        size = len(payload) if type(payload) is bytes else weigh(payload)
        if state.checkpoint_bytes + size > state.config.checkpoint_bytes:
            state.counters["checkpoints_refused"] += 1
            state.story.tell(now, session.id, f"a checkpoint of {size} bytes is over checkpoint_bytes, and not kept")
            return
        session.state = Checkpoint(payload, size, trusted)
        state.checkpoint_bytes += size

    def idle(self, session: Session, now: float) -> None:
        """`session_ttl_s` may have passed without use; a call that waits or runs is use."""
        service, sid = session.service, session.id
        if service.sessions.get(sid) is not session or (ttl := service.config.session_ttl_s) is None:
            return
        if self._busy(service, sid):
            session.used_at = now
        if now - session.used_at >= ttl - 1e-6:
            self._state.story.tell(now, sid, f"closed after {ttl} s without use")
            self.close(service, sid, f"unused for {ttl} s", now)
        else:
            self._state.deadlines.add(session.used_at + ttl, Kind.SESSION, session)

    def _busy(self, service: Service, sid: str) -> bool:
        if service.sessions[sid].unpinned or service.sessions[sid].suspects:
            return True
        idx = service.pins.get(sid)
        if idx is None:
            return False
        replica = service.replicas[idx]
        held = set(self._state.ledger.held[replica.key].values())
        return any(one.is_of(sid) for one in held) or any(request.is_of(sid) for request in replica.parked)
