"""`forge worker`: the supervisor of `forge_worker`, with a command line for people."""

from __future__ import annotations

import sys

import click

from forge_cli.options import broker_option, split_pairs


@click.command(short_help="Offer this machine's GPUs and cores to a broker.")
@click.option("--gpu", default="none", metavar="0|0,1|none", show_default=True, help="The GPUs its actor will see.")
@broker_option
@click.option(
    "--label", "labels", multiple=True, metavar="KEY=VALUE", help="Shown by `forge workers`. May be repeated."
)
@click.pass_context
def worker(context: click.Context, gpu: str, broker: str, labels: tuple[str, ...]) -> None:
    """Offer this machine to a broker: one process, which serves one replica after another.

    A broker starts workers on its own machine by itself; this is for other machines, and for GPUs that you hand out yourself. It
    runs until Ctrl-C or SIGTERM: the first one drains (running calls finish, its replica starts anew elsewhere), the second one ends
    it at once. It also ends when it is drained by `forge drain`. Without a broker for 10 s it ends with exit code 69.

    \b
    Examples:
      forge worker --gpu 0
      forge worker --gpu 0,1 --broker tcp://head:5555 --label zone=a
      FORGE_BROKER=tcp://head:5555 forge worker --gpu none
    """
    from forge_worker.supervisor import supervise

    gpus = () if gpu.strip() in ("", "none") else tuple(name.strip() for name in gpu.split(","))
    pairs = split_pairs(labels, "--label")
    if sys.stdout.isatty():
        click.echo(
            f"offering {'GPU ' + ', '.join(gpus) if gpus else 'a worker without GPU'} to {broker}; Ctrl-C ends it"
        )
    code = supervise(broker, gpus, pairs)
    if code:
        context.exit(code)
