"""Four tokenizers, trained on the generator's text, each imitating one family's way with words and numbers.

gpt2    byte-level BPE; every number to 198 is one token
phi     byte-level BPE with merges of its own: numbers of two digits are one token, longer ones and rare words are split
pythia  byte-level BPE; digits stand alone
gemma   SentencePiece style: "▁" for the space, byte fallback, digits stand alone, <bos> in front
"""

import json
from collections.abc import Callable, Iterator
from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from throughline.zoo.texts import sample_problems

NUM_TEXTS = 20_000
END = "<|endoftext|>"


def build_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of zoo model `name`, trained from scratch; the same each time."""
    return {"gpt2": _gpt2, "phi": _phi, "pythia": _pythia, "gemma": _gemma}[name]()


def _problem_texts(seed: int, keep: Callable[[int], bool] = lambda i: True) -> Iterator[str]:
    for i, document in enumerate(islice(sample_problems("train", seed), NUM_TEXTS)):
        if keep(i):
            yield document.text


def _train_byte_level(texts: Iterator[str], vocab_size: int, *before: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _wrap(tokenizer: Tokenizer, **specials: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, clean_up_tokenization_spaces=False, **specials
    )


def _gpt2() -> PreTrainedTokenizerFast:
    def texts() -> Iterator[str]:
        yield from _problem_texts(seed=1)
        for _ in range(200):
            yield "".join(f" {number}" for number in range(199))

    return _wrap(_train_byte_level(texts(), 640), eos_token=END, bos_token=END)


def _phi() -> PreTrainedTokenizerFast:
    """Two-digit numbers come from a list, since no longer number may be merged; words from the texts without numbers."""

    def texts() -> Iterator[str]:
        for text in _problem_texts(seed=2, keep=lambda i: i % 4 == 0):
            yield "".join(c for c in text if not c.isdigit())
        for _ in range(400):
            yield "".join(f" {number}" for number in range(100))

    return _wrap(_train_byte_level(texts(), 480), eos_token=END, bos_token=END)


def _pythia() -> PreTrainedTokenizerFast:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return _wrap(_train_byte_level(_problem_texts(seed=3), 400, digits), eos_token=END, bos_token=END)


def _gemma() -> PreTrainedTokenizerFast:
    """Byte tokens must be ordinary entries of the vocabulary (as special ones they would vanish on decoding), and the
    trainer knows no such entries: so the merges are trained first and the vocabulary is put together afterwards."""
    pieces = Regex(r"\d|▁?\p{L}+|▁|[^\p{L}\d▁]")
    spaces, split = normalizers.Replace(" ", "▁"), pre_tokenizers.Split(pieces, "isolated")
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = spaces, split
    trained.train_from_iterator(_problem_texts(seed=4), trainers.BpeTrainer(vocab_size=180, show_progress=False))
    learned = json.loads(trained.to_str())["model"]

    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    entries = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocab = {entry: i for i, entry in enumerate(entries)}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = spaces, split
    tokenizer.add_special_tokens(specials)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return _wrap(tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
