"""docs/promises.md, row by row: each row names a kind of use beside other tools, and the test of its name executes it.

Every test asks the other tool, or a formula in float64, for the right value: of LoRA, VPT-deep, SSF and AdaptFormer on
one tiny ViT, and of CoOp on a tiny CLIP.
"""

import contextlib
import copy
import importlib
import os
import pickle
import re
import threading
from pathlib import Path

import lightning.pytorch as pl
import onnxruntime
import open_clip
import pytest
import small_learner_runs  # noqa: F401  (makes OpenCLIP know the tiny CLIP)
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load, save
from timm.models import create_feature_extractor
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import visionpeft as vp
from visionpeft.clip.learners import CoOp
from visionpeft.tasks import ImageClassification
from visionpeft.tasks.optimisation import Optimisation

PAGE = Path(__file__).parents[1] / "docs" / "promises.md"
METHODS = {
    "lora": vp.LoRA(rank=2),
    "vpt_deep": vp.VPT(num_tokens=2, deep=True),
    "ssf": vp.SSF(),
    "adapt_former": vp.AdaptFormer(bottleneck=4, dropout=0.0),
}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(4) % 3
ROWS = {}


def row(name, verdict):
    """The row of the page that a test executes."""

    def mark(test):
        assert name not in ROWS
        ROWS[name] = (verdict, test.__name__)
        return test

    return mark


each_method = pytest.mark.parametrize("method", METHODS)


def build(dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 32, "num_classes": 3} | options
    return timm.create_model("vit_tiny_patch16_224", **options).eval().to(dtype)


def adapted(method, dtype=torch.float64, model=None, **options):
    """The ViT with a method whose tensors, and a head whose tensors, are off where they start."""
    model = build(dtype) if model is None else model
    torch.manual_seed(1)
    model = vp.attach(model, METHODS[method], **options)
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model, values, images=IMAGES):
    return functional_call(model, values, (images,)).square().sum()


def gradients(model, images=IMAGES, loss=lambda logits: logits.square().sum()):
    return dict(
        zip(trained(model), torch.autograd.grad(loss(model(images)), list(trained(model).values())), strict=True)
    )


def assert_near(found, expected, tolerance=1e-9):
    """Relative to all tensors together: some gradients, of a shift of all keys, are zero."""
    assert found.keys() == expected.keys()
    flat = [torch.cat([values[name].detach().double().flatten() for name in expected]) for values in (found, expected)]
    assert flat[1].norm() > 0
    assert (flat[0] - flat[1]).norm() / flat[1].norm() < tolerance


def step(model, size=0.1):
    """Move what is trained."""
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(size * torch.randn_like(parameter))


def frozen(model):
    return {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("peft.")}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# Averages


def check_average(model, update, averaged, decay, first):
    """(1 - d) sum_i d^(n - i) w_i + d^n w_0 of every tensor; `first`: the first update is w_0."""
    before = frozen(model)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    for turn in range(3):
        step(model)
        update(model)
        for name, value in model.state_dict().items():
            kept = 0.0 if turn == 0 and first else decay
            expected[name] = kept * expected[name] + (1 - kept) * value.double()
    found = averaged().state_dict()
    assert_near(found, expected)
    assert not torch.equal(averaged()(IMAGES), model(IMAGES))
    return before


@row("timm `ModelEmaV3`", "promised")
@each_method
def test_model_ema(method):
    model = adapted(method)
    average = ModelEmaV3(model, decay=0.9)
    before = check_average(model, average.update, lambda: average.module, 0.9, first=False)
    assert_near(frozen(average.module), before)


@row("torch `AveragedModel`", "promised")
@each_method
def test_averaged_model(method):
    model = adapted(method)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    before = check_average(model, average.update_parameters, lambda: average.module, 0.9, first=True)
    assert same(frozen(average.module), before)


