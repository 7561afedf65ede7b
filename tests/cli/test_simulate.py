"""`forge simulate`: a class and a command line become a simulation, and what it measured is told."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from forge_cli.main import main
from forge_cli.simulation_page import moment

MODULE = "simulated_app"
APP = '''
from forge_client import AutoscalingConfig, ForgeActor, Router, ScalingPolicy, service_endpoint


class Last(Router):
    """A router of one's own."""

    def get_replica(self, healthy_replicas, sess_id=None, session_map=None):
        return healthy_replicas[-1]


class OneMore(ScalingPolicy):
    """And a policy."""

    def decide(self, observation, config, limits, state, now):
        return 1


class Gen(ForgeActor):
    num_replicas = 1
    autoscaling = AutoscalingConfig(scale_up_cooldown=10.0, min_time_between_scale_events=10.0)

    def __init__(self):
        raise AssertionError("no instance is made")

    @service_endpoint(router=Last)
    async def predict(self, x):
        return x


class Embed(ForgeActor):
    @service_endpoint(batch_size=8, batch_timeout=0.05, batch_mode="call")
    def embed(self, x):
        return x


class Two(ForgeActor):
    @service_endpoint
    def slow(self, x):
        return x

    @service_endpoint(timeout=0.5)
    async def quick(self, x):
        return x
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / f"{MODULE}.py").write_text(APP, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop(MODULE, None)


def simulate(line: str) -> Result:
    return CliRunner().invoke(main, ["simulate", *shlex.split(line)])


def told(line: str) -> dict[str, Any]:
    done = simulate(f"{line} --json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def test_a_step_is_followed_by_the_classs_own_settings_router_and_policy(folder: Path) -> None:
    """X1: and no instance of the class is made."""
    said = told(f"{MODULE}:Gen --trace step --rate 2 --peak 30 --for 10m --service-time 1s --option max_replicas=6")
    assert said["failed"] == 0
    assert said["calls"] == said["succeeded"] + said["outstanding_at_end"] == pytest.approx(9600, rel=0.05)
    assert [event["delta"] for event in said["scale_events"]][:3] == [1, 1, 1]
    assert 150 <= said["scale_events"][0]["at"] <= 160
    assert said["replicas"]["most"] in (4, 5, 6)
    assert sum(said["decisions"].values()) == 600
    own = told(
        f"""{MODULE}:Gen --trace constant --rate 1 --for 5m --option 'autoscaling={{"policy": "{MODULE}:OneMore"}}'"""
    )
    assert (own["replicas"]["at_end"], own["scale_events"][0]["rule"]) == (10, "custom")


def test_the_same_line_says_the_same_and_another_seed_does_not(folder: Path) -> None:
    line = f"{MODULE}:Gen --trace spike --rate 3 --for 2m --spread 1"
    assert told(line) == told(line)
    assert told(line)["latency_s"] != told(f"{line} --seed 1")["latency_s"]


def test_batches_take_base_and_item_and_leave_as_configured(folder: Path) -> None:
    """B1: and a plain def runs one batch at a time, in its one thread."""
    said = told(f"{MODULE}:Embed --trace constant --rate 60 --for 1m --batch-time 100ms+10ms --spread 0")
    assert set(said["batches"]["sizes"]) <= {"1", "2", "4", "8"}
    assert said["batches"]["avg_size"] > 6
    assert said["running_s"]["max"] == pytest.approx(0.18)


def test_a_plain_def_runs_in_its_threads_and_an_endpoints_timeout_holds(folder: Path) -> None:
    line = f"{MODULE}:Two --trace constant --rate 4 --for 2m --service-time 400ms --spread 0"
    slow, at_once = told(f"{line} --endpoint slow"), told(f"{line} --endpoint slow --parallel 8")
    assert slow["errors"] == {}
    assert slow["waiting_s"]["mean"] > 10 * at_once["waiting_s"]["mean"]
    impatient = told(f"{line} --endpoint quick --parallel 1")
    assert impatient["errors"].keys() == {"CallTimeout"}
    assert impatient["latency_s"]["max"] <= 0.5


def test_the_page_tells_what_happened_what_it_cost_and_why_it_scaled(folder: Path) -> None:
    done = simulate(f"{MODULE}:Gen --trace step --rate 2 --peak 30 --for 10m --service-time 1s --price 3.6")
    assert done.exit_code == 0, done.output
    for word in (
        "calls succeeded",
        "0 failed",
        "replica-seconds",
        "which cost",
        "of it waiting",
        "SCALED AT",
        "0:02:3",
    ):
        assert word in done.stdout
    assert "max_queue_depth_emergency=20" in done.stdout
    assert done.stderr == ""


def test_moments_that_were_recorded_are_all_played_and_answered_and_told_by_the_second(folder: Path) -> None:
    (folder / "calls.csv").write_text("0\n0.5\n1\n1.5\n", "utf-8")
    done = simulate(f"{MODULE}:Gen --trace calls.csv --service-time 100ms --spread 0")
    assert done.exit_code == 0, done.output
    assert "4 of 4 calls succeeded, 0 failed, 0 not answered at the end" in done.stdout
    assert "1 replica throughout, never fewer than 1 healthy; 0 scale events" in done.stdout
    assert re.findall(r"^\d:\d\d:\d\d", done.stdout, re.MULTILINE) == ["0:00:01", "0:00:02"]


def test_a_file_is_played_at_its_own_rates(folder: Path) -> None:
    (folder / "load.csv").write_text("seconds,rate\n0,1\n60,20\n120,0\n", "utf-8")
    said = told(f"{MODULE}:Gen --trace load.csv")
    assert (said["trace"], said["seconds"]) == ("load.csv", 180.0)
    thirds = [[one["rate"] for one in said["samples"]][start : start + 80] for start in (0, 80, 160)]
    assert [sum(third) / 80 for third in thirds] == pytest.approx([1, 20, 0], rel=0.3, abs=0.1)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the extra `plot`")
def test_a_picture_is_drawn(folder: Path) -> None:
    done = simulate(f"{MODULE}:Gen --trace spike --rate 2 --for 2m --plot run.png")
    assert done.exit_code == 0, done.output
    assert "drawn: run.png" in done.stdout
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_picture_is_refused_before_anything_is_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else known(name))
    done = simulate(f"{MODULE}:Gen --trace spike --for 24h --plot run.png")
    assert done.exit_code == 2
    assert "pip install 'forge-broker[plot]'" in done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Gen --trace stpe", "'stpe' is neither a shape nor a file that is there; did you mean 'step'"),
        ("Gen --trace load.csv", "line 2: 'x' is no number"),
        ("Gen --trace good.csv --rate 5", "good.csv has rates of its own"),
        ("Gen --trace step --rate 100000 --for 24h", "too many to simulate"),
        ("Gen --trace step --service-time long", "'long' is no duration"),
        ("Gen --trace step --batch-time 1s", "--batch-time is of endpoints with batch_mode='call'"),
        ("Gen --trace step --endpoint predit", "did you mean 'predict'"),
        ("Gen --trace step --option max_replica=3", "did you mean 'max_replicas'"),
        ("Gen --trace step --option min_replicas=5 --option max_replicas=3", "min_replicas=5 is above max_replicas=3"),
        (
            """Gen --trace step --option 'autoscaling={"up": 1}' --option min_replicas=5 --option max_replicas=3""",
            "  - autoscaling: unknown option 'up'",
        ),
        (
            """Gen --trace step --option 'autoscaling={"up": 1}' --option min_replicas=5 --option max_replicas=3""",
            "  - min_replicas=5 is above max_replicas=3",
        ),
        ("Gen --trace step --plot run.gif", "run.gif is no picture"),
        ("Gen --trace step --plot no/run.png", "no/run.png cannot be written"),
        ("Embed --trace step", "say by --batch-time how long"),
        ("Embed --trace step --batch-time fast", "'fast' is no BASE+ITEM"),
        ("Two --trace step", "Two has 2 endpoints (slow, quick): say which by --endpoint"),
        ("Gne --trace step", "did you mean 'Gen'"),
    ],
)
def test_what_cannot_be_simulated_says_what_is_wrong(folder: Path, line: str, said: str) -> None:
    (folder / "load.csv").write_text("0,1\nx,2\n", "utf-8")
    (folder / "good.csv").write_text("0,1\n10,2\n", "utf-8")
    done = simulate(f"{MODULE}:{line}")
    assert said in done.stderr
    assert done.exit_code == (1 if "predit" in line else 2)
    assert done.stdout == ""


def test_moments_are_hours_minutes_and_seconds() -> None:
    assert [moment(seconds) for seconds in (0, 59.6, 3599, 86_400)] == ["0:00:00", "0:01:00", "0:59:59", "24:00:00"]
