"""The console script `framemesh`: its commands, the checks before anything starts, the exit code. Parses no words."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import msgspec
from cyclopts import App, CycloptsError, Parameter, UnknownOptionError, UnusedCliTokensError

from launch.helppage import HelpPage
from launch.options import COMMANDS as SETTINGS_OF
from launch.options import SHEET, Output, did_you_mean, is_flag_of, take_in
from launch.tryout import try_folder, try_port, try_services, try_transport
from runtime.batchrules import rules_of
from runtime.config import DEMO_MODEL, Config, check_config, describe_mesh
from runtime.errors import FramemeshError, InvalidInput
from runtime.places import is_remote, read_places
from runtime.sampling import ResolvedParams, SamplingParams

if TYPE_CHECKING:
    from runtime.models.card import Card

HELP = "Serve diffusion image and video models over a mesh of ranks."
EPILOGUE = (
    "A flag, unless it is of the group Command, is also a key of the --config file (--log-level: log_level) and an "
    "environment variable (FRAMEMESH_LOG_LEVEL). The command line wins over the environment, the environment over the "
    "file."
)

ConfigFlags = Annotated[Config, Parameter(name="*", group="Mesh and model")]
SamplingFlags = Annotated[SamplingParams, Parameter(name="*", group="Sampling")]
OutputFlags = Annotated[Output, Parameter(name="*", group="Output")]
ConfigFile = Annotated[str | None, Parameter(name="--config", group="Command", help="A JSON or YAML file of settings.")]
ProfileFile = Annotated[
    str | None,
    Parameter(name="--profile-file", group="Command", help="A layout that `framemesh tune` found; other settings win."),
]
DryRun = Annotated[
    bool, Parameter(group="Command", help="Check everything, print the resolved settings as JSON, start nothing.")
]
MeshPlace = Annotated[
    str | None,
    Parameter(name="--mesh", help="Folder of the mesh, or its scheduler's endpoint; unset: all that run."),
]
CurveDir = Annotated[
    str | None,
    Parameter(name="--curve-dir", env_var="FRAMEMESH_CURVE_DIR", help="Folder of the keys for sockets between hosts."),
]
VIDEO, PICTURES = ".mp4", (".png", ".jpg", ".jpeg", ".webp")
"""Endings of files."""
NO_CONFIG, NO_PARAMS, NO_OUTPUT = Config(), SamplingParams(), Output()


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code (0 done, 1 failed, 2 bad input, 130 interrupted)."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except InvalidInput as error:
        _say(f"error: {error}")
        return 2
    except CycloptsError as error:
        _say(f"error: {_refusal(error)}")
        return 2
    except FramemeshError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str]) -> int:
    intake = take_in(argv, os.environ)
    app = App(
        name="framemesh",
        help=HELP,
        help_format="plaintext",
        help_formatter=HelpPage(),
        version=_version,
        config=intake.fill,
        default_parameter=Parameter(consume_multiple=True, negative_iterable=()),
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for command in COMMANDS:
        with_settings = command.__name__ in SETTINGS_OF
        app.command(command, help_epilogue=EPILOGUE if with_settings else None)
    command, bound, _ = app.parse_args(intake.tokens)
    config = bound.arguments.get("config")
    if config is not None and command is not doctor:
        # What has no effect has to be right all the same: better refused than noted first.
        check_config(config)
    for note in intake.notes:
        _say(note)
    return command(*bound.args, **bound.kwargs) or 0


def _refusal(error: CycloptsError) -> str:
    """Of a command line, in the words of the other refusals."""
    command = " ".join(error.command_chain or ())
    match error:
        case UnknownOptionError():
            word = (error.token.keyword or error.token.value).partition("=")[0].replace("_", "-")
            names = (name for argument in error.argument_collection for name in argument.names)
            near = did_you_mean(word, (name for name in names if is_flag_of(command, name)), "--")
            return f"{word}: is no flag of {command}{near}"
        case UnusedCliTokensError():
            words = " ".join(error.unused_tokens or ())
            return f"{words}: is too much; `framemesh {command} --help` names what it takes (text goes in quotes)"
        case _:
            return str(error)


def _version() -> str:
    try:
        return version("framemesh")
    except PackageNotFoundError:
        return "unknown: runs from a folder that is not installed"


def serve(
    *,
    config: ConfigFlags = NO_CONFIG,
    config_file: ConfigFile = None,
    profile_file: ProfileFile = None,
    dry_run: DryRun = False,
) -> int:
    """Serve a model over HTTP; a signal drains it, a second one stops it at once."""
    ready = prepare(config, http=True)
    if dry_run:
        return _print_plan(ready)
    from launch.serve import serve as serve_until_signal

    return serve_until_signal(ready.config, ready.folder)


def mesh(*, config: ConfigFlags = NO_CONFIG, config_file: ConfigFile = None, dry_run: DryRun = False) -> int:
    """Run a mesh without an HTTP server, for `framemesh gateway`; a signal drains it, a second one stops it at once."""
    if config.bind is not None:
        _use_keys(config.curve_dir)
        _check_endpoint("bind", config.bind)
    ready = prepare(config)
    if dry_run:
        return _print_plan(ready)
    from launch.serve import serve_mesh

    return serve_mesh(ready.config, ready.folder)


def gateway(*, config: ConfigFlags = NO_CONFIG, config_file: ConfigFile = None) -> int:
    """Serve models over HTTP whose meshes run apart (`framemesh mesh`), here or elsewhere; they may start later."""
    check_config(config)
    places = read_places("mesh", config.mesh)
    _use_keys(config.curve_dir)
    for scheduler in (scheduler for place in places for scheduler in place.schedulers):
        _check_endpoint("mesh", scheduler)
        if is_remote(scheduler) and config.frames_bind is None:
            advice = "name an address of this host for its frames, such as tcp://10.0.0.9:0"
            raise InvalidInput("frames_bind", f"{scheduler} is on another host; {advice}")
    if config.frames_bind is not None:
        _check_endpoint("frames_bind", config.frames_bind)
    try_services(config)
    _check_keys_file(config)
    try_folder(Path(config.output_path))
    try_port(config.host, config.port)
    from launch.serve import serve_gateway

    return serve_gateway(config, places)


def generate(
    *,
    config: ConfigFlags = NO_CONFIG,
    params: SamplingFlags = NO_PARAMS,
    output: OutputFlags = NO_OUTPUT,
    config_file: ConfigFile = None,
    dry_run: DryRun = False,
) -> int:
    """Generate once, without an HTTP server."""
    ready = prepare(config, params, output)
    if dry_run:
        return _print_plan(ready)
    from launch.serve import generate_once

    code = generate_once(ready.config, ready.folder, params, output.output_file_name, bool(output.save_output))
    if code == 0 and not output.save_output:
        _say(f"note: nothing was saved; with --save-output the video goes to {config.output_path}")
    return code


def run(
    *,
    config: ConfigFlags = NO_CONFIG,
    params: SamplingFlags = NO_PARAMS,
    output: OutputFlags = NO_OUTPUT,
    config_file: ConfigFile = None,
) -> int:
    """Serve a model, send it one prompt over HTTP, save the video, stop."""
    if output.save_output is False:
        raise InvalidInput("save_output", "run always saves its video; generate does without")
    ready = prepare(config, params, output, http=True)
    from launch.serve import run_once

    return run_once(ready.config, ready.folder, params, output.output_file_name)


def tune(
    *,
    model_path: str = DEMO_MODEL,
    revision: str | None = None,
    num_gpus: int = 1,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float | None = None,
    machine: str | None = None,
    measure: int = 3,
    dry_run: Annotated[
        bool, Parameter(negative="", help="Predict only; needs no accelerator and starts nothing.")
    ] = False,
    profile_file: Path = Path("framemesh-profile.json"),
) -> int:
    """Find the fastest layout for a model and a shape, and write it down for `serve --profile-file`.

    Parameters
    ----------
    model_path
        A diffusers folder, a Hugging Face model id, or "demo".
    revision
        Branch, tag or commit of a model id.
    num_gpus
        Ranks to lay out.
    height
        Pixels; unset: the model's default.
    width
        Pixels; unset: the model's default.
    num_frames
        Frames of video; unset: the model's default.
    guidance_scale
        Of a video model; 1 or less: without guidance, so without guidance branches to spread.
    true_cfg_scale
        The same of an image model.
    machine
        Constants to predict with: cpu-gloo, h100-nvlink, h100-pcie, or a JSON file; unset: chosen by this machine.
    measure
        How many of the best predictions to measure.
    profile_file
        Where the profile goes.
    """
    from launch.tune import tune as find_layout
    from runtime.models.card import usual_request

    if measure < 1:
        raise InvalidInput("measure", f"{measure} is too few; take 1 or more, or --dry-run")
    config = Config(model_path=model_path, revision=revision, num_gpus=num_gpus)
    check_config(config)
    folder, card = _card_of(model_path, revision)
    params = replace(
        usual_request(),
        height=height,
        width=width,
        num_frames=num_frames,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
    )
    if any(scale is not None and scale <= 1 for scale in (guidance_scale, true_cfg_scale)):
        # Without guidance there is nothing to steer away from.
        params = replace(params, negative_prompt=None)
    return find_layout(
        config, folder, card, params, machine=machine, dry_run=dry_run, measure=measure, profile_file=profile_file
    )


def top(
    *,
    mesh: MeshPlace = None,
    curve_dir: CurveDir = None,
    once: Annotated[bool, Parameter(negative="", help="Print one snapshot and leave.")] = False,
) -> int:
    """Watch running meshes: ranks, queue, step times, memory; q leaves."""
    _use_keys(curve_dir)
    from launch.top import top as follow

    return follow(mesh, once=once)


def jobs(
    *,
    mesh: MeshPlace = None,
    curve_dir: CurveDir = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="One JSON array.")] = False,
) -> int:
    """List the requests of running meshes."""
    _use_keys(curve_dir)
    from launch.top import jobs as list_jobs

    return list_jobs(mesh, as_json=as_json)


def cancel(
    request_id: Annotated[str, Parameter(name="ID", help="Of the request; its beginning will do.")],
    /,
    *,
    mesh: MeshPlace = None,
    curve_dir: CurveDir = None,
) -> int:
    """Cancel a request of a running mesh."""
    _use_keys(curve_dir)
    from launch.top import cancel as cancel_one

    return cancel_one(mesh, request_id)


def drain(
    *,
    timeout: Annotated[
        float | None,
        Parameter(help="Seconds that running work gets to end before it is checkpointed; unset: the mesh's own."),
    ] = None,
    mesh: MeshPlace = None,
    curve_dir: CurveDir = None,
) -> int:
    """Have a running mesh, or all of one launcher, finish its work, take no more, and stop; waits for it."""
    from launch.observe import drain_mesh

    _use_keys(curve_dir)
    drain_mesh(mesh, timeout, _say)
    return 0


def models(*, model_path: str | None = None, revision: str | None = None) -> int:
    """List the native model families, or say what one model is.

    Parameters
    ----------
    model_path
        A diffusers folder, a Hugging Face model id, or "demo".
    revision
        Branch, tag or commit of a model id.
    """
    if model_path is not None:
        _print_rows(_model_rows(model_path, revision))
        return 0
    from runtime.models.card import FAMILIES

    for pipeline_class, factory in FAMILIES.items():
        card = get_type_hints(factory)["return"]
        _print_rows([(pipeline_class, f"family {card.family}, {card.task_type}, frames leave {card.decode_streams}")])
    return 0


def env() -> int:
    """Describe this machine: accelerators, memory, versions."""
    from launch.devices import describe_machine

    _print_rows(describe_machine())
    return 0


def doctor(
    *,
    config: ConfigFlags = NO_CONFIG,
    config_file: ConfigFile = None,
    as_json: Annotated[bool, Parameter(name="--json", group="Command", negative="", help="One JSON array.")] = False,
) -> int:
    """Check this host for a mesh with these settings, and say what to do about what is found."""
    from launch.doctor import doctor as examine_host

    return examine_host(config, as_json=as_json)


def keygen(*, curve_dir: CurveDir = None, name: str | None = None) -> int:
    """Make this host's keys for sockets between hosts.

    Parameters
    ----------
    name
        Of this host, as the others know it; unset: its host name.
    """
    from launch.keygen import keygen as make_pair

    return make_pair(Path(curve_dir) if curve_dir else None, name)


def apikey(name: Annotated[str, Parameter(name="NAME", help="Of whom the key is for.")], /) -> int:
    """Make an API key and the line that lets it in; the key is shown once and kept nowhere."""
    from runtime.apikeys import line_for, new_key

    secret = new_key()
    line = line_for(name, secret)
    _say(f"The key, for {name} alone; it is shown this once:")
    print(secret)
    _say("The line for --api-keys-file (a file of mode 0600) or FRAMEMESH_API_KEYS:")
    print(line)
    return 0


COMMANDS = (serve, mesh, gateway, generate, run, tune, top, jobs, cancel, drain, models, env, doctor, keygen, apikey)


def _use_keys(curve_dir: str | None) -> None:
    from runtime.keys import load_keys
    from runtime.wire import set_keys

    set_keys(load_keys(curve_dir or None))


def _check_endpoint(field: str, endpoint: str) -> None:
    """Refuse what no socket would take, keys missing for one between hosts included, before anything starts."""
    from runtime.wire import check_endpoint

    try:
        check_endpoint(endpoint)
    except InvalidInput as error:
        raise InvalidInput(field, error.message) from error


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model and a request that have passed every check that needs no weights."""

    config: Config
    """With the layout that fits the model."""
    folder: Path
    card: Card
    resolved: ResolvedParams | None
    why: tuple[str, ...]
    """How the layout was chosen; empty where it was asked for."""


