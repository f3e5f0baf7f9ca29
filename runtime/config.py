"""The one frozen configuration tree of a mesh. Every process gets the same one; nothing reads the environment later.

A field is a flag (`--ulysses-degree`), a config-file key (`ulysses_degree`) and an environment variable
(`FRAMEMESH_ULYSSES_DEGREE`); its docstring is its help text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from runtime.apikeys import parse_keys, parse_rate, parse_weights
from runtime.bounds import MAX_PROMPT_CHARS, MAX_RANKS
from runtime.errors import InvalidInput
from runtime.layout import Heads, Layout, derive_layout, describe_layout
from runtime.places import read_places

Precision = Literal["fp16", "bf16", "fp32"]
Backend = Literal["nccl", "gloo", "staged"]
LogLevel = Literal["debug", "info", "warning", "error"]

BUCKET_URL = re.compile(r"s3://[^/@?#\s]+(/[^?#\s]*)?")

DEMO_MODEL = "demo"
"""The value of `model_path` that means the model shipped inside the package."""
POSTGRES = ("postgresql://", "postgres://", "postgresql+psycopg://")


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Which halves of the VAE to hold, and its tiles."""

    load_encoder: bool | None = None
    """Hold the VAE's encoder; unset: only if the family needs it."""
    load_decoder: bool = True
    """Hold the VAE's decoder."""
    tile_sample_min_height: int | None = None
    """Tile height in pixels when tiling is on; unset: the VAE's own."""
    tile_sample_min_width: int | None = None
    """Tile width in pixels when tiling is on; unset: the VAE's own."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything about a mesh that is fixed before it starts."""

    model_path: str = DEMO_MODEL
    """A diffusers folder, a Hugging Face model id, or "demo" (the model shipped with framemesh)."""
    revision: str | None = None
    """Branch, tag or commit of a model id."""
    served_model_name: tuple[str, ...] = ()
    """Names under which clients know the model: the first is the one in answers, the others are aliases. Unset: the
    model path."""
    allow_any_model: bool = False
    """Take a request for a model that is not served here as one for the first model."""
    backend: Literal["auto", "framemesh", "sglang"] = "auto"
    """auto or framemesh (alias sglang): the native families; a model outside them is refused."""

    num_gpus: int = 1
    """Ranks of the worker mesh: GPUs, or CPU processes where there is no GPU. With nothing else said on how they share
    the work, the layout that the cost and memory model predicts to be fastest is taken."""
    replicas: int = 1
    """Meshes of that many ranks each, side by side on this host behind one gateway."""
    bind: str | None = None
    """Endpoint of the scheduler for gateways elsewhere, such as tcp://10.0.0.1:5555; unset: a socket on this host."""
    mesh: tuple[str, ...] = ()
    """The meshes of a gateway without its own: NAME=SCHEDULER[,SCHEDULER…] for each model, one SCHEDULER a replica."""
    frames_bind: str | None = None
    """Where a gateway takes frames from meshes on other hosts: tcp://ADDRESS:PORT of this host, the next ports for
    further meshes; port 0 takes free ones."""
    sp_degree: int | None = None
    """Sequence-parallel degree (ring * ulysses); unset: derived from the other degrees."""
    ulysses_degree: int | None = None
    """DeepSpeed-Ulysses degree: all-to-all between heads and sequence; unset: as much of SP as divides the heads."""
    ring_degree: int | None = None
    """Ring-attention degree; unset: what Ulysses leaves of SP."""
    enable_cfg_parallel: bool | None = None
    """Evaluate the guidance branches on separate ranks; requests without guidance use them for SP. Unset: not, unless
    the layout is chosen."""
    cfg_parallel_size: int | None = None
    """Groups of ranks that share the guidance branches; unset: 2 with --enable-cfg-parallel, else 1."""
    sp_engine: Literal["native", "yunchang"] = "native"
    """Attention over several ranks: our own, or yunchang's (CUDA with flash-attn only)."""
    dist_backend: Literal["auto", "nccl", "gloo", "staged"] = "auto"
    """Transport of tensors between ranks; auto: NCCL on CUDA, gloo on CPUs. staged: CUDA tensors over gloo."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA when there are enough GPUs for the ranks, else the CPU."""
    dist_timeout: int = 600
    """Seconds after which a collective that hangs is an error."""

    tp_size: int | None = None
    """Ranks that share the layers of the text encoders; divides the SP degree. Unset: as the cost model predicts."""
    use_fsdp_inference: bool | None = None
    """Every rank holds 1/N of the denoiser's and the text encoders' weights (FSDP2) instead of all of them. Unset: not,
    unless the layout is chosen and nothing else fits."""

    dit_precision: Precision | None = None
    """Precision of the denoiser; unset: bf16 on CUDA, fp32 on CPU."""
    vae_precision: Precision | None = None
    """Precision of the VAE; unset: fp32."""
    text_encoder_precisions: tuple[Precision, ...] = ()
    """Precision of each text encoder in pipeline order; unset: as the denoiser."""
    attention_backend: Literal["auto", "torch_sdpa"] = "auto"
    """Attention kernel of the denoiser."""
    vae_tiling: bool = False
    """Decode frames above the tile size tile by tile, as the VAE's own tiled decode does."""
    vae_slicing: bool = False
    """Decode one request at a time, to save memory; every decode here does, so this changes nothing."""
    vae_sp: bool = False
    """Decode over all ranks, each of which decodes a strip of rows of every frame; tiles are then not needed."""
    vae_config: VaeConfig = field(default_factory=VaeConfig)
    """Parts and tiles of the VAE."""

    host: str = "127.0.0.1"
    """Address that the HTTP server listens on."""
    port: int = 30000
    """Port of the HTTP server; 0 takes a free one."""
    public_url: str | None = None
    """How clients reach this server, e.g. https://images.example.org; put before the URLs in answers, which are
    relative without it."""
    output_path: str = "outputs"
    """Folder for results and for the job store."""
    output_store: str | None = None
    """s3://bucket/prefix: finished files go there (endpoint and credentials: AWS_* variables); unset: output_path."""
    output_redirect: bool = False
    """Answer for a file in the bucket with a redirect to a signed URL of it; unset: the gateway passes the bytes on."""
    metadata: bool = True
    """Write into each result how it was made: prompt, seed, steps, times; --no-metadata leaves all of it out."""
    keep_results_hours: float = 0.0
    """Hours after its end that a job is removed with its files; 0 keeps it for ever."""
    webhook_url: str | None = None
    """Told of the end of every job, beside the webhook_url of the request."""
    webhook_secret_file: str | None = None
    """File (0600) of the secrets that sign webhooks, one whsec_… a line; unset: nobody may ask for webhooks."""
    database_url: str | None = field(default=None, repr=False)
    """PostgreSQL database of the jobs (postgresql://user:password@host/database), which several gateways may share;
    unset: an SQLite file in the output folder, for one gateway."""
    job_lease: float = 15.0
    """Seconds after which the jobs of a gateway that died are another one's, where several share a database."""
    batching_delay_ms: float = 0.0
    """How long the gateway collects requests before it sends them on together."""
    batching_max_size: int = 16
    """Most requests that share a forward; 1 switches batching off. The cost model may choose fewer."""
    batching_config: str | None = None
    """JSON or YAML file of rules that bound the batch size by model and resolution."""
    scheduling_policy: Literal["srpt", "deadline", "fifo"] = "srpt"
    """Order within an API key: shortest predicted remaining work, least slack, or arrival."""
    key_weights: tuple[str, ...] = ()
    """Shares of API keys, NAME=WEIGHT each: a key of weight 2 gets twice the service of one that is not named, when
    both have work. The mesh decides by this for all of its gateways."""
    max_active: int = 64
    """Requests whose state the ranks hold at once, memory allowing."""
    cost_cache: str | None = None
    """Folder where measured costs are kept between starts; unset: the user's cache folder."""
    max_prompt_chars: int = 20_000
    """Longest prompt that is tokenized at all."""
    allow_private_urls: bool = False
    """Let clients name URLs (of images, of webhooks) on loopback and private addresses."""

    api_keys_file: str | None = None
    """File of the API keys that are let in, mode 0600, lines made by `framemesh apikey NAME`; it is read again when it
    changes. Unset, and without --api-keys: everybody may ask."""
    api_keys: tuple[str, ...] = ()
    """API keys as lines of such a file: NAME:SHA256, with :rate=60/minute and :concurrent=4 if these differ."""
    protect_metrics: bool = False
    """Ask for an API key at /metrics too."""
    rate_limit: str | None = None
    """Requests for videos and images that one API key may make in a time, such as 60/minute; unset: no limit."""
    max_concurrent_per_key: int | None = None
    """Videos and images of one API key that may be unfinished at once; unset: no limit."""
    max_queue: int = 1000
    """Requests that may wait at this gateway; 0: no limit."""
    max_pixels: int | None = None
    """Most pixels of one request: width * height * frames * images; unset: no limit but the model's."""
    lenient: bool = False
    """Ignore fields that are unknown and values that cannot be had, and say so in `warnings`, instead of refusing."""

    checkpoint_every_steps: int = 10
    """Denoising steps between two checkpoints of a request; 0 writes none, so that after a crash it starts again."""
    spool_dir: str | None = None
    """Folder of the checkpoints; unset: `spool` in the output folder."""
    checkpoint_max_bytes: int = 16 << 30
    """Most bytes that all checkpoints may take; beyond it none is written, loudly."""
    drain_timeout: float = 30.0
    """Seconds that running requests get to end when the server is told to stop; then they are checkpointed."""
    crash_limit: int = 3
    """The mesh stops with the last error when its workers, its scheduler or its gateway died so often in 5 minutes."""
    start_timeout: int = 1800
    """Seconds that the workers may take to load the model."""
    curve_dir: str | None = None
    """Folder of CURVE keys (made by `framemesh keygen`), for sockets between hosts; unset: ipc and loopback only."""
    log_level: LogLevel = "info"
    """How much the processes log."""
    enable_metrics: bool = True
    """Answer /metrics in Prometheus' text format."""
    trace_path: str | None = None
    """Append the start and end of every work item on every rank to this file (JSON lines)."""

    @property
    def layout(self) -> Layout:
        return self.layout_on()

    @property
    def cfg_degree(self) -> int:
        if self.cfg_parallel_size is not None:
            return self.cfg_parallel_size
        return 2 if self.enable_cfg_parallel else 1

    @property
    def cfg_setting(self) -> str:
        """Which setting `cfg_degree` comes from."""
        return "enable_cfg_parallel" if self.cfg_parallel_size is None else "cfg_parallel_size"

    @property
    def layout_is_open(self) -> bool:
        """Whether nothing was said on how several ranks share the work, so that it has to be chosen."""
        degrees = (self.sp_degree, self.ulysses_degree, self.ring_degree, self.cfg_parallel_size)
        switches = (self.enable_cfg_parallel, self.use_fsdp_inference)
        return self.num_gpus > 1 and all(said is None for said in (*degrees, *switches))

    def layout_on(self, heads: int | None = None) -> Layout:
        """The layout for a model with so many heads, or before the model is known."""
        return derive_layout(
            self.num_gpus,
            sp_degree=self.sp_degree,
            ulysses_degree=self.ulysses_degree,
            ring_degree=self.ring_degree,
            cfg_degree=self.cfg_degree,
            cfg_setting=self.cfg_setting,
            heads=heads,
        )

    @property
    def spool(self) -> Path:
        return Path(self.spool_dir) if self.spool_dir is not None else Path(self.output_path) / "spool"

    @property
    def model_name(self) -> str:
        return self.served_model_name[0] if self.served_model_name else self.model_path


