"""Calls through the whole client, against a broker that does as told (A2, A4, A5, A7, A8, A12)."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import forge_client
from forge_client import (
    BadCall,
    CallTimeout,
    FanoutError,
    ForgeActor,
    NoHealthyReplicas,
    PayloadTooLarge,
    RemoteError,
    SerializationError,
    Service,
    ServiceConfig,
    ServiceStopped,
    ValueMesh,
    connect,
    endpoint,
    get_service,
)
from forge_client.connection import current_client
from forge_contract.errors import Overloaded, ProtocolError, ReplicaLost, UnknownService
from forge_contract.huge_pages import NEVER_KEPT_FROM
from forge_contract.messages import FAILED, OK, RAISED
from forge_contract.payload import decode, encode, encode_exception
from tests.client.fake_broker import Raised, Served, error_payload, serve


class Gen(ForgeActor):
    def __init__(self, path: str = "") -> None: ...

    @endpoint
    async def predict(self, x: Any, scale: Any = 1) -> Any: ...

    @endpoint(timeout=0.05)
    async def slow(self, x: Any = None) -> Any: ...


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(tmp_path) as served, connect(served.address):
        yield served


async def test_a_call_goes_out_and_its_value_comes_back(broker: Served) -> None:
    broker.broker.methods["predict"] = lambda item, x, scale: x * scale
    service = await Gen.options(num_replicas=2).as_service("weights.pt")
    assert await service.predict.route(4, scale=2) == 8
    assert broker.broker.specs[0]["class_name"] == "Gen"
    assert service.num_replicas == 2


async def test_calls_made_in_one_turn_travel_in_one_envelope(broker: Served) -> None:
    """W1"""
    service = await Gen.as_service()
    before = broker.broker.envelopes
    assert await asyncio.gather(*(service.predict.route(x) for x in range(100))) == list(range(100))
    assert broker.broker.envelopes == before + 1


async def test_arguments_are_taken_as_they_are_at_the_call(broker: Served) -> None:
    numpy = pytest.importorskip("numpy")
    broker.broker.methods["predict"] = lambda item, x: x.sum() if hasattr(x, "sum") else sum(x)
    service = await Gen.as_service()
    small, large, largest = [1, 2], numpy.ones(100_000), numpy.ones(NEVER_KEPT_FROM, "u1")
    calls = [service.predict.route(one) for one in (small, large, largest)]
    small.append(100)
    large[:] = largest[:] = 7
    assert [await call for call in calls] == [3, 100_000, NEVER_KEPT_FROM]


async def test_wrong_arguments_never_travel(broker: Served) -> None:
    service = await Gen.as_service()
    seen = len(broker.broker.seen)
    for call in (service.predict.route, service.predict.fanout):
        with pytest.raises(BadCall, match=r"Gen-1\.predict: missing a required argument: 'x'"):
            call()
        with pytest.raises(BadCall, match=r"it takes x, scale"):
            call(1, size=3)
    assert len(broker.broker.seen) == seen


async def test_an_endpoints_exception_is_raised_anew_at_each_caller_with_its_remote_traceback(broker: Served) -> None:
    """A5, and way 11 of §9"""

    def raises(item: Any, x: Any) -> Any:
        return Raised(ValueError(f"no {x}"))

    broker.broker.methods["predict"] = raises
    service = await Gen.as_service()
    errors = await asyncio.gather(service.predict.route(1), service.predict.route(1), return_exceptions=True)
    assert [repr(error) for error in errors] == ["ValueError('no 1')"] * 2
    assert errors[0] is not errors[1]
    assert "ValueError: no 1" in str(errors[0].__cause__)


async def test_what_would_end_the_callers_loop_arrives_as_a_remote_error(broker: Served) -> None:
    """A5"""
    broker.broker.methods["predict"] = lambda item, x: Raised(SystemExit(3) if x else StopIteration())
    service = await Gen.as_service()
    for x in (0, 1):
        with pytest.raises(RemoteError, match=r"SystemExit|StopIteration"):
            await service.predict.route(x)


async def test_exceptions_come_back_as_values_where_the_service_says_so(broker: Served) -> None:
    """A5"""
    broker.broker.methods["predict"] = lambda item, x: Raised(KeyError(x)) if x else NoHealthyReplicas
    service = await Gen.options(errors="return").as_service()
    assert repr(await service.predict.route(1)) == "KeyError(1)"


async def test_our_own_errors_are_raised_with_their_fields(broker: Served) -> None:
    def overloaded(item: Any, x: Any) -> Any:
        raise Overloaded(what="predict", limit_name="max_queued_requests", limit=2, retry_after_s=0.5)

    broker.broker.methods["predict"] = overloaded
    service = await Gen.options(errors="return").as_service()
    with pytest.raises(Overloaded) as caught:
        await service.predict.route(1)
    assert caught.value.retry_after_s == 0.5


async def test_a_fan_out_answers_in_replica_order(broker: Served) -> None:
    broker.broker.methods["predict"] = lambda item, x: (item["replica"], x)
    service = await Gen.as_service()
    assert await service.predict.fanout(5) == [(0, 5), (1, 5)]


async def test_a_fan_out_with_failures_raises_both_or_returns_them_in_place(broker: Served) -> None:
    """A5"""

    def half(item: Any, x: Any) -> Any:
        if item["replica"] == 1:
            raise ReplicaLost(replica="gen/1", why="exit code -9")
        return x

    broker.broker.methods["predict"] = half
    service = await Gen.as_service()
    with pytest.raises(FanoutError, match=r"1 of 2 replicas failed: replica 1: ReplicaLost") as caught:
        await service.predict.fanout(3)
    assert caught.value.results == {0: 3}
    assert isinstance(caught.value.errors[1], ReplicaLost)
    kept = await service.predict.options(return_exceptions=True).fanout(3)
    assert (kept[0], type(kept[1])) == (3, ReplicaLost)


async def test_a_mesh_answers_with_rank_0_or_the_whole_mesh(broker: Served) -> None:
    """A7"""
    fake = broker.broker

    async def parts_of(service: Service) -> Any:
        call = service.predict.route(1)
        await broker.until(lambda _: fake.seen[-1][0] == "call")
        (outbox,) = fake.out.values()
        seq = max((await current_client()).link.unanswered)
        fake.parts(outbox, seq, [[0, 0], [0, 1]], [(OK, encode(rank, trusted=True)) for rank in "ab"])
        broker.turn()
        return await call

    fake.silent.add("predict")
    first = await Gen.options(procs=2).as_service()
    whole = await Gen.options(procs=2, return_first_rank_result=False).as_service()
    assert await parts_of(first) == "a"
    assert await parts_of(whole) == ValueMesh({"procs": 2}, ["a", "b"])


async def test_an_error_on_one_rank_keeps_its_type_and_says_which_rank_it_was(broker: Served) -> None:
    """A5, A12: of an actor's call, of a replica of several ranks, and of a fan-out over such."""
    fake = broker.broker
    fake.silent.add("predict")
    raised = (RAISED, encode_exception(KeyError("k"), trusted=True))

    async def caught(call: Any, points: list[list[int]]) -> BaseException:
        before = len(fake.seen)
        await broker.until(lambda _: len(fake.seen) > before)
        (outbox,) = fake.out.values()
        seq = max((await current_client()).link.unanswered)
        fake.parts(outbox, seq, points, [(OK, encode(1, trusted=True)), raised])
        broker.turn()
        with pytest.raises((KeyError, FanoutError)) as failed:
            await call
        return failed.value

    actor = await Gen.options(procs=2).as_actor()
    service = await Gen.options(procs=2).as_service()
    mesh = await caught(actor.predict.call(1), [[0, 0], [0, 1]])
    routed = await caught(service.predict.route(1), [[0, 0], [0, 1]])
    fanned = await caught(service.predict.fanout(1), [[3, 0], [3, 1]])
    assert isinstance(fanned, FanoutError)
    assert type(mesh) is type(routed) is type(fanned.errors[3]) is KeyError
    assert mesh.__notes__ == ["Gen-1.predict: rank 1 of 2"]
    assert routed.__notes__ == fanned.errors[3].__notes__ == ["Gen-2.predict: rank 1 of 2"]
    assert list(fanned.errors) == [3]


