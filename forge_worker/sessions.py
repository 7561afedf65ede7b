"""Sessions whose state survives their replica: the class's `export_session` and `import_session` (design S3).

`actor_host` has one of these when the class defines both. It asks before a call of a session whether a state has to be
imported first, and after it whether its reply has to wait for a checkpoint; when calls may start, and that calls of a
session run one at a time, is its business.

Of a replica of several ranks every rank imports and only rank 0 exports: the broker keeps one state for a session, and
what the ranks have apart from one another is for the class to gather.
"""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Iterable
from typing import Any

from forge_contract.errors import PayloadTooLarge, SessionLost
from forge_contract.framing import Payload
from forge_contract.payload import decode, encode, payload_size
from forge_worker.assignment import Assignment
from forge_worker.calls import Call
from forge_worker.hooks import call_hook, is_our_cancel
from forge_worker.link import Import
from forge_worker.outcomes import trimmed

log = logging.getLogger("forge_worker")


class Session:
    """What we know of one session. `behind` and `current` are `actor_host`'s: who waits, and for what."""

    __slots__ = ("behind", "current", "due", "forgotten", "id", "lost", "pending", "since")

    def __init__(self, session: str) -> None:
        self.id = session
        self.current: object = None  # the one call that may run or wait for room, or what else keeps calls out
        self.behind: deque[Call] = deque()
        self.pending: Import | None = None  # to be imported before the next call
        self.lost: SessionLost | None = None  # the import failed
        self.since = 0  # calls that the last checkpoint does not know of
        self.due = False  # a checkpoint is wanted whatever `since` says
        self.forgotten = False  # it lives only until its last call here has ended


class Sessions:
    """The sessions of one instance. `trusted`: whether states may hold pickles, by the trust of our own address."""

    def __init__(self, instance: Any, assignment: Assignment, *, trusted: bool) -> None:
        self._export = instance.export_session
        self._import = instance.import_session
        self._class_name = assignment.class_name
        self._service = assignment.name
        self._every = assignment.checkpoint_every
        self._limit = assignment.max_payload_bytes
        self._trusted = trusted
        self._exports = assignment.rank == 0
        self._sessions: dict[str, Session] = {}

    def of(self, session: str) -> Session:
        """The session, as one that is served here."""
        found = self._sessions.get(session)
        if found is None:
            found = self._sessions[session] = Session(session)
        found.forgotten = False
        return found

    def arrived(self, instruction: Import) -> None:
        """A state to import before the session's next call; it replaces whatever is here."""
        session = self.of(instruction.session)
        session.pending, session.lost = instruction, None

    def forget(self, sessions: Iterable[str]) -> None:
        for name in sessions:
            session = self._sessions.get(name)
            if session is not None:
                session.forgotten, session.pending, session.lost = True, None, None
                self.release(session)

    def release(self, session: Session) -> None:
        """Its memory, once nothing of it runs or waits any more and it is forgotten."""
        if session.forgotten and session.current is None and not session.behind:
            self._sessions.pop(session.id, None)

    def get(self, name: str) -> Session | None:
        """The session as it is; asking does not make it a living one."""
        return self._sessions.get(name)

    def let_go(self) -> None:
        """None of the calls that wait will start here."""
        for session in self._sessions.values():
            session.behind.clear()

    def unsettled(self, name: str) -> bool:
        """Whether a call of it has to `prepare` first."""
        session = self._sessions.get(name)
        return session is not None and (session.pending is not None or session.lost is not None)

    async def prepare(self, session: Session) -> SessionLost | None:
        """Import the state that waits. Returns why its calls fail, if they do, which is until it is forgotten."""
        pending, session.pending = session.pending, None
        if pending is not None:
            try:
                state = decode(pending.payload, trusted=pending.trusted)
                await call_hook(self._import, session.id, state)
            except BaseException as error:
                if is_our_cancel(error):
                    raise
                log.warning(
                    "session %r of %s could not be imported", session.id, self._service, exc_info=trimmed(error)
                )
                why = "".join(traceback.format_exception_only(error)).strip()
                session.lost = SessionLost(session=session.id, service=self._service, why=f"its state: {why}")
            else:
                session.since = 0
        return session.lost

    def ended(self, name: str) -> bool:
        """A call of it has ended: whether its reply has to wait for a checkpoint."""
        session = self._sessions.get(name)
        if session is None:
            return False
        session.since += 1
        return (session.due or session.since >= self._every) and self._wanted(session)

    def held(self) -> list[Session]:
        """All whose state is ours to tell."""
        return [session for session in self._sessions.values() if self._wanted(session)]

    def _wanted(self, session: Session) -> bool:
        return self._exports and not session.forgotten and session.lost is None

    async def export(self, session: Session) -> Payload | None:
        """Its state now. None, with a warning in the log: it could not be had, and the last checkpoint stands."""
        where = f"{self._class_name}.export_session"
        try:
            state = await call_hook(self._export, session.id)
            payload: Payload = encode(state, trusted=self._trusted, where=where)
            size = payload_size(payload)
            if size > self._limit:
                raise PayloadTooLarge(what=f"the state of session {session.id!r}", size=size, limit=self._limit)
        except BaseException as error:
            if is_our_cancel(error):
                raise
            log.warning("no checkpoint of session %r of %s", session.id, self._service, exc_info=trimmed(error))
            return None
        session.since, session.due = 0, False
        return payload
