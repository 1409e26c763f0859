"""Methods for clips: published counts, what mixes with what, the papers in float64, the invariants of the matrix."""

import copy
import dataclasses
import functools
import inspect

import pytest
import test_invariants as matrix
import timm
import torch
from conftest import (
    FEW_CASES,
    MECHANISMS,
    VIDEO_CASES,
    adapter_tensors,
    cells,
    distance,
    every_pair,
    loss_of,
    randomise,
)
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from reference.hosts import HOSTS, Host, clip, eva, vit
from reference.video import frame_features
from shared_cells import shared
from timm.layers import DropPath
from timm.models.vision_transformer import Block

import visionpeft as vp
from visionpeft.adapters.storage import is_older, method_from
from visionpeft.backbones.dispatch import describe_block, pre_norm_block
from visionpeft.models.image_classifier import ImageClassifier

CLASSES = 5


@dataclasses.dataclass(frozen=True, repr=False)
class VideoHost(Host):
    """A host of the matrix that takes clips of three frames."""

    def inputs(self, batch=2, dtype=torch.float32, seed=0):
        """Random clips."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, 3, *self.size, generator=generator, dtype=torch.float64).to(dtype)


def video(make, num_classes=CLASSES):
    """A plain classifier of clips of three frames."""
    return vp.VideoClassifier(make(), num_frames=3, num_classes=num_classes, dropout=0.0)


def image_model(host, dtype=torch.float32):
    """The image tower of a host of the image matrix."""
    model = host.build(dtype)
    return getattr(model, "visual", model)


VIDEO_HOSTS = [
    VideoHost("video_vit", functools.partial(video, functools.partial(vit, reg_tokens=1))),
    VideoHost("video_eva", functools.partial(video, functools.partial(eva, swiglu_mlp=True))),
    VideoHost("video_clip", functools.partial(video, lambda: clip().visual)),
]
IMAGE_HOSTS = [host for host in HOSTS if host.takes != "text"]
BY_NAME = {host.name: host for host in HOSTS}

# Methods of images act in each frame by themselves, so what a classifier of clips can break is one mechanism or another
# of acting and not one method or another: one of each, as the matrix of images has all of them.
MIXED = [*VIDEO_CASES, *(case for case in FEW_CASES if case.name in MECHANISMS)]

READING = [
    matrix.test_noise_has_an_effect,
    matrix.test_only_the_adapter_gets_gradients,
    matrix.test_base_keys_stay,
    matrix.test_disable_and_activate,
    matrix.test_use_survives_an_exception,
    matrix.test_deepcopy_follows_its_own_parameters,
    matrix.test_pickle,
    matrix.test_save_and_load,
    matrix.test_load_refuses_another_backbone,
    matrix.test_no_grad_gives_the_same,
    matrix.test_autocast,
]
READING_EXACTLY = [matrix.test_activation_checkpointing]
WRITING = [
    matrix.test_base_is_never_written,
    matrix.test_detach_leaves_the_original,
    matrix.test_routed_rows_are_those_of_each_adapter,
    matrix.test_low_precision_backbone,
    matrix.test_training_lowers_the_loss,
    matrix.test_one_seed_gives_one_start,
]


def each(invariants):
    """Parametrise a test over invariants of the matrix."""
    return pytest.mark.parametrize("invariant", invariants, ids=lambda test: test.__name__)


def with_folder(invariant, tmp_path):
    """The folder as an argument, for an invariant that needs one."""
    return {"tmp_path": tmp_path} if "tmp_path" in inspect.signature(invariant).parameters else {}


@each(READING)
@shared(every_pair(VIDEO_HOSTS, MIXED))
def test_invariant(invariant, cell, tmp_path):
    """What holds for every method on every model of images holds on classifiers of clips."""
    invariant(cell, **with_folder(invariant, tmp_path))


@each(READING_EXACTLY)
@shared(every_pair(VIDEO_HOSTS, MIXED), torch.float64)
def test_invariant_in_float64(invariant, cell, tmp_path):
    """Likewise for what is compared in float64."""
    invariant(cell, **with_folder(invariant, tmp_path))


@each(WRITING)
@cells(VIDEO_HOSTS, MIXED)
def test_invariant_of_a_model_of_its_own(invariant, host, case, tmp_path):
    """Likewise for what changes the model."""
    invariant(host, case, **with_folder(invariant, tmp_path))


@shared(every_pair(VIDEO_HOSTS, VIDEO_CASES), torch.float64)
def test_every_tensor_is_live(cell):
    """Each tensor has a gradient, but for patches behind the last attention where the class token alone is read."""
    host, model = cell.host, cell.model
    loss_of(host, model, torch.float64).backward()
    sizes = {n: p.grad.abs().max().item() for n, p in adapter_tensors(model).items()}
    dead = {n for n, size in sizes.items() if size < 1e-9 * max(sizes.values())}
    last = {n for n in sizes if n.startswith("st_adapter.visual.2.stream_mid.")}
    assert dead == (last if host.name in ("video_vit", "video_clip") else set())


@cells(VIDEO_HOSTS, [c for c in VIDEO_CASES if c.name.startswith("st_adapter")])
def test_switching(host, case):
    """With two adapters attached, each gives what it gives alone."""
    matrix.test_switching_equals_one_alone(host, case)


def test_two_adapters_with_one_trained_norm():
    """Two of AIM's adapters train one norm: they act in turn, not together."""
    model = vp.VideoClassifier(vit(), vp.AIM(num_frames=3), num_frames=3)
    with pytest.raises(vp.ConfigurationError, match="both train"):
        vp.attach(model, vp.AIM(num_frames=3), "second")
    vp.disable(model)
    vp.attach(model, vp.AIM(num_frames=3), "second")