def check_config(config: Config) -> None:
    """Refuse what can be seen to be wrong without looking at the model or the machine.

    Raises:
        InvalidInput: names the field.
    """
    _check_parallel(config)
    _check_places(config)
    _check_gateway(config)
    _check_admission(config)
    if not config.vae_config.load_decoder:
        raise InvalidInput("vae_config.load_decoder", "must be true: without the decoder there are no frames")
    if not 1 <= config.max_prompt_chars <= MAX_PROMPT_CHARS:
        raise InvalidInput(
            "max_prompt_chars", f"{config.max_prompt_chars} is out of range; take 1 to {MAX_PROMPT_CHARS}"
        )
    for name in ("batching_max_size", "max_active", "crash_limit", "replicas"):
        if getattr(config, name) < 1:
            raise InvalidInput(name, f"{getattr(config, name)} is too few; take 1 or more")
    for name in ("checkpoint_every_steps", "checkpoint_max_bytes", "drain_timeout"):
        if getattr(config, name) < 0:
            raise InvalidInput(name, f"{getattr(config, name)} is negative; take 0 or more")
    parse_weights("key_weights", config.key_weights)
    _check_outputs(config)
    if config.batching_delay_ms < 0:
        raise InvalidInput("batching_delay_ms", f"{config.batching_delay_ms} is negative; it is a time in ms")
    for name in ("tile_sample_min_height", "tile_sample_min_width"):
        value = getattr(config.vae_config, name)
        if value is not None and value < 64:
            raise InvalidInput(f"vae_config.{name}", f"{value} is below the smallest tile of 64 pixels")


