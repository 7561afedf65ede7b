"""`forge simulate`: what would these settings do? The world is `forge_broker.simulator`; here a class and a command line become one."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from forge_cli.exits import Misused
from forge_cli.options import Duration, Rate, read_seconds, service_options
from forge_cli.services import load_class, read_options
from forge_cli.terminal import stdout_console, write_json

if TYPE_CHECKING:
    from forge_broker.simulator.setup import Setup
    from forge_broker.simulator.traces import Trace
    from forge_client.actor import ForgeActor

DEFAULT_RATE: Final = 100.0  # calls/s
DEFAULT_S: Final = 3600.0
PEAK: Final = 4  # times the rate, where --peak is not given
MOST_CALLS_S: Final = 1e6
MOST_S: Final = 31 * 86_400.0
MOST_SESSIONS: Final = 100_000
MOST_CALLS: Final = 10_000_000  # some minutes and half a gigabyte; beyond that somebody slipped


@click.command(short_help="Run a service's settings against a load in virtual time, and show what they would do.")
@click.argument("target", metavar="MODULE:CLASS")
@click.option(
    "--trace",
    metavar="SHAPE|FILE",
    required=True,
    help="constant, step, spike, diurnal, or a file of `seconds,rate` lines.",
)
@click.option("--rate", type=Rate(most=MOST_CALLS_S), metavar="CALLS/S", help=f"[default: {DEFAULT_RATE:g}]")
@click.option(
    "--peak", type=Rate(most=MOST_CALLS_S), metavar="CALLS/S", help=f"Of a shape. [default: {PEAK} times --rate]"
)
@click.option(
    "--for", "seconds", type=Duration(most_s=MOST_S), metavar="DURATION", help="[default: 1h, or all of the file]"
)
@click.option("--endpoint", metavar="NAME", help="Which is called. [default: the only one]")
@click.option(
    "--service-time",
    "mean_s",
    type=Duration(),
    default="20ms",
    show_default=True,
    metavar="DURATION",
    help="Of one call.",
)
@click.option(
    "--spread",
    type=click.FloatRange(0, 100),
    default=0.5,
    show_default=True,
    metavar="RATIO",
    help="Standard deviation of a call's or a batch's time, over its mean (lognormal).",
)
@click.option("--batch-time", metavar="BASE+ITEM", help="Of one run with a list: 20ms+2ms is 20 ms and 2 ms a call.")
@click.option(
    "--start-time",
    "start_s",
    type=Duration(zero=True),
    default="5s",
    show_default=True,
    metavar="DURATION",
    help="From the decision until a new replica is ready.",
)
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    metavar="N",
    help="Calls a replica really runs at once. [default: threads= of a plain def, else all it is given]",
)
@click.option(
    "--sessions",
    type=click.IntRange(0, MOST_SESSIONS),
    default=0,
    metavar="N",
    help="Spread the calls over N sessions.",
)
@click.option("--timeout", type=Duration(), metavar="DURATION", help="Of each call. [default: the endpoint's own]")
@click.option("--replicas", type=int, metavar="N", help="At the start. [default: the class's own, or 1]")
@service_options
@click.option(
    "--price", type=click.FloatRange(min=0), metavar="PRICE", help="Of a replica for an hour: shows what it costs."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Another seed, other arrivals.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw load, replicas, queue, latency.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object, with all samples and scale events; times in seconds."
)
def simulate(
    target: str,
    trace: str,
    rate: float | None,
    peak: float | None,
    seconds: float | None,
    endpoint: str | None,
    mean_s: float,
    spread: float,
    batch_time: str | None,
    start_s: float,
    parallel: int | None,
    sessions: int,
    timeout: float | None,
    replicas: int | None,
    options: tuple[str, ...],
    price: float | None,
    seed: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Run a service's settings against a load in virtual time, and show what they would do: replicas, queues, latencies, cost.

    The broker's own core routes, batches and scales; callers, and what a call takes, are a model. The class is imported for its
    options, and nothing of it runs; no broker is needed. Step and spike go from --rate to --peak and back, diurnal is one day from
    --rate to --peak and back, however long --for is. A file has lines of `seconds,rate`, or of the moments at which calls came.

    \b
    Examples:
      forge simulate app:Generator --trace step --rate 20 --peak 200 --service-time 50ms
      forge simulate app:Generator --trace diurnal --rate 2 --peak 20 --for 24h --price 2.5 --plot day.png
      forge simulate app:Embed --trace spike --batch-time 20ms+2ms --option max_replicas=8
      forge simulate app:Generator --trace yesterday.csv --start-time 40s --option 'autoscaling={"scale_up_cooldown": 10}'
    """
    from forge_broker.simulator.figures import Figures
    from forge_broker.simulator.world import simulate as run

    if plot is not None:
        from forge_cli.plots import check_plot

        check_plot(plot)
    chosen = read_options(options, num_replicas=replicas)
    cls = load_class(target).options(**chosen)
    calls = _trace(trace, rate, peak, seconds)
    setup = _setup(
        cls,
        endpoint,
        calls,
        mean_s,
        spread,
        batch_time,
        start_s,
        parallel,
        sessions=sessions,
        timeout_s=timeout,
        seed=seed,
    )
    with _saying(f"simulating {calls.seconds:,.0f} s of {setup.endpoint}"):
        figures: Figures = run(setup)
    told = {
        "class": target,
        "endpoint": setup.endpoint,
        "trace": calls.name,
        "seconds": calls.seconds,
        "seed": seed,
        **figures.told(price),
    }
    if plot is not None:
        from forge_cli.plots import draw

        draw(told, plot)
    if as_json:
        write_json(told)
        return
    from forge_cli.simulation_page import page

    stdout_console().print(page(told))
    if plot is not None:
        click.echo(f"drawn: {plot}")


