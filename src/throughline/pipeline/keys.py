"""Keys of what is trained, from the study alone."""

from collections.abc import Mapping, Sequence

from throughline.run_dir import digest_key
from throughline.study import ModelSpec, Study

NOT_IN_KEYS = {"checkpoint_minutes", "activation_cache"}  # they change when and where, not what


def steps_of(
    study: Study, spec: ModelSpec, layers: Sequence[int], imported: Mapping[int, str]
) -> dict[int, tuple[str, str]]:
    """Step and key of each of `layers` of a model, of which `imported` are there with these keys."""
    dictionary, training = study.dictionary_for(spec), study.training.model_dump(exclude=NOT_IN_KEYS)
    if not study.training.ceiling_seeds:  # so that runs keep the keys they had before there were twins
        del training["ceiling_seeds"]
    model = spec.model_dump(exclude={"layers", "dictionary"})

    def key_of(layer: int) -> str:
        return digest_key(
            model, study.data.model_dump(), dictionary.at_layer(layer).model_dump(exclude={"per_layer"}), training
        )

    return {layer: (f"train/{spec.name}/{layer}", imported.get(layer) or key_of(layer)) for layer in layers}
