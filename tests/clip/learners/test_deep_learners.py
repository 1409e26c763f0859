"""MaPLe, IVLP, PromptSRC and CLIP-LoRA: counts, logits by the papers' layout, the fast text path, equivalences."""

import copy
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import base_state, distance, randomise, same_bytes
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, convert_weights_to_lp
from open_clip.transformer import LayerNormFp32
from reference import prompted_clip
from reference.hosts import CUSTOM_ATTENTION, lively, vit
from torch import nn

import visionpeft as vp
from visionpeft.clip.learners import IVLP, CLIPLoRA, CoOp, MaPLe, PromptSRC, ZeroShot
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.methods.parts.deep_prompts import DeepPrompts, ReplaceTokens

TOKENIZER = open_clip.get_tokenizer("ViT-B-16")
NAMES = ["dog", "red kite", "2012 sports car", "heron"]
LENGTH, LAYERS = 20, 4
BUILDS = {
    "MaPLe": lambda clip, **more: MaPLe(clip, TOKENIZER, NAMES, **({"depth": 3} | more)),
    "IVLP": lambda clip, **more: IVLP(clip, TOKENIZER, NAMES, **({"depth_text": 3, "depth_visual": 2} | more)),
    "PromptSRC": lambda clip, **more: PromptSRC(clip, TOKENIZER, NAMES, **more),
    "CLIPLoRA": lambda clip, **more: CLIPLoRA(clip, TOKENIZER, NAMES, **more),
}
PROMPTED = ("MaPLe", "IVLP", "PromptSRC")
every_learner = pytest.mark.parametrize("name", BUILDS)


def make_clip(kind="plain", dtype=torch.float64, layers=LAYERS, seed=3, cast_dtype=None):
    """A tiny lively CLIP: text width 24, image width 32, 16 patches."""
    torch.manual_seed(seed)
    vision = {"layers": layers, "width": 32, "head_width": 8, "mlp_ratio": 2.0, "patch_size": 8, "image_size": 32}
    text = {"context_length": LENGTH, "vocab_size": 49408, "width": 24, "heads": 3, "layers": layers, "mlp_ratio": 2.0}
    if kind == "custom_attention":
        vision, text = vision | CUSTOM_ATTENTION, text | CUSTOM_ATTENTION
    if kind == "bidirectional":
        text |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    if kind == "resnet":
        vision = {"layers": (1, 1, 1, 1), "width": 16, "image_size": 64}
    if kind == "trunk":
        vision |= {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "layers": 0}
    cls = CustomTextCLIP if kind in ("custom_text", "bidirectional", "trunk") else CLIP
    model = cls(16, CLIPVisionCfg(**vision), CLIPTextCfg(**text), quick_gelu=kind == "plain", cast_dtype=cast_dtype)
    if kind == "trunk":
        model.visual.trunk = vit(depth=layers, num_classes=0, pre_norm=True, reg_tokens=1)
        model.visual.head.proj = nn.Linear(32, 16, bias=False)
    return lively(model).to(dtype).eval()


