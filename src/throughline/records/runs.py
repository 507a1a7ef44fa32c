"""What a run notes of itself and what is planned for it."""

from collections.abc import Sequence

from throughline.records.base import Record


class StepRecord(Record):
    """One finished step of a run: what it was made from (`key`), when, and the checksums of its files.

    `seconds` of steps that were done at once, such as the layers of a block in training, are divided equally among them.
    """

    step: str
    key: str
    started: str
    seconds: float
    files: dict[str, str]


class JobState(Record):
    """Where a job of training is, or why it failed: consecutive layers of one model, on one device. Lists are by layer."""

    model: str
    layers: list[int]
    host: str
    pid: int
    device: str
    at: float  # when this was noted; seconds since 1970
    attempt: int = 1
    failed: str | None = None
    step: int = 0
    num_steps: int = 0
    tokens_per_second: float = 0.0
    eta_seconds: float | None = None
    loss: list[float] = []
    l0: list[float] = []
    fvu: list[float] = []
    dead: list[float] = []
    events: list[str] = []  # setbacks of its layers so far, in words


class RunInfo(Record):
    """Versions and hardware of a run, and what is known of its models."""

    name: str
    versions: dict[str, str]
    hardware: dict[str, str | int | float]
    commit: str | None
    created: str
    forced: bool = False
    random_weights: list[str] = []  # models of the run that were never trained
    depths: dict[str, int] = {}  # number of layers of each model
    seconds: dict[str, float] = {}  # spent in each stage so far, summed over models and over runs that went on


class PlannedDevice(Record):
    """One device that work is planned for, with the rates that times are computed from."""

    name: str
    kind: str  # devices of one kind have the same memory and rates
    memory_bytes: int
    flops_per_second: float  # matrix products in the dtype that dictionaries are trained in
    float32_flops_per_second: float
    bytes_per_second: float  # memory
    start_seconds: float  # until a job's model begins to be read
    measured: bool  # False: the rates are assumed
    on_cpu: bool
    bfloat16: bool  # multiplies it faster than float32
    threads: int = 1  # that train on a CPU


class PlannedJob(Record):
    """Consecutive pending layers of one model on one device. `bytes` are parts of its peak memory, which is `total_bytes`."""

    model: str
    first: int
    last: int
    layers: list[int]  # first to last, but for those that are done
    device: str
    bytes: dict[str, int]  # base, model, forward, parameters, optimizer, activations, buffers
    total_bytes: int
    disk_bytes: dict[str, int]  # dictionaries; while it runs, checkpoint and activations
    flops: float
    start_second: float
    seconds: float
    cached: bool  # activations are kept on disk and read again, instead of computed in each epoch


class PlannedModel(Record):
    """What is planned of one model, and why its activations are kept or not."""

    model: str
    num_layers: int
    pending: list[int]
    done: list[int]  # from the same settings, so skipped
    invalidated: list[int]  # there, but from other settings, so trained again
    tokens: int  # of an epoch
    activations: str


class Plan(Record):
    """What a study takes, job by job in the order in which they start. Seconds and bytes are predictions."""

    study: str
    devices: list[PlannedDevice]
    models: list[PlannedModel]
    jobs: list[PlannedJob]
    makespan_seconds: float
    lower_bound_seconds: float  # no split and no placement ends sooner
    work_seconds: float  # of all models unsplit, on the fastest device
    flops: float
    disk_bytes: dict[str, int]  # dictionaries, which stay; checkpoints and activations, the most at any time
    assumptions: list[str]


def describe_bytes(size: float) -> str:
    """`1.5 GiB`, or `12 MiB` where it is less than a tenth of a GiB."""
    if size < 0.1 * 2**30:
        return f"{size / 2**20:.0f} MiB" if size >= 2**20 or not size else "1 MiB"
    return f"{size / 2**30:.1f} GiB"


def span(layers: Sequence[int]) -> str:
    """`0-5`, `0-2, 5` or `3`: layers in ascending order, consecutive ones together."""
    known = sorted(set(layers))
    starts = [layer for layer in known if layer - 1 not in known]
    ends = [layer for layer in known if layer + 1 not in known]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
