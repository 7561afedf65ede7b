"""The life of a call: acceptance, routing, order, fan-outs, meshes, cancellation, loss (R1–R3, F2, F5, A5–A7, A12, W3, W8)."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from forge_contract.errors import (
    BadCall,
    CallCancelled,
    CallTimeout,
    NoHealthyReplicas,
    OutcomeUnknown,
    Overloaded,
    ProtocolError,
    ReplicaLost,
    RouterError,
    UnknownService,
    from_wire,
)
from forge_contract.messages import BYE, CALLS, DROP, DROPPED, FAILED, FANOUT, OK, RAISED, REPLIES, UNTOUCHED
from forge_contract.routing import Router
from tests.core.peers import Bench, built_in


def test_a_stateless_call_waits_in_its_endpoints_queue_while_nobody_has_room() -> None:
    """R1: late binding: the replica that frees up first gets it."""
    _bench, client, (one, two), endpoint = Bench().serving(2, replica_max_concurrent_requests=1)
    client.call(endpoint, b"a", b"b", b"c")
    assert (one.seen, two.seen) == ([b"a"], [b"b"])
    two.reply()
    assert two.seen == [b"b", b"c"]
    assert client.results == {2: (OK, b"b")}


def test_a_slow_endpoint_does_not_starve_another() -> None:
    """R1: the queues take turns, so three calls of the other endpoint do not wait behind a hundred."""
    serving = Bench().serving(1, endpoints=("slow", "quick"), replica_max_concurrent_requests=1)
    _bench, client, (worker,), slow = serving
    quick = serving.service.endpoints[1].id
    client.call(slow, *[b"s"] * 100)
    client.call(quick, b"q", b"q", b"q")
    for _ in range(8):
        worker.reply()
    assert worker.seen.count(b"q") == 3


def test_calls_gathered_in_one_envelope_spread_evenly_in_turn() -> None:
    """R3: 16 calls over 4 replicas, round-robin, are exactly 4 each."""
    _, client, workers, endpoint = Bench().serving(4)
    client.call(endpoint, *[b"x"] * 16)
    assert [len(worker.calls) for worker in workers] == [4, 4, 4, 4]


def test_higher_priorities_go_first_and_equals_in_order() -> None:
    """The column `priority`."""
    _, client, (worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=1)
    client.call(endpoint, b"first")
    client.call(endpoint, b"low", b"a", b"high", b"b", priority=[-5, 0, 7, None])
    for _ in range(5):
        worker.reply()
    assert worker.seen == [b"first", b"high", b"a", b"b", b"low"]


class Custom(Router):
    """Does what it is told."""

    def __init__(self) -> None:
        self.plan: Any = None
        self.views: list[Any] = []

    def get_replica(
        self, healthy_replicas: Any, sess_id: Any = None, session_map: Any = None, hints: Any = None
    ) -> Any:
        self.views = [(one.idx, one.has_room, one.current_load, one.healthy) for one in healthy_replicas]
        self.hints = hints
        return self.plan(healthy_replicas)


def with_router(replicas: int, **options: Any) -> tuple[Custom, Any]:
    router = Custom()
    bench = Bench(unpickle=lambda _: router)
    return router, bench.serving(replicas, routers={"predict": {"code": b"pickle"}}, **options)


def test_a_router_sees_all_healthy_replicas_and_a_full_choice_parks_the_call() -> None:
    """R2: it is asked while somebody has room, and may still choose one that has none."""
    router, (_, client, (one, two), endpoint) = with_router(2, replica_max_concurrent_requests=1)
    router.plan = lambda views: views[0]
    client.call(endpoint, b"a", b"b", hints={"k": 1})
    assert router.views == [(0, False, 1, True), (1, True, 0, True)]
    assert router.hints == {"k": 1}
    assert (one.seen, two.seen) == ([b"a"], [])
    one.reply()
    assert one.seen == [b"a", b"b"]


@pytest.mark.parametrize("fault", ["raises", "foreign", "none", "number", "other service"])
def test_what_a_router_does_wrong_fails_its_call_and_nothing_else(fault: str) -> None:
    """R3."""
    router, (bench, client, (worker,), endpoint) = with_router(1)
    client.deploy(class_name="Other")
    (other,) = bench.launched()
    other.ready()
    foreign = bench.service("Other").replicas[0]

    def wrong(views: Any) -> Any:
        if fault == "raises":
            raise KeyError("no")
        return {"foreign": object(), "none": None, "number": 0, "other service": foreign}[fault]

    router.plan = wrong
    (bad,) = client.call(endpoint, b"bad")
    router.plan = lambda views: views[0]
    client.call(endpoint, b"good")
    error = client.error(bad)
    assert isinstance(error, RouterError)
    assert "Custom" in str(error)
    assert worker.seen == [b"good"]


def test_each_endpoint_has_its_own_router() -> None:
    """R2: two round-robins over the same replicas do not disturb each other."""
    serving = Bench().serving(2, endpoints=("a", "b"))
    _, client, (one, two), a = serving
    b = serving.service.endpoints[1].id
    for _ in range(2):
        client.call(a, b"a")
        client.call(b, b"b")
    assert (one.seen, two.seen) == ([b"a", b"b"], [b"a", b"b"])


def test_calls_parked_for_one_replica_are_bounded() -> None:
    """W8: affinity to a busy replica fills its own queue up to the limit, then callers are told to come again."""
    serving = Bench().serving(
        2,
        routers={"predict": built_in("ConsistentHashRouter")},
        replica_max_concurrent_requests=1,
        max_queued_requests=3,
    )
    _, client, _, endpoint = serving
    sequences = client.call(endpoint, *[b"x"] * 10, hints={"key": "same"})
    refused = [sequence for sequence in sequences if sequence in client.results]
    assert len(refused) == 6
    error = client.error(refused[0])
    assert isinstance(error, Overloaded)
    assert error.retry_after_s > 0


def test_past_the_queues_limit_callers_are_told_at_once() -> None:
    """W8: but what the pump can place at once does not count."""
    _, client, (worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=4, max_queued_requests=2)
    sequences = client.call(endpoint, *[b"x"] * 10)
    assert len(worker.calls) == 4
    errors = [client.error(sequence) for sequence in sequences[6:]]
    assert all(isinstance(error, Overloaded) and error.retry_after_s > 0 for error in errors)
    assert len(client.results) == 4


def test_bytes_of_unanswered_calls_are_bounded_and_fanouts_count() -> None:
    """W8."""
    bench, client, (worker,), endpoint = Bench(max_queue_bytes=100).serving(1)
    client.fanout(endpoint, b"x" * 101)
    (refused,) = client.call(endpoint, b"y")
    assert isinstance(client.error(refused), Overloaded)
    worker.reply()
    assert bench.state.held_bytes == 0
    assert client.call(endpoint, b"y")[0] not in client.results


def test_a_client_that_does_not_acknowledge_gets_no_more_than_link_bytes() -> None:
    """W8, PROTOCOL.md §4.4."""
    bench, client, (worker,), endpoint = Bench(link_bytes=500).serving(1)
    client.call(endpoint, b"x")
    worker.reply(payload=b"y" * 600)
    client.received = 0  # says that nothing arrived
    (refused,) = client.call(endpoint, b"x")
    assert bench.state.links[client.name].channel.kept_bytes > 500
    assert refused not in client.results or isinstance(client.error(refused), Overloaded)


def test_an_unknown_endpoint_and_a_rank_that_is_none_fail_their_calls() -> None:
    """W8."""
    _, client, _, endpoint = Bench().serving(1)
    assert isinstance(client.error(client.call(99999, b"x")[0]), UnknownService)
    assert isinstance(client.error(client.call(endpoint, b"x", rank=1)[0]), BadCall)
    assert isinstance(client.error(client.fanout(99999)), UnknownService)


def test_an_id_in_use_is_not_accepted_twice() -> None:
    """W3: the repeated one is counted; the first keeps its one reply."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.call(endpoint, b"x")
    client.say([CALLS, endpoint, [1, 1], [1, 1], {}], packed=b"yz")
    client.say([FANOUT, endpoint, 1, 1, {}], packed=b"y")
    assert bench.state.counters["reused_ids"] == 3
    worker.reply()
    assert client.results == {1: (OK, b"x")}


