"""Links and hellos as the broker sees them, and bytes that nobody should send (C1, W3, W4, W6, W8)."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_broker.core.actions import Send
from forge_broker.core.events import LaunchEnded, ProcessGone, Received, Unroutable, Watched
from forge_broker.core.workers import WorkerState
from forge_contract.errors import ProtocolError, TrustRequired, from_wire
from forge_contract.framing import decode, encode
from forge_contract.messages import (
    ASSIGN,
    BYE,
    CALLS,
    CANCEL,
    CONTROL,
    DISPATCH,
    FANOUT,
    HEARTBEAT,
    HELLO,
    MASTER,
    PROBE,
    READY,
    REFUSE,
    REPLIES,
    RESULTS,
    STOP,
    UNREADY,
    WELCOME,
    WHO,
)
from tests.core.peers import HERE, INCARNATION, TRUSTED, UNTRUSTED, Bench, ClientPeer, spec


def test_the_next_deadline_is_when_something_is_due_and_tick_does_it() -> None:
    """C1: nothing polls; with nothing due there is nothing to wait for."""
    bench = Bench()
    assert bench.broker.next_deadline() is None
    client = bench.client()
    client.say([CANCEL, []])
    due = bench.broker.next_deadline()
    assert due == pytest.approx(bench.now + 0.1)
    assert bench.broker.tick(bench.now) == []
    bench.advance(0.2)
    assert client.envelopes[-1].ack == 1


def test_a_hello_that_is_repeated_is_welcomed_again_to_the_same_effect() -> None:
    """W4, PROTOCOL.md §5: the first welcome may have been lost."""
    bench = Bench()
    client = bench.client()
    first = client.welcome
    client.connect()
    client.hello()
    assert client.of(WELCOME) == [[WELCOME, first], [WELCOME, first]]
    assert len(bench.state.clients) == 1
    assert first["client"] == client.id > 0
    assert first["incarnation"] == INCARNATION


def test_a_hello_of_a_new_epoch_begins_anew_and_keeps_the_client_id() -> None:
    """W4: what was under way in the old epoch is over."""
    _bench, client, (worker,), endpoint = Bench().serving(1, detached=True, name="Echo")
    client.call(endpoint, b"x")
    before = client.id
    client.epoch, client.sent, client.received = 2, 0, 0
    client.fields["client"] = before
    client.hello()
    assert client.id == before
    worker.reply()
    client.call(endpoint, b"y")
    worker.reply()
    assert client.results == {2: (0, b"y")}


def test_a_hello_of_an_older_epoch_comes_late_and_is_dropped() -> None:
    """W4: by a connection that is no more; believing it would end the living link."""
    bench = Bench()
    client = bench.client()
    client.epoch, client.sent, client.received = 2, 0, 0
    client.hello()
    client.epoch = 1
    client.hello()
    client.epoch = 2
    assert isinstance(client.ask("find", name="x"), Exception)
    assert bench.state.counters["old_hello"] == 1


def test_two_clients_that_ask_for_the_same_id_get_different_ones() -> None:
    """PROTOCOL.md §3."""
    bench = Bench()
    one, two = bench.client(client=5), bench.client(client=5)
    assert one.id == 5
    assert two.id not in (0, 5)


@pytest.mark.parametrize("stranger", ["sender", "epoch", "incarnation"])
@pytest.mark.parametrize("kind", ["numbered", "probe"])
def test_who_is_unknown_is_asked_who_it_is(stranger: str, kind: str) -> None:
    """W4: an unknown sender, another epoch, another broker's incarnation."""
    bench = Bench()
    client = bench.client()
    name = "c-stranger" if stranger == "sender" else client.name
    epoch = 9 if stranger == "epoch" else 1
    incarnation = 5 if stranger == "incarnation" else INCARNATION
    number, body = (1, []) if kind == "numbered" else (0, [[PROBE]])
    client.send(encode(name, epoch, incarnation, number, 0, body))
    assert client.of(WHO) == [[WHO]]
    assert client.envelopes[-1].epoch == epoch


