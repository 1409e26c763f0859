"""Methods that train single entries, and those that choose by data: what they choose, keep, change and refuse."""

import copy
import io
import json
import math
import types

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import CASES, adapted, base_state, same_bytes
from reference import addresses_of, forward
from reference.hosts import HOSTS
from safetensors.torch import load_file
from small_runs import arguments, draw_images, results, run
from timm.layers import DropPath

import visionpeft as vp
from visionpeft import fit
from visionpeft.backbones.layer import Layer
from visionpeft.errors import UserError
from visionpeft.methods.parts.sparse_delta import SparseDelta
from visionpeft.runs.history import EpochHistory, read_history
from visionpeft.sites.frozen_layers import linear
from visionpeft.tasks import allocating

BY_HOST = {h.name: h for h in HOSTS}
BY_NAME = {c.name: c for c in CASES}
VIT = BY_HOST["vit_cls"]
LABELS = torch.tensor([0, 3, 1, 4, 4, 2])
WAITING = [vp.FishMask(density=0.03), vp.ChildTuning("D", share=0.2), vp.SPT(budget=700, rank=2)]
WAITING += [vp.EVA(rank=2), vp.SCT(channels=3)]


def images(dtype=torch.float64):
    """Six images."""
    return VIT.inputs(6, dtype, seed=4)


def allocated(method, batches=None, dtype=torch.float64):
    """A small ViT with a method that has seen six images in batches of four and two."""
    model = VIT.build(dtype)
    vp.attach(model, method)
    x = images(dtype)
    vp.allocate(model, batches or [(x[:4], LABELS[:4]), (x[4:], LABELS[4:])])
    return model.eval()


# an independent choice: gradients of the transcription of the backbone


def squares(groups, clip=None, head=None, embedding=False):
    """{name: sum of squared gradients} of the mean cross-entropy of each group of images, each tensor's clipped."""
    plain = VIT.build(torch.float64)
    if head is not None:
        plain.head.load_state_dict(head.state_dict())
    weights = {k: v.clone().requires_grad_() for k, v in plain.state_dict().items()}
    found = {}
    for group in groups:
        logits = forward(plain, images()[group], weights=weights)
        loss = -torch.log_softmax(logits, dim=-1)[range(len(group)), LABELS[group]].mean()
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        for (block, site), address in addresses_of(plain, "visual").items():
            if address.weight not in gradients or (site == "patch_embed" and not embedding):
                continue
            path = f"visual.{site}" if block is None else f"visual.{block}.{site}"
            for part, gradient in zip(("weight", "bias"), address.read(gradients), strict=True):
                if clip is not None:
                    gradient = gradient * min(1.0, clip / gradient.square().sum().sqrt().item())
                found[f"{path}.{part}"] = found.get(f"{path}.{part}", 0) + gradient**2
    return found


def without_key_biases(scores):
    """The scores but those of biases of keys, which are zero."""
    return {name: score for name, score in scores.items() if not name.endswith(".k.bias")}


def chosen(model, method):
    """{name: flat indices} of the trained entries."""
    state = model.peft["default"].state_dict()
    return {
        key.removeprefix(f"{method}.").removesuffix("_index"): value.tolist()
        for key, value in state.items()
        if key.endswith("_index")
    }


def largest(scores, number):
    """{name: flat indices} of the entries with the largest scores, by sorting them all."""
    ranked = sorted(((v, name, i) for name, score in scores.items() for i, v in enumerate(score.flatten().tolist())))
    found = {}
    for _, name, index in ranked[-number:]:
        found.setdefault(name, []).append(index)
    return {name: sorted(indices) for name, indices in found.items()}


def test_fish_mask_has_the_largest_fisher_information():
    """The entries with the largest sums over samples of squared gradients of single samples."""
    model = allocated(vp.FishMask(density=0.03, among="blocks"))
    scores = without_key_biases(squares([[i] for i in range(6)]))
    number = round(0.03 * sum(score.numel() for score in scores.values()))
    assert chosen(model, "fish_mask") == largest(scores, number)
    assert chosen(model, "fish_mask") != largest(without_key_biases(squares([[0, 1, 2, 3], [4, 5]])), number)