@pytest.mark.parametrize("api", ["call", "call_one", "choose", "broadcast", "generate", "stream"])
async def test_the_apis_of_actors_are_refused_on_services(broker: Served, api: str) -> None:
    """A4"""
    service = await Gen.as_service()
    with pytest.raises(NotImplementedError, match=r"Services only support route\(\) and fanout\(\)\."):
        getattr(service.predict, api)(1)
    with pytest.raises(NotImplementedError, match=r"Services only support route\(\) and fanout\(\)\."):
        service.predict(1)


async def test_cancelling_the_task_cancels_the_call(broker: Served) -> None:
    """F5"""
    broker.broker.silent.add("predict")
    service = await Gen.as_service()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(service.predict.route(1), 0.01)
    await broker.until(lambda fake: fake.seen[-1][0] == "cancel")
    assert service.predict._target.client.link.refused_replies == 0


async def test_a_reply_that_comes_in_the_turn_of_its_cancellation_harms_no_other(broker: Served) -> None:
    """F5: neither a value nor an error for somebody who left, beside those of others in the same envelope."""
    fake = broker.broker
    fake.silent.add("predict")
    service = await Gen.as_service()
    client = await current_client()
    calls = [service.predict.route(at) for at in range(6)]
    await broker.until(lambda fake: len([entry for entry in fake.seen if entry[0] == "call"]) == 6)
    seqs = list(client.link.unanswered)
    raised = (RAISED, encode_exception(KeyError("k"), trusted=True))
    for left, others, odd in ((0, 1, (OK, encode(7, trusted=True))), (2, 3, raised)):
        calls[left].cancel()
        waiters = [client.link.unanswered.pop(seqs[at]) for at in (left, others)]
        client.results(True, waiters, [odd[0], OK], [odd[1], encode("kept", trusted=True)])
        assert await calls[others] == "kept"
        assert calls[left].cancelled()
    client.results(True, [client.link.unanswered.pop(seqs[4])], [OK], [b"\xc1"])
    with pytest.raises(ProtocolError, match="cannot be read"):
        await calls[4]


