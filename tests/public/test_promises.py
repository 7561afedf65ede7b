"""The design's promises and their tests: each promise of what this release builds is cited by a test, by its number.

And the few that are about the code itself, not about what it does: C7, W2.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent

PROMISED = {"L": 5, "C": 7, "W": 9, "A": 12, "R": 4, "S": 4, "B": 3, "F": 10, "X": 6}
NOT_YET = {"X6": "engines beyond this machine come later"}


def promises_cited(docstring: str) -> set[str]:
    """The numbers in a docstring; `A1–A3` stands for all three."""
    found = set(re.findall(r"\b[LCWARSBFX]\d+\b", docstring))
    for letter, first, last in re.findall(r"\b([LCWARSBFX])(\d+)\s*[–-]\s*\1(\d+)\b", docstring):
        found |= {f"{letter}{number}" for number in range(int(first), int(last) + 1)}
    return found


def citations() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
                for promise in promises_cited(ast.get_docstring(node) or ""):
                    found.setdefault(promise, []).append(f"{file.relative_to(TESTS)}::{node.name}")
    return found


def test_each_promise_of_this_release_is_cited_by_a_test() -> None:
    promised = {f"{letter}{number}" for letter, count in PROMISED.items() for number in range(1, count + 1)}
    assert NOT_YET.keys() <= promised
    assert sorted(promised - NOT_YET.keys() - citations().keys()) == []


def test_no_test_cites_a_promise_that_was_never_made() -> None:
    made = {f"{letter}{number}" for letter, count in PROMISED.items() for number in range(1, count + 1)}
    assert {promise: tests for promise, tests in citations().items() if promise not in made} == {}


def test_ranges_of_promises_are_read_whole() -> None:
    assert promises_cited("A1–A3, W6: and (L2) but not A1x") == {"A1", "A2", "A3", "W6", "L2"}


def test_the_wiring_of_the_core_decides_nothing() -> None:
    """C7: it asks no router, weighs no replicas, looks at no queue; whoever does can be called without it."""
    wiring = ast.parse((ROOT / "forge_broker" / "core" / "broker.py").read_text("utf-8"))
    touched = {node.attr for node in ast.walk(wiring) if isinstance(node, ast.Attribute)}
    decisions = {"get_replica", "pool", "queues", "queue", "parked", "ledger", "release", "pins", "slots", "replicas"}
    decisions |= {"push", "push_front", "has_room", "healthy", "active", "move", "priority", "attempt", "router"}
    assert touched & decisions == set()
    called = {
        node.func.id for node in ast.walk(wiring) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert called & {"sorted", "min", "max", "place"} == set()


@pytest.mark.parametrize(
    "part", ["placement", "queues", "replicas", "ledger", "deadlines", "requests", "workers", "stats", "story"]
)
def test_what_decides_can_be_called_without_the_broker(part: str) -> None:
    """C7, L3: importing it brings neither the wiring nor the state of a whole broker."""
    program = (
        f"import sys, forge_broker.core.{part};"
        "print(*sorted(sys.modules.keys() & {'forge_broker.core.broker', 'forge_broker.core.state'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout.split() == []


def test_the_broker_has_nothing_to_decode_a_payload_with() -> None:
    """W2: neither its source nor what it has loaded when it runs."""
    for file in (ROOT / "forge_broker").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any("payload" in name.partition("forge_contract.")[2] for name in names), file
    program = "import sys, forge_broker.__main__; print(*(name for name in sys.modules if 'payload' in name))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout.split() == []
