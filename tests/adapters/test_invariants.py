"""The matrix: what holds for every method on every host. One function per invariant, so that a failure names it."""

import copy
import dataclasses
import functools
import io
import itertools
import shutil

import open_clip
import pytest
import timm
import torch
from conftest import (
    CASES,
    FEW_CASES,
    FEW_HOSTS,
    FEW_NAMES,
    MECHANISMS,
    MERGE_REFUSALS,
    TRAINED_ALONE,
    adapted,
    adapter_tensors,
    anatomy,
    attach,
    base_state,
    cells,
    distance,
    every_pair,
    loss_of,
    output_of,
    randomise,
    same_bytes,
    show_data,
    spread,
    spread_pairs,
    to_last_stage,
)
from reference.hosts import HOSTS, lively, shallow
from shared_cells import plain, plain_output, shared, untouched_output

import visionpeft as vp
from visionpeft.errors import ConfigurationError, StorageError, UnsupportedError, UserError

ADDING = [c for c in CASES if c.name not in TRAINED_ALONE]
MERGEABLE = [c for c in CASES if c.mergeable]
BY_NAME = {c.name: c for c in CASES}
BY_HOST = {h.name: h for h in HOSTS}


# attaching


@spread([c for c in CASES if c.identity])
def test_identity_at_start(host, case):
    """A method whose change is zero at the start leaves the output as it was."""
    model = attach(host.build(), host, case).eval()
    assert distance(output_of(host, model), untouched_output(host)) <= 1e-6


@shared(spread_pairs())
def test_noise_has_an_effect(cell):
    """Moving the adapter's tensors moves the output."""
    assert distance(cell.output, untouched_output(cell.host)) > 1e-3


def without_gradient(host, case, name):
    """Tensors that cannot have a gradient, by the algebra of softmax or because the output does not contain them."""
    if name == "trained.logit_scale":
        return True
    if case.name == "adapter_fusion" and name.endswith("key.bias"):  # adds the same to the scores of all adapters
        return True
    # a vector added to every key adds the same to all scores of a query, unless keys are rotated or normalised later
    rotated = host.name.startswith(("eva", "dinov3"))
    normalised = host.name in ("vit_qk_norm", "clip_custom")
    # HiWi's last bias adds the same to every row of a weight, so to a query's mean, which the norm takes away
    if case.name == "hi_wi" and host.name == "vit_qk_norm" and name.endswith(".q.up.bias"):
        return True
    if name.endswith(("k_norm.shift", "k_norm.bias", "ln_k.bias")):
        return not rotated
    return name.endswith((".k.shift", ".k.bias")) and not rotated and not normalised


@shared(every_pair(), torch.float64)
def test_every_tensor_is_live(cell):
    """Each trainable tensor gets a gradient that is not zero."""
    loss_of(cell.host, cell.model, torch.float64).backward()
    sizes = {n: p.grad.abs().max().item() for n, p in adapter_tensors(cell.model).items() if p.requires_grad}
    dead = {n for n, size in sizes.items() if size < 1e-9 * max(sizes.values())}
    assert dead == {n for n in dead if without_gradient(cell.host, cell.case, n)}


@shared(spread_pairs())
def test_only_the_adapter_gets_gradients(cell):
    """No parameter of the backbone is trainable or gets a gradient."""
    trainable = {id(p) for p in vp.trainable_parameters(cell.model)}
    assert trainable <= {id(p) for p in cell.model.peft["default"].parameters()}
    if trainable:
        loss_of(cell.host, cell.model).backward()
    for name, parameter in cell.model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trainable), name
        assert parameter.grad is None or id(parameter) in trainable, name


@shared(spread_pairs())
def test_base_keys_stay(cell):
    """Every key of the plain model is still there, with its shape; everything else is under `peft.`."""
    found = {k: v.shape for k, v in cell.model.state_dict().items() if not k.startswith("peft.")}
    assert found == {k: v.shape for k, v in plain(cell.host).state_dict().items()}


@spread()
def test_base_is_never_written(host, case):
    """The backbone's bytes after training, disabling and detaching are those before attaching."""
    model = host.build()
    before = base_state(model)
    attach(model, host, case)
    randomise(model.peft["default"])
    trainable = vp.trainable_parameters(model)
    if trainable:
        optimiser = torch.optim.SGD(trainable, lr=0.01)
        for _ in range(3):
            optimiser.zero_grad()
            loss_of(host, model).backward()
            optimiser.step()
    vp.disable(model)
    assert same_bytes(base_state(model), before)
    vp.activate(model, "default")
    vp.detach(model)
    assert same_bytes(dict(model.state_dict()), before)