def test_an_id_used_again_while_its_cancelled_call_still_runs_is_refused() -> None:
    """W3, F5: the ledger could not tell the two apart, and room would leak."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.call(endpoint, b"x")
    client.cancel(1)
    del client.results[1]
    client.say([CALLS, endpoint, [1], [1], {}], packed=b"y")
    assert isinstance(client.error(1), ProtocolError)
    worker.reply(status=DROPPED)
    assert bench.service().replicas[0].active == 0


# Fan-outs.


def test_a_fanout_reaches_every_healthy_replica_and_is_one_reply_in_replica_order() -> None:
    """A5."""
    _, client, workers, endpoint = Bench().serving(3)
    sequence = client.fanout(endpoint, b"w")
    for worker, value in zip(reversed(workers), (b"2", b"1", b"0"), strict=True):
        assert not client.parts
        worker.reply(payload=value)
    assert client.parts[sequence] == {(0, 0): (OK, b"0"), (1, 0): (OK, b"1"), (2, 0): (OK, b"2")}


def test_the_part_of_a_replica_that_dies_is_replica_lost_and_is_not_tried_elsewhere() -> None:
    """A5: running or still parked, a fan-out is never re-routed."""
    _, client, (one, two), endpoint = Bench().serving(2, replica_max_concurrent_requests=1)
    client.call(endpoint, b"a", b"b")
    sequences = [client.fanout(endpoint), client.fanout(endpoint)]
    one.reply(1)
    assert one.calls
    one.die()
    two.reply()
    two.reply()
    two.reply()
    for sequence in sequences:
        parts = client.parts[sequence]
        status, payload = parts[0, 0]
        assert status == FAILED
        assert isinstance(from_wire(msgpack.unpackb(payload)), ReplicaLost)
        assert parts[1, 0] == (OK, b"x")


def test_a_fanout_with_nobody_healthy_says_so() -> None:
    """F8."""
    _, client, (one,), endpoint = Bench().serving(1)
    one.die()
    error = client.error(client.fanout(endpoint))
    assert isinstance(error, NoHealthyReplicas)
    assert "RECOVERING" in str(error)


@pytest.mark.parametrize("timeout", [[1.0], 1.0])
def test_a_fanout_that_takes_too_long_fails_as_a_whole(timeout: Any) -> None:
    """F5: columns may come as lists of one; running parts are dropped, parked ones leave."""
    bench, client, (one, two), endpoint = Bench().serving(2, replica_max_concurrent_requests=1)
    client.call(endpoint, b"a")
    sequence = client.fanout(endpoint, timeout=timeout)
    bench.advance(1.5)
    assert isinstance(client.error(sequence), CallTimeout)
    assert two.of(DROP)
    one.reply()
    two.reply(status=DROPPED)
    assert one.seen == [b"a"]
    assert [replica.active for replica in bench.service().replicas.values()] == [0, 0]


@pytest.mark.parametrize("columns", [{"timeout": [None]}, {"session": ["s"]}, {"hints": {}}, {"priority": [3]}])
def test_a_fanout_takes_any_well_formed_columns(columns: Any) -> None:
    """W8, S1: it ignores the session."""
    _, client, (worker,), endpoint = Bench().serving(1)
    sequence = client.fanout(endpoint, **columns)
    worker.reply()
    assert client.parts[sequence] == {(0, 0): (OK, b"x")}


def test_a_fanouts_part_given_back_is_left_out_unless_it_is_the_only_one() -> None:
    """A5: there is no other replica it could go to, and this one, which leaves, is one of the healthy no more."""
    _, client, (one, two), endpoint = Bench().serving(2)
    sequence = client.fanout(endpoint)
    one.reply(status=UNTOUCHED)
    two.reply()
    assert client.parts[sequence] == {(1, 0): (OK, b"x")}
    _, client, (only,), endpoint = Bench().serving(1)
    sequence = client.fanout(endpoint)
    only.reply(status=UNTOUCHED)
    assert client.parts[sequence][0, 0][0] == FAILED


# Meshes.


def test_every_rank_gets_each_call_in_the_same_order_one_at_a_time() -> None:
    """A7: collectives of two calls must not cross."""
    _, client, (zero, one), endpoint = Bench().serving(1, procs=2)
    sequences = client.call(endpoint, b"a", b"b", b"c")
    for _ in range(3):
        assert len(zero.calls) == len(one.calls) == 1
        one.reply(payload=b"1")
        zero.reply(payload=b"0")
    assert zero.seen == one.seen == [b"a", b"b", b"c"]
    assert client.results == dict.fromkeys(sequences, (OK, b"0"))


def test_a_service_that_wants_all_ranks_gets_their_values_as_parts() -> None:
    """A7: `return_first_rank_result=False`; a rank that raised is among them."""
    _, client, (zero, one), endpoint = Bench().serving(1, procs=2, return_first_rank_result=False)
    (sequence,) = client.call(endpoint, b"a")
    one.reply(status=RAISED, payload=b"E")
    zero.reply(payload=b"0")
    assert client.parts[sequence] == {(0, 0): (OK, b"0"), (0, 1): (RAISED, b"E")}


def test_the_first_ranks_value_does_not_hide_another_ranks_exception() -> None:
    """A7, A5."""
    _, client, (zero, one), endpoint = Bench().serving(1, procs=2)
    (sequence,) = client.call(endpoint, b"a")
    zero.reply(payload=b"0")
    one.reply(status=RAISED, payload=b"E")
    assert client.results[sequence] == (RAISED, b"E")


def test_a_call_meant_for_one_rank_reaches_only_that_one() -> None:
    """The column `rank`; a reply by another rank is fenced (W3)."""
    bench, client, (zero, one), endpoint = Bench().serving(1, kind="actor", procs=2)
    (sequence,) = client.call(endpoint, b"a", rank=1)
    assert (zero.seen, one.seen) == ([], [b"a"])
    zero.say([REPLIES, 1, [one.calls[0][0]], [1], 0, [1]], packed=b"z")
    assert bench.state.ledger.fenced == 1
    one.reply(payload=b"1")
    assert client.results[sequence] == (OK, b"1")


def test_a_status_of_a_worker_never_reaches_a_client_that_does_not_know_it() -> None:
    """PROTOCOL.md §7: DROPPED and UNTOUCHED are between worker and broker."""
    _, client, (zero, one), endpoint = Bench().serving(1, kind="actor", procs=2)
    (sequence,) = client.call(endpoint, b"a")
    zero.reply(status=DROPPED)
    one.reply()
    assert {status for status, _ in client.parts[sequence].values()} == {FAILED, OK}


# Failures.


def test_calls_of_a_lost_replica_return_in_their_old_order_before_the_others() -> None:
    """F2: attempt + 1, to the front."""
    bench, client, (one,), endpoint = Bench().serving(1, replica_max_concurrent_requests=3)
    client.call(endpoint, b"a", b"b", b"c", b"d")
    one.die()
    bench.advance(0.1)
    (again,) = bench.launched()
    again.ready()
    assert [(attempt, payload) for _, attempt, payload in again.calls] == [(2, b"a"), (2, b"b"), (2, b"c")]
    again.reply()
    assert again.seen == [b"a", b"b", b"c", b"d"]


def test_returned_calls_keep_their_priority_and_their_order_within_it() -> None:
    """F2."""
    bench, client, (one,), endpoint = Bench().serving(1, replica_max_concurrent_requests=2)
    client.call(endpoint, b"a", b"b", b"c", priority=[0, 5, 0])
    client.call(endpoint, b"d", priority=5)
    assert one.seen == [b"b", b"a"]
    one.die()
    bench.advance(0.1)
    (again,) = bench.launched()
    again.ready()
    again.reply()
    assert again.seen == [b"b", b"d", b"a", b"c"]


def test_a_reply_that_is_not_the_current_one_is_refused_and_counted() -> None:
    """W3: wrong attempt, wrong epoch, unknown request, another worker's."""
    bench, client, (one, two), endpoint = Bench().serving(2)
    client.call(endpoint, b"a")
    ((key, attempt, _),) = one.calls
    fenced = bench.state.ledger
    one.say([REPLIES, 1, [key], [attempt + 1], 0, [1]], packed=b"?")
    one.say([REPLIES, 2, [key], [attempt], 0, [1]], packed=b"?")
    one.say([REPLIES, 1, [key + 1], [attempt], 0, [1]], packed=b"?")
    two.say([REPLIES, 1, [key], [attempt], 0, [1]], packed=b"?")
    bench.worker().say([REPLIES, 1, [key], [attempt], 0, [1]], packed=b"?")
    assert fenced.fenced == 5
    assert not client.results
    one.reply()
    one.say([REPLIES, 1, [key], [attempt], 0, [1]], packed=b"?")
    assert fenced.fenced == 6
    assert client.results == {1: (OK, b"a")}


