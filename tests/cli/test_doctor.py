"""What the doctor judges, with plain values."""

from __future__ import annotations

import resource
from pathlib import Path

from click.testing import CliRunner

from forge_cli.doctor import (
    OK,
    PROBLEM,
    WARNING,
    check_gpus,
    check_optional,
    check_private_directory,
    judge_open_files,
    judge_shared_memory,
)
from forge_cli.main import main


def test_a_private_directory_that_others_may_enter_is_a_problem_with_its_remedy(tmp_path: Path) -> None:
    """W6: its mode is what makes the address trusted."""
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert check_private_directory(environ).level == OK  # not there yet: a broker makes it
    directory = tmp_path / "forge"
    directory.mkdir(mode=0o700)
    assert check_private_directory(environ).level == OK
    directory.chmod(0o750)
    finding = check_private_directory(environ)
    assert (finding.level, finding.advice) == (PROBLEM, f"chmod 700 {directory}")


def test_what_is_no_directory_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "forge").write_text("", "ascii")
    assert check_private_directory({"XDG_RUNTIME_DIR": str(tmp_path)}).level == PROBLEM
    assert check_private_directory({"XDG_RUNTIME_DIR": str(tmp_path / "missing")}).level == PROBLEM


def test_few_open_files_are_a_warning() -> None:
    assert judge_open_files(1024, 4096).level == OK
    assert judge_open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY).level == OK
    finding = judge_open_files(256, 4096)
    assert finding.level == WARNING
    assert "ulimit -n" in finding.advice


def test_the_shared_memory_of_a_container_is_a_warning() -> None:
    assert judge_shared_memory(64 << 20, 64 << 20).level == WARNING
    assert judge_shared_memory(8 << 30, 1 << 20).level == WARNING
    assert judge_shared_memory(8 << 30, 8 << 30).level == OK


def test_gpus_that_cannot_be_read_are_a_problem_and_none_are_fine() -> None:
    assert check_gpus({"FORGE_GPUS": "none"}).level == OK
    assert "2: 0, 1 (FORGE_GPUS says so)" in check_gpus({"FORGE_GPUS": "2"}).found
    assert check_gpus({"FORGE_GPUS": "0,0"}).level == PROBLEM


def test_what_is_optional_is_fine_without() -> None:
    assert check_optional("no_such_package_here", "only some need it").level == OK


def test_no_broker_is_a_problem_only_for_who_named_one(tmp_path: Path) -> None:
    named = CliRunner().invoke(main, ["doctor", "--broker", f"ipc://{tmp_path}/none.sock"])
    assert named.exit_code == 1
    assert "problem  broker" in named.output
    environ = {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}
    default = CliRunner().invoke(main, ["doctor"], env=environ)
    assert default.exit_code == 0, default.output
    assert "warning  broker" in default.output
    assert "→ forge broker start" in default.output
