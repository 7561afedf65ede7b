"""Calls with the real broker and real workers: what comes back, what fails, and what a caller who leaves costs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from typing import Any

import numpy as np
import pytest

from forge_client import (
    CallTimeout,
    FanoutError,
    ReplicaLost,
    Service,
    UnknownSession,
    ValueMesh,
    connect,
)
from forge_client.connection import current_client
from tests.public.actors import Echo

pytestmark = pytest.mark.timeout(30)

BOUND_S = 15.0


async def until_running(service: Service, *counts: int) -> None:
    """Until the replicas run so many calls, each as the broker knows it."""
    async with asyncio.timeout(BOUND_S):
        while [replica["active_requests"] for replica in (await service.state())["replicas"]] != list(counts):
            continue


async def test_calls_that_were_sent_ahead_to_a_replica_that_becomes_slow_run_on_another() -> None:
    """R1: nobody stands behind a slow call for long while another replica is free."""
    service = await Echo.options(
        num_replicas=2, replica_max_concurrent_requests=2, dispatch_ahead_s=0.1, name="ahead"
    ).as_service()
    client = await current_client()
    answers: Counter[int] = Counter()

    async def caller(n: int) -> None:
        while True:
            await service.echo.route(n)
            answers[n] += 1

    async def told(of: str) -> str:
        return "\n".join((await client.control("explain", {"subject": of}))["story"])

    started: list[asyncio.Future[Any]] = [asyncio.create_task(caller(n)) for n in range(64)]
    try:
        async with asyncio.timeout(BOUND_S):
            while not any(replica["queue_size"] for replica in (await service.state())["replicas"]):
                continue
            started += [service.rest.route() for _ in range(3)]  # one replica rests twice, and runs nothing else
            while "called back" not in await told("ahead/0") + await told("ahead/1"):
                continue
            before = answers.copy()
            while not all(answers[n] > before[n] for n in range(64)):
                await service.state()
        assert not any(one.done() for one in started)
    finally:
        for one in started:
            one.cancel()
        await asyncio.wait(started, timeout=BOUND_S)


async def test_large_arrays_travel_there_and_back() -> None:
    """W1, W5: in frames of their own, many at once, beside small ones."""
    service = await Echo.as_service()
    arrays = [np.full((1 << 18,), n, dtype=np.float32) for n in range(12)]
    answers = await asyncio.gather(*(service.echo.route({"n": n, "array": one}) for n, one in enumerate(arrays)))
    for n, answer in enumerate(answers):
        assert answer["n"] == n
        assert answer["array"].dtype == np.float32
        assert np.array_equal(answer["array"], arrays[n])


async def test_exceptions_are_raised_or_come_back_as_values_and_harm_no_replica() -> None:
    """A5: on a service, on one with errors="return", and in a fan-out."""
    service = await Echo.options(num_replicas=2).as_service()
    with pytest.raises(LookupError, match="nothing here") as caught:
        await service.fail.route("nothing here")
    assert "raise LookupError(text)" in str(caught.value.__cause__)
    with pytest.raises(FanoutError, match="2 of 2 replicas failed") as both:
        await service.fail.fanout("nowhere")
    assert {type(error) for error in both.value.errors.values()} == {LookupError}
    listed = await service.fail.options(return_exceptions=True).fanout("nowhere")
    assert [str(error) for error in listed] == ["nowhere", "nowhere"]
    returning = await Echo.options(errors="return").as_service()
    value = await returning.fail.route("as a value")
    assert (type(value), str(value)) == (LookupError, "as a value")
    for one in (service, returning):
        assert all(replica["healthy"] and not replica["restarts"] for replica in (await one.state())["replicas"])


async def test_a_fan_out_tells_which_replica_died_and_what_the_others_said() -> None:
    """A5"""
    service = await Echo.options(num_replicas=2).as_service()
    survivor, victim = await service.pid.fanout()
    fanned = service.rest_unless.fanout(survivor)
    await until_running(service, 0, 1)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(FanoutError, match="1 of 2") as caught:
        await fanned
    assert caught.value.results == {0: survivor}
    assert isinstance(caught.value.errors[1], ReplicaLost)


async def test_a_killed_worker_costs_no_caller_its_answer() -> None:
    """R1, C4: what it held is answered by the other replica."""
    service = await Echo.options(num_replicas=2).as_service()
    survivor, victim = await service.pid.fanout()
    calls = [service.rest_unless.route(survivor) for _ in range(10)]
    await asyncio.wait_for(calls[0], BOUND_S)
    os.kill(victim, signal.SIGKILL)
    assert await asyncio.wait_for(asyncio.gather(*calls), BOUND_S) == [survivor] * 10


async def test_a_callers_timeout_or_cancellation_gives_the_room_back() -> None:
    """C6, and known mistake 1: no replica is marked failed for it."""
    service = await Echo.options(replica_max_concurrent_requests=1).as_service()
    with pytest.raises(CallTimeout, match=r"Echo.*\.rest did not answer within 0\.1 s"):
        await service.rest.options(timeout=0.1).route()
    left = asyncio.ensure_future(service.rest.route())
    waiting = service.echo.route("after it")
    await until_running(service, 1)
    left.cancel()
    assert await asyncio.wait_for(waiting, BOUND_S) == "after it"
    (replica,) = (await service.state())["replicas"]
    assert (replica["state"], replica["restarts"]) == ("HEALTHY", 0)


async def test_a_mesh_of_a_service_answers_with_rank_0_or_with_all() -> None:
    """A7: also on hosts × procs."""
    first = await Echo.options(procs=2).as_service()
    assert await first.rank.route() == (0, 2)
    whole = await Echo.options(procs=2, hosts=1, return_first_rank_result=False).as_service()
    mesh: ValueMesh[Any] = await whole.rank.route()
    assert mesh.sizes == {"hosts": 1, "procs": 2}
    assert mesh.item(hosts=0, procs=1) == (1, 2)
    assert list(mesh.values()) == [(0, 2), (1, 2)]


async def test_a_session_ends_by_disuse_and_with_its_client() -> None:
    """S2"""
    service = await Echo.options(name="shared-sessions", session_ttl_s=0.2).as_service()
    short = await service.start_session()
    assert (await service.where.route(sess_id=short))[0] == short
    async with asyncio.timeout(BOUND_S):
        while (await service.state())["sessions"]:
            continue
    with pytest.raises(UnknownSession):
        await service.where.route(sess_id=short)
    address = (await current_client()).address
    lasting = await Echo.options(name="lasting").as_service()
    async with connect(address) as other:
        theirs = await (await _found("lasting")).start_session()
        assert other.address == address
        assert (await lasting.state())["active_sessions"] == [theirs]
    async with asyncio.timeout(BOUND_S):
        while (await lasting.state())["sessions"]:
            continue


async def _found(name: str) -> Service:
    from forge_client import get_service

    service = await get_service(name)
    assert isinstance(service, Service)
    return service
