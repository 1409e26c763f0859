"""Backbones in stages, whose tokens are the pixels of maps: ConvNeXt."""

import copy
import functools

import block_checks
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt

import visionpeft as vp
from visionpeft.adapters import selfcheck
from visionpeft.adapters.fingerprint import fingerprint
from visionpeft.backbones import describe
from visionpeft.backbones.timm_convnext import SitedConvNeXtBlock
from visionpeft.methods.parts.addressing import select_blocks

DEPTHS = (1, 1, 2, 1)

# name -> how a ConvNeXt is built: version 1 or 2, with linear layers or with convolutions of single pixels
FORMS = {
    "v1": {},
    "v2_conv": {"use_grn": True, "ls_init_value": None, "conv_mlp": True},
}


@functools.cache
def _made(form: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = ConvNeXt(num_classes=5, depths=DEPTHS, dims=(8, 16, 24, 32), **FORMS[form]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # else layer scale and GRN, which start near zero, would hide every effect
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def made(form="v1"):
    return copy.deepcopy(_made(form))


def images(number=2, size=(64, 96)):
    return torch.randn(number, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def moved(model):
    """Every tensor of the adapter moved from where it starts; returns those of its modules by path."""
    generator = torch.Generator().manual_seed(2)
    part = model.peft["default"]
    for parameter in part.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    names = [name for name, _ in part.named_children() if name not in ("head", "trained")]
    module = part.get_submodule(f"{names[0]}.visual") if names else torch.nn.Module()
    return {name: value.detach() for name, value in module.named_parameters()}


def close(left, right):
    return torch.allclose(left, right, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def output_with(form, forward, size=(64, 96)):
    """What timm's model gives whose blocks run `forward(index, block, x)`, a formula that is written here."""
    model = made(form)
    for index, block in enumerate(block for stage in model.stages for block in stage.blocks):
        block.forward = functools.partial(forward, index, block)
    return model(images(size=size))


def linear(x, weight, bias):
    """Of a map (batch, in, rows, columns)."""
    return F.conv2d(x, weight[:, :, None, None], bias)


def branch(block, x):
    """The branch of timm's own block: what it adds to its stream."""
    return type(block).forward(block, x) - x


IDENTITY = {
    "lora": vp.LoRA(rank=2, targets=("fc1", "fc2", "reduction", "patch_embed")),
    "bit_fit": vp.BitFit(),
    "norms": vp.LayerNormTuning(),
    "ia3": vp.IA3(targets=("hidden",)),
    "rep_adapter": vp.RepAdapter(bottleneck=4, positions=("mlp",)),
    "adapt_former": vp.AdaptFormer(bottleneck=4, dropout=0.0),
    "convpass": vp.Convpass(bottleneck=4, positions=("mlp",)),
    "last_blocks": vp.LastBlocks(),
}
OTHERS = {
    "ssf": vp.SSF(std=0.1),
    "mona": vp.Mona(bottleneck=4, dropout=0.0),
    "adapter": vp.Adapter(placement="adapter_plus", drop_path=0.0),
}


@pytest.mark.parametrize("name", IDENTITY | OTHERS)
def test_exact_at_the_start_live_and_merged(form, name):
    """No change at the start, to the bit; then every tensor has an effect, and what can be merged computes the same."""
    method = (IDENTITY | OTHERS)[name]
    model = made(form)
    with torch.no_grad():
        base = model(images())
        vp.attach(model, method, head=False)
        assert torch.equal(model(images()), base) == (name in IDENTITY)
    moved(model)
    output = model(images())
    grads = torch.autograd.grad(output.square().sum(), list(model.peft.parameters()))
    assert all(bool(grad.any()) for grad in grads)
    assert not close(output, base)
    if name in ("adapt_former", "convpass", "mona", "adapter"):
        with pytest.raises(vp.UnsupportedError, match="cannot be merged"):
            vp.merge(model)
        return
    vp.merge(model)
    assert type(model.stages[0].blocks[0]).__module__.startswith("timm.")
    assert close(model(images()), output)
    vp.detach(model)
    assert torch.equal(model(images()), base)


def test_lora_is_timms_model_with_other_weights(form):
    model = made(form)
    vp.attach(model, vp.LoRA(rank=2, alpha=3, targets=("fc1", "fc2", "reduction"), blocks="stage:last:2"), head=False)
    values = moved(model)
    assert {name.partition(".")[0] for name in values} == {"2", "3", "4", "downsample"}
    expected = made(form)
    blocks = [block for stage in expected.stages for block in stage.blocks]
    layers = {f"{i}.{site}": getattr(block.mlp, site) for i, block in enumerate(blocks) for site in ("fc1", "fc2")}
    layers |= {f"downsample.{i}/reduction": expected.stages[i].downsample[1] for i in (2, 3)}
    with torch.no_grad():
        for path in {name.rpartition(".")[0] for name in values}:
            weight = layers[path].weight
            weight += 1.5 * (values[f"{path}.B"] @ values[f"{path}.A"]).view_as(weight)
        assert close(model(images()), expected(images()))
        assert not close(made(form)(images()), expected(images()))


def test_adapt_former_beside_the_block(form):
    model = made(form)
    vp.attach(model, vp.AdaptFormer(bottleneck=4, dropout=0.0, scale=0.5), head=False)
    values = moved(model)

    def forward(index, block, x):
        down, up = (
            [values[f"{index}.stream_in.{part}.{kind}"] for kind in ("weight", "bias")] for part in ("down", "up")
        )
        return x + branch(block, x) + 0.5 * linear(linear(x, *down).relu(), *up)

    assert close(model(images()), output_with(form, forward))
    assert not close(model(images()), output_with(form, lambda index, block, x: x + branch(block, x)))


@pytest.mark.parametrize("size", [(64, 96), (96, 64)], ids=str)
def test_convpass_and_mona_see_the_grid_of_every_image(form, size):
    """One adapter serves images of two sizes, which have as many pixels in the maps: the grid is that of the image."""
    values = {}

    def part(index, site, name):
        return values[f"{index}.{site}.{name}.weight"], values[f"{index}.{site}.{name}.bias"]

    def with_convpass(index, block, x):
        def gelu(x):
            return x * torch.sigmoid(1.702 * x)

        h = F.layer_norm(
            block.conv_dw(x).movedim(1, -1),
            block.norm.normalized_shape,
            block.norm.weight,
            block.norm.bias,
            block.norm.eps,
        )
        h = gelu(linear(h.movedim(-1, 1), *part(index, "mlp_in", "down")))
        h = gelu(F.conv2d(h, *part(index, "mlp_in", "conv"), padding=1))
        return x + branch(block, x) + 0.1 * linear(h, *part(index, "mlp_in", "up"))

    def with_mona(index, block, x):
        x = x + branch(block, x)
        site = f"{index}.stream_out"
        normed = F.layer_norm(x.movedim(1, -1), x.shape[1:2], *part(index, "stream_out", "norm")).movedim(-1, 1)
        h = values[f"{site}.norm_scale"][:, None, None] * normed + values[f"{site}.scale"][:, None, None] * x
        z = linear(h, *part(index, "stream_out", "down"))
        convolved = [
            F.conv2d(z, *part(index, "stream_out", f"depthwise.{i}"), padding=1 + i, groups=4) for i in range(3)
        ]
        z = z + sum(convolved) / 3
        z = z + linear(z, *part(index, "stream_out", "pointwise"))
        return x + linear(F.gelu(z), *part(index, "stream_out", "up"))

    convpass = vp.Convpass(bottleneck=4, positions=("mlp",), scale=0.1)
    for method, forward in ((convpass, with_convpass), (vp.Mona(bottleneck=4, dropout=0.0), with_mona)):
        model = made(form)
        vp.attach(model, method, head=False)
        values = moved(model)
        assert close(model(images(size=size)), output_with(form, forward, size))


def test_images_of_a_batch_do_not_influence_each_other(form):
    model = made(form)
    vp.attach(model, [vp.Mona(bottleneck=4), vp.AdaptFormer(bottleneck=4), vp.SSF()], head=False)
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.eval()
        assert close(model(images(3))[1:2], model(images(3)[1:2]))


@pytest.mark.parametrize(
    "name", sorted(n for n in dir(vp) if isinstance(getattr(vp, n), type) and issubclass(getattr(vp, n), vp.Method))
)
def test_every_method_acts_or_is_refused_by_a_sentence(name):
    """And a refused one leaves nothing behind."""
    try:
        method = getattr(vp, name)()
    except (TypeError, vp.UserError):
        pytest.skip("needs arguments")
    model = made()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        vp.attach(model, method)
    except vp.UserError:
        assert model.state_dict().keys() == before.keys()
    else:
        if not method.pending:
            assert model(images()).isfinite().all()
        vp.detach(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (vp.VPT(), "VPT adds tokens, which blocks of class ConvNeXtBlock would never see: they have no attention"),
        (vp.PrefixTuning(), "have no layer 'v'"),
        (vp.LoRA(), "LoRA: target 'q' matches no layer"),
        (vp.LoRA(targets=("conv_dw",)), "a convolution of single channels"),
        (vp.Adapter(placement="parallel"), "Adapter acts at site 'stream_mid' of blocks .* which have no attention"),
        (vp.FacT(targets=("fc1",)), "widths 8, 16, 24, 32, .* choose the blocks of one stage"),
        (vp.Mona(grid=(2, 3)), "leave grid out"),
        (vp.LoRA(targets=("fc1",), blocks="stage:4"), "names no stage; allowed are 'stage:0' to 'stage:3'"),
    ],
    ids=str,
)
def test_refused(method, sentence):
    with pytest.raises(vp.UserError, match=sentence):
        vp.attach(made(), method)


def test_what_shares_one_width_acts_inside_a_stage():
    model = made()
    vp.attach(model, vp.FacT(rank=2, targets=("fc1", "fc2"), blocks="stage:2"), head=False)
    assert {name.split(".")[2] for name, _ in model.peft["default"].named_parameters()} == {"2", "3", "factors"}


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("stage:2", [2, 3]),
        ("stage:-1", [4]),
        ("stage:last:2", [2, 3, 4]),
        ("stage:1:3", [1, 2, 3]),
        ("stage:all", [0, 1, 2, 3, 4]),
    ],
)
def test_stages(blocks, expected):
    assert select_blocks(blocks, 5, DEPTHS) == expected


def test_a_tower_without_stages():
    with pytest.raises(vp.ConfigurationError, match="names stages, of which this tower has none"):
        select_blocks("stage:1", 5)


# of the fact sheet: checked there by counting other libraries' parameters
COUNTS = [
    (vp.LoRA(rank=8, targets=("fc1", "fc2")), 1_443_840),
    (vp.DoRA(rank=8, targets=("fc1", "fc2")), 1_534_080),
    (vp.SSF(), 260_608),
    (vp.BitFit(), 130_304),
    (vp.LayerNormTuning(), 40_192),
    (vp.AdaptFormer(bottleneck=64), 2_330_496),
    (vp.Adapter(bottleneck=8), 307_104),
    (vp.IA3(targets=("hidden",)), 72_192),
    (vp.Convpass(bottleneck=8, positions=("mlp",)), 328_128),
    (vp.Mona(bottleneck=64), 2_750_592),
]


def test_counts():
    """Trained parameters on ConvNeXt-B."""
    with torch.device("meta"):
        model = timm.create_model("convnext_base")
    for method, expected in COUNTS:
        vp.attach(model, method, head=False)
        assert sum(parameter.numel() for parameter in model.peft.parameters()) == expected, method
        vp.detach(model)


def test_layers_between_stages_go_with_the_stage_after_them():
    tower = describe(made()).towers["visual"]
    between = [site for site in tower.layers if "/" in site]
    assert between == [f"downsample.{i}/{name}" for i in (1, 2, 3) for name in ("norm", "reduction")]
    model = made()
    vp.attach(model, vp.SSF(blocks="stage:1"), head=False)
    names = {name.split(".visual.")[1] for name, _ in model.peft["default"].named_parameters()}
    assert {name for name in names if name.startswith("downsample")} == {
        f"downsample.1/{layer}.{value}" for layer in ("norm", "reduction") for value in ("scale", "shift")
    }
    assert not any(name.startswith(("patch_embed", "norm")) for name in names)


def test_a_drift_that_a_small_layer_scale_would_hide(monkeypatch):
    """gamma starts at 1e-6: a sited block that leaves the branch out would be off by no more than that."""
    monkeypatch.setattr(selfcheck, "_check_block", block_checks.every_time)
    model = ConvNeXt(num_classes=5, depths=DEPTHS, dims=(8, 16, 24, 32))
    vp.attach(model, vp.LoRA(targets=("fc1",)))
    vp.detach(model)
    without = SitedConvNeXtBlock.branch
    monkeypatch.setattr(SitedConvNeXtBlock, "branch", lambda self, at, x: without(self, at, x) * (1 + 1e-3))
    with pytest.raises(vp.UnsupportedError, match="does not compute what its sited form computes"):
        vp.attach(ConvNeXt(num_classes=5, depths=DEPTHS, dims=(8, 16, 24, 32)), vp.LoRA(targets=("fc1",)))


@pytest.mark.parametrize("name", ["stages.0.blocks.0.mlp.grn.weight", "head.norm.bias", "stages.1.downsample.1.weight"])
def test_the_fingerprint_knows_every_weight(name):
    model = made("v2_conv")
    before = fingerprint(model)
    with torch.no_grad():
        model.head.fc.weight.add_(1)
        assert fingerprint(model) == before
        model.get_parameter(name).mul_(2)
    assert fingerprint(model) != before


def test_saved_and_loaded(tmp_path):
    model = made()
    vp.attach(model, [vp.SSF(), vp.Mona(bottleneck=4, dropout=0.0)])
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = model(images())
    vp.save(model, tmp_path / "adapter")
    other = made()
    vp.load(other, tmp_path / "adapter")
    assert torch.equal(other(images()), expected)


def test_the_image_tower_of_a_clip():
    vision = {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    clip = open_clip.CLIP(
        16, vision, {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    ).eval()
    with torch.no_grad():
        base = clip.encode_image(images().float())
        vp.attach(clip, vp.LoRA(targets=("fc1", "fc2"), towers="visual"))
        assert torch.equal(clip.encode_image(images().float()), base)
        for parameter in clip.peft.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        assert not torch.allclose(clip.encode_image(images().float()), base)


def labelled():
    return [(images(4), torch.tensor([0, 1, 2, 3]))]


@pytest.mark.parametrize("structure", ["lora", "adapter"])
def test_spt_changes_matrices_and_leaves_kernels_of_single_channels_to_their_entries(form, structure):
    model = vp.attach(made(form), vp.SPT(budget=4000, rank=2, structure=structure, matrix_share=0.02), head=False)
    vp.allocate(model, labelled())
    (method,) = model.peft["default"].methods
    sites = {name.split(".")[2] for name in method.structured}
    assert sites == {"fc1", "fc2"}
    assert any(".conv_dw." in name for name in method.entries)
    trained = model.peft["default"].num_parameters()
    assert trained <= 4000
    moved(model)
    found = model(images())
    if structure == "lora":
        vp.merge(model)
        plain = made(form)
        plain.load_state_dict(model.state_dict())
        assert close(found, plain(images()))
        return
    assert found.isfinite().all()
    own = model.peft["default"].spt.visual["0"]["fc2_adapter"]
    y = torch.randn(2, 4, 5, 8, dtype=torch.float64)  # channels last, as tokens are
    hidden = F.gelu(F.linear(y, own.down.weight, own.down.bias))
    expected = y + F.linear(hidden, own.up.weight, own.up.bias)
    if form == "v1":
        assert close(own(None, y, None, None), expected)
    else:
        assert close(own(None, y.permute(0, 3, 1, 2), None, None), expected.permute(0, 3, 1, 2))


def test_far_trains_neurons_of_layers_of_any_kind(form):
    model = vp.attach(made(form), vp.FAR(share=0.2), head=False)
    plain = made(form)
    for stage in vp.stages(model, labelled()):
        if stage == 1:
            moved(model)
            continue
        assert close(model(images()), plain(images()))
        moved(model)
        found = model(images())
        assert not torch.allclose(found, plain(images()), rtol=1e-3)
        vp.merge(model)
        plain.load_state_dict(model.state_dict())
        assert close(found, plain(images()))
        before = made(form).stages[0].blocks[0].mlp
        rows = (plain.stages[0].blocks[0].mlp.fc1.weight != before.fc1.weight).flatten(1).any(1)
        columns = (plain.stages[0].blocks[0].mlp.fc2.weight != before.fc2.weight).any(0).flatten()
        assert rows.equal(columns)
        assert rows.sum() == round(0.2 * len(rows))
        vp.unmerge(model)
