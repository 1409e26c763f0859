"""Mixtures of experts: what holds of them beside their formulas."""

import copy
import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import distance, output_of, randomise
from reference import edits_of, forward, shapes_of
from reference.hosts import HOSTS

import visionpeft as vp
from visionpeft.errors import ConfigurationError, UnsupportedError

HOST = next(host for host in HOSTS if host.name == "vit_cls")
MIXED = {"molora": vp.MoLORA(experts=3, rank=2), "mov": vp.MoV(experts=3)}


def moved(method):
    """A host with a method attached, off its start."""
    torch.manual_seed(0)
    model = vp.attach(HOST.build(torch.float64), method).eval()
    randomise(model.peft["default"])
    return model


@pytest.mark.parametrize("name", MIXED)
def test_equal_experts_make_the_router_irrelevant(name):
    """Whatever it says, the shares add up to 1; experts that differ are weighed."""
    model = moved(MIXED[name])
    parameters = dict(model.peft.named_parameters())
    routers = [p for path, p in parameters.items() if path.endswith("router.weight")]
    changed = []
    for equal in (False, True):
        with torch.no_grad():
            for path, parameter in parameters.items():
                if equal and path.endswith((".A", ".B", ".scales")):
                    parameter.copy_(parameter[:1].expand_as(parameter))
            before = output_of(HOST, model, dtype=torch.float64)
            for router in routers:
                router.mul_(-3)
        changed.append((output_of(HOST, model, dtype=torch.float64) - before).norm() / before.norm())
    assert changed[0] > 1e-3
    assert changed[1] < 1e-13