@row("Lightning `EMAWeightAveraging`", "promised")
@pytest.mark.filterwarnings("ignore")
@each_method
def test_lightning_averaging(method, tmp_path):
    names = ["red", "green", "blue"]
    options = {"backbone": "test_vit", "pretrained": False, "backbone_kwargs": {"img_size": 32, "depth": 2}}
    rates = Optimisation(lr=0.05, warmup_epochs=0)
    task = ImageClassification(METHODS[method], names, optimisation=rates, **options)
    weights, before = [], frozen(task.model)

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            weights.append({name: p.detach().double().clone() for name, p in trained(pl_module).items()})

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [EMAWeightAveraging(decay=0.5), Record()]
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=callbacks, default_root_dir=tmp_path, **quiet)
    trainer.fit(task, DataLoader(TensorDataset(IMAGES.float(), LABELS), batch_size=2))
    expected = weights[0]
    for now in weights[1:]:
        expected = {name: (expected[name] + now[name]) / 2 for name in now}
    assert_near(trained(task), expected, 1e-6)
    assert same(frozen(task.model), before)


# torch.func


@row("`functional_call`", "promised")
@each_method
def test_functional_call(method):
    model, twin = adapted(method), adapted(method)
    step(twin)
    assert torch.equal(functional_call(model, dict(trained(twin)), (IMAGES,)), twin(IMAGES))
    assert not torch.equal(model(IMAGES), twin(IMAGES))


@row("`torch.func.grad`", "promised")
@each_method
def test_grad(method):
    model = adapted(method)
    assert_near(grad(lambda values: loss_of(model, values))(trained(model)), gradients(model))


@row("gradients of each sample", "promised")
@each_method
def test_gradients_of_each_sample(method):
    model = adapted(method)
    values = {name: p.detach() for name, p in trained(model).items()}
    found = vmap(grad(lambda given, image: loss_of(model, given, image[None])), in_dims=(None, 0))(values, IMAGES)
    for index in range(len(IMAGES)):
        one = gradients(model, IMAGES[index : index + 1])
        assert_near({name: value[index] for name, value in found.items()}, one)


@row("`vmap` over adapters", "promised")
@each_method
def test_vmap_over_adapters(method):
    models = [adapted(method), adapted(method)]
    step(models[1])
    stacked = {name: torch.stack([trained(each)[name].detach() for each in models]) for name in trained(models[0])}
    found = vmap(lambda values: functional_call(models[0], values, (IMAGES,)))(stacked)
    for logits, model in zip(found, models, strict=True):
        assert torch.allclose(logits, model(IMAGES), rtol=0, atol=1e-10)


def moved(values, direction, size):
    return {name: value + size * direction[name] for name, value in values.items()}


def directions(model):
    values = {name: p.detach() for name, p in trained(model).items()}
    return values, {name: torch.randn_like(value) for name, value in values.items()}


@row("`jvp`", "promised")
@each_method
def test_jvp(method):
    model = adapted(method)
    values, direction = directions(model)
    with sdpa_kernel(SDPBackend.MATH):
        _, found = jvp(lambda given: loss_of(model, given), (values,), (direction,))
    with torch.no_grad():
        up, down = (loss_of(model, moved(values, direction, size)) for size in (1e-6, -1e-6))
    assert torch.allclose(found, (up - down) / 2e-6, rtol=1e-6)


@row("second derivatives", "promised")
@each_method
def test_second_derivatives(method):
    """`create_graph=True`, against finite differences of the gradient; `hessian` against `jacrev(grad)`."""
    model = adapted(method)
    values, direction = directions(model)
    with sdpa_kernel(SDPBackend.MATH):
        slope = torch.autograd.grad(loss_of(model, trained(model)), list(trained(model).values()), create_graph=True)
        along = sum((one * direction[name]).sum() for one, name in zip(slope, values, strict=True))
        found = torch.autograd.grad(along, list(trained(model).values()))
        sides = [grad(lambda given: loss_of(model, given))(moved(values, direction, size)) for size in (1e-5, -1e-5)]
        expected = {name: (sides[0][name] - sides[1][name]) / 2e-5 for name in values}
        assert_near(dict(zip(values, found, strict=True)), expected, 1e-6)
        name = next(iter(values))
        of_one = lambda value: loss_of(model, values | {name: value})  # noqa: E731
        assert torch.allclose(hessian(of_one)(values[name]), jacrev(grad(of_one))(values[name]), atol=1e-9)


