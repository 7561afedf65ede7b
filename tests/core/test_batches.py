"""Batches as the broker makes them (B1–B3): which calls, when, why, and what room they take. Virtual time throughout."""

from __future__ import annotations

from typing import Any

import pytest

from forge_broker.core.metrics import metrics
from forge_broker.core.requests import Request, Slice
from forge_contract.errors import (
    CallCancelled,
    CallTimeout,
    Overloaded,
    PoisonedRequest,
    RouterError,
    ServiceStopped,
)
from forge_contract.messages import OK, RAISED, UNTOUCHED, show_request
from tests.core.peers import Bench, Serving, built_in
from tests.core.test_dispatch import Custom


def serving(
    replicas: int = 1, *, batch: dict[str, Any] | None = None, bench: Bench | None = None, **options: Any
) -> Serving:
    """Batches of up to 4, of calls at most 10 ms old."""
    endpoint = {"batch_size": 4, "batch_timeout": 0.01, "batch_mode": "call", **(batch or {})}
    return (bench or Bench()).serving(replicas, endpoint_options=endpoint, **options)


def reasons(bench: Bench) -> dict[str, int]:
    batcher = bench.service().endpoints[0].batcher
    assert batcher is not None
    return dict(batcher.stats.reasons)


def test_calls_gathered_together_make_exactly_as_many_full_batches_as_there_are() -> None:
    """B1: an envelope is taken in whole before flushing; 8 calls are 2 batches of 4, one for each replica."""
    bench, client, (one, two), endpoint = serving(2)
    client.call(endpoint, *[bytes([letter]) for letter in b"abcdefgh"])
    assert one.batches == [[b"a", b"b", b"c", b"d"]]
    assert two.batches == [[b"e", b"f", b"g", b"h"]]
    assert reasons(bench) == {"size": 2}
    assert {type(call) for call in bench.state.clients[client.id].calls.values()} == {Slice}


def test_a_batch_leaves_when_its_first_call_has_waited_batch_timeout() -> None:
    """B1, B3, C5: the first one's time counts, not the last one's; each call's story tells."""
    bench, client, (worker,), endpoint = serving()
    client.call(endpoint, b"a")
    bench.advance(0.006)
    client.call(endpoint, b"b")
    bench.advance(0.0039)
    assert worker.batches == []
    bench.advance(0.0002)
    assert worker.batches == [[b"a", b"b"]]
    assert reasons(bench) == {"timeout": 1}
    assert bench.service().endpoints[0].batcher.stats.waited_s == pytest.approx(0.01)
    for call in client.ids([1, 2]):
        (entry,) = bench.state.story.of(show_request(call))
        assert entry.text == "left in a batch of 2 (of 4) 10.0 ms after its first call: timeout"


def test_calls_of_several_clients_share_a_batch() -> None:
    """B1."""
    bench, client, (worker,), endpoint = serving()
    other = bench.client()
    client.call(endpoint, b"a", b"b")
    other.call(endpoint, b"c", b"d")
    assert worker.batches == [[b"a", b"b", b"c", b"d"]]
    worker.reply()
    assert sorted(client.results) == sorted(other.results) == [1, 2]


def test_metrics_tell_of_batches_where_an_endpoint_batches() -> None:
    """B3: by reason, by size, and how long the first of each waited."""
    bench, client, _workers, endpoint = serving()
    client.call(endpoint, *[b"x"] * 6)
    bench.advance(0.02)
    told = metrics(bench.service(), bench.now)["service"]["batches"]["predict"]
    assert told == {
        "batches": 2,
        "items": 6,
        "avg_size": 3.0,
        "avg_wait_s": pytest.approx(0.005),
        "reasons": {"size": 1, "timeout": 1},
        "sizes": {"2": 1, "4": 1},
    }
    plain = Bench().serving()
    assert "batches" not in metrics(plain.service, plain.bench.now)["service"]