@shared(every_pair(VIDEO_HOSTS, VIDEO_CASES))
def test_merge_is_refused(cell):
    """Neither method is a change of weights."""
    matrix.test_merge_refuses_by_name(cell)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5)])
@cells(VIDEO_HOSTS, [c for c in FEW_CASES if c.mergeable and c.name != "ssf"])
def test_image_methods_merge(host, case, dtype, tolerance):
    """Methods of images merge into the backbone of a classifier of clips."""
    matrix.test_merge(host, case, dtype, tolerance)


# every method on one host, and one of either kind on the block classes of the others
COMPILED = [(VIDEO_HOSTS[0], case) for case in VIDEO_CASES]
COMPILED += [(VIDEO_HOSTS[1], VIDEO_CASES[3]), (VIDEO_HOSTS[2], VIDEO_CASES[0])]


@pytest.mark.slow
@pytest.mark.parametrize(("host", "case"), COMPILED, ids=repr)
def test_compile(host, case):
    """No graph breaks."""
    matrix.same_when_compiled(host, [case])


# published numbers


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (vp.STAdapter(positions=("before_mlp",)), 7_110_144),
        (vp.STAdapter(positions=("before_attention", "before_mlp")), 14_220_288),
        (vp.STAdapter(kernel=(3, 3, 3)), 12 * (2 * 768 * 384 + 384 * 29 + 768)),
        (vp.AIM(), 10_659_072),
        (vp.AIM(num_temporal=2), 14_209_536),
    ],
    ids=repr,
)
@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_published_counts(library, method, count):
    """On ViT-B/16 with 8 frames, without the head, exactly the published numbers; 400 classes have 307,600 more."""
    with torch.device("meta"):
        if library == "timm":
            backbone = timm.create_model("vit_base_patch16_224")
        else:
            backbone = ImageClassifier(CLIP(512, CLIPVisionCfg(), CLIPTextCfg(layers=1)).visual)
        model = vp.VideoClassifier(backbone, method, num_frames=8, num_classes=400)
    found = vp.summary(model)
    assert found.adapter == count
    assert found.trainable == sum(p.numel() for p in vp.trainable_parameters(model)) == count + 307_600
    if isinstance(method, vp.AIM):
        longer = 32 - 8
        with torch.device("meta"):
            vp.detach(model)
            model.set_num_frames(32)
            vp.attach(model, dataclasses.replace(method, num_frames=32))
        assert vp.summary(model).adapter == count + longer * 768


