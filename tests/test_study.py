"""The study file: what it refuses and in which words, what its settings, overrides and paths come to."""

from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from throughline.api import PRESETS, SHORT_DEMO, init
from throughline.errors import InputError
from throughline.registry import ARCHITECTURES
from throughline.study import (
    DictionarySpec,
    GateSpec,
    L1Schedule,
    Section,
    Study,
    dump_study,
    folder_name,
    load_study,
    parse_study,
)
from throughline.study_fields import sections

ROOT = Path(__file__).resolve().parents[1]
PRESET_FOLDER = ROOT / "src" / "throughline" / "presets"


NAN = float("nan")


def tree(**changes) -> dict:
    return {"name": "small", "models": ["zoo/pythia"], "data": {"path": "zoo/arithmetic"}} | changes


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trainng": {}}, "unknown key trainng; did you mean training?"),
        ({"xyzzy": 1}, "unknown key xyzzy; known keys: name, models, data, dictionary,"),
        ({"training": {"token": 5}}, "unknown key training.token; did you mean tokens?"),
        ({"data": {"path": "a.txt", "contxt": 5}}, "unknown key data.contxt; did you mean context?"),
        ({"dictionary": {"expantion": 5}}, "unknown key dictionary.expantion; did you mean expansion?"),
        ({"dictionary": {"per_layer": {3: {"kk": 1}}}}, "unknown key dictionary.per_layer.3.kk; did you mean k?"),
        ({"dictionary": {"l1": {"early": 1, "mid": 1, "lat": 1}}}, "unknown key dictionary.l1.lat; did you mean late?"),
        ({"models": [{"path": "zoo/pythia", "layer": [0]}]}, "unknown key models.0.layer; did you mean layers?"),
        (
            {"models": [{"path": "zoo/pythia", "dictionary": {"dsae": 3}}]},
            "unknown key models.0.dictionary.dsae; did you mean d_sae?",
        ),
        ({"gate": {"max_fuv": 1}}, "unknown key gate.max_fuv; did you mean max_fvu?"),
        ({"transfer": {"metrics": ["machting"]}}, "metric 'machting' is unknown; did you mean 'matching'?"),
        ({"features": {"labelers": ["concept"]}}, "labeler 'concept' is unknown; did you mean 'concepts'?"),
        ({"dictionary": {"architecture": "topkk"}}, "architecture 'topkk' is unknown; did you mean 'topk'?"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest_known_one(changes, expected):
    with pytest.raises(InputError) as caught:
        parse_study(tree(**changes), "study.yaml")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training": {"tokens": "many"}}, "training.tokens: input should be a valid integer, found 'many'"),
        ({"training": {"lr": "fast"}}, "training.lr: input should be a valid number or 'auto', found 'fast'"),
        ({"training": 5}, "training: input should be keys and values, found 5"),
        ({"models": "zoo/pythia"}, "models: input should be a valid list, found 'zoo/pythia'"),
        ({"models": []}, "models: list should have at least 1 item"),
        ({"models": [{"path": "zoo/pythia", "layers": 3}]}, "models.0.layers: input should be 'all' or a valid list"),
        ({"models": [{"path": "zoo/pythia", "dtype": "float8"}]}, "models.0.dtype: input should be 'float32'"),
        ({"data": {"context": 5}}, "data.path is missing"),
        ({"data": {"path": "a.txt", "heldout": 1.5}}, "data.heldout: input should be less than 1, found 1.5"),
        ({"dictionary": {"k": 0}}, "dictionary.k: input should be greater than or equal to 1, found 0"),
        ({"name": "a/b"}, "name: string should match pattern"),
        ({"executor": {"kind": "cloud"}}, "executor.kind: input should be"),
        ({"training": {"seed": 2**70}}, "training.seed: input should be less than or equal to 4294967295, found 1180"),
        ({"training": {"lr": -1}}, "training.lr: input should be greater than or equal to 0 or 'auto', found -1"),
        ({"training": {"lr": NAN}}, "training.lr: input should be a finite number or 'auto', found nan"),
        ({"training": {"lr": float("inf")}}, "training.lr: input should be a finite number or 'auto', found inf"),
        ({"training": {"passes": 10**14}}, "training.passes: input should be less than or equal to 10000"),
        ({"training": {"tokens": 10**11, "epochs": 100}}, "training: tokens · epochs · passes is 10,000,000,000,000"),
        ({"dictionary": {"d_sae": 10**14}}, "dictionary.d_sae: input should be less than or equal to 16777216"),
        ({"dictionary": {"d_sae": 50, "k": 51}}, "dictionary: k 51 is more than the 50 features; lower k, or raise"),
        ({"dictionary": {"d_sae": 50, "target_l0": 51}}, "dictionary: target_l0 51 is more than the 50 features"),
        (
            {"dictionary": {"per_layer": {3: {"d_sae": 9}}}},
            "dictionary of zoo/pythia, layer 3: k 32 is more than the 9",
        ),
        ({"dictionary": {"l1": NAN}}, "dictionary.l1: input should be a finite number"),
        ({"gate": {"max_fvu": NAN}}, "gate.max_fvu: input should be a finite number, found nan"),
        (
            {"models": [{"path": "zoo/pythia", "layers": []}]},
            "models.0.layers: input should be 'all' or list should have",
        ),
        ({"executor": {"cpus": 100_000}}, "executor.cpus: input should be less than or equal to 1024, found 100000"),
        (
            {"training": {"tokens": 100, "batch_tokens": 4096}},
            "batch_tokens 4096 is more than the 100 tokens of the training",
        ),
    ],
)
def test_wrong_values_say_where_what_was_expected_and_what_was_found(changes, expected):
    with pytest.raises(InputError) as caught:
        parse_study(tree(**changes), "study.yaml")
    message = str(caught.value)
    assert expected.lower() in message.lower()
    assert message.startswith("study.yaml: ")
    assert "\n" not in message


