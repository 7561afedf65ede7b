"""The way to the broker: connecting, losing it, coming back, leaving (A1, A10, W4)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import forge_client
from forge_client import BrokerLost, BrokerUnreachable, ConfigError, ForgeActor, VersionMismatch, connect, endpoint
from forge_client.connection import current_client
from tests.client.fake_broker import serve

ROOT = Path(__file__).resolve().parents[2]


class Echo(ForgeActor):
    @endpoint
    async def echo(self, x: Any) -> Any: ...


async def test_nobody_at_the_address_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnreachable, match=r"nobody\.sock within 0\.05 s"):
        await connect(f"ipc://{tmp_path}/nobody.sock", connect_timeout_s=0.05)


@pytest.mark.parametrize("address", ["localhost:5555", "ipc://" + "x" * 200])
async def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        await connect(address)


async def test_a_refused_hello_is_raised_where_one_connects(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        served.broker.refusal = ["VersionMismatch", {"ours": 9, "theirs": 1}]
        with pytest.raises(VersionMismatch, match="protocol 9"):
            await connect(served.address)


async def test_the_environment_names_the_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A1"""
    async with serve(tmp_path) as served:
        monkeypatch.setenv("FORGE_BROKER", served.address)
        first, second = await asyncio.gather(current_client(), current_client())
        assert first is second
        assert first.address == served.address == connect().address
        await forge_client.shutdown()
        assert (await current_client()) is not first
        await forge_client.shutdown()


async def test_the_latest_connection_is_used_until_its_block_ends(tmp_path: Path) -> None:
    """A1"""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with serve(tmp_path / "a") as a, serve(tmp_path / "b") as b, connect(a.address) as outer:
        async with connect(b.address) as inner:
            assert await current_client() is inner
        assert await current_client() is outer
        assert b.broker.hellos[0]["pid"] == os.getpid()


async def test_what_was_lost_at_a_reconnect_is_sent_again(tmp_path: Path) -> None:
    """W4"""
    async with serve(tmp_path) as served, connect(served.address):
        service = await Echo.as_service()
        served.close()
        calls = [service.echo.route(x) for x in range(3)]
        await asyncio.sleep(0)
        served.open()
        assert await asyncio.gather(*calls) == [0, 1, 2]
        assert [entry[2][0][0] for entry in served.broker.seen if entry[0] == "call"] == [0, 1, 2]


async def test_a_broker_that_does_not_come_back_is_lost(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, connect(served.address) as client:
        served.broker.silent.add("echo")
        service = await Echo.as_service()
        calls = service.echo.route(1), service.echo.route(2)
        await served.until(lambda fake: fake.seen[-1][0] == "call")
        served.close()
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in errors] == [BrokerLost] * 2
        assert errors[0] is not errors[1]
        with pytest.raises(BrokerLost, match="nothing was heard of it"):
            service.echo.route(3)
        with pytest.raises(BrokerLost):
            await client.control("status", {})


async def test_another_broker_at_the_address_loses_what_was_unanswered_and_serves_anew(tmp_path: Path) -> None:
    """F10: this release opens no recovery window."""
    async with serve(tmp_path) as served, connect(served.address):
        served.broker.silent.add("echo")
        service = await Echo.as_service()
        call = service.echo.route(1)
        await served.until(lambda fake: fake.seen[-1][0] == "call")
        served.broker.forget()
        served.broker.silent.clear()
        service.echo.route(2).add_done_callback(lambda done: done.exception())
        with pytest.raises(BrokerLost):
            await call
        with pytest.raises(BrokerLost):
            service.echo.route(3)
        assert await (await Echo.as_service()).echo.route(4) == 4
        assert served.broker.hellos[-1]["client"] == 0x1A2B3C


async def test_a_client_shows_that_it_lives(tmp_path: Path) -> None:
    """F1"""
    async with serve(tmp_path) as served, connect(served.address):
        await served.until(lambda fake: fake.heartbeats >= 3)


async def test_a_pending_replica_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A3"""
    async with serve(tmp_path) as served, connect(served.address):
        served.broker.notice("pending", {"service": "gen", "replica": 1, "why": "no GPU is free"})
        served.turn()
        await (await Echo.as_service()).echo.route(1)
    assert "gen: replica 1 is pending: no GPU is free" in caplog.text


def test_a_loop_that_ends_without_shutdown_says_goodbye_and_a_closed_one_makes_no_noise(tmp_path: Path) -> None:
    """A10"""
    program = f"""
import asyncio, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "client")!r}]
from pathlib import Path
from forge_client import ForgeActor, connect, endpoint
from tests.client.fake_broker import serve

class Echo(ForgeActor):
    @endpoint
    async def echo(self, x): ...

async def forgetful(folder):
    async with serve(folder) as served:
        served.broker.silent.add("echo")
        await connect(served.address)
        service = await Echo.as_service()
        service.echo.route(1)

folder = Path({str(tmp_path)!r})
asyncio.run(forgetful(folder))
loop = asyncio.new_event_loop()  # closed without asyncio.run's goodbyes
loop.run_until_complete(forgetful(folder))
loop.close()
async def again():
    async with serve(folder) as served, connect(served.address):
        service = await Echo.as_service()
        print(await service.echo.route("done"))
asyncio.run(again())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
