"""Where a setting comes from: the option, else the variable, else the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from forge_cli.broker import settle
from forge_cli.options import read_value, resolve_broker
from forge_contract.errors import ConfigError

FILE = """
[broker]
max_workers = 3
heartbeat_s = 0.25
gpus = ["4"]
[client]
broker = "tcp://in-the-file:1"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "forge.toml"
    path.write_text(FILE, "utf-8")
    return path


def test_the_option_wins_then_the_variable_then_the_file(file: Path) -> None:
    options: dict[str, Any] = {"max_workers": 5, "heartbeat_s": None}
    environ = {"FORGE_MAX_WORKERS": "4", "FORGE_CONFIG": str(file)}
    assert settle(options, environ, None).max_workers == 5
    assert settle({}, environ, None).max_workers == 4
    assert settle({}, {}, file).max_workers == 3
    assert settle(options, environ, None).heartbeat_s == 0.25
    assert settle({}, {"HOME": "/nowhere"}, None).max_workers == 64


def test_the_option_config_wins_over_the_variable(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("[broker]\nmax_workers = 9\n", "utf-8")
    assert settle({}, {"FORGE_CONFIG": str(file)}, other).max_workers == 9


def test_gpus_come_from_the_option_the_variable_the_file_or_the_machine(file: Path) -> None:
    variable = {"FORGE_GPUS": "2"}
    machine = {"CUDA_VISIBLE_DEVICES": "6,7", "HOME": "/nowhere"}
    assert settle({"gpus": "none"}, variable, file).gpus == ()
    assert settle({"gpus": "0,3"}, variable, file).gpus == ("0", "3")
    assert settle({}, variable, file).gpus == ("0", "1")
    assert settle({}, machine, file).gpus == ("4",)
    assert settle({}, machine, None).gpus == ("6", "7")


def test_a_bind_is_added_to_the_private_address_unless_it_is_an_ipc_address_itself() -> None:
    environ = {"XDG_RUNTIME_DIR": "/run/user/7", "FORGE_BROKER": "tcp://elsewhere:1", "HOME": "/nowhere"}
    own = "ipc:///run/user/7/forge/broker.sock"
    assert settle({}, environ, None).bind == (own,)
    assert settle({"bind": ("tcp://127.0.0.1:5555",)}, environ, None).bind == (own, "tcp://127.0.0.1:5555")
    assert settle({"bind": ("ipc:///tmp/x.sock",)}, environ, None).bind == ("ipc:///tmp/x.sock",)
    assert settle({}, environ | {"FORGE_BIND": "tcp://127.0.0.1:1"}, None).bind == (own, "tcp://127.0.0.1:1")


def test_all_problems_of_a_configuration_are_told_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('[broker]\nheartbeat_s = -1\nliveness = "many"\nbind = ["udp://x"]\n', "utf-8")
    with pytest.raises(ConfigError) as raised:
        settle({"max_workers": -1}, {}, path)
    for problem in ("heartbeat_s must be above 0", "liveness must be int", "max_workers", "udp://x"):
        assert problem in str(raised.value)


def test_an_unknown_setting_in_the_file_is_refused_with_the_closest_one(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[broker]\nmax_worker = 1\n", "utf-8")
    with pytest.raises(ConfigError, match=r"max_worker.*did you mean 'max_workers'"):
        settle({}, {}, path)


def test_commands_look_for_the_broker_in_the_same_order(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setenv("HOME", "/nowhere")
    assert resolve_broker(None) == ("ipc:///run/user/7/forge/broker.sock", "the default")
    monkeypatch.setenv("FORGE_CONFIG", os.fspath(file))
    assert resolve_broker(None) == ("tcp://in-the-file:1", "the configuration file")
    monkeypatch.setenv("FORGE_BROKER", "tcp://in-the-variable:1")
    assert resolve_broker(None)[0] == "tcp://in-the-variable:1"
    assert resolve_broker("tcp://in-the-option:1")[0] == "tcp://in-the-option:1"


def test_the_clients_table_takes_the_broker_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('[client]\nbrokr = "tcp://x:1"\n', "utf-8")
    monkeypatch.setenv("FORGE_CONFIG", os.fspath(path))
    with pytest.raises(ConfigError, match="brokr"):
        resolve_broker(None)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2), ("0.5", 0.5), ("true", True), ("[1]", [1]), ("weights.pt", "weights.pt"), ('"2"', "2"), ("", "")],
)
def test_a_value_is_json_where_it_is_json_and_text_otherwise(text: str, value: object) -> None:
    assert read_value(text) == value
