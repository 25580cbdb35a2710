"""The wire: closed, typed messages, their limits, and the frame they travel in. Pure: bytes in, messages out.

A frame is `!IQ` (length of the header, length of the payload), the header (one message, MessagePack), and the
payload (raw bytes, with the few messages that say so). Whatever does not decode to one of these messages raises
`WireError`; a receiver then drops the connection. Never pickle, code or an import.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from millpond.pool.errors import WireError

PROTOCOL = 5
"""Rises when a message changes in a way that an older peer cannot read; both ends must have the same."""

MAX_HEADER_BYTES = 8 * 1024 * 1024
"""Longest message."""
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
"""Longest payload of one frame; larger tensors travel in several."""
MAX_GREETING_BYTES = 4096
"""Longest message of a peer that has not yet proved who it is; it may send no payload."""
MAX_ITEMS = 65_536
"""Items in a batch, handles in a list."""
MAX_DIMS = 64
"""Dimensions of a tensor (as in PyTorch)."""
MAX_TENSORS = 1_000_000
"""Live tensors of a session."""
MAX_PLANS = 65_536
"""Plans of a session; a client forgets old ones before it exceeds this."""
MAX_GRAPHS = 1024
"""Captured graphs of a session; a client that defines one under an old number replaces it."""
MAX_GRAPH_STEPS = 65_536
"""Steps of one captured graph."""
MAX_LEASE_DEVICES = 1024
"""Devices of one lease."""
MAX_HOST_DEVICES = 16
"""Devices that one host offers."""
MAX_HOST_WORKERS = 512
"""Workers that one host runs: 32 on each device."""
MAX_INLINE_BYTES = 16 * 1024
"""Largest tensor that travels inside a batch instead of as a payload."""
CLOSED_S = 3.0
"""How long an end waits for a new connection after the other one, or something between them, has closed the old:
after the death of a process all that it had must be gone within ten seconds. After silence it waits for the grace."""
MAX_TEXT = 4096
"""Longest text in a message."""

Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Name = Annotated[str, Meta(max_length=128)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Handle = Annotated[int, Meta(ge=0, le=2**62)]
Size = Annotated[int, Meta(ge=0, le=2**62)]
Seconds = Annotated[float, Meta(ge=0, le=1e7)]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=64)]
Shape = Annotated[tuple[Size, ...], Meta(max_length=MAX_DIMS)]
Ticket = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""Joins the two ends of a copy between devices; random, so that only its own client knows it."""
Digest = Annotated[bytes, Meta(max_length=32)]
"""SHA-256 of a certificate; empty: there is none."""
Handles = Annotated[list[Handle], Meta(max_length=MAX_ITEMS)]

# --- greeting: both with the broker and with a worker --------------------------------------------------------------


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """Listener → caller, at once: prove that you know the token, over this nonce."""

    protocol: Count
    nonce: Nonce


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Caller → listener: the proof, what the caller is, and a nonce for the listener to prove itself over."""

    protocol: Count
    torch: Name
    nonce: Nonce
    proof: Nonce
    name: Name = ""


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Listener → caller: its own proof, and what it is."""

    torch: Name
    proof: Nonce
    device: Name = ""
    """What it computes on, by PyTorch's name: `cpu`, `cuda:1`."""
    memory_bytes: Size = 0
    grace_s: Seconds = 0.0
    """How long a lease, and a session, outlives a break of the network."""


RefusalCode = Literal["protocol", "torch", "token", "busy", "lease", "malformed"]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Listener → caller: no, and why. The connection ends."""

    code: RefusalCode
    message: Text


# --- values in an op's arguments -----------------------------------------------------------------------------------


class Complex(msgspec.Struct, frozen=True, tag="c"):
    """A complex number."""

    real: float
    imag: float


class BigInt(msgspec.Struct, frozen=True, tag="i"):
    """An unsigned 64-bit number above 2^63 - 1, such as a seed."""

    text: Annotated[str, Meta(pattern=r"^-?[0-9]{1,20}$")]


Number = bool | int | float | Complex | BigInt


class View(msgspec.Struct, frozen=True, tag="v"):
    """How an operand looks at its storage: dtype, sizes, strides, offset in elements; lazily conjugated or negated."""

    dtype: Name
    sizes: Shape
    strides: Shape
    offset: Size
    conjugate: bool = False
    negative: bool = False


class Operand(msgspec.Struct, frozen=True, tag="t"):
    """A tensor: the `slot`-th handle of a call, as it was made, or as a view of it."""

    slot: Count
    view: View | None = None


class Slot(msgspec.Struct, frozen=True, tag="s"):
    """A number: the `slot`-th of a call. With a dtype, it is a tensor without dimensions in the host's memory."""

    slot: Count
    dtype: Name = ""


