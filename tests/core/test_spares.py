"""Fast starts (X2). Warm spares: who takes them, how they give way, what becomes of those that fail; their GPUs are nobody else's
meanwhile. Preloading: which launches are forked."""

from __future__ import annotations

import pytest

from forge_broker.core.actions import Exit, Kill, Label, Launch, Unload
from forge_broker.core.events import LaunchEnded, Preloaded, Terminate
from forge_broker.core.workers import WorkerState
from forge_contract.errors import ConfigError
from forge_contract.messages import ASSIGN, BYE, NOTICE, REFUSE, STOP, UNREADY, WARM, WARMED
from tests.core.peers import Bench, ClientPeer, WorkerPeer


def spares(client: ClientPeer, name: str = "Echo") -> tuple[int, int, str]:
    """How many are ready, how many start, and why there are not more."""
    told = client.ask("state", service=name)["spares"]
    return told["ready"], told["starting"], told["why"]


def warm(bench: Bench) -> list[WorkerPeer]:
    """The processes of all spares that were wanted since the last look have imported."""
    processes = bench.launched()
    for process in processes:
        assert process.of(WARM)
        process.say([WARMED])
    return processes


def test_spares_are_made_behind_a_started_service_and_taken_before_idle_workers_and_launches() -> None:
    """X2: pinned to its GPU, the class imported, and a new one comes behind it; its output is the replica's from then on."""
    bench = Bench(gpus=("0", "1", "2"))
    client = bench.client()
    client.deploy(with_gpus=True, warm_spares=1)
    (worker,) = bench.launched()
    assert not bench.of(Launch), "the first replicas come before any spare"
    worker.ready()
    (launch,) = bench.of(Launch)
    assert launch.label == "Echo/spare.0"
    spare = bench.worker(gpus=launch.gpus, launch=launch.launch)
    ((_, fields),) = spare.of(WARM)
    assert (fields["target"], fields["gpus"], fields["trusted"]) == ({"ref": "module:Echo"}, ["1"], True)
    assert spares(client) == (0, 1, "")
    spare.say([WARMED])
    assert spares(client) == (1, 0, "")
    idle = bench.worker(gpus=("2",))
    bench.of(Label)
    worker.die()
    bench.advance(0.0)
    ((_, assigned, _),) = spare.of(ASSIGN)
    assert (assigned["epoch"], assigned["gpus"]) == (2, ["1"])
    assert bench.of(Label) == [Label(spare.launch, "Echo/0.0")]
    assert not idle.of(ASSIGN)
    spare.ready()
    assert bench.service().replicas[0].healthy
    (behind,) = bench.of(Launch)
    assert behind.gpus == ("0",)


def test_a_spare_is_taken_while_it_starts_or_imports_when_none_is_warm() -> None:
    """X2: it is nearer to serving than a launch, and its import is the replica's."""
    bench, client, (worker,), _ = Bench().serving(1, warm_spares=1)
    (importing,) = bench.launched()
    worker.die()
    bench.advance(0.0)
    assert importing.of(ASSIGN)
    importing.say([WARMED])
    assert bench.state.workers[importing.name].state is WorkerState.LOADING
    (launch,) = bench.of(Launch)
    importing.die()
    bench.advance(5.0)
    starting = bench.worker(launch=launch.launch)
    assert (bool(starting.of(WARM)), bool(starting.of(ASSIGN))) == (False, True)
    starting.ready()
    assert bench.service().replicas[0].healthy
    assert spares(client) == (0, 1, "")