def _check_admission(config: Config) -> None:
    parse_keys("api_keys", config.api_keys)
    if config.rate_limit is not None:
        parse_rate("rate_limit", config.rate_limit)
    for name in ("max_concurrent_per_key", "max_pixels"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InvalidInput(name, f"{value} would let nothing in; take 1 or more, or leave it out")
    if config.max_queue < 0:
        raise InvalidInput("max_queue", f"{config.max_queue} is negative; take 0 (no limit) or more")
    names: object = config.served_model_name
    if isinstance(names, str):
        raise InvalidInput("served_model_name", f"{names!r} is text; give a tuple of names")
    if not all(config.served_model_name):
        raise InvalidInput("served_model_name", "holds an empty name")
    if len(set(config.served_model_name)) < len(config.served_model_name):
        raise InvalidInput("served_model_name", "holds the same name twice")


def _check_places(config: Config) -> None:
    if config.mesh:
        read_places("mesh", config.mesh)
    for name, least in (("bind", 1), ("frames_bind", 0)):
        endpoint = getattr(config, name)
        if endpoint is None or (name == "bind" and endpoint.startswith("ipc://")):
            continue
        form = f"{endpoint} is not of the form tcp://ADDRESS:PORT"
        try:
            url = urlsplit(endpoint)
            host, port = url.hostname, url.port
        except ValueError as error:
            raise InvalidInput(name, form) from error
        if url.scheme != "tcp" or host is None or port is None or url.path:
            raise InvalidInput(name, form)
        if host in {"*", "0.0.0.0", "::"}:
            raise InvalidInput(
                name, f"{host} is no address to connect to; take the one under which others reach this host"
            )
        if port < least:
            raise InvalidInput(name, "port 0 is a different one at each start; name one that gateways can know")


def _check_outputs(config: Config) -> None:
    if config.output_store is not None and not BUCKET_URL.fullmatch(config.output_store):
        reason = f"{config.output_store!r} is not of the form s3://bucket/prefix; all else is in AWS_* variables"
        raise InvalidInput("output_store", reason)
    if not 0 <= config.keep_results_hours < float("inf"):
        raise InvalidInput("keep_results_hours", f"{config.keep_results_hours} is no time; take 0 (for ever) or more")
    if config.webhook_url is not None and not config.webhook_url.startswith(("http://", "https://")):
        raise InvalidInput("webhook_url", f"{config.webhook_url!r} is not of the form https://host/path")
    if config.webhook_url is not None and config.webhook_secret_file is None:
        raise InvalidInput("webhook_url", "needs webhook_secret_file: webhooks are signed")


def _check_parallel(config: Config) -> None:
    if config.num_gpus * config.replicas > MAX_RANKS:
        raise InvalidInput(
            "num_gpus", f"{config.num_gpus * config.replicas} ranks are too many; take at most {MAX_RANKS}"
        )
    if config.tp_size is not None and config.tp_size < 1:
        raise InvalidInput("tp_size", f"{config.tp_size} is not a degree; it must be 1 or more")
    if config.enable_cfg_parallel and config.cfg_degree == 1:
        raise InvalidInput("cfg_parallel_size", "1 contradicts enable_cfg_parallel; take 2 or more, or leave it out")
    if config.enable_cfg_parallel is False and config.cfg_degree > 1:
        reason = f"{config.cfg_parallel_size} contradicts no-enable-cfg-parallel; leave one of them out"
        raise InvalidInput("cfg_parallel_size", reason)
    if config.layout.num_ranks == 1 and config.sp_engine != "native":
        raise InvalidInput("sp_engine", f"{config.sp_engine} has nothing to do on one rank; leave it out")
    if config.device != "auto":
        check_transport(config, config.device)
    if config.use_fsdp_inference and config.dist_backend == "staged":
        raise InvalidInput("use_fsdp_inference", "dist_backend staged cannot gather sharded weights; take nccl")


def check_transport(config: Config, device: str) -> None:
    """What moves tensors between ranks against the kind of device that they are on.

    Raises:
        InvalidInput: it cannot move them.
    """
    resolve_backend(config.dist_backend, device)
    if config.sp_engine == "yunchang" and device == "cpu":
        raise InvalidInput("sp_engine", "yunchang needs CUDA and flash-attn; take native on the CPU")


def resolve_backend(wanted: str, device: str) -> Backend:
    """The transport that `dist_backend` means for tensors on "cuda" or "cpu".

    Raises:
        InvalidInput: it cannot move them.
    """
    if wanted == "auto":
        return "nccl" if device == "cuda" else "gloo"
    if wanted == "nccl" and device == "cpu":
        raise InvalidInput("dist_backend", "nccl moves CUDA tensors only; take gloo on the CPU")
    if wanted == "staged" and device == "cpu":
        raise InvalidInput("dist_backend", "staged is for CUDA tensors; CPU tensors go over gloo as they are")
    if wanted == "gloo" and device == "cuda":
        raise InvalidInput("dist_backend", "gloo moves CPU tensors only; take nccl, or staged to share a GPU")
    return "nccl" if wanted == "nccl" else "gloo" if wanted == "gloo" else "staged"


def _check_gateway(config: Config) -> None:
    if not 0 <= config.port <= 65535:
        raise InvalidInput("port", f"{config.port} is not a port; take 0 (any free one) to 65535")
    if config.public_url is not None and not re.fullmatch(r"https?://[^\s/?#]+[^\s?#]*", config.public_url):
        raise InvalidInput("public_url", f"{config.public_url!r} is not of the form https://host or https://host/path")
    if config.database_url is not None and not config.database_url.startswith(POSTGRES):
        raise InvalidInput("database_url", "is not of the form postgresql://user:password@host/database")
    if config.job_lease < 1:
        raise InvalidInput("job_lease", f"{config.job_lease:g} s are too few; take 1 or more")


def fit_layout(config: Config, card: Heads, branches: int) -> Config:
    """The configuration with the layout that suits the model, now that it is known.

    Args:
        config: any degrees may be unset.
        card: of the model.
        branches: most guidance branches that a step of the model evaluates.

    Raises:
        InvalidInput: a rank would be left without a head, or never get a branch; states the equation.
    """
    if config.cfg_degree > branches:
        reason = f"cfg({config.cfg_degree}) > {branches} guidance branches of this model; leave the ranks to SP"
        raise InvalidInput(config.cfg_setting, reason)
    if config.use_fsdp_inference and branches % config.cfg_degree:
        reason = f"{branches} guidance branches on cfg({config.cfg_degree}) groups are unequal numbers of forwards, "
        raise InvalidInput("use_fsdp_inference", f"{reason}and every forward gathers weights from all ranks")
    layout = config.layout_on(card.heads)
    if layout.ulysses > card.heads:
        reason = f"ulysses({layout.ulysses}) > {card.heads} attention heads; give the rest to ring_degree"
        raise InvalidInput("ulysses_degree", reason)
    if layout == config.layout:
        return config
    return replace(config, ulysses_degree=layout.ulysses, ring_degree=layout.ring)


def describe_mesh(config: Config, card: Heads) -> tuple[str, ...]:
    """The layout with what each rank has of a forward, then how weights, encodes and decodes are shared."""
    ranks, tp = config.num_gpus, config.tp_size or 1
    weights = f"1/{ranks} of denoiser and text encoders" if config.use_fsdp_inference else "all of them"
    encodes = f"heads and hidden units split over {tp} ranks" if tp > 1 else "every rank alone"
    decodes = "a strip of rows of every frame on each rank" if config.vae_sp else "one rank each"
    shared = f"  weights on a rank: {weights}; text encoders: {encodes}; decodes: {decodes}"
    return (*describe_layout(config.layout, card), shared)


def save_frozen(config: Config, path: Path) -> None:
    """Write the resolved configuration for the children of a launcher; nobody else reads it, it may hold a password."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(config)))


def load_frozen(path: Path) -> Config:
    """Read what `save_frozen` wrote.

    Raises:
        InvalidInput: the file does not hold a configuration.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Config)
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidInput("config", f"{path}: {error}") from error
