"""The gateway process: `python -P -m gateway --config FILE --model-folder FOLDER --scheduler URL --frames URL`.

With several meshes there is a `--scheduler NAME=URL[,URL…]` for each model, and for each scheduler a `--frames`, in
the same order. Without a model's folder its meshes tell what it is.

Once it listens it prints one line to stdout, {"url": "http://host:port"}, and nothing else ever.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from sqlalchemy import URL

from gateway.app import create_app
from gateway.catalog import Catalog, Model
from gateway.http1 import Http
from gateway.jobs.store import JobStore
from gateway.mesh import Mesh
from gateway.replicas import Replicas
from runtime.config import Config, load_frozen
from runtime.errors import FramemeshError, InvalidInput, StartFailed
from runtime.keys import load_keys
from runtime.log import get_logger, setup_logging
from runtime.models.card import Card, card_for, read_configs
from runtime.places import Place, read_places
from runtime.process import die_with_parent
from runtime.wire import set_keys

GRACE_S = 1
"""Event streams have no end of their own while a job runs; a shutdown must not wait for them."""


class Server(uvicorn.Server):
    """uvicorn that says where it listens."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(json.dumps({"url": self._url}), flush=True)


class _ToStructlog(logging.Handler):
    """What libraries log with the standard library, in our form."""

    def emit(self, record: logging.LogRecord) -> None:
        get_logger(record.name).log(record.levelno, record.getMessage(), exc_info=record.exc_info)


def main() -> int:
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m gateway", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="frozen configuration (JSON)")
    parser.add_argument("--model-folder", type=Path, help="the resolved diffusers folder of the configured model")
    parser.add_argument("--scheduler", required=True, action="append", help="[NAME=]URL[,URL…] of a model's schedulers")
    parser.add_argument("--frames", required=True, action="append", help="endpoint to take a mesh's frames on")
    args = parser.parse_args()
    try:
        config = load_frozen(args.config)
        setup_logging("gateway", config.log_level)
        logging.basicConfig(level=logging.WARNING, handlers=[_ToStructlog()])
        set_keys(load_keys(config.curve_dir))
        card = card_for(read_configs(args.model_folder)) if args.model_folder is not None else None
        places = read_places("--scheduler", args.scheduler, config.model_name)
        Path(config.output_path).mkdir(parents=True, exist_ok=True)
        asyncio.run(serve(config, card, places, args.frames))
    except (FramemeshError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def serve(config: Config, card: Card | None, places: Sequence[Place], frames: Sequence[str]) -> None:
    """Until a signal. `card` is that of the configured model, `frames` has an endpoint for each scheduler.

    Raises:
        StartFailed: it did not come up, for a reason that its operator can do something about.
    """
    listening = listen(config.host, config.port)
    store = JobStore(store_url(config), lease_s=config.job_lease)
    models = connect(config, card, places, frames)
    app = create_app(config, Catalog(models, allow_any=config.allow_any_model), store)
    settings = uvicorn.Config(
        app, http=Http, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=GRACE_S
    )
    host = f"[{config.host}]" if ":" in config.host else config.host
    # Uvicorn would log why the application did not start, and end as if nothing had happened.
    async with app.router.lifespan_context(app):
        # A full collection looks at everything that lives as long as the process, and nobody is served for 60 ms.
        gc.collect()
        gc.freeze()
        await Server(settings, f"http://{host}:{listening.getsockname()[1]}").serve([listening])


def connect(config: Config, card: Card | None, places: Sequence[Place], frames: Sequence[str]) -> list[Model]:
    """The models, each over its meshes.

    Raises:
        InvalidInput: there is not one endpoint for frames to each scheduler, or one cannot be used.
    """
    schedulers = [scheduler for place in places for scheduler in place.schedulers]
    if len(frames) != len(schedulers):
        raise InvalidInput("--frames", f"is there {len(frames)} times for {len(schedulers)} schedulers; give each one")
    delay_s = config.batching_delay_ms / 1000
    endpoints = dict(zip(schedulers, frames, strict=True))
    return [
        Model(
            place.name,
            card if place.name == config.model_name else None,
            Replicas([Mesh(url, endpoints[url], batching_delay_s=delay_s) for url in place.schedulers]),
            config.served_model_name[1:] if place.name == config.model_name else (),
        )
        for place in places
    ]


def store_url(config: Config) -> str | URL:
    """Of the database of the jobs; a file in the output folder unless another one is configured."""
    return config.database_url or URL.create("sqlite", database=str(Path(config.output_path) / "jobs.sqlite3"))


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        StartFailed: the address is taken, or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
        # asyncio sees to it only for sockets that were made with a protocol's number, which these are not: an answer's
        # body would wait for the acknowledgement of its head, 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        raise StartFailed(
            f"cannot listen on {host}:{port}: {os.strerror(error.errno) if error.errno else error}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