def test_what_is_over_a_full_batch_waits_for_the_next() -> None:
    """B1."""
    bench, client, (worker,), endpoint = serving()
    client.call(endpoint, *[b"x"] * 6)
    assert [len(batch) for batch in worker.batches] == [4]
    client.call(endpoint, b"y", b"y")
    assert [len(batch) for batch in worker.batches] == [4, 4]
    assert reasons(bench) == {"size": 2}


def test_a_batch_takes_one_unit_of_room_until_its_last_call_has_ended() -> None:
    """B2: whatever its size."""
    bench, client, (worker,), endpoint = serving(replica_max_concurrent_requests=2)
    replica = bench.service().replicas[0]
    client.call(endpoint, *[b"x"] * 12)
    assert ([len(batch) for batch in worker.batches], replica.active) == ([4, 4], 2)
    worker.reply(3)
    assert replica.active == 2
    worker.reply(1)
    assert ([len(batch) for batch in worker.batches], replica.active) == ([4, 4, 4], 2)
    worker.reply()
    assert (replica.active, len(client.results)) == (0, 12)


def test_a_batch_still_fills_while_nobody_has_room() -> None:
    """R1, B1: late binding; what is overdue leaves as large as it may be when somebody is free."""
    bench, client, (worker,), endpoint = serving(replica_max_concurrent_requests=1)
    client.call(endpoint, *[b"x"] * 4)
    client.call(endpoint, b"a")
    bench.advance(0.05)
    client.call(endpoint, b"b")
    bench.advance(0.05)
    client.call(endpoint, b"c")
    worker.reply()
    assert worker.batches[1:] == [[b"a", b"b", b"c"]]
    assert reasons(bench) == {"size": 1, "timeout": 1}


def test_batches_of_an_endpoint_run_at_once_on_different_replicas_and_on_one() -> None:
    """B3."""
    _bench, client, (one, two), endpoint = serving(2, replica_max_concurrent_requests=2)
    for _ in range(4):
        client.call(endpoint, *[b"x"] * 4)
    assert (len(one.batches), len(two.batches)) == (2, 2)


def test_only_equal_shapes_keys_and_trust_share_a_batch() -> None:
    """B2, W6."""
    bench, client, (worker,), endpoint = serving(batch={"batch_key": True})
    stranger = bench.client(1)
    client.call(endpoint, b"a", b"b", b"c", b"d", shape=[1, 2, 1, 2])
    client.call(endpoint, b"e", b"f", shape=1, key=["fr", "de"])
    client.call(endpoint, b"g", shape=1, key="fr")
    stranger.call(endpoint, b"h", shape=1)
    bench.advance(0.01)
    assert sorted(worker.batches) == [[b"a", b"c"], [b"b", b"d"], [b"e", b"g"], [b"f"], [b"h"]]


def test_the_weight_of_a_batch_is_limited_and_what_is_too_heavy_goes_alone() -> None:
    """Weights are the client's; an item above the limit is a batch by itself."""
    bench, client, (worker,), endpoint = serving(batch={"batch_weight": True, "batch_max_weight": 10.0})
    client.call(endpoint, b"a", b"b", b"c", weight=[4, 4, 4])
    assert worker.batches == [[b"a", b"b"]]
    client.call(endpoint, b"d", weight=50)
    assert worker.batches == [[b"a", b"b"], [b"c"], [b"d"]]
    assert reasons(bench) == {"weight": 3}
    client.call(endpoint, b"e", b"f", b"g", b"h", weight=[4, 4, 8, 2])
    assert worker.batches[3:] == [[b"e", b"f"], [b"g", b"h"]]
    assert reasons(bench) == {"weight": 5}  # a full batch waited, but the next call was too heavy for it


