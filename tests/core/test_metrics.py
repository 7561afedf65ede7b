"""The figures of a service, from scripted runs with exact numbers: what its clients are told (X4) and what a scrape is (X3)."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from bench.core_alone import rounds, serving
from forge_broker.core.families import SECONDS, SIZES, Family, families
from forge_broker.core.metrics import metrics
from forge_broker.core.stats import ServiceStats
from forge_client.metrics import Metrics
from forge_contract.config import AutoscalingConfig
from forge_contract.messages import FAILED, HEARTBEAT, OK, RAISED, REPLIES, UNTOUCHED
from tests.core.peers import Bench, ClientPeer


def told(bench: Bench) -> Metrics:
    """As a client reads them."""
    return Metrics(metrics(bench.service(), bench.now))


def family(bench: Bench, name: str) -> Family:
    return next(one for one in families(bench.state, bench.now) if one.name == name)


def samples(bench: Bench, name: str) -> dict[tuple[str, ...], Any]:
    """Of one family, without what is 0; single numbers as such."""
    found = {values: value if len(value) > 1 else value[0] for values, value in family(bench, name).samples}
    return {values: value for values, value in found.items() if value}


def outcomes(bench: Bench) -> dict[str, int]:
    found: dict[str, int] = metrics(bench.service(), bench.now)["service"]["endpoints"]["predict"]["outcomes"]
    return found


def busy() -> Bench:
    """Two replicas of room 2. In the last minute four calls were answered, one of them with an exception, all after 0.5 s; three run and
    two wait; three sessions are open, two of them pinned."""
    bench = Bench()
    _, client, (one, two), endpoint = bench.serving(2, replica_max_concurrent_requests=2)
    bench.advance(100.0)
    client.call(endpoint, b"a", b"b", b"c", b"d")
    bench.advance(0.5)
    one.reply(1, status=RAISED)
    one.reply()
    two.reply()
    for sid in ("s", "t", "u"):
        client.ask("open_session", service="Echo", session=sid)
    bench.advance(1.5)
    client.call(endpoint, b"e", session="s")
    client.call(endpoint, b"f", session="t")
    client.call(endpoint, b"g", session="t")
    client.call(endpoint, b"h", session="t")
    client.call(endpoint, b"i", session="t")
    return bench


@pytest.mark.parametrize(
    ("row", "figure", "expected"),
    [
        ("Total Sessions: Number of active sessions", "total_sessions", 3),
        ("Healthy Replicas: Number of operational replicas", "healthy_replicas", 2),
        ("Total Request Rate: Requests per second across all replicas", "total_request_rate", 4 / 60),
        ("Average Queue Depth: Average pending requests per replica", "avg_queue_depth", 1.0),
        ("Average Capacity Utilization: Average resource usage across replicas", "avg_capacity_utilization", 0.75),
        ("Sessions Per Replica: Distribution of sessions across replicas", "sessions_per_replica", {0: 1, 1: 1}),
    ],
)
def test_service_level_metrics_are_what_the_specification_says(row: str, figure: str, expected: Any) -> None:
    """X4: as an attribute, in the summary, and by the method of this name where there is one."""
    found = told(busy())
    assert getattr(found, figure) == pytest.approx(expected), row
    assert found.summary["service"][figure] == pytest.approx(expected), row
    method = getattr(found, f"get_{figure}", None)
    assert method is None or method() == method(found.replica_metrics) == pytest.approx(expected), row


@pytest.mark.parametrize(
    ("row", "figures", "expected"),
    [
        (
            "Request Counts: Total, successful, and failed requests",
            ("total_requests", "successful_requests", "failed_requests"),
            {0: (2, 1, 1), 1: (2, 2, 0)},
        ),
        ("Request Rate: Requests per second (sliding window)", ("request_rate",), {0: (2 / 60,), 1: (2 / 60,)}),
        ("Average Latency: Response time (sliding window)", ("avg_latency",), {0: (0.5,), 1: (0.5,)}),
        ("Active Requests: Currently processing requests", ("active_requests",), {0: (1,), 1: (2,)}),
        ("Queue Depth: Pending requests in queue", ("queue_depth",), {0: (0,), 1: (2,)}),
        ("Assigned Sessions: Number of sessions assigned to replica", ("assigned_sessions",), {0: (1,), 1: (1,)}),
        ("Capacity Utilization: Current load vs maximum capacity", ("capacity_utilization",), {0: (0.5,), 1: (1.0,)}),
    ],
)
def test_replica_level_metrics_are_what_the_specification_says(
    row: str, figures: tuple[str, ...], expected: dict[int, tuple[float, ...]]
) -> None:
    """X4: as attributes and in the summary."""
    found = told(busy())
    for idx, values in expected.items():
        attributes = tuple(getattr(found.replica_metrics[idx], figure) for figure in figures)
        assert attributes == pytest.approx(values), row
        assert tuple(found.summary["replicas"][idx][figure] for figure in figures) == attributes


def test_waiting_and_running_are_told_apart_by_service_endpoint_and_replica() -> None:
    """X3: the second call waited 2 s for the room of the first, which ran so long; then it ran 1 s."""
    bench, client, (worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=1)
    client.call(endpoint, b"a", b"b")
    bench.advance(2.0)
    worker.reply()
    bench.advance(1.0)
    worker.reply()
    found = told(bench)
    (of_endpoint,) = found.endpoints.values()
    assert found.latency == of_endpoint["latency"]
    wait, run = found.latency["wait"], found.latency["run"]
    assert (wait["count"], wait["mean"], wait["p50"]) == (2, 1.0, 0.0)
    assert (run["count"], run["mean"]) == (2, 1.5)
    for name, exact in (("p50", 1.0), ("p90", 2.0), ("p99", 2.0)):
        assert run[name] == pytest.approx(exact, rel=0.13)
        assert getattr(found.replica_metrics[0], f"run_{name}") == run[name]
    assert found.replica_metrics[0].wait_p99 == pytest.approx(2.0, rel=0.13)
    bench.advance(70.0)
    assert told(bench).latency["run"]["count"] == 0  # of the last minute
    waited, ran = samples(bench, "forge_call_wait_seconds"), samples(bench, "forge_call_run_seconds")
    key = ("Echo", "predict")
    assert waited[key][-2:] == (2, 2.0)  # since the start
    assert ran[key][-2:] == (2, 3.0)
    assert waited[key][SECONDS.index(0.0001)] == 1
    assert [ran[key][SECONDS.index(bound)] for bound in (0.5, 1.0, 2.5)] == [0, 1, 2]


def test_every_call_is_counted_once_by_how_it_ended_for_its_caller() -> None:
    """X3: whoever answers it, and whether it was accepted or not."""
    bench, client, (worker,), endpoint = Bench().serving(
        1, replica_max_concurrent_requests=2, max_queued_requests=2, no_replica_grace_s=1.0
    )
    client.call(endpoint, b"a", b"b")
    worker.reply(1)
    worker.reply(status=RAISED)
    client.call(endpoint, b"c", timeout=1.0)
    (gone,) = client.call(endpoint, b"d")
    client.call(endpoint, b"e", b"f", b"g")  # two may wait
    client.cancel(gone)
    bench.advance(1.5)
    assert outcomes(bench) == {"ok": 1, "raised": 1, "timed_out": 1, "cancelled": 1, "overloaded": 1}
    worker.reply(2)  # late: their callers have their answers, and the room is free
    worker.reply(1, status=FAILED, payload=b"\x92\xa1x\x80")
    client.call(endpoint, b"h", session="nobody's")
    other = bench.client()
    other.call(endpoint, b"i")
    bench.handle_gone(other)
    worker.die()  # with one that runs, and nobody comes to run it again
    bench.advance(1.5)
    assert outcomes(bench) == {
        **dict.fromkeys(("ok", "raised", "timed_out", "cancelled", "overloaded"), 1),
        **dict.fromkeys(("failed", "refused", "abandoned", "no_replicas"), 1),
    }
    assert samples(bench, "forge_calls_total") == {
        ("Echo", "predict", outcome): count for outcome, count in outcomes(bench).items()
    }


def test_calls_of_one_envelope_that_did_not_end_alike_are_told_apart() -> None:
    """X3: though those in a row that did are counted together: by status, endpoint, and when they came and left."""
    bench, client, (worker,), predict = Bench().serving(1, replica_max_concurrent_requests=5)
    client.call(predict, *[b"x"] * 3, timeout=60.0)  # each by itself
    bench.advance(1.0)
    client.call(predict, *[b"y"] * 3, timeout=60.0)  # one of them waits
    bench.advance(1.0)
    ids = [one[0] for one in worker.calls]
    worker.calls = []
    worker.say([REPLIES, worker.replica_epoch, ids, 1, [OK, RAISED, RAISED, OK, OK], [1] * 5], packed=b"abcde")
    assert outcomes(bench) == {"ok": 3, "raised": 2}
    worker.reply()
    assert outcomes(bench) == {"ok": 4, "raised": 2}
    (wait,) = samples(bench, "forge_call_wait_seconds").values()
    (run,) = samples(bench, "forge_call_run_seconds").values()
    assert (wait[-2:], run[-2:]) == ((6, 1.0), (6, 3 * 2.0 + 2 * 1.0))


def test_a_fan_out_is_one_call_and_runs_on_each_replica() -> None:
    """A5, X3: ok if all of it was."""
    bench, client, (one, two), endpoint = Bench().serving(2)
    client.fanout(endpoint)
    bench.advance(1.0)
    one.reply()
    two.reply()
    assert outcomes(bench) == {"ok": 1}
    client.fanout(endpoint)
    one.reply()
    two.reply(status=RAISED)
    assert outcomes(bench) == {"ok": 1, "raised": 1}
    assert told(bench).latency["run"]["count"] == 4
    assert [one.total_requests for one in told(bench).replica_metrics.values()] == [2, 2]


def test_attempts_beyond_the_first_and_restarts_are_counted() -> None:
    """F2, F7, X3: a call of a lost replica, and one that was given back."""
    bench, client, (one, two), endpoint = Bench().serving(2, replica_max_concurrent_requests=1)
    client.call(endpoint, b"a", b"b", b"c")  # c waits, and was never tried
    one.die()
    assert told(bench).retries == 1
    assert told(bench).restarts == 1
    two.reply(status=UNTOUCHED)
    assert told(bench).retries == 2
    assert samples(bench, "forge_retries_total") == {("Echo", "predict"): 2}
    assert samples(bench, "forge_replica_restarts_total") == {("Echo",): 1}
    assert samples(bench, "forge_replicas") == {("Echo", "HEALTHY"): 1, ("Echo", "RECOVERING"): 1}


def test_late_replies_dead_letters_and_what_the_protocol_counts_are_told() -> None:
    """W3, F4, X3."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.call(endpoint, b"a")
    worker.calls = [(worker.calls[0][0], 7, b"")]
    worker.reply()
    assert samples(bench, "forge_fenced_replies_total") == {(): 1}
    client.send([b"nonsense"])
    assert samples(bench, "forge_events_total") == {("ProtocolError",): 1}
    for _ in range(3):
        worker.die()
        bench.advance(40.0)
        (worker,) = bench.launched()
        worker.ready()
    assert samples(bench, "forge_dead_letters") == {(): 1}
    assert outcomes(bench) == {"poisoned": 1}


