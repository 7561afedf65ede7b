"""Calls of one envelope that are accepted, and held, as one (C2): a `requests.Slice` for each way that some of them go.

`intake` asks us first, and accepts by itself what we leave; `dispatch` carries our slices over, at once or out of the queue where they
wait. There is one path: whatever a slice's calls cannot share, a deadline, say, makes them Requests from the start.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

from forge_broker.core.clients import Client
from forge_broker.core.dispatch import Dispatch
from forge_broker.core.replicas import Replica
from forge_broker.core.requests import Slice
from forge_broker.core.services import Endpoint, Service
from forge_broker.core.state import State
from forge_contract.framing import Payloads
from forge_contract.messages import DISPATCH, request_id, spread

KEPT_TOGETHER_FROM: Final = 8  # calls of an envelope; fewer are dealt evenly, whatever they cost

_SESSION = {"session"}
_SHAPE = {"shape"}


class Slices:
    def __init__(self, state: State, dispatch: Dispatch) -> None:
        self._state = state
        self._dispatch = dispatch

    def may_hold(self, endpoint: Endpoint, columns: dict[str, Any]) -> bool:
        """Whether `accept` may hold any calls with these columns: they have nothing but arguments, and there is a share for each replica
        rather than a choice for each call; or nothing but their sessions."""
        batcher = endpoint.batcher
        if columns.keys() == _SESSION:
            return batcher is None
        if endpoint.queue.deal is None or endpoint.service.config.world > 1:
            return False
        if batcher is None:
            return not columns
        # In a lane calls wait one by one; so these are the ones that need not wait for company.
        return (
            (not columns or (columns.keys() == _SHAPE and type(columns["shape"]) is int))
            and not batcher.length
            and batcher.max_weight >= batcher.size
            and self._leave_at_once(endpoint)
        )

    def accept(
        self,
        client: Client,
        endpoint: Endpoint,
        sequences: list[int],
        sizes: list[int],
        packed: bytes,
        columns: dict[str, Any],
        now: float,
    ) -> int:
        """Accept new calls with small arguments, `packed` side by side, for which `may_hold` holds: how many, from the first on."""
        base = request_id(client.id, 0)
        ids = [base + sequence for sequence in sequences]
        if "session" in columns:
            at = self._to_their_sessions(client, endpoint, ids, sizes, packed, columns["session"], now)
        else:
            at = 0
            if self._leave_at_once(endpoint):
                at = self._share_out(client, endpoint, ids, sizes, packed, columns.get("shape") or 0, now)
            limit = endpoint.service.config.max_queued_requests
            if at < len(ids) and endpoint.batcher is None and endpoint.queue.length + len(ids) - at <= limit:
                self._wait(client, endpoint, ids[at:], sizes[at:], packed[sum(sizes[:at]) :], now)
                at = len(ids)
        held = len(packed) if at == len(ids) else sum(sizes[:at])
        client.accepted += at
        client.held_bytes += held
        self._state.held_bytes += held
        return at

    def _leave_at_once(self, endpoint: Endpoint) -> bool:
        """Whether nobody waits before new calls of this endpoint, and there is room."""
        service = endpoint.service
        return bool(not service.ready and not endpoint.queue.length and service.pool.roomy)

    def _share_out(
        self,
        client: Client,
        endpoint: Endpoint,
        ids: list[int],
        sizes: list[int],
        packed: bytes,
        shape: int,
        now: float,
    ) -> int:
        """Dispatch these, from the first on while somebody has room, a slice to each replica, or to each batch that is full: how many."""
        batcher = endpoint.batcher
        if batcher is None and (replica := self._on_its_way(endpoint, len(ids))) is not None:
            self._dispatch.slice(Slice(ids, sizes, packed, client, endpoint, now), replica, now)
            return len(ids)
        at = start = 0
        deal = endpoint.queue.deal
        assert deal is not None
        units, least = (len(ids) if batcher is None else len(ids) // batcher.size), 1
        if batcher is None and units >= KEPT_TOGETHER_FROM:
            least = int(endpoint.share)
        for replica, count in deal(endpoint.service.pool, units, least):
            for size in [count] if batcher is None else [batcher.size] * count:
                end = at + size
                share = sizes[at:end]
                stop = start + sum(share)
                one = Slice(ids[at:end], share, packed[start:stop], client, endpoint, now)
                self._dispatch.slice(one, replica, now, shape=None if batcher is None else shape)
                at, start = end, stop
            endpoint.last = replica
            if batcher is not None:
                batcher.stats.left("size", batcher.size, 0.0, count)
        return at

    def _on_its_way(self, endpoint: Endpoint, count: int) -> Replica | None:
        """Where the last calls of this endpoint go, that came from others in this turn, if so many more are not yet worth an envelope of
        their own."""
        replica: Replica | None = endpoint.last
        if replica is None or replica.free < count:
            return None
        group = replica.ranks[0].group
        if group is None or group[0] != DISPATCH or group[2] != endpoint.method:
            return None
        return replica if len(group[4]) + count <= endpoint.share else None

    def _wait(
        self, client: Client, endpoint: Endpoint, ids: list[int], sizes: list[int], packed: bytes, now: float
    ) -> None:
        one = Slice(ids, sizes, packed, client, endpoint, now)
        client.calls.update(dict.fromkeys(ids, one))
        endpoint.queue.push_slice(one)
        endpoint.service.wake(endpoint.queue)
        self._dispatch.pump(endpoint.service, now)

    def _to_their_sessions(
        self,
        client: Client,
        endpoint: Endpoint,
        ids: list[int],
        sizes: list[int],
        packed: bytes,
        sessions: list[str | None] | str,
        now: float,
    ) -> int:
        """Dispatch calls of sessions that live on replicas with room for all of them, behind nobody: a slice to each replica. All, or none
        where something has to be decided for one of them: it is new, lost, or kept for a suspect; what its replica should take has to
        wait; or its calls run one at a time (S3)."""
        service: Service = endpoint.service
        if service.exports or service.ready or service.unpinned.length or service.suspects.length:
            return 0
        if service.config.world > 1:
            return 0
        sids: list[Any] = spread(sessions, len(ids))
        shares: defaultdict[int | None, list[int]] = defaultdict(list)  # replica → places in the columns
        for at, home in enumerate(map(service.pins.get, sids)):
            shares[home].append(at)
        if None in shares:
            return 0
        replicas = [service.replicas[idx] for idx in shares if idx is not None]
        for replica, places in zip(replicas, shares.values(), strict=True):
            if replica.parked.length or len(places) > replica.free:
                return 0
        pieces: list[Any] = Payloads(packed, ()).take_all(sizes)
        for replica, places in zip(replicas, shares.values(), strict=True):
            share = [sizes[at] for at in places]
            theirs = b"".join([pieces[at] for at in places])
            one = Slice([ids[at] for at in places], share, theirs, client, endpoint, now)
            one.sessions = [sids[at] for at in places]
            self._dispatch.slice(one, replica, now)
        return len(ids)
