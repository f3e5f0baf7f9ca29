"""The scheduler process: `python -P -m runtime --bind ENDPOINT --config FILE --model-folder FOLDER`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from runtime.batching import BatchLimits, BatchRule, read_batch_rules
from runtime.checkpoints import find_saved
from runtime.config import Config, load_frozen
from runtime.cost import CostModel
from runtime.costfile import cost_path, load_constants, save_constants
from runtime.engine import Engine
from runtime.keys import load_keys
from runtime.log import get_logger, setup_logging
from runtime.models.card import card_for, read_configs
from runtime.protocol import Done, FromScheduler, ToScheduler
from runtime.recovery import LossLog
from runtime.scheduler import Scheduler
from runtime.wire import Channel, set_keys


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m runtime", description=__doc__)
    parser.add_argument(
        "--bind", required=True, help="endpoint for all peers: ipc://, loopback tcp://, or with curve_dir any tcp://"
    )
    parser.add_argument("--config", type=Path, required=True, help="frozen configuration (JSON)")
    parser.add_argument("--model-folder", type=Path, required=True, help="the resolved diffusers folder")
    args = parser.parse_args()
    config = load_frozen(args.config)
    setup_logging("scheduler", config.log_level)
    set_keys(load_keys(config.curve_dir))
    configs = read_configs(args.model_folder)
    card = card_for(configs)
    cost_file = cost_path(config, configs)
    cost = CostModel(card, load_constants(cost_file))
    limits = BatchLimits(config.batching_max_size, _rules(config), config.model_name)
    scheduler = Scheduler(
        card,
        config.layout,
        cost,
        config.scheduling_policy,
        limits,
        config.max_active,
        checkpoint_every=config.checkpoint_every_steps,
        decode_on_all=config.vae_sp and config.num_gpus > 1,
        found=find_saved(config.spool) if config.checkpoint_every_steps else {},
        losses=LossLog(config.crash_limit),
    )
    channel: Channel[FromScheduler, ToScheduler] = Channel.bind(args.bind, ToScheduler)
    trace = _trace_to(Path(config.trace_path)) if config.trace_path else None
    # The supervisor ends us with SIGTERM; what was learnt has to be kept.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    engine = Engine(channel, scheduler, time.time_ns(), trace)
    get_logger("engine").info("listening", endpoint=channel.endpoint, layout=str(config.layout))
    try:
        while not engine.stopped:
            engine.step()
    finally:
        save_constants(cost.constants, cost_file)
        channel.close(linger_s=1.0)


def _rules(config: Config) -> tuple[BatchRule, ...]:
    return read_batch_rules(Path(config.batching_config)) if config.batching_config is not None else ()


def _trace_to(path: Path) -> Callable[[Done], None]:
    """A line per item and rank: rank, seq, started, finished (that rank's monotonic clock, seconds)."""
    lines = path.open("wb", buffering=0)

    def write(done: Done) -> None:
        lines.write(msgspec.json.encode(msgspec.structs.asdict(done)) + b"\n")

    return write


if __name__ == "__main__":
    main()
