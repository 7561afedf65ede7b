"""dead list, show, retry, drop, against a broker that answers what it is told (F4)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge_contract.errors import BadCall, PoisonedRequest
from forge_contract.payload import encode_call
from tests.cli.fake import Told, told

LETTER: dict[str, Any] = {
    "id": "1a2b3c-17",
    "service": "gen",
    "endpoint": "predict",
    "attempts": 3,
    "died": 12.0,
    "why": "rank 0: died of SIGSEGV\n  Fatal Python error\n  \x1b[31mred",
    "bytes": 2048,
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Told]:
    with told(tmp_path) as broker:
        broker.controls["dead_list"] = lambda fields: {"dead": [LETTER]}
        yield broker


def keep(broker: Told, *arguments: Any, trusted: bool = True, endpoint: int = 100) -> None:
    """A letter of these arguments."""
    payload = encode_call(arguments, {}, trusted=True, where="x")
    taken = {"service": "gen", "endpoint": endpoint, "trusted": trusted}
    broker.controls["dead_take"] = lambda fields: {**taken, "payload": payload}
    broker.controls["dead_drop"] = lambda fields: {"dropped": 1}


def test_the_list_tells_what_was_called_and_how_it_died(broker: Told) -> None:
    """F4"""
    lines = broker.forge("dead", "list").output.splitlines()
    assert [line.rstrip() for line in lines] == [
        "DEAD LETTER  ENDPOINT     ATTEMPTS      DIED  ARGUMENTS  WHY",
        "1a2b3c-17    gen.predict         3  12 s ago    2.0 KiB  rank 0: died of SIGSEGV",
    ]
    assert json.loads(broker.forge("dead", "list", "--json").output) == {"dead": [LETTER]}


def test_no_dead_letters_are_said_to_be_none(broker: Told) -> None:
    broker.controls["dead_list"] = lambda fields: {"dead": []}
    assert broker.forge("dead", "list").output == "no dead letters\n"


def test_show_tells_the_story_and_leaves_the_terminal_alone(broker: Told) -> None:
    """C5, F4. What a process wrote before it died may hold anything."""
    broker.controls["dead_show"] = lambda fields: {**LETTER, "story": ["-9 s  ran on gen/0, which died"]}
    done = broker.forge("dead", "show", "1a2b3c-17")
    assert done.exit_code == 0, done.output
    assert broker.asked("dead_show") == [{"id": "1a2b3c-17"}]
    assert "1a2b3c-17 called gen.predict and died 12 s ago, after 3 attempts" in done.output
    assert "    Fatal Python error" in done.output
    assert "-9 s  ran on gen/0, which died" in done.output
    assert "\x1b" not in done.output


def test_retry_calls_again_with_the_kept_arguments_prints_the_result_and_drops_the_letter(broker: Told) -> None:
    """F4"""
    broker.serves("gen", "predict")
    broker.methods["predict"] = lambda item, x: {"y": x}
    keep(broker, 7)
    done = broker.forge("dead", "retry", "1a2b3c-17")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"y": 7}
    assert "1a2b3c-17 succeeded" in done.stderr
    assert [one[:3] for one in broker.seen if one[0] == "call"] == [("call", "predict", ((7,), {}))]
    assert broker.asked("dead_drop") == [{"id": "1a2b3c-17"}]


def test_large_arguments_are_sent_again_as_they_were_kept(broker: Told) -> None:
    broker.serves("gen", "predict")
    broker.methods["predict"] = lambda item, x: len(x)
    keep(broker, b"x" * (1 << 20))
    assert broker.forge("dead", "retry", "1a2b3c-17").stdout == f"{1 << 20}\n"


def test_a_retry_that_fails_keeps_the_letter_and_says_so(broker: Told) -> None:
    """F4"""

    def die(item: dict[str, Any], x: int) -> None:
        raise PoisonedRequest(endpoint="gen.predict", attempts=3)

    broker.serves("gen", "predict")
    broker.methods["predict"] = die
    keep(broker, 7)
    done = broker.forge("dead", "retry", "1a2b3c-17")
    assert (done.exit_code, done.stdout) == (1, "")
    first, second = done.stderr.splitlines()
    assert first.startswith("Error: PoisonedRequest: gen.predict")
    assert second == "1a2b3c-17 is still a dead letter"
    assert not broker.asked("dead_drop")


def test_a_retry_has_the_timeout_it_is_given(broker: Told) -> None:
    """F5"""
    broker.serves("gen", "predict")
    broker.silent.add("predict")
    keep(broker, 7)
    done = broker.forge("dead", "retry", "1a2b3c-17", "--timeout", "0.1")
    assert done.exit_code == 1
    assert "CallTimeout: gen.predict did not answer within 0.1 s" in done.stderr
    assert not broker.asked("dead_drop")


def test_a_retry_of_an_actors_call_reaches_all_its_ranks(broker: Told) -> None:
    """A7: as `forge call` would."""
    broker.serves("gen", "predict", kind="actor")
    keep(broker, 7)
    done = broker.forge("dead", "retry", "1a2b3c-17")
    assert done.exit_code == 0, done.output
    assert "ValueMesh" in done.stdout


def test_what_came_without_trust_is_not_sent_again_with_it(broker: Told) -> None:
    """W6: a worker would unpickle what a stranger wrote."""
    broker.serves("gen", "predict")
    keep(broker, 7, trusted=False)
    done = broker.forge("dead", "retry", "1a2b3c-17")
    assert done.exit_code == 1
    assert "forge dead retry 1a2b3c-17 --broker tcp://" in done.stderr
    assert not [one for one in broker.seen if one[0] == "call"]


def test_what_came_without_trust_is_sent_again_without(tmp_path: Path) -> None:
    """W6"""
    with told(tmp_path, trusted=False) as broker:
        broker.serves("gen", "predict")
        keep(broker, 7, trusted=False)
        assert broker.forge("dead", "retry", "1a2b3c-17").stdout == "7\n"


def test_a_service_that_is_replaced_during_a_retry_gets_nothing(broker: Told) -> None:
    broker.serves("gen", "predict")
    keep(broker, 7, endpoint=9)
    done = broker.forge("dead", "retry", "1a2b3c-17")
    assert done.exit_code == 1
    assert "gen was deployed anew this moment; try again" in done.stderr
    assert not [one for one in broker.seen if one[0] == "call"]


def test_drop_counts_what_was_there_and_names_what_was_not(broker: Told) -> None:
    def drop(fields: dict[str, Any]) -> dict[str, Any]:
        if fields["id"] == "1-9":
            raise BadCall(endpoint="dead", why="there is no such letter")
        return {"dropped": 1}

    broker.controls["dead_drop"] = drop
    done = broker.forge("dead", "drop", "1-1", "1-2", "1-1")
    assert (done.exit_code, done.output) == (0, "2 dead letters dropped\n")
    assert broker.asked("dead_drop") == [{"id": "1-1"}, {"id": "1-2"}]
    done = broker.forge("dead", "drop", "1-1", "1-9")
    assert done.exit_code == 1
    assert done.stdout == "1 dead letter dropped\n"
    assert "no dead letter 1-9; `forge dead list` shows" in done.stderr


def test_drop_all_is_said_in_so_many_words(broker: Told) -> None:
    broker.controls["dead_drop"] = lambda fields: {"dropped": 1234}
    assert broker.forge("dead", "drop", "--all").output == "1,234 dead letters dropped\n"
    assert broker.asked("dead_drop") == [{"id": None}]
    for line in (["dead", "drop"], ["dead", "drop", "--all", "1-1"]):
        assert broker.forge(*line).exit_code == 2
    assert len(broker.asked("dead_drop")) == 1
