"""The broker's core alone: what it computes for a call, what it keeps for one that waits and for a session, with no socket in between.

Peers are hand-made (`bare_peers`). Times are CPU times of this process around `Broker.handle` and `Broker.pack`; sizes are what this
process's resident memory grew by, so each is measured in a process of its own, as `targets` starts one for each row.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.bare_peers import BareClient, BareWorker, Core
from bench.effort import Effort, Figures
from forge_broker.core.actions import Action, Deliver, Send
from forge_contract.messages import PROBE

ENVELOPE: Final = 256  # calls: what an envelope holds at 512 outstanding on two replicas
BUILT_IN: Final = ("RoundRobinRouter", "LeastLoadedRouter", "PowerOfTwoRouter", "ConsistentHashRouter", "SessionRouter")
SESSIONS: Final = 1000  # calls of the routers that look at sessions come from so many
FEW, MANY = 2, 1000  # replicas
ENVELOPES: Final = 60  # in a run
LONE: Final = 1000  # envelopes of one call, in a run
QUEUED: Final = 100_000
MILLION: Final = 1_000_000
SESSION_ROUTERS: Final = ("ConsistentHashRouter", "SessionRouter")
ROOM: Final = 1024
NO_LIMIT: Final = 1 << 30


def settle_memory() -> None:
    """As `forge_broker/shell/serve.py` does at its start: what is there stays, and is not looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rounds(core: Core, client: BareClient, workers: Sequence[BareWorker], calls: Sequence[list[Any]]) -> float:
    """CPU seconds in the core for these envelopes, each answered before the next: in, out to the workers, back, out to the client.

    What the peers do in between (reading, writing their own) is not counted.
    """
    clock = time.process_time
    used = 0.0
    by_route = {worker.route: worker for worker in workers}
    for frames in calls:
        core.now += 0.001
        began = clock()
        sends = packed(core, core.handle(frames, client.route))
        used += clock() - began
        replies = []
        for send in sends:
            core.peers[send.route].hear(send.frames)
            if (worker := by_route.get(send.route)) is not None and worker.held:
                replies.append((worker, worker.replies()))
        began = clock()
        back: list[Action] = []
        for worker, answer in replies:
            back += core.handle(answer, worker.route)
        sends = packed(core, back)
        used += clock() - began
        for send in sends:
            core.peers[send.route].hear(send.frames)
        core.tick()  # acks and metrics: ten times a second at most, so no part of a call
    return used


def packed(core: Core, actions: Sequence[Action]) -> list[Send]:
    """What a turn of the broker ends with."""
    pack, now = core.broker.pack, core.now
    found = [pack(action.name, now) if type(action) is Deliver else action for action in actions]
    return [send for send in found if type(send) is Send]


def serving(
    replicas: int, router: str = "RoundRobinRouter", **config: Any
) -> tuple[Core, BareClient, int, list[BareWorker]]:
    core = Core(max_workers=max(replicas, 1))
    client = BareClient(core)
    config = {"replica_max_concurrent_requests": ROOM, **config}
    endpoint, workers = client.deploy(replicas, router, **config)
    return core, client, endpoint, workers


def cpu_per_call(effort: Effort) -> Figures:
    """Microseconds of the core for a stateless call, `ENVELOPE` of them in each envelope, 2 replicas."""
    envelopes = effort.of(ENVELOPES)
    core, client, endpoint, workers = serving(2)
    settle_memory()
    found = []
    for run in range(effort.runs + 1):
        used = rounds(core, client, workers, [client.calls(endpoint, ENVELOPE) for _ in range(envelopes)])
        if run:  # the first warms up
            found.append(used / (envelopes * ENVELOPE) * 1e6)
    if client.results != (effort.runs + 1) * envelopes * ENVELOPE:
        raise RuntimeError(f"{client.results} results")
    return {"us": found}


class Routed:
    """A service with so many replicas behind one router, and calls to it, one an envelope. Behind a router that looks at sessions each is
    of the next of `SESSIONS`, whose pins are taken away after each run: that of a pinned session needs no router."""

    def __init__(self, router: str, replicas: int) -> None:
        self.core, self.client, self.endpoint, self.workers = serving(replicas, router)
        self.sessions: list[str] = []
        if router in SESSION_ROUTERS:
            self.sessions = [f"{number:016x}" for number in range(SESSIONS)]
            service = self.core.broker.state.names["Echo"].id
            for session in self.sessions:
                self.client.ask("open_session", service=service, session=session, hints={})

    def cpu_s(self, count: int) -> float:
        client, endpoint = self.client, self.endpoint
        if not self.sessions:
            return rounds(self.core, client, self.workers, [client.calls(endpoint, 1) for _ in range(count)])
        service = self.core.broker.state.names["Echo"]
        used = 0.0
        for start in range(0, count, SESSIONS):
            some = self.sessions[: count - start]
            used += rounds(
                self.core, client, self.workers, [client.calls(endpoint, 1, session=session) for session in some]
            )
            for session in some:
                service.unpin(session)
        return used