def test_fish_mask_counts_the_whole_model():
    """As in the paper's code: a share of all parameters, the head's first; the patch embedding is ranked, too."""
    head = 5 * 32 + 5
    total = sum(p.numel() for p in VIT.build().parameters())
    model = allocated(vp.FishMask(density=0.03))
    scores = squares([[i] for i in range(6)], embedding=True)
    assert chosen(model, "fish_mask") == largest(scores, int(0.03 * total) - head)
    assert any("patch_embed.weight" in name for name in chosen(model, "fish_mask"))
    trained = sum(p.numel() for p in model.peft["default"].parameters())
    assert trained == int(0.03 * total)
    among = allocated(vp.FishMask(density=0.03, among="blocks"))
    assert sum(p.numel() for p in among.peft["default"].parameters()) != trained
    part = allocated(vp.FishMask(density=0.03, blocks=[0]))
    of_part = {name: s for name, s in scores.items() if name.startswith("visual.0.")}
    number = int(0.03 * (sum(s.numel() for s in of_part.values()) + head)) - head
    assert chosen(part, "fish_mask") == largest(of_part, number)


def test_a_head_larger_than_the_budget_of_fish_mask_is_refused():
    model = vp.attach(VIT.build(), vp.FishMask(density=0.003))
    with pytest.raises(vp.ConfigurationError, match=r"the head has 165 values, which are counted in the budget of \d+"):
        vp.allocate(model, [(images(torch.float32), LABELS)])
    assert model.peft["default"].pending


@pytest.mark.parametrize("autocast", [False, True])
def test_entries_of_the_patch_embedding_act_and_merge(autocast):
    """W + D of a convolution, against torch's own convolution with the changed kernel."""
    model = allocated(vp.FishMask(density=0.03))
    delta = model.peft["default"].fish_mask.visual.patch_embed
    kernel, bias = (p.detach().clone() for p in model.patch_embed.proj.parameters())
    with torch.no_grad():
        delta.weight.normal_()
        kernel.view(-1)[delta.weight_index.long()] += delta.weight
        if delta.bias is not None:
            bias[delta.bias_index.long()] += delta.bias.normal_()
        expected = F.conv2d(images(), kernel, bias, stride=8)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = model.patch_embed.proj(images())
        assert torch.allclose(found.double(), expected, rtol=0, atol=0.05 if autocast else 1e-12)
        assert not torch.allclose(
            found.double(),
            F.conv2d(images(), *VIT.build(torch.float64).patch_embed.proj.parameters(), stride=8),
            atol=0.1,
        )
    vp.merge(model)
    assert torch.allclose(model.patch_embed.proj.weight, kernel, rtol=1e-14)


def test_child_d_has_the_largest_fisher_information():
    """Of the first samples only, if so many are asked for, also in the middle of a batch."""
    model = allocated(vp.ChildTuning("D", share=0.1, samples=3, rule="formula"))
    scores = without_key_biases(squares([[0], [1], [2]]))
    number = round(0.1 * sum(score.numel() for score in scores.values()))
    assert chosen(model, "child_tuning") == largest(scores, number)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_child_d_as_published(share):
    """Gradients of batches, each tensor's clipped to one; above NumPy's percentile of all block parameters."""
    model = VIT.build(torch.float64)
    vp.attach(model, vp.ChildTuning("D", share=share))
    with torch.no_grad():
        model.peft["default"].head.weight.mul_(40)  # so that clipping acts
    head = model.peft["default"].head
    x = images()
    vp.allocate(model, [(x[:4], LABELS[:4]), (x[4:], LABELS[4:])])

    def expected(clip, groups=((0, 1, 2, 3), (4, 5))):
        scores = squares([list(group) for group in groups], clip, head)
        scores = {name: score for name, score in scores.items() if not name.startswith("visual.norm")}
        border = np.percentile(np.concatenate([s.flatten().numpy() for s in scores.values()]), (1 - share) * 100)
        found = {name: (s.flatten() >= border).nonzero().flatten().tolist() for name, s in scores.items()}
        return {name: indices for name, indices in found.items() if indices}

    assert chosen(model, "child_tuning") == expected(clip=1.0)
    assert chosen(model, "child_tuning") != expected(clip=None)
    assert chosen(model, "child_tuning") != expected(clip=1.0, groups=[[i] for i in range(6)])
    inside = {f"trained.{n}" for n, _ in VIT.build().named_parameters() if not n.startswith(("blocks.", "head."))}
    trained = {n for n, _ in model.peft["default"].named_parameters() if not n.startswith(("child_tuning.", "head."))}
    assert trained == inside >= {"trained.cls_token", "trained.pos_embed", "trained.norm.weight"}
    assert not model.peft["default"].masked  # these are trained whole


