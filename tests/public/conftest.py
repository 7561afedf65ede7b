"""One embedded broker for all tests of a module, and nothing of one test left when the next begins."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from forge_client.connection import _clients
from forge_client.embedded import end_embedded


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    """FORGE_* variables for the module's broker; a module overrides it."""
    return {}


@pytest.fixture(scope="module", autouse=True)
def embedded(settings: dict[str, str]) -> Iterator[None]:
    """The broker is started by the first test that needs it, and ended after the last."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield
        end_embedded()


@pytest.fixture(autouse=True)
async def stopped() -> AsyncIterator[None]:
    """What a test started is stopped and its clients have left; the broker stays."""
    yield
    for client in list(_clients()):
        await client.shutdown()
