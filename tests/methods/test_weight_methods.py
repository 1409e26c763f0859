"""What the matrix does not say of the methods that change weights: DoRA, VeRA, KronA, KAdaptation, and compositions."""

import math

import pytest
import torch
from conftest import CASES, adapted, adapter_tensors, distance, randomise
from reference.hosts import HOSTS
from safetensors.torch import load_file

import visionpeft as vp

HOST = {host.name: host for host in HOSTS}
CASE = next(case for case in CASES if case.name == "vera")


def output_of(model, seed=0):
    with torch.no_grad():
        return model(HOST["vit_cls"].inputs(4, torch.float64, seed))


def attached(*methods, names=None, seed=1, head=True):
    """A host in float64 with each method as an adapter of its own, all active, moved off their start."""
    model = HOST["vit_cls"].build(torch.float64)
    torch.manual_seed(0)
    for number, method in enumerate(methods):
        name = names[number] if names else "abcdef"[number]
        vp.attach(model, method, name, head=head)
        randomise(model.peft[name], seed + number)
    vp.activate(model, list(model.peft))
    return model.eval()


def test_dora_starts_with_the_lengths_of_the_rows():
    model = HOST["vit_cls"].build(torch.float64)
    weight = model.blocks[1].attn.qkv.weight.detach().clone()
    vp.attach(model, vp.DoRA(rank=2, targets=("k",)))
    magnitude = model.peft["default"].get_parameter("dora.visual.1.k.magnitude")
    assert torch.allclose(magnitude, weight[32:64].square().sum(1).sqrt(), rtol=1e-14)


def test_dora_leaves_out_the_gradient_of_the_length():
    """A change of B along V does not change V / |V|; with |V| as a constant its gradient is not zero."""
    model = attached(vp.DoRA(rank=2, targets=("fc1",)))
    layer = model.peft["a"].get_submodule("dora.visual.0.fc1")
    weight = model.blocks[0].mlp.fc1.weight.detach()
    model(HOST["vit_cls"].inputs(2, torch.float64)).square().sum().backward()
    V = (weight + layer.B @ layer.A).detach().requires_grad_()
    x = torch.randn(3, 32, dtype=torch.float64)
    direction = torch.randn(3, len(V), dtype=torch.float64)
    y = layer(x, x @ weight.T + 1, weight, torch.ones(len(V), dtype=torch.float64))
    (found,) = torch.autograd.grad((y * direction).sum(), layer.B)
    constant = (layer.magnitude / V.norm(dim=1)).detach()[:, None]
    (of_V,) = torch.autograd.grad(((x @ (constant * V).T) * direction).sum(), V)
    assert distance(found, of_V @ layer.A.T.detach()) < 1e-12
    (whole,) = torch.autograd.grad(
        ((x @ (layer.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)).T) * direction).sum(), V
    )
    assert distance(found, whole @ layer.A.T.detach()) > 1e-2


@pytest.mark.parametrize("others", [[vp.BitFit()], [vp.AdaLoRA(rank=2, initial_rank=2)], [vp.LoRA(rank=2), vp.SSF()]])
def test_dora_sees_the_backbones_weight_whatever_is_stacked(others):
    """Merged equals adapted beside methods whose names sort before and behind it."""
    model = attached(*others, vp.DoRA(rank=2, targets=("q", "fc2")))
    active = output_of(model)
    vp.merge(model)
    assert distance(output_of(model), active) < 1e-10
    vp.unmerge(model)
    assert torch.equal(output_of(model), active)


def test_two_doras_act_together_but_are_not_merged():
    model = attached(vp.DoRA(rank=2), vp.DoRA(rank=3), head=False)
    active = output_of(model)
    vp.activate(model, ["b", "a"])
    assert torch.equal(output_of(model), active)
    with pytest.raises(vp.UnsupportedError, match="merge with one of their adapters active"):
        vp.merge(model)
    assert torch.equal(output_of(model), active)
    vp.activate(model, "b")
    alone = output_of(model)
    vp.merge(model)
    assert distance(output_of(model), alone) < 1e-10


def test_dora_with_a_row_of_zeros_stays_finite():
    model = HOST["vit_cls"].build()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[3] = 0
    before = model(HOST["vit_cls"].inputs())
    vp.attach(model, vp.DoRA(rank=2, targets=("fc1",)))
    output = model(HOST["vit_cls"].inputs())
    assert distance(output, before) < 1e-6
    output.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in vp.trainable_parameters(model))


