"""A broker that comes back with nothing (F10): it has everything again from what workers and clients say in the recovery window."""

from __future__ import annotations

from typing import Any

import pytest

from forge_broker.core.actions import KillPeer, Launch
from forge_broker.core.replicas import ReplicaState
from forge_contract.errors import OutcomeUnknown, Overloaded, ServiceStopped
from forge_contract.messages import (
    CALLS,
    CONTROL,
    DROP,
    FANOUT,
    FORGET,
    IMPORT,
    OK,
    RECALL,
    REFUSE,
    REPLAY,
    REPLIES,
    SETTLED,
    STATES,
    STOP,
    UNTOUCHED,
    request_id,
)
from tests.core.peers import TRUSTED, UNTRUSTED, Bench, ClientPeer, WorkerPeer, spec

SERVICE, ENDPOINT = 5, 6
OWNER = 0xABC


def deed(**options: Any) -> dict[str, Any]:
    one = spec(**{"num_replicas": 2, **options})
    return {"service": SERVICE, "name": "Echo", "spec": one, "endpoints": [ENDPOINT], "owner": OWNER, "trusted": True}


def holds(replica: int, *, of: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    rest = {"epoch": 3, "rank": 0, "ready": True, "running": [], "sessions": []}
    return {"deed": of or deed(), "replica": replica, **rest, **fields}


def worker_back(bench: Bench, replica: int, **fields: Any) -> WorkerPeer:
    return bench.worker(launch=9, holds=holds(replica, **fields), holdings=[b"init"])


def client_back(bench: Bench, *sessions: Any, of: dict[str, Any] | None = None, address: int = TRUSTED) -> ClientPeer:
    declares = {"services": [of or deed()], "sessions": list(sessions)}
    return bench.client(address, client=OWNER, declares=declares, holdings=[b"init"])


def id_of(sequence: int) -> int:
    return request_id(OWNER, sequence)


def end_window(bench: Bench) -> None:
    bench.advance(bench.state.config.recovery_s + 0.01)


def test_services_replicas_and_their_owner_are_there_again_under_their_old_ids() -> None:
    """F10: whoever comes first; and nothing is launched meanwhile."""
    for worker_first in (True, False):
        bench = Bench(recovering=True)
        if worker_first:
            worker_back(bench, 0)
        client = client_back(bench)
        if not worker_first:
            worker_back(bench, 0)
        two = worker_back(bench, 1)
        assert client.welcome["recovering"] is True
        assert client.id == OWNER
        assert not bench.of(Launch)
        end_window(bench)
        service = bench.service()
        assert (service.id, service.endpoints[0].id, service.init) == (SERVICE, ENDPOINT, b"init")
        assert [replica.state for replica in service.replicas.values()] == [ReplicaState.HEALTHY] * 2
        assert [replica.epoch for replica in service.replicas.values()] == [3, 3]
        client.call(ENDPOINT, b"a", b"b")
        two.reply()
        assert len(client.results) == 1
        assert not bench.of(Launch)
        assert bench.state.next_id() > ENDPOINT


def test_spares_of_the_broker_that_died_leave_and_others_are_made_when_the_window_ends() -> None:
    """F10, X2: they hold nothing, and their launch is not known."""
    spared = deed(num_replicas=1, warm_spares=1)
    bench = Bench(recovering=True)
    worker_back(bench, 0, of=spared)
    client_back(bench, of=spared)
    spare = bench.worker(launch=77, holds=None)
    assert spare.of(STOP)
    assert not bench.of(Launch)
    end_window(bench)
    (launch,) = bench.of(Launch)
    assert launch.label == "Echo/spare.0"


def test_what_cannot_be_kept_until_the_window_ends_is_refused_and_nobody_is_dropped() -> None:
    """W8, F10: with Overloaded, at once; what was asked before it, and what still fits after it, is done."""
    bench = Bench(recovering=True, max_queue_bytes=100)
    worker = worker_back(bench, 0)
    client = client_back(bench)
    (kept,) = client.call(ENDPOINT, b"x" * 90)
    refused = [*client.call(ENDPOINT, b"y" * 6, b"z" * 6), client.fanout(ENDPOINT, b"w" * 11)]
    control = client.deploy(b"v" * 11)
    errors = [*map(client.error, refused), client.answers[control]]
    assert all(isinstance(error, Overloaded) and error.retry_after_s > 0 for error in errors)
    (fits,) = client.call(ENDPOINT, b"u" * 10)
    assert not client.of(REFUSE)
    assert bench.state.links[client.name].channel.received
    assert bench.state.counters["overloaded"] == 3  # messages
    end_window(bench)
    assert worker.seen == [b"x" * 90, b"u" * 10]
    worker.reply()
    assert sorted(client.results) == sorted([kept, fits, *refused])


def test_calls_that_were_sent_ahead_of_the_room_are_known_again_and_do_not_run_twice() -> None:
    """F10, R1: a worker that tells of more calls than it runs at once has them of a broker that sent some ahead."""
    one_at_a_time = deed(num_replicas=1, replica_max_concurrent_requests=1)
    bench = Bench(recovering=True)
    ids = [id_of(sequence) for sequence in (1, 2, 3)]
    worker = worker_back(bench, 0, of=one_at_a_time, running=[[key, 1] for key in ids])
    client = client_back(bench, of=one_at_a_time)
    client.call(ENDPOINT, b"a", b"b", b"c", again=True)
    client.call(ENDPOINT, b"new")
    end_window(bench)
    (replica,) = bench.service().replicas.values()
    assert (worker.seen, replica.active, replica.active_requests) == ([], 3, 1)
    bench.advance(1.0)  # the room is looked at, and is one again; what is there beyond it is called back
    assert (replica.room, len(worker.of(RECALL))) == (1, 1)
    worker.calls = [(key, 1, b"A") for key in ids]
    worker.reply(2)
    assert worker.seen == []
    worker.reply(1)
    assert worker.seen == [b"new"]
    worker.reply()
    assert client.results == {1: (OK, b"A"), 2: (OK, b"A"), 3: (OK, b"A"), 4: (OK, b"new")}


def test_calls_that_run_as_a_batch_take_its_room_together_and_do_not_run_again() -> None:
    """F10, B2: also where the replica has room for fewer calls than the batch has."""
    one_at_a_time = deed(replica_max_concurrent_requests=1)
    bench = Bench(recovering=True)
    ids = [id_of(sequence) for sequence in (1, 2, 3)]
    running = [[key, 1] for key in ids]
    worker = worker_back(bench, 0, of=one_at_a_time, running=running, batches=[ids])
    client = client_back(bench, of=one_at_a_time)
    client.call(ENDPOINT, b"a", b"b", again=True)  # nobody waits for the third any more
    client.call(ENDPOINT, b"new")
    end_window(bench)
    replica = bench.service().replicas[0]
    assert (worker.seen, replica.active) == ([], 1)
    worker.calls = [(ids[0], 1, b"A")]
    worker.reply()
    assert (worker.seen, replica.active) == ([], 1)
    worker.calls = [(ids[1], 1, b"B")]
    worker.reply()
    assert client.results == {1: (OK, b"A"), 2: (OK, b"B")}
    assert worker.seen == [b"new"]


def test_a_call_that_may_have_run_and_cannot_be_kept_is_not_called_overloaded() -> None:
    """F3, F10: who is told Overloaded tries again; what is delivered at most once had been sent before."""
    once, often = deed(), deed()
    once["spec"]["endpoints"][0]["options"]["delivery"] = "at_most_once"
    for known, expected in ((once, OutcomeUnknown), (often, Overloaded), (None, OutcomeUnknown)):
        bench = Bench(recovering=True, max_queue_bytes=10)
        if known is not None:
            worker_back(bench, 0, of=known)
        client = bench.client(client=OWNER, declares={"services": [], "sessions": []})
        (refused,) = client.call(ENDPOINT, b"x" * 11, again=True)
        assert type(client.error(refused)) is expected


def test_nonsense_is_a_broken_protocol_even_when_there_is_no_room_for_it() -> None:
    """W8."""
    for message in ([CONTROL, "one", "status", {}, 11], [CALLS, ENDPOINT, [0], [11], {}], [FANOUT, ENDPOINT, 1, 11]):
        bench = Bench(recovering=True, max_queue_bytes=10)
        client = bench.client()
        client.say(message, packed=b"x" * 11)
        assert client.of(REFUSE), message
        assert client.name not in bench.state.links


def test_a_call_that_a_worker_runs_is_not_run_again() -> None:
    """F10: it is entered in the ledger, and its reply goes to who waits for it."""
    bench = Bench(recovering=True)
    one, two = worker_back(bench, 0, running=[[id_of(1), 2]]), worker_back(bench, 1)
    client = client_back(bench)
    client.call(ENDPOINT, b"a", again=True)
    end_window(bench)
    assert (one.seen, two.seen, client.results) == ([], [], {})
    assert bench.service().replicas[0].active == 1
    one.say([REPLIES, 3, [id_of(1)], 2, OK, [4]], packed=b"done")
    assert client.results == {1: (OK, b"done")}


def test_a_call_that_a_worker_has_ended_is_answered_from_what_it_kept() -> None:
    """F10: also when the worker died since, for its word stands."""
    bench = Bench(recovering=True)
    one, _ = worker_back(bench, 0), worker_back(bench, 1)
    one.say([REPLIES, 3, [id_of(1), id_of(7)], 1, OK, [4, 5]], packed=b"doneother")
    client = client_back(bench)
    client.call(ENDPOINT, b"a", again=True)
    bench.handle_gone(one)
    end_window(bench)
    assert client.results == {1: (OK, b"done")}


@pytest.mark.parametrize("delivery", ["at_least_once", "at_most_once"])
def test_a_call_that_a_draining_worker_gave_back_runs_elsewhere(delivery: str) -> None:
    """F9, F10: it has not run, whatever became of the broker that was told so; and its caller is not told what only workers say."""
    of = deed(delivery=delivery)
    bench = Bench(recovering=True)
    one, two = worker_back(bench, 0, of=of), worker_back(bench, 1, of=of)
    one.say([REPLIES, 3, [id_of(1)], 1, UNTOUCHED, [0]])
    client = client_back(bench, of=of)
    client.call(ENDPOINT, b"a", again=True)
    end_window(bench)
    assert (client.results, one.seen, two.seen) == ({}, [], [b"a"])
    assert [attempt for _, attempt, _ in two.calls] == [2]
    client.call(ENDPOINT, b"b")
    assert (one.seen, two.seen) == ([], [b"a", b"b"])  # its worker is leaving
    two.reply()
    assert client.results == {1: (OK, b"a"), 2: (OK, b"b")}


def test_what_nobody_ran_runs_now_or_is_unknown_as_its_delivery_says() -> None:
    """F10, F3: in the order sent."""
    bench = Bench(recovering=True)
    one, two = worker_back(bench, 0), worker_back(bench, 1)
    client = client_back(bench)
    client.call(ENDPOINT, b"a", b"b", again=True)
    client.call(ENDPOINT, b"c")
    assert not client.results
    end_window(bench)
    assert (one.seen, two.seen) == ([b"a", b"c"], [b"b"])
    of = deed(delivery="at_most_once")
    bench = Bench(recovering=True)
    one = bench.worker(launch=9, holds=holds(0, of=of), holdings=[b"init"])
    client = client_back(bench, of=of)
    client.call(ENDPOINT, b"a", again=True)
    client.call(ENDPOINT, b"b")
    end_window(bench)
    assert isinstance(client.error(1), OutcomeUnknown)
    assert one.seen == [b"b"]


def test_what_a_worker_runs_and_nobody_waits_for_is_dropped() -> None:
    """F10, F5."""
    bench = Bench(recovering=True)
    one = worker_back(bench, 0, running=[[id_of(1), 1], [id_of(2), 1]])
    worker_back(bench, 1)
    client = client_back(bench)
    client.call(ENDPOINT, b"a", again=True)
    end_window(bench)
    assert one.of(DROP) == [[DROP, [id_of(2)]]]


def test_of_two_attempts_the_later_one_counts() -> None:
    """F10, W3: a replica that was lost to our predecessor still runs the first."""
    bench = Bench(recovering=True)
    one = worker_back(bench, 0, running=[[id_of(1), 1]])
    two = worker_back(bench, 1, running=[[id_of(1), 2]])
    client = client_back(bench)
    client.call(ENDPOINT, b"a", again=True)
    end_window(bench)
    one.say([REPLIES, 3, [id_of(1)], 1, OK, [3]], packed=b"old")
    assert not client.results
    two.say([REPLIES, 3, [id_of(1)], 2, OK, [3]], packed=b"new")
    assert client.results == {1: (OK, b"new")}


def test_a_rank_that_does_not_come_back_costs_its_replica_a_restart() -> None:
    """F10, F2: and a replica nobody speaks for is started anew."""
    bench = Bench(recovering=True)
    of = deed(procs=2)
    zero = bench.worker(holds=holds(0, of=of, running=[[id_of(1), 1]]), holdings=[b"init"])
    client = client_back(bench, of=of)
    client.call(ENDPOINT, b"a", again=True)
    assert bench.state.window is not None
    status = client.ask("status")["recovering"]
    assert status["until_s"] > 0
    assert status["missing"] == ["rank 1 of Echo/0", "1 replicas of Echo"]
    end_window(bench)
    assert zero.of(STOP)
    assert bench.service().replicas[0].state is ReplicaState.RECOVERING
    assert len(bench.service().replicas) == 2
    bench.advance(1.0)
    workers = bench.launched()
    assert len(workers) == 4
    assert not client.results


def test_sessions_keep_their_replica_and_their_state() -> None:
    """F10, S3."""
    bench = Bench(recovering=True)
    of = deed(exports=True)
    one = bench.worker(holds=holds(0, of=of), holdings=[b"init"])
    two = bench.worker(holds=holds(1, of=of, sessions=[["s", 0.0]]), holdings=[b"init"])
    two.say([STATES, ["s"], [5]], packed=b"state")
    client = client_back(bench, [SERVICE, "s", {}, True], of=of)
    client.call(ENDPOINT, b"a", b"b", b"c", session="s", again=True)
    end_window(bench)
    assert (one.seen, two.seen) == ([], [b"a", b"b", b"c"])
    bench.handle_gone(two)
    assert [payloads[0] for message, payloads in one.heard if message[0] == IMPORT] == [b"state"]
    assert one.seen == [b"a", b"b", b"c"]


def test_a_service_whose_owner_stays_away_is_stopped_and_a_detached_one_lives_on() -> None:
    """F10, A10."""
    for owner, lives in ((OWNER, False), (0, True)):
        bench = Bench(recovering=True)
        one = bench.worker(holds=holds(0, of={**deed(num_replicas=1), "owner": owner}), holdings=[b"init"])
        end_window(bench)
        assert bool(one.of(STOP)) is not lives
        assert bench.service().stopping is None or not lives


def test_what_was_asked_in_the_window_is_answered_after_it() -> None:
    """F10: a deploy waits, so that nothing is launched on a GPU that a worker of ours still has; looking does not wait."""
    bench = Bench(recovering=True)
    client = bench.client()
    client.deploy(class_name="Other")
    assert client.ask("workers") == {"workers": []}
    assert not bench.of(Launch)
    end_window(bench)
    assert len(bench.of(Launch)) == 1


def test_a_worker_that_was_not_ready_or_is_of_an_older_epoch_is_sent_away() -> None:
    """F10, W3."""
    bench = Bench(recovering=True)
    good = worker_back(bench, 0)
    for odd in (
        worker_back(bench, 1, ready=False),
        worker_back(bench, 0, epoch=2),
        worker_back(bench, 0),
        worker_back(bench, 1, rank=4),
    ):
        assert odd.of(STOP)
    assert not good.of(STOP)
    newer = worker_back(bench, 0, epoch=4)
    assert good.of(STOP)
    assert bench.service().replicas[0].ranks[0].name == newer.name


@pytest.mark.parametrize(
    "wrong",
    [
        {"deed": {}},
        {"deed": None},
        {"replica": -1},
        {"replica": 10**9},
        {"running": [[1]]},
        {"running": ["x"]},
        {"sessions": [1]},
        {"epoch": "1"},
        {"deed": {**deed(), "endpoints": [SERVICE]}},
        {"deed": {**deed(), "endpoints": [1, 2, 3]}},
        {"deed": {**deed(), "spec": {}}},
    ],
    ids=str,
)
def test_nonsense_in_a_hello_is_refused_and_costs_nobody_else_anything(wrong: dict[str, Any]) -> None:
    """W8, F10."""
    bench = Bench(recovering=True)
    client, one = client_back(bench), worker_back(bench, 0)
    odd = bench.worker(holds={**holds(1), **wrong}, holdings=[b"init"])
    assert odd.of(REFUSE) or odd.of(STOP)
    end_window(bench)
    client.call(ENDPOINT, b"a")
    assert one.seen == [b"a"]


def test_an_untrusted_peer_cannot_vouch_for_code() -> None:
    """W6, F10: a deed's stamp is believed only of a peer that has that trust."""
    bench = Bench(recovering=True)
    of = deed(target={"code": b"class by value"})
    odd = bench.worker(UNTRUSTED, holds=holds(0, of=of), holdings=[b"init"])
    assert odd.of(REFUSE)
    assert not bench.state.services


def test_the_window_opens_late_for_who_knows_our_predecessor_if_we_know_nothing_yet() -> None:
    """F10: on TCP nothing on disk says that somebody was here before."""
    bench = Bench()
    one = worker_back(bench, 0)
    assert one.welcome["recovering"] is True
    bench = Bench()
    client = bench.client()
    client.deploy(class_name="Other", num_replicas=1)
    late = worker_back(bench, 0)
    assert late.welcome["recovering"] is False
    assert late.of(STOP)
    bench = Bench()
    bench.advance(bench.state.config.recovery_s + 1.0)
    assert worker_back(bench, 0).of(STOP)


def test_a_worker_is_told_what_it_need_not_keep_when_the_client_has_it() -> None:
    """F10: not when the broker has it."""
    _, client, (worker,), endpoint = Bench().serving(1)
    client.call(endpoint, b"a")
    before = worker.sent
    client_received = client.received
    worker.reply()
    client.call(endpoint, b"b")  # its envelope acknowledges the result of a, and makes the broker speak to the worker
    assert client.received > client_received
    assert worker.of(SETTLED) == [[SETTLED, before + 1]]
    worker.reply()
    client.received -= 1  # it has not got the result of b
    client.call(endpoint, b"c")
    assert not worker.of(SETTLED)


def test_a_mesh_call_is_matched_rank_by_rank() -> None:
    """F10, A7: one rank has ended it, the other runs it still."""
    bench = Bench(recovering=True)
    of = deed(procs=2, num_replicas=1, return_first_rank_result=False)
    zero = bench.worker(holds=holds(0, of=of), holdings=[b"init"])
    one = bench.worker(holds=holds(0, of=of, rank=1, running=[[id_of(1), 1]]), holdings=[b"init"])
    zero.say([REPLIES, 3, [id_of(1)], 1, OK, [1]], packed=b"0")
    client = client_back(bench, of=of)
    client.call(ENDPOINT, b"a", again=True)
    end_window(bench)
    assert not client.parts
    one.say([REPLIES, 3, [id_of(1)], 1, OK, [1]], packed=b"1")
    assert client.parts[1] == {(0, 0): (OK, b"0"), (0, 1): (OK, b"1")}


def test_the_window_waits_for_who_was_welcomed_late_and_has_something_to_say() -> None:
    """F10: a call welcomed a moment before the end is not run again because its envelope comes a moment after it."""
    bench = Bench(recovering=True)
    one, _ = worker_back(bench, 0, replies=True), worker_back(bench, 1)
    declares = {"services": [deed()], "sessions": [], "waiting": True}
    bench.advance(bench.state.config.recovery_s - 0.01)
    client = bench.client(client=OWNER, declares=declares, holdings=[b"init"])
    bench.advance(0.1)
    one.say([REPLIES, 3, [id_of(1)], 1, OK, [4]], packed=b"done")
    bench.advance(0.1)
    assert bench.state.window is not None
    client.call(ENDPOINT, b"a", again=True)
    bench.advance(0.1)
    assert client.results == {1: (OK, b"done")}
    assert one.seen == []


def test_the_window_does_not_wait_for_ever() -> None:
    """F10."""
    bench = Bench(recovering=True)
    worker_back(bench, 0, replies=True)
    bench.advance(2 * bench.state.config.recovery_s + 0.1)
    assert bench.state.window is None


def test_the_last_fan_out_is_played_to_those_who_start_after_the_window() -> None:
    """F10, A11: the client that sent it remembers it; who came back has had it."""
    bench = Bench(recovering=True)
    of = deed(endpoint_options={"replay_last": True})
    one = bench.worker(launch=9, holds=holds(0, of=of), holdings=[b"init"])
    declares = {"services": [of], "sessions": [], "replays": [ENDPOINT]}
    bench.client(client=OWNER, declares=declares, holdings=[b"init", b"weights"])
    end_window(bench)
    (newcomer,) = bench.launched()
    assert [payloads[0] for message, payloads in newcomer.heard if message[0] == REPLAY] == [b"weights"]
    assert not one.of(REPLAY)
    newcomer.ready(played=0)
    assert not bench.service().replicas[1].healthy
    newcomer.ready(played=1)
    assert bench.service().replicas[1].healthy


def test_of_two_workers_that_hold_a_session_the_one_that_was_used_last_is_right() -> None:
    """F10, S3: the other is a zombie, of another host perhaps, that our predecessor had taken for dead."""
    for zombie_first in (True, False):
        bench = Bench(recovering=True)
        of = deed(exports=True)

        def zombie(bench: Bench = bench, of: dict[str, Any] = of) -> None:
            held = holds(0, of=of, sessions=[["s", 9.5]])
            bench.worker(holds=held, holdings=[b"init"]).say([STATES, ["s"], [3]], packed=b"old")

        if zombie_first:
            zombie()
        two = bench.worker(holds=holds(1, of=of, sessions=[["s", 0.5]]), holdings=[b"init"])
        two.say([STATES, ["s"], [3]], packed=b"new")
        if not zombie_first:
            zombie()
        client = client_back(bench, [SERVICE, "s", {}, True], of=of)
        end_window(bench)
        client.call(ENDPOINT, b"a", session="s")
        assert two.seen == [b"a"]
        kept = bench.service().sessions["s"].state
        assert kept is not None
        assert kept.payload == b"new"


def test_what_a_zombie_of_an_older_epoch_says_of_sessions_ends_with_its_seat() -> None:
    """F10, S3: it was stopped, and its session moved; let go on, it took up its last call, so that its use is the latest of all."""
    bench = Bench(recovering=True)
    of = deed(exports=True)
    zombie = bench.worker(holds=holds(0, of=of, epoch=2, sessions=[["s", 0.0]]), holdings=[b"init"])
    zombie.say([STATES, ["s"], [3]], packed=b"old")
    two = bench.worker(holds=holds(1, of=of, sessions=[["s", 2.5]]), holdings=[b"init"])
    two.say([STATES, ["s"], [3]], packed=b"new")
    one = bench.worker(holds=holds(0, of=of, sessions=[]), holdings=[b"init"])
    assert zombie.of(STOP)
    client = client_back(bench, [SERVICE, "s", {}, True], of=of)
    end_window(bench)
    client.call(ENDPOINT, b"a", session="s")
    assert (one.seen, two.seen) == ([], [b"a"])
    kept = bench.service().sessions["s"].state
    assert kept is not None
    assert kept.payload == b"new"


def test_of_two_workers_that_hold_a_session_the_wrong_one_is_told_to_forget_it() -> None:
    """F10, S3: the session may move there one day, and must not find an old state of its own."""
    bench = Bench(recovering=True)
    one = worker_back(bench, 0, sessions=[["s", 9.5]])
    two = worker_back(bench, 1, sessions=[["s", 0.5]])
    client_back(bench, [SERVICE, "s", {}, True])
    end_window(bench)
    assert one.of(FORGET) == [[FORGET, ["s"]]]
    assert not two.of(FORGET)


def test_a_call_that_came_back_running_may_not_hang_either() -> None:
    """F10, F1: its time counts from when it was asked for again, for nobody knows how long it had run."""
    bench = Bench(recovering=True)
    of = deed(num_replicas=1, endpoint_options={"hang_timeout_s": 5.0})
    one = bench.worker(holds=holds(0, of=of, running=[[id_of(1), 1]]), holdings=[b"init"])
    client = client_back(bench, of=of)
    client.call(ENDPOINT, b"a", again=True)
    end_window(bench)
    bench.advance(4.9 - bench.state.config.recovery_s)
    assert not bench.of(KillPeer)
    bench.advance(0.2)
    assert [kill.name for kill in bench.of(KillPeer)] == [one.name]


def test_behind_a_client_that_does_not_read_the_books_of_its_worker_stay_bounded() -> None:
    """F10, W8: others go on being served meanwhile, and each of their envelopes is remembered behind its."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    reader, name = bench.client(), worker.name
    client.call(endpoint, b"never read")
    worker.reply()
    client.received -= 1
    books = bench.state.workers[name].unsettled
    assert books.maxlen is not None
    books.extend([books[0]] * books.maxlen)
    reader.call(endpoint, b"a")
    worker.reply()
    reader.call(endpoint, b"b")
    assert len(books) == books.maxlen
    assert reader.results[1][1] == b"a"


def test_whoever_has_not_spoken_when_the_window_ends_is_counted() -> None:
    """F10: what it ran or waits for may run twice, which is worth knowing."""
    bench = Bench(recovering=True)
    worker_back(bench, 0, running=[[id_of(1), 1]])  # its owner, who waits for that call, does not come
    worker_back(bench, 1, replies=True)  # and sends none
    end_window(bench)
    bench.advance(bench.state.config.recovery_s + 0.1)
    assert bench.state.counters["recovery_unheard"] == 2
    bench = Bench(recovering=True)
    worker = worker_back(bench, 0, replies=True)
    client = client_back(bench)
    worker.say([REPLIES, 3, [id_of(1)], 1, OK, [4]], packed=b"done")
    client.call(ENDPOINT, b"a", again=True)
    end_window(bench)
    assert bench.state.counters["recovery_unheard"] == 0


def test_an_owner_that_goes_again_in_the_window_takes_its_service_along() -> None:
    """F10, A10: nobody else would ever end it."""
    bench = Bench(recovering=True)
    worker = worker_back(bench, 0)
    bench.handle_gone(client_back(bench, [SERVICE, "s", {}, True]))
    end_window(bench)
    assert isinstance(bench.service().stopping, ServiceStopped)
    assert worker.of(STOP)
    assert not bench.service().sessions


def test_an_owner_whose_hello_is_refused_owns_nothing() -> None:
    """F10, W8: also what it had declared before the nonsense."""
    bench = Bench(recovering=True)
    worker = worker_back(bench, 0)
    client = client_back(bench, [SERVICE, "s", {}, True], ["nonsense"])
    assert client.of(REFUSE)
    assert not bench.state.clients
    end_window(bench)
    assert isinstance(bench.service().stopping, ServiceStopped)
    assert worker.of(STOP)
    assert not bench.service().sessions
