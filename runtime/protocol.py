"""Every message on every socket, one union per direction. Small Structs only; tensors never travel here.

    gateway    -> scheduler   GatewayHello Submit Cancel Stored Grant Observe
    worker     -> scheduler   WorkerHello Ready Heartbeat Done ItemFailed Checkpointed CheckpointFailed
    supervisor -> scheduler   SupervisorHello Drain
    observer   -> scheduler   Observe Cancel Drain
    scheduler  -> gateway     Welcome MeshState Progress Completed Failed Cancelled Status
    scheduler  -> worker      Welcome Encode Denoise Decode Checkpoint Release Shutdown
    scheduler  -> supervisor  Welcome MeshState Fence
    scheduler  -> observer    Welcome Status
    worker     -> gateway     FramesChunk (+ a payload of raw pixels)

Structs are arrays on the wire (positional), so a new field is appended with a default; anything else raises
`PROTOCOL_VERSION`. Values outside the ranges of `runtime.bounds` make a message malformed. The envelope (version,
epoch) and the sender's identity belong to `runtime.wire`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runtime.bounds import (
    MAX_REQUESTS,
    Credits,
    Degree,
    Frames,
    Id,
    Int63,
    ItemSeq,
    Pid,
    Pixels,
    Place,
    Priority,
    Rank,
    RankCount,
    RealPid,
    Seconds,
    SomeFrames,
    SomeSteps,
    Steps,
    Times,
    TokenId,
    Word,
)
from runtime.layout import Layout
from runtime.sampling import ResolvedParams

PROTOCOL_VERSION = 2
CANCELLED = "cancelled"
TIMED_OUT = "timed_out"

Ranks = Annotated[tuple[Rank, ...], Meta(max_length=65_536)]
Ids = Annotated[tuple[Id, ...], Meta(max_length=MAX_REQUESTS)]
TokenIds = Annotated[
    dict[Word, dict[Word, Annotated[tuple[TokenId, ...], Meta(max_length=1_000_000)]]], Meta(max_length=16)
]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of everything on a socket; the tag is the class name."""


# ---- what a model is ---------------------------------------------------------------------------------------------


class TokenizerExport(msgspec.Struct, frozen=True):
    """One text encoder's tokenizer, so that a gateway can tokenize without transformers."""

    encoder: Word
    """Component name in the pipeline, e.g. "text_encoder"."""
    json: str
    """`tokenizers.Tokenizer.to_str()`."""
    max_length: Frames
    """Tokens, special ones included, that the family's pipeline feeds this encoder."""


class ModelInfo(msgspec.Struct, frozen=True):
    """What rank 0 tells the mesh about the loaded model."""

    name: Place
    model_path: Place
    configs: dict[str, dict[str, Any]]
    """The folder's JSON configs by component; what the family's card is built from."""
    tokenizers: Annotated[tuple[TokenizerExport, ...], Meta(max_length=16)]
    dit_precision: Word
    vae_precision: Word
    device: Word
    layout: Layout


# ---- requests ----------------------------------------------------------------------------------------------------


class Request(msgspec.Struct, frozen=True):
    """One accepted generation."""

    id: Id
    params: ResolvedParams
    token_ids: TokenIds = {}
    """Per encoder and prompt ("prompt", "negative_prompt"): unpadded ids; an encoder that is missing is tokenized
    on the worker."""
    attempt: Times = 0
    """How often it was started; frames of an older attempt are dropped."""
    key: Word = ""
    """Whom the work is charged to: a name for the API key, never the key itself."""
    priority: Priority = 0
    """Higher goes first within a key."""
    timeout_s: Seconds | None = None
    """Seconds after its arrival at which it is no longer wanted."""
    trace: Place = ""
    """The `x-request-id` of the HTTP call behind it, for logs."""
    traceparent: Word = ""
    """W3C trace context of that call."""
    previews: Times = 0
    """Latent previews that are wanted while it is denoised, evenly spread."""
    images: Annotated[tuple[Place, ...], Meta(max_length=64)] = ()
    """Files of the pictures that it starts from, in the caller's order; empty unless the card takes some."""
    mask: Place = ""
    """File that is transparent where the first picture may change."""
    markup: Place = ""
    """File that is drawn over the first picture, to say what to change."""


