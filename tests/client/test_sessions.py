"""Sessions at the caller: which calls belong to one, and when it is over (S1, S2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from forge_client import BadCall, ForgeActor, Service, SessionClosed, connect, current_session, endpoint
from forge_contract.errors import UnknownService
from tests.client.fake_broker import Served, serve


class Chat(ForgeActor):
    @endpoint
    async def say(self, text: str = "") -> Any: ...


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(tmp_path) as served, connect(served.address):
        # The answer is the session of the call, as the broker sees it.
        served.broker.methods["say"] = lambda item, text="": item.get("session")
        yield served


@pytest.fixture
async def chat(broker: Served) -> Service:
    return await Chat.as_service()


async def test_calls_inside_the_block_belong_to_the_session_and_others_do_not(chat: Service) -> None:
    """S1"""
    async with chat.session() as session:
        assert await chat.say.route() == session.session_id
        assert current_session() == session.session_id == str(session)
    assert await chat.say.route() is None
    assert current_session() is None


async def test_a_session_belongs_to_its_service_alone(chat: Service) -> None:
    """S1, and way 5 of §9"""
    other = await Chat.as_service()
    async with chat.session() as session, other.session() as others:
        assert await chat.say.route() == session.session_id
        assert await other.say.route() == others.session_id
    async with chat.session():
        assert await other.say.route() is None


async def test_the_inner_session_wins_and_the_outer_one_comes_back(chat: Service) -> None:
    """S1"""
    async with chat.session() as outer:
        async with chat.session() as inner:
            assert await chat.say.route() == inner.session_id
        assert await chat.say.route() == outer.session_id


async def test_tasks_started_inside_inherit_the_session(chat: Service) -> None:
    """S1"""
    async with chat.session() as session:
        answers = await asyncio.gather(asyncio.create_task(ask(chat)), ask(chat))
        assert set(answers) == {session.session_id}


async def ask(chat: Service) -> Any:
    return await chat.say.route("hello")


async def test_a_task_that_outlives_the_block_is_told_so(chat: Service, broker: Served) -> None:
    """S1"""
    over = asyncio.Event()

    async def late() -> Any:
        await over.wait()
        return await chat.say.route()

    async with chat.session() as session:
        task = asyncio.create_task(late())
        await asyncio.sleep(0)
    over.set()
    with pytest.raises(SessionClosed, match=session.session_id):
        await task
    assert [entry[0] for entry in broker.broker.seen] == ["deploy", "open_session", "close_session"]


async def test_blocks_left_out_of_order_leave_no_closed_session_behind(chat: Service) -> None:
    """S1"""
    outer, inner = chat.session(), chat.session()
    await outer.__aenter__()
    await inner.__aenter__()
    await outer.__aexit__(None, None, None)
    assert await chat.say.route() == inner.session_id
    await inner.__aexit__(None, None, None)
    assert await chat.say.route() is None


async def test_an_explicit_session_wins(chat: Service) -> None:
    """S1"""
    session_id = await chat.start_session(user="ada")
    async with chat.session():
        assert await chat.say.route(sess_id=session_id) == session_id
    await chat.terminate_session(session_id)
    await chat.terminate_session(session_id)


@pytest.mark.parametrize("wrong", [5, ["s"], b"s"])
async def test_a_session_id_of_another_type_is_its_callers_mistake(chat: Service, broker: Served, wrong: Any) -> None:
    """W8: the broker would end the whole client for it."""
    with pytest.raises(BadCall, match="sess_id is the id of a session"):
        chat.say.route(sess_id=wrong)
    assert await chat.say.route() is None


async def test_a_session_counts_as_used_from_its_first_call_on(chat: Service, broker: Served) -> None:
    """F10: what a broker without memory is told."""
    used, idle = await chat.start_session(), await chat.start_session()
    other = await chat.start_session()
    await chat.say.route(sess_id=used)
    await chat.say.options(timeout=9.0).route(sess_id=other)
    await chat.terminate_session(other)
    binding = await chat.bound()
    assert {sid: was_used for _, sid, _, was_used in binding.declared_sessions()} == {used: True, idle: False}


async def test_options_of_a_call_hold_inside_a_session_too(chat: Service, broker: Served) -> None:
    """F5, S1"""
    broker.broker.methods["say"] = lambda item, text="": [item["session"], item["priority"], 0 < item["timeout"] <= 9.0]
    async with chat.session() as session:
        answer = await chat.say.options(timeout=9.0, priority=-7).route()
    assert answer == [session.session_id, -7, True]


async def test_fan_outs_ignore_the_session_and_take_none(chat: Service, broker: Served) -> None:
    """S1"""
    async with chat.session():
        assert await chat.say.fanout() == [None, None]
        with pytest.raises(BadCall, match="takes no sess_id"):
            chat.say.fanout(sess_id="x")


async def test_hints_travel_with_the_session_and_with_a_call(chat: Service, broker: Served) -> None:
    """R2, R3"""
    async with chat.session(key="doc-1") as session:
        pass
    opening = ("open_session", {"service": 1, "session": session.session_id, "hints": {"key": "doc-1"}})
    assert opening in broker.broker.seen
    await chat.say.options(hints={"key": 7}, priority=5).route()
    assert broker.broker.seen[-1][3] == {"hints": {"key": 7}, "priority": 5}


async def test_a_session_ends_with_its_block_also_when_the_service_is_gone(chat: Service) -> None:
    """S2"""
    async with chat.session() as session:
        await chat.shutdown()
    assert session.closed


async def test_a_session_that_cannot_be_opened_fails_the_block(chat: Service, broker: Served) -> None:
    def refuse(fields: Any) -> Any:
        raise UnknownService(name="Chat-1", known=[])

    broker.broker.controls["open_session"] = refuse
    with pytest.raises(UnknownService):
        async with chat.session():
            pass
    assert await chat.say.route() is None