@pytest.mark.parametrize("rule", ["published", "formula"])
def test_child_d_measures_as_published_with_what_is_drawn(rule):
    """Stochastic depth acts while the published rule measures, and not while the formula is measured."""
    seen = []
    model = VIT.build(torch.float64)
    for block in model.blocks:
        block.drop_path1 = DropPath(0.3)
        block.drop_path1.register_forward_hook(lambda module, args, output: seen.append(module.training))
    vp.attach(model, vp.ChildTuning("D", share=0.1, rule=rule))
    model.eval()
    vp.allocate(model, [(images(), LABELS)])
    assert set(seen) == {rule == "published"}
    assert not any(module.training for module in model.modules())


def test_pafi_has_the_smallest_magnitudes():
    """Of matrices and biases of the blocks, without norms and the key bias; no data are asked for."""
    model = VIT.build(torch.float64)
    vp.attach(model, vp.PaFi(density=0.01, blocks=[0, 2]))
    weights, scores = VIT.build(torch.float64).state_dict(), {}
    for (block, site), address in addresses_of(VIT.build(), "visual").items():
        if block in (0, 2) and not site.startswith("norm"):
            weight, bias = address.read(weights)
            scores[f"visual.{block}.{site}.weight"] = -weight.abs()
            scores |= {} if site == "k" else {f"visual.{block}.{site}.bias": -bias.abs()}
    number = round(0.01 * sum(score.numel() for score in scores.values()))
    assert chosen(model, "pa_fi") == largest(scores, number)


@pytest.mark.parametrize("structure", ["lora", "adapter"])
@pytest.mark.parametrize("budget", [60, 700, 1500, 4000])
def test_spt_spends_its_budget(budget, structure):
    """The allocation of the largest number of sensitive entries whose cost is within the budget, found one by one."""
    model = allocated(vp.SPT(budget=budget, rank=2, structure=structure, matrix_share=0.3, vector_share=0.5))
    scores = without_key_biases(squares([[0, 1, 2, 3], [4, 5]]))
    sizes = {}
    for name, score in scores.items():
        if score.ndim == 2:
            rows, columns = score.shape
            read = columns if ".proj." in name else rows
            sizes[name] = 2 * (rows + columns) if structure == "lora" else 2 * read + 2 + rows * 2 + rows
    counts, costs = dict.fromkeys(scores, 0), dict.fromkeys(scores, 0)
    ranked = sorted(((v, name) for name, score in scores.items() for v in score.flatten().tolist()), reverse=True)
    taken = 0
    for _, name in ranked:
        counts[name] += 1
        size = scores[name].numel()
        if name in sizes:
            costs[name] = sizes[name] if counts[name] >= 0.3 * sizes[name] else counts[name]
        else:
            costs[name] = size if counts[name] >= 0.5 * size else counts[name]
        if sum(costs.values()) > budget:
            break
        taken += 1
    expected, structured = {}, set()
    for name, indices in largest(scores, taken).items():
        if name in sizes and len(indices) >= 0.3 * sizes[name]:
            structured.add(name)
        elif name not in sizes and len(indices) >= 0.5 * scores[name].numel():
            expected[name] = list(range(scores[name].numel()))
        else:
            expected[name] = indices
    (method,) = model.peft["default"].methods
    assert set(method.structured) == structured
    assert chosen(model, "spt") == expected
    trained = vp.summary(model).adapter - 32  # the class token
    assert trained == sum(sizes[name] for name in structured) + sum(map(len, expected.values())) <= budget


def test_spt_meets_both_kinds():
    """The cases above are not all of one kind."""
    (method,) = allocated(vp.SPT(budget=1500, rank=2, matrix_share=0.3)).peft["default"].methods
    assert method.structured
    assert method.entries


