# mypy: allow-untyped-defs, allow-untyped-calls
"""Every code block of the service's specification, run as it stands: only what it leaves open (a class, `model`, `inputs`) is
supplied around it. Untyped where the specification is.

The last test compares: a block that was changed there, or added, is missed here. The broker has 8 declared GPUs.
"""

from __future__ import annotations

import ast
import asyncio
import re
from pathlib import Path

import pytest

from forge_client import (
    AutoscalingConfig,
    ForgeActor,
    RoundRobinRouter,
    Router,
    Service,
    ServiceConfig,
    ServiceStopped,
    service_endpoint,
)
from tests.public.actors import (
    BatchProcessorActor,
    ModelInferenceActor,
    MyForgeActor,
    Predictor,
    StreamProcessorActor,
)

pytestmark = pytest.mark.timeout(30)

SPECIFICATION = Path(__file__).parents[3] / "shared" / "service-spec.md"


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    return {"FORGE_GPUS": "8"}


async def test_basic_service_setup() -> None:
    """A2, A7: with and without options, as a service and as an actor."""
    # Pre-configured: two replicas of two ranks.
    service = await MyForgeActor.options(num_replicas=2, procs=2).as_service(...)
    await service.shutdown()

    service = await MyForgeActor.as_service(...)
    await service.shutdown()

    actor = await MyForgeActor.options(procs=1, hosts=1).as_actor(...)
    await actor.shutdown()

    actor = await MyForgeActor.as_actor(...)
    await actor.shutdown()

    with pytest.raises(ServiceStopped):
        await actor.given.call_one()


async def test_service_endpoints_take_route_and_fanout_and_nothing_else() -> None:
    """A4, A5"""
    service, x = await Predictor.options(num_replicas=2).as_service(), 1
    result = await service.predict.route(x)

    results = await service.predict.fanout(x)

    assert result[0] == 2
    assert [value for value, _ in results] == [2, 2]
    assert result in results
    for name in ("call", "call_one", "choose", "broadcast", "generate", "stream"):
        with pytest.raises(NotImplementedError, match=r"Services only support route\(\) and fanout\(\)\."):
            getattr(service.predict, name)(x)
    with pytest.raises(NotImplementedError, match=r"Services only support route\(\) and fanout\(\)\."):
        service.predict(x)


async def test_actor_endpoints_take_call_one_and_call() -> None:
    """A7, A8: what the specification tells in prose."""
    actor = await Predictor.as_actor()
    value, pid = await actor.predict.call_one(1)
    assert value == 2
    assert list((await actor.predict.call(1)).values()) == [(2, pid)]


async def test_sessions_by_block_and_by_hand() -> None:
    """S1, S2"""
    service = await Predictor.options(num_replicas=2).as_service()
    arg1, arg2, arg3 = 1, 2, 3
    async with service.session() as session:
        result1 = await service.my_endpoint.route(arg1, arg2)
        result2 = await service.another_endpoint.fanout(arg3)

    session_id = await service.start_session()
    result = await service.my_endpoint.route(arg1, arg2, sess_id=session_id)
    await service.terminate_session(session_id)

    assert result1[:2] == (3, session.session_id)
    assert result2 == [(3, None), (3, None)]  # a fan-out ignores the session
    assert result[:2] == (3, session_id)
    assert type(session_id) is str


async def test_stateless_calls() -> None:
    """R3: with the default router, the second call goes to the other replica."""
    service = await Predictor.options(num_replicas=2).as_service()
    arg1, arg2 = 1, 2
    result = await service.my_endpoint.route(arg1, arg2)

    another = await service.my_endpoint.route(arg1, arg2)
    assert result[:2] == another[:2] == (3, None)
    assert result[2] != another[2]