# switching


@shared(spread_pairs())
def test_disable_and_activate(cell):
    """Disabled, the model is the backbone to the bit; active again, it is what it was before."""
    host, model, active = cell.host, cell.model, cell.output
    unchanged = plain_output(host)
    vp.disable(model)
    assert torch.equal(output_of(host, model), unchanged)
    vp.activate(model, "default")
    assert torch.equal(output_of(host, model), active)
    with vp.use(model, None):
        assert torch.equal(output_of(host, model), unchanged)
    assert torch.equal(output_of(host, model), active)


@shared(every_pair(FEW_HOSTS, FEW_CASES))
def test_use_survives_an_exception(cell):
    """Leaving `use` by an exception restores what was active."""
    active = cell.output
    with pytest.raises(ZeroDivisionError), vp.use(cell.model, None):
        _ = 1 / 0
    assert torch.equal(output_of(cell.host, cell.model), active)


# what detaching undoes depends on where a method acts: `spread` has each mechanism on every host, every case on two
@spread()
def test_detach_leaves_the_original(host, case):
    """After detaching, classes, attributes, hooks, flags and output are those of a model never touched."""
    model, twin = host.build(), host.build()
    attach(model, host, case)
    randomise(model.peft["default"])
    output_of(host, model)
    vp.detach(model)
    assert anatomy(model) == anatomy(twin)
    assert torch.equal(output_of(host, model), untouched_output(host))
    assert same_bytes(dict(model.state_dict()), dict(twin.state_dict()))


# copies


@shared(spread_pairs())
def test_deepcopy_follows_its_own_parameters(cell):
    """A copy has its own adapter; changing and detaching it leaves the original as it was."""
    host, model, before = cell.host, cell.model, cell.output
    twin = copy.deepcopy(model)
    assert torch.equal(output_of(host, twin), before)
    randomise(twin.peft["default"], seed=9)
    assert torch.equal(output_of(host, model), before)
    if adapter_tensors(model):
        assert distance(output_of(host, twin), before) > 1e-4
    vp.detach(twin)
    assert torch.equal(output_of(host, twin), untouched_output(host))
    assert torch.equal(output_of(host, model), before)


