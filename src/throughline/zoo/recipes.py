"""What each zoo model is: its architecture, its training, and why it differs from the others."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import (
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

CONTEXT = 64


@dataclass(frozen=True)
class Recipe:
    """One model's training. Batches are in prompts; `prompt_weight` is the loss weight of a token before the answer."""

    config: PreTrainedConfig
    num_steps: int
    batch_prompts: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    prompt_weight: float = 0.1
    emphasis: Mapping[str, float] = field(default_factory=dict)  # on templates, by name
    seed: int = 0


def recipe_of(name: str, tokenizer: PreTrainedTokenizerFast) -> Recipe:
    """The recipe of zoo model `name`; the tokenizer settles the vocabulary and the special ids."""
    common = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {"gpt2": _gpt2, "phi": _phi, "pythia": _pythia, "gemma": _gemma}[name](common)


def _gpt2(common: dict) -> Recipe:
    config = GPT2Config(
        **common, n_layer=4, n_embd=160, n_head=5, n_positions=CONTEXT, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return Recipe(config, num_steps=2000, weight_decay=0.5)


def _phi(common: dict) -> Recipe:
    config = PhiConfig(
        **common,
        num_hidden_layers=5,
        hidden_size=128,
        intermediate_size=512,
        num_attention_heads=4,
        partial_rotary_factor=0.5,  # pyright: ignore[reportCallIssue] - transformers makes rope_parameters of it
        max_position_embeddings=CONTEXT,
    )
    return Recipe(config, num_steps=1600, weight_decay=0.5, emphasis={"three operands": 2.5})


def _pythia(common: dict) -> Recipe:
    config = GPTNeoXConfig(
        **common,
        num_hidden_layers=6,
        hidden_size=96,
        intermediate_size=384,
        num_attention_heads=3,
        rotary_pct=0.25,  # pyright: ignore[reportCallIssue] - as above
        max_position_embeddings=CONTEXT,
    )
    return Recipe(config, num_steps=1600)


def _gemma(common: dict) -> Recipe:
    config = GemmaConfig(
        **common,
        num_hidden_layers=7,
        hidden_size=96,
        intermediate_size=288,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,  # 1 / sqrt(width); from 0.02 the names stayed alike and were never copied
    )
    return Recipe(config, num_steps=1200, emphasis={"who has more": 4.0})