def test_other_methods_act_while_data_are_seen():
    """The gradients are those of the model with the rest of the adapter."""
    torch.manual_seed(0)
    model = VIT.build(torch.float64)
    vp.attach(model, [vp.VPT(num_tokens=3), vp.FishMask(density=0.03)], train=("pos_embed",))
    prompts = model.peft["default"].get_parameter("vpt.visual.0.stream_in.prompts").detach().clone()
    vp.allocate(model, [(images(), LABELS)])
    assert torch.equal(model.peft["default"].get_parameter("vpt.visual.0.stream_in.prompts"), prompts)
    assert chosen(model, "fish_mask") != chosen(allocated(vp.FishMask(density=0.03)), "fish_mask")


# what waiting methods refuse, and what seeing data leaves alone


@pytest.mark.parametrize("method", WAITING, ids=repr)
def test_waiting_methods_refuse(method, tmp_path):
    """Without data, computing, saving, merging and combining say what to do."""
    model = VIT.build()
    plain = VIT.run(model, VIT.inputs())
    vp.attach(model, method)
    attempts = [
        lambda: VIT.run(model, VIT.inputs()),
        lambda: vp.save(model, tmp_path),
        lambda: vp.merge(model),
        lambda: vp.combine(model, {"default": 1.0}, "copy"),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match=r"visionpeft\.allocate"):
            attempt()
    assert not list(tmp_path.iterdir())
    with vp.use(model, None):
        assert torch.equal(VIT.run(model, VIT.inputs()), plain)
    vp.detach(model)
    assert torch.equal(VIT.run(model, VIT.inputs()), plain)


@pytest.mark.parametrize("method", WAITING, ids=repr)
def test_seeing_data_changes_nothing_else(method):
    """Base, flags, modes, head and what is active are what they were; nobody waits any more."""
    model = VIT.build()
    vp.attach(model, vp.LoRA(rank=2), name="other")
    vp.attach(model, method)
    vp.disable(model)
    model.train()
    model.blocks[1].eval()
    before, head = base_state(model), model.peft["default"].head
    modes = {n: m.training for n, m in model.named_modules() if not n.startswith("peft.default")}
    vp.allocate(model, [(images(torch.float32), LABELS)])
    assert same_bytes(base_state(model), before)
    assert model.peft["default"].head is head
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
    assert model.peft.active == ()
    assert [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("peft.")] == []
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(UserError, match="none does"):
        vp.allocate(model, [(images(torch.float32), LABELS)])


def test_data_that_tell_nothing_are_refused():
    """No batches, a head at zero, images that are not finite: a sentence, and the adapter goes on waiting."""
    x = images(torch.float32)
    bad = x.clone()
    bad[1, 0, 0, 0] = math.nan
    for batches, zero in (([], False), ([(x, LABELS)], True), ([(bad, LABELS)], False)):
        model = VIT.build()
        vp.attach(model, vp.FishMask(density=0.03))
        if zero:
            torch.nn.init.zeros_(model.peft["default"].head.weight)
        with pytest.raises(UserError):
            vp.allocate(model, batches)
        with pytest.raises(UserError, match=r"visionpeft\.allocate"):
            model(x)


def test_smallest_entries_are_not_chosen_among_weights_that_are_not_there():
    """A model on device "meta" ended in PyTorch's own error about a copy."""
    with torch.device("meta"):
        model = timm.create_model("test_vit", num_classes=3)
    classes = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(vp.ConfigurationError, match="PaFi: the smallest entries are those of weights"):
        vp.attach(model, vp.PaFi())
    assert classes == {name: type(module) for name, module in model.named_modules()}
    vp.attach(model, vp.FishMask())  # which chooses later


@pytest.mark.parametrize("method", [vp.FishMask, vp.PaFi, vp.SPT])
def test_entries_are_not_to_be_given(method):
    """Their numbers alone do not say which they are."""
    model = VIT.build()
    with pytest.raises(UserError, match="leave them out"):
        vp.attach(model, method(entries={"visual.0.q.weight": 3}))
    assert not hasattr(model, "peft")


def test_which_adapter_sees_the_data():
    """With two that wait, the name decides."""
    model = VIT.build()
    for name in ("a", "b"):
        vp.attach(model, vp.FishMask(density=0.03), name)
        vp.disable(model)
    with pytest.raises(UserError, match="name="):
        vp.allocate(model, [(images(torch.float32), LABELS)])
    vp.allocate(model, [(images(torch.float32), LABELS)], name="b")
    assert [model.peft[name].pending for name in ("a", "b")] == [True, False]


