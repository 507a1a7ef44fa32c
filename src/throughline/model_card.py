"""The model card of exported dictionaries: what they are, how good, how made and how to load them; all of it from the run."""

from pathlib import Path

from throughline.dictionaries import Dictionary
from throughline.files import replacing
from throughline.records import LayerQuality
from throughline.study import ModelSpec, Study

Layers = dict[int, tuple[Dictionary, LayerQuality]]


def hook_name(layer: int) -> str:
    """TransformerLens' name of the residual stream after block `layer`: the folder of its dictionary on the hub."""
    return f"blocks.{layer}.hook_resid_post"


def write_model_card(folder: Path, study: Study, spec: ModelSpec, layers: Layers) -> Path:
    """Write `README.md`; returns its path."""
    path = folder / "README.md"
    with replacing(path) as temporary:
        temporary.write_text(model_card(study, spec, layers), encoding="utf-8")
    return path


def model_card(study: Study, spec: ModelSpec, layers: Layers) -> str:
    """The card in Markdown, with the front matter by which the hub and SAELens know it."""
    ids = [hook_name(layer) for layer in layers]
    parts = [
        _front_matter(spec),
        f"# Sparse autoencoders of {spec.name}\n",
        f"{len(layers)} sparse autoencoder{'s'[: len(layers) > 1]}, each of the residual stream after one block.\n",
        "## Load\n",
        "```python\nfrom sae_lens import SAE\n\n"
        f'sae = SAE.from_pretrained("USER/REPOSITORY", "{ids[0]}")  # wherever this folder was uploaded\n```\n',
        "They take raw activations: nothing is subtracted from the input, and scale and mean of training are in the weights. "
        "Decoder rows have unit norm, so features are in units of the residual stream.\n",
        "## Quality\n",
        *_quality(layers),
        "## Training\n",
        *_training(study, layers),
        "Trained and measured with [throughline](https://pypi.org/project/throughline/).\n",
    ]
    return "\n".join(parts)


def _front_matter(spec: ModelSpec) -> str:
    on_hub = (
        spec.weights == "trained" and spec.path.count("/") == 1 and not spec.path.startswith((".", "/", "~", "zoo/"))
    )
    lines = ["library_name: saelens", *([f"base_model: {spec.path}"] if on_hub else [])]
    return "\n".join(["---", *lines, "tags:", "- sparse-autoencoder", "- interpretability", "- throughline", "---", ""])


def _quality(layers: Layers) -> list[str]:
    columns = ("id", "architecture", "features", "L0", "FVU", "CE recovered", "ΔCE (nats)", "dead", "gate")
    rows = [
        (
            f"`{hook_name(layer)}`",
            str(dictionary.metadata.get("training_architecture", dictionary.architecture)),
            f"{dictionary.d_sae:,}",
            f"{quality.l0:.1f}",
            f"{quality.fvu:.4f}",
            f"{quality.ce_loss_score:.4f}",
            f"{quality.delta_ce:+.4f}",
            f"{quality.dead:.2%}",
            "pass" if quality.passed else "**failed**: " + "; ".join(quality.gate),
        )
        for layer, (dictionary, quality) in layers.items()
    ]
    table = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
    first = next(iter(layers.values()))[1]
    failed = sum(not quality.passed for _, quality in layers.values())
    return [
        *table,
        "",
        f"On {first.num_tokens:,} held-out tokens; CE with the reconstruction in place of the activation, on "
        f"{first.num_spliced_tokens:,} of them, recovered against zero ablation. FVU is the share of variance unexplained, "
        "about the mean over tokens; dead features fired on none of these tokens.\n",
        *([f"**{failed} of {len(layers)} failed the quality gate.**\n"] if failed else []),
    ]


def _training(study: Study, layers: Layers) -> list[str]:
    imported = [(layer, d) for layer, (d, _) in layers.items() if "imported_from" in d.metadata]
    own = [d for d, _ in layers.values() if "imported_from" not in d.metadata]
    lines = [f"- `{hook_name(layer)}` was trained elsewhere ({d.metadata['imported_from']})" for layer, d in imported]
    if own:
        training, metadata = study.training, own[0].metadata
        lines += [
            f"- text: `{metadata.get('dataset_path')}`, pieces of up to {metadata.get('context_size')} tokens, special tokens "
            + ("left out" if metadata.get("exclude_special_tokens") else "kept"),
            f"- {metadata.get('training_tokens', training.tokens * training.epochs):,} tokens in batches of "
            f"{training.step_tokens:,}, {training.epochs} epoch{'s'[: training.epochs > 1]}",
            f"- learning rate {training.lr}, precision {training.precision}, seed {training.seed}",
        ]
    return [*lines, ""]
