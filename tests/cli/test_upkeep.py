"""drain, restart, broker stop: what they ask for, and how they know that it is done."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_cli.broker import _until_gone
from forge_cli.conversation import process_behind, somebody_listens
from forge_cli.exits import Misused
from forge_cli.upkeep import find_worker
from forge_contract.errors import UnknownService
from tests.cli.fake import Told, told

WORKERS = ["w-6f0e2d1c8b7a4953", "w-6fff000000000000", "w-0123456789abcdef"]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Told]:
    with told(tmp_path) as broker:
        broker.controls["workers"] = lambda fields: {"workers": [{"name": name} for name in WORKERS]}
        yield broker


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("w-0", WORKERS[2]), (WORKERS[0], WORKERS[0]), ("w-6f0", WORKERS[0])],
)
def test_the_beginning_of_a_workers_name_is_enough(typed: str, meant: str) -> None:
    assert find_worker(typed, WORKERS) == meant


def test_a_whole_name_is_meant_though_another_begins_so() -> None:
    assert find_worker("w-1", ["w-12", "w-1"]) == "w-1"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("w-6f", f"may be any of 2 workers: {WORKERS[0]}, {WORKERS[1]}; type more"),
        ("w-0123456789abcdff", "did you mean 'w-0123456789abcdef'"),
        ("gen", "a replica is written gen/0"),
    ],
)
def test_a_beginning_of_none_or_of_several_is_refused_with_what_to_type(typed: str, said: str) -> None:
    with pytest.raises(Misused, match=said):
        find_worker(typed, WORKERS)


def test_drain_asks_for_the_whole_name_and_says_that_the_worker_is_gone(broker: Told) -> None:
    """F9"""
    done = broker.forge("drain", "w-0")
    assert (done.exit_code, done.output) == (0, f"{WORKERS[2]} is drained and gone\n")
    assert broker.asked("drain") == [{"target": WORKERS[2]}]


def test_drain_takes_a_replica_as_it_is_written(broker: Told) -> None:
    """F9, X2"""
    done = broker.forge("drain", "gen/1")
    assert (done.exit_code, done.output) == (0, "gen/1 is drained and taken out of gen\n")
    assert broker.asked("drain") == [{"target": "gen/1"}]
    assert not broker.asked("workers")


def test_drain_of_what_is_not_there_exits_2_and_drains_nothing(broker: Told) -> None:
    assert broker.forge("drain", "w-6f").exit_code == 2
    assert not broker.asked("drain")


@pytest.mark.parametrize(
    ("replaced", "said"),
    [([0, 1], "gen: replicas 0, 1 were replaced\n"), ([3], "gen: replica 3 was replaced\n")],
)
def test_restart_says_which_replicas_were_replaced(broker: Told, replaced: list[int], said: str) -> None:
    broker.controls["restart"] = lambda fields: {"restarted": replaced}
    done = broker.forge("restart", "gen")
    assert (done.exit_code, done.output) == (0, said)
    assert broker.asked("restart") == [{"service": "gen"}]


def test_restart_of_an_unknown_service_fails_with_the_known_ones(broker: Told) -> None:
    def refuse(fields: dict[str, object]) -> dict[str, object]:
        raise UnknownService(name=fields["service"], known=["gen"])

    broker.controls["restart"] = refuse
    done = broker.forge("restart", "gn")
    assert (done.exit_code, done.output) == (1, "Error: UnknownService: no service 'gn'; did you mean 'gen'?\n")


def test_a_broker_that_drains_longer_than_one_waits_is_left_to_it_with_what_to_do(broker: Told) -> None:
    """F9. The fake's process, which is ours, does not end."""
    done = broker.forge("broker", "stop", "--timeout", "0.2")
    assert done.exit_code == 1
    assert "still draining after 0.2 s, and goes on" in done.output
    assert f"(pid {os.getpid()})" in done.output
    assert broker.asked("terminate") == [{}]


def test_a_broker_that_refuses_to_end_is_not_waited_for(broker: Told) -> None:
    def refuse(fields: dict[str, object]) -> dict[str, object]:
        raise UnknownService(name="x", known=[])

    broker.controls["terminate"] = refuse
    assert broker.forge("broker", "stop", "--timeout", "30").exit_code == 1


def test_the_process_behind_an_ipc_address_is_known_and_of_others_it_is_not(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    assert process_behind(f"ipc://{path}") is None
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        assert process_behind(f"ipc://{path}") == os.getpid()
        assert somebody_listens(f"ipc://{path}")
    assert process_behind(f"ipc://{path}") is None
    assert not somebody_listens(f"ipc://{path}")
    assert process_behind("tcp://127.0.0.1:1") is None


def test_a_broker_is_gone_when_its_process_is() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:

        async def wait() -> None:
            waiting = asyncio.ensure_future(_until_gone("ipc:///nowhere", process.pid))
            await asyncio.sleep(0)
            assert not waiting.done()
            process.kill()
            await asyncio.wait_for(waiting, 10)

        asyncio.run(wait())
    asyncio.run(asyncio.wait_for(_until_gone("ipc:///nowhere", process.pid), 10))


def test_a_broker_out_of_the_kernels_sight_is_gone_when_its_port_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        assert somebody_listens(address)

        async def wait() -> None:
            waiting = asyncio.ensure_future(_until_gone(address, None))
            listening.accept()[0].close()  # it looked, and somebody was there
            assert not waiting.done()
            listening.close()
            await asyncio.wait_for(waiting, 10)

        asyncio.run(wait())
    assert somebody_listens("tcp://no.such.host.invalid:1")
