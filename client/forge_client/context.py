"""Where the running code is: which session and which request (design A6, S1).

Context variables, so a task started inside inherits them. The client sets the session in `async with
service.session()`; a worker sets both around each call of an endpoint.
"""

from __future__ import annotations

from contextvars import ContextVar

from forge_contract.messages import show_request

session_var: ContextVar[str | None] = ContextVar("forge_session", default=None)
# The number, not its text: it is set for every call and asked for by few.
request_var: ContextVar[int | None] = ContextVar("forge_request", default=None)


def current_session() -> str | None:
    """The id of the session this code runs in; None outside of one."""
    return session_var.get()


def current_request() -> str | None:
    """The id of the call that runs here, as `forge explain` takes it (`1a2b3c-17`); None outside of an endpoint."""
    request = request_var.get()
    return None if request is None else show_request(request)
