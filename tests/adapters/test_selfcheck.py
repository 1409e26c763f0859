"""Negative controls of the check at attach: a drifted block and a dead site are refused before anything is touched."""

import pytest
import timm
import torch
from timm.models.vision_transformer import Block

import visionpeft as vp
from visionpeft.backbones.timm_layers import SitedAttention
from visionpeft.backbones.timm_vit import SitedBlock


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


def test_users_subclass_of_a_block(model):
    class MyBlock(Block):
        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(x) * 2

    model.blocks[1].__class__ = MyBlock
    refuse(model, vp.LoRA(), "MyBlock is a subclass")


def test_users_family_can_be_registered(model):
    from visionpeft.backbones.dispatch import describe_block, pre_norm_block

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
