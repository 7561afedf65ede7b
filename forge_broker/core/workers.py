"""A worker as the broker sees it: one process that may hold one rank, its life as a table, and the calls on their way to it."""

from __future__ import annotations

import enum
from collections import deque
from typing import Any, Final

from forge_broker.core.links import Link
from forge_broker.core.requests import Request, Slice
from forge_contract.messages import DISPATCH, DROP, FORGET, SETTLED


class WorkerState(enum.Enum):
    STARTING = "STARTING"  # launched, no hello yet: it is a `Launch` in `state` until then
    IDLE = "IDLE"
    WARMING = "WARMING"  # a spare that imports its class
    WARM = "WARM"  # a spare that has
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    GONE = "GONE"
    LOST = "LOST"  # silent on another host: fenced until it is heard from


class WorkerMove(enum.Enum):
    HELLO = "says hello"
    WARM = "is to be a spare"
    WARMED = "has imported the class"
    ASSIGN = "becomes a rank"
    READY = "has run setup"
    STOP = "is told to stop"
    SILENT = "is silent for too long"
    END = "has ended"


MOVES: Final[dict[WorkerState, dict[WorkerMove, WorkerState]]] = {
    WorkerState.STARTING: {WorkerMove.HELLO: WorkerState.IDLE, WorkerMove.END: WorkerState.GONE},
    WorkerState.IDLE: {
        WorkerMove.WARM: WorkerState.WARMING,
        WorkerMove.ASSIGN: WorkerState.LOADING,
        WorkerMove.STOP: WorkerState.DRAINING,
        WorkerMove.SILENT: WorkerState.LOST,
        WorkerMove.END: WorkerState.GONE,
    },
    WorkerState.WARMING: {
        WorkerMove.WARMED: WorkerState.WARM,
        WorkerMove.ASSIGN: WorkerState.LOADING,  # it goes on importing, which the replica would have to do anyhow
        WorkerMove.STOP: WorkerState.DRAINING,
        WorkerMove.SILENT: WorkerState.LOST,
        WorkerMove.END: WorkerState.GONE,
    },
    WorkerState.WARM: {
        WorkerMove.ASSIGN: WorkerState.LOADING,
        WorkerMove.STOP: WorkerState.DRAINING,
        WorkerMove.SILENT: WorkerState.LOST,
        WorkerMove.END: WorkerState.GONE,
    },
    WorkerState.LOADING: {
        WorkerMove.WARMED: WorkerState.LOADING,  # it was assigned while it imported
        WorkerMove.READY: WorkerState.READY,
        WorkerMove.STOP: WorkerState.DRAINING,
        WorkerMove.SILENT: WorkerState.LOST,
        WorkerMove.END: WorkerState.GONE,
    },
    WorkerState.READY: {
        WorkerMove.READY: WorkerState.READY,  # it has run another replay
        WorkerMove.STOP: WorkerState.DRAINING,
        WorkerMove.SILENT: WorkerState.LOST,
        WorkerMove.END: WorkerState.GONE,
    },
    WorkerState.DRAINING: {
        WorkerMove.WARMED: WorkerState.DRAINING,  # import or setup ended after the STOP was sent
        WorkerMove.READY: WorkerState.DRAINING,
        WorkerMove.STOP: WorkerState.DRAINING,
        WorkerMove.SILENT: WorkerState.LOST,
        WorkerMove.END: WorkerState.GONE,
    },
    WorkerState.LOST: {WorkerMove.STOP: WorkerState.DRAINING, WorkerMove.END: WorkerState.GONE},
    WorkerState.GONE: {},
}

UNSETTLED_AT_MOST: Final = 1 << 16
_TIMEOUT, _SESSION, _CLIENT, _BATCHES = 1, 2, 4, 8  # which columns a DISPATCH has


