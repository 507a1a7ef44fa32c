"""`python load.py DIR`: what each library makes of the files that throughline wrote.

For every folder DIR/<format>/<case>/ the features and reconstructions of DIR/inputs.safetensors go to
DIR/<format>/<case>.safetensors.
"""

import sys
import warnings
from pathlib import Path

import libraries
from safetensors.torch import load_file, save_file


def main(root: Path) -> None:
    warnings.simplefilter("ignore")
    x_ND = load_file(root / "inputs.safetensors")["inputs"]
    for kind in sorted(path for path in root.iterdir() if path.is_dir()):
        for folder in sorted(path for path in kind.iterdir() if path.is_dir()):
            found = libraries.outputs(libraries.load(kind.name, folder), x_ND)
            save_file(
                {name: tensor.contiguous() for name, tensor in found.items()}, kind / f"{folder.name}.safetensors"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
