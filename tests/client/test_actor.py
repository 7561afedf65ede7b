"""What users write: marks, options, and the spec that goes to the broker (A2, A9, R2, R4)."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from forge_client import (
    ConfigError,
    ForgeActor,
    LeastLoadedRouter,
    Router,
    Service,
    ServiceConfig,
    TrustRequired,
    endpoint,
    service_endpoint,
)
from forge_client.actor import endpoints_of, service_config
from forge_client.actor_handle import ActorHandle
from forge_client.spec import describe
from forge_contract.errors import BadCall, UnknownEndpoint


class First(Router):
    def get_replica(self, healthy_replicas: Any, sess_id: Any = None, session_map: Any = None) -> Any:
        return healthy_replicas[0]


class Gen(ForgeActor):
    procs = 2
    num_replicas = 3

    def __init__(self, path: str = "w") -> None:
        self.path = path

    @endpoint
    async def version(self) -> int:
        return 1

    @service_endpoint(router=LeastLoadedRouter(), batch_size=8, batch_timeout=0.01)
    async def predict(self, x: int, y: int = 0) -> int:
        return x + y


class Routed(ForgeActor):
    @service_endpoint(router=First)
    def pick(self) -> int:
        return 0


def test_class_attributes_are_the_defaults_and_options_inherit_what_is_not_given() -> None:
    """A2"""
    configured = Gen.options(num_replicas=5).options(replica_max_concurrent_requests=4)
    config = service_config(configured)
    assert (config.procs, config.num_replicas, config.replica_max_concurrent_requests) == (2, 5, 4)
    assert service_config(Gen).num_replicas == 3
    assert issubclass(configured, Gen)
    assert configured.__qualname__ == "Gen"


def test_default_replicas_and_num_replicas_are_one_setting_also_when_inherited() -> None:
    """A3"""
    assert service_config(Gen.options(default_replicas=1)).num_replicas == 1


def test_a_subclass_of_a_configured_class_may_set_its_own() -> None:
    """A2"""

    class Wider(Gen.options(procs=4, num_replicas=2)):  # type: ignore[misc]
        procs = 8

    assert service_config(Wider).procs == 8
    assert service_config(Wider).num_replicas == 2


def test_an_unknown_option_fails_there_and_then_with_the_known_ones() -> None:
    """A2"""
    with pytest.raises(ConfigError, match=r"'num_replica'.*did you mean 'num_replicas'(.|\n)*procs"):
        Gen.options(num_replica=2)


class Poisoned(RuntimeError):
    pass


def test_fatal_errors_are_given_as_classes_or_names_and_travel_as_names() -> None:
    """F6"""
    configured = Gen.options(fatal_errors=(Poisoned, ValueError, "torch.cuda.CudaError", "builtins.OSError"))
    assert service_config(configured).fatal_errors == (
        f"{__name__}.Poisoned",
        "ValueError",
        "torch.cuda.CudaError",
        "OSError",
    )
    assert service_config(Gen.options(fatal_errors=[MemoryError])).fatal_errors == ("MemoryError",)
    assert service_config(Gen.options(fatal_errors=KeyError)).fatal_errors == ("KeyError",)

    class Fragile(Gen):
        fatal_errors = (ZeroDivisionError,)

    assert service_config(Fragile).fatal_errors == ("ZeroDivisionError",)
    with pytest.raises(ConfigError, match="fatal_errors must be names of exceptions"):
        Gen.options(fatal_errors=(7,))


def test_what_a_failure_does_is_said_for_each_endpoint() -> None:
    """F1, F3, A11"""

    class Trainer(ForgeActor):
        @endpoint(replay_last=True, delivery="at_most_once")
        async def load(self, weights: bytes) -> None: ...

        @service_endpoint(hang_timeout_s=2.5)
        async def step(self) -> None: ...

    spec = describe(Trainer, ServiceConfig(on_session_loss="raise", max_attempts=2), "service", trusted=True)
    load, step = (one["options"] for one in spec["endpoints"])
    assert (load["replay_last"], load["delivery"], load["hang_timeout_s"]) == (True, "at_most_once", None)
    assert (step["replay_last"], step["delivery"], step["hang_timeout_s"]) == (False, None, 2.5)
    assert (spec["config"]["on_session_loss"], spec["config"]["max_attempts"]) == ("raise", 2)
    with pytest.raises(ConfigError, match="hang_timeout_s must be above 0"):
        endpoint(hang_timeout_s=0.0)(Gen.version)


def test_sessions_are_exported_by_a_class_with_both_hooks_and_half_of_them_is_refused() -> None:
    """S3"""

    class Chat(ForgeActor):
        def export_session(self, sess_id: str) -> Any: ...
        def import_session(self, sess_id: str, state: Any) -> None: ...

    class Half(ForgeActor):
        async def import_session(self, sess_id: str, state: Any) -> None: ...

    assert describe(Chat, ServiceConfig(), "service", trusted=True)["exports"] is True
    assert describe(Gen, ServiceConfig(), "service", trusted=True)["exports"] is False
    with pytest.raises(ConfigError, match=r"Half: it defines import_session and no export_session"):
        Service(ServiceConfig(), Half)


def test_options_that_cannot_hold_are_reported_together() -> None:
    """A3"""
    with pytest.raises(ConfigError, match=r"(?s)procs.*replica_max_concurrent_requests"):
        Gen.options(procs=0, replica_max_concurrent_requests=0)


def test_a_method_that_has_the_name_of_an_option_is_no_setting() -> None:
    class Named(ForgeActor):
        def errors(self) -> list[str]:
            return []

        @property
        def hosts(self) -> int:
            return 3

    assert service_config(Named).errors == "raise"
    assert service_config(Named).hosts is None


def test_endpoints_stay_plain_methods() -> None:
    assert Routed().pick() == 0


def test_an_override_of_an_endpoint_is_an_endpoint_with_its_options() -> None:
    class Louder(Gen):
        async def predict(self, x: int, y: int = 0) -> int:
            return 2 * x + y

    method, options = endpoints_of(Louder)["predict"]
    assert method is Louder.predict
    assert options.batch_size == 8
    assert list(endpoints_of(Louder)) == ["version", "predict"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"routr": None}, "router"),
        ({"router": 7}, "no Router"),
        ({"batch_size": 0}, "batch_size"),
        ({"timeout": -1}, "timeout"),
    ],
)
def test_endpoint_options_are_judged_at_decoration(options: dict[str, Any], said: str) -> None:
    """R2"""
    with pytest.raises(ValueError, match=said):
        service_endpoint(**options)(Gen.version)


def test_what_is_no_plain_method_or_takes_the_callers_word_is_no_endpoint() -> None:
    def stream(self: Any) -> Any:
        yield 1

    def sticky(self: Any, sess_id: str) -> None: ...

    bad: Any
    for bad in (stream, sticky, staticmethod(sticky), 7):
        with pytest.raises(ConfigError, match=r"endpoint|sess_id"):
            endpoint(bad)


@pytest.mark.parametrize("cls", [int, ForgeActor, 3, "Gen"])
def test_a_class_that_is_no_forge_actor_is_refused(cls: Any) -> None:
    with pytest.raises(ConfigError, match="no subclass of ForgeActor"):
        Service(ServiceConfig(), cls)


def test_constructor_arguments_are_judged_before_anything_starts() -> None:
    with pytest.raises(BadCall, match=r"Gen\(\): .*'weights'.*it takes path"):
        Service(ServiceConfig(), Gen, weights="w")


def test_an_endpoint_that_does_not_exist_names_the_closest() -> None:
    service = Service(ServiceConfig(), Gen)
    with pytest.raises(UnknownEndpoint, match=r"Gen has no endpoint 'predct'; did you mean 'predict'\?"):
        _ = service.predct
    assert not hasattr(service, "_private")


def test_an_endpoint_named_like_a_method_of_the_handle_is_refused_by_name() -> None:
    class Clash(ForgeActor):
        @endpoint
        def state(self) -> None: ...

    with pytest.raises(ConfigError, match="state"):
        Service(ServiceConfig(), Clash)
    ActorHandle(ServiceConfig(), Clash)


def test_an_actor_is_one_replica() -> None:
    with pytest.raises(ConfigError, match="num_replicas=2"):
        ActorHandle(ServiceConfig(num_replicas=2), Routed)


def test_a_class_that_others_can_import_travels_by_reference_even_without_trust() -> None:
    """W6"""
    spec = describe(Gen.options(procs=1), ServiceConfig(), "service", trusted=False)
    assert spec["target"] == {"ref": f"{__name__}:Gen"}
    assert [one["router"]["name"] for one in spec["endpoints"]] == ["RoundRobinRouter", "LeastLoadedRouter"]
    assert all(path == str(Path(path).absolute()) for path in spec["path"])


def test_a_class_from_inside_a_function_travels_by_value_and_only_with_trust() -> None:
    """A9, W6"""

    class Local(ForgeActor):
        @endpoint
        def seven(self) -> int:
            return 7

    with pytest.raises(TrustRequired, match="Local"):
        describe(Local, ServiceConfig(), "service", trusted=False)
    code = describe(Local.options(procs=1), ServiceConfig(), "service", trusted=True)["target"]["code"]
    assert pickle.loads(code)().seven() == 7


def test_a_class_of_a_module_that_only_exists_here_travels_by_value() -> None:
    """A9"""
    module = types.ModuleType("made_here")
    sys.modules["made_here"] = module
    try:
        source = "from forge_client import ForgeActor\nclass Made(ForgeActor):\n    def six(self): return HALF * 2\nHALF = 3\n"
        exec(source, module.__dict__)
        target = describe(module.Made, ServiceConfig(), "service", trusted=True)["target"]
    finally:
        del sys.modules["made_here"]
    assert pickle.loads(target["code"])().six() == 6
    assert not cloudpickle.list_registry_pickle_by_value()


def test_a_custom_router_travels_by_value_so_that_nobody_imports_its_module() -> None:
    """R4"""
    router = describe(Routed, ServiceConfig(), "service", trusted=True)["endpoints"][0]["router"]
    program = (
        "import pickle, sys; router = pickle.loads(sys.stdin.buffer.read());"
        f"assert {__name__!r} not in sys.modules; print(router.get_replica(['a', 'b']))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], input=router["code"], capture_output=True, cwd=root, check=False
    )
    assert done.stdout.decode().split() == ["a"], done.stderr.decode()
    with pytest.raises(TrustRequired, match=r"router First of Routed\.pick"):
        describe(Routed, ServiceConfig(), "service", trusted=False)
