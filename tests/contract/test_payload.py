"""Round trips of the payload codec: types are kept, large memory is not copied, nothing heavy is imported."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import math
import pathlib
import subprocess
import sys
import threading
import uuid
import warnings
import zoneinfo
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_contract.errors import SerializationError
from forge_contract.payload import (
    LARGE,
    decode,
    decode_call,
    decode_small,
    encode,
    encode_call,
    encode_plain_call,
    payload_size,
    register_value,
)
from forge_contract.value_mesh import ValueMesh
from tests.contract.payload_samples import Color, Handle, Key, Level, Mode, Pair, Prompt


def there_and_back(value: Any) -> Any:
    return decode(encode(value, trusted=False), trusted=False)


def same(one: Any, other: Any) -> bool:
    """Equal with equal types, all the way down; NaN is NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return len(one) == len(other) and all(map(same, one.items(), other.items()))
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    return bool(one == other)


PLAIN_VALUES = [
    None,
    True,
    0,
    -1,
    2**63,
    2**64 - 1,
    2**64,
    -(2**63) - 1,
    2**1000,
    -(2**127),
    0.5,
    math.nan,
    -math.inf,
    1 - 2j,
    "",
    "größe",
    "a file\udc80",
    b"\0\xff",
    [],
    [1, [2, (3, [4])]],
    (),
    (1, (2, {3, (4,)})),
    set(),
    {1, "a", (2, 3)},
    frozenset({1, frozenset({2})}),
    {1: 2, (1, 2): {None: [True]}, None: 0, Color.RED: 1, 1.5: 2, frozenset({1}): 3, Key("k", (1,)): 4, b"k": 5},
    {"\udc80": "\udc80"},
    dt.datetime(2026, 11, 23, 18, 4, 5, 678),  # noqa: DTZ001 - naive ones travel too
    dt.datetime(2026, 11, 23, tzinfo=dt.UTC),
    dt.datetime(2026, 11, 23, tzinfo=dt.timezone(dt.timedelta(hours=-5, minutes=-30))),
    dt.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
    dt.date(1, 1, 1),
    dt.time(23, 59, 59, 999999),
    dt.time(1, tzinfo=dt.timezone(dt.timedelta(hours=2), "somewhere")),
    dt.timedelta(days=-1, microseconds=1),
    Decimal("1.10"),
    Decimal("-Infinity"),
    uuid.UUID(int=2**127 + 5),
    pathlib.Path("/tmp/a b"),
    pathlib.PurePosixPath("a/b"),
    pathlib.PureWindowsPath("c:\\a"),
    range(1, 10, 3),
    slice(None, -1, None),
    collections.OrderedDict(b=1, a=2),
    collections.Counter("abca"),
    collections.deque([1, 2], maxlen=3),
    collections.defaultdict(list, {"a": [1]}),
    Color.BLUE,
    Level.LOW,
    Mode.READ,
    Mode.READ | Mode.WRITE,
    Mode(0),
    Prompt("a", [1], more=(Key("b", (2,)),)),
    Key("a", (1, 2)),
    Pair(1, Pair((2,), None)),
    ValueMesh({"hosts": 2, "procs": 1}, [(1,), Color.RED]),
    b"x" * LARGE,
    ["x" * LARGE, {"image": b"y" * LARGE, "again": (b"z" * LARGE,)}],
    [[[[b"deep" * LARGE]]]] * 2,
    Prompt("large", [1], more=b"x" * LARGE),
]


def named(value: Any) -> str:
    """The same in every process, which the order of a set is not."""
    shown = f"of {len(value)}" if isinstance(value, (set, frozenset)) else f"{str(value)[:20]!a}"
    return f"{type(value).__name__} {shown}"


@pytest.mark.parametrize("value", PLAIN_VALUES, ids=named)
def test_plain_values_keep_their_types(value: Any) -> None:
    """W5."""
    assert same(there_and_back(value), value)
    assert same(there_and_back([{"deeper": (value,)}]), [{"deeper": (value,)}])


