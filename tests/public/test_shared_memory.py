"""Large arrays between processes of one machine, through the public door (PROTOCOL.md §9.1, W1, W5, F2)."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge_client import ForgeActor, connect, endpoint, service_endpoint, shutdown
from forge_client.connection import current_client
from forge_contract.errors import SegmentLost
from tests.shell.running import BrokerProcess, private_address

np = pytest.importorskip("numpy")

pytestmark = pytest.mark.timeout(40)

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
SHM = Path("/dev/shm")


def is_first(marker: str) -> bool:
    """Whether nobody has asked this with the same marker before."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def under(prefix: str) -> list[str]:
    return sorted(path.name for path in SHM.glob(f"{prefix}*"))


class Arrays(ForgeActor):
    @endpoint
    async def pid(self) -> int:
        return os.getpid()

    @endpoint
    async def echo(self, value: Any) -> Any:
        return value

    @endpoint
    async def spoil_and_die_once(self, array: Any, marker: str) -> float:
        """Writes into its argument and dies; the next attempt tells what it was given."""
        found = float(array.sum())
        array += 1
        if is_first(marker):
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    @endpoint
    def made(self, count: int) -> Any:
        return np.arange(count, dtype=np.float32)

    @endpoint
    async def slowly(self, array: Any) -> float:
        await asyncio.Event().wait()  # nobody sets it
        return float(array.sum())

    @service_endpoint(batch_size=4, batch_timeout=5.0, batch_mode="call", collate="stack")
    async def doubled(self, arrays: Any) -> Any:
        assert arrays.shape[0] == 4
        return 2 * arrays

    @service_endpoint(batch_size=4, batch_timeout=5.0)
    def one_by_one(self, array: Any) -> Any:
        return array + 1

    @service_endpoint(replay_last=True)
    async def weights(self, array: Any) -> int:
        self.total = int(array.sum())
        return self.total

    @endpoint
    async def told(self) -> int:
        return self.total


async def files(owner: str = "") -> list[str]:
    """Segments of our broker, or of one peer of it."""
    terms = (await current_client()).link.segments
    assert terms is not None
    return under(f"{terms.prefix}-{owner}")


async def until(done: Any, what: str) -> None:
    deadline = time.monotonic() + 10.0
    while not await done():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


async def broker_bytes() -> int:
    """What the broker has received so far, if through sockets of its own: its peak memory stands for it."""
    broker = (await current_client()).embedded
    assert broker is not None
    return int(psutil.Process(broker.process.pid).memory_info().rss)


@pytest.mark.parametrize("shape", [(MIB,), (1024, 3, 200)])
async def test_an_array_comes_back_as_it_was_and_did_not_pass_through_the_broker(shape: tuple[int, ...]) -> None:
    """W1, W5."""
    service = await Arrays.as_service()
    array = np.random.default_rng(1).random(shape).astype("f4")
    before = await broker_bytes()
    for _ in range(10):
        back = await service.echo.route(array)
        assert back.dtype == array.dtype
        assert np.array_equal(back, array)
    assert back.flags.writeable
    assert await broker_bytes() - before < array.nbytes
    assert len(await files("c-")) >= 1
    assert len(await files("w-")) >= 1


async def test_tensors_of_every_dtype_go_this_way() -> None:
    torch = pytest.importorskip("torch")
    service = await Arrays.as_service()
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        tensor = torch.arange(MIB).to(dtype)
        back = await service.echo.route({"x": tensor, "y": [tensor[:7], tensor[7:]]})
        assert torch.equal(back["x"], tensor)
        assert torch.equal(torch.cat(back["y"]), tensor)
        back["x"][0] = 1  # it is ours
    assert await files("c-")


async def test_fortran_order_structured_and_strided_arrays_and_bytes_go_this_way() -> None:
    service = await Arrays.as_service()
    many = np.arange(MIB, dtype="i8").reshape(1024, 1024)
    record = np.zeros(MIB, dtype=[("a", "i4"), ("b", "f8")])
    for value in (many.T, many[::2, ::3], record):
        back = await service.echo.route(value)
        assert np.array_equal(back, value)
    blob = os.urandom(MIB)
    assert await service.echo.route(blob) == blob


async def test_a_view_that_is_kept_survives_later_calls() -> None:
    service = await Arrays.as_service()
    first = await service.made.route(MIB)
    tail = (await service.made.route(MIB))[-3:]
    for value in range(8):
        await service.echo.route(np.full(MIB, value, "f4"))
    assert np.array_equal(first, np.arange(MIB))
    assert list(tail) == [MIB - 3, MIB - 2, MIB - 1]


async def test_segments_are_used_again_when_results_are_collected() -> None:
    service = await Arrays.as_service()
    for _ in range(20):
        result = await service.made.route(MIB)
        result = await service.echo.route(result)
    assert len(await files("w-")) <= 4
    assert len(await files("c-")) <= 2


async def test_a_result_is_the_callers_to_write_to() -> None:
    """Nobody else sees it, and it does not come back in a later result."""
    service = await Arrays.as_service()
    for _ in range(4):
        result = await service.made.route(MIB)
        assert result[5] == 5
        result[:] = -1
        assert result.sum() == -MIB