def test_no_weight_however_odd_lets_a_batch_weigh_more_than_it_may() -> None:
    """W8: a weight is a client's to say; what 1e18 does to a sum of small numbers is not the others' to bear."""
    for odd in (1e18, 1.7e308):
        _bench, client, (worker,), endpoint = serving(batch={"batch_weight": True, "batch_max_weight": 10.0})
        client.call(endpoint, b"a", b"b", b"c", weight=[odd, 6, 6])
        client.call(endpoint, b"d", b"e", weight=[odd, 6])
        _bench.advance(0.01)
        assert worker.batches == [[letter] for letter in (b"a", b"b", b"c", b"d", b"e")]


def test_a_batch_timeout_of_nought_gathers_what_came_in_one_message() -> None:
    """B1."""
    bench, client, (worker,), endpoint = serving(batch={"batch_timeout": 0})
    client.call(endpoint, b"a", b"b")
    client.call(endpoint, b"c")
    assert worker.batches == [[b"a", b"b"], [b"c"]]
    assert reasons(bench) == {"timeout": 2}


def test_with_batch_eager_nobody_waits_while_a_replica_has_room() -> None:
    """And batches fill while all are busy."""
    bench, client, (worker,), endpoint = serving(batch={"batch_eager": True}, replica_max_concurrent_requests=1)
    client.call(endpoint, b"a", b"b")
    client.call(endpoint, b"c")
    client.call(endpoint, b"d")
    assert worker.batches == [[b"a", b"b"]]
    worker.reply()
    assert worker.batches == [[b"a", b"b"], [b"c", b"d"]]
    assert reasons(bench) == {"eager": 2}


def test_a_deadline_flushes_a_batch_before_it_expires_in_it() -> None:
    """B1: half of its time is left to run in."""
    bench, client, (worker,), endpoint = serving(batch={"batch_timeout": 1.0})
    client.call(endpoint, b"a")
    client.call(endpoint, b"b", timeout=0.2)
    bench.advance(0.1)
    assert worker.batches == [[b"a", b"b"]]
    assert reasons(bench) == {"deadline": 1}
    bench.advance(0.2)
    assert isinstance(client.error(2), CallTimeout)


def test_a_cancelled_call_leaves_a_batch_that_has_not_gone() -> None:
    """F5: and its patience with it."""
    bench, client, (worker,), endpoint = serving()
    client.call(endpoint, b"a")
    bench.advance(0.005)
    client.call(endpoint, b"b")
    client.cancel(1)
    assert isinstance(client.error(1), CallCancelled)
    bench.advance(0.006)
    assert worker.batches == []
    bench.advance(0.005)
    assert worker.batches == [[b"b"]]


def test_a_cancelled_call_of_a_batch_that_runs_leaves_its_room_taken() -> None:
    """F5, B2."""
    bench, client, (worker,), endpoint = serving()
    client.call(endpoint, *[b"x"] * 4)
    client.cancel(2)
    replica = bench.service().replicas[0]
    worker.reply(3)
    assert replica.active == 1
    worker.reply()
    assert (replica.active, sorted(client.results)) == (0, [1, 2, 3, 4])


def test_sessions_and_fanouts_go_by_themselves() -> None:
    """S4."""
    _bench, client, (worker,), endpoint = serving()
    client.ask("open_session", service=_bench.service().id, session="s", hints={})
    client.call(endpoint, b"a", session="s")
    client.fanout(endpoint, b"b")
    assert (worker.seen, worker.batches) == ([b"a", b"b"], [])


def test_an_actors_calls_are_batches_of_one() -> None:
    """B2: they do not wait for each other."""
    _bench, client, (worker,), endpoint = serving(kind="actor")
    client.call(endpoint, b"a")
    assert (worker.seen, worker.batches) == ([b"a"], [])