def images_of(dtype=torch.float64, batch=3):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@torch.no_grad()
def shaken(learner, seed=1, size=0.3):
    """The learner with all it trains moved off its initial values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner.trainable_parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return learner.eval()


# counts


def vit_b16():
    """OpenCLIP's ViT-B-16 in its true widths, without memory."""
    config = open_clip.get_model_config("ViT-B-16")
    with torch.device("meta"):
        model = CLIP(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"]))
    model.attn_mask = torch.full((77, 77), -math.inf).triu_(1)
    return model


@pytest.mark.parametrize(
    ("learner", "options", "count", "tensors"),
    [
        (MaPLe, {}, 3_555_072, 27),
        (MaPLe, {"depth": 3}, 1_185_024, 9),
        (MaPLe, {"depth": 1}, 395_008, 3),
        (MaPLe, {"depth": 12}, 4_740_096, 36),
        (IVLP, {}, 30_720, 24),
        (IVLP, {"num_text": 4, "num_visual": 0}, 24_576, 12),
        (IVLP, {"num_text": 0, "num_visual": 8}, 73_728, 12),
        (IVLP, {"num_text": 4, "num_visual": 4, "depth_text": 9, "depth_visual": 9}, 46_080, 18),
        (PromptSRC, {}, 46_080, 18),
        (CLIPLoRA, {}, 184_320, 144),
    ],
)
def test_published_counts(learner, options, count, tensors):
    """Exactly the numbers of the papers on ViT-B/16."""
    built = learner(vit_b16(), TOKENIZER, NAMES, **options)
    assert sum(p.numel() for p in built.trainable_parameters()) == count
    assert len(built.trained_state()) == tensors


def test_names_of_saved_tensors():
    """They are part of the file format."""
    maple = {f"clip.peft.maple.coupled_prompts.{path}" for path in (
        "text.context.prompts", "text.1.stream_in.prompts",
        "visual.0.stream_in.projection.weight", "visual.0.stream_in.projection.bias",
        "visual.1.stream_in.projection.weight", "visual.1.stream_in.projection.bias",
    )}  # fmt: skip
    assert set(BUILDS["MaPLe"](make_clip(), depth=2).trained_state()) == maple
    own = {f"clip.peft.ivlp.deep_prompts.{tower}.stream_in.prompts" for tower in ("text.1", "visual.0", "visual.1")}
    assert set(BUILDS["IVLP"](make_clip(), depth_text=2).trained_state()) == {"vectors", *own}


# the papers' arithmetic


def reference_logits(weights, images, fixed_words, text_prompts, image_prompts):
    """Logits of the transcription in `reference/prompted_clip.py`."""
    custom = "text.token_embedding.weight" in weights
    activation = prompted_clip.gelu if custom else prompted_clip.quick_gelu
    words = " ".join(["x"] * (len(text_prompts[0]) if text_prompts else 0) + fixed_words)
    ids = TOKENIZER([f"{words} {name}." for name in NAMES], context_length=LENGTH)
    t = prompted_clip.text_features(weights, ids, text_prompts, 3, LAYERS, activation, "text." if custom else "")
    f = prompted_clip.image_features(weights, images, image_prompts, 4, LAYERS, activation)
    return weights["logit_scale"].exp() * f @ t.T


def expected_maple(weights, tensors, images, depth, words=("of", "a")):
    """MaPLe's logits from its saved tensors."""
    own = {name.removeprefix("clip.peft.maple.coupled_prompts."): tensor for name, tensor in tensors.items()}
    text = [own["text.context.prompts"], *(own[f"text.{i}.stream_in.prompts"] for i in range(1, depth))]
    visual = [
        text[i] @ own[f"visual.{i}.stream_in.projection.weight"].T + own[f"visual.{i}.stream_in.projection.bias"]
        for i in range(depth)
    ]
    return reference_logits(weights, images, list(words), text, visual)


def expected_ivlp(weights, tensors, images, depth_text, depth_visual, words=("of", "a")):
    """IVLP's logits from its saved tensors."""
    own = {name.rpartition("deep_prompts.")[2]: tensor for name, tensor in tensors.items()}
    text = [own["vectors"]] if "vectors" in own else []
    text += [own[f"text.{i}.stream_in.prompts"] for i in range(1, depth_text)] if text else []
    visual = [own[f"visual.{i}.stream_in.prompts"] for i in range(depth_visual) if "visual.0.stream_in.prompts" in own]
    return reference_logits(weights, images, list(words), text, visual)


@pytest.mark.parametrize("kind", ["plain", "custom_text"])
@pytest.mark.parametrize("depth", [1, 2, 3, LAYERS])
def test_maple_logits_and_gradients(kind, depth):
    """What the paper's layout gives, for shallow prompts, prompts that travel on, and prompts in all blocks."""
    plain = make_clip(kind)
    weights = {name: tensor.detach() for name, tensor in plain.state_dict().items()}
    learner = shaken(BUILDS["MaPLe"](copy.deepcopy(plain), depth=depth))
    images = images_of()
    logits = learner(images)
    copies = {n: t.detach().clone().requires_grad_() for n, t in learner.trained_state().items()}
    expected = expected_maple(weights, copies, images, depth)
    assert distance(logits, expected) < 1e-11
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, tensor in learner.trained_state().items():
        assert distance(tensor.grad, copies[name].grad) < 1e-9, name


@pytest.mark.parametrize("kind", ["plain", "custom_text"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth_text": 3, "depth_visual": 2}, ["of", "a"]),
        ({"depth_text": None, "depth_visual": None}, ["of", "a"]),
        ({"depth_text": 1, "depth_visual": 1, "num_text": 4, "num_visual": 3}, []),
        ({"num_visual": 0, "num_text": 3}, ["a"]),
        ({"num_visual": 0, "num_text": 3, "depth_text": 1}, ["a"]),
        ({"num_text": 0, "num_visual": 3}, ["a", "photo", "of", "a"]),
        ({"num_text": 6, "num_visual": 1}, []),
    ],
)
def test_ivlp_logits(kind, options, words):
    """What the paper's layout gives, for both towers and for each alone."""
    plain = make_clip(kind)
    weights = {name: tensor.detach() for name, tensor in plain.state_dict().items()}
    learner = shaken(BUILDS["IVLP"](copy.deepcopy(plain), **options))
    depth_text, depth_visual = options.get("depth_text", 3) or LAYERS, options.get("depth_visual", 2) or LAYERS
    with torch.no_grad():
        logits = learner(images_of())
        expected = expected_ivlp(weights, learner.trained_state(), images_of(), depth_text, depth_visual, words)
    assert distance(logits, expected) < 1e-11


def test_prompts_in_a_timm_trunk():
    """On a trunk with registers and a norm in front: appended after the patches, replaced block by block."""
    plain = make_clip("trunk")
    learner = shaken(BUILDS["IVLP"](copy.deepcopy(plain), depth_visual=3))
    own = learner.trained_state()
    prompts = [own[f"clip.peft.ivlp.deep_prompts.visual.{i}.stream_in.prompts"] for i in range(3)]
    trunk, number = plain.visual.trunk, 2
    with torch.no_grad():
        x = trunk._pos_embed(trunk.patch_embed(images_of()))
        x = trunk.norm_pre(torch.cat([x, prompts[0].expand(len(x), -1, -1)], 1))
        for index, block in enumerate(trunk.blocks):
            if 1 <= index < 3:
                x = torch.cat([x[:, :-number], prompts[index].expand(len(x), -1, -1)], 1)
            x = block(x)
        expected = F.normalize(plain.visual.head(trunk.forward_head(trunk.norm(x))), dim=-1)
        found = learner.image_features(images_of())
        assert distance(found, expected) < 1e-11
        assert distance(found, F.normalize(plain.encode_image(images_of()), dim=-1)) > 0.01


def test_every_maple_tensor_learns_and_text_prompts_from_both_towers():
    """Gradients reach all 27 tensors; each text prompt gets one from the images and one from the texts."""
    learner = shaken(MaPLe(make_clip(layers=10), TOKENIZER, NAMES))
    assert len(learner.trained_state()) == 27
    learner(images_of()).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in learner.trainable_parameters())
    direction = torch.randn(16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for features in (lambda: learner.image_features(images_of()), learner.text_features):
        learner.zero_grad()
        (features() @ direction).sum().backward()
        for name, parameter in learner.trained_state().items():
            if ".text." in name:
                assert parameter.grad.abs().max() > 1e-6, name


def test_first_values_are_those_of_the_papers():
    """Words for the text prompt of block 0, noise for the others, and equal projections in all blocks but the first."""
    clip = make_clip()
    learner = MaPLe(clip, TOKENIZER, NAMES, depth=4)
    state = {n.removeprefix("clip.peft.maple.coupled_prompts."): p for n, p in learner.trained_state().items()}
    assert torch.equal(state["text.context.prompts"], clip.token_embedding.weight[torch.tensor([320, 1125])])
    weights = [state[f"visual.{i}.stream_in.projection.weight"] for i in range(4)]
    assert torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], weights[3])
    assert weights[1] is not weights[2]
    assert not torch.equal(weights[0], weights[1])
    assert 0.005 < state["text.2.stream_in.prompts"].std() < 0.05