def _trace(text: str, rate: float | None, peak: float | None, seconds: float | None) -> Trace:
    from forge_broker.simulator.traces import SHAPES, read_csv, trace_of

    path = Path(text)
    if text not in SHAPES and path.is_file():
        if rate is not None or peak is not None:
            raise Misused(f"--rate and --peak are of shapes ({', '.join(SHAPES)}); {text} has rates of its own")
        found = read_csv(path, seconds)
    else:
        low = DEFAULT_RATE if rate is None else rate
        found = trace_of(text, low, PEAK * low if peak is None else peak, DEFAULT_S if seconds is None else seconds)
    expected = found.expected
    if expected > MOST_CALLS:
        raise Misused(f"{expected:,.0f} calls are too many to simulate (at most {MOST_CALLS:,}): shorten it with --for")
    return found


def _setup(
    cls: type[ForgeActor],
    endpoint: str | None,
    trace: Trace,
    mean_s: float,
    spread: float,
    batch_time: str | None,
    start_s: float,
    parallel: int | None,
    **rest: Any,
) -> Setup:
    """Raises Misused for what does not fit the class."""
    from forge_broker.shell.serve import load_named
    from forge_broker.simulator.model import ServiceModel
    from forge_broker.simulator.setup import Setup
    from forge_client.actor import endpoints_of, service_config
    from forge_client.spec import describe
    from forge_contract.errors import UnknownEndpoint

    known = endpoints_of(cls)
    if endpoint is None:
        if len(known) != 1:
            raise Misused(f"{cls.__name__} has {len(known)} endpoints ({', '.join(known)}): say which by --endpoint")
        (endpoint,) = known
    if endpoint not in known:
        raise UnknownEndpoint(name=endpoint, owner=cls.__name__, known=list(known))
    method, its = known[endpoint]
    in_calls = its.batch_mode == "call"
    if in_calls and batch_time is None:
        raise Misused(
            f"{endpoint} runs once for a batch (batch_mode='call'): say by --batch-time how long, such as 20ms+2ms"
        )
    if not in_calls and batch_time is not None:
        raise Misused(
            f"--batch-time is of endpoints with batch_mode='call'; {endpoint} runs once for each call: --service-time"
        )
    base_s, item_s = _batch_time(batch_time)
    is_async = inspect.iscoroutinefunction(method)
    model = ServiceModel(
        mean_s=mean_s,
        spread=spread,
        batch_base_s=base_s,
        batch_item_s=item_s,
        start_s=start_s,
        parallel=parallel or (None if is_async else its.threads),
    )
    if rest["timeout_s"] is None:
        rest["timeout_s"] = its.timeout
    spec = describe(cls, service_config(cls), "service", trusted=True)
    return Setup(
        spec=spec,
        endpoint=endpoint,
        trace=trace,
        model=model,
        interruptible=is_async,
        unpickle=_unpickle,
        load=load_named,
        **rest,
    )


def _batch_time(text: str | None) -> tuple[float | None, float]:
    """`20ms+2ms`. Raises click.BadParameter."""
    if text is None:
        return None, 0.0
    base, plus, item = text.partition("+")
    base_s, item_s = read_seconds(base), read_seconds(item) if plus else 0.0
    if base_s is None or item_s is None or base_s < 0 or item_s < 0:
        raise click.BadParameter(f"{text!r} is no BASE+ITEM, such as 20ms+2ms", param_hint="--batch-time")
    return base_s, item_s


def _unpickle(code: bytes) -> Any:
    """A router or policy of the user's own class, which came from this very process."""
    import cloudpickle

    return cloudpickle.loads(code)


@contextmanager
def _saying(text: str) -> Iterator[None]:
    """While it computes, which no loop could interrupt."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    from rich.console import Console

    with Console(stderr=True, markup=False, emoji=False, highlight=False).status(text):
        yield
