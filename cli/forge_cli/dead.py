"""`forge dead list | show | retry | drop`: calls that the broker gave up because they kept killing their replicas (design F4).

Arguments are never read here: `retry` sends the bytes that the broker kept. The broker stamps every call with the trust of the
address it comes in by, so what came without trust must not be sent again over an address that has it: a worker would unpickle
what a stranger wrote.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from forge_cli.conversation import converse
from forge_cli.exits import Failure
from forge_cli.options import broker_option
from forge_cli.services import import_from_here, plain
from forge_cli.terminal import stdout_console, write_json

if TYPE_CHECKING:
    from forge_client.binding import Target
    from forge_client.client import Client


@click.group(short_help="Calls that were given up because they kept killing their replicas.")
def dead() -> None:
    """Calls that were given up because they kept killing their replicas.

    The broker keeps their arguments and their story, until it ends or has no room for more (dead_letters, dead_letter_bytes).
    """


@dead.command("list", short_help="Show the dead letters, newest first.")
@click.option("--json", "as_json", is_flag=True, help="The broker's own answer.")
@broker_option
def list_(as_json: bool, broker: str) -> None:
    """Show the dead letters, newest first.

    \b
    Examples:
      forge dead list
      forge dead list --json | jq '.dead[].id'
    """
    answer = converse(broker, lambda client: client.control("dead_list", {}))
    if as_json:
        write_json(answer)
        return
    from forge_cli.tables import dead_table

    stdout_console().print(dead_table(answer["dead"]))


@dead.command()
@click.argument("letter", metavar="ID")
@broker_option
def show(letter: str, broker: str) -> None:
    """Tell the story of one dead letter: where it ran and how each of its replicas died.

    \b
    Example:
      forge dead show 1a2b3c-17
    """
    answer = converse(broker, lambda client: client.control("dead_show", {"id": letter}))
    from forge_cli.tables import dead_page

    stdout_console().print(dead_page(answer))


@dead.command()
@click.argument("letter", metavar="ID")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="For the whole call, waiting included. [default: the endpoint's own]",
)
@broker_option
def retry(letter: str, timeout: float | None, broker: str) -> None:
    """Call it again, with the same arguments, and print what it returns, as `forge call` does.

    The letter is dropped if the call succeeds, and kept otherwise. Mend the service first, and deploy it again under its name: a call
    that kills its replica does so again. What an untrusted address sent is sent again over an untrusted one only.

    \b
    Examples:
      forge dead retry 1a2b3c-17
      forge dead retry 1a2b3c-17 --timeout 60 --broker tcp://127.0.0.1:5555
    """
    import_from_here()  # a result may be of a class that is defined here
    result = converse(broker, lambda client: _retry(client, letter, timeout), waiting=f"calling {letter} again")
    write_json(plain(result))
    click.echo(f"{letter} succeeded and is no dead letter any more", err=True)


@dead.command()
@click.argument("letters", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All there are.")
@broker_option
def drop(letters: tuple[str, ...], everything: bool, broker: str) -> None:
    """Forget dead letters, and the arguments kept with them.

    \b
    Examples:
      forge dead drop 1a2b3c-17 1a2b3c-18
      forge dead drop --all
    """
    if bool(letters) == everything:
        raise click.UsageError("name the dead letters to drop (`forge dead list` shows them), or say --all")
    dropped, unknown = converse(broker, lambda client: _drop(client, letters))
    click.echo(f"{dropped:,} dead letter{'' if dropped == 1 else 's'} dropped")
    if unknown:
        raise Failure(f"no dead letter {', '.join(unknown)}; `forge dead list` shows those there are")


async def _drop(client: Client, letters: tuple[str, ...]) -> tuple[int, list[str]]:
    """How many were dropped, and which were not there. No letters: all."""
    from forge_client import BadCall

    if not letters:
        return int((await client.control("dead_drop", {"id": None}))["dropped"]), []
    dropped = 0
    unknown = []
    for letter in dict.fromkeys(letters):
        try:
            dropped += int((await client.control("dead_drop", {"id": letter}))["dropped"])
        except BadCall:
            unknown.append(letter)
    return dropped, unknown


async def _retry(client: Client, letter: str, timeout_s: float | None) -> Any:
    """The value of the call. Raises what the call raises, and Failure for a letter that cannot be sent from here."""
    taken = await client.control("dead_take", {"id": letter})
    if client.trusted and taken["trusted"] is not True:
        raise Failure(
            f"{letter} came in by an address without trust, and {client.address} would lend it yours; send it again the way it "
            f"came: forge dead retry {letter} --broker tcp://HOST:PORT"
        )
    description = await client.control("find", {"name": taken["service"]})
    binding = client.bind(description)
    target = next((one for one in binding.targets.values() if one.id == taken["endpoint"]), None)
    if target is None:
        raise Failure(f"{letter} is still a dead letter: {binding.name} was deployed anew this moment; try again")
    try:
        value = await _send(client, target, taken["payload"], timeout_s, mesh=description["kind"] == "actor")
    except Exception as error:
        error.add_note(f"{letter} is still a dead letter")
        raise
    await client.control("dead_drop", {"id": letter})
    return value


async def _send(client: Client, target: Target, payload: Any, timeout_s: float | None, *, mesh: bool) -> Any:
    """An ordinary call, but for its arguments, which are encoded already. An exception is raised even where the service says
    errors="return": what is returned counts as success."""
    from forge_client.outgoing import Extras
    from forge_client.replies import MeshReader, Reader

    binding = target.binding
    reader = (MeshReader if mesh else Reader)(target.label, return_first=binding.return_first, sizes=binding.sizes)
    call = client.new_call()
    within_s = target.timeout if timeout_s is None else timeout_s
    deadline = None if within_s is None else time.monotonic() + within_s
    extras = None if deadline is None else Extras(deadline=deadline)
    seq = client.link.submit(target.id, client.own(payload, target.label), (call, reader), extras)
    if deadline is not None and within_s is not None:
        client.guard(seq, deadline, within_s)
    client.touch()
    return await call
