"""What a command line means before anything is connected: help, usage, exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from forge_cli.exits import failure_of
from forge_cli.main import main
from forge_contract.errors import (
    AddressInUse,
    BrokerLost,
    BrokerUnreachable,
    ConfigError,
    RemoteError,
    RemoteTraceback,
    UnknownService,
    VersionMismatch,
)

ROOT = Path(__file__).resolve().parents[2]
GROUPS = [main, *(command for command in main.commands.values() if isinstance(command, click.Group))]
COMMANDS = [command for group in GROUPS for command in group.commands.values() if not isinstance(command, click.Group)]


def examples_in(text: str) -> list[str]:
    """The command lines of a text: indented, beginning with `forge` or with variables for it, up to a remark or a pipe."""
    found = []
    for line in text.splitlines():
        match = re.match(r"\s+(?:[A-Z_]+=\S+ |cat \S+ \| )*(forge (?:.*\S)?)", line.replace("\b", ""))
        if match is not None:
            found.append(re.split(r"\s{3,}|\s+\| |\s+2> |\s+#", match[1])[0])
    return found


def parse(line: str) -> click.Context:
    """Raises click.UsageError when the command does not take this line."""
    arguments = shlex.split(line)[1:]
    command: click.Command = main
    while isinstance(command, click.Group):
        name = arguments.pop(0)
        if name.startswith("-"):
            return command.make_context("forge", [name], resilient_parsing=True)
        command = command.commands[name]
    return command.make_context(command.name, arguments)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
def test_the_help_of_each_command_shows_command_lines_that_it_takes(command: click.Command) -> None:
    lines = examples_in(command.help or "")
    assert lines
    for line in lines:
        parse(line)


def test_the_command_lines_in_the_manual_are_taken() -> None:
    """docs/cli.md, and the epilog of `forge --help`."""
    lines = examples_in((ROOT / "docs" / "cli.md").read_text("utf-8")) + examples_in(main.epilog or "")
    assert len(lines) > 10
    for line in lines:
        parse(line)


def test_help_lists_the_commands_and_the_exit_codes() -> None:
    told = CliRunner().invoke(main, ["--help"]).output
    for word in (
        "broker",
        "worker",
        "status",
        "deploy",
        "call",
        "load",
        "stop",
        "workers",
        "explain",
        "doctor",
        "69",
        "130",
    ):
        assert word in told


def test_help_imports_nothing_that_takes_long() -> None:
    """`forge --help` has to be there at once."""
    program = "import sys, json, forge_cli.main; print(json.dumps(sorted(sys.modules)))"
    path = os.pathsep.join(str(ROOT / root) for root in ("", "client", "cli"))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    imported = {name.partition(".")[0] for name in json.loads(done.stdout)}
    heavy = {
        "zmq",
        "rich",
        "structlog",
        "msgpack",
        "asyncio",
        "torch",
        "numpy",
        "forge_broker",
        "forge_worker",
        "forge_client",
    }
    assert not imported & heavy


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnknownService(name="gn", known=["gen"]), 1),
        (RemoteError(type_name="app.Odd", remote_message="x"), 1),
        (ConfigError(where="bind", message="no"), 2),
        (AddressInUse(address="ipc:///b", holder=""), 2),
        (BrokerUnreachable(address="ipc:///b", waited_s=5.0), 69),
        (BrokerLost(address="ipc:///b", why="it ended"), 69),
        (VersionMismatch(ours=1, theirs=2), 69),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_error_has_its_exit_code(error: Exception, code: int) -> None:
    failure = failure_of(error)
    assert failure is not None
    assert failure.exit_code == code
    assert str(error) in failure.message


def test_an_endpoints_own_exception_fails_with_its_remote_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """A5"""
    error = KeyError("x")
    error.__cause__ = RemoteTraceback("Traceback: in the worker")
    failure = failure_of(error)
    assert failure is not None
    failure.show()
    assert capsys.readouterr().err == "Traceback: in the worker\nError: KeyError: 'x'\n"


def test_what_was_noted_on_an_error_is_told_below_it() -> None:
    """A5: which rank of a mesh it was, for instance."""
    error = RemoteError(type_name="app.Odd", remote_message="x")
    error.add_note("rank 2 of 4")
    failure = failure_of(error)
    assert failure is not None
    assert failure.message == "RemoteError: app.Odd: x\nrank 2 of 4"


def test_a_mistake_of_our_own_is_not_dressed_up() -> None:
    assert failure_of(KeyError("x")) is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("call gen", "no SERVICE.ENDPOINT"),
        ("call gen.predict hello", "is no JSON"),
        ("deploy app", "no MODULE:CLASS"),
        ("deploy ./app.py:Gen", "such as app:Gen"),
        ("deploy app:Gen --arg k", "no KEY=VALUE"),
        ("deploy app:Gen --arg k=1 --arg k=2", "given twice"),
        ("deploy no_such_module_here:Gen", "there is no module 'no_such_module_here'"),
        ("deploy json:JSONEncoder", "no subclass of ForgeActor"),
        ("deploy json:JSONEncodr", "did you mean 'JSONEncoder'"),
        ("worker --label x", "no KEY=VALUE"),
        ("status --broker nonsense", "neither tcp://host:port nor ipc:///path"),
        ("status --brokr x", "No such option"),
        ("broker start --log-level loud", "loud"),
    ],
)
def test_wrong_usage_says_what_was_wrong_and_exits_2(line: str, said: str) -> None:
    done = CliRunner().invoke(main, shlex.split(line))
    assert said in done.output
    assert done.exit_code == 2


@pytest.mark.parametrize("line", ["status", "workers", "explain gen/0", "status --watch"])
def test_without_a_broker_one_line_says_so_and_the_code_is_69(line: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [*line.split(), "--broker", f"ipc://{tmp_path}/none.sock"])
    assert done.exit_code == 69
    assert re.fullmatch(r"Error: no broker answered at ipc://\S+ within 0 s; is it running\?.*\n", done.output)


def test_a_port_at_which_nobody_listens_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    done = CliRunner().invoke(main, ["status", "--broker", address])
    assert done.exit_code == 69
    assert f"no broker answered at {address} within 0 s" in done.output
