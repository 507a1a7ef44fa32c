"""A process that left out what one model on one device does not need computes the same bits, and can still do the rest."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import transformers

import lean_process
from test_models import CONFIGS, GATED, save_model

FAMILIES = CONFIGS | {"gemma3": lambda: transformers.Gemma3TextConfig(**GATED, query_pre_attn_scalar=16)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("families")
    return [str(save_model(root / name, config())) for name, config in FAMILIES.items()]


@pytest.fixture(scope="module")
def lean(folders) -> dict[str, Any]:
    """What a process of its own says."""
    command = [sys.executable, lean_process.__file__, *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.xdist_group("lean")
def test_every_family_has_the_same_bits(lean, folders):
    assert len(folders) == len(FAMILIES)
    for folder in folders:
        assert lean["found"][folder] == lean_process.digests_of(folder), folder


@pytest.mark.xdist_group("lean")
def test_nothing_unused_is_loaded_and_all_of_it_works_later(lean):
    assert lean["loaded"] == []
    assert all(find_spec(name) for name in lean_process.UNWANTED)
    assert lean["compiled"] == [1.0, 3.0, 5.0]
    assert lean["accelerated"]