class GatewayHello(Message, frozen=True):
    frames_endpoint: Place
    """Where this gateway instance takes frames."""
    credits: Credits
    """Chunks that may be on their way to it at once."""


class Submit(Message, frozen=True):
    requests: Annotated[tuple[Request, ...], Meta(max_length=MAX_REQUESTS)]


class Cancel(Message, frozen=True):
    request_id: Id
    reason: Place = "cancelled by the client"


class Stored(Message, frozen=True):
    """The gateway has every frame of the request on disk (or in the caller's hands)."""

    request_id: Id


class Grant(Message, frozen=True):
    """Chunks that were consumed: so many more may be sent."""

    credits: Credits


class Progress(Message, frozen=True):
    """Where a request is. `eta_s` is the predicted time to the last frame, seconds."""

    request_id: Id
    stage: str
    step: Int63
    total_steps: Int63
    eta_s: float
    queue_position: Int63 = 0


class Usage(msgspec.Struct, frozen=True):
    """What a request took of the mesh, as the scheduler that ended it saw it."""

    queue_s: Seconds = 0.0
    """Seconds in line, all attempts together."""
    rank_seconds: Seconds = 0.0
    """Measured seconds of its items times their ranks; a shared item is split evenly among its requests."""
    attempts: Times = 0
    """How often it was started."""
    peak_memory_bytes: Int63 = 0
    """Of the fullest rank while it ran; 0: not known."""


class Completed(Message, frozen=True):
    request_id: Id
    timings: dict[str, float]
    """Seconds per stage (queued, encode, denoise, decode, total) as the scheduler saw them."""
    usage: Usage = Usage()


class Failed(Message, frozen=True):
    request_id: Id
    code: Word
    reason: str
    usage: Usage = Usage()


class Cancelled(Message, frozen=True):
    request_id: Id
    reason: str
    usage: Usage = Usage()
    code: Word = CANCELLED
    """`TIMED_OUT` if nobody cancelled it but its own timeout."""


class MeshState(Message, frozen=True):
    """Whether the mesh takes work, and why not. `model` is set once it is loaded, and left out where nothing but the
    backlog is new: tokenizers are large."""

    ready: bool
    reason: str
    ranks_ready: RankCount
    num_ranks: RankCount
    model: ModelInfo | None = None
    losses: Times = 0
    """How often the worker group was lost so far."""
    draining: bool = False
    """Takes no new work and ends when what runs has ended."""
    gave_up: bool = False
    """The worker group was lost too often in a short time; `reason` is the last loss."""
    backlog_s: Seconds = 0.0
    """Predicted seconds until all that was accepted is done, if nothing else arrives."""


class Welcome(Message, frozen=True):
    """Answer to every hello: the scheduler's epoch, which the peer uses from now on."""

    epoch: Int63


# ---- ranks and items ---------------------------------------------------------------------------------------------


class WorkerHello(Message, frozen=True):
    rank: Rank
    num_ranks: Degree
    generation: Times
    """How often the worker group was restarted; ranks of different generations never share an item."""
    host: Word
    pid: Pid


class Measurement(msgspec.Struct, frozen=True):
    """What a unit of work cost when the ranks warmed up."""

    kind: Literal["encode", "denoise", "first_decode", "decode"]
    params: ResolvedParams
    batch: Degree
    seconds: Seconds


class Ready(Message, frozen=True):
    rank: Rank
    generation: Times
    model: ModelInfo | None = None
    """Only rank 0 sends it."""
    memory_budget: Int63 = 0
    """Bytes that this rank has for the states of requests; 0: not known."""
    measurements: Annotated[tuple[Measurement, ...], Meta(max_length=10_000)] = ()
    device_memory: Int63 = 0
    """Bytes in all of this rank's GPU, or of its host where it runs on the CPU; 0: not known."""