async def test_batch_routing() -> None:
    """A9, B1: 16 calls gathered together are exactly two batches of 8, on two of the four replicas, the next two on the others."""
    inputs = range(16)

    def model(x):
        return 2 * x

    class MyActor(ForgeActor):
        @service_endpoint(router=RoundRobinRouter(), batch_size=8, batch_timeout=0.01)
        async def predict(self, x):
            return model(x)

    service = await MyActor.options(num_replicas=4).as_service()

    await asyncio.gather(*(service.predict.route(data) for data in inputs))

    told = (await service.state())["batches"]["predict"]
    assert (told["batches"], told["reasons"], told["sizes"]) == (2, {"size": 2}, {"8": 2})
    assert await requests_by_replica(service) == [8, 8, 0, 0]
    assert await asyncio.gather(*(service.predict.route(data) for data in inputs)) == [2 * x for x in inputs]
    assert await requests_by_replica(service) == [8, 8, 8, 8]


async def requests_by_replica(service: Service) -> list[int]:
    metrics = await service.get_metrics()
    return [replica.total_requests for replica in metrics.replica_metrics.values()]


async def test_a_custom_router_always_picks_the_first_replica() -> None:
    """R2, R4: by value, class and router."""

    def model(x):
        return 2 * x

    class MyCustomRouter(Router):
        """Index 0, whatever the load."""

        def get_replica(self, healthy_replicas, sess_id=None, session_map=None):
            if not healthy_replicas:
                raise RuntimeError("No healthy replicas available")
            return healthy_replicas[0]

    class MyActor(ForgeActor):
        @service_endpoint(router=MyCustomRouter())
        async def predict(self, x):
            return model(x)

    service = await MyActor.options(num_replicas=2).as_service()
    assert [await service.predict.route(x) for x in range(4)] == [0, 2, 4, 6]
    metrics = await service.get_metrics()
    assert [replica.total_requests for replica in metrics.replica_metrics.values()] == [4, 0]


async def test_monitoring_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    """X4: the latest figures, without waiting for any."""
    service = await Predictor.options(num_replicas=2).as_service()
    metrics = service.get_metrics()
    print(f"Total request rate: {metrics.get_total_request_rate()}")
    print(f"Average queue depth: {metrics.get_avg_queue_depth()}")
    print(f"Capacity utilization: {metrics.get_avg_capacity_utilization(service._replicas)}")

    summary = service.get_metrics_summary()
    print(f"Healthy replicas: {summary['service']['healthy_replicas']}")
    print(f"Total sessions: {summary['service']['total_sessions']}")

    for replica_idx, replica_metrics in summary["replicas"].items():
        print(f"Replica {replica_idx}: {replica_metrics['request_rate']:.1f} req/s")

    told = capsys.readouterr().out.splitlines()
    assert "Healthy replicas: 2" in told
    assert told[-2:] == ["Replica 0: 0.0 req/s", "Replica 1: 0.0 req/s"]


async def test_graceful_shutdown_of_a_service_and_of_an_actor_by_its_class() -> None:
    """A10"""
    service, actor = await asyncio.gather(Predictor.as_service(), MyForgeActor.as_actor())
    await service.shutdown()

    await MyForgeActor.shutdown(actor)

    with pytest.raises(ServiceStopped):
        await service.predict.route(1)
    with pytest.raises(ServiceStopped):
        await actor.given.call_one()


async def gpus_of(service: Service) -> list[str]:
    """Starts the service, asks each replica for its GPUs, and stops it."""
    async with service:
        answers: list[str] = await service.gpus.fanout()
        return answers


async def test_ml_model_serving() -> None:
    """A2, A3: four replicas, each with a GPU that no other has."""
    config = ServiceConfig(
        gpus_per_replica=1,
        min_replicas=2,
        max_replicas=20,
        default_replicas=4,
        replica_max_concurrent_requests=8,
        autoscaling=AutoscalingConfig(
            scale_up_capacity_threshold=0.7,
            scale_up_queue_depth_threshold=3.0,
        ),
    )
    service = Service(config, ModelInferenceActor, model_path="/path/to/model")
    assert len(set(await gpus_of(service))) == 4