@row("second derivatives with fused attention", "refused")
@each_method
def test_second_derivatives_with_fused_attention(method):
    """PyTorch's own refusal, as of the plain model; nothing wrong is given."""
    for model in (adapted(method), build()):
        tensors = list(trained(model).values())
        first = torch.autograd.grad(model(IMAGES).square().sum(), tensors, create_graph=True)
        total = sum(one.sum() for one in first)
        with pytest.raises(RuntimeError, match=r"derivative for aten::_scaled_dot_product.* is not implemented"):
            total.backward()


# Hooks


def calls(model, names):
    counted = dict.fromkeys(names, 0)
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: counted.update({name: counted[name] + 1}))
    model(IMAGES)
    return counted


@row("forward hooks", "promised")
@each_method
def test_forward_hooks(method):
    """On every submodule of the library they fire as often as in the plain model."""
    names = [name for name, _ in build().named_modules()]
    assert calls(adapted(method), names) == calls(build(), names)


@row("backward hooks", "promised")
@each_method
def test_backward_hooks(method):
    model, seen, expected = adapted(method), {}, {}

    def watch(module, inputs, output):
        output.register_hook(lambda gradient: expected.update(output=gradient))

    model.blocks[0].register_full_backward_hook(lambda module, given, output: seen.update(output=output[0]))
    model.blocks[0].register_forward_hook(watch)
    model(IMAGES).square().sum().backward()
    assert seen["output"].abs().max() > 0
    assert torch.equal(seen["output"], expected["output"])
    for trained_alone in (vp.LinearProbe(), vp.VQT()):  # nothing in the blocks or before them
        model, seen = vp.attach(build(), trained_alone), {}
        model.blocks[0].register_full_backward_hook(
            lambda module, given, output, seen=seen: seen.update(output=output[0])
        )
        model(IMAGES).square().sum().backward()
        assert not seen
        model(IMAGES.clone().requires_grad_()).square().sum().backward()
        assert seen["output"].abs().max() > 0


@row("attention maps", "promised")
@each_method
def test_attention_maps(method):
    """A hook on `attn_drop` sees weights that sum to 1; the features they give are those of fused attention."""
    model = adapted(method)
    fused = model(IMAGES)
    maps = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: maps.append(output))
    assert torch.allclose(model(IMAGES), fused, atol=1e-9)
    prompts = 2 if method == "vpt_deep" else 0
    assert [tuple(each.shape) for each in maps] == [(4, 2, 5, 5 + prompts)] * 2
    assert all(torch.allclose(each.sum(-1), torch.ones(())[None].double()) for each in maps)
    if method in ("lora", "ssf"):  # of a plain model with the merged weights
        plain = build()
        plain.load_state_dict(vp.merge(adapted(method)).state_dict())
        of_plain = []
        for block in plain.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: of_plain.append(output))
        plain(IMAGES)
        assert all(torch.allclose(one, other, atol=1e-9) for one, other in zip(maps, of_plain, strict=True))


# Graphs


@row("`torch.compile`", "promised")
@each_method
def test_compile(method):
    """One graph, with its gradients."""
    model = adapted(method)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = gradients(model)
    found = torch.autograd.grad(compiled(IMAGES).square().sum(), list(trained(model).values()))
    assert_near(dict(zip(expected, found, strict=True)), expected)


@row("attaching to a compiled model", "refused")
@each_method
def test_attaching_to_a_compiled_model(method):
    model = build()
    with pytest.raises(vp.UserError, match=r"before torch\.compile"):
        vp.attach(torch.compile(model, backend="eager"), METHODS[method])
    assert same(model.state_dict(), build().state_dict())


