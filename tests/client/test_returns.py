"""A broker that dies and comes back, as the caller sees it: nothing, or an error that says what (F10, F5, A12, S3).

What the link says to the successor is in `test_recovery`; a real broker that is killed is in `test_end_to_end`.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import zmq

import forge_client
from forge_client import (
    BrokerLost,
    CallTimeout,
    ForgeActor,
    OutcomeUnknown,
    Service,
    ServiceStopped,
    SessionLost,
    connect,
    endpoint,
)
from forge_client.connection import current_client
from forge_contract.payload import decode_call
from tests.client.fake_broker import FakeBroker, Served, serve


class Echo(ForgeActor):
    def __init__(self, weights: str = "w") -> None: ...

    @endpoint
    async def echo(self, x: Any = None) -> Any: ...

    @endpoint
    async def load(self, x: Any = None) -> Any: ...


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(tmp_path) as served:
        served.broker.welcome["orphan_grace_s"] = 5.0
        async with connect(served.address):
            yield served


def dies_and_returns(served: Served, *, recovering: bool = True) -> None:
    """Killed, and started again at the same address."""
    served.close()
    served.broker.forget(recovering=recovering)
    served.broker.silent.clear()
    served.open()


async def called(served: Served, count: int = 1) -> None:
    """Wait until the broker has so many calls."""
    await served.until(lambda fake: len(calls(fake)) >= count)


def calls(fake: FakeBroker) -> list[tuple[Any, ...]]:
    return [entry for entry in fake.seen if entry[0] in ("call", "fanout")]


async def test_an_unanswered_call_is_answered_by_the_brokers_successor(broker: Served) -> None:
    """F10"""
    broker.broker.silent.add("echo")
    service = await Echo.as_service()
    call = service.echo.route("first")
    await called(broker)
    dies_and_returns(broker)
    assert await call == "first"
    assert calls(broker.broker)[-1][2:] == ((("first",), {}), {"again": True})
    assert await service.echo.route("and on") == "and on"
    assert "again" not in calls(broker.broker)[-1][3]


async def test_a_call_made_while_the_broker_is_away_waits_and_is_new(
    broker: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F10, F3: it cannot have run, so an actor's too goes on."""
    actor = await Echo.as_actor()
    await goes_away(broker, monkeypatch)
    call = actor.echo.call_one("meanwhile")
    broker.broker.forget(recovering=True)
    broker.open()
    assert await call == "meanwhile"
    assert "again" not in calls(broker.broker)[-1][3]