async def test_concurrent_calls_of_many_sizes_get_what_is_theirs() -> None:
    service = await Arrays.options(num_replicas=2).as_service()
    sizes = [100_000 + 37_000 * at for at in range(24)]
    backs = await asyncio.gather(*(service.echo.route(np.full(size, size, "i4")) for size in sizes))
    for size, back in zip(sizes, backs, strict=True):
        assert back.shape == (size,)
        assert (back == size).all()


async def test_a_fan_out_reads_one_segment_everywhere() -> None:
    service = await Arrays.options(num_replicas=3).as_service()
    array = np.arange(MIB, dtype="f4")
    for back in await service.echo.fanout(array):
        assert np.array_equal(back, array)


async def test_arrays_of_a_batch_keep_their_places() -> None:
    """B2. Also among small calls, which pass the broker as slices; a plain endpoint shares its results from its threads."""
    service = await Arrays.options(num_replicas=1).as_service()
    for _ in range(2):
        arrays = [np.full(MIB >> 2, at, "f4") for at in range(8)]
        backs, small, ones = await asyncio.gather(
            asyncio.gather(*(service.doubled.route(array) for array in arrays)),
            asyncio.gather(*(service.echo.route(at) for at in range(100))),
            asyncio.gather(*(service.one_by_one.route(array) for array in arrays)),
        )
        assert small == list(range(100))
        for at, (back, one) in enumerate(zip(backs, ones, strict=True)):
            assert (back == 2 * at).all()
            assert (one == at + 1).all()
        del back, one
    assert await files("w-")


async def test_calls_that_are_given_up_do_not_keep_their_segments() -> None:
    """A5: cancelled before and after they began, and timed out. What they had serves later calls."""
    service = await Arrays.options(num_replicas=1, replica_max_concurrent_requests=4).as_service()
    array = np.ones(MIB, "f4")
    for _ in range(4):
        calls = [service.slowly.route(array) for _ in range(6)]
        timed = service.slowly.options(timeout=0.2).route(array)
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await timed
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert (await service.echo.route(array) == 1).all()
    assert len(await files("c-")) <= 10  # of 32 calls; 7 at a time, and what was answered last


async def test_a_full_place_is_only_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are used, and counted. The worker, whose place is not full, answers through shared memory."""
    service = await Arrays.as_service()
    array = np.arange(MIB, dtype="f4")

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert np.array_equal(await service.echo.route(array), array)
    assert not await files("c-")
    assert await files("w-")
    client = await current_client()

    async def told() -> bool:
        return bool((await client.control("status", {}))["shared_memory"]["refused"] == 1)

    await until(told, "no heartbeat told of what was refused")


async def test_a_retry_reads_unspoilt_input(tmp_path: Path) -> None:
    """F2, F3: the first attempt wrote into its argument and died."""
    service = await Arrays.as_service()
    array = np.ones(MIB, "f4")
    found = await service.spoil_and_die_once.route(array, str(tmp_path / "died"))
    assert (tmp_path / "died").exists()
    assert found == MIB


async def test_what_the_caller_changes_after_the_call_does_not_travel() -> None:
    service = await Arrays.as_service()
    array = np.ones(MIB, "f4")
    call = service.echo.route(array)
    array[:] = 7
    assert (await call == 1).all()


async def test_the_files_of_a_killed_worker_go_and_what_was_read_of_them_stays() -> None:
    service = await Arrays.as_service()
    kept = await service.made.route(MIB)
    pid = await service.pid.route()
    left = await files("w-")
    assert left
    os.kill(pid, signal.SIGKILL)

    async def gone() -> bool:
        return not set(left) & set(await files("w-"))

    await until(gone, "the dead worker's files are still there")
    assert np.array_equal(kept, np.arange(MIB))
    assert (await service.made.route(MIB)).sum() == kept.sum()


CALLER = """
import asyncio, sys
import numpy as np
from forge_client import get_service

async def main():
    service = await get_service(sys.argv[1])
    call = service.slowly.route(np.ones(1 << 20, "f4"))
    await asyncio.sleep(0)
    from forge_client.connection import current_client
    print((await current_client()).link.name, flush=True)
    await call