def test_random_matrices_of_vera_are_pinned():
    """A saved adapter holds the seed, so the values may never change."""
    model = HOST["vit_cls"].build()
    vp.attach(model, vp.VeRA(rank=4, seed=0), head=False)
    matrices = model.peft["default"].get_submodule("vera.visual.matrices")
    bound = math.sqrt(6 / 32)
    assert matrices.A_32.shape == (4, 32)
    assert [round(v / bound * 2**24) for v in matrices.A_32[0, :3].double().tolist()] == PINNED
    assert [round(v / math.sqrt(6 / 4) * 2**24) for v in matrices.B_32[0, :3].double().tolist()] == PINNED_B
    assert matrices.A_32.abs().max() <= bound
    assert matrices.A_32.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert abs(matrices.A_32.mean().item()) < bound / 5


PINNED = [4227306, 5865050, -10137826]
PINNED_B = [5391888, -10041138, -5065046]


def test_matrices_of_vera_are_two_draws_where_rank_and_width_are_the_same():
    model = HOST["vit_cls"].build()
    vp.attach(model, vp.VeRA(rank=32), head=False)
    A, B = model.peft["default"].get_submodule("vera.visual.0.q").matrices
    assert A.shape == B.shape
    assert not (A == B).any()


def test_compacter_starts_near_the_backbone():
    model = HOST["vit_cls"].build(torch.float64)
    before = output_of(model)
    torch.manual_seed(0)
    vp.attach(model, vp.Compacter(bottleneck=16), head=False)
    assert 0 < distance(output_of(model.eval()), before) < 0.01


def test_vera_saves_vectors_alone_and_shares_its_matrices(tmp_path):
    model = adapted(HOST["vit_cls"], CASE)
    vp.save(model, tmp_path)
    names = {name.rpartition(".")[2] for name in load_file(tmp_path / "adapter.safetensors") if "vera" in name}
    assert names == {"b", "d"}
    part = model.peft["default"].vera
    first, last = part.visual["0"]["q"], part.visual["2"]["v"]
    assert first.matrices[0].data_ptr() == last.matrices[0].data_ptr()
    assert not any(tensor.requires_grad for tensor in first.matrices)
    other = HOST["vit_cls"].build()
    vp.attach(other, vp.VeRA(rank=5, seed=4))
    assert not torch.equal(other.peft["default"].vera.visual["0"]["q"].matrices[0], first.matrices[0])


def test_shapes_that_do_not_divide_are_refused():
    model = HOST["vit_cls"].build()
    for method, sentence in (
        (vp.KronA(shape=(5, 4)), r"shape \(5, 4\) does not divide q, which maps 32 to 32"),
        (vp.KAdaptation(terms=3), "terms=3 does not divide q"),
        (vp.Compacter(bottleneck=9, terms=3), "terms=3 does not divide the width 32 of the visual tower"),
    ):
        with pytest.raises(vp.ConfigurationError, match=sentence):
            vp.attach(model, method)
    assert not hasattr(model, "peft")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: vp.DoRA(rank=0), "rank must be a positive integer"),
        (lambda: vp.VeRA(initial=0.0), "initial must not be 0"),
        (lambda: vp.VeRA(seed=-1), "seed must be"),
        (lambda: vp.KronA(shape=(2, 0)), "shape must be two positive integers or None"),
        (lambda: vp.KAdaptation(terms=0), "terms must be a positive integer"),
        (lambda: vp.Compacter(bottleneck=6, terms=4), "bottleneck 6 must be a multiple of terms 4"),
        (lambda: vp.Compacter(placement="pre"), "placement must be one of houlsby, pfeiffer"),
        (lambda: vp.MAM(num_tokens=0), "num_tokens must be a positive integer"),
        (lambda: vp.MAM(bottleneck=0), "bottleneck must be a positive integer"),
        (lambda: vp.UniPELT(targets=()), "targets must be a list of names"),
        (lambda: vp.UniPELT(activation="tanh"), "activation must be one of gelu, relu"),
        (lambda: vp.UniPELT(init="zero"), "init must be one of houlsby, lora"),
        (lambda: vp.AdaLoRA(rank=8, initial_rank=4), "initial_rank must not be below rank"),
        (lambda: vp.AdaLoRA(start=0.8, end=0.7), "start < end"),
    ],
)
def test_values_without_sense_are_refused(make, sentence):
    with pytest.raises(vp.ConfigurationError, match=sentence):
        make()


