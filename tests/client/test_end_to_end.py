"""Through the public door, with a real broker and real workers: the embedded one of this process (A1–A12).

The broker is started by the first test and ended after the last; each test's loop has a client of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import forge_client
from forge_client import (
    FanoutError,
    ForgeActor,
    LeastLoadedRouter,
    RemoteError,
    Router,
    Service,
    ServiceConfig,
    ServiceStopped,
    UnknownService,
    UnknownSession,
    ValueMesh,
    current_session,
    endpoint,
    get_service,
    service_endpoint,
)
from forge_client.connection import _clients, current_client
from forge_client.embedded import end_embedded

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(scope="module", autouse=True)
def embedded() -> Iterator[None]:
    yield
    end_embedded()


@pytest.fixture(autouse=True)
async def stopped() -> AsyncIterator[None]:
    """What a test started is gone when the next one begins; the broker stays."""
    yield
    for client in list(_clients()):
        await client.shutdown()


def ended(pid: int, within_s: float = 5) -> bool:
    if not psutil.pid_exists(pid):
        return True
    return not psutil.wait_procs([psutil.Process(pid)], timeout=within_s)[1]


@dataclass
class Point:
    x: int
    y: int


class Broken(Exception):
    pass


class First(Router):
    def get_replica(self, healthy_replicas: Any, sess_id: Any = None, session_map: Any = None) -> Any:
        if not healthy_replicas:
            raise RuntimeError("No healthy replicas available")
        return healthy_replicas[0]


class Counter(ForgeActor):
    """Enough of an actor to see where a call went."""

    def __init__(self, start: int = 0, fail: str = "") -> None:
        if fail:
            raise Broken(fail)
        self.count = start

    async def setup(self) -> None:
        self.ready = True

    @endpoint
    async def add(self, amount: int = 1) -> int:
        self.count += amount
        return self.count

    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @service_endpoint(router=LeastLoadedRouter(), batch_size=8, batch_timeout=0.01)
    async def double(self, value: Any) -> Any:
        return value * 2

    @service_endpoint(router=First())
    async def first(self) -> int:
        return os.getpid()

    @endpoint
    async def where(self) -> tuple[str | None, int]:
        return current_session(), os.getpid()

    @endpoint
    async def fail(self, text: str) -> None:
        raise Broken(text)

    @endpoint
    async def move(self, point: Point, by: int) -> Point:
        return Point(point.x + by, point.y + by)

    @endpoint
    async def ask(self, other: Service, amount: int) -> Any:
        return await other.add.route(amount)

    @endpoint
    async def start_another(self) -> Any:
        return await Counter.options(name="started-inside").as_service(100)


async def test_a_service_of_two_replicas_serves_and_stops() -> None:
    """A1, A2, A5"""
    service = await Counter.options(num_replicas=2).as_service(start=10)
    assert service.num_replicas == 2
    assert len(set(await service.pid.fanout())) == 2
    assert await asyncio.gather(*(service.double.route(x) for x in range(50))) == [2 * x for x in range(50)]
    assert await service.move.route(Point(1, 2), by=3) == Point(4, 5)
    assert len({await service.first.route() for _ in range(5)}) == 1
    with pytest.raises(Broken, match="on purpose") as caught:
        await service.fail.route("on purpose")
    assert "raise Broken(text)" in str(caught.value.__cause__)
    with pytest.raises(FanoutError, match="2 of 2"):
        await service.fail.fanout("everywhere")
    await service.shutdown()
    with pytest.raises(ServiceStopped):
        await service.pid.route()


async def test_a_constructor_that_raises_reaches_the_caller_and_leaves_nothing() -> None:
    """A2"""
    with pytest.raises(Broken, match="no weights") as caught:
        await Counter.options(num_replicas=2).as_service(fail="no weights")
    assert "raise Broken(fail)" in str(caught.value.__cause__)


async def test_sessions_stay_on_their_replica() -> None:
    """S1, S2"""
    service = await Counter.options(num_replicas=2).as_service()
    async with service.session() as session:
        answers = [await service.where.route() for _ in range(6)]
    assert {session_id for session_id, _ in answers} == {session.session_id}
    assert len({pid for _, pid in answers}) == 1
    session_id = await service.start_session()
    assert (await service.where.route(sess_id=session_id))[0] == session_id
    await service.terminate_session(session_id)
    await service.terminate_session(session_id)
    with pytest.raises(UnknownSession):
        await service.where.route(sess_id="never-started")
    assert (await service.where.route())[0] is None


async def test_an_actor_of_several_ranks_answers_with_a_mesh() -> None:
    """A7, A8, A12"""
    actor = await Counter.options(procs=2).as_actor(5)
    assert await actor.add.call(1) == ValueMesh({"procs": 2}, [6, 6])
    assert await actor.add.choose(0) == 6
    assert sorted([value async for value in actor.add.stream(1)]) == [7, 7]
    with pytest.raises(ValueError, match="has 2"):
        actor.add.call_one()
    actor.add.broadcast(10)
    assert list((await actor.add.call(0)).values()) == [17, 17]
    assert actor.state_epoch == 1
    await Counter.shutdown(actor)


async def test_calls_of_one_client_to_one_actor_start_in_order() -> None:
    """A6"""
    actor = await Counter.as_actor()
    answers = await asyncio.gather(*(actor.add.call_one(1) for _ in range(100)))
    assert answers == list(range(1, 101))


async def test_handles_work_in_other_actors() -> None:
    """A8"""
    service, asking = await Counter.as_service(1), await Counter.as_service()
    assert await asking.ask.route(service, 41) == 42


async def test_what_an_actor_starts_ends_with_it() -> None:
    """A10"""
    outer = await Counter.as_service()
    inner = await outer.start_another.route()
    assert await inner.add.route(1) == 101
    assert await (await get_service("started-inside")).add.route(1) == 102
    await outer.shutdown()
    async with asyncio.timeout(5):
        while True:
            try:
                await get_service("started-inside")
            except UnknownService:
                break
            except ServiceStopped:
                break


async def test_classes_from_inside_a_function_work() -> None:
    """A9, W6"""

    class Mine(Exception):
        pass

    class Local(ForgeActor):
        @endpoint
        def shout(self, text: str) -> str:
            if not text:
                raise Mine("nothing to shout")
            return text.upper()

    async with Service(ServiceConfig(), Local) as service:
        assert await service.shout.route("hi") == "HI"
        with pytest.raises((Mine, RemoteError), match="nothing to shout"):
            await service.shout.route("")


async def test_metrics_and_state_have_the_names_of_the_original() -> None:
    """X4, X5"""
    service = await Counter.as_service()
    await asyncio.gather(*(service.add.route() for _ in range(10)))
    metrics = await service.get_metrics()
    assert metrics.replica_metrics[0].successful_requests == 10
    summary = await service.get_metrics_summary()
    assert summary["service"]["healthy_replicas"] == 1
    assert {"request_rate", "avg_latency", "capacity_utilization"} <= summary["replicas"][0].keys()
    assert metrics.endpoints["add"]["outcomes"] == {"ok": 10}
    assert 0.0 < metrics.latency["run"]["p50"] <= metrics.latency["run"]["p99"] < 60.0
    assert metrics.get_avg_capacity_utilization(service._replicas) >= 0.0
    assert (await service.state())["replicas"][0]["state"] == "HEALTHY"


def test_a_program_that_forgets_everything_leaves_no_process_behind(tmp_path: Path) -> None:
    """A1, A9, A10: a class of `__main__`, a service never shut down, and a program that is killed."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import asyncio, os, sys
        from forge_client import ForgeActor, endpoint

        class Echo(ForgeActor):
            @endpoint
            async def pid(self): return os.getpid()

        async def main():
            service = await Echo.as_service()
            print(await service.pid.route(), flush=True)
            if "killed" in sys.argv:
                os.kill(os.getpid(), 9)

        asyncio.run(main())
        """)
    )
    for arguments, code in ((["ends"], 0), (["killed"], -9)):
        done = subprocess.run(
            [sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
        assert done.returncode == code, done.stderr
        worker = int(done.stdout)
        assert ended(worker), done.stderr


async def test_shutdown_ends_the_embedded_broker_when_nobody_else_uses_it() -> None:
    """A10"""
    service = await Counter.as_service()
    broker = (await current_client()).embedded
    assert broker is not None
    await forge_client.shutdown()
    assert not broker.running
    with pytest.raises(ServiceStopped):
        service.add.route()


async def test_an_embedded_broker_that_is_killed_comes_back_and_nothing_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A1, F10: the same worker answers, with its state, what was asked before, meanwhile and afterwards."""
    service = await Counter.as_service(7)
    client = await current_client()
    assert client.embedded is not None
    assert await service.add.route() == 8
    worker = await service.pid.route()
    client.embedded.process.send_signal(signal.SIGSTOP)  # so that the call is still unanswered
    before = service.double.route(1)
    await asyncio.sleep(0)
    client.embedded.process.kill()
    meanwhile = service.add.route()
    assert [await before, await meanwhile] == [2, 9]
    assert (await service.pid.route(), await service.add.route()) == (worker, 10)
    assert "the embedded broker ended (signal SIGKILL) and was started anew" in caplog.text


