"""Poison (F4): which deaths make suspects, that a suspect runs alone, and what becomes of one that kills again."""

from __future__ import annotations

import pytest

from forge_broker.core.actions import Kill, KillPeer, Look
from forge_broker.core.events import Stopped
from forge_contract.errors import BadCall, OutcomeUnknown, PoisonedRequest, SessionLost
from forge_contract.messages import RAISED, UNREADY, show_request
from tests.core.peers import Bench, WorkerPeer


def revived(bench: Bench) -> list[WorkerPeer]:
    """Those that were launched meanwhile, ready to serve."""
    bench.advance(40.0)
    workers = bench.launched()
    for worker in workers:
        worker.ready()
    return workers


def test_a_call_that_kills_every_replica_is_poison_at_its_third_death_and_its_companions_are_acquitted() -> None:
    """F4, F3."""
    bench, client, (first,), endpoint = Bench().serving(1)
    client.call(endpoint, b"good", b"bad", b"also good")
    first.die()
    (second,) = revived(bench)
    assert second.seen == [b"good", b"bad", b"also good"]
    second.die()
    (third,) = revived(bench)
    assert third.seen == [b"good"]  # the last attempt is made alone, whoever it is
    third.reply()
    assert third.seen == [b"good", b"bad"]
    third.die()
    assert isinstance(client.error(2), PoisonedRequest)
    (fourth,) = revived(bench)
    assert fourth.seen == [b"also good"]
    fourth.reply()
    assert [client.results[sequence][1] for sequence in (1, 3)] == [b"good", b"also good"]
    assert bench.service().cell is None
    client.call(endpoint, b"next", b"one more")
    assert fourth.seen == [b"also good", b"next", b"one more"]


def test_a_suspect_waits_until_its_replica_runs_nothing_else_and_the_others_go_on() -> None:
    """F4: alone on a replica, not in the service."""
    bench, client, (one, two), endpoint = Bench().serving(2, replica_max_concurrent_requests=2)
    client.call(endpoint, b"a")
    one.die()
    assert two.seen == [b"a"]
    client.call(endpoint, b"b")
    (again,) = revived(bench)
    two.die()  # a: second death, b: its first
    assert again.seen == [b"a"]
    (other,) = revived(bench)
    assert other.seen == [b"b"]
    client.call(endpoint, b"c", b"d", b"e")
    assert (again.seen, other.seen) == ([b"a"], [b"b", b"c"])  # the cell takes nothing else, the other fills up
    again.reply()
    assert again.seen == [b"a", b"d", b"e"]


def test_a_death_the_broker_chose_convicts_nobody() -> None:
    """F4, F9: drained and restarted ever so often, a call is no suspect."""
    bench, client, (worker, _), endpoint = Bench().serving(2, replica_max_concurrent_requests=1)
    client.call(endpoint, b"a")
    for _ in range(4):
        holder = next(one for one in bench.state.workers.values() if one.replica and one.replica.active)
        client.control("drain", target=holder.name)
        peer = next(one for one in bench.peers.values() if one.name == holder.name)
        assert isinstance(peer, WorkerPeer)
        peer.die()
        revived(bench)
    assert not client.results
    assert not bench.service().suspects.length
    (request,) = bench.state.clients[client.id].calls.values()
    assert getattr(request, "deaths", None) == 0
    del worker


def test_an_ill_replica_is_replaced_and_its_calls_are_no_suspects() -> None:
    """F1 (health), F6."""
    bench, client, (one, two), endpoint = Bench().serving(2)
    client.call(endpoint, b"a")
    one.say([UNREADY, ["ReplicaLost", {"replica": "Echo/0", "why": "health() returned False"}], 0])
    assert two.seen == [b"a"]
    assert bench.service().replicas[0].restarts == 1
    (request,) = bench.state.clients[client.id].calls.values()
    assert getattr(request, "deaths", None) == 0