def cost_of_replicas(effort: Effort) -> Figures:
    """By router, what the core computes for a call with `MANY` replicas as a multiple of that with `FEW`, in turns.

    One call an envelope, because many in one would go to as many workers, and what is compared is choosing, not sending.
    """
    lone = effort.of(LONE)
    found: Figures = {}
    for router in BUILT_IN:
        few, many = Routed(router, FEW), Routed(router, max(FEW, effort.of(MANY)))
        settle_memory()
        pairs = [(few.cpu_s(lone), many.cpu_s(lone)) for _ in range(effort.runs + 1)][1:]  # the first warms up
        found[router] = [of_many / of_few for of_few, of_many in pairs]
        found[f"{router}_us"] = [of_many / lone * 1e6 for _, of_many in pairs]
    return found


def queued_call(effort: Effort) -> Figures:
    """Bytes of a call that waits."""
    return {"bytes": [Queued(effort.of(QUEUED)).bytes_per_call]}


def million_queued(effort: Effort) -> Figures:
    """How long the broker is not to be spoken to while a million calls come, wait, and go on one by one."""
    queued = Queued(effort.of(MILLION))
    return {
        "worst_turn_ms": [queued.worst_ms],
        "status_ms": [queued.status_ms],
        "probe_ms": [queued.probe_ms],
        "bytes": [queued.bytes_per_call],
    }


def idle_sessions(effort: Effort) -> Figures:
    grown, status_ms = idle_sessions_bytes(effort.of(MILLION))
    return {"mb": [grown / 1e6], "status_ms": [status_ms]}


class Queued:
    """So many calls that wait, since no replica has room, and what the broker is like meanwhile."""

    def __init__(self, count: int) -> None:
        core, client, endpoint, (worker,) = serving(
            1, replica_max_concurrent_requests=1, dispatch_ahead_s=0.0, max_queued_requests=NO_LIMIT
        )
        settle_memory()
        client.say_frames(client.calls(endpoint, 1))
        before = resident_bytes()
        self.worst_ms = 0.0
        for at in range(0, count, ENVELOPE):
            self._timed(client.calls(endpoint, min(ENVELOPE, count - at)), client)
        self.bytes_per_call = (resident_bytes() - before) / count
        self.status_ms = self._timed(client.said(client.control("status")), client)
        acks = client.acks
        self.probe_ms = self._timed(client.unnumbered([PROBE]), client)
        if client.acks == acks:
            raise RuntimeError("a probe was not answered")
        for _ in range(ENVELOPE):
            self._timed(worker.replies(), worker)  # each lets one call go
        if client.results != ENVELOPE:
            raise RuntimeError(f"{client.results} results instead of {ENVELOPE}")
        queue = core.broker.state.endpoints[endpoint].queue
        if queue.length != count - ENVELOPE:
            raise RuntimeError(f"{queue!r} instead of {count - ENVELOPE}")

    def _timed(self, frames: list[Any], peer: BareClient | BareWorker) -> float:
        """Milliseconds of one turn of the broker's for an envelope."""
        core = peer.core
        core.now += 0.001
        began = time.perf_counter()
        sends = packed(core, core.handle(frames, peer.route))
        took = (time.perf_counter() - began) * 1e3
        self.worst_ms = max(self.worst_ms, took)
        for send in sends:
            core.peers[send.route].hear(send.frames)
        core.tick()
        return took


def idle_sessions_bytes(count: int) -> tuple[int, float]:
    """Resident memory that open sessions take which were used once and wait for more; and the milliseconds of a `status` meanwhile."""
    core, client, endpoint, workers = serving(2)
    service = core.broker.state.names["Echo"].id
    settle_memory()
    before = resident_bytes()
    for at in range(0, count, ENVELOPE):
        ids = [f"{number:016x}" for number in range(at, min(at + ENVELOPE, count))]
        client.say(*(client.control("open_session", service=service, session=one, hints={}) for one in ids))
        client.answers.clear()
        rounds(core, client, workers, [client.calls(endpoint, len(ids), session=ids)])
    grown = resident_bytes() - before
    if len(core.broker.state.names["Echo"].pins) != count:
        raise RuntimeError(f"{len(core.broker.state.names['Echo'].pins)} of {count} sessions are pinned")
    began = time.perf_counter()
    client.ask("status")
    return grown, (time.perf_counter() - began) * 1e3
