"""Calls that end before their replica has: cancelled, out of time, or left behind by their client (F5).

The caller is answered at once; what is queued leaves its queue, what runs is dropped, and its room comes back only when the replica
has really ended it, which is `dispatch`'s business. A replica is never harmed by its callers.
"""

from __future__ import annotations

from typing import Any

from forge_broker.core.answers import Answers
from forge_broker.core.clients import Client
from forge_broker.core.queues import Queue
from forge_broker.core.replicas import Replica
from forge_broker.core.requests import Gather, Request
from forge_broker.core.sessions import Sessions
from forge_broker.core.state import State
from forge_contract.errors import CallCancelled, CallTimeout, ForgeError, ProtocolError
from forge_contract.messages import request_id, show_request


class Endings:
    def __init__(self, state: State, answers: Answers, sessions: Sessions) -> None:
        self._state = state
        self._answers = answers
        self._sessions = sessions

    def cancel(self, client: Client, message: list[Any], now: float) -> None:
        """CANCEL: nobody waits for these any more."""
        if len(message) != 2 or not isinstance(message[1], list):
            raise ProtocolError("CANCEL is [18, seqs]")
        for sequence in message[1]:
            call = client.call(request_id(client.id, sequence)) if type(sequence) is int else None
            if call is not None:
                self.end_early(call, CallCancelled(endpoint=call.endpoint.full_name, why="its caller gave up"), now)

    def expire(self, key: int, now: float) -> None:
        """A call's time may be up; the entry stays in the heap when a call is answered, so look first."""
        client = self._state.clients.get(key >> 40)
        call = client.call(key) if client is not None else None
        if call is None or call.deadline is None or call.deadline > now:
            return
        queued = isinstance(call, Request) and isinstance(call.holder, Queue)
        self.end_early(
            call,
            CallTimeout(
                endpoint=call.endpoint.full_name,
                timeout_s=round(call.deadline - call.queued_at, 3),
                state="queued" if queued else "running",
            ),
            now,
        )

    def end_early(self, call: Request | Gather, error: ForgeError, now: float) -> None:
        """Answer now; what is queued leaves its queue, what runs is dropped and gives its room back when it has ended (F5)."""
        self._let_go_all(call, now)
        self._answers.fail(call, error)

    def _let_go_all(self, call: Request | Gather, now: float) -> None:
        if isinstance(call, Gather):
            for child in call.children.values():
                self._let_go(child, now)
            call.children.clear()
        else:
            self._let_go(call, now)

    def drop_client(self, client: Client, now: float) -> None:
        """The client is gone: nobody waits for any of its calls."""
        for call in client.open_calls():
            self._let_go_all(call, now)
            self._answers.settle(call, client, "abandoned")
        self._sessions.close_all(list(client.sessions), "its client is gone", now)

    def _let_go(self, request: Request, now: float) -> None:
        if isinstance(request.holder, Queue):
            request.endpoint.service.unqueue(request)
        elif isinstance(request.holder, Replica):
            request.answered = True
            replica = request.holder
            self._state.story.tell(now, show_request(request.id), f"dropped while it ran on {replica.name}")
            for worker in replica.ranks_for(request.rank):
                worker.add_drop(request.id)
                self._state.deliver(worker)
