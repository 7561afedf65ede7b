"""When calls come: shapes, files, and what is wrong with a file."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import pytest

from forge_broker.simulator.traces import Trace, read_csv, trace_of
from forge_contract.errors import ConfigError


def counted(trace: Trace, start: float, end: float) -> int:
    return sum(start <= at < end for at in trace.arrivals(Random(5)))


@pytest.mark.parametrize(
    ("shape", "rates"),
    [
        ("constant", {0: 10, 500: 10, 999: 10}),
        ("step", {0: 10, 249: 10, 250: 40, 749: 40, 750: 10, 999: 10}),
        ("spike", {0: 10, 249: 10, 250: 40, 299: 40, 300: 10, 999: 10}),
        ("diurnal", {0: 10, 250: 25, 500: 40, 750: 25}),
    ],
)
def test_a_shape_goes_from_rate_to_peak_and_back(shape: str, rates: dict[float, float]) -> None:
    trace = trace_of(shape, 10.0, 40.0, 1000.0)
    assert {at: trace.rate(at) for at in rates} == pytest.approx(rates)
    assert trace.highest == (10 if shape == "constant" else 40)


@pytest.mark.parametrize("shape", ["constant", "step", "spike", "diurnal"])
def test_arrivals_come_at_the_rate_of_their_moment_in_order_and_repeat_with_their_seed(shape: str) -> None:
    trace = trace_of(shape, 10.0, 40.0, 1000.0)
    arrivals = list(trace.arrivals(Random(5)))
    assert arrivals == list(trace.arrivals(Random(5))) != list(trace.arrivals(Random(6)))
    assert arrivals == sorted(arrivals)
    assert 0 < arrivals[0] < arrivals[-1] < 1000
    assert len(arrivals) == pytest.approx(trace.expected, abs=4 * math.sqrt(trace.expected))
    for start in range(0, 1000, 250):
        expected = sum(trace.rate(at + 0.5) for at in range(start, start + 250))
        assert counted(trace, start, start + 250) == pytest.approx(expected, abs=4 * math.sqrt(expected))


def test_a_file_of_rates_holds_each_until_the_next_and_the_last_as_long_as_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "load.csv"
    file.write_text("seconds,rate\n# a quiet night\n0,2\n\n100, 50\n200,0\n", "utf-8")
    trace = read_csv(file)
    assert (trace.name, trace.seconds, trace.highest) == ("load.csv", 300.0, 50.0)
    assert [trace.rate(at) for at in (0, 99, 100, 199, 200, 299)] == [2, 2, 50, 50, 0, 0]
    assert counted(trace, 200, 300) == 0
    assert counted(trace, 100, 200) == pytest.approx(5000, abs=300)
    assert read_csv(file, 150.0).seconds == 150.0


def test_a_file_of_moments_is_played_as_it_was_recorded(tmp_path: Path) -> None:
    file = tmp_path / "calls.csv"
    file.write_text("0.5\n0.5\n2\n3.25\n", "utf-8")
    assert list(read_csv(file).arrivals(Random(1))) == [0.5, 0.5, 2.0, 3.25]
    assert list(read_csv(file, 2.5).arrivals(Random(1))) == [0.5, 0.5, 2.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0,1\n1,fast\n", "line 2: 'fast' is no number"),
        ("0,1\n10,nan\n", "line 2: 'nan' is no number"),
        ("0,1\n10,-3\n", "line 2: -3 is no rate"),
        ("0,1\n10,1e9\n", "line 2: 1e+09 is no rate"),
        ("5,1\n3,1\n", "line 2: 3 is before 5 of line 1"),
        ("-5,1\n", "line 1: -5 is no time"),
        ("0,1\n10\n", "line 2: 1 values, and line 1 has 2"),
        ("0,1,2\n", "line 1: 3 values, where `seconds,rate` are two"),
        ("seconds,rate\n", "holds no line of `seconds,rate`"),
        ("0,1\n\x00,1\n", "line 2: '\\x00' is no number"),
    ],
)
def test_nonsense_in_a_file_is_named_by_its_line_and_value(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "load.csv"
    file.write_text(text, "utf-8")
    with pytest.raises(ConfigError) as wrong:
        read_csv(file)
    assert said in str(wrong.value)
    assert "load.csv" in str(wrong.value)


def test_all_that_is_wrong_is_told_together_but_not_without_end(tmp_path: Path) -> None:
    file = tmp_path / "load.csv"
    file.write_text("0,1\n" + "".join(f"{line},x{line}\n" for line in range(100)), "utf-8")
    with pytest.raises(ConfigError) as wrong:
        read_csv(file)
    assert "line 2: 'x0'" in str(wrong.value)
    assert "line 6: 'x4'" in str(wrong.value)
    assert "line 7" not in str(wrong.value)
    assert "and more" in str(wrong.value)


def test_a_file_that_cannot_be_read_and_a_shape_that_is_none_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_csv(tmp_path)
    with pytest.raises(ConfigError, match="'stpe' is neither a shape nor a file that is there; did you mean 'step'"):
        trace_of("stpe", 1.0, 1.0, 1.0)