def test_the_router_is_asked_once_for_a_batch() -> None:
    """B2, §9-12: the endpoint's own router, by the hints of its first call."""
    router = Custom()
    _bench, client, (one, two), endpoint = serving(
        2, bench=Bench(unpickle=lambda _: router), routers={"predict": {"code": b"pickle"}}
    )
    asked: list[Any] = []

    def second(views: Any) -> Any:
        asked.append(router.hints)
        return views[1]

    router.plan = second
    client.call(endpoint, *[b"x"] * 4, hints=[{"at": at} for at in range(4)])
    assert (one.batches, len(two.batches)) == ([], 1)
    assert asked == [{"at": 0}]


def test_a_router_that_fails_fails_its_batch_each_call_with_an_error_of_its_own() -> None:
    """R3, §9-11."""
    router = Custom()
    bench = Bench(unpickle=lambda _: router)
    _bench, client, (worker,), endpoint = serving(bench=bench, routers={"predict": {"code": b"pickle"}})
    router.plan = lambda views: None
    client.call(endpoint, *[b"x"] * 4)
    assert all(isinstance(client.error(sequence), RouterError) for sequence in (1, 2, 3, 4))
    assert worker.batches == []
    router.plan = lambda views: views[0]
    client.call(endpoint, *[b"y"] * 4)
    assert worker.batches == [[b"y"] * 4]


def test_a_batch_that_the_router_parks_stays_whole() -> None:
    """R2: affinity may want a full replica."""
    router = Custom()
    bench = Bench(unpickle=lambda _: router)
    _bench, client, (one, two), endpoint = serving(
        2, bench=bench, routers={"predict": {"code": b"pickle"}}, replica_max_concurrent_requests=1
    )
    router.plan = lambda views: views[0]
    client.call(endpoint, *[b"a"] * 4)
    client.call(endpoint, *[b"b"] * 4)
    client.call(endpoint, *[b"c"] * 4)
    assert (one.batches, two.batches) == ([[b"a"] * 4], [])
    one.reply()
    one.reply()
    assert one.batches == [[b"a"] * 4, [b"b"] * 4, [b"c"] * 4]


@pytest.mark.parametrize("name", ["LeastLoadedRouter", "PowerOfTwoRouter", "ConsistentHashRouter", "SessionRouter"])
def test_every_built_in_router_routes_batches(name: str) -> None:
    """R3."""
    _bench, client, workers, endpoint = serving(2, routers={"predict": built_in(name)})
    client.call(endpoint, *[b"x"] * 8)
    assert sum(len(worker.batches) for worker in workers) == 2
    for worker in workers:
        worker.reply()
    assert len(client.results) == 8


def test_a_batch_of_a_lost_replica_is_batched_again_at_once() -> None:
    """F2, F3: in its old order, without waiting for company it has waited for already."""
    bench, client, (one, two), endpoint = serving(2)
    client.call(endpoint, b"a", b"b", b"c", b"d")
    one.reply(1)
    one.die()
    assert two.batches == [[b"b", b"c", b"d"]]
    assert reasons(bench) == {"size": 1, "loss": 1}
    two.reply()
    assert sorted(client.results) == [1, 2, 3, 4]


def test_a_batch_that_is_given_back_goes_elsewhere_at_once() -> None:
    """F9."""
    bench, client, (one, two), endpoint = serving(2)
    client.call(endpoint, b"a", b"b", b"c", b"d")
    one.reply(1)
    one.reply(3, status=UNTOUCHED, payload=b"")
    assert two.batches == [[b"b", b"c", b"d"]]
    assert reasons(bench) == {"size": 1, "drain": 1}


def test_a_poisonous_call_is_told_from_its_companions_in_the_batch() -> None:
    """F4: after two deaths each runs alone; who kills again is poison, the others are answered."""
    bench, client, (first, second), endpoint = serving(2)
    client.call(endpoint, b"a", b"poison", b"c", b"d")
    for worker in (first, second):
        worker.die()
        worker.calls = []
    answered: set[int] = set()
    for _ in range(60):
        bench.advance(1.0)
        for worker in bench.launched():
            worker.ready()
        for worker in [peer for peer in bench.peers.values() if peer.fields["role"] == "worker"]:
            if not getattr(worker, "calls", None):
                continue
            if any(payload == b"poison" for _, _, payload in worker.calls):
                assert len(worker.calls) == 1, "a suspect has company"
                worker.die()
                worker.calls = []
            else:
                worker.reply()
        answered = set(client.results)
        if len(answered) == 4:
            break
    assert answered == {1, 2, 3, 4}
    assert isinstance(client.error(2), PoisonedRequest)
    assert [client.results[one] for one in (1, 3, 4)] == [(OK, b"a"), (OK, b"c"), (OK, b"d")]


