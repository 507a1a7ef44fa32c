"""Train one SAELens dictionary on planted activations; run by planted.py in an environment that has sae-lens.

    python peers_planted.py ARCHITECTURE FOLDER K BATCH LR

Reads FOLDER/data.safetensors (`train`, `heldout`); writes FOLDER/found.safetensors (`W_dec`, `x_hat`, `l0`, `fired`) and prints
seconds. SAELens' defaults, but for the advice of its documentation: activations scaled, learning rate decayed over the last
fifth, sparsity warmed up over the first twentieth. Those with a penalty get the coefficient in K's place, `penalty:VALUE`.
"""

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def make(architecture: str, d_in: int, d_sae: int, sparsity: str, num_steps: int):
    """An untrained dictionary of SAELens."""
    import sae_lens
    from sae_lens import (
        GatedTrainingSAEConfig,
        JumpReLUTrainingSAEConfig,
        StandardTrainingSAEConfig,
        TopKTrainingSAEConfig,
    )
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAEConfig

    widths = [d_sae // 32, d_sae * 3 // 32, d_sae * 7 // 32, d_sae * 15 // 32, d_sae]
    value, warm_up = float(sparsity.removeprefix("penalty:")), num_steps // 20
    config, own = {
        "topk": (TopKTrainingSAEConfig, {"k": int(value)}),
        "batch_topk": (BatchTopKTrainingSAEConfig, {"k": value}),
        "matryoshka": (MatryoshkaBatchTopKTrainingSAEConfig, {"k": value, "matryoshka_widths": widths}),
        "relu": (StandardTrainingSAEConfig, {"l1_coefficient": value, "l1_warm_up_steps": warm_up}),
        "gated": (GatedTrainingSAEConfig, {"l1_coefficient": value, "l1_warm_up_steps": warm_up}),
        "jumprelu": (JumpReLUTrainingSAEConfig, {"l0_coefficient": value, "l0_warm_up_steps": warm_up}),
    }[architecture]
    made = config(d_in=d_in, d_sae=d_sae, normalize_activations="expected_average_only_in", **own)
    return sae_lens.TrainingSAE.from_dict(made.to_dict())


def batches(x_ND: torch.Tensor, size: int):
    """Batches in the order of the data, from the start again when it ends (the scale is measured on the first ones)."""
    while True:
        yield from (part for part in x_ND.split(size) if len(part) == size)


def main() -> None:
    """Train, encode held-out data, write what is measured."""
    architecture, folder, sparsity, batch, lr = sys.argv[1:]
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    data = load_file(Path(folder) / "data.safetensors")
    train, heldout = data["train"], data["heldout"]
    num_steps = len(train) // int(batch)
    sae = make(architecture, train.shape[1], int(data["d_FD"].shape[0]), sparsity, num_steps)
    config = SAETrainerConfig(
        total_training_samples=num_steps * int(batch),
        train_batch_size_samples=int(batch),
        lr=float(lr),
        lr_end=0.0,
        lr_decay_steps=num_steps // 5,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=100,
        dead_feature_window=max(20, num_steps // 20),
    )
    started = time.perf_counter()
    SAETrainer(config, sae, batches(train, int(batch))).fit()
    seconds = time.perf_counter() - started
    sae.save_inference_model(folder)
    from sae_lens import SAE

    trained = SAE.load_from_disk(folder)
    with torch.no_grad():
        f_NF = trained.encode(heldout)
        found = {
            "W_dec": trained.W_dec.contiguous(),
            "x_hat": trained.decode(f_NF).contiguous(),
            "l0": (f_NF > 0).sum(1).float().mean()[None],
            "fired": (f_NF > 0).any(0),
        }
    save_file(found, Path(folder) / "found.safetensors")
    print(f"{seconds:.1f}")


if __name__ == "__main__":
    main()