def test_an_envelope_that_comes_twice_is_dropped_and_one_after_a_gap_too() -> None:
    """W4: go back n; both owe an ack at once."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.call(endpoint, b"a")
    client.sent -= 1
    client.call(endpoint, b"b")  # under a number that was used
    client.say([CALLS, endpoint, [3], [1], {}], packed=b"c", skip=1)
    assert worker.seen == [b"a"]
    assert bench.state.counters["out_of_order"] == 2
    number = client.sent - 2
    bench.advance(0.0)
    assert client.envelopes[-1].ack == number
    client.sent = number
    client.call(endpoint, b"d")
    assert worker.seen == [b"a", b"d"]


def test_a_probe_from_a_new_route_has_what_was_not_acknowledged_sent_there_again() -> None:
    """W4: ZeroMQ lost it with the old connection, and told nobody."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.call(endpoint, b"a")
    bench.peers.pop(client.route)
    worker.reply()
    assert not client.results
    client.connect()
    client.whisper([PROBE])
    assert client.results == {1: (0, b"a")}


def test_the_broker_probes_and_an_ack_in_answer_that_is_short_has_the_rest_sent_again() -> None:
    """W4: even when that ack brings something new itself."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    got = client.received
    client.call(endpoint, b"a", b"b")
    bench.peers.pop(client.route)
    worker.reply(1)
    bench.peers[client.route] = client
    client.received = got + 1  # the first result arrived after all; the second will not
    bench.peers.pop(client.route)
    worker.reply(1)
    bench.peers[client.route] = client
    client.heard.clear()
    bench.advance(1.5)
    assert client.of(PROBE)
    client.whisper()
    assert client.results == {2: (0, b"b")}


def test_a_known_name_from_an_address_of_other_trust_is_refused() -> None:
    """W6."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.connect(UNTRUSTED)
    client.call(endpoint, b"a")
    client.whisper([PROBE])
    client.hello()
    assert worker.seen == []
    assert bench.state.counters["wrong_trust"] == 3


def test_code_by_value_needs_trust_and_a_reference_does_not() -> None:
    """W6."""
    bench = Bench()
    client = bench.client(UNTRUSTED)
    assert client.welcome["trusted"] is False
    assert isinstance(client.answers[client.deploy(target={"code": b"pickle"})], TrustRequired)
    by_value = client.deploy(routers={"predict": {"code": b"pickle"}})
    assert isinstance(client.answers[by_value], TrustRequired)
    client.deploy()
    (worker,) = bench.launched()
    ((_, fields, _),) = worker.of(ASSIGN)
    assert fields["trusted"] is False