@pytest.mark.parametrize(("place", "section"), sections().items(), ids=[*sections()])
def test_every_number_has_bounds_and_is_finite(place, section):
    """But for those of the gate, which are compared and never computed with, and the learning rate."""
    for name in section.model_fields:
        schema = TypeAdapter(section).json_schema()["properties"][name]
        for kind in [schema, *schema.get("anyOf", [])]:
            if kind.get("type") in ("integer", "number") and section is not GateSpec and name != "lr":
                assert kind.keys() & {"maximum", "exclusiveMaximum"}, f"{place}.{name}"
    assert section.model_config["allow_inf_nan"] is False


def test_all_faults_are_named_in_one_line():
    with pytest.raises(InputError) as caught:
        parse_study(tree(training={"tokens": "x", "epoch": 1}, gat={}), "study.yaml")
    message = str(caught.value)
    assert all(part in message for part in ("training.tokens", "did you mean epochs?", "did you mean gate?"))
    assert "\n" not in message


def test_a_long_wrong_value_is_shortened():
    with pytest.raises(InputError) as caught:
        parse_study(tree(training={"tokens": "x" * 500}))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "models",
    [
        ["zoo/pythia", "zoo/pythia"],
        [{"path": "a/gpt2"}, {"path": "b/gpt2"}],
        [{"path": "x", "name": "a b"}, {"path": "y", "name": "a-b"}],
        [{"path": "x", "name": "a__b"}, {"path": "y", "name": "a_b"}],
    ],
)
def test_models_whose_folders_would_be_the_same_are_refused(models):
    with pytest.raises(InputError, match="models need different names"):
        parse_study(tree(models=models))


@pytest.mark.parametrize("name", ["..", ".", "./.."])
def test_a_model_name_cannot_lead_out_of_its_folder(name):
    with pytest.raises(InputError, match="needs a name with a letter or digit"):
        parse_study(tree(models=[{"path": "zoo/pythia", "name": name}]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "is not YAML"),
        pytest.param("training: {seed: " + "9" * 5000 + "}", "is not YAML", id="digits"),
        ("name: 2024-13-45", "is not YAML"),
        pytest.param("name: " + "[" * 5000, "is not YAML", id="brackets"),
        ("- just\n- a list\n", "should hold keys and values (name, models, data, …), found list"),
        ("", "should hold keys and values (name, models, data, …), found NoneType"),
    ],
)
def test_files_that_are_no_study(tmp_path, text, expected):
    with pytest.raises(InputError) as caught:
        load_study(write(tmp_path, text))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(InputError, match="does not exist; `throughline init` writes one"):
        load_study(tmp_path / "none.yaml")


