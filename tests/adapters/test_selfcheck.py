"""Negative controls of the check at attach: a drifted block and a dead site are refused before anything is touched."""

import functools

import block_checks
import pytest
import timm
import torch
from timm.models.vision_transformer import Block

import visionpeft as vp
from visionpeft.adapters import selfcheck
from visionpeft.backbones import timm_layers
from visionpeft.backbones.dispatch import describe_block, pre_norm_block
from visionpeft.backbones.timm_layers import SitedAttention
from visionpeft.backbones.timm_vit import SitedBlock
from visionpeft.sites import Sites


@pytest.fixture(autouse=True)
def every_block_is_checked(monkeypatch):
    monkeypatch.setattr(selfcheck, "_check_block", block_checks.every_time)


@pytest.fixture
def model():
    return timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, num_classes=3).eval()


def refuse(model, method, sentence):
    classes = [type(module) for module in model.modules()]
    with pytest.raises(vp.UnsupportedError, match=sentence):
        vp.attach(model, method)
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "peft")


def test_library_that_computes_something_else(model, monkeypatch):
    def newer(self, x, attn_mask=None, is_causal=False):
        x = x + self.attn(self.norm1(x))
        return x + 1.001 * self.mlp(self.norm2(x))

    monkeypatch.setattr(Block, "forward", newer)
    refuse(model, vp.LoRA(), "does not compute what its sited form computes")


def test_site_that_reaches_nothing(model, monkeypatch):
    def forgetful(self, x, attn_mask=None, is_causal=False):
        return super(SitedAttention, self).forward(x, attn_mask, is_causal)

    monkeypatch.setattr(SitedAttention, "forward", forgetful)
    refuse(model, vp.LoRA(targets=("q",)), "nothing done at site 'q'")


def test_blocks_in_which_nothing_acts_are_the_users(model):
    """A forward that was put on a block itself hides sites, but in another block nobody needs them."""
    model.blocks[0].forward = functools.partial(Block.forward, model.blocks[0])
    refuse(model, vp.LoRA(blocks=[0]), "was replaced on the object itself")
    for method in (vp.LoRA(blocks=[1]), vp.VPT(num_tokens=2, blocks=[1])):
        vp.detach(vp.attach(model, method))


def sited_forward(body):
    """A forward of a sited timm block, as the library's but for where `body` puts the sites."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return body(self, x, self.sites.enter())

    return forward


def no_mlp_in(block, x, at):
    x = at("stream_in", x)
    x = at("stream_mid", x + at("attn_out", block.attn(at("attn_in", block.norm1(x)))))
    return at("stream_out", x + at("mlp_out", block.mlp(block.norm2(x))))


def branches_exchanged(block, x, at):
    x = at("stream_in", x)
    x = at("stream_mid", x + at("mlp_out", block.attn(at("mlp_in", block.norm1(x)))))
    return at("stream_out", x + at("attn_out", block.mlp(at("attn_in", block.norm2(x)))))


def middle_before_the_branch(block, x, at):
    x = at("stream_mid", at("stream_in", x))
    x = x + at("attn_out", block.attn(at("attn_in", block.norm1(x))))
    return at("stream_out", x + at("mlp_out", block.mlp(at("mlp_in", block.norm2(x)))))


def entered_twice(block, x, at):
    x = at("stream_in", at("stream_in", x))
    x = at("stream_mid", x + at("attn_out", block.attn(at("attn_in", block.norm1(x)))))
    return at("stream_out", x + at("mlp_out", block.mlp(at("mlp_in", block.norm2(x)))))


def entered_behind_the_norm(block, x, at):
    h = block.attn(at("attn_in", at("stream_in", block.norm1(x))))
    x = at("stream_mid", x + at("attn_out", h))
    return at("stream_out", x + at("mlp_out", block.mlp(at("mlp_in", block.norm2(x)))))


def left_before_the_sum(block, x, at):
    x = at("stream_in", x)
    x = at("stream_mid", x + at("attn_out", block.attn(at("attn_in", block.norm1(x)))))
    return x + at("stream_out", at("mlp_out", block.mlp(at("mlp_in", block.norm2(x)))))


def reached_by_a_copy(block, x, at):
    x = at("stream_in", x)
    h = block.norm1(x)
    at("attn_in", h)
    x = at("stream_mid", x + at("attn_out", block.attn(h)))
    return at("stream_out", x + at("mlp_out", block.mlp(at("mlp_in", block.norm2(x)))))


WRONG_BLOCKS = {
    no_mlp_in: "nothing done at site 'mlp_in'",
    reached_by_a_copy: "nothing done at site 'attn_in'",
    branches_exchanged: "in the order",
    middle_before_the_branch: "in the order",
    entered_twice: "'stream_in' of .* more than once",
    entered_behind_the_norm: "'stream_in' of .* at another tensor",
    left_before_the_sum: "'stream_out' of .* at another tensor",
}


@pytest.mark.parametrize("body", WRONG_BLOCKS, ids=lambda body: body.__name__)
def test_sites_that_are_not_where_they_belong(model, monkeypatch, body):
    """Each of these blocks computes what the library's block computes, and has one site missing or at a wrong place."""
    monkeypatch.setattr(SitedBlock, "forward", sited_forward(body))
    methods = {"'attn_in'": vp.RepAdapter(4, positions=("attention",)), "'mlp_in'": vp.RepAdapter(4)}
    method = next((m for site, m in methods.items() if site in WRONG_BLOCKS[body]), vp.LoRA())
    refuse(model, method, WRONG_BLOCKS[body])