hashables = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.dates(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
values = st.recursive(
    hashables
    | st.floats()
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.datetimes(timezones=st.none() | st.timezones())
    | st.timedeltas()
    | st.sampled_from(Color),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.sets(hashables, max_size=4)
        | st.builds(Prompt, st.text(), st.lists(st.integers()), inner)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=20,
)


@settings(max_examples=60)
@given(values)
def test_any_nesting_of_plain_values_comes_back_as_it_was(value: Any) -> None:
    """W5."""
    assert same(there_and_back(value), value)


@settings(max_examples=40)
@given(st.lists(values, max_size=3), st.dictionaries(st.text(), values, max_size=3))
def test_the_arguments_of_a_call_come_back_as_they_were(args: list[Any], kwargs: dict[str, Any]) -> None:
    """W5."""
    payload = encode_call(tuple(args), kwargs, trusted=False, where="Gen.generate")
    assert same(decode_call(payload, trusted=False), (tuple(args), kwargs))


@pytest.mark.parametrize("size", [3, LARGE])
def test_bytearrays_and_memoryviews_come_out_as_bytes(size: int) -> None:
    """W5."""
    data = bytes(range(256)) * (2 * size // 256 + 1)
    for value in (bytearray(data), memoryview(data), memoryview(data)[::2]):
        assert there_and_back([value, (value,)]) == [bytes(value), (bytes(value),)]


def test_a_registered_value_travels_as_its_fields() -> None:
    """A8."""
    register_value(Handle, "test-handle", vars, lambda fields: Handle(fields["service"]))
    [handle] = there_and_back([Handle("gen")])
    assert type(handle) is Handle
    assert handle.service == "gen"
    with pytest.raises(ValueError, match="belongs to"):
        register_value(Prompt, "test-handle", vars, lambda fields: None)


# ---- arrays

ARRAYS = [
    *(np.arange(12).astype(dtype).reshape(3, 4) for dtype in "?bBhHiIlLqQefdgFDG"),
    np.arange(12, dtype=">i4"),
    np.array(["a", "bc"]),
    np.array([b"a", b"bc"]),
    np.array(["2026-11-23", "NaT"], dtype="M8[ns]"),
    np.array([1, 2], dtype="m8[s]"),
    np.array([(1, 2.0, [1, 2])], dtype=[("a", "i4"), ("b", "<f8"), ("c", "i2", (2,))]),
    np.zeros(2, dtype=np.dtype([("a", "i1"), ("b", "f8")], align=True)),
    np.array(3.5),
    np.zeros((0, 3)),
    np.zeros(3, dtype="S0"),
    np.arange(100).reshape(10, 10)[::2, ::3],
    np.arange(100).reshape(10, 10)[::-1],
    np.arange(10)[::5][:1],
    np.asfortranarray(np.arange(12).reshape(3, 4)),
    np.arange(2 * LARGE, dtype="u1").reshape(2, -1).T,
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}{array.shape}")
def test_numpy_arrays_keep_dtype_shape_and_content(array: np.ndarray[Any, Any]) -> None:
    """W5."""
    out = there_and_back(array)
    assert type(out) is np.ndarray
    assert (out.dtype, out.shape) == (array.dtype, array.shape)
    assert out.tobytes() == array.tobytes()
    assert out.flags.writeable or array.nbytes >= LARGE


@pytest.mark.parametrize(
    "scalar",
    [
        np.bytes_(b"a"),
        np.complex64(1j),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])[0],
        np.float32(1.5),
        np.float64("nan"),
        np.int64(-1),
        np.bool_(True),
        np.str_("ab"),
        np.str_(""),
        np.datetime64("NaT", "s"),
    ],
    ids=lambda scalar: f"{type(scalar).__name__} {scalar}",
)
def test_numpy_scalars_keep_their_type(scalar: np.generic) -> None:
    """W5."""
    out = there_and_back(scalar)
    assert type(out) is type(scalar)
    assert out.dtype == scalar.dtype
    assert out.tobytes() == scalar.tobytes()


INTS = "bool uint8 int8 uint16 int16 int32 uint32 int64 uint64"
FLOATS = "float16 float32 float64 bfloat16 complex32 complex64 complex128"
FLOAT8 = [name for name in dir(torch) if name.startswith("float8_")]