class Symbol(msgspec.Struct, frozen=True, tag="n"):
    """A dtype, layout or memory format by its name; `device` is the worker's device and has none."""

    kind: Literal["dtype", "layout", "memory_format", "device"]
    name: Name = ""


Atom = None | bool | int | float | Text | Complex | Operand | Slot | Symbol
Argument = Atom | Annotated[list[Atom], Meta(max_length=MAX_ITEMS)]


class Geometry(msgspec.Struct, frozen=True, tag="g"):
    """What the client believes a result to be; a result in another memory layout is laid out so, else refused."""

    dtype: Name
    sizes: Shape
    strides: Shape


# --- client ↔ worker: a session outlives its connections -----------------------------------------------------------


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """Client → worker, first on every connection: begin a session, or go on with one whose connection broke.

    `session` is the client's to choose, unguessable; `received` is how many of the worker's messages it has. So do
    workers attach to one another to deliver; `device` then is the caller's own number in the lease.
    """

    session: Nonce
    resumes: bool = False
    received: Count = 0
    device: Annotated[int, Meta(ge=0, lt=MAX_LEASE_DEVICES)] = 0


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """Worker → client that resumes: how many of its messages have come in; it sends the others again."""

    received: Count


class Received(msgspec.Struct, frozen=True, tag="received"):
    """Either way: so many messages of the session have come in. This one and the two above are not counted."""

    messages: Count


class EndSession(msgspec.Struct, frozen=True, tag="end-session"):
    """Client → worker: the session is over; what it had is freed."""


# --- client → worker: items of a batch, in order -------------------------------------------------------------------


class Numerics(msgspec.Struct, frozen=True, array_like=True):
    """What the program has set for its whole process and the op computes by; the defaults are PyTorch's.

    Default dtype; precision of float32 products and of cuDNN's convolutions and recurrent layers; whether cuBLAS may
    reduce float16 and bfloat16 in that precision (and split sums), or accumulate in float16; deterministic algorithms
    (whether they only warn, and fill new memory); cuDNN itself, its search for the fastest algorithm, its determinism.
    """

    default_dtype: Literal["float32", "float64", "float16", "bfloat16"] = "float32"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    conv_tf32: bool = True
    rnn_tf32: bool = True
    fp16_reduction: tuple[bool, bool] = (True, True)
    bf16_reduction: tuple[bool, bool] = (True, True)
    fp16_accumulation: bool = False
    deterministic: bool = False
    deterministic_warns: bool = False
    deterministic_fill: bool = True
    cudnn: bool = True
    cudnn_benchmark: bool = False
    cudnn_deterministic: bool = False


class Define(msgspec.Struct, frozen=True, tag="define", array_like=True):
    """Define a plan: an op with everything that does not change from call to call.

    `results` is what comes out, flat: a geometry, None for an undefined tensor; `alias` ones are not listed.
    """

    plan: Annotated[int, Meta(ge=0, lt=MAX_PLANS)]
    op: Name
    arguments: Annotated[list[Argument], Meta(max_length=256)]
    keywords: Annotated[dict[Name, Argument], Meta(max_length=256)]
    results: Annotated[list[Geometry | None], Meta(max_length=MAX_ITEMS)]
    numerics: Numerics = Numerics()


class Call(msgspec.Struct, frozen=True, tag="call", array_like=True, gc=False):
    """Run a plan; its new results get the handles `first`, `first + 1`, …"""

    plan: Annotated[int, Meta(ge=0, lt=MAX_PLANS)]
    operands: Handles
    first: Handle
    numbers: Annotated[list[Number], Meta(max_length=MAX_ITEMS)] = []


class Step(msgspec.Struct, frozen=True, tag="step", array_like=True, gc=False):
    """A call within a graph. Operands are places: the graph's inputs from 0, then every step's results, in order.

    So an operand can only be an input or what an earlier step made. `results` is given where the plan has none.
    """

    plan: Annotated[int, Meta(ge=0, lt=MAX_PLANS)]
    operands: Annotated[list[Count], Meta(max_length=MAX_ITEMS)]
    numbers: Annotated[list[Number], Meta(max_length=MAX_ITEMS)] = []
    results: Annotated[list[Geometry | None], Meta(max_length=MAX_ITEMS)] | None = None