def test_replies_of_a_batch_may_differ_and_come_apart() -> None:
    """B2: an element that is an exception is its caller's alone."""
    bench, client, (worker,), endpoint = serving()
    client.call(endpoint, *[b"x"] * 4)
    worker.reply(1)
    worker.reply(2, status=RAISED, payload=b"!")
    worker.reply(1)
    assert [client.results[one][0] for one in (1, 2, 3, 4)] == [OK, RAISED, RAISED, OK]
    assert bench.service().replicas[0].active == 0


def test_every_rank_of_a_mesh_gets_the_same_batches() -> None:
    """A7, B2: collectives must not cross."""
    bench, client, (zero, one), endpoint = serving(procs=2)
    client.call(endpoint, b"a", b"b", b"c", b"d")
    client.call(endpoint, b"e")
    bench.advance(0.01)
    zero.reply()
    one.reply()
    bench.advance(0.01)
    zero.reply()
    one.reply()
    assert zero.batches == one.batches == [[b"a", b"b", b"c", b"d"], [b"e"]]
    assert sorted(client.results) == [1, 2, 3, 4, 5]
    assert bench.service().replicas[0].active == 0


def test_the_limit_of_the_queue_counts_all_lanes() -> None:
    """W8."""
    _bench, client, _workers, endpoint = serving(batch={"batch_key": True}, max_queued_requests=3)
    client.call(endpoint, b"a", b"b", b"c", b"d", key=[1, 2, 3, 4])
    assert isinstance(client.error(4), Overloaded)
    assert sorted(client.results) == [4]


def test_what_waits_in_lanes_fails_with_its_service() -> None:
    """§9-10: and nothing looks at the lanes afterwards."""
    bench, client, _workers, endpoint = serving()
    client.call(endpoint, b"a", b"b")
    client.control("stop", service=bench.service().id)
    assert all(isinstance(client.error(one), ServiceStopped) for one in (1, 2))
    bench.advance(1.0)
    assert bench.state.held_bytes == 0


def test_without_a_replica_batches_wait_and_leave_when_one_is_there() -> None:
    """§9-10, F8: an empty pool kills no batcher."""
    bench, client, (worker,), endpoint = serving()
    worker.die()
    client.call(endpoint, *[b"x"] * 5)
    for _ in range(20):
        bench.advance(0.5)
        (fresh,) = bench.launched() or (None,)
        if fresh is not None:
            fresh.ready()
            break
    assert fresh is not None
    assert [len(batch) for batch in fresh.batches] == [4, 1]


def test_many_keys_leave_no_empty_lanes_behind() -> None:
    """W8: a key is the client's to choose."""
    bench, client, (worker,), endpoint = serving(batch={"batch_key": True})
    for start in range(0, 2000, 100):
        client.call(endpoint, *[b"x"] * 100, key=list(range(start, start + 100)))
        bench.advance(0.01)
        worker.reply()
        bench.advance(0.01)
        worker.reply()
    while worker.calls:
        worker.reply()
    batcher = bench.service().endpoints[0].batcher
    assert batcher is not None
    assert len(client.results) == 2000
    assert len(batcher.lanes) <= 256