def test_a_late_reply_from_a_worker_thought_dead_is_refused() -> None:
    """W3, known wrong way 14."""
    bench, client, (zero, one), endpoint = Bench().serving(1, procs=2)
    client.call(endpoint, b"a")
    zero.die()
    one.reply(payload=b"late")
    assert not client.results
    assert bench.state.ledger.fenced == 1


def test_an_actors_calls_in_flight_are_outcome_unknown_and_queued_ones_reach_the_new_incarnation() -> None:
    """A12."""
    bench, client, (one,), endpoint = Bench().serving(1, kind="actor", replica_max_concurrent_requests=1)
    running, queued = client.call(endpoint, b"a", b"b")
    assert client.ask("find", name="Echo")["state_epoch"] == 1
    one.die()
    assert isinstance(client.error(running), OutcomeUnknown)
    bench.advance(0.1)
    (again,) = bench.launched()
    again.ready()
    again.reply()
    assert client.results[queued] == (OK, b"b")
    assert client.ask("find", name="Echo")["state_epoch"] == 2


def test_a_cancelled_call_that_waits_is_gone_and_one_that_runs_keeps_its_room_until_it_ends() -> None:
    """F5."""
    bench, client, (worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=1)
    running, waiting, last = client.call(endpoint, b"a", b"b", b"c")
    client.cancel(running, waiting)
    assert all(isinstance(client.error(sequence), CallCancelled) for sequence in (running, waiting))
    assert worker.of(DROP) == [[DROP, client.ids([running])]]
    assert worker.seen == [b"a"]
    worker.reply(status=DROPPED)
    assert worker.seen == [b"a", b"c"]
    client.cancel(running, last, 17)
    assert bench.state.ledger.fenced == 0


