"""What acts on the input of a layer, merged: together with other methods, row by row, and where it has no place."""

import pytest
import torch
from conftest import distance, randomise
from reference.hosts import HOSTS, Host, vit
from timm.models.vitamin import GeGluMlp

import visionpeft as vp

BY_NAME = {host.name: host for host in HOSTS}
EVERY = ("q", "k", "v", "proj", "fc1", "fc2")


def merged(host, *methods):
    """Outputs before and after merging, and the plain and the merged weights."""
    model = vp.attach(host.build(torch.float64), list(methods), head=False)
    randomise(model.peft["default"])
    inputs = host.inputs(dtype=torch.float64)
    with torch.no_grad():
        before = host.run(model.eval(), inputs)
        plain = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("peft.")}
        vp.merge(model)
        return before, host.run(model, inputs), plain, model.state_dict()


@pytest.mark.parametrize("host", ["vit_cls", "vit_res_post", "vit_swiglu", "beit", "eva_grouped", "clip_whole"])
def test_merges_with_what_acts_on_the_output(host):
    """In front of matrices that LoRA changes and whose outputs SSF and (IA)^3 scale."""
    methods = [vp.RepAdapter(4, scale=0.3), vp.LoRA(2, targets=EVERY), vp.SSF(), vp.IA3()]
    for order in (methods, methods[::-1]):
        before, after, *_ = merged(BY_NAME[host], *order)
        assert distance(after, before) < 1e-10


def test_two_adapters_fold_in_the_order_in_which_they_act():
    """R2(R1(x)) is W R2 R1, not W R1 R2."""
    host = BY_NAME["vit_cls"]
    before, after, *_ = merged(host, vp.RepAdapter(4, scale=2.0), vp.RepAdapter(2, scale=2.0))
    assert distance(after, before) < 1e-10


@pytest.mark.parametrize("host", ["vit_cls", "clip_visual"])
def test_ia3_leaves_the_queries_of_a_fused_matrix(host):
    """Of one matrix for q, k and v the rows of k and v change, with their biases, and no others."""
    _, _, plain, changed = merged(BY_NAME[host], vp.IA3())
    names = ("attn.qkv.weight", "attn.qkv.bias", "attn.in_proj_weight", "attn.in_proj_bias")
    fused = [name for name in plain if name.endswith(names)]
    assert len(fused) == 2 * 3
    for name in fused:
        width = len(plain[name]) // 3
        assert torch.equal(changed[name][:width], plain[name][:width])
        ratio = changed[name][width:] / plain[name][width:]
        assert (ratio - 1).abs().min() > 0
        if ratio.ndim == 2:
            assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio))
    last = [name for name in plain if name.endswith(("fc2.weight", "c_proj.weight"))]
    for name in last:
        ratio = changed[name] / plain[name]
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio))
    untouched = {name for name in plain if torch.equal(changed[name], plain[name])}
    assert set(plain) - untouched == {*fused, *last}


def test_rep_adapter_changes_all_rows_that_read_it():
    """q, k, v and fc1 change, nothing else."""
    _, _, plain, changed = merged(BY_NAME["vit_cls"], vp.RepAdapter(4))
    names = {name for name in plain if not torch.equal(changed[name], plain[name])}
    layers = ("attn.qkv", "mlp.fc1")
    assert names == {f"blocks.{i}.{each}.{part}" for i in range(3) for each in layers for part in ("weight", "bias")}
    for name in names:
        assert (changed[name] != plain[name]).flatten(1 if plain[name].ndim > 1 else 0).any(-1).all()


def test_a_norm_in_front_of_the_matrices_is_no_place():
    """ViTamin normalises inside its MLP: a shift or mixture of channels in front of that norm is no weight."""
    model = Host("vitamin", lambda: vit(mlp_layer=GeGluMlp, scale_mlp_norm=True)).build()
    vp.attach(model, vp.RepAdapter(4, positions=("mlp",)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(vp.UnsupportedError, match="RepAdapter"):
        vp.merge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    vp.detach(model)
    vp.attach(model, vp.IA3())
    randomise(model.peft["default"])
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()(images)
        assert distance(vp.merge(model)(images), expected) < 1e-5


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (vp.RepAdapter, {"bottleneck": 3, "groups": 2}),
        (vp.RepAdapter, {"groups": 0}),
        (vp.RepAdapter, {"positions": ()}),
        (vp.RepAdapter, {"dropout": 1.0}),
        (vp.IA3, {"targets": ("q",)}),
        (vp.IA3, {"targets": "k"}),
    ],
)
def test_refused_options(method, options):
    with pytest.raises(vp.ConfigurationError):
        method(**options)
