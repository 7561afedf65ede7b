"""A place for each test, and one broker for all tests of a module that only need one to be there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.running import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A place with a broker that serves `gen`: two replicas of app:Gen(k=5). It has one GPU, by declaration."""
    place = Place(tmp_path_factory.mktemp("served"))
    with place.start_broker("--gpus", "1"):
        done = place.forge("deploy", "app:Gen", "--name", "gen", "--replicas", "2", "--arg", "k=5")
        assert done.code == 0, done
        assert "gen: 2 replicas of Gen healthy" in done.out
        assert "gen.predict(x, scale: int = 1)" in done.out
        yield place
