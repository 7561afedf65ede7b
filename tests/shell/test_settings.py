"""Option, then FORGE_* variable, then TOML file."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_broker.shell.settings import load, slots
from forge_contract.errors import ConfigError


def test_an_option_wins_over_a_variable_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "forge.toml"
    file.write_text("[broker]\nmax_workers = 1\nheartbeat_s = 0.25\nliveness = 7\n", encoding="utf-8")
    config = load({"max_workers": 3}, {"FORGE_MAX_WORKERS": "2", "FORGE_LIVENESS": "8"}, file)
    assert (config.max_workers, config.liveness, config.heartbeat_s) == (3, 8, 0.25)


def test_an_option_that_was_not_said_is_no_option() -> None:
    assert load({"max_workers": None}, {"FORGE_MAX_WORKERS": "2", "HOME": "/nowhere"}).max_workers == 2


def test_the_default_address_is_the_users_own_private_one() -> None:
    config = load({}, {"XDG_RUNTIME_DIR": "/run/user/7", "HOME": "/nowhere"})
    assert config.bind == ("ipc:///run/user/7/forge/broker.sock",)
    assert config.log_dir == "/run/user/7/forge/logs"


def test_the_place_of_http_is_meant_for_the_broker_of_the_machine_and_not_for_a_programs_own(tmp_path: Path) -> None:
    """A1: its port would be taken, and the program would not start."""
    environ = {"FORGE_HTTP": "127.0.0.1:8266", "HOME": str(tmp_path)}
    assert load({}, environ).http == "127.0.0.1:8266"
    assert load({"embedded": True}, environ).http is None
    assert load({"embedded": True, "http": "127.0.0.1:0"}, environ).http == "127.0.0.1:0"


def test_variables_of_other_programs_are_left_alone() -> None:
    others = {"FORGE_TEST_RUN": "x", "FORGE_BROKER": "tcp://a:1", "HOME": "/nowhere"}
    assert load({}, others) == load({}, {"HOME": "/nowhere"})


def test_every_wrong_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="FORGE_MAX_WORKERS='many'") as caught:
        load({}, {"FORGE_MAX_WORKERS": "many", "FORGE_INSECURE": "perhaps", "HOME": "/nowhere"})
    assert "FORGE_INSECURE='perhaps'" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "forge.toml"
    file.write_text("[broker\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"forge\.toml"):
        load({}, {"FORGE_CONFIG": str(file)})


def test_an_unknown_setting_is_refused_with_the_closest_one(tmp_path: Path) -> None:
    file = tmp_path / "forge.toml"
    file.write_text("[broker]\nmax_worker = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'max_workers'"):
        load({}, {}, file)


@pytest.mark.parametrize(
    ("text", "names"),
    [("2", ("0", "1")), ("0", ()), ("0,3", ("0", "3")), ("GPU-a, GPU-b", ("GPU-a", "GPU-b")), ("none", ())],
)
def test_gpu_slots_are_a_count_or_names(text: str, names: tuple[str, ...]) -> None:
    assert slots(text) == names
