"""A virtual environment for each peer, made once: a file beside it says what was installed, and differs when the roster does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from bench.peers.roster import Peer

INSTALL_S: Final = 900.0
INSTALLED: Final = "installed.json"


class NotInstalled(Exception):
    """What pip, or venv, said last."""


def python_of(directory: Path) -> Path:
    return directory / "bin" / "python"


def wanted(peer: Peer) -> str:
    """What the file beside a finished environment says."""
    return json.dumps({"requires": peer.requires, "python": sys.version.split()[0]})


def make(peer: Peer, directory: Path, bound_s: float = INSTALL_S) -> bool:
    """Make or find the peer's environment; whether it had to be made.

    Raises NotInstalled; what is half installed is then not taken for whole, for the file that says so is written last.
    """
    stamp = directory / INSTALLED
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted(peer):
        return False
    if directory.exists():
        shutil.rmtree(directory)
    _run([sys.executable, "-m", "venv", str(directory)], bound_s)
    pip = [str(python_of(directory)), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    constraints = ["-c", str(peer.constraints)] if peer.constraints else []
    _run([*pip, *constraints, *peer.requires], bound_s)
    stamp.write_text(wanted(peer), encoding="utf-8")
    return True


def _run(command: list[str], bound_s: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=bound_s, check=False)
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"not done within {bound_s:.0f} s: {' '.join(command)}") from None
    if done.returncode:
        raise NotInstalled(last_line(done.stderr or done.stdout))


def last_line(said: str) -> str:
    """The last error that a program told; where it calls nothing an error, its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "error:"))]
    return (errors or lines or ["it said nothing"])[-1]
