"""Image towers in bfloat16 on a CPU, watched at PyTorch's own operations; torch 2.14.1, open_clip_torch 3.3.0."""

import copy

import pytest
import torch
from clip_reference import NAMES, VISION, clip_model, images, tokenizer
from open_clip import CoCa
from open_clip.model import convert_weights_to_lp
from torch.utils._python_dispatch import TorchDispatchMode

from visionpeft.clip.learners import PLOT, TPT, CoOp, MaPLe, ZeroShot
from visionpeft.errors import UnsupportedError

POOLED = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2, "output_tokens": True}
TOKENS = (4, 5)  # of the pool's queries, and of an image; never the size of a batch here


class Products(TorchDispatchMode):
    """Counts the products that are made once for each token with the weight expanded to so many."""

    def __init__(self):
        super().__init__()
        self.all, self.by_token = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm, torch.ops.aten.addmm):
            self.all += 1
            self.by_token += any(len(x) in TOKENS and x.ndim == 3 and x.stride(0) == 0 for x in args)
        return function(*args, **(kwargs or {}))


def products(encode, autocast=True):
    """Products of an encoder without a graph: all, and those made by token."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), Products() as counted:
        encode()
    return counted.all, counted.by_token


def coca(**options):
    """A CoCa, whose image tower pools by an attention of its own."""
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, "embed_cls": True}
    text["output_tokens"] = True
    decoder = {"context_length": 76, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return CoCa(64, decoder, text, VISION | POOLED | {"layers": 3}, **options).eval()


def test_a_coca_with_which_openclip_cannot_compute_is_refused():
    """As `create_model` builds it with precision="bf16"; whole in bfloat16 it is the float32 one, rounded."""
    mixed, x = coca(cast_dtype=torch.bfloat16), images(2, dtype=torch.float32)
    convert_weights_to_lp(mixed, torch.bfloat16)
    with pytest.raises(RuntimeError, match="same dtype"), torch.no_grad():
        mixed.encode_image(x.bfloat16())
    with pytest.raises(UnsupportedError, match='build it with "pure_bf16"'):
        ZeroShot(mixed, tokenizer(), NAMES)
    pure, exact = (ZeroShot(clip, tokenizer(), NAMES) for clip in (coca().bfloat16(), coca()))
    with torch.no_grad():
        near, expected = pure(x).float(), exact(x)
    assert (near - expected).norm() < 0.05 * (expected - expected.mean()).norm()
    CoOp(pure.clip, tokenizer(), NAMES)  # whose context is float32, as are adapters
    MaPLe(coca().bfloat16(), tokenizer(), NAMES, depth=1)


def plain():
    return clip_model(dtype=torch.float32)


@pytest.mark.parametrize("make_clip", [plain, coca])
@pytest.mark.parametrize("cast", [False, True], ids=["autocast", "cast"])
def test_frozen_weights_are_not_copied_for_each_token(make_clip, cast):
    """The negative control: OpenCLIP's own call does so in both of its blocks."""
    clip = make_clip()
    clip = clip.bfloat16() if cast else clip
    learner, x = ZeroShot(clip, tokenizer(), NAMES), images(2, dtype=torch.float32)
    clip.train()  # else attention in bfloat16 without autocast is one function of PyTorch's
    count, by_token = products(lambda: learner.encode_images(x), autocast=not cast)
    assert count > 8
    assert by_token == 0
    assert products(lambda: clip.encode_image(x.bfloat16() if cast else x), autocast=not cast)[1] >= 2


@pytest.mark.parametrize(
    ("learner_class", "x"), [(PLOT, images(2)), (TPT, images(6).unflatten(0, (2, 3)))], ids=["PLOT", "TPT"]
)
def test_learners_that_read_the_tower_in_their_own_way(learner_class, x):
    learner = learner_class(plain(), tokenizer(), NAMES)
    count, by_token = products(lambda: learner.image_features(x.float()))
    assert count > 8
    assert by_token == 0


@pytest.mark.parametrize("make_clip", [plain, coca])
def test_the_values_are_those_of_openclip(make_clip):
    clip = make_clip()
    expected, x = copy.deepcopy(clip), images(3, dtype=torch.float32)
    learner = ZeroShot(clip, tokenizer(), NAMES)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = learner.encode_images(x).float(), expected.encode_image(x, normalize=False).float()
        other = expected.encode_image(x.flip(0), normalize=False).float()
    assert (ours - theirs).norm() < 0.02 * theirs.norm() < 0.2 * (other - theirs).norm()


def test_nothing_is_left_on_the_tower_and_float32_is_not_touched():
    clip, x = plain(), images(2, dtype=torch.float32)
    learner = ZeroShot(clip, tokenizer(), NAMES)
    hooked = []
    probe = clip.visual.ln_post.register_forward_pre_hook(
        lambda *_: hooked.append(len(clip.visual.transformer.resblocks[0].attn._forward_pre_hooks))
    )
    with torch.no_grad():
        learner.encode_images(x)
        with torch.autocast("cpu", torch.bfloat16):
            learner.encode_images(x)
    probe.remove()
    assert hooked == [0, 1]
    assert not any(module._forward_pre_hooks for module in clip.modules())
    with torch.no_grad():
        assert torch.equal(learner.encode_images(x), clip.encode_image(x))
