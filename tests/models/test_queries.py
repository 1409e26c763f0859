"""Queries through the blocks of a backbone: Hugging Face transformers' EoMT, adapters, positions, what cannot be."""

import copy

import pytest
import timm
import torch
from clip_reference import clip_model
from test_dense_predictor import backbone, images

import visionpeft as vp
from visionpeft.heads.mask_classification import MaskPredictions

WIDTH, DEPTH, QUERIES = 48, 3, 5
HEAD = vp.EoMT(queries=QUERIES, depth=2, upscale=1)


def predictor(inside=None, method=None, head=HEAD, dtype=torch.float32):
    torch.manual_seed(0)
    return vp.DensePredictor(backbone(dtype) if inside is None else inside, head, 3, method)


def transformers_model():
    from transformers import EomtConfig, EomtForUniversalSegmentation

    config = EomtConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=3, image_size=32, patch_size=8, num_labels=3,
        num_blocks=2, num_queries=QUERIES, num_register_tokens=2, num_upscale_blocks=1, layerscale_value=1.0,
        hidden_dropout_prob=0.0, attention_dropout=0.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = EomtForUniversalSegmentation(config).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return theirs


def renamed(state):
    """Their weights under our names."""
    sides = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    inside = {
        "cls_token": state["embeddings.cls_token"],
        "reg_token": state["embeddings.register_tokens"],
        "pos_embed": state["embeddings.position_embeddings.weight"][None],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
    }
    head = {"queries": state["query.weight"]}
    for kind in ("weight", "bias"):
        inside[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        head[f"classify.{kind}"] = state[f"class_predictor.{kind}"]
        head |= {f"mask.{2 * i}.{kind}": state[f"mask_head.fc{i + 1}.{kind}"] for i in range(3)}
        head[f"upscale.0.0.{kind}"] = state[f"upscale_block.block.0.conv1.{kind}"]
        head[f"upscale.0.3.{kind}"] = state[f"upscale_block.block.0.layernorm2d.{kind}"]
        for i in range(DEPTH):
            ours, old = f"blocks.{i}", f"layers.{i}"
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                inside[f"{ours}.{name}.{kind}"] = state[f"{old}.{name}.{kind}"]
            parts = [state[f"{old}.attention.{sides[site]}.{kind}"] for site in "qkv"]
            inside[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
            inside[f"{ours}.attn.proj.{kind}"] = state[f"{old}.attention.out_proj.{kind}"]
            inside |= {f"{ours}.ls{n}.gamma": state[f"{old}.layer_scale{n}.lambda1"] for n in (1, 2)}
    head["upscale.0.2.weight"] = state["upscale_block.block.0.conv2.weight"]
    return inside, head


@pytest.mark.parametrize("adapted", [False, True], ids=["library's blocks", "sited blocks"])
def test_it_is_that_of_transformers(adapted):
    """All predictions, with attention masked as in training, and the last one without."""
    theirs = transformers_model()
    inside = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, embed_dim=WIDTH, num_heads=3, depth=DEPTH, img_size=32, patch_size=8,
        reg_tokens=2, no_embed_class=True, init_values=1.0,
    ).double()  # fmt: skip
    of_backbone, of_head = renamed(theirs.state_dict())
    inside.load_state_dict(of_backbone)
    model = predictor(inside).train()
    model.head.load_state_dict(of_head)
    if adapted:
        vp.attach(model, vp.LoRA(rank=2))  # which changes nothing yet
        model.train()
    pixels = images(32, 32, dtype=torch.float64)
    seen = []
    predict = theirs.predict
    theirs.predict = lambda tokens: seen.append(predict(tokens)) or seen[-1]
    theirs.train()(pixels)
    found = model.head_output(pixels)
    assert len(found.masks) == len(seen) == 3
    for ours, other in zip(zip(found.masks, found.classes, strict=True), seen, strict=True):
        assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(ours, other, strict=True))
    theirs.eval().attn_mask_probs.zero_()
    theirs(pixels)
    with torch.no_grad():
        scores = model.eval().head_output(pixels)
        expected = MaskPredictions([seen[-1][0]], [seen[-1][1]]).scores
    assert torch.allclose(scores, expected, atol=1e-8)
    assert not torch.allclose(seen[-1][0], seen[-2][0], atol=1e-3)  # masks would show


def test_adapters_act_on_queries_and_they_learn():
    for method in (
        vp.LoRA(rank=2),
        vp.AdaptFormer(bottleneck=4),
        vp.VPT(num_tokens=2),
        vp.VPT(2, deep=False),
        vp.Mona(8, grid=(6, 8)),
        vp.CoDA(bottleneck=4, blocks="first:1"),
    ):
        model = predictor(method=method)
        model.train()
        before = model.head_output(images()).classes[-1]
        with torch.no_grad():
            for name, parameter in model.peft.default.named_parameters():
                if not name.startswith("head"):
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        found = model.head_output(images())
        assert not torch.allclose(found.classes[-1], before, atol=1e-4)
        vp.mask_classification_loss(found, torch.randint(3, (2, 48, 64)), weights=vp.MaskLoss(points=50)).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vp.trainable_parameters(model)), method