@pytest.mark.parametrize("name", MIXED)
def test_a_token_is_weighed_by_itself(name):
    """What acts on one token does not depend on the others."""
    model = moved(MIXED[name])
    for _, placement in model.peft["default"].placements:
        module = placement.module
        read, given = (module.A.shape[2], module.B.shape[1]) if name == "molora" else [module.scales.shape[1]] * 2
        x, y = (torch.randn(2, 5, width, dtype=torch.float64) for width in (read, given))
        layer = placement.site != "hidden"
        with torch.no_grad():
            whole = module(x, y, None, None) if layer else module(x)
            alone = module(x[1:, 3:4], y[1:, 3:4], None, None) if layer else module(x[1:, 3:4])
        torch.testing.assert_close(whole[1:, 3:4], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        (vp.MixLoRA, {"top": 1}, "top must be from 2 to the number of experts, 8, not 1"),
        (vp.MixLoRA, {"top": 9}, "top must be from 2 to the number of experts, 8, not 9"),
        (vp.MixLoRA, {"rank": 0}, "rank must be a positive integer"),
        (vp.MixLoRA, {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        (vp.MixLoRA, {"balance": -0.1}, "balance must not be negative, but is -0.1"),
        (vp.AdaMix, {"experts": 0}, "experts must be a positive integer"),
        (vp.AdaMix, {"consistency": -1}, "consistency must not be negative, but is -1"),
        (vp.AdaMix, {"activation": "tanh"}, "activation must be one of gelu"),
        (vp.MoLORA, {"experts": 0}, "experts must be a positive integer"),
        (vp.MoLORA, {"rank": 0}, "rank must be a positive integer"),
        (vp.MoLORA, {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        (vp.MoLORA, {"targets": ()}, "targets must be a list of names"),
        (vp.MoV, {"experts": -1}, "experts must be a positive integer"),
        (vp.MoV, {"targets": ("q",)}, "targets must be a list out of k, v, hidden"),
    ],
)
def test_refusals(kind, fields, sentence):
    with pytest.raises(ConfigurationError, match=f"^{kind.__name__}: {sentence}"):
        kind(**fields)


# AdaMix


def test_routes_are_drawn_in_training_alone():
    """Each pass is that of one down- and one up-projection, all pairs are met, and the mean is none of them."""
    module = moved(vp.AdaMix(experts=2, bottleneck=3, shared_up=False)).peft["default"].placements[0][1].module
    x = torch.randn(1, 4, 32, dtype=torch.float64)

    def formula(i, j):
        """x + U_j gelu(D_i x + d_i) + u_j."""
        down, up = (module.down_weight[i], module.down_bias[i]), (module.up_weight[j], module.up_bias[j])
        return x + torch.nn.functional.gelu(x @ down[0].T + down[1]) @ up[0].T + up[1]

    with torch.no_grad():
        expected = {pair: formula(*pair) for pair in itertools.product(range(2), repeat=2)}
        in_use = module.eval()(x)
        assert min(distance(in_use, each) for each in expected.values()) > 1e-3
        module.train()
        met = []
        for _ in range(60):
            found = module(x)
            met += [pair for pair, each in expected.items() if distance(found, each) < 1e-12]
    assert len(met) == 60
    assert set(met) == set(expected)


def test_projections_differ_at_the_start():
    """In published code they are copies of one."""
    torch.manual_seed(0)
    for _, placement in vp.attach(HOST.build(), vp.AdaMix()).peft["default"].placements:
        down = placement.module.down_weight
        assert len(placement.module.up_weight) == 1
        assert min((a - b).abs().max().item() for a, b in itertools.combinations(down, 2)) > 0.01


def test_undrawn_projections_have_a_gradient_of_zero():
    """So that several processes, which draw for themselves, wait for none."""
    model = vp.attach(HOST.build(), vp.AdaMix(experts=3, bottleneck=2)).train()
    HOST.run(model, HOST.inputs()).square().sum().backward()
    for _, placement in model.peft["default"].placements:
        assert (placement.module.down_weight.grad.flatten(1).norm(dim=1) > 0).sum() == 1


def symmetric_divergence(first, second):
    """The mean over the batch of sum_c (p_c - q_c) (log p_c - log q_c) / 2, its halves with a constant target."""
    p, q = (torch.exp(z.double()) / torch.exp(z.double()).sum(1, keepdim=True) for z in (first, second))
    halves = (q.detach() * (q.detach() / p).log()).sum() + (p.detach() * (p.detach() / q).log()).sum()
    return halves / (2 * len(first))


def test_passes_are_compared():
    """By formula, with its gradients; the same twice costs nothing."""
    torch.manual_seed(0)
    model = vp.attach(HOST.build(), vp.AdaMix(experts=2, consistency=0.7), head=False)
    first, second = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    found = vp.penalty(model, first, lambda: second)
    expected = 0.7 * symmetric_divergence(first, second)
    assert abs(found.item() - expected.item()) < 1e-6 * expected.item()
    for ours, theirs in zip(*(torch.autograd.grad(loss, (first, second)) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert abs(vp.penalty(model, first, lambda: first).item()) < 1e-6
    with pytest.raises(ConfigurationError, match="AdaMix compares two passes"):
        vp.penalty(model)
    vp.disable(model)
    assert vp.penalty(model) == 0


def test_equal_projections_give_no_divergence():
    model = moved(vp.AdaMix(experts=2, bottleneck=3)).train()
    found = []
    for equal in (False, True):
        with torch.no_grad():
            for _, placement in model.peft["default"].placements if equal else ():
                for parameter in placement.module.parameters():
                    parameter.copy_(parameter[:1].expand_as(parameter))
            logits = HOST.run(model, HOST.inputs(4, torch.float64))
            divergences = [
                vp.penalty(model, logits, lambda: HOST.run(model, HOST.inputs(4, torch.float64))) for _ in range(4)
            ]
        found.append(max(float(each) for each in divergences))
    assert found[0] > 1e-3
    assert found[1] < 1e-6


def test_adamix_is_saved_as_one_adapter(tmp_path):
    """Which can be trained, merged into soups, and gives the same bytes."""
    model = vp.attach(HOST.build(), vp.AdaMix(experts=3, bottleneck=4, activation="relu")).eval()
    randomise(model.peft["default"])
    vp.save(model, tmp_path)
    fresh = HOST.build().eval()
    vp.load(fresh, tmp_path)
    assert fresh.peft["default"].methods == (vp.Adapter(bottleneck=4, placement="pfeiffer", activation="relu"),)
    assert torch.equal(output_of(HOST, fresh), output_of(HOST, model))
    assert vp.summary(fresh).adapter == 3 * (2 * 32 * 4 + 4 + 32)


# MixLoRA


def test_the_mlp_gets_each_token_as_often_as_it_has_experts():
    """Two experts of eight cost two passes of the MLP, not eight."""
    model, seen = moved(vp.MixLoRA(rank=1)), []
    model.blocks[0].mlp.fc1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    output_of(HOST, model, dtype=torch.float64)
    vp.disable(model)
    output_of(HOST, model, dtype=torch.float64)
    assert seen == [2 * 17, 17]


def test_balance_by_formula():
    """balance * the mean over blocks of E sum_e f_e P_e, counted token by token, with its gradient."""
    model = moved(vp.MixLoRA(experts=4, rank=1, balance=0.3)).train()
    with pytest.raises(ConfigurationError, match="pass in training mode"):
        vp.penalty(model)
    part, read = model.peft["default"].mix_lora.visual, []
    for block in part.values():
        block.mlp_in.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
    HOST.run(model, HOST.inputs(dtype=torch.float64))
    found, routers = vp.penalty(model), [block.mlp_in.router.weight for block in part.values()]
    terms = []
    for x, router in zip(read, routers, strict=True):
        tokens, used, total = x.flatten(0, 1), [0] * 4, 0
        for token in tokens:
            e = torch.exp(router @ token)
            total = total + e / e.sum()
            for expert in sorted(range(4), key=lambda index, e=e: -e[index].item())[:2]:
                used[expert] += 1
        terms.append(4 * sum(n / len(tokens) * p / len(tokens) for n, p in zip(used, total, strict=True)))
    expected = 0.3 * sum(terms) / len(terms)
    assert abs(found.item() - expected.item()) < 1e-12
    # earlier routers also change what later ones read, which was taken as it was here
    ours, theirs = (torch.autograd.grad(loss, routers[-1])[0] for loss in (found, expected))
    assert distance(ours, theirs) < 1e-10
    with pytest.raises(ConfigurationError, match="pass in training mode"):  # that pass was judged already
        vp.penalty(model)
    assert vp.penalty(vp.attach(HOST.build(), vp.MixLoRA(balance=0))) == 0


def test_a_model_is_copied_between_a_pass_and_its_penalty():
    """What is kept of a pass is part of its graph, which cannot be copied, and does not belong to the copy."""
    model = moved(vp.MixLoRA(rank=1)).train()
    HOST.run(model, HOST.inputs(dtype=torch.float64))
    twin = copy.deepcopy(model)
    with pytest.raises(ConfigurationError, match="pass in training mode"):
        vp.penalty(twin)
    assert vp.penalty(model) > 0


def test_passes_of_two_threads_are_apart():
    """Each has chosen experts for its own tokens; here both have passed the router before one enters the MLP."""
    model, together = moved(vp.MixLoRA(experts=4, rank=2)), threading.Barrier(2)
    inputs = [HOST.inputs(3, torch.float64, seed=seed) for seed in range(2)]

    def meet(*_):
        together.wait(timeout=60)

    with torch.no_grad():
        expected = [model(each) for each in inputs]
        model.blocks[0].mlp.fc1.register_forward_pre_hook(meet)
        with ThreadPoolExecutor(2) as pool:
            found = [*pool.map(lambda each: torch.no_grad()(model)(each), inputs)]
    for ours, theirs in zip(found, expected, strict=True):
        assert distance(ours, theirs) < 1e-13
    assert distance(*found) > 0.1


@pytest.mark.parametrize(("other", "said"), [(vp.Convpass(2), "no branch"), (vp.MixLoRA(rank=1), "of their own")])
def test_what_would_meet_other_tokens_is_refused(other, said):
    """In the same blocks, and nothing is changed; apart they act together."""
    model = moved(vp.MixLoRA(rank=1, blocks="first:1"))
    before = output_of(HOST, model, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=said):
        vp.attach(model, other, "other")
    assert torch.equal(output_of(HOST, model, dtype=torch.float64), before)
    vp.attach(
        model, vp.MixLoRA(rank=1, blocks="last:1") if isinstance(other, vp.MixLoRA) else vp.AdaptFormer(2), "other"
    )
    randomise(model.peft["other"])
    assert distance(output_of(HOST, model, dtype=torch.float64), before) > 1e-3


def test_what_acts_around_the_experts_meets_the_tokens_of_the_block():
    """Stacked with what acts before, in and after the MLP, it is what the transcriptions make together."""
    methods = [vp.MixLoRA(experts=3, rank=2, alpha=6), vp.Adapter(bottleneck=3), vp.RepAdapter(2), vp.IA3()]
    torch.manual_seed(0)
    model = vp.attach(HOST.build(torch.float64), methods, head=False).eval()
    randomise(model.peft["default"])
    plain = HOST.build(torch.float64)
    tensors = {name: tensor.detach() for name, tensor in model.peft["default"].state_dict().items()}
    # In the law of order what acts on the MLP's input comes before the experts.
    order = {
        method.name: dataclasses.asdict(method) for method in sorted(methods, key=lambda m: m.name != "rep_adapter")
    }
    edits = edits_of(tensors, order, shapes_of(plain))
    with torch.no_grad():
        expected = forward(plain, HOST.inputs(dtype=torch.float64), edits)
    assert distance(output_of(HOST, model, dtype=torch.float64), expected) < 1e-12