def test_the_stamp_of_trust_is_the_senders_on_dispatches_and_results() -> None:
    """W6: an untrusted client cannot borrow a worker's trust, nor the other way round."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    stranger = bench.client(UNTRUSTED)
    client.call(endpoint, b"a")
    stranger.call(endpoint, b"b")
    assert [message[3] for message in worker.of(DISPATCH)] == [True, False]
    worker.reply()
    assert [message[1] for message in client.of(RESULTS) + stranger.of(RESULTS)] == [True, True]
    bench.state.links[worker.name].trusted = False
    worker.connect(UNTRUSTED)
    client.call(endpoint, b"c")
    bench.peers[worker.route] = worker
    bench.state.links[worker.name].route = worker.route
    worker.calls = [(client.ids([2])[0], 1, b"c")]
    worker.reply()
    assert client.of(RESULTS)[0][1] is False


def test_silence_is_death_elsewhere_and_nothing_here() -> None:
    """F1: here the kernel tells; any envelope counts as life."""
    bench = Bench(heartbeat_s=0.5, liveness=4)
    here, there, lively = bench.worker(), bench.worker(host="other"), bench.worker(host="third")
    for _ in range(3):
        bench.advance(1.5)
        lively.whisper([HEARTBEAT, {"oldest_s": 0.0, "lag_s": 0.0, "rss": 1}])
    assert bench.state.workers[there.name].state is WorkerState.LOST
    assert {one.name for one in bench.state.workers.values() if one.state is WorkerState.IDLE} == {
        here.name,
        lively.name,
    }
    bench.handle(ProcessGone(here.name))
    assert set(bench.state.workers) == {there.name, lively.name}
    there.whisper([HEARTBEAT, {"oldest_s": 0.0, "lag_s": 0.0, "rss": 1}])
    ((_, why, grace_s, replace),) = there.of(STOP)
    assert "silent" in why
    assert (grace_s, replace) == (0.0, True)


@pytest.mark.parametrize(
    "message",
    [[READY], [99], [RESULTS, 1], [REPLIES, 1, [1], 1, 0, [9]], [UNREADY, None, 5], [MASTER, 1, 2], []],
    ids=str,
)
def test_nonsense_from_an_idle_worker_costs_it_its_link_and_nobody_else(message: list[Any]) -> None:
    """W8: an assigned READY is a move of its life, any other is nonsense and must not stop the broker."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    idle = bench.worker()
    idle.say(message)
    if message:
        assert idle.name not in bench.state.workers
    assert idle.of(REFUSE)
    client.call(endpoint, b"a")
    assert worker.seen == [b"a"]


def test_a_second_ready_is_nonsense() -> None:
    """W8, C3."""
    bench, _, (worker,), _ = Bench().serving(1)
    worker.say([READY])
    assert bench.state.counters["ProtocolError"] == 1
    assert worker.name not in bench.state.workers


def test_what_a_client_said_before_its_nonsense_stands_and_the_rest_is_taken_back() -> None:
    """W8: an envelope applied in part leaves nothing behind once its sender is gone."""
    bench, client, (worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=1)
    other = bench.client()
    other.say([CALLS, endpoint, [1, 2], [1, 1], {}], [CALLS, endpoint, [3], [7], {}], packed=b"ab")
    assert other.of(REFUSE)
    assert other.id not in bench.state.clients
    worker.reply()
    client.call(endpoint, b"c")
    assert worker.seen == [b"a", b"c"]


@pytest.mark.parametrize(
    "fields",
    [
        {"role": "king"},
        {"pid": "1"},
        {"pid": 1 << 40},
        {"gpus": ["0", "0"]},
        {"gpus": [0]},
        {"gpus": None},
        {"labels": {"a": 1}},
        {"launch": 1.5},
        {"host": None},
    ],
    ids=str,
)
def test_a_hello_that_is_wrong_is_refused(fields: dict[str, Any]) -> None:
    """W8: and leaves no peer behind."""
    bench = Bench()
    worker = bench.worker(**fields) if "gpus" not in fields else bench.worker()
    if "gpus" in fields:
        worker = bench.worker()
        worker.name, worker.fields = "w-other", {**worker.fields, **fields}
        worker.hello()
    assert worker.of(REFUSE)
    assert worker.name not in bench.state.links


def test_what_nests_too_deep_to_be_passed_on_is_refused_at_the_door() -> None:
    """W8: msgpack reads deeper than it writes; a heartbeat or a signature of that depth would break a later answer."""
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    bench = Bench()
    client = bench.client()
    frames = encode(client.name, 1, INCARNATION, 1, 0, [[CONTROL, 1, "deploy", {"spec": {**spec(), "x": deep}}, 0]])
    client.send(frames)
    assert client.of(REFUSE)
    assert bench.state.services == {}


def test_bytes_that_are_no_envelope_are_answered_and_counted() -> None:
    """W8, PROTOCOL.md §2."""
    bench = Bench()
    client = bench.client()
    for frames in ([b"", b""], [b"\xc1", b""], [b"\x81\x90\x01", b""], [b"x"], []):
        client.send(frames)
    assert bench.state.counters["ProtocolError"] == 5
    assert len(client.of(REFUSE)) == 5
    client.send([msgpack.packb([2, "x"]), b""])
    assert bench.state.counters["VersionMismatch"] == 1


