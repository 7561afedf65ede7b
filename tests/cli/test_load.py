"""`forge load`: calls come when they are due, latencies count from there, and what could not be measured is said."""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import Result

from forge_broker.simulator.figures import percentiles, quantile
from forge_cli.load import number_ms
from forge_cli.open_loop import OpenLoop, poisson, uniform
from forge_cli.options import read_seconds
from forge_contract.errors import BrokerLost, Overloaded
from tests.cli.fake import Told, told
from tests.cli.running import BOUND_S, Place


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Told]:
    with told(tmp_path) as broker:
        broker.serves("gen", "predict", "rest")
        broker.silent.add("rest")
        yield broker


def load(broker: Told, line: str) -> Result:
    return broker.forge("load", *line.split())


class Virtual:
    """A clock that moves when somebody sleeps, and a service that answers so many seconds after it was called."""

    def __init__(self, *, answers_after_s: float = 0.0, sending_takes_s: Callable[[int], float] = lambda number: 0.0):
        self.now = 100.0
        self.sent_at: list[float] = []
        self._answers_after_s = answers_after_s
        self._sending_takes_s = sending_takes_s
        self._due: list[tuple[float, asyncio.Future[Any]]] = []

    def call(self, number: int) -> asyncio.Future[Any]:
        self.sent_at.append(self.now)
        self.now += self._sending_takes_s(number)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._due.append((self.now + self._answers_after_s, answer))
        return answer

    async def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        while self._due and self._due[0][0] <= until:
            at, answer = self._due.pop(0)
            self.now = max(self.now, at)
            answer.set_result(None)
            await asyncio.sleep(0)  # its callback looks at the clock
        self.now = until

    async def run(self, arrivals: Iterator[float], seconds: float) -> OpenLoop:
        loop = OpenLoop(self.call, clock=lambda: self.now, sleep=self.sleep)
        await loop.run(arrivals, seconds)
        await self.sleep(self._answers_after_s)
        await loop.settle(0.0)
        loop.give_up()
        return loop


def test_arrivals_at_random_are_independent_and_repeat_with_their_seed() -> None:
    """Their distances are exponential: as wide on average as they are scattered."""
    drawn = list(poisson(100.0, 50.0, Random(3)))
    assert drawn == list(poisson(100.0, 50.0, Random(3)))
    assert drawn != list(poisson(100.0, 50.0, Random(4)))
    gaps = [after - before for before, after in pairwise(drawn)]
    assert statistics.mean(gaps) == pytest.approx(0.01, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.01, rel=0.05)
    assert drawn[-1] < 50.0


def test_uniform_arrivals_are_so_many_at_equal_distances() -> None:
    assert list(uniform(4.0, 1.0)) == [0.0, 0.25, 0.5, 0.75]
    assert list(islice(uniform(1e6, 3600.0), 2)) == [0.0, 1e-6]  # nothing is made before it is needed


async def test_arrivals_do_not_wait_for_replies() -> None:
    service = Virtual(answers_after_s=5.0)
    loop = await service.run(uniform(10.0, 1.0), 1.0)
    assert service.sent_at == pytest.approx([100.0 + number / 10 for number in range(10)])
    assert loop.tally.outstanding_at_end == 10
    assert list(loop.tally.latencies) == pytest.approx([5.0] * 10)
    assert loop.tally.kept_up


async def test_a_latency_counts_from_when_the_call_was_due_so_a_stall_is_in_it() -> None:
    """The third call takes a second to send, and the seven that were due meanwhile are sent at its end: without what they
    waited, nine of ten latencies would be 10 ms."""
    service = Virtual(answers_after_s=0.01, sending_takes_s=lambda number: 1.0 if number == 2 else 0.0)
    loop = await service.run(uniform(10.0, 3.0), 3.0)
    stalled = [1.01, 0.91, 0.81, 0.71, 0.61, 0.51, 0.41, 0.31, 0.21, 0.11]
    assert sorted(loop.tally.latencies, reverse=True)[:10] == pytest.approx(stalled)
    assert sorted(loop.tally.latencies)[:20] == pytest.approx([0.01] * 20)
    whole = stalled + [0.01] * 20
    assert loop.tally.told()["spread"] == pytest.approx(statistics.stdev(whole) / statistics.mean(whole), abs=1e-4)


async def test_a_generator_that_cannot_keep_up_says_so_and_ends_in_time() -> None:
    """Each call takes it 5 ms to send, and 1000 a second are asked for."""
    service = Virtual(sending_takes_s=lambda number: 0.005)
    tally = (await service.run(uniform(1000.0, 2.0), 2.0)).tally
    said = tally.told()
    assert said["kept_up"] is False
    assert said["achieved_rate"] == pytest.approx(200, rel=0.01)
    assert said["seconds"] == pytest.approx(2.0, abs=0.01)
    assert said["sent_late_s"]["max"] == pytest.approx(2.0 * (1 - 200 / 1000), abs=0.01)