def test_unused_sites_may_be_missing(model, monkeypatch):
    """The control of the test above: a block without a site serves the methods that do not use it."""
    monkeypatch.setattr(SitedBlock, "forward", sited_forward(no_mlp_in))
    vp.attach(model, vp.LoRA())


@pytest.mark.parametrize("site", ["q", "k", "v"])
@pytest.mark.parametrize("wrong", ["rows", "input", "output"])
def test_linear_sites_at_other_tensors(model, monkeypatch, site, wrong):
    """What acts at q must be given the rows, the input and the output of the queries; likewise for keys and values."""
    original = timm_layers.fused_qkv

    def moved(sites, x, layer, weight, bias):
        probe = sites.acting.get(site, ())
        sites.acting[site] = tuple(functools.partial(exchanged, module) for module in probe)
        outputs = original(sites, x, layer, weight, bias)
        sites.acting[site] = probe
        return outputs

    def exchanged(module, x, y, weight, bias):
        if wrong == "rows":
            weight = weight.flip(0)
        elif wrong == "input":
            x = 2 * x
        else:
            return y + (module(x, 2 * y, weight, bias) - 2 * y)
        return module(x, y, weight, bias)

    monkeypatch.setattr(timm_layers, "fused_qkv", moved)
    refuse(model, vp.LoRA(), f"site '{site}' of .* at another tensor")


def test_keys_that_reach_nothing(model, monkeypatch):
    """Prompts among keys and values need both; an attention that uses the values alone is refused."""
    kv = Sites.kv
    monkeypatch.setattr(Sites, "kv", lambda sites, k, v, *more: (k, kv(sites, k, v, *more)[1]))
    refuse(model, vp.PrefixTuning(num_tokens=2), "nothing done at site 'kv'")


def test_users_subclass_of_a_block(model):
    class MyBlock(Block):
        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(x) * 2

    model.blocks[1].__class__ = MyBlock
    refuse(model, vp.VPT(), "needs sited blocks; .*MyBlock is a subclass of Block with its own code; register")


def test_users_family_can_be_registered(model):
    class MyBlock(Block):
        """A block that doubles its MLP."""

        def forward(self, x, attn_mask=None, is_causal=False):
            x = x + self.attn(self.norm1(x))
            return x + 2 * self.mlp(self.norm2(x))

    class SitedMyBlock(MyBlock):
        def forward(self, x, attn_mask=None, is_causal=False):
            at = self.sites.enter()
            x = at("stream_in", x)
            x = at("stream_mid", x + at("attn_out", self.attn(at("attn_in", self.norm1(x)))))
            return at("stream_out", x + 2 * at("mlp_out", self.mlp(at("mlp_in", self.norm2(x)))))

    describe_block.register(MyBlock, lambda block: pre_norm_block(block, SitedMyBlock))
    for block in model.blocks:
        block.__class__ = MyBlock
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        base = model(images)
        vp.attach(model, [vp.LoRA(), vp.AdaptFormer(bottleneck=4)])
        assert torch.allclose(model(images), base, atol=1e-6)
        vp.detach(model)
        assert torch.equal(model(images), base)


def test_sited_block_is_a_block(model):
    vp.attach(model, vp.LoRA())
    assert all(isinstance(block, Block) and type(block) is SitedBlock for block in model.blocks)


def test_the_check_draws_no_random_numbers(model):
    torch.manual_seed(3)
    vp.attach(model, vp.LinearProbe())
    expected = torch.rand(1)
    vp.detach(model)
    torch.manual_seed(3)
    vp.attach(model, vp.SSF(std=0.0), name="b", head=False)
    vp.detach(model)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), expected)


def collected(model, register):
    """Hooks of every kind on every module of the blocks; what they have seen."""
    seen = []
    for module in model.blocks.modules():
        register(module, seen)
    return seen


WATCHERS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, i, o: seen.append(m)),
    "with keywords": lambda m, seen: m.register_forward_hook(lambda m, i, k, o: seen.append(m), with_kwargs=True),
    "before": lambda m, seen: m.register_forward_pre_hook(lambda m, i: seen.append(m)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda m, i, o: seen.append(m)),
}  # fmt: skip


class Recorder:
    """A hook that has collected what cannot be copied."""

    def __init__(self):
        self.seen = []

    def __deepcopy__(self, memo):
        raise AssertionError("a hook was copied")

    def watch(self, module, inputs, output):
        self.seen.append(module)


