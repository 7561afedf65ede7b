"""Breaks everything while work goes on, then compares what callers saw with what workers did.

    python bench/chaos.py                               # 60 s: a worker killed every second
    python bench/chaos.py --stop-every 3 --drain-every 4 --broker-every 10 --link-every 2 --hand-started 2
    python bench/chaos.py --seconds 20 --json chaos.json --keep

64 callers keep calls outstanding, half of them in sessions whose state is a count. A quarter of them runs in a process of its own
and comes by TCP through `fault_proxy`, like the workers of `--hand-started`; the rest use the ipc address. What is broken, and how
often in seconds:

    --kill-every    SIGKILL to a worker
    --stop-every    SIGSTOP to a worker: half of them wake again after a moment, the others the broker has to notice
    --drain-every   CONTROL drain of a worker or a replica's worker
    --broker-every  SIGKILL to the broker, which is started again at the same addresses
    --link-every    a fault of the proxy: reset, half-open, black hole in one direction, delay

`chaos_history` says what is compared. Exit code 1 when anything was lost, answered twice, stale, out of order, run twice at most once,
failed without reason, or left running or in /dev/shm. Chance is seeded; what the processes make of it is not the same twice.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any, Final

if not __package__:  # run as a plain script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.chaos_actor import Counter
from bench.chaos_callers import Callers
from bench.chaos_history import History, Verdict, check, read
from bench.chaos_processes import (
    END_S,
    ROOT,
    Broker,
    end_all,
    environment,
    files_of,
    hand_started,
    send,
    stopped,
    workers,
)
from bench.fault_proxy import FaultProxy
from forge_client import ForgeError, connect
from forge_client.client import Client

NAME: Final = "chaos"
CONNECT_S: Final = 20.0
START_S: Final = 60.0  # for the first replicas, on a machine that is busy
PAUSES_S: Final = (0.1, 1.0)  # how long a worker sleeps that is woken again: below every limit
STOPPED_IS_DEAD_S: Final = 2.0  # heartbeat_s × liveness of the broker below
ORPHAN_GRACE_S: Final = 30.0  # two half-open connections, one after the other, are a silence of 10 s
CONNECT_AGAIN_S: Final = 2.0  # a worker, to a broker that was started again
NOTICED_WITHIN_S: Final = 10.0  # that, and room to spare on a machine that is busy
HEARTBEAT_S: Final = 0.25

EVERYTHING: Final = {"kill": 1.0, "stop": 3.0, "drain": 4.0, "broker": 10.0, "link": 2.0}

MAY_FAIL: Final = {"broker": frozenset({"SessionLost"})}
"""What a kind of fault explains: a state goes when its worker dies together with the broker that kept the checkpoint (F10)."""


class Faults:
    """One task for each kind. Every fault is written into a history of its own, with what came of it."""

    def __init__(self, options: argparse.Namespace, broker: Broker, proxy: FaultProxy, client: Client) -> None:
        self._random = random.Random(options.seed)
        self._broker = broker
        self._proxy = proxy
        self._client = client
        self.history = History(options.directory, "faults")
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "kill": self._kill,
            "stop": self._stop,
            "drain": self._drain,
            "broker": self._kill_broker,
            "link": self._break_links,
        }
        periods = {kind: getattr(options, f"{kind}_every") for kind in kinds}
        self.kinds = {kind: period for kind, period in periods.items() if period}
        self._tasks = [
            asyncio.create_task(self._repeat(kinds[kind], period), name=kind) for kind, period in self.kinds.items()
        ]
        self._later: set[asyncio.Task[None]] = set()
        self._stopped: dict[int, float] = {}  # for good, by pid: when
        self._broker_killed = [-math.inf]  # when
        self._recovery_s: float = options.recovery_s

    async def end(self) -> None:
        """Nothing new breaks; what heals by itself is healed. Raises what went wrong in here."""
        for task in self._tasks:
            task.cancel()
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*self._later)
        self._proxy.heal()
        await self._all_noticed()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        self._broker.check()

    async def _all_noticed(self) -> None:
        """Those stopped at the very end, too, must be found and killed. Who is not is told as left running, at the end of it all.

        Of a worker stopped while there was no broker, or too shortly before, the next broker has never heard and cannot hear.
        It is woken, and has to leave by itself.
        """
        for pid, when in self._stopped.items():
            since = when - self._recovery_s - CONNECT_AGAIN_S
            if stopped(pid) and any(since < killed < when + 2 * STOPPED_IS_DEAD_S for killed in self._broker_killed):
                send(pid, SIGCONT)
                self.history.write("note", "stop", detail=f"worker {pid} woken: its broker died before it could notice")
        until = time.monotonic() + NOTICED_WITHIN_S
        while any(map(stopped, self._stopped)) and time.monotonic() < until:  # noqa: ASYNC110 - the kernel is asked
            await asyncio.sleep(0.05)

    async def _repeat(self, fault: Callable[[], Awaitable[None]], period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s * (0.8 + 0.4 * self._random.random()))
            await fault()

    def _in_background(self, doing: Awaitable[None]) -> None:
        async def run() -> None:
            await doing

        task = asyncio.create_task(run())
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def _kill(self) -> None:
        pid = self._some_worker()
        if pid is not None and send(pid, SIGKILL):
            self.history.write("fault", "kill", detail=f"worker {pid}")

    async def _stop(self) -> None:
        pid = self._some_worker()
        if pid is None or not send(pid, SIGSTOP):
            return
        if self._random.random() < 0.5:
            self.history.write("fault", "stop", detail=f"worker {pid}, for good")
            self._stopped[pid] = time.monotonic()
        else:
            self.history.write("fault", "pause", detail=f"worker {pid}")
            self._in_background(self._wake(pid, self._random.uniform(*PAUSES_S)))

    async def _wake(self, pid: int, after_s: float) -> None:
        await asyncio.sleep(after_s)
        send(pid, SIGCONT)

    async def _drain(self) -> None:
        try:
            found = (await self._client.control("workers", {}))["workers"]
        except ForgeError as error:
            self.history.write("note", "drain", detail=f"no list of workers: {type(error).__name__}: {error}")
            return
        serving = [worker["name"] for worker in found if worker["state"] == "READY"]
        if len(serving) > 1:
            self._in_background(self._drain_one(self._random.choice(serving)))

    async def _drain_one(self, name: str) -> None:
        self.history.write("fault", "drain", detail=name)
        try:
            async with asyncio.timeout(END_S):
                await self._client.control("drain", {"target": name})
        except (ForgeError, TimeoutError) as error:
            # It may have been killed meanwhile. That it was not drained harms nobody; whether calls were harmed is judged.
            self.history.write("note", "drain", detail=f"{name}: {type(error).__name__}: {error}")
        else:
            self.history.write("note", "drain", detail=f"{name} is gone")

    async def _kill_broker(self) -> None:
        self.history.write("fault", "broker", detail=f"pid {self._broker.pid}")
        self._broker_killed.append(time.monotonic())
        await asyncio.to_thread(self._broker.kill)
        self._broker.start()

    async def _break_links(self) -> None:
        some = self._random
        kind = some.choice(["reset", "half-open", "hole", "delay"])
        if kind == "reset":
            met = self._proxy.reset()
        elif kind == "half-open":
            met = self._proxy.half_open()
        elif kind == "delay":
            met = self._proxy.delay(some.uniform(0.01, 0.1))
        else:
            met = self._proxy.black_hole(some.choice(["up", "down"]))
        self.history.write("fault", "link", detail=f"{kind}, {met} connections")
        if kind in ("delay", "hole"):
            # One in five lasts longer than ZMTP's heartbeats bear, and the connection is given up.
            await asyncio.sleep(6.5 if kind == "hole" and some.random() < 0.2 else some.uniform(0.3, 2.0))
            self._proxy.heal()

    def _some_worker(self) -> int | None:
        pids = workers(self._broker.mark)
        return self._random.choice(pids) if pids else None


async def run(options: argparse.Namespace) -> tuple[Verdict, dict[str, int], list[str]]:
    """One run: the verdict, what the last broker had seen of batches and shared memory, and what was left: the command lines of
    processes that had to be killed, and files in /dev/shm."""
    broker = Broker(
        options.directory,
        heartbeat_s=HEARTBEAT_S,
        liveness=round(STOPPED_IS_DEAD_S / HEARTBEAT_S),
        recovery_s=options.recovery_s,
        orphan_grace_s=ORPHAN_GRACE_S,
        max_workers=4 * options.replicas,
    )
    proxy = FaultProxy(broker.port)
    others: list[subprocess.Popen[bytes]] = []
    left: list[str] = []
    seen: dict[str, int] = {}
    segments = ""
    try:
        broker.start()
        address = f"tcp://127.0.0.1:{await proxy.start()}"
        async with connect(broker.ipc, connect_timeout_s=CONNECT_S) as client:
            segments = "" if client.link.segments is None else client.link.segments.prefix
            seen = await _work(options, broker, proxy, client, address, others)
    except BaseException:
        print(f"the broker's last words:\n{broker.last_words()}\nhistories and logs: {options.directory}")
        raise
    finally:
        await proxy.close()
        for other in others:
            other.terminate()
        await asyncio.to_thread(broker.end)
        left = await asyncio.to_thread(end_all, broker.mark, END_S if sys.exc_info()[0] is None else 1.0)
        for other in others:
            await asyncio.to_thread(other.wait)
    left += await asyncio.to_thread(files_of, segments)
    allowed: frozenset[str] = frozenset().union(
        *(errors for kind, errors in MAY_FAIL.items() if getattr(options, f"{kind}_every"))
    )
    return check(read(options.directory), allowed), seen, left


async def _work(
    options: argparse.Namespace,
    broker: Broker,
    proxy: FaultProxy,
    client: Client,
    address: str,
    others: list[subprocess.Popen[bytes]],
) -> dict[str, int]:
    environ = environment(broker.mark)
    others += [hand_started(address, broker.mark, options.directory) for _ in range(options.hand_started)]
    async with asyncio.timeout(START_S):
        # Idle ones are used before new ones are launched, so the service is deployed when they are there.
        while len((await client.control("workers", {}))["workers"]) < options.hand_started:  # noqa: ASYNC110 - it is asked
            await asyncio.sleep(0.05)
    configured = Counter.options(
        name=NAME,
        num_replicas=options.replicas,
        replica_max_concurrent_requests=options.callers,
        on_session_loss="raise",
        # By default a replica that dies every few seconds is soon tried twice a minute (F7). Here nothing is wrong with it, and a
        # run in which hardly anybody lives kills hardly anybody.
        restart_backoff_s=0.1,
        restart_backoff_at_most_s=0.5,
    )
    async with asyncio.timeout(START_S):
        service = await configured.as_service(str(options.directory), options.work_ms / 1000)
    far = options.callers // 4
    near = options.callers - far
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.chaos_callers", "--address", address, "--service", NAME),
        *("--history", str(options.directory), "--settle", str(options.settle)),
        *("--sessions", str(far // 2), "--plain", str(far - far // 2)),
        stdin=subprocess.PIPE,
        env=environ,
        cwd=ROOT,
    )
    assert child.stdin is not None
    try:
        callers = Callers(service, client, History(options.directory, "near"), "near", itertools.count(1))
        once = options.callers // 8
        callers.start(sessions=near // 2, plain=near - near // 2 - once, once=once)
        faults = Faults(options, broker, proxy, client)
        await asyncio.sleep(options.seconds)
        await faults.end()
        child.stdin.close()
        await callers.stop(options.settle)
        async with asyncio.timeout(options.settle + END_S):
            code = await child.wait()
        if code:
            raise RuntimeError(f"the callers behind the proxy ended with {code}; their words are above")
        batches = (await service.state())["batches"].values()
        shared = (await client.control("status", {}))["shared_memory"]
        return {
            "batches": sum(one["batches"] for one in batches),
            "batched": sum(one["items"] for one in batches),
            "shared_bytes": shared["bytes"],
        }
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


def show(verdict: Verdict, seen: dict[str, int], left: list[str]) -> None:
    faults = ", ".join(f"{kind} {count}" for kind, count in sorted(verdict.faults.items())) or "none"
    rate = verdict.calls / verdict.seconds if verdict.seconds else 0.0
    rows: list[tuple[str, object]] = [
        ("faults", faults),
        ("calls", f"{verdict.calls:,} in {verdict.seconds:.1f} s, {rate:,.0f}/s"),
        ("ok", f"{verdict.ok:,}"),
        ("unknown", _by_error(verdict.unknown)),
        ("failed", _by_error(verdict.failed)),
        ("… without reason", len(verdict.unexpected)),
        ("lost", len(verdict.lost)),
        ("duplicated replies", len(verdict.duplicated)),
        ("run twice", len(verdict.run_twice)),
        ("stale", len(verdict.stale)),
        ("out of order", len(verdict.out_of_order)),
        ("left behind", len(left)),
        ("run again elsewhere", f"{verdict.run_again}, at least once allows it"),
        ("counted twice", f"{len(verdict.counted_twice)}, at least once allows it"),
        ("batches", f"{seen['batches']:,} of {seen['batched']:,} calls, since the broker came last"),
        ("shared memory", f"{seen['shared_bytes'] / 2**20:.1f} MiB at the end"),
        ("sessions", f"{verdict.sessions:,}, of which {verdict.moved:,} moved"),
        ("longest silence", f"{verdict.longest_silence_s:.3f} s"),
        (
            "latency",
            f"median {verdict.median_ms:.1f} ms, p99 {verdict.p99_ms:.1f} ms, longest {verdict.longest_ms:,.0f} ms",
        ),
    ]
    for name, value in rows:
        print(f"{name:<22}{value}")
    for name, finding in verdict.to_dict()["evidence"].items():
        if name != "counted_twice":
            print(f"\n{name}:", *finding, sep="\n  ")
    if left:
        print("\nleft behind:", *left, sep="\n  ")


def _by_error(counts: dict[str, int]) -> str:
    told = ", ".join(f"{error} {count}" for error, count in sorted(counts.items()))
    return f"{sum(counts.values())}{f' ({told})' if told else ''}"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long things break")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--hand-started", type=int, default=0, metavar="N", help="workers that come through the proxy")
    parser.add_argument("--work-ms", type=float, default=5.0, help="what a call takes")
    parser.add_argument("--settle", type=float, default=30.0, help="seconds for what is unanswered at the end")
    parser.add_argument("--recovery-s", type=float, default=1.5, help="the recovery window of the broker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--everything", action="store_true", help=f"all kinds of faults: {EVERYTHING}")
    for kind in EVERYTHING:
        parser.add_argument(f"--{kind}-every", type=float, metavar="SECONDS", help="0: never")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--keep", action="store_true", help="keep histories and logs, which is done anyway when something is wrong"
    )
    return parser


def main() -> int:
    options = arguments().parse_args()
    plan = EVERYTHING if options.everything else {"kill": EVERYTHING["kill"]}
    for kind in EVERYTHING:
        if getattr(options, f"{kind}_every") is None:
            setattr(options, f"{kind}_every", plan.get(kind, 0.0))
    options.directory = Path(tempfile.mkdtemp(prefix="forge-chaos-"))  # 0700, so that its ipc address is trusted
    verdict, seen, left = asyncio.run(run(options))
    show(verdict, seen, left)
    wrong = verdict.bad + len(left)
    if options.json:
        about = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        figures: dict[str, Any] = {**verdict.to_dict(), **seen, "left_behind": len(left), "about": about}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if wrong or options.keep:
        print(f"\nhistories and logs: {options.directory}")
    else:
        shutil.rmtree(options.directory)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
