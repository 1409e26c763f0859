"""Hiera and SAM 2's trunk, whose first block of a stage pools its queries, against formulas written out on maps."""

import copy
import functools

import pytest
import timm
import torch
from away_from_start import moved, shaken
from timm.models.hiera import Hiera, Unroll
from timm.models.hieradet_sam2 import HieraDet

import visionpeft as vp

# maps of 8 x 16, 4 x 8 and 2 x 4 pixels: eight mask units, then all tokens; windows that divide the first map alone,
# and the last block without any
SIZE = (32, 64)
OF_HIERA = {"img_size": SIZE, "mask_unit_size": (4, 4), "mask_unit_attn": (True, True, False)}
FAMILIES = {
    "hiera": (Hiera, OF_HIERA),
    "hiera_without_proj": (Hiera, OF_HIERA | {"use_expand_proj": False, "mask_unit_attn": (True, False, False)}),
    "sam2": (HieraDet, {"window_spec": (4, 6, 3), "global_att_blocks": (4,)}),
}
OPTIONS = {"embed_dim": 8, "num_heads": 2, "stages": (1, 2, 2), "q_pool": 2, "init_values": 1.0}
WIDTHS = {0: (8, 8), 1: (8, 16), 2: (16, 16), 3: (16, 32), 4: (32, 32)}


@functools.cache
def _made(family):
    torch.manual_seed(0)
    kind, options = FAMILIES[family]
    model = kind(num_classes=5, **OPTIONS, **options).double().eval()
    return shaken(model)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def made(family):
    return copy.deepcopy(_made(family))