# the start


@pytest.mark.parametrize("host", IMAGE_HOSTS, ids=repr)
def test_start_is_the_image_model(host):
    """At the start the features of every frame are those of the image model, for any number of frames."""
    backbone, plain = image_model(host), image_model(host)
    for frames in (1, 2, 5):
        clips = torch.randn(2, 3, frames, *host.size)
        with torch.no_grad():
            images = clips.transpose(1, 2).flatten(0, 1)
            if hasattr(plain, "forward_head"):
                expected = plain.forward_head(plain.forward_features(images), pre_logits=True)
            else:
                expected = plain(images)
            both = ("before_attention", "before_mlp")
            st_adapter = vp.STAdapter(4, positions=both, norm_of_mean=False)
            for method in (st_adapter, vp.AIM(num_frames=frames, num_temporal=2)):
                model = vp.VideoClassifier(backbone, method, num_frames=frames).eval()
                found = model.frame_features(clips)
                assert found.shape == (2, frames, model.num_features)
                assert distance(found.flatten(0, 1), expected) < 1e-6
                assert distance(model(clips), expected.unflatten(0, (2, frames)).mean(1)) < 1e-6
                vp.detach(model)


@pytest.mark.parametrize("name", ["clip_visual", "vit_registers"])
def test_st_adapter_normalises_the_mean_over_frames(name):
    """As its authors: ln_post of the mean of the class tokens. The mean of normalised ones, as in AIM, is another."""
    host = BY_NAME[name]
    plain = image_model(host, torch.float64)
    norm = plain.ln_post if hasattr(plain, "ln_post") else plain.norm
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    backbone, seen, clips = copy.deepcopy(plain), [], torch.randn(2, 3, 4, *host.size, dtype=torch.float64)
    clips *= torch.tensor([0.1, 1.0, 2.0, 5.0])[:, None, None]  # frames of other lengths
    norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        plain(clips.transpose(1, 2).flatten(0, 1))
        tokens = seen[0] if seen[0].ndim == 2 else seen[0][:, 0]
        tokens = tokens.unflatten(0, (2, 4))

        def normalised(x):
            centred = x - x.mean(-1, keepdim=True)
            y = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
            return y @ plain.proj if getattr(plain, "proj", None) is not None else y

        of_mean, of_frames = normalised(tokens.mean(1)), normalised(tokens).mean(1)
        assert distance(of_mean, of_frames) > 0.01
        model = vp.VideoClassifier(backbone, vp.STAdapter(4), num_frames=4).eval()
        assert distance(model(clips), of_mean) < 1e-12
        vp.detach(model)
        vp.attach(model, vp.STAdapter(4, norm_of_mean=False)).eval()
        assert distance(model(clips), of_frames) < 1e-12


def test_st_adapter_of_an_older_version_normalises_each_frame():
    """A description without the field was written where there was no choice."""
    described = {"class": "STAdapter", "fields": dataclasses.asdict(vp.STAdapter(4, positions=("before_mlp",)))}
    assert method_from(described) == vp.STAdapter(4, positions=("before_mlp",))
    del described["fields"]["norm_of_mean"]
    assert is_older(described)
    assert method_from(described) == vp.STAdapter(4, positions=("before_mlp",), norm_of_mean=False)


def test_first_gradients_of_st_adapter_reach_the_convolution_alone():
    """So it is published: with conv zero, down and up follow one step later."""
    model = vp.VideoClassifier(vit(), vp.STAdapter(4), num_frames=2, num_classes=3)
    model(torch.randn(2, 3, 2, 32, 32)).square().sum().backward()
    sizes = {n: p.grad.abs().max() for n, p in adapter_tensors(model).items() if n.startswith("st_adapter")}
    assert all((size > 0) == (".conv." in n or n.endswith("up.bias")) for n, size in sizes.items()), sizes


