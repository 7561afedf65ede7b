"""A real worker process as a spare (X2): it imports when it is told to, and becomes a rank without importing again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest

from forge_contract.messages import OK, READY, UNREADY, WARMED
from forge_contract.payload import decode_exception
from tests.worker.fake_broker import Child, FakeBroker, goodbye


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[FakeBroker]:
    with FakeBroker(f"ipc://{tmp_path}/b.sock") as broker:
        yield broker


def test_a_spare_imports_with_its_gpus_pinned_and_holds_nothing_until_it_is_assigned(broker: FakeBroker) -> None:
    """X2, L2: it leaves when it is told to stop like one that idles, and is nothing to a broker's successor."""
    with Child(broker, "--gpu", "0,1") as process:
        broker.until(lambda: bool(broker.hellos), "hello")
        broker.warm("Echo", gpus=["0", "1"])
        broker.expect(WARMED)
        broker.ask_who()
        broker.until(lambda: len(broker.hellos) > 1, "second hello")
        assert broker.hellos[1]["holds"] is None
        broker.assign("Echo", "environment", gpus=["0", "1"], rank=0)
        broker.expect(READY)
        broker.call(0, (1, ()))
        status, seen = broker.replies(1)[1]
        assert status == OK
        assert seen["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert "RANK" not in seen, "the module was imported again for the rank"
        broker.stop()
        goodbye(broker, process)


def test_what_is_told_while_it_imports_comes_afterwards_and_its_class_by_value_is_loaded_once(
    broker: FakeBroker, tmp_path: Path
) -> None:
    """X2, A9."""
    marks = tmp_path / "marks"

    class Counting:
        async def loads(self) -> int:
            return len(marks.read_text().splitlines())

    def load() -> type:
        with marks.open("a") as file:
            file.write("loaded\n")
        return Counting

    class Loaded:
        def __reduce__(self) -> tuple[object, ...]:
            return load, ()

    code = {"code": cloudpickle.dumps(Loaded())}
    with Child(broker):
        broker.until(lambda: bool(broker.hellos), "hello")
        broker.warm(code)
        broker.assign(code, "loads")
        broker.expect(READY)
        broker.call(0, (1, ()))
        assert broker.replies(1) == {1: (OK, 1)}


def test_an_import_that_raises_is_told_and_the_spare_leaves(broker: FakeBroker) -> None:
    """X2: an assignment that crosses it is not taken."""
    with Child(broker) as process:
        broker.until(lambda: bool(broker.hellos), "hello")
        broker.warm({"ref": "no_such_module:Echo"})
        broker.assign("Echo", "echo")
        (_, error, _), (exception,) = broker.expect(UNREADY)
        assert "no_such_module" in error[1]["why"]
        raised = decode_exception(exception, trusted=True)
        assert isinstance(raised, ModuleNotFoundError)
        assert "for a spare of sample" in str(raised)
        assert goodbye(broker, process) == "could not import"
        assert not any(message[0] == READY for message, _ in broker.said)
