"""A study's plan: what is left to train, what it costs on every kind of device, and where each block of layers goes.

1. count each model on the meta device; leave out the layers that are done from the same settings
2. costs of each model on each kind of device
3. refuse what fits nowhere, and say what would
4. place, and describe every job
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from throughline.jobs import count_tokens
from throughline.model_files import check_layers
from throughline.models import check_model, read_tokenizer
from throughline.pipeline.keys import steps_of
from throughline.planning.blocks import Block, Device, find_misfit, work_of
from throughline.planning.costs import (
    ACTIVE_SHARE,
    FORWARD_SHARE,
    WEIGHTS_BYTES_PER_SECOND,
    ModelCosts,
    Setting,
    count_costs,
)
from throughline.planning.devices import describe_assumptions
from throughline.planning.misfits import refuse
from throughline.planning.placing import Placement, place
from throughline.planning.shapes import ModelShape, measure_shape
from throughline.records import Plan, PlannedDevice, PlannedJob, PlannedModel, StepRecord, describe_bytes
from throughline.study import ModelSpec, Study, parse_study
from throughline.text import read_documents

Manifest = Mapping[str, StepRecord]
AllCosts = dict[str, dict[str, ModelCosts]]  # by model, then by kind of device


def plan_study(study: Study, devices: list[PlannedDevice], manifest: Manifest | None = None) -> Plan:
    """The plan of what `manifest` (the finished steps of a run) has not. InputError as `count_models` and `place_models`."""
    return place_models(study, count_models(study, manifest or {}), devices)


class Layers(NamedTuple):
    """The wanted layers of a model: left to train, done from the same key, and those of the former that are there from another."""

    pending: list[int]
    done: list[int]
    invalidated: list[int]


class CountedModel(NamedTuple):
    """One model of a study: its shape, the tokens of an epoch, and which of its layers are left."""

    shape: ModelShape
    tokens: int
    layers: Layers


def count_models(
    study: Study, manifest: Manifest, imported: Callable[[str], Mapping[int, str]] = lambda model: {}
) -> list[CountedModel]:
    """The study's models, and what of them a run with these finished steps has left. `imported` gives a model's imported layers
    and their keys. InputError if a model or the text cannot be read.
    """
    # as a run reads it back, 8 as 8.0: keys are made of what is written there
    study = parse_study(study.model_dump(mode="json"))
    next(read_documents(study.data, "train", study.training.seed))
    counted = []
    for spec in study.models:
        check_model(spec)
        shape = measure_shape(spec)
        tokens = count_tokens(study, read_tokenizer(spec, study.data.bos), min(study.data.context, shape.context))
        layers = divide_layers(study, spec, shape.num_layers, manifest, imported(spec.name))
        counted.append(CountedModel(shape, tokens, layers))
    return counted


def place_models(study: Study, counted: list[CountedModel], devices: list[PlannedDevice]) -> Plan:
    """The plan of what is left of these models. InputError if something fits on none of the devices."""
    kinds = {device.kind: device for device in devices}
    settings = {
        m.shape.name: {
            kind: Setting(study, study.model(m.shape.name), m.shape, device, m.tokens) for kind, device in kinds.items()
        }
        for m in counted
    }
    pending = {model.shape.name: model.layers.pending for model in counted}
    refuse(settings, pending, devices)
    costs = {
        name: {kind: count_costs(setting, pending[name]) for kind, setting in on.items()}
        for name, on in settings.items()
    }
    placeable = {name: {kind: found.costs for kind, found in on.items()} for name, on in costs.items()}
    places = [Device(device.kind, device.memory_bytes) for device in devices]
    assert find_misfit(placeable, places) is None
    placement = place(placeable, places)
    jobs = [describe_job(costs, block, devices[block.device]) for block in placement.blocks]
    return Plan(
        study=study.name,
        devices=devices,
        models=[_describe_model(study, model, jobs) for model in counted],
        jobs=jobs,
        makespan_seconds=placement.makespan,
        lower_bound_seconds=placement.lower_bound,
        work_seconds=min(work_of(placeable, kind) for kind in kinds),
        flops=sum(job.flops for job in jobs),
        disk_bytes=_disk_of(jobs),
        assumptions=_assumptions(study, devices, placement),
    )


def divide_layers(
    study: Study, spec: ModelSpec, num_layers: int, manifest: Manifest, imported: Mapping[int, str]
) -> Layers:
    """What a run with these finished steps and imported layers leaves to do."""
    check_layers(spec.name, spec.layers, num_layers)
    wanted = list(range(num_layers)) if spec.layers == "all" else sorted(set(spec.layers))
    steps = steps_of(study, spec, wanted, imported)
    done = [layer for layer, (step, key) in steps.items() if step in manifest and manifest[step].key == key]
    pending = [layer for layer in wanted if layer not in done]
    return Layers(pending, done, [layer for layer in pending if steps[layer][0] in manifest])


def describe_job(costs: AllCosts, block: Block, device: PlannedDevice) -> PlannedJob:
    """What a block takes, part by part."""
    model = costs[block.model][device.kind]
    some, last = slice(block.first, block.stop), block.stop - 1
    layers = list(model.costs.layers[some])
    cached = model.costs.is_cached(block.first, block.stop)
    epochs = 1 if cached else model.costs.epochs
    parts = model.parts[some]
    held = dict(model.fixed)
    held["forward"] += sum(model.forward_bytes[some])
    held |= {name: sum(getattr(part, name) for part in parts) for name in ("parameters", "optimizer", "activations")}
    held["buffers"] += sum(part.buffers for part in parts)
    disk = {
        "dictionaries": sum(model.dictionary_bytes[some]),
        "checkpoint": sum(model.checkpoint_bytes[some]),
        "activations": sum(model.cache_bytes[some]) if cached else 0,
    }
    return PlannedJob(
        model=block.model,
        first=layers[0],
        last=layers[-1],
        layers=layers,
        device=device.name,
        bytes=held,
        total_bytes=sum(held.values()),
        disk_bytes=disk,
        flops=epochs * model.forward_flops[last] + sum(model.train_flops[some]),
        start_second=block.start,
        seconds=block.seconds,
        cached=cached,
    )


def _disk_of(jobs: list[PlannedJob]) -> dict[str, int]:
    """Dictionaries stay; of checkpoints and activations each device has those of one job at a time."""
    most: dict[str, dict[str, int]] = {}
    for job in jobs:
        here = most.setdefault(job.device, {"checkpoints": 0, "activations": 0})
        here["checkpoints"] = max(here["checkpoints"], job.disk_bytes["checkpoint"])
        here["activations"] = max(here["activations"], job.disk_bytes["activations"])
    passing = {name: sum(here[name] for here in most.values()) for name in ("checkpoints", "activations")}
    return {"dictionaries": sum(job.disk_bytes["dictionaries"] for job in jobs)} | passing


def _describe_model(study: Study, model: CountedModel, jobs: list[PlannedJob]) -> PlannedModel:
    return PlannedModel(
        model=model.shape.name,
        num_layers=model.shape.num_layers,
        **model.layers._asdict(),
        tokens=model.tokens,
        activations=_why_cached(study, [job for job in jobs if job.model == model.shape.name]),
    )


def _why_cached(study: Study, jobs: list[PlannedJob]) -> str:
    """Whether a model's activations are kept on disk, and why."""
    wanted, epochs = study.training.activation_cache, study.training.epochs
    if not jobs:
        return "nothing to train"
    if epochs == 1:
        return "not kept: one epoch"
    if wanted == "off":
        return f"not kept: activation_cache is off; computed in each of {epochs} epochs"
    size = describe_bytes(sum(job.disk_bytes["activations"] for job in jobs))
    if wanted == "on":
        return f"kept on disk ({size}): activation_cache is on"
    kept = sum(job.cached for job in jobs)
    if not kept:
        return f"not kept: computing them in each of {epochs} epochs takes less time than reading them"
    where = "" if kept == len(jobs) else f" by {kept} of {len(jobs)} jobs"
    return f"kept on disk{where} ({size}): reading them takes less time than computing them in each of {epochs} epochs"


def _assumptions(study: Study, devices: list[PlannedDevice], placement: Placement) -> list[str]:
    lines = describe_assumptions(devices)
    lines.append(
        f"a forward pass reaches {FORWARD_SHARE:.0%} of these products; "
        f"weights are read at {WEIGHTS_BYTES_PER_SECOND / 1e9:g} GB/s; the disk has room"
    )
    if any(study.dictionary_for(m).l0 is None for m in study.models):
        lines.append(f"where a penalty decides, {ACTIVE_SHARE:.0%} of the features are active")
    if study.training.ceiling_seeds:
        lines.append(
            f"each of {study.training.ceiling_seeds + 1} dictionaries of a layer (training.ceiling_seeds) takes "
            "as much as one alone; they share the forward pass"
        )
    if len({block.model for block in placement.blocks}) < len(placement.blocks):
        lines.append(
            "the parts of a split model each run it up to their last layer; layers do not depend on one another"
        )
    return lines
