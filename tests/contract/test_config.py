"""Configuration is judged whole: every problem in one error, unknown options with the known ones (A2, A3)."""

from __future__ import annotations

import re
from typing import Any

import pytest

from forge_contract.addresses import check_address, default_address, ipc_path, is_loopback, read_http
from forge_contract.config import AutoscalingConfig, BrokerConfig, EndpointOptions, ServiceConfig
from forge_contract.errors import ConfigError
from forge_contract.scaling import ScalingPolicy


def test_all_problems_are_told_together_with_the_names_of_their_fields() -> None:
    """A3."""
    with pytest.raises(ConfigError) as caught:
        ServiceConfig(procs=0, errors="maybe", health_poll_rate=-1.0, min_replicas=3, max_replicas=2, name="a b")
    text = str(caught.value)
    for field in ("procs", "errors", "health_poll_rate", "min_replicas=3 is above max_replicas=2", "name"):
        assert field in text
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("cls", [ServiceConfig, AutoscalingConfig, EndpointOptions, BrokerConfig])
def test_every_field_of_a_wrong_type_is_a_problem_and_never_a_crash(cls: Any) -> None:
    """A3: whatever is given for it."""
    values = ("text", -5, 1.5, [1], (1,), {"a": 1}, True, float("nan"), 2**70)
    for name in cls.__dataclass_fields__:
        if name == "default_replicas":
            continue
        refused: list[str] = []
        for value in values:
            try:  # anything else that is raised fails the test
                cls(**{name: value})
            except ConfigError as error:
                refused.append(str(error))
        assert refused, f"{name} takes whatever it is given"
        assert all(name in told for told in refused)


def test_an_unknown_option_fails_with_the_closest_and_the_known_ones() -> None:
    """A2."""
    with pytest.raises(
        ConfigError, match=r"(?s)unknown option 'num_replica'; did you mean 'num_replicas'.*known ones.*procs"
    ):
        ServiceConfig().replace(num_replica=2)
    with pytest.raises(ConfigError, match="unknown option 5"):
        ServiceConfig.from_wire({5: 1})
    with pytest.raises(ConfigError, match="a map was expected"):
        ServiceConfig.from_wire([1])


def test_what_is_not_given_is_kept() -> None:
    """A2."""
    config = ServiceConfig(procs=2, num_replicas=3).replace(with_gpus=True).replace(procs=4)
    assert (config.procs, config.num_replicas, config.with_gpus) == (4, 3, True)
    assert config.replace(default_replicas=5).num_replicas == 5


def test_default_replicas_is_another_name_for_num_replicas() -> None:
    """A3."""
    assert ServiceConfig(default_replicas=3) == ServiceConfig(num_replicas=3)
    with pytest.raises(ConfigError, match="the same setting"):
        ServiceConfig(default_replicas=3, num_replicas=2)


def test_a_config_survives_the_wire() -> None:
    """PROTOCOL.md §7.1."""
    config = ServiceConfig(procs=2, hosts=3, autoscaling=AutoscalingConfig(scale_up_step_size=2), name="x")
    assert ServiceConfig.from_wire(config.to_wire()) == config
    assert ServiceConfig.from_wire(ServiceConfig().to_wire()) == ServiceConfig()


def test_hosts_multiply_ranks_and_gpus_are_shared_evenly() -> None:
    """A3."""
    config = ServiceConfig(procs=2, hosts=3, gpus_per_replica=12)
    assert (config.world, config.gpus_per_rank, config.mesh_sizes) == (6, 2, {"hosts": 3, "procs": 2})
    with pytest.raises(ConfigError, match="cannot be shared evenly by 6 ranks"):
        ServiceConfig(procs=2, hosts=3, gpus_per_replica=5)


def test_nobody_can_ask_for_a_billion_of_something() -> None:
    """W8."""
    for name in ("procs", "hosts", "num_replicas", "replica_max_concurrent_requests", "mesh_concurrency"):
        with pytest.raises(ConfigError, match=f"{name} must be at most"):
            ServiceConfig().replace(**{name: 10**9})
    for name in ("batch_size", "threads"):
        with pytest.raises(ConfigError, match=f"{name} must be at most"):
            EndpointOptions.checked("endpoint", {name: 2**70})


@pytest.mark.parametrize("address", ["ipc:///x", "tcp://h:1", "tcp://*:5555", "tcp://[::1]:65535", "tcp://h:*"])
def test_addresses_are_ipc_and_tcp(address: str) -> None:
    """PROTOCOL.md §1."""
    check_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "ipc://",
        "http://h:1",
        "tcp://h",
        "tcp://:1",
        "tcp://h:65536",
        "tcp://h:²",
        "tcp://h:" + "9" * 5000,
        "ipc://" + "x" * 108,
    ],
)
def test_what_is_no_address_is_told(address: str) -> None:
    """A3."""
    with pytest.raises(ConfigError):
        check_address(address)