class DefineGraph(msgspec.Struct, frozen=True, tag="define-graph", array_like=True):
    """Define a captured graph: what its inputs are as they were made, its steps, and the places that are kept."""

    graph: Annotated[int, Meta(ge=0, lt=MAX_GRAPHS)]
    inputs: Annotated[list[Geometry], Meta(max_length=MAX_ITEMS)]
    steps: Annotated[list[Step], Meta(max_length=MAX_GRAPH_STEPS)]
    outputs: Annotated[list[Count], Meta(max_length=MAX_ITEMS)]


class Run(msgspec.Struct, frozen=True, tag="run", array_like=True):
    """Run a graph; what it keeps gets the handles `first`, `first + 1`, …"""

    graph: Annotated[int, Meta(ge=0, lt=MAX_GRAPHS)]
    operands: Handles
    first: Handle


class Put(msgspec.Struct, frozen=True, tag="put", array_like=True):
    """Make a tensor from few bytes, contiguous."""

    handle: Handle
    dtype: Name
    sizes: Shape
    data: Annotated[bytes, Meta(max_length=MAX_INLINE_BYTES)]


class Write(msgspec.Struct, frozen=True, tag="write", array_like=True):
    """Write the frame's payload into a tensor's storage at `offset` bytes. At most one per frame, as its last item."""

    handle: Handle
    offset: Size


class Free(msgspec.Struct, frozen=True, tag="free", array_like=True):
    """Drop tensors."""

    handles: Handles


class Seed(msgspec.Struct, frozen=True, tag="seed", array_like=True):
    """Seed the worker's default generator."""

    seed: BigInt


class SetRandomState(msgspec.Struct, frozen=True, tag="set-random-state", array_like=True):
    """Set the state of the worker's default generator."""

    state: Annotated[bytes, Meta(max_length=MAX_INLINE_BYTES)]


class Ask(msgspec.Struct, frozen=True, tag="ask", array_like=True):
    """Run a plan whose results only the worker can know; answered by `Results`."""

    plan: Annotated[int, Meta(ge=0, lt=MAX_PLANS)]
    operands: Handles
    first: Handle
    numbers: Annotated[list[Number], Meta(max_length=MAX_ITEMS)] = []


class Read(msgspec.Struct, frozen=True, tag="read", array_like=True):
    """Send `length` bytes of a tensor's storage, from `offset`; answered by `Data`."""

    handle: Handle
    offset: Size
    length: Annotated[int, Meta(ge=0, le=MAX_PAYLOAD_BYTES)]


class GetRandomState(msgspec.Struct, frozen=True, tag="get-random-state", array_like=True):
    """Send the state of the worker's default generator; answered by `Data`."""


class GetUsage(msgspec.Struct, frozen=True, tag="get-usage", array_like=True):
    """Say how much memory this session and lease use, and what the device is; answered by `Usage`."""

    reset_peak: bool = False
    """Whether the peak is counted anew from here."""


class Synchronize(msgspec.Struct, frozen=True, tag="synchronize", array_like=True):
    """Answer `Done` when everything before has run."""


class Send(msgspec.Struct, frozen=True, tag="send", array_like=True):
    """Send a tensor's storage to the worker of the lease's `peer`-th device, under a ticket."""

    handle: Handle
    peer: Count
    ticket: Ticket


class Receive(msgspec.Struct, frozen=True, tag="receive", array_like=True):
    """Make a tensor of what the lease's `peer`-th worker sends under a ticket; wait for it."""

    handle: Handle
    peer: Count
    ticket: Ticket
    geometry: Geometry


Item = (
    Define
    | Call
    | DefineGraph
    | Run
    | Put
    | Write
    | Free
    | Seed
    | SetRandomState
    | Ask
    | Read
    | GetRandomState
    | GetUsage
    | Synchronize
    | Send
    | Receive
)


class Batch(msgspec.Struct, frozen=True, tag="batch"):
    """Client → worker: do these in order. Items are counted from 0 over the whole session, by both ends."""

    items: Annotated[list[Item], Meta(max_length=MAX_ITEMS)]