def test_what_goes_wrong_for_a_caller_harms_no_replica() -> None:
    """A5, F5: an exception, a timeout, a cancellation, a client that dies."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    other = bench.client()
    client.call(endpoint, b"raises")
    worker.reply(status=RAISED)
    client.call(endpoint, b"takes long", timeout=1.0)
    bench.advance(1.5)
    (given_up,) = client.call(endpoint, b"given up")
    client.cancel(given_up)
    other.call(endpoint, b"left behind")
    bench.handle_gone(other)
    worker.reply()
    client.call(endpoint, b"last")
    assert worker.seen[-1] == b"last"
    replica = bench.service().replicas[0]
    assert (replica.healthy, replica.epoch, replica.restarts, replica.deaths) == (True, 1, 0, 0)
    assert not bench.of(Kill)


def test_at_most_once_is_never_tried_again() -> None:
    """F3."""
    _, client, (one, _two), endpoint = Bench().serving(2, delivery="at_most_once")
    client.call(endpoint, b"a")
    one.die()
    assert isinstance(client.error(1), OutcomeUnknown)


def test_what_was_given_up_is_not_run_again_when_its_replica_dies() -> None:
    """F5, F2: its caller has had its answer."""
    _, client, (one, two), endpoint = Bench().serving(2)
    client.call(endpoint, b"cancelled", b"elsewhere")
    client.cancel(1)
    one.die()
    assert (two.seen, len(client.results)) == ([b"elsewhere"], 1)


def test_the_calls_of_a_suspects_session_wait_behind_it() -> None:
    """F4, A6: in the order sent, also through two deaths."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.ask("open_session", service="Echo", session="s", hints={})
    client.call(endpoint, b"1", b"2", session="s")
    worker.die()
    (worker,) = revived(bench)
    worker.die()
    client.call(endpoint, b"3", session="s")
    (worker,) = revived(bench)
    assert worker.seen == [b"1"]
    client.call(endpoint, b"4", session="s")
    for _ in range(4):
        worker.reply(1)
    assert worker.seen == [b"1", b"2", b"3", b"4"]
    assert len(client.results) == 4


def test_what_waits_behind_a_suspect_fails_when_its_session_is_lost() -> None:
    """F4, S3: it would run in a session that does not know what it was told before."""
    bench, client, (first,), endpoint = Bench().serving(1, on_session_loss="raise")
    client.ask("open_session", service="Echo", session="s", hints={})
    client.call(endpoint, b"1", b"2", b"3", session="s")
    first.die()
    (second,) = revived(bench)
    second.die()
    (third,) = revived(bench)
    third.reply()
    assert third.seen == [b"1", b"2"]
    third.die()
    assert isinstance(client.error(2), PoisonedRequest)
    assert isinstance(client.error(3), SessionLost)
    (fourth,) = revived(bench)
    assert fourth.seen == []


