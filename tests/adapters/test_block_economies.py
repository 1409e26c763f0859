"""Economies of blocks: outputs and gradients of the straightforward computation, in float64, for less."""

import copy
import dataclasses

import pytest
import torch
from conftest import CASES, FEW_CASES, adapted, adapter_tensors, distance, randomise
from reference import edits_of, forward, shapes_of, trained_weights
from reference.hosts import HOSTS, Host, clip, vit
from timm.models.vision_transformer import VisionTransformer

import visionpeft as vp
from visionpeft.adapters import economies as block_economies
from visionpeft.backbones.whole_model import describe
from visionpeft.costs.saved_bytes import saved_bytes, storages
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.methods.parts.base import Method
from visionpeft.sites import Placement

BY_NAME = {host.name: host for host in HOSTS}
SOME = [
    BY_NAME[name] for name in ("vit_cls", "vit_qk_norm", "beit", "eva_split", "eva_grouped", "dinov3", "clip_custom")
]
SOME += [BY_NAME["vit_res_post"], Host("clip_tower", lambda: clip().visual)]
POOLING_CLASS_TOKEN = {
    *("vit_cls", "vit_registers", "vit_pre_norm", "vit_qk_norm", "vit_swiglu", "vit_res_post", "vit_dynamic"),
    *("eva_split", "clip_whole", "clip_custom", "clip_tower", "eva_token"),
}


class Mean(torch.nn.Module):
    """Adds a share of the mean over all tokens; a share of 0 changes nothing, but may not be left out."""

    def __init__(self, share):
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(float(share)))

    def forward(self, x):
        return x + self.share * x.mean(1, keepdim=True)


@dataclasses.dataclass(frozen=True)
class Mixing(Method):
    """Mixes the tokens at a site, so that blocks have to run all of them."""

    share: float = 0.0
    site: str = "mlp_in"
    add: str | None = None
    towers: str | None = None

    def place(self, tower):
        return [Placement(tower.name, index, self.site, Mean(self.share), add=self.add) for index in range(tower.depth)]


class Scaling(torch.nn.Module):
    """Scales every token by itself, prompts as well."""

    tokenwise = True

    def __init__(self, width):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale


@dataclasses.dataclass(frozen=True)
class ScaledStream(Method):
    """Scales what enters each block, behind the prompts' entrance."""

    towers: str | list[str] | None = None

    def place(self, tower):
        return [Placement(tower.name, index, "stream_in", Scaling(tower.width)) for index in range(tower.depth)]


def all_sites(model):
    """The sites of every block of the image tower."""
    found = [getattr(block.module, "sites", None) for block in describe(model).towers["visual"].blocks]
    return [sites for sites in found if sites is not None]


def prompts_are_keys(model):
    """In how many blocks prompts are keys and values alone."""
    return sum(sites.key_prompts is not None for sites in all_sites(model))


def run(host, model, inputs):
    """Output, and gradient of every adapter tensor, of a loss that sees all of the output."""
    model.zero_grad()
    output = host.run(model, inputs)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (output * direction.to(output)).sum().backward()
    own = {f"{name}.{key}": p for name in model.peft for key, p in model.peft[name].named_parameters()}
    return output.detach(), {key: p.grad.clone() for key, p in own.items() if p.grad is not None}


def difference(one, other):
    """Largest relative difference of outputs, and of gradients against the largest one."""
    (left, found), (right, wanted) = one, other
    largest = max(gradient.norm() for gradient in wanted.values())
    assert found.keys() == wanted.keys()
    return max(distance(left, right), *((found[k] - wanted[k]).norm() / largest for k in wanted))


def stacked(host, *methods, mixing=None):
    """A host with methods as one adapter, moved off their start; `mixing` forces prompts to be tokens."""
    torch.manual_seed(0)
    model = host.build(torch.float64)
    images = ["visual"] if host.takes == "both" else None
    methods = [dataclasses.replace(method, towers=images) for method in methods]
    vp.attach(model, methods, "own")
    randomise(model.peft["own"])
    if mixing is not None:
        vp.attach(model, mixing, "mixing", head=False)
    return model.eval()


# deep prompts as keys and values


