"""The broker's process as its peers and its operator meet it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from pathlib import Path

import pytest
import zmq

from forge_broker.shell.processes import host_id, pid_namespace, start_time
from forge_contract.addresses import SEND_BUFFER_BYTES
from forge_contract.errors import from_wire
from forge_contract.messages import ANSWER, BYE, CALLS, CONTROL, HELLO, REFUSE, WHO
from tests.shell.running import BrokerProcess, RawPeer, private_address


def test_an_ipc_socket_in_a_private_directory_is_trusted_and_tcp_is_not(tmp_path: Path) -> None:
    """W6: trust belongs to the address a peer came in by."""
    with BrokerProcess(bind=[private_address(tmp_path), "tcp://127.0.0.1:*"], log_dir=str(tmp_path / "logs")) as broker:
        ipc, tcp = broker.said["addresses"]
        with RawPeer(ipc) as trusted, RawPeer(tcp, "c-00000000000000bb") as untrusted:
            assert trusted.greet()["trusted"] is True
            assert untrusted.greet()["trusted"] is False


def test_an_ipc_socket_that_others_may_enter_is_not_trusted(tmp_path: Path) -> None:
    """W6."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    with (
        BrokerProcess(bind=[f"ipc://{shared}/broker.sock"], log_dir=str(tmp_path / "logs")) as broker,
        RawPeer(broker.address) as peer,
    ):
        assert peer.greet()["trusted"] is False


def test_a_second_broker_on_an_address_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    """W9: libzmq would let it steal the path."""
    settings = {"bind": [private_address(tmp_path)], "log_dir": str(tmp_path / "logs")}
    with BrokerProcess(**settings) as first, BrokerProcess(**settings) as second:
        error = from_wire(second.said["error"])
        assert type(error).__name__ == "AddressInUse"
        assert str(first.process.pid) in str(error)
        assert second.wait() == 2
        with RawPeer(first.address) as peer:
            assert peer.greet()["trusted"] is True  # the first one still has its socket


def test_a_broker_may_take_the_address_of_one_that_was_killed(tmp_path: Path) -> None:
    """W9, F10: the lock ends with its holder, the socket file is left behind and replaced."""
    settings = {"bind": [private_address(tmp_path)], "log_dir": str(tmp_path / "logs")}
    with BrokerProcess(**settings) as first:
        first.process.kill()
        first.wait()
    with BrokerProcess(**settings) as second, RawPeer(second.address) as peer:
        assert peer.greet()["trusted"] is True


def test_connections_over_ipc_have_room_for_large_frames(tmp_path: Path) -> None:
    """However they came: the first is made before the broker looks, the second while it sleeps."""
    with BrokerProcess(bind=[private_address(tmp_path)], log_dir=str(tmp_path / "logs")) as broker:
        path = broker.address.removeprefix("ipc://")
        with RawPeer(broker.address) as first, RawPeer(broker.address, "c-00000000000000bb") as second:
            first.greet()
            second.greet()
            second.greet()  # another turn of the broker's loop: it has heard of the connection in this one or before
            most = 2 * int(Path("/proc/sys/net/core/wmem_max").read_text())
            assert send_buffers(broker.process.pid, path) == [min(SEND_BUFFER_BYTES, most)] * 2


def send_buffers(pid: int, path: str) -> list[int]:
    """Bytes, of another process's ends of the connections to its socket at `path`."""
    kernel = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    found = []
    for descriptor in map(int, os.listdir(f"/proc/{pid}/fd")):
        ours = kernel.syscall(438, process, descriptor, 0)  # pidfd_getfd, which Python has no name for
        assert ours >= 0, os.strerror(ctypes.get_errno())
        try:
            stream = socket.socket(fileno=ours)
        except OSError:  # no socket
            os.close(ours)
            continue
        with stream:
            if stream.getsockname() == path and not stream.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.append(stream.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
    os.close(process)
    return found


def test_a_tcp_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with BrokerProcess(bind=[address], log_dir=str(tmp_path)) as broker:
            error = from_wire(broker.said["error"])
    assert type(error).__name__ == "AddressInUse"
    assert address in str(error)


def test_a_bind_beyond_this_machine_is_refused_with_the_reason(tmp_path: Path) -> None:
    """W6: nothing on the wire is encrypted in this release."""
    with BrokerProcess(bind=["tcp://0.0.0.0:5999"], log_dir=str(tmp_path)) as broker:
        error = from_wire(broker.said["error"])
    assert "--insecure" in str(error)
    assert "encrypt" in str(error)


def test_wrong_settings_are_all_named_in_one_error(tmp_path: Path) -> None:
    with BrokerProcess(bind=["nonsense"], heartbeat_s=-1, liveness=0) as broker:
        error = from_wire(broker.said["error"])
    for field in ("bind", "heartbeat_s", "liveness"):
        assert field in str(error)


def test_garbage_on_the_socket_is_answered_or_dropped_and_the_broker_goes_on(tmp_path: Path) -> None:
    """W8."""
    with BrokerProcess(bind=[private_address(tmp_path)], log_dir=str(tmp_path / "logs")) as broker:
        with RawPeer(broker.address, "c-00000000000000cc") as garbage:
            for parts in ([b""], [b"\xc1"], [b"x", b"y"], [b"\x93\x01\x02", b""], [b"\xff" * 70000, b"z" * 70000, b""]):
                garbage.socket.send_multipart(parts)
                assert garbage.receive().body[0][0] == REFUSE
            context = zmq.Context()
            push = context.socket(zmq.REQ)  # another kind of socket, with its empty delimiter
            push.linger = 0
            push.connect(broker.address)
            push.send(b"hello?")
            push.close()
            context.term()
        with RawPeer(broker.address) as peer:
            incarnation = peer.greet()["incarnation"]
            peer.send(1, [[CONTROL, 1, "status", {}, 0]], incarnation=incarnation)
            answer = peer.receive().body[0]
            assert answer[:3] == [ANSWER, 1, True]
            assert answer[3]["counters"]["ProtocolError"] >= 4


def test_a_patience_without_end_does_not_end_the_broker(tmp_path: Path) -> None:
    """W8: the kernel's poller waits for 24 days at most, and a caller's timeout may be longer."""
    with (
        BrokerProcess(bind=[private_address(tmp_path)], log_dir=str(tmp_path / "logs"), heartbeat_s=1e7) as broker,
        RawPeer(broker.address) as peer,
    ):
        incarnation = peer.greet()["incarnation"]  # from here on only its silence is due, in three years
        for number in (1, 2):
            peer.send(number, [[CONTROL, number, "status", {}, 0]], incarnation=incarnation)
            assert peer.receive().body[0][:3] == [ANSWER, number, True]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="pidfds are Linux's")
