"""`forge load`: calls at a rate that is asked for, and how long they took. How they are sent and counted is in `open_loop`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Any, Final

import click

from forge_cli.conversation import converse
from forge_cli.exits import Failure, Misused
from forge_cli.options import Duration, Rate, broker_option, read_value, split_pairs
from forge_cli.services import find_endpoint, import_from_here, read_arguments, split_endpoint
from forge_cli.terminal import stdout_console, write_json

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from rich.console import RenderableType

    from forge_cli.open_loop import OpenLoop, Tally

MOST_CALLS_S: Final = 1e6
MOST_SESSIONS: Final = 100_000
GRACE_S: Final = 10.0  # what is still outstanding when the last call was sent, is waited for so long
REFRESH_S: Final = 0.25  # of the bar
LINES: Final = 10  # in the course of a run, where there is no terminal; one a second at most
SEED_BITS: Final = 32


@click.command(short_help="Call an endpoint at a given rate, and show how long the answers took.")
@click.argument("endpoint", metavar="SERVICE.ENDPOINT")
@click.argument("arguments", metavar="[JSON]", required=False)
@click.option(
    "--rate", type=Rate(most=MOST_CALLS_S), required=True, metavar="CALLS/S", help="Calls a second, on average."
)
@click.option(
    "--for", "seconds", type=Duration(), default="10s", show_default=True, metavar="DURATION", help="500ms, 30s, 5m."
)
@click.option("--arg", "pairs", multiple=True, metavar="KEY=VALUE", help="A keyword of the endpoint. May be repeated.")
@click.option("--timeout", type=Duration(), metavar="DURATION", help="Of each call. [default: the endpoint's own]")
@click.option(
    "--sessions",
    type=click.IntRange(0, MOST_SESSIONS),
    default=0,
    metavar="N",
    help="Spread the calls over N sessions.",
)
@click.option(
    "--uniform", "evenly", is_flag=True, help="Calls at equal distances. [default: at random, as independent callers]"
)
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", help="Repeats the arrivals of a run. [default: drawn, and told]"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object; times in seconds.")
@broker_option
def load(
    endpoint: str,
    arguments: str | None,
    rate: float,
    seconds: float,
    pairs: tuple[str, ...],
    timeout: float | None,
    sessions: int,
    evenly: bool,
    seed: int | None,
    as_json: bool,
    broker: str,
) -> None:
    """Call an endpoint at a given rate, whether or not earlier calls were answered, and show how long the answers took.

    A call's latency counts from the moment at which it was due, so what a stalled service or a late generator does to its callers is
    in the percentiles. Arguments are those of `forge call`, or --arg. The percentiles are of the calls that succeeded; failures are
    counted by type. Ctrl-C ends it early, with the table of what there was.

    \b
    Examples:
      forge load gen.predict '{"x": 1}' --rate 500 --for 30s
      forge load gen.predict --arg x=1 --rate 2000 --for 5m --timeout 1s
      forge load gen.chat '"hello"' --rate 50 --sessions 200 --uniform
      forge load gen.predict 3 --rate 100 --seed 7 --json | jq .latency_s.p99
    """
    service, method = split_endpoint(endpoint)
    positional, keywords = read_arguments(arguments)
    if pairs and arguments is not None:
        raise click.BadParameter("give the arguments as JSON or by --arg, not both", param_hint="--arg")
    keywords = {**keywords, **{key: read_value(value) for key, value in split_pairs(pairs, "--arg").items()}}
    if seed is None:
        seed = Random().getrandbits(SEED_BITS)
    import_from_here()  # a result may be of a class that is defined here
    run = _Run(service, method, positional, keywords, rate, seconds, timeout, sessions, evenly, seed)
    # select, not epoll: asyncio rounds epoll's timeouts up to whole milliseconds, and each call would be half of one late.
    try:
        converse(broker, lambda client: run.run(), waiting="", patient=True, loop=_select_loop)
    finally:
        # Also when it was interrupted, or the broker went away: what was measured was measured.
        if run.loop is not None and run.loop.tally.sent:
            _show(run, endpoint, as_json)
    if run.loop is not None and run.loop.tally.sent and not run.loop.tally.answered:
        raise Failure(f"not one of the {run.loop.tally.sent:,} calls succeeded")


class _Run:
    """One run, as the command line asks for it."""

    def __init__(
        self,
        service: str,
        method: str,
        positional: list[Any],
        keywords: dict[str, Any],
        rate: float,
        seconds: float,
        timeout: float | None,
        sessions: int,
        evenly: bool,
        seed: int,
    ) -> None:
        self.service = service
        self.method = method
        self.positional = positional
        self.keywords = keywords
        self.rate = rate
        self.seconds = seconds
        self.timeout = timeout
        self.sessions = sessions
        self.evenly = evenly
        self.seed = seed
        self.loop: OpenLoop | None = None

    async def run(self) -> None:
        from forge_cli.open_loop import OpenLoop, poisson, uniform
        from forge_contract.errors import BrokerLost, Overloaded, ServiceStopped

        call = await self._caller()
        self.loop = loop = OpenLoop(
            call, clock=time.monotonic, refused=(Overloaded,), fatal=(BrokerLost, ServiceStopped)
        )
        arrivals = (
            uniform(self.rate, self.seconds) if self.evenly else poisson(self.rate, self.seconds, Random(self.seed))
        )
        try:
            with _progress(loop.tally, self.seconds):
                await loop.run(arrivals, self.seconds)
                if loop.over is None:
                    await loop.settle(GRACE_S if self.timeout is None else min(GRACE_S, self.timeout + 1.0))
        finally:
            loop.give_up()
        if loop.over is not None:
            raise loop.over

    async def _caller(self) -> Callable[[int], asyncio.Future[Any]]:
        """Sends the call of a number. Raises what is wrong with the names."""
        from forge_client import ActorHandle

        handle, endpoint = await find_endpoint(self.service, self.method, self.timeout)
        positional, keywords, sessions = self.positional, self.keywords, self.sessions
        if isinstance(handle, ActorHandle):
            if sessions:
                raise Misused(f"{self.service} is an actor, and only services have sessions: leave --sessions out")
            return lambda number: endpoint.call(*positional, **keywords)
        if not sessions:
            return lambda number: endpoint.route(*positional, **keywords)
        # They end with our connection.
        names = [await handle.start_session() for _ in range(sessions)]
        return lambda number: endpoint.route(*positional, sess_id=names[number % sessions], **keywords)

    def told(self) -> dict[str, Any]:
        assert self.loop is not None
        return {
            "endpoint": f"{self.service}.{self.method}",
            "asked_rate": self.rate,
            "arrivals": "uniform" if self.evenly else "poisson",
            "seed": self.seed,
            "sessions": self.sessions,
            "timeout_s": self.timeout,
            **self.loop.tally.told(),
        }


def _select_loop() -> asyncio.AbstractEventLoop:
    import asyncio
    import selectors

    return asyncio.SelectorEventLoop(selectors.SelectSelector())


@contextmanager
def _progress(tally: Tally, seconds: float) -> Iterator[None]:
    """A bar on a terminal, now and then a line elsewhere; on stderr, so that a pipe gets the table alone. On a running loop."""
    import asyncio

    from forge_broker.simulator.figures import quantile

    began = time.monotonic()
    seen = [began, 0, 0]  # when, and how many were sent and answered, at the last look

    def now_at() -> tuple[float, str]:
        now = time.monotonic()
        rate = (tally.sent - seen[1]) / max(now - seen[0], 1e-9)
        fresh = sorted(tally.latencies[int(seen[2]) :])
        p99 = f"p99 {milliseconds(quantile(fresh, 0.99))}" if fresh else "no answers"
        seen[:] = [now, tally.sent, len(tally.latencies)]
        facts = [f"{rate:,.0f} calls/s", p99, f"{tally.outstanding:,} outstanding"]
        return min(now - began, seconds), " · ".join([*facts, *([f"{tally.failed:,} failed"] if tally.failed else [])])

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        every_s = REFRESH_S
        columns = (
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
            TextColumn("{task.description}"),
        )
        bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
        task = bar.add_task("", total=seconds)

        def look() -> None:
            at, said = now_at()
            bar.update(task, completed=at, description=said, refresh=True)

        bar.start()
        end = bar.stop
    else:
        every_s = max(1.0, seconds / LINES)

        def look() -> None:
            at, said = now_at()
            click.echo(f"{at:.0f} of {seconds:g} s: {said}", err=True)

        def end() -> None:
            """A line needs no ending."""

    async def look_again() -> None:
        while True:
            await asyncio.sleep(every_s)
            look()

    looking = asyncio.get_running_loop().create_task(look_again())
    try:
        yield
    finally:
        looking.cancel()
        end()


def milliseconds(seconds: float) -> str:
    """Three figures: `0.84 ms`, `12.3 ms`, `1,234 ms`."""
    return f"{number_ms(seconds)} ms"


def number_ms(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _show(run: _Run, endpoint: str, as_json: bool) -> None:
    if as_json:
        write_json(run.told())
    else:
        stdout_console().print(page(run.told(), endpoint))


def page(told: dict[str, Any], endpoint: str) -> RenderableType:
    """What people read of a run. `told` is what `--json` prints."""
    from rich.console import Group
    from rich.text import Text

    from forge_cli.tables import plain_table

    rates = f"{told['achieved_rate']:,.1f} calls/s of {told['asked_rate']:,.1f} asked for"
    arrivals = "uniform arrivals" if told["arrivals"] == "uniform" else f"Poisson arrivals of seed {told['seed']}"
    over = f" over {told['sessions']:,} sessions" if told["sessions"] else ""
    parts: list[RenderableType] = [
        Text(f"{endpoint}: {told['sent']:,} calls in {told['seconds']:.1f} s, {arrivals}{over}", "bold"),
        Text(rates, "" if told["kept_up"] else "yellow"),
        Text(
            f"{told['succeeded']:,} succeeded, {told['failed']:,} failed ({told['timeouts']:,} by timeout), "
            f"{told['outstanding_at_end']:,} outstanding when the last was sent, {told['unanswered']:,} never answered"
        ),
    ]
    if told["latency_s"]:
        table = plain_table("LATENCY", *(f"#{name}" for name in told["latency_s"]))
        for title, figures in (("ms from when due", told["latency_s"]), ("ms sent late", told["sent_late_s"])):
            table.add_row(title, *(number_ms(seconds) for seconds in figures.values()))
        parts += [Text(), table]
        if told["spread"] is not None:
            parts.append(Text(f"spread of the latencies, standard deviation over mean: {told['spread']:.2f}", "dim"))
    if told["errors"]:
        table = plain_table("ERROR", "#CALLS", "~THE FIRST SAID")
        for name, count in told["errors"].items():
            table.add_row(name, f"{count:,}", told["examples"][name].partition("\n")[0])
        parts += [Text(), table]
    if not told["kept_up"]:
        late = told["sent_late_s"]
        parts += [
            Text(),
            Text(
                f"this generator could not keep up: one call in a hundred was sent {milliseconds(late['p99'])} late or more, the "
                f"latest {milliseconds(late['max'])}. The latencies contain that and say nothing of the service alone; ask for a "
                "lower rate, run several `forge load` side by side, or run it on another machine",
                "yellow",
            ),
        ]
    return Group(*parts)
