"""Save and load dictionaries of a run: SAELens' layout (`formats/saelens.py`), and beside it a probe.

The probe is a handful of inputs with the features and reconstructions they gave when the dictionary was saved. Loading
computes both anew and refuses the dictionary on a mismatch: scale kept outside the weights, or a class guessed wrongly, shows
here.
"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from throughline.dictionaries.dictionary import Dictionary
from throughline.dictionaries.formats import saelens
from throughline.dictionaries.formats.files import write_safetensors
from throughline.errors import DamagedFileError, InputError

PROBE = "probe.safetensors"
TOLERANCE = 1e-4  # relative to the largest expected number: other machines sum in another order


def save_dictionary(dictionary: Dictionary, folder: Path, probe_ND: Tensor) -> list[str]:
    """Write a dictionary and its probe; returns the file names."""
    write_safetensors(folder / PROBE, _probe(dictionary, probe_ND.float()))
    return [PROBE, *saelens.write(dictionary, folder)]


def load_dictionary(folder: Path, device: str = "cpu") -> Dictionary:
    """The dictionary of a folder, checked against its probe.

    Raises InputError if there is none, DamagedFileError if files are damaged or the probe comes out otherwise.
    """
    if not saelens.holds(folder):
        raise InputError(
            f"{folder} holds no dictionary ({saelens.CONFIG} and {saelens.WEIGHTS}); `throughline train` makes them"
        )
    try:
        dictionary = saelens.read(folder)
        _check_probe(dictionary, folder)
    except InputError as error:  # what a user may hand over wrongly has no place in a run
        raise DamagedFileError(str(error)) from error
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedFileError(f"dictionary in {folder} is damaged: {type(error).__name__} {error}") from error
    return dictionary.to(device)


def _probe(dictionary: Dictionary, inputs_ND: Tensor) -> dict[str, Tensor]:
    features_NF = dictionary.encode(inputs_ND)
    return {"inputs": inputs_ND, "features": features_NF, "reconstructions": dictionary.decode(features_NF)}


def _check_probe(dictionary: Dictionary, folder: Path) -> None:
    if not (folder / PROBE).is_file():
        return  # trained elsewhere
    probe = load_file(folder / PROBE)
    if probe["inputs"].shape[1:] != (dictionary.d_model,):
        raise DamagedFileError(f"the probe of the dictionary in {folder} has inputs of another width")
    for name, found in _probe(dictionary, probe["inputs"]).items():
        expected = probe[name]
        if found.shape != expected.shape:
            raise DamagedFileError(f"the probe of the dictionary in {folder} has {name} of another shape")
        off = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
        if not off <= TOLERANCE:  # nor if it is not a number
            raise DamagedFileError(f"dictionary in {folder} does not give its probe's {name} (off by {float(off):.2g})")
