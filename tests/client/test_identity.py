"""Who a process is: enough to hold this one by a pidfd and no other (F1)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import psutil

from forge_client.identity import draw_name, hello_identity, started_ticks


def test_names_say_the_role_and_are_never_the_same() -> None:
    assert re.fullmatch(r"w-[0-9a-f]{16}", draw_name("worker"))
    assert re.fullmatch(r"c-[0-9a-f]{16}", draw_name("client"))
    assert draw_name("client") != draw_name("client")


def test_two_processes_of_one_machine_share_host_and_namespace() -> None:
    """F1"""
    ours = hello_identity()
    program = "import json; from forge_client.identity import hello_identity as h; print(json.dumps(h()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=20)
    theirs = json.loads(done.stdout)
    assert (theirs["host"], theirs["pid_namespace"]) == (ours["host"], ours["pid_namespace"])
    assert theirs["pid"] != ours["pid"] == os.getpid()
    assert theirs["started"] >= ours["started"] > 0


def test_the_start_time_is_the_kernel_s() -> None:
    """F1: psutil reads the same field."""
    ticks = os.sysconf("SC_CLK_TCK")
    created = psutil.Process().create_time() - psutil.boot_time()
    assert abs(started_ticks(os.getpid()) / ticks - created) < 1.5


def test_a_process_that_is_gone_has_no_start_time() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(timeout=20)
    assert started_ticks(process.pid) == 0