class Heartbeat(Message, frozen=True):
    """Sent by a thread of its own once a second: the process lives. `busy_seq` is the item it is in, -1 for none."""

    rank: Rank
    generation: Times
    busy_seq: ItemSeq
    host: Word = ""
    pid: Pid = 0


class SavedState(msgspec.Struct, frozen=True):
    """A checkpoint in the spool: everything that the step after `step` reads, embeddings left out."""

    step: Steps
    """Denoising steps that it holds."""
    path: Place
    bytes: Int63


class Encode(Message, frozen=True):
    """Tokens to embeddings to initial latents, or to the latents of a checkpoint."""

    seq: Int63
    ranks: Ranks
    requests: tuple[Request, ...]
    resume: dict[str, SavedState] = {}
    """By request; those that are not in it start at step 0."""


class PreviewTo(msgspec.Struct, frozen=True):
    """A preview that is due when a denoise item ends."""

    request_id: Id
    endpoint: Place
    """Where its gateway takes frames."""
    attempt: Times
    """Goes into the header."""


class Denoise(Message, frozen=True):
    """`steps` denoising steps of a batch on a layout."""

    seq: Int63
    ranks: Ranks
    layout: Layout
    request_ids: Ids
    steps: SomeSteps
    previews: Annotated[tuple[PreviewTo, ...], Meta(max_length=MAX_REQUESTS)] = ()


class Decode(Message, frozen=True):
    """The next `chunks` chunks of a request's frames, sent to `endpoint` as they are made.

    `first_chunk` 0 begins the decode anew, whatever was decoded before.
    """

    seq: Int63
    ranks: Ranks
    request_id: Id
    chunks: SomeFrames
    endpoint: Place
    first_chunk: Frames = 0
    attempt: Times = 0
    """Goes into the header of every chunk."""


class Checkpoint(Message, frozen=True):
    """Write these requests' states to the spool as they are now; a thread does it and nobody waits."""

    seq: Int63
    ranks: Ranks
    request_ids: Ids


class Release(Message, frozen=True):
    """Forget these requests, and remove their checkpoints."""

    seq: Int63
    ranks: Ranks
    request_ids: Ids
    keep_saved: bool = False
    """They start again: their checkpoints stay."""


WorkItem = Encode | Denoise | Decode | Checkpoint | Release


class Done(Message, frozen=True):
    """A rank finished an item. Times are the rank's own monotonic clock, seconds."""

    rank: Rank
    seq: Int63
    started: Seconds
    finished: Seconds
    peak_bytes: Int63 = 0
    """Most memory that the rank held during the item; on CPUs, during its process's life. 0: not known."""


class ItemFailed(Message, frozen=True):
    """A rank could not finish an item. `group_broken`: its collectives may be out of step, the rank exits."""

    rank: Rank
    seq: ItemSeq
    code: Word
    reason: str
    group_broken: bool


class Checkpointed(Message, frozen=True):
    """A request's state is durable."""

    rank: Rank
    request_id: Id
    saved: SavedState


class CheckpointFailed(Message, frozen=True):
    """A request's state could not be written; an older checkpoint of it, if there is one, still holds."""

    rank: Rank
    request_id: Id
    step: Steps
    reason: str


class Shutdown(Message, frozen=True):
    """Leave with exit code 0."""


class SupervisorHello(Message, frozen=True):
    host: Word


class Drain(Message, frozen=True):
    """Take no new work; when nothing runs any more send Shutdown to the ranks and leave.

    What still runs after `timeout_s` is written to the spool, so that the next start goes on from there.
    """

    timeout_s: Seconds | None = None
    """None waits for ever."""


class Fence(Message, frozen=True):
    """Kill this process of your host: it hangs."""

    rank: Rank
    pid: RealPid
    reason: str


class FramesChunk(Message, frozen=True):
    """Header of `count` decoded frames; the payload is uint8 RGB of shape (count, height, width, 3)."""

    request_id: Id
    attempt: Times
    first_frame: Frames
    count: SomeFrames
    total: SomeFrames
    height: Pixels
    width: Pixels
    timings: Annotated[dict[Word, Seconds], Meta(max_length=100)] = {}
    """On the last chunk: the rank's own seconds per stage."""
    kind: Literal["frames", "preview"] = "frames"
    """A preview is made of latents, uses no credit and may be lost."""
    step: Steps = 0
    """Denoising steps behind a preview."""


