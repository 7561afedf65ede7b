"""Services that grow and shrink, by themselves and by hand (X1, X2), with hand-made peers and a clock that the tests turn."""

from __future__ import annotations

from typing import Any

import pytest

from forge_broker.core.actions import Kill, Launch
from forge_broker.core.events import LaunchEnded
from forge_broker.core.replicas import ReplicaState
from forge_contract.config import AutoscalingConfig
from forge_contract.errors import ConfigError, NoHealthyReplicas, ServiceStopped, StartFailed, TrustRequired
from forge_contract.messages import IMPORT, NOTICE, RESIZED, STOP
from forge_contract.scaling import Decision
from tests.contract.policies import Says
from tests.core.peers import UNTRUSTED, Bench, Serving, spec
from tests.core.test_drains import leave

BRISK = {
    "scale_down_idle_time_threshold": 5.0,
    "min_time_between_scale_events": 2.0,
    "scale_up_cooldown": 2.0,
    "scale_down_cooldown": 2.0,
    "smoothing_s": 0.0,
}


def scaled(replicas: int = 1, *, bench: Bench | None = None, most: int = 4, **options: Any) -> Serving:
    """A service that scales by itself, one call at a time on each replica."""
    brisk = AutoscalingConfig(**{**BRISK, **options.pop("autoscaling", {})})
    given = {"replica_max_concurrent_requests": 1, "max_replicas": most, "autoscaling": brisk, **options}
    return (bench or Bench()).serving(replicas, **given)


def last(serving: Serving) -> dict[str, Any]:
    return dict(serving.client.ask("why_scale", service="Echo")["decisions"][0])


def test_waiting_calls_bring_a_replica_and_it_takes_its_share() -> None:
    """X1, X2: the decision says its rule and its figures; one that starts counts, so nothing is added twice for the same load."""
    serving = scaled()
    bench, client, (one,), endpoint = serving
    client.call(endpoint, *[b"%d" % n for n in range(10)])
    bench.advance(1.0)
    (two,) = bench.launched()
    assert last(serving)["rule"] == "queue"
    assert last(serving)["figures"]["queued"] == 9
    bench.advance(10.0)  # 4.5 for each, once it is there
    assert not bench.of(Launch)
    two.ready()
    assert two.seen == [b"1"]
    for worker in (one, two) * 6:
        worker.reply()
    assert len(client.results) == 10
    assert client.ask("state", service="Echo")["scaling"]["wanted"] == 2


def test_a_service_that_has_just_started_is_judged_by_more_than_its_first_sample() -> None:
    """X1: however long its start took; what lasts is believed."""
    bench = Bench()
    client = bench.client()
    steady = AutoscalingConfig(scale_up_request_rate_threshold=1000.0)
    client.deploy(num_replicas=1, replica_max_concurrent_requests=1, autoscaling=steady)
    (one,) = bench.launched()
    bench.advance(60.4)
    one.ready()
    client.call(bench.service().endpoints[0].id, b"x")
    bench.advance(1.0)
    assert client.ask("why_scale", service="Echo")["decisions"][0]["rule"] != "capacity"
    bench.advance(20.0)
    assert client.ask("why_scale", service="Echo")["last_change"]["rule"] == "capacity"


def test_an_emergency_adds_a_step_at_each_evaluation_until_there_are_enough_or_no_more_are_allowed() -> None:
    """X1: whatever the cooldowns say."""
    serving = scaled(most=6)
    bench, client, _, endpoint = serving
    client.call(endpoint, *[b"x"] * 100)
    wanted = []
    for _ in range(7):
        bench.advance(1.0)
        wanted.append(serving.service.wanted)
    assert wanted == [2, 3, 4, 5, 5, 6, 6]  # below 20 for each from 5 on, then past the queue threshold
    assert last(serving)["rule"] == "limits"