@row("`torch.fx`", "promised")
@each_method
def test_fx(method):
    model = adapted(method)
    assert torch.allclose(torch.fx.symbolic_trace(model)(IMAGES), model(IMAGES), atol=1e-9)


@row("timm feature extraction", "promised")
@each_method
def test_feature_extraction(method):
    """By graph and by `forward_intermediates`: the blocks' outputs as a hook sees them, without prompts."""
    model, seen = adapted(method), []
    extracted = create_feature_extractor(copy.deepcopy(model), {"blocks.0": "first", "head": "logits"})(IMAGES)
    assert torch.allclose(extracted["logits"], model(IMAGES), atol=1e-9)
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    final, (first, _) = model.forward_intermediates(IMAGES)
    assert torch.allclose(model.forward_head(final), extracted["logits"], atol=1e-9)
    assert first.shape == (4, 16, 2, 2)
    assert torch.allclose(first.flatten(2).mT, seen[0][:, 1:5], atol=1e-9)
    assert torch.allclose(extracted["first"], seen[0], atol=1e-9)


FREE = ({0: torch.export.Dim("batch")},)


@row("`torch.export`", "promised")
@each_method
def test_export(method):
    model = adapted(method)
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=FREE).module()
    assert torch.allclose(program(IMAGES[:2]), model(IMAGES[:2]), atol=1e-9)


@pytest.mark.slow
@row("ONNX", "promised")
@each_method
def test_onnx(method, tmp_path):
    model, images, path = adapted(method, torch.float32), IMAGES.float(), tmp_path / "model.onnx"
    torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=FREE, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images[:2].numpy()})
    assert torch.allclose(torch.from_numpy(logits), model(images[:2]), atol=1e-4)


@row("`torch.jit.trace`", "promised")
@pytest.mark.filterwarnings("ignore")
@each_method
def test_jit_trace(method):
    model = adapted(method)
    traced = torch.jit.trace(model, IMAGES, check_trace=False)
    assert torch.allclose(traced(IMAGES[:2]), model(IMAGES[:2]), atol=1e-9)


@row("`torch.jit.script`", "unknown")
@pytest.mark.filterwarnings("ignore")
@each_method
def test_jit_script(method):
    """Today it ends in an error of PyTorch's; if it ends otherwise one day, it must be right."""
    model = adapted(method)
    try:
        scripted = torch.jit.script(model)
    except (TypeError, RuntimeError):
        return
    assert torch.allclose(scripted(IMAGES), model(IMAGES), atol=1e-9)


# Copies and files


def check_twin(twin, model):
    """It computes the same, learns by itself, and gives back its backbone."""
    expected = model(IMAGES)
    assert torch.equal(twin(IMAGES), expected)
    step(twin)
    assert torch.equal(model(IMAGES), expected)
    assert not torch.equal(twin(IMAGES), expected)
    assert torch.equal(vp.detach(twin)(IMAGES), build()(IMAGES))


@row("`copy.deepcopy`", "promised")
@each_method
def test_deepcopy(method):
    model = adapted(method)
    check_twin(copy.deepcopy(model), model)


@row("`pickle`, `torch.save` of the model", "promised")
@each_method
def test_pickle(method, tmp_path):
    model = adapted(method)
    check_twin(pickle.loads(pickle.dumps(model)), model)
    torch.save(model, tmp_path / "model.pt")
    check_twin(torch.load(tmp_path / "model.pt", weights_only=False), model)


@row("`state_dict`", "promised")
@each_method
def test_state_dict(method):
    """The backbone's keys are those of the library; what is added lies below `peft.`."""
    model, twin = adapted(method), vp.attach(build(), METHODS[method])
    assert same(frozen(model), build().state_dict())
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(IMAGES), model(IMAGES))


@row("`load_state_dict(assign=True)`", "promised")
@each_method
def test_assign(method):
    model, twin = adapted(method), vp.attach(build(), METHODS[method])
    twin.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    twin.peft.requires_grad_(True)
    assert torch.equal(twin(IMAGES), model(IMAGES))
    assert all(value.abs().max() > 0 for name, value in gradients(twin).items() if name.startswith("peft.default.head"))
    step(twin)
    assert not torch.equal(twin(IMAGES), model(IMAGES))


