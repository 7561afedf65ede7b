"""What several commands take: `--broker`, KEY=VALUE pairs, durations and rates."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|min|m|h)")


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers alone, and only since click 8.2
    """`500ms`, `30s`, `5m`, `1h30m`; a number alone is seconds. The command gets seconds."""

    name = "duration"

    def __init__(self, *, least_s: float = 0.0, most_s: float = math.inf, zero: bool = False) -> None:
        self._least_s = least_s
        self._most_s = most_s
        self._zero = zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        seconds = read_seconds(value)
        if seconds is None:
            self.fail(f"{value!r} is no duration, such as 500ms, 30s, 5m or 1h30m", param, ctx)
        if seconds == 0 and self._zero:
            return 0.0
        if seconds <= 0 or not self._least_s <= seconds <= self._most_s:
            least = f"{self._least_s:g} s" if self._least_s else "more than nothing"
            most = f", at most {self._most_s:g} s" if math.isfinite(self._most_s) else ""
            self.fail(f"{value!r} is out of range: at least {least}{most}", param, ctx)
        return seconds


class Rate(click.ParamType):  # type: ignore[type-arg]  # as above
    """Calls a second."""

    name = "rate"

    def __init__(self, *, most: float) -> None:
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            rate = float(value)
        except ValueError:
            self.fail(f"{value!r} is no number of calls a second, such as 500 or 0.5", param, ctx)
        if not 0 < rate <= self._most:
            self.fail(f"{value!r} is no rate: above 0 and at most {self._most:,.0f} calls a second", param, ctx)
        return rate


def read_seconds(text: str) -> float | None:
    """None for what is no duration."""
    bare = text.strip().lower()
    try:
        seconds = float(bare)
    except ValueError:
        parts = _PART.findall(bare)
        if not parts or re.sub(r"\s", "", bare) != "".join(number + unit for number, unit in parts):
            return None
        return math.fsum(float(number) * _UNITS_S[unit] for number, unit in parts)
    return seconds if math.isfinite(seconds) else None


def broker_option(command: Command) -> Command:
    """`--broker ADDRESS`; the command gets it as `broker`, resolved and checked."""
    return click.option(
        "--broker",
        metavar="ADDRESS",
        callback=_resolve,
        help="ipc:///path or tcp://host:port. [default: FORGE_BROKER, else `broker` in the configuration file's table "
        "[client], else your own private ipc address]",
    )(command)


def service_options(command: Command) -> Command:
    """`--option KEY=VALUE`, as often as wanted; the command gets the texts as `options`."""
    return click.option(
        "--option",
        "options",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any other option of ServiceConfig. May be repeated.",
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
