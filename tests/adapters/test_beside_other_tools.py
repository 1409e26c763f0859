"""Adapters beside tools of PyTorch and timm that write to, exchange, wrap or ask modules of the model they act in.

The right values are those of the library's own model: without adapters, or with the adapter merged into its weights.
"""

import abc
import copy
import functools

import pytest
import timm
import torch
import transformers
from accelerate import Accelerator, cpu_offload
from accelerate.state import AcceleratorState
from away_from_start import moved
from timm.models.vision_transformer import Block
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import random_unstructured, remove
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import visionpeft as vp
from visionpeft.errors import ConfigurationError, UnsupportedError

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(depth=2, width=32, **options):
    torch.manual_seed(0)
    options = {"num_heads": 2, "img_size": 32, "num_classes": 5, "depth": depth, "embed_dim": width} | options
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


def adapted(model=None, method=None, **options):
    model = build() if model is None else model
    vp.attach(model, method or vp.LoRA(rank=2), head=False, **options)
    moved(model)
    return model


def statistics(model):
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("averaged", [False, True])
def test_update_bn_leaves_the_statistics_of_the_backbone(averaged):
    """They are reset by it to be filled again in training, which a frozen normalisation never is."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).train()
    with torch.no_grad():
        for _ in range(3):
            model(2 * IMAGES + 1)
    model.eval()
    before, plain = statistics(model), model(IMAGES)
    model = adapted(model, vp.SSF() if averaged else vp.LoRA(rank=2, targets=("convolutions",)))
    expected = model(IMAGES)
    used = AveragedModel(model) if averaged else model
    used.train()
    update_bn([IMAGES] * 2, used)
    used.eval()
    torch.testing.assert_close(used(IMAGES), expected, rtol=0, atol=0)
    after = statistics(used.module if averaged else used)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    if not averaged:
        assert torch.equal(vp.detach(model)(IMAGES), plain)
        update_bn([IMAGES] * 2, model)  # the negative control: of a plain model it writes them
        assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def test_class_token_only_stands_aside_where_patches_are_pooled():
    """`reset_classifier(classes, "avg")` pools what the economy leaves out: NaN, the mean of nothing, if it did not."""
    model = adapted()
    plain = adapted()
    vp.economise(model, class_token_only=True)
    torch.testing.assert_close(model(IMAGES), plain(IMAGES))
    for each in (model, plain):
        torch.manual_seed(1)
        each.reset_classifier(7, "avg")
    assert torch.equal(model(IMAGES), plain(IMAGES))
    for each in (model, plain):
        torch.manual_seed(1)
        each.reset_classifier(7, "token")
    torch.testing.assert_close(model(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("name", ["repvgg_a0", "fastvit_t8"])
def test_fusing_layers_is_refused_while_adapters_act(name):
    """timm makes one layer of several by their weights, of which adapters are no part; merged they are."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(images)
        adapted(model, vp.LoRA(rank=2, targets=("all",)))
        expected = model(images)
        assert (expected - plain).abs().max() > 1e-3
        with pytest.raises(UnsupportedError, match=r"cannot be fused while adapters act in it.*merge first"):
            reparameterize_model(model)
        with vp.use(model, None):  # without what acts, it is the library's own again
            torch.testing.assert_close(reparameterize_model(model)(images), plain, rtol=1e-3, atol=1e-4)
        vp.merge(model, keep=False)
        torch.testing.assert_close(reparameterize_model(model)(images), expected, rtol=1e-3, atol=1e-4)


class OtherLinear(nn.Linear):
    """What a tool puts in the place of a linear layer."""


def exchange_linears(model):
    for block in model.blocks:
        old = block.mlp.fc1
        block.mlp.fc1 = OtherLinear(old.in_features, old.out_features)
        block.mlp.fc1.load_state_dict(old.state_dict())


def prune(model):
    model.prune_intermediate_layers([0], prune_norm=False, prune_head=False)


def wrap(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))