def test_prompts_that_travel_stay_beside_queries():
    """What queries find does not depend on whether prompts are tokens or keys: their places are told apart."""
    torch.manual_seed(3)
    model = predictor(method=vp.VPT(num_tokens=2, blocks="last:2"), dtype=torch.float64).eval()
    pixels = images(dtype=torch.float64)
    with torch.no_grad():
        as_keys, masked = model(pixels), model.train().head_output(pixels)
        # whose convolutions mix tokens, so that prompts have to be some
        vp.attach(model, vp.Convpass(bottleneck=4, grid=(6, 8)), name="patches")
        for name, parameter in model.peft.patches.named_parameters():
            if name.startswith("convpass"):
                torch.nn.init.zeros_(parameter)
        model.peft.patches.head.load_state_dict(model.peft.default.head.state_dict())
        for ours, theirs in zip(model.train().head_output(pixels).masks, masked.masks, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-9)
        assert torch.allclose(model.eval()(pixels), as_keys, atol=1e-9)
        assert not torch.allclose(masked.scores, model.coarse_logits(pixels), atol=1e-3)


def test_rotary_positions_are_those_of_patches():
    """As timm's own blocks compute when told that queries are tokens before the patches."""
    torch.manual_seed(2)
    inside = timm.create_model(
        "vit_small_patch16_dinov3", depth=2, embed_dim=48, num_heads=3, num_classes=0, init_values=1.0, img_size=32,
        dynamic_img_size=True,
    ).double()  # fmt: skip
    original = copy.deepcopy(inside)
    model = predictor(inside).eval()
    pixels = images(32, 48, dtype=torch.float64)
    with pytest.raises(vp.UnsupportedError, match="unless an adapter acts in it; attach a method, such as LinearProbe"):
        model(pixels)
    vp.attach(model, vp.LinearProbe())
    head = model.peft.default.head.eval()
    with torch.no_grad():
        x, rope = original._pos_embed(original.patch_embed(pixels))
        x = torch.cat([x[:, :5], head.queries.expand(2, -1, -1), x[:, 5:]], dim=1)
        for block in original.blocks:
            block.attn.num_prefix_tokens += QUERIES
            x = block(x, rope=rope)
        x = original.norm(x)
        patches = x[:, 5 + QUERIES :].transpose(1, 2).unflatten(2, (2, 3))
        expected = MaskPredictions(*([each] for each in head.predict(x[:, 5 : 5 + QUERIES], patches))).scores
        assert torch.allclose(model.coarse_logits(pixels), expected, atol=1e-9)
        # used without the head, the backbone has no queries, and its maps are the library's
        assert torch.allclose(vp.feature_maps(inside, pixels, (1,)), vp.feature_maps(untold(original), pixels, (1,)))


def untold(original):
    for block in original.blocks:
        block.attn.num_prefix_tokens -= QUERIES
    return original


def test_openclip():
    visual = clip_model().visual
    model = predictor(visual, vp.LoRA(rank=2), dtype=torch.float64).train()
    pixels = images(32, 32, dtype=torch.float64)
    found = model.head_output(pixels)
    assert [each.shape for each in found.masks] == [(2, QUERIES, 4, 4)] * 3
    plain = vp.DensePredictor(visual_copy := clip_model().visual, HEAD, 3).train()
    plain.head.load_state_dict(model.peft.default.head.state_dict())
    again = plain.head_output(pixels)  # by OpenCLIP's own attention
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(found.masks, again.masks, strict=True))
    assert not list(visual_copy.transformer.resblocks[-1]._forward_pre_hooks)


def test_saved_with_the_adapter_and_masks_are_lost(tmp_path):
    made = [predictor(method=vp.LoRA(rank=2)), predictor()]
    vp.save(made[0], tmp_path / "adapter", class_names=["a", "b", "c"])
    vp.load(made[1], tmp_path / "adapter")
    with torch.no_grad():
        expected, found = (model.eval()(images()) for model in made)
        assert torch.equal(expected, found)
        masked = made[0].train().head_output(images()).scores
        made[0].set_progress(1.0)
        free = made[0].head_output(images()).scores
        assert torch.allclose(free, made[0].eval().head_output(images()), atol=1e-6)
        assert not torch.allclose(free, masked, atol=1e-4)


def refused(message, compute):
    with pytest.raises(vp.UserError, match=message):
        compute()


def test_what_cannot_be_is_refused():
    refused("depth must be at least 1", lambda: vp.EoMT(depth=0))
    refused("queries must be at least 1", lambda: vp.EoMT(queries=0))
    refused("through 4 blocks of a backbone that has 3", lambda: predictor(head=vp.EoMT()))
    beit = timm.create_model("beit_base_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=32, num_classes=0)
    refused("take no attention mask", lambda: predictor(beit))
    refused("through blocks of a backbone", lambda: HEAD.make(8, 1, 3)(torch.zeros(1, 1, 8, 2, 2)))
    model = predictor(method=vp.LoRA(rank=2))
    vp.attach(model, vp.LoRA(rank=2), name="other")
    with vp.route(model, ["default", "other"]):
        refused("leave the route", lambda: model(images()))
    vp.economise(model, recompute="block")
    refused("use recompute 'mlp'", lambda: model(images()))
    vp.economise(model, recompute="mlp")
    assert model(images()).shape == (2, 3, 48, 64)
    refused("none of the last 2 blocks .*first:1", lambda: predictor(method=vp.CoDA()))
    refused("beside the tokens, as by LST; choose another method", lambda: predictor(method=vp.LST())(images()))