def test_no_call_waits_in_a_lane_that_was_given_up() -> None:
    """§9-10: at the queue's limit a full lane is emptied to make room, and among so many it goes; its next call finds the new one."""
    bench, client, (worker,), endpoint = serving(
        batch={"batch_key": True, "batch_timeout": 1.0}, max_queued_requests=303, replica_max_concurrent_requests=400
    )
    client.call(endpoint, *[b"x"] * 300, key=list(range(300)))
    client.call(endpoint, *[b"y"] * 4, key=0)
    assert worker.batches == [[b"x", b"y", b"y", b"y"]]
    batcher = bench.service().endpoints[0].batcher
    assert batcher is not None
    assert (batcher.length, sum(lane.length for lane in batcher.lanes.values())) == (300, 300)
    client.control("stop", service=bench.service().id)
    worker.reply()
    bench.advance(2.0)
    assert len(client.results) == 304


def test_a_call_that_says_more_than_its_shape_is_a_request_of_its_own() -> None:
    """C2: a batch is a batch, however it is held."""
    bench, client, (worker,), endpoint = serving()
    client.call(endpoint, *[b"x"] * 4, shape=1, priority=[0, 0, 5, 0])
    assert {type(call) for call in bench.state.clients[client.id].calls.values()} == {Request}
    worker.reply()
    assert len(client.results) == 4


# Sessions that share batches.


def in_sessions(*sessions: str, exports: bool = False, **batch: Any) -> Serving:
    made = serving(
        batch={"batch_sessions": True, **batch},
        endpoints=("predict", "other"),
        exports=exports,
        replica_max_concurrent_requests=100,
    )
    for session in sessions:
        made.client.ask("open_session", service=made.service.id, session=session, hints={})
    return made


def test_calls_of_sessions_share_batches_where_the_endpoint_says_so() -> None:
    """batch_sessions: of one replica, each session's in the order sent."""
    bench, client, (worker,), endpoint = in_sessions("s", "t")
    client.call(endpoint, b"s1", b"s2", b"t1", session=["s", "s", "t"])
    assert worker.batches == []
    client.call(endpoint, b"t2", session="t")
    assert worker.batches == [[b"s1", b"s2", b"t1", b"t2"]]
    client.call(endpoint, b"s3", session="s")
    bench.advance(0.01)
    assert worker.batches[1:] == [[b"s3"]]
    assert reasons(bench) == {"size": 1, "timeout": 1}
    assert bench.service().replicas[0].active == 2
    worker.reply()
    assert (bench.service().replicas[0].active, len(client.results)) == (0, 5)


def test_a_session_whose_state_is_exported_shares_no_batch() -> None:
    """S3: its calls run one at a time."""
    _bench, client, (worker,), endpoint = in_sessions("s", "t", exports=True)
    client.call(endpoint, b"s1", b"s2", b"t1", session=["s", "s", "t"])
    assert (worker.seen, worker.batches) == ([b"s1", b"s2", b"t1"], [])


def test_a_session_never_overtakes_itself_and_waits_for_no_other_session() -> None:
    """A6: a call for another batch stays behind its session's call that waits for company; other sessions' calls join."""
    bench, client, (worker,), endpoint = in_sessions("s", "t")
    client.call(endpoint, b"s1", session="s")
    client.ask("open_session", service=bench.service().id, session="u", hints={})
    client.call(endpoint, b"s2", shape=7, session="s")  # of another shape: for another batch
    client.call(endpoint, b"u1", session="u")
    assert worker.batches == []
    bench.advance(0.01)
    assert worker.batches == [[b"s1", b"u1"], [b"s2"]]


def test_what_of_a_session_waits_for_company_moves_with_its_session() -> None:
    """F2, S3."""
    bench, client, (worker,), endpoint = in_sessions("s")
    client.call(endpoint, b"s1", session="s")
    worker.die()
    for _ in range(20):
        bench.advance(0.5)
        for fresh in bench.launched():
            fresh.ready()
            bench.advance(0.02)
            assert fresh.batches == [[b"s1"]]
            return
    raise AssertionError("no replica came back")
