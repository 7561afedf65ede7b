"""A storm: every kind of call, while everything breaks that can (§7). Seeded, so that one that fails replays to the same event.

    python -m tests.face_to_face.storm --seeds 1000 [--first 0] [--jobs 2]      # what `make storm` runs
    Storm(4711).run()

The broker's invariants are checked after every event. Once the faults are over, every call has had exactly one reply; a session's
answers count its calls, whatever its replica died of; what is delivered at most once started at most once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections import Counter
from functools import partial
from typing import Any, Final

import msgpack

from forge_contract.config import AutoscalingConfig
from forge_contract.messages import FAILED, OK
from tests.face_to_face.memory import SHARED_FROM, Memory
from tests.face_to_face.parties import Peer, Reply, SimClient, SimWorker
from tests.face_to_face.world import World

CALLS: Final = 60
EVERY_S: Final = 0.1  # a call
FAULT_EVERY: Final = 5  # calls
BOUND_S: Final = 300.0  # virtual, after the last fault: restarts wait ever longer for one that was killed often
REPLICAS: Final = 3
SETTLED_S: Final = 10.0  # virtual: who has heard nothing for 5 s asks, and learns that it was given up
SESSIONS: Final = "ab"
SHARE_OF_LARGE: Final = (
    0.4  # of the calls: their arguments and results lie in shared memory, between peers that have it
)
POISON: Final = b"poison"
ENDPOINTS: Final = {
    "echo": {},
    "pay": {"delivery": "at_most_once"},
    "slow": {"hang_timeout_s": 1.0},
    "load": {"replay_last": True},
    "batch": {"batch_size": 4, "batch_timeout": 0.1},
    "together": {
        "batch_size": 3,
        "batch_timeout": 0.1,
        "batch_mode": "call",
        "batch_key": "key",
        "batch_weight": "weight",
        "batch_max_weight": 5.0,
        "batch_eager": True,
        "batch_sessions": True,
    },
}
# Replicas come and go with every few calls.
SCALING: Final = AutoscalingConfig(
    scale_up_queue_depth_threshold=2.0,
    max_queue_depth_emergency=4.0,
    scale_down_idle_time_threshold=0.5,
    min_time_between_scale_events=0.3,
    scale_up_cooldown=0.3,
    scale_down_cooldown=0.3,
    smoothing_s=0.0,
    evaluate_every_s=0.1,
)
# What a call may end with but its value; anything else is a bug.
EXPECTED: Final = {
    "echo": {"PoisonedRequest"},
    "pay": {"OutcomeUnknown"},
    "slow": {"PoisonedRequest"},
    "batch": {"PoisonedRequest"},
    "together": {"PoisonedRequest"},
    "timed": {"CallTimeout", "PoisonedRequest"},
    "mesh": {"PoisonedRequest", "OutcomeUnknown"},
}
KINDS: Final = (
    "echo",
    "session",
    "session",
    "fanout",
    "mesh",
    "timed",
    "priority",
    "pay",
    "slow",
    "mortal",
    "batch",
    "burst",
    "sessions",
    "together",
)


class Lost(AssertionError):
    """What a storm found, with its seed."""


class Call:
    def __init__(self, kind: str, client: SimClient, reply: Reply, payload: bytes, session: str | None) -> None:
        self.kind = kind
        self.client = client
        self.reply = reply
        self.payload = payload
        self.session = session
        self.cancelled = False


class Storm:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.memory = Memory()
        self.world = world = World(
            seed, memory=self.memory, recovery_s=2.0, drain_grace_s=3.0, shared_memory_from=SHARED_FROM
        )
        self.random = world.random
        self.sizes = random.Random(seed)  # of its own: what is large changes nothing of what happens when
        world.duplicates = self.random.choice([0.0, 0.02])
        world.actor = self._act
        self.near, self.far, self.mortal = world.client(), world.client(host="another-host"), world.client()
        self.hand = [world.worker(host="another-host"), world.worker()]
        room = self.random.choice([1, 3, 10])
        self.exports = self.random.choice([True, True, False])
        self.service = self.near.deploy(
            num_replicas=REPLICAS,
            replica_max_concurrent_requests=room,
            dispatch_ahead_s=self.random.choice([0.0, 0.002, 0.02, 0.5]),
            endpoints=ENDPOINTS,
            exports=self.exports,
            restart_backoff_at_most_s=5.0,
            max_replicas=REPLICAS + 1,
            autoscaling=self.random.choice([None, SCALING]),
        )
        self.mesh = self.far.deploy(num_replicas=1, procs=2, restart_backoff_at_most_s=5.0)
        for session in SESSIONS:
            self.near.ask("open_session", service=self.service["service"], session=session, hints={})
        self.calls: list[Call] = []
        self.executed: Counter[bytes] = Counter()
        self.executed_by: Counter[tuple[str, bytes]] = Counter()
        self.dozed: set[SimClient] = set()  # stopped for a while: one that is away for too long is told BrokerLost
        self.forgetful: set[str] = set()  # sessions whose state may have died with the broker and its worker at once

    # The actor.

    def _act(self, worker: SimWorker, method: int, payload: bytes) -> tuple[float, int, bytes]:
        self.executed[payload] += 1
        if worker.assignment.world == 1:  # a mesh runs a call anew that one of its ranks had not got
            self.executed_by[worker.link.name, payload] += 1
        if payload.endswith(POISON):
            self.world.clock.at(self.world.clock.now + 0.05, worker.die)
            return 60.0, OK, payload
        if payload.endswith(b"slow") and self.random.random() < 0.2:
            return 20.0, OK, payload
        return self.random.random() * 0.3, OK, payload

    # The callers.

    def call(self, n: int) -> None:
        kind = self.random.choice(KINDS)
        if kind in ("batch", "burst", "sessions", "together"):
            self._call_together(n, kind)
            return
        payload = str(n).encode()
        if kind == "slow":
            payload += b"slow"
        elif kind == "echo" and self.random.random() < 0.05:
            payload += POISON
            self.world.faults["poison"] += 1
        client, session, buffered = self.near, None, self._is_large()
        near = partial(self.near.call, self.service, payload=payload, buffered=buffered)
        if kind == "session":
            session = self.random.choice(SESSIONS)
            reply = near(session=session)
        elif kind == "fanout":
            name = self.random.choice(["echo", "load"])  # arguments that are replayed are not shared
            reply = self.near.fanout(self.service, name, payload, buffered=buffered and name == "echo")
        elif kind == "mesh":
            client, reply = self.far, self.far.call(self.mesh, payload=payload, buffered=buffered)
        elif kind == "timed":
            reply = near(timeout=self.random.random() * 2)
        elif kind == "priority":
            kind, reply = "echo", near(priority=self.random.randrange(-2, 3))
        elif kind in ("pay", "slow"):
            reply = near(kind)
        elif kind == "mortal" and self.mortal.alive:
            client, reply = self.mortal, self.mortal.call(self.service, payload=payload, buffered=buffered)
        else:
            reply = near()
        self.calls.append(Call(kind, client, reply, payload, session))

    def _call_together(self, n: int, kind: str) -> None:
        """Several calls in one turn: as batches, or held as one."""
        for at in range(self.random.randrange(1, 12 if kind == "burst" else 6)):
            name, sid = "batch" if kind == "batch" else "echo", None
            said: dict[str, Any] = {}
            if kind == "sessions" or (kind == "together" and self.random.random() < 0.3):
                sid = self.random.choice(SESSIONS)
            if kind == "together":
                name = "together"
                said["shape"] = self.random.randrange(1, 3)
                said["key"] = self.random.choice([None, "a"])
                said["weight"] = self.random.choice([1.0, 2.0, 9.0])
            payload = b"%d.%d" % (n, at)
            large = self._is_large()
            reply = self.near.call(
                self.service, name, payload=payload, flush=False, session=sid, buffered=large, **said
            )
            self.calls.append(Call(name, self.near, reply, payload, sid))
        self.near.flush()

    def _is_large(self) -> bool:
        return self.sizes.random() < SHARE_OF_LARGE

    # The faults.

    def disturb(self) -> None:
        world, draw = self.world, self.random.random
        alive = [peer for peer in world.peers.values() if peer.alive]
        peer = self.random.choice(alive)
        kind = self.random.randrange(12)
        if kind in (0, 1) and isinstance(peer, SimWorker):
            world.faults["worker killed"] += 1
            peer.die()
        elif kind == 2 and peer.connection.up:
            peer.connection.reconnect(draw())
        elif kind == 3 and peer.connection.up:
            peer.connection.half_open(to_broker=draw() < 0.5, seconds=2.0)
            self._kept_from_a_successor(peer)
        elif kind in (4, 5):
            # A worker of another host is taken for dead meanwhile, and comes back as a zombie; one of this host is killed.
            world.faults["paused"] += 1
            peer.pause()
            if isinstance(peer, SimClient):
                self.dozed.add(peer)
            world.clock.at(world.clock.now + draw() * 8, peer.resume)
            self._kept_from_a_successor(peer)
        elif kind == 6:
            self._cancel()
        elif kind == 7 and not world.broker_is_down and draw() < 0.5:
            self.forgetful |= {sid for sid in SESSIONS if not self._lives(sid)}
            world.kill_broker(draw() * 2)
        elif kind == 8:
            world.faults["delay"] += 1
            world.delay_s = 0.2
            world.clock.at(world.clock.now + draw(), lambda: setattr(world, "delay_s", 0.001))
        elif kind == 9 and isinstance(peer, SimWorker):
            world.faults["drained worker"] += 1
            self.near.control("drain", {"target": peer.link.name})
        elif kind == 10:
            world.faults["drain, restart or scale"] += 1
            name = self.service["name"]
            if draw() < 0.3:
                self.near.control("restart", {"service": name})
            elif draw() < 0.5:
                self.near.control("scale", {"service": name, "replicas": self.random.randrange(1, REPLICAS + 2)})
            elif draw() < 0.5:
                self.near.control("drain", {"target": f"{name}/{self.random.randrange(REPLICAS)}"})  # for good
            else:
                self.near.control("drain", {"target": f"{self.mesh['name']}/0"})  # refused: it is the last
        elif kind == 11 and self.mortal.alive and draw() < 0.2:
            world.faults["client killed"] += 1
            self.mortal.die()

    def _kept_from_a_successor(self, peer: Peer) -> None:
        """It cannot speak for as long as a recovery window lasts: in one, the states it has are lost, as nobody else has them."""
        if isinstance(peer, SimWorker) and (self.world.broker_is_down or self.world.broker.state.window is not None):
            self.forgetful |= set(peer.counts)

    def _lives(self, sid: str) -> bool:
        """Whether some worker has the state of this session, which otherwise dies with the broker."""
        service = self.world.broker.state.services.get(self.service["service"])
        if service is None or sid not in service.sessions:
            return False
        if service.sessions[sid].state is None:
            return True
        worker = None if sid not in service.pins else service.replicas[service.pins[sid]].ranks[0]
        peer = None if worker is None else self.world.peers[worker.name]
        return isinstance(peer, SimWorker) and peer.alive and not peer.is_kept_from_speaking and sid in peer.counts

    def _cancel(self) -> None:
        candidates = [
            call for call in self.calls if call.session is None and call.kind != "fanout" and not call.reply.done
        ]
        if candidates:
            call = self.random.choice(candidates)
            self.world.faults["cancelled"] += 1
            call.cancelled = True
            call.client.link.cancel(call.reply.sequence)
            call.client.flush()

    # The whole.

    def run(self) -> Storm:
        """Raises Lost, or InvariantBroken, with what went wrong."""
        clock = self.world.clock
        try:
            for n in range(CALLS):
                clock.at(clock.now + n * EVERY_S, partial(self.call, n))
                if n % FAULT_EVERY == 0:
                    clock.at(clock.now + n * EVERY_S, self.disturb)
            self.world.run_for(CALLS * EVERY_S)
            self.world.duplicates = 0.0
            self.world.run_until(self._all_answered, BOUND_S)
            self.world.run_for(SETTLED_S)
            self._judge()
        except AssertionError as error:
            raise Lost(f"storm {self.seed}: {error}") from error
        finally:
            self.memory.close()
        return self

    def _all_answered(self) -> bool:
        return all(
            call.reply.done or call.cancelled or not call.client.alive or self._gave_up(call) for call in self.calls
        )

    def _gave_up(self, call: Call) -> bool:
        return call.reply in call.client.lost_waiters and self._was_lost(call.client)

    def _explains(self, error: str | None, client: SimClient) -> bool:
        """Whether this client was away for so long that its call may end like this. It loses what it started (`mortal` what `near`
        did), and an answer that waited for it loses its segment, if worker and broker died meanwhile."""
        if error == "SegmentLost":
            return client in self.dozed and self.world.faults["broker killed"] > 0
        return error in ("ServiceStopped", "UnknownService") and self._was_lost(
            self.far if client is self.far else self.near
        )

    def _was_lost(self, client: SimClient) -> bool:
        """Whether a broker gave it up, and with it all it had started. Only of one that was stopped or whose broker died."""
        if client not in self.dozed and not self.world.faults["broker killed"]:
            return False
        return client.was_lost or self._recovered_without(client)

    def _recovered_without(self, client: SimClient) -> bool:
        """A broker stopped its services and died before it could say so."""
        absent = {f"the client that started {deed['name']}" for deed in client.deeds.values()}
        return any(
            note.event == "recovered" and not absent.isdisjoint(note.fields["missing"]) for note in self.world.notes
        )

    def _judge(self) -> None:
        self.forgetful |= self.world.states_lost
        if self.world.faults["broker killed"]:
            # A reply may die with its broker and its worker while the checkpoint that includes it lives in the session's next
            # worker: the call runs again (it is delivered at least once), on a state that has it already.
            self.forgetful |= {
                call.session
                for call in self.calls
                if call.session is not None and self.world.ended[call.session, call.payload] > 1
            }
        # A worker of another host that a broker gave up while it was stopped is welcome to the next broker, which never heard of that.
        given_up = {note.fields["worker"] for note in self.world.notes if note.event == "worker gone"}
        given_up = given_up if self.world.faults["broker killed"] else set()
        twice = [where for where, count in self.executed_by.items() if count > 1 and where[0] not in given_up]
        # The recovery window waits for who announced replies, but not as long as a deaf connection or a stopped process can last.
        assert not twice or self.world.unheard, f"run twice by one worker, which no death explains: {twice}"
        self._judge_order()
        self._judge_memory()
        counts: Counter[str] = Counter()
        poisoned: set[str] = set()
        for call in self.calls:
            reply = call.reply
            if call.cancelled or not call.client.alive or self._gave_up(call):
                assert reply.replies <= 1, f"{call.payload!r} was answered {reply.replies} times"
                continue
            assert reply.replies == 1, f"{call.payload!r} was answered {reply.replies} times"
            if call.session is not None:
                counts[call.session] += 1
                wanted = b"%d" % counts[call.session]
                if self._explains(reply.error, self.near):
                    if reply.error == "SegmentLost" and not self.executed[call.payload]:
                        counts[call.session] -= 1  # its arguments were gone; else it has run, and its result is
                    continue
                if reply.error == "PoisonedRequest":
                    poisoned.add(
                        call.session
                    )  # killed by chance on three replicas, the last time alone: it never ended
                if not self.exports and reply.error != "PoisonedRequest":
                    assert reply.status == OK, f"{call.payload!r} of session {call.session} failed: {reply.error}"
                    assert bytes(reply.payload) == call.payload, f"{call.payload!r} was answered {reply.payload!r}"
                elif call.session not in self.forgetful | poisoned:
                    assert reply.status == OK, f"{call.payload!r} of session {call.session} failed: {reply.error}"
                    assert bytes(reply.payload) == wanted, (
                        f"call {wanted!r} of session {call.session} was answered {bytes(reply.payload)!r}"
                    )
            elif call.kind != "fanout" and reply.status == FAILED:
                allowed = EXPECTED.get(call.kind, EXPECTED["echo"])
                ended = self._explains(reply.error, call.client)
                assert reply.error in allowed or ended, f"{call.kind} {call.payload!r} failed with {reply.error}"
            elif call.kind != "fanout":
                assert bytes(reply.payload) == call.payload, f"{call.payload!r} was answered {reply.payload!r}"
            elif reply.status != FAILED and not self._was_lost(self.near):
                values = [bytes(value) for status, value in reply.payload if status == OK]
                assert values == [call.payload] * len(values), f"{call.payload!r} was answered {values}"
                errors = [msgpack.unpackb(error)[0] for status, error in reply.payload if status == FAILED]
                assert "SegmentLost" not in errors, f"fan-out {call.payload!r} failed with {errors}"
            if call.kind == "pay":
                assert self.executed[call.payload] <= 1, f"at most once, and ran {self.executed[call.payload]} times"
            if call.payload.endswith(POISON):
                ended = self._explains(reply.error, self.near)
                assert reply.error == "PoisonedRequest" or ended, f"poison ended with {reply.status}, {reply.error}"
                # A death that the broker chose (a drain, a stopped process) convicts nobody, though poison was its cause.
                chosen = ("broker killed", "drained worker", "drain, restart or scale", "paused", "half_open")
                often = self.executed[call.payload] > 3 and not any(self.world.faults[one] for one in chosen)
                assert not often, f"poison ran {self.executed[call.payload]} times"

    def _judge_memory(self) -> None:
        """The dead have left nothing, but those that the last broker never met: what is theirs goes with it. That every large value was
        there to be read, and unspoilt, is judged as any other answer is."""
        notes = self.world.notes
        starts = [at for at, note in enumerate(notes) if note.event == "recovering"]
        met = {note.fields["peer"] for note in notes[starts[-1] if starts else 0 :] if note.event == "hello"}
        left = self.memory.left_by(name for name in met if not self.world.peers[name].alive)
        assert not left, f"segments of the dead are left: {left}"

    def _judge_order(self) -> None:
        """A worker starts a session's calls in the order sent (A6). Not of those that ran more than once: when a reply has died with its
        broker and its worker, its call runs again after younger ones."""
        place = {call.payload: at for at, call in enumerate(self.calls)}
        for peer in self.world.peers.values():
            last: dict[str, bytes] = {}
            for _, _, payload, session in peer.started if isinstance(peer, SimWorker) else ():
                if session is None or self.executed[payload] > 1:
                    continue
                before = last.get(session)
                assert before is None or place[before] < place[payload], (
                    f"{payload!r} of session {session} started after {before!r} on {peer.link.name}"
                )
                last[session] = payload


def _one(seed: int) -> tuple[int, int, Counter[str], str]:
    try:
        storm = Storm(seed).run()
    except (Lost, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        return seed, 0, Counter(), f"storm {seed}: {type(error).__name__}: {error}"
    return seed, len(storm.calls), storm.world.faults, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    began = time.perf_counter()
    calls, faults, failed = 0, Counter[str](), []
    seeds = range(options.first, options.first + options.seeds)
    with multiprocessing.Pool(options.jobs) as pool:
        for _, made, found, error in pool.imap_unordered(_one, seeds, chunksize=8):
            calls += made
            faults += found
            if error:
                failed.append(error)
                print(error.splitlines()[0][:300], file=sys.stderr)
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in faults.most_common())
    print(f"{options.seeds:,} storms, {calls:,} requests, {sum(faults.values()):,} faults ({kinds})")
    print(f"lost, duplicated or wrong: {len(failed)} storms; {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