async def test_what_concerns_one_call_is_counted_and_a_broker_that_is_lost_ends_the_run() -> None:
    loop = asyncio.get_running_loop()
    virtual = Virtual()

    def call(number: int) -> asyncio.Future[Any]:
        if number < 3:
            raise Overloaded(what="gen.predict", limit=1, retry_after_s=1.0)
        answer: asyncio.Future[Any] = loop.create_future()
        answer.set_exception(KeyError("x") if number < 5 else BrokerLost(address="ipc:///b", why="it ended"))
        return answer

    async def sleep(seconds: float) -> None:
        await virtual.sleep(seconds)
        await asyncio.sleep(0)

    open_loop = OpenLoop(call, clock=lambda: virtual.now, sleep=sleep, refused=(Overloaded,), fatal=(BrokerLost,))
    await open_loop.run(uniform(10.0, 5.0), 5.0)
    assert dict(open_loop.tally.errors) == {"Overloaded": 3, "KeyError": 2, "BrokerLost": 1}
    assert isinstance(open_loop.over, BrokerLost)
    assert open_loop.tally.seconds < 1.0


def test_percentiles_are_values_that_were_measured() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.51, 0.99, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert percentiles([], {"p50": 0.5}) is None
    assert [number_ms(seconds) for seconds in (0.00084, 0.0123, 1.234)] == ["0.84", "12.3", "1,234"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("5m", 300), ("1h30m", 5400), ("1 h 30 min", 5400), ("2.5", 2.5), ("1e1", 10)]
    + [(text, None) for text in ("", "s", "1y", "3 m 2", "m5", "nan", "inf", "1h-1m")],
)
def test_durations_are_read_as_people_write_them(text: str, seconds: float | None) -> None:
    assert read_seconds(text) == seconds


def test_load_calls_with_the_arguments_and_tells_what_it_measured(broker: Told) -> None:
    done = load(broker, "gen.predict --arg x=1 --rate 200 --for 250ms --uniform --json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert {name: said[name] for name in ("sent", "succeeded", "failed", "unanswered", "arrivals")} == {
        "sent": 50,
        "succeeded": 50,
        "failed": 0,
        "unanswered": 0,
        "arrivals": "uniform",
    }
    assert 0 < said["latency_s"]["p50"] <= said["latency_s"]["p99"] <= said["latency_s"]["max"] < 10
    calls = [one for one in broker.seen if one[0] == "call"]
    assert [(endpoint, arguments) for _, endpoint, arguments, _ in calls] == [("predict", ((), {"x": 1}))] * 50


def test_load_spreads_its_calls_over_sessions(broker: Told) -> None:
    done = load(broker, "gen.predict 1 --rate 200 --for 60ms --uniform --sessions 3")
    assert done.exit_code == 0, done.output
    opened = [fields["session"] for fields in broker.asked("open_session")]
    assert len(opened) == 3
    assert [one[3]["session"] for one in broker.seen if one[0] == "call"] == [
        opened[number % 3] for number in range(12)
    ]


def test_errors_are_shown_by_type_and_a_run_without_a_success_fails(broker: Told) -> None:
    broker.methods["predict"] = lambda item, x: {}[x]
    done = load(broker, "gen.predict 1 --rate 200 --for 50ms --uniform")
    assert done.exit_code == 1
    assert "KeyError" in done.stdout
    assert "not one of the 10 calls succeeded" in done.stderr


def test_calls_beyond_their_timeout_are_counted_as_such(broker: Told) -> None:
    done = load(broker, "gen.rest --rate 100 --for 50ms --uniform --timeout 10ms --json")
    said = json.loads(done.stdout)
    assert (said["timeouts"], said["errors"], said["latency_s"]) == (5, {"CallTimeout": 5}, None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gen.predit 1 --rate 5", "UnknownEndpoint: gen has no endpoint 'predit'; did you mean 'predict'"),
        ("gen.predict 1 --rate 0", "'0' is no rate: above 0 and at most 1,000,000"),
        ("gen.predict 1 --rate fast", "'fast' is no number of calls a second"),
        ("gen.predict 1 --rate 5 --for soon", "'soon' is no duration, such as 500ms"),
        ("gen.predict 1 --rate 5 --for 0", "'0' is out of range: at least more than nothing"),
        ("gen.predict 1 --rate 5 --arg x=1", "as JSON or by --arg, not both"),
        ("gen.predict 1 --rate 5 --sessions -1", "-1 is not in the range"),
        ("predict 1 --rate 5", "no SERVICE.ENDPOINT"),
    ],
)
def test_a_load_that_cannot_be_says_what_is_wrong(broker: Told, line: str, said: str) -> None:
    done = load(broker, line)
    assert done.exit_code == (1 if "Unknown" in said else 2)
    assert said in done.stderr
    assert done.stdout == ""


def test_ctrl_c_prints_the_table_of_what_there_was_and_exits_with_130(broker: Told, place: Place) -> None:
    answered = Counter[str]()
    enough = threading.Event()

    def predict(item: dict[str, Any], x: int) -> int:
        answered["predict"] += 1
        if answered["predict"] == 20:
            enough.set()
        return x

    broker.methods["predict"] = predict
    with place.start("load", "gen.predict", "1", "--rate", "200", "--for", "1h", "--broker", broker.address) as loading:
        assert loading.process.stdout is not None
        assert enough.wait(BOUND_S)
        assert loading.interrupt() == 130
        table = loading.process.stdout.read()
    assert "ms from when due" in table
    assert "succeeded, 0 failed" in table