def test_events_about_peers_that_are_gone_change_nothing() -> None:
    """C1: the shell's news may be old."""
    bench = Bench()
    assert bench.handle(Unroutable((0, b"?"))) == []
    assert bench.handle(Watched("w-gone")) == []
    assert bench.handle(ProcessGone("w-gone")) == []
    assert bench.handle(LaunchEnded(5, "exit code 0", [])) == []
    assert bench.broker.pack("w-gone", bench.now) is None


# Whatever bytes arrive.

SCALARS = [
    None,
    True,
    0,
    1,
    -1,
    2**64 - 1,
    -(2**63),
    1.5,
    float("nan"),
    float("inf"),
    "",
    "s",
    "Echo",
    "worker",
    HERE,
    b"",
    b"x",
]
KINDS = [CALLS, FANOUT, CANCEL, CONTROL, REPLIES, READY, UNREADY, MASTER, BYE, HELLO, HEARTBEAT, PROBE, WHO, 99]
COLUMNS = ["timeout", "session", "priority", "hints", "rank", "shape", "new"]
VALUES: list[Any] = [None, 0, 1, -3, 1.5, "s", {"key": 1}, [None], ["s"], [0.5], [{}], [1, 2], float("inf")]
OPERATIONS = [
    "deploy",
    "find",
    "stop",
    "open_session",
    "close_session",
    "state",
    "metrics",
    "status",
    "workers",
    "explain",
]


class Chaos:
    """Messages that are well-formed, nearly so, or not at all, drawn from a seed."""

    def __init__(self, seed: int, endpoint: int, held: list[int]) -> None:
        self.random = random.Random(seed)
        self.pick = self.random.choice
        self.endpoint = endpoint
        self.held = held

    def junk(self, depth: int = 3) -> Any:
        drawn = self.random.random()
        if depth == 0 or drawn < 0.5:
            return self.pick(SCALARS)
        if drawn < 0.75:
            return [self.junk(depth - 1) for _ in range(self.random.randrange(4))]
        return {
            self.pick(["name", "options", "role", "s", 3]): self.junk(depth - 1)
            for _ in range(self.random.randrange(4))
        }

    def some(self, values: list[Any]) -> list[Any]:
        return [self.pick(values) for _ in range(self.random.randrange(4))]

    def columns(self) -> dict[str, Any]:
        return {name: self.pick([*VALUES, self.junk()]) for name in self.some(COLUMNS)}

    def spoilt(self) -> dict[str, Any]:
        name = self.pick(["kind", "class_name", "target", "config", "endpoints", "path", "name"])
        big = {self.pick(["procs", "hosts", "num_replicas", "mesh_concurrency"]): 2**60}
        router = self.pick([self.junk(), {"name": "ConsistentHashRouter", "options": self.junk()}])
        endpoints = [{"name": "predict", "options": {}, "router": router}]
        return {**spec(), name: self.pick([self.junk(), big, endpoints])}

    def message(self) -> list[Any]:
        endpoint = self.pick([self.endpoint, self.endpoint, self.endpoint + 1])
        number = self.random.randrange(-1, 10)
        numbers = list(range(-1, 10))
        case = self.random.randrange(11)
        if case == 0:
            return [self.pick(KINDS), *(self.junk() for _ in range(self.random.randrange(5)))]
        if case == 1:
            sequences = self.some(numbers[2:])
            return [CALLS, endpoint, sequences, [self.pick([0, 0, 1]) for _ in sequences], self.columns()]
        if case == 2:
            return [CALLS, endpoint, self.some(numbers), self.some(numbers), self.columns()]
        if case == 3:
            return [FANOUT, endpoint, number, self.pick([0, 0, 1, -1]), self.columns()]
        if case in (4, 5):
            ids = self.some([*self.held, 1])
            few = self.pick([1, 1, 2, self.some([1, 2])])
            return [REPLIES, self.pick([1, 1, 2]), ids, few, self.pick([0, 1, 2, 3, 4, 5]), [0 for _ in ids]]
        if case == 6:
            fields = {
                self.pick(["service", "name", "session", "hints", "subject", "spec"]): self.pick(
                    ["Echo", "s", self.junk()]
                )
            }
            return [CONTROL, number, self.pick(OPERATIONS), {"service": "Echo", **fields}, 0]
        if case == 7:
            return [CONTROL, number, "deploy", {"spec": self.spoilt()}, 0]
        if case == 8:
            hello = {name: self.junk() for name in self.some(["role", "host", "pid", "gpus", "launch"])}
            return [HELLO, hello]
        if case == 9:
            return self.pick([[READY], [BYE, "?"], [MASTER, "here", 5], [PROBE]])
        return self.pick([[CANCEL, self.some(numbers)], [UNREADY, self.junk(), self.pick([0, 1])]])