@pytest.mark.parametrize(
    ("address", "read"),
    [
        ("127.0.0.1:8266", ("127.0.0.1", 8266)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_http_is_served_at_a_host_and_a_port(address: str, read: tuple[str, int]) -> None:
    assert BrokerConfig(http=address).http == address
    assert read_http(address) == read


@pytest.mark.parametrize(
    "address", ["", "8266", ":8266", "localhost", "::1:8266", "[]:1", "http://a:1", "a:65536", "a:x", "a:-1", "a:٣"]
)
def test_what_is_no_host_and_port_is_told_with_the_other_problems(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BrokerConfig(http=address, max_workers=-1)
    assert "is not host:port, such as 127.0.0.1:8266" in str(caught.value)
    assert "max_workers" in str(caught.value)


def test_only_what_cannot_be_reached_from_elsewhere_is_loopback() -> None:
    """W6."""
    assert all(map(is_loopback, ["ipc:///x", "tcp://127.0.0.1:1", "tcp://localhost:1", "tcp://[::1]:1"]))
    assert not any(map(is_loopback, ["tcp://0.0.0.0:1", "tcp://*:1", "tcp://eth0:1", "tcp://10.0.0.1:1"]))


def test_the_users_own_broker_is_found_by_the_environment() -> None:
    """A1."""
    assert default_address({"FORGE_BROKER": "tcp://h:1"}, 5) == "tcp://h:1"
    assert default_address({"XDG_RUNTIME_DIR": "/run/u"}, 5) == "ipc:///run/u/forge/broker.sock"
    assert str(ipc_path(default_address({}, 5))) == "/tmp/forge-5/broker.sock"
    assert ipc_path("tcp://h:1") is None


def test_contradictions_among_the_options_of_batches_are_told_together() -> None:
    """A3, issue's options of batches: what would change nothing is refused, not ignored."""
    with pytest.raises(ConfigError) as caught:
        EndpointOptions(
            batch_key=7,
            batch_max_weight=8.0,
            batch_eager=True,
            batch_sessions=True,
            collate="pad",
            batch_timeout=-1.0,
        )
    text = str(caught.value)
    for problem in (
        "batch_key must be a function of the arguments or the name of one, not 7",
        "batch_max_weight needs batch_weight",
        "collate must be 'stack', not 'pad'",
        "collate needs batch_mode='call'",
        "batch_timeout must be at least 0",
        "batch_max_weight, batch_key, batch_eager, batch_sessions, collate without batch_size above 1",
    ):
        assert problem in text


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"batch_size": True}, "batch_size must be int, not True"),
        ({"batch_size": 8, "batch_timeout": float("nan")}, "batch_timeout must be at least 0, not nan"),
        ({"batch_size": 8, "batch_mode": "list"}, "batch_mode must be 'route' or 'call', not 'list'"),
        ({"batch_size": 8, "collate": "stack"}, "collate needs batch_mode='call'"),
        ({"batch_size": 8, "batch_max_weight": 0, "batch_weight": "x"}, "batch_max_weight must be above 0, not 0"),
        ({"batch_size": 8, "batch_weight": 3}, "batch_weight must be a function of the arguments or the name of one"),
        ({"batch_eager": True}, "batch_eager without batch_size above 1: nothing is batched"),
    ],
)
def test_options_of_batches_that_cannot_hold_are_told(options: dict[str, Any], problem: str) -> None:
    """A2."""
    with pytest.raises(ConfigError, match=re.escape(problem)):
        EndpointOptions(**options)


def test_a_function_travels_as_the_word_that_it_is_one_and_a_name_as_itself() -> None:
    """PROTOCOL.md §7.1: the broker makes batches of what clients say, and runs nobody's code for it."""
    options = EndpointOptions(batch_size=8, batch_key=len, batch_weight="text", batch_max_weight=10)
    told = options.to_wire()
    assert (told["batch_key"], told["batch_weight"]) == (True, "text")
    assert EndpointOptions(**told).to_wire() == told


def test_what_is_wrong_with_thresholds_and_with_limits_is_told_together() -> None:
    """A3, X1: of a configuration that comes as a map, as from the command line."""
    wrong = {
        "scale_down_capacity_threshold": 0.9,
        "min_healthy_replicas_ratio": 2.0,
        "evaluate_every_s": 0.0,
        "policy": "no name",
        "scale_up": 1,
    }
    with pytest.raises(ConfigError) as caught:
        ServiceConfig.from_wire({"min_replicas": 5, "max_replicas": 2, "num_replicas": 5, "autoscaling": wrong})
    told = str(caught.value)
    for said in (
        "autoscaling: scale_down_capacity_threshold=0.9 must be below scale_up_capacity_threshold=0.8",
        "min_healthy_replicas_ratio is a share",
        "evaluate_every_s must be at least 0.01",
        "policy must be 'module:qualname', not 'no name'",
        "autoscaling: unknown option 'scale_up'",
        "autoscaling: the known ones are evaluate_every_s",
        "min_replicas=5 is above max_replicas=2",
    ):
        assert said in told
    with pytest.raises(ConfigError, match="autoscaling: unknown option '1'"):
        ServiceConfig.from_wire({"autoscaling": {1: 1}})


class Policy(ScalingPolicy):
    def decide(self, *_: Any) -> int:
        return 0


def test_a_policy_is_an_instance_a_class_a_factory_or_a_name() -> None:
    """X1: by value it travels beside the configuration, by name in it."""
    for given in (Policy(), Policy, [Policy()].pop):
        assert AutoscalingConfig(policy=given).to_wire()["policy"] is None
    named = AutoscalingConfig(policy="package.module:Outer.Policy")
    assert AutoscalingConfig(**named.to_wire()) == named
    for wrong in (ScalingPolicy(), 5, int, lambda: 1 / 0, "module", ":name", "mod ule:name"):
        with pytest.raises(ConfigError, match="policy"):
            AutoscalingConfig(policy=wrong)