@pytest.mark.parametrize("method", [vp.DoRA, vp.VeRA, vp.KronA, vp.KAdaptation, vp.AdaLoRA, vp.UniPELT])
def test_unknown_targets_are_refused_by_name(method):
    with pytest.raises(vp.ConfigurationError, match=f"{method.__name__}: target 'qkv' matches no layer"):
        vp.attach(HOST["vit_cls"].build(), method(targets=("qkv",)))
    with pytest.raises(vp.ConfigurationError, match="'patch_embed' matches no layer"):  # a convolution
        vp.attach(HOST["vit_cls"].build(), method(targets=("patch_embed",)))


def test_mam_is_its_two_parts_attached_together():
    """The same tensors under the names of the parts give the same output."""
    whole = attached(vp.MAM(num_tokens=3, bottleneck=4), names=["default"])
    parts = vp.attach(
        HOST["vit_cls"].build(torch.float64), [vp.PrefixTuning(3), vp.AdaptFormer(4, scale=4.0, dropout=0.0)]
    ).eval()
    state = {}
    for name, tensor in whole.peft["default"].state_dict().items():
        own = "prefix_tuning" if ".kv." in name else "adapt_former"
        state[name.replace("mam.", f"{own}.")] = tensor
    parts.peft["default"].load_state_dict(state)
    assert torch.equal(output_of(parts), output_of(whole))


def test_gates_of_unipelt_bypass_what_they_close():
    """With all gates closed the model is the backbone with keys and values of zero; open, it is the parts."""
    model = attached(vp.UniPELT(rank=2, num_tokens=2, bottleneck=4), names=["default"])
    part = model.peft["default"].unipelt.visual

    def set_gates(value):
        with torch.no_grad():
            for module in part.modules():
                if hasattr(module, "gate"):
                    module.gate.linear.weight.zero_()
                    module.gate.linear.bias.fill_(value)

    parts = vp.attach(
        HOST["vit_cls"].build(torch.float64),
        [vp.LoRA(rank=2), vp.PrefixTuning(2), vp.Adapter(4, placement="pfeiffer", activation="relu")],
    ).eval()
    state = {}
    for name, tensor in model.peft["default"].state_dict().items():
        for inner, method in (("low_rank", "lora"), ("prefix", "prefix_tuning"), ("bottleneck", "adapter")):
            if f".{inner}." in name:
                state[name.replace(f".{inner}.", ".").replace("unipelt.", f"{method}.")] = tensor
        if name.startswith("head."):
            state[name] = tensor
    parts.peft["default"].load_state_dict(state)
    set_gates(40.0)
    assert distance(output_of(model), output_of(parts)) < 1e-12
    with torch.no_grad():
        for name, tensor in parts.peft["default"].named_parameters():
            if not name.startswith("head."):
                tensor.zero_()  # zero keys and values are still there
    set_gates(-40.0)
    assert distance(output_of(model), output_of(parts)) < 1e-12


def test_gates_of_unipelt_are_set_by_each_image():
    model = attached(vp.UniPELT(rank=2, num_tokens=2, bottleneck=4), names=["default"])
    gate = model.peft["default"].unipelt.visual["0"]["mlp_out"].gate
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    values = gate(x)
    assert values.shape == (3, 1, 1)
    scores = x @ gate.linear.weight[0] + gate.linear.bias
    assert torch.allclose(values.flatten(), (1 / (1 + (-scores).exp())).mean(1), rtol=1e-13)
    assert values.std() > 1e-3


