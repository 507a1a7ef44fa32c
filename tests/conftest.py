"""What all tests share: one thread for torch (cores may be busy), no network, and the data beside the checkout."""

import os
from pathlib import Path

import pytest

import shape_checks  # noqa: F401 - covers what is imported after it, so it comes before anything of ours
from trained import made_once as made_once
from trained import trained as trained

pytest_plugins = ["left_out"]
os.environ["HF_HUB_OFFLINE"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models, texts and tokenizers that lies beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared data folder does not lie beside this checkout")
    return SHARED / "data"