# what mixes with what


def jacobian(module, tokens):
    """(frame, token, frame, token): whether an output of the first clip depends on an input of it."""
    x = torch.randn(2 * tokens[0], tokens[1], 32, dtype=torch.float64)
    full = torch.autograd.functional.jacobian(module, x)
    depends = full.abs().amax(dim=(2, 5)) > 1e-12
    assert not depends[: tokens[0], :, tokens[0] :].any()  # no clip sees another
    return depends[: tokens[0], :, : tokens[0]]


def attached(method, frames, backbone=None):
    """A classifier with a method whose tensors are not those of the start, in float64."""
    model = vp.VideoClassifier(backbone or vit(reg_tokens=1), method, num_frames=frames).double().eval()
    randomise(model.peft["default"])
    return model


@pytest.mark.parametrize(("frames", "reach"), [(1, 1), (2, 1), (5, 1), (6, 2)])
def test_temporal_kernel_mixes_neighbouring_frames_of_one_patch(frames, reach):
    """An output depends on the same patch in the frames t - reach to t + reach, and on nothing else."""
    model = attached(vp.STAdapter(4, kernel=(2 * reach + 1, 1, 1)), frames)
    found = jacobian(model.peft["default"].get_submodule("st_adapter.visual.0.stream_in"), (frames, 16))
    for t in range(frames):
        for s in range(frames):
            assert torch.equal(found[t, :, s], torch.eye(16, dtype=torch.bool) & (abs(t - s) <= reach))


