"""Random weights: as the architecture's own rules have them, only faster; and every output says that they are random."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

from throughline import api
from throughline.cli import main
from throughline.errors import InputError
from throughline.models import LanguageModel, check_model, open_model, read_tokenizer
from throughline.models.random_weights import POOL, _PooledNormal, build_random, byte_tokenizer
from throughline.study import ModelSpec, dump_study, load_study, parse_study

FULL_SIZE = Path(__file__).resolve().parents[1] / "benchmarks" / "full_size"
PUBLISHED = {"gpt2-medium": 354.8, "gemma-2b": 2506.2, "phi-2": 2779.7, "pythia-1.4b": 1414.6}  # million parameters
CONTEXT = 48
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
COMMON: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
ROTARY = SMALL | COMMON | {"max_position_embeddings": CONTEXT}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=CONTEXT, **COMMON),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**ROTARY),
    "phi": lambda: transformers.PhiConfig(**ROTARY),
    "gemma": lambda: transformers.GemmaConfig(**ROTARY, num_key_value_heads=1, head_dim=16),
    "llama": lambda: transformers.LlamaConfig(**ROTARY, num_key_value_heads=1),
}


def spec_of(folder: Path, **changes: Any) -> ModelSpec:
    return ModelSpec(path=str(folder), weights="random", **changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders with nothing but config.json."""
    root = tmp_path_factory.mktemp("configurations")
    for name, config in CONFIGS.items():
        config().save_pretrained(root / name)
        assert [file.name for file in (root / name).iterdir()] == ["config.json"]
    return {name: root / name for name in CONFIGS}


@pytest.fixture(params=CONFIGS)
def family(request) -> str:
    return request.param


def ids(num_rows: int = 2, length: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (num_rows, length))


def weights_of(model: LanguageModel) -> dict[str, torch.Tensor]:
    return dict(model.hf.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_activations_and_logits_are_sane(folders, family, dtype):
    model = open_model(spec_of(folders[family], dtype=dtype))
    assert model.hf.dtype == getattr(torch, dtype) and not model.hf.training
    output = model.run(model.inputs(ids()), capture=range(3))
    assert output.logits is not None and output.logits.isfinite().all() and output.logits.std() > 0
    for residual in output.residuals.values():
        assert residual.dtype == getattr(torch, dtype)
        assert 0.005 < float(residual.float().std()) < 100
        assert torch.unique(residual[0].float(), dim=0).shape[0] == 16  # every token its own


@torch.no_grad()
def test_weights_are_those_of_the_architectures_rules(folders, family):
    """Parameter by parameter against the slow way: the same constants, the same spread; and the same buffers."""
    model = open_model(spec_of(folders[family]))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folders[family])
    expected = transformers.AutoModelForCausalLM.from_config(config)
    found = dict(model.hf.named_parameters())
    assert set(found) == {name for name, _ in expected.named_parameters()}  # tied ones are one
    for name, parameter in expected.named_parameters():
        assert found[name].shape == parameter.shape
        if parameter.min() == parameter.max():
            assert torch.equal(found[name], parameter), name
        else:
            torch.testing.assert_close(found[name].std(), parameter.std(), rtol=0.15, atol=0)
            assert abs(float(found[name].mean())) < 0.2 * float(parameter.std()), name
    buffers = dict(model.hf.named_buffers())
    assert set(buffers) == {name for name, _ in expected.named_buffers()}
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert (model.family.scale_of_norm(model.structure.final_norm) == 1).all()


def test_a_name_has_its_own_weights(folders):
    once, again, other = (weights_of(open_model(spec_of(folders["phi"], name=name))) for name in ("a", "a", "b"))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["lm_head.weight"], other["lm_head.weight"])


