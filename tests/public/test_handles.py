"""What one does with services, actors and sessions, with the real broker: each sentence of the design that fakes alone had proved."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from forge_client import (
    OutcomeUnknown,
    Service,
    ServiceConfig,
    ServiceStopped,
    SessionClosed,
    UnknownService,
    connect,
    get_service,
)
from forge_client.connection import current_client
from tests.public.actors import Echo, Host

pytestmark = pytest.mark.timeout(30)

BOUND_S = 15.0


async def until(holds: Callable[[], Any]) -> None:
    """Ask the broker again and again, within a bound, until it says what is expected."""
    async with asyncio.timeout(BOUND_S):
        while not await holds():
            continue


async def test_a_service_is_started_by_its_first_call_by_await_or_by_a_block() -> None:
    """A2: the long form; calls made while it starts wait for it, in order."""
    lazy = Service(ServiceConfig(), Echo)
    assert await asyncio.gather(*(lazy.echo.route(n) for n in range(5))) == [0, 1, 2, 3, 4]
    await lazy.shutdown()
    awaited = await Service(ServiceConfig(num_replicas=2), Echo)
    assert awaited.num_replicas == 2
    async with Service(ServiceConfig(), Echo) as within:
        assert await within.echo.route(1) == 1
    with pytest.raises(ServiceStopped):
        await within.echo.route(1)
    assert await awaited.echo.route(1) == 1


async def test_sessions_belong_to_their_service_their_block_and_their_tasks() -> None:
    """S1: every sentence of it."""
    a, b = await asyncio.gather(Echo.options(num_replicas=2).as_service(), Echo.as_service())
    leave = asyncio.Event()

    async def later() -> Any:
        await leave.wait()
        return await a.where.route()

    async with a.session() as outer:
        assert (await b.where.route())[0] is None
        first, pid = await a.where.route()
        assert first == outer.session_id
        assert type(first) is str
        async with a.session() as inner:
            assert (await a.where.route())[0] == inner.session_id
            assert (await a.where.route(sess_id=outer.session_id)) == (outer.session_id, pid)
        assert await asyncio.create_task(_ask(a)) == (outer.session_id, pid)
        assert {session for session, _ in await a.where.fanout()} == {None}
        outliving = asyncio.create_task(later())
        by_hand = await a.start_session()
        assert type(by_hand) is str
        assert (await a.where.route(sess_id=by_hand))[0] == by_hand
        await a.terminate_session(by_hand)
    leave.set()
    with pytest.raises(SessionClosed, match="this task outlived the block"):
        await outliving
    assert await a.where.route() != (outer.session_id, pid)
    state = await a.state()
    assert (state["active_sessions"], state["session_replica_map"]) == ([], {})  # no ghost pin


async def _ask(service: Service) -> Any:
    return await service.where.route()


async def test_calls_of_a_session_bypass_batching() -> None:
    """S4: alone, it would wait for seven others or for 20 s."""
    service = await Echo.as_service()
    async with service.session() as session:
        assert await asyncio.wait_for(service.batched.route(1), 5) == (1, session.session_id)


async def test_plain_endpoints_run_off_the_loop_in_their_threads_and_in_order() -> None:
    """A6: as many as hold a call leave the loop free for the one that lets them go."""
    actor = await Echo.options(replica_max_concurrent_requests=20).as_actor()
    held = [actor.hold.call_one() for _ in range(4)]
    threads = await asyncio.gather(*(actor.thread.call_one() for _ in range(4)))
    assert await actor.loop_thread.call_one() not in threads
    await actor.let_go.call_one()
    assert await asyncio.gather(*held) == [True] * 4


async def test_a_handle_works_in_another_actor_and_so_does_one_of_an_actor() -> None:
    """A8: as an argument, in a list, and as a result."""
    service, actor = await asyncio.gather(Echo.as_service(), Echo.as_actor())
    host = await Host.as_service([service, actor])
    assert await host.ask_both.route("hi") == ["hi", "hi"]
    again = (await host.handles.route())[0]
    assert await again.echo.route(2) == 2


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_what_an_actor_started_ends_with_it_however_it_ends(how: str) -> None:
    """A10: its service, that service's worker processes, and its name."""
    host = await Host.options(restart_backoff_s=60.0, num_replicas=1).as_service()
    inner_pid = await host.start_inner.route("inner")
    assert await (await get_service("inner")).pid.route() == inner_pid
    pid = await host.pid.route()
    if how == "stopped":
        await host.shutdown()
    else:
        os.kill(pid, signal.SIGKILL)

    async def gone() -> bool:
        try:
            await get_service("inner")
        except (UnknownService, ServiceStopped):
            return not psutil.pid_exists(inner_pid)
        return False

    await until(gone)


async def test_a_detached_service_outlives_its_client_and_is_found_by_name() -> None:
    """A10"""
    address = (await current_client()).address
    async with connect(address):
        started = await Echo.options(name="kept", detached=True).as_service()
        other = await Echo.options(name="not-kept").as_service()
        pid, _ = await started.pid.route(), await other.pid.route()
    kept = await get_service("kept")
    assert await kept.pid.route() == pid

    async def gone() -> bool:
        try:
            await get_service("not-kept")
        except (UnknownService, ServiceStopped):
            return True
        return False

    await until(gone)
    await kept.shutdown()


async def test_an_actor_that_is_killed_comes_back_with_a_new_state_epoch() -> None:
    """A12: calls in flight say so, later ones reach the new incarnation."""
    actor = await Echo.options(restart_backoff_s=0.01).as_actor()
    pid, epoch = await actor.pid.call_one(), actor.state_epoch
    held = actor.rest.call_one()
    await until(_running(1))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(OutcomeUnknown, match="may or may not have run"):
        await held
    assert await actor.pid.call_one() != pid
    assert actor.state_epoch == epoch + 1


def _running(count: int) -> Callable[[], Any]:
    async def holds() -> bool:
        status = await (await current_client()).control("status", {})
        running = [int(replica["active_requests"]) for one in status["services"] for replica in one["replicas"]]
        return sum(running) == count

    return holds


async def test_sessions_are_counted_per_replica() -> None:
    """X4, S2: two sessions go to two replicas, the least loaded in turn, and the metrics say where they live."""
    service = await Echo.options(num_replicas=2).as_service()
    async with service.session(), service.session():
        first, second = await service.start_session(), await service.start_session()
        for session in (first, second):
            await service.echo.route("pin", sess_id=session)
        metrics = await service.get_metrics()
        assert metrics.get_sessions_per_replica() == {0: 1, 1: 1}
        assert metrics.total_sessions == 4  # the two of the blocks have made no call, so they are pinned nowhere
        state = await service.state()
        assert sorted(state["session_replica_map"].items()) == sorted([(first, 0), (second, 1)])
