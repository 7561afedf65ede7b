"""Bad input: a clear error that says what was wrong, where, and what to do; nothing lost, nothing left half started.

One test for each line of the issue's list that needs the whole system. These need less, and are proved where they are
handled: no broker at the address (tests/client/test_client.py, and for the commands tests/cli), garbage at the broker's socket
and its address in use (tests/shell/test_serve.py, tests/cli/test_broker.py), `--gpu 7` (tests/cli/test_broker.py,
tests/worker/test_supervisor.py).

The broker of these tests takes payloads of up to 1 MiB.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgpack
import psutil
import pytest
import zmq

from forge_client import (
    AutoscalingConfig,
    BadCall,
    ConfigError,
    ForgeActor,
    PayloadTooLarge,
    PoisonedRequest,
    Router,
    RouterError,
    SerializationError,
    Service,
    ServiceConfig,
    UnknownEndpoint,
    UnknownService,
    UnknownSession,
    VersionMismatch,
    connect,
    endpoint,
    get_service,
    service_endpoint,
)
from forge_client.connection import current_client
from forge_contract.framing import encode
from forge_contract.messages import ASSIGN, BROKER_NAME, DISPATCH, DROP, OK, REFUSE, RESULTS
from tests.client.fake_broker import Served, serve
from tests.public.actors import Echo, Grenade
from tests.worker.fake_broker import Child, goodbye, start
from tests.worker.fake_broker import FakeBroker as WorkersBroker

pytestmark = pytest.mark.timeout(30)

GARBAGE: list[list[bytes]] = [
    [b""],
    [b"\xc1"],
    [b"x", b"y"],
    [b"\x93\x01\x02", b""],
    [b"\xff" * 70_000, b"z" * 70_000, b""],
    [b"{" * 5000, b""],
]


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    return {"FORGE_MAX_PAYLOAD_BYTES": str(1 << 20)}


async def workers_of_the_broker() -> set[int]:
    """Pids of the processes that the embedded broker runs."""
    broker = (await current_client()).embedded
    assert broker is not None
    return {process.pid for process in psutil.Process(broker.process.pid).children(recursive=True)}


async def status() -> dict[str, Any]:
    return await (await current_client()).control("status", {})


# Options and classes: judged where they are written.


def test_an_unknown_option_fails_where_it_is_written_and_lists_the_known_ones() -> None:
    """A2"""
    with pytest.raises(ConfigError) as caught:
        Echo.options(num_replica=2, procs=1)
    assert "options()" in str(caught.value)
    assert "unknown option 'num_replica'; did you mean 'num_replicas'" in str(caught.value)
    assert "replica_max_concurrent_requests" in str(caught.value)
    with pytest.raises(ConfigError, match="unknown option 'batchsize'; did you mean 'batch_size'"):
        service_endpoint(batchsize=8)(Echo.echo)


def test_an_unknown_field_of_a_configuration_names_the_closest() -> None:
    """A3"""
    with pytest.raises(
        ConfigError, match=r"ServiceConfig: (?s:.*)'gpus_per_replicas'; did you mean 'gpus_per_replica'"
    ):
        ServiceConfig(gpus_per_replicas=1)  # type: ignore[call-arg]
    with pytest.raises(
        ConfigError, match=r"AutoscalingConfig: (?s:.*)'scale_up_cooldwn'; did you mean 'scale_up_cooldown'"
    ):
        AutoscalingConfig(scale_up_cooldwn=1.0)  # type: ignore[call-arg]


def test_all_problems_of_a_configuration_are_told_in_one_error() -> None:
    """A3: with the names of the fields."""
    with pytest.raises(ConfigError) as caught:
        ServiceConfig(procs=0, min_replicas=3, max_replicas=2, health_poll_rate=-1.0, errors="ignore", gpus=1)  # type: ignore[call-arg]
    assert len(caught.value.problems) >= 5
    for field in ("procs", "min_replicas=3", "max_replicas=2", "health_poll_rate", "errors", "unknown option 'gpus'"):
        assert field in str(caught.value)


async def test_a_class_that_is_no_forge_actor_is_told_how_to_become_one() -> None:
    class Plain:
        pass

    for wrong in (Plain, ForgeActor, 3):
        with pytest.raises(ConfigError, match="no subclass of ForgeActor; write `class "):
            Service(ServiceConfig(), wrong)  # type: ignore[arg-type]


# Calls: judged before they travel.


async def test_calls_that_cannot_be_never_reach_a_replica() -> None:
    """A5, W5: an unknown endpoint with the closest names, wrong arguments, what no pickle can hold, too much, no session."""
    service = await Echo.as_service()
    with pytest.raises(UnknownEndpoint, match=r"Echo.* has no endpoint 'ecko'; did you mean 'echo'"):
        service.ecko  # noqa: B018
    with pytest.raises(BadCall, match=r"Echo[^:]*\.echo: .*'value'"):
        await service.echo.route()
    with pytest.raises(BadCall, match="unexpected keyword argument 'valeu'"):
        await service.echo.route(1, valeu=2)
    with pytest.raises(BadCall, match="too many positional arguments"):
        await service.echo.fanout(1, 2)
    with pytest.raises(SerializationError, match=r"Echo.*echo.* a value of type .*lock cannot travel"):
        await service.echo.route({"of": [threading.Lock()]})
    with pytest.raises(
        PayloadTooLarge, match=r"the arguments of Echo.*\.echo would take .* over max_payload_bytes=1048576"
    ):
        await service.echo.route(bytes(2 << 20))
    with pytest.raises(UnknownSession, match=r"Echo.* has no session 'nobody'; it was never started, or it has ended"):
        await service.echo.route(1, sess_id="nobody")
    assert (await service.get_metrics()).replica_metrics[0].total_requests == 0
    assert await service.echo.route(1) == 1


async def test_a_result_that_cannot_travel_fails_its_call_alone() -> None:
    """W5, W8: of a type that nothing can hold, or larger than the limit."""
    service = await Echo.as_service()
    with pytest.raises(SerializationError, match=r"Echo\.lock.* a value of type .*lock cannot travel"):
        await service.lock.route()
    with pytest.raises(PayloadTooLarge, match=r"Echo\.zeros.* over max_payload_bytes=1048576; .*raise the limit"):
        await service.zeros.route(2 << 20)
    assert len(await service.zeros.route(1 << 19)) == 1 << 19
    assert (await service.state())["replicas"][0]["restarts"] == 0


# Starts that fail: the caller gets the remote traceback, and nothing is left half started.


@pytest.mark.parametrize("where", ["init", "setup"])
async def test_a_constructor_or_setup_that_raises_leaves_no_process_and_no_name(where: str) -> None:
    """A2: and the name can be used again at once."""
    before = await workers_of_the_broker()
    named = Echo.options(num_replicas=2, name="once-more")
    with pytest.raises(LookupError, match="at /nowhere") as caught:
        await named.as_service(where)
    assert 'raise LookupError("no ' in str(caught.value.__cause__)
    assert "actors.py" in str(caught.value.__cause__)
    assert await workers_of_the_broker() <= before
    assert (await status())["services"] == []
    with pytest.raises(UnknownService, match="no service 'once-more'"):
        await get_service("once-more")
    service = await named.as_service()
    assert await service.echo.route(1) == 1


async def test_a_module_that_workers_cannot_import_is_told_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A2: here it can be imported, there it misses a library."""
    (tmp_path / "half_installed.py").write_text(
        "import os\n"
        "from forge_client import ForgeActor, endpoint\n"
        "if 'FORGE_BROKER' in os.environ:  # in a worker\n"
        "    import library_of_this_machine_only\n"
        "class Half(ForgeActor):\n"
        "    @endpoint\n"
        "    async def f(self): return 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module: ModuleType = __import__("half_installed")
    before = await workers_of_the_broker()
    with pytest.raises(ImportError, match="library_of_this_machine_only") as caught:
        await module.Half.options(name="half").as_service()
    assert "half_installed.py" in str(caught.value.__cause__)
    assert await workers_of_the_broker() <= before
    assert (await status())["services"] == []
    assert await (await Echo.options(name="half").as_service()).echo.route(1) == 1


# Routers.


class Raising(Router):
    def get_replica(self, healthy_replicas: Any, sess_id: Any = None, session_map: Any = None) -> Any:
        raise ZeroDivisionError("no weights to divide by")


class Nonsense(Router):
    def get_replica(self, healthy_replicas: Any, sess_id: Any = None, session_map: Any = None) -> Any:
        return "the first one"


class Misrouted(ForgeActor):
    @service_endpoint(router=Raising())
    async def raising(self) -> int:
        return 1

    @service_endpoint(router=Nonsense())
    async def nonsense(self) -> int:
        return 2

    @endpoint
    async def fine(self) -> int:
        return 3


async def test_a_router_that_raises_or_returns_nonsense_fails_its_own_calls_by_name() -> None:
    """R3: nothing else."""
    service = await Misrouted.as_service()
    with pytest.raises(RouterError, match=r"router Raising.* of Misrouted.*\.raising .*ZeroDivisionError.*no weights"):
        await service.raising.route()
    with pytest.raises(RouterError, match=r"router Nonsense.* of Misrouted.*\.nonsense .*the first one"):
        await service.nonsense.route()
    assert await service.fine.route() == 3
    for wrong in (3, "round-robin", object()):
        with pytest.raises(ConfigError, match="router"):
            service_endpoint(router=wrong)(Misrouted.fine)


# Peers that speak nonsense, or another version.


class Foreign:
    """A ROUTER that answers each hello with the same frames, until closed; in a thread of its own."""

    def __init__(self, directory: Path, answer: Callable[[bytes], list[bytes]]) -> None:
        self.address = f"ipc://{directory}/foreign.sock"
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.bind(self.address)
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        if self._socket.poll(20_000):
            route, head, *_ = self._socket.recv_multipart()
            self._socket.send_multipart([route, *self._answer(head)])

    def close(self) -> None:
        self._thread.join(20)
        self._socket.close(linger=1000)


def refusal_in_our_version(head: bytes) -> list[bytes]:
    return encode(BROKER_NAME, 0, 1, 0, 0, [[REFUSE, "VersionMismatch", {"ours": 99, "theirs": 1}]])


def welcome_of_another_version(head: bytes) -> list[bytes]:
    return [msgpack.packb([99, "no field of ours"]), b""]


@pytest.mark.parametrize("answer", [refusal_in_our_version, welcome_of_another_version])
async def test_a_broker_of_another_version_is_told_apart_from_none(
    tmp_path: Path, answer: Callable[[bytes], list[bytes]]
) -> None:
    """W7: at once, and with the remedy."""
    foreign = Foreign(tmp_path, answer)
    try:
        with pytest.raises(VersionMismatch, match=r"99.*install the same forge-broker on both"):
            await connect(foreign.address)
    finally:
        foreign.close()


def test_a_worker_of_another_version_leaves_with_a_line_that_says_so(tmp_path: Path) -> None:
    """W7"""
    foreign = Foreign(tmp_path, welcome_of_another_version)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "forge_worker", "--child", "--broker", foreign.address, "--gpu", "none"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    finally:
        foreign.close()
    assert done.returncode == 69, done.stderr
    assert "install the same forge-broker on both" in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_client_that_is_sent_garbage_drops_it_counts_it_and_goes_on(tmp_path: Path) -> None:
    """W8: what is no envelope, and envelopes whose messages make no sense."""
    async with serve(tmp_path) as served, connect(served.address) as client:
        service = await Echo.as_service()
        assert await service.echo.route(1) == 1
        before = client.link.refused_envelopes
        throw(served, client.link.name, GARBAGE)
        nonsense: list[list[Any]] = [[RESULTS], [RESULTS, True, "x", 3, None], [200, 1], [ASSIGN, {}, 0]]
        for message in nonsense:
            served.broker.out[client.link.name].body.append(message)
            served.turn()
        assert await service.echo.route(2) == 2
        assert client.link.refused_envelopes - before == len(GARBAGE) + len(nonsense)


def throw(served: Served, name: str, envelopes: list[list[bytes]]) -> None:
    for frames in envelopes:
        served._socket.send_multipart([served._routes[name], *frames])


def test_a_worker_that_is_sent_garbage_drops_it_and_goes_on(tmp_path: Path) -> None:
    """W8: also what can be read as an envelope and says nothing that a worker knows. (What is counted: test_link.)"""
    with WorkersBroker(f"ipc://{tmp_path}/broker.sock") as broker, Child(broker, stderr=subprocess.PIPE) as process:
        start(broker, "Echo", "echo")
        for frames in GARBAGE:
            broker._socket.send_multipart([broker._identity, *frames])
        for message in (
            [DROP],
            [DISPATCH, 1, 0, True, [5], 1, [0], []],
            [DISPATCH, 1, 9, True, [5], 1, [0], {}],
            [200, 1],
        ):
            broker.send(message)
        broker.call(0, (1, ("still here",)))
        assert broker.replies(1) == {1: (OK, "still here")}
        broker.stop()
        goodbye(broker, process)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


# Clients that vanish.


async def test_a_client_killed_in_mid_call_leaves_a_shared_service_healthy_and_its_room_comes_back() -> None:
    """A10, and known mistake 1: what it called is cancelled, what it had queued is dropped."""
    client = await current_client()
    service = await Echo.options(name="shared", detached=True, replica_max_concurrent_requests=1).as_service()
    program = (
        "import asyncio, forge_client\n"
        "async def main():\n"
        "    shared = await forge_client.get_service('shared')\n"
        "    await asyncio.gather(*(shared.rest.route() for _ in range(3)))\n"
        "asyncio.run(main())\n"
    )
    vanishing = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, env=os.environ | {"FORGE_BROKER": client.address}
    )
    try:
        await until(
            service, lambda state: state["replicas"][0]["active_requests"] == 1 and state["queues"]["shared.rest"] == 2
        )
    finally:
        vanishing.send_signal(signal.SIGKILL)
        await vanishing.wait()
    assert await asyncio.wait_for(service.echo.route("room again"), 10) == "room again"
    (replica,) = (await service.state())["replicas"]
    assert (replica["state"], replica["restarts"], replica["active_requests"]) == ("HEALTHY", 0, 0)
    assert (await service.state())["queues"]["shared.rest"] == 0
    await service.shutdown()


async def until(service: Service, holds: Callable[[dict[str, Any]], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds(await service.state()):
            continue


@pytest.mark.parametrize("how", ["segfault", "exit"])
async def test_a_call_that_ends_its_process_is_poison_and_costs_the_others_nothing(how: str) -> None:
    """F4: in earnest. What ran beside it runs again, and once more it is tried alone."""
    service = await Grenade.options(num_replicas=2, restart_backoff_s=0.05, restart_backoff_at_most_s=0.1).as_service()
    poison = service.go_off.route(how)
    others = [service.fine.route(value) for value in range(40)]
    assert await asyncio.gather(*others) == list(range(40))
    with pytest.raises(PoisonedRequest, match="3 replicas"):
        await poison
    assert await service.fine.route(41) == 41


async def test_a_call_that_runs_out_of_memory_is_told_so() -> None:
    """F4, A5: an exception like any other, as long as there is memory left to say it."""
    service = await Grenade.options(num_replicas=1).as_service()
    with pytest.raises(MemoryError):
        await service.go_off.route("memory")
