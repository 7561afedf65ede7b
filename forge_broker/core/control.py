"""The operations of CONTROL (PROTOCOL.md §7): what a client asks for besides calls. Each takes checked fields and returns the answer's,
or None when the answer comes later; a ForgeError raised here is the answer.
"""

from __future__ import annotations

from typing import Any

from forge_broker.core import status
from forge_broker.core.clients import Client
from forge_broker.core.dead_letters import DeadLetter
from forge_broker.core.drains import Drains
from forge_broker.core.lifecycle import Lifecycle
from forge_broker.core.metrics import metrics
from forge_broker.core.scaling import Scaling
from forge_broker.core.services import Service
from forge_broker.core.sessions import Sessions
from forge_broker.core.state import State
from forge_broker.core.telling import Telling
from forge_contract.errors import (
    BadCall,
    ForgeError,
    ProtocolError,
    ServiceStopped,
    TrustRequired,
    UnknownEndpoint,
    UnknownService,
)
from forge_contract.framing import Payload, Payloads
from forge_contract.messages import ANSWER

Answer = dict[str, Any] | tuple[dict[str, Any], Payload] | None


class Control:
    def __init__(
        self,
        state: State,
        sessions: Sessions,
        lifecycle: Lifecycle,
        drains: Drains,
        scaling: Scaling,
        telling: Telling,
    ) -> None:
        self._state = state
        self._sessions = sessions
        self._lifecycle = lifecycle
        self._drains = drains
        self._scaling = scaling
        self._telling = telling

    def handle(self, client: Client, message: list[Any], payloads: Payloads, now: float) -> None:
        """CONTROL: one operation, one answer."""
        if len(message) != 5 or type(message[1]) is not int or type(message[4]) is not int:
            raise ProtocolError("CONTROL is [19, number, op, fields, size]")
        _, number, name, fields, size = message
        payload = payloads.take(size)
        if not isinstance(name, str) or not isinstance(fields, dict):
            raise ProtocolError("CONTROL needs the name of an operation and a map of fields")
        try:
            answer: Answer = None
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
            fields, answered = answer if isinstance(answer, tuple) else (answer, b"")
            client.post([ANSWER, number, True, fields, client.outbox.attach(answered)])
        self._state.deliver(client)

    def _service(self, fields: dict[str, Any]) -> Service:
        """By id or by name."""
        wanted = fields.get("service")
        state = self._state
        found = state.services.get(wanted) if type(wanted) is int else state.names.get(str(wanted))
        if found is None:
            raise UnknownService(name=wanted if isinstance(wanted, (int, str)) else "?", known=list(state.names))
        return found

    def _find(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        service = self._service({"service": fields.get("name")})
        if service.stopping is not None:
            raise service.stopping
        service.watchers.add(client.name)
        return self._telling.describe(service, now)

    def _stop(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        service = self._service(fields)
        service.waiting_stop.append((client, number))
        self._lifecycle.stop_service(service, ServiceStopped(service=service.name, why=""), now)
        return None

    def _open_session(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        service = self._service(fields)
        if service.stopping is not None:
            raise service.stopping
        sid, hints = fields.get("session"), fields.get("hints") or {}
        if not (isinstance(sid, str) and 0 < len(sid) <= 200 and isinstance(hints, dict)):
            raise ProtocolError("open_session needs session, a str of 1 to 200 characters, and hints, a map")
        self._sessions.open(service, client, sid, hints, now)
        return {}

    def _close_session(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        self._sessions.close(self._service(fields), str(fields.get("session")), "terminated", now)
        return {}

    def _drain(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        self._drains.drain(str(fields.get("target")), client, number, now)
        return None

    def _restart(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        self._drains.restart(self._service(fields), client, number, now)
        return None

    def _scale(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        service = self._service(fields)
        done = self._scaling.by_hand(service, fields.get("replicas"), client, now)
        if fields.get("wait") is not True:
            return done
        self._scaling.answer_when_done(service, client, number)
        return None

    def _why_scale(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        return status.decisions(self._service(fields), now)

    def _terminate(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        self._lifecycle.terminate(f"{client.name} asked for it", now)
        return {}

    def _letter(self, fields: dict[str, Any]) -> DeadLetter:
        letter = self._state.dead.get(str(fields.get("id")))
        if letter is None:
            raise BadCall(
                endpoint="dead", why=f"there is no dead letter {fields.get('id')!r:.60}; see `forge dead list`"
            )
        return letter

    def _dead_list(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        letters = self._state.dead.newest_first()
        return {"dead": [status.dead_letter(one, now) for one in letters], "forgotten": self._state.dead.forgotten}

    def _dead_show(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        letter = self._letter(fields)
        return {**status.dead_letter(letter, now), "story": letter.story}

    def _dead_take(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        letter = self._letter(fields)
        if letter.trusted and not client.trusted:
            raise TrustRequired(what="the arguments of a trusted client's call")
        service = self._service({"service": letter.service})
        for endpoint in service.endpoints:
            if endpoint.name == letter.endpoint:
                taken = {"service": service.id, "endpoint": endpoint.id, "trusted": letter.trusted}
                return taken, letter.payload
        known = [endpoint.name for endpoint in service.endpoints]
        raise UnknownEndpoint(name=letter.endpoint, owner=service.name, known=known)

    def _dead_drop(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        dead = self._state.dead
        ids = [one.id for one in dead.newest_first()] if fields.get("id") is None else [self._letter(fields).id]
        return {"dropped": sum(map(dead.drop, ids))}

    def _state_of(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        return status.service_state(self._service(fields), now)

    def _metrics(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        return metrics(self._service(fields), now)

    def _status(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        return status.broker_status(self._state, now)

    def _workers(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        return {"workers": status.workers(self._state, now)}

    def _explain(self, client: Client, number: int, fields: dict[str, Any], now: float) -> Answer:
        return {"story": status.story(self._state, str(fields.get("subject")), now)}


_OPERATIONS = {
    "find": Control._find,
    "stop": Control._stop,
    "open_session": Control._open_session,
    "close_session": Control._close_session,
    "drain": Control._drain,
    "restart": Control._restart,
    "scale": Control._scale,
    "why_scale": Control._why_scale,
    "terminate": Control._terminate,
    "dead_list": Control._dead_list,
    "dead_show": Control._dead_show,
    "dead_take": Control._dead_take,
    "dead_drop": Control._dead_drop,
    "state": Control._state_of,
    "metrics": Control._metrics,
    "status": Control._status,
    "workers": Control._workers,
    "explain": Control._explain,
}
