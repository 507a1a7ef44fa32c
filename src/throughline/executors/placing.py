"""Which blocks of layers a cluster's devices are given, and in which order. Knows nothing of Ray.

A slot is a place for one process: so many cores and GPUs of one node. Each job has one, or with `executor.devices` a team of them.
"""

from collections.abc import Mapping, Sequence
from math import log2
from typing import NamedTuple

from throughline.errors import InputError
from throughline.jobs import Job, divide_begun
from throughline.planning.studies import Layers, count_models, place_models
from throughline.records import PlannedDevice
from throughline.session import Session
from throughline.study import ExecutorSpec


class Node(NamedTuple):
    """A machine of a cluster, as far as jobs are concerned."""

    id: str
    cpus: float
    gpus: float
    memory_bytes: int  # of the machine, that jobs may have
    card: str | None = None  # what its GPUs are called

    @property
    def kind(self) -> str:
        """Nodes of one kind are taken to be equally fast; their memory is told apart by factors of two."""
        what = f"{self.gpus:g} {self.card or 'GPUs'}, " if self.gpus else ""
        return f"{what}{self.cpus:g} cpus, about {2 ** round(log2(max(self.memory_bytes / 2**30, 1)))} GiB"


class Wanted(NamedTuple):
    """What each process asks for."""

    cpus: float
    gpus: float

    def slots(self, node: Node) -> int:
        """How many such processes the node has room for."""
        by_cpus = int(node.cpus / self.cpus)
        return min(by_cpus, int(node.gpus / self.gpus)) if self.gpus else by_cpus


class PlacedJob(NamedTuple):
    """A job and what is known of the device that it is meant for."""

    job: Job
    memory_bytes: int | None = None  # that it needs of its node; None: not known, or a GPU's
    card: str | None = None  # None: any will do


def wanted_of(executor: ExecutorSpec, nodes: Sequence[Node]) -> Wanted:
    """What the study's jobs ask for; InputError if no node has it."""
    gpus = executor.gpus if executor.gpus is not None else float(any(node.gpus for node in nodes))
    wanted = Wanted(float(executor.cpus or 1), gpus)
    if not any(map(wanted.slots, nodes)):
        largest = max(nodes, key=lambda node: (node.gpus, node.cpus))
        raise InputError(
            f"a job asks for {wanted.cpus:g} cpus and {wanted.gpus:g} gpus, but no node has them; the largest of {len(nodes)} has "
            f"{largest.cpus:g} and {largest.gpus:g}; set executor.cpus or executor.gpus lower"
        )
    return wanted


def size_of_teams(executor: ExecutorSpec, wanted: Wanted, nodes: Sequence[Node], num_layers: int) -> int:
    """How many slots train one block together. InputError if there are not so many.

    Layers are independent of each other, so dividing them comes first; GPUs that are left over share a block.
    """
    slots = sum(map(wanted.slots, nodes))
    if executor.devices and executor.devices > slots:
        raise InputError(f"executor.devices is {executor.devices}, but there are {slots}")
    left_over = slots // max(1, num_layers) if wanted.gpus >= 1 else 1
    return executor.devices or max(1, left_over)


def teams(
    nodes: Sequence[Node], wanted: Wanted, size: int, measured: Mapping[str, PlannedDevice]
) -> list[PlannedDevice]:
    """The cluster as devices to plan for: teams of slots of one kind of node, as fast as what was `measured` on one of them."""
    devices = []
    for kind in dict.fromkeys(node.kind for node in nodes):
        alike = [node for node in nodes if node.kind == kind]
        slots = wanted.slots(alike[0])
        if not slots:
            continue
        rates = measured[kind]
        memory = rates.memory_bytes if wanted.gpus else int(min(node.memory_bytes for node in alike) / slots)
        for number in range(max(1, slots * len(alike) // size)):
            name = f"{kind} #{number}"
            devices.append(rates.model_copy(update={"name": name, "kind": kind, "memory_bytes": memory}))
    return devices


def place_jobs(
    session: Session, jobs: Sequence[Job], devices: list[PlannedDevice], cards: Mapping[str, str | None]
) -> list[PlacedJob]:
    """The pending layers in blocks, in the order in which they are to start: those that were begun as they are, the rest as
    planned. `cards`: the card of each kind of device. InputError if a layer fits on none of them.
    """
    begun, left = [], {}
    for job in jobs:
        blocks, left[job.model] = divide_begun(session, job.model, job.layers)
        begun += [Job(job.model, block) for block in blocks]
    study = session.study
    study = study.model_copy(update={"models": [spec for spec in study.models if left.get(spec.name)]})
    if not study.models:
        return [PlacedJob(job) for job in begun]
    counted = [model._replace(layers=Layers(left[model.shape.name], [], [])) for model in count_models(study, {})]
    of = {device.name: device for device in devices}
    some_cards = len(set(cards.values())) > 1
    placed = []
    for planned in place_models(study, counted, devices).jobs:
        device = of[planned.device]
        memory_bytes = planned.total_bytes if device.on_cpu else None
        placed.append(
            PlacedJob(Job(planned.model, planned.layers), memory_bytes, cards[device.kind] if some_cards else None)
        )
    return [PlacedJob(job) for job in begun] + placed
