"""The same program on every kind of broker, what a broker without trust refuses, and a broker under much idle weight."""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest

from forge_client import (
    ForgeActor,
    Router,
    SerializationError,
    TrustRequired,
    connect,
    endpoint,
    service_endpoint,
)
from forge_client.connection import current_client
from forge_contract.errors import from_wire
from forge_contract.framing import Outbox
from forge_contract.messages import ANSWER, CALLS, CONTROL, FAILED, RESULTS
from forge_contract.payload import encode_call
from tests.public.actors import Echo
from tests.shell.running import BrokerProcess, RawPeer

pytestmark = pytest.mark.timeout(30)

ROOT = Path(__file__).parents[2]


async def program() -> int | None:
    """Knows nothing of where it runs. The pid of the broker that served it."""
    service = await Echo.as_service()
    assert await service.echo.route("x") == "x"
    ppid: int | None = psutil.Process(await service.pid.route()).ppid()
    await service.shutdown()
    return ppid


async def test_the_same_program_runs_on_an_embedded_a_named_and_the_users_own_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A1: `connect()` and FORGE_BROKER. (`connect(address)`: below.)"""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(ROOT)  # the broker is not ours: its workers find actors on their own path
    with BrokerProcess(bind=[f"ipc://{tmp_path}/forge/broker.sock", "tcp://127.0.0.1:*"]) as broker:
        tcp = broker.said["addresses"][1]
        embedded = await program()
        assert embedded != broker.process.pid
        async with connect():
            assert await program() == broker.process.pid
        assert (await current_client()).embedded is not None  # behind the block it is as before it
        monkeypatch.setenv("FORGE_BROKER", tcp)
        assert await asyncio.to_thread(asyncio.run, program()) == broker.process.pid


class Marking:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


async def test_a_client_without_trust_sends_neither_code_nor_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W6: it is told so before anything travels; what goes by reference and as plain values works."""
    monkeypatch.chdir(ROOT)

    class Local(ForgeActor):
        @endpoint
        async def f(self) -> int:
            return 1

    class Mine(Router):
        def get_replica(self, healthy_replicas: Any, sess_id: Any = None, session_map: Any = None) -> Any:
            return healthy_replicas[0]

    class Routed(Echo):
        @service_endpoint(router=Mine())
        async def g(self) -> int:
            return 1

    with BrokerProcess(bind=["tcp://127.0.0.1:*"], log_dir=str(tmp_path / "logs")) as broker:
        async with connect(broker.address) as client:
            assert not client.trusted
            with pytest.raises(TrustRequired, match=r"Local.* needs trust.*private ipc address"):
                await Local.as_service()
            with pytest.raises(TrustRequired):
                await Routed.as_service()
            service = await Echo.as_service()
            with pytest.raises(SerializationError, match=r"Echo.*\.echo.*Marking"):
                await service.echo.route(Marking(tmp_path / "sent"))
            assert await service.echo.route({"plain": [1, 2.0, "x"]}) == {"plain": [1, 2.0, "x"]}
            # And one who does not ask our library: the stamp is the broker's, and the worker obeys it.
            with RawPeer(broker.address) as forger:
                await asyncio.to_thread(forge_a_pickle, forger, service, tmp_path / "forged")
    assert not (tmp_path / "sent").exists()
    assert not (tmp_path / "forged").exists()


def forge_a_pickle(forger: RawPeer, service: Any, path: Path) -> None:
    incarnation = forger.greet()["incarnation"]
    forger.send(1, [[CONTROL, 1, "find", {"name": service.name}, 0]], incarnation=incarnation)
    answer = forger.receive().body[0]
    assert answer[:3] == [ANSWER, 1, True]
    outbox = Outbox()
    size = outbox.attach(encode_call((Marking(path),), {}, trusted=True, where="forged"))
    outbox.body.append([CALLS, answer[3]["endpoints"]["echo"], [1], [size], {}])
    forger.socket.send_multipart(outbox.seal(forger.name, 1, incarnation, 2, 0))
    while True:
        envelope = forger.receive()
        if envelope.body and envelope.body[0][0] == RESULTS:
            break
    _, trusted, seqs, statuses, sizes = envelope.body[0]
    assert (trusted, seqs) == (False, [1])
    assert statuses in (FAILED, [FAILED])
    error = from_wire(msgpack.unpackb(bytes(envelope.payloads.take(sizes[0]))))
    assert isinstance(error, (TrustRequired, SerializationError))


async def test_a_custom_router_works_in_a_broker_that_never_imports_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R4: each process that imports the module leaves its pid; torch would be as heavy."""
    (tmp_path / "routed_app.py").write_text(
        "import os, pathlib\n"
        "from forge_client import ForgeActor, Router, service_endpoint\n"
        "pathlib.Path(__file__).with_name(f'{os.getpid()}.imported').touch()\n"
        "LAST = -1\n"
        "class Last(Router):\n"
        "    def get_replica(self, healthy_replicas, sess_id=None, session_map=None):\n"
        "        return healthy_replicas[LAST]\n"
        "class App(ForgeActor):\n"
        "    @service_endpoint(router=Last)\n"
        "    async def pid(self):\n"
        "        return os.getpid()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    service = await __import__("routed_app").App.options(num_replicas=2).as_service()
    first, last = await service.pid.fanout()
    assert {await service.pid.route() for _ in range(4)} == {last}
    embedded = (await current_client()).embedded
    assert embedded is not None
    imported = {int(file.partition(".")[0]) for file in os.listdir(tmp_path) if file.endswith(".imported")}
    assert imported >= {os.getpid(), first, last}
    assert embedded.process.pid not in imported


class Slow(Router):
    def get_replica(self, healthy_replicas: Any, sess_id: Any = None, session_map: Any = None) -> Any:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            continue
        return healthy_replicas[0]


class SlowlyRouted(ForgeActor):
    @service_endpoint(router=Slow())
    async def slow(self) -> int:
        return 1


async def test_how_long_a_router_held_up_the_broker_is_shown() -> None:
    """R4: one that hangs cannot be contained; one that is slow is seen by its effect."""
    service = await SlowlyRouted.as_service()
    client = await current_client()
    assert (await client.control("status", {}))["loop_lag_s"] < 0.5
    assert await service.slow.route() == 1
    assert (await client.control("status", {}))["loop_lag_s"] >= 0.5


async def test_a_broker_with_a_thousand_sessions_and_ten_thousand_queued_calls_answers_at_once() -> None:
    """C2, R1: status walks over services and workers, never over calls or sessions."""
    service = await Echo.options(replica_max_concurrent_requests=1).as_service()
    await asyncio.gather(*(service.start_session() for _ in range(1000)))
    held = service.rest.route()
    queued = [service.echo.route(n) for n in range(10_000)]
    client = await current_client()
    async with asyncio.timeout(15):
        while sum((await service.state())["queues"].values()) < 10_000:
            continue
    began = time.monotonic()
    status = await client.control("status", {})
    took_s = time.monotonic() - began
    (mine,) = status["services"]
    assert mine["sessions"] == 1000
    assert sum(mine["queues"].values()) == 10_000
    assert took_s < 0.5
    for call in (held, *queued):
        call.cancel()
    assert await service.echo.route("room") == "room"


def test_pickles_of_the_test_above_would_be_noticed(tmp_path: Path) -> None:
    """W6: the check above, checked."""
    pickle.loads(pickle.dumps(Marking(tmp_path / "unpickled")))
    assert (tmp_path / "unpickled").is_dir()