# entries outside the choice


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("name", ["pafi", "fish_mask", "child_d"])
def test_other_entries_do_not_move(name, optimiser):
    """After steps with momentum and strong weight decay, exactly the chosen entries differ from the backbone's.

    Child-Tuning D as published trains what is outside the blocks whole.
    """
    model = VIT.build()
    method = vp.PaFi(density=0.02) if name == "pafi" else BY_NAME[name].method
    vp.attach(model, method)
    if method.pending:
        vp.allocate(model, [(images(torch.float32), LABELS)])
    parameters = vp.trainable_parameters(model)
    if optimiser == "adamw":
        optimiser = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5)
    else:
        optimiser = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.5)
    for _ in range(4):
        optimiser.zero_grad()
        F.cross_entropy(model(images(torch.float32)), LABELS).backward()
        optimiser.step()
    states = [v for s in optimiser.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.ndim]
    assert sum(s.numel() for s in states) <= 2 * sum(p.numel() for p in parameters)
    picked = chosen(model, method.name)
    vp.merge(model)
    found, base = model.state_dict(), VIT.build().state_dict()
    moved = 0
    for (block, site), address in addresses_of(VIT.build(), "visual").items():
        path = f"visual.{site}" if block is None else f"visual.{block}.{site}"
        if address.weight not in base or (name == "child_d" and block is None):
            continue
        for part, new, old in zip(("weight", "bias"), address.read(found), address.read(base), strict=True):
            differing = (new != old).flatten().nonzero().flatten().tolist()
            assert set(differing) <= set(picked.get(f"{path}.{part}", []))
            moved += len(differing)
    assert moved > 0.9 * sum(map(len, picked.values()))


def test_file_holds_values_and_indices_alone(tmp_path):
    """Four bytes for a value and four for its index; the summary counts both."""
    model = adapted(VIT, BY_NAME["fish_mask"])
    vp.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    own = {k: v for k, v in tensors.items() if not k.startswith("head.")}
    total = vp.summary(model)
    assert {v.dtype for k, v in own.items()} == {torch.float32, torch.int32}
    assert sum(v.numel() for v in own.values()) == 2 * total.adapter == 2 * total.indices
    fields = json.loads((tmp_path / "adapter.json").read_text())["methods"][0]["fields"]
    assert sum(fields["entries"].values()) == total.indices
    assert f"{total.indices:,} indices" in " ".join(str(total).split())


def test_pafi_is_loaded_where_it_would_choose_otherwise(tmp_path):
    """On the backbone in bfloat16, whose order of magnitudes is another, the saved entries are used."""
    model = adapted(VIT, BY_NAME["pafi"])
    vp.save(model, tmp_path)
    other = VIT.build(torch.bfloat16)
    vp.load(other, tmp_path)
    assert chosen(other, "pa_fi") == chosen(model, "pa_fi")


