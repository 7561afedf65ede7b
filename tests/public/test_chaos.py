"""The proof by real processes: the checker finds every kind of wrong, the proxy breaks links as it says, and a short run finds nothing.

The long runs are `make chaos`. What they compare is in `bench/chaos_history.py`; here it is given histories that were made up, each with
one mistake in it, because a checker that finds nothing in a run that went well has proved nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bench.chaos_history import History, Record, check, read
from bench.fault_proxy import FaultProxy

ROOT = Path(__file__).parents[2]
BOUND_S = 50.0

pytestmark = pytest.mark.timeout(BOUND_S + 5)


class Told:
    """A history as a test tells it: one thing after another, a millisecond apart."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def _add(
        self,
        event: str,
        kind: str,
        call: str = "",
        session: str = "",
        n: int = 0,
        value: int = 0,
        who: str = "client",
        detail: str = "",
    ) -> Told:
        when = len(self.records) / 1000
        self.records.append(Record(when, event, kind, call, session, n, value, who, detail))
        return self

    def invoke(self, call: str, kind: str = "plain", session: str = "", n: int = 0) -> Told:
        return self._add("invoke", kind, call, session, n)

    def run(self, call: str, who: str = "w1", kind: str = "plain", session: str = "", n: int = 0) -> Told:
        return self._add("run", kind, call, session, n, who=who)

    def ok(self, call: str, kind: str = "plain", session: str = "", n: int = 0, value: int = 0) -> Told:
        return self._add("ok", kind, call, session, n, value)

    def ends(self, how: str, call: str, detail: str, kind: str = "plain") -> Told:
        return self._add(how, kind, call, detail=detail)

    def fault(self, kind: str) -> Told:
        return self._add("fault", kind)

    def refused(self, replies: int) -> Told:
        return self._add("refused", "plain", value=replies)

    def counted(self, n: int, value: int | None = None, who: str = "w1") -> Told:
        """One whole call of session s."""
        call = f"s{n}"
        self.invoke(call, "session", "s", n).run(call, who, "session", "s", n)
        return self.ok(call, "session", "s", n, n if value is None else value)


def test_a_history_in_which_all_is_well_has_no_findings() -> None:
    told = Told().invoke("a").run("a").ok("a").counted(1).counted(2)
    told.invoke("o", "once").run("o", kind="once").ok("o", "once").invoke("c", "control").ok("c", "control")
    verdict = check(told.records)
    assert verdict.bad == 0
    assert (verdict.calls, verdict.ok, verdict.sessions, verdict.moved) == (5, 5, 1, 0)
    assert verdict.median_ms == pytest.approx(2.0)


def test_a_call_that_is_never_answered_is_lost() -> None:
    verdict = check(Told().invoke("a").run("a").records)
    assert verdict.lost == ["plain call a was asked at 0.000 and never answered"]


def test_a_call_that_is_answered_and_was_run_by_nobody_is_lost() -> None:
    verdict = check(Told().invoke("a").ok("a").records)
    assert verdict.lost == ["plain call a was answered at 0.001 and run by nobody"]


def test_two_outcomes_of_one_call_are_a_duplicated_reply() -> None:
    verdict = check(Told().invoke("a").run("a").ok("a").ok("a").records)
    assert verdict.duplicated == ["plain call a was answered ok, then ok"]


def test_a_reply_that_reached_a_client_twice_counts_although_its_caller_saw_one() -> None:
    verdict = check(Told().invoke("a").run("a").ok("a").refused(0).refused(3).records)
    assert verdict.duplicated == ["3 replies reached process client a second time"]


def test_an_at_most_once_call_that_ran_in_two_processes_is_found() -> None:
    """F3"""
    told = Told().invoke("o", "once").run("o", "w1", "once").run("o", "w2", "once").ok("o", "once")
    assert check(told.records).run_twice == ["once call o ran at 0.001 in w1, 0.002 in w2"]


def test_an_at_least_once_call_may_run_again_elsewhere_but_not_twice_in_one_process() -> None:
    """F3, W4"""
    again = check(Told().invoke("a").run("a", "w1").fault("kill").run("a", "w2").ok("a").records)
    assert (again.bad, again.run_again, again.faults) == (0, 1, {"kill": 1})
    resent = check(Told().invoke("a").run("a", "w1").run("a", "w1").ok("a").records)
    assert resent.run_twice == ["plain call a ran at 0.001 in w1, 0.002 in w1"]


def test_a_session_whose_value_goes_back_is_stale() -> None:
    """S3"""
    verdict = check(Told().counted(1).counted(2).counted(3, value=1, who="w2").counted(4, value=2, who="w2").records)
    assert verdict.stale == ["session call s3, number 3 of session s, was answered 1 at 0.008"]
    assert verdict.moved == 1