def test_binary_and_folders_are_refused(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not YAML"):
        load_study(tmp_path / "bytes.yaml")
    with pytest.raises(InputError, match="does not exist"):
        load_study(tmp_path)


# ---- settings


def test_settings_change_values_anywhere(tmp_path):
    path = write(tmp_path, yaml.safe_dump(tree()))
    settings = [
        "training.tokens=9000",
        "dictionary.l1={early: 1, mid: 2, late: 3}",
        "models.0={path: zoo/gpt2, layers: [1]}",
    ]
    study = load_study(path, [*settings, "transfer.metrics=[matching]", "name=other"])
    assert study.training.tokens == 9000
    assert study.dictionary.l1 == L1Schedule(early=1, mid=2, late=3)
    assert (study.models[0].name, study.models[0].layers) == ("zoo/gpt2", [1])
    assert (study.transfer.metrics, study.name) == (["matching"], "other")


def test_a_setting_reaches_into_a_list(tmp_path):
    path = write(tmp_path, yaml.safe_dump(tree(models=[{"path": "zoo/pythia"}])))
    assert load_study(path, ["models.0.layers=[2]"]).models[0].layers == [2]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("tokens", "--set expects a.b=value, found 'tokens'"),
        ("=5", "--set expects a.b=value, found '=5'"),
        ("training.token=5", "unknown key training.token; did you mean tokens?"),
        ("name.first=5", "--set name.first=5: name holds no keys"),
        ("training.tokens={", "'{' is not YAML"),
        ("models.7=zoo/gpt2", "models is a list of 1, counted from 0"),
        ("models.first.layers=[0]", "models.first holds no keys"),
    ],
)
def test_wrong_settings(tmp_path, setting, expected):
    with pytest.raises(InputError) as caught:
        load_study(write(tmp_path, yaml.safe_dump(tree())), [setting])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_section_left_empty_has_its_defaults(tmp_path):
    text = yaml.safe_dump(tree()) + "training:\n  # tokens: 5\n"
    assert load_study(write(tmp_path, text)) == load_study(write(tmp_path, yaml.safe_dump(tree())))
    with pytest.raises(InputError, match="unknown key trainng"):
        load_study(write(tmp_path, yaml.safe_dump(tree()) + "trainng:\n"))


# ---- overrides


def test_layers_override_models_and_models_override_the_study():
    study = parse_study(
        tree(
            models=[{"path": "zoo/pythia", "dictionary": {"k": 4}}, "zoo/gpt2"],
            dictionary={"k": 8, "d_sae": 100, "per_layer": {1: {"k": 2}, 2: {"expansion": 3}}},
        )
    )
    first, second = (study.dictionary_for(model) for model in study.models)
    assert [first.at_layer(i).k for i in range(3)] == [4, 2, 4]
    assert [second.at_layer(i).k for i in range(3)] == [8, 2, 8]
    assert [second.at_layer(i).width(50) for i in range(3)] == [100, 100, 150]  # a given expansion replaces d_sae


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 18, 24, 32])
def test_l1_changes_at_the_thirds_of_depth(depth):
    spec = DictionarySpec(l1=L1Schedule(early=3, mid=2, late=1))
    values = [spec.l1_at(layer, depth) for layer in range(depth)]
    assert values == [3 if 3 * i < depth else 2 if 3 * i < 2 * depth else 1 for i in range(depth)]
    assert DictionarySpec(l1=0.5).l1_at(0, depth) == 0.5


# ---- paths and names


def test_relative_paths_lie_beside_the_file(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "model").mkdir()
    models = [{"path": "model"}, "zoo/gpt2", "openai-community/gpt2-medium"]
    study = load_study(write(tmp_path, yaml.safe_dump(tree(models=models, data={"path": "texts.jsonl"}))))
    assert study.data.path == str((tmp_path / "texts.jsonl").resolve())
    assert [m.path for m in study.models] == [str((tmp_path / "model").resolve()), *models[1:]]
    assert [m.name for m in study.models] == ["model", "zoo/gpt2", "gpt2-medium"]


def test_model_looks_up_names():
    study = parse_study(tree(models=["zoo/pythia", "zoo/gpt2"]))
    assert study.model("zoo/gpt2").path == "zoo/gpt2"
    with pytest.raises(InputError, match="this run has no model 'zoo/gtp2'; it has zoo/"):
        study.model("zoo/gtp2")
    with pytest.raises(InputError, match=r"this run has 2 models; say which with --model \(zoo/pythia, zoo/gpt2\)"):
        study.model(None)
    assert parse_study(tree()).model(None).name == "zoo/pythia"


@pytest.mark.parametrize(
    ("name", "folder"), [("zoo/gpt2", "zoo-gpt2"), ("gpt2.5", "gpt2.5"), ("a__b", "a_b"), ("a b:c", "a-b-c")]
)
def test_folder_names(name, folder):
    assert folder_name(name) == folder


def test_a_study_survives_being_written(tmp_path):
    study = load_study(PRESET_FOLDER / "seed98.yaml")
    assert parse_study(yaml.safe_load(dump_study(study))) == study
    with pytest.raises(ValueError, match="frozen"):
        study.name = "other"  # type: ignore[misc]


# ---- what ships


def test_presets_and_examples_are_studies():
    shipped = [*PRESET_FOLDER.glob("*.yaml"), *(ROOT / "examples").glob("*.yaml")]
    assert len(shipped) >= 5
    for path in shipped:
        assert load_study(path).models, path
    assert {path.stem for path in PRESET_FOLDER.glob("*.yaml")} == {*PRESETS, "demo"}