def test_spatial_kernel_mixes_neighbouring_patches():
    """A kernel (3, 3, 3) reaches one frame, row and column in each direction."""
    model = attached(vp.STAdapter(4, kernel=(3, 3, 3)), 3)
    found = jacobian(model.peft["default"].get_submodule("st_adapter.visual.0.stream_in"), (3, 16))
    for t, i, s, j in torch.cartesian_prod(*(torch.arange(n) for n in (3, 16, 3, 16))).tolist():
        near = abs(t - s) <= 1 and abs(i // 4 - j // 4) <= 1 and abs(i % 4 - j % 4) <= 1
        assert found[t, i, s, j] == near


@pytest.mark.parametrize("host", ["vit_registers", "beit", "dinov3", "eva_rope_mixed", "clip_custom"])
def test_attention_in_time_mixes_equal_indices_only(host):
    """An output depends on the token of the same index, class token with class token, in all frames."""
    model = attached(vp.AIM(num_frames=4, num_temporal=2), 4, image_model(BY_NAME[host]))
    found = jacobian(model.peft["default"].get_submodule("aim.visual.0.stream_in"), (4, 7))
    assert torch.equal(found, torch.eye(7, dtype=torch.bool)[None, :, None].expand_as(found))


@pytest.mark.parametrize("method", [vp.STAdapter(4), vp.AIM(num_frames=3)], ids=repr)
def test_order_of_frames_matters(method):
    """Turning a clip round changes the logits; for methods of images it does not."""
    clips = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        model = attached(method, 3)
        assert distance(model(clips.flip(2)), model(clips)) > 1e-4
        model = attached(vp.AdaptFormer(4), 3)
        assert distance(model(clips.flip(2)), model(clips)) < 1e-12


@pytest.mark.parametrize("blocks", ["all", "last:4"])
def test_drop_path_of_aim_rises_linearly(blocks):
    """From 0 in the first block to .2 in the last, as published: .1 on average over the 24 modules of ViT-B."""
    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224")
    model = vp.VideoClassifier(backbone, vp.AIM(blocks=blocks), num_frames=8)
    rates = {"stream_in": {}, "mlp_in": {}, "attn_out": {}}
    for name, module in model.peft["default"].named_modules():
        if isinstance(module, DropPath):
            _, _, index, site, *_ = name.split(".")
            rates[site][int(index)] = module.drop_prob
    assert not any(rates.pop("attn_out").values())  # the branch in space is never dropped
    expected = torch.linspace(0, 0.2, 12, dtype=torch.float64).tolist()
    chosen = range(12) if blocks == "all" else range(8, 12)
    for found in rates.values():
        assert list(found) == list(chosen)
        assert [found[index] for index in chosen] == pytest.approx([expected[index] for index in chosen])
    if blocks == "all":
        every = [rate for found in rates.values() for rate in found.values()]
        assert len(every) == 24
        assert sum(every) / 24 == pytest.approx(0.1)


def test_branches_of_whole_clips_are_dropped():
    """With a high probability of dropping, what is left of AIM's joint branch is the same in all frames of a clip."""
    model = vp.VideoClassifier(vit(), vp.AIM(num_frames=3, drop_path=0.9), num_frames=3)
    randomise(model.peft["default"])
    joint = model.peft["default"].get_submodule("aim.visual.2.mlp_in").train()
    torch.manual_seed(0)
    left = (joint(torch.randn(300, 4, 32)).abs().amax(dim=(1, 2)) > 0).view(100, 3)
    assert torch.equal(left.any(1), left.all(1))
    assert 1 <= left[:, 0].sum() <= 30


# the papers in float64


def expected_features(host, clips, model, methods):
    """The reference's features of the frames."""
    fields = {method.name: dataclasses.asdict(method) for method in methods}
    tensors = {name: tensor.detach() for name, tensor in adapter_tensors(model).items()}
    with torch.no_grad():
        return frame_features(image_model(host, torch.float64), clips, tensors, fields)


@pytest.mark.parametrize("case", VIDEO_CASES, ids=repr)
@pytest.mark.parametrize("host", IMAGE_HOSTS, ids=repr)
def test_output_is_that_of_the_paper(host, case):
    """Features and logits are what the formulas say, on every model of images."""
    clips = torch.randn(2, 3, 3, *host.size, dtype=torch.float64)
    backbone = image_model(host, torch.float64)
    if case.name == "st_adapter_spatial" and host.name in ("vit_dynamic", "dinov3"):
        with pytest.raises(vp.ConfigurationError, match="fixed grid"):
            vp.VideoClassifier(backbone, case.method, num_frames=3)
        return
    torch.manual_seed(1)
    model = vp.VideoClassifier(backbone, case.method, num_frames=3, num_classes=CLASSES, dropout=0.5).eval()
    randomise(model.peft["default"])
    features = expected_features(host, clips, model, [case.method])
    with torch.no_grad():
        assert distance(model.frame_features(clips), features) < 1e-11
        head = model.head[1]
        expected = sum(features[:, t] for t in range(3)) / 3 @ head.weight.T + head.bias
        assert distance(model(clips), expected) < 1e-11


@pytest.mark.parametrize("case", VIDEO_CASES, ids=repr)
@pytest.mark.parametrize("name", ["vit_registers", "dinov3", "clip_visual", "beit"])
def test_gradients_are_those_of_the_paper(name, case):
    """Every tensor has the gradient of the formula."""
    host = BY_NAME[name]
    if case.name == "st_adapter_spatial" and name == "dinov3":
        pytest.skip("no fixed grid")
    clips = torch.randn(2, 3, 3, *host.size, dtype=torch.float64)
    model = vp.VideoClassifier(image_model(host, torch.float64), case.method, num_frames=3).eval()
    randomise(model.peft["default"])
    direction = torch.randn(2, 3, model.num_features, dtype=torch.float64)
    (model.frame_features(clips) * direction).sum().backward()
    copies = {n: t.detach().clone().requires_grad_() for n, t in adapter_tensors(model).items()}
    fields = {case.method.name: dataclasses.asdict(case.method)}
    (frame_features(image_model(host, torch.float64), clips, copies, fields) * direction).sum().backward()
    largest = max(t.grad.norm() for t in copies.values())
    for n, tensor in adapter_tensors(model).items():
        assert (tensor.grad - copies[n].grad).norm() < 1e-11 * largest, n


@pytest.mark.parametrize("name", ["vit_registers", "clip_visual", "beit", "eva_split"])
@pytest.mark.parametrize("reverse", [False, True])
def test_stack_with_image_methods(name, reverse):
    """Prompts stay out of the convolution, and what acts in the attention in space does not act in time."""
    host = BY_NAME[name]
    methods = [
        vp.VPT(num_tokens=2, deep=True),
        vp.STAdapter(4, positions=("before_attention", "before_mlp")),
        vp.LoRA(rank=2, targets=("q", "k", "v", "proj")),
        vp.SSF(),
        vp.PrefixTuning(num_tokens=2),
    ]
    without_prompts = [vp.AIM(num_frames=3), *methods[2:]]
    clips = torch.randn(2, 3, 3, *host.size, dtype=torch.float64)
    for stack in (methods, without_prompts):
        order = stack[::-1] if reverse else stack
        model = vp.VideoClassifier(image_model(host, torch.float64), order, num_frames=3).eval()
        randomise(model.peft["default"])
        with torch.no_grad():
            found = model.frame_features(clips)
        assert distance(found, expected_features(host, clips, model, stack)) < 1e-10


# the number of frames


def test_any_number_of_frames_for_st_adapter():
    """Adapters trained on clips of one length compute the formula on others."""
    host = BY_NAME["vit_cls"]
    method = vp.STAdapter(4)
    model = vp.VideoClassifier(image_model(host, torch.float64), method, num_frames=3).eval()
    randomise(model.peft["default"])
    for frames in (1, 2, 7):
        model.set_num_frames(frames)
        clips = torch.randn(2, 3, frames, 32, 32, dtype=torch.float64)
        with torch.no_grad():
            assert distance(model.frame_features(clips), expected_features(host, clips, model, [method])) < 1e-11


def test_aim_refuses_other_numbers_of_frames_unless_it_may_interpolate():
    """The embedding of time is interpolated linearly on request."""
    host = BY_NAME["vit_cls"]
    method = vp.AIM(num_frames=2)
    model = vp.VideoClassifier(image_model(host, torch.float64), method, num_frames=2).eval()
    randomise(model.peft["default"])
    clips = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)
    with pytest.raises(vp.ConfigurationError, match="the clips have 4 frames, but this model takes 2"):
        model(clips)
    model.set_num_frames(4)
    with pytest.raises(vp.ConfigurationError, match="no embedding of time for clips of 4 frames"):
        model(clips)
    model.set_num_frames(4, interpolate=True)
    tensors = {name: tensor.detach().clone() for name, tensor in adapter_tensors(model).items()}
    first, last = tensors["aim.visual.tokens.embedding"]
    tensors["aim.visual.tokens.embedding"] = torch.stack(
        [first, 0.75 * first + 0.25 * last, 0.25 * first + 0.75 * last, last]
    )
    expected = frame_features(
        image_model(host, torch.float64), clips, tensors, {"aim": dataclasses.asdict(method)}
    ).detach()
    with torch.no_grad():
        assert distance(model.frame_features(clips), expected) < 1e-11
        model.set_num_frames(2)
        assert model(clips[:, :, :2]).shape == (2, model.num_features)


