"""Whatever clients, workers and the kernel do, in whatever order: a state machine that hypothesis drives over the core's public door.

`peers.Bench` checks the broker's own books after every event (C6), `model.Model` is told of every dispatch and judges it by what was
promised. When the faults are over (`teardown`), everything that was asked has its one answer.

More of it: `pytest tests/core/test_machine.py --hypothesis-profile=search`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forge_broker.core.actions import Kill, KillPeer, Launch, Look
from forge_broker.core.events import LaunchEnded, ProcessGone, Stopped, Watched
from forge_broker.core.workers import WorkerState
from forge_contract.config import AutoscalingConfig, EndpointOptions
from forge_contract.errors import PoisonedRequest
from forge_contract.messages import (
    BYE,
    DROPPED,
    HEARTBEAT,
    OK,
    RAISED,
    REPLIES,
    SEQUENCE_MASK,
    STATES,
    UNREADY,
    UNTOUCHED,
    WARMED,
    request_id,
)
from tests.core.model import BATCH_SIZE, ELSEWHERE, MAX_ATTEMPTS, Asked, Model, Rank
from tests.core.peers import Bench, ClientPeer, spec

SETTLED_AFTER_S = 600.0
"""By then every call must have ended when nothing breaks any more; what waits longest is `no_replica_grace_s` (60 s) after a backoff."""

ENDPOINTS: dict[str, dict[str, Any]] = {
    "predict": {},
    "once": {"delivery": "at_most_once"},
    "slow": {"hang_timeout_s": 20.0},
    "load": {"replay_last": True},
    "batch": {"batch_size": BATCH_SIZE, "batch_timeout": 1.0},
}

EAGER = AutoscalingConfig(
    scale_up_queue_depth_threshold=2.0,
    max_queue_depth_emergency=4.0,
    scale_down_idle_time_threshold=3.0,
    min_time_between_scale_events=0.0,
    scale_up_cooldown=0.0,
    scale_down_cooldown=0.0,
    smoothing_s=0.0,
)
"""Replicas come and go with every few calls, down to none."""

pytestmark = pytest.mark.timeout(900)  # a search takes minutes, and so does hypothesis to shrink what it finds

few = st.integers(0, 5)
"""Which of those there are; the model takes it modulo their number, so that examples shrink."""


RARE: dict[str, Callable[[Any], Any]] = {
    "client_joins": lambda self: len(self.clients) < 3,
    "client_dies": lambda self: len(self.clients) > 1,
    "open_session": lambda self: self.serves() and len(self.opened) < 3,
    "close_session": lambda self: self.serves() and self.opened,
    "drain_replica": lambda self: self.serves(),
    "drain_worker": lambda self: self.workers,
    "restart": lambda self: self.serves(),
    "scale": lambda self: self.serves(),
    "launch_fails": lambda self: self.launches,
    "join_by_hand": lambda self: len(self.workers) < 8,
    "leave_unasked": lambda self: self.workers,
    "falls_ill": lambda self: any(worker.told_ready >= 0 for worker in self.workers),
    "checkpoint": lambda self: self.workers,
    "falls_silent": lambda self: any(not worker.here for worker in self.workers),
    "is_heard_again": lambda self: self.mute,
    "is_found_stopped": lambda self: self.looks,
}
"""What happens now and then, and when it can."""


class Machine(RuleBasedStateMachine):
    @initialize(
        replicas=st.integers(1, 3),
        room=st.integers(1, 3),
        procs=st.sampled_from([1, 1, 1, 2]),
        loss=st.sampled_from(["restart", "raise"]),
        queued=st.sampled_from([4, 1000]),
        scaling=st.sampled_from([None, None, EAGER]),
        spares=st.sampled_from([0, 0, 1]),
    )
    def begin(
        self,
        replicas: int,
        room: int,
        procs: int,
        loss: str,
        queued: int,
        scaling: AutoscalingConfig | None,
        spares: int,
    ) -> None:
        self.bench = Bench(max_workers=12, checkpoint_bytes=40, dead_letters=2)
        self.model = Model(self.bench)
        self.launches: list[int] = []
        self.doomed: list[Any] = []  # Kill and KillPeer that the kernel has not carried out yet
        self.looks: list[str] = []
        self.workers: list[Rank] = []  # alive
        self.dead: list[Rank] = []
        self.mute: set[str] = set()  # alive, on another host, and not heard
        self.clients: list[ClientPeer] = []
        self.buried = 0  # calls of clients that are gone
        self.controls: list[tuple[ClientPeer, int]] = []
        self.opened: dict[str, ClientPeer] = {}
        self.count = 0
        self.unnatural = False  # workers were taken for dead that the model knows to be alive
        self.owner = self.bench.client()
        plan = spec(
            endpoints=tuple(ENDPOINTS),
            exports=True,
            num_replicas=replicas,
            procs=procs,
            replica_max_concurrent_requests=room,
            mesh_concurrency=room,
            on_session_loss=loss,
            max_queued_requests=queued,
            max_attempts=MAX_ATTEMPTS,
            warm_spares=spares,
            min_replicas=0 if scaling else 1,
            max_replicas=4,
            autoscaling=scaling,
        )
        for one in plan["endpoints"]:
            one["options"] = EndpointOptions(**ENDPOINTS[one["name"]]).to_wire()
        self.controls.append((self.owner, self.owner.control("deploy", b"init", spec=plan)))
        self.clients.append(self.bench.client())
        self.look_around()
        for _ in range(replicas * procs):
            self.join(0)
        for worker in self.workers:
            worker.ready()
            worker.told_ready = 0

    # What the shell would do.

    def look_around(self) -> None:
        self.launches += [launch.launch for launch in self.bench.of(Launch)]
        self.doomed += [*self.bench.of(Kill), *self.bench.of(KillPeer)]
        self.looks += [look.name for look in self.bench.of(Look)]

    @invariant()
    def the_callers_see_what_was_promised(self) -> None:
        """Each has at most one reply, which is to its own call; and whoever is HEALTHY has the last weights (A11)."""
        if not hasattr(self, "bench"):
            return
        self.look_around()
        for asked in self.model.asked.values():
            result = asked.client.results.get(asked.key & SEQUENCE_MASK)
            if result is not None and result[0] in (OK, RAISED):
                assert result[1] == asked.payload, f"{asked!r} has the answer {result[1]!r}"
            if asked.deaths >= MAX_ATTEMPTS and asked.client in self.clients:
                assert result is not None, f"{asked!r} killed {MAX_ATTEMPTS} replicas, and nobody was told"
        for client in self.clients:
            assert all(sequence <= client.sequence for sequence in client.results), "a reply to what was not asked"
        self.model.weigh()
        service = self.bench.state.names.get("Echo")
        if self.model.weights is not None and service is not None and not self.model.fanouts:
            for worker in self.workers:
                known = self.bench.state.workers.get(worker.name)
                if known is not None and known.replica is not None and known.replica.healthy:
                    assert self.model.weights in worker.had, f"{worker.name} serves without {self.model.weights!r}"

    @invariant()
    def every_call_is_counted_once_by_how_it_ended(self) -> None:
        """X3: whoever answered it, and whether anybody still waited."""
        service = self.bench.state.names.get("Echo") if hasattr(self, "bench") else None
        if service is not None:
            made = self.buried + sum(client.sequence for client in self.clients)
            unanswered = sum(len(client.calls) for client in self.bench.state.clients.values())
            assert sum(sum(one.stats.outcomes.values()) for one in service.endpoints) == made - unanswered

    def serves(self) -> bool:
        return "Echo" in self.bench.state.names

    # Clients.

    def client_joins(self, which: int) -> None:
        self.clients.append(self.bench.client())

    def client_dies(self, which: int) -> None:
        if len(self.clients) > 1:
            client = self.clients.pop(which % len(self.clients))
            self.buried += client.sequence
            self.bench.handle(ProcessGone(client.name))
            self.controls = [one for one in self.controls if one[0] is not client]
            self.opened = {sid: owner for sid, owner in self.opened.items() if owner is not client}

    def endpoint_id(self, name: str) -> int:
        return next(one.id for one in self.bench.service().endpoints if one.name == name)

    def ask(self, client: ClientPeer, name: str, count: int, session: str | None, **columns: Any) -> None:
        payloads: list[bytes] = []
        for _ in range(count):
            self.count += 1
            payload = f"call {self.count}".encode()
            key = request_id(client.id, client.sequence + 1 + len(payloads))
            options = ENDPOINTS[name]
            once, hangs = "delivery" in options, "hang_timeout_s" in options
            asked = Asked(payload, client, key, once=once, hangs=hangs, session=session)
            self.model.asked[payload] = asked
            if session is not None:
                self.model.of_session.setdefault(session, []).append(asked)
                columns["session"] = session
            payloads.append(payload)
        client.call(self.endpoint_id(name), *payloads, **columns)

    @precondition(serves)
    @rule(
        who=few,
        name=st.sampled_from(["predict", "predict", *ENDPOINTS]),
        count=st.integers(1, 4),
        priority=st.sampled_from([None, None, 1, -1]),
        timeout=st.sampled_from([None, None, 0.5, 15.0]),
    )
    def call(self, who: int, name: str, count: int, priority: int | None, timeout: float | None) -> None:
        columns = {"priority": priority, "timeout": timeout}
        given = {column: value for column, value in columns.items() if value is not None}
        self.ask(self.clients[who % len(self.clients)], name, count, None, **given)

    @precondition(serves)
    @rule(
        which=few,
        name=st.sampled_from(["predict", "once", "slow", "batch"]),
        count=st.integers(1, 3),
        timeout=st.sampled_from([None, None, 5.0]),
    )
    def call_in_session(self, which: int, name: str, count: int, timeout: float | None) -> None:
        if which >= len(self.opened):
            self.open_session(which)
        sid = sorted(self.opened)[which % len(self.opened)]
        given = {} if timeout is None else {"timeout": timeout}
        self.ask(self.opened[sid], name, count, sid, **given)

    @precondition(serves)
    @rule(who=few, name=st.sampled_from(["load", "load", "predict"]), timeout=st.sampled_from([None, 8.0]))
    def fanout(self, who: int, name: str, timeout: float | None) -> None:
        client = self.clients[who % len(self.clients)]
        self.count += 1
        payload = f"fan {self.count}".encode()
        if name == "load":
            self.model.fanouts[client, client.sequence + 1] = payload
        client.fanout(self.endpoint_id(name), payload, **({} if timeout is None else {"timeout": timeout}))

    @rule(who=few, back=few)
    def cancel(self, who: int, back: int) -> None:
        client = self.clients[who % len(self.clients)]
        if client.sequence:
            client.cancel(max(1, client.sequence - back))

    def open_session(self, which: int) -> None:
        client = self.clients[which % len(self.clients)]
        if len(self.opened) < 3:
            self.count += 1
            sid = f"session {self.count}"
            self.opened[sid] = client
            self.controls.append((client, client.control("open_session", service="Echo", session=sid, hints={})))

    def close_session(self, which: int) -> None:
        sid = sorted(self.opened)[which % len(self.opened)]
        client = self.opened.pop(sid)
        self.controls.append((client, client.control("close_session", service="Echo", session=sid)))

    # Operators.

    def drain_replica(self, which: int) -> None:
        replicas = sorted(self.bench.service().replicas) or [0]
        target = f"Echo/{replicas[which % len(replicas)]}"
        self.controls.append((self.owner, self.owner.control("drain", target=target)))

    def drain_worker(self, which: int) -> None:
        worker = self.workers[which % len(self.workers)]
        if worker.here:  # of one elsewhere that is silent nobody can tell when it is gone
            self.controls.append((self.owner, self.owner.control("drain", target=worker.name)))

    def restart(self, which: int) -> None:
        self.controls.append((self.owner, self.owner.control("restart", service="Echo")))

    def scale(self, which: int) -> None:
        fields: dict[str, Any] = {"replicas": which, "wait": which % 2 == 0}  # what cannot be is refused
        self.controls.append((self.owner, self.owner.control("scale", service="Echo", **fields)))

    # Workers.

    def join(self, which: int) -> None:
        launch = self.launches.pop(which % len(self.launches))
        self.workers.append(Rank(self.model, {"launch": launch}))

    def launch_fails(self, which: int) -> None:
        launch = self.launches.pop(which % len(self.launches))
        self.bench.handle(LaunchEnded(launch, "could not be started: no room", []))

    def join_by_hand(self, which: int) -> None:
        here = which % 2 == 0
        worker = Rank(self.model, {} if here else {"host": ELSEWHERE})
        self.workers.append(worker)
        if here:
            self.bench.handle(Watched(worker.name))

    @rule(seconds=st.sampled_from([0.0, 2.0, 40.0]), steps=st.integers(1, 3))
    def start(self, seconds: float, steps: int) -> None:
        """What the broker launched says hello, and who is assigned gets ready, or half of it."""
        self.time_passes(seconds)
        self.look_around()
        if steps != 2:
            while self.launches:
                self.join(0)
                self.look_around()
        if steps != 1:
            for worker in list(self.workers):
                self.say_warmed(worker)
                self.say_ready(worker)

    def say_warmed(self, worker: Rank) -> None:
        if worker.warming:
            worker.warming = False
            worker.say([WARMED])

    def say_ready(self, worker: Rank) -> None:
        if worker.assigned and worker.told_ready < len(worker.replays) and not worker.stopping:
            worker.had |= set(worker.replays)
            worker.told_ready = len(worker.replays)
            worker.ready(worker.told_ready)

    @precondition(lambda self: any(worker.calls for worker in self.workers))
    @rule(which=few, at=few, count=st.integers(1, 4), status=st.sampled_from([OK, OK, OK, RAISED, DROPPED]))
    def reply(self, which: int, at: int, count: int, status: int) -> None:
        busy = [worker for worker in self.workers if worker.calls]
        worker = busy[which % len(busy)]
        for _ in range(min(count, len(worker.calls))):
            worker.end(at % len(worker.calls), status)

    @precondition(lambda self: any(worker.stopping for worker in self.workers))
    @rule(which=few, ends=st.integers(0, 3), exports=st.booleans())
    def leave(self, which: int, ends: int, exports: bool) -> None:
        """One that is told to stop gives back what it has not started."""
        told = [worker for worker in self.workers if worker.stopping]
        self.depart(told[which % len(told)], ends, exports)

    def leave_unasked(self, which: int) -> None:
        """Its supervisor was told to end."""
        self.depart(self.workers[which % len(self.workers)], which, True)

    def depart(self, worker: Rank, ends: int, exports: bool) -> None:
        for _ in range(min(ends, len(worker.calls))):
            worker.end(0, OK)
        while worker.calls:
            worker.end(0, UNTOUCHED)
        if exports:
            self.export(worker)
        worker.say([BYE, "told to stop"])
        self.process_ends(worker)

    @precondition(lambda self: self.workers)
    @rule(which=few)
    def die(self, which: int) -> None:
        mortal = [worker for worker in self.workers if worker.calls] or self.workers
        worker = mortal[which % len(mortal)]
        known = self.bench.state.workers.get(worker.name)
        self.unnatural |= not worker.here  # the broker learns of it by its silence, later
        if worker.here and known is not None and known.state is WorkerState.READY and known.replica.healthy:
            for request in self.bench.state.ledger.of(known.replica):
                asked = self.model.asked.get(bytes(request.payload))
                if asked is not None and self.model.is_open(asked):
                    asked.deaths += 1
        self.process_ends(worker)

    @precondition(lambda self: self.workers)
    @rule(which=few)
    def die_and_come_back(self, which: int) -> None:
        """Once more, for those calls that are in flight each time."""
        self.die(which)
        self.start(40.0, 3)

    def process_ends(self, worker: Rank) -> None:
        self.workers.remove(worker)
        self.mute.discard(worker.name)
        self.dead.append(worker)
        if worker.launch:
            worker.die()
        elif worker.here:
            self.bench.handle(ProcessGone(worker.name))

    def falls_ill(self, which: int) -> None:
        serving = [worker for worker in self.workers if worker.told_ready >= 0]
        serving[which % len(serving)].say(
            [UNREADY, ["ReplicaLost", {"replica": "Echo", "why": "health() is False"}], 0]
        )

    def checkpoint(self, which: int) -> None:
        self.export(self.workers[which % len(self.workers)])

    def export(self, worker: Rank) -> None:
        """The states of the sessions that are here, as the worker knows them: those of which it has run a call."""
        known = self.bench.state.workers.get(worker.name)
        if known is None or known.replica is None:
            return
        states = {sid: b"state" for sid, idx in known.replica.service.pins.items() if idx == known.replica.idx}
        if states:
            for rank in self.workers:  # of a mesh, all ranks are one replica, and the state is what rank 0 says
                other = self.bench.state.workers.get(rank.name)
                if other is not None and other.replica is known.replica:
                    rank.knows |= states.keys()
            worker.say([STATES, list(states), [5] * len(states)], packed=b"state" * len(states))

    @precondition(lambda self: self.dead)
    @rule(which=few, lie=st.sampled_from(["late", "epoch", "attempt", "unknown"]))
    def zombie(self, which: int, lie: str) -> None:
        """A reply from who is thought dead, or that is not the current one: nobody gets it (W3)."""
        live = [worker for worker in self.workers if worker.calls]
        if lie == "late" or not live:
            worker = self.dead[which % len(self.dead)]
            held = worker.calls[:1] or [(request_id(self.clients[0].id, max(1, self.clients[0].sequence)), 1, b"")]
        else:
            worker = live[which % len(live)]
            held = worker.calls[:1]
        ((key, attempt, _),) = held
        epoch = worker.replica_epoch - (lie == "epoch")
        attempt += lie == "attempt"
        key += (1 << 20) * (lie == "unknown")
        worker.say([REPLIES, epoch, [key], [attempt], [OK], [6]], packed=b"forged")

    def falls_silent(self, which: int) -> None:
        far = [worker for worker in self.workers if not worker.here]
        if far:
            self.mute.add(far[which % len(far)].name)
            self.unnatural = True

    def is_heard_again(self, which: int) -> None:
        quiet = [worker for worker in self.workers if worker.name in self.mute]
        if quiet:
            worker = quiet[which % len(quiet)]
            self.mute.discard(worker.name)
            for at in range(len(worker.calls) - 1, -1, -1):
                worker.end(at, OK)
            worker.whisper([HEARTBEAT, {}])

    # The kernel and the clock.

    @precondition(lambda self: self.doomed)
    @rule()
    def the_kernel_obeys(self) -> None:
        self.look_around()
        doomed, self.doomed = self.doomed, []
        for kill in doomed:
            by_launch = isinstance(kill, Kill)
            for worker in list(self.workers):
                if (worker.launch == kill.launch) if by_launch else (worker.name == kill.name):
                    self.process_ends(worker)
            if by_launch and kill.launch in self.launches:
                self.launches.remove(kill.launch)
                self.bench.handle(LaunchEnded(kill.launch, "signal SIGKILL", []))

    def is_found_stopped(self, which: int) -> None:
        self.bench.handle(Stopped(self.looks.pop()))
        self.unnatural = True

    @rule(seconds=st.sampled_from([0.05, 1.0, 4.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        until = self.bench.now + seconds
        while self.bench.now < until:
            self.bench.advance(min(2.0, until - self.bench.now))
            for worker in self.workers:
                if not worker.here and worker.name not in self.mute:
                    worker.whisper([HEARTBEAT, {}])

    # What is rarer than calls, replies and deaths.

    @rule(what=st.sampled_from(sorted(RARE)), which=few)
    def something_else(self, what: str, which: int) -> None:
        if RARE[what](self):
            getattr(self, what)(which)

    # The end.

    def teardown(self) -> None:
        """Nothing breaks any more: workers start, run what they get and leave when they are told to. Then nobody is left waiting."""
        if not hasattr(self, "bench"):
            return
        until = self.bench.now + SETTLED_AFTER_S
        self.mute.clear()
        while self.unanswered() and self.bench.now < until:
            self.look_around()
            while self.launches:
                self.join(0)
                self.look_around()
            self.the_kernel_obeys()
            for worker in list(self.workers):
                if worker.stopping:
                    self.depart(worker, 100, True)
                    continue
                self.say_warmed(worker)
                self.say_ready(worker)
                while worker.calls:
                    worker.end(0, OK)
            self.time_passes(1.0)
            self.the_callers_see_what_was_promised()
        assert not self.unanswered(), f"after {SETTLED_AFTER_S} s without a fault {self.unanswered()} wait still"
        for asked in self.model.asked.values():
            status = asked.client.results.get(asked.key & SEQUENCE_MASK)
            if status is not None and status[0] not in (OK, RAISED):
                error = asked.client.error(asked.key & SEQUENCE_MASK)
                innocent = asked.deaths < MAX_ATTEMPTS and not asked.suspect and not self.unnatural
                assert not (isinstance(error, PoisonedRequest) and innocent), f"{asked!r} has killed nobody"

    def unanswered(self) -> list[str]:
        """Calls and controls of the living that have no answer."""
        waiting = [
            f"{client.name} call {sequence}"
            for client in self.clients
            for sequence in range(1, client.sequence + 1)
            if sequence not in client.results and sequence not in client.parts
        ]
        return waiting + [f"{client.name} control {n}" for client, n in self.controls if n not in client.answers]


EXAMPLES = (
    100 if settings().derandomize else 2_000
)  # the same ones at every run, or as many others as a search is worth

Machine.TestCase.settings = settings(stateful_step_count=40, max_examples=EXAMPLES)
test_no_order_of_events_loses_or_doubles_an_answer = Machine.TestCase
