"""Border biases, index modules and ragged attention: against the originals in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapwood.minimize import (
    AppendOnes,
    BorderBias2d,
    HeadBlock,
    InputSelect,
    RaggedAttention,
)

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 7, "padding": 3},
    {"kernel_size": (3, 5), "padding": (2, 1)},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 5), "padding": 2, "stride": (3, 2)},
    {"kernel_size": (4, 3), "padding": "same"},
    {"kernel_size": 1, "padding": 1},
]


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(geometry: dict[str, Any], bias: bool = True) -> tuple[nn.Conv2d, BorderBias2d, Tensor]:
    """A convolution over six channels, its narrow form over three, the constants of the others."""
    full = nn.Conv2d(6, 8, bias=bias, **geometry).double()
    c = seeded(3, seed=1)
    narrow = nn.Conv2d(3, 8, bias=bias, **geometry).double()
    narrow.weight.data = full.weight.data[:, :3].clone()
    if bias:
        narrow.bias.data = full.bias.data.clone()
    taps = torch.einsum("orhw,r->ohw", full.weight.data[:, 3:], c)
    return full, BorderBias2d.from_conv(narrow, taps), c


def image(c: Tensor, *size: int) -> Tensor:
    x = seeded(2, 6, *size, seed=2)
    x[:, 3:] = c[:, None, None]
    return x


@pytest.mark.parametrize("size", [(9, 11), (7, 7), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_border_bias_equals_the_full_convolution(
    geometry: dict[str, Any], size: tuple[int, int]
) -> None:
    full, small, c = pair(geometry)
    x = image(c, *size)
    try:
        expected = full(x)
    except RuntimeError:
        with pytest.raises(RuntimeError):  # too small an image for both
            small(x[:, :3])
        return
    torch.testing.assert_close(small(x[:, :3]), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(small(x[0, :3]), expected[0], rtol=0, atol=1e-12)


def test_border_bias_is_a_prunable_convolution_and_remembers_its_map() -> None:
    full, small, c = pair({"kernel_size": 3, "padding": 1}, bias=False)
    assert isinstance(small, nn.Conv2d)
    assert small.bias is None
    for size in ((5, 5), (6, 4), (5, 5)):
        x = image(c, *size)
        torch.testing.assert_close(small(x[:, :3]), full(x), rtol=0, atol=1e-12)
    before = small(x[:, :3])
    small.taps.zero_()  # the map follows
    assert not torch.equal(small(x[:, :3]), before)
    assert torch.equal(copy.deepcopy(small)(x[:, :3]), small(x[:, :3]))


def test_border_bias_adds_up_over_two_rounds() -> None:
    _, small, _ = pair({"kernel_size": 3, "padding": 1})
    more = seeded(8, 3, 3, seed=5)
    twice = BorderBias2d.from_conv(small, more)
    torch.testing.assert_close(twice.taps, small.taps + more)


def test_border_bias_gradients() -> None:
    full, small, c = pair({"kernel_size": 3, "padding": 1})
    x = image(c, 4, 5)
    whole, kept = x.clone().requires_grad_(), x[:, :3].clone().requires_grad_()
    full(whole).square().sum().backward()
    small(kept).square().sum().backward()
    assert whole.grad is not None
    assert kept.grad is not None
    torch.testing.assert_close(kept.grad, whole.grad[:, :3], rtol=0, atol=1e-12)
    torch.testing.assert_close(small.weight.grad, full.weight.grad[:, :3], rtol=0, atol=1e-11)


def test_border_bias_exports_compiles_and_follows_dtypes() -> None:
    full, small, c = pair({"kernel_size": 3, "padding": 1, "stride": 2})
    x = image(c, 6, 7)
    expected = full(x)
    exported = torch.export.export(small, (x[:, :3],)).module()
    torch.testing.assert_close(exported(x[:, :3]), expected, rtol=0, atol=1e-12)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[:, :3]), expected, rtol=0, atol=1e-12)
    single = copy.deepcopy(small).float()(x[:, :3].float())
    torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = copy.deepcopy(small).float()(x[:, :3].float())
    assert narrow.dtype == torch.bfloat16


def test_ones_do_the_same_with_standard_layers() -> None:
    full, small, c = pair({"kernel_size": 3, "padding": 1})
    conv = nn.Conv2d(4, 8, 3, padding=1).double()
    conv.weight.data = torch.cat((small.weight.data, small.taps[:, None]), 1)
    conv.bias.data = full.bias.data
    x = image(c, 5, 6)
    found = nn.Sequential(AppendOnes(), conv)(x[:, :3])
    torch.testing.assert_close(found, full(x), rtol=0, atol=1e-12)


def test_border_bias_refusals() -> None:
    with pytest.raises(ValueError, match="BorderBias2d: padding_mode must be one of zeros"):
        BorderBias2d(2, 2, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match=r"taps must have shape \(8, 3, 3\), got \(8, 3, 2\)"):
        BorderBias2d.from_conv(nn.Conv2d(2, 8, 3, padding=1), torch.zeros(8, 3, 2))


def test_input_select() -> None:
    x = seeded(2, 5, 3)
    select = InputSelect(torch.tensor([4, 0]), dim=1)
    assert select.index.dtype == torch.int32
    assert torch.equal(select(x), x[:, [4, 0]])
    assert torch.autograd.gradcheck(select, (x.clone().requires_grad_(),))
    exported = torch.export.export(select, (x,)).module()
    assert torch.equal(exported(x), select(x))
    assert copy.deepcopy(select).load_state_dict(select.state_dict())
    with pytest.raises(TypeError, match=r"InputSelect: index must be torch.int64 or .*float32"):
        InputSelect(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="InputSelect: index must not be negative, got -1"):
        InputSelect(torch.tensor([-1]))


WIDTH, HEADS, DIM = 12, 3, 4


def attention(batch_first: bool = True) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).double().eval()
    module.in_proj_bias.data = seeded(3 * WIDTH, seed=3)
    module.out_proj.bias.data = seeded(WIDTH, seed=4)
    return module


def blocks(module: nn.MultiheadAttention) -> list[list[HeadBlock]]:
    """q, k, v, each as one block per head."""
    weights, biases = module.in_proj_weight.data.chunk(3), module.in_proj_bias.data.chunk(3)
    return [
        [HeadBlock(*rows) for rows in zip(w.split(DIM), b.split(DIM), strict=True)]
        for w, b in zip(weights, biases, strict=True)
    ]


def ragged(module: nn.MultiheadAttention, **kwargs: Any) -> RaggedAttention:
    q, k, v = blocks(module)
    out = list(module.out_proj.weight.data.split(DIM, 1))
    bias = module.out_proj.bias.data
    return RaggedAttention.from_heads(q, k, v, out, bias, scale=DIM**-0.5, **kwargs).eval()


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "hidden": {"attn_mask": torch.arange(7).expand(5, 7) > 4},
    "added": {"attn_mask": seeded(5, 7, seed=6)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3])},
    "both": {
        "attn_mask": torch.arange(7).expand(5, 7) > 5,
        "key_padding_mask": torch.tensor([[True] + [False] * 6, [False] * 7]),
    },
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_equals_that_of_torch(mask: str, batch_first: bool) -> None:
    module = attention(batch_first)
    small = ragged(module, batch_first=batch_first, round_to=3)
    assert (small.qk_width, small.v_width) == (6, 6)
    query, key, value = (
        seeded(2, 5, WIDTH),
        seeded(2, 7, WIDTH, seed=1),
        seeded(2, 7, WIDTH, seed=2),
    )
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    found, weights = small(query, key, value, **MASKS[mask])
    expected, _ = module(query, key, value, need_weights=False, **MASKS[mask])
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_attention_without_a_batch_and_causal() -> None:
    module, x = attention(), seeded(5, WIDTH)
    later = torch.ones(5, 5).triu(1) > 0
    small = ragged(module)
    torch.testing.assert_close(
        small(x, x, x, attn_mask=later)[0],
        module(x, x, x, attn_mask=later, need_weights=False)[0],
        rtol=0,
        atol=1e-13,
    )
    torch.testing.assert_close(
        small(x, x, x, is_causal=True)[0], small(x, x, x, attn_mask=later)[0], rtol=0, atol=1e-13
    )


def test_heads_of_different_widths_and_a_uniform_one() -> None:
    """Head 0 keeps two QK dims, head 1 none (uniform attention), head 2 all; V as ragged."""
    module = attention()
    qk, vs = [[0, 2], [], [0, 1, 2, 3]], [[1], [0, 1, 2], [0, 3]]
    rows = module.in_proj_weight.data.view(3, HEADS, DIM, WIDTH)
    biases = module.in_proj_bias.data.view(3, HEADS, DIM)
    out = module.out_proj.weight.data.view(WIDTH, HEADS, DIM)
    for head in range(HEADS):
        for part, kept in ((0, qk), (1, qk), (2, vs)):
            gone = [d for d in range(DIM) if d not in kept[head]]
            rows[part, head, gone] = 0.0
            biases[part, head, gone] = 0.0
    cut = [
        [HeadBlock(rows[p, h, keep[h]], biases[p, h, keep[h]]) for h in range(HEADS)]
        for p, keep in ((0, qk), (1, qk), (2, vs))
    ]
    columns = [out[:, h, vs[h]] for h in range(HEADS)]
    small = RaggedAttention.from_heads(
        *cut, columns, module.out_proj.bias.data, scale=DIM**-0.5
    ).eval()
    assert (small.qk_width, small.v_width) == (4, 3)
    x = seeded(2, 5, WIDTH)
    expected, _ = module(x, x, x, need_weights=False)
    torch.testing.assert_close(small(x, x, x)[0], expected, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda q: small(q, q, q)[0], (x[:1, :3].requires_grad_(),))


def test_shared_keys_and_values() -> None:
    module = attention()
    q, k, v = blocks(module)
    mapping = [0, 1, 0]
    out = list(module.out_proj.weight.data.split(DIM, 1))
    small = RaggedAttention.from_heads(
        q, k[:2], v[:2], out, None, scale=0.5, kv_of_head=mapping
    ).eval()
    x = seeded(2, 5, WIDTH)
    heads = []
    for head, shared in enumerate(mapping):
        a, b, c = (x @ block.weight.T + block.bias for block in (q[head], k[shared], v[shared]))
        heads.append((0.5 * a @ b.transpose(1, 2)).softmax(-1) @ c @ out[head].T)
    torch.testing.assert_close(small(x, x, x)[0], sum(heads), rtol=0, atol=1e-13)
    assert small.k_proj.out_features == 8


def test_attention_exports_and_compiles() -> None:
    small, x = ragged(attention()), seeded(2, 5, WIDTH)
    expected = small(x, x, x)[0]
    exported = torch.export.export(small, (x, x, x)).module()
    torch.testing.assert_close(exported(x, x, x)[0], expected, rtol=0, atol=1e-13)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x)[0], expected, rtol=0, atol=1e-13)
    copied = copy.deepcopy(small)
    copied.load_state_dict(small.state_dict())
    assert torch.equal(copied(x, x, x)[0], expected)


def test_attention_refusals() -> None:
    def make(**kwargs: Any) -> RaggedAttention:
        sizes = {"heads": 2, "qk_width": 2, "v_width": 2, "scale": 1.0}
        return RaggedAttention(4, 4, **(sizes | kwargs))

    with pytest.raises(ValueError, match="RaggedAttention: heads must be at least 1, got 0"):
        make(heads=0)
    with pytest.raises(
        ValueError, match=r"kv_of_head must map 2 heads onto 0 .. m - 1, got \[0, 2"
    ):
        make(kv_of_head=[0, 2])
    with pytest.raises(ValueError, match="attn_mask must be the same for all heads"):
        make()(*[torch.zeros(2, 3, 4)] * 3, attn_mask=torch.zeros(4, 3, 3))
    q, k, v = blocks(attention())
    out = [torch.zeros(4, DIM).double()] * HEADS
    with pytest.raises(ValueError, match="k must have 3 blocks, got 2"):
        RaggedAttention.from_heads(q, k[:2], v, out, None, scale=1.0)
    short = [HeadBlock(q[0].weight[:2]), *q[1:]]
    with pytest.raises(ValueError, match="q must have 4 rows in head 0, as its keys, got 2"):
        RaggedAttention.from_heads(short, k, v, out, None, scale=1.0)
    with pytest.raises(ValueError, match="out must have 4 columns in head 0, as its values, got 1"):
        RaggedAttention.from_heads(q, k, v, [o[:, :1] for o in out], None, scale=1.0)