@shared(spread_pairs())
def test_pickle(cell):
    """The whole adapted model goes through `torch.save` and comes back the same, and detaches."""
    file = io.BytesIO()
    torch.save(cell.model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(output_of(cell.host, twin), cell.output)
    vp.detach(twin)
    assert torch.equal(output_of(cell.host, twin), untouched_output(cell.host))


# storage


@shared(spread_pairs())
def test_save_and_load(cell, tmp_path):
    """A saved adapter on a fresh backbone gives the same output to the bit."""
    if not adapter_tensors(cell.model):
        pytest.skip("nothing to save")
    vp.save(cell.model, tmp_path / "adapter")
    fresh = cell.host.build()
    name = vp.load(fresh, tmp_path / "adapter")
    assert name == "default"
    assert torch.equal(output_of(cell.host, fresh.eval()), cell.output)


@shared(every_pair(cases=ADDING[:1] + [c for c in FEW_CASES if c.name in ("lora_all", "vpt_deep")]))
def test_load_refuses_another_backbone(cell, tmp_path):
    """The same architecture with other weights is not the backbone the adapter was trained on."""
    vp.save(cell.model, tmp_path / "adapter")
    torch.manual_seed(77)
    other = lively(cell.host.build())
    before, state = anatomy(other), base_state(other)
    with pytest.raises(StorageError):
        vp.load(other, tmp_path / "adapter")
    assert anatomy(other) == before
    assert same_bytes(dict(other.state_dict()), state)


# several adapters

STACK = ("vpt_deep", "lora_all", "houlsby", "ssf")


@functools.cache
def stack_tensors(host):
    """The tensors of each method of the stack, by its name."""
    return {
        name: {
            n: t.detach()
            for n, t in adapter_tensors(adapted(host, BY_NAME[name], torch.float64)).items()
            if not n.startswith("head.")
        }
        for name in STACK
    }


def put(host, adapter, names):
    """Give an adapter the tensors of some methods of the stack."""
    own = {n: t for name in names for n, t in stack_tensors(host)[name].items()}
    missing, unexpected = adapter.load_state_dict(own, strict=False)
    assert not unexpected
    assert all(n.startswith("head.") for n in missing)


def stacked(host, names):
    """The output under one adapter of these methods, in this order."""
    model = vp.attach(host.build(torch.float64), [BY_NAME[n].on(host) for n in names])
    put(host, model.peft["default"], names)
    return output_of(host, model.eval(), dtype=torch.float64)


@functools.cache
def stacked_in_order_of_the_list(host, names):
    """Likewise in the order in which `STACK` has them."""
    return stacked(host, sorted(names, key=STACK.index))


def separate(host, names):
    """A model with an adapter for each of these methods, attached in this order, all active."""
    model = host.build(torch.float64)
    for name in names:
        vp.attach(model, BY_NAME[name].on(host), name=name)
        put(host, model.peft[name], [name])
    vp.activate(model, list(names))
    return model.eval()


@pytest.mark.parametrize("order", list(itertools.permutations(STACK))[1::6], ids="-".join)
@pytest.mark.parametrize("host", FEW_HOSTS, ids=repr)
def test_stacking_in_any_order(host, order):
    """Four methods give one output in whatever order they are stacked, and detach in any order."""
    expected = stacked_in_order_of_the_list(host, frozenset(STACK))
    assert distance(stacked(host, order), expected) < 1e-12
    model = separate(host, order)
    assert distance(output_of(host, model, dtype=torch.float64), expected) < 1e-12
    left = set(order)
    for name in sorted(order, key=STACK[::-1].index):
        vp.detach(model, name)
        left.remove(name)
        if left:
            rest = stacked_in_order_of_the_list(host, frozenset(left))
            assert distance(output_of(host, model, dtype=torch.float64), rest) < 1e-12
    assert anatomy(model) == anatomy(host.build(torch.float64))
    assert torch.equal(output_of(host, model, dtype=torch.float64), untouched_output(host, torch.float64))


# prompts of other names than those of `VPT` and `PrefixTuning`
LONGER = ("coda", "e2vpt", "lpt", "idpg", "ptuning", "decomposed", "smop", "apt", "selective_prompts")


@spread()
def test_routed_rows_are_those_of_each_adapter(host, case):
    """Row i of a mixed batch is the row which adapter i, or the plain backbone, gives alone."""
    model = host.build(torch.float64)
    if host.takes == "both":
        # the rows of a batch are images, so only what acts on the image tower can be routed
        case = dataclasses.replace(case, image_only=True)
    for seed, name in enumerate(("a", "b")):
        attach(model, host, case, name)
        randomise(model.peft[name], seed)
        vp.disable(model)
    model.eval()
    names = ["a", None, "b", "a"]
    # nor can two values of one parameter of the backbone act in one batch
    refused = host.takes == "text" or any(name.startswith("trained.") for name in adapter_tensors(model, "a"))
    longer = case.name.startswith(("vpt", "xprompt", "prefix", "mam", "unipelt", "mix_lora", *LONGER))
    if refused or longer:
        with pytest.raises(UserError), vp.route(model, names):
            output_of(host, model, 4, torch.float64)
    if refused:
        return
    if longer:
        # rows with and without more tokens differ in length; rows of two adapters of one length do not
        names = ["a", "b", "b", "a"]
    expected = []
    for row, name in enumerate(names):
        with vp.use(model, name):
            expected.append(output_of(host, model, 4, torch.float64)[row])
    with vp.route(model, names):
        mixed = output_of(host, model, 4, torch.float64)
    assert distance(mixed, torch.stack(expected)) < 1e-12


@cells(FEW_HOSTS, FEW_CASES)
def test_switching_equals_one_alone(host, case):
    """With two adapters attached, each gives when active what it gives on a backbone of its own."""
    model = host.build()
    for seed, name in enumerate(("a", "b")):
        attach(model, host, case, name)
        randomise(model.peft[name], seed)
    model.eval()
    for name in ("a", "b", "a"):
        alone = attach(host.build(), host, case).eval()
        alone.peft["default"].load_state_dict(model.peft[name].state_dict())
        vp.activate(model, name)
        assert torch.equal(output_of(host, model), output_of(host, alone))


# training


UPSTREAM_FAULTS = {"clip_custom": "OpenCLIP passes five positional arguments to its custom blocks when checkpointing"}


@shared(spread_pairs(), torch.float64)
def test_activation_checkpointing(cell):
    """The library's own activation checkpointing gives the same gradients."""
    host, model = cell.host, cell.model
    if host.name in UPSTREAM_FAULTS:
        pytest.skip(UPSTREAM_FAULTS[host.name])
    if not vp.trainable_parameters(model):
        pytest.skip("nothing to train")
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        loss_of(host, model, torch.float64).backward()
        gradients.append({n: p.grad.clone() for n, p in adapter_tensors(model).items() if p.grad is not None})
    model.set_grad_checkpointing(False)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-10 * gradient.norm() + 1e-12, name


@shared(spread_pairs())
def test_no_grad_gives_the_same(cell):
    """Without gradients, and without gradients in the adapter, no faster path changes the output."""
    host, model = cell.host, cell.model
    with torch.enable_grad():
        graded = host.run(model, host.inputs()).detach()
    assert distance(cell.output, graded) < 1e-6
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    assert distance(output_of(host, model), graded) < 1e-6
    for parameter in trained:
        parameter.requires_grad_()


@shared(spread_pairs())
def test_autocast(cell):
    """Under bfloat16 autocast the output is finite and close, and gradients keep the adapter's precision."""
    host, model = cell.host, cell.model
    with torch.autocast("cpu", torch.bfloat16):
        output = host.run(model, host.inputs())
        loss = output.float().square().sum()
    assert output.isfinite().all()
    assert distance(output.detach().float(), cell.output) < 0.25
    if vp.trainable_parameters(model):
        loss.backward()
    for name, parameter in adapter_tensors(model).items():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name


@spread()
def test_low_precision_backbone(host, case):
    """On a backbone stored in bfloat16 the adapter, its head and its copies are kept in float32, run and train."""
    torch.manual_seed(1)
    model = attach(host.build(torch.bfloat16), host, case)
    randomise(model.peft["default"])
    model.eval()
    before = base_state(host.build(torch.bfloat16))
    output = host.run(model, host.inputs(dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    trainable = vp.trainable_parameters(model)
    output.float().square().sum().backward()
    torch.optim.SGD(trainable, lr=0.01).step()
    for name, tensor in adapter_tensors(model).items():
        if not tensor.is_floating_point():
            continue
        assert tensor.dtype == torch.float32, name
        assert tensor.grad is None or tensor.grad.dtype == tensor.dtype, name
    vp.disable(model)
    assert same_bytes(base_state(model), before)


# every method on one host; on another, whose library is not the same, what differs is the mechanism
TRAINING = [(BY_HOST["vit_cls"], c) for c in CASES] + [
    (BY_HOST["clip_visual"], c) for c in CASES if c.name in MECHANISMS
]


@pytest.mark.parametrize(("host", "case"), TRAINING, ids=repr)
def test_training_lowers_the_loss(host, case):
    """Every method learns: 16 random images, random targets, as many steps of Adam as it needs, at most 20."""
    torch.manual_seed(4)
    model = attach(host.build(), host, case).eval()
    inputs = host.inputs(16)
    with torch.no_grad():
        targets = host.run(model, inputs) + torch.randn(16, 1)
    optimiser = torch.optim.Adam(vp.trainable_parameters(model), lr=0.02)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (host.run(model, inputs) - targets).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if max(losses[-3:]) < 0.97 * losses[0]:  # and stays there
            return
    assert min(losses[-3:]) < 0.97 * losses[0]


@cells(FEW_HOSTS, FEW_CASES)
def test_one_seed_gives_one_start(host, case):
    """The initial values follow from the seed."""
    starts = []
    for _ in range(2):
        torch.manual_seed(11)
        starts.append(attach(host.build(), host, case).peft["default"].state_dict())
    assert same_bytes(*starts)


# the head, and what is trained beside the adapter


def test_extra_parameters_travel_with_the_adapter(tmp_path):
    """Raw parameters named in `train` are trained, saved and put back; the backbone's own stay as they are."""
    host = BY_HOST["vit_registers"]
    model, plain = host.build(), host.build()
    names = ("cls_token", "pos_embed", "norm.weight")
    vp.attach(model, vp.LoRA(rank=2), train=names)
    assert {f"trained.{n}" for n in names} <= set(adapter_tensors(model))
    randomise(model.peft["default"])
    model.eval()
    loss_of(host, model).backward()
    for name in names:
        assert adapter_tensors(model)[f"trained.{name}"].grad.abs().max() > 0
    active = output_of(host, model)
    vp.save(model, tmp_path / "adapter")
    fresh = host.build()
    vp.load(fresh, tmp_path / "adapter")
    assert torch.equal(output_of(host, fresh.eval()), active)
    vp.disable(model)
    assert torch.equal(output_of(host, model), output_of(host, plain))
    vp.detach(model)
    assert anatomy(model) == anatomy(plain)
    assert same_bytes(dict(model.state_dict()), dict(plain.state_dict()))


def test_head_with_buffers_travels_with_the_adapter(tmp_path):
    """The running statistics of a head are the adapter's: saved with it, absent from the backbone's own head."""
    host = BY_HOST["vit_cls"]

    def build():
        model = host.build()
        torch.manual_seed(0)
        model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(32, affine=False), torch.nn.Linear(32, 4))
        return model

    model = build()
    vp.attach(model, vp.AdaptFormer(bottleneck=4))
    randomise(model.peft["default"])
    model.train()
    loss_of(host, model)
    model.eval()
    active = output_of(host, model)
    vp.save(model, tmp_path / "adapter")
    fresh = build()
    vp.load(fresh, tmp_path / "adapter")
    assert torch.equal(output_of(host, fresh.eval()), active)
    vp.detach(model)
    assert same_bytes(dict(model.state_dict()), dict(build().state_dict()))


def test_head_can_stay_frozen():
    """`head=False` trains the adapter alone."""
    model = BY_HOST["vit_cls"].build()
    vp.attach(model, vp.LoRA(rank=2), head=False)
    assert not any(n.startswith("head.") for n in adapter_tensors(model))
    assert not any(p.requires_grad for p in model.head.parameters())


# where a method acts


@pytest.mark.parametrize("tower", ["visual", "text"])
@pytest.mark.parametrize("case", FEW_CASES, ids=repr)
def test_the_other_tower_is_untouched(case, tower):
    """A method on one tower of CLIP leaves the features of the other as they were, to the bit."""
    host = BY_HOST["clip_whole"]
    if case.image_only and tower == "text":
        pytest.skip("acts on images alone")
    model = host.build()
    vp.attach(model, dataclasses.replace(case.on(host), towers=[tower]))
    randomise(model.peft["default"])
    model.eval()
    with torch.no_grad():
        features, unchanged = model(*host.inputs()), plain(host)(*host.inputs())
    own = ["visual", "text"].index(tower)
    assert torch.equal(features[1 - own], unchanged[1 - own])
    assert distance(features[own], unchanged[own]) > 1e-3


@cells(FEW_HOSTS, [c for c in FEW_CASES if c.name not in ("bit_fit", "ssf")])
def test_only_the_chosen_blocks_change(host, case):
    """With `blocks="last:1"` what enters the last block is what enters it in the backbone."""
    method = dataclasses.replace(case.on(host), blocks="last:1")
    seen = []
    for model in (vp.attach(host.build(), method), host.build().requires_grad_(False)):
        if hasattr(model, "peft"):
            randomise(model.peft["default"])
        tower = getattr(model, "visual", model)
        blocks = tower.blocks if hasattr(tower, "blocks") else tower.transformer.resblocks
        handle = blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
        output = output_of(host, model.eval())
        handle.remove()
        seen.append(output)
    assert torch.equal(seen[0], seen[2])
    assert distance(seen[1], seen[3]) > 1e-3


@shared(every_pair(FEW_HOSTS, FEW_CASES))
def test_hooks_of_others_keep_firing(cell):
    """A forward hook put on a block's attention or MLP is still called, once for each forward."""
    tower = getattr(cell.model, "visual", cell.model)
    block = (tower.blocks if hasattr(tower, "blocks") else tower.transformer.resblocks)[0]
    calls = []
    handles = [
        module.register_forward_hook(lambda module, *_: calls.append(module)) for module in (block.attn, block.mlp)
    ]
    output_of(cell.host, cell.model)
    for handle in handles:
        handle.remove()
    assert calls == [block.attn, block.mlp]


PROMPTED = [h for h in HOSTS if h.name.startswith(("vit", "eva", "beit", "dinov3"))]


@shared(every_pair(PROMPTED, [c for c in CASES if "vpt" in c.name]))
def test_prompts_do_not_leak_into_intermediates(cell):
    """Feature maps taken between the blocks have the shape they have without prompts, or are refused."""
    inputs = cell.host.inputs()
    with torch.no_grad():
        expected = [x.shape for x in plain(cell.host).forward_intermediates(inputs, intermediates_only=True)]
        try:
            found = cell.model.forward_intermediates(inputs, intermediates_only=True)
        except UnsupportedError:
            return
    assert [x.shape for x in found] == expected


# merging


@spread(MERGEABLE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"])
def test_merge(host, case, dtype, tolerance):
    """Merged equals adapted; a plain model loads the merged weights; unmerging restores every byte."""
    model = adapted(host, case, dtype)
    active = output_of(host, model, dtype=dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if (host.name, case.name) in MERGE_REFUSALS:
        with pytest.raises(UserError):
            vp.merge(model)
        assert same_bytes(dict(model.state_dict()), before)
        return
    vp.merge(model)
    assert distance(output_of(host, model, dtype=dtype), active) < tolerance
    plain = host.build(dtype)
    plain.load_state_dict(base_state(model))
    assert distance(output_of(host, plain, dtype=dtype), active) < tolerance
    vp.unmerge(model)
    assert same_bytes(dict(model.state_dict()), before)
    assert torch.equal(output_of(host, model, dtype=dtype), active)
    vp.detach(model)
    assert anatomy(model) == anatomy(host.build(dtype))
    assert same_bytes(dict(model.state_dict()), dict(host.build(dtype).state_dict()))


def test_merged_models_may_change_their_precision():
    """The weights that were kept aside follow, so that the unmerged model computes."""
    model = adapted(HOSTS[0], next(c for c in CASES if c.mergeable), torch.float32)
    vp.merge(model)
    model.bfloat16()
    vp.unmerge(model)
    assert output_of(HOSTS[0], model, dtype=torch.bfloat16).isfinite().all()
    vp.detach(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("trains", [False, True], ids=["then evaluated", "then trained"])
def test_unmerged_adapters_are_in_the_mode_of_the_model(trains):
    """Merged, they do not follow the model from training to evaluation or back: their dropout would go on, or rest."""
    model = vp.attach(HOSTS[0].build(), vp.LoRA(rank=2, dropout=0.5)).train(not trains)
    vp.merge(model)
    model.train(trains)
    vp.unmerge(model)
    assert all(module.training is trains for module in model.modules())


def test_detached_heads_are_in_the_mode_of_the_model():
    model = vp.attach(HOSTS[0].build().train(), vp.LoRA(2))
    vp.detach(model.eval())
    assert not any(module.training for module in model.modules())


def test_routed_heads_refuse_other_batches():
    """Also where an adapter is a head alone, so that no site sees the batch."""
    model = HOSTS[0].build()
    for name in ("one", "two"):
        vp.attach(model, vp.LinearProbe(), name)
    with vp.route(model, ["one", "two"]), pytest.raises(ConfigurationError, match=r"each of 2 samples"):
        model(HOSTS[0].inputs(4))


def test_large_batches_are_routed():
    """Python keeps one object of a number up to 256 alone, so that only beyond it a count is compared by its value."""
    model = HOSTS[0].build().eval()
    vp.attach(model, vp.LinearProbe(), "one")
    randomise(model.peft["one"])
    names = ["one" if index % 3 else None for index in range(300)]
    x = HOSTS[0].inputs(3).repeat(100, 1, 1, 1)
    with torch.no_grad():
        with vp.use(model, "one"):
            one = model(x)
        with vp.use(model, None):
            none = model(x)
        with vp.route(model, names):
            routed = model(x)
    expected = torch.where(torch.tensor([name == "one" for name in names])[:, None], one, none)
    assert distance(routed, expected) < 1e-6
    assert distance(one, none) > 1e-3


@pytest.mark.parametrize("names", [[], (), "one", None], ids=repr)
def test_a_route_that_names_no_samples_is_refused(names):
    """Before anything is changed: the active adapter acts as before."""
    model = adapted(HOSTS[0], next(c for c in CASES if c.name == "lora"), name="one")
    before = output_of(HOSTS[0], model)
    with pytest.raises(ConfigurationError, match="for each sample of the batch"), vp.route(model, names):
        pytest.fail("the context was entered")
    assert model.peft.active == ("one",)
    assert torch.equal(output_of(HOSTS[0], model), before)


@shared(spread_pairs([c for c in CASES if not c.mergeable]))
def test_merge_refuses_by_name(cell):
    """A method that is not linear in the weights says so, and nothing changes."""
    before = {k: v.clone() for k, v in cell.model.state_dict().items()}
    active = cell.output
    with pytest.raises(UserError, match=type(cell.case.method).__name__):
        vp.merge(cell.model)
    assert same_bytes(dict(cell.model.state_dict()), before)
    assert torch.equal(output_of(cell.host, cell.model), active)


# refusing


def swin():
    """A backbone with windows."""
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=16, depths=(1, 1))


def convnext():
    """A backbone without attention."""
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))


def resnet_clip():
    """A CLIP with a ResNet tower."""
    vision = open_clip.model.CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, image_size=32)
    return open_clip.model.CLIP(8, vision, open_clip.model.CLIPTextCfg(9, 40, width=16, heads=2, layers=1))


def plain_mlp():
    """No backbone at all."""
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())


