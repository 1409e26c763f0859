"""Economies of frozen layers: the same outputs and gradients as the formulas written out here, with less kept."""

import copy
import functools
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import visionpeft as vp
from visionpeft.costs.saved_bytes import saved_bytes, storages
from visionpeft.methods.lora import LowRank
from visionpeft.sites import frozen_layers, sited_layer_class

EVERY_MATRIX = ("q", "k", "v", "proj", "fc1", "fc2")
WIDTH, DEPTH, HEADS, PATCH, BATCH = 48, 2, 3, 8, 3


def backbone(dtype=torch.float64, **options):
    """A tiny lively ViT."""
    torch.manual_seed(0)
    options = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 4} | options
    model = VisionTransformer(32, PATCH, **options).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def adapted(methods, dtype=torch.float64, train=(), **options):
    """The ViT with adapters, one for each method, whose tensors are moved off their initial values."""
    model = backbone(dtype, **options)
    for index, method in enumerate(methods):
        vp.attach(model, method, name=f"a{index}", head=index == 0, train=train if index == 0 else ())
    names = [f"a{index}" for index in range(len(methods))]
    vp.activate(model, names)
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def images(dtype=torch.float64):
    """A batch."""
    return torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def written_out(model, x):
    """Logits of the ViT with what LoRA, SSF and PaFi add, by plain operations."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())

    def changed(place, y, x=None):
        for name in model.peft.active:
            path = f"peft.{name}.lora.visual.{place}"
            if f"{path}.A" in tensors:
                scaling = model.peft[name].methods[0].alpha / model.peft[name].methods[0].rank
                y = y + scaling * (x @ tensors[f"{path}.A"].T @ tensors[f"{path}.B"].T)
        for name in model.peft.active:
            path = f"peft.{name}.ssf.visual.{place}"
            if f"{path}.scale" in tensors:
                y = y * tensors[f"{path}.scale"] + tensors[f"{path}.shift"]
        return y

    def norm(place, module, x):
        centred = x - x.mean(-1, keepdim=True)
        normalised = centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
        return changed(place, normalised * module.weight + module.bias)

    def entries(place, part, like):
        total = torch.zeros(like.numel(), dtype=like.dtype)
        for name in model.peft.active:
            path = f"peft.{name}.pa_fi.visual.{place}.{part}"
            if path in tensors:
                total = total.index_put((tensors[f"{path}_index"].long(),), tensors[path], accumulate=True)
        return total.view_as(like)

    def linear(place, x, weight, bias):
        weight, bias = weight + entries(place, "weight", weight), bias + entries(place, "bias", bias)
        return changed(place, x @ weight.T + bias, x)

    projection = model.patch_embed.proj
    patches = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)
    x = changed("patch_embed", patches @ projection.weight.flatten(1).T + projection.bias)
    x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1) + model.pos_embed
    for i, block in enumerate(model.blocks):
        h = norm(f"{i}.norm1", block.norm1, x)
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        q, k, v = (linear(f"{i}.{site}", h, w, b) for site, w, b in zip("qkv", weights, biases, strict=True))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
        h = ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(f"{i}.proj", h, block.attn.proj.weight, block.attn.proj.bias)
        h = linear(f"{i}.fc1", norm(f"{i}.norm2", block.norm2, x), block.mlp.fc1.weight, block.mlp.fc1.bias)
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + linear(f"{i}.fc2", h, block.mlp.fc2.weight, block.mlp.fc2.bias)
    x = norm("norm", model.norm, x)[:, 0]
    return x @ model.head.weight.T + model.head.bias


def run(model, function):
    """Logits and gradients of the trained tensors and the images."""
    model.zero_grad()
    x = images().requires_grad_()
    logits = function(x)
    (logits * torch.arange(1.0, logits.numel() + 1).view_as(logits)).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "images": x.grad} | gradients


def difference(found, expected):
    """Largest relative difference, tensor by tensor, but for shifts of keys, whose gradient is zero up to rounding."""
    assert found.keys() == expected.keys()
    names = [name for name in found if not name.endswith(".k.shift")]
    return max(((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in names)


def lora(*targets, rank=3):
    """LoRA with a scale other than 1."""
    return vp.LoRA(rank=rank, alpha=5.0, targets=targets)


CASES = {
    "lora_all": [lora(*EVERY_MATRIX)],
    "lora_q_v": [lora("q", "v")],
    "lora_two": [lora("q", "fc1", "fc2"), lora(*EVERY_MATRIX, rank=2)],
    "ssf": [vp.SSF()],
    "lora_and_ssf": [lora(*EVERY_MATRIX), vp.SSF()],
    "pafi": [vp.PaFi(density=0.05)],
    "pafi_two_lora_ssf": [vp.PaFi(density=0.05), lora(*EVERY_MATRIX), vp.PaFi(density=0.1), vp.SSF()],
}


@pytest.mark.parametrize("train", [(), ("*.norm1", "*.fc1.bias", "*.qkv.bias")], ids=["frozen", "some_trained"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_formula(case, train):
    """In float64 to 1e-12, also where norms and biases of the backbone are trained."""
    model = adapted(CASES[case], train=train)
    found, expected = run(model, model), run(model, lambda x: written_out(model, x))
    assert len(found) >= 12
    assert difference(found, expected) <= 1e-12


@pytest.mark.parametrize("case", ["lora_all", "ssf"])
def test_a_small_change_would_be_seen(case):
    """The comparison is not blind: one factor or scale that is off by a billionth exceeds the tolerance."""
    model = adapted(CASES[case])
    expected = run(model, lambda x: written_out(model, x))
    with torch.no_grad():
        next(p for n, p in model.peft.named_parameters() if n.endswith(("fc1.B", "fc1.scale"))).mul_(1 + 1e-9)
    assert difference(run(model, model), expected) > 1e-11


@pytest.mark.parametrize("value", [0.0, 1e-12, 1e-3])
def test_ssf_with_scales_near_zero(value):
    """Where the output says nothing about the input, its gradient is still the formula's."""
    model = adapted([vp.SSF()])
    with torch.no_grad():
        for name, parameter in model.peft.named_parameters():
            if name.endswith("scale"):
                parameter[::5] = value
    assert difference(run(model, model), run(model, lambda x: written_out(model, x))) <= 1e-12


