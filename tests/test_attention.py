"""Attention for short texts in bfloat16 against torch's own."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from throughline.models import attention
from throughline.models.attention import attend

B, H, T, d = 2, 4, 24, 8


def tensors(groups: int = 1, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, T, d), (B, H // groups, T, d), (B, H // groups, T, d))
    return tuple(torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)


class Module(torch.nn.Module):
    is_causal = True

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def masks() -> dict[str, torch.Tensor | None]:
    pieces_BT = torch.arange(T).expand(B, T) // 7
    seen = (pieces_BT[:, :, None] == pieces_BT[:, None, :]).tril()
    lowest = torch.finfo(torch.bfloat16).min
    return {"causal": None, "pieces": torch.zeros(B, 1, T, T).masked_fill(~seen[:, None], lowest).bfloat16()}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("mask", ["causal", "pieces"])
def test_it_is_torch_s_attention(groups, scaling, mask):
    """To the precision of bfloat16, against float32."""
    given = tensors(groups)
    found, _ = attend(Module(groups), *given, masks()[mask], scaling=scaling)
    exact = [t.float() for t in given]
    float_mask = None if (m := masks()[mask]) is None else m.float()
    expected = sdpa_attention_forward(Module(groups), *exact, float_mask, scaling=scaling)[0]
    assert found.shape == (B, T, H, d) and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("why", ["float32", "long", "softcap", "bool mask"])
def test_what_it_does_not_know_is_left_to_torch(monkeypatch, why):
    called = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: (called.append(why), None))
    if why == "long":
        monkeypatch.setattr(attention, "LONGEST", T - 1)
    given = tensors(dtype=torch.float32 if why == "float32" else torch.bfloat16)
    mask = torch.ones(B, 1, T, T, dtype=torch.bool).tril() if why == "bool mask" else None
    attend(Module(), *given, mask, **({"softcap": 30.0} if why == "softcap" else {}))
    assert called == [why]