def test_aim_of_another_length_is_refused_at_attach(tmp_path):
    """Nothing is changed where the numbers of frames differ; a saved adapter can be loaded to be interpolated."""
    model = vp.VideoClassifier(vit(), num_frames=4, num_classes=3)
    with pytest.raises(vp.ConfigurationError, match="AIM"):
        vp.attach(model, vp.AIM(num_frames=8))
    assert not hasattr(model, "peft")
    vp.attach(model, vp.AIM(num_frames=4))
    vp.save(model, tmp_path / "adapter")
    backbone = vp.detach(model).backbone
    other = vp.VideoClassifier(backbone, num_frames=6, num_classes=7)
    with pytest.raises(vp.ConfigurationError, match="AIM"):
        vp.load(other, tmp_path / "adapter")
    other.set_num_frames(6, interpolate=True)
    vp.load(other, tmp_path / "adapter")
    assert other(torch.randn(2, 3, 6, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("std", [0.02, 0.01])
def test_first_weights_of_the_head(std):
    """N(0, .02^2) of ST-Adapter by default, N(0, .01^2) of AIM."""
    torch.manual_seed(0)
    made = vp.VideoClassifier(vit(), num_classes=2000, **({} if std == 0.02 else {"head_std": std}))
    assert made.head[1].weight.std().item() == pytest.approx(std, rel=0.02)
    assert not made.head[1].bias.any()
    with pytest.raises(vp.ConfigurationError, match="head_std"):
        vp.VideoClassifier(vit(), num_classes=2, head_std=-1.0)


def test_a_copy_has_its_own_number_of_frames():
    """Changing a copy leaves the original as it was."""
    model = vp.VideoClassifier(vit(), vp.STAdapter(4), num_frames=2)
    twin = copy.deepcopy(model)
    twin.set_num_frames(5)
    assert model(torch.randn(1, 3, 2, 32, 32)).shape == twin(torch.randn(1, 3, 5, 32, 32)).shape


# the classifier


@pytest.mark.parametrize(
    "method", [vp.LinearProbe(), vp.VPT(num_tokens=2), vp.LoRA(), vp.AdaptFormer(bottleneck=4)], ids=repr
)
def test_methods_of_images_act_frame_by_frame(method):
    """The logits are the head on the mean of what an adapted model of images gives for each frame."""
    plain = vit(num_classes=0)
    model = vp.VideoClassifier(copy.deepcopy(plain), method, num_frames=3, num_classes=4, dropout=0.0).eval()
    randomise(model.peft["default"])
    images = plain.eval()
    if not isinstance(method, vp.LinearProbe):
        images = vp.attach(plain, method).eval()
        own = {n: t for n, t in model.peft["default"].state_dict().items() if not n.startswith("head.")}
        images.peft["default"].load_state_dict(own)
    clips = torch.randn(2, 3, 3, 32, 32)
    with torch.no_grad():
        mean = torch.stack([images(clips[:, :, t]) for t in range(3)]).mean(0)
        assert distance(model(clips), model.head(mean)) < 1e-6
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "peft.default.head.1.weight" in trainable  # the copy; the model's own head is frozen
    assert not any(n.startswith("backbone.") for n in trainable)


def test_what_image_classifiers_read_is_averaged():
    """Features are those in front of the classifier, whatever the backbone, and its classifier stays as it is."""
    clips = torch.randn(2, 3, 3, 32, 32)
    backbone = vit(global_pool="avg", num_classes=9).eval()
    head = backbone.head
    tower = clip().visual.eval()
    classifier = ImageClassifier(clip().visual, num_classes=9).eval()
    width = {backbone: 32, tower: 16, classifier: 32}
    for model, features in width.items():
        made = vp.VideoClassifier(model, vp.LoRA(rank=2), num_frames=3, num_classes=4).eval()
        with torch.no_grad():
            assert made.num_features == features
            assert made.forward_features(clips).shape == (2, features)
            assert made(clips).shape == (2, 4)
        assert "trainable" in str(vp.summary(made))
    assert backbone.head is head


def test_the_classifier_of_the_backbone_does_not_matter_to_a_saved_adapter(tmp_path):
    """An adapter of clips loads on the same backbone with another classifier of images."""
    backbone = vit(num_classes=9).eval()
    other = vit(num_classes=0).eval()
    other.load_state_dict({n: t for n, t in backbone.state_dict().items() if not n.startswith("head.")})
    model = vp.VideoClassifier(backbone, vp.STAdapter(4), num_frames=2, num_classes=3).eval()
    randomise(model.peft["default"])
    vp.save(model, tmp_path / "adapter")
    again = vp.VideoClassifier(other, num_frames=2).eval()
    vp.load(again, tmp_path / "adapter")
    clips = torch.randn(2, 3, 2, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(clips), model(clips))


def test_hooks_of_others_fire_once():
    """The attention over time does not count as a call of the attention."""
    model = vp.VideoClassifier(vit(), vp.AIM(num_frames=2), num_frames=2)
    calls = []
    model.backbone.blocks[0].attn.register_forward_hook(lambda module, *_: calls.append(module))
    model(torch.randn(1, 3, 2, 32, 32))
    assert len(calls) == 1


# refusing


@pytest.mark.parametrize("method", [vp.STAdapter(4), vp.AIM()], ids=repr)
def test_models_of_images_are_refused(method):
    """A model of single images has no frames to mix."""
    model = vit()
    with pytest.raises(vp.UnsupportedError, match="takes single images; attach it to a VideoClassifier"):
        vp.attach(model, method)
    assert not hasattr(model, "peft")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_images_are_refused():
    """A batch of images is no clip, nor is a batch that is not whole clips given to the backbone inside."""
    model = vp.VideoClassifier(vit(), vp.STAdapter(4), num_frames=2)
    with pytest.raises(vp.ConfigurationError, match="takes clips"):
        model(torch.randn(2, 3, 32, 32))
    with pytest.raises(vp.ConfigurationError, match="3 images is not whole clips of 2 frames"):
        model.backbone(torch.randn(3, 3, 32, 32))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: vp.VideoClassifier(clip()), "give its image tower"),
        (lambda: vp.VideoClassifier(torch.nn.Linear(2, 2)), "not a Linear"),
        (lambda: vp.VideoClassifier(vit(), num_frames=0), "num_frames"),
        (lambda: vp.VideoClassifier(vit(), num_classes=-1), "num_classes"),
        (lambda: vp.VideoClassifier(vit(), dropout=1.0), "dropout"),
        (lambda: vp.STAdapter(0), "bottleneck"),
        (lambda: vp.STAdapter(kernel=(2, 1, 1)), "odd"),
        (lambda: vp.STAdapter(kernel=(3, 3)), "kernel must be a list of 3 integers"),
        (lambda: vp.STAdapter(positions=()), "positions"),
        (lambda: vp.STAdapter(positions="before_mlp"), "positions"),
        (lambda: vp.STAdapter(positions=("after_mlp",)), "before_attention, before_mlp"),
        (lambda: vp.AIM(ratio=0), "ratio"),
        (lambda: vp.AIM(num_temporal=3), "num_temporal"),
        (lambda: vp.AIM(drop_path=1.0), "drop_path"),
        (lambda: vp.AIM(num_frames=0), "num_frames"),
    ],
)
def test_what_makes_no_sense_is_refused(make, sentence):
    """One sentence that says what is allowed."""
    with pytest.raises(vp.UserError, match=sentence):
        make()


