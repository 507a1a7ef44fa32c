"""What both scripts share: loading any format with the library it comes from. Runs in the environment of `make peers`.

dictionary_learning is installed without its dependencies: they pin old versions of what the other libraries need. Its classes
of dictionaries use none of them; the modules that its package imports beside them are empty here.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

WIDTH_FOLDER = (
    "layer_3/width_16k/average_l0_4"  # sae_lens takes the width of a Gemma Scope dictionary from its folder's name
)
LOADERS = "sae_lens.loading.pretrained_sae_loaders"


def dictionary_learning(module: str) -> ModuleType:
    """A module of dictionary_learning, with empty modules in place of what it imports beside its dictionaries."""
    import datasets  # noqa: F401  (which looks for zstandard itself)

    for absent in ("nnsight", "zstandard"):
        if absent not in sys.modules:
            sys.modules[absent] = ModuleType(absent)
            setattr(sys.modules[absent], "LanguageModel", type("LanguageModel", (), {}))  # noqa: B010
    return import_module(f"dictionary_learning.{module}")


def load(kind: str, folder: Path):
    """The dictionary of a folder, by the library's own loader."""
    if kind == "saelens":
        from sae_lens import SAE

        return SAE.load_from_disk(folder)
    if kind == "saelens-hub":
        from sae_lens import SAE

        with mock.patch(f"{LOADERS}.hf_hub_download", from_folder(folder.parent)):
            return SAE.from_pretrained("someone/something", folder.name)
    if kind == "sparsify":
        from sparsify import SparseCoder

        return SparseCoder.load_from_disk(folder)
    if kind == "dictionary-learning":
        return dictionary_learning("utils").load_dictionary(str(folder), "cpu")[0]
    return load_gemma_scope(folder, 2 if (folder / "params.safetensors").is_file() else 1)


def load_gemma_scope(folder: Path, generation: int):
    """Through sae_lens' loaders of what is on the hub, which is `folder` here."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    loader = loaders.gemma_2_sae_huggingface_loader if generation == 1 else loaders.gemma_3_sae_huggingface_loader
    name = WIDTH_FOLDER if generation == 1 else "resid_post/layer_3_width_16k_l0_small"
    repository = "google/gemma-scope-2b-pt-res" if generation == 1 else "google/gemma-scope-2-1b-pt"

    def download(*args, filename: str = "", **kwargs) -> str:
        return str(folder / Path(filename or args[1]).name)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        from safetensors.torch import load_file

        return {name: list(tensor.shape) for name, tensor in load_file(folder / Path(filename).name).items()}

    with (
        mock.patch(f"{LOADERS}.hf_hub_download", download),
        mock.patch(f"{LOADERS}.get_safetensors_tensor_shapes", shapes),
    ):
        config, state, _ = loader(repository, name)
    config |= {"d_in": state["W_enc"].shape[0], "d_sae": state["W_enc"].shape[1]}
    config = loaders.handle_config_defaulting(config)
    sae = SAE.from_dict(config)
    sae.load_state_dict(state)
    return sae


def from_folder(root: Path):
    """`hf_hub_download` of a repository that lies at `root`."""

    def download(repo_id: str = "", filename: str = "", **_) -> str:
        path = root / filename
        if not path.is_file():
            from huggingface_hub.errors import EntryNotFoundError

            raise EntryNotFoundError(filename)
        return str(path)

    return download


@torch.no_grad()
def outputs(sae, x_ND: Tensor) -> dict[str, Tensor]:
    """Features, in units of the input (times the norm of their decoder row), and reconstructions."""
    if type(sae).__name__ == "SparseCoder":
        values, features, _ = sae.encode(x_ND)
        f_NF = torch.zeros(len(x_ND), sae.num_latents).scatter_(1, features, values)
        return {"features": f_NF * sae.W_dec.norm(dim=1), "reconstructions": sae.decode(values, features)}
    f_NF = sae.encode(x_ND)
    norm_F = sae.decoder.weight.norm(dim=0) if hasattr(sae, "decoder") else sae.W_dec.norm(dim=1)
    if getattr(getattr(sae, "cfg", None), "rescale_acts_by_decoder_norm", False):
        norm_F = torch.ones_like(norm_F)
    return {"features": f_NF * norm_F, "reconstructions": sae.decode(f_NF)}