class Worker(Link):
    role = "worker"
    constant_field = 5  # attempts

    __slots__ = (
        "_flags",
        "gpus",
        "host",
        "launch",
        "played",
        "rank",
        "replays",
        "replica",
        "settled",
        "state",
        "unsettled",
    )

    def __init__(self, *link: Any) -> None:
        super().__init__(*link)
        self.host: str = self.hello["host"]
        self.gpus: tuple[str, ...] = tuple(self.hello["gpus"])
        self.launch: int = self.hello["launch"]
        self.state = WorkerState.STARTING
        self.replica: Any = None  # replicas.Replica
        self.rank = 0
        self.replays = 0  # sent to it (A11)
        self.played = 0  # of them it has run
        # Envelopes of it whose replies are not known to have reached their clients: (number, client, envelope to that client);
        # of a call that another rank still runs, (number, that request, 0). It keeps those replies (F10).
        # Bounded: behind a client that does not read, the oldest are forgotten, as the worker forgets what is too much to keep.
        self.unsettled: deque[tuple[int, Any, int]] = deque(maxlen=UNSETTLED_AT_MOST)
        self.settled = 0  # what it was told
        self._flags = 0  # the columns of the DISPATCH that is open

    def __repr__(self) -> str:
        doing = f" {self.replica.name}.{self.rank}" if self.replica is not None else ""
        return f"<Worker {self.name} {self.state.value}{doing}>"

    def move(self, move: WorkerMove) -> None:
        after = MOVES[self.state].get(move)
        if after is None:
            raise RuntimeError(f"{self!r} cannot take the move {move.value!r}")
        self.state = after

    def settle(self) -> None:
        """Tell it what it need not keep any more, now that there is something to tell anyway."""
        settled = 0
        unsettled = self.unsettled
        while unsettled:
            number, owed, envelope = unsettled[0]
            if isinstance(owed, Request):
                client = owed.client
                if owed.id in client.calls and not client.gone:
                    break
                # In the envelope that is being filled, or one before it: to a client that is quiet there may be no other.
                unsettled[0] = (number, client, client.channel.sent + (1 if client.outbox else 0))
                continue
            if envelope > owed.channel.acked and not owed.gone:
                break
            settled = number
            unsettled.popleft()
        if settled > self.settled and not (unsettled and unsettled[0][0] == settled):
            self.settled = settled
            self.post([SETTLED, settled])

    def add_dispatch(self, requests: list[Request], endpoint: Any, now: float) -> None:
        """Append to the open column group; a new one when method, trust or the set of columns differ."""
        deadlines = [request.deadline for request in requests]
        sessions = [request.session for request in requests]
        first = requests[0]
        timed, bound = None not in deadlines, None not in sessions
        if len(requests) > 1 and (
            (not timed and any(one is not None for one in deadlines))
            or (not bound and any(sessions))
            or any(request.trusted is not first.trusted for request in requests)
        ):
            for request in requests:  # not of one kind
                self.add_dispatch([request], endpoint, now)
            return
        flags = (_CLIENT if endpoint.ordered else 0) | (_TIMEOUT if timed else 0) | (_SESSION if bound else 0)
        group = self.group
        if group is None or group[2] != endpoint.method or group[3] is not first.trusted or self._flags != flags:
            group = self._open_dispatch(first.trusted, endpoint, flags)
        group[4] += [request.id for request in requests]
        group[5] += [request.attempt for request in requests]
        group[6] += self.outbox.attach_all([request.payload for request in requests])
        if timed:
            group[7]["timeout"] += [deadline - now for deadline in deadlines if deadline is not None]
        if bound:
            group[7]["session"] += sessions

    def add_batch(self, requests: list[Request], endpoint: Any) -> None:
        """`add_dispatch` for calls that run as one batch (B2), all with the same trust."""
        first = requests[0]
        sessions = [request.session for request in requests]
        flags = _BATCHES | (_SESSION if any(sessions) else 0)
        group = self.group
        if group is None or group[2] != endpoint.method or group[3] is not first.trusted or self._flags != flags:
            group = self._open_dispatch(first.trusted, endpoint, flags)
        if flags & _SESSION:
            group[7]["session"] += sessions
        group[4] += [request.id for request in requests]
        group[5] += [request.attempt for request in requests]
        group[6] += self.outbox.attach_all([request.payload for request in requests])
        group[7]["batches"].append(len(requests))

    def add_slice(self, one: Slice) -> None:
        """`add_dispatch`, or `add_batch`, for calls on their first attempt with nothing but small arguments, which are side by side."""
        ids, sizes, packed = one.columns()
        endpoint, trusted, batch, sessions = one.endpoint, one.client.trusted, one.batch is not None, one.sessions
        flags = (_CLIENT if endpoint.ordered else 0) | (_BATCHES if batch else 0) | (_SESSION if sessions else 0)
        group = self.group
        if group is None or group[2] != endpoint.method or group[3] is not trusted or self._flags != flags:
            group = self._open_dispatch(trusted, endpoint, flags)
        group[4] += ids
        group[5] += [1] * len(ids)
        group[6] += sizes
        if batch:
            group[7]["batches"].append(len(ids))
        if sessions:
            group[7]["session"] += sessions
        self.outbox.attach_packed(packed)

    def _open_dispatch(self, trusted: bool, endpoint: Any, flags: int) -> list[Any]:
        columns: dict[str, Any] = {}
        if flags & _TIMEOUT:
            columns["timeout"] = []
        if flags & _SESSION:
            columns["session"] = []
        if flags & _CLIENT:
            columns["client"] = True
        if flags & _BATCHES:
            columns["batches"] = []
        self._flags = flags
        return self.open_group([DISPATCH, self.replica.epoch, endpoint.method, trusted, [], [], [], columns])

    def add_forget(self, session: str) -> None:
        """This session has ended."""
        self._add_to_list(FORGET, session)

    def add_drop(self, request: int) -> None:
        """Cancel this one."""
        self._add_to_list(DROP, request)

    def _add_to_list(self, kind: int, item: Any) -> None:
        """Many of a kind in a row share a message."""
        body = self.outbox.body
        if self.group is None and body and body[-1][0] == kind:
            body[-1][1].append(item)
        else:
            self.post([kind, [item]])