@pytest.mark.parametrize("start", range(0, 120, 40))
def test_no_message_stops_the_broker_or_breaks_its_books(start: int) -> None:
    """W8, C6: envelopes of a client, workers and an idle one with anything in them; the invariants hold after each event."""
    for seed in range(start, start + 40):
        bench, client, (worker, other), endpoint = Bench().serving(2, replica_max_concurrent_requests=2)
        client.ask("open_session", service="Echo", session="s")
        client.call(endpoint, b"a", b"b", b"c", b"d", b"e")
        client.call(endpoint, b"f", session="s")
        client.sequence, client.honest = 20, False
        client.fanout(endpoint)
        idle = bench.worker(host="other")
        chaos = Chaos(seed, endpoint, [key for one in (worker, other) for key, _, _ in one.calls])
        try:
            for _ in range(12):
                peer = chaos.pick([client, worker, other, idle])
                if peer.name not in bench.state.links:
                    peer.epoch, peer.sent, peer.received = peer.epoch + 1, 0, 0
                    peer.hello()
                body = [chaos.message() for _ in range(chaos.pick([1, 1, 2]))]
                if chaos.random.random() < 0.9:
                    peer.say(*body, packed=chaos.pick([b"", b"", b"x"]))
                else:
                    peer.whisper(*body)
                for launched in bench.launched():
                    launched.ready()
                if chaos.random.random() < 0.2:
                    bench.end_killed()
                bench.advance(chaos.pick([0.0, 0.2, 2.0, 70.0]))
            assert "counters" in bench.client().ask("status")
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


@settings(max_examples=150)
@given(st.lists(st.binary(max_size=40), max_size=3), st.integers(0, 60), st.integers(0, 255))
def test_no_bytes_stop_the_broker(frames: list[bytes], at: int, value: int) -> None:
    """W8: random frames, and a valid envelope with one byte changed."""
    bench = Bench()
    client = bench.client()
    client.send(list(frames))
    (head,) = encode(client.name, 1, INCARNATION, 1, 0, [[CONTROL, 1, "status", {}, 0], [CANCEL, [1]]])
    at %= len(head)
    client.send([head[:at] + bytes([value]) + head[at + 1 :]])
    bench.advance(3.0)


def test_a_refusal_can_be_read() -> None:
    """W8: REFUSE says what was wrong."""
    bench = Bench()
    peer = ClientPeer(bench, TRUSTED, {"role": "king", "client": 0})
    peer.hello()
    ((_, *error),) = peer.of(REFUSE)
    assert isinstance(from_wire(error), ProtocolError)
    assert "role" in str(from_wire(error))
    assert isinstance(bench.actions[-1], Send)
    assert decode(bench.actions[-1].frames).number == 0


def test_a_launched_workers_life_is_watched_from_its_hello() -> None:
    """F1, C3."""
    bench, _, (worker,), _ = Bench().serving(1)
    assert bench.state.workers[worker.name].state is WorkerState.READY
    assert bench.state.links[worker.name].watched
    assert Received(worker.route, []).frames == []
