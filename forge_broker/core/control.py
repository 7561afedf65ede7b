"""The operations of CONTROL (PROTOCOL.md §7): what a client asks for besides calls. Each takes checked fields and returns the answer's,
or None when the answer comes later; a ForgeError raised here is the answer.
"""

from __future__ import annotations

from typing import Any

from forge_broker.core import status
from forge_broker.core.clients import Client
from forge_broker.core.lifecycle import Lifecycle
from forge_broker.core.services import Service
from forge_broker.core.sessions import Sessions
from forge_broker.core.state import State
from forge_contract.errors import ForgeError, ProtocolError, ServiceStopped, UnknownService
from forge_contract.framing import Payloads
from forge_contract.messages import ANSWER


class Control:
    def __init__(self, state: State, sessions: Sessions, lifecycle: Lifecycle) -> None:
        self._state = state
        self._sessions = sessions
        self._lifecycle = lifecycle

    def handle(self, client: Client, message: list[Any], payloads: Payloads, now: float) -> None:
        """CONTROL: one operation, one answer."""
        if len(message) != 5 or type(message[1]) is not int or type(message[4]) is not int:
            raise ProtocolError("CONTROL is [19, number, op, fields, size]")
        _, number, name, fields, size = message
        payload = payloads.take(size)
        if not isinstance(name, str) or not isinstance(fields, dict):
            raise ProtocolError("CONTROL needs the name of an operation and a map of fields")
        try:
            answer: dict[str, Any] | None = None
            if name == "deploy":
                self._lifecycle.deploy(client, number, fields.get("spec"), payload, now)
            elif name in _OPERATIONS:
                answer = _OPERATIONS[name](self, client, number, fields, now)
            else:
                raise ProtocolError(f"there is no operation {name!r:.60}; there is deploy, {', '.join(_OPERATIONS)}")
        except ForgeError as error:
            client.post([ANSWER, number, False, {"error": error.to_wire()}, 0])
        else:
            if answer is None:
                return
            client.post([ANSWER, number, True, answer, 0])
        self._state.deliver(client)

    def _service(self, fields: dict[str, Any]) -> Service:
        """By id or by name."""
        wanted = fields.get("service")
        state = self._state
        found = state.services.get(wanted) if type(wanted) is int else state.names.get(str(wanted))
        if found is None:
            raise UnknownService(name=wanted if isinstance(wanted, (int, str)) else "?", known=list(state.names))
        return found

    def _find(self, client: Client, number: int, fields: dict[str, Any], now: float) -> dict[str, Any] | None:
        service = self._service({"service": fields.get("name")})
        if service.stopping is not None:
            raise service.stopping
        service.watchers.add(client.name)
        return self._lifecycle.describe(service, now)

    def _stop(self, client: Client, number: int, fields: dict[str, Any], now: float) -> dict[str, Any] | None:
        service = self._service(fields)
        service.waiting_stop.append((client, number))
        self._lifecycle.stop_service(service, ServiceStopped(service=service.name, why=""), now)
        return None

    def _open_session(self, client: Client, number: int, fields: dict[str, Any], now: float) -> dict[str, Any] | None:
        service = self._service(fields)
        if service.stopping is not None:
            raise service.stopping
        sid, hints = fields.get("session"), fields.get("hints") or {}
        if not (isinstance(sid, str) and 0 < len(sid) <= 200 and isinstance(hints, dict)):
            raise ProtocolError("open_session needs session, a str of 1 to 200 characters, and hints, a map")
        self._sessions.open(service, client, sid, hints, now)
        return {}

    def _close_session(self, client: Client, number: int, fields: dict[str, Any], now: float) -> dict[str, Any] | None:
        self._sessions.close(self._service(fields), str(fields.get("session")), "terminated", now)
        return {}

    def _state_of(self, client: Client, number: int, fields: dict[str, Any], now: float) -> dict[str, Any] | None:
        return status.service_state(self._service(fields), now)

    def _metrics(self, client: Client, number: int, fields: dict[str, Any], now: float) -> dict[str, Any] | None:
        return status.metrics(self._service(fields), now)

    def _status(self, client: Client, number: int, fields: dict[str, Any], now: float) -> dict[str, Any] | None:
        return status.broker_status(self._state, now)

    def _workers(self, client: Client, number: int, fields: dict[str, Any], now: float) -> dict[str, Any] | None:
        return {"workers": status.workers(self._state, now)}

    def _explain(self, client: Client, number: int, fields: dict[str, Any], now: float) -> dict[str, Any] | None:
        return {"story": status.story(self._state, str(fields.get("subject")), now)}


_OPERATIONS = {
    "find": Control._find,
    "stop": Control._stop,
    "open_session": Control._open_session,
    "close_session": Control._close_session,
    "state": Control._state_of,
    "metrics": Control._metrics,
    "status": Control._status,
    "workers": Control._workers,
    "explain": Control._explain,
}