def test_ssf_guard_is_needed(monkeypatch):
    """Without the guard, scales near zero spoil the gradient."""
    model = adapted([vp.SSF()])
    with torch.no_grad():
        for name, parameter in model.peft.named_parameters():
            if name.endswith("scale"):
                parameter[::5] = 1e-12
    monkeypatch.setattr(frozen_layers, "SMALLEST_SCALE", 0.0)
    assert difference(run(model, model), run(model, lambda x: written_out(model, x))) > 1e-9


def saved_in_tokens(model, dtype=torch.float32, autocast=False):
    """What a step keeps, in token-wide tensors per block; images and labels do not count."""
    x, labels = images(dtype), torch.arange(BATCH)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return F.cross_entropy(model(x), labels)

    given = {tensor.untyped_storage().data_ptr() for tensor in (x, labels)}
    count, _ = saved_bytes(step, storages(model) | given)
    tokens = BATCH * model.pos_embed.shape[1] * model.embed_dim * 4
    return count / (model.depth * tokens if hasattr(model, "depth") else len(model.blocks) * tokens)


# widths at which what a rank or a bottleneck keeps is small beside the tokens, as in real backbones
WIDE = {"embed_dim": 192, "num_heads": 3}
KEPT = {
    "lora_all": (vp.LoRA(rank=1, targets=EVERY_MATRIX), 10.7, 15.5),
    "lora_qkv": (vp.LoRA(rank=1, targets=("q", "k", "v")), 10.7, 11.0),
    "lora_qv": (vp.LoRA(rank=1), 10.7, 12.0),
    "pafi": (vp.PaFi(density=0.001), 10.7, 15.5),
    "ssf": (vp.SSF(), 13.4, 20.0),
    "adapt_former": (vp.AdaptFormer(bottleneck=8), 9.9, None),
    "linear_probe": (vp.LinearProbe(), 0.1, 0.45),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_for_backward(name, monkeypatch):
    """What a step keeps stays below its bound, and the formulas run as they are keep more."""
    method, bound, formula = KEPT[name]
    model = adapted([method], torch.float32, **WIDE).train()
    assert saved_in_tokens(model) <= bound
    if formula is not None:
        monkeypatch.setattr(frozen_layers, "traced", lambda: True)
        assert saved_in_tokens(model) > formula


def test_sparse_changes_of_a_half_precision_backbone_keep_nothing_dense():
    """They get a product of their own, which keeps no matrix, and of the inputs only that of proj in its precision."""

    def kept(method):
        return saved_in_tokens(adapted([method], torch.bfloat16, **WIDE).train(), torch.bfloat16)

    assert kept(vp.PaFi(density=0.001)) <= 1.2 * kept(vp.LoRA(rank=1, targets=EVERY_MATRIX))


@pytest.mark.parametrize(
    "method",
    [vp.AdaptFormer(bottleneck=8, dropout=0.0), lora("q", "k", "v"), lora(*EVERY_MATRIX)],
    ids=["adapt_former", "lora_qkv", "lora_all"],
)
def test_autocast_keeps_no_casts_of_frozen_weights(method, monkeypatch):
    """Bitwise the gradients of PyTorch's own autocast, and the copies of the frozen weights are not kept."""
    model = adapted([method], torch.float32, **WIDE)

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images(torch.float32))
        logits.float().square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"logits": logits}

    found, kept = gradients(), saved_in_tokens(model, autocast=True)
    monkeypatch.setattr(frozen_layers, "traced", lambda: True)
    expected = gradients()
    assert found.keys() == expected.keys()
    assert [n for n in found if not torch.equal(found[n], expected[n])] == []
    # Nothing in front of the first adapter needs a gradient.
    casts = sum(2 * p.numel() for p in model.blocks[1:].parameters() if p.ndim == 2 and not p.requires_grad)
    tokens = DEPTH * BATCH * model.pos_embed.shape[1] * model.embed_dim * 4
    assert saved_in_tokens(model, autocast=True) - kept >= casts / tokens


