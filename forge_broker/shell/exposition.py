"""The core's families in Prometheus's format, through prometheus_client, which is imported when HTTP is asked for and not before.

A label that names things has as many values as there are things, and somebody may make a service for each session. So of each family
only so many are told apart, those that came first; the others are one series, `other`, and `forge_folded_series` says how many they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import add
from typing import TYPE_CHECKING, Any, Final

from forge_broker.core.families import Family, Sample, Value

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

APART_AT_MOST: Final = (
    500  # things of one family; with 22 bounds each, a histogram of so many endpoints is 12,000 lines
)
OTHER: Final = "other"


class Fold:
    """Which things of one family are told apart. Who was folded stays so as long as it lives, and what it had counted stays when it is
    gone: `other` never falls, which Prometheus would take for a restart."""

    def __init__(self, apart_at_most: int) -> None:
        self._apart_at_most = apart_at_most
        self._apart: set[tuple[str, ...]] = set()
        self._folded: dict[tuple[str, ...], Value] = {}  # by all its labels: what it had last
        self._gone: dict[tuple[str, ...], Value] = {}  # by the labels of `other`
        self.folded = 0  # series, at the last look

    def of(self, family: Family) -> list[Sample]:
        naming = [label in family.names for label in family.labels]
        things = {_named(values, naming) for values, _ in family.samples}
        self._apart &= things
        folded: dict[tuple[str, ...], Value] = {}
        told: dict[tuple[str, ...], Value] = {}
        for values, value in family.samples:
            thing = _named(values, naming)
            if thing not in self._apart and (values in self._folded or len(self._apart) >= self._apart_at_most):
                folded[values] = value
                continue
            self._apart.add(thing)
            # A thing may itself be called `other`.
            told[values] = _both(family, told.get(values), value)
        if family.kind != "gauge":
            for values in self._folded.keys() - folded.keys():
                other = _other(values, naming)
                self._gone[other] = _both(family, self._gone.get(other), self._folded[values])
        self._folded = folded
        self.folded = len(folded)
        for values, value in [
            *((_other(values, naming), value) for values, value in folded.items()),
            *self._gone.items(),
        ]:
            told[values] = _both(family, told.get(values), value)
        return list(told.items())


class Exposition:
    """Made once, asked for each scrape, by one thread at a time."""

    def __init__(self, version: str, apart_at_most: int = APART_AT_MOST) -> None:
        from prometheus_client import CollectorRegistry
        from prometheus_client.process_collector import ProcessCollector

        self._version = version
        self._apart_at_most = apart_at_most
        self._folds: dict[str, Fold] = {}
        self._families: Sequence[Family] = ()
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def write(self, families: Sequence[Family], accept: str) -> tuple[bytes, str]:
        """The page, in the format that the scraper accepts, and its content type."""
        from prometheus_client.exposition import choose_encoder

        self._families = families
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        """prometheus_client asks this."""
        from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

        yield InfoMetricFamily("forge_broker", "The broker.", value={"version": self._version})
        folded = GaugeMetricFamily(
            "forge_folded_series", "Series that are part of `other`, because there are too many.", labels=["family"]
        )
        for family in self._families:
            fold = self._folds.setdefault(family.name, Fold(self._apart_at_most))
            yield _metric(family, fold.of(family))
            if family.names:
                folded.add_metric([family.name], fold.folded)
        yield folded


def _metric(family: Family, samples: Sequence[Sample]) -> Metric:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    if family.kind == "histogram":
        told = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for values, (*seen, count, total) in samples:
            buckets = [(repr(bound), n) for bound, n in zip(family.bounds, seen, strict=True)]
            told.add_metric(values, [*buckets, ("+Inf", count)], total)
        return told
    kind: Any = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    single = kind(family.name, family.help, labels=family.labels)
    for values, (value,) in samples:
        single.add_metric(values, value)
    made: Metric = single
    return made


def _named(values: tuple[str, ...], naming: Sequence[bool]) -> tuple[str, ...]:
    return tuple(value for value, names in zip(values, naming, strict=True) if names)


def _other(values: tuple[str, ...], naming: Sequence[bool]) -> tuple[str, ...]:
    return tuple(OTHER if names else value for value, names in zip(values, naming, strict=True))


def _both(family: Family, one: Value | None, other: Value) -> Value:
    if one is None:
        return other
    return tuple(map(max if family.folds == "max" else add, one, other))
