"""What is written about metrics, alerts and paths is what is served (docs/observability.md, deploy/alerts.yml)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from forge_broker.core.families import Family, families
from forge_broker.core.stats import OUTCOMES
from forge_broker.shell.exposition import Exposition
from forge_broker.shell.http_door import PATHS
from tests.core.peers import Bench

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs" / "observability.md").read_text("utf-8")
ALERTS = ROOT / "deploy" / "alerts.yml"
PROMTOOL = shutil.which("promtool")

needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed (Debian: apt-get install prometheus)"
)


def served() -> list[Family]:
    bench = Bench()
    return families(bench.state, bench.now)


def page() -> dict[str, str]:
    """Name and type of everything on a page, named as its series are."""
    text, _ = Exposition("1").write(served(), "")
    found = text_string_to_metric_families(text.decode())
    return {one.name + ("_total" if one.type == "counter" else ""): one.type for one in found}


def table(heading: str, columns: int) -> list[list[str]]:
    """The rows of the first table below a heading, without their ticks."""
    below = DOCS.partition(f"\n{heading}\n")[2]
    rows = [line for line in below.partition("\n|")[2].partition("\n\n")[0].splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|", columns - 1)] for row in rows[1:]]


def test_every_metric_that_is_served_is_listed_with_its_type_and_the_other_way_round() -> None:
    """X3."""
    listed = {name: kind for name, kind, _, _ in table("## Metrics", 4)}
    assert listed == page()


def test_the_labels_that_are_listed_are_those_that_are_served() -> None:
    """X3."""
    listed = {name: tuple(filter(None, labels.split(", "))) for name, _, labels, _ in table("## Metrics", 4)}
    for family in served():
        assert listed[family.name] == family.labels
        assert set(family.names) <= set(family.labels)


def test_every_path_and_outcome_is_listed() -> None:
    paths = [row[0] for row in table("## Over HTTP", 2)]
    assert paths == list(PATHS)
    found = re.search(r"\| outcome \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", DOCS)
    assert found is not None
    outcomes = [name for line in found[1].splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert outcomes == list(OUTCOMES)


def test_alerts_ask_for_what_is_served_and_are_listed() -> None:
    """X3."""
    text = ALERTS.read_text("utf-8")
    asked = set(re.findall(r"\bforge_\w+", re.sub(r"#.*", "", text)))
    names = {family.name for family in served()} | {"forge_folded_series"}
    assert asked <= names, asked - names
    alerts = re.findall(r"- alert: (\w+)", text)
    assert [row[0] for row in table("## Alerts", 2)] == alerts
    assert text.count("summary:") == text.count("description:") == len(alerts)


@needs_promtool
def test_promtool_accepts_the_alerts() -> None:
    checked = subprocess.run(
        [str(PROMTOOL), "check", "rules", str(ALERTS)], capture_output=True, text=True, timeout=30, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


SCENARIO = """
rule_files: [{alerts}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'up{{job="forge", instance="a"}}', values: '1 1 1 1 1 1 1 1 1 1 1 1 0 0 0'}}
      - {{series: 'forge_replicas{{instance="a", service="gen", state="HEALTHY"}}', values: '2x20'}}
      - {{series: 'forge_replicas{{instance="a", service="gen", state="RECOVERING"}}', values: '0x20'}}
      - {{series: 'forge_replicas_wanted{{instance="a", service="gen"}}', values: '1x2 2x20'}}
      - {{series: 'forge_replicas_max{{instance="a", service="gen"}}', values: '2x20'}}
      - {{series: 'forge_room{{instance="a", service="gen"}}', values: '20x20'}}
      - {{series: 'forge_queue_length{{instance="a", service="gen", queue="predict"}}', values: '0 5+10x20'}}
      - {{series: 'forge_replicas{{instance="a", service="toy", state="HEALTHY"}}', values: '0x20'}}
      - {{series: 'forge_replicas{{instance="a", service="toy", state="RECOVERING"}}', values: '1x20'}}
      - {{series: 'forge_queue_length{{instance="a", service="toy", queue="f"}}', values: '1x20'}}
      - {{series: 'forge_calls_total{{instance="a", service="gen", endpoint="predict", outcome="ok"}}', values: '0+90x20'}}
      - {{series: 'forge_calls_total{{instance="a", service="gen", endpoint="predict", outcome="overloaded"}}', values: '0+10x20'}}
      - {{series: 'forge_calls_total{{instance="a", service="toy", endpoint="f", outcome="raised"}}', values: '0+10x20'}}
    alert_rule_test:
{expected}
"""


@needs_promtool
def test_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    """X3: a broker that goes away in the twelfth minute, `gen` at its limit with a growing queue, and `toy`, which does not come back."""
    gen = "{exp_labels: {severity: warning, instance: a, service: gen}}"
    expected = [
        ("ForgeBrokerDown", 11, ""),
        ("ForgeBrokerDown", 13, "{exp_labels: {severity: critical, job: forge, instance: a}}"),
        ("ForgeNoHealthyReplica", 2, "{exp_labels: {severity: critical, instance: a, service: toy}}"),
        ("ForgeReplicasUnhealthy", 4, ""),
        ("ForgeReplicasUnhealthy", 6, "{exp_labels: {severity: warning, instance: a, service: toy}}"),
        ("ForgeQueueGrows", 2, ""),
        ("ForgeQueueGrows", 12, gen),
        ("ForgeScaleLimit", 2, ""),
        ("ForgeScaleLimit", 12, gen),
        ("ForgeCallsFail", 12, "{exp_labels: {severity: warning, instance: a, service: gen, endpoint: predict}}"),
        ("ForgeDeadLetters", 12, ""),
    ]
    rules = "".join(
        f"      - {{alertname: {name}, eval_time: {minute}m, exp_alerts: [{alert}]}}\n"
        for name, minute, alert in expected
    )
    # What the alerts say is left out: only when they fire is looked at.
    bare = re.sub(r" {8}annotations:\n(?: {10,}.*\n| {10,}\S.*\n)+", "", ALERTS.read_text("utf-8"))
    (tmp_path / "alerts.yml").write_text(bare, "utf-8")
    scenario = tmp_path / "scenario.yml"
    scenario.write_text(SCENARIO.format(alerts=tmp_path / "alerts.yml", expected=rules), "utf-8")
    checked = subprocess.run(
        [str(PROMTOOL), "test", "rules", str(scenario)], capture_output=True, text=True, timeout=30, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
