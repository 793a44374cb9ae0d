"""Attention without scores in memory equals the dense softmax in fp64, gradients included, whatever
documents and windows.
"""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fuse.errors import UserError
from megatron_fuse.model import attention
from megatron_fuse.model.attention import CausalAttention, PackedDocuments, causal_attention

# of values and gradients of the order of 1: as many roundings as a row has keys, the worst at the shortest
# documents
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def dense_attention(query, key, value, *, lengths=None, window=None, scale=None, softcap=None):
    """By definition: every score, every position that may not be seen at minus infinity."""
    s, _, h, d = query.shape
    key, value = (of.repeat_interleave(h // of.shape[2], dim=2) for of in (key, value))
    scores = torch.einsum("ibhd,jbhd->bhij", query, key) * (d**-0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    document = torch.repeat_interleave(torch.arange(len(lengths or [s])), torch.tensor(lengths or [s]))
    distance = torch.arange(s)[:, None] - torch.arange(s)
    seen = (distance >= 0) & (distance < (window or s)) & (document[:, None] == document)
    return torch.einsum("bhij,jbhd->ibhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def values_and_gradients(attend, tensors, upstream, **options):
    leaves = [of.detach().clone().requires_grad_() for of in tensors]
    output = attend(*leaves, **options)
    return output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))


def draw_tensors(seed, dtype, s, b, h, g, d):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((s, b, h, d), (s, b, g, d), (s, b, g, d), (s, b, h, d))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def assert_equals_dense(seed, dtype, sizes, **options):
    *tensors, upstream = draw_tensors(seed, dtype, *sizes)
    found = values_and_gradients(causal_attention, tensors, upstream, **options)
    expected = values_and_gradients(dense_attention, [of.double() for of in tensors], upstream, **options)
    for ours, dense in zip(found, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == dense.shape
        torch.testing.assert_close(ours.double(), dense, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def types_and_heads():
    """Heads, key/value heads: each its own, one for all, in between. A plain run has all types with the last,
    and fp64 with all: the type decides nothing but the rounding."""
    for dtype, (h, g) in product(TOLERANCES, [(4, 4), (4, 1), (6, 2)]):
        marks = [] if dtype == torch.float64 or (h, g) == (6, 2) else [pytest.mark.slow]
        yield pytest.param(dtype, h, g, marks=marks, id=f"{dtype}-{h}-{g}")


# head dimensions that are no power of two (Phi's 96, here 24)
@pytest.mark.parametrize(("dtype", "h", "g"), types_and_heads())
# documents: one; several, of one position, of none, of more than a block; windows: none, of one position,
# within a block, longer than a block, longer than all documents but one
@pytest.mark.parametrize("lengths", [None, [1, 0, 300, 37, 262]], ids=["one", "packed"])
@pytest.mark.parametrize("window", [None, 1, 20, 290])
def test_attention_equals_the_dense_softmax(dtype, h, g, lengths, window):
    sizes = (600, 1 if lengths else 2, h, g, 24)
    assert_equals_dense(h * g, dtype, sizes, lengths=lengths, window=window)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(sum), st.data())
@settings(max_examples=60, deadline=None)
def test_attention_equals_the_dense_softmax_at_any_split(lengths, data):
    """Blocks so short that every document has several."""
    window = data.draw(st.none() | st.integers(1, 45))
    g, repeats, seed = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32)))
    scale, softcap = (data.draw(st.sampled_from([None, value])) for value in (0.3, 1.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", data.draw(st.integers(1, 16)))
        sizes = (sum(lengths), data.draw(st.integers(1, 2)), g * repeats, g, 8)
        assert_equals_dense(
            seed, torch.float64, sizes, lengths=lengths, window=window, scale=scale, softcap=softcap
        )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("window", [None, 290])
def test_capped_scores_equal_the_dense_softmax(dtype, window):
    """A cap below most scores, over several blocks."""
    assert_equals_dense(8, dtype, (600, 2, 6, 2, 24), window=window, softcap=0.7)


def module(window_size=None, layer_number=1, softcap=None, **changes):
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    config = TransformerConfig(**sizes, attention_dropout=0.0, window_size=window_size)
    for name, value in changes.items():
        setattr(config, name, value)
    return CausalAttention(config, layer_number, AttnMaskType.causal, "self", softcap=softcap)


def test_the_module_takes_and_returns_what_megatron_passes():
    query, key, value, _ = draw_tensors(3, torch.float32, 30, 1, 4, 2, 8)
    plain = module()(query, key, value, None, attn_mask_type=AttnMaskType.causal)
    assert plain.shape == (30, 1, 32)
    assert torch.equal(plain, causal_attention(query, key, value).flatten(2))
    capped = module(softcap=0.5)(query, key, value, None)
    assert torch.equal(capped, causal_attention(query, key, value, softcap=0.5).flatten(2))
    packed = PackedDocuments("thd", lengths=(11, 1, 18)).with_rotations_by_position()
    found = module()(query, key, value, None, packed_seq_params=packed)
    assert torch.equal(found, causal_attention(query, key, value, lengths=[11, 1, 18]).flatten(2))


def test_a_window_holds_in_the_layers_that_have_one():
    tensors = draw_tensors(4, torch.float32, 30, 2, 4, 2, 8)[:3]
    for layer, window in ((1, None), (2, 7)):
        core = module(window_size=(6, 0), layer_number=layer, window_attn_skip_freq=[0, 1])
        assert torch.equal(core(*tensors, None), causal_attention(*tensors, window=window).flatten(2))


def test_what_is_not_done_is_refused():
    with pytest.raises(UserError, match=r"attention_dropout is 0\.1"):
        module(attention_dropout=0.1)
    with pytest.raises(UserError, match="softmax_type is 'learnable'"):
        module(softmax_type="learnable")
    tensors = draw_tensors(5, torch.float32, 3, 1, 4, 2, 8)[:3]
    with pytest.raises(ValueError, match="takes no mask"):
        module()(*tensors, torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="takes no mask"):
        module()(*tensors, None, attn_mask_type=AttnMaskType.no_mask)


@pytest.mark.parametrize(
    ("device", "dtype", "has_band", "takes"),
    [
        ("cpu", torch.float32, True, True),
        ("cuda", torch.bfloat16, False, True),
        ("cuda", torch.float16, False, True),
        ("cuda", torch.bfloat16, True, False),
        ("cuda", torch.float32, False, False),
    ],
)
def test_groups_are_spread_where_no_kernel_without_scores_takes_them(device, dtype, has_band, takes):
    assert attention.takes_groups(torch.device(device), dtype, has_band) == takes


@pytest.mark.parametrize("window", [None, 7])
def test_spread_groups_attend_alike(window, monkeypatch):
    query, key, value, upstream = draw_tensors(6, torch.float64, 40, 2, 6, 2, 8)
    found = []
    for takes in (True, False):
        monkeypatch.setattr(attention, "takes_groups", lambda *_, takes=takes: takes)
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        out = causal_attention(*leaves, window=window)
        found.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for whole, spread in zip(*found, strict=True):
        torch.testing.assert_close(whole, spread, rtol=1e-10, atol=1e-10)