@pytest.mark.parametrize("method", [vp.LoRA(), vp.VPT(num_tokens=2)], ids=["lora", "vpt"])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_users_hooks_do_not_run(model, method, watcher):
    seen = collected(model, WATCHERS[watcher])
    vp.attach(model, method)
    assert seen == []
    model(torch.randn(1, 3, 224, 224)).sum().backward()
    assert any(each is model.blocks[0].mlp for each in seen)  # and the user's model still has them


def test_users_hooks_are_not_copied(model):
    recorder = Recorder()
    collected(model, lambda module, _: module.register_forward_hook(recorder.watch))
    vp.attach(model, vp.LoRA())
    assert recorder.seen == []


def test_hooks_on_every_module_of_the_program_do_not_run(model):
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        vp.attach(model, vp.LoRA())
        assert seen == []
        model(torch.randn(1, 3, 224, 224))
        assert len(seen) > 0
    finally:
        handle.remove()


def test_asking_what_peft_could_wrap_runs_no_hooks(model):
    from visionpeft.sharing.peft_modules import peft_modules

    seen = collected(model, WATCHERS["forward"])
    _, found = peft_modules(model)
    assert found["blocks.0.attn.qkv"].refused is None
    assert seen == []


class DoublingBlock(Block):
    """A block whose sited form, below, has drifted from it."""

    def forward(self, x, attn_mask=None, is_causal=False):
        """Twice the MLP."""
        x = x + self.attn(self.norm1(x))
        return x + 2 * self.mlp(self.norm2(x))


class SitedDoublingBlock(DoublingBlock):
    """The MLP but once."""

    forward = SitedBlock.forward


describe_block.register(DoublingBlock, lambda block: pre_norm_block(block, SitedDoublingBlock))


def with_odd_block(index):
    model = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=32, num_heads=2, num_classes=3).eval()
    model.blocks[index].__class__ = DoublingBlock
    return model


@pytest.mark.parametrize("odd", [0, 1, 2, 3])
def test_a_block_through_which_prompts_travel_is_checked(odd):
    """With shallow prompts nothing acts in the blocks in between, but they are swapped, too."""
    refuse(with_odd_block(odd), vp.VPT(num_tokens=2, deep=False), "does not compute what its sited form computes")


def test_the_odd_block_is_left_alone_where_no_prompt_travels():
    model = with_odd_block(3)
    vp.attach(model, vp.VPT(num_tokens=2, deep=False, blocks="0:3"))
    assert type(model.blocks[3]) is DoublingBlock


def test_what_was_set_by_hand_makes_a_kind_of_its_own(model, monkeypatch):
    """Two blocks with one description: the one whose attention drifts is found although another stands for its kind."""
    model.blocks[1].attn.scale = 1.0
    model.blocks[1].attn.fused_attn = False
    monkeypatch.setattr(SitedAttention, "forward", drifting(SitedAttention.forward))
    refuse(model, vp.LoRA(), "does not compute what its sited form computes")


def drifting(forward):
    def drifted(self, *args, **kwargs):
        return forward(self, *args, **kwargs) * (1.0 if self.fused_attn else 1.01)

    return drifted


@pytest.mark.parametrize("part", ["block", "attention"])
def test_a_forward_on_the_object_is_refused(model, part):
    module = model.blocks[1] if part == "block" else model.blocks[1].attn
    module.forward = module.forward
    refuse(model, vp.LoRA(), "replaced on the object itself")


def test_no_site_of_a_block_that_stays_as_it_is_is_checked_twice(model, monkeypatch):
    """Nor what another method, attached meanwhile, had checked besides; a weight written to makes it another block."""
    checked = []
    check = selfcheck._check_block

    def spy(block, tower, used):
        checked.append(set(used))
        return check(block, tower, used)

    monkeypatch.setattr(selfcheck, "_check_block", spy)
    for method in (vp.LoRA(targets=("q",)), vp.LoRA(targets=("fc1",)), vp.LoRA(targets=("fc1", "q"))):
        vp.detach(vp.attach(model, method))
    assert checked == [{"q"}, {"fc1"}]
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.weight.mul_(2)
    vp.attach(model, vp.LoRA(targets=("q",)))
    assert checked == [{"q"}, {"fc1"}, {"q"}]


@pytest.mark.parametrize(("changed", "checks"), [("rates", 2), ("a norm's epsilon", 3)])
def test_blocks_that_drop_paths_at_other_rates_are_of_one_kind(monkeypatch, changed, checks):
    """The first block drops none and has other parts; what is set in another block beside makes a third kind."""
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=4, embed_dim=32, num_heads=2, drop_path_rate=0.3, proj_drop_rate=0.1
    )
    model.blocks[3].mlp.drop1.p = 0.5
    if changed != "rates":
        model.blocks[2].norm1.eps = 1e-3
    checked = []
    monkeypatch.setattr(
        selfcheck, "_check_block", lambda *arguments: checked.append(block_checks.every_time(*arguments))
    )
    vp.attach(model, vp.LoRA())
    assert len(checked) == checks
