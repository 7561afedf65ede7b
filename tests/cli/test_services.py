"""deploy, call, stop, and the commands that look, against a real broker: through the public door."""

from __future__ import annotations

import json
import re
import signal
import time

import pytest

from forge_cli.services import plain, read_arguments
from tests.cli.running import BOUND_S, Place


@pytest.mark.parametrize(
    ("arguments", "value"),
    [('{"x": 1, "scale": 3}', 8), ("[2, 10]", 25), ("4", 9), ("[6]", 11)],
    ids=["object: keywords", "array: positional", "anything else: the one argument", "array of one"],
)
def test_call_prints_what_the_endpoint_returns(served: Place, arguments: str, value: int) -> None:
    done = served.forge("call", "gen.predict", arguments)
    assert done.code == 0, done
    assert json.loads(done.out) == {"y": value}
    assert done.err == ""


def test_call_reads_its_arguments_from_stdin(served: Place) -> None:
    done = served.forge("call", "gen.predict", "-", given='{"x": 1}')
    assert json.loads(done.out) == {"y": 6}


def test_what_json_cannot_say_is_shown_as_its_repr(served: Place) -> None:
    done = served.forge("call", "gen.odd")
    assert done.code == 0, done
    assert json.loads(done.out) == [1, "{2}", "b'x'", "nan", {"3": "ü"}]


def test_plain_values_stay_what_they_are() -> None:
    assert plain({"a": [None, True, 1.5, "x"]}) == {"a": [None, True, 1.5, "x"]}
    assert plain({(1, 2): float("inf")}) == {"(1, 2)": "inf"}


