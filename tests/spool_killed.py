"""Processes that write into a spool folder and are killed at any moment: `python spool_killed.py FOLDER LIVES`."""

import os
import random
import signal
import sys
import time
from pathlib import Path

from workers.spool import SpoolFolder


def write_for_ever(folder, life):
    """Files of many sizes under few names, each replacing the last one as a rank's do."""
    spool = SpoolFolder(folder, 1 << 30)
    step = 0
    while True:
        step += 1
        size = 1 + (step * 7919) % 300_000
        path = spool.write(f"request {step % 3}", life * 100_000 + step, size.to_bytes(8, "little") + b"x" * size)
        spool.remove(f"request {step % 3}", keep=path)


def main(folder, lives):
    chance = random.Random(7)
    for life in range(int(lives)):
        child = os.fork()
        if child == 0:
            write_for_ever(Path(folder), life)
        time.sleep(chance.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, f"the writer of life {life} ended by itself"


if __name__ == "__main__":
    main(*sys.argv[1:])
