"""VQT: queries that nobody sees, and a head over what they get. Its formula is tested with all methods."""

import threading

import pytest
import torch
from conftest import HOSTS, distance, randomise
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import visionpeft as vp
from visionpeft.errors import UnsupportedError
from visionpeft.sites import Sites

BY_HOST = {host.name: host for host in HOSTS}
HOST = BY_HOST["vit_cls"]
IMAGES = HOST.inputs(2, torch.float64)


def queried(host=HOST, num_tokens=1):
    """A host with VQT off its start, in eval mode."""
    model = vp.attach(host.build(torch.float64), vp.VQT(num_tokens))
    randomise(model.peft["default"])
    return model.eval()


def between_blocks(model, images):
    """The tokens that leave each block."""
    seen = []
    handles = [block.register_forward_hook(lambda block, inputs, output: seen.append(output)) for block in model.blocks]
    model.forward_features(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "host", [h for h in HOSTS if h.name in ("vit_registers", "vit_res_post", "eva_split")], ids=repr
)
def test_the_tokens_of_the_backbone_are_what_they_are_without(host):
    """To the bit after every block, and without a gradient; prompts that are seen change them."""
    images = host.inputs(2, torch.float64)
    expected = between_blocks(host.build(torch.float64), images)
    found = between_blocks(queried(host), images)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    assert not any(tokens.requires_grad for tokens in found)
    prompted = between_blocks(vp.attach(host.build(torch.float64), vp.VPT(1)), images)
    assert not torch.equal(prompted[0], expected[0])


@pytest.mark.parametrize("entering", [0, 1])
def test_a_query_that_is_the_class_token_gets_what_the_class_token_gets(entering):
    """With one image, Q_l is the class token (or, for the control, a patch's) that enters block l."""
    model, image = HOST.build(torch.float64), IMAGES[:1]
    entered, left = [], []
    handles = [b.register_forward_pre_hook(lambda block, inputs: entered.append(inputs[0])) for b in model.blocks]
    handles += [b.register_forward_hook(lambda block, inputs, output: left.append(output)) for b in model.blocks]
    pooled = model.forward_head(model.forward_features(image), pre_logits=True)
    for handle in handles:
        handle.remove()
    vp.attach(model, vp.VQT()).eval()
    randomise(model.peft["default"])
    with torch.no_grad():
        for index, tokens in enumerate(entered):
            model.peft["default"].vqt.visual[str(index)].kv.prompts.copy_(tokens[:, entering])
    parts = [pooled, *(tokens[:, 0] for tokens in left)]
    head = model.peft["default"].head
    expected = torch.cat([part / part.norm() for part in parts], dim=-1) @ head.weight.T + head.bias
    difference = distance(model(image), expected)
    assert difference < 1e-12 if entering == 0 else difference > 1e-3


def test_gradients_are_those_of_keys_and_values_that_are_kept():
    """Also when they are differentiated again. With images that have a gradient nothing is made again."""
    model = queried(num_tokens=2)
    prompts = model.peft["default"].vqt.visual["1"].kv.prompts
    found = []
    for images in (IMAGES, IMAGES.clone().requires_grad_()):
        (first,) = torch.autograd.grad(model(images).square().sum(), prompts, create_graph=True)
        found.append((first.detach(), *torch.autograd.grad(first.square().sum(), prompts)))
    for left, right in zip(*found, strict=True):
        assert right.abs().max() > 1e-6
        assert distance(left, right) < 1e-10


def test_the_head_starts_from_that_of_the_model():
    """The columns for the pooled features and the bias are the model's; the others have the bound of a linear layer."""
    model = HOST.build()
    vp.attach(model, vp.VQT(2))
    head = model.peft["default"].head
    assert head.weight.shape == (5, 32 * (1 + 3 * 2))
    assert torch.equal(head.weight[:, :32], model.head._parameters["weight"])
    assert torch.equal(head.bias, model.head._parameters["bias"])
    bound = (32 * 7) ** -0.5
    assert 0.95 * bound < head.weight[:, 32:].abs().max() <= bound


