"""What the commands do once everything was checked: stay up, run one prompt over HTTP, or generate without a port."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from launch.client import Client
from launch.edge import Edge
from launch.fleet import Fleet
from launch.generator import Generator, Result
from launch.options import SHEET
from launch.progress import ProgressView
from launch.signals import Signals, sigterm_as_interrupt
from launch.supervisor import Supervisor
from runtime.apikeys import line_for, new_key
from runtime.config import Config
from runtime.errors import RequestFailed, StartFailed
from runtime.log import get_logger, setup_logging
from runtime.places import Place
from runtime.protocol import MeshState, Progress
from runtime.sampling import SamplingParams

INTERRUPTED = 130
DRAIN_S = 3.0
"""How long idle ranks get to leave by themselves at the end."""
OVERTIME_S = 30.0
"""How long the writing of checkpoints and the leaving may take after the time for a drain is over."""

OWN_NAME = "framemesh-run"
"""The account of the one prompt of `run`."""

log = get_logger("launcher")


def serve(config: Config, folder: Path) -> int:
    """Stay up until it is drained, by SIGINT, SIGTERM or `framemesh drain`; prints the URL once requests can be served.

    Returns 0 after a drain, 130 or 143 if a second signal cut it short.

    Raises:
        StartFailed: the mesh did not come up, or broke in a way that it cannot repair.
    """
    setup_logging("launcher", config.log_level)

    def start() -> Fleet:
        return Fleet.local(config, folder, quiet=False)

    return asyncio.run(
        _stay_up(config, start, lambda fleet: f"framemesh serves {config.model_name} at {fleet.url}", config.model_path)
    )


def serve_mesh(config: Config, folder: Path) -> int:
    """The same without a gateway: scheduler and workers, for gateways elsewhere."""
    setup_logging("launcher", config.log_level)

    async def stay_up() -> int:
        mesh = Supervisor(config, folder, quiet=False)
        ready = f"framemesh has a mesh of {config.model_name} at {mesh.scheduler_endpoint}"
        return await _stay_up(config, lambda: Fleet([mesh]), lambda _: ready, config.model_path)

    return asyncio.run(stay_up())


def serve_gateway(config: Config, places: Sequence[Place]) -> int:
    """The same without a mesh; its meshes may start later."""
    setup_logging("launcher", config.log_level)

    def start() -> Fleet:
        return Fleet([], Edge(config, places, model_folder=None, quiet=False))

    names = ", ".join(place.name for place in places)
    return asyncio.run(_stay_up(config, start, lambda fleet: f"framemesh serves {names} at {fleet.url}"))


def run_once(config: Config, folder: Path, params: SamplingParams, file_name: str | None) -> int:
    """A server, one prompt over HTTP, the video and a contact sheet on disk, everything stopped."""
    setup_logging("launcher", config.log_level)
    return asyncio.run(_run_once(config, folder, params, file_name))


def generate_once(config: Config, folder: Path, params: SamplingParams, file_name: str | None, save: bool) -> int:
    """One generation without an HTTP server."""
    setup_logging("launcher", config.log_level)
    with sigterm_as_interrupt(), ProgressView() as view:
        with Generator(config, folder, on_state=lambda state: _show_start(view, state)) as generator:
            result = generator.generate(params, on_event=lambda event: _show_event(view, event))
        if save:
            suffix = ".png" if generator.card.task_type == "T2I" else ".mp4"
            video, sheet = _target(config, params, result.metadata["seed"], file_name, suffix)
            _write(config, result, video, sheet)
    if save:
        _report(video, sheet, result.metadata["seed"], result.metadata["timings"])
        usage = result.usage
        print(
            f"usage          {usage.rank_seconds:.2f} rank-seconds, at most {usage.peak_memory_bytes / 2**20:.0f} MiB"
        )
    return 0


async def _stay_up(
    config: Config, start: Callable[[], Fleet], ready: Callable[[Fleet], str], loading: str | None = None
) -> int:
    fleet, signals = start(), Signals()
    cut_short = None
    try:
        if await signals.during(_come_up(fleet, ready, loading)):
            _say("stopping")
            return 0
        asked = await signals.during(fleet.wait_draining())
        cut_short = await signals.during(_drain(fleet, config.drain_timeout if asked else None))
        if cut_short:
            _say("stopping at once")
            return 128 + cut_short
        return 0
    finally:
        await fleet.stop(at_once=bool(cut_short))


async def _come_up(fleet: Fleet, ready: Callable[[Fleet], str], loading: str | None) -> None:
    await fleet.start()
    if loading is not None:
        _say(f"{fleet.devices_reason}; loading {loading}")
    await fleet.wait_ready()
    print(ready(fleet), flush=True)


async def _drain(fleet: Fleet, timeout_s: float | None) -> None:
    """Until the scheduler and the ranks have left; what did not end is in the store and the spool.

    Without a time somebody else has told the scheduler to drain, and how long it has.
    """
    left = await asyncio.to_thread(fleet.work_left)
    _say(f"draining{left and f': {left}'}; again to stop at once")
    if timeout_s is not None:
        await fleet.drain(timeout_s)
    try:
        async with asyncio.timeout(None if timeout_s is None else timeout_s + OVERTIME_S):
            await fleet.watch()
    except TimeoutError:
        log.error("the drain did not end in its time; what is left goes on at the next start", timeout_s=timeout_s)


def with_own_key(config: Config, secret: str) -> Config:
    """A server that asks for keys lets us in too."""
    if not config.api_keys and config.api_keys_file is None:
        return config
    return replace(config, api_keys=(*config.api_keys, line_for(OWN_NAME, secret)))


async def _run_once(config: Config, folder: Path, params: SamplingParams, file_name: str | None) -> int:
    secret = new_key()
    config = with_own_key(config, secret)
    fleet, signals = Fleet.local(config, folder, quiet=True), Signals()
    made: list[tuple[Path, Path, int, dict[str, float]]] = []
    with ProgressView() as view:
        fleet.tell_states(lambda state: _show_start(view, state))

        async def work() -> None:
            await fleet.start()
            await fleet.wait_ready()
            ended = asyncio.create_task(fleet.watch())
            client = Client(fleet.url, secret)
            # Closed, it waits for nobody any more in the thread.
            closing.callback(client.close)
            video = asyncio.create_task(asyncio.to_thread(_one_video, client, config, params, file_name, view))
            try:
                await asyncio.wait({ended, video}, return_when=asyncio.FIRST_COMPLETED)
                if not video.done():
                    ended.result()
                    raise StartFailed("the mesh was drained before the video was done")
                view.stage("stopping")
                made.append(video.result())
            finally:
                ended.cancel()
                video.cancel()

        try:
            with contextlib.ExitStack() as closing:
                signalled = await signals.during(work())
                if signalled:
                    _say("stopping")
        finally:
            await fleet.leave(DRAIN_S)
            await fleet.stop()
    for video in made:
        _report(*video)
    return INTERRUPTED if signalled else 0


def _one_video(
    client: Client, config: Config, params: SamplingParams, file_name: str | None, view: ProgressView
) -> tuple[Path, Path, int, dict[str, float]]:
    """One prompt over HTTP: (video, contact sheet, seed, timings)."""
    from gateway.media.stills import SUFFIXES

    sent = time.monotonic()
    first_frame = 0.0
    if client.task_type() == "T2I" or Path(file_name or "").suffix.lower() in {*SUFFIXES}:
        view.stage("picture")
        return _one_picture(client, config, params, file_name)
    job = client.create(params)
    for name, data in client.events(job["id"]):
        if name == "queued":
            view.stage("queued", eta_s=data.get("eta_s"))
        elif name == "stage":
            view.stage(data["stage"])
        elif name == "step":
            view.stage(data.get("stage", "denoise"), data["step"], data["total_steps"], data["eta_s"])
        elif name == "frames":
            first_frame = first_frame or time.monotonic() - sent
            view.frames(data["first"] + data["count"], data["total"])
        elif name == "error":
            raise RequestFailed(job["id"], data["error"]["code"], data["error"]["message"])
    done = client.retrieve(job["id"])
    video, sheet = _target(config, params, done["seed"], file_name, ".mp4")
    client.download(job["id"], video)
    _write_sheet(video, sheet)
    timings = {**done["timings"], "first frame after": first_frame, "done after": time.monotonic() - sent}
    return video, sheet, done["seed"], timings


def _one_picture(
    client: Client, config: Config, params: SamplingParams, file_name: str | None
) -> tuple[Path, Path, int, dict[str, float]]:
    """One prompt to an image model over HTTP: (picture, itself, seed, timings)."""
    from gateway.media.stills import SUFFIXES

    sent = time.monotonic()
    kind = SUFFIXES[Path(file_name or ".png").suffix.lower() or ".png"]
    made = client.create_image(params, output_format=kind)
    picture, sheet = _target(config, params, made["seed"], file_name, ".png")
    picture.write_bytes(base64.b64decode(made["b64_json"]))
    return picture, sheet, made["seed"], {**made["timings"], "done after": time.monotonic() - sent}


def _target(config: Config, params: SamplingParams, seed: int, file_name: str | None, suffix: str) -> tuple[Path, Path]:
    """(result, contact sheet) in the output folder, which is made if need be; a picture is its own contact sheet."""
    slug = re.sub(r"[^a-z0-9]+", "-", params.prompt.lower()).strip("-")[:60] or "video"
    result = Path(config.output_path) / (file_name or f"{slug}-{seed}{suffix}")
    result.parent.mkdir(parents=True, exist_ok=True)
    # Not .png alone, which is how a picture of that name ends.
    return result, result.with_suffix(SHEET) if result.suffix.lower() == ".mp4" else result


def _write(config: Config, result: Result, target: Path, sheet: Path) -> None:
    from gateway.media.stills import SUFFIXES, still

    embedded = result.metadata if config.metadata else None
    if target.suffix.lower() == ".mp4":
        _write_video(result, target, embedded)
        _write_sheet(target, sheet)
    else:
        target.write_bytes(still(result.frames[0], SUFFIXES[target.suffix.lower()], embedded))


def _write_video(result: Result, video: Path, embedded: dict[str, object] | None) -> None:
    from gateway.media.mp4 import FragmentWriter, remux_faststart

    _, height, width, _ = result.frames.shape
    with tempfile.TemporaryDirectory(prefix="framemesh-") as folder:
        growing = Path(folder) / "video.mp4"
        with FragmentWriter(growing, width, height, result.metadata["fps"], embedded) as writer:
            writer.write(result.frames)
        remux_faststart(growing, video)


def _write_sheet(video: Path, sheet: Path) -> None:
    from gateway.media.mp4 import read_frames
    from gateway.media.stills import contact_sheet, png

    sheet.write_bytes(png(contact_sheet(read_frames(video))))


def _report(video: Path, sheet: Path, seed: int, timings: dict[str, float]) -> None:
    print(f"video          {video}\ncontact sheet  {sheet}" if sheet != video else f"picture        {video}")
    print(f"seed           {seed}")
    print("timings        " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in timings.items()), flush=True)


def _show_start(view: ProgressView, state: MeshState) -> None:
    if not (state.ready or state.draining):
        view.stage("start", state.ranks_ready, state.num_ranks)


def _show_event(view: ProgressView, event: object) -> None:
    from gateway.mesh import Frames

    if isinstance(event, Progress):
        view.stage(event.stage, event.step, event.total_steps, event.eta_s)
    elif isinstance(event, Frames):
        view.frames(event.first + event.count, event.total)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
