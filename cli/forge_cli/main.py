"""The `forge` command: one group of commands, and what an error becomes on the way out.

Each command lives with its like: `broker`, `worker`, `look` (status, workers, explain), `services` (deploy, call, stop), `upkeep`
(drain, restart), `scaling` (scale, why-scale), `load`, `simulate`, `dead`, `doctor`. None of these modules imports the broker, the
worker, the client or rich before one of its commands runs: `forge --help` has to be there at once. Commands raise the library's errors as
they come; here, and only here, they are turned into a text and an exit code.
"""

from __future__ import annotations

from typing import Any

import click

from forge_cli import broker, dead, doctor, load, look, scaling, services, simulate, upkeep, worker
from forge_cli.exits import EXIT_INTERRUPTED, failure_of

EPILOG = """\b
To begin with:
  forge broker start                      in one terminal
  forge deploy module:Class --name gen    in another one
  forge call gen.predict '{"x": 1}'
  forge status --watch

\b
Exit codes:
    0  done
    1  it failed: the error's type and text are on stderr
    2  wrong options, arguments or configuration; address in use
   69  no broker answers, or it went away
  130  interrupted by Ctrl-C

Settings come from the option, else from the FORGE_* variable, else from the TOML file that FORGE_CONFIG names
(~/.config/forge/forge.toml): table [broker] for `broker start`, [client] for the others.
"""


class Forge(click.Group):
    """Where errors of all commands come by."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
            raise failure from error


@click.group(
    cls=Forge, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="forge-broker", prog_name="forge")
def main() -> None:
    """Actor classes as services: replicas in worker processes behind one broker."""


for command in (
    broker.broker,
    worker.worker,
    services.deploy,
    services.call,
    services.stop,
    look.status,
    look.workers,
    look.explain,
    upkeep.drain,
    upkeep.restart,
    scaling.scale,
    scaling.why_scale,
    load.load,
    simulate.simulate,
    dead.dead,
    doctor.doctor,
):
    main.add_command(command)
