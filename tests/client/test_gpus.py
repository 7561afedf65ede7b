"""Which GPUs there are, by whoever knows first."""

from __future__ import annotations

import pytest

from forge_client.gpus import check_gpus, find_gpus
from forge_contract.errors import ConfigError


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        ({"FORGE_GPUS": "2"}, ("0", "1")),
        ({"FORGE_GPUS": "0,3"}, ("0", "3")),
        ({"FORGE_GPUS": "GPU-8f2e"}, ("GPU-8f2e",)),
        ({"FORGE_GPUS": "none"}, ()),
        ({"FORGE_GPUS": ""}, ()),
        ({"FORGE_GPUS": "0"}, ()),
        ({"FORGE_GPUS": "1", "CUDA_VISIBLE_DEVICES": "4,5"}, ("0",)),
        ({"CUDA_VISIBLE_DEVICES": "4, 5"}, ("4", "5")),
        ({"CUDA_VISIBLE_DEVICES": ""}, ()),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ()),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, ("0",)),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ()),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1f,GPU-2a"}, ("MIG-1f", "GPU-2a")),
    ],
)
def test_the_environment_declares_gpus(environ: dict[str, str], gpus: tuple[str, ...]) -> None:
    assert find_gpus(environ) == gpus


@pytest.mark.parametrize("text", ["0,0", "0,", ",1"])
def test_a_declaration_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="FORGE_GPUS"):
        find_gpus({"FORGE_GPUS": text})


def test_asking_for_gpus_that_are_not_there_tells_which_are() -> None:
    check_gpus(("1", "0"), {"FORGE_GPUS": "2"})
    check_gpus((), {"FORGE_GPUS": "none"})
    with pytest.raises(ConfigError, match=r"no GPU 7, 8 on this machine; it has 0, 1 \(FORGE_GPUS says so\)"):
        check_gpus(("7", "0", "8"), {"FORGE_GPUS": "2"})
    with pytest.raises(ConfigError, match="it has none"):
        check_gpus(("0",), {"CUDA_VISIBLE_DEVICES": ""})


def test_all_problems_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        check_gpus(("0", "0", "9"), {"FORGE_GPUS": "1"})
    assert len(caught.value.problems) == 2
