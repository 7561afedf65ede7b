"""scale and why-scale: what they ask for, and how the answers look (X1, X2)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.fake import Told, told
from tests.cli.running import Place


def decision(rule: str, delta: int, wanted: int, **fields: Any) -> dict[str, Any]:
    said = {
        "rule": rule,
        "delta": delta,
        "wanted": wanted,
        "reason": f"\x1b[31mbecause of {rule}",
        "figures": {"queued": 9},
    }
    return said | {"count": 1, "first_s": 3.0, "last_s": 3.0} | fields


ANSWER = {
    "name": "gen",
    "wanted": 3,
    "limits": [1, 4],
    "policy": "ThresholdPolicy",
    "decisions": [
        decision("cooldown", 0, 3, count=1200, first_s=1203.0),
        decision("queue", 2, 3, first_s=1260.0, last_s=1260.0),
    ],
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Told]:
    with told(tmp_path) as broker:
        broker.controls["scale"] = lambda fields: (
            {"wanted": fields["replicas"], "healthy": 4} if fields["wait"] else {"wanted": fields["replicas"], "was": 1}
        )
        broker.controls["why_scale"] = lambda _: ANSWER
        yield broker


@pytest.mark.parametrize(
    ("line", "asked", "said"),
    [
        (["4"], {"replicas": 4, "wait": False}, "gen: 4 replicas, was 1\n"),
        (["1"], {"replicas": 1, "wait": False}, "gen: 1 replica, as before\n"),
        (["4", "--wait"], {"replicas": 4, "wait": True}, "gen: 4 of 4 replicas healthy\n"),
    ],
)
def test_scale_says_what_is_and_what_was(broker: Told, line: list[str], asked: dict[str, Any], said: str) -> None:
    """X2."""
    done = broker.forge("scale", "gen", *line)
    assert (done.exit_code, done.output) == (0, said)
    assert broker.asked("scale") == [{"service": "gen", **asked}]


@pytest.mark.parametrize("wrong", ["-1", "two", "1.5"])
def test_scale_takes_a_number(broker: Told, wrong: str) -> None:
    done = broker.forge("scale", "gen", "--", wrong)
    assert done.exit_code == 2
    assert not broker.asked("scale")


def test_why_scale_tells_each_decision_with_its_reason_and_how_often_it_was_the_same(broker: Told) -> None:
    """X1: control characters of a custom policy's reason do not reach the terminal."""
    done = broker.forge("why-scale", "gen")
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "gen wants 3 replicas, 1 to 4 are allowed, and scales by itself (ThresholdPolicy)" in text
    assert "3.0 s 0 3 cooldown" in text
    assert "(1,200 times in 20 min)" in text
    assert "21 min +2 3 queue" in text
    assert "\x1b[31m" not in done.output
    assert json.loads(broker.forge("why-scale", "gen", "--json").output) == ANSWER


def test_why_scale_of_what_nobody_decided_anything_of_says_so(broker: Told) -> None:
    broker.controls["why_scale"] = lambda _: ANSWER | {"policy": None, "decisions": []}
    done = broker.forge("why-scale", "gen")
    assert "scales by hand alone" in done.output
    assert "nothing was decided yet" in done.output


def test_a_real_service_is_scaled_and_says_by_whom(served: Place) -> None:
    """X2: and an error names the closest service, or the limits."""
    done = served.forge("scale", "gen", "3", "--wait")
    assert (done.code, done.out) == (0, "gen: 3 of 3 replicas healthy\n"), done
    (latest,) = json.loads(served.forge("why-scale", "gen", "--json").out)["decisions"]
    assert (latest["rule"], latest["delta"], latest["wanted"]) == ("by hand", 1, 3)
    assert served.forge("scale", "gen", "2").out == "gen: 2 replicas, was 3\n"
    unknown = served.forge("scale", "gn", "3")
    assert unknown.code == 1
    assert "UnknownService: no service 'gn'; did you mean 'gen'?" in unknown.err
    none = served.forge("scale", "gen", "0")
    assert none.code == 2
    assert "0 replicas of gen need autoscaling" in none.err