async def test_a_timeout_travels_and_is_kept_by_our_own_clock_when_nobody_answers(broker: Served) -> None:
    broker.broker.silent |= {"slow", "predict"}
    service = await Gen.as_service()
    with pytest.raises(CallTimeout, match=r"Gen-1\.slow did not answer within 0\.05 s"):
        await service.slow.route()
    with pytest.raises(CallTimeout, match=r"within 0\.01 s"):
        await service.predict.options(timeout=0.01).route(1)
    await broker.until(lambda fake: sum(entry[0] == "call" for entry in fake.seen) == 2)
    slow, predict = (entry[3]["timeout"] for entry in broker.broker.seen if entry[0] == "call")
    assert 0 < slow <= 0.05
    assert 0 < predict <= 0.01


async def test_what_cannot_travel_names_the_endpoint_and_the_argument(tmp_path: Path) -> None:
    """W5, W6"""
    async with serve(tmp_path, trusted=False) as served, connect(served.address):
        served.broker.welcome["max_payload_bytes"] = 1000
        service = await Gen.as_service()
        with pytest.raises(SerializationError, match=r"Gen-1\.predict, argument 'scale'\[0\]"):
            service.predict.route(1, scale=[object()])


@pytest.mark.parametrize("size", [2000, 50_000])
async def test_too_large_arguments_never_travel(tmp_path: Path, size: int) -> None:
    async with serve(tmp_path) as served:
        served.broker.welcome["max_payload_bytes"] = 1000
        async with connect(served.address):
            service = await Gen.as_service()
            with pytest.raises(
                PayloadTooLarge, match=r"arguments of Gen-1\.predict would take .* max_payload_bytes=1000"
            ):
                service.predict.route(b"x" * size)


async def test_the_first_call_starts_a_service_and_waits_for_it(broker: Served) -> None:
    """A2"""
    service = Service(ServiceConfig(num_replicas=2), Gen, "weights")
    numbers = [1]
    calls = [service.predict.route(numbers), service.predict.fanout(2), service.predict.route(3)]
    numbers.append(2)
    assert await asyncio.gather(*calls) == [[1], [2, 2], 3]
    assert len(broker.broker.specs) == 1