# --- worker → client -----------------------------------------------------------------------------------------------


class Data(msgspec.Struct, frozen=True, tag="data"):
    """The bytes asked for are this frame's payload."""


class Results(msgspec.Struct, frozen=True, tag="results"):
    """What came of an `Ask`, flat: a tensor's geometry, or a plain value."""

    results: Annotated[list[Geometry | bool | int | float | Complex | None], Meta(max_length=MAX_ITEMS)]


class Usage(msgspec.Struct, frozen=True, tag="usage"):
    """Memory of the lease: in use, most so far, and all there is. Of a GPU also what CUDA says it is."""

    used_bytes: Size
    peak_bytes: Size
    limit_bytes: Size
    capability: tuple[Count, Count] = (0, 0)
    processors: Count = 0


class Done(msgspec.Struct, frozen=True, tag="done"):
    """Everything before has run."""


ErrorKind = Literal["memory", "refused", "index", "value", "type", "not-implemented", "runtime", "geometry"]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Item number `item` failed; every later item that needs its results fails with it, silently.

    `answer` is true where this is sent in place of the answer that the client waits for.
    """

    item: Count
    kind: ErrorKind
    message: Annotated[str, Meta(max_length=16_384)]
    answer: bool = False


# --- worker → worker of the same lease -----------------------------------------------------------------------------


class Deliver(msgspec.Struct, frozen=True, tag="deliver"):
    """A part, from `offset`, of the `total` bytes under a ticket: this frame's payload. The parts come in order."""

    ticket: Ticket
    total: Size
    offset: Size


class Withhold(msgspec.Struct, frozen=True, tag="withhold"):
    """What was to come under a ticket does not, and why."""

    ticket: Ticket
    kind: ErrorKind
    message: Text


# --- client ↔ worker of a job, in a session as above ---------------------------------------------------------------

JobInput = Literal[
    "job.json",
    "weights.safetensors",
    "checkpoint.safetensors",
    "train-ids.npy",
    "train-starts.npy",
    "train-labels.npy",
    "validation-ids.npy",
    "validation-starts.npy",
    "validation-labels.npy",
]
"""The files that a job may be given. There are no others, so nobody names a path."""
JobOutput = Literal["trained.safetensors", "checkpoint.safetensors"]
"""The files that come of a job."""


class WriteFile(msgspec.Struct, frozen=True, tag="write-file"):
    """Client → worker, before the job starts: the next part of a file, from `offset`, is this frame's payload."""

    file: JobInput
    offset: Size


class StartJob(msgspec.Struct, frozen=True, tag="start-job"):
    """Client → worker: all files are there. Answered by the job's lines, and its end."""


class StopJob(msgspec.Struct, frozen=True, tag="stop-job"):
    """Client → worker: the job is to stop as soon as it can, and keep what it has; as Ctrl-C says it."""


class ReadFile(msgspec.Struct, frozen=True, tag="read-file"):
    """Client → worker: send at most `length` bytes of a file, from `offset`; answered by `FilePart`."""

    file: JobOutput
    offset: Size
    length: Annotated[int, Meta(ge=1, le=MAX_PAYLOAD_BYTES)]


class DropFile(msgspec.Struct, frozen=True, tag="drop-file"):
    """Client → worker: a file has been taken; the job may write the next one."""

    file: JobOutput


class FilePart(msgspec.Struct, frozen=True, tag="file-part"):
    """Worker → client: the bytes asked for are this frame's payload; the file has `total`."""

    total: Size


class JobLine(msgspec.Struct, frozen=True, tag="job-line"):
    """Worker → client: the job has said what is this frame's payload, a line of JSON."""


class JobEnded(msgspec.Struct, frozen=True, tag="job-ended"):
    """Worker → client: the job says nothing more; what Ray says of it, and the last of what it printed."""

    why: Text


# --- client ↔ broker -----------------------------------------------------------------------------------------------


class Acquire(msgspec.Struct, frozen=True, tag="acquire"):
    """Client → broker: a lease on `devices` devices, each whole or (`memory_bytes` > 0) a part by memory."""

    owner: Name
    devices: Annotated[int, Meta(ge=1, le=MAX_LEASE_DEVICES)] = 1
    memory_bytes: Size = 0
    wait_s: Seconds = 0.0
    job: bool = False
    """Whether it is for a job: its worker has no tensors, but runs Paddle's training on the device."""


