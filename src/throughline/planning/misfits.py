"""What fits on no device, and what would make it fit, computed."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

from throughline.errors import InputError
from throughline.planning.costs import ModelCosts, Setting, count_costs
from throughline.records import PlannedDevice
from throughline.study import Study, parse_study

GIB = 2**30


def refuse(settings: dict[str, Setting], pending: list[int], devices: list[PlannedDevice]) -> None:
    """InputError if one of the pending layers fits on none of the devices; `settings` are by kind of device.

    It says the smallest memory that would do, and the largest expansion and batch, each changed alone, that would.
    """
    largest = {d.kind: d for d in sorted(devices, key=lambda device: device.memory_bytes)}
    for layer in pending:
        needs = {kind: count_costs(settings[kind], [layer]) for kind in largest}
        if any(needs[kind].costs.fits(0, 1, device.memory_bytes) for kind, device in largest.items()):
            continue
        best = min(largest.values(), key=lambda d: needs[d.kind].costs.memory_for(0, 1) - d.memory_bytes)
        raise InputError(_describe(settings[best.kind], layer, needs[best.kind], best))


def _describe(setting: Setting, layer: int, needs: ModelCosts, device: PlannedDevice) -> str:
    wanted = needs.costs.memory_for(0, 1)
    found, model = device.memory_bytes / GIB, needs.fixed["model"] / GIB
    ways = [f"a device of {ceil(10 * wanted / GIB) / 10:g} GiB", *_smaller(setting, layer, device)]
    return (
        f"{setting.spec.name} layer {layer} needs {wanted / GIB:.1f} GiB alone ({model:.1f} of it the model), "
        f"the most that is left by the devices is {found:.1f} GiB; {' or '.join(ways)} would do"
    )


def _smaller(setting: Setting, layer: int, device: PlannedDevice) -> list[str]:
    """The largest expansion and the largest batch that fit, if any do."""
    dictionary, D = setting.dictionary(layer), setting.shape.d_model

    def fits(study: Study) -> bool:
        found = count_costs(replace(setting, study=study, spec=study.model(setting.spec.name)), [layer])
        return found.costs.fits(0, 1, device.memory_bytes)

    def with_width(tenths: int) -> Study:
        return _changed(setting.study, "dictionary", {"d_sae": max(1, tenths * D // 10)})

    def with_batch(tokens: int) -> Study:
        return _changed(setting.study, "training", {"batch_tokens": tokens})

    tenths = _largest(10 * dictionary.width(D) // D, lambda value: fits(with_width(value)))
    halvings = [setting.training.batch_tokens >> i for i in range(1, setting.training.batch_tokens.bit_length())]
    batch = next((tokens for tokens in halvings if fits(with_batch(tokens))), None)
    ways = [f"dictionary.expansion {tenths / 10:g}"] if tenths and dictionary.d_sae is None else []
    ways += [f"dictionary.d_sae {tenths * D // 10}"] if tenths and dictionary.d_sae is not None else []
    return ways + ([f"training.batch_tokens {batch}"] if batch else [])


def _changed(study: Study, section: str, values: dict[str, int]) -> Study:
    """The study with other values in one section, and no overrides of dictionaries."""
    tree = study.model_dump()
    tree[section] |= values
    if section == "dictionary":
        tree["dictionary"]["per_layer"] = {}
        for model in tree["models"]:
            model["dictionary"] = None
    return parse_study(tree)


def _largest(below: int, holds: Callable[[int], bool]) -> int:
    """The largest number under `below` of which `holds` is true, 0 if none; it is true of all below such a number."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
