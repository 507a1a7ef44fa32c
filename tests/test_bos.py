"""BOS in front of a text, or not: the tokenizer is made to do it, and everything that reads text follows."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from throughline.errors import InputError
from throughline.models import open_model, read_tokenizer
from throughline.models.bos import adds_bos, bos_token, set_bos_
from throughline.records import Document
from throughline.study import ModelSpec
from throughline.tokens import collect_rows, encode_prompt

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FAMILIES = ("tokenizers/gpt2", "tokenizers/phi-2", "tokenizers/pythia", "stories260K")
TEXT = "Tom has 15 apples.\nHe eats  two of them — naïvely."


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(SHARED / family)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_and_without(family):
    """The text's own tokens and the characters they cover are the same in all three; `always` and `never` say what they do."""
    plain = tokenizer_of(family)
    alone = plain(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    bos = plain.convert_tokens_to_ids(bos_token(plain))
    for wanted in ("auto", "always", "never"):
        tokenizer = tokenizer_of(family)
        set_bos_(tokenizer, wanted, family)
        found = tokenizer(TEXT, return_offsets_mapping=True)
        begins = wanted == "always" or (wanted == "auto" and adds_bos(plain))
        assert adds_bos(tokenizer) == begins
        start = int(begins)
        assert found["input_ids"][:start] == [bos][:start]
        assert found["input_ids"][start:] == alone["input_ids"]
        assert found["offset_mapping"][start:] == alone["offset_mapping"]
        set_bos_(tokenizer, wanted, family)  # twice does no more
        assert tokenizer(TEXT)["input_ids"] == found["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_begins_with_bos_gets_no_second_one(family):
    tokenizer = tokenizer_of(family)
    set_bos_(tokenizer, "always", family)
    bos = str(bos_token(tokenizer))
    assert [t.id for t in encode_prompt(tokenizer, bos + TEXT)] == [t.id for t in encode_prompt(tokenizer, TEXT)]
    rows, twice = (collect_rows([Document(text=text)], tokenizer, 64) for text in (TEXT, bos + TEXT))
    assert (rows.ids == twice.ids).all() and (rows.special == twice.special).all()


def test_every_piece_of_a_long_text_begins_with_it():
    tokenizer = tokenizer_of("tokenizers/gpt2")
    set_bos_(tokenizer, "always", "gpt2")
    rows = collect_rows([Document(text=TEXT * 20)], tokenizer, 32)
    begins = rows.positions == 0
    real = rows.pieces >= 0
    assert (rows.ids[begins & real] == tokenizer.eos_token_id).all() and rows.special[begins & real].all()
    assert (begins & real).sum() > 5


def test_a_model_is_opened_with_it():
    spec = ModelSpec(path="zoo/gpt2")
    with_it, without = (open_model(spec, bos=bos).tokenizer for bos in ("always", "never"))
    assert adds_bos(with_it) and not adds_bos(without)
    assert adds_bos(read_tokenizer(spec, "always")) and not adds_bos(read_tokenizer(spec, "never"))


def test_always_needs_a_token_for_it(tmp_path):
    tokenizer = tokenizer_of("tokenizers/gpt2")
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("bos_token", "eos_token", "unk_token")}
    path.write_text(
        json.dumps(kept | {"bos_token": None, "eos_token": None, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    bare = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="neither BOS nor an end of text; set auto"):
        set_bos_(bare, "always", "bare")