def test_batches_are_told_by_reason_size_and_how_long_they_waited() -> None:
    """B3, X3."""
    bench, client, _, endpoint = Bench().serving(1, endpoint_options={"batch_size": 4, "batch_timeout": 0.01})
    client.call(endpoint, *[b"x"] * 7)
    bench.advance(0.02)
    assert samples(bench, "forge_batches_total") == {
        ("Echo", "predict", "size"): 1,
        ("Echo", "predict", "timeout"): 1,
    }
    (sizes,) = samples(bench, "forge_batch_size").values()
    assert sizes[-2:] == (2, 7)
    assert sizes[SIZES.index(2.0)] == 0
    assert sizes[SIZES.index(4.0)] == 2
    (waited_s,) = samples(bench, "forge_batch_wait_seconds_total").values()  # the full one not at all
    assert waited_s == pytest.approx(0.01)
    assert samples(bench, "forge_in_flight") == {("Echo",): 2}  # a batch takes one unit of room


def test_scale_events_are_counted_by_direction_and_rule() -> None:
    """X1, X3: by the policy as by hand."""
    bench, client, _, _ = Bench().serving(1, max_replicas=8)
    client.ask("scale", service="Echo", replicas=4, wait=False)
    client.ask("scale", service="Echo", replicas=5, wait=False)
    client.ask("scale", service="Echo", replicas=2, wait=False)
    assert samples(bench, "forge_scale_events_total") == {("Echo", "up", "by hand"): 2, ("Echo", "down", "by hand"): 1}
    assert samples(bench, "forge_replicas_wanted") == {("Echo",): 2}
    assert samples(bench, "forge_replicas_max") == {("Echo",): 8}
    assert (told(bench).wanted_replicas, told(bench).scalings) == (2, {"up": 2, "down": 1})


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({"min_replicas": 2, "max_replicas": 3, "num_replicas": 2}, (2, 3)),
        ({"autoscaling": AutoscalingConfig()}, (1, 10)),
        ({}, (1, None)),
    ],
    ids=["given", "those of scaling by itself", "by hand, without a most"],
)
def test_the_limits_that_hold_are_told_also_where_nobody_gave_any(
    options: dict[str, Any], limits: tuple[int, int | None]
) -> None:
    """X1, X3: an alert on a service at its limit compares with them."""
    bench, *_ = Bench().serving(options.pop("num_replicas", 1), **options)
    told = tuple(samples(bench, f"forge_replicas_{name}").get(("Echo",)) for name in ("min", "max"))
    assert told == limits


