"""One rank: `torchrun … -m workers --scheduler ENDPOINT --config FILE --model-folder FOLDER`.

Says hello before it imports torch, so that a restart is noticed at once; says Ready when the weights are loaded.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from runtime.config import Config, load_frozen
from runtime.log import get_logger, setup_logging
from runtime.models.card import card_for, read_configs
from runtime.process import die_with_parent
from runtime.protocol import FromScheduler, FromWorker, ItemFailed, ModelInfo, Ready, Welcome, WorkerHello
from runtime.wire import Channel, incarnation

log = get_logger("worker")


def main() -> int:
    die_with_parent()
    parser = argparse.ArgumentParser(prog="torchrun -m workers", description=__doc__)
    parser.add_argument("--scheduler", required=True, help="endpoint of the scheduler")
    parser.add_argument("--config", type=Path, required=True, help="frozen configuration (JSON)")
    parser.add_argument("--model-folder", type=Path, required=True, help="the resolved diffusers folder")
    args = parser.parse_args()
    config = load_frozen(args.config)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    generation = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    setup_logging(f"worker{rank}", config.log_level)
    identity = incarnation(f"worker{rank}")
    channel: Channel[FromWorker, FromScheduler] = Channel.connect(args.scheduler, FromScheduler, identity)
    channel.send(WorkerHello(rank, num_ranks, generation, socket.gethostname(), os.getpid()))
    return _serve(args.scheduler, args.model_folder, config, rank, generation, identity, channel)


def _serve(
    endpoint: str,
    folder: Path,
    config: Config,
    rank: int,
    generation: int,
    identity: bytes,
    channel: Channel[FromWorker, FromScheduler],
) -> int:
    from workers.frames import FrameSender
    from workers.setup import build_executor, describe_model, pick_device
    from workers.worker import GroupBroken, Heart, Worker

    heart = Heart(endpoint, identity, rank, generation)
    heart.start()
    device = pick_device(config)
    sender = FrameSender(identity)
    card = card_for(read_configs(folder))
    try:
        executor, family, precisions = build_executor(config, folder, card, device, rank, sender)
    except Exception as error:
        reason = f"cannot load {config.model_path}: {type(error).__name__}: {error}"
        channel.send(ItemFailed(rank, -1, "load_failed", reason, group_broken=True))
        channel.close(linger_s=2.0)
        raise
    received = channel.receive()
    assert received is not None
    assert isinstance(received.message, Welcome)
    channel.set_epoch(received.message.epoch)
    model: ModelInfo | None = describe_model(config, folder, family, precisions, device) if rank == 0 else None
    channel.send(Ready(rank, generation, model))
    heart.start_beating(received.message.epoch)
    log.info("ready", device=str(device), layout=str(config.layout))
    try:
        Worker(rank, channel, executor, heart).run()
    except GroupBroken:
        channel.close(linger_s=2.0)
        # A collective may hold a thread of the process group for ever; only a hard exit is sure to end it.
        os._exit(1)
    sender.close()
    channel.close(linger_s=1.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