def test_who_leaves_is_watched_no_more_though_its_process_lives(tmp_path: Path) -> None:
    """W8: a program that connects a thousand times costs the broker no descriptor for each."""
    us = {"host": host_id(), "pid": os.getpid(), "pid_namespace": pid_namespace(), "started": start_time(os.getpid())}
    with BrokerProcess(bind=[private_address(tmp_path)], log_dir=str(tmp_path / "logs")) as broker:
        descriptors = Path(f"/proc/{broker.process.pid}/fd")

        def watched() -> int:
            return sum("pidfd" in os.readlink(one) for one in descriptors.iterdir())

        with RawPeer(broker.address) as peer:
            for number in range(4):
                peer.name = f"c-{number:016x}"
                incarnation = peer.greet(**us)["incarnation"]
                peer.send(1, [[CONTROL, 1, "status", {}, 0]], incarnation=incarnation)
                assert peer.receive().body[0][:3] == [ANSWER, 1, True]
                assert watched() == 1
                peer.send(2, [[BYE, "done"]], incarnation=incarnation, ack=1)


def test_another_version_is_told_which_one_the_broker_speaks(tmp_path: Path) -> None:
    """§5 of PROTOCOL.md: a refusal has the same form in every version."""
    import msgpack

    with (
        BrokerProcess(bind=[private_address(tmp_path)], log_dir=str(tmp_path / "logs")) as broker,
        RawPeer(broker.address) as peer,
    ):
        peer.socket.send_multipart([msgpack.packb([99, "from the future"]), b""])
        refusal = peer.receive().body[0]
        assert refusal[0] == REFUSE
        assert str(from_wire(refusal[1:])) == (
            "this side speaks protocol 1, the other 99; install the same forge-broker on both"
        )


def test_a_stranger_is_asked_who_it_is(tmp_path: Path) -> None:
    """W4."""
    with (
        BrokerProcess(bind=[private_address(tmp_path)], log_dir=str(tmp_path / "logs")) as broker,
        RawPeer(broker.address) as peer,
    ):
        peer.send(1, [[CALLS, 1, [1], [0], {}]], incarnation=5)
        assert peer.receive().body == [[WHO]]


def test_a_hello_without_its_fields_is_refused_naming_them(tmp_path: Path) -> None:
    """W8."""
    with (
        BrokerProcess(bind=[private_address(tmp_path)], log_dir=str(tmp_path / "logs")) as broker,
        RawPeer(broker.address) as peer,
    ):
        peer.send(0, [[HELLO, {"role": "worker"}, []]])
        refusal = peer.receive().body[0]
        assert refusal[0] == REFUSE
        for field in ("host", "pid", "gpus"):
            assert field in str(from_wire(refusal[1:]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_exit_code_0_and_removes_its_socket(tmp_path: Path, number: signal.Signals) -> None:
    """F9."""
    broker = BrokerProcess(bind=[private_address(tmp_path)], log_dir=str(tmp_path / "logs"))
    os.kill(broker.process.pid, number)
    assert broker.wait() == 0
    assert not (tmp_path / "broker.sock").exists()
    log = broker.close()
    assert '"event": "broker stopping"' in log  # JSON, because this is no terminal


def test_an_embedded_broker_ends_with_its_owner(tmp_path: Path) -> None:
    """A1: however the owner ends, its end of the pipe does."""
    broker = BrokerProcess(bind=[private_address(tmp_path)], embedded=True)
    assert broker.process.stdin is not None
    broker.process.stdin.close()
    assert broker.wait() == 0
    assert broker.process.stderr is not None
    assert broker.process.stderr.read() == b""  # silent as long as nothing is wrong
    broker.process.stdout.close()  # type: ignore[union-attr]
    broker.process.stderr.close()