class Waiting(msgspec.Struct, frozen=True, tag="waiting"):
    """Broker → client: the lease is pending, and why."""

    lease: Name
    reason: Text


class WorkerAddress(msgspec.Struct, frozen=True):
    """Where a lease's worker listens, and the token of its sessions."""

    host: Name
    port: Annotated[int, Meta(ge=1, le=65_535)]
    token: Name
    pid: Count
    device: Name
    memory_bytes: Size


class Granted(msgspec.Struct, frozen=True, tag="granted"):
    """Broker → client: the lease is yours; one worker for each device."""

    lease: Name
    workers: Annotated[list[WorkerAddress], Meta(max_length=MAX_LEASE_DEVICES)]


class Reattach(msgspec.Struct, frozen=True, tag="reattach"):
    """Client → broker, on a new connection: this lease is mine, by its workers' token. Answered by `Heartbeat`."""

    lease: Name
    token: Name


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Client → broker: I am here. The broker sends it back."""


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Client → broker: the lease is no longer needed."""


class LeaseEnded(msgspec.Struct, frozen=True, tag="lease-ended"):
    """Broker → client: the lease is over, how, and why."""

    lease: Name
    state: Literal["released", "expired", "preempted", "failed"]
    reason: Text


class GetStatus(msgspec.Struct, frozen=True, tag="get-status"):
    """Client → broker: what is there, and who has it? Answered by `Status`."""


class DeviceStatus(msgspec.Struct, frozen=True):
    """A device of the pool."""

    index: Count
    name: Name
    memory_bytes: Size
    free_bytes: Size
    host: Name = ""
    jobs: bool = False
    """Whether its host runs jobs."""


class LeaseStatus(msgspec.Struct, frozen=True):
    """A lease, live or past."""

    lease: Name
    owner: Name
    state: Name
    reason: Text
    devices: Annotated[list[Count], Meta(max_length=MAX_LEASE_DEVICES)]
    memory_bytes: Size
    used_bytes: Size
    created: Text
    changed: Text


class Status(msgspec.Struct, frozen=True, tag="status"):
    """Broker → client: the pool at this moment; leases newest first."""

    version: Name
    torch: Name
    devices: Annotated[list[DeviceStatus], Meta(max_length=4096)]
    leases: Annotated[list[LeaseStatus], Meta(max_length=4096)]


# --- host ↔ broker -------------------------------------------------------------------------------------------------


class HostDevice(msgspec.Struct, frozen=True):
    """A device that a host offers; `torch_name` is what its worker calls it (`cuda:0`)."""

    name: Name
    torch_name: Name
    memory_bytes: Size


class Join(msgspec.Struct, frozen=True, tag="join"):
    """Host → broker: here are devices to lend. From here on the connection is a host's.

    `session` is the host's to choose, unguessable. One whose connection broke comes back by it: `resumes`.
    """

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    devices: Annotated[list[HostDevice], Meta(min_length=1, max_length=MAX_HOST_DEVICES)]
    session: Nonce
    resumes: bool = False
    jobs: bool = False
    """Whether it runs jobs: it has a Ray."""


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    """Broker → host: its devices are in the pool; whether its part goes on, and its workers with it."""

    resumed: bool = False


class Running(msgspec.Struct, frozen=True, tag="running"):
    """Host → broker, once it has come back: these workers run. What else the broker said meanwhile, it says again."""

    workers: Annotated[list[Count], Meta(max_length=MAX_HOST_WORKERS)]


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """Host → broker: it lends its devices no more."""


class StartWorker(msgspec.Struct, frozen=True, tag="start-worker"):
    """Broker → host: start a worker on a device; `worker` is what both call it. Answered by reports, and its end."""

    worker: Count
    lease: Name
    device: Name
    memory_bytes: Size
    token: Name
    peer_token: Name
    grace_s: Seconds
    asks_certificate: bool = False
    job: bool = False
    """Whether it is the worker of a job."""


class EndWorker(msgspec.Struct, frozen=True, tag="end-worker"):
    """Broker → host: end a worker."""

    worker: Count


class PeerAddress(msgspec.Struct, frozen=True):
    """Where a worker takes in what the others of its lease send, and the SHA-256 of the certificate that it shows."""

    host: Name
    port: Annotated[int, Meta(ge=1, le=65_535)]
    certificate: Digest = b""


