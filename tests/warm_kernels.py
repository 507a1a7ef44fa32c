"""Compile what training and transfer compute with, once, before several workers would each do so; nothing to do if it is on disk.

python tests/warm_kernels.py
"""

from throughline.kernel_cache import PACKAGE, kernels_folder

SOURCES = ("training/kernels.py", "transfer/cooccurrence.py", "dictionaries/selecting.py")


def warm() -> None:
    """Every architecture in both precisions, and one pair of layers: what is not here is compiled by who first needs it."""
    import torch

    import test_compiled
    import test_cooccurrence
    from throughline.dictionaries.selecting import keep_top
    from throughline.transfer.cooccurrence import relate

    test_compiled.engine.DEAD_AFTER_SHARE, test_compiled.engine.DEAD_AFTER_BATCHES = 0.02, 1
    for small in (test_compiled.compiled.SMALL_PRODUCT, 0):
        test_compiled.compiled.SMALL_PRODUCT = small
        for precision in ("float32", "bfloat16"):
            for name in test_compiled.SPECS if small == 0 else ("topk",):
                test_compiled.run({0: test_compiled.SPECS[name]}, 60, precision=precision)
    a, b = test_cooccurrence.features(9, 1), test_cooccurrence.features(9, 2)
    relate(*test_cooccurrence.layers(a, b), strength=0.9, with_matrix=True)
    keep_top(torch.randn(4, 8), 2)


folders = [kernels_folder(str(PACKAGE / source)) for source in SOURCES]
if not all(folder and (folder / "warm").is_file() for folder in folders):
    warm()
    for folder in folders:
        if folder:
            (folder / "warm").touch()