async def goes_away(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, and the client has noticed."""
    link = (await current_client()).link
    noticed, disconnected = asyncio.Event(), link.disconnected

    def notice(now: float) -> None:
        disconnected(now)
        noticed.set()

    monkeypatch.setattr(link, "disconnected", notice)
    served.close()
    async with asyncio.timeout(5.0):
        await noticed.wait()
    assert not link.heard


async def test_the_timeout_of_a_call_runs_on_while_the_broker_is_away(
    broker: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5, F10"""
    service = await Echo.as_service()
    await goes_away(broker, monkeypatch)
    before = time.monotonic()
    with pytest.raises(CallTimeout, match="no answer from the broker"):
        await service.echo.options(timeout=0.05).route("late")
    assert time.monotonic() - before < 2.0
    cancelled = service.echo.route("cancelled")
    cancelled.cancel()
    broker.broker.forget(recovering=True)
    broker.open()
    assert await service.echo.route("next") == "next"
    assert [entry[2][0] for entry in calls(broker.broker)] == [("next",)]  # nobody waits for the others
    assert not (await current_client()).link.unanswered


async def test_a_call_under_way_has_only_the_rest_of_its_timeout_left(broker: Served) -> None:
    """F5, F10"""
    broker.broker.silent.add("echo")
    service = await Echo.as_service()
    call = service.echo.options(timeout=60.0).route(1)
    await called(broker)
    first = calls(broker.broker)[-1][3]["timeout"]
    dies_and_returns(broker)
    await call
    assert 0 < calls(broker.broker)[-1][3]["timeout"] < first <= 60.0


async def test_a_fan_out_under_way_has_an_unknown_outcome(broker: Served) -> None:
    """F10"""
    broker.broker.silent.add("load")
    service = await Echo.as_service()
    fanout = service.load.fanout("weights")
    await called(broker)
    dies_and_returns(broker)
    with pytest.raises(OutcomeUnknown, match=r"Echo-1\.load may or may not have run: the broker died while it ran"):
        await fanout
    assert await service.load.fanout("weights") == ["weights"] * 2


async def test_the_successor_is_told_of_services_how_many_they_are_by_now_and_sessions(broker: Served) -> None:
    """F10"""
    service = await Echo.options(num_replicas=2).as_service("of mine")
    other = await Echo.as_service()
    await Echo.options(detached=True, name="on-its-own").as_service()
    session = await service.start_session(user="ada")
    closed = await service.start_session()
    await service.terminate_session(closed)
    await other.shutdown()
    broker.broker.notice("resized", {"service": 1, "wanted": 5, "resizes": 3})
    await service.echo.route(0)
    dies_and_returns(broker)
    await service.echo.route(1)
    declared = broker.broker.hellos[-1]["declares"]
    ((args, kwargs),) = [decode_call(payload, trusted=True) for payload in broker.broker.declared_payloads]
    assert (args, kwargs) == (("of mine",), {})
    assert declared == {
        "services": [
            {
                "service": 1,
                "name": "Echo-1",
                "spec": broker.broker.specs[0],
                "endpoints": [100, 101],
                "owner": 0x1A2B3C,
                "trusted": True,
                "wanted": 5,
                "resizes": 3,
            }
        ],
        "sessions": [[1, session, {"user": "ada"}, False]],
        "replays": [],
        "waiting": True,
    }


async def test_a_deploy_under_way_is_asked_for_again(broker: Served) -> None:
    """F10"""
    broker.broker.silent.add("deploy")
    starting = asyncio.ensure_future(Echo.as_service())
    await broker.until(lambda fake: fake.seen)
    dies_and_returns(broker)
    assert await (await starting).echo.route(1) == 1


async def test_handles_and_open_sessions_outlive_the_broker(broker: Served) -> None:
    """F10, A8, S1"""
    broker.broker.methods["echo"] = lambda item, x=None: item.get("session")
    service = await Echo.as_service()
    travelled = pickle.dumps(service)
    async with service.session() as session:
        dies_and_returns(broker)
        assert await service.echo.route() == session.session_id
        assert await service.echo.route() == session.session_id
    arrived: Service = pickle.loads(travelled)
    assert await arrived.echo.route() is None
    assert await pickle.loads(pickle.dumps(service)).echo.route() is None


async def test_a_successor_that_recovers_nothing_ends_handles_and_sessions(broker: Served) -> None:
    """F10"""
    broker.broker.silent.add("echo")
    service = await Echo.as_service()
    travelled = pickle.dumps(service)
    async with service.session():
        call = service.echo.route(1)
        await called(broker)
        dies_and_returns(broker, recovering=False)
        with pytest.raises(BrokerLost, match="knows nothing of our calls"):
            await call
        with pytest.raises(BrokerLost):
            service.echo.route(2)
    with pytest.raises(ServiceStopped, match="another broker"):
        await pickle.loads(travelled)
    assert await (await Echo.as_service()).echo.route(3) == 3


async def test_one_who_answers_the_connection_and_says_nothing_is_no_broker(tmp_path: Path) -> None:
    """F10: the wait ends with the time, not with a connection."""
    async with serve(tmp_path) as served, connect(served.address):  # orphan_grace_s is 0.3 here
        served.broker.silent.add("echo")
        service = await Echo.as_service()
        call = service.echo.route(1)
        await called(served)
        served.close()
        mute: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        mute.bind(served.address)
        try:
            async with asyncio.timeout(5.0):
                with pytest.raises(BrokerLost, match=r"nothing was heard of it for 0\.3 s"):
                    await call
        finally:
            mute.close(linger=0)


async def test_a_loop_that_was_held_up_has_not_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F10: what came back while user code held the loop is heard before the wait is called over."""
    async with serve(tmp_path) as served:
        served.broker.welcome["orphan_grace_s"] = 0.8
        async with connect(served.address):
            service = await Echo.as_service()
            await goes_away(served, monkeypatch)
            call = service.echo.route(1)
            await asyncio.sleep(0)
            time.sleep(1.3)  # noqa: ASYNC251 - the user's code, which is what this is about
            served.broker.forget(recovering=True)
            served.open()
            assert await call == 1


async def test_an_actor_that_began_anew_has_another_state_epoch(broker: Served) -> None:
    """A12: also when the broker's successor counts from 1 again."""
    actor = await Echo.as_actor()
    assert actor.state_epoch == 1
    for epoch, expected in ((2, 2), (1, 3), (7, 7)):
        broker.broker.notice("restarted", {"service": 1, "replica": 0, "epoch": epoch})
        broker.turn()
        await actor.echo.call_one(1)
        assert actor.state_epoch == expected


async def test_a_lost_session_is_told_to_its_calls_and_its_block_ends_quietly(broker: Served) -> None:
    """S3"""

    def lost(*_: Any) -> Any:
        raise SessionLost(session="s", service="Echo-1", why="replica 0 died")

    broker.broker.methods["echo"] = lost
    broker.broker.controls["close_session"] = lost
    service = await Echo.as_service()
    async with service.session():
        with pytest.raises(SessionLost, match="lost its state: replica 0 died"):
            await service.echo.route()
    await forge_client.shutdown()