async def test_batch_processing() -> None:
    """A2, A3: three replicas of one rank with two GPUs each."""
    config = ServiceConfig(
        gpus_per_replica=2,
        min_replicas=1,
        max_replicas=10,
        default_replicas=3,
        replica_max_concurrent_requests=5,
        autoscaling=AutoscalingConfig(
            scale_up_queue_depth_threshold=10.0,
            scale_down_idle_time_threshold=600.0,
        ),
    )
    service = Service(config, BatchProcessorActor, batch_size=100)
    pairs = await gpus_of(service)
    assert len({gpu for pair in pairs for gpu in pair.split(",")}) == 6


async def test_real_time_analytics() -> None:
    """A2, A3: five replicas."""
    config = ServiceConfig(
        gpus_per_replica=1,
        min_replicas=3,
        max_replicas=15,
        default_replicas=5,
        replica_max_concurrent_requests=20,
        autoscaling=AutoscalingConfig(
            scale_up_request_rate_threshold=50.0,
            scale_up_capacity_threshold=0.6,
        ),
    )
    service = Service(config, StreamProcessorActor, window_size=1000)
    assert len(set(await gpus_of(service))) == 5


def shape(statement: ast.stmt) -> str:
    """What a statement does: without comments, layout and docstrings."""
    for node in ast.walk(statement):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(statement)


def bodies_of_tests() -> list[list[str]]:
    """The statements of each test in this folder."""
    return [
        [shape(statement) for statement in node.body]
        for file in sorted(Path(__file__).parent.glob("test_*.py"))
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    ]


@pytest.mark.skipif(not SPECIFICATION.exists(), reason="the specification does not lie beside this checkout")
def test_every_code_block_of_the_specification_is_run_here() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", SPECIFICATION.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 10
    bodies = bodies_of_tests()
    missed = [block for block in blocks if not any(holds(body, block) for body in bodies)]
    assert not missed, "not run by any test of tests/public:\n\n" + "\n".join(missed)


@pytest.mark.skipif(not SPECIFICATION.exists(), reason="the specification does not lie beside this checkout")
def test_every_parameter_of_the_specification_is_there_with_its_default() -> None:
    """A3, X1: whether it does what it says is tried where it is decided, parameter by parameter (contract/test_scaling.py)."""
    of_services, of_autoscaling = (
        chapter("### ServiceConfig", "### Auto"),
        chapter("### AutoscalingConfig", "## Metrics"),
    )
    names = re.findall(r"^\| `(\w+)` \|", of_services, re.MULTILINE)
    assert len(names) == 8
    assert set(names) <= ServiceConfig.known_options()
    defaults = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", of_autoscaling, re.MULTILINE))
    assert len(defaults) == 13
    assert {name: str(getattr(AutoscalingConfig(), name)) for name in defaults} == defaults


@pytest.mark.skipif(not SPECIFICATION.exists(), reason="the specification does not lie beside this checkout")
def test_every_metric_of_the_specification_is_tried_with_an_exact_number() -> None:
    """X4: by the row that says so, in core/test_metrics.py."""
    rows = re.findall(r"^- \*\*([\w ]+)\*\*: ", chapter("## Metrics", "## Use Cases"), re.MULTILINE)
    assert len(rows) == 13
    tried = (Path(__file__).parents[1] / "core" / "test_metrics.py").read_text("utf-8")
    assert [row for row in rows if f'"{row}: ' not in tried] == []


def chapter(begins: str, ends: str) -> str:
    return SPECIFICATION.read_text("utf-8").partition(begins)[2].partition(ends)[0]


def holds(body: list[str], block: str) -> bool:
    """Whether all statements of the block stand in this body, one after the other."""
    wanted = [shape(statement) for statement in ast.parse(block).body]
    return any(body[at : at + len(wanted)] == wanted for at in range(len(body) - len(wanted) + 1))


def test_a_block_that_was_changed_would_be_missed() -> None:
    """The check above, checked: comments, layout and quotes do not count, an argument does."""
    bodies = bodies_of_tests()
    assert any(holds(body, "service = (await\n  MyForgeActor.as_service( ... ))  # one replica") for body in bodies)
    assert not any(holds(body, "service = await MyForgeActor.as_service(1, 2)") for body in bodies)
