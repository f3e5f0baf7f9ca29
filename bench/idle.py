"""Idle costs nothing: CPU time per process over 30 s, after 10 s of quiet. Wanted: below 1 % of one core each."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import psutil

from bench.report import machine, save
from framemesh import Client, SamplingParams
from launch.process import child_environment


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.idle", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quiet", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args()
    where = machine()
    with tempfile.TemporaryDirectory(prefix="framemesh-") as folder:
        command = [sys.executable, "-P", "-m", "launch", "serve", "--port", "0", "--num-gpus", str(args.ranks)]
        server = subprocess.Popen(
            [*command, "--output-path", folder], env=child_environment({}), stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            with Client(url) as client:
                job = client.create(SamplingParams(prompt="a red circle moving right", seed=1))
                for _ in client.events(job["id"]):
                    pass
            time.sleep(args.quiet)
            percent = _cpu_percent(server.pid, args.seconds)
        finally:
            server.terminate()
            server.wait()
    save("idle", where, {"wanted_percent": 1.0, "percent_of_one_core": percent, "seconds": args.seconds})


def _cpu_percent(pid: int, seconds: float) -> dict[str, float]:
    launcher = psutil.Process(pid)
    processes = [launcher, *launcher.children(recursive=True)]
    before = {p.pid: sum(p.cpu_times()[:2]) for p in processes}
    time.sleep(seconds)
    return {_name(p): round(100 * (sum(p.cpu_times()[:2]) - before[p.pid]) / seconds, 3) for p in processes}


def _name(process: psutil.Process) -> str:
    words: list[Any] = process.cmdline()
    rank = process.environ().get("RANK")
    module = words[words.index("-m") + 1] if "-m" in words else os.path.basename(words[0])
    return f"{module} rank {rank}" if rank is not None else module


if __name__ == "__main__":
    main()