def test_a_session_that_counts_a_call_twice_is_shown_and_allowed() -> None:
    verdict = check(Told().counted(1).counted(2, value=3).counted(3, value=4).records)
    assert (verdict.bad, len(verdict.counted_twice)) == (0, 1)


def test_behind_a_call_without_a_value_nobody_knows_what_the_count_should_be() -> None:
    told = Told().counted(1).invoke("s2", "session", "s", 2).ends("info", "s2", "CallTimeout: …", "session")
    assert check(told.counted(3, value=2).records).bad == 0


def test_calls_of_a_session_that_run_in_another_order_than_sent_are_found() -> None:
    """A6"""
    told = Told()
    for n in (1, 2, 3):
        told.invoke(f"s{n}", "session", "s", n)
    for n, who in ((1, "w1"), (3, "w1"), (2, "w2")):
        told.run(f"s{n}", who, "session", "s", n)
    for n in (1, 2, 3):
        told.ok(f"s{n}", "session", "s", n, n)
    assert check(told.records).out_of_order == ["session s: number 2 first ran at 0.005, after number 3"]


def test_one_process_that_goes_back_in_a_session_is_out_of_order_even_if_the_call_ran_before() -> None:
    told = Told().counted(1).counted(2).counted(3).run("s2", "w1", "session", "s", 2)
    assert check(told.records).out_of_order == ["session s: process w1 ran number 2 at 0.009, after number 3"]


@pytest.mark.parametrize(("faults", "found"), [(["broker"], 1), (["kill"], 1), (["kill", "broker"], 0), ([], 1)])
def test_a_reply_that_died_with_its_worker_and_its_broker_may_be_had_again_behind_later_ones(
    faults: list[str], found: int
) -> None:
    """F10: nobody is left who knows of it, while the worker that the session has moved to has run the next."""
    told = Told().counted(1)
    for n, who in ((2, "w1"), (3, "w2")):
        told.invoke(f"s{n}", "session", "s", n).run(f"s{n}", who, "session", "s", n)
    for kind in faults:
        told.fault(kind)
    told.run("s2", "w2", "session", "s", 2)
    for n in (2, 3):
        told.ok(f"s{n}", "session", "s", n, n)
    assert len(check(told.records).out_of_order) == found


def test_what_ran_without_being_answered_may_run_again_from_there_in_another_process() -> None:
    """F2, S3: a death takes the replies of several calls along."""
    told = Told().counted(1)
    for n in (2, 3):
        told.invoke(f"s{n}", "session", "s", n).run(f"s{n}", "w1", "session", "s", n)
    told.fault("kill")
    for n in (2, 3):
        told.run(f"s{n}", "w2", "session", "s", n).ok(f"s{n}", "session", "s", n, n)
    verdict = check(told.counted(4, who="w2").records)
    assert (verdict.bad, verdict.run_again, verdict.moved) == (0, 2, 1)


def test_unknown_outcomes_are_counted_as_unknown_and_failures_by_type() -> None:
    told = Told().invoke("o", "once").run("o", kind="once").ends("info", "o", "OutcomeUnknown: it may have run", "once")
    told.invoke("a").ends("fail", "a", "NoHealthyReplicas: none").invoke("b").ends("fail", "b", "SessionLost: gone")
    verdict = check(told.records, allowed=frozenset({"SessionLost"}))
    assert verdict.unknown == {"OutcomeUnknown": 1}
    assert verdict.failed == {"NoHealthyReplicas": 1, "SessionLost": 1}
    assert verdict.unexpected == ["plain call a failed at 0.004: NoHealthyReplicas: none"]
    assert verdict.bad == 1


def test_the_longest_silence_is_between_two_values() -> None:
    told = Told().invoke("a").run("a").ok("a").invoke("b").run("b")
    for _ in range(5):
        told.fault("stop")
    verdict = check(told.ok("b").records)
    assert verdict.longest_silence_s == pytest.approx(0.008)


def test_a_history_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    first, second = History(tmp_path, "one"), History(tmp_path, "two")
    first.write("invoke", "session", "a", "s", 4)
    second.write("run", "session", "a", "s", 4, 17)
    first.write("fail", "session", "a", "s", 4, detail="ValueError: two\nlines,\tand a tab")
    first.close()
    second.close()
    who = str(os.getpid())
    assert [record[1:] for record in read(tmp_path)] == [
        ("invoke", "session", "a", "s", 4, 0, who, ""),
        ("run", "session", "a", "s", 4, 17, who, ""),
        ("fail", "session", "a", "s", 4, 0, who, "ValueError: two lines, and a tab"),
    ]


