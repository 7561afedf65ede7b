"""Where a broker's configuration comes from: an option of the command, then a `FORGE_*` variable, then a TOML file.

The value itself, and what is wrong with it, is `BrokerConfig`'s business.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge_contract.addresses import default_address, private_directory
from forge_contract.config import BrokerConfig
from forge_contract.errors import ConfigError


def load(options: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> BrokerConfig:
    """`options`: what was said on the command line (None: not said). `file`: a TOML file with a table [broker]; by default
    FORGE_CONFIG, or ~/.config/forge/forge.toml if there is one. Raises ConfigError with every problem."""
    settings: dict[str, Any] = {**read_table("broker", file, environ), **_from_environ(environ)}
    if options.get("embedded"):
        settings.pop("http", None)  # meant for the broker of this machine: a program's own would find the port taken
    settings.update({name: value for name, value in options.items() if value is not None})
    if not settings.get("bind"):
        settings["bind"] = (default_address({**environ, "FORGE_BROKER": ""}, os.getuid()),)
    if settings.get("log_dir") is None:
        settings["log_dir"] = str(private_directory(environ, os.getuid()) / "logs")
    for name in ("bind", "gpus"):
        if isinstance(settings.get(name), list):
            settings[name] = tuple(settings[name])
    return BrokerConfig.checked(settings)


def slots(text: str) -> tuple[str, ...]:
    """GPU slots as people declare them: a count (`2`), or names (`0,3`; `GPU-…`)."""
    if text.strip().isdigit():
        return tuple(str(n) for n in range(int(text)))
    return tuple(name.strip() for name in text.split(",") if name.strip() and name.strip() != "none")


def read_table(name: str, file: Path | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """One table of the configuration file, empty where there is none: `broker`, or `client`, which the command reads.

    `file`: as for `load`. Raises ConfigError when it cannot be read or is no TOML.
    """
    wanted = file or (Path(environ["FORGE_CONFIG"]) if environ.get("FORGE_CONFIG") else None)
    path = wanted or Path(environ.get("HOME", "/")) / ".config" / "forge" / "forge.toml"
    if wanted is None and not path.exists():
        return {}
    try:
        with path.open("rb") as stream:
            table = tomllib.load(stream).get(name, {})
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(where=str(path), message=f"cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(where=str(path), message=f"[{name}] is no table")
    return dict(table)


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    """FORGE_MAX_WORKERS=8 and the like, one for each field. Other FORGE_ variables belong to other programs."""
    found: dict[str, Any] = {}
    problems: list[str] = []
    for field in dataclasses.fields(BrokerConfig):
        text = environ.get(f"FORGE_{field.name.upper()}")
        if not text:
            continue
        try:
            found[field.name] = _read(field.name, str(field.type), text)
        except (ValueError, KeyError):
            problems.append(f"FORGE_{field.name.upper()}={text!r} is no {field.type}")
    if problems:
        raise ConfigError(where="environment", problems=problems)
    return found


def _read(name: str, kind: str, text: str) -> Any:
    if name == "gpus":
        return slots(text)
    if name == "bind":
        return tuple(text.split(","))
    if kind == "bool":
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
    if kind == "int":
        return int(text)
    return float(text) if kind == "float" else text