REFUSED = {
    "swin": (swin, vp.VPT(num_tokens=2, deep=False), UnsupportedError),
    "convnext": (convnext, vp.VPT(num_tokens=2), UnsupportedError),
    "resnet_clip": (resnet_clip, vp.VPT(num_tokens=2), UnsupportedError),
    "no_backbone": (plain_mlp, vp.LoRA(rank=2), UnsupportedError),
    "no_such_target": (BY_HOST["vit_cls"].build, vp.LoRA(rank=2, targets=("qkv",)), UserError),
    "no_such_block": (BY_HOST["vit_cls"].build, vp.VPT(num_tokens=2, blocks=[7]), UserError),
    "no_such_tower": (BY_HOST["vit_cls"].build, vp.SSF(towers=["text"]), UserError),
    "second_of_two": (BY_HOST["vit_cls"].build, [vp.SSF(), vp.LoRA(rank=2, targets=("nothing",))], UserError),
    "no_such_parameter": (BY_HOST["vit_cls"].build, vp.LoRA(rank=2), ConfigurationError),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusal_changes_nothing(reason):
    """A refused attach leaves state, classes, flags and hooks as they were, and says why in words."""
    make, method, error = REFUSED[reason]
    model = make()
    before, state = anatomy(model), {k: v.clone() for k, v in model.state_dict().items()}
    options = {"train": ("no.such.parameter",)} if reason == "no_such_parameter" else {}
    with pytest.raises(error) as raised:
        vp.attach(model, method, **options)
    assert len(str(raised.value)) > 20
    assert anatomy(model) == before
    assert same_bytes(dict(model.state_dict()), state)


@pytest.mark.parametrize("host", FEW_HOSTS, ids=repr)
def test_refusal_keeps_what_is_attached(host):
    """A second attach that fails leaves the first adapter working."""
    model = adapted(host, BY_NAME["lora"])
    before = output_of(host, model)
    tree = anatomy(model)
    with pytest.raises(UserError):
        vp.attach(model, vp.LoRA(rank=2, targets=("nothing",)), name="second")
    with pytest.raises(UserError):
        vp.attach(model, vp.LoRA(rank=2), name="default")
    assert anatomy(model) == tree
    assert torch.equal(output_of(host, model), before)


# compiling


def compiled_loss(host, model, function, dtype):
    """Output and gradients of the adapter through `function`."""
    model.zero_grad()
    inputs = host.inputs(dtype=dtype)
    output = function(*inputs) if host.takes == "both" else function(inputs)
    output = torch.cat(output[:2], dim=-1) if host.takes == "both" else output
    output.square().sum().backward()
    return output.detach(), {n: p.grad.clone() for n, p in adapter_tensors(model).items() if p.grad is not None}


def same_when_compiled(host, cases, backend="aot_eager", depth=2, dtype=torch.float64, tolerance=1e-10):
    """Compile without graph breaks; forward and backward equal those of the model as it is.

    In float64, because the rounding of float32 grows with every method in a graph.
    """
    torch._dynamo.reset()
    host = shallow(host, depth)
    torch.manual_seed(1)
    model = vp.attach(host.build(dtype), [case.on(host) for case in cases]).eval()
    randomise(model.peft["default"])
    plain, gradients = compiled_loss(host, model, model, dtype)
    output, others = compiled_loss(host, model, torch.compile(model, backend=backend, fullgraph=True), dtype)
    assert distance(output, plain) < 0.1 * tolerance
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() <= tolerance * (gradient.norm() + 0.1), name


# Tracing takes seconds: every method once, several in one graph, and two methods on every host.
IN_ONE_GRAPH = (
    ("vpt_deep", "lora_all", "houlsby", "ssf"),
    ("prefix", "adapt_former", "ia3", "bit_fit", "pafi"),
    ("dora", "rep_adapter", "convpass"),
    ("unipelt",),
    ("vpt_gated",),
)
COMPILED = [(BY_HOST["vit_cls"], names) for names in IN_ONE_GRAPH]
COMPILED += [(host, ("vpt_deep", "lora_all")) for host in FEW_HOSTS if host.name != "vit_cls"]


# The other methods are traced without the compiler's own work, which is the same for all.
ONLY_TRACED = (
    ("full", "lora", "vera", "ada_lora", "krona"),
    ("layer_norm_tuning", "kadaptation", "compacter"),
    ("last_block", "fact", "mam", "child_f", "linear_probe"),
    ("fish_mask", "spt", "gps", "second_order", "neuro_ada"),
    ("pissa", "olora", "lora_ga", "eva", "oft", "boft", "hira"),
    ("ltsft",),
    ("diff_pruning",),
    ("xprompt_deep",),
    ("pruned_bit_fit",),
    ("relora",),
    ("fish_dip",),
    ("selective_prompts",),
    ("auto_lora",),
    ("periodic_lora",),
    ("far",),
    ("vb_lora", "miss", "rand_lora", "gra_lora", "fourierft", "waveft"),
    ("moslora", "sora", "dy_lora", "lora_dropout", "capa_boost", "hi_wi"),
    ("molora", "moelora", "mov", "mix_lora", "sct", "binary_mask", "said"),
    ("ada_mix",),
    ("mole",),
    ("moa",),
    ("hyper_former",),
    ("adapter_fusion",),
    ("dtl", "dtl_plus", "lst"),
    ("mona", "e2vpt", "prefix_propagation", "lpt"),
    ("idpg", "ptuning", "decomposed", "smop", "apt", "pixel_prompt", "ciat", "coda"),
    ("vqt",),
)


def test_every_method_is_in_a_graph():
    assert sorted(name for names in IN_ONE_GRAPH for name in names) == sorted(FEW_NAMES)
    traced = {type(BY_NAME[name].method) for names in (*IN_ONE_GRAPH, *ONLY_TRACED) for name in names}
    assert traced == {type(case.method) for case in CASES}


@pytest.mark.parametrize("names", ONLY_TRACED, ids="-".join)
def test_no_graph_breaks(names):
    """Nor is there another graph after a step, in which what the methods do between the steps has changed them."""
    torch._dynamo.reset()
    host, graphs, dtype = shallow(BY_HOST["vit_cls"], 2), [], torch.float64  # CoDA leaves the last block alone
    if BY_NAME[names[0]].sources:
        model = attach(host.build(dtype), host, BY_NAME[names[0]])
    else:
        model = vp.attach(host.build(dtype), [BY_NAME[name].on(host) for name in names])
    if model.peft["default"].pending:
        show_data(host, model)
    to_last_stage(host, model)
    randomise(model.peft["default"])

    def run_as_it_is(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.eval(), backend=run_as_it_is, fullgraph=True)
    for step in (1, 2):
        output, gradients = compiled_loss(host, model, compiled, dtype)
        expected, others = compiled_loss(host, model, model, dtype)
        assert distance(output, expected) < 1e-11
        assert gradients.keys() == others.keys()
        assert all(torch.allclose(gradients[name], others[name], atol=1e-9) for name in gradients)
        vp.after_step(model, step, 10)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "names"), COMPILED, ids=lambda value: value.name if hasattr(value, "name") else "-".join(value)
)
def test_compile(host, names):
    """`torch.compile(fullgraph=True)` traces the adapted model and its backward pass."""
    same_when_compiled(host, [BY_NAME[name] for name in names])


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
def test_compile_with_inductor():
    """The default compiler, once."""
    same_when_compiled(BY_HOST["vit_cls"], [BY_NAME["lora_all"]], "inductor", 1, torch.float32, 1e-4)


def test_compiled_model_is_refused():
    """Attaching after compiling would be ignored by what is compiled, so it is refused."""
    model = torch.compile(BY_HOST["vit_cls"].build(), backend="eager")
    with pytest.raises(UserError):
        vp.attach(model, vp.LoRA(rank=2))
