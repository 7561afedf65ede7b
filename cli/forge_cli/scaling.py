"""`forge scale` and `forge why-scale`: how many replicas a service has, by hand, and why it has them.

The policy and its figures are the broker's (design X1, X2); here they are asked for and printed.
"""

from __future__ import annotations

import click

from forge_cli.conversation import converse
from forge_cli.options import broker_option
from forge_cli.terminal import stdout_console, write_json


@click.command(short_help="Set how many replicas a service has.")
@click.argument("service")
@click.argument("replicas", type=click.IntRange(min=0), metavar="N")
@click.option("--wait", is_flag=True, help="Return when all are healthy and the others are gone.")
@broker_option
def scale(service: str, replicas: int, wait: bool, broker: str) -> None:
    """Set how many replicas a service has, within its min_replicas and max_replicas.

    Those that go finish their calls first, and their sessions move. A service that scales by itself goes on from there. Without --wait
    it returns when the broker has accepted it; `forge status` shows how far it is.

    \b
    Examples:
      forge scale gen 4
      forge scale gen 4 --wait
      forge scale gen 0          with autoscaling: the next call brings one back
    """
    fields = {"service": service, "replicas": replicas, "wait": wait}
    answer = converse(
        broker,
        lambda client: client.control("scale", fields),
        waiting=f"scaling {service} to {replicas}",
    )
    count = f"{replicas} replica{'' if replicas == 1 else 's'}"
    if wait:
        click.echo(f"{service}: {answer['healthy']} of {count} healthy")
    else:
        click.echo(
            f"{service}: {count}, as before"
            if answer["was"] == replicas
            else f"{service}: {count}, was {answer['was']}"
        )


@click.command("why-scale", short_help="Tell why a service has as many replicas as it has.")
@click.argument("service")
@click.option("--json", "as_json", is_flag=True, help="The broker's own answer.")
@broker_option
def why_scale(service: str, as_json: bool, broker: str) -> None:
    """Tell why a service has as many replicas as it has: the last decisions, also those not to change anything, the newest first.

    Equal decisions not to do anything stand in one line, with how many they are.

    \b
    Examples:
      forge why-scale gen
      forge why-scale gen --json | jq '.decisions[0].figures'
    """
    answer = converse(broker, lambda client: client.control("why_scale", {"service": service}))
    if as_json:
        write_json(answer)
        return
    from forge_cli.tables import decisions_page

    stdout_console().print(decisions_page(answer))