def test_a_spare_of_a_mesh_is_all_its_ranks_with_all_their_gpus() -> None:
    """X2, A7: each sees the GPUs that the rank will see, in rank order; none is warm before all are, and one lost is all lost."""
    bench = Bench(gpus=("0", "1", "2", "3"))
    client = bench.client()
    client.deploy(with_gpus=True, procs=2, warm_spares=1)
    ranks = bench.launched()
    for rank in ranks:
        rank.ready()
    zero, one = bench.launched()
    assert [process.of(WARM)[0][1]["gpus"] for process in (zero, one)] == [["2", "3"]] * 2
    zero.say([WARMED])
    assert spares(client) == (0, 1, "")
    one.die()
    assert zero.of(STOP)
    zero.die()
    bench.advance(0.0)
    zero, one = warm(bench)
    assert spares(client) == (1, 0, "")
    for rank in ranks:
        rank.die()
    bench.advance(0.0)
    assert [process.of(ASSIGN)[0][1]["rank"] for process in (zero, one)] == [0, 1]
    assert zero.fields["gpus"] + one.fields["gpus"] == ["2", "3"]


def test_a_spare_that_fails_is_told_of_and_made_anew_ever_more_slowly_and_its_service_goes_on() -> None:
    """X2, F7: an import that raises, a process that dies, one that never gets done."""
    bench, client, (worker,), endpoint = Bench().serving(1, warm_spares=1, start_timeout_s=50.0)
    (spare,) = bench.launched()
    spare.say([UNREADY, ["ReplicaLost", {"replica": "this", "why": "ImportError: no torch"}], 0])
    assert spare.of(STOP)
    assert "ImportError: no torch" in spares(client)[2]
    assert any("no torch" in line for line in client.ask("explain", subject="Echo/spares")["story"])
    spare.say([BYE, "could not import"])
    spare.die()
    pauses = []
    for _ in range(3):
        before = bench.now
        while not (launched := bench.of(Launch)):
            bench.advance(0.1)
        pauses.append(bench.now - before)
        bench.handle(LaunchEnded(launched[0].launch, "signal SIGKILL", ["last words"]))
    assert pauses[0] < 0.2 < pauses[1] < pauses[2]
    assert "signal SIGKILL\n  last words" in spares(client)[2]
    bench.advance(10.0)
    (slow,) = bench.launched()
    bench.advance(50.0)
    assert Kill(slow.launch) in bench.of(Kill)
    assert "start_timeout_s=50.0" in spares(client)[2]
    slow.die()
    bench.advance(30.0)
    warm(bench)
    assert spares(client) == (1, 0, "")
    client.call(endpoint, b"x")
    assert worker.seen == [b"x"]
    assert bench.service().replicas[0].restarts == 0


def test_a_spare_gives_way_to_a_replica_of_another_service_and_comes_back_when_there_is_room() -> None:
    """X2, A3: a spare never keeps a replica pending; not one more goes than has to."""
    bench, client, _, _ = Bench(gpus=("0", "1", "2"), max_workers=4).serving(1, with_gpus=True, warm_spares=2)
    old, new = warm(bench)
    client.deploy(name="cpu", class_name="Cpu")
    (cpu,) = bench.launched()  # room for a process, as it was
    cpu.ready()
    client.deploy(name="gpu", class_name="Gpu", with_gpus=True)
    assert (
        "spares of Echo give way" in [message[2]["why"] for message in client.of(NOTICE) if message[1] == "pending"][-1]
    )
    assert new.of(STOP)
    assert not old.of(STOP)
    new.say([BYE, "dismissed"])
    assert not bench.of(Launch), "its process holds the GPU until it has ended"
    new.die()
    (gpu,) = bench.launched()
    assert gpu.fields["gpus"] == new.fields["gpus"]
    gpu.ready()
    ready, starting, why = spares(client)
    assert (ready, starting) == (1, 0)
    assert "no room" in why
    client.control("stop", service="gpu")
    gpu.say([BYE, "stopped"])
    gpu.die()
    warm(bench)
    assert spares(client) == (2, 0, "")


def test_spares_that_would_not_be_enough_stay() -> None:
    """X2: a replica that nothing helps is no reason to give anything up."""
    bench, client, _, _ = Bench(gpus=("0", "1")).serving(1, with_gpus=True, warm_spares=1)
    (spare,) = warm(bench)
    client.deploy(name="large", class_name="Large", gpus_per_replica=3)
    assert not spare.of(STOP)
    assert bench.worker(gpus=spare.fields["gpus"]).of(REFUSE), "a GPU has one holder"


