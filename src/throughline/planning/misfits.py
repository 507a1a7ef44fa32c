"""What fits on no device, and what would make all of the study fit, computed."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import NamedTuple

from throughline.errors import InputError
from throughline.planning.costs import Setting, count_costs
from throughline.records import PlannedDevice
from throughline.study import Study, parse_study

GIB = 2**30


class _Misfit(NamedTuple):
    """A model's layer that needs the most memory, where even the device that comes closest has too little."""

    setting: Setting  # on that device
    layer: int
    needed: int
    model_bytes: int

    def fits_in(self, study: Study) -> bool:
        """True if the layer fits on the device when the study is this one."""
        changed = replace(self.setting, study=study, spec=study.model(self.setting.spec.name))
        return count_costs(changed, [self.layer]).costs.fits(0, 1, self.setting.device.memory_bytes)


def refuse(
    settings: dict[str, dict[str, Setting]], pending: dict[str, list[int]], devices: list[PlannedDevice]
) -> None:
    """InputError if a pending layer fits on none of the devices; `settings` are by model, then by kind of device.

    It names the layer that needs most, the smallest memory that would do, and the largest expansion and batch and the most
    twins, each changed alone, that would.
    """
    largest = {d.kind: d for d in sorted(devices, key=lambda device: device.memory_bytes)}
    found = [_find(settings[model], layers, largest) for model, layers in pending.items()]
    misfits = [misfit for misfit in found if misfit]
    if not misfits:
        return
    worst = max(misfits, key=lambda misfit: misfit.needed)
    at_most = max(device.memory_bytes for device in devices) / GIB
    ways = [f"a device of {ceil(10 * worst.needed / GIB) / 10:g} GiB", *_smaller(worst.setting, misfits)]
    raise InputError(
        f"{worst.setting.spec.name} layer {worst.layer} needs {worst.needed / GIB:.1f} GiB "
        f"({worst.model_bytes / GIB:.1f} of it the model), the devices have {at_most:.1f} GiB at most; {' or '.join(ways)} would do"
    )


def _find(settings: dict[str, Setting], layers: list[int], largest: dict[str, PlannedDevice]) -> _Misfit | None:
    """The layer of one model that needs most, of those that fit nowhere."""
    misfits = []
    for layer in layers:
        needs = {kind: count_costs(settings[kind], [layer]) for kind in largest}
        if not any(needs[kind].costs.fits(0, 1, device.memory_bytes) for kind, device in largest.items()):
            closest = min(needs, key=lambda kind: needs[kind].costs.memory_for(0, 1) - largest[kind].memory_bytes)
            best = needs[closest]
            misfits.append(_Misfit(settings[closest], layer, best.costs.memory_for(0, 1), best.fixed["model"]))
    return max(misfits, key=lambda misfit: misfit.needed, default=None)


def _smaller(setting: Setting, misfits: list[_Misfit]) -> list[str]:
    """The largest expansion, the largest batch and the most twins with which all misfits fit, if any do.

    `setting` is of the worst.
    """
    dictionary = setting.dictionary(misfits[0].layer)
    widest = max(
        10 * m.setting.dictionary(m.layer).width(m.setting.shape.d_model) // m.setting.shape.d_model for m in misfits
    )

    def fit(study: Study) -> bool:
        return all(misfit.fits_in(study) for misfit in misfits)

    def with_expansion(tenths: int) -> Study:
        return _changed(setting.study, "dictionary", {"expansion": tenths / 10, "d_sae": None, "per_layer": {}})

    def with_batch(tokens: int) -> Study:
        return _changed(setting.study, "training", {"batch_tokens": tokens})

    def with_twins(count: int) -> Study:
        return _changed(setting.study, "training", {"ceiling_seeds": count})

    tenths = _largest(widest, lambda value: fit(with_expansion(value)))
    halvings = [setting.training.step_tokens >> i for i in range(1, setting.training.step_tokens.bit_length())]
    batch = next((tokens for tokens in halvings if fit(with_batch(tokens))), None)
    instead = "" if dictionary.d_sae is None else " in place of d_sae"
    ways = [f"dictionary.expansion {tenths / 10:g}{instead}"] if tenths else []
    ways += [f"training.batch_tokens {batch}"] if batch else []
    twins = next((n for n in reversed(range(setting.training.ceiling_seeds)) if fit(with_twins(n))), None)
    return ways if twins is None else [*ways, f"training.ceiling_seeds {twins}"]


def _changed(study: Study, section: str, values: dict) -> Study:
    """The study with other values in one section; dictionaries lose the overrides of models and layers."""
    tree = study.model_dump()
    tree[section] |= values
    if section == "dictionary":
        tree["models"] = [model | {"dictionary": None} for model in tree["models"]]
    return parse_study(tree)


def _largest(below: int, holds: Callable[[int], bool]) -> int:
    """The largest number under `below` of which `holds` is true, 0 if none; it is true of all below such a number."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