def prepare(
    config: Config, params: SamplingParams | None = None, output: Output = NO_OUTPUT, *, http: bool = False
) -> Prepared:
    """Check everything that can be checked before a process starts, the cheap things before a download.

    Raises:
        InvalidInput: names the setting at fault.
    """
    from launch.sizes import settle_layout

    check_config(config)
    rules_of(config)
    _check_output(output)
    _use_keys(config.curve_dir)
    try_folder(Path(config.output_path))
    if config.spool_dir is not None:
        try_folder(config.spool, "spool_dir")
    try_transport(config)
    if http:
        try_port(config.host, config.port)
        try_services(config)
        _check_keys_file(config)
    folder, card = _card_of(config.model_path, config.revision)
    config, why = settle_layout(config, folder, card)
    _check_encoders(config, folder)
    resolved = None if params is None else card.check(params)
    _check_ending(output, card, resolved)
    notes = list(_notes(config, card))
    config = replace(config, vae_sp=config.vae_sp and config.num_gpus > 1 and card.decodes_in_strips)
    if config.num_gpus > 1:
        notes.insert(0, "\n".join([*describe_mesh(config, card), *why]))
    for note in notes:
        _say(f"note: {note}")
    return Prepared(config, folder, card, resolved, why)


def _check_keys_file(config: Config) -> None:
    if config.api_keys_file is not None:
        from runtime.apikeys import read_keys

        read_keys(Path(config.api_keys_file).expanduser())


