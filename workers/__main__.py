"""One rank: `torchrun … -m workers --scheduler ENDPOINT --config FILE --model-folder FOLDER`.

Takes its seat before it imports torch, so that a restart is noticed at once; says Ready when the weights are loaded.
"""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path
from typing import NoReturn

from runtime.config import Config, fit_layout, load_frozen
from runtime.keys import load_keys
from runtime.log import get_logger, setup_logging
from runtime.models.card import card_for, most_branches, read_configs
from runtime.process import die_with_parent
from runtime.protocol import ItemFailed, Ready
from runtime.wire import set_keys
from workers.seat import Seat, WorkerChannel, take_seat

log = get_logger("worker")


def main() -> NoReturn:
    die_with_parent()
    threading.excepthook = die_with_thread
    parser = argparse.ArgumentParser(prog="torchrun -m workers", description=__doc__)
    parser.add_argument("--scheduler", required=True, help="endpoint of the scheduler")
    parser.add_argument("--config", type=Path, required=True, help="frozen configuration (JSON)")
    parser.add_argument("--model-folder", type=Path, required=True, help="the resolved diffusers folder")
    args = parser.parse_args()
    config = load_frozen(args.config)
    setup_logging(f"worker{os.environ['RANK']}", config.log_level)
    set_keys(load_keys(config.curve_dir))
    seat, channel = take_seat(args.scheduler)
    _serve(args.model_folder, config, seat, channel)


def die_with_thread(args: threading.ExceptHookArgs) -> None:
    """A rank whose sender, spool or heart is dead would look alive and keep requests waiting for ever."""
    name = args.thread.name if args.thread is not None else "?"
    log.error("a thread died, and the rank with it", thread=name, exc_info=args.exc_value)
    os._exit(1)


def _serve(folder: Path, config: Config, seat: Seat, channel: WorkerChannel) -> NoReturn:
    from workers.calibrate import measure
    from workers.checkpoint import digest
    from workers.frames import FrameSender
    from workers.previews import Previews
    from workers.setup import build_executor, describe_model, device_memory, memory_budget, pick_device
    from workers.spool import Spool
    from workers.worker import GroupBroken, Heart, Worker

    device = pick_device(config)
    sender = FrameSender(seat.identity)
    configs = read_configs(folder)
    card = card_for(configs)
    config = fit_layout(config, card, most_branches(card))
    try:
        executor, family, precisions = build_executor(config, folder, card, device, seat.rank, seat.generation, sender)
        measurements = measure(executor, family, card, config.layout)
        previews = Previews(family, card, sender)
        previews.warm_up(max((measured.params for measured in measurements), key=lambda params: params.num_frames))
    except Exception as error:
        reason = f"cannot load {config.model_path}: {type(error).__name__}: {error}"
        channel.send(ItemFailed(seat.rank, -1, "load_failed", reason, group_broken=True))
        channel.close(linger_s=2.0)
        raise
    model = describe_model(config, folder, family, precisions, device) if seat.rank == 0 else None
    budget = memory_budget(device, config.num_gpus)
    told = measurements if seat.rank == 0 else ()
    ready = Ready(seat.rank, seat.generation, model, budget, told, device_memory(device))
    channel.send(ready)
    spool = Spool(seat, config.spool, config.checkpoint_max_bytes, digest((configs, precisions, device.type)))
    executor.spool, executor.previews = spool, previews
    heart = Heart(seat)
    heart.start()
    spool.start()
    log.info("ready", device=str(device), layout=str(config.layout))
    try:
        Worker(seat, channel, executor, heart, spool, ready).run()
    except GroupBroken:
        # What is in line was sound before this item.
        spool.close(timeout_s=2.0)
        channel.close(linger_s=2.0)
        leave(1)
    sender.close()
    spool.close(timeout_s=10.0)
    channel.close(linger_s=1.0)
    leave(0)


def leave(code: int) -> NoReturn:
    """End at once: a collective may hold a thread of the process group for ever, and gloo's threads, met by the
    interpreter's own way out, abort the process now and then."""
    os._exit(code)


if __name__ == "__main__":
    main()
