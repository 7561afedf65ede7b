"""`forge status`, `forge workers`, `forge explain`: commands that look and change nothing. How it looks is in `tables`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from forge_cli.conversation import converse
from forge_cli.options import broker_option
from forge_cli.terminal import stdout_console, write_json

if TYPE_CHECKING:
    from forge_client.client import Client

REFRESH_S: Final = 1.0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The broker's own answer.")
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl-C.")
@click.option("--verbose", "-v", is_flag=True, help="Last errors in full, and all that a recovering broker misses.")
@broker_option
def status(as_json: bool, watch: bool, verbose: bool, broker: str) -> None:
    """Show services, replicas, queues, sessions and workers.

    Below the tables stands why a replica is pending, what its last error was (exit code or signal, and the last lines of its stderr),
    and which workers are lost.

    \b
    Examples:
      forge status
      forge status --watch
      forge status --verbose
      forge status --json | jq '.services[].queues'
    """
    if watch:
        try:
            converse(broker, lambda client: _watch(client, broker, as_json, verbose))
        except KeyboardInterrupt:
            return  # that is how one stops watching
    answer = converse(broker, lambda client: client.control("status", {}))
    if as_json:
        write_json(answer)
    else:
        _print(answer, broker, verbose)


@click.command(short_help="Show worker processes: where they are and what they run.")
@click.option("--json", "as_json", is_flag=True, help="The broker's own answer.")
@broker_option
def workers(as_json: bool, broker: str) -> None:
    """Show worker processes: where they are, what they run, how they feel.

    \b
    Examples:
      forge workers
      forge workers --json --broker tcp://head:5555
    """
    answer = converse(broker, lambda client: client.control("workers", {}))
    if as_json:
        write_json(answer)
        return
    from forge_cli.tables import worker_table

    stdout_console().print(worker_table(answer["workers"], wide=True))


@click.command(short_help="Tell what happened to a request, a session, a replica, a worker.")
@click.argument("subject", metavar="REQUEST|SESSION|REPLICA|WORKER")
@broker_option
def explain(subject: str, broker: str) -> None:
    """Tell what happened to a request, a session, a replica or a worker, and how it is now.

    Of what is ordinary and over the broker keeps nothing, and says so.

    \b
    Examples:
      forge explain gen/0                 a replica
      forge explain 1a2b3c-17             a request: current_request() inside an endpoint, or `forge dead list`
      forge explain w-6f0e2d1c8b7a4953    a worker, as `forge workers` names it
    """
    answer = converse(broker, lambda client: client.control("explain", {"subject": subject}))
    for line in answer["story"]:
        click.echo(line)


def _print(answer: dict[str, Any], address: str, verbose: bool) -> None:
    from forge_cli.tables import status_page

    stdout_console().print(status_page(answer, address, verbose=verbose))


async def _watch(client: Client, address: str, as_json: bool, verbose: bool) -> None:
    """Until it is cancelled. Raises BrokerLost when the broker is gone for good."""
    import asyncio

    if as_json or not sys.stdout.isatty():
        while True:
            answer = await client.control("status", {})
            if as_json:
                write_json(answer, indent=None)
            else:
                _print(answer, address, verbose)
                click.echo()
            await asyncio.sleep(REFRESH_S)
    await _watch_on_screen(client, address, verbose)


async def _watch_on_screen(client: Client, address: str, verbose: bool) -> None:
    import asyncio
    from functools import partial

    from rich.live import Live

    from forge_cli.tables import duration, status_page

    loop = asyncio.get_running_loop()
    page = partial(status_page, address=address, verbose=verbose)
    answer = await client.control("status", {})
    with Live(page(answer), console=stdout_console(), screen=True, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(REFRESH_S)
            asked_at = loop.time()
            asking = asyncio.ensure_future(client.control("status", {}))
            while not (await asyncio.wait({asking}, timeout=REFRESH_S))[0]:
                # The last page stays, with its age: what was true before a broker fell silent is what one wants to see.
                note = f"no answer from the broker for {duration(loop.time() - asked_at)}"
                live.update(page(answer, note=note), refresh=True)
            answer = asking.result()
            live.update(page(answer), refresh=True)