class Introduce(msgspec.Struct, frozen=True, tag="introduce"):
    """Broker → host: tell a worker who the workers of its lease are, and which of them it is itself."""

    worker: Count
    own: Count
    peers: Annotated[list[PeerAddress], Meta(max_length=MAX_LEASE_DEVICES)]


class WorkerReport(msgspec.Struct, frozen=True, tag="worker-report"):
    """Host → broker: how a worker is; the first says that it listens, and where."""

    worker: Count
    pid: Count
    port: Annotated[int, Meta(ge=1, le=65_535)]
    peer_port: Annotated[int, Meta(ge=0, le=65_535)]
    used_bytes: Size
    idle_s: Annotated[float, Meta(ge=0)]
    certificate: Digest = b""


class WorkerEnded(msgspec.Struct, frozen=True, tag="worker-ended"):
    """Host → broker: a worker has ended, and why."""

    worker: Count
    why: Text


Greeting = Challenge | Hello | Welcome | Refused
ToWorker = Attach | Batch | Received | EndSession
FromWorker = Attached | Data | Results | Usage | Done | Failed | Received | Refused
ToBroker = Acquire | Reattach | Heartbeat | Release | GetStatus | Join
ToJob = Attach | Received | EndSession | WriteFile | StartJob | StopJob | ReadFile | DropFile
FromJob = Attached | Received | Refused | FilePart | JobLine | JobEnded
ToPeer = Attach | Deliver | Withhold
FromPeer = Attached | Received | Refused
FromBroker = Waiting | Granted | Heartbeat | LeaseEnded | Status | Refused
ToHost = Joined | Heartbeat | StartWorker | EndWorker | Introduce | Refused
FromHost = Heartbeat | Running | WorkerReport | WorkerEnded | Leave

PREFIX = struct.Struct("!IQ")
"""Lengths of header and payload."""

_encoder = msgspec.msgpack.Encoder()
_decoders = {
    "greeting": msgspec.msgpack.Decoder(Greeting),
    "to-worker": msgspec.msgpack.Decoder(ToWorker),
    "from-worker": msgspec.msgpack.Decoder(FromWorker),
    "to-job": msgspec.msgpack.Decoder(ToJob),
    "from-job": msgspec.msgpack.Decoder(FromJob),
    "to-peer": msgspec.msgpack.Decoder(ToPeer),
    "from-peer": msgspec.msgpack.Decoder(FromPeer),
    "to-broker": msgspec.msgpack.Decoder(ToBroker),
    "from-broker": msgspec.msgpack.Decoder(FromBroker),
    "to-host": msgspec.msgpack.Decoder(ToHost),
    "from-host": msgspec.msgpack.Decoder(FromHost),
}
Direction = Literal[
    "greeting",
    "to-worker",
    "from-worker",
    "to-job",
    "from-job",
    "to-peer",
    "from-peer",
    "to-broker",
    "from-broker",
    "to-host",
    "from-host",
]
Message = (
    Greeting | ToWorker | FromWorker | ToJob | FromJob | ToPeer | FromPeer | ToBroker | FromBroker | ToHost | FromHost
)


def encode(message: Message, payload_bytes: int = 0) -> bytes:
    """Return a frame up to its payload, which the caller sends right after."""
    header = _encoder.encode(message)
    return PREFIX.pack(len(header), payload_bytes) + header


def measure(prefix: bytes, *, greeted: bool = True) -> tuple[int, int]:
    """Return the lengths of header and payload that a frame's first 12 bytes announce.

    Raises:
        WireError: a length is over its limit.
    """
    header_bytes, payload_bytes = PREFIX.unpack(prefix)
    most = MAX_HEADER_BYTES if greeted else MAX_GREETING_BYTES
    if not 0 < header_bytes <= most:
        raise WireError(f"a frame announces a message of {header_bytes} bytes; 1 to {most} are allowed here")
    if payload_bytes > (MAX_PAYLOAD_BYTES if greeted else 0):
        raise WireError(f"a frame announces a payload of {payload_bytes} bytes, more than is allowed here")
    return header_bytes, payload_bytes


def decode(header: bytes | bytearray | memoryview, direction: Direction) -> Message:
    """Return the message in a frame's header.

    Raises:
        WireError: it is not a message that may travel in this direction.
    """
    try:
        message: Message = _decoders[direction].decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"a frame that is not a {direction} message: {error}") from None
    return message