async def test_a_service_that_cannot_start_tells_everyone_and_may_be_tried_again(broker: Served) -> None:
    """A2"""

    def fails(fields: Any) -> Any:
        raise FileNotFoundError("weights.pt")

    broker.broker.controls["deploy"] = fails
    service = Service(ServiceConfig(), Gen, "weights.pt")
    calls = [service.predict.route(1), service.predict.route(2)]
    with pytest.raises(FileNotFoundError, match=r"weights\.pt") as caught:
        await service
    assert "FileNotFoundError" in str(caught.value.__cause__)
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors] == [FileNotFoundError] * 2
    assert len({id(error) for error in [*errors, caught.value]}) == 3
    del broker.broker.controls["deploy"]
    async with service:
        assert await service.predict.route(7) == 7


async def test_a_start_that_nobody_waits_for_any_more_leaves_nothing_running(broker: Served) -> None:
    """Way 15 of §9"""
    fake = broker.broker
    starting = asyncio.ensure_future(Gen.as_service())
    await broker.until(lambda _: fake.specs)
    starting.cancel()  # before the answer was read
    with pytest.raises(asyncio.CancelledError):
        await starting
    await broker.until(lambda _: ("stop", {"service": 1}) in fake.seen)


async def test_shutdown_twice_is_once_and_calls_afterwards_are_refused(broker: Served) -> None:
    service = await Gen.as_service()
    await asyncio.gather(service.shutdown(), service.shutdown())
    await service.shutdown()
    assert [entry[0] for entry in broker.broker.seen].count("stop") == 1
    for late in (service.predict.route, service.predict.fanout):
        with pytest.raises(ServiceStopped, match="Gen-1"):
            late(1)
    unstarted = Service(ServiceConfig(), Gen)
    await unstarted.shutdown()
    with pytest.raises(ServiceStopped):
        await unstarted


async def test_handles_learn_that_their_service_was_stopped_by_others(broker: Served) -> None:
    service = await Gen.as_service()
    broker.broker.notice(
        "stopped", {"service": 1, "error": ["StartFailed", {"service": "Gen-1", "why": "it kept dying"}]}
    )
    broker.turn()
    assert await service.predict.route(1) == 1
    with pytest.raises(ServiceStopped, match="it kept dying"):
        service.predict.route(1)


async def test_everything_this_client_started_ends_with_shutdown_but_what_is_detached(broker: Served) -> None:
    """A10"""
    service = await Gen.as_service()
    await Gen.options(name="kept", detached=True).as_service()
    actor = await Gen.as_actor()
    await forge_client.shutdown()
    await broker.until(lambda fake: fake.seen[-1][0] == "bye")
    assert [entry[1]["service"] for entry in broker.broker.seen if entry[0] == "stop"] == [1, 3]
    with pytest.raises(ServiceStopped):
        service.predict.route(1)
    with pytest.raises(ServiceStopped):
        actor.predict.call(1)


async def test_a_service_is_found_by_name_and_judges_calls_as_the_class_would(broker: Served) -> None:
    """A10"""

    def find(fields: dict[str, Any]) -> dict[str, Any]:
        if fields["name"] not in broker.broker.named:
            raise UnknownService(name=fields["name"], known=list(broker.broker.named))
        return broker.broker.named[fields["name"]]

    broker.broker.controls["find"] = find
    await Gen.options(name="gen").as_service()
    found = await get_service("gen")
    assert await found.predict.route(3) == 3
    with pytest.raises(BadCall):
        found.predict.route()
    with pytest.raises(UnknownService, match=r"did you mean 'gen'\?"):
        await get_service("gne")


async def test_handles_are_values(broker: Served) -> None:
    """A8"""
    service = await Gen.options(num_replicas=2).as_service()
    actor = await Gen.as_actor()
    travelled = decode(encode([service, actor], trusted=False), trusted=False)
    for other, same in (travelled, pickle.loads(pickle.dumps([service, actor]))):
        assert await other.predict.route(4) == 4
        assert await same.predict.call_one(5) == 5
        await other.session().open()
    with pytest.raises(SerializationError, match="await it first"):
        encode(Service(ServiceConfig(), Gen), trusted=True)


async def test_a_handle_of_another_broker_says_so(broker: Served) -> None:
    """A8"""
    fields = (await Gen.as_service()).to_fields()
    stranger = Service.from_fields({**fields, "incarnation": 1})
    with pytest.raises(ServiceStopped, match="another broker"):
        await stranger.predict.route(1)