@pytest.mark.parametrize("prompts", [[], [vp.VPT(num_tokens=2)]], ids=["alone", "beside_prompts"])
@pytest.mark.parametrize("reads", ["input", "values"])
def test_prefix_gate_of_unipelt_reads_what_the_attention_reads(reads, prompts):
    """The output of the norm before it, prompts included, whatever LoRA does to v; "values" reads that change."""
    method = vp.UniPELT(rank=2, num_tokens=2, bottleneck=4, prefix_gate=reads)
    model = attached(method, *prompts, names=["default", "prompts"])
    gate = model.peft["default"].unipelt.visual["0"]["kv"].gate
    seen, norms = [], []
    gate.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output.detach())))
    for block in model.blocks[:1]:
        block.norm1.register_forward_hook(lambda module, args, output: norms.append(output.detach()))
    output_of(model)
    with torch.no_grad():
        model.peft["default"].unipelt.visual["0"]["v"].low_rank.B.mul_(3).add_(0.5)
    output_of(model)
    (first, opened), (second, opened_again) = seen
    assert first.shape[1] == 17 + 2 * len(prompts)
    assert torch.equal(first, second) == torch.equal(opened, opened_again) == (reads == "input")
    if reads == "input":
        assert torch.equal(first, norms[0])


def test_unipelt_starts_as_published():
    """A bottleneck of BERT's start with ReLU, which does not leave the backbone as it is."""
    model = HOST["vit_cls"].build(torch.float64)
    before = output_of(model.eval())
    vp.attach(model, vp.UniPELT(rank=2, num_tokens=2, bottleneck=16), head=False)
    part = model.peft["default"].unipelt.visual["1"]["mlp_out"].bottleneck
    assert isinstance(part.act, torch.nn.ReLU)
    for layer in (part.down, part.up):
        assert 0.015 < layer.weight.std().item() < 0.025
        assert not layer.bias.any()
    assert distance(output_of(model), before) > 1e-4


def test_alpha_is_divided_by_the_rank_of_each_layer():
    """Where `overrides` gives a layer another rank, its scale is alpha over that rank, acting and merged."""
    host = HOST["vit_cls"]
    model = host.build(torch.float64)
    before = model.blocks[0].attn.qkv.weight.detach().clone()
    vp.attach(model, vp.LoRA(rank=4, alpha=6, overrides={"v": 2}))
    randomise(model.peft["default"])
    inputs = host.inputs(dtype=torch.float64)
    with torch.no_grad():
        active = model.eval()(inputs)
    tensors = {name: tensor.detach().clone() for name, tensor in adapter_tensors(model).items()}
    vp.merge(model)
    for site, rank, rows in (("q", 4, slice(0, 32)), ("v", 2, slice(64, 96))):
        a, b = (tensors[f"lora.visual.0.{site}.{name}"] for name in "AB")
        assert len(a) == rank
        change = model.blocks[0].attn.qkv.weight[rows] - before[rows]
        assert distance(change, 6 / rank * b @ a) < 1e-12
    with torch.no_grad():
        assert distance(model(inputs), active) < 1e-12


def test_merging_into_weights_that_are_trained_is_undone():
    """A weight that is trained itself and changed by LoRA holds both when merged, and all of that is taken back."""
    model = HOST["vit_cls"].build(torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vp.attach(model, [vp.LastBlocks(1), vp.LoRA(rank=2, targets=("q", "fc2"))])
    randomise(model.peft["default"])
    active = output_of(model.eval())
    vp.merge(model)
    assert distance(output_of(model), active) < 1e-12
    vp.unmerge(model)
    assert torch.equal(output_of(model), active)
    vp.merge(model)
    vp.detach(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_weight_of_several_layers_takes_no_change_of_one():
    """Two blocks with one matrix: LoRA beside it is another one in each, which no one matrix is; a trained copy is."""

    def build():
        model = HOST["vit_cls"].build(torch.float64).eval()
        model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
        return model

    for blocks in ("all", [0]):
        model = vp.attach(build(), vp.LoRA(rank=2, targets=("q",), blocks=blocks))
        randomise(model.peft["default"])
        active = output_of(model)
        with pytest.raises(vp.UnsupportedError, match=r"q in block 0 .* cannot be merged: other layers"):
            vp.merge(model)
        assert torch.equal(output_of(model), active)

    model = vp.attach(build(), vp.LoRA(rank=2, targets=("fc2",)), train=["blocks.0.attn.qkv"])
    randomise(model.peft["default"])
    active = output_of(model)
    vp.merge(model)
    assert distance(output_of(model), active) < 1e-12
    assert model.blocks[1].attn.qkv.weight is model.blocks[0].attn.qkv.weight
    vp.detach(model)
    assert torch.equal(output_of(model), output_of(build()))
    assert model.blocks[1].attn.qkv.weight is model.blocks[0].attn.qkv.weight
