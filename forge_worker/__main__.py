"""`python -m forge_worker`: the worker program's command line. Imports are cheap until it is clear what to run.

Without `--child` it is the supervisor that `forge worker` runs too; with it, one worker that ends when its replica
does, which is what a supervisor and the broker's local scaler start. With `--fork-server` the scaler starts what forks such workers.
"""

from __future__ import annotations

import argparse
import sys


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m forge_worker",
        description="Serve one rank of one replica after another for the broker at ADDRESS.",
        epilog="exit codes: 0 stopped, 2 wrong arguments, 64 (a child) stopped for good, 69 no broker or refused by it, "
        "70 a fault of the worker itself",
    )
    made.add_argument("--broker", required=True, metavar="ADDRESS", help="ipc:///path or tcp://host:port")
    made.add_argument("--gpu", default="none", metavar="0,1|none", help="GPUs it may use (default: none)")
    made.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")
    made.add_argument("--launch", type=int, default=0, metavar="N", help="the number a scaler started it under")
    made.add_argument("--child", action="store_true", help="one worker, not supervised")
    made.add_argument(
        "--fork-server", metavar="CONTROL,SOURCE", help="fork workers, as a scaler says by these descriptors"
    )
    made.add_argument("--owned", action="store_true", help="with --child: leave when stdin ends")
    return made


def main(arguments: list[str]) -> int:
    made = parser()
    given = made.parse_args(arguments)
    gpus = () if given.gpu in ("none", "") else tuple(name.strip() for name in given.gpu.split(","))
    labels: dict[str, str] = {}
    for label in given.label:
        key, equals, value = label.partition("=")
        if not (key and equals):
            made.error(f"--label takes KEY=VALUE, not {label!r}")
        labels[key] = value
    if given.fork_server is not None:
        from forge_worker import fork_server

        control, _, source = given.fork_server.partition(",")
        return fork_server.main(int(control), int(source), given.broker)
    if given.child:
        from forge_worker import runtime

        return runtime.main(runtime.WorkerOptions(given.broker, gpus, given.launch, labels, given.owned))

    from forge_contract.errors import ConfigError
    from forge_worker.supervisor import supervise

    try:
        return supervise(given.broker, gpus, labels)
    except ConfigError as error:
        made.error(str(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