def test_many_cancelled_calls_share_one_message() -> None:
    """C2: an envelope has a limit of messages, a column has none."""
    _, client, (worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=100)
    sequences = client.call(endpoint, *[b"x"] * 100)
    client.cancel(*sequences)
    assert worker.of(DROP) == [[DROP, client.ids(sequences)]]


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_calls_time_is_up_wherever_it_is(state: str) -> None:
    """F5, C1: the answer says where it was; the replica stays healthy (known wrong way 1)."""
    bench, client, (_worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=1)
    if state == "queued":
        client.call(endpoint, b"long")
    (sequence,) = client.call(endpoint, b"x", timeout=2.0)
    bench.advance(1.9)
    assert sequence not in client.results
    bench.advance(0.2)
    error = client.error(sequence)
    assert isinstance(error, CallTimeout)
    assert state in str(error)
    assert bench.service().replicas[0].healthy


def test_a_parked_call_and_an_unpinned_one_run_out_of_time_too() -> None:
    """F5: the counts of their session survive it (checked by the invariants)."""
    bench, client, (worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=1)
    client.ask("open_session", service="Echo", session="s")
    client.ask("open_session", service="Echo", session="t")
    client.call(endpoint, b"a", session="s")
    parked, unpinned = client.call(endpoint, b"b", b"c", session=["s", "t"], timeout=[1.0, 1.0])
    bench.advance(2.0)
    assert isinstance(client.error(parked), CallTimeout)
    assert isinstance(client.error(unpinned), CallTimeout)
    worker.reply()
    assert worker.seen == [b"a"]


