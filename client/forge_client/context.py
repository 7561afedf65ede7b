"""Where the running code is: which session and which request (design A6, S1).

Context variables, so a task started inside inherits them. The client sets the session in `async with
service.session()`; a worker sets both around each call of an endpoint.
"""

from __future__ import annotations

from contextvars import ContextVar

from forge_contract.messages import show_request


class SessionsOfCalls:
    """The sessions of calls that run one after another in one context: which one it is follows from the request, for who asks. A context
    variable is set once for all of them instead of once for each."""

    __slots__ = ("_by_request", "_requests", "_sessions")

    def __init__(self, requests: list[int], sessions: list[str | None]) -> None:
        self._requests = requests
        self._sessions = sessions
        self._by_request: dict[int, str | None] | None = None  # once somebody has asked

    def of(self, request: int | None) -> str | None:
        if self._by_request is None:
            self._by_request = dict(zip(self._requests, self._sessions, strict=True))
        return None if request is None else self._by_request.get(request)


session_var: ContextVar[str | SessionsOfCalls | None] = ContextVar("forge_session", default=None)
# The number, not its text: it is set for every call and asked for by few.
request_var: ContextVar[int | None] = ContextVar("forge_request", default=None)


def current_session() -> str | None:
    """The id of the session this code runs in; None outside of one."""
    session = session_var.get()
    return session.of(request_var.get()) if isinstance(session, SessionsOfCalls) else session


def current_request() -> str | None:
    """The id of the call that runs here, as `forge explain` takes it (`1a2b3c-17`); None outside of an endpoint."""
    request = request_var.get()
    return None if request is None else show_request(request)