STACKS = {
    "alone": (vp.VPT(3),),
    "two": (vp.VPT(3), vp.VPT(2, projection=5)),
    "with shallow": (vp.VPT(3), vp.VPT(2, deep=False)),
    "lora": (vp.VPT(3), vp.LoRA(2, targets=("q", "k", "v", "proj", "fc1", "fc2"))),
    "ssf": (vp.VPT(3), vp.SSF()),
    "prefix": (vp.VPT(3), vp.PrefixTuning(2)),
    "ia3": (vp.VPT(3), vp.IA3()),
    "norms": (vp.VPT(3), vp.LayerNormTuning()),
    "stream": (vp.VPT(3), ScaledStream()),
    "adapters": (vp.VPT(3), vp.Adapter(4, placement="houlsby"), vp.AdaptFormer(4, dropout=0.0)),
    "some blocks": (vp.VPT(3, blocks="last:2", overrides={"last:1": 5}),),
}


@pytest.mark.parametrize("host", SOME, ids=repr)
@pytest.mark.parametrize("stack", STACKS)
def test_prompts_as_keys_are_prompts_in_the_stream(host, stack):
    """The same output and gradients as with prompts among the tokens, which a method that mixes tokens enforces."""
    inputs = host.inputs(dtype=torch.float64)
    cheap, plain = stacked(host, *STACKS[stack]), stacked(host, *STACKS[stack], mixing=Mixing())
    assert prompts_are_keys(cheap) == (2 if stack == "some blocks" else 3)
    assert prompts_are_keys(plain) == 0
    found, wanted = run(host, cheap, inputs), run(host, plain, inputs)
    wanted = wanted[0], {key: gradient for key, gradient in wanted[1].items() if key.startswith("own.")}
    assert difference(found, wanted) < 1e-12
    with torch.no_grad():
        next(p for n, p in cheap.peft["own"].named_parameters() if n.endswith("prompts"))[0] *= 1.001
    assert difference(run(host, cheap, inputs), wanted) > 1e-7  # the comparison can fail


@pytest.mark.parametrize("stack", ["lora", "ssf", "prefix"])
def test_prompts_as_keys_beside_other_methods_are_the_papers(stack):
    """Against the formulas of the papers, which share no code with the package."""
    host = BY_NAME["dinov3"]
    model, inputs = stacked(host, *STACKS[stack]), host.inputs(dtype=torch.float64)
    tensors, fields = adapter_tensors(model, "own"), {m.name: dataclasses.asdict(m) for m in STACKS[stack]}
    plain = host.build(torch.float64)
    with torch.no_grad():
        edits = edits_of(tensors, fields, shapes_of(plain))
        wanted = forward(plain, inputs, edits, trained_weights(plain.state_dict(), tensors))
        assert prompts_are_keys(model) == 3
        assert distance(model(inputs), wanted) < 1e-12


def test_prompts_stay_tokens_where_that_matters():
    """In causal towers, with modules that mix tokens, and in a batch some rows of which go through such modules."""
    text = BY_NAME["clip_text"]
    model = adapted(text, next(c for c in CASES if c.name == "vpt_deep"))
    assert all(block.__dict__["sites"].key_prompts is None for block in model.transformer.resblocks)
    host = BY_NAME["vit_cls"]
    model = stacked(host, vp.VPT(3))
    vp.attach(model, vp.VPT(3), "other")
    with vp.route(model, ["own", "other"]):
        assert prompts_are_keys(model) == 3
    assert prompts_are_keys(model) == 3  # both act
    vp.attach(model, [vp.VPT(3), vp.Convpass(2)], "mixing")
    with vp.route(model, ["own", "mixing"]):
        assert prompts_are_keys(model) == 0
    vp.activate(model, "own")
    assert [sites.key_prompts(torch.zeros(2, 17, 32).double()).shape[1] for sites in all_sites(model)] == [3] * 3
    for method in (vp.VPT(3, deep=False), vp.GatedVPT(3)):
        assert prompts_are_keys(stacked(host, method)) == 0
    for method in (vp.Convpass(2), vp.UniPELT(2, num_tokens=2, bottleneck=2), Mixing(site="stream_in", add="attn_out")):
        assert prompts_are_keys(stacked(host, vp.VPT(3), method)) == 0