def test_a_timeout_that_is_no_number_does_not_stop_the_clock() -> None:
    """W8: nan compares with nothing; in the heap it would hide every later deadline."""
    bench, client, _, endpoint = Bench().serving(1)
    client.call(endpoint, b"x", timeout=float("nan"))
    assert bench.state.counters["ProtocolError"] == 1


def test_deadlines_of_answered_calls_do_not_pile_up() -> None:
    """W8: never grows without bound, even with long timeouts at a high rate."""
    bench, client, (worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=1000)
    for _ in range(15):
        client.call(endpoint, *[b"x"] * 1000, timeout=3600.0)
        worker.reply()
    assert len(bench.state.deadlines) < 11_500


def test_calls_wait_for_a_healthy_replica_up_to_the_grace_and_then_learn_what_each_is_doing() -> None:
    """F8: each call has its own grace, counted from when nobody was healthy or from its coming."""
    bench, client, (worker,), endpoint = Bench().serving(1, no_replica_grace_s=10.0, restart_backoff_s=1000.0)
    worker.die()
    (first,) = client.call(endpoint, b"a")
    bench.advance(6.0)
    (second,) = client.call(endpoint, b"b")
    bench.advance(4.1)
    error = client.error(first)
    assert isinstance(error, NoHealthyReplicas)
    assert "Echo/0 is RECOVERING" in str(error)
    assert "exit code 1" in str(error)
    assert second not in client.results
    bench.advance(6.0)
    assert isinstance(client.error(second), NoHealthyReplicas)