def test_those_go_that_are_not_healthy_then_the_least_loaded_with_the_fewest_sessions() -> None:
    """X2."""
    serving = scaled(4, replica_max_concurrent_requests=10, most=9, restart_backoff_s=1000.0)
    bench, client, workers, endpoint = serving
    for sid, _ in zip("ab", workers, strict=False):
        client.ask("open_session", service="Echo", session=sid, hints={})
        client.call(endpoint, b"x", session=sid)
    client.call(endpoint, b"y", b"y")
    for worker in workers:
        worker.reply()
    workers[0].die()
    for again in bench.launched():
        again.die()
    for again in bench.launched():
        again.die()
    assert serving.service.replicas[0].state is not ReplicaState.HEALTHY
    pinned = set(serving.service.pins.values())
    gone = []
    for wanted in (3, 2, 1):
        client.ask("scale", service="Echo", replicas=wanted)
        gone += [idx for idx in range(4) if idx not in gone and idx not in {r.idx for r in serving.service.current}]
    assert gone[0] == 0  # UNHEALTHY, or on its way back
    assert not pinned & set(gone[:2])
    assert {replica.idx for replica in serving.service.current} <= pinned


def test_a_replica_that_is_scaled_away_ends_what_runs_and_its_sessions_move_with_their_state() -> None:
    """X2, S3, F9: no call fails, and none waits for one that leaves."""
    serving = scaled(2, exports=True, replica_max_concurrent_requests=10)
    bench, client, workers, endpoint = serving
    for sid in "ab":  # one on each
        client.ask("open_session", service="Echo", session=sid, hints={})
        client.call(endpoint, b"x", session=sid)
    for worker in workers:
        worker.reply()
    stays, gone = workers
    other, sid = sorted(serving.service.pins, key=lambda one: serving.service.pins[one])
    client.call(endpoint, *[b"y"] * 3, session=other)
    client.call(endpoint, b"last", session=sid)
    number = client.control("scale", service="Echo", replicas=1, wait=True)
    ((_, reason, grace_s, _),) = gone.of(STOP)
    assert (reason, grace_s) == ("its service is scaled down", bench.state.config.drain_grace_s)
    assert number not in client.answers
    leave(gone, **{sid: b"what it knows now"})
    assert client.answers[number] == {"wanted": 1, "healthy": 1}
    stays.reply()
    (following,) = client.call(endpoint, b"z", session=sid)
    assert [payloads for message, payloads in stays.heard if message[0] == IMPORT] == [[b"what it knows now"]]
    stays.reply()
    assert following in client.results
    assert all(status == 0 for status, _ in client.results.values())


