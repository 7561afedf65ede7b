"""`forge broker start`: settings from options, environment and file; then `forge_broker` runs until it is told to end.
`forge broker stop` tells it so from elsewhere, and knows by the kernel when it is gone.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from forge_cli.conversation import converse, process_behind, somebody_listens
from forge_cli.exits import Failure
from forge_cli.options import broker_option

if TYPE_CHECKING:
    from forge_client.client import Client
    from forge_contract.config import BrokerConfig

LOOK_AGAIN_S: Final = 0.1  # between two looks at a broker of which the kernel cannot tell us


@click.group()
def broker() -> None:
    """Run a broker, and end it."""


@broker.command()
@click.option(
    "--bind",
    multiple=True,
    metavar="ADDRESS",
    help="Listen here, too: tcp://127.0.0.1:5555. An ipc:// address takes the place of your own private one. May be repeated.",
)
@click.option(
    "--insecure", is_flag=True, default=None, help="Allow binds beyond this machine, although nothing is encrypted."
)
@click.option(
    "--http",
    metavar="HOST:PORT",
    help="Serve /metrics for Prometheus, /healthz, /readyz and /api/status here: 127.0.0.1:8266. [default: nowhere]",
)
@click.option("--log-dir", metavar="DIR", help="Where workers' output goes. [default: `logs` in the private directory]")
@click.option("--max-workers", type=int, metavar="N", help="Worker processes it may start at once. [default: 64]")
@click.option("--gpus", metavar="N|LIST|none", help="GPUs to hand out: 2, or 0,3. [default: those found]")
@click.option(
    "--heartbeat-s", type=float, metavar="SECONDS", help="Between two signs of life of a peer. [default: 0.5]"
)
@click.option(
    "--liveness", type=int, metavar="N", help="Missed heartbeats that mean death, on other hosts. [default: 10]"
)
@click.option(
    "--orphan-grace-s",
    type=float,
    metavar="SECONDS",
    help="How long workers and clients wait for a broker that is gone. [default: 10]",
)
@click.option(
    "--recovery-s",
    type=float,
    metavar="SECONDS",
    help="How long it waits for what workers and clients hold, after a broker that was killed. [default: 3]",
)
@click.option(
    "--drain-grace-s", type=float, metavar="SECONDS", help="For running calls, when something is drained. [default: 30]"
)
@click.option(
    "--config", type=click.Path(path_type=Path), metavar="FILE", help="TOML, table [broker]. [default: FORGE_CONFIG]"
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    envvar="FORGE_LOG_LEVEL",
    default="info",
    show_default=True,
    help="Of the lines on stderr; JSON when that is no terminal.",
)
def start(config: Path | None, log_level: str, **options: Any) -> None:
    """Run a broker until Ctrl-C or SIGTERM, which ends what it runs, too.

    The first one drains: running calls finish (up to --drain-grace-s), nothing new is taken. The second one ends it at once.

    It listens on your own private ipc address, where `forge` and `connect()` look for it, and on what --bind adds. Every setting is
    also a variable (FORGE_MAX_WORKERS=8) and a line of the TOML file's table [broker] (max_workers = 8); the option wins, then the
    variable.

    \b
    Examples:
      forge broker start
      forge broker start --bind tcp://127.0.0.1:5555 --gpus 2
      forge broker start --http 127.0.0.1:8266
      FORGE_MAX_WORKERS=8 forge broker start --config cluster.toml
      forge broker start --gpus none 2> broker.jsonl
    """
    from forge_broker.shell.serve import serve

    settled = settle(options, os.environ, config)
    serve(settled, lambda addresses: _welcome(settled, addresses), log_level=log_level)


@broker.command(short_help="Let the broker finish what runs, and end it.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for its end. It goes on draining after that.",
)
@broker_option
def stop(timeout_s: float, broker: str) -> None:
    """Drain a broker and everything it runs, and wait until it is gone.

    The same as Ctrl-C where it runs: calls that run finish, everything else is told that the broker is stopping. When this returns
    with 0, another one can be started at its address.

    \b
    Examples:
      forge broker stop
      forge broker stop --timeout 300 --broker tcp://head:5555
    """
    converse(broker, lambda client: _stop(client, broker, timeout_s), waiting="waiting for the broker to end")
    click.echo(f"the broker at {broker} is gone")


async def _stop(client: Client, address: str, timeout_s: float) -> None:
    import asyncio

    from forge_client import BrokerLost

    pid = process_behind(address)
    gone = asyncio.ensure_future(_until_gone(address, pid))
    try:
        async with asyncio.timeout(timeout_s):
            asking = client.control_soon("terminate", {})
            either: set[asyncio.Future[Any]] = {asking, gone}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            # It may be gone before we have read that it will be.
            if asking.done() and not isinstance(asking.exception(), BrokerLost):
                asking.result()
            await gone
    except TimeoutError:
        where = f"pid {pid}" if pid is not None else "the terminal or service manager it runs in"
        raise Failure(
            f"the broker at {address} is still draining after {timeout_s:g} s, and goes on; `forge status` shows what it waits for. "
            f"To end it now, press Ctrl-C twice where it runs, or send SIGTERM twice ({where})"
        ) from None
    finally:
        gone.cancel()


async def _until_gone(address: str, pid: int | None) -> None:
    """When the process has ended, on this machine; elsewhere, when nobody listens at its address any more."""
    import asyncio

    try:
        descriptor = os.pidfd_open(pid) if pid is not None and hasattr(os, "pidfd_open") else None
    except ProcessLookupError:
        return
    if descriptor is None:
        while await asyncio.to_thread(somebody_listens, address):  # noqa: ASYNC110 - no event tells of another machine
            await asyncio.sleep(LOOK_AGAIN_S)
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def settle(options: dict[str, Any], environ: Mapping[str, str], file: Path | None) -> BrokerConfig:
    """Option, then variable, then file; the GPUs of this machine unless one of them names some, and the private address unless one
    of them names another ipc address. Raises ConfigError with every problem."""
    from forge_broker.shell.settings import load, read_table, slots
    from forge_client.gpus import find_gpus
    from forge_contract.addresses import default_address

    said = {**options, "bind": options.get("bind") or None}
    if said.get("gpus") is not None:
        said["gpus"] = slots(said["gpus"])
    elif not environ.get("FORGE_GPUS") and "gpus" not in read_table("broker", file, environ):
        said["gpus"] = find_gpus(environ)
    config = load(said, environ, file)
    if not any(address.startswith("ipc://") for address in config.bind):
        # FORGE_BROKER says where others look for a broker, not where we listen.
        own = default_address({**environ, "FORGE_BROKER": ""}, os.getuid())
        config = dataclasses.replace(config, bind=(own, *config.bind))
    return config


def _welcome(config: BrokerConfig, addresses: list[str]) -> None:
    """What to type next, for who reads a terminal. Programs read the log line `listening`."""
    if not sys.stdout.isatty():
        return
    from forge_contract.addresses import default_address

    own = addresses[0] == default_address(os.environ, os.getuid())
    at = "" if own else f" --broker {addresses[0]}"
    lines = ["", "Forge broker listens on", *(f"  {address}" for address in addresses), "", "In another terminal:"]
    lines += [
        f"  forge deploy module:Class --name gen --replicas 2{at}",
        f"  forge call gen.predict '{{\"x\": 1}}'{at}",
        f"  forge status --watch{at}",
    ]
    lines += [f"  forge worker --gpu none --broker {address}" for address in addresses if address.startswith("tcp://")]
    if config.http is not None:
        lines.append(f"  curl http://{config.http}/metrics")
    lines += [
        "",
        f"Workers' output is in {config.log_dir}. Ctrl-C ends the broker and all it runs; a second one does not wait.",
        "",
    ]
    click.echo("\n".join(lines))