@pytest.mark.parametrize("where", ["attn_in", "mlp_out"])
def test_tokens_that_read_prompts_still_do(where):
    """A method that mixes tokens sees the prompts among them."""
    host, inputs = BY_NAME["vit_cls"], BY_NAME["vit_cls"].inputs(dtype=torch.float64)
    mixed = stacked(host, vp.VPT(3), mixing=Mixing(0.5, where))
    before = run(host, mixed, inputs)[0]
    vp.activate(mixed, "mixing")
    without = run(host, mixed, inputs)[0]
    assert distance(before, without) > 1e-3


@pytest.mark.parametrize("host", SOME, ids=repr)
def test_hooks_see_the_tokens_of_the_backbone_once(host):
    """Whichever layers they watch, and added after attaching: prompts that are no tokens are not shown to them."""
    inputs = host.inputs(dtype=torch.float64)

    def watched(model):
        seen = []
        for name, module in describe(model).towers["visual"].blocks[1].module.named_modules():
            module.register_forward_hook(lambda m, i, o, name=name: seen.append((name, getattr(o, "shape", None))))
        return host.run(model, inputs), seen

    model = stacked(host, vp.VPT(3))
    assert prompts_are_keys(model) == 3
    expected = run(host, model, inputs)[0]
    output, found = watched(model)
    assert distance(output, expected) < 1e-12
    assert len(dict(found)) == len(found)
    plain = dict(watched(host.build(torch.float64).eval())[1])
    fronts = {name: shape for name, shape in found if name.endswith(("norm1", "ln_1", "qkv", "k_proj", "v_proj"))}
    assert fronts
    assert all(shape == plain[name] for name, shape in fronts.items())


def test_dropout_of_prompts_is_drawn_for_each_sample():
    """The same numbers are drawn as for prompts in the stream."""
    host, inputs = BY_NAME["vit_cls"], BY_NAME["vit_cls"].inputs(dtype=torch.float64)
    results = []
    for mixing in (None, Mixing()):
        model = stacked(host, vp.VPT(3, dropout=0.5), mixing=mixing)
        model.peft.train()
        torch.manual_seed(5)
        results.append(run(host, model, inputs))
    wanted = results[1][0], {key: g for key, g in results[1][1].items() if key.startswith("own.")}
    assert difference(results[0], wanted) < 1e-12
    cheap = stacked(host, vp.VPT(3, dropout=0.5))
    x = torch.zeros(4, 17, 32, dtype=torch.float64)
    assert all(len(sites.prompts(x)) == 1 for sites in all_sites(cheap))
    cheap.peft.train()
    assert all(len(sites.prompts(x)) == 4 for sites in all_sites(cheap))


def test_dropout_on_the_way_to_keys_is_drawn_for_each_sample():
    """A dropout in LoRA on the keys is not the same for the whole batch; one elsewhere does not matter."""
    x = torch.zeros(4, 17, 32, dtype=torch.float64)
    for target, rows in (("k", 4), ("fc1", 1)):
        model = stacked(BY_NAME["vit_cls"], vp.VPT(3), vp.LoRA(2, targets=(target,), dropout=0.5))
        model.peft.train()
        assert all(len(sites.prompts(x)) == rows for sites in all_sites(model))


def test_prompts_as_keys_keep_little():
    """Less is kept for backward than by prompts in the stream, and never the whole fused projection."""
    host, inputs = BY_NAME["vit_cls"], BY_NAME["vit_cls"].inputs(8, torch.float64)
    sizes, fused = [], 8 * 17 * 3 * 32 * 8
    for mixing in (None, Mixing()):
        model = stacked(host, vp.VPT(16), mixing=mixing)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            model(inputs).sum()
        sizes.append(saved_bytes(lambda model=model: model(inputs), storages(model))[0])
        if mixing is None:
            assert not [t for t in kept if t.untyped_storage().nbytes() == fused]
    assert sizes[0] < 0.75 * sizes[1]


# class token only