# the fast text path


def text_step(learner, fast):
    """Text features and what their gradient is, with the fast path or with every text in full."""
    learner.fast_text = fast
    learner.zero_grad()
    features = learner.text_features()
    direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (features * direction.to(features)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in learner.trained_state().items() if p.grad is not None}
    return features.detach(), gradients


@pytest.mark.parametrize("kind", ["plain", "custom_attention"])
@pytest.mark.parametrize("chunk_size", [None, 3])
@every_learner
def test_fast_text_is_exact(name, chunk_size, kind):
    """Features and gradients are those of running every text in full, in both precisions."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        learner = shaken(BUILDS[name](make_clip(kind, dtype)))
        learner.chunk_size = chunk_size
        assert learner.text.why_in_full(learner.layout) is None
        (fast, fast_gradients), (full, gradients) = text_step(learner, True), text_step(learner, False)
        assert distance(fast, full) < tolerance
        assert fast_gradients.keys() == gradients.keys()
        assert len(gradients) > 2
        largest = max(g.norm() for g in gradients.values())
        for key, gradient in gradients.items():
            assert (fast_gradients[key] - gradient).norm() < tolerance * largest, key


@pytest.mark.parametrize("name", PROMPTED)
def test_fast_text_replaces_the_tokens(name, monkeypatch):
    """The comparison above notices prompts that are not put in: a fast path without them gives something else."""
    learner = shaken(BUILDS[name](make_clip()))
    monkeypatch.setattr(ReplaceTokens, "forward", lambda self, x: x)
    without = text_step(learner, True)[0]
    monkeypatch.undo()
    assert distance(without, text_step(learner, False)[0]) > 1e-3


@pytest.mark.parametrize("name", PROMPTED)
def test_texts_that_do_not_share_the_replaced_tokens_run_in_full(name):
    """Templates that differ from the first word on are what the library computes with the prompts put in."""
    learner = shaken(BUILDS[name](make_clip()))
    contents = learner.tokenizer.contents(["a photo of a small dog", "itap of a heron", "art of the red kite"])
    layout = learner.tokenizer.layout(contents, "abc")
    assert "replaced" in learner.text.why_in_full(layout)
    with torch.no_grad():
        fast, full = (learner.text.encode(layout, fast=fast) for fast in (True, False))
        assert torch.equal(fast, full)
        ids = TOKENIZER(["a photo of a small dog"], context_length=LENGTH)
        assert distance(full[0, :1], learner.clip.encode_text(ids)) < 1e-12
        shared = learner.tokenizer.layout(contents[:1] * 2, "ab")
        assert learner.text.why_in_full(shared) is None
        assert distance(learner.text.encode(shared)[0, :1], full[0, :1]) < 1e-11


def test_dropout_is_drawn_for_each_text():
    """While CLIP-LoRA trains, two texts that are the same get dropout of their own; evaluated, they are equal."""
    learner = CLIPLoRA(make_clip(), TOKENIZER, ["dog", "dog", "cat"], allow_duplicates=True)
    randomise(learner.clip.peft["cliplora"])
    assert learner.text.why_in_full(learner.layout) is None
    torch.manual_seed(0)
    first, second, _ = learner.text_features()
    assert distance(first, second) > 1e-3
    learner.eval()
    first, second, _ = learner.text_features()
    assert distance(first, second) < 1e-12


def test_dropout_elsewhere_does_not_slow_the_text_down():
    """Dropout in the image tower or in an adapter that does not act leaves the shared prefix shared."""
    learner = CLIPLoRA(make_clip(), TOKENIZER, NAMES, towers=["visual"])
    assert learner.training
    assert learner.clip.peft["cliplora"].training
    assert learner.text._may_share()
    both = CLIPLoRA(make_clip(), TOKENIZER, NAMES)
    assert not both.text._may_share()
    vp.disable(both.clip)
    assert both.text._may_share()


def test_drop_path_in_the_text_tower_runs_in_full():
    """It drops whole texts, which packed texts are not."""
    clip = make_clip()
    vp.attach(clip, vp.Adapter(bottleneck=4, placement="adapter_plus", towers=["text"]), head=False)
    learner = CoOp(clip, TOKENIZER, NAMES, context_length=2)
    assert "DropPath" in learner.train().text.why_in_full(learner.layout)
    learner.eval()
    randomise(clip.peft["default"])
    assert learner.text.why_in_full(learner.layout) is None
    (fast, _), (full, _) = text_step(learner, True), text_step(learner, False)
    assert distance(fast, full) < 1e-10


# equivalences


@pytest.mark.parametrize("build", [MaPLe, IVLP, PromptSRC], ids=lambda c: c.__name__)
@pytest.mark.parametrize("number", [2, 4])
def test_first_text_features_are_those_of_the_phrase(build, number):
    """With prompts in block 0 alone, the text side starts as the plain prompt."""
    clip = make_clip()
    plain = ZeroShot(copy.deepcopy(clip), TOKENIZER, NAMES)
    options = {"num_tokens": number, "depth": 1} if build is MaPLe else {"num_text": number, "depth_text": 1}
    learner = build(clip, TOKENIZER, NAMES, **options)
    with torch.no_grad():
        assert distance(learner.text_features(), plain.text_features()) < 1e-12
        assert distance(learner.image_features(images_of()), plain.image_features(images_of())) > 1e-3


def test_promptsrc_without_its_losses_is_ivlp():
    """The same prompts, the same loss, the same gradients."""
    clip = make_clip()
    off = {"text_weight": 0, "image_weight": 0, "logit_weight": 0, "average_mean": None}
    source = shaken(PromptSRC(copy.deepcopy(clip), TOKENIZER, NAMES, depth_text=3, depth_visual=2, **off))
    ivlp = IVLP(clip, TOKENIZER, NAMES, num_text=4, num_visual=4, depth_text=3, depth_visual=2)
    tensors = {n.replace("promptsrc", "ivlp"): p.detach() for n, p in source.trained_state().items()}
    ivlp.load_trained_state(tensors, "the prompts of PromptSRC")
    labels = torch.tensor([0, 2, 1])
    results = []
    for learner in (source, ivlp):
        loss, logits = learner.loss(images_of(), labels)
        loss.backward()
        results.append([loss, logits, *(p.grad for p in learner.trainable_parameters())])
    for left, right in zip(*results, strict=True):
        assert distance(left, right) < 1e-12


def test_clip_lora_starts_as_clip():
    """B is zero, so it is the CLIP with its template."""
    clip = make_clip()
    plain = ZeroShot(copy.deepcopy(clip), TOKENIZER, NAMES)
    learner = CLIPLoRA(clip, TOKENIZER, NAMES).eval()
    assert distance(learner(images_of()), plain(images_of())) < 1e-12


def test_clip_lora_scale():
    """The change of each matrix is alpha / sqrt(rank) B A."""
    learner = shaken(CLIPLoRA(make_clip(), TOKENIZER, NAMES, rank=3, alpha=1.5))
    logits = learner(images_of()).detach()
    plain = make_clip()
    with torch.no_grad():
        for tower, blocks in (("text", plain.transformer.resblocks), ("visual", plain.visual.transformer.resblocks)):
            for index, block in enumerate(blocks):
                weight = block.attn.in_proj_weight
                for rows, site in zip(weight.chunk(3), "qkv", strict=True):
                    pair = learner.clip.peft["cliplora"].get_submodule(f"lora.{tower}.{index}.{site}")
                    rows += 1.5 / math.sqrt(3) * pair.B @ pair.A
    assert distance(logits, ZeroShot(plain, TOKENIZER, NAMES)(images_of())) < 1e-11


# PromptSRC


@pytest.mark.parametrize("templates", [["a photo of a {}.", "art of the {}"], None])
def test_promptsrc_loss(templates):
    """Cross entropy, two distances and a divergence from the CLIP without prompts; by default with the authors' 60."""
    clip = make_clip()
    plain = copy.deepcopy(clip)
    learner = shaken(PromptSRC(clip, TOKENIZER, NAMES, **({"template": templates} if templates else {})))
    if templates is None:
        templates = [function("{}") for function in open_clip.OPENAI_IMAGENET_TEMPLATES[:60]]
    labels = torch.tensor([0, 2, 1])
    loss, logits = learner.loss(images_of(), labels)
    with torch.no_grad():
        f, t = learner.image_features(images_of()), learner.text_features()
        f0 = F.normalize(plain.encode_image(images_of()), dim=-1)
        texts = [[template.format(name) for name in NAMES] for template in templates]
        t0 = sum(plain.encode_text(TOKENIZER(each, context_length=LENGTH)) for each in texts)
        t0 = t0 / t0.norm(dim=-1, keepdim=True)
        assert distance(learner.template_features(), t0) < 1e-12
        one = F.normalize(plain.encode_text(TOKENIZER(texts[0], context_length=LENGTH)), dim=-1)
        assert distance(one, t0) > 1e-3  # another set of templates would show
        scale = plain.logit_scale.exp()
        p, p0 = (scale * f @ t.T).softmax(-1), (scale * f0 @ t0.T).softmax(-1)
        expected = -p[torch.arange(3), labels].log().mean()
        expected += 25 * (t - t0).abs().mean() + 10 * (f - f0).abs().mean()
        expected += (p0 * (p0.log() - p.log())).sum() / p.numel()
    assert distance(logits, scale * f @ t.T) < 1e-12
    assert distance(loss.detach(), expected) < 1e-11
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in learner.trainable_parameters())