def test_a_spare_does_not_take_the_place_of_a_replica_that_waits_to_be_tried_again() -> None:
    """X2, F7."""
    bench, client, _, _ = Bench(max_workers=2).serving(1, warm_spares=1)
    (spare,) = warm(bench)
    client.deploy(name="other", class_name="Other")
    spare.say([BYE, "dismissed"])
    spare.die()
    (other,) = bench.launched()
    other.ready()
    for _ in range(2):  # after the second death in a row there is a pause
        other.die()
        assert not bench.of(Launch)
        bench.advance(5.0)
        (other,) = bench.launched()
        assert other.of(ASSIGN)
        other.ready()


@pytest.mark.parametrize("how", ["stop", "terminate"])
def test_spares_end_with_their_service_and_with_the_broker(how: str) -> None:
    """X2: one that imports would hear of it too late, and is killed; nothing is left, and none is made meanwhile."""
    bench, client, (worker,), _ = Bench().serving(1, warm_spares=2)
    idle, importing = bench.launched()
    idle.say([WARMED])
    if how == "stop":
        number = client.control("stop", service="Echo")
    else:
        bench.handle(Terminate("a signal"))
    assert idle.of(STOP)
    assert bench.of(Kill) == [Kill(importing.launch)]
    importing.die()
    for process in (worker, idle):
        process.say([BYE, "stopped"])
        process.die()
    bench.advance(60.0)
    assert not bench.of(Launch)
    assert not any((bench.state.services, bench.state.launches))
    if how == "stop":
        assert client.answers[number] == {}
    else:
        assert bench.of(Exit)


def test_a_spare_that_is_drained_is_no_failure() -> None:
    """X2, F9."""
    bench, client, _, _ = Bench().serving(1, warm_spares=1)
    (spare,) = warm(bench)
    number = client.control("drain", target=spare.name)
    assert spare.of(STOP)
    spare.say([BYE, "drained"])
    spare.die()
    assert client.answers[number] == {}
    warm(bench)
    assert spares(client) == (1, 0, "")


def test_who_was_not_told_to_import_cannot_have() -> None:
    """W8: it is let go."""
    bench, _, (worker,), _ = Bench().serving(1)
    worker.say([WARMED])
    assert worker.of(REFUSE)
    assert worker.name not in bench.state.workers


def test_spares_are_for_one_machine() -> None:
    """A3."""
    with pytest.raises(ConfigError, match="warm_spares=1 wait on the broker's machine"):
        Bench().client().deploy(hosts=2, warm_spares=1)


def test_workers_are_forked_until_the_scaler_says_that_they_cannot_be() -> None:
    """X2: which it decides by what the import did; from then on they are launched as any, and everybody can see why."""
    bench = Bench()
    client = bench.client()
    client.deploy(preload=True, warm_spares=1, with_gpus=False)
    (first,) = bench.of(Launch)
    assert first.preload is not None
    assert (first.preload.source["target"], first.preload.on_gpus) == ({"ref": "module:Echo"}, False)
    bench.handle(Preloaded(bench.service().id, ""))
    worker = bench.worker(launch=first.launch)
    worker.ready()
    assert client.ask("state", service="Echo")["preload"] == {"wanted": True, "ready": True, "why": ""}
    (spare,) = bench.of(Launch)
    assert spare.preload == first.preload
    bench.handle(Preloaded(bench.service().id, "its import started threads: pool"))
    told = client.ask("state", service="Echo")["preload"]
    assert told == {"wanted": True, "ready": False, "why": "its import started threads: pool"}
    bench.handle(LaunchEnded(spare.launch, "signal SIGKILL", []))
    bench.advance(0.0)
    (again,) = bench.of(Launch)
    assert again.preload is None
    client.control("stop", service="Echo")
    for launch in (again.launch, worker.launch):
        assert not bench.of(Unload)
        bench.handle(LaunchEnded(launch, "signal SIGKILL", []))
    assert bench.of(Unload)