def test_no_arguments_are_no_arguments() -> None:
    assert read_arguments(None) == ([], {})
    assert read_arguments("null") == ([None], {})
    assert read_arguments("[[1]]") == ([[1]], {})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["call", "gen.predit", "1"], "UnknownEndpoint: gen has no endpoint 'predit'; did you mean 'predict'"),
        (["call", "gn.predict", "1"], "UnknownService: no service 'gn'; did you mean 'gen'?"),
        (["call", "gen.predict", '{"z": 1}'], "BadCall: gen.predict"),
        (["call", "gen.rest", "--timeout", "0.2"], "CallTimeout: gen.rest did not answer within 0.2 s"),
        (["call", "gen.shutdown"], "UnknownEndpoint"),
        (["stop", "gn"], "UnknownService: no service 'gn'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_of_ours_is_one_line_with_its_type(served: Place, line: list[str], said: str) -> None:
    done = served.forge(*line)
    assert done.code == 1, done
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert done.out == ""


def test_an_exception_in_an_endpoint_shows_its_remote_traceback(served: Place) -> None:
    """A5"""
    done = served.forge("call", "gen.fail")
    assert done.code == 1, done
    assert "app.py" in done.err
    assert done.err.endswith("Error: KeyError: '[red]'\n")


def test_a_class_that_cannot_start_fails_the_deploy_and_leaves_nothing(served: Place) -> None:
    """A2"""
    done = served.forge("deploy", "app:Broken", "--name", "broken")
    assert done.code == 1, done
    assert "RuntimeError: no weights" in done.err
    assert [service["name"] for service in served.status()["services"] if not service["stopping"]] == ["gen"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["app:Gn"], "did you mean 'Gen'"),
        (["app:Plain"], "class Plain is no subclass of ForgeActor"),
        (["app:Gen", "--option", "num_replica=2"], "did you mean 'num_replicas'"),
        (["app:Gen", "--option", 'autoscaling={"up": 1}'], "unknown option 'up'"),
        (["app:Gen", "--name", "gen"], "a service named 'gen' is running"),
        (["broken_module:X"], "broken_module cannot be imported: ZeroDivisionError"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_deploy_that_cannot_be_is_refused_with_2(served: Place, line: list[str], said: str) -> None:
    (served.directory / "broken_module.py").write_text("1 / 0\n", "utf-8")
    done = served.forge("deploy", *line)
    assert done.code == 2, done
    assert said in done.err
    assert "forge_cli" not in done.err


def test_a_service_outlives_the_command_that_deployed_it_until_it_is_stopped(served: Place) -> None:
    """A10"""
    assert served.forge("deploy", "app:Gen", "--name", "brief").code == 0
    (brief,) = [service for service in served.status()["services"] if service["name"] == "brief"]
    assert brief["detached"] is True
    assert served.forge("call", "brief.predict", "1").code == 0
    done = served.forge("stop", "brief")
    assert (done.code, done.out) == (0, "brief is stopped\n")
    assert [service["name"] for service in served.status()["services"]] == ["gen"]
    assert served.forge("call", "brief.predict", "1").code == 1


def test_a_deploy_that_waits_is_visible_with_its_reason_and_ctrl_c_takes_it_back(served: Place) -> None:
    """A3: what cannot be placed is pending, because …"""
    with served.start("deploy", "app:Gen", "--name", "needy", "--replicas", "2", "--with-gpus") as waiting:
        waiting.wait_for(lambda line: "needy: replica 1 is pending" in line)
        done = served.forge("status")
        assert re.search(r"needy/1 is pending, because it needs .* GPU", done.out), done
        assert waiting.interrupt() == 130
    deadline = time.monotonic() + BOUND_S
    while [service["name"] for service in served.status()["services"]] != ["gen"]:
        assert time.monotonic() < deadline
    assert set(served.status()["gpus"].values()) == {""}


def test_status_shows_services_replicas_queues_and_workers_plainly_in_a_pipe(served: Place) -> None:
    out = served.forge("status").out
    for word in (f"broker at {served.address}", "SERVICE", "gen/0", "gen/1", "HEALTHY", "2 of 2", "queues", "w-"):
        assert word in out
    assert "\x1b" not in out


def test_status_json_is_the_brokers_own_answer(served: Place) -> None:
    status = served.status()
    (gen,) = status["services"]
    assert [replica["name"] for replica in gen["replicas"]] == ["gen/0", "gen/1"]
    assert {"incarnation", "uptime_s", "workers", "gpus", "counters"} <= status.keys()


def test_watch_repeats_until_ctrl_c_which_is_no_failure(served: Place) -> None:
    with served.start("status", "--watch", "--json") as watching:
        assert watching.process.stdout is not None
        first, second = (json.loads(watching.process.stdout.readline()) for _ in range(2))
        assert first["uptime_s"] < second["uptime_s"]
        assert watching.interrupt() == 0


def test_watch_ends_with_69_when_its_broker_does(place: Place) -> None:
    with (
        place.start_broker("--orphan-grace-s", "0.2") as broker,
        place.start("status", "--watch", "--json") as watching,
    ):
        assert watching.process.stdout is not None
        assert watching.process.stdout.readline()
        broker.process.send_signal(signal.SIGKILL)
        watching.wait_for(lambda line: "went away" in line)
        assert watching.process.wait(BOUND_S) == 69


def test_workers_and_replicas_and_requests_can_be_explained(served: Place) -> None:
    """C5"""
    (worker, *_) = json.loads(served.forge("workers", "--json").out)["workers"]
    assert worker["name"] in served.forge("workers").out
    assert f"pid {worker['pid']}" in served.forge("explain", worker["name"]).out
    assert "HEALTHY" in served.forge("explain", "gen/0").out
    request = json.loads(served.forge("call", "gen.who").out)
    assert "it is over" in served.forge("explain", request).out
    assert "nothing is known of 'nobody'" in served.forge("explain", "nobody").out


def test_doctor_finds_the_broker_and_says_how_fast_it_answers(served: Place) -> None:
    done = served.forge("doctor")
    assert done.code == 0, done
    assert re.search(r"OK +broker .* answers in \d+\.\d ms .*, trusted", done.out), done
    for subject in ("python", "pyzmq", "msgpack", "torch", "GPUs", "private directory", "open files"):
        assert re.search(rf"^(OK|warning) +{subject}", done.out, re.MULTILINE), subject