# ---- observers ---------------------------------------------------------------------------------------------------


class Observe(Message, frozen=True):
    """How do things stand? A hello that is repeated for every Status; nothing is remembered of who asks."""

    prefix: Id = ""
    """Only the request of this id, or else those whose ids begin so."""


class RankStatus(msgspec.Struct, frozen=True):
    """What a rank does now. `pid` 0: it has not joined."""

    rank: int
    host: str = ""
    pid: int = 0
    ready: bool = False
    silent_s: float = 0.0
    """Since the last sign of life."""
    doing: str = ""
    """In words: "idle", "denoise x3, 5 steps"."""
    request_ids: tuple[str, ...] = ()
    """Whom its item serves."""
    running_s: float = 0.0
    predicted_s: float = 0.0
    """Of the whole item; 0 while there is none."""
    held_bytes: int = 0
    budget_bytes: int = 0
    """For the states of requests; 0: not known."""
    peak_bytes: int = 0
    """Most memory that it held during its last item, weights and all; 0: not known."""


class JobStatus(msgspec.Struct, frozen=True):
    """Where a request is."""

    id: str
    key: str
    stage: str
    step: int
    total: int
    """Denoising steps, in the decode and after it chunks."""
    eta_s: float
    waited_s: float
    """In the queue."""
    age_s: float
    """Since it arrived."""
    priority: int = 0
    cancelling: bool = False
    """Ends with its item."""


class StepTime(msgspec.Struct, frozen=True):
    """The latest item of a kind: seconds per unit, measured and as predicted when it began."""

    kind: str
    batch: int
    units: int
    seconds: float
    predicted_s: float


class Buckets(msgspec.Struct, frozen=True):
    """How values are spread: one count per upper bound, and one for what is above the last."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    total: float = 0.0
    """The sum of the values."""


class Totals(msgspec.Struct, frozen=True):
    """What a mesh did since its scheduler started."""

    step_seconds: Buckets = Buckets()
    """Measured seconds of each denoising step of a batch."""
    batch_sizes: Buckets = Buckets()
    """Requests in each denoise item."""
    cost_errors: dict[str, Buckets] = {}
    """By kind of item: |predicted - measured| / measured."""
    rank_seconds: dict[str, float] = {}
    """Measured seconds times ranks by `Request.key`; of very many keys the later ones are one."""


class Status(Message, frozen=True):
    """A snapshot of one mesh."""

    epoch: int
    ready: bool
    reason: str
    layout: Layout
    policy: str
    model: str
    """Empty until a rank has loaded it."""
    losses: int
    ranks: tuple[RankStatus, ...]
    jobs: tuple[JobStatus, ...]
    """All that the ranks work on, then the first of the queue."""
    queued: dict[str, int]
    """Requests in line by key, those that `jobs` leaves out too."""
    step_times: tuple[StepTime, ...]
    cost_error: float | None
    """Median error of the latest predictions, relative."""
    stale: int
    """Messages dropped because they were for another epoch or of a rank that is gone."""
    dropped: int
    """Messages dropped because they could not be read."""
    draining: bool = False
    totals: Totals = Totals()
    prefix: str = ""
    """That of the question."""


FromGateway = GatewayHello | Submit | Cancel | Stored | Grant | Observe
FromWorker = WorkerHello | Ready | Heartbeat | Done | ItemFailed | Checkpointed | CheckpointFailed
FromSupervisor = SupervisorHello | Drain
FromObserver = Observe | Cancel | Drain
ToScheduler = FromGateway | FromWorker | FromSupervisor | FromObserver

ToGateway = Welcome | MeshState | Progress | Completed | Failed | Cancelled | Status
ToWorker = Welcome | WorkItem | Shutdown
ToSupervisor = Welcome | MeshState | Fence
ToObserver = Welcome | Status | Cancelled
FromScheduler = ToGateway | ToWorker | ToSupervisor | ToObserver