@row("safetensors", "promised")
@each_method
def test_safetensors(method):
    state = adapted(method).state_dict()
    assert same(load(save(state)), state)


# Training


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone; tests/runs/test_parallel.py has two."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def three_steps(model, called):
    optimiser = torch.optim.SGD(vp.trainable_parameters(model), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(called(IMAGES), LABELS).backward()
        optimiser.step()
    with torch.no_grad():
        return called(IMAGES)


@row("DDP", "promised")
@each_method
def test_ddp(method, one_process):
    model, alone = adapted(method), adapted(method)
    assert torch.allclose(three_steps(model, DistributedDataParallel(model)), three_steps(alone, alone), atol=1e-9)
    assert same(frozen(model), build().state_dict())


@row("`nn.DataParallel` on several devices", "refused")
@each_method
def test_data_parallel(method, monkeypatch):
    """Its copies are made here on the CPU, where it has no broadcast of its own; a merged model is copied."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        replicate, "_broadcast_coalesced_reshape", lambda tensors, devices, detach: [tensors for _ in devices]
    )
    model = adapted(method)
    with pytest.raises(vp.UnsupportedError, match="start a process for each device"):
        replicate.replicate(model, [0, 1])
    for copied in replicate.replicate(build(), [0, 1]):
        assert torch.equal(copied(IMAGES), build()(IMAGES))
    if method in ("lora", "ssf"):
        expected = vp.merge(model)(IMAGES)
        assert all(torch.equal(copied(IMAGES), expected) for copied in replicate.replicate(model, [0, 1]))


def sharded(method):
    model, mesh = adapted(method), init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@row("FSDP2", "promised")
@each_method
def test_fsdp(method, one_process):
    model, alone = sharded(method), adapted(method)
    assert torch.allclose(three_steps(model, model), three_steps(alone, alone), atol=1e-9)


@row("switching, merging or attaching on a sharded model", "refused")
@each_method
def test_changing_a_sharded_model(method, one_process):
    model = sharded(method)
    for act in (vp.disable, vp.merge, vp.detach, lambda model: vp.attach(model, METHODS[method], "other")):
        with pytest.raises(vp.UnsupportedError, match=r"is sharded|cannot be merged"):
            act(model)
    assert torch.allclose(model(IMAGES), adapted(method)(IMAGES), atol=1e-9)


def check_autocast(method, dtype, tolerance):
    model = adapted(method, torch.float32)
    expected = gradients(model, IMAGES.float())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=dtype == torch.float16)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(IMAGES.float()).float().square().sum()
    scaler.scale(loss).backward()
    optimiser = torch.optim.SGD(vp.trainable_parameters(model), lr=0.1)
    scaler.unscale_(optimiser)
    assert_near({name: p.grad for name, p in trained(model).items()}, expected, tolerance)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained(model).values())
    return model, optimiser, scaler


@row("autocast in bfloat16", "promised")
@each_method
def test_bfloat16(method):
    check_autocast(method, torch.bfloat16, 0.05)


@row("autocast in float16 with `GradScaler`", "promised")
@each_method
def test_float16(method):
    """A step whose gradients are infinite is left out."""
    model, optimiser, scaler = check_autocast(method, torch.float16, 0.005)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    next(iter(trained(model).values())).grad.fill_(torch.inf)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimiser)
    scaler.update()
    assert same({name: p.detach() for name, p in trained(model).items()}, before)
    assert scaler.get_scale() == 32


@row("gradient checkpointing", "promised")
@each_method
def test_gradient_checkpointing(method):
    model = adapted(method)
    expected = gradients(model)
    model.set_grad_checkpointing(True)
    model.train()
    assert_near(gradients(model), expected)


@row("timm optimisers with layer decay", "promised")
@each_method
def test_layer_decay(method):
    """Rates as of the block, and of the head, in the plain model."""

    def scales(model):
        names = {id(p): name for name, p in model.named_parameters()}
        groups = create_optimizer_v2(model, opt="sgd", lr=1.0, layer_decay=0.5).param_groups
        return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}

    plain, found = scales(build()), scales(adapted(method))
    assert found.keys() == trained(adapted(method)).keys()
    for name, scale in found.items():
        block = re.search(r"visual\.(\d)\.", name)
        if block or ".head." in name:
            assert scale == plain[f"blocks.{block[1]}.norm1.weight" if block else "head.weight"], name
    assert len(set(found.values())) >= 3


@row("a backbone quantised by torchao", "promised")
@pytest.mark.filterwarnings("ignore")
@each_method
def test_quantised(method):
    """Logits of the numbers that the integers stand for; they stay as they are while the adapter learns."""
    plain, quantised = (build(torch.float32) for _ in range(2))
    quantize_(
        quantised, Int8WeightOnlyConfig(), lambda module, name: "blocks" in name and hasattr(module, "in_features")
    )
    stands_for = {}
    for name, module in quantised.named_modules():
        if type(getattr(module, "weight", None)) not in (torch.nn.Parameter, type(None)):
            stands_for[name] = module.weight.dequantize()
            plain.get_submodule(name).weight.data = stands_for[name]
    assert len(stands_for) == 8
    quantised, plain = (adapted(method, torch.float32, each) for each in (quantised, plain))
    images = IMAGES.float()
    assert torch.allclose(quantised(images), plain(images), atol=1e-4)
    assert_near(gradients(quantised, images), gradients(plain, images), 1e-4)
    three = torch.optim.SGD(vp.trainable_parameters(quantised), lr=0.05)
    F.cross_entropy(quantised(images), LABELS).backward()
    three.step()
    found = {name: quantised.get_submodule(name).weight.dequantize() for name in stands_for}
    assert same(found, stands_for)


@row("threads that switch adapters", "promised")
@each_method
def test_threads(method):
    """`use` takes turns: each thread gets the answer of the adapter that it chose."""
    model = adapted(method)
    vp.attach(model, METHODS[method], "other")
    alone, right = {}, []
    with torch.no_grad():
        for name in ("default", "other"):
            with vp.use(model, name):
                alone[name] = model(IMAGES)

    def work(number):
        for turn in range(8):
            name = ("default", "other")[(number + turn) % 2]
            with torch.no_grad(), vp.use(model, name):
                right.append(torch.equal(model(IMAGES), alone[name]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert right == [True] * 24
    assert not torch.equal(alone["default"], alone["other"])


@row("threads that route batches", "promised")
@each_method
def test_threads_that_route(method):
    """All within their routes when they compute, and one without a route gets the adapter that is active."""
    model = adapted(method)
    vp.attach(model, METHODS[method], "other")
    with torch.no_grad():
        for parameter in model.peft["other"].parameters():
            parameter.add_(0.2)
        alone = {}
        for name in ("default", "other"):
            with vp.use(model, name):
                alone[name] = model(IMAGES)
    vp.activate(model, "other")
    together, right = threading.Barrier(3, timeout=60), []

    def work(names):
        wanted = torch.stack([alone[name][row] for row, name in enumerate(names or ["other"] * 4)])
        with torch.no_grad(), vp.route(model, names) if names else contextlib.nullcontext():
            for _ in range(4):
                together.wait()
                right.append(torch.allclose(model(IMAGES), wanted, rtol=0, atol=1e-12))
            together.wait()

    routes = (["default", "other", "other", "default"], ["other", "default", "default", "default"], None)
    threads = [threading.Thread(target=work, args=(names,)) for names in routes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert right == [True] * 12
    assert not torch.allclose(alone["default"], alone["other"], atol=1e-3)


# Changes of the model


@row("`reset_classifier` under a trained head", "refused")
@each_method
def test_reset_classifier(method, tmp_path):
    model = adapted(method)
    model.reset_classifier(7)
    for act in (vp.trainable_parameters, lambda model: vp.save(model, tmp_path / "adapter"), vp.merge):
        with pytest.raises(vp.UserError, match=r"was exchanged after adapter 'default'|cannot be merged"):
            act(model)
    assert not (tmp_path / "adapter").exists()
    assert vp.detach(model)(IMAGES).shape == (4, 7)


@row("blocks taken out, or layers exchanged, beneath adapters", "refused")
@each_method
def test_pruning(method, tmp_path):
    """Whatever acted there, as in the last block of all: nothing of it is trained, saved or merged."""
    model = adapted(method)
    model.prune_intermediate_layers([0], prune_norm=False, prune_head=False)
    for act in (vp.trainable_parameters, lambda model: vp.save(model, tmp_path / "adapter"), vp.merge):
        with pytest.raises(vp.UserError, match=r"'blocks\.1' of the model was taken out|cannot be merged"):
            act(model)
    assert not (tmp_path / "adapter").exists()
    assert vp.detach(model)(IMAGES).shape == (4, 3)


@row("`torch.nn.utils.prune` and parametrisations", "refused")
@each_method
def test_tensors_made_of_others(method, tmp_path):
    plain, model = build(), adapted(method)
    prune.random_unstructured(plain.blocks[0].mlp.fc1, "weight", 0.5)
    with pytest.raises(vp.UnsupportedError, match=r"blocks\.0\.mlp\.fc1\.weight is made by a hook .*prune\.remove"):
        vp.attach(plain, METHODS[method])
    before = model(IMAGES)
    for change in (lambda head: prune.random_unstructured(head, "weight", 0.5), parametrizations.weight_norm):
        with pytest.raises(vp.UnsupportedError, match="cannot be pruned or parametrised"):
            change(model.head)
        assert torch.equal(model(IMAGES), before)
    prune.random_unstructured(model.peft["default"].head, "weight", 0.5)
    with pytest.raises(vp.UnsupportedError, match=r"head\.weight of the adapter is made of other .*prune\.remove"):
        vp.save(model, tmp_path)
    expected = model(IMAGES)
    prune.remove(model.peft["default"].head, "weight")
    vp.save(model, tmp_path)
    other = build()
    vp.load(other, tmp_path)
    assert torch.allclose(other(IMAGES), expected, atol=1e-6)
    assert not torch.allclose(expected, before, atol=1e-3)


@row("`set_input_size` while `pos_embed` is trained", "refused")
@each_method
def test_set_input_size_of_what_is_trained(method):
    model = adapted(method, train="pos_embed")
    before = model(IMAGES)
    with pytest.raises(vp.UnsupportedError, match="while an adapter trains pos_embed"):
        model.set_input_size(64)
    assert torch.equal(model(IMAGES), before)


@row("`set_input_size`", "promised")
@each_method
def test_set_input_size(method):
    """As attached after it."""
    model, other = adapted(method), build()
    model.set_input_size(64)
    other.set_input_size(64)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert torch.allclose(model(images), adapted(method, model=other)(images), atol=1e-9)


# CLIP learners


def learner():
    """CoOp on a tiny CLIP, off where it starts."""
    torch.manual_seed(0)
    clip = open_clip.create_model("tiny_clip").eval()
    made = CoOp(clip, open_clip.get_tokenizer("tiny_clip"), ["red car", "green tree", "blue sky"])
    step(made)
    return made.double()


CLIP_IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@row("a CLIP learner: `copy.deepcopy`, `pickle`", "promised")
def test_copies_of_a_learner():
    made = learner()
    expected = made(CLIP_IMAGES)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(CLIP_IMAGES), expected)
        step(twin)
        assert torch.equal(made(CLIP_IMAGES), expected)
        assert not torch.equal(twin(CLIP_IMAGES), expected)


@row("a CLIP learner: `state_dict`, safetensors", "promised")
def test_state_of_a_learner():
    made, other = learner(), learner()
    step(other)
    assert not torch.equal(made(CLIP_IMAGES), other(CLIP_IMAGES))
    other.load_state_dict(load(save(made.state_dict())))
    assert torch.equal(made(CLIP_IMAGES), other(CLIP_IMAGES))


@row("a CLIP learner: `torch.func`", "promised")
def test_functions_of_a_learner():
    made, other = learner(), learner()
    step(other)
    assert torch.equal(functional_call(made, dict(trained(other)), (CLIP_IMAGES,)), other(CLIP_IMAGES))
    found = grad(lambda values: loss_of(made, values, CLIP_IMAGES))(trained(made))
    assert_near(found, gradients(made, CLIP_IMAGES))


@row("a CLIP learner: `ModelEmaV3`", "promised")
def test_average_of_a_learner():
    made = learner()
    average = ModelEmaV3(made, decay=0.9)
    expected = {name: value.double().clone() for name, value in made.state_dict().items()}
    step(made)
    average.update(made)
    for name, value in made.state_dict().items():
        expected[name] = 0.9 * expected[name] + 0.1 * value.double()
    assert_near(average.module.state_dict(), expected)
    twin = learner()
    twin.load_state_dict(average.module.state_dict())
    with torch.no_grad():  # features that were kept for other values are not taken
        assert torch.equal(average.module(CLIP_IMAGES), twin(CLIP_IMAGES))


@pytest.mark.slow
@row("a CLIP learner: `torch.compile`", "promised")
def test_a_compiled_learner():
    made = learner()
    compiled = torch.compile(made, backend="aot_eager")
    assert torch.allclose(compiled(CLIP_IMAGES), made(CLIP_IMAGES), atol=1e-9)
    found = torch.autograd.grad(compiled(CLIP_IMAGES).square().sum(), made.trainable_parameters())
    assert_near(dict(zip(trained(made), found, strict=True)), gradients(made, CLIP_IMAGES))


@row("a CLIP learner: `torch.export`", "promised")
def test_an_exported_learner():
    """Whether it has been called before or not, and without gradients; it computes as before afterwards."""
    expected = learner()(CLIP_IMAGES.flip(0))
    for called, gradients_too in ((False, False), (False, True), (True, False)):
        made = learner()
        with torch.set_grad_enabled(gradients_too):
            if called:
                made(CLIP_IMAGES)
            program = torch.export.export(made, (CLIP_IMAGES,)).module()
            assert torch.allclose(program(CLIP_IMAGES.flip(0)), expected, atol=1e-9)
            assert torch.allclose(made(CLIP_IMAGES.flip(0)), expected, atol=1e-9)


@row("a CLIP learner: `torch.fx`", "refused")
def test_fx_of_a_learner():
    """torch.fx says so: which classes there are, and what their text is, is no graph of the images."""
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(learner())


@row("a CLIP learner: autocast", "promised")
def test_autocast_of_a_learner():
    made = learner().float()
    images = CLIP_IMAGES.float()
    expected = gradients(made, images, lambda logits: logits.float().softmax(-1).square().sum())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(made, images, lambda logits: logits.float().softmax(-1).square().sum())
    assert_near(found, expected, 0.1)


# The page


def shown():
    """(verdict, sentence) by row of the page."""
    lines = re.findall(r"^\| (.+?) \| (\w+) \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line for line in lines if line[0] != "kind"]
    assert len({name for name, _, _ in lines}) == len(lines)
    return {name: (verdict, sentence) for name, verdict, sentence in lines}


def test_every_row_has_its_test_and_every_test_its_row():
    page = shown()
    assert {name: verdict for name, (verdict, _) in page.items()} == {
        name: verdict for name, (verdict, _) in ROWS.items()
    }
    assert {verdict for verdict, _ in page.values()} == {"promised", "refused", "unknown"}
    tests = [name for _, name in ROWS.values()]
    assert len(set(tests)) == len(tests)
    page_alone = "test_every_row_has_its_test_and_every_test_its_row"
    assert {name for name in globals() if name.startswith("test_")} == {*tests, page_alone}
    assert all(re.fullmatch(r"[A-Z`].*\.", sentence) for _, sentence in page.values())