def test_the_grace_begins_anew_when_a_replica_was_healthy_in_between() -> None:
    """F8: a call is not failed for yesterday's outage."""
    bench, client, (worker,), endpoint = Bench().serving(1, no_replica_grace_s=10.0)
    worker.die()
    client.call(endpoint, b"a")
    bench.advance(9.0)
    (again,) = bench.launched()
    again.ready()
    again.die()
    bench.advance(5.0)
    assert not client.results
    bench.advance(6.0)
    assert isinstance(client.error(1), NoHealthyReplicas)


def test_a_worker_that_gives_calls_back_gets_no_new_ones() -> None:
    """F9, F3: it is on its way out; what was only queued there runs elsewhere, and is not lost for an actor either."""
    _bench, client, (one, two), endpoint = Bench().serving(2, replica_max_concurrent_requests=2)
    client.call(endpoint, b"a", b"b", b"c")
    running, given = one.calls
    one.calls = [given]
    one.reply(status=UNTOUCHED)
    assert two.seen == [b"c", b"b"]
    client.call(endpoint, b"d")
    assert one.seen == [b"a", b"b"]
    one.calls = [running]
    one.reply()
    one.say([BYE, "SIGTERM"])
    two.reply()
    assert {value for _, value in client.results.values()} == {b"a", b"b", b"c"}
    assert two.seen[2:] == [b"d"]


def test_an_actors_calls_given_back_wait_for_its_next_incarnation() -> None:
    """F3: a request that was only queued is always dispatched again, at-most-once or not."""
    bench, client, (one,), endpoint = Bench().serving(1, kind="actor", replica_max_concurrent_requests=2)
    client.call(endpoint, b"a", b"b")
    one.reply(status=UNTOUCHED)
    assert one.calls == []
    one.say([BYE, "SIGTERM"])
    bench.advance(0.1)
    (again,) = bench.launched()
    again.ready()
    again.reply()
    assert client.results == {1: (OK, b"a"), 2: (OK, b"b")}


@pytest.mark.parametrize(
    "message",
    [
        [REPLIES, 1, [1], [1], 9, [0]],
        [REPLIES, 1, [1], [1], [0, 0], [0]],
        [REPLIES, 1, ["x"], 1, 0, [0]],
        [REPLIES, 1, [1], 1, 0],
        [REPLIES, 1, [1], 1, 0, [5]],
        [REPLIES, 1, [1], 1, 0, [-3]],
    ],
    ids=str,
)
def test_replies_that_are_nonsense_cost_the_worker_its_link(message: list[Any]) -> None:
    """W8: and its calls go back to their queue."""
    bench, client, (one,), endpoint = Bench().serving(1)
    client.call(endpoint, b"a")
    one.say(message)
    assert bench.state.counters["ProtocolError"] == 1
    bench.end_killed()
    bench.advance(0.1)
    (again,) = bench.launched()
    again.ready()
    assert again.seen == [b"a"]