def _check_encoders(config: Config, folder: Path) -> None:
    from runtime.folding import resolve_tp
    from runtime.machine import load_machine
    from runtime.models.card import read_configs

    if config.tp_size is not None:
        resolve_tp(config.tp_size, read_configs(folder), config.layout.sp, load_machine("cpu-gloo"))


def _notes(config: Config, card: Card) -> Iterator[str]:
    """What was asked for and changes nothing, or something else, with the reason."""
    if config.use_fsdp_inference and config.num_gpus == 1:
        yield "use_fsdp_inference: one rank has nobody to share its weights with; it holds all of them"
    if config.vae_sp and config.num_gpus == 1:
        yield "vae_sp: one rank decodes alone"
    if config.vae_sp and not card.decodes_in_strips:
        yield f"vae_sp: the {card.family} decode cannot be shared; every picture is decoded by one rank"
    if config.vae_sp and config.vae_tiling and config.num_gpus > 1 and card.decodes_in_strips:
        yield "vae_tiling: with vae_sp the ranks decode strips of rows, which need no tiles and no blending"
    if config.vae_slicing:
        yield "vae_slicing: decodes take one request and one latent frame at a time anyway"


def _card_of(model_path: str, revision: str | None) -> tuple[Path, Card]:
    from launch.weights import resolve_model
    from runtime.models.card import card_for, read_configs

    folder = resolve_model(model_path, revision)
    return folder, card_for(read_configs(folder))


