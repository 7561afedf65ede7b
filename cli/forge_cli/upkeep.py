"""`forge drain` and `forge restart`: taking workers and replicas out of use while calls go on, and putting new ones in their place.

What draining means is the broker's business (design F9, X2). Here a target is found by what people type, and the wait is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from forge_cli.conversation import converse
from forge_cli.exits import Misused
from forge_cli.options import broker_option

if TYPE_CHECKING:
    from forge_client.client import Client


@click.command(short_help="Take a worker or a replica out of use without losing a call.")
@click.argument("target", metavar="WORKER|REPLICA")
@broker_option
def drain(target: str, broker: str) -> None:
    """Take a worker or a replica out of use without losing a call, and wait until it is gone.

    It gets nothing new. Running calls finish (up to the broker's --drain-grace-s), queued ones go elsewhere, sessions move with their
    state. The replica of a drained worker starts anew in another worker; a drained replica is taken out of its service
    (not the last one: that is `forge stop`).
    The beginning of a worker's name is enough where no other begins so. Ctrl-C ends the waiting, not the draining.

    \b
    Examples:
      forge drain w-6f0e2d1c8b7a4953    a worker, as `forge workers` names it
      forge drain w-6f                  the same, if it is the only one
      forge drain gen/1                 a replica
    """
    drained = converse(broker, lambda client: _drain(client, target), waiting=f"draining {target}")
    service, slash, _ = drained.rpartition("/")
    click.echo(f"{drained} is drained and taken out of {service}" if slash else f"{drained} is drained and gone")


@click.command(short_help="Replace a service's replicas one by one, under load.")
@click.argument("service")
@broker_option
def restart(service: str, broker: str) -> None:
    """Replace a service's replicas one by one: each is drained, started anew and healthy before the next one leaves, so no call fails.

    Returns when all are replaced; fails when one does not come back, and leaves the others as they are. Ctrl-C ends the waiting, not
    the restart.

    \b
    Examples:
      forge restart gen
      forge restart gen --broker tcp://head:5555
    """
    answer = converse(
        broker, lambda client: client.control("restart", {"service": service}), waiting=f"restarting {service}"
    )
    click.echo(f"{service}: {_replaced(answer['restarted'])}")


def find_worker(typed: str, names: Sequence[str]) -> str:
    """The one worker whose name is or begins with what was typed. Raises Misused when there is none, or are several."""
    from forge_contract.errors import did_you_mean

    found = [name for name in names if name == typed] or [name for name in names if name.startswith(typed)]
    if len(found) == 1:
        return found[0]
    if found:
        few = ", ".join(sorted(found)[:5]) + (" …" if len(found) > 5 else "")
        raise Misused(f"{typed!r} may be any of {len(found)} workers: {few}; type more of its name")
    hint = did_you_mean(typed, names) or "`forge workers` lists them; a replica is written gen/0"
    raise Misused(f"no worker's name begins with {typed!r}; {hint}")


async def _drain(client: Client, typed: str) -> str:
    """The target's whole name, when it is gone."""
    target = typed
    if "/" not in typed:
        workers = (await client.control("workers", {}))["workers"]
        target = find_worker(typed, [worker["name"] for worker in workers])
    await client.control("drain", {"target": target})
    return target


def _replaced(replicas: Sequence[int]) -> str:
    if not replicas:
        return "there was no replica to replace"
    listed = ", ".join(str(idx) for idx in replicas)
    return f"replica {listed} was replaced" if len(replicas) == 1 else f"replicas {listed} were replaced"