class Ends:
    """A connection through the proxy, seen from both sides."""

    def __init__(self, proxy: FaultProxy, near: Any, far: Any) -> None:
        self.proxy = proxy
        self.near_in: asyncio.StreamReader = near[0]
        self.near_out: asyncio.StreamWriter = near[1]
        self.far_in: asyncio.StreamReader = far[0]
        self.far_out: asyncio.StreamWriter = far[1]

    async def up(self, data: bytes) -> bytes:
        self.near_out.write(data)
        return await self.far_in.readexactly(len(data))

    async def down(self, data: bytes) -> bytes:
        self.far_out.write(data)
        return await self.near_in.readexactly(len(data))


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    accepted: asyncio.Queue[Any] = asyncio.Queue()
    server = await asyncio.start_server(lambda *far: accepted.put_nowait(far), "127.0.0.1", 0)
    proxy = FaultProxy(server.sockets[0].getsockname()[1])
    port = await proxy.start()
    async with asyncio.timeout(10):
        near = await asyncio.open_connection("127.0.0.1", port)
        made = Ends(proxy, near, await accepted.get())
        assert await made.up(b"hello") == b"hello"
        yield made
        await proxy.close()
    for writer in (made.near_out, made.far_out):
        writer.transport.abort()
    server.close()


async def test_a_reset_reaches_both_ends(ends: Ends) -> None:
    assert ends.proxy.reset() == 1
    for reader in (ends.near_in, ends.far_in):
        with pytest.raises(ConnectionResetError):
            await reader.read(1)


async def test_of_a_half_open_connection_only_the_far_end_knows(ends: Ends) -> None:
    """What the near end says goes nowhere, for as long as it likes to say it."""
    assert ends.proxy.half_open() == 1
    with pytest.raises(ConnectionResetError):
        await ends.far_in.read(1)
    for _ in range(40):
        ends.near_out.write(bytes(1 << 16))
        await ends.near_out.drain()
    assert len(ends.proxy) == 1
    assert not ends.near_in.at_eof()
    assert ends.proxy.half_open() == 0


async def test_a_black_hole_swallows_one_direction_until_it_is_healed(ends: Ends) -> None:
    """TCP loses nothing of a connection that lives: what was sent arrives in the end."""
    assert ends.proxy.black_hole("up") == 1
    ends.near_out.write(b"sent")
    assert await ends.down(b"the other way works") == b"the other way works"
    arriving = asyncio.ensure_future(ends.far_in.readexactly(4))
    assert await ends.down(b"still") == b"still"
    assert not arriving.done()
    ends.proxy.heal()
    assert await arriving == b"sent"


async def test_a_delay_is_paid_by_what_is_sent_after_it(ends: Ends) -> None:
    ends.proxy.delay(0.05)
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert await ends.up(b"late") == b"late"
    assert loop.time() - began >= 0.05


async def test_who_connects_while_nobody_listens_behind_the_proxy_is_sent_away() -> None:
    """A broker that is being started again refuses connections; a proxy that took them would hide it."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    proxy = FaultProxy(port)
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", await proxy.start())
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.transport.abort()
        await proxy.close()


def chaos(path: Path, *options: str) -> dict[str, Any]:
    """The figures of a run of `bench/chaos.py`, in batches and with shared memory. Fails with all it printed unless nothing was found."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "chaos.py"), "--json", str(path), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    figures: dict[str, Any] = json.loads(path.read_text("utf-8"))
    assert figures["batched"] > figures["batches"] > 0
    assert figures["shared_bytes"] > 0
    return figures


def test_while_workers_are_killed_and_stopped_nothing_is_lost_doubled_stale_or_out_of_order(tmp_path: Path) -> None:
    """F1, F2, F3, S3, A6: real processes and real kills."""
    figures = chaos(tmp_path / "figures.json", "--seconds", "5", "--kill-every", "1", "--stop-every", "2")
    assert figures["faults"]["kill"] >= 3
    assert figures["ok"] > 500
    assert figures["run_again"] > 0  # the kills met calls
    assert figures["bad"] == 0


def test_nor_while_workers_are_drained_links_break_and_the_broker_is_killed(tmp_path: Path) -> None:
    """F9, F10, W4, S3: the broker comes back at the same addresses, with nothing on disk."""
    every = ["--kill-every", "0", "--drain-every", "1.5", "--link-every", "1", "--broker-every", "3"]
    figures = chaos(tmp_path / "figures.json", "--seconds", "5", *every)
    assert figures["faults"]["broker"] == 1
    assert figures["faults"]["drain"] >= 1
    assert figures["faults"]["link"] >= 1
    assert figures["ok"] > 500
    assert figures["bad"] == 0
