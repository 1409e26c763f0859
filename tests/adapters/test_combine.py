"""Weighted combinations of adapters: what they are by formula, what is refused, and the choice of a soup."""

import pytest
import torch
from conftest import CASES, adapted, attach, cells, distance, randomise, same_bytes
from reference.hosts import HOSTS

import visionpeft as vp
from visionpeft.errors import UserError

BY_HOST = {h.name: h for h in HOSTS}
BY_NAME = {c.name: c for c in CASES}
VIT = BY_HOST["vit_cls"]
ADDITIVE = ("lora", "lora_all", "ada_lora", "spt", "pafi", "fish_mask", "child_d", "child_f", "full", "last_block")
ADDITIVE += (
    "ltsft",
    "diff_pruning",
    "auto_lora",
    "fish_dip",
    "far",
    "pruned_bit_fit",
    "bit_fit",
    "layer_norm_tuning",
    "pissa",
    "sora",
    "eva",
    "gps",
)


def two(case, host=VIT, dtype=torch.float64, seeds=(1, 2)):
    """A host with a case attached twice, with other values."""
    model = host.build(dtype)
    for name, seed in zip("ab", seeds, strict=True):
        torch.manual_seed(seed)
        attach(model, host, case, name)
        randomise(model.peft[name], seed)
        vp.disable(model)
    return model.eval()


def outputs(host, model, *names):
    """The outputs with each of these adapters alone."""
    found = []
    for name in names:
        with vp.use(model, name), torch.no_grad():
            found.append(host.run(model, host.inputs(dtype=next(model.parameters()).dtype)))
    return found


def merged(model, name):
    """The backbone's weights with one adapter merged; without heads."""
    vp.activate(model, name)
    vp.merge(model)
    weights = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("head.")}
    vp.unmerge(model)
    return weights


@cells([VIT, BY_HOST["clip_whole"]], [c for c in CASES if c.name != "spt_adapter"])
def test_one_adapter_of_weight_one_is_itself(host, case):
    """Combining one adapter gives what it gives, for every method."""
    model = adapted(host, case, torch.float64)
    vp.combine(model, {"default": 1.0}, "copy")
    assert model.peft.active == ("copy",)
    expected, found = outputs(host, model, "default", "copy")
    assert distance(found, expected) < 1e-12


@cells([VIT, BY_HOST["clip_whole"]], [BY_NAME[name] for name in ADDITIVE])
def test_changes_of_weights_are_added(host, case):
    """The merged weights are W0 + sum_i w_i (W_i - W0), of adapters merged one by one."""
    model = two(case, host)
    base = {k: v.clone() for k, v in host.build(torch.float64).state_dict().items()}
    one, other = merged(model, "a"), merged(model, "b")
    for weights in ((0.3, 0.7), (1.5, -0.75), (1.0, -1.0)):
        vp.combine(model, dict(zip("ab", weights, strict=True)), "mix", head=False)
        moved = 0
        for key, found in merged(model, "mix").items():
            expected = base[key] + weights[0] * (one[key] - base[key]) + weights[1] * (other[key] - base[key])
            assert torch.allclose(found, expected, rtol=0, atol=1e-12), (key, weights)
            moved += (found - base[key]).norm().item()
        assert moved > 0.1, weights
        vp.detach(model, "mix")


def test_low_rank_matrices_are_not_averaged_apart():
    """The mean of A and the mean of B would make another change, with different alphas and ranks no change at all."""
    model = VIT.build(torch.float64)
    tensors = {}
    for name, rank, alpha in (("a", 2, 6), ("b", 3, None)):
        vp.attach(model, vp.LoRA(rank=rank, alpha=alpha, overrides={"0": 4}), name)
        randomise(model.peft[name], rank)
        tensors[name] = {k: v.detach().clone() for k, v in model.peft[name].state_dict().items()}
        vp.disable(model)
    vp.combine(model, {"a": 0.25, "b": 0.75}, "mix")
    mix = model.peft["mix"]
    assert mix.methods == (vp.LoRA(rank=8, alpha=None),)
    for index in range(3):
        for site in "qv":
            path = f"lora.visual.{index}.{site}"
            change = sum(
                weight * scale * tensors[name][f"{path}.B"] @ tensors[name][f"{path}.A"]
                for name, weight, scale in (("a", 0.25, 6 / (4 if index == 0 else 2)), ("b", 0.75, 1))
            )
            assert torch.allclose(mix.get_parameter(f"{path}.B") @ mix.get_parameter(f"{path}.A"), change, atol=1e-14)
    # what is left of the ranks can be trained
    VIT.run(model, VIT.inputs(dtype=torch.float64)).square().sum().backward()
    assert (mix.get_parameter("lora.visual.2.q.B").grad.norm(dim=0) > 0).all()


def test_entries_are_united():
    """Entries of one adapter alone keep their weighted value; those of both are added."""
    model = VIT.build(torch.float64)
    for name, density in (("a", 0.02), ("b", 0.05)):
        vp.attach(model, vp.PaFi(density), name)
        randomise(model.peft[name], 3)
        vp.disable(model)
    vp.combine(model, {"a": 2.0, "b": -1.0}, "mix", head=False)
    a, b, mix = (model.peft[name].state_dict() for name in ("a", "b", "mix"))
    path = "pa_fi.visual.1.fc1.weight"
    values = dict(zip(b[f"{path}_index"].tolist(), -b[path], strict=True))
    for index, value in zip(a[f"{path}_index"].tolist(), a[path], strict=True):
        values[index] = values.get(index, 0) + 2 * value
    assert mix[f"{path}_index"].tolist() == sorted(values)
    assert torch.equal(mix[path], torch.stack([values[i] for i in sorted(values)]))


