"""`forge doctor`: is this machine fit for it, and if not, what to do.

Each check looks at one thing and gives one finding; what is a judgement of numbers (`judge_…`) takes the numbers. torch is looked
up, never imported: that takes seconds, and a broken one would take the doctor along.
"""

from __future__ import annotations

import os
import platform
import resource
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import click

from forge_cli.options import broker_option, resolve_broker
from forge_cli.terminal import stdout_console

if TYPE_CHECKING:
    from forge_client.client import Client

OK: Final = "OK"
WARNING: Final = "warning"
PROBLEM: Final = "problem"

STYLES: Final = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}
ROUND_TRIPS: Final = 9
FILES_AT_LEAST: Final = 1024  # a broker needs a few for each peer
SHM: Final = "/dev/shm"  # noqa: S108 - looked at, not written to
ELSEWHERE: Final = "set XDG_RUNTIME_DIR to a directory of yours"
SHM_AT_LEAST: Final = 1 << 30  # bytes; containers get 64 MiB unless told otherwise, and torch's data loaders fill that


class Finding(NamedTuple):
    level: str  # OK, WARNING or PROBLEM
    subject: str
    found: str
    advice: str = ""  # what to do


@click.command(short_help="Look at this machine and say what to do.")
@broker_option
@click.pass_context
def doctor(context: click.Context, broker: str) -> None:
    """Look at Python, ZeroMQ, torch, GPUs, addresses, permissions and limits; say what to do.

    Exit code 1 when there is a problem; warnings alone are 0.

    \b
    Examples:
      forge doctor
      forge doctor --broker tcp://head:5555
    """
    said = context.get_parameter_source("broker") is click.core.ParameterSource.COMMANDLINE
    source = resolve_broker(broker if said else None)[1]
    problems = 0
    console = stdout_console()
    for finding in examine(broker, source, os.environ):
        problems += finding.level == PROBLEM
        _show(console, finding)
    if problems:
        context.exit(1)