def test_promptsrc_averages_over_epochs():
    """The prompts end as the Gaussian mean over the epochs, also where a run goes on from its buffers."""
    mean, std, epochs = 2.0, 1.5, 5
    learner = PromptSRC(make_clip(), TOKENIZER, NAMES, average_mean=mean, average_std=std)
    weights = [math.exp(-((a - mean) ** 2) / (2 * std**2)) for a in range(1, epochs + 1)]
    seen = []
    for epoch in range(epochs):
        shaken(learner, seed=epoch)
        seen.append({n: p.detach().clone() for n, p in learner.trained_state().items()})
        learner.end_epoch(epoch, epochs)
        if epoch == 2:
            buffers = {n: learner.state_dict()[n].clone() for n in ("average", "average_weight")}
            learner = PromptSRC(make_clip(), TOKENIZER, NAMES, average_mean=mean, average_std=std)
            learner.load_trained_state(seen[-1], "a checkpoint")
            learner.load_state_dict(buffers, strict=False)
    learner.end_training()
    for name, parameter in learner.trained_state().items():
        expected = sum(w * state[name] for w, state in zip(weights, seen, strict=True)) / sum(weights)
        assert distance(parameter.detach(), expected) < 1e-12


def test_promptsrc_averages_over_the_epochs_of_its_last_training_alone():
    learner = PromptSRC(make_clip(), TOKENIZER, NAMES, average_mean=2.0, average_std=1.0)
    for value in (1.0, 3.0):
        for epoch in range(3):
            with torch.no_grad():
                for parameter in learner.trainable_parameters():
                    parameter.fill_(value)
            learner.end_epoch(epoch, 3)
        learner.end_training()
        for parameter in learner.trainable_parameters():
            torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, value))