@pytest.mark.parametrize("name", ["vpt_deep", "ssf", "houlsby", "prefix", "dora"])
def test_other_methods_are_averaged(name):
    """The tensors are the weighted means, and weights that do not add up to 1 are refused."""
    model = two(BY_NAME[name])
    vp.combine(model, {"a": 1.25, "b": -0.25}, "mix")
    a, b, mix = (model.peft[each].state_dict() for each in ("a", "b", "mix"))
    assert a.keys() == mix.keys()
    for key, found in mix.items():
        assert torch.allclose(found, 1.25 * a[key] - 0.25 * b[key], atol=1e-14), key
    with pytest.raises(UserError, match="add up to 1"):
        vp.combine(model, {"a": 1, "b": -1}, "no", head=False)


def test_combined_adapter_is_trained_saved_and_loaded(tmp_path):
    """It is an adapter like others."""
    model = two(BY_NAME["spt"], dtype=torch.float32)
    vp.combine(model, {"a": 0.5, "b": 0.5}, "mix")
    VIT.run(model, VIT.inputs()).square().sum().backward()
    assert all(p.grad is not None for p in vp.trainable_parameters(model))
    vp.save(model, tmp_path, "mix")
    fresh = VIT.build()
    vp.load(fresh, tmp_path)
    assert torch.equal(*(VIT.run(each, VIT.inputs()) for each in (model, fresh.eval())))


def test_heads():
    """Heads of equally many classes are averaged with the weights; others are left out or refused."""
    case = BY_NAME["lora"]
    model = two(case)
    vp.combine(model, {"a": 0.25, "b": 0.75}, "mix")
    heads = [model.peft[name].head.weight for name in ("a", "b", "mix")]
    assert torch.allclose(heads[2], 0.25 * heads[0] + 0.75 * heads[1], atol=1e-14)
    vp.combine(model, {"a": 1, "b": 1}, "sum", head=False)
    assert model.peft["sum"].head_paths == ()
    before = list(model.peft)
    with pytest.raises(UserError, match="head=False"):
        vp.combine(model, {"a": 1, "b": 1}, "no")
    model.peft["b"].head = torch.nn.Linear(32, 3)
    with pytest.raises(UserError, match="head=False"):
        vp.combine(model, {"a": 0.5, "b": 0.5}, "no")
    assert list(model.peft) == before


REFUSED = {
    "another method": ({"a": 0.5, "c": 0.5}, "free"),
    "another range of blocks": ({"a": 0.5, "d": 0.5}, "free"),
    "another extra parameter": ({"a": 0.5, "e": 0.5}, "free"),
    "not allocated": ({"f": 1.0}, "free"),
    "before its last stage": ({"g": 1.0}, "free"),
    "no numbers": ({"a": "much"}, "free"),
    "a list": (["a"], "free"),
    "no such adapter": ({"a": 0.5, "z": 0.5}, "free"),
    "no adapter": ({}, "free"),
    "not a number": ({"a": float("nan")}, "free"),
    "name taken": ({"a": 1.0}, "c"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_change_nothing(reason):
    """What cannot be combined is refused, and the model stays as it was."""
    model = VIT.build()
    methods = {
        "a": vp.LoRA(rank=2),
        "c": vp.SSF(),
        "d": vp.LoRA(rank=2, blocks="last:1"),
        "e": vp.LoRA(rank=2),
        "f": vp.FishMask(),
        "g": vp.DiffPruning(),  # which would have no entries yet, and so change nothing
    }
    for name, method in methods.items():
        vp.attach(model, method, name, train=("cls_token",) if name == "e" else ())
        vp.disable(model)
    vp.activate(model, "a")
    before, state = (list(model.peft), model.peft.active), {k: v.clone() for k, v in model.state_dict().items()}
    weights, name = REFUSED[reason]
    with pytest.raises(UserError):
        vp.combine(model, weights, name)
    assert (list(model.peft), model.peft.active) == before
    assert same_bytes(dict(model.state_dict()), state)


def test_bottlenecks_of_spt_are_refused():
    """They are neither linear nor placed alike."""
    with pytest.raises(UserError, match="structure"):
        vp.combine(adapted(VIT, BY_NAME["spt_adapter"]), {"default": 1.0}, "copy")


# which adapters make a soup


@pytest.mark.parametrize("host", [VIT, BY_HOST["clip_visual"]], ids=repr)
def test_feature_mean(host):
    """The mean of what the head reads of the backbone, whatever acts and whatever the batches are."""
    images = host.inputs(6, torch.float64)
    plain = host.build(torch.float64)
    with torch.no_grad():
        if host is VIT:
            expected = plain.forward_head(plain.forward_features(images), pre_logits=True).mean(dim=0)
        else:
            expected = plain(images).mean(dim=0)
    model = adapted(host, BY_NAME["lora_all"], torch.float64).train()
    before = VIT.run(model, images)
    found = vp.feature_mean(model, [(images[:4], None), images[4:]])
    assert distance(found.double(), expected) < 1e-6
    assert model.training
    assert torch.equal(VIT.run(model, images), before)


def test_similar_adapters():
    """Equal weights of the nearest by cosine, whatever the lengths."""
    means = {"far": [0.0, 1.0], "near": torch.tensor([100.0, 1.0]), "nearer": [1.0, 0.001]}
    assert vp.similar_adapters(torch.tensor([2.0, 0.0]), means, 2) == {"nearer": 0.5, "near": 0.5}
    for number in (0, 4):
        with pytest.raises(UserError):
            vp.similar_adapters(torch.tensor([2.0, 0.0]), means, number)
    with pytest.raises(UserError, match="of one backbone"):
        vp.similar_adapters(torch.ones(3), means, 2)
