"""Language models: the stream captured and edited is the real one, in every family, alone and packed."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from throughline.errors import InputError
from throughline.models import FAMILIES, LanguageModel, ModelOutput, open_model
from throughline.models.attention import NAME
from throughline.models.gelu import TanhGELU
from throughline.models.structure import find_blocks, find_final_norm, norm_follows
from throughline.study import ModelSpec
from throughline.zoo.vocabularies import build_tokenizer

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260K"
CONTEXT = 64
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
}
GATED: dict[str, Any] = SMALL | {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=CONTEXT),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, intermediate_size=64),
    "phi": lambda: transformers.PhiConfig(**SMALL, intermediate_size=64),
    "gemma": lambda: transformers.GemmaConfig(**GATED),
    "gemma2": lambda: transformers.Gemma2Config(**GATED, query_pre_attn_scalar=16, sliding_window=8),
    "llama": lambda: transformers.LlamaConfig(**GATED),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, intermediate_size=64, num_key_value_heads=1),
    "mistral": lambda: transformers.MistralConfig(**GATED, sliding_window=8),
}


def save_model(folder: Path, config: transformers.PreTrainedConfig, tokenizer=None) -> Path:
    """A model with random weights, larger than by default so that attention matters, and norms not all ones."""
    torch.manual_seed(0)
    tokenizer = tokenizer or build_tokenizer("pythia")
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = len(tokenizer), 0, 0, None
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.3))
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer("pythia")


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, config(), tokenizer) for name, config in CONFIGS.items()}


@pytest.fixture(scope="session", params=CONFIGS)
def model(request, folders) -> LanguageModel:
    return open_model(ModelSpec(path=str(folders[request.param])))


@pytest.fixture(scope="session")
def gpt2(folders) -> LanguageModel:
    return open_model(ModelSpec(path=str(folders["gpt2"])))


@pytest.fixture
def broken(folders, tmp_path) -> Path:
    """A copy of the gpt2 folder to spoil."""
    return Path(shutil.copytree(folders["gpt2"], tmp_path / "broken"))


def random_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 300, (rows, length))


def logits_of(output: ModelOutput) -> Tensor:
    assert output.logits is not None
    return output.logits


def num_hooks(model: LanguageModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules())


def test_every_family_file_is_tested():
    assert set(FAMILIES.built_in) == set(CONFIGS)


def test_facts(model):
    assert (model.num_layers, model.d_model, model.context) == (3, 32, CONTEXT)
    assert model.vocab_size == len(model.tokenizer)
    assert model.layers("all") == [0, 1, 2] and model.layers([2, 0, 2]) == [0, 2]
    assert not model.hf.training and not any(p.requires_grad for p in model.hf.parameters())
    assert model.hf.get_submodule(model.module_path(1)) is model.structure.blocks[1]


@torch.no_grad()
def test_capture_is_the_residual_stream(model):
    inputs = model.inputs(random_ids(2, 12))
    assert inputs.mask is None and inputs.positions is None
    bare = model.run(inputs)
    output = model.run(inputs, capture=range(3))
    assert torch.equal(logits_of(bare), logits_of(output))
    assert bare.residuals == {} and logits_of(output).dtype == torch.float32
    logits = model.structure.unembedding(model.structure.final_norm(output.residuals[2]))
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    torch.testing.assert_close(cap * torch.tanh(logits / cap) if cap else logits, logits_of(output))
    assert num_hooks(model) == 0
    torch.testing.assert_close(logits_of(model.run(inputs, last_only=True)), logits_of(bare)[:, -1:])
    reference = open_model(ModelSpec(path=model.hf.config._name_or_path)).hf(inputs.ids, output_hidden_states=True)
    for layer in (0, 1):
        assert torch.equal(output.residuals[layer], reference.hidden_states[layer + 1])


@torch.no_grad()
def test_early_exit_skips_later_blocks(model):
    inputs, calls = model.inputs(random_ids(1, 6)), []
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(model.structure.blocks)
    ]
    try:
        output = model.run(inputs, capture=[0, 1], logits=False)
        assert calls == [0, 1] and output.logits is None and set(output.residuals) == {0, 1}
        calls.clear()
        assert model.run(inputs, logits=False) == (None, {}) and calls == []
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(output.residuals[1], model.run(inputs, capture=[1]).residuals[1])


class Patched(nn.Module):
    """A block with something done to its output, as an oracle for hooks."""

    def __init__(self, block: nn.Module, edit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.edit = block, edit

    def __getattr__(self, name: str):
        return super().__getattr__(name) if name == "block" else getattr(self.block, name)

    def forward(self, *args, **options) -> Tensor:
        return self.__dict__["edit"](self.block(*args, **options))


@torch.no_grad()
def test_edits(model):
    inputs = model.inputs(random_ids(2, 8))
    bare = model.run(inputs, capture=[2])
    same = model.run(inputs, edits={0: lambda x: x, 1: torch.clone})
    assert torch.equal(logits_of(bare), logits_of(same))
    zeroed = model.run(inputs, edits={1: torch.zeros_like}, capture=[1, 2])
    assert not zeroed.residuals[1].any() and not torch.allclose(zeroed.residuals[2], bare.residuals[2])
    assert not torch.allclose(logits_of(zeroed), logits_of(bare))

    def edit(x: Tensor) -> Tensor:
        return x.flip(-1) * 0.7

    edited = model.run(inputs, edits={1: edit}, capture=[1, 2])
    with model.editing(1, edit):
        assert torch.equal(model.hf(inputs.ids).logits.float(), logits_of(edited))
        assert torch.equal(model.run(inputs, capture=[1]).residuals[1], edited.residuals[1])
    assert torch.equal(logits_of(model.run(inputs)), logits_of(bare))
    block = model.structure.blocks[1]
    model.structure.blocks[1] = Patched(block, edit)
    try:
        assert torch.equal(logits_of(model.run(inputs)), logits_of(edited))
    finally:
        model.structure.blocks[1] = block


def test_hooks_are_gone_after_an_exception(model):
    def fail(_x: Tensor) -> Tensor:
        raise ZeroDivisionError

    inputs = model.inputs(random_ids(1, 4))
    with pytest.raises(ZeroDivisionError):
        model.run(inputs, capture=[0, 2], edits={1: fail})
    assert num_hooks(model) == 0
    with pytest.raises(InputError, match="has layers 0-2"):
        model.run(inputs, capture=[0, 3])
    assert num_hooks(model) == 0


@pytest.mark.parametrize("position", [1, 9, 17])
def test_copies_that_differ_late_need_not_begin_at_the_start(model, position):
    """Longer than the windows of gemma2 and mistral, which are of 8 tokens."""
    ids = random_ids(1, 18)
    past, late = model.remember(ids[0].tolist()).before(position), torch.as_tensor(ids)[:, position:].repeat(3, 1)
    whole = model.inputs(torch.as_tensor(ids).repeat(3, 1))
    step = torch.randn(3, 18 - position, model.d_model, generator=torch.Generator().manual_seed(1))

    def edit(x: Tensor) -> Tensor:
        return torch.cat([x[:, : x.shape[1] - step.shape[1]], x[:, -step.shape[1] :] + step], dim=1)

    with torch.no_grad():
        wanted = model.run(whole, capture=[2], edits={0: edit})
        start = model.run(whole, capture=[0], edits={0: edit}).residuals[0][:, position:]
        found = model.run(model.inputs(late), capture=[2], edits={0: lambda x: x + step}, past=past)
        again = model.after(0).run(model.inputs(late), capture=[2], edits={0: lambda _: start}, past=past)
    for one in (found, again):
        torch.testing.assert_close(logits_of(one), logits_of(wanted)[:, position:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.residuals[2], wanted.residuals[2][:, position:], rtol=1e-4, atol=1e-4)


def test_gradient_is_the_effect_of_a_small_edit(model):
    inputs = model.inputs(random_ids(1, 6))
    leaf = model.run(inputs, capture=[0]).residuals[0].detach().requires_grad_()
    assert torch.is_grad_enabled()
    logits_of(model.run(inputs, edits={0: lambda _: leaf}))[0, -1, 7].backward()
    assert leaf.grad is not None
    step = 1e-2 * leaf.grad / leaf.grad.norm()
    with torch.no_grad():
        up, down = (logits_of(model.run(inputs, edits={0: lambda x, s=s: x + s * step}))[0, -1, 7] for s in (1, -1))
    torch.testing.assert_close((up - down) / 2, (step * leaf.grad).sum(), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_texts_are_as_alone(model, implementation):
    if model.family.attn_implementation not in (None, implementation):
        assert model.hf.config._attn_implementation == model.family.attn_implementation
        return
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation(implementation)
    texts = [random_ids(1, length, seed) for seed, length in enumerate((5, 3, 8, 2))]
    pieces = np.array([[0] * 5 + [1] * 3 + [-1, -1], [0] * 8 + [3] * 2])
    ids = np.array([[*texts[0][0], *texts[1][0], 0, 0], [*texts[2][0], *texts[3][0]]])
    inputs = model.inputs(ids, pieces=pieces)
    assert inputs.mask is not None and inputs.mask.shape == (2, 1, 10, 10) and inputs.positions is not None
    assert inputs.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 0], [*range(8), 0, 1]]
    packed = model.run(inputs, capture=range(3))
    for text, (row, start) in zip(texts, ((0, 0), (0, 5), (1, 0), (1, 8)), strict=True):
        alone, where = model.run(model.inputs(text), capture=range(3)), slice(start, start + text.shape[1])
        for layer in range(3):
            torch.testing.assert_close(
                packed.residuals[layer][row, where], alone.residuals[layer][0], rtol=0, atol=1e-5
            )
        torch.testing.assert_close(logits_of(packed)[row, where], logits_of(alone)[0], rtol=1e-5, atol=1e-5)
    model.hf.set_attn_implementation(before)


def test_fast_path(gpt2):
    ids, pieces = random_ids(2, 6), np.array([[0] * 6, [4] * 4 + [-1] * 2])
    positions = np.array([[*range(6)], [*range(4), 0, 0]])
    assert gpt2.inputs(ids, positions, pieces)[1:] == (None, None)
    assert gpt2.inputs(torch.tensor(ids), torch.arange(6).expand(2, 6))[1:] == (None, None)
    in_front = gpt2.inputs(ids, pieces=np.array([[-1] + [0] * 5] * 2))
    assert in_front.mask is not None and in_front.positions is not None
    assert in_front.positions[0].tolist() == [0, 0, 1, 2, 3, 4]
    shifted = gpt2.inputs(ids, positions=np.arange(3, 9)[None].repeat(2, 0))
    assert shifted.mask is not None and shifted.mask[0, 0, 2].tolist()[:3] == [0, 0, 0]
    assert (shifted.mask[0, 0, 2, 3:] < -1e30).all()


@torch.no_grad()
def test_packed_rows_may_be_longer_than_the_context(gpt2):
    ids = random_ids(1, 2 * CONTEXT)
    packed = gpt2.run(gpt2.inputs(ids, pieces=np.arange(2 * CONTEXT)[None] // CONTEXT), capture=[2])
    alone = gpt2.run(gpt2.inputs(ids[:, CONTEXT:]), capture=[2])
    torch.testing.assert_close(packed.residuals[2][:, CONTEXT:], alone.residuals[2], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="a text of 65 tokens was given to gpt2, whose context is 64"):
        gpt2.inputs(random_ids(1, CONTEXT + 1))


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
@torch.no_grad()
def test_windows(folders, name):
    model = open_model(ModelSpec(path=str(folders[name])))
    ids = random_ids(1, 12)
    model.run(model.inputs(ids))  # unpacked, the model applies its window of 8 itself
    with pytest.raises(InputError, match=rf"a packed text of 9 tokens was given to {name}, whose layers see 8 at once"):
        model.inputs(ids, pieces=np.array([[0] * 9 + [1] * 3]))


@torch.no_grad()
def test_unembedding_predicts_linear_steps(model):
    """With the norm frozen, a step of the stream changes the centred logits by unembedding @ step / divisor."""
    stream = torch.randn(32) * 3
    step = torch.randn(32)
    centres = model.family.centres
    frozen = (stream.var(unbiased=False) if centres else stream.square().mean()).sqrt()

    def logits(x: Tensor) -> Tensor:
        centred = x - x.mean() if centres else x
        scaled = centred / frozen * model.family.scale_of_norm(model.structure.final_norm)
        bias = getattr(model.structure.final_norm, "bias", None)
        return model.structure.unembedding(scaled if bias is None else scaled + bias)

    torch.testing.assert_close(
        logits(stream),
        model.structure.unembedding(model.structure.final_norm(stream[None, None])[0, 0]),
        rtol=1e-3,
        atol=1e-3,
    )
    W_VD = model.unembedding()
    assert W_VD.shape == (model.vocab_size, 32) and W_VD.dtype == torch.float32
    change = logits(stream + step) - logits(stream)
    torch.testing.assert_close(W_VD @ step / frozen, change - change.mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(W_VD.mean(0), torch.zeros(32), rtol=0, atol=1e-5)
    if centres:
        torch.testing.assert_close(W_VD.mean(1), torch.zeros(len(W_VD)), rtol=0, atol=1e-5)


def test_scale_of_norm_is_what_the_norm_does(model):
    norm, family = model.structure.final_norm, model.family
    assert norm_follows(norm, family.centres, family.scale_of_norm)
    assert not norm_follows(norm, not family.centres, family.scale_of_norm)


def test_generate_is_greedy(model):
    ids = random_ids(1, 5, seed=3)[0].tolist()
    expected = model.hf.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False, pad_token_id=0)[
        0, 5:
    ].tolist()
    assert model.generate(ids, 10) == (expected[: expected.index(0)] if 0 in expected else expected)


def test_generate_stops(gpt2):
    ids = random_ids(1, CONTEXT - 2)[0].tolist()
    assert len(gpt2.generate(ids, 10)) <= 3
    with pytest.raises(InputError, match="whose context is 64"):
        gpt2.generate(random_ids(1, CONTEXT + 1)[0].tolist(), 10)
    with pytest.raises(InputError, match="a text without tokens was given to gpt2"):
        gpt2.generate([], 10)
    with gpt2.editing(2, torch.zeros_like):  # the same token wins everywhere
        first = gpt2.generate(ids[:4], 3)
    assert len(set(first)) == 1 and len(first) == 3
    gpt2.tokenizer.eos_token_id, before = first[0], gpt2.tokenizer.eos_token_id
    with gpt2.editing(2, torch.zeros_like):
        assert gpt2.generate(ids[:4], 3) == []
    gpt2.tokenizer.eos_token_id = before


def test_dtype(folders):
    model = open_model(ModelSpec(path=str(folders["llama"]), dtype="bfloat16"))
    inputs = model.inputs(random_ids(1, 6), pieces=np.array([[0, 0, 0, 1, 1, 1]]))
    output = model.run(inputs, capture=[1], edits={1: lambda x: x.float()})
    assert output.residuals[1].dtype == torch.bfloat16 and logits_of(output).dtype == torch.float32
    assert model.unembedding().dtype == torch.float32


@torch.no_grad()
def test_family_without_a_file(tmp_path, tokenizer):
    stablelm = transformers.StableLmConfig(**SMALL, intermediate_size=64, num_key_value_heads=2)
    model = open_model(ModelSpec(path=str(save_model(tmp_path / "stablelm", stablelm, tokenizer))))
    assert model.family.centres and "stablelm" in model.family.note
    gemma3 = transformers.Gemma3TextConfig(**GATED, query_pre_attn_scalar=16)
    model = open_model(ModelSpec(path=str(save_model(tmp_path / "gemma3", gemma3, tokenizer))))
    assert not model.family.centres and norm_follows(model.structure.final_norm, False, model.family.scale_of_norm)
    mamba = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(
        InputError, match=r"'mamba' takes no .*position_ids; a file beside .*gpt2, gpt_neox.* can describe"
    ):
        open_model(ModelSpec(path=str(save_model(tmp_path / "mamba", mamba, tokenizer))))


def test_structure_errors():
    twins = nn.Module()
    twins.a = nn.ModuleList([nn.Linear(1, 1)] * 2)
    with pytest.raises(InputError, match=r"one list of 3 blocks; lists found: a \(2\)"):
        find_blocks(twins, 3)
    twins.b = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)] * 2)] * 2)
    with pytest.raises(InputError, match=r"lists found: a \(2\), b \(2\)"):
        find_blocks(twins, 2)
    del twins.a
    assert find_blocks(twins, 2)[0] == "b"
    with pytest.raises(InputError, match="one final norm after b, found nothing"):
        find_final_norm(twins, "b")


def test_tuple_blocks(gpt2):
    """Transformers 4 returned tuples."""
    seen = []

    class Returns(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x, "rest"

    block, blocks = gpt2.structure.blocks[0], gpt2.structure.blocks
    blocks[0] = Returns()
    try:
        with gpt2.editing(0, lambda x: seen.append(x) or x + 1):
            assert blocks[0](torch.ones(1, 1, 2))[1] == "rest"
            assert blocks[0](torch.ones(1, 1, 2))[0].tolist() == [[[2, 2]]]
    finally:
        blocks[0] = block
    assert len(seen) == 2


def fails(path: Path | str, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        open_model(ModelSpec(path=str(path)))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_layer_out_of_range(gpt2):
    with pytest.raises(InputError, match="^layer 12 asked of gpt2, which has layers 0-2$"):
        gpt2.layers([1, 12])
    with pytest.raises(InputError, match="layer -1 asked of"):
        gpt2.module_path(-1)


def test_folders_that_are_not_models(broken, tmp_path):
    fails(tmp_path / "nowhere", "model folder .*nowhere does not exist; give a folder")
    fails("./nowhere", "model folder nowhere does not exist")
    fails("~/no-such-model", "does not exist")
    fails(tmp_path, "has no config.json, so it is not a Hugging Face model")
    (broken / "model.safetensors").rename(broken / "kept")
    fails(broken, r"has config.json but no weights \(\*.safetensors\)")
    (broken / "pytorch_model.bin").write_bytes(b"")
    fails(broken, r"pickled weights only \(pytorch_model.bin\).*convert to safetensors")
    (broken / "config.json").write_text("{")
    (broken / "kept").rename(broken / "model.safetensors")
    fails(broken, "cannot be opened: .*not a valid JSON")


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_remote_code_is_refused(broken):
    (broken / "evil.py").write_text("raise SystemExit('remote code ran')")
    change_config(broken, auto_map={"AutoModelForCausalLM": "evil.Model"})
    fails(broken, r"brings its own code \(auto_map in config.json\) and remote code is off")


def test_not_a_causal_model(broken):
    change_config(broken, architectures=["GPT2ForSequenceClassification"])
    fails(broken, r"not a causal language model \(found GPT2ForSequenceClassification\)")
    change_config(broken, model_type="t5", architectures=None)
    fails(broken, r"not a causal language model \(found model type 't5'\)")
    change_config(broken, model_type="unheard_of")
    fails(broken, "found model type 'unheard_of'")


def test_damaged_weights(broken):
    change_config(broken, n_layer=4)
    fails(broken, "lack 12 tensors, such as transformer.h.3")
    change_config(broken, n_layer=3, vocab_size=7)
    fails(broken, "cannot be opened: ")
    change_config(broken, vocab_size=400)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    fails(broken, "cannot be opened: ")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_no_tokenizer(folders, tmp_path, name):
    folder = Path(shutil.copytree(folders[name], tmp_path / name))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    fails(folder, "has no tokenizer")


def test_hub_unreachable(monkeypatch):
    def refuse(*_args, **_options):
        raise socket.gaierror("tests reach no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("nobody/no-such-model", r"model nobody/no-such-model cannot be opened: .* a local folder works without")


def test_opening_is_silent(folders, capfd):
    level = transformers.logging.get_verbosity()
    open_model(ModelSpec(path=str(folders["gpt2"])))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    assert transformers.logging.get_verbosity() == level and transformers.logging.is_progress_bar_enabled()


@pytest.mark.skipif(not STORIES.is_dir(), reason="shared data folder with stories260K is not beside the checkout")
def test_a_real_model_tells_a_story():
    model = open_model(ModelSpec(path=str(STORIES)))
    assert (model.name, model.num_layers, model.d_model) == ("stories260K", 5, 64)
    told = model.tokenizer.decode(model.generate(model.tokenizer.encode("Once upon a time"), 60))
    assert "there was a little girl named" in told and "She" in told


def test_gelu_by_table_is_torch_s():
    """Every bfloat16 number, bit for bit; float32 and inputs that want a gradient take torch's own way."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    expected = torch.nn.functional.gelu(numbers, approximate="tanh")
    found = TanhGELU()(numbers.view(256, 256).T)
    assert torch.equal(found.T.reshape(-1).view(torch.int16), expected.view(torch.int16))
    x = torch.randn(5, requires_grad=True)
    TanhGELU()(x).sum().backward()
    assert x.grad is not None
    y = torch.randn(5).bfloat16().requires_grad_()
    TanhGELU()(y).sum().backward()
    assert y.grad is not None


def test_a_copy_in_bfloat16_attends_as_torch_does(model):
    """Packed and not: as far from float32 as with torch's own attention, within a fifth."""
    half, torch_s = model.in_dtype(torch.bfloat16), model.in_dtype(torch.bfloat16)
    before = model.hf.config._attn_implementation
    assert (half.hf.config._attn_implementation == NAME) == (before == "sdpa")
    torch_s.hf.set_attn_implementation(before)
    assert model.hf.config._attn_implementation == before
    ids, last = np.random.default_rng(0).integers(0, model.vocab_size, (2, 8)), model.num_layers - 1
    for pieces in (None, np.repeat(np.arange(2), 4)[None].repeat(2, 0)):
        exact, found, other = (
            m.run(m.inputs(ids, pieces=pieces), capture=[last], logits=False).residuals[last].float()
            for m in (model, half, torch_s)
        )
        error, usual = float((found - exact).norm()), float((other - exact).norm())
        assert 0 < error < 1.2 * usual
