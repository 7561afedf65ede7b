"""The page that Prometheus reads, from plain families: names, buckets, and labels that must not become too many."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from forge_broker.core.families import Family
from forge_broker.shell.exposition import Exposition, Fold

CALLS = ("service", "endpoint", "outcome")


def calls(*samples: tuple[str, str, float]) -> Family:
    told = [((service, "f", outcome), (value,)) for service, outcome, value in samples]
    return Family("forge_calls_total", "counter", "Calls.", told, CALLS, CALLS[:2])


def read(page: bytes) -> dict[str, dict[tuple[str, ...], float]]:
    """By name of the sample, and its labels' values in the order of their names."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            assert labels not in found.get(sample.name, {}), "one series twice"
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_counters_gauges_and_histograms_are_read_back_as_they_were() -> None:
    seconds = Family(
        "forge_call_run_seconds", "histogram", "Run.", [(("a",), (1.0, 3.0, 4.0, 2.5))], ("service",), bounds=(0.1, 1.0)
    )
    level = Family("forge_sessions", "gauge", "Sessions.", [(('a"\\\n',), (7,))], ("service",), ("service",))
    page, content_type = Exposition("1.2").write([calls(("a", "ok", 3)), seconds, level], "")
    found = read(page)
    assert content_type.startswith("text/plain")
    assert found["forge_calls_total"] == {("f", "ok", "a"): 3.0}
    assert found["forge_call_run_seconds_bucket"] == {("0.1", "a"): 1.0, ("1.0", "a"): 3.0, ("+Inf", "a"): 4.0}
    assert found["forge_call_run_seconds_count"] == {("a",): 4.0}
    assert found["forge_call_run_seconds_sum"] == {("a",): 2.5}
    assert found["forge_sessions"] == {('a"\\\n',): 7.0}
    assert found["forge_broker_info"] == {("1.2",): 1.0}
    assert found["process_cpu_seconds_total"][()] >= 0.0


def test_openmetrics_is_written_for_who_asks_for_it() -> None:
    page, content_type = Exposition("1").write([calls(("a", "ok", 3))], "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert page.endswith(b"# EOF\n")


def test_a_label_with_a_million_values_makes_no_more_series_than_are_told_apart() -> None:
    """A service for each session: the first ones are told, the others together, and how many they are."""
    exposition = Exposition("1", apart_at_most=10)
    many = calls(*((f"gen-{n}", outcome, 1) for n in range(1_000) for outcome in ("ok", "raised")))
    found = read(exposition.write([many], "")[0])
    assert len(found["forge_calls_total"]) == 22
    assert found["forge_calls_total"]["other", "ok", "other"] == 990.0
    assert found["forge_calls_total"]["f", "raised", "gen-9"] == 1.0
    assert found["forge_folded_series"]["forge_calls_total",] == 1980.0


def told(fold: Fold, *samples: tuple[str, str, float]) -> dict[str, float]:
    return {values[0]: value[0] for values, value in fold.of(calls(*samples))}


def test_who_was_folded_stays_so_and_a_counter_of_many_never_falls() -> None:
    """Prometheus would take a fall for a restart, and a series that begins in the middle for a burst."""
    fold = Fold(1)
    assert told(fold, ("a", "ok", 5), ("b", "ok", 7)) == {"a": 5, "other": 7}
    assert told(fold, ("b", "ok", 8)) == {"other": 8}  # a is gone, and b is not told apart now
    assert told(fold, ("b", "ok", 8), ("c", "ok", 1)) == {"c": 1, "other": 8}
    assert told(fold, ("c", "ok", 2)) == {"c": 2, "other": 8}  # b is gone, what it counted stays
    assert fold.folded == 0


def test_a_thing_called_other_is_added_to_the_others() -> None:
    samples: Any = [((name,), (value,)) for name, value in (("other", 5), ("b", 7))]
    family = Family("forge_x_total", "counter", "X.", samples, ("service",), ("service",))
    assert dict(Fold(1).of(family)) == {("other",): (12,)}


@pytest.mark.parametrize(("folds", "expected"), [("sum", 0.9), ("max", 0.5)])
def test_levels_of_many_are_added_up_or_the_highest_is_told(folds: str, expected: float) -> None:
    samples: Any = [((name,), (value,)) for name, value in (("a", 0.1), ("b", 0.4), ("c", 0.5))]
    family = Family("forge_x_ratio", "gauge", "X.", samples, ("worker",), ("worker",), folds)
    fold = Fold(1)
    assert dict(fold.of(family))["other",][0] == pytest.approx(expected)
    assert dict(fold.of(family._replace(samples=samples[:2])))["other",] == (0.4,)  # levels do not stay
