"""Sessions: opened and closed by their client, pinned to a replica at their first call, ended when unused for long (S2).

Where a session is pinned stands in `Service.pins`; which of its calls goes where is `dispatch`'s business.
"""

from __future__ import annotations

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
            service.sessions[sid] = Session(sid, client, hints, now)
            client.sessions.add((service.id, sid))
            if service.config.session_ttl_s is not None:
                self._state.deadlines.add(now + service.config.session_ttl_s, Kind.SESSION, (service.id, sid))

    def close(self, service: Service, sid: str, why: str, now: float) -> None:
        """Idempotent. What waits under it fails; what runs, runs on and is answered."""
        session = service.sessions.pop(sid, None)
        if session is None:
            return
        idx = service.pins.get(sid)
        replica = None if idx is None else service.replicas[idx]
        for queue in (service.unpinned, service.suspects, *([] if replica is None else [replica.parked])):
            for request in [request for request in queue if request.session == sid]:
                queue.remove(request)
                request.holder = None
                closed = SessionClosed(session=sid, service=service.name, why=f": {why}")
                self._answers.fail(request, closed)
        service.unpin(sid)
        self.drop_checkpoint(session)
        for worker in [] if replica is None else replica.ranks:
            if worker is not None:
                worker.add_forget(sid)
                self._state.deliver(worker)
        session.client.sessions.discard((service.id, sid))

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

    def idle(self, key: tuple[int, str], now: float) -> None:
        """`session_ttl_s` may have passed without use; a call that waits or runs is use. `key`: service id, session id."""
        service_id, sid = key
        service = self._state.services.get(service_id)
        session = None if service is None else service.sessions.get(sid)
        if service is None or session is None or (ttl := service.config.session_ttl_s) is None:
            return
        if self._busy(service, sid):
            session.used_at = now
        if now - session.used_at >= ttl - 1e-6:
            self._state.story.tell(now, sid, f"closed after {ttl} s without use")
            self.close(service, sid, f"unused for {ttl} s", now)
        else:
            self._state.deadlines.add(session.used_at + ttl, Kind.SESSION, key)

    def _busy(self, service: Service, sid: str) -> bool:
        if service.sessions[sid].unpinned or service.sessions[sid].suspects:
            return True
        idx = service.pins.get(sid)
        if idx is None:
            return False
        replica = service.replicas[idx]
        held = self._state.ledger.held[replica.key].values()
        return any(request.session == sid for request in held) or any(
            request.session == sid for request in replica.parked
        )