def test_nothing_dense_is_kept_for_backward():
    """Of a sparse change, x is kept, and neither the matrix nor its gradient."""
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(9, 7, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    layer = types.SimpleNamespace(weight_tensor=weight, kind="linear", trailing=())
    change = SparseDelta(layer, torch.tensor([0, 9, 30, 62], dtype=torch.int32)).double()

    def changed(x, values):
        change._parameters["weight"] = values
        y, ((_, left),) = linear(x, weight, bias, [(None, (change,))])
        assert not left
        return y

    kept, values = [], torch.randn(4, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        changed(x, values)
    assert sorted(kept) == sorted([x.shape, values.shape, weight.shape])
    assert torch.autograd.gradcheck(changed, (x, values))


def test_what_can_be_made_again_is_not_kept():
    """Of outputs of norms and activations, which matrices read, no more is kept than by LoRA."""
    x, kept = VIT.inputs(8), {}
    for method in (vp.PaFi(density=0.02), vp.LoRA(rank=1, targets=("q", "k", "v", "proj", "fc1", "fc2"))):
        model = VIT.build()
        vp.attach(model, method)
        sizes = {}

        def pack(tensor, sizes=sizes):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = model(x)
        kept[type(method).__name__] = sum(sizes.values())
        del output
    assert kept["PaFi"] < 1.1 * kept["LoRA"]


# Child-Tuning F


def passed(model, number=1):
    """Gradients of what is trained, head included, summed over so many passes over different images."""
    model.zero_grad()
    for i in range(number):
        F.cross_entropy(model(VIT.inputs(6, seed=4 + i)), LABELS).backward()
    return {n: p.grad.clone() for n, p in model.peft["default"].named_parameters()}


def child_f(share=0.25):
    """A model, and an optimiser whose steps change nothing, so that gradients can be compared."""
    model = vp.attach(VIT.build(), vp.ChildTuning("F", share=share)).eval()
    return model, torch.optim.SGD(vp.trainable_parameters(model), lr=0.0)


def masks_of(model, optimiser, whole):
    """Which entries of the gradient a step leaves, at 1 / share of what they were; the others are zero."""
    before = {n: g.clone() for n, g in whole.items()}
    optimiser.step()
    kept = {}
    for name, parameter in model.peft["default"].named_parameters():
        kept[name] = parameter.grad != 0
        expected = torch.where(kept[name], 4 * before[name], torch.zeros_like(before[name]))
        assert torch.allclose(parameter.grad, expected, rtol=1e-5, atol=1e-9), name
    return kept


@pytest.mark.parametrize("passes", [1, 3])
def test_child_f_masks_once_for_each_step(passes):
    """An entry of what the passes have summed is 0 or g / share, that of the head, too, and anew for each step."""
    model, optimiser = child_f()
    torch.manual_seed(0)
    masks = [masks_of(model, optimiser, passed(model, passes)) for _ in range(2)]
    for kept in masks:
        counted = {n: (k.sum().item(), k.numel()) for n, k in kept.items() if n.endswith("weight")}
        share = sum(n for n, _ in counted.values()) / sum(n for _, n in counted.values())
        assert 0.24 < share < 0.26  # a mask drawn in each pass would keep more: 58 % of sums of three
        assert 0.1 < counted["head.weight"][0] / counted["head.weight"][1] < 0.4
    assert any(not torch.equal(masks[0][n], masks[1][n]) for n in masks[0])
    whole = passed(model, passes)
    assert all((g != 0).float().mean() > 0.9 for n, g in whole.items() if n.endswith("fc1.weight"))  # none in a pass


def test_child_f_steps_like_the_published_optimiser():
    """AdamW on M g / share, as written by the authors within the step: moments see the masked gradient."""
    model, _ = child_f()
    twin = vp.attach(VIT.build(), vp.FullFineTuning()).eval()
    pair = [torch.optim.AdamW(vp.trainable_parameters(m), lr=0.01, weight_decay=0.1) for m in (model, twin)]
    torch.manual_seed(0)
    for _ in range(3):
        passed(model)
        pair[0].step()
        for mine, other in zip(vp.trainable_parameters(model), vp.trainable_parameters(twin), strict=True):
            other.grad = mine.grad.clone()
        pair[1].step()
    for mine, other in zip(vp.trainable_parameters(model), vp.trainable_parameters(twin), strict=True):
        assert torch.equal(mine, other)


def test_child_f_masks_after_clipping():
    """The clipped gradient is masked; masked first, it would be clipped to the norm that was asked for."""
    model, optimiser = child_f()
    passed(model)
    parameters = vp.trainable_parameters(model)
    torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
    clipped = {n: p.grad.clone() for n, p in model.peft["default"].named_parameters()}
    masks_of(model, optimiser, clipped)
    norm = torch.stack([p.grad.norm() for p in parameters]).norm().item()
    assert 1.5e-3 < norm < 2.5e-3  # 1 / share times as large in a quarter of the entries


def test_child_f_masks_gradients_that_a_closure_makes():
    """As Lightning calls its optimisers: the gradients come into being within the step."""
    model, optimiser = child_f()
    whole = passed(model)
    model.zero_grad()

    def closure():
        passed(model)
        return torch.zeros(())

    for step in (lambda: optimiser.step(closure), lambda: optimiser.step(closure=closure)):
        step()
        kept = sum((p.grad != 0).sum().item() for p in vp.trainable_parameters(model))
        share = kept / sum((g != 0).sum().item() for g in whole.values())
        assert 0.24 < share < 0.26


def test_child_f_masks_gradients_of_copies():
    """A copied and an unpickled model mask as the original does, and only parameters of their own are masked."""
    model, _ = child_f()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = None
    for each in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        own = torch.optim.SGD(vp.trainable_parameters(each), lr=0.0)
        whole = passed(each)
        torch.manual_seed(0)
        kept = masks_of(each, own, whole)
        expected = expected or kept
        assert all(torch.equal(kept[n], expected[n]) for n in kept)
    plain = torch.nn.Linear(3, 3)
    plain(torch.ones(2, 3)).sum().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert (plain.weight.grad != 0).all()


# runs


@pytest.fixture(scope="module")
def squares_on_disk(tmp_path_factory):
    """A small set of images."""
    return draw_images(tmp_path_factory.mktemp("data") / "squares")


FISH = ["--model.method", "FishMask", "--model.method.density", "0.01", "--model.method.samples", "10"]
SPT = ["--model.method", "SPT", "--model.method.budget", "3000", "--model.method.rank", "2"]
CHILD = ["--model.method", "ChildTuning", "--model.method.variant", "F"]
START = ["--model.method", "LoRAGA", "--model.method.rank", "2", "--model.method.samples", "10"]


@pytest.mark.parametrize("method", [FISH, SPT, CHILD, START], ids=["fish_mask", "spt", "child_f", "lora_ga"])
def test_resumed_run_keeps_what_it_chose(method, tmp_path, squares_on_disk, monkeypatch, capsys):
    """A run that is interrupted goes on with the entries it has, and ends where the uninterrupted one ends."""
    shown = "what the method will choose by the data"
    whole = run(tmp_path / "whole", squares_on_disk, *method, epochs=4)

    def fail_in_third_epoch(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise ZeroDivisionError
        return original(self, trainer, pl_module)

    original = EpochHistory.on_train_epoch_end
    with monkeypatch.context() as patch:
        patch.setattr(EpochHistory, "on_train_epoch_end", fail_in_third_epoch)
        with pytest.raises(ZeroDivisionError):
            fit.main([*arguments(squares_on_disk, *method, epochs=4), "--output", str(tmp_path / "parts")])
    (part,) = (tmp_path / "parts").iterdir()
    monkeypatch.setattr(allocating, "allocate", None)  # it must not be asked again
    assert fit.main(["--resume", str(part)]) == 0
    losses = [[row["train/loss"] for row in read_history(folder / "metrics.csv")] for folder in (part, whole)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert results(part)["test"] == results(whole)["test"]
    assert same_bytes(*(load_file(folder / "adapter" / "adapter.safetensors") for folder in (part, whole)))
    assert (shown in capsys.readouterr().out) == (method != CHILD)
    assert results(whole)["parameters"]["adapter"] > 0
    assert "waiting" not in results(whole)["parameters"]


def test_child_f_in_a_run(tmp_path, squares_on_disk, monkeypatch):
    """Under Lightning: one draw for each step over accumulated batches, of clipped gradients, of every parameter."""
    norms, draws, original = [], [], vp.ChildTuning.mask_gradient

    def observed(self, gradient, generator):
        draws.append(gradient.numel())
        norms.append(gradient.norm().item())
        return original(self, gradient, generator)

    monkeypatch.setattr(vp.ChildTuning, "mask_gradient", observed)
    steps = []
    after = vp.ChildTuning.after_step
    monkeypatch.setattr(vp.ChildTuning, "after_step", lambda self, *args: steps.append(1) or after(self, *args))
    options = ("--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.01")
    folder = run(tmp_path, squares_on_disk, *CHILD, *options, epochs=3)
    trained = results(folder)["parameters"]["trainable"]
    assert len(steps) >= 3
    assert sum(draws) == len(steps) * trained
    each = len(draws) // len(steps)
    for step in range(len(steps)):
        total = sum(norm**2 for norm in norms[step * each : (step + 1) * each]) ** 0.5
        assert total == pytest.approx(0.01, rel=1e-3)


def test_sparse_changes_under_function_transforms():
    """`torch.func.grad` gives what `backward` gives."""
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    layer = torch.nn.Linear(7, 9).double().requires_grad_(False)
    change = SparseDelta(Layer("fc1", "linear", layer), torch.tensor([0, 9, 30, 62], dtype=torch.int32)).double()

    def loss(weight):
        y = torch.func.functional_call(change, {"weight": weight}, (x, layer(x), layer.weight, layer.bias))
        return y.square().sum()

    transformed = torch.func.grad(loss)(change.weight.detach())
    loss(change.weight).backward()
    assert torch.allclose(transformed, change.weight.grad, rtol=1e-12)
