"""Small things that tests are made of: a model of random weights, rows of tokens, codes from matrices, text with facts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from throughline.codes import Codes
from throughline.dictionaries import Dictionary
from throughline.models import LanguageModel
from throughline.records import Document, Fact, role_of
from throughline.tokens import Piece, TokenRows, kind_of_text, pack

WORDS = ("red", "blue", "green", "sun", "moon", "7", "42", "+", "=", "sea", "sky", "tree")
CONTEXT = 24


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each of WORDS, divided at spaces; id 0 is the end of text."""
    vocabulary = {word: i for i, word in enumerate(("<end>", "<unknown>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>", clean_up_tokenization_spaces=False
    )


def tiny_model(family: str = "gpt2") -> LanguageModel:
    """Three blocks of width 16 with random weights, large enough for attention to matter."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    common = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=CONTEXT, **common)
    else:
        config = transformers.GPTNeoXConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=CONTEXT,
            **common,
        )
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.2))
    return LanguageModel("tiny", hf, tokenizer)


def random_documents(num_documents: int, seed: int, num_words: int = 8, answers: bool = False) -> list[Document]:
    """Texts of random words. The fact `mark` = 1 holds at some tokens and follows from nothing else."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(num_documents):
        words = rng.choice(WORDS, num_words + rng.integers(0, 4))
        text = " ".join(words)
        facts = [Fact("mark", 1, *m.span()) for m in re.finditer(r"\S+", text) if rng.random() < 0.2]
        start = text.rindex(" ", 0, text.rindex(" ")) if answers else None
        documents.append(Document(text, start, tuple(facts)))
    return documents


def word_pieces(documents: Sequence[Document]) -> list[Piece]:
    """Each document as one piece, a token for each word and none besides."""
    pieces = []
    for number, document in enumerate(documents):
        spans = [m.span() for m in re.finditer(r"\S+", document.text)]
        starts, ends = np.array(spans, dtype=np.int32).T
        words = [document.text[a:b] for a, b in spans]
        pieces.append(
            Piece(
                number,
                np.array([2 + WORDS.index(word) for word in words]),
                starts,
                ends,
                special=np.zeros(len(words), dtype=bool),
                answers=ends > (10**6 if document.answer_start is None else document.answer_start),
                kinds=np.array([kind_of_text(word) for word in words], dtype=np.int8),
            )
        )
    return pieces


def make_codes(
    documents: Sequence[Document],
    features: np.ndarray | None = None,
    layer: int = 0,
    residual_ND: np.ndarray | None = None,
) -> Codes:
    """Codes of a text whose features at its tokens, in reading order, are the rows of a dense matrix."""
    pieces = word_pieces(documents)
    rows = TokenRows.concatenate(list(pack(pieces, CONTEXT, 8)))
    ids, starts, ends, kinds = (
        np.concatenate([getattr(p, a) for p in pieces]) for a in ("ids", "starts", "ends", "kinds")
    )
    documents_N = np.repeat(np.arange(len(pieces)), [len(p.ids) for p in pieces])
    answer_starts = np.array([10**6 if d.answer_start is None else d.answer_start for d in documents])
    features = np.zeros((len(ids), 1)) if features is None else features
    return Codes(
        rows,
        documents,
        ids_N=ids,
        documents_N=documents_N,
        positions_N=np.concatenate([np.arange(len(p.ids)) for p in pieces]),
        starts_N=starts,
        ends_N=ends,
        kinds_N=kinds,
        roles_N=role_of(kinds.astype(np.int64), ends >= answer_starts[documents_N]),
        layers={layer: sp.csr_array(features.astype(np.float32))},
        residual_LND=None if residual_ND is None else residual_ND[None],
    )


@dataclass
class GivenSide:
    """One model's part of a relation (`transfer.Side`), all of it given."""

    model: str
    dictionaries: dict[int, Dictionary]
    codes: Codes
    sample: Any
    fit: Any = None
    twins: list[dict[int, Dictionary]] = field(default_factory=list)
    twin_codes: list[Codes] = field(default_factory=list)
    language_model: Any = None


def marked(codes: Codes) -> np.ndarray:
    """Tokens at which the fact `mark` holds, bool [N]."""
    spans = {(d, f.start, f.end) for d, document in enumerate(codes.documents) for f in document.facts}
    places = zip(codes.documents_N.tolist(), codes.starts_N.tolist(), codes.ends_N.tolist(), strict=True)
    return np.array([place in spans for place in places])


def random_dictionary(d_model: int, d_sae: int, k: int | None = None, seed: int = 0) -> Dictionary:
    """Random weights with unit decoder rows; topk if `k` is given, else relu."""
    generator = torch.Generator().manual_seed(seed)
    W_enc, W_dec = (torch.randn(shape, generator=generator) for shape in ((d_model, d_sae), (d_sae, d_model)))
    b_enc, b_dec = (torch.randn(size, generator=generator) for size in (d_sae, d_model))
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    name, options = ("relu", {}) if k is None else ("topk", {"k": k})
    return Dictionary(name, W_enc, b_enc, W_dec, b_dec, options=options, metadata={"model_name": "tiny"})


def dictionary_of(architecture: str, d_model: int = 16, d_sae: int = 40, seed: int = 0) -> Dictionary:
    """Random weights with unit decoder rows in one of the four architectures of inference."""
    base = random_dictionary(d_model, d_sae, 6 if architecture == "topk" else None, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    extra = {
        "jumprelu": {"threshold": torch.rand(d_sae, generator=generator)},
        "gated": {name: 0.3 * torch.randn(d_sae, generator=generator) for name in ("r_mag", "b_mag")},
    }
    metadata = {"model_name": "someone/tiny", "hf_hook_name": "transformer.h.3", "layer": 3, "context_size": 64}
    return replace(base, architecture=architecture, extra=extra.get(architecture, {}), metadata=metadata)


def identity_dictionary(d_model: int) -> Dictionary:
    """Both signs of every coordinate: x comes back exactly."""
    both = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    return Dictionary("relu", both.T.contiguous(), torch.zeros(2 * d_model), both, torch.zeros(d_model))


def planted_activations(num_tokens: int, directions_FD: Tensor, num_active: int, seed: int = 0) -> Tensor:
    """Tokens [N, D] that are each the sum of `num_active` directions with coefficients of 1 to 2, off centre."""
    generator = torch.Generator().manual_seed(seed)
    F, D = directions_FD.shape
    chosen = torch.rand(num_tokens, F, generator=generator).topk(num_active, dim=1).indices
    size = 1 + torch.rand(num_tokens, num_active, generator=generator)
    f_NF = torch.zeros(num_tokens, F).scatter_(1, chosen, size)
    return f_NF @ directions_FD + torch.randn(D, generator=generator)


def planted_layers(num_tokens: int, num_layers: int = 2, num_features: int = 12, d_model: int = 8) -> Tensor:
    """Activations [L, N, D] of layers that have their own planted directions, two active on each token."""
    layers = []
    for layer in range(num_layers):
        directions_FD = torch.randn(num_features, d_model, generator=torch.Generator().manual_seed(100 + layer))
        directions_FD /= directions_FD.norm(dim=1, keepdim=True)
        layers.append(planted_activations(num_tokens, directions_FD, 2, seed=layer))
    return torch.stack(layers)