def test_threads_do_not_meet():
    """Several passes at the same time give what each gives alone."""
    model = queried()
    batches = [HOST.inputs(2, torch.float64, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(images) for images in batches]
        found = [[] for _ in batches]

        def run(number):
            with torch.no_grad():
                found[number] += [model(batches[number]) for _ in range(5)]

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(output, own) for outputs, own in zip(found, expected, strict=True) for output in outputs)
    assert not torch.equal(expected[0], expected[1])


def test_pooled_features_alone_are_refused():
    """The head needs a whole pass, and what one pass has brought is not read twice."""
    model = queried()
    features = model.forward_features(IMAGES)
    model.forward_head(features)
    with pytest.raises(UnsupportedError, match="call the whole model"):
        model.forward_head(features)
    model.set_grad_checkpointing(True)
    with set_checkpoint_early_stop(False):  # and all of them to their end
        model(IMAGES).square().sum().backward()  # computes the blocks again
    with pytest.raises(UnsupportedError, match="call the whole model"):
        model.forward_head(features)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_model_is_checkpointed(reentrant):
    """Its blocks and its head are computed again in the backward pass, where the head found nothing from the blocks."""
    model = queried()
    images = IMAGES.clone().requires_grad_()  # or a reentrant checkpoint would have no gradient at all
    model(images).square().sum().backward()
    expected = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    for _ in range(2):
        model.zero_grad()
        checkpoint(model, images, use_reentrant=reentrant).square().sum().backward()
        found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], value, rtol=1e-10, atol=0) for name, value in expected.items())


def test_a_model_that_does_not_pool_is_refused():
    """It gives its head one vector for each token; a pooled one is taken (negative control)."""
    model = queried()
    model(IMAGES)
    model.global_pool = ""
    with pytest.raises(UnsupportedError, match="one vector for each image"):
        model(IMAGES)


def several_layers():
    model = HOST.build()
    model.head = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.GELU(), torch.nn.Linear(8, 5))
    return model


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (HOST.build, {"head": False}, "head=True"),
        (BY_HOST["clip_visual"].build, {}, "one linear head"),
        (several_layers, {}, "not of a Sequential"),
        (HOST.build, {"train": ("norm",)}, "acts alone"),
        (lambda: vp.attach(HOST.build(), vp.LoRA(2), "lora"), {}, "acts alone"),
        (lambda: vp.attach(HOST.build(), vp.LinearProbe(), "probe"), {}, "acts alone"),
        (lambda: vp.VideoClassifier(HOST.build(), num_frames=2), {}, "clips"),
        (BY_HOST["clip_text"].build, {}, "no patches"),
    ],
    ids=["no_head", "clip", "layers", "train", "beside", "two_heads", "video", "text"],
)
def test_what_cannot_be_is_refused_in_words(make, options, words):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedError, match=words):
        vp.attach(model, vp.VQT(), **options)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_another_adapter_beside_it_is_refused():
    """It may be attached and used by turns."""
    model = queried()
    before = model(IMAGES)
    with pytest.raises(UnsupportedError, match="'default'"):
        vp.attach(model, vp.LoRA(2), "lora")
    assert torch.equal(model(IMAGES), before)
    vp.disable(model)
    vp.attach(model, vp.LoRA(2), "lora")
    with pytest.raises(UnsupportedError, match="activate no other"):
        vp.activate(model, ["lora", "default"])
    vp.activate(model, "default")
    assert torch.equal(model(IMAGES), before)


def test_an_attention_that_hands_out_keys_alone_is_refused():
    """As a family of a user's may: without what it reads, keys and values could not be made again."""
    sites = Sites(num_prefix_tokens=1, causal=False)
    k = torch.zeros(1, 2, 3, 4)
    sites.asking = lambda *given: None
    with pytest.raises(UnsupportedError, match=r"must call sites.kv\(k, v, h\)"):
        sites.kv(k, k)
    assert sites.kv(k, k, torch.zeros(1, 3, 8))[0] is k