def _check_output(output: Output) -> None:
    if output.return_frames:
        raise InvalidInput("return_frames", "works in the Python SDK only; here --save-output writes the video")
    name = output.output_file_name
    if name is None:
        return
    if "/" in name or "\\" in name or not name.isprintable():
        raise InvalidInput("output_file_name", f"{name!r} is no plain file name; the folder goes into --output-path")
    if Path(name).suffix.lower() not in {VIDEO, *PICTURES}:
        endings = ", ".join(PICTURES)
        raise InvalidInput(
            "output_file_name", f'{name!r} must end in .mp4, as in "clip.mp4", or for a picture in one of {endings}'
        )
    if len(os.fsencode(Path(name).with_suffix(SHEET))) > 255:
        raise InvalidInput("output_file_name", f"{name!r} and {SHEET} are longer than the 255 bytes of a file name")


def _check_ending(output: Output, card: Card, resolved: ResolvedParams | None) -> None:
    """A video goes into an MP4, one frame may also be a picture; an image model makes nothing else."""
    ending = Path(output.output_file_name or "").suffix.lower()
    if ending == VIDEO and card.task_type == "T2I":
        raise InvalidInput("output_file_name", f"this model makes pictures; take one of {', '.join(PICTURES)}")
    if ending in PICTURES and resolved is not None and resolved.num_frames > 1:
        raise InvalidInput("output_file_name", f"{resolved.num_frames} frames are a video; it must end in .mp4")


def _print_plan(ready: Prepared) -> int:
    config, layout = ready.config, ready.config.layout
    plan: dict[str, Any] = {
        "model": {"folder": str(ready.folder), **_describe(ready.card)},
        "layout": {"cfg": layout.cfg, "ring": layout.ring, "ulysses": layout.ulysses, "ranks": layout.num_ranks},
        "why": ready.why,
        "config": dataclasses.asdict(config),
        "params": msgspec.to_builtins(ready.resolved),
    }
    print(json.dumps(plan, indent=2))
    return 0


def _describe(card: Card) -> dict[str, str]:
    return {"family": card.family, "pipeline_class": card.pipeline_class, "task_type": card.task_type}


def _model_rows(model_path: str, revision: str | None) -> list[tuple[str, str]]:
    folder, card = _card_of(model_path, revision)
    defaults = msgspec.to_builtins(card.check(SamplingParams(prompt="-", seed=0)))
    told = {name: value for name, value in defaults.items() if name not in {"prompt", "negative_prompt", "seed"}}
    return [
        ("folder", str(folder)),
        *_describe(card).items(),
        ("frames leave", card.decode_streams),
        *((f"default {name}", str(value)) for name, value in told.items()),
    ]


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
