"""Replies from workers: each is taken out of the ledger and answered, or refused; the freed room is given away.

The way back of the hot path: a run of plain replies to calls of one Slice keeps the books once for all of them, everything else goes
one by one. What becomes of calls that were given back untouched is for `returns` to say.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from forge_broker.core.answers import ANSWERED, Answers, Run, packed
from forge_broker.core.clients import Client
from forge_broker.core.columns import read_replies
from forge_broker.core.deadlines import Kind
from forge_broker.core.dispatch import Dispatch
from forge_broker.core.latency import add
from forge_broker.core.replicas import LEAVING, Replica
from forge_broker.core.requests import Request, Slice
from forge_broker.core.returns import Returns
from forge_broker.core.services import Service
from forge_broker.core.state import State
from forge_broker.core.workers import Worker
from forge_contract.errors import CallCancelled
from forge_contract.framing import Payload, Payloads
from forge_contract.messages import DROPPED, FAILED, OK, RETURNED, SEQUENCE_MASK, UNTOUCHED, show_request, spread

METRICS_EVERY_S = 1.0
SHARE_NS = 200_000  # of a worker's time: less work than that is not divided, for another envelope costs as much
METRICS_REPLICAS = 100  # with more of them, snapshots are rarer


class Ends:
    """What the replies of one envelope come to."""

    __slots__ = (
        "client",
        "count",
        "latency_s",
        "leaving",
        "replica",
        "room",
        "run",
        "share",
        "succeeded",
        "untouched",
        "worker",
    )

    def __init__(self, replica: Replica, worker: Worker, cost: int) -> None:
        self.replica = replica
        self.worker = worker
        self.share = SHARE_NS // cost if cost else 0  # so many of these calls are worth an envelope; 0: not known
        self.client: Client | None = None  # whose replies these are at present: nearly always all of them
        self.run: Run | None = None  # ordinary ends of calls of that client, that are no Slice's
        self.count = 0
        self.room = 0  # units of it that are free again
        self.succeeded = 0
        self.latency_s = 0.0  # all together
        self.untouched: list[Request] = []  # given back
        self.leaving = False  # because the worker leaves


class Replies:
    def __init__(self, state: State, answers: Answers, returns: Returns, dispatch: Dispatch) -> None:
        self._state = state
        self._answers = answers
        self._returns = returns
        self._dispatch = dispatch

    def take(self, worker: Worker, message: list[Any], payloads: Payloads, now: float) -> None:
        """REPLIES: each is taken out of the ledger or refused (fenced, W3), and the freed room is given away."""
        epoch, ids, attempts, statuses, sizes, cost = read_replies(message)
        replica: Replica | None = worker.replica
        if replica is None or epoch != replica.epoch:
            payloads.take_all(sizes)
            self._refuse(ids, attempts, worker, now)
            return
        ends = Ends(replica, worker, cost)
        plain = attempts == 1 and statuses == OK and bool(sizes) and min(sizes) >= 0
        # Its payloads before any of its replies: of a message that names more than has come, none counts.
        if plain:
            self._end_plain(ids, sizes, payloads.take_packed(sizes), ends, now)
        else:
            taken = payloads.take_all(sizes)
            self._end_each(ids, spread(attempts, len(ids)), spread(statuses, len(ids)), taken, ends, now)
        if ends.run is not None:
            self._answers.answer_run(ends.run, worker.trusted)
        self._make_room(ends, now)

    def _end_plain(self, ids: list[int], sizes: list[int], packed: bytes, ends: Ends, now: float) -> None:
        """Small results of first attempts: a run of each Slice, and those of calls that are held by themselves together."""
        held = self._state.ledger.held[ends.replica.key]
        found = set(map(held.get, ids))
        runs: list[tuple[Slice | None, int]]
        if len(found) == 1:  # nearly always
            (only,) = found
            runs = [(only if type(only) is Slice else None, len(ids))]
        else:
            holders = [one if type(one) is Slice else None for one in map(held.get, ids)]
            runs = [(one, sum(1 for _ in run)) for one, run in groupby(holders)]
        at = start = 0
        for one, count in runs:
            end = at + count
            share = sizes[at:end]
            stop = start + sum(share)
            results = packed[start:stop]
            if one is None or not self._end_slice(one, ids[at:end], share, results, ends, now):
                taken = Payloads(results, ()).take_all(share)
                self._end_each(ids[at:end], [1] * count, [OK] * count, taken, ends, now)
            at, start = end, stop

    def _end_slice(self, one: Slice, ids: list[int], sizes: list[int], packed: bytes, ends: Ends, now: float) -> bool:
        """Plain replies to calls of one slice; False: they are no longer, or not all, of it."""
        left = one.left
        wanted = set(ids)
        if len(wanted) < len(ids) or not wanted <= left.keys():
            return False
        client: Client = one.client
        calls, held = client.calls, one.held
        bytes_ = 0
        for key in ids:
            bytes_ += left.pop(key)
            del calls[key]
            del held[key]
        if one.sessions is not None:
            ends.replica.service.answered(one.sessions_of(ids), now)
        self._state.held_bytes -= bytes_
        client.held_bytes -= bytes_
        client.answered += len(ids)
        if client is not ends.client:
            self._next_client(ends, client)
        client.add_run([key & SEQUENCE_MASK for key in ids], OK, sizes, packed, ends.worker.trusted)
        self._state.deliver(client)
        count = len(ids)
        ran_s = now - one.started_at
        endpoint = one.endpoint
        endpoint.worth(ends.share)
        stats = endpoint.stats
        stats.outcomes["ok"] += count
        add(stats.latency, ends.replica.stats.latency, count, one.started_at - one.queued_at, ran_s, now)
        ends.count += count
        ends.succeeded += count
        ends.latency_s += (now - one.queued_at) * count
        ends.room += count if one.batch is None else one.batch.ended(count)
        return True

    def _end_each(
        self, ids: list[int], attempts: list[int], statuses: list[int], taken: list[Payload], ends: Ends, now: float
    ) -> None:
        """Replies, one by one."""
        state = self._state
        replica, worker = ends.replica, ends.worker
        held = state.ledger.held[replica.key]
        trusted = worker.trusted
        number = worker.channel.received  # of the envelope that this is in
        # Most calls of an envelope came, left and ended alike; those in a row are counted together, `first` standing for them.
        first: Request | None = None
        alike = ended = 0
        for key, attempt, status, payload in zip(ids, attempts, statuses, taken, strict=True):
            request = state.ledger.one(replica, key)
            if request is None or request.attempt != attempt:
                self._refuse([key], attempt, worker, now)
                continue
            if request.parts is not None:
                if request.rank not in (None, worker.rank):
                    state.ledger.fenced += 1
                    continue
                request.parts[worker.rank] = (status, payload, trusted)
                if len(request.parts) < (1 if request.rank is not None else len(replica.ranks)):
                    worker.unsettled.append((number, request, 0))
                    continue
                status = UNTOUCHED if any(one[0] == UNTOUCHED for one in request.parts.values()) else status  # noqa: PLW2901
            del held[key]
            ends.count += 1
            ends.room += 1 if request.batch is None else request.batch.ended(1)
            ends.latency_s += now - request.queued_at
            if request.session is not None:
                replica.service.answered([request.session], now)
            if request.answered:
                continue
            if status == OK:
                ends.succeeded += 1
            if status in (UNTOUCHED, RETURNED):
                ends.untouched.append(request)
                ends.leaving = ends.leaving or status == UNTOUCHED
            elif request.parts is None and request.gather is None and status != DROPPED:
                if request.client is not ends.client:
                    self._next_client(ends, request.client)
                run = ends.run
                if run is None:
                    run = ends.run = Run(request.client)
                del run.calls[key]
                run.bytes += request.size
                run.sequences.append(key & SEQUENCE_MASK)
                run.statuses.append(status)
                run.payloads.append(payload)
                if (
                    first is not None
                    and request.started_at == first.started_at
                    and request.queued_at == first.queued_at
                    and status == ended
                    and request.endpoint is first.endpoint
                ):
                    alike += 1
                    continue
                if first is not None:
                    first.endpoint.stats.outcomes[ANSWERED[ended]] += alike
                    self._timed(first, replica, alike, now)
                first, ended, alike = request, status, 1
            else:
                if status != DROPPED:  # its outcome is counted by who answers it
                    self._timed(request, replica, 1, now)
                self.ended(request, replica, status, payload, trusted)
                worker.unsettled.append((number, request, 0))
        if first is not None:
            first.endpoint.stats.outcomes[ANSWERED[ended]] += alike
            self._timed(first, replica, alike, now)

    def _timed(self, one: Request, replica: Replica, count: int, now: float) -> None:
        """So many calls like this one have run until now."""
        waited_s, ran_s = one.started_at - one.queued_at, now - one.started_at
        add(one.endpoint.stats.latency, replica.stats.latency, count, waited_s, ran_s, now)

    def _next_client(self, ends: Ends, client: Client) -> None:
        """The replies from here on are another client's."""
        worker = ends.worker
        if ends.run is not None:
            self._answers.answer_run(ends.run, worker.trusted)
            ends.run = None
        ends.client = client
        worker.unsettled.append((worker.channel.received, client, client.channel.sent + 1))

    def _refuse(self, ids: list[int], attempts: int | list[int], worker: Worker, now: float) -> None:
        """Late replies: somebody else has the calls, or nobody any more (W3)."""
        self._state.ledger.fenced += len(ids)
        for key, attempt in zip(ids, spread(attempts, len(ids)), strict=True):
            self._state.story.tell(now, show_request(key), f"refused a reply of attempt {attempt} from {worker.name}")

    def _make_room(self, ends: Ends, now: float) -> None:
        """Calls have ended on a replica: count them, and give their room to who waits."""
        if not ends.count:
            return
        state, replica, untouched = self._state, ends.replica, ends.untouched
        failed = ends.count - ends.succeeded - len(untouched)
        replica.stats.ended(ends.succeeded, failed, ends.latency_s, now)
        service: Service = replica.service
        if replica.pool is None:
            replica.active -= ends.room
        elif ends.room:
            replica.pool.gave(replica, ends.room)
        replica.pace.ended += ends.room
        if untouched:
            if ends.leaving and replica.pool is not None:
                if service.cell is replica:
                    service.cell = None
                replica.pool.close(replica, LEAVING)  # its worker is leaving: what it got now would come back at once
            why = f"{replica.name} gave it back"
            self._returns.take_back(replica, untouched, why, now, lost=False, recalled=not ends.leaving)
        if service.watchers and not service.metrics_at:
            # A snapshot grows with the replicas: so many bytes a second at most, however many there are.
            service.metrics_at = now + METRICS_EVERY_S * max(1.0, len(service.replicas) / METRICS_REPLICAS)
            state.deadlines.add(service.metrics_at, Kind.METRICS, service.id)
        if replica.parked.length:
            service.wake(replica.parked)
        self._dispatch.pump(service, now)

    def ended(self, request: Request, replica: Replica, status: int, payload: Payload, trusted: bool) -> None:
        """All ranks that run this call have ended it: answer, or add the part to its fan-out."""
        parts = request.parts
        gather = request.gather
        if parts is None and gather is None:
            assert status == DROPPED  # `replies` answers the ordinary ones itself
            why = f"{replica.name} dropped it"
            self._answers.fail(request, CallCancelled(endpoint=request.endpoint.full_name, why=why))
            return
        service: Service = replica.service
        found = parts or {0: (status, payload, trusted)}
        if any(one[0] == DROPPED for one in found.values()):
            dropped = packed(CallCancelled(endpoint=request.endpoint.full_name, why=f"{replica.name} dropped it"))
            found = {rank: (FAILED, dropped, True) if one[0] == DROPPED else one for rank, one in found.items()}
        if gather is None and request.rank is not None:
            self._answers.answer(request, *found[request.rank])
            return
        if service.kind == "service" and service.config.return_first_rank_result:
            wrong = [rank for rank in sorted(found) if found[rank][0] != OK]
            found = {0: found[wrong[0]] if wrong else found[0]}
            if gather is None:
                self._answers.answer(request, *found[0])
                return
        points = {(replica.idx, rank): one for rank, one in found.items()}
        if gather is None:
            self._answers.answer_parts(request, points)
        else:
            self._answers.gathered(gather, replica.idx, points)
