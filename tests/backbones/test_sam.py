"""SAM's image encoder against its attention written out, window by window, and timm's own block in training."""

import copy
import functools

import pytest
import timm
import torch
from away_from_start import moved, shaken
from timm.layers import DropPath
from timm.models.vision_transformer_sam import VisionTransformerSAM

import visionpeft as vp

# a map of 4 x 5 pixels, which windows of 3 x 3 do not divide, and a second block without windows
OPTIONS = {"img_size": (16, 20), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "window_size": 3}
FAMILIES = {"positions": {"use_rel_pos": True}, "rotary": {"use_rope": True, "qkv_bias": False, "qk_norm": True}}


@functools.cache
def _made(family):
    torch.manual_seed(0)
    options = {"global_attn_indexes": (1,), "neck_chans": 8, "num_classes": 5, "init_values": 1.0}
    model = VisionTransformerSAM(**OPTIONS, **options, **FAMILIES[family]).double().eval()
    return shaken(model).requires_grad_(False)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def made(family):
    return copy.deepcopy(_made(family))


def images(number=2):
    return torch.randn(number, 3, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(left, right):
    return torch.allclose(left, right, rtol=1e-10, atol=1e-10)


def turned(x, table):
    """Heads (..., pixels, d) rotated in pairs by a table of sines and cosines (pixels, 2 d)."""
    sines, cosines = table.chunk(2, dim=-1)
    other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cosines + other * sines


def attention_of(block, h, prompts=None, prefix=None):
    """Attention of a map h (batch, rows, columns, width): prompts and prefixes are keys in every window."""
    attention, (rows, columns) = block.attn, h.shape[1:3]
    height, width = (block.window_size,) * 2 if block.window_size else (rows, columns)
    filled = h.new_zeros(len(h), -(-rows // height) * height, -(-columns // width) * width, 16)
    filled[:, :rows, :columns] = h
    found = torch.zeros_like(filled)
    for top in range(0, filled.shape[1], height):
        for left in range(0, filled.shape[2], width):
            read = filled[:, top : top + height, left : left + width].flatten(1, 2)
            q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in attention.qkv(read).chunk(3, dim=-1))
            q, k = attention.q_norm(q), attention.k_norm(k)
            bias = h.new_zeros(*q.shape[:3], height * width)
            if attention.use_rel_pos:
                for a in range(height * width):
                    for b in range(height * width):
                        down, right = a // width - b // width, a % width - b % width
                        far = attention.rel_pos_h[down + height - 1] + attention.rel_pos_w[right + width - 1]
                        bias[:, :, a, b] = q[:, :, a] @ far
            else:
                q, k = (turned(part, attention.rope.get_embed()) for part in (q, k))
            others = [] if prefix is None else [[each.unflatten(-1, (2, 8)).transpose(0, 1) for each in prefix]]
            if prompts is not None:
                keys, values = (
                    y.unflatten(-1, (2, 8)).transpose(0, 1) for y in attention.qkv(prompts).chunk(3, dim=-1)[1:]
                )
                others.append([attention.k_norm(keys), values])
            for keys, values in others:
                keys, values = (each.expand(len(h), -1, -1, -1) for each in (keys, values))
                k, v = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
            bias = torch.nn.functional.pad(bias, (k.shape[2] - bias.shape[3], 0))
            y = ((q @ k.mT / 8**0.5 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
            found[:, top : top + height, left : left + width] = attention.proj(y).unflatten(1, (height, width))
    return found[:, :rows, :columns]


def block_of(block, x, prompts=None, prefix=None):
    """One block on a map x."""
    prompts = None if prompts is None else block.norm1(prompts)
    x = x + block.ls1(attention_of(block, block.norm1(x), prompts, prefix))
    return x + block.ls2(block.mlp(block.norm2(x)))


@torch.no_grad()
def output_with(family, forward):
    """What timm's model gives whose blocks run `forward(index, block, x)`."""
    model = made(family)
    for index, block in enumerate(model.blocks):
        block.forward = functools.partial(forward, index, block)
    return model(images())


def test_prompts_and_prefixes_are_keys_in_every_window(family):
    assert close(made(family)(images()), output_with(family, lambda index, block, x: block_of(block, x)))
    for method in (vp.VPT(num_tokens=2), vp.PrefixTuning(num_tokens=2)):
        model = made(family)
        vp.attach(model, method, head=False)
        values = moved(model)

        def forward(index, block, x, values=values):
            own = {name.rpartition(".")[2]: value for name, value in values.items() if name.startswith(f"{index}.")}
            return block_of(block, x, own.get("prompts"), [own["keys"], own["values"]] if "keys" in own else None)

        assert close(model(images()), output_with(family, forward))
        assert not close(model(images()), made(family)(images()))


METHODS = {
    "lora": vp.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2", "patch_embed", "neck_0", "neck_2")),
    "bit_fit": vp.BitFit(),
    "norms": vp.LayerNormTuning(),
    "adapt_former": vp.AdaptFormer(bottleneck=4, dropout=0.0),
    "convpass": vp.Convpass(bottleneck=4),
    "ssf": vp.SSF(std=0.1),
    "mona": vp.Mona(bottleneck=4),
}
UNMERGED = dict.fromkeys(("adapt_former", "convpass", "mona"), "merged: what it adds")


@pytest.mark.parametrize("name", METHODS)
def test_exact_at_the_start_live_and_merged(family, name):
    model = made(family)
    with torch.no_grad():
        base = model(images())
        vp.attach(model, METHODS[name], head=False)
        assert close(model(images()), base) == (name not in ("ssf", "mona"))
    moved(model)
    model.eval()
    output = model(images())
    parameters = dict(model.peft.named_parameters())
    grads = torch.autograd.grad(output.square().sum(), list(parameters.values()))
    void = "k.shift" if family == "positions" else "none"
    dead = [n for n, grad in zip(parameters, grads, strict=True) if not grad.any() and not n.endswith(void)]
    assert dead == []
    assert not close(output, base)
    refused = UNMERGED | ({"ssf": "no bias that could hold a shift"} if family == "rotary" else {})
    if name in refused:
        with pytest.raises(vp.UnsupportedError, match=refused[name]):
            vp.merge(model)
        return
    vp.merge(model)
    assert type(model.blocks[0]).__module__.startswith("timm.")
    assert close(model(images()), output)
    vp.detach(model)
    assert close(model(images()), base)


def test_attention_by_itself():
    """Without positions and what acts at its sites, as methods for clips use it over the frames."""
    model = made("positions")
    vp.attach(model, [vp.LoRA(rank=2), vp.PrefixTuning(num_tokens=2)], head=False)
    moved(model)
    block, h, plain = model.blocks[0], torch.randn(2, 7, 16, dtype=torch.float64), made("positions").blocks[0].attn
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in plain.qkv(h).chunk(3, dim=-1))
    y = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert close(block.attend(h), plain.proj(y))


def test_refused(family):
    model = made(family)
    for method, sentence in (
        (vp.VPT(deep=False), "pixels of a map, in which prompts have no place"),
        (vp.DTL(), "pixels of a map, beside which nothing is carried"),
    ):
        with pytest.raises(vp.UserError, match=sentence):
            vp.attach(model, method)
    with pytest.raises(vp.UnsupportedError, match="tokens in a line, but those of VisionTransformerSAM are the pixels"):
        vp.DensePredictor(model, classes=2)
    vp.attach(model, vp.RepAdapter(bottleneck=4))
    with pytest.raises(vp.UnsupportedError, match="windows of this block are filled up with zeros"):
        vp.merge(model)


def test_the_first_drop_path_drops_windows(family):
    """As in timm's own block, with the same draws; the second one drops samples."""
    models = [made(family), made(family)]
    vp.attach(models[0], vp.LoRA(rank=2), head=False)
    outputs = []
    for model in models:
        for block in model.blocks:
            block.drop_path1, block.drop_path2 = DropPath(0.5).train(), DropPath(0.5).train()
        torch.manual_seed(5)
        outputs.append(model(images(4)))
    assert close(*outputs)
    torch.manual_seed(6)
    assert not close(models[0](images(4)), outputs[1])


def test_counts():
    """Trained parameters: 12 blocks of width 768."""
    with torch.device("meta"):
        model = timm.create_model("samvit_base_patch16")
    for method, expected in [
        (vp.LoRA(rank=8), 12 * 8 * 4 * 768),
        (vp.AdaptFormer(bottleneck=64), 12 * (2 * 768 * 64 + 64 + 768)),
        (vp.VPT(num_tokens=10), 12 * 10 * 768),
        (vp.SSF(), 12 * 22 * 768 + 2 * 768 + 2 * 2 * 256),
        (vp.LoRA(rank=8, targets=("neck_0", "neck_2")), 8 * (768 + 256) + 8 * (9 * 256 + 256)),
    ]:
        vp.attach(model, method, head=False)
        assert sum(parameter.numel() for parameter in model.peft.parameters()) == expected, method
        vp.detach(model)