def test_spatial_kernel_needs_all_patches():
    """Where patches are missing there is no grid."""
    model = vp.VideoClassifier(vit(patch_drop_rate=0.5), vp.STAdapter(4, kernel=(3, 3, 3)), num_frames=2)
    with pytest.raises(vp.UnsupportedError, match="needs the 4 x 4 patches"):
        model.train()(torch.randn(1, 3, 2, 32, 32))


def test_block_without_attention_as_a_function_is_refused():
    """A family registered by a user need not offer it; then AIM says so, and other methods work."""

    class MyBlock(Block):
        """A block of a user's."""

    class SitedMyBlock(MyBlock):
        """Its sited form, with the sites alone."""

        def forward(self, x, attn_mask=None, is_causal=False):
            at = self.sites.enter()
            x = at("stream_in", x)
            x = at("stream_mid", x + at("attn_out", self.attn(at("attn_in", self.norm1(x)))))
            return at("stream_out", x + at("mlp_out", self.mlp(at("mlp_in", self.norm2(x)))))

    describe_block.register(MyBlock, lambda block: pre_norm_block(block, SitedMyBlock))
    model = vp.VideoClassifier(vit(block_fn=MyBlock), num_frames=8)
    with pytest.raises(vp.UnsupportedError, match="AIM uses the attention of a block twice, but SitedMyBlock"):
        vp.attach(model, vp.AIM())
    assert not hasattr(model, "peft")
    vp.attach(model, vp.STAdapter(4))