def hosts_for_class_token():
    token = {"global_pool": "token", "use_fc_norm": False}
    eva = BY_NAME["eva_fused"].make
    more = [Host("eva_token", lambda: eva(**token)), Host("clip_tower", lambda: clip().visual)]
    return [*HOSTS, *more]


@pytest.mark.parametrize("host", hosts_for_class_token(), ids=repr)
def test_class_token_only_is_for_class_token_pooling(host):
    """It narrows the last block of towers that pool the class token, and others refuse it and stay as they were."""
    model = host.build(torch.float64)
    vp.attach(model, vp.LoRA(2))
    if host.name not in POOLING_CLASS_TOKEN:
        with pytest.raises(UnsupportedError, match="class_token_only"):
            vp.economise(model, class_token_only=True)
        assert model.peft.economies == block_economies.Economies()
        return
    vp.economise(model, class_token_only=True)
    assert [sites.kept for sites in all_sites(model)] == [None, None, slice(0, 1)]


POOLING = [host for host in hosts_for_class_token() if host.name in POOLING_CLASS_TOKEN]
METHODS = {
    **{case.name: case.method for case in FEW_CASES},
    "shallow": vp.VPT(3, deep=False),
    "adapt_former": vp.AdaptFormer(4, dropout=0.0),
    "parallel": vp.Adapter(4, placement="parallel"),
    "adapter_plus": vp.Adapter(4, placement="adapter_plus"),
    "ia3": vp.IA3(),
    "full": vp.FullFineTuning(),
    "convpass": vp.Convpass(2),
    "pooled": vp.GatedVPT(2, dropout=0.0, pooling="mean"),
}
MIXING = ("convpass", "unipelt", "pooled")  # they read other tokens behind the attention


CELLS = [(host, name) for host in POOLING for name in METHODS if (host.name, name) != ("vit_dynamic", "convpass")]


@pytest.mark.parametrize(("host", "method"), CELLS, ids=repr)
def test_class_token_only_changes_nothing(host, method):
    """Outputs and gradients are those of all tokens, with every method in force."""
    inputs, model = host.inputs(dtype=torch.float64), stacked(host, METHODS[method])
    wanted = run(host, model, inputs)
    vp.economise(model, class_token_only=True)
    assert all_sites(model)[-1].kept == (None if method in MIXING else slice(0, 1))
    found = run(host, model, inputs)
    assert difference(found, wanted) < 1e-12
    vp.economise(model)
    assert [sites.kept for sites in all_sites(model)] == [None] * len(all_sites(model))


@pytest.mark.parametrize("site", ["attn_out", "stream_mid", "mlp_in", "mlp_out", "stream_out"])
def test_class_token_only_stands_aside_where_other_tokens_are_read(site, monkeypatch):
    """A method that mixes tokens behind the attention still sees all of them."""
    host = BY_NAME["vit_cls"]
    inputs, model = host.inputs(dtype=torch.float64), stacked(host, vp.LoRA(2), Mixing(0.5, site))
    wanted = run(host, model, inputs)
    vp.economise(model, class_token_only=True)
    assert difference(run(host, model, inputs), wanted) < 1e-12
    monkeypatch.setattr(block_economies, "_treats_class_token_alone", lambda acting: True)
    vp.economise(model, class_token_only=True)
    assert difference(run(host, model, inputs), wanted) > 1e-5  # the comparison can fail


def test_class_token_only_stands_aside_for_branches_around_the_attention():
    """What they carry past it has all tokens."""
    host = BY_NAME["vit_cls"]
    inputs = host.inputs(dtype=torch.float64)
    model = stacked(host, vp.LoRA(2), Mixing(0.5, "attn_in", add="attn_out"), vp.Convpass(2))
    wanted = run(host, model, inputs)
    vp.economise(model, class_token_only=True)
    assert difference(run(host, model, inputs), wanted) < 1e-12


def test_gates_over_tokens_stay_gates_over_tokens():
    """UniPELT's gates are means over tokens, also at layers."""
    host = BY_NAME["vit_cls"]
    inputs, model = host.inputs(dtype=torch.float64), stacked(host, vp.UniPELT(2, num_tokens=2, bottleneck=2))
    wanted = run(host, model, inputs)
    vp.economise(model, class_token_only=True)
    assert difference(run(host, model, inputs), wanted) < 1e-12