def test_the_short_demo_is_a_study():
    assert len(load_study(PRESET_FOLDER / "demo.yaml", list(SHORT_DEMO)).models) == 2


def test_seed98_is_the_study_of_98_dictionaries():
    study = load_study(PRESET_FOLDER / "seed98.yaml")
    assert (ROOT / "examples" / "seed98.yaml").read_text() == (PRESET_FOLDER / "seed98.yaml").read_text()
    depths = {"gpt2-medium": 24, "gemma-2b": 18, "phi-2": 32, "pythia-1.4b": 24}
    assert [model.name for model in study.models] == list(depths)
    assert all(model.layers == "all" for model in study.models)
    assert sum(depths.values()) == 98
    assert (study.dictionary.expansion, study.dictionary.d_sae, study.dictionary.architecture) == (8, None, "relu")
    assert (study.training.epochs, study.training.batch_tokens) == (10, 64)
    assert study.dictionary.l1 == L1Schedule(early=1.5e-4, mid=1e-4, late=5e-5)
    assert {study.dictionary.l1_at(i, 24) for i in range(24)} == {1.5e-4, 1e-4, 5e-5}


@pytest.mark.parametrize("name", ["seed98-modern", "seed98-offline"])
def test_its_siblings_have_the_same_models(name):
    study, first = load_study(ROOT / "examples" / f"{name}.yaml"), load_study(PRESET_FOLDER / "seed98.yaml")
    assert [m.name.removesuffix(" (random weights)") for m in study.models] == [m.name for m in first.models]
    if name == "seed98-offline":
        assert (study.dictionary, study.training) == (first.dictionary, first.training)
        assert {m.weights for m in study.models} == {"random"}
        return
    assert (PRESET_FOLDER / f"{name}.yaml").read_text() == (ROOT / "examples" / f"{name}.yaml").read_text()
    assert (study.dictionary.architecture, study.dictionary.k) == ("topk", 64)
    assert (study.training.tokens, study.training.batch_tokens) == (50_000_000, 4096)


def test_every_default_is_valid_on_its_own():
    study = Study(**tree())  # type: ignore[arg-type]
    assert study.dictionary.architecture in ARCHITECTURES.names()


def test_init_writes_every_field_with_its_default_or_an_example(tmp_path):
    """What is commented out is a study too, field by field, and every field stands there once with what it means."""
    values = yaml.safe_load((PRESET_FOLDER / "commented.yaml").read_text())
    written = init(tmp_path / "study.yaml").read_text()
    expected = parse_study(values)
    assert load_study(tmp_path / "study.yaml") == expected
    lines = written.splitlines()
    for name, section in sections().items():
        for field, about in section.model_fields.items():
            if (
                not (isinstance(about.annotation, type) and issubclass(about.annotation, Section))
                and name != "features.llm"
            ):
                assert about.description and any(line.strip(" #-").startswith(f"{field}: ") for line in lines), field
    places = [i for i, line in enumerate(lines) if line.strip().startswith("# ") and ": " in line and line[0] == " "]
    assert len(places) > 25
    with_example = {k for s in sections().values() for k, f in s.model_fields.items() if f.examples}
    for i in places:
        given = [*lines[:i], lines[i].replace("# ", "", 1), *lines[i + 1 :]]
        on_ray = ["executor.kind=ray"] if lines[i].strip("# ").startswith(("address", "gpus", "devices")) else []
        found = load_study(write(tmp_path, "\n".join(given)), on_ray)
        key = lines[i].strip(" #").partition(":")[0]
        assert found == expected or key in with_example, lines[i]


def test_every_field_is_documented_with_its_default():
    lines = (ROOT / "docs" / "study.md").read_text().splitlines()
    cells = [[cell.strip(" `") for cell in line.split("|")[1:3]] for line in lines if line.startswith("| `")]
    study = Study(**tree())  # type: ignore[arg-type]
    sections = [value for value in dict(study).values() if isinstance(value, Section)]
    for section in [study.models[0], *sections]:
        for name, field in type(section).model_fields.items():
            described = [default for key, default in cells if key == name]
            assert described, f"docs/study.md does not mention {name}"
            if not field.is_required() and name != "name":
                empty = field.default is None or field.default in ({}, [])
                shown = "none" if empty else yaml.safe_dump(field.default, default_flow_style=True).partition("\n")[0]
                assert any(same(value, shown) for value in described), f"{name}: {shown} expected, found {described}"


def same(written: str, shown: str) -> bool:
    return written == shown.strip("'") or yaml.safe_load(written) == yaml.safe_load(shown)