class Ranks(ForgeActor):
    @endpoint
    def who(self, x: Any = None) -> Any: ...


async def test_an_actors_call_is_always_a_mesh(broker: Served) -> None:
    """A7"""
    actor = await Ranks.as_actor()
    assert await actor.who.call(3) == ValueMesh({"procs": 1}, [3])
    assert await actor.who.call_one(4) == 4
    assert await actor.who.choose(5) == 5
    assert actor.state_epoch == 1


async def test_call_one_on_a_mesh_names_its_ranks_and_choose_and_stream_address_them(broker: Served) -> None:
    """A8"""
    broker.broker.methods["who"] = lambda item, x=None: item["rank"]
    actor = await Ranks.options(procs=3).as_actor()
    with pytest.raises(ValueError, match="has 3"):
        actor.who.call_one()
    assert await actor.who.choose() in {0, 1, 2}
    assert sorted([rank async for rank in actor.who.stream()]) == [0, 1, 2]


async def test_an_abandoned_stream_cancels_the_rest(broker: Served) -> None:
    broker.broker.methods["who"] = lambda item, x=None: (
        Raised(ValueError("rank")) if item["rank"] == 0 else item["rank"]
    )
    actor = await Ranks.options(procs=2).as_actor()
    with pytest.raises(ValueError, match="rank"):
        async for _ in actor.who.stream():
            pass


async def test_a_broadcast_is_not_waited_for_and_its_failure_is_logged(
    broker: Served, caplog: pytest.LogCaptureFixture
) -> None:
    broker.broker.methods["who"] = lambda item, x: Raised(ValueError("nobody home"))
    actor = await Ranks.as_actor()
    actor.who.broadcast(1)
    with pytest.raises(ValueError, match="nobody home"):
        await actor.who.call_one(2)  # answered after the broadcast: calls of one client start in order
    assert "who.broadcast: ValueError: nobody home" in caplog.text


async def test_an_actor_that_began_anew_shows_it(broker: Served) -> None:
    """A12"""
    actor = await Ranks.as_actor()
    broker.broker.notice("restarted", {"service": 1, "replica": 0, "epoch": 2})
    broker.turn()
    await actor.who.call_one(1)
    assert actor.state_epoch == 2


async def test_metrics_are_the_latest_pushed_or_fresh_when_awaited(broker: Served) -> None:
    """X4"""
    service = await Gen.as_service()
    figures = {
        "service": {"total_request_rate": 2.5, "healthy_replicas": 1},
        "replicas": {"idx": 0, "request_rate": 2.5},
    }
    assert service.get_metrics().get_total_request_rate() == 0.0
    broker.broker.notice("metrics", {"service": 1, "snapshot": figures})
    broker.turn()
    await service.predict.route(1)
    metrics = service.get_metrics()
    assert metrics.get_total_request_rate() == metrics.total_request_rate == 2.5
    assert metrics.get_avg_capacity_utilization(service._replicas) == 0.0
    broker.broker.controls["metrics"] = lambda fields: {"service": {"total_sessions": 4}, "replicas": {}}
    assert service.get_metrics_summary()["replicas"][0]["request_rate"] == 2.5
    assert (await service.get_metrics_summary())["service"]["total_sessions"] == 4
    assert (await service.get_metrics()).total_sessions == 4


async def test_an_unknown_option_of_a_call_is_named(broker: Served) -> None:
    service = await Gen.as_service()
    with pytest.raises(forge_client.ConfigError, match="did you mean 'timeout'"):
        service.predict.options(timout=1)
    with pytest.raises(forge_client.ConfigError, match="above 0"):
        service.predict.options(timeout=0)


async def test_a_call_that_fails_as_a_whole_fails_the_fan_out(broker: Served) -> None:
    fake = broker.broker
    fake.silent.add("predict")
    service = await Gen.as_service()
    call = service.predict.fanout(1)
    await broker.until(lambda _: fake.seen[-1][0] == "fanout")
    (outbox,) = fake.out.values()
    fake.results(outbox, [1], [(FAILED, error_payload("NoHealthyReplicas", service="gen", waited_s=1, replicas=[]))])
    broker.turn()
    with pytest.raises(NoHealthyReplicas, match="it has no replicas"):
        await call