@pytest.mark.parametrize("name", [*INTS.split(), *FLOATS.split(), *FLOAT8])
def test_torch_tensors_of_every_dtype_keep_their_content(name: str) -> None:
    """W5: bfloat16 and float8 too, which numpy does not have."""
    dtype = getattr(torch, name)
    for bytes_long in (96, 3 * LARGE):
        memory = (torch.arange(bytes_long) % 2).to(torch.uint8)
        tensor = memory.view(dtype).reshape(3, -1)
        out = there_and_back(tensor)
        assert (out.dtype, out.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(out.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3),
        torch.tensor(3.0, dtype=torch.bfloat16),
        torch.zeros(0, 3),
        torch.arange(12).reshape(3, 4).t(),
        torch.arange(12)[::2],
        torch.arange(3).expand(4, 3),
        torch.tensor([1j]).conj(),
        torch.tensor([1j]).conj().imag,
    ],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}",
)
def test_torch_tensors_of_every_layout_keep_their_content(tensor: torch.Tensor) -> None:
    """W5."""
    out = there_and_back(tensor)
    assert (out.dtype, out.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(out, tensor)


def test_gradients_stay_at_home() -> None:
    """W5."""
    parameter = torch.nn.Parameter(torch.ones(2))
    out = there_and_back(parameter * 2)
    assert not out.requires_grad
    assert type(there_and_back(parameter)) is torch.Tensor


def test_a_state_dict_travels_with_its_metadata_and_without_a_pickle() -> None:
    """W5."""
    layer = torch.nn.Linear(3, 2)
    state = there_and_back(layer.state_dict())
    assert type(state) is collections.OrderedDict
    assert state._metadata == layer.state_dict()._metadata  # type: ignore[attr-defined]
    torch.nn.Linear(3, 2).load_state_dict(state)


def test_large_arrays_go_out_as_the_memory_they_are() -> None:
    """W1, W5: no copy out."""
    array = np.arange(LARGE, dtype="f4")
    tensor = torch.arange(LARGE).to(torch.bfloat16)
    data = b"x" * LARGE
    payload = encode_call((array, array.reshape(2, -1).T, [tensor]), {"data": data}, trusted=False, where="x")
    assert isinstance(payload, list)
    document, one, transposed, third, fourth = payload
    assert len(document) < 300
    assert np.shares_memory(np.frombuffer(one, "u1"), array)
    assert np.shares_memory(np.frombuffer(transposed, "u1"), array)
    assert np.frombuffer(third, "u1").ctypes.data == tensor.data_ptr()
    assert any(part is data for part in (one, transposed, third, fourth))
    assert payload_size(payload) == len(document) + 2 * array.nbytes + 2 * LARGE + LARGE


def as_received(payload: Any) -> list[Any]:
    """The frames as zmq gives them with copy=False: writable memory of this process."""
    return [payload[0], *(memoryview(bytearray(buffer)) for buffer in payload[1:])]


def test_large_arrays_come_in_as_views_of_the_frame() -> None:
    """W5: no copy in, writable, and torch has nothing to warn about."""
    frames = as_received(encode([np.arange(LARGE), torch.arange(LARGE)], trusted=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array, tensor = decode(frames, trusted=False)
    assert np.shares_memory(array, np.frombuffer(frames[1], "u1"))
    assert tensor.data_ptr() == np.frombuffer(frames[2], "u1").ctypes.data
    array[0] = 7
    tensor += 1
    assert tensor[1] == 2


def test_an_array_over_memory_that_others_may_hold_is_never_written_through() -> None:
    """W5: bytes are immutable, and in one process a buffer is the sender's own array."""
    array, tensor = np.zeros(LARGE), torch.zeros(LARGE)
    payload = encode([array, tensor], trusted=False)
    for frames in (payload, [bytes(frame) for frame in payload]):
        got_array, got_tensor = decode(frames, trusted=False)
        with pytest.raises(ValueError, match="read-only"):
            got_array[0] = 1
        got_tensor += 1
        assert torch.equal(tensor, torch.zeros(LARGE))
        assert torch.equal(decode(frames, trusted=False)[1], tensor)


def test_a_large_document_gets_a_frame_of_its_own() -> None:
    """W1."""
    payload = encode(list(range(LARGE)), trusted=False)
    assert type(payload) is list
    assert len(payload) == 1
    assert decode(payload, trusted=False) == list(range(LARGE))
    assert type(encode([1], trusted=False)) is bytes


# ---- what cannot travel


def test_a_value_that_refers_to_itself_is_refused_clearly() -> None:
    """W5."""
    endless_list: list[Any] = []
    endless_list.append(endless_list)
    endless_dict: dict[str, Any] = {}
    endless_dict["self"] = ([endless_dict],)
    deep: Any = ()
    for _ in range(100):
        deep = (deep,)
    worst: Any = None
    for level in range(30_000):
        worst = (worst,) if level % 450 == 0 else [worst]
    for value in (endless_list, endless_dict, deep, worst, Prompt("", [], more=endless_list)):
        with pytest.raises(SerializationError, match="refers to itself"):
            encode(value, trusted=True)


def test_the_error_says_where_in_the_arguments_the_value_sits() -> None:
    """W5."""
    args = (1, {"lr": Pair(Prompt("", [], more=[threading.Lock()]), 0)})
    with pytest.raises(SerializationError) as caught:
        encode_call(args, {}, trusted=False, where="Gen.generate")
    text = str(caught.value)
    assert text.startswith("Gen.generate, argument 1['lr'].left.more[0]: a value of type _thread.lock cannot travel")
    assert "trusted address" in text
    with pytest.raises(SerializationError, match="argument 'lock'"):
        encode_call((), {"lock": threading.Lock()}, trusted=True, where="Gen.generate")


def test_encoding_goes_on_after_a_value_that_could_not_travel() -> None:
    """W5: encoders are used again, but not one that stopped in the middle."""
    for _ in range(3):
        with pytest.raises(SerializationError):
            encode([np.zeros(LARGE), (threading.Lock(),)], trusted=True)
        assert there_and_back((1, [2])) == (1, [2])


def test_importing_the_codec_imports_neither_torch_nor_numpy() -> None:
    """L2."""
    code = (
        "import sys, forge_contract.payload as p; p.decode(p.encode([(1, {2}), b'x'], trusted=True), trusted=True);"
        "sys.exit(', '.join({'torch', 'numpy', 'cloudpickle', 'zmq'} & set(sys.modules)) or 0)"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "args",
    [
        (),
        (1, 2.5, True, None),
        ("text", b"bytes"),
        (b"x" * (LARGE - 1),),
        (2**80,),
        ("\udcff",),
        ([1],),
        (b"x" * LARGE,),
    ],
    ids=lambda args: f"{args!r:.20}",
)
def test_plain_calls_are_encoded_as_all_calls_are(args: tuple[Any, ...]) -> None:
    """W5: the quick way says what the long way says, or leaves it to it."""
    quick = encode_plain_call(args)
    assert decode_call(encode_call(args, {}, trusted=False, where="f"), trusted=False) == (args, {})
    assert (quick is None) == (not 0 <= sum(map(_plain_size, args)) < LARGE - 16)
    assert quick is None or decode_call(quick, trusted=False) == (args, {})


def _plain_size(value: Any) -> float:
    """Bytes it takes up in a plain document; infinitely many if it cannot be in one."""
    if type(value) in (list,) or value in (2**80, "\udcff"):
        return math.inf
    return len(value) if isinstance(value, (str, bytes)) else 9


def test_a_column_of_small_payloads_is_decoded_in_one_pass_and_any_other_is_left() -> None:
    small = [encode(value, trusted=False) for value in (1, "a", (2, Decimal("0.1")), None)]
    assert decode_small(small, trusted=False) == [1, "a", (2, Decimal("0.1")), None]
    for odd in (encode(b"x" * LARGE, trusted=False), encode("x" * 2000, trusted=False), b"\xc1", b""):
        assert decode_small([*small, odd], trusted=False) is None
    assert decode_small([], trusted=False) is None