async def test_an_embedded_broker_that_was_asked_to_end_is_lost_at_once_and_the_next_use_starts_another() -> None:
    """A1, F9"""
    service = await Counter.as_service()
    client = await current_client()
    assert client.embedded is not None
    client.embedded.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(client.embedded.process.wait, 10) == 0
    with pytest.raises((forge_client.BrokerLost, ServiceStopped)):
        await service.add.route()
    with pytest.raises(forge_client.BrokerLost):  # at the latest when the client has noticed
        await client.control("status", {})
    assert client.over is not None
    assert await (await Counter.as_service(7)).add.route() == 8


def test_a_fork_of_the_program_does_not_keep_the_broker_alive(tmp_path: Path) -> None:
    """A1: the broker ends with the process that started it, also when a child of that lives on."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import asyncio, os, signal
        from forge_client import ForgeActor, endpoint

        class Echo(ForgeActor):
            @endpoint
            async def pid(self): return os.getpid()

        async def main():
            service = await Echo.as_service()
            worker = await service.pid.route()
            child = os.fork()
            if child == 0:
                os.close(1)
                os.close(2)
                signal.pause()
            print(worker, child, flush=True)
            os.kill(os.getpid(), 9)

        asyncio.run(main())
        """)
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=20, check=False)
    worker, child = map(int, done.stdout.split())
    try:
        assert ended(worker)
        assert not ended(child, within_s=0)
    finally:
        os.kill(child, signal.SIGKILL)


async def test_threads_with_loops_of_their_own_share_the_embedded_broker() -> None:
    """A1: each event loop has its own client of it."""

    async def elsewhere() -> tuple[int, int]:
        service = await Counter.as_service(1)
        broker = (await current_client()).embedded
        assert broker is not None
        return await service.add.route(), broker.process.pid

    service = await Counter.as_service(2)
    mine = (await current_client()).embedded
    assert mine is not None
    answers = await asyncio.gather(*(asyncio.to_thread(asyncio.run, elsewhere()) for _ in range(2)))
    assert answers == [(2, mine.process.pid)] * 2
    assert await service.add.route() == 3


def test_a_broker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A1"""
    end_embedded()
    monkeypatch.setenv("FORGE_MAX_WORKERS", "many")
    with pytest.raises(forge_client.ConfigError, match="many"):
        asyncio.run(current_client())
