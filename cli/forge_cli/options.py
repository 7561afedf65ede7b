"""What several commands take: `--broker`, and KEY=VALUE pairs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def broker_option(command: Command) -> Command:
    """`--broker ADDRESS`; the command gets it as `broker`, resolved and checked."""
    return click.option(
        "--broker",
        metavar="ADDRESS",
        callback=_resolve,
        help="ipc:///path or tcp://host:port. [default: FORGE_BROKER, else `broker` in the configuration file's table "
        "[client], else your own private ipc address]",
    )(command)


def _resolve(context: click.Context, option: click.Parameter, value: str | None) -> str:
    return resolve_broker(value)[0]


def resolve_broker(option: str | None) -> tuple[str, str]:
    """The address of the broker to talk to, and where it came from. Raises ConfigError when it is none."""
    from forge_broker.shell.settings import read_table
    from forge_contract.addresses import check_address, default_address
    from forge_contract.errors import ConfigError

    variable = os.environ.get("FORGE_BROKER")
    if option:
        address, source = option, "--broker"
    elif variable:
        address, source = variable, "FORGE_BROKER"
    else:
        table = read_table("client", None, os.environ)
        unknown = sorted(table.keys() - {"broker"})
        if unknown or not isinstance(table.get("broker", ""), str):
            raise ConfigError(
                where="[client]", message=f"takes `broker`, an address in quotes, and nothing else: {table!r:.200}"
            )
        address, source = table.get("broker", ""), "the configuration file"
    if not address:
        return default_address(os.environ, os.getuid()), "the default"
    check_address(address, source)
    return address, source


def read_value(text: str) -> Any:
    """JSON where it is JSON, else the text itself: `2`, `true`, `[1, 2]`, `weights.pt`."""
    import json

    try:
        return json.loads(text)
    except ValueError:
        return text


def split_pairs(pairs: Iterable[str], option: str) -> dict[str, str]:
    """`k=v` texts as a dict. Raises click.BadParameter for what has no key, or the same key twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise click.BadParameter(f"{pair!r} is no KEY=VALUE", param_hint=option)
        if key in found:
            raise click.BadParameter(f"{key!r} is given twice", param_hint=option)
        found[key] = value
    return found