def test_base_weights_keep_their_precision():
    """Autocast leaves the backbone's bytes as they are, and merging is exact afterwards."""
    model = adapted([lora(*EVERY_MATRIX)], torch.float32)
    before = copy.deepcopy({n: p for n, p in model.named_parameters() if not n.startswith("peft.")})
    with torch.autocast("cpu", torch.bfloat16):
        model(images(torch.float32)).float().sum().backward()
    after = dict(model.named_parameters())  # not by attribute: `head.weight` is what computes, the trained copy
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        expected = model(images(torch.float32))
        vp.merge(model)
        assert (model(images(torch.float32)) - expected).norm() <= 1e-5 * expected.norm()


def pieces():
    """A norm that is remembered, a frozen weight, a change of it and tokens."""
    torch.manual_seed(3)
    norm = nn.LayerNorm(6).double().requires_grad_(False)
    norm.__class__ = sited_layer_class(nn.LayerNorm)
    change = LowRank(6, 4, 2, 0.7, 0.0).double()
    nn.init.normal_(change.B)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    return norm, torch.randn(4, 6, dtype=torch.float64), change, x


def test_a_tensor_changed_in_place_is_not_made_again():
    """What a norm gave and somebody changed is kept as it is."""
    norm, weight, change, x = pieces()
    h = norm(x)
    h.mul_(2)
    y, _ = frozen_layers.linear(h, weight, None, [(None, (change,))])
    y.square().sum().backward()
    expected = F.linear(h, weight) + 0.7 * F.linear(F.linear(h, change.A), change.B)
    (grad,) = torch.autograd.grad(expected.square().sum(), change.A)
    assert (change.A.grad - grad).norm() <= 1e-12 * grad.norm()


def test_a_source_changed_in_place_is_refused():
    """What a norm read must not change before the backward pass; PyTorch says so."""
    norm, weight, change, x = pieces()
    y, _ = frozen_layers.linear(norm(x), weight, None, [(None, (change,))])
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.square().sum().backward()


TWICE = CASES | {  # not DoRA, which by its definition holds its norm fixed in the gradient
    "vpt": [vp.VPT(num_tokens=2)],
    "adaptformer": [vp.AdaptFormer(bottleneck=4)],
    "fish_mask": [vp.ChildTuning("F", share=0.6)],
    "bitfit": [vp.BitFit()],
}