asyncio.run(main())
"""


async def test_the_files_of_a_killed_client_go() -> None:
    """Also of one whose call still runs."""
    service = await Arrays.options(name="arrays").as_service()
    client = await current_client()
    environ = {**os.environ, "FORGE_BROKER": client.address}
    other = subprocess.Popen(  # noqa: ASYNC220 - of a start there is nothing to wait for
        [sys.executable, "-c", CALLER, "arrays"], stdout=subprocess.PIPE, env=environ, cwd=ROOT
    )
    assert other.stdout is not None
    with other.stdout:
        name = (await asyncio.to_thread(other.stdout.readline)).decode().strip()

        async def there() -> bool:
            return bool(await files(name))

        async def gone() -> bool:
            return not await files(name)

        await until(there, "its arguments never came into shared memory")
        other.kill()
        await asyncio.to_thread(other.wait, 10)
        await until(gone, "the dead client's files are still there")
    assert (await service.echo.route(np.ones(MIB, "f4")) == 1).all()


async def test_a_segment_that_vanished_fails_its_call_and_nothing_else() -> None:
    """Somebody cleared /dev/shm between the call and its reading."""
    service = await Arrays.options(num_replicas=1, replica_max_concurrent_requests=1).as_service()
    running = service.slowly.options(timeout=1.0).route(1)
    waiting = service.echo.route(np.ones(MIB, "f4"))

    async def there() -> bool:
        return bool(await files("c-"))

    await until(there, "no segment")
    for name in await files("c-"):
        (SHM / name).unlink()
    with pytest.raises(TimeoutError):
        await running
    with pytest.raises(SegmentLost, match="/dev/shm"):
        await waiting
    assert (await service.echo.route(np.full(MIB, 2, "f4")) == 2).all()


async def test_a_result_whose_segment_vanished_fails_its_call_and_nothing_else() -> None:
    """Cleared between the answer and its reading, which this loop is kept from meanwhile."""
    service = await Arrays.as_service()
    terms = (await current_client()).link.segments
    assert terms is not None
    call = service.made.route(MIB)
    await asyncio.sleep(0)  # the end of the turn, in which it is sent
    deadline = time.monotonic() + 10.0
    while not (answers := under(f"{terms.prefix}-w-")):
        assert time.monotonic() < deadline, "no segment"
    for name in answers:
        (SHM / name).unlink()
    with pytest.raises(SegmentLost, match="/dev/shm"):
        await call
    assert (await service.made.route(MIB)).sum() > 0


async def test_weights_that_are_replayed_do_not_depend_on_a_segment() -> None:
    """A11: they are needed long after their call, by replicas that start later."""
    service = await Arrays.as_service()
    assert await service.weights.fanout(np.ones(MIB, "f4")) == [MIB]
    for _ in range(3):
        await service.echo.route(np.zeros(MIB, "f4"))
    os.kill(await service.pid.route(), signal.SIGKILL)
    assert await service.told.route() == MIB


async def test_constructor_arguments_survive_their_segmentless_way_to_a_later_replica() -> None:
    class Holding(ForgeActor):
        def __init__(self, array: Any) -> None:
            self.array = array

        @endpoint
        async def total(self) -> tuple[int, int]:
            return int(self.array.sum()), os.getpid()

    service = await Holding.as_service(np.ones(MIB, "f4"))
    total, pid = await service.total.route()
    os.kill(pid, signal.SIGKILL)
    assert (await service.total.route())[0] == total == MIB


async def test_status_says_how_much_is_shared() -> None:
    service = await Arrays.as_service()
    await service.echo.route(np.ones(MIB, "f4"))
    client = await current_client()

    async def told() -> bool:
        shared = (await client.control("status", {}))["shared_memory"]
        assert shared["on"] is True
        return bool(shared["bytes"] >= 8 * MIB)

    await until(told, "no heartbeat told of the segments")


async def test_a_client_without_trust_and_its_broker_use_frames(tmp_path: Path) -> None:
    """W6; and nothing is left when the broker ends."""
    with BrokerProcess(bind=[private_address(tmp_path), "tcp://127.0.0.1:*"]) as broker:
        trusted, tcp = broker.said["addresses"]
        async with connect(trusted):
            service = await Arrays.options(name="arrays").as_service()
            array = np.arange(MIB, dtype="f4")
            assert np.array_equal(await service.echo.route(array), array)
            prefix = (await current_client()).link.segments.prefix  # type: ignore[union-attr]
            program = (
                "import asyncio, numpy as np\n"
                "from forge_client import get_service\n"
                "from forge_client.connection import current_client\n"
                "async def main():\n"
                "    service = await get_service('arrays')\n"
                "    array = np.arange(1 << 20, dtype='f4')\n"
                "    assert np.array_equal(await service.echo.route(array), array)\n"
                "    assert (await current_client()).link.segments is None\n"
                "asyncio.run(main())\n"
            )
            environ = {**os.environ, "FORGE_BROKER": tcp}
            done = await asyncio.to_thread(
                subprocess.run, [sys.executable, "-c", program], env=environ, cwd=ROOT, timeout=30, check=False
            )
            assert done.returncode == 0
            assert under(prefix)
            await shutdown()
        broker.close()
    assert under(prefix) == []


async def test_a_broker_that_is_killed_leaves_the_calls_their_arguments_and_results(tmp_path: Path) -> None:
    """F10: what was sent to the first broker is read by whom the second one sends it to."""
    service = await Arrays.as_service()
    array = np.arange(MIB, dtype="f4")
    assert np.array_equal(await service.echo.route(array), array)
    broker = (await current_client()).embedded
    assert broker is not None
    calls = [service.echo.route(array + at) for at in range(4)]
    await asyncio.sleep(0)
    os.kill(broker.process.pid, signal.SIGKILL)
    for at, back in enumerate(await asyncio.gather(*calls)):
        assert np.array_equal(back, array + at)
    assert np.array_equal(await service.echo.route(array), array)