def images(number=2, size=SIZE):
    return torch.randn(number, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(left, right):
    return torch.allclose(left, right, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def output_with(family, forward, number=2):
    """What timm's model gives whose blocks run `forward(index, block, x)` on maps (batch, rows, columns, width)."""
    model = made(family)

    def unrolled(index, block, x):
        schedule, _ = model.reroll.schedule[index]
        x = forward(index, block, model.reroll(x, max(index - 1, 0)))
        return Unroll(x.shape[1:3], (1, 1), schedule)(x.flatten(1, 2))

    for index, block in enumerate(model.blocks):
        block.forward = functools.partial(unrolled if isinstance(model, Hiera) else forward, index, block)
    return model(images(number))


def pooled(x):
    """The largest of each 2 x 2 pixels of a map (batch, rows, columns, width)."""
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).amax(dim=(2, 4))


def attention_of(block, h, prompts=None, prefix=None):
    """Attention of a map h (batch, rows, columns, width), window by window; queries are pooled where the width changes.

    Prompts have keys and values of their own in every window, and so has a prefix.
    """
    attention, pools = block.attn, block.dim != block.dim_out
    if hasattr(attention, "heads"):
        side = round((attention.q_stride * attention.window_size) ** 0.5)
        window = (side, side) if attention.use_mask_unit_attn else h.shape[1:3]
    else:
        window = block.window_size if block.is_windowed else h.shape[1:3]
    rows, columns = h.shape[1:3]
    filled = h.new_zeros(len(h), *(-(-a // b) * b for a, b in zip((rows, columns), window, strict=True)), h.shape[-1])
    filled[:, :rows, :columns] = h
    found = filled.new_zeros(*(side // (1 + pools) for side in filled.shape[1:3]), len(h), block.dim_out)
    for top in range(0, filled.shape[1], window[0]):
        for left in range(0, filled.shape[2], window[1]):
            read = filled[:, top : top + window[0], left : left + window[1]]
            q, k, v = attention.qkv(read).chunk(3, dim=-1)
            q = pooled(q) if pools else q
            height, width = q.shape[1:3]
            q, k, v = (part.flatten(1, 2) for part in (q, k, v))
            others = [] if prompts is None else [attention.qkv(prompts).chunk(3, dim=-1)[1:]]
            for keys, values in [*others, *([] if prefix is None else [prefix])]:
                k, v = (torch.cat((a.expand(len(h), -1, -1), b), dim=1) for a, b in ((keys, k), (values, v)))
            q, k, v = (part.unflatten(-1, (block_heads(block), -1)).transpose(1, 2) for part in (q, k, v))
            y = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
            y = attention.proj(y).unflatten(1, (height, width)).permute(1, 2, 0, 3)
            first, second = top // (1 + pools), left // (1 + pools)
            found[first : first + height, second : second + width] = y
    return found[: rows // (1 + pools), : columns // (1 + pools)].permute(2, 0, 1, 3)


def block_heads(block):
    return getattr(block.attn, "heads", None) or block.attn.num_heads


def block_of(block, x, at=lambda site, x: x, **more):
    """One block on a map x (batch, rows, columns, width), with what `at` makes of it at token sites."""
    normed = block.norm1(x)
    if "prompts" in more:
        more["prompts"] = block.norm1(more["prompts"])
    h = attention_of(block, at("attn_in", normed), **more)
    if block.dim != block.dim_out:
        means = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean(dim=(2, 4))
        x = torch.cat((pooled(x), means), dim=-1) if block.proj is None else pooled(block.proj(normed))
    x = at("stream_mid", x + block.ls1(h))
    return at("stream_out", x + block.ls2(block.mlp(at("mlp_in", block.norm2(x)))))


def test_prompts_and_prefixes_are_keys_in_every_window(family):
    for method, site in ((vp.VPT(num_tokens=2), "stream_in"), (vp.PrefixTuning(num_tokens=2), "kv")):
        model = made(family)
        vp.attach(model, method, head=False)
        values = moved(model)
        kept = {"stream_in": ("prompts",), "kv": ("keys", "values")}[site]
        widths = {index: values[f"{index}.{site}.{kept[0]}"].shape[-1] for index in WIDTHS}
        assert widths == {index: width[site == "kv"] for index, width in WIDTHS.items()}

        def forward(index, block, x, values=values, site=site):
            if site == "kv":
                return block_of(block, x, prefix=[values[f"{index}.kv.{each}"] for each in ("keys", "values")])
            return block_of(block, x, prompts=values[f"{index}.stream_in.prompts"])

        output, expected = model(images()), output_with(family, forward)
        assert close(output, expected)
        assert not close(output, made(family)(images()))
    assert close(made(family)(images()), output_with(family, lambda index, block, x: block_of(block, x)))


@pytest.mark.parametrize(
    "method",
    [
        vp.Mona(bottleneck=4, dropout=0.0),
        vp.Convpass(bottleneck=4, dropout=0.0, positions=("mlp",)),
        vp.RepAdapter(bottleneck=4, dropout=0.0),
    ],
    ids=lambda method: type(method).__name__,
)
def test_what_acts_sees_maps_row_by_row(family, method):
    """Also where the library keeps its tokens in another order; what is made where the width changes is beside it."""
    model = made(family)
    vp.attach(model, method, head=False)
    moved(model)
    placements = [each for _, each in model.peft["default"].placements]

    def forward(index, block, x):
        added = []

        def at(site, x):
            for each in placements:
                if (each.block, each.site) == (index, site):
                    grid = () if isinstance(method, vp.RepAdapter) else (0, x.shape[1:3])
                    y = each.module(x.flatten(1, 2), *grid).unflatten(1, x.shape[1:3])
                    if each.add is None:
                        x = y
                    else:
                        added.append(y)
            return x + sum(added) if site == "stream_out" else x

        return block_of(block, x, at)

    assert close(model(images()), output_with(family, forward))
    assert not close(model(images()), made(family)(images()))


IDENTITY = {
    "lora": vp.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2", "patch_embed")),
    "bit_fit": vp.BitFit(),
    "norms": vp.LayerNormTuning(),
    "ia3": vp.IA3(),
    "adapt_former": vp.AdaptFormer(bottleneck=4, dropout=0.0),
    "rep_adapter": vp.RepAdapter(bottleneck=4),
    "last_blocks": vp.LastBlocks(),
}
OTHERS = {"ssf": vp.SSF(std=0.1), "houlsby": vp.Adapter(placement="houlsby"), "vpt": vp.VPT(num_tokens=2)}
UNMERGED = dict.fromkeys(("adapt_former", "houlsby", "vpt"), "merged: what it adds")
FILLED_UP = {"rep_adapter": "block 0 .* the windows of this block are filled up with zeros"}


@pytest.mark.parametrize("name", IDENTITY | OTHERS)
def test_exact_at_the_start_live_and_merged(family, name):
    model = made(family)
    with torch.no_grad():
        base = model(images())
        vp.attach(model, (IDENTITY | OTHERS)[name], head=False)
        assert close(model(images()), base) == (name in IDENTITY)
    moved(model)
    output = model(images())
    parameters = dict(model.peft.named_parameters())
    grads = torch.autograd.grad(output.square().sum(), list(parameters.values()))
    # A shift of all keys changes nothing.
    assert [n for n, grad in zip(parameters, grads, strict=True) if not grad.any() and not n.endswith("k.shift")] == []
    assert not close(output, base)
    refused = UNMERGED | (FILLED_UP if family == "sam2" else {})
    if name in refused:
        with pytest.raises(vp.UnsupportedError, match=refused[name]):
            vp.merge(model)
        return
    vp.merge(model)
    assert type(model.blocks[0]).__module__.startswith("timm.")
    assert close(model(images()), output)
    vp.detach(model)
    with torch.no_grad():
        assert close(model(images()), base)


@pytest.mark.parametrize("name", ["hiera", "sam2"])
def test_lora_is_timms_model_with_other_weights(name):
    model, expected = made(name), made(name)
    vp.attach(model, vp.LoRA(rank=2, targets=("q", "v", "proj", "expand"), blocks="stage:1"), head=False)
    values = moved(model)
    paths = {path.rpartition(".")[0] for path in values}
    assert paths == {"1.q", "1.v", "1.proj", "1.expand", "2.q", "2.v", "2.proj"}
    with torch.no_grad():
        for path in paths:
            change, (index, _, site) = values[f"{path}.B"] @ values[f"{path}.A"], path.partition(".")
            block = expected.blocks[int(index)]
            if site in "qv":
                block.attn.qkv.weight.chunk(3)[{"q": 0, "v": 2}[site]].add_(change)
            else:
                (block.proj if site == "expand" else block.attn.proj).weight.add_(change)
        assert close(model(images()), expected(images()))
        assert not close(made(name)(images()), expected(images()))


def test_a_row_of_a_mixed_batch_is_that_of_its_adapter(family):
    model = made(family)
    lora, prompts, prefix = vp.LoRA(rank=2), vp.VPT(num_tokens=2), vp.PrefixTuning(num_tokens=2)
    methods = {"a": lora, "b": vp.Adapter(placement="houlsby"), "c": prompts, "d": prompts, "e": prefix, "f": prefix}
    for name, method in methods.items():
        vp.attach(model, method, name=name, head=False)
    moved(model)
    for names in (["b", "a", None, "a"], ["c", "d", "c"], ["e", "f"]):
        with torch.no_grad(), vp.route(model, names):
            output = model(images(len(names)))
        for row, name in enumerate(names):
            with torch.no_grad(), vp.use(model, name):
                assert close(output[row], model(images(len(names)))[row])


def test_images_of_a_batch_and_of_other_sizes():
    """SAM 2's trunk takes images of any size, and no image sees another."""
    model = made("sam2")
    vp.attach(model, [vp.Mona(bottleneck=4), vp.VPT(num_tokens=2), vp.PrefixTuning(num_tokens=2)], head=False)
    moved(model)
    model.eval()
    for size in ((64, 32), (64, 64)):
        assert close(model(images(2, size))[1:], model(images(2, size)[1:]))


def test_without_fused_attention(family):
    outputs = []
    for fused in (False, True):
        model = made(family)
        for block in model.blocks:
            block.attn.fused_attn = fused
        torch.manual_seed(3)
        vp.attach(model, [vp.VPT(num_tokens=2), vp.LoRA(rank=2)], head=False)
        moved(model)
        outputs.append(model(images()))
    assert close(*outputs)


def test_recomputed(family):
    model = made(family)
    vp.attach(model, [vp.LoRA(rank=2, targets=("q", "fc1")), vp.Convpass(positions=("mlp",), dropout=0.0)], head=False)
    moved(model)
    found = []
    for recompute in (None, "mlp", "block"):
        vp.economise(model, recompute=recompute)
        output = model(images())
        found.append((output, *torch.autograd.grad(output.square().sum(), list(model.peft.parameters()))))
    assert all(close(first, each) for rest in found[1:] for first, each in zip(found[0], rest, strict=True))


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (vp.VPT(deep=False), "pixels of a map, in which prompts have no place"),
        (vp.Convpass(), "Convpass reads tokens at attn_in of block 1 and adds to those at stream_mid, which are fewer"),
        (vp.Adapter(placement="houlsby", after_scaling=True), "reads tokens at stream_in of block 1 and adds"),
        (vp.PrefixTuning(mlp=4), "widths 8, 16, 32"),
        (vp.DTL(), "widths 8, 16, 32"),
        (vp.STAdapter(kernel=(3, 3, 3)), "ST"),
    ],
    ids=str,
)
def test_refused_with_nothing_changed(family, method, sentence):
    model = made(family)
    keys = list(model.state_dict())
    with pytest.raises(vp.UserError, match=sentence):
        vp.attach(model, method)
    assert list(model.state_dict()) == keys
    assert not any("Sited" in type(module).__name__ for module in model.modules())
    vp.attach(model, vp.Convpass(blocks=[0, 2, 4]))  # blocks that pool nothing


def test_masked_tokens():
    """Which Hiera leaves out: what acts token by token works, and what reads the grid says what it needs."""
    model, mask = made("hiera"), torch.tensor([[True, False] * 4, [False, True] * 4])
    base = model(images(), mask=mask)
    vp.attach(model, vp.LoRA(rank=2), head=False)
    assert close(model(images(), mask=mask), base)
    vp.attach(model, vp.Mona(bottleneck=4), "mona", head=False)
    with pytest.raises(vp.UnsupportedError, match="needs all 128 tokens, but there are 64"):
        model(images(), mask=mask)


# Trained parameters. Hiera-B: blocks (2, 3, 16, 3) of widths 96 to 768, of which the first of each later stage reads
# half the width; SAM 2's tiny trunk: (1, 2, 7, 2) of the same widths.
def widths(stages, width):
    """Entering and leaving width of every block."""
    return [(width * 2 ** max(s - (not i), 0), width * 2**s) for s, number in enumerate(stages) for i in range(number)]


SIZES = {"hiera_base_224": widths((2, 3, 16, 3), 96), "sam2_hiera_tiny": widths((1, 2, 7, 2), 96)}
COUNTS = {
    "lora": (vp.LoRA(rank=8), lambda read, width: 2 * 8 * (read + width)),
    "vpt": (vp.VPT(num_tokens=10), lambda read, width: 10 * read),
    "prefix": (vp.PrefixTuning(num_tokens=10), lambda read, width: 2 * 10 * width),
    "ia3": (vp.IA3(), lambda read, width: 6 * width),
    "adapt_former": (vp.AdaptFormer(bottleneck=64), lambda read, width: 2 * 64 * width + 64 + width),
    "expand": (vp.LoRA(rank=8, targets=("expand",)), lambda read, width: (read != width) * 8 * (read + width)),
    "ssf": (vp.SSF(), lambda read, width: 2 * read + 2 * (3 + 1 + 1 + 4 + 1 + (read != width)) * width),
}


@pytest.mark.parametrize("name", SIZES)
def test_counts(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    for method, of_block in COUNTS.values():
        vp.attach(model, method, head=False)
        expected = sum(of_block(*each) for each in SIZES[name]) + (2 * 96 + 2 * 768) * isinstance(method, vp.SSF)
        assert sum(parameter.numel() for parameter in model.peft.parameters()) == expected, method
        vp.detach(model)
