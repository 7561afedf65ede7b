"""Errors travel as code and fields, and come back as what they were; a peer's nonsense comes back as ProtocolError (W8)."""

from __future__ import annotations

import pickle
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_contract import errors
from forge_contract.errors import FanoutError, ForgeError, ProtocolError, UnknownEndpoint, from_wire

FIELDS: dict[str, dict[str, Any]] = {
    "ConfigError": {"where": "options()", "problems": ["one", "two"]},
    "UnknownEndpoint": {"name": "predct", "owner": "Echo", "known": ["predict"]},
    "BadCall": {"endpoint": "Echo.predict", "why": "one argument too many"},
    "SerializationError": {"type_name": "socket", "where": "Echo.predict", "why": "it is a resource"},
    "TrustRequired": {"what": "class Echo by value"},
    "PayloadTooLarge": {"what": "Echo.predict", "size": 9, "limit": 5},
    "VersionMismatch": {"ours": 1, "theirs": 2},
    "AddressInUse": {"address": "tcp://a:1", "holder": " (pid 5)"},
    "BrokerUnreachable": {"address": "tcp://a:1", "waited_s": 5.0},
    "BrokerLost": {"address": "tcp://a:1", "why": "it was stopped"},
    "UnknownService": {"name": "Ecko", "known": ["Echo"]},
    "ServiceStopped": {"service": "Echo", "why": ""},
    "StartFailed": {"service": "Echo", "why": "exit code 1", "last_lines": ["boom"]},
    "CallTimeout": {"endpoint": "Echo.predict", "timeout_s": 1.5, "state": "queued"},
    "CallCancelled": {"endpoint": "Echo.predict", "why": "its caller gave up"},
    "Overloaded": {"what": "Echo.predict", "limit_name": "x", "limit": 5, "retry_after_s": 0.5},
    "NoHealthyReplicas": {"service": "Echo", "waited_s": 60.0, "replicas": ["Echo/0 is RECOVERING"]},
    "ReplicaLost": {"replica": "Echo/0", "why": "exit code 1"},
    "OutcomeUnknown": {"endpoint": "Echo.predict", "why": "lost"},
    "PoisonedRequest": {"endpoint": "Echo.predict", "attempts": 3},
    "RouterError": {"router": "R()", "endpoint": "Echo.predict", "why": "raised"},
    "BatchError": {"endpoint": "Echo.predict", "why": "3 results for 4 items"},
    "UnknownSession": {"service": "Echo", "session": "s"},
    "SessionClosed": {"service": "Echo", "session": "s", "why": ""},
    "SegmentLost": {"segment": "forge-1-w-2-3", "why": "No such file or directory"},
    "SessionLost": {"service": "Echo", "session": "s", "replica": "Echo/0"},
    "RemoteError": {"type_name": "KeyError", "remote_message": "'k'", "remote_traceback": "…"},
    "ForgeError": {"message": "something"},
    "ProtocolError": {"message": "no envelope"},
    "SessionError": {"message": "some session"},
}


def every(cls: type[ForgeError]) -> set[type[ForgeError]]:
    return {cls}.union(*(every(below) for below in cls.__subclasses__()))


def test_this_file_and_the_drawn_tree_know_every_error() -> None:
    """A class that is added is drawn in the module's docstring."""
    names = {cls.__name__ for cls in every(ForgeError) if cls.__module__ == errors.__name__}
    assert names == {*FIELDS, "FanoutError"}
    assert all(name in (errors.__doc__ or "") for name in names)


@pytest.mark.parametrize("name", FIELDS)
def test_an_error_comes_back_as_what_it_was(name: str) -> None:
    """Type, text and fields, over the wire and by pickle."""
    error = getattr(errors, name)(**FIELDS[name])
    assert "?" not in str(error).replace("running?", "").replace("did you mean", "")[:-1]
    for back in (from_wire(msgpack.unpackb(msgpack.packb(error.to_wire()))), pickle.loads(pickle.dumps(error))):
        assert type(back) is type(error)
        assert str(back) == str(error)
        for field, value in FIELDS[name].items():
            assert getattr(back, field) == value


def test_an_unknown_endpoint_names_the_closest_and_keeps_its_name() -> None:
    """AttributeError has a `name` of its own, which must not hide ours."""
    error = UnknownEndpoint(name="predct", owner="Echo", known=["predict", "version"])
    assert "did you mean 'predict'?" in str(error)
    assert error.name == "predct"
    with pytest.raises(AttributeError, match="has no field 'other'"):
        _ = error.other


def test_a_fanout_error_holds_results_and_errors_and_survives_pickle() -> None:
    """A5."""
    error = FanoutError("Echo.predict", {0: "a"}, {1: ValueError("no")})
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == str(error) == "Echo.predict.fanout: 1 of 2 replicas failed: replica 1: ValueError: no"
    assert back.results == {0: "a"}


hostile = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(
    ["self", "message", "fields", "problems", "known", "name", "last_lines", "replicas", "text", "args"]
)


@given(st.sampled_from([*FIELDS, "FanoutError", "NewError"]), st.dictionaries(names, hostile, max_size=4))
def test_hostile_fields_make_an_error_all_the_same(code: str, fields: dict[str, Any]) -> None:
    """W8."""
    assert str(from_wire([code, fields])) is not None


@pytest.mark.parametrize(
    "form", [None, 5, [], ["x"], ["ConfigError", []], ["ConfigError", {"problems": {"a": 1}}]], ids=str
)
def test_what_is_no_error_is_a_protocol_error(form: Any) -> None:
    """W8."""
    assert isinstance(from_wire(form), ProtocolError)