def test_low_load_takes_one_after_the_other_down_to_the_least() -> None:
    """X1, X2: and says how long it waits for that."""
    serving = scaled(3, most=3)
    bench, client, _, _ = serving
    bench.advance(4.0)
    assert (last(serving)["rule"], last(serving)["count"]) == ("low", 4)
    seen = []
    for _ in range(10):
        bench.advance(1.0)
        seen.append(serving.service.wanted)
    assert seen == [3, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    decisions = client.ask("why_scale", service="Echo")["decisions"]
    # Equal decisions not to do anything are one.
    assert [(one["rule"], one["delta"]) for one in decisions] == [
        ("limits", 0),
        ("low", -1),
        ("cooldown", 0),
        ("low", -1),
        ("low", 0),
    ]


def test_a_service_nobody_calls_goes_to_zero_and_the_first_call_brings_it_back_at_once() -> None:
    """X1: the call waits for it; nobody polls."""
    serving = scaled(1, min_replicas=0)
    bench, client, (one,), endpoint = serving
    bench.advance(6.0)
    assert one.of(STOP)
    leave(one)
    assert serving.service.wanted == 0
    assert not serving.service.replicas
    bench.advance(100.0)
    (sequence,) = client.call(endpoint, b"hello")
    (launch,) = bench.of(Launch)  # without any time passing
    assert last(serving)["rule"] == "wake"
    two = bench.worker(launch=launch.launch)
    two.ready()
    two.reply()
    assert client.results[sequence] == (0, b"hello")


def test_a_session_that_is_open_keeps_the_last_replica_and_one_that_comes_later_wakes() -> None:
    """X1, S2."""
    serving = scaled(1, min_replicas=0)
    bench, client, (one,), endpoint = serving
    client.ask("open_session", service="Echo", session="s", hints={})
    bench.advance(30.0)
    assert last(serving)["rule"] == "sessions"
    client.ask("close_session", service="Echo", session="s")
    bench.advance(1.0)
    leave(one)
    client.ask("open_session", service="Echo", session="t", hints={})
    assert serving.service.wanted == 0
    client.call(endpoint, b"x", session="t")
    (two,) = bench.launched()
    two.ready()
    assert two.seen == [b"x"]


def test_what_has_no_place_is_pending_with_the_reason_counts_as_starting_and_is_placed_when_something_is_free() -> None:
    """X2, A3: a GPU never has two replicas."""
    serving = scaled(1, bench=Bench(gpus=("0",)), with_gpus=True)
    bench, client, (one,), endpoint = serving
    client.call(endpoint, *[b"x"] * 90)
    bench.advance(20.0)
    assert serving.service.wanted == 2  # and no more, though it is an emergency
    assert last(serving)["rule"] == "pending"
    assert not bench.of(Launch)
    pending = client.ask("state", service="Echo")["replicas"][1]["pending"]
    assert "needs 1 worker with 1 GPU" in pending
    assert [message[2]["why"] for message in client.of(NOTICE) if message[1] == "pending"] == [pending]
    two = bench.worker(gpus=("1",))  # somebody starts a worker by hand, here
    assert two.replica_epoch == 1
    two.ready()
    assert two.seen == [b"x"]
    assert one.seen == [b"x"]


@pytest.mark.parametrize("failing", [False, True], ids=["no place", "starts fail"])
def test_replicas_that_never_got_healthy_do_not_keep_a_service_large(failing: bool) -> None:
    """X1: though they are most of it, it shrinks when load is low, and gives up the last one that serves, too."""
    bench = Bench() if failing else Bench(gpus=("0",))
    up = {"scale_up_step_size": 4}
    serving = scaled(1, bench=bench, most=5, min_replicas=0, with_gpus=not failing, autoscaling=up)
    _, client, (one,), endpoint = serving

    def pass_by(seconds: int) -> None:
        for _ in range(seconds):
            bench.advance(1.0)
            for launch in bench.of(Launch):
                bench.handle(LaunchEnded(launch.launch, "exit code 1", []))

    client.call(endpoint, *[b"x"] * 8)
    pass_by(1)
    assert serving.service.wanted == 5
    for _ in range(8):
        one.reply()
    pass_by(60)
    assert serving.service.wanted == 0
    assert last(serving)["rule"] == "limits"


def test_an_idle_worker_is_used_before_a_process_is_started() -> None:
    """X2."""
    serving = scaled()
    bench, client, _, endpoint = serving
    idle = bench.worker()
    client.call(endpoint, *[b"x"] * 8)
    bench.advance(1.0)
    assert idle.replica_epoch == 1
    assert not bench.of(Launch)


def test_a_launch_that_keeps_failing_is_tried_ever_more_slowly_and_blocks_nothing() -> None:
    """X2, F7: the reason is shown, the others serve, and one more is tried."""
    serving = scaled(1, restart_backoff_s=1.0)
    bench, client, (one,), endpoint = serving
    client.call(endpoint, *[b"x"] * 8)
    tries = []
    for _ in range(100):
        bench.advance(0.5)
        for launch in bench.of(Launch):
            tries.append((round(bench.now - 1000.0, 1), launch.launch))
            bench.handle(LaunchEnded(launch.launch, "could not be started: [Errno 12] Cannot allocate memory", []))
    assert len(tries) < 40
    failing = client.ask("state", service="Echo")["replicas"][1]
    assert failing["state"] in ("RECOVERING", "UNHEALTHY")
    assert "Cannot allocate memory" in failing["last_error"]
    assert serving.service.wanted > 2  # what does not get healthy is not waited for
    one.reply()
    assert len(one.seen) == 2
    bench.advance(60.0)
    for worker in bench.launched():
        worker.ready()
    assert len(serving.service.pool) > 1


def test_wanted_is_what_a_broker_that_comes_back_has() -> None:
    """F10: neither what it began with, nor only those that came back; and nothing scales in the window."""
    serving = scaled(1, most=6)
    bench, client, (one,), _ = serving
    client.ask("scale", service="Echo", replicas=3)
    two, three = bench.launched()
    for worker in (two, three):
        worker.ready()
    client.ask("scale", service="Echo", replicas=2)
    told = [message for worker in (one, two, three) for message in worker.of(RESIZED)]
    assert told.count([RESIZED, 2, 2]) == 2
    deed = serving.service.deed()
    assert (deed["wanted"], deed["resizes"]) == (2, 2)

    later = Bench(recovering=True)
    deeds = [{**deed, "wanted": 1, "resizes": 0}, deed]
    fields = {"epoch": 1, "rank": 0, "ready": True, "running": [], "sessions": []}
    owner = {"services": [deeds[0]], "sessions": []}
    back = later.client(client=deed["owner"], declares=owner, holdings=[b"init"])
    held = later.worker(holds={"deed": deeds[1], "replica": 0, **fields}, holdings=[b"init"])
    service = later.service()
    assert back.ask("status")["recovering"]["missing"] == ["1 replicas of Echo"]
    back.call(service.endpoints[0].id, *[b"x"] * 60)
    later.advance(2.9)
    assert not later.of(Launch)
    assert service.wanted == 2
    later.advance(0.1)  # the window ends, and an evaluation is due: 59 wait, for one that is there and one that comes
    assert held.seen
    assert len(later.of(Launch)) == 2
    assert [one["delta"] for one in back.ask("why_scale", service="Echo")["decisions"]] == [1]


@pytest.mark.parametrize(
    ("broken", "why"), [({"wanted": -1}, "wants"), ({"wanted": 5000}, "wants"), ({"resizes": "x"}, "wants")]
)
def test_a_deed_with_a_size_that_cannot_be_is_refused(broken: dict[str, Any], why: str) -> None:
    """W8, F10."""
    deed = scaled().service.deed() | broken
    bench = Bench(recovering=True)
    declares = {"services": [deed], "sessions": []}
    client = bench.client(client=deed["owner"], declares=declares, holdings=[b"init"])
    assert not client.welcome or client.name not in bench.state.links
    assert not bench.state.services


def test_replicas_nobody_told_of_are_kept() -> None:
    """F10: whoever knew how many they are is gone with the broker."""
    deed = {**scaled(1).service.deed(), "owner": 0}
    bench = Bench(recovering=True)
    fields = {"epoch": 1, "rank": 0, "ready": True, "running": [], "sessions": []}
    for idx in (0, 3):
        bench.worker(holds={"deed": deed, "replica": idx, **fields}, holdings=[b"init"])
    bench.advance(4.0)
    assert bench.service().wanted == 2
    assert not bench.of(Launch)


@pytest.mark.parametrize(
    ("options", "replicas", "said"),
    [
        (
            {"min_replicas": 1, "max_replicas": 4},
            5,
            r"has 1 to 4 replicas \(min_replicas, max_replicas\), and cannot have 5",
        ),
        ({}, 0, "need autoscaling"),
        ({"min_replicas": 0}, 0, "need autoscaling"),
        ({"autoscaling": AutoscalingConfig()}, 0, "has 1 to 10 replicas"),
        ({}, -1, "a number from 0 on"),
        ({}, True, "a number from 0 on"),
        ({"kind": "actor"}, 2, "is an actor"),
    ],
)
def test_by_hand_only_what_the_limits_allow(options: dict[str, Any], replicas: Any, said: str) -> None:
    """X2, A3."""
    serving = Bench().serving(1, **options)
    answer = serving.client.ask("scale", service="Echo", replicas=replicas)
    assert isinstance(answer, ConfigError)
    with pytest.raises(ConfigError, match=said):
        raise answer
    assert serving.service.wanted == 1


def test_by_hand_is_answered_at_once_or_when_it_is_done() -> None:
    """X2: twice the same is once."""
    bench, client, _, _ = Bench().serving(1)
    assert client.ask("scale", service="Echo", replicas=2) == {"wanted": 2, "was": 1}
    number = client.control("scale", service="Echo", replicas=2, wait=True)
    (two,) = bench.launched()
    assert number not in client.answers
    two.ready()
    assert client.answers[number] == {"wanted": 2, "healthy": 2}
    assert client.ask("why_scale", service="Echo")["decisions"][0]["reason"] == f"{client.name} asked for 2"

    failed = client.control("scale", service="Echo", replicas=3, wait=True)
    for _ in range(3):
        bench.advance(1.0)
        for worker in bench.launched():
            worker.die()
    assert isinstance(client.answers[failed], StartFailed)
    assert "last words" in str(client.answers[failed])
    stopped = client.control("scale", service="Echo", replicas=4, wait=True)
    client.control("stop", service="Echo")
    assert isinstance(client.answers[stopped], (StartFailed, ServiceStopped))


def test_a_replica_that_is_drained_is_not_wanted_any_more() -> None:
    """F9, X2: unless the least is more than what is left."""
    serving = scaled(2, min_replicas=1)
    bench, client, (one, _), _ = serving
    client.control("drain", target="Echo/0")
    leave(one)
    assert serving.service.wanted == 1
    bench.advance(3.0)
    assert not bench.of(Launch)

    serving = scaled(2, min_replicas=2)
    bench, client, (one, _), _ = serving
    client.control("drain", target="Echo/0")
    assert serving.service.wanted == 1
    bench.advance(1.0)
    assert serving.service.wanted == 2
    assert last(serving)["rule"] == "limits"


@pytest.mark.parametrize(
    ("answer", "wanted", "counted", "shown"),
    [
        (Decision(1, "hunch", "it is Monday"), 2, None, "hunch"),
        (1_000_000, 4, "scaling_policy_clamped", "clamped"),
        (ZeroDivisionError("oh"), 1, "scaling_policy_raised", "raised"),
        ("two", 1, "scaling_policy_nonsense", "nonsense"),
    ],
)
def test_a_custom_policy_is_asked_and_its_slips_are_counted_and_shown(
    answer: Any, wanted: int, counted: str | None, shown: str
) -> None:
    """X1: it changes nothing, or what the limits allow."""
    bench = Bench(unpickle=lambda _: Says(answer))
    client = bench.client()
    described = spec(num_replicas=1, max_replicas=4, autoscaling=AutoscalingConfig()) | {"policy": {"code": b"pickle"}}
    client.control("deploy", b"init", spec=described)
    for worker in bench.launched():
        worker.ready()
    bench.advance(1.0)
    assert bench.service().wanted == wanted
    assert client.ask("why_scale", service="Echo")["decisions"][0]["rule"] == shown
    assert bench.state.counters[counted or "scaling_policy_clamped"] == (counted is not None)


def test_a_custom_policy_needs_trust_and_has_to_be_one() -> None:
    """X1, W6: by value and by name alike."""
    named = AutoscalingConfig(policy="policies:Mine")
    loaded: list[tuple[str, list[str]]] = []

    def load(name: str, path: list[str]) -> Any:
        loaded.append((name, path))
        return Says(0)

    bench = Bench(unpickle=lambda _: "no policy")
    bench.state.load = load
    stranger = bench.client(UNTRUSTED)
    assert isinstance(stranger.answers[stranger.deploy(autoscaling=named)], TrustRequired)
    by_value = spec(autoscaling=AutoscalingConfig()) | {"policy": {"code": b"pickle"}}
    assert isinstance(stranger.answers[stranger.control("deploy", b"", spec=by_value)], TrustRequired)
    assert not loaded
    client = bench.client()
    assert "no ScalingPolicy" in str(client.answers[client.control("deploy", b"", spec=by_value)])
    client.deploy(autoscaling=named)
    assert loaded == [("policies:Mine", [])]
    assert isinstance(bench.service().sizing.policy, Says)


def test_calls_that_wait_for_company_in_a_batch_ask_for_no_replica() -> None:
    """X1, B1: as long as somebody has room for them."""
    serving = scaled(1, endpoint_options={"batch_size": 64, "batch_timeout": 30.0})
    bench, client, (one,), endpoint = serving
    client.call(endpoint, *[b"x"] * 40)
    bench.advance(5.0)
    assert serving.service.wanted == 1
    client.call(endpoint, *[b"x"] * 64)  # a whole batch takes the room
    assert len(one.seen) == 64
    bench.advance(1.0)
    assert serving.service.wanted == 2


def test_a_fan_out_to_no_replica_says_so() -> None:
    """A5, X1: it goes to every replica there is, and there is none."""
    serving = scaled(1, min_replicas=0)
    bench, client, (one,), endpoint = serving
    bench.advance(6.0)
    leave(one)
    assert isinstance(client.error(client.fanout(endpoint)), NoHealthyReplicas)


def test_a_restart_and_a_scaling_down_do_not_get_in_each_others_way() -> None:
    """F9, X2: one that is being replaced is the first to go."""
    bench, client, workers, _ = Bench().serving(3)
    restarting = client.control("restart", service="Echo")
    client.ask("scale", service="Echo", replicas=2)
    assert [replica.leaving for replica in bench.service().replicas.values()] == [True, False, False]
    leave(workers[0])
    for _ in range(3):
        for worker in workers[1:]:
            if worker.of(STOP):
                leave(worker)
        for launched in bench.launched():
            launched.ready()
    assert client.answers[restarting]["restarted"] == [0, 1, 2]
    assert sorted(bench.service().replicas) == [1, 2]
    assert not bench.of(Kill)
