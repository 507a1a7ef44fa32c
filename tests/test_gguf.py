"""Models in GGUF: what is opened is the model that was written, once; what cannot be opened is said in one line."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from throughline import gguf_models
from throughline.errors import InputError
from throughline.models import check_model, open_model
from throughline.study import ModelSpec
from throughline.zoo.vocabularies import build_tokenizer

gguf = pytest.importorskip("gguf")
Q8 = gguf.GGMLQuantizationType.Q8_0
HEADS, KV_HEADS, WIDTH, INNER, LAYERS, CONTEXT = 2, 1, 32, 64, 2, 64


def make_llama(vocab_size: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def interleaved(weight: torch.Tensor, heads: int) -> np.ndarray:
    """Rows of queries and keys as llama.cpp has them: the two halves of a head's rotation beside each other."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns).numpy()


def write(path: Path, hf: transformers.LlamaForCausalLM, tokenizer: Any, rounded: bool = False) -> None:
    """The MLPs' weights as 8-bit numbers, if they are to be rounded."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(hf.config.rms_norm_eps)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(hf.config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    special = set(tokenizer.all_special_ids)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens))]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    state = {name: tensor.detach() for name, tensor in hf.state_dict().items()}
    plain = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    for n in range(LAYERS):
        theirs = f"model.layers.{n}."
        for name, short in plain.items():
            weight = state[f"{theirs}{name}.weight"].numpy()
            if rounded and name.startswith("mlp"):
                weight, kind = gguf.quants.quantize(weight, Q8), Q8
            else:
                kind = None
            writer.add_tensor(f"blk.{n}.{short}.weight", weight, raw_dtype=kind)
        for name, short, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS)):
            rows = interleaved(state[f"{theirs}self_attn.{name}.weight"], heads)
            writer.add_tensor(f"blk.{n}.{short}.weight", np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    tokenizer = build_tokenizer("pythia")
    hf = make_llama(len(tokenizer))
    folder = tmp_path_factory.mktemp("gguf")
    write(folder / "tiny.gguf", hf, tokenizer)
    return folder, hf


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "throughline" / "gguf"


def test_it_is_the_model_that_was_written_and_is_read_once(written, cache, monkeypatch, capfd):
    """By its file, by the folder that holds it, and in a Python package."""
    folder, hf = written
    monkeypatch.setattr(gguf_models, "locate", lambda path: str(folder) if path == "package:tiny" else path)
    ids, seen = torch.arange(1, 40)[None], {}
    for number, path in enumerate((str(folder / "tiny.gguf"), str(folder), "package:tiny")):
        model = open_model(ModelSpec(path=path, name="tiny"))
        assert (model.num_layers, model.d_model) == (LAYERS, WIDTH)
        found = model.run(model.inputs(ids)).logits
        assert found is not None
        torch.testing.assert_close(found, hf(ids).logits, rtol=1e-4, atol=1e-5)
        assert ("tiny.gguf: its tensors" in capfd.readouterr().err) == (number == 0)
        [made] = cache.iterdir()
        times = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
        assert seen == (times if number else {})
        seen = times
        assert gguf_models.quantization_of(made) is None  # nothing was rounded
    (made / gguf_models.QUANTIZATION).write_text('{"F32": 9, "Q4_1": 7, "Q8_0": 1}')
    assert gguf_models.quantization_of(made) == "Q4_1"  # what most of them were


def test_rounded_weights_are_read_and_said(written, cache, tmp_path):
    _, hf = written
    write(tmp_path / "rounded.gguf", hf, build_tokenizer("pythia"), rounded=True)
    said: list[str] = []
    model = open_model(ModelSpec(path=str(tmp_path / "rounded.gguf"), name="tiny"), say=said.append)
    assert said == ["tiny: its weights were rounded to Q8_0 before they came here"]
    expected, ids = copy.deepcopy(hf), torch.arange(1, 40)[None]
    for name, weight in expected.named_parameters():
        if ".mlp." in name:
            blocks = gguf.quants.quantize(weight.detach().numpy(), Q8)
            weight.data = torch.from_numpy(gguf.quants.dequantize(blocks, Q8))
    found = model.run(model.inputs(ids)).logits
    assert found is not None
    torch.testing.assert_close(found, expected(ids).logits, rtol=1e-4, atol=1e-5)
    assert (found - hf(ids).logits).abs().max() > 1e-4  # rounding is seen


def test_its_architecture_with_random_weights(written, cache):
    folder, hf = written
    model = open_model(ModelSpec(path=str(folder / "tiny.gguf"), name="tiny", weights="random"))
    assert (model.num_layers, model.d_model) == (LAYERS, WIDTH)
    assert not torch.equal(model.hf.lm_head.weight, hf.lm_head.weight)


def test_a_folder_that_another_process_finished_first_stays(written, cache, monkeypatch):
    folder, _ = written
    out, run = gguf_models._folder_of(folder / "tiny.gguf"), gguf_models.subprocess.run

    def slower(*arguments: Any, **options: Any) -> Any:
        done = run(*arguments, **options)
        out.mkdir(parents=True)
        (out / gguf_models.QUANTIZATION).write_text("{}")
        return done

    monkeypatch.setattr(gguf_models.subprocess, "run", slower)
    assert gguf_models.unpack(folder / "tiny.gguf") == out
    assert [file.name for file in out.iterdir()] == [gguf_models.QUANTIZATION] and list(cache.iterdir()) == [out]


def test_a_conversion_that_is_killed_is_named_and_leaves_nothing(written, cache, monkeypatch):
    folder, _ = written
    kill = "import os, sys; os.makedirs(sys.argv[2]); os.kill(os.getpid(), 9)"
    run = gguf_models.subprocess.run

    def killed(command: list[str], **options: Any) -> Any:
        return run([*command[:2], kill, *command[3:]], **options)

    monkeypatch.setattr(gguf_models.subprocess, "run", killed)
    with pytest.raises(
        InputError, match="signal 9 ended the process that read it; as float32 its weights may be too large"
    ):
        gguf_models.unpack(folder / "tiny.gguf")
    assert not list(cache.iterdir())


def test_what_cannot_be_opened_is_said_in_one_line(written, cache, tmp_path):
    folder, _ = written
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((folder / "tiny.gguf").read_bytes()[:1000])
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (two / name).write_bytes(b"")
    for path, words in (
        (str(cut), r"cut.gguf cannot be read: "),
        (str(two), r"has 2 GGUF files \(a.gguf, b.gguf\); give the path of one of them"),
        ("package:no_such_package", r"needs the Python package no_such_package: pip install no-such-package"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            check_model(ModelSpec(path=path, name="x"))
        assert "\n" not in str(caught.value)
    assert not list(cache.glob("*")) if cache.exists() else True
