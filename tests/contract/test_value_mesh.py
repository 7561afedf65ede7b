"""The ValueMesh: row-major, immutable, and clear about what it does not have."""

from __future__ import annotations

import pickle

import pytest

from forge_contract.value_mesh import Point, ValueMesh

MESH = ValueMesh({"hosts": 2, "procs": 3}, list("abcdef"))


def test_values_lie_in_rank_order_with_the_last_dimension_fastest() -> None:
    """A7."""
    assert len(MESH) == 6
    assert list(MESH.values()) == list("abcdef")
    assert MESH.get(4) == MESH.item(hosts=1, procs=1) == "e"
    assert MESH.sizes == {"hosts": 2, "procs": 3}


def test_iterating_gives_points_and_values() -> None:
    """A7."""
    pairs = list(MESH)
    assert pairs == list(MESH.items())
    point, value = pairs[5]
    assert (dict(point), point.rank, value) == ({"hosts": 1, "procs": 2}, 5, "f")
    assert point == {"hosts": 1, "procs": 2}
    assert all(MESH.item(**point) == value for point, value in MESH)
    assert repr(point) == "<Point rank 5 hosts=1 procs=2>"
    assert hash(point) == hash(Point(5, MESH.sizes))


def test_a_dimension_of_size_one_may_be_left_out() -> None:
    """A7."""
    assert ValueMesh({"hosts": 1, "procs": 2}, [1, 2]).item(procs=1) == 2
    assert ValueMesh({}, [1]).item() == 1


def test_what_it_does_not_have_is_named() -> None:
    """A7."""
    with pytest.raises(KeyError, match="no dimension 'gpus' here; there is 'hosts', 'procs'"):
        MESH.item(gpus=1)
    with pytest.raises(KeyError, match="needs a coordinate for 'procs'"):
        MESH.item(hosts=1)
    with pytest.raises(IndexError, match="procs=3 is outside this mesh: procs has size 3"):
        MESH.item(hosts=0, procs=3)
    for rank in (-1, 6):
        with pytest.raises(IndexError, match=f"rank {rank} is not in this mesh of 6 ranks"):
            MESH.get(rank)
    with pytest.raises(ValueError, match="takes 6 values, not 5"):
        ValueMesh(MESH.sizes, list("abcde"))
    with pytest.raises(ValueError, match="0 or more"):
        ValueMesh({"procs": -1}, [])
    with pytest.raises(TypeError, match="whole numbers"):
        ValueMesh({"procs": True}, [1])


def test_a_mesh_never_changes() -> None:
    """A7."""
    values = [1, 2]
    mesh = ValueMesh({"procs": 2}, values)
    values.append(3)
    mesh.sizes["procs"] = 7
    assert mesh == ValueMesh({"procs": 2}, (1, 2)) == pickle.loads(pickle.dumps(mesh))
    assert mesh != ValueMesh({"ranks": 2}, (1, 2))
    assert hash(mesh) == hash(ValueMesh({"procs": 2}, (1, 2)))


def test_its_repr_is_a_status_line() -> None:
    """A7."""
    assert repr(MESH) == "<ValueMesh hosts=2 procs=3 ['a', 'b', 'c', 'd', …]>"
    assert repr(ValueMesh({"procs": 1}, [None])) == "<ValueMesh procs=1 [None]>"
