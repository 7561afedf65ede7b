"""The same work on other systems, side by side: a no-op, a batched no-op and a 16 MiB tensor, each system in an environment of its own.

    make peers                                           # installs them (minutes, about 2 GB below bench/out/), then measures: 7 minutes
    python bench/against_peers.py --only forge majordomo # some of them
    python bench/against_peers.py --json peers.json --plot peers.png

A round starts every peer once, one after another, gives it the load of `bench/peers/load.py` (one client process, two
replicas) and ends it; so what the machine does for a minute hits one round of each and not all rounds of one. Figures are
medians over the rounds, with the least and the most. Every process carries a mark, is given a bounded time, and is gone
before the next peer starts. All traffic is on 127.0.0.1 or ipc (Ray opens its ports on every interface, behind a token of
this run: see `bench/peers/ray_core.py`).

Which systems, and with which settings, is in `bench/peers/roster.py`. What could not be installed, or failed, keeps its row and says why.
Exit code 1 when that is Forge broker itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

if not __package__:  # run as a plain script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.chaos_processes import end_all, environment
from bench.peers import report, venvs
from bench.peers.roster import PEERS, ROOT, Peer

OUT: Final = ROOT / "bench" / "out" / "peers"
ONE_S: Final = 150.0  # a peer's part of a round; the slowest takes 30 s on a quiet machine
END_S: Final = 5.0  # what is told to end has so long
LOOK_S: Final = 0.25  # at what others are doing, before each peer's turn
GONE_S: Final = 10.0  # and what is killed


class Failed(Exception):
    """A peer's part of a round gave no figures; the last it said."""


def one_round(python: Path, program: Sequence[str], seconds: float, bound_s: float = ONE_S) -> dict[str, Any]:
    """What `load.run` wrote: versions, loop, figures. All that was started is gone afterwards. Raises Failed."""
    mark = uuid.uuid4().hex
    directory = Path(tempfile.mkdtemp(prefix="forge-peer-"))
    out, log = directory / "figures.json", directory / "log"
    try:
        with log.open("wb") as written:
            process = subprocess.Popen(
                [str(python), *program, "--seconds", str(seconds), "--out", str(out)],
                cwd=ROOT,
                env=environment(mark),
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                start_new_session=True,
            )
            code: int | None = None
            try:
                code = process.wait(bound_s)
            except subprocess.TimeoutExpired:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(END_S)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                # With figures in hand nothing is left to wait for: whoever is still there has outlived its owner.
                end_all(mark, END_S if code == 0 else 0.0)
                end_all(mark, GONE_S)  # the kernel takes a moment to bury them
        if code is None:
            raise Failed(f"not done within {bound_s:.0f} s")
        if code != 0:
            raise Failed(venvs.last_line(log.read_text("utf-8", errors="replace")))
        told: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return told
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def install(peers: Sequence[Peer], directory: Path) -> dict[str, str]:
    """The peers that could not be installed, by name: why."""
    failed = {}
    for peer in peers:
        began = time.perf_counter()
        try:
            made = venvs.make(peer, directory / peer.short)
        except venvs.NotInstalled as problem:
            failed[peer.name] = f"not installed: {problem}"
            say(f"{peer.name}: {failed[peer.name]}")
        else:
            if made:
                say(f"{peer.name}: installed in {time.perf_counter() - began:.0f} s")
    return failed


def measure(
    peers: Sequence[Peer], directory: Path, runs: int, seconds: float, others: list[float]
) -> dict[str, dict[str, Any]]:
    """By the peers' names: {"versions", "loop", "rounds": [figures, …]}, or {"error"} for one that gave none.

    Into `others` goes what share of the cores was in use before each peer's turn, when nothing of ours ran.
    """
    failed = install(peers, directory)
    results: dict[str, dict[str, Any]] = {peer.name: {"through": peer.through} for peer in peers}
    for number in range(1, runs + 1):
        for peer in peers:
            if peer.name in failed:
                continue
            began = time.perf_counter()
            result = results[peer.name]
            others.append(report.busy(LOOK_S))
            try:
                told = one_round(venvs.python_of(directory / peer.short), ("-m", peer.module), seconds)
            except Failed as problem:
                result.setdefault("failures", []).append(str(problem))
                say(f"round {number}, {peer.name}: {problem}")
                continue
            result["versions"], result["loop"] = told["versions"], told["loop"]
            result.setdefault("rounds", []).append(told["figures"])
            say(f"round {number}, {peer.name}: {time.perf_counter() - began:.0f} s")
    for name, result in results.items():
        if "rounds" not in result:
            result["error"] = failed.get(name) or f"failed: {result['failures'][-1]}"
    return results


def say(line: str) -> None:
    """Progress, beside the table: that goes to stdout."""
    print(line, file=sys.stderr, flush=True)


def show(results: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    print(
        f"{about['cores']} cores ({about['cpu']}, {about['memory_gib']} GiB), Linux {about['kernel']}, Python {about['python']}; "
        f"between the peers, when nothing of ours ran, others used {about['others']['median']:.0%} of it "
        f"({about['others']['min']:.0%}–{about['others']['max']:.0%})"
    )
    print(
        f"medians of {about['runs']} rounds (least–most), closed loops of {about['seconds']} s; command: {about['command']}\n"
    )
    print(report.table(results))
    print("\nitems per batch: " + ", ".join(f"{name} {size:.1f}" for name, size in report.batch_sizes(results).items()))
    print("versions: " + report.versions(results))
    for name, result in results.items():
        for failure in result.get("failures", []):
            print(f"{name}: a round failed: {failure}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="rounds")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each closed loop")
    parser.add_argument("--only", nargs="+", choices=[peer.short for peer in PEERS], metavar="PEER", help="these peers")
    parser.add_argument("--directory", type=Path, default=OUT, help="where the environments are")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here (PNG); needs matplotlib, the extra `bench`")
    options = parser.parse_args()
    peers = [peer for peer in PEERS if not options.only or peer.short in options.only]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended on the way out
    options.directory.mkdir(parents=True, exist_ok=True)
    about, others = report.machine(), [report.busy(LOOK_S)]
    results = measure(peers, options.directory, options.runs, options.seconds, others)
    words = [os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]
    about["others"] = {"median": statistics.median(others), "min": min(others), "max": max(others)}
    about |= {"runs": options.runs, "seconds": options.seconds, "command": f"python {' '.join(words)}"}
    show(results, about)
    if options.json:
        options.json.write_text(json.dumps({"about": about, "peers": results}, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        report.picture(results, options.plot)
    return 1 if "error" in results.get("Forge broker", {}) else 0


if __name__ == "__main__":
    sys.exit(main())
