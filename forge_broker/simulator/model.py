"""What a call takes, and a replica to start: the model of a service, where the rest of the simulation is the real thing.

A call takes `mean_s`, scattered lognormally with `spread` (standard deviation over mean); one run of a batch takes `batch_base_s` and
`batch_item_s` for each of its calls, scattered likewise. A replica runs `parallel` of the calls it has at once, as a plain `def` does
with its threads; the others wait inside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from forge_contract.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServiceModel:
    """Times in seconds."""

    mean_s: float = 0.02
    spread: float = 0.0  # standard deviation / mean of a call's time
    batch_base_s: float | None = None  # of a run with a list; None: the endpoint runs single calls
    batch_item_s: float = 0.0
    start_s: float = 5.0  # from the launch of a worker process until its replica is ready
    parallel: int | None = None  # calls (or batches) that a replica really runs at once; None: all it has

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be a number from {least} on, not {value!r}"
            for name, value, least in (
                ("mean_s", self.mean_s, 0),
                ("spread", self.spread, 0),
                ("batch_base_s", self.batch_base_s or 0.0, 0),
                ("batch_item_s", self.batch_item_s, 0),
                ("start_s", self.start_s, 0),
                ("parallel", 1 if self.parallel is None else self.parallel, 1),
            )
            if not (math.isfinite(value) and value >= least)
        ]
        if problems:
            raise ConfigError(where="service model", problems=problems)

    def drawer(self, random: Random) -> Drawer:
        return Drawer(self, random)


class Drawer:
    """Draws times. One lognormal factor for each run: of mean 1, and 1 where there is no spread."""

    def __init__(self, model: ServiceModel, random: Random) -> None:
        self._model = model
        self._normal = random.gauss
        self._sigma = math.sqrt(math.log1p(model.spread**2))
        self._mu = -(self._sigma**2) / 2

    def call_s(self) -> float:
        mean = self._model.mean_s
        return mean * math.exp(self._normal(self._mu, self._sigma)) if self._sigma else mean

    def batch_s(self, size: int) -> float:
        model = self._model
        mean = (model.batch_base_s or 0.0) + size * model.batch_item_s
        return mean * math.exp(self._normal(self._mu, self._sigma)) if self._sigma else mean
