"""The scheduler process: `python -P -m runtime --bind ENDPOINT --config FILE --model-folder FOLDER`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from runtime.apikeys import parse_weights
from runtime.batching import BatchLimits
from runtime.batchrules import rules_of
from runtime.checkpoints import Leftovers, find_saved
from runtime.config import Config, fit_layout, load_frozen
from runtime.cost import CostModel
from runtime.costfile import cost_path, load_constants, save_constants
from runtime.engine import Engine
from runtime.keys import load_keys
from runtime.log import get_logger, setup_logging
from runtime.models.card import Card, card_for, most_branches, read_configs
from runtime.protocol import FromScheduler, ToScheduler
from runtime.recovery import LossLog
from runtime.scheduler import Scheduler
from runtime.trace import Trace
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
    # Under a launcher every degree is said. By hand the ranks derive what is open as we do, and nobody chooses.
    config = fit_layout(config, card, most_branches(card))
    cost_file = cost_path(config, configs)
    cost = CostModel(card, load_constants(cost_file))
    scheduler = make_scheduler(config, card, cost)
    channel: Channel[FromScheduler, ToScheduler] = Channel.bind(args.bind, ToScheduler)
    epoch = time.time_ns()
    trace = Trace(Path(config.trace_path), epoch) if config.trace_path else None
    # The supervisor ends us with SIGTERM; what was learnt has to be kept.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    engine = Engine(channel, scheduler, epoch, trace)
    get_logger("engine").info("listening", endpoint=channel.endpoint, layout=str(config.layout))
    try:
        while not engine.stopped:
            engine.step()
    finally:
        # A second one must not interrupt the write.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        save_constants(cost.constants, cost_file)
        channel.close(linger_s=1.0)
        if trace is not None:
            trace.close()


def make_scheduler(config: Config, card: Card, cost: CostModel) -> Scheduler:
    """The policy that the configuration asks for."""
    names = (config.model_path, *config.served_model_name)
    return Scheduler(
        card,
        config.layout,
        cost,
        config.scheduling_policy,
        BatchLimits(config.batching_max_size, rules_of(config), names),
        config.max_active,
        weights=parse_weights("key_weights", config.key_weights),
        checkpoint_every=config.checkpoint_every_steps,
        decode_on_all=config.vae_sp and config.num_gpus > 1,
        found=Leftovers(find_saved(config.spool) if config.checkpoint_every_steps else {}),
        losses=LossLog(config.crash_limit),
    )


if __name__ == "__main__":
    main()
