"""Sessions as the caller sees them (S1): a block, or an id passed by hand. Where a session is pinned is the broker's.

Which session a call belongs to is a context variable, so tasks started inside a block inherit it, and one mapping
serves all services: a call looks up its own service and sees no other's. A task that outlives the block
still holds the closed session, and is told so instead of running as a call without one.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any

from forge_client.context import SessionsOfCalls, session_var
from forge_contract.errors import (
    BrokerLost,
    ServiceStopped,
    SessionClosed,
    SessionLost,
    UnknownService,
    UnknownSession,
)

if TYPE_CHECKING:
    from forge_client.binding import Binding
    from forge_client.service import Service

# Service key → the session that calls of this context belong to. Never changed in place: contexts share it.
active_sessions: ContextVar[Mapping[tuple[int, int], Session]] = ContextVar("forge_active_sessions", default={})  # noqa: B039


class Session:
    """`async with service.session(**hints) as session:`; `session.session_id` is its id."""

    def __init__(self, service: Service, hints: dict[str, Any]) -> None:
        self._service = service
        self.hints = hints
        self._binding: Binding | None = None
        self._outer: Session | None = None
        self._outer_id: str | SessionsOfCalls | None = None
        self.session_id = secrets.token_hex(8)
        self.closed = False

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open" if self._binding is not None else "not opened"
        return f"<Session {self.session_id} of {self._service.name} {state}>"

    def __str__(self) -> str:
        return self.session_id

    async def open(self) -> None:
        """Tell the broker. Raises what keeps the service from serving."""
        if self._binding is not None or self.closed:
            raise SessionClosed(session=self.session_id, service=self._service.name, why=": a session is opened once")
        binding = await self._service.bound()
        self._binding = binding
        fields = {"service": binding.service, "session": self.session_id, "hints": self.hints}
        binding.sessions[self.session_id] = self
        binding.unused.add(self.session_id)
        try:
            await binding.client.control("open_session", fields)
        except BaseException:
            self.closed = True
            binding.forget_session(self.session_id)
            raise

    async def close(self) -> None:
        """Ends it; a second time does nothing."""
        if self.closed or self._binding is None:
            return
        self.closed = True
        await close_session(self._binding, self.session_id)

    async def __aenter__(self) -> Session:
        await self.open()
        assert self._binding is not None
        active = active_sessions.get()
        self._outer = active.get(self._binding.key)
        self._outer_id = session_var.get()
        active_sessions.set({**active, self._binding.key: self})
        session_var.set(self.session_id)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()
        await self.close()

    def _leave(self) -> None:
        """Out of this context. Not by a token: fixtures and generators enter and leave in different contexts."""
        assert self._binding is not None
        active = dict(active_sessions.get())
        if active.get(self._binding.key) is not self:
            return  # another one was entered inside and is still open; it will skip us when it leaves
        outer = self._outer
        while outer is not None and outer.closed:
            outer = outer._outer
        if outer is None:
            del active[self._binding.key]
        else:
            active[self._binding.key] = outer
        active_sessions.set(active)
        session_var.set(self._outer_id)


async def close_session(binding: Binding, session_id: str) -> None:
    """End a session of this service by id. Idempotent."""
    session = binding.forget_session(session_id)
    if session is not None:
        session.closed = True
    if binding.over is not None:
        return
    try:
        await binding.client.control("close_session", {"service": binding.service, "session": session_id})
    except (BrokerLost, ServiceStopped, SessionLost, UnknownService, UnknownSession):
        return  # there is no such session any more, which is what was asked for


def session_of(binding: Binding) -> str | None:
    """The session that a call of this service belongs to here. Raises SessionClosed in a task that outlived it."""
    session = active_sessions.get().get(binding.key)
    if session is None:
        return None
    if session.closed:
        raise SessionClosed(
            session=session.session_id, service=binding.name, why=": this task outlived the block that opened it"
        )
    return session.session_id