def test_promptsrc_keeps_the_last_prompts_without_averaging():
    """No mean, no change."""
    learner = shaken(PromptSRC(make_clip(), TOKENIZER, NAMES, average_mean=None))
    before = {n: p.detach().clone() for n, p in learner.trained_state().items()}
    learner.end_epoch(0, 1)
    learner.end_training()
    assert same_bytes(before, {n: p.detach() for n, p in learner.trained_state().items()})


# training, classes, storage


@pytest.mark.parametrize("kind", ["plain", "custom_attention", "custom_text", "bidirectional", "trunk"])
@every_learner
def test_steps_leave_the_clip_alone(name, kind):
    """A few steps lower the loss, move every tensor, and the CLIP stays the same to the byte, also after detaching."""
    clip = make_clip(kind, torch.float32)
    before, plain = base_state(clip), copy.deepcopy(clip)
    learner = BUILDS[name](clip)
    first = {n: p.detach().clone() for n, p in learner.trained_state().items()}
    images, labels = images_of(torch.float32), torch.tensor([0, 2, 1])
    optimiser = torch.optim.Adam(learner.trainable_parameters(), lr=1e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        loss, _ = learner.loss(images, labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(first[n], p) for n, p in learner.trained_state().items())
    assert same_bytes(base_state(clip), before)
    vp.detach(clip)
    assert same_bytes(dict(clip.state_dict()), before)
    with torch.no_grad():
        assert torch.equal(clip.encode_image(images), plain.requires_grad_(False).encode_image(images))


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
@every_learner
def test_low_precision(name, precision):
    """Under autocast or on a CLIP in bfloat16, prompts stay float32, gradients are finite and logits are near."""
    learner, exact = (BUILDS[name](make_clip(dtype=torch.float32)) for _ in range(2))
    exact.load_trained_state(learner.trained_state(), "the same prompts")
    if precision == "bfloat16":
        learner = BUILDS[name](make_clip(dtype=torch.bfloat16))
        learner.load_trained_state(exact.trained_state(), "the same prompts")
    images, labels = images_of(torch.float32), torch.tensor([0, 2, 1])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss, _ = learner.train().loss(images, labels)
    loss.backward()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in learner.trainable_parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        assert distance(learner.eval()(images).float(), exact.eval()(images)) < 0.1


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.01), ("bf16", 0.08)])
@every_learner
def test_a_clip_built_in_half_precision(name, precision, tolerance):
    """OpenCLIP's "fp16" and "bf16" keep the norms, which take no float64, in float32 and multiply in half."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    half, clip = make_clip(dtype=torch.float32, cast_dtype=dtype), make_clip(dtype=torch.float32)
    convert_weights_to_lp(half, dtype)
    assert isinstance(half.visual.transformer.resblocks[0].ln_1, LayerNormFp32)
    clip.load_state_dict(half.state_dict())
    found = []
    for each in (half, clip):
        torch.manual_seed(0)
        learner = shaken(BUILDS[name](each))
        loss, logits = learner.loss(images_of(torch.float32), torch.tensor([0, 1, 3]))
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in learner.trainable_parameters()]
        found.append((logits.detach(), torch.cat(gradients)))
    (logits, gradient), (expected, expected_gradient) = found
    assert logits.dtype == gradient.dtype == torch.float32
    assert distance(logits, expected) < tolerance
    assert distance(gradient, expected_gradient) < 0.1  # that of an absolute difference is its sign


@every_learner
def test_other_class_names(name):
    """What was learned classifies into other classes as a learner built with them does."""
    learner = shaken(BUILDS[name](make_clip()))
    learner.set_class_names(["buzzard", "cat", "a very large tree"])
    other = BUILDS[name](make_clip())
    other.load_trained_state({n: p.detach() for n, p in learner.trained_state().items()}, "another")
    other.set_class_names(["buzzard", "cat", "a very large tree"])
    with torch.no_grad():
        assert learner(images_of()).shape == (3, 3)
        assert distance(learner(images_of()), other.eval()(images_of())) < 1e-12


@every_learner
def test_save_and_load(name, tmp_path):
    """From its folder the same learner comes back to the bit."""
    learner = shaken(BUILDS[name](make_clip(dtype=torch.float32)))
    save_learner(learner, tmp_path / "learner")
    again = load_learner(tmp_path / "learner", make_clip(dtype=torch.float32), TOKENIZER)
    images = images_of(torch.float32)
    with torch.no_grad():
        assert torch.equal(again(images), learner(images))


@pytest.mark.parametrize("options", [{"num_text": 0}, {"num_visual": 0}], ids=["images_only", "text_only"])
def test_features_of_a_tower_without_prompts_are_fixed(options):
    """They need no gradient and are worked out once."""
    learner = BUILDS["IVLP"](make_clip(), **options)
    assert learner.frozen_images == ("num_visual" in options)
    logits = learner(images_of())
    logits.sum().backward()
    text = learner.text_features()
    assert text.requires_grad == ("num_visual" in options)
    if "num_text" in options:
        shaken(learner)
        assert learner.text_features() is text or learner.train().text_features().equal(text)


# refusals


@pytest.mark.parametrize("name", [name for name in BUILDS if name != "CLIPLoRA"])
def test_a_resnet_is_refused(name):
    """A ResNet has no blocks to put prompts into; the model keeps its classes and gets no adapter."""
    clip = make_clip("resnet")
    before = {n: type(m) for n, m in clip.named_modules()}
    with pytest.raises(UnsupportedError, match="ModifiedResNet"):
        BUILDS[name](clip)
    assert {n: type(m) for n, m in clip.named_modules()} == before
    assert not hasattr(clip, "peft")


def test_text_prompts_alone_work_on_a_resnet():
    """What acts on the text tower alone asks nothing of the image tower."""
    learner = BUILDS["IVLP"](make_clip("resnet"), num_visual=0)
    assert learner(torch.randn(2, 3, 64, 64, dtype=torch.float64)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("MaPLe", {"depth": 5}, "depth=5, but the text tower has 4 blocks"),
        ("MaPLe", {"depth": 0}, "use 1 to 4"),
        ("MaPLe", {"depth": 1.5}, "depth must be an integer or None, not 1.5"),
        ("MaPLe", {"num_tokens": 0}, "at least 1"),
        ("MaPLe", {"num_tokens": 1.5}, "must be an integer"),
        ("IVLP", {"depth_text": 2.5}, "depth_text must be an integer or None"),
        ("IVLP", {"num_text": 2.5}, "must be an integer"),
        ("IVLP", {"num_visual": 2.5}, "num_visual must be an integer"),
        ("IVLP", {"depth_text": 9}, "depth_text=9, but the text tower has 4 blocks"),
        ("IVLP", {"depth_visual": 9}, "depth_visual=9, but the visual tower has 4 blocks"),
        ("IVLP", {"num_text": 0, "num_visual": 0}, "both 0"),
        ("IVLP", {"num_text": 0, "init": None}, "must have words"),
        ("IVLP", {"num_text": 30}, "reads 20"),
        ("PromptSRC", {"average_std": 0.0}, "must be positive"),
        ("PromptSRC", {"template": "no place"}, "no place"),
        ("CLIPLoRA", {"towers": ["audio"]}, "'visual' or 'text'"),
        ("CLIPLoRA", {"rank": 0}, "positive integer"),
        ("CLIPLoRA", {"targets": ["keys"]}, "matches no layer"),
    ],
)
def test_options_that_cannot_be(name, options, sentence):
    """One sentence, and no adapter left on the model."""
    clip = make_clip()
    with pytest.raises(ConfigurationError, match=sentence):
        BUILDS[name](clip, **options)
    assert not hasattr(clip, "peft")


@every_learner
def test_a_second_adapter_of_the_name_is_refused(name):
    """The first learner stays as it was."""
    clip = make_clip()
    learner = shaken(BUILDS[name](clip))
    with torch.no_grad():
        before = learner(images_of())
    with pytest.raises(ConfigurationError, match="already attached"):
        BUILDS[name](clip)
    with torch.no_grad():
        assert torch.equal(learner(images_of()), before)


# the law of order


@torch.no_grad()
def test_tokens_are_replaced_before_prompts_enter():
    """Inserted prompts do not move the place of the tokens that are replaced, whatever was attached first."""
    methods = [vp.VPT(num_tokens=3, init="normal", towers=["text"]), DeepPrompts(num_visual=0, depth_text=3)]
    ids = TOKENIZER(["a photo of a dog."], context_length=LENGTH)
    first, second, plain = make_clip(), make_clip(), make_clip()
    for clip, order in ((first, methods), (second, methods[::-1])):
        for method in order:
            vp.attach(clip, method, name=method.name)
    for name in ("vpt", "deep_prompts"):
        randomise(first.peft[name])
        second.peft[name].load_state_dict(first.peft[name].state_dict())
    output = first.encode_text(ids)
    assert torch.equal(second.encode_text(ids), output)

    own = first.peft.state_dict()
    x = plain.token_embedding(ids) + plain.positional_embedding
    mask = torch.full((LENGTH + 3, LENGTH + 3), -math.inf, dtype=torch.float64).triu_(1)
    for index, block in enumerate(plain.transformer.resblocks):
        if 1 <= index < 3:
            x[:, 1:3] = own[f"deep_prompts.deep_prompts.text.{index}.stream_in.prompts"]
        x = torch.cat([x[:, :1], own[f"vpt.vpt.text.{index}.stream_in.prompts"][None], x[:, 1:]], 1)
        x = block(x, attn_mask=mask)
        x = torch.cat([x[:, :1], x[:, 4:]], 1)
    expected = plain.ln_final(x)[:, ids.argmax()] @ plain.text_projection
    assert distance(output, expected) < 1e-12


@pytest.mark.parametrize("first", ["prompts", "replacing"])
def test_shallow_prompts_and_replaced_tokens_are_refused(first):
    """Prompts that travel through the text tower would move the tokens to be replaced."""
    methods = [
        vp.VPT(num_tokens=3, deep=False, init="normal", towers=["text"]),
        DeepPrompts(num_text=2, num_visual=0, depth_text=3),
    ]
    one, two = methods if first == "prompts" else methods[::-1]
    clip = vp.attach(make_clip(), one, name="one")
    with pytest.raises(UnsupportedError, match="shallow prompts"):
        vp.attach(clip, two, name="two")
    assert list(clip.peft) == ["one"]


@every_learner
def test_a_deep_copy_is_a_learner_of_its_own(name):
    """It computes the same, and neither learns from what the other does."""
    learner = shaken(BUILDS[name](make_clip()))
    with torch.no_grad():
        expected = learner(images_of())
        twin = copy.deepcopy(learner)
        assert torch.equal(twin(images_of()), expected)
        for tensor in twin.trainable_parameters():
            tensor += 0.1
        assert torch.equal(learner(images_of()), expected)
        assert not torch.equal(twin(images_of()), expected)
