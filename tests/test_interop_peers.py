"""Files of the real libraries, both ways: what they save is read here, and what is written here they load; the same numbers.

The libraries live in the environment of `make peers`; scripts in tests/peers run there, once each way.
"""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders import dictionary_of
from throughline.dictionaries.formats import FORMATS, read_foreign, saelens, write_foreign

pytestmark = [pytest.mark.xdist_group("peers"), pytest.mark.slow("peers")]  # each script imports for ten seconds

SCRIPTS = Path(__file__).parent / "peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
PEERS = CACHE / "throughline" / "peers"
TOLERANCE = 1e-5  # of the largest number

# every kind that each library makes, and what it is here
MADE = {
    "saelens": {
        "standard-plain": "relu",
        "standard-subtracts": "relu",
        "topk-plain": "topk",
        "topk-subtracts": "topk",
        "topk-ranked": "topk",
        "jumprelu-plain": "jumprelu",
        "jumprelu-subtracts": "jumprelu",
        "gated-plain": "gated",
        "gated-subtracts": "gated",
        "batchtopk-plain": "jumprelu",
        "batchtopk-subtracts": "jumprelu",
        "matryoshka_batchtopk-plain": "jumprelu",
        "matryoshka_batchtopk-subtracts": "jumprelu",
        "old-3": "relu",
        "old-5": "topk",
    },
    "sparsify": {"h.3": "topk", "layers.11": "topk"},
    "gemma-scope": {"one": "jumprelu", "two": "jumprelu"},
    "dictionary-learning": {
        "AutoEncoder": "relu",
        "AutoEncoderNew": "relu",
        "GatedAutoEncoder": "gated",
        "JumpReluAutoEncoder": "jumprelu",
        "AutoEncoderTopK": "topk",
        "BatchTopKSAE": "jumprelu",
        "MatryoshkaBatchTopKSAE": "jumprelu",
    },
}
CASES = [(format_name, case) for format_name, cases in MADE.items() for case in cases]
WRITTEN = [(name, architecture) for name, module in FORMATS.items() for architecture in module.ARCHITECTURES_HELD]
HUB = "blocks.3.hook_resid_post"


def run_script(name: str, folder: Path) -> None:
    if coming := os.environ.get(
        "THROUGHLINE_PEERS_COMING"
    ):  # .ci/run installs them meanwhile, and makes this file at the end
        while not Path(coming).exists():
            time.sleep(0.2)
    if not (PEERS / ".installed").is_file():
        pytest.skip(f"the other projects' libraries are not in {PEERS}; `make peers` installs them")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [str(PEERS / "bin" / "python"), str(SCRIPTS / name), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """What the libraries saved, and what they say it gives."""
    folder = tmp_path_factory.mktemp("made")
    run_script("make.py", folder)
    return folder


@pytest.fixture(scope="session")
def loaded(tmp_path_factory) -> Path:
    """What was written here, and what the libraries say it gives."""
    folder = tmp_path_factory.mktemp("written")
    save_file({"inputs": inputs()}, folder / "inputs.safetensors")
    for format_name, architecture in WRITTEN:
        write_foreign(dictionary_of(architecture), folder / format_name / architecture, format_name)
    write_foreign(dictionary_of("gated"), folder / "saelens-hub" / HUB, "saelens")
    run_script("load.py", folder)
    return folder


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return 3 * torch.randn(64, 16, generator=generator) + torch.randn(16, generator=generator)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE


@pytest.mark.parametrize(("format_name", "case"), CASES)
def test_what_a_library_saves_is_read(made, format_name, case):
    expected = load_file(made / format_name / f"{case}.safetensors")
    found_format, dictionary = read_foreign(made / format_name / case)
    assert (found_format, dictionary.architecture) == (format_name, MADE[format_name][case])
    features_NF = dictionary.encode(expected["inputs"])
    assert_close(features_NF, expected["features"])
    assert_close(dictionary.decode(features_NF), expected["reconstructions"])
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(dictionary.d_sae))
    assert 1 < float((features_NF > 0).float().sum(1).mean()) < dictionary.d_sae


def test_our_configuration_has_the_keys_of_saelens(made):
    for case, architecture in (("standard-plain", "relu"), ("topk-plain", "topk"), ("batchtopk-plain", "jumprelu")):
        theirs = json.loads((made / "saelens" / case / "cfg.json").read_text())
        ours = saelens.config_of(dictionary_of(architecture))
        assert set(ours) == set(theirs)
        assert ours["architecture"] == theirs["architecture"]
        assert ours["metadata"]["sae_lens_version"] == theirs["metadata"]["sae_lens_version"]


def test_every_kind_that_the_libraries_make_is_here(made):
    for format_name, cases in MADE.items():
        assert {path.name for path in (made / format_name).iterdir() if path.is_dir()} == set(cases)


@pytest.mark.parametrize(("format_name", "architecture"), [*WRITTEN, ("saelens-hub", "gated")])
def test_what_is_written_here_a_library_loads(loaded, format_name, architecture):
    case = HUB if format_name == "saelens-hub" else architecture
    found = load_file(loaded / format_name / f"{case}.safetensors")
    ours = dictionary_of(architecture)
    features_NF = ours.encode(inputs())
    assert_close(found["features"], features_NF)
    assert_close(found["reconstructions"], ours.decode(features_NF))
