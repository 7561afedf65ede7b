"""When calls come: a rate over time, and arrivals drawn from it, or the arrivals themselves as they were recorded.

A rate is drawn as a Poisson process whose intensity changes (by thinning: arrivals of the highest rate, of which each is kept with the
share that its moment has). `trace_of` reads what the command line says, `read_csv` a file.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

from forge_contract.errors import ConfigError, did_you_mean

SHAPES: Final = ("constant", "step", "spike", "diurnal")
STEP_UP, STEP_DOWN = 0.25, 0.75  # of the time: long enough to settle before, and to see what is given back after
SPIKE_AT, SPIKE_FOR = 0.25, 0.05
STEPS: Final = 1000  # in which a rate is added up
PROBLEMS_TOLD: Final = 5  # of a file: the first say what is wrong with the rest
MOST_RATE: Final = 1e6  # calls/s
MOST_SECONDS: Final = 31 * 86_400.0


class Trace(NamedTuple):
    """So many seconds of calls. `arrivals(random)` are their moments, from 0 on, in order."""

    name: str
    seconds: float
    rate: Callable[[float], float]  # calls/s at a moment; of recorded arrivals the mean
    highest: float
    recorded: tuple[float, ...] | None = None

    @property
    def expected(self) -> float:
        """Calls, on average."""
        if self.recorded is not None:
            return float(len(self.recorded))
        step = self.seconds / STEPS
        return sum(self.rate((number + 0.5) * step) for number in range(STEPS)) * step

    def arrivals(self, random: Random) -> Iterator[float]:
        if self.recorded is not None:
            yield from self.recorded
            return
        at, highest, rate, seconds = 0.0, self.highest, self.rate, self.seconds
        if not highest:
            return
        draw, chance = random.expovariate, random.random
        while (at := at + draw(highest)) < seconds:
            if chance() * highest < rate(at):
                yield at


def trace_of(shape: str, rate: float, peak: float, seconds: float) -> Trace:
    """One of `SHAPES`, between `rate` and `peak`. Raises ConfigError for another."""
    if shape == "constant":
        return Trace(shape, seconds, lambda at: rate, rate)
    if shape == "step":
        up, down = STEP_UP * seconds, STEP_DOWN * seconds
        return Trace(shape, seconds, lambda at: peak if up <= at < down else rate, max(rate, peak))
    if shape == "spike":
        up, down = SPIKE_AT * seconds, (SPIKE_AT + SPIKE_FOR) * seconds
        return Trace(shape, seconds, lambda at: peak if up <= at < down else rate, max(rate, peak))
    if shape == "diurnal":
        mean, swing = (rate + peak) / 2, (peak - rate) / 2
        # One day, however long it is: lowest at its beginning and its end.
        return Trace(shape, seconds, lambda at: mean - swing * math.cos(2 * math.pi * at / seconds), max(rate, peak))
    hint = did_you_mean(shape, SHAPES) or f"the shapes are {', '.join(SHAPES)}"
    raise ConfigError(where="--trace", message=f"{shape!r} is neither a shape nor a file that is there; {hint}")


def read_csv(path: Path, seconds: float | None = None) -> Trace:
    """A trace from a file: lines of `seconds,rate` (calls/s from then on), or of one number each, when calls came. A first line of
    words is a heading. `seconds`: how much of it; else all, with a last rate as long as the one before, and a mean distance
    after the last call.

    Raises ConfigError naming lines and values.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(where=str(path), message=f"cannot be read: {error}") from error
    rows: list[tuple[int, list[float]]] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in line.split(",")]
        if not any(cells) or line.lstrip().startswith("#"):
            continue
        values = [_number(cell) for cell in cells]
        if not rows and not problems and number == 1 and all(value is None for value in values):
            continue  # the heading
        wrong = [
            f"line {number}: {cell!r} is no number" for cell, value in zip(cells, values, strict=True) if value is None
        ]
        if wrong:
            problems += wrong
        else:
            row = [value for value in values if value is not None]
            problems += _row_problems(number, row, rows)
            rows.append((number, row))
        if len(problems) > PROBLEMS_TOLD:
            problems = [*problems[:PROBLEMS_TOLD], "and more"]
            break
    if not rows and not problems:
        problems = ["holds no line of `seconds,rate`, nor of seconds"]
    if problems:
        raise ConfigError(where=str(path), problems=problems)
    if len(rows[0][1]) == 1:
        return _recorded(path.name, [row[0] for _, row in rows], seconds)
    return _rates(path.name, [row[0] for _, row in rows], [row[1] for _, row in rows], seconds)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _row_problems(number: int, row: list[float], rows: list[tuple[int, list[float]]]) -> list[str]:
    if len(row) > 2:
        return [f"line {number}: {len(row)} values, where `seconds,rate` are two, and arrivals one"]
    if rows and len(row) != len(rows[0][1]):
        return [f"line {number}: {len(row)} values, and line {rows[0][0]} has {len(rows[0][1])}"]
    found = []
    if row[0] < 0 or row[0] > MOST_SECONDS:
        found.append(f"line {number}: {row[0]:g} is no time: seconds from 0 to {MOST_SECONDS:,.0f}")
    elif rows and row[0] < rows[-1][1][0]:
        found.append(f"line {number}: {row[0]:g} is before {rows[-1][1][0]:g} of line {rows[-1][0]}")
    if len(row) == 2 and not 0 <= row[1] <= MOST_RATE:
        found.append(f"line {number}: {row[1]:g} is no rate: calls a second from 0 to {MOST_RATE:,.0f}")
    return found


def _recorded(name: str, times: list[float], seconds: float | None) -> Trace:
    if seconds is None:
        span = times[-1] - times[0]
        # Not up to the last call: it would end unanswered, or, by a rounding, be no part of it.
        until = times[-1] + (span / (len(times) - 1) if span else 1.0)
    else:
        until = seconds
    kept = tuple(at for at in times if at < until)
    mean = len(kept) / until if until else 0.0
    return Trace(name, until, lambda at: mean, mean, kept)


def _rates(name: str, times: list[float], rates: list[float], seconds: float | None) -> Trace:
    last_s = times[-1] - times[-2] if len(times) > 1 else 60.0
    until = times[-1] + last_s if seconds is None else seconds

    def rate(at: float) -> float:
        place = bisect_right(times, at)
        return rates[place - 1] if place else 0.0

    return Trace(name, until, rate, max(rates))