def test_a_suspect_that_is_cancelled_gives_its_cell_back() -> None:
    """F4, F5."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.call(endpoint, b"1")
    worker.die()
    revived(bench)[0].die()
    client.cancel(1)
    (worker,) = revived(bench)
    client.call(endpoint, b"2", b"3")
    assert worker.seen == [b"2", b"3"]


def test_dead_letters_are_kept_shown_taken_and_dropped() -> None:
    """F4: with their arguments and their story, bounded."""
    bench, client, (worker,), endpoint = Bench(dead_letters=1).serving(1)
    for payload in (b"first", b"second"):
        (sequence,) = client.call(endpoint, payload)
        for _ in range(3):
            worker.die()
            (worker,) = revived(bench)
        assert isinstance(client.error(sequence), PoisonedRequest)
    (letter,) = client.ask("dead_list")["dead"]
    name = show_request(client.ids([2])[0])
    assert (letter["id"], letter["endpoint"], letter["attempts"], letter["bytes"]) == (name, "predict", 3, 6)
    assert any("suspect" in line for line in client.ask("dead_show", id=name)["story"])
    number = client.control("dead_take", id=name)
    assert client.answers[number] == {"service": bench.service().id, "endpoint": endpoint, "trusted": True}
    assert b"second" in [payload for _, payloads in client.heard for payload in payloads]
    assert client.ask("dead_drop", id=name) == {"dropped": 1}
    assert client.ask("dead_list")["dead"] == []
    assert isinstance(client.ask("dead_show", id=name), BadCall)


def test_a_call_that_runs_too_long_costs_its_replica_and_is_the_only_suspect() -> None:
    """F1, F4: hang_timeout_s."""
    bench, client, (one, two), endpoint = Bench().serving(2, endpoint_options={"hang_timeout_s": 3.0})
    client.call(endpoint, b"hangs", b"elsewhere")
    bench.advance(1.0)
    client.call(endpoint, b"companion", b"elsewhere too")
    two.reply()
    bench.advance(2.0)
    assert bench.of(Kill)
    assert two.calls[0][2] == b"hangs"
    calls = {bytes(call.payload): call for call in bench.state.clients[client.id].calls.values()}
    assert {payload: getattr(call, "deaths", None) for payload, call in calls.items()} == {b"hangs": 1, b"companion": 0}
    assert one.seen == [b"hangs", b"companion"]


def test_a_call_that_ends_in_time_hangs_nothing() -> None:
    """F1."""
    bench, client, (worker,), endpoint = Bench().serving(1, endpoint_options={"hang_timeout_s": 3.0})
    client.call(endpoint, b"a")
    worker.reply()
    bench.advance(10.0)
    assert not bench.of(Kill)


@pytest.mark.parametrize("launched", [True, False])
def test_a_silent_worker_of_this_machine_is_looked_at_and_killed_if_it_is_stopped(launched: bool) -> None:
    """F1: silence is busy; state T is not."""
    bench = Bench()
    target = bench.serving(1).workers[0] if launched else bench.worker()
    bench.advance(5.5)
    assert target.name in {look.name for look in bench.of(Look)}
    bench.handle(Stopped(target.name))
    assert bench.of(Kill) if launched else bench.of(KillPeer)


def test_calls_that_end_in_time_leave_nothing_to_look_at() -> None:
    """F1: one entry for all calls of an endpoint on a replica, however many come by; a call begun later has its own time."""
    bench, client, (worker,), endpoint = Bench().serving(
        1, endpoint_options={"hang_timeout_s": 60.0}, replica_max_concurrent_requests=100
    )
    before = len(bench.state.deadlines)
    for _ in range(50):
        client.call(endpoint, b"a", b"b")
        worker.reply()
    assert len(bench.state.deadlines) <= before + 3  # the watch, and the links' own
    bench.advance(50.0)
    client.call(endpoint, b"late")
    bench.advance(59.0)
    assert not bench.of(Kill)
    bench.advance(1.0)
    assert bench.of(Kill)


def test_a_suspect_stays_alone_when_the_next_ones_session_lives_elsewhere() -> None:
    """F4: the replica that is kept for it is given up for the other's when it has ended, not before."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.ask("open_session", service=bench.service().id, session="s", hints={})
    client.call(endpoint, b"first")
    client.call(endpoint, b"second", session="s")
    worker.die()
    (worker,) = revived(bench)
    assert sorted(worker.seen) == [b"first", b"second"]
    worker.die()
    client.ask("scale", service="Echo", replicas=2, wait=False)
    one, two = revived(bench)
    service = bench.service()
    service.pin("s", next(replica for replica in service.replicas.values() if replica is not service.cell))
    client.call(endpoint, b"other")
    two.reply()  # room is looked for anew
    client.call(endpoint, b"another", b"and another")
    assert (one.seen, two.seen) == ([b"first"], [b"other", b"another", b"and another"])
    one.reply()
    assert two.seen[3:] == []  # now that one is kept free
    two.reply()
    assert two.seen[3:] == [b"second"]