def directional(function, tensors, directions, step=1e-6):
    """Derivative of a function of tensors along directions, by central differences."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor.add_(direction, alpha=sign * step)
        values.append(function())
        with torch.no_grad():
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor.sub_(direction, alpha=sign * step)
    return [(plus - minus) / (2 * step) for plus, minus in zip(*values, strict=True)]


@sdpa_kernel(SDPBackend.MATH)  # PyTorch refuses to differentiate its flash attention twice
def twice(model, tensors, x):
    """Relative errors of Hessian times direction, tensor by tensor, against differences of plain gradients."""
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors]

    def gradients(create_graph=False):
        loss = (model(x) * torch.arange(1.0, 13.0).view(3, 4)).sin().sum()
        return torch.autograd.grad(loss, tensors, create_graph=create_graph)

    product = sum((g * d).sum() for g, d in zip(gradients(True), directions, strict=True))
    found = torch.autograd.grad(product, tensors)
    expected = directional(gradients, tensors, directions)
    # What a shift of keys gives is zero up to rounding.
    least = 1e-4 * torch.stack([e.norm() for e in expected]).norm()
    return [((f - e).norm() / max(e.norm(), least)).item() for f, e in zip(found, expected, strict=True)]


RECOMPUTED = [(case, part) for case in ("lora_and_ssf", "pafi_two_lora_ssf") for part in ("mlp", "block")]


@pytest.mark.parametrize(("case", "recompute"), [*((case, None) for case in TWICE), *RECOMPUTED])
def test_second_derivatives_are_those_of_finite_differences(case, recompute):
    """Of adapters, of trained norms, whose output is made again, and of the images."""
    model = adapted(TWICE[case], train=("*.norm1",) if case.startswith("lora") else ())
    vp.economise(model, recompute=recompute)
    x = images().requires_grad_()
    assert max(twice(model, [*vp.trainable_parameters(model), x], x)) <= 2e-6


@pytest.mark.parametrize("case", ["lora_all", "lora_and_ssf", "pafi_two_lora_ssf"])
def test_second_derivatives_behind_frozen_adapters(case):
    """Of the images alone, where no layer keeps its input."""
    model = adapted(TWICE[case]).requires_grad_(False)
    x = images().requires_grad_()
    assert max(twice(model, [x], x)) <= 2e-6


@pytest.mark.parametrize("case", ["lora_all", "lora_and_ssf"])
def test_a_gradient_without_its_graph_would_be_seen(case, monkeypatch):
    """The comparison is not blind: sources that do not know where they come from give another second derivative."""
    remember = frozen_layers.remember

    def detached(y, function, *tensors):
        return remember(y, function, *(None if t is None else t.detach() for t in tensors))

    monkeypatch.setattr(frozen_layers, "remember", detached)
    model = adapted(TWICE[case])
    x = images().requires_grad_()
    assert max(twice(model, [*vp.trainable_parameters(model), x], x)) > 1e-2


def test_gradients_of_gradients_by_torch():
    """torch's own check in float64 of each function of ours, for every input that may need a gradient."""
    generator = torch.Generator().manual_seed(2)

    def some(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    weight, index = some(5, 4).detach(), torch.tensor([1, 7], dtype=torch.int32)

    def linear(x, bias, a, b, c, d, values):
        rows = (slice(0, 2), slice(3, 5))
        return frozen_layers._FrozenLinear.apply(
            x, weight, bias, None, rows, (0.5, 2.0), ((slice(1, 4), index),), a, b, c, d, values
        )

    inputs = (some(2, 3, 4), some(5), some(2, 4), some(1, 4), some(2, 2), some(2, 1), some(2))
    assert torch.autograd.gradgradcheck(linear, inputs)
    values = (some(2, 3, 4), some(4).detach().abs().add(0.5).requires_grad_(), some(4))
    assert torch.autograd.gradgradcheck(frozen_layers.scale_shift, values)
    assert torch.autograd.gradgradcheck(
        lambda x, v: frozen_layers.sparse_product(x, v, index, (5, 4), torch.float64), (some(3, 4), some(2))
    )


@sdpa_kernel(SDPBackend.MATH)
@pytest.mark.parametrize("case", ["lora_all", "ssf"])
def test_second_derivatives_under_autocast(case):
    """In bfloat16 they are those of float32 within its rounding."""
    products = []
    for enabled in (False, True):
        model = adapted(CASES[case], torch.float32)
        tensors = vp.trainable_parameters(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(images(torch.float32)).float().square().sum()
        gradients = torch.autograd.grad(loss, tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors)
        products.append(torch.cat([g.flatten() for g in second]))
    assert (products[0] - products[1]).norm() <= 0.1 * products[0].norm()


class Doubled(LowRank):
    """A subclass with a forward of its own."""

    def forward(self, x, y, weight, bias):
        """Twice the change."""
        return y + 2 * (super().forward(x, y, weight, bias) - y)


def test_a_subclass_with_its_own_forward_is_called():
    """It is not taken for its base class."""
    _, weight, change, x = pieces()
    change.__class__ = Doubled
    y, ((_, left),) = frozen_layers.linear(x, weight, None, [(None, (change,))])
    assert left == (change,)
    assert torch.equal(y, F.linear(x, weight))


def test_hooks_on_a_change_fire():
    """A module that somebody watches is called."""
    model = adapted([lora(*EVERY_MATRIX)])
    seen = []
    changes = [module for module in model.peft.modules() if isinstance(module, LowRank)]
    for module in changes:
        module.register_forward_hook(lambda module, *_: seen.append(module))
    found = run(model, model)
    assert len(seen) == len(changes) == DEPTH * len(EVERY_MATRIX)
    assert difference(found, run(model, lambda x: written_out(model, x))) <= 1e-12


def test_what_is_not_replaced_does_not_keep_the_projection():
    """With dropout, q and v are new tensors; k is not, and must not keep all three."""
    model = adapted([vp.LoRA(rank=1, dropout=0.1)], torch.float32, **WIDE).train()
    # q, k, v, attended, hidden, two inputs of norms; for each of q and v what is dropped, its mask and its input
    assert saved_in_tokens(model) <= 10.5 + 2 * 2.1


def test_own():
    """A part is copied, a whole is not."""
    whole = torch.randn(4, 5, 6)
    assert frozen_layers.own(whole).data_ptr() == whole.data_ptr()
    part = frozen_layers.own(whole[:, 0])
    assert torch.equal(part, whole[:, 0])
    assert part.untyped_storage().nbytes() == part.numel() * 4


def test_function_transforms_give_the_same_gradients():
    """`torch.func.grad` of a model with LoRA on all layers and SSF is what `backward` gives."""
    torch.manual_seed(0)
    model = backbone().eval()
    vp.attach(model, [vp.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2")), vp.SSF()])
    for parameter in vp.trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    trained = dict(model.peft.named_parameters(prefix="peft"))

    def loss(values: dict) -> torch.Tensor:
        # The head is in the model under two paths.
        return torch.func.functional_call(model, values, images, tie_weights=False).square().sum()

    transformed = torch.func.grad(loss)({name: value.detach() for name, value in trained.items()})
    model(images).square().sum().backward()
    for name, parameter in trained.items():
        # A shift of all keys changes nothing, so that its gradient is rounding.
        assert (transformed[name] - parameter.grad).norm() <= 1e-8 * parameter.grad.norm() + 1e-12, name


@pytest.mark.parametrize("recompute", [None, "mlp", "block"])
def test_nothing_is_kept_but_by_the_graph(recompute):
    """What is made again keeps no tokens alive that the backward pass, or recomputing, has let go."""
    model = adapted([lora("q", "v", "fc1", "fc2")], torch.float32)
    vp.economise(model, recompute=recompute)

    def tokens():
        gc.collect()
        every = [item for item in gc.get_objects() if type(item) is torch.Tensor and item.ndim == 3]
        return sorted(item.shape[2] for item in every if item.shape[:2] == (BATCH, 17))

    before = tokens()
    loss = model(images(torch.float32)).sum()
    if recompute is not None:
        assert tokens().count(4 * WIDTH) == before.count(4 * WIDTH)
    loss.backward()
    assert tokens() == before


@pytest.mark.parametrize("after", ["detach", "merge"])
def test_backward_behind_a_change_of_adapters(after):
    """The gradients of a forward pass are the same when its adapters no longer act."""
    model = adapted([lora(*EVERY_MATRIX)])
    expected = run(model, model)
    logits = model(images())
    parameters = dict(model.peft.a0.lora.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    getattr(vp, after)(model)
    (logits * torch.arange(1.0, logits.numel() + 1).view_as(logits)).square().sum().backward()
    for name, parameter in parameters.items():
        assert torch.equal(parameter.grad, expected[f"peft.a0.lora.{name}"]), name


def test_activations_that_work_in_place():
    """SSF in front of an activation that writes over its input."""
    model = adapted([vp.SSF()], act_layer=functools.partial(nn.ReLU, inplace=True))
    twin = adapted([vp.SSF()], act_layer=nn.ReLU)
    assert difference(run(model, model), run(twin, twin)) == 0


@pytest.mark.parametrize("watch", ["full_backward_pre_hook", "own_forward"])
def test_watched_projections_are_called(watch):
    """A fused projection that somebody watches or replaces is called."""
    model, seen = adapted([lora("q")]), []
    layer = model.blocks[1].attn.qkv
    if watch == "full_backward_pre_hook":
        layer.register_full_backward_pre_hook(lambda *_: seen.append(layer))
    else:
        original = layer.forward
        layer.forward = lambda x: (seen.append(layer), original(x))[1]
    run(model, model)
    assert seen == [layer]