def test_the_random_state_of_others_is_left_alone(folders):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    open_model(spec_of(folders["gemma"]))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_pooled_numbers_are_normal_and_rows_differ():
    with _PooledNormal(0):
        matrix = torch.empty(2 * POOL // 1024, 1024).normal_(0.5, 2.0)
    assert abs(float(matrix.mean()) - 0.5) < 0.01 and abs(float(matrix.std()) - 2) < 0.01
    assert torch.unique(matrix[:, :4], dim=0).shape[0] == len(matrix)
    rows = (matrix[:: POOL // 1024 // 3] - 0.5) / 2
    correlations = rows @ rows.T / 1024
    assert float((correlations - torch.diag(correlations.diag())).abs().max()) < 0.2
    assert float(torch.linalg.svdvals((matrix[:2048] - 0.5) / 2)[-1]) > 8  # a normal matrix of this shape: about 13


def test_rules_that_leave_something_undefined_are_refused(monkeypatch):
    config = CONFIGS["phi"]()
    monkeypatch.setattr(transformers.PhiForCausalLM, "_init_weights", lambda self, module: None)
    with pytest.raises(InputError, match="'phi' cannot have random weights: its rules leave .* undefined"):
        build_random(config, name="x", dtype=torch.float32, attn_implementation=None, device="cpu")


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_is_the_published_size(name):
    config = transformers.AutoConfig.from_pretrained(FULL_SIZE / name)
    with torch.device("meta"):
        hf = transformers.AutoModelForCausalLM.from_config(config)
    hf.tie_weights()
    parameters = list(hf.parameters())
    assert all(parameter.is_meta for parameter in parameters)
    assert round(sum(parameter.numel() for parameter in parameters) / 1e6, 1) == PUBLISHED[name]
    depth = {"gpt2-medium": 24, "gemma-2b": 18, "phi-2": 32, "pythia-1.4b": 24}[name]
    context = {"gpt2-medium": 1024, "gemma-2b": 8192}.get(name, 2048)
    width = {"gpt2-medium": 1024, "phi-2": 2560}.get(name, 2048)
    assert check_model(spec_of(FULL_SIZE / name)) == (depth, context, width)


@pytest.mark.parametrize(("name", "rotated"), [("phi-2", 32), ("pythia-1.4b", 32), ("gemma-2b", 256)])
def test_rotary_share_is_read(name, rotated):
    """Dimensions of a head that are rotated: the configurations use an older spelling for it."""
    config = transformers.AutoConfig.from_pretrained(FULL_SIZE / name, num_hidden_layers=1)
    with torch.device("meta"):
        hf = transformers.AutoModelForCausalLM.from_config(config)
    assert {2 * len(buffer) for path, buffer in hf.named_buffers() if path.endswith("inv_freq")} == {rotated}


# ---- tokens without a tokenizer


@pytest.mark.parametrize("text", ["", "What is 15 + 27?", " né\n\t\x00", "日本 🦊"])
def test_bytes_as_tokens(text):
    tokenizer = byte_tokenizer(257)
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded["input_ids"] == list(text.encode())
    assert tokenizer.decode(encoded["input_ids"]) == text
    assert "".join(text[a:b] for a, b in dict.fromkeys(map(tuple, encoded["offset_mapping"]))) == text
    assert (tokenizer.eos_token_id, len(tokenizer), tokenizer.is_fast) == (256, 257, True)


def test_a_vocabulary_too_small_for_bytes(folders, tmp_path):
    folder = Path(shutil.copytree(folders["phi"], tmp_path / "small"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    with pytest.raises(
        InputError, match=r"a vocabulary of 256 has no room for 256 bytes .*; put a tokenizer.json beside"
    ):
        check_model(spec_of(folder))


# ---- folders


def test_trained_weights_are_left_unread_and_that_is_said():
    said: list[str] = []
    spec = ModelSpec(path="zoo/phi", weights="random")
    model, trained = open_model(spec, say=said.append), open_model(ModelSpec(path="zoo/phi"))
    assert model.name == "zoo/phi (random weights)"
    assert said == [
        "zoo/phi (random weights): its trained weights are not read; speed and memory are real, "
        "all that is learned from it is not"
    ]
    assert model.tokenizer.encode("15 + 27") == trained.tokenizer.encode("15 + 27")  # its own tokenizer is kept
    assert not torch.equal(model.hf.get_output_embeddings().weight, trained.hf.get_output_embeddings().weight)


def test_a_configuration_alone(folders):
    said: list[str] = []
    spec = spec_of(folders["gpt2"])
    open_model(spec, say=said.append)
    assert said[0].startswith("gpt2 (random weights): only its architecture is read; its tokens are bytes")
    assert check_model(spec).context == CONTEXT and read_tokenizer(spec).eos_token_id == 256
    with pytest.raises(InputError, match="layer 3 asked of gpt2 .random weights., which has layers 0-2"):
        check_model(spec_of(folders["gpt2"], layers=[3]))
    with pytest.raises(InputError, match=r"no weights \(\*.safetensors\); to measure .*, set weights: random"):
        check_model(ModelSpec(path=str(folders["gpt2"])))


def test_remote_code_is_refused_here_too(folders, tmp_path):
    folder = Path(shutil.copytree(folders["gpt2"], tmp_path / "own"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(InputError, match="brings its own code"):
        open_model(spec_of(folder))


# ---- the name says it


def test_the_name_says_it_once():
    models = [
        {"path": "zoo/phi"},
        {"path": "zoo/phi", "weights": "random"},
        {"path": "zoo/gpt2", "weights": "random", "name": "x"},
    ]
    study = parse_study({"name": "s", "models": models, "data": {"path": "zoo/arithmetic"}})
    names = ["zoo/phi", "zoo/phi (random weights)", "x (random weights)"]
    assert [m.name for m in study.models] == names
    again = parse_study(yaml.safe_load(dump_study(study)))
    assert [m.name for m in again.models] == names and again == study
    with pytest.raises(InputError, match=r"models.0: a model of trained weights is named 'x \(random weights\)'"):
        parse_study({"name": "s", "models": [{"path": "zoo/phi", "name": names[2]}], "data": {"path": "t.txt"}})


def test_every_output_says_so(folders, tmp_path, capsys):
    name = "phi (random weights)"
    study = {
        "name": "random",
        "models": [{"path": str(folders["phi"]), "weights": "random", "dtype": "bfloat16", "layers": [0, 2]}],
        "data": {"path": "zoo/arithmetic", "context": 48},
        "dictionary": {"d_sae": 64, "k": 4},
        "training": {"tokens": 2048, "batch_tokens": 256},
        "evaluation": {"tokens": 1000, "spliced_tokens": 200, "sample_tokens": 500},
        "transfer": {"metrics": ["reconstruction"]},
        "trace": {"prompts": ["What is 1 + 2?"]},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    run = tmp_path / "run"
    assert load_study(tmp_path / "study.yaml").model("phi (random weights)").weights == "random"

    def command(*arguments: object) -> str:
        with pytest.raises(SystemExit):
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return out + err

    news = command("run", tmp_path / "study.yaml", "--out", run, "--force")
    assert f"{name}: only its architecture is read" in news
    assert f"{name}: step 8/8" in news and f"evaluating {name}" in news
    assert json.loads((run / "run.json").read_text())["random_weights"] == [name]
    assert api.status(run)["random_weights"] == [name] and list(api.status(run)["models"]) == [name]
    for shown in (
        command("status", run),
        command("evaluate", run),
        command("transfer", run, "--force"),
        command("trace", run, "What is 3 + 4?", "--force"),
        command("trace", run, "What is 3 + 4?", "--force", "--json"),
        (run / "report" / "index.html").read_text(),
        *(path.read_text() for path in run.glob("models/*/layer_*/cfg.json")),
        *(path.read_text() for path in run.glob("models/*/layer_*/quality.json")),
    ):
        assert name in shown, shown[:300]
    assert (
        json.loads((run / "models/phi-random-weights-/layer_02/cfg.json").read_text())["metadata"]["model_name"] == name
    )