def test_rules_of_scaling_are_kept_apart_as_long_as_they_are_not_too_many() -> None:
    """X1, X3: a policy of the user's may name them as it likes."""
    stats = ServiceStats()
    for n in range(1000):
        stats.scaled(1, f"because of {n}")
    stats.scaled(-1, "because of 0")
    assert len(stats.scalings) == 52
    assert stats.scalings["up", "other"] == 950
    assert stats.scalings["down", "other"] == 1


def test_what_waits_is_told_by_where_it_waits() -> None:
    """X3, X4: in endpoints' queues, and parked at replicas."""
    bench = busy()
    assert samples(bench, "forge_queue_length") == {("Echo", "parked"): 2}
    assert samples(bench, "forge_room") == {("Echo",): 4}
    assert samples(bench, "forge_in_flight") == {("Echo",): 3}
    assert samples(bench, "forge_sessions") == {("Echo",): 3}
    client = next(one for one in bench.peers.values() if isinstance(one, ClientPeer))
    client.call(bench.service().endpoints[0].id, b"x", b"y")
    assert samples(bench, "forge_queue_length") == {("Echo", "parked"): 2, ("Echo", "predict"): 1}


def test_what_workers_say_of_themselves_is_told_of_each_and_what_they_do_not_say_is_not() -> None:
    """F1, X3."""
    bench, _, (one, two), _ = Bench().serving(2)
    one.whisper([HEARTBEAT, {"cpu_s": 1.5, "rss": 4096, "gpu_bytes": 1 << 30, "gpu_busy": 0.5, "lag_s": 0.0}])
    two.whisper([HEARTBEAT, {"cpu_s": 2.5, "rss": "much", "gpu_busy": float("nan"), "lag_s": float("inf")}])
    assert samples(bench, "forge_worker_cpu_seconds_total") == {(one.name, "Echo/0"): 1.5, (two.name, "Echo/1"): 2.5}
    assert samples(bench, "forge_worker_memory_bytes") == {(one.name, "Echo/0"): 4096}
    assert samples(bench, "forge_worker_gpu_memory_bytes") == {(one.name, "Echo/0"): 1 << 30}
    assert samples(bench, "forge_worker_gpu_utilization_ratio") == {(one.name, "Echo/0"): 0.5}
    assert samples(bench, "forge_workers") == {("READY",): 2}


def test_a_snapshot_of_a_thousand_replicas_stays_small_and_goes_out_more_rarely() -> None:
    """X4: so many bytes a second at most; made once, whoever hears it."""
    core, client, endpoint, workers = serving(1000)
    service = core.broker.state.names["Echo"]
    rounds(core, client, workers, [client.calls(endpoint, 1000)])
    snapshot = metrics(service, core.now)
    assert len(msgpack.packb(snapshot)) < 100_000
    assert len(Metrics(snapshot).replica_metrics) == 1000
    assert 9.0 < service.metrics_at - core.now <= 10.0