CHANGES = {
    exchange_linears: "'blocks.0.mlp.fc1' of the model was taken out or exchanged",
    prune: "'blocks.1' of the model was taken out or exchanged",
    wrap: "'blocks.0' is within a CheckpointWrapper",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_layers_that_are_exchanged_taken_out_or_wrapped(change, tmp_path):
    """What acted there acts no more, or under another name: nothing is trained, saved or merged of it."""
    model = adapted(method=vp.LoRA(rank=2, targets=("fc1",)))
    change(model)
    for act in (
        lambda: vp.trainable_parameters(model),
        lambda: vp.save(model, tmp_path / "adapter"),
        lambda: vp.merge(model),
    ):
        with pytest.raises(ConfigurationError, match=CHANGES[change]):
            act()
    assert not (tmp_path / "adapter").exists()
    if change is not exchange_linears:  # an exchanged layer is one that an adapter can act at
        with pytest.raises(UnsupportedError, match=r"of which 1 blocks are found|blocks of class CheckpointWrapper"):
            vp.activate(model, "default")
    vp.detach(model)
    assert {type(module).__module__.split(".")[0] for module in model.modules()} <= {"timm", "torch", __name__}


def test_a_layer_that_is_wrapped_by_compiling_it_may_be(tmp_path):
    """The negative control: it is still there, and the same."""
    model = adapted()
    expected = model(IMAGES)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    torch.testing.assert_close(model(IMAGES), expected)
    assert vp.trainable_parameters(model)


def test_synchronised_batch_normalisation_is_refused():
    """It exchanges the normalisations that keep the statistics of the backbone."""
    model = adapted(timm.create_model("resnet10t", num_classes=3), vp.LoRA(rank=2, targets=("convolutions",)))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(ConfigurationError, match=r"'conv1\.1' of the model was taken out or exchanged"):
        vp.trainable_parameters(model)


def test_a_forward_put_around_a_module_that_acts():
    """As accelerate's hooks do it: the model computes, and what acts cannot be changed until it is taken off."""
    model, same = adapted(), adapted()
    own = {module: module.forward for module in model.modules()}
    for module, forward in own.items():
        module.forward = lambda *given, forward=forward, **named: forward(*given, **named)
    for change in (
        lambda: vp.use(model, None).__enter__(),
        lambda: vp.merge(model),
        lambda: vp.detach(model),
        lambda: vp.disable(model),
    ):
        with pytest.raises(UnsupportedError, match="was replaced on the object itself while adapters act"):
            change()
        torch.testing.assert_close(model(IMAGES), same(IMAGES))
    for module in model.modules():
        vars(module).pop("forward", None)
    assert torch.equal(vp.detach(model)(IMAGES), build()(IMAGES))


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("train", [(), ("pos_embed", "cls_token", "norm")])
def test_what_accelerate_prepared_in_bfloat16_is_saved_and_switched(accelerator, train, tmp_path):
    """It puts a forward around that of the whole model, which is the library's own with adapters and without."""
    model, same = adapted(train=train), adapted(train=train)
    prepared = accelerator.prepare(model)
    assert prepared is model
    assert "forward" in vars(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, plain = same(IMAGES), build()(IMAGES)
    torch.testing.assert_close(model(IMAGES), expected.float())
    accelerator.backward(model(IMAGES).sum())
    vp.save(accelerator.unwrap_model(model), tmp_path)
    other = build()
    vp.load(other, tmp_path)
    torch.testing.assert_close(other(IMAGES), same(IMAGES))
    with vp.use(model, None):
        torch.testing.assert_close(model(IMAGES), plain.float())
    if not train:
        with vp.route(model, ["default", None, "default", None]):
            rows = model(IMAGES)
        torch.testing.assert_close(rows[::2], expected[::2].float(), rtol=0.02, atol=0.02)
        torch.testing.assert_close(rows[1::2], plain[1::2].float(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(model(IMAGES), expected.float())
    torch.testing.assert_close(vp.merge(model)(IMAGES), expected.float(), rtol=0.05, atol=0.05)
    vp.detach(model)
    torch.testing.assert_close(model(IMAGES), plain.float())


def test_layers_that_accelerate_fetches_are_refused():
    """The attention reads the weights of its layers, which are elsewhere until these are called."""
    model = build()
    expected = model(IMAGES)
    cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(model(IMAGES), expected)
    with pytest.raises(UnsupportedError, match=r"patch_embed\.proj are fetched by a hook of accelerate"):
        vp.attach(model, vp.LoRA(rank=2))
    torch.testing.assert_close(model(IMAGES), expected)


@pytest.mark.parametrize("train", [(), ("pos_embed", "cls_token", "norm")])
@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_timm_optimisers_decay_what_they_decay_of_the_plain_model(train, layer_decay):
    """A trained copy of a position embedding has no weight decay, as the embedding itself has none."""

    def decays(model):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimiser = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=layer_decay)
        return {names[id(p)]: group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}

    plain = decays(build())
    method = vp.LoRA(rank=2) if train else vp.FullFineTuning()
    found = decays(vp.attach(build(), method, train=train))
    copies = {name: value for name, value in found.items() if ".trained." in name or "peft.default.head" in name}
    expected = {name: plain[name.removeprefix("peft.default.").removeprefix("trained.")] for name in copies}
    assert copies == expected
    assert {0.0, 0.05} == set(copies.values())


def test_a_parametrised_weight_is_not_merged(tmp_path):
    """It is made of others, so that there is no tensor to put the merged one into."""
    model = build()
    for block in model.blocks:
        parametrizations.weight_norm(block.mlp.fc1)
    adapted(model, vp.LoRA(rank=2, targets=("fc1",)))
    expected = model(IMAGES)
    with pytest.raises(UnsupportedError, match=r"save and detach the adapter, call torch.nn.utils.parametrize"):
        vp.merge(model)
    assert torch.equal(model(IMAGES), expected)
    vp.save(model, tmp_path)
    vp.detach(model)
    for block in model.blocks:
        parametrize.remove_parametrizations(block.mlp.fc1, "weight")
    vp.load(model, tmp_path, check_fingerprint=False)
    torch.testing.assert_close(vp.merge(model)(IMAGES), expected)


def pruned(module):
    random_unstructured(module, "weight", 0.5)


EXCHANGES = {
    "pruned": pruned,
    "parametrised": lambda module: parametrize.register_parametrization(module, "weight", nn.Identity()),
    "spectral_norm": lambda module: nn.utils.spectral_norm(module, dim=0),
}


@pytest.mark.parametrize("part", ["head", "norm"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_weight_of_which_a_copy_is_trained_is_not_exchanged(exchange, part):
    """Refused before the model has lost its own: PyTorch takes the weight out, and puts it back where it can."""
    torch.manual_seed(1)
    model = vp.attach(build(), vp.LoRA(rank=2), train=["norm"])
    moved(model)
    expected, keys = model(IMAGES), model.state_dict().keys()
    if (exchange, part) != ("spectral_norm", "norm"):  # which is for matrices
        with pytest.raises(UnsupportedError, match=r"weight of .* cannot be pruned or parametrised while an adapter"):
            EXCHANGES[exchange](model.get_submodule(part))
    assert torch.equal(model(IMAGES), expected)
    assert model.state_dict().keys() == keys
    assert torch.equal(vp.detach(model)(IMAGES), build()(IMAGES))
    EXCHANGES["pruned"](model.get_submodule(part))  # the negative control: nothing acts in its place now


def test_a_layer_parametrised_while_an_adapter_acts_keeps_its_weight():
    """Taking the adapter off gave the layer the class that it had before, which knows of no parametrisation."""
    model = adapted(method=vp.LoRA(rank=2, targets=("fc1",)))
    expected = model(IMAGES)
    parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    for change in (vp.disable, vp.detach, vp.merge):
        with pytest.raises(UnsupportedError, match="weight of a Linear was parametrised while adapters act"):
            change(model)
        torch.testing.assert_close(model(IMAGES), expected)
    parametrize.remove_parametrizations(model.blocks[0].mlp.fc1, "weight")
    torch.testing.assert_close(vp.detach(model)(IMAGES), build()(IMAGES))


OF_OTHERS = {
    "pruned": (lambda module: random_unstructured(module, "B", 0.5), lambda module: remove(module, "B")),
    "weight_norm": (
        lambda module: parametrizations.weight_norm(module, "B"),
        lambda module: parametrize.remove_parametrizations(module, "B"),
    ),
    "orthogonal": (
        lambda module: parametrizations.orthogonal(module, "B"),
        lambda module: parametrize.remove_parametrizations(module, "B"),
    ),
}


@pytest.mark.parametrize("kind", OF_OTHERS)
def test_tensors_of_an_adapter_that_are_made_of_others_are_not_saved(kind, tmp_path):
    """What was saved of them under other names, no model could load."""
    model = adapted()
    module, (make, write_out) = model.peft["default"].get_submodule("lora.visual.0.q"), OF_OTHERS[kind]
    make(module)
    expected = model(IMAGES)
    for act in (
        lambda: vp.save(model, tmp_path / "ours"),
        lambda: vp.export_peft(model, tmp_path / "theirs"),
        lambda: vp.combine(model, {"default": 1.0}, "mix"),
    ):
        with pytest.raises(UnsupportedError, match=r"lora.visual.0.q.B of the adapter is made of other tensors"):
            act()
    assert not any(tmp_path.iterdir())
    write_out(module)
    vp.save(model, tmp_path / "ours")
    other = build()
    vp.load(other, tmp_path / "ours")
    torch.testing.assert_close(other(IMAGES), expected)


def test_a_head_that_is_made_of_others_is_written_out_first(tmp_path):
    model = build()
    parametrizations.weight_norm(model.head)
    vp.attach(model, vp.LoRA(rank=2))
    moved(model)
    expected = model(IMAGES)
    with pytest.raises(UnsupportedError, match=r"head.weight of the adapter .* first, with .*remove_parametrizations"):
        vp.save(model, tmp_path)
    parametrize.remove_parametrizations(model.peft["default"].head, "weight")
    vp.save(model, tmp_path)
    other = build()
    vp.load(other, tmp_path)
    torch.testing.assert_close(other(IMAGES), expected)


def test_a_head_that_was_quantised_with_the_model_is_refused(tmp_path):
    """torchao takes every linear layer by itself, that of the adapter among them, which then learns no more."""
    model = vp.attach(build(width=64), vp.LoRA(rank=2))
    quantize_(model, Int8WeightOnlyConfig())
    for act in (vp.trainable_parameters, vp.merge, lambda model: vp.save(model, tmp_path / "adapter")):
        with pytest.raises(ConfigurationError, match=r"'head\.weight' of adapter 'default' was quantised"):
            act(model)
    model = vp.attach(build(width=64), vp.LoRA(rank=2))
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and "block" in name)
    vp.save(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "part", "undo"),
    [
        (pruned, "blocks.0.mlp.fc1", lambda module: remove(module, "weight")),
        (pruned, "head", lambda module: remove(module, "weight")),
        (nn.utils.weight_norm, "head", nn.utils.remove_weight_norm),
        (nn.utils.spectral_norm, "blocks.1.attn.qkv", nn.utils.remove_spectral_norm),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_backbone_whose_weights_are_made_by_hooks_is_refused(change, part, undo, frozen):
    model = build().requires_grad_(not frozen)
    change(model.get_submodule(part))
    with pytest.raises(UnsupportedError, match=f"{part}.weight is made by a hook before each call; write it out first"):
        vp.attach(model, vp.LoRA(rank=2, targets=("q", "fc1")))
    expected = model(IMAGES)
    undo(model.get_submodule(part))
    torch.testing.assert_close(vp.attach(model, vp.LoRA(rank=2, targets=("q", "fc1")))(IMAGES), expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_layers_of_dynamic_quantisation_are_refused():
    """Their weight is packed, and they give no gradient; a merged model is converted like any other."""
    model = adapted()
    expected = model(IMAGES)
    convert = functools.partial(torch.ao.quantization.quantize_dynamic, qconfig_spec={nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedError, match=r"is a Linear of torch.ao.quantization, which packs its weight"):
        vp.attach(convert(build()), vp.LoRA(rank=2))
    converted = convert(vp.merge(model, keep=False))
    assert (converted(IMAGES) - expected).norm() / expected.norm() < 0.1


class CodedLinear(nn.Linear):
    """As layers of bitsandbytes: its parameter holds integers, of another shape, which it alone can read."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.abs().max() / 127
        codes = (linear.weight / self.scale).round().to(torch.int8).flatten()[:, None]
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.view(self.out_features, -1) * self.scale, self.bias)


@pytest.mark.parametrize("method", [vp.LoRA(rank=2), vp.VPT(), vp.LinearProbe()])
def test_layers_that_another_package_has_quantised_are_refused(method):
    """bitsandbytes and quanto: copies and rows of their weights ended in errors of PyTorch's."""
    model = build()
    expected = model(IMAGES)
    for block in model.blocks:
        block.mlp.fc1 = CodedLinear(block.mlp.fc1)
    assert (model(IMAGES) - expected).norm() / expected.norm() < 0.1
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.mlp\.fc1 is a CodedLinear .* \(a Parameter of int8\)"):
        vp.attach(model, method)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


class Mixed(abc.ABC):  # noqa: B024 (as those of quanto)
    """A first base that is abstract, as quanto's layers have one: Python lets no object have another class then."""


class MixedLinear(Mixed, nn.Linear):
    pass


class LinearMixed(nn.Linear, Mixed):
    pass


@pytest.mark.parametrize("path", ["blocks.1.mlp.fc1", "head"])  # checked by a copy before, or only when it is to act
def test_a_layer_whose_class_cannot_be_another_is_refused(path):
    model = build()
    plain, kinds = model(IMAGES), [type(module) for module in model.modules()]

    def exchange(kind):
        old = model.get_submodule(path)
        made = kind(old.in_features, old.out_features)
        made.load_state_dict(old.state_dict())
        model.set_submodule(path, made)

    exchange(MixedLinear)
    method = vp.LoRA(rank=2, targets=("q", "fc1"))
    with pytest.raises(UnsupportedError, match=r"nothing can act in a MixedLinear of .*test_beside_other_tools"):
        vp.attach(model, method)
    exchange(nn.Linear)
    assert [type(module) for module in model.modules()] == kinds
    assert not any("acting" in vars(module) or "sites" in vars(module) for module in model.modules())
    assert torch.equal(model(IMAGES), plain)
    exchange(LinearMixed)  # the negative control: its first base is the class of the library
    moved(vp.attach(model, method))
    assert not torch.allclose(model(IMAGES), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attaching_under_another_default_dtype(dtype):
    """What is trained beside a float32 backbone is float32; PyTorch has no orthogonal start in bfloat16."""
    for method in (vp.SMoP(), vp.LoRA(rank=2), vp.OLoRA(rank=2)):
        model = build()
        torch.set_default_dtype(dtype)
        try:
            vp.attach(model, method)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {parameter.dtype for parameter in model.peft.parameters()} == {torch.float32}
        assert model(IMAGES).isfinite().all()


def test_attaching_and_loading_within_inference_mode(tmp_path):
    """What is made there can be trained afterwards, also in a model that was made there, whose writes nobody counts."""
    model = adapted()
    vp.save(model, tmp_path)
    expected = model(IMAGES)
    with torch.inference_mode():
        inside = build()
        vp.load(inside, tmp_path)
        torch.testing.assert_close(inside(IMAGES), expected)
        next(inside.parameters()).add_(1)
        vp.detach(inside)
        with pytest.raises(vp.errors.StorageError, match="weights"):  # and not what was known of it before
            vp.load(inside, tmp_path)
    outside = build()
    with torch.inference_mode():
        vp.load(outside, tmp_path)
    outside.train()(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in vp.trainable_parameters(outside))


@pytest.mark.parametrize("method", [vp.OFT(block=8), vp.VeRA(rank=4)], ids=lambda method: method.name)
def test_everything_in_bfloat16(method):
    """No solver of PyTorch has bfloat16, and a buffer follows the parameters that act with it."""
    model = adapted(method=method)
    expected = model(IMAGES)
    for parameter in model.parameters():  # as FSDP's MixedPrecisionPolicy casts: parameters, and not buffers
        parameter.data = parameter.data.bfloat16()
    found = model(IMAGES.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 0.03


def test_private_training_with_opacus():
    """Its optimiser clips the gradients of each image, which `torch.func` gives: to the bit DP-SGD by hand."""
    opacus = pytest.importorskip("opacus")
    images, labels, limit, rate = IMAGES.double(), torch.arange(4), 0.1, 0.5
    for method in (vp.LoRA(rank=2), vp.VPT(), vp.SSF()):
        model = vp.attach(build().double(), method).train()
        moved(model)
        by_hand = copy.deepcopy(model)
        loader = DataLoader(TensorDataset(images, labels), batch_size=4)
        _, optimiser, loader = opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(vp.trainable_parameters(model), lr=rate),
            data_loader=loader,
            noise_multiplier=0.0,
            max_grad_norm=limit,
            poisson_sampling=False,
            grad_sample_mode="no_op",
        )
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

        def loss(values, image, label, model=model):
            return nn.functional.cross_entropy(functional_call(model, values, (image[None],)), label[None])

        for batch, truth in loader:
            values = {name: p.detach() for name, p in trained.items()}
            of_each = vmap(grad(loss), in_dims=(None, 0, 0))(values, batch, truth)
            for name, p in trained.items():
                p.grad_sample = of_each[name]
            optimiser.step()
        parameters = vp.trainable_parameters(by_hand)
        total = [torch.zeros_like(p) for p in parameters]
        for image, label in zip(images, labels, strict=True):
            gradients = torch.autograd.grad(nn.functional.cross_entropy(by_hand(image[None]), label[None]), parameters)
            norm = torch.cat([each.flatten() for each in gradients]).norm()
            total = [t + g * min(1.0, limit / (norm.item() + 1e-6)) for t, g in zip(total, gradients, strict=True)]
        for p, mine, t in zip(vp.trainable_parameters(model), parameters, total, strict=True):
            torch.testing.assert_close(p, mine - rate * t / len(images), rtol=0, atol=1e-14)


def wrapped():
    """A timm model within transformers."""
    torch.manual_seed(0)
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=5)
    return transformers.TimmWrapperForImageClassification(config).eval()


class Rows(Dataset):
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return {"pixel_values": IMAGES[index], "labels": index}


def test_the_trainer_of_transformers(tmp_path):
    """It trains, resumes and loads adapters of the timm part, whose backbone stays to the bit."""

    def trained(name, **options):
        model = wrapped()
        vp.attach(model.timm_model, vp.LoRA(rank=2))
        arguments = transformers.TrainingArguments(
            str(tmp_path / name), num_train_epochs=2, per_device_train_batch_size=2, learning_rate=0.01, report_to=[],
            use_cpu=True, save_strategy="epoch", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=Rows()).train(**options)
        return model.eval()

    model, plain = trained("whole"), wrapped()
    assert not torch.allclose(model(IMAGES).logits, plain(IMAGES).logits)
    resumed = trained("resumed", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert torch.equal(resumed(IMAGES).logits, model(IMAGES).logits)
    vp.save(model.timm_model, tmp_path / "adapter")
    other = wrapped()
    vp.load(other.timm_model, tmp_path / "adapter")
    assert torch.equal(other(IMAGES).logits, model(IMAGES).logits)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())


def test_what_transformers_saves_and_reads(tmp_path):
    """A merged model is read with its logits; of an attached one `from_pretrained` reads the backbone alone."""
    model = wrapped()
    vp.attach(model.timm_model, vp.LoRA(rank=2))
    moved(model.timm_model)
    expected = model(IMAGES).logits
    model.save_pretrained(tmp_path / "attached")
    vp.merge(model.timm_model, keep=False)
    model.save_pretrained(tmp_path / "merged")
    read = [type(model).from_pretrained(tmp_path / name).eval()(IMAGES).logits for name in ("attached", "merged")]
    torch.testing.assert_close(read[0], wrapped()(IMAGES).logits)
    torch.testing.assert_close(read[1], expected)
