"""What a process that left out of torch and transformers what it can finds of models in folders: python lean_process.py FOLDER…

tests/test_lean_imports.py holds it against what a process that left out nothing finds, by the same functions.
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

import torch

from throughline import lean_imports

IDS = [5, 9, 12, 5, 40, 33, 7, 1]
UNWANTED = ("torch._dynamo.eval_frame", "torch.distributed.tensor", "accelerate", "scipy")


def digests_of(folder: str) -> dict[str, str]:
    """Of the logits for IDS, of four tokens that follow them, and of every buffer by name."""
    from throughline.models import open_model
    from throughline.study import ModelSpec

    torch.set_num_threads(1)
    model = open_model(ModelSpec(path=folder), device="cpu")
    with torch.no_grad():
        logits = model.hf(torch.tensor([IDS])).logits
    buffers = {name: _digest(buffer) for name, buffer in model.hf.named_buffers()}
    return buffers | {"logits": _digest(logits), "generated": str(model.generate(IDS, 4))}


def _digest(values: torch.Tensor) -> str:
    return sha256(values.detach().contiguous().numpy().tobytes()).hexdigest()


def main() -> None:
    """Print digests by folder, which of UNWANTED is there, and whether torch's compiler and accelerate do their work afterwards."""
    lean_imports.wanted = True
    lean_imports.leave_out_unused()
    found = {folder: digests_of(folder) for folder in sys.argv[1:]}
    loaded = [name for name in UNWANTED if name in sys.modules]

    double = torch.compile(lambda x: x * 2 + 1, backend="eager", fullgraph=True)
    compiled = double(torch.arange(3.0)).tolist()
    import accelerate

    model = torch.nn.Linear(2, 2)
    prepared = accelerate.Accelerator(cpu=True).prepare(model)
    same = torch.equal(prepared(torch.ones(2)), model(torch.ones(2)))
    print(json.dumps({"found": found, "loaded": loaded, "compiled": compiled, "accelerated": same}))


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # a command does not have tests/ on its path
    main()
