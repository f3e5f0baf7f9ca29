"""Starts a gloo group of real processes for one test script; many cases run per group, since a start costs seconds.

The ranks are forked off one process that has imported torch and diffusers already: four seconds of imports in each of
eight ranks would be most of the time on two cores. Run as a script this file is that process.
"""

import atexit
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]


def run_ranks(num_ranks: int, script: str, *args: str, timeout_s: float = 240.0) -> None:
    """Run tests/`script` on every rank; raises with the failed rank's output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"rank{rank}" for rank in range(num_ranks)]
        orders = [
            {"argv": [str(ROOT / "tests" / script), *args], "output": str(output)}
            | {"environment": {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}}
            for rank, output in enumerate(outputs)
        ]
        malloc = tuple(sorted(item for item in os.environ.items() if item[0].startswith("MALLOC_")))
        codes = Nursery.shared(malloc).run(orders, timeout_s)
        for rank, (code, output) in enumerate(zip(codes, outputs, strict=True)):
            said = output.read_text(errors="replace")[-4000:]
            assert code == 0, f"rank {rank} of {num_ranks} ended with {code}:\n{said}"


class Nursery:
    """The process that ranks are forked off, and a pipe to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
                "OMP_NUM_THREADS": "1",
                "PYTHONWARNINGS": "ignore",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,  # `select` knows nothing of what Python has read ahead.
        )
        atexit.register(os.killpg, self._process.pid, signal.SIGKILL)

    @staticmethod
    @functools.cache
    def shared(malloc: tuple[tuple[str, str], ...]) -> "Nursery":
        """One for all tests with the same settings of malloc, which it reads when a process starts."""
        return Nursery()

    def run(self, orders: list[dict[str, Any]], timeout_s: float) -> list[int]:
        """Exit codes, as `os.waitstatus_to_exitcode` gives them; ranks that take longer are killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(orders).encode() + b"\n")
        self._process.stdin.flush()
        pids = json.loads(self._process.stdout.readline())
        in_time, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        if not in_time:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        codes = json.loads(self._process.stdout.readline())
        assert in_time, f"the ranks took longer than {timeout_s} s"
        return codes


def nurse() -> None:
    """Carry out orders until nobody gives any."""
    for line in sys.stdin:
        pids = [fork_rank(**order) for order in json.loads(line)]
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


def fork_rank(argv: list[str], output: str, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid == 0:
        be_rank(argv, output, environment)
    return pid


def be_rank(argv: list[str], output: str, environment: dict[str, str]) -> NoReturn:
    """Run a script and end at once: gloo's threads may abort a process that ends as usual while its peers hang up."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    sys.argv, code = argv, 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    import parity_families  # noqa: F401  The three families with their pipelines, so torch and diffusers as well.

    import workers.setup  # noqa: F401

    nurse()