def examine(broker: str, source: str, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Every finding, as soon as it is known. `source`: what named the broker's address."""
    yield check_python()
    yield check_package()
    yield check_platform()
    yield check_zmq()
    yield check_msgpack()
    yield check_optional("uvloop", "asyncio's own loop is used; `pip install 'forge-broker[uvloop]'` is faster")
    yield check_optional("torch", "only actors that use it need it")
    yield check_gpus(environ)
    yield check_private_directory(environ)
    yield judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    if os.path.isdir(SHM):
        space = os.statvfs(SHM)
        yield judge_shared_memory(space.f_frsize * space.f_blocks, space.f_frsize * space.f_bavail)
    yield check_broker(broker, source)


def check_python() -> Finding:
    # An older one could not have come this far.
    return Finding(OK, "python", f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}")


def check_package() -> Finding:
    version = _version("forge-broker")
    if version is None:
        return Finding(WARNING, "forge-broker", "not installed, run from its source", "pip install -e . in its folder")
    return Finding(OK, "forge-broker", version)


def check_platform() -> Finding:
    found = f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores"
    if sys.platform not in ("linux", "darwin"):
        return Finding(PROBLEM, "platform", found, "Linux and macOS are supported")
    if not hasattr(os, "pidfd_open"):
        return Finding(
            WARNING,
            "platform",
            f"{found}; no pidfd",
            "a dead worker is noticed by its silence, in seconds instead of at once",
        )
    return Finding(OK, "platform", found)


def check_zmq() -> Finding:
    try:
        import zmq
    except ImportError as error:
        return Finding(PROBLEM, "pyzmq", str(error), "pip install 'pyzmq>=26'")
    found = f"{zmq.pyzmq_version()}, libzmq {zmq.zmq_version()}"
    if not zmq.has("ipc"):
        return Finding(
            PROBLEM, "pyzmq", f"{found} without ipc", "install a pyzmq wheel: pip install --force-reinstall pyzmq"
        )
    return Finding(OK, "pyzmq", found)


def check_msgpack() -> Finding:
    try:
        import msgpack
    except ImportError as error:
        return Finding(PROBLEM, "msgpack", str(error), "pip install msgpack")
    found = str(_version("msgpack") or "version unknown")
    if msgpack.Packer.__module__.endswith("fallback"):
        return Finding(
            WARNING,
            "msgpack",
            f"{found}, in pure Python: many times slower",
            "unset MSGPACK_PUREPYTHON, or: pip install --force-reinstall msgpack",
        )
    return Finding(OK, "msgpack", found)


def check_optional(package: str, without: str) -> Finding:
    from importlib.util import find_spec

    if find_spec(package) is None:
        return Finding(OK, package, f"not installed; {without}")
    return Finding(OK, package, _version(package) or "installed, version unknown")


def check_gpus(environ: Mapping[str, str]) -> Finding:
    from forge_client.gpus import NVIDIA_DRIVER, find_gpus
    from forge_contract.errors import ConfigError

    source = next((f" ({name} says so)" for name in ("FORGE_GPUS", "CUDA_VISIBLE_DEVICES") if name in environ), "")
    try:
        gpus = find_gpus(environ)
    except ConfigError as error:
        return Finding(PROBLEM, "GPUs", str(error), "set FORGE_GPUS to a count (2), names (0,3) or none")
    if gpus:
        return Finding(OK, "GPUs", f"{len(gpus)}: {', '.join(gpus)}{source}")
    if not source and Path("/dev/nvidia0").exists() and not NVIDIA_DRIVER.is_dir():
        return Finding(
            WARNING,
            "GPUs",
            "none found, although there is /dev/nvidia0",
            "pip install 'forge-broker[gpu]', or declare them: FORGE_GPUS=1",
        )
    return Finding(OK, "GPUs", f"none{source}")


def check_private_directory(environ: Mapping[str, str]) -> Finding:
    """Where the default broker's socket is; only its mode makes that address trusted."""
    from forge_contract.addresses import private_directory

    subject = "private directory"
    directory = Path(private_directory(environ, os.getuid()))
    try:
        status = directory.lstat()
    except FileNotFoundError:
        parent = directory.parent
        if os.access(parent, os.W_OK | os.X_OK):
            return Finding(OK, subject, f"{directory}, made when a broker starts")
        return Finding(
            PROBLEM,
            subject,
            f"{directory} cannot be made: {parent} is missing or not writable",
            ELSEWHERE,
        )
    except OSError as error:
        return Finding(PROBLEM, subject, f"{directory}: {error.strerror}", ELSEWHERE)
    mode = stat.S_IMODE(status.st_mode)
    found = f"{directory}, mode {mode:04o}"
    if not stat.S_ISDIR(status.st_mode):
        return Finding(PROBLEM, subject, f"{directory} is no directory", f"remove it: rm {directory}")
    if status.st_uid != os.getuid():
        return Finding(PROBLEM, subject, f"{found}, of user {status.st_uid}", ELSEWHERE)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Finding(PROBLEM, subject, f"{found}: others may enter, so it is not trusted", f"chmod 700 {directory}")
    return Finding(OK, subject, found)


def judge_open_files(soft: int, hard: int) -> Finding:
    if soft == resource.RLIM_INFINITY or soft >= FILES_AT_LEAST:
        return Finding(OK, "open files", "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft:,}")
    most = "" if hard == resource.RLIM_INFINITY else f" (at most {hard:,} without an administrator)"
    return Finding(WARNING, "open files", f"up to {soft:,}: few for a broker", f"ulimit -n {FILES_AT_LEAST}{most}")


def judge_shared_memory(total: int, free: int) -> Finding:
    from forge_cli.tables import size

    found = f"{size(total)}, {size(free)} free"
    if total < SHM_AT_LEAST:
        return Finding(
            WARNING,
            SHM,
            found,
            "torch's data loaders may need more; in a container: --shm-size=2g, or --ipc=host",
        )
    if free < total / 10:
        return Finding(WARNING, SHM, found, "what is left over from dead programs? ls -lS /dev/shm")
    return Finding(OK, SHM, found)


def check_broker(address: str, source: str) -> Finding:
    """Whether a broker answers, and how fast. That none runs is a problem only for who named one."""
    from forge_cli.conversation import converse
    from forge_cli.tables import duration
    from forge_client import BrokerUnreachable, ForgeError

    at = f"{address} ({source})"
    try:
        median_s, uptime_s, trusted = converse(address, _timed, waiting="asking the broker")
    except BrokerUnreachable:
        if source == "the default":
            return Finding(WARNING, "broker", f"none at {at}", "forge broker start")
        return Finding(PROBLEM, "broker", f"none at {at}", "start it there, or correct the address")
    except ForgeError as error:
        return Finding(PROBLEM, "broker", f"{at}: {error}", "start it anew, with the same version as here")
    trust = "trusted" if trusted else "not trusted: classes by reference only, no pickles"
    return Finding(
        OK,
        "broker",
        f"{at} answers in {median_s * 1000:.1f} ms (median of {ROUND_TRIPS}), {trust}, up {duration(uptime_s)}",
    )


async def _timed(client: Client) -> tuple[float, float, bool]:
    took = []
    uptime_s = 0.0
    for _ in range(ROUND_TRIPS):
        began = time.perf_counter()
        answer = await client.control("status", {})
        took.append(time.perf_counter() - began)
        uptime_s = float(answer["uptime_s"])
    return sorted(took)[ROUND_TRIPS // 2], uptime_s, client.trusted


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _show(console: object, finding: Finding) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    assert isinstance(console, Console)
    row = Table.grid(padding=(0, 2), pad_edge=False)
    row.add_column(width=7)
    row.add_column(width=17)
    row.add_column()
    row.add_row(Text(finding.level, STYLES[finding.level]), Text(finding.subject, "bold"), finding.found)
    if finding.advice:
        row.add_row("", "", Text(f"→ {finding.advice}", STYLES[finding.level]))
    console.print(row)