def test_hooks_see_all_tokens():
    """While a hook watches the last block or what is behind it, all tokens are there."""
    host = BY_NAME["vit_cls"]
    inputs, model = host.inputs(dtype=torch.float64), stacked(host, vp.LoRA(2))
    wanted = model(inputs).detach()
    vp.economise(model, class_token_only=True)
    assert model.forward_features(inputs).shape == (2, 1, 32)
    for module in (model.blocks[-1], model.blocks[-1].mlp.fc1, model.norm, model.blocks):
        seen = []
        handle = module.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.shape[1]))
        assert distance(model(inputs), wanted) < 1e-12
        handle.remove()
        assert seen == [17]
    seen = []
    handle = model.norm.register_full_backward_hook(lambda m, i, o: seen.append(o[0].shape[1]))
    model(inputs).sum().backward()
    handle.remove()
    assert seen == [17]
    with pytest.raises(UnsupportedError, match="class_token_only"):
        model.forward_intermediates(inputs)
    with pytest.raises(UnsupportedError, match="is_causal"):
        model.forward_features(inputs, is_causal=True)
    vp.economise(model)
    assert len(model.forward_intermediates(inputs, intermediates_only=True)) == 3
    assert model.forward_features(inputs).shape == (2, 17, 32)


def test_masks_reach_the_class_token():
    """An attention mask is cut to the row of the class token."""
    host = BY_NAME["vit_cls"]
    inputs, model = host.inputs(dtype=torch.float64), stacked(host, vp.VPT(2))
    mask = torch.rand(17, 17, generator=torch.Generator().manual_seed(0)) > 0.5
    mask.fill_diagonal_(True)
    wanted = model.forward_features(inputs, attn_mask=mask)[:, 0]
    assert distance(model.forward_features(inputs)[:, 0], wanted) > 1e-3
    vp.economise(model, class_token_only=True)
    assert distance(model.forward_features(inputs, attn_mask=mask)[:, 0], wanted) < 1e-12


# recomputing


@pytest.mark.parametrize("host", [*SOME, BY_NAME["clip_whole"]], ids=repr)
@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_recomputing_changes_nothing(host, recompute):
    """Outputs and gradients are the same, also of dropout, and less is kept."""
    inputs = host.inputs(dtype=torch.float64)
    methods = (vp.VPT(2, dropout=0.5), vp.AdaptFormer(4, dropout=0.5), vp.LoRA(2, dropout=0.5, targets=("fc1", "v")))
    model = stacked(host, *methods)
    model.peft.train()
    results, sizes = [], []
    for chosen in (None, recompute, None):
        vp.economise(model, recompute=chosen)
        torch.manual_seed(7)
        results.append(run(host, model, inputs))
        sizes.append(saved_bytes(lambda: host.run(model, inputs), storages(model))[0])
    assert difference(results[1], results[0]) < 1e-12
    assert sizes[1] < (0.85 if recompute == "mlp" else 0.6) * sizes[0]
    assert sizes[2] == sizes[0]
    torch.manual_seed(8)
    assert difference(run(host, model, inputs), results[0]) > 1e-4  # the comparison can fail


def test_recomputing_reaches_blocks_without_modules():
    """BitFit and full fine-tuning put no module into a block, and keep less all the same."""
    host = BY_NAME["vit_cls"]
    inputs = host.inputs(8, torch.float64)
    for method in (vp.BitFit(), vp.FullFineTuning()):
        model = stacked(host, method)
        wanted, before = run(host, model, inputs), saved_bytes(lambda model=model: model(inputs), storages(model))[0]
        vp.economise(model, recompute="mlp")
        assert difference(run(host, model, inputs), wanted) < 1e-12
        assert saved_bytes(lambda model=model: model(inputs), storages(model))[0] < 0.8 * before


def test_all_together_under_frames():
    """Methods for clips, in which tokens of several images meet, stay what they are."""
    torch.manual_seed(0)
    model = vp.VideoClassifier(vit().double(), vp.AIM(num_frames=2, drop_path=0.0), num_frames=2, num_classes=3)
    model = model.double().eval()
    vp.attach(model, vp.VPT(2), "prompts", head=False)
    vp.activate(model, ["default", "prompts"])
    for name in model.peft:
        randomise(model.peft[name])
    clips = torch.randn(2, 3, 2, 32, 32, dtype=torch.float64)
    host = Host("clips", None)
    wanted = run(host, model, clips)
    for chosen in ({"class_token_only": True}, {"recompute": "mlp"}, {"class_token_only": True, "recompute": "block"}):
        vp.economise(model, **chosen)
        assert difference(run(host, model, clips), wanted) < 1e-12


# the option itself


def test_economies_come_and_go():
    """They hold for whichever adapters act, and detaching, disabling and merging leave the library's model."""
    model = vit().double().eval()
    before = {name: (type(m), sorted(vars(m))) for name, m in model.named_modules()}
    with pytest.raises(ConfigurationError):
        vp.economise(model, class_token_only=True)
    vp.attach(model, vp.LoRA(2), "a")
    vp.economise(model, class_token_only=True, recompute="block")
    vp.attach(model, vp.LoRA(2), "b")
    assert all_sites(model)[-1].kept == slice(0, 1)
    assert model.grad_checkpointing
    with vp.use(model, None):
        assert type(model.blocks[-1]) is before["blocks.2"][0]
        assert not model.grad_checkpointing
        assert "forward_intermediates" not in vars(model)
    assert model.grad_checkpointing
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    randomise(model.peft["a"])
    wanted = model(images).detach()
    vp.merge(model)
    assert not model.grad_checkpointing
    assert type(model) is VisionTransformer
    assert distance(model(images), wanted) < 1e-12
    vp.unmerge(model)
    assert all_sites(model)[-1].kept == slice(0, 1)
    vp.detach(model)
    assert {name: (type(m), sorted(vars(m))) for name, m in model.named_modules()} == before
    assert not model.grad_checkpointing


def test_unknown_choices_are_refused():
    model = vp.attach(vit(), vp.LoRA(2))
    with pytest.raises(ConfigurationError, match="recompute"):
        vp.economise(model, recompute="everything")
    assert model.peft.economies == block_economies.Economies()


@pytest.mark.parametrize("chosen", [{}, {"class_token_only": True}, {"recompute": "mlp"}], ids=str)
def test_compiled_models_compute_the_same(chosen):
    host = BY_NAME["vit_cls"]
    inputs, model = host.inputs(dtype=torch.float64), stacked(host, vp.VPT(2), vp.AdaptFormer(4, dropout=0.0))
    vp.economise(model, **chosen)
    wanted = run(host, model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    direction = torch.randn(2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model.zero_grad()
    output = compiled(inputs)
    (output * direction).sum().backward()
    found = {f"own.{key}": p.grad.clone() for key, p in model.peft["own"].named_parameters()}
    assert difference((output.detach(), found), wanted) < 1e-12


def test_copies_compute_the_same():
    host = BY_NAME["vit_cls"]
    inputs, model = host.inputs(dtype=torch.float64), stacked(host, vp.VPT(2))
    vp.economise(model, class_token_only=True, recompute="mlp")
    twin = copy.deepcopy(model)
    wanted = run(host, model, inputs)
    assert difference(run(host, twin, inputs), wanted) == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert difference(run(host, twin, inputs), wanted) == 0


def test_routed_batches_compute_the_same():
    """Row i is what adapter i gives, with every economy asked for."""
    host = BY_NAME["vit_cls"]
    inputs, model = host.inputs(dtype=torch.float64), stacked(host, vp.LoRA(2), vp.AdaptFormer(4, dropout=0.0))
    vp.attach(model, vp.LoRA(2), "other", head=False)
    randomise(model.peft["other"])
    with vp.route(model, ["own", "other"]):
        wanted = run(host, model, inputs)
    for chosen in ({"class_token_only": True}, {"recompute": "mlp"}, {"recompute": "block"}):
        vp.economise(model, **chosen)
        with vp.route(model, ["own", "other"]):
            assert difference(run(host, model, inputs), wanted) < 1e-12
