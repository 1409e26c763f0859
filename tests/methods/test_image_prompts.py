"""Prompts and adapters of images: options and hosts beside the matrix, and what must hold by their papers."""

import dataclasses

import pytest
import timm
import torch
from conftest import distance, randomise
from reference import edits_of, forward, shapes_of
from reference.hosts import HOSTS, vit
from torch.utils.flop_counter import FlopCounterMode

import visionpeft as vp
from visionpeft.errors import UserError
from visionpeft.methods.coda import soft_top_k
from visionpeft.methods.mona import MultiCognitiveAdapter
from visionpeft.tasks.optimisation import output_side

BY_NAME = {host.name: host for host in HOSTS}
HOST = BY_NAME["vit_cls"]


def stacked(host, *methods):
    """A model with these methods stacked, off their start, in float64."""
    torch.manual_seed(2)
    model = vp.attach(host.build(torch.float64), list(methods), head=False)
    randomise(model.peft["default"])
    return model.eval()


def output(model, host=HOST, seed=0):
    with torch.no_grad():
        return model(host.inputs(dtype=torch.float64, seed=seed))


def at(model, method, block, site):
    """A module of the adapter."""
    return model.peft["default"].get_submodule(f"{method}.visual.{block}.{site}")


GRID = {"grid": (5, 3)}  # of vit_dynamic, which takes images of any size


@pytest.mark.parametrize(
    ("host", "methods"),
    [
        ("vit_dynamic", [vp.Mona(3, **GRID), vp.VPT(2, deep=False)]),
        ("vit_registers", [vp.Mona(3), vp.VPT(2)]),
        ("vit_registers", [vp.AdaptFormer(4, before_scaling=True)]),
        ("vit_res_post", [vp.AdaptFormer(4, before_scaling=True)]),
        ("beit", [vp.E2VPT(num_tokens=2, num_keys=3, shared=True)]),
        ("vit_map", [vp.LPT(num_tokens=2, bottleneck=3, start=2)]),
        ("vit_registers", [vp.LPT(num_tokens=3, bottleneck=3, reads="patches")]),
        ("dinov3", [vp.PrefixPropagation(num_tokens=2, keep=0.5)]),
        ("vit_map", [vp.IDPG(num_tokens=2, bottleneck=8, terms=4)]),
        ("vit_registers", [vp.SMoP(experts=3, num_tokens=2), vp.APT(num_tokens=2)]),
        ("vit_map", [vp.APT(num_tokens=2)]),
        ("vit_dynamic", [vp.PixelPrompt(width=3, **GRID), vp.SSF()]),
        ("dinov3", [vp.DecomposedPromptTuning(num_tokens=2, rank=3, grid=(4, 3))]),
        ("vit_res_post", [vp.CIAT(bottleneck=3, activation="silu"), vp.LoRA(rank=2)]),
        ("vit_registers", [vp.CoDA(bottleneck=3, reduction=2), vp.LoRA(rank=2)]),
        ("vit_avg", [vp.CoDA(bottleneck=3, reduction=5, blocks=[1, 2])]),
        ("vit_pre_norm", [vp.CIAT(bottleneck=3), vp.DecomposedPromptTuning(num_tokens=2, rank=1)]),
    ],
    ids=repr,
)
def test_formula(host, methods):
    """Options, registers, other prompts, no class token, a grid that is not square: as in the transcription."""
    host = BY_NAME[host]
    model, plain = stacked(host, *methods), host.build(torch.float64)
    tensors = {name: p.detach() for name, p in model.peft["default"].named_parameters()}
    fields = {method.name: dataclasses.asdict(method) for method in methods}
    expected = forward(plain, host.inputs(dtype=torch.float64), edits_of(tensors, fields, shapes_of(plain)))
    assert distance(output(model, host), expected) < 1e-11


# Mona


def mona(grid=(9, 9)):
    torch.manual_seed(0)
    module = MultiCognitiveAdapter(4, 3, grid, 0.0).double().eval()
    randomise(module)
    return module


@torch.no_grad()
def change(module, image):
    """What it adds to an image (rows, columns, 4) of patches after one class token."""
    x = torch.cat((torch.zeros(1, image.shape[-1], dtype=image.dtype), image.flatten(0, 1)))[None]
    return (module(x, 1) - x)[0, 1:].unflatten(0, image.shape[:2])


def test_mona_without_convolutions_is_a_bottleneck_of_a_scaled_norm():
    module, image = mona(), torch.randn(9, 9, 4, dtype=torch.float64)
    with torch.no_grad():
        for part in (*module.depthwise, module.pointwise):
            part.weight.zero_()
            part.bias.zero_()
        u = module.norm_scale * module.norm(image) + module.scale * image
        assert distance(change(module, image), module.up(torch.nn.functional.gelu(module.down(u)))) < 1e-12
        module.depthwise[1].bias.add_(0.1)
        assert distance(change(module, image), module.up(torch.nn.functional.gelu(module.down(u)))) > 1e-3


def test_mona_moves_inner_patches_of_a_constant_image_alike():
    """Kernels of 7 x 7 reach three patches: further in all see the same, nearer they see the border."""
    delta = change(mona(), torch.randn(4, dtype=torch.float64).expand(9, 9, 4))
    inner = delta[3:6, 3:6].flatten(0, 1)
    assert (inner - inner[0]).abs().max() < 1e-12
    assert (delta[2, 3:6] - inner[0]).abs().max() > 1e-4


@pytest.mark.parametrize("symmetric", [True, False])
def test_mona_transposes_with_symmetric_kernels(symmetric):
    module, image = mona((9, 9)), torch.randn(9, 9, 4, dtype=torch.float64)
    if symmetric:
        with torch.no_grad():
            for each in module.depthwise:
                each.weight.copy_((each.weight + each.weight.mT) / 2)
    same = distance(change(module, image.transpose(0, 1)), change(module, image).transpose(0, 1)) < 1e-12
    assert same == symmetric


def test_mona_starts_as_published():
    module = MultiCognitiveAdapter(4, 3, (2, 2), 0.1)
    assert torch.equal(module.norm_scale, torch.full((4,), 1e-6))
    assert torch.equal(module.scale, torch.ones(4))
    assert all(each.weight.abs().max() <= each.kernel_size[0] ** -1 for each in module.depthwise)
    assert module.up.weight.any()


# prompts that travel


def copy_prompts(model, method, tokens):
    """Give the prompts of each block to a method with such modules at `stream_in`."""
    with torch.no_grad():
        for block, own in tokens.items():
            at(model, method, block, "stream_in").prompts.copy_(own)


def test_propagation_is_deep_or_shallow_at_its_ends():
    deep = stacked(HOST, vp.PrefixPropagation(num_tokens=3, keep=0.0))
    tokens = {block: at(deep, "prefix_propagation", block, "stream_in").source.prompts for block in range(3)}
    other = stacked(HOST, vp.VPT(num_tokens=3))
    copy_prompts(other, "vpt", tokens)
    assert distance(output(deep), output(other)) < 1e-12
    travelling = stacked(HOST, vp.PrefixPropagation(num_tokens=3))
    assert distance(output(travelling), output(other)) > 1e-3  # with keep = 1 it is another function
    shallow = stacked(HOST, vp.VPT(num_tokens=3, deep=False))
    copy_prompts(shallow, "vpt", {0: at(travelling, "prefix_propagation", 0, "stream_in").source.prompts})
    with torch.no_grad():
        for block in (1, 2):
            at(travelling, "prefix_propagation", block, "stream_in").source.prompts.zero_()
    assert distance(output(travelling), output(shallow)) < 1e-12


def test_prompts_that_travel_keep_their_place_beside_others():
    """Beside deep prompts, which enter after them and before them in the sequence: with keep = 0 as more of those."""
    model = stacked(HOST, vp.VPT(num_tokens=2), vp.PrefixPropagation(num_tokens=3, keep=0.0))
    more = stacked(HOST, vp.VPT(num_tokens=5))
    both = {}
    for block in range(3):
        own = at(model, "prefix_propagation", block, "stream_in").source.prompts
        both[block] = torch.cat((at(model, "vpt", block, "stream_in").prompts, own))
    copy_prompts(more, "vpt", both)
    assert distance(output(model), output(more)) < 1e-12
    with torch.no_grad():
        both[1][-1] += torch.randn(32, dtype=torch.float64)  # a constant would be taken out by the norm
    copy_prompts(more, "vpt", both)
    assert distance(output(model), output(more)) > 1e-4


def test_late_prompts_leave_everything_below_alone():
    """Tokens that reach block m are the backbone's to the bit, and no gradient goes below it."""
    model, plain = stacked(HOST, vp.LPT(num_tokens=2, bottleneck=3, start=2)), HOST.build(torch.float64)
    seen = []
    for each in (model, plain):
        for block in each.blocks[1:]:
            block.register_forward_hook(lambda module, args, result: seen.append((args[0], result)))
        each(HOST.inputs(dtype=torch.float64))
    (below, late), (_, late_result), (plain_below, plain_late), _ = [(a, b) for a, b in seen]
    assert torch.equal(below, plain_below)
    assert torch.equal(late, plain_late)
    assert not below.requires_grad
    assert not late.requires_grad
    assert late_result.requires_grad


def test_late_prompts_are_those_of_the_class_token():
    """Images of one class token get the same prompts, others do not; a generator of zeros and a bias is VPT-shallow."""
    source = at(stacked(HOST, vp.LPT(num_tokens=2, bottleneck=3)), "lpt", 1, "stream_in").source
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    x[1, 0] = x[0, 0]
    with torch.no_grad():
        first, second = source(x, 1)
        assert torch.equal(first, second)
        x[1, 0] += 1
        assert (source(x, 1)[1] - first).abs().max() > 1e-4
    model, shallow = stacked(HOST, vp.LPT(2, 3, start=0)), stacked(HOST, vp.VPT(2, deep=False))
    source = at(model, "lpt", 0, "stream_in").source
    with torch.no_grad():
        source.up.weight.zero_()
    copy_prompts(shallow, "vpt", {0: source.up.bias.unflatten(0, (2, -1))})
    assert distance(output(model), output(shallow)) < 1e-12


@pytest.mark.parametrize("class_token", [False, True], ids=["registers alone", "class token"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        (vp.LPT(num_tokens=2, bottleneck=3), "lpt.visual.1.stream_in.source"),
        (vp.IDPG(num_tokens=2, terms=4), "idpg.visual.1.stream_in.source"),
        (vp.APT(num_tokens=2), "apt.visual.1.kv"),
    ],
    ids=["LPT", "IDPG", "APT"],
)
def test_registers_without_a_class_token_stand_for_no_image(method, path, class_token):
    """timm's models with registers that pool patches (reg4_gap) have tokens before the patches and no class token: an
    image is then the mean of its patches, or of all its tokens, and not the first register.
    """
    torch.manual_seed(0)
    model = vit(reg_tokens=2, class_token=class_token, global_pool="avg").double()
    acts = vp.attach(model, method).peft["default"].get_submodule(path)
    first = 2 + class_token
    x = torch.randn(2, first + 16, 32, dtype=torch.float64)
    x[1] = x[0]
    x[1, 0] += 1  # of the second image the first token is another one, and all tokens have the mean that they had
    x[1, 1] -= 1
    with torch.no_grad():
        if isinstance(method, vp.APT):
            k = v = torch.zeros(2, 4, first + 16, 8, dtype=torch.float64)
            one, other = acts(k, v, x)[0]
        else:
            one, other = acts(x, first)
    assert torch.allclose(one, other, rtol=1e-12, atol=1e-12) is not class_token


def test_idpg_without_matrices_is_prefix_propagation():
    model, propagated = stacked(HOST, vp.IDPG(num_tokens=3, terms=4)), stacked(HOST, vp.PrefixPropagation(num_tokens=3))
    with torch.no_grad():
        for block in range(3):
            own = at(propagated, "prefix_propagation", block, "stream_in").source.prompts
            own.copy_(at(model, "idpg", block, "stream_in").source.c)
        assert distance(output(model), output(propagated)) > 1e-4
        generator = model.peft["default"].get_submodule("idpg.visual.generator")
        generator.up.S.zero_()
    assert distance(output(model), output(propagated)) < 1e-12


def test_p_tuning_is_saved_as_shallow_prompts(tmp_path):
    """The file has no MLP, loads as `VPT(deep=False)`, and gives the same to the bit."""
    model = stacked(HOST, vp.PTuning(num_tokens=3, hidden=5))
    vp.save(model, tmp_path / "adapter")
    fresh = HOST.build(torch.float64)
    vp.load(fresh, tmp_path / "adapter")
    assert isinstance(fresh.peft["default"].methods[0], vp.VPT)
    assert [tuple(p.shape) for p in fresh.peft["default"].parameters() if p.shape[-1] == 32] == [(3, 32)]
    assert torch.equal(output(model), output(fresh.eval()))
    with torch.no_grad():
        at(model, "ptuning", 0, "stream_in").source.embedding.mul_(-1)
    assert not torch.equal(output(model), output(fresh))


def test_decomposed_change_of_positions_is_a_position_embedding():
    """Added to the model's own, the rest is `VPT(deep=False)`; images of other sizes are refused."""
    model = stacked(HOST, vp.DecomposedPromptTuning(num_tokens=3, rank=2, alpha=5.0))
    shallow = stacked(HOST, vp.VPT(num_tokens=3, deep=False))
    copy_prompts(shallow, "vpt", {0: at(model, "decomposed_prompt_tuning", 0, "stream_in").source.prompts})
    assert distance(output(model), output(shallow)) > 1e-3
    change = model.peft["default"].get_submodule("decomposed_prompt_tuning.visual.tokens")
    with torch.no_grad():
        shallow.pos_embed += 5.0 / 2**0.5 * change.A @ change.B
    assert distance(output(model), output(shallow)) < 1e-12
    dynamic = vp.attach(BY_NAME["vit_dynamic"].build(), vp.DecomposedPromptTuning(2, **GRID))
    with pytest.raises(vp.UnsupportedError, match="changes 16 positions, but there are 17 tokens"):
        dynamic(torch.zeros(1, 3, 32, 32))


def test_prompts_of_decomposed_tuning_may_learn_at_their_own_rate():
    """What LoRA+ is about is what the authors have a rate of its own for: the prompts."""
    model = vp.attach(HOST.build(), vp.DecomposedPromptTuning(num_tokens=3), head=False)
    assert [tuple(each.shape) for each in output_side(model)] == [(3, 32)]


def test_smop_of_one_set_is_vpt_and_of_several_gives_each_image_its_own():
    one, shallow = stacked(HOST, vp.SMoP(experts=1, num_tokens=3)), stacked(HOST, vp.VPT(3, deep=False))
    copy_prompts(shallow, "vpt", {0: at(one, "smop", 0, "stream_in").source.prompts[0]})
    assert distance(output(one), output(shallow)) < 1e-12
    source = at(stacked(HOST, vp.SMoP(experts=2, num_tokens=3)), "smop", 0, "stream_in").source
    with torch.no_grad():
        source.router.zero_()
        source.router[:, 0] = torch.tensor([1.0, -1.0])
        x = torch.zeros(2, 17, 32, dtype=torch.float64)
        x[0, 1:, 0], x[1, 1:, 0] = 2.0, -2.0
        share = 1 / (1 + torch.exp(torch.tensor(-4.0, dtype=torch.float64)))
        assert distance(source(x, 1), share * source.prompts) < 1e-12
        assert torch.equal(source.eval()(x, 1), source(x, 1))
        torch.manual_seed(0)
        x[:, 1:, 0] = 0.01
        drawn = source.train()(x.expand(2, -1, -1), 1)
        assert not torch.equal(drawn, source.eval()(x, 1))  # noise is for training alone


def test_routers_of_smop_start_orthogonal():
    model = vp.attach(HOST.build(), vp.SMoP(experts=4), head=False)
    router = at(model, "smop", 0, "stream_in").source.router
    torch.testing.assert_close(router @ router.T, torch.eye(4))


# pixels


def test_a_frame_is_added_to_the_image():
    """As if timm's own model were given the framed image; patches inside the border stay to the bit."""
    method = vp.PixelPrompt(width=5)
    model, plain = stacked(HOST, method), HOST.build(torch.float64)
    frame = model.peft["default"].get_submodule("pixel_prompt.visual.patch_embed")
    x = HOST.inputs(dtype=torch.float64)
    with torch.no_grad():
        image = frame.image()
        assert not image[:, 5:-5, 5:-5].any()
        assert image[:, 4].all()
        assert image[:, :, -5].all()
        assert sum(p.numel() for p in frame.parameters()) == int(image.count_nonzero())
        assert distance(model(x), plain(x + image)) < 1e-12
        assert distance(model(x), plain(x)) > 1e-3
        own, given = plain.patch_embed(x).unflatten(1, (4, 4)), model.patch_embed(x).unflatten(1, (4, 4))
    assert torch.equal(own[:, 1:-1, 1:-1], given[:, 1:-1, 1:-1])
    assert not (own[:, 0] == given[:, 0]).all(dim=-1).any()


# keys, values and prompts


def test_apt_with_open_gates_is_prefix_tuning():
    model, prefix = stacked(HOST, vp.APT(num_tokens=3)), stacked(HOST, vp.PrefixTuning(num_tokens=3))
    with torch.no_grad():
        for block in range(3):
            own, other = at(model, "apt", block, "kv"), at(prefix, "prefix_tuning", block, "kv")
            other.keys.copy_(own.keys)
            other.values.copy_(own.values)
            own.level.fill_(1)
        assert distance(output(model), output(prefix)) > 1e-3
        for block in range(3):
            own = at(model, "apt", block, "kv")
            own.gate.weight.zero_()
            own.gate.bias.fill_(40)  # a sigmoid of one
    assert distance(output(model), output(prefix)) < 1e-12


def test_e2vpt_is_vpt_without_keys_and_prefix_tuning_without_prompts():
    alone, deep = stacked(HOST, vp.E2VPT(num_tokens=3, num_keys=0)), stacked(HOST, vp.VPT(num_tokens=3))
    copy_prompts(deep, "vpt", {block: at(alone, "e2vpt", block, "stream_in").prompts for block in range(3)})
    assert distance(output(alone), output(deep)) < 1e-12
    for shared in (True, False):
        keys, prefix = stacked(HOST, vp.E2VPT(0, 3, shared=shared)), stacked(HOST, vp.PrefixTuning(num_tokens=3))
        with torch.no_grad():
            for block in range(3):
                own, other = at(keys, "e2vpt", block, "kv"), at(prefix, "prefix_tuning", block, "kv")
                other.keys.copy_(own.keys)
                other.values.copy_(own.keys if shared else own.values)
        assert distance(output(keys), output(prefix)) < 1e-12


def test_e2vpt_starts_kaiming_uniform():
    """Over (heads, tokens, head width), the fan of each head is tokens times head width."""
    model = vp.attach(HOST.build(), vp.E2VPT(num_keys=4), head=False)
    values = torch.cat([at(model, "e2vpt", block, "kv").values.detach().flatten() for block in range(3)])
    bound = (6 / (4 * 8)) ** 0.5
    assert 0.98 * bound < values.max() <= bound
    assert abs(values.square().mean() - bound**2 / 3) < 0.15 * bound**2 / 3


def test_adaptformer_before_scaling_is_scaled():
    """Beside a layer scale of one it is the default; a layer scale of zero takes it out."""
    host, outputs = BY_NAME["vit_registers"], {}
    for scale in (1.0, 0.0):
        for before in (False, True):
            model = stacked(host, vp.AdaptFormer(4, before_scaling=before))
            for block in model.blocks:
                torch.nn.init.constant_(block.ls2.gamma, scale)
            outputs[scale, before] = output(model, host)
        with vp.use(model, None):
            outputs[scale, None] = output(model, host)
    assert distance(outputs[1.0, False], outputs[1.0, True]) < 1e-12
    assert torch.equal(outputs[0.0, True], outputs[0.0, None])
    assert distance(outputs[0.0, False], outputs[0.0, None]) > 1e-3


# counter-interference adapters


def test_ciat_reads_what_the_frozen_norm_gives():
    """Scaling the stream before a block leaves what an adapter of it adds as it was: the norm takes it out."""
    model = stacked(HOST, vp.CIAT(bottleneck=4, embedding=False))
    seen, x = [], torch.randn(1, 17, 32, dtype=torch.float64)
    at(model, "ciat", 1, "attn_in").register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        model.blocks[1].norm1.eps = 0.0
        for each in (x, 3 * x, x + torch.randn_like(x)):
            model.blocks[1](each)
    assert distance(seen[1], seen[0]) < 1e-12
    assert distance(seen[2], seen[0]) > 1e-2


def test_ciat_starts_glorot_uniform():
    model = vp.attach(HOST.build(), vp.CIAT(bottleneck=32), head=False)
    weight = at(model, "ciat", 0, "mlp_in").up.weight.detach()
    bound = (6 / 64) ** 0.5
    assert 0.95 * bound < weight.max() <= bound
    assert not at(model, "ciat", 0, "mlp_in").up.bias.any()


# conditional adapters


def test_soft_top_k_chooses_k():
    """Weights lie in (0, 1], add up to at most k, to k where e is not small, and keep the order of the scores."""
    torch.manual_seed(0)
    scores = torch.randn(196, dtype=torch.float64)
    for temperature, least in ((1.0, 0.995), (0.3, 0.94), (0.1, 0.88)):
        for k in (20, 49, 175):
            weights = soft_top_k(scores, k, temperature)
            assert weights.min() > 0
            assert weights.max() <= 1
            assert least * k < weights.sum() <= k + 1e-9
            assert (weights[scores.argsort()].diff() >= 0).all()
    assert soft_top_k(scores, 49, 0.1).sort().values[-40:].min() > 0.5
    equal = torch.zeros(8, dtype=torch.float64)
    torch.testing.assert_close(soft_top_k(equal, 3, 0.1), equal + 3 / 8)


def test_coda_with_all_patches_and_weights_of_one_is_a_parallel_adapter():
    model = stacked(HOST, vp.CoDA(bottleneck=4, reduction=1, blocks=[0]))
    select, spread = (at(model, "coda", 0, site) for site in ("stream_in", "stream_out"))
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    with torch.no_grad():
        select.router.zero_()  # equal scores, of which all are wanted
        given = model.blocks[0](x)
        adapter = spread.adapter(torch.nn.functional.layer_norm(x, (32,)))
        assert distance(given, HOST.build(torch.float64).blocks[0](x) + adapter) < 1e-12
        assert adapter.norm() > 1e-2


def test_coda_sends_the_best_patches_alone():
    """What was not sent changes nothing in the block: its tokens get the adapter, all others are those without it."""
    model = stacked(HOST, vp.CoDA(bottleneck=4, reduction=4, blocks=[0]))
    select, spread = (at(model, "coda", 0, site) for site in ("stream_in", "stream_out"))
    x = torch.randn(1, 17, 32, dtype=torch.float64)
    with torch.no_grad():
        scores = torch.nn.functional.layer_norm(x[0, 1:], (32,)) @ select.router
        best = set(scores.topk(4).indices.tolist())
        moved = (model.blocks[0](x) - x - spread.adapter(torch.nn.functional.layer_norm(x, (32,))))[0]
    assert {i for i in range(16) if moved[1 + i].abs().max() > 1e-12} == best
    assert moved[0].abs().max() > 1e-3


def test_coda_costs_less_than_the_backbone():
    """A block of 1 + 196 tokens has 1 + 49 in it, all pass the adapter; PyTorch counts the products but attention's."""
    model = vp.attach(timm.create_model("vit_base_patch16_224", depth=2, num_classes=0), vp.CoDA(blocks=[0]))
    counted = []
    for name in (None, "default"):
        with vp.use(model, name), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 224, 224))
        counted.append(counter.get_total_flops())
    assert counted[0] - counted[1] == 2 * 12 * (197 - 50) * 768**2 - 2 * 197 * 2 * 64 * 768


def test_two_choices_of_one_block_are_refused():
    model = vp.attach(HOST.build(), vp.CoDA(), "one")
    with pytest.raises(vp.UnsupportedError, match="two adapters choose the tokens that pass one block"):
        vp.attach(model, [vp.CoDA(reduction=2)], "two"), vp.activate(model, ["one", "two"])


# refusals


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        (vp.Mona, {"bottleneck": 0}, "bottleneck must be a positive integer"),
        (vp.Mona, {"grid": (0, 3)}, "grid must be rows and columns"),
        (vp.Mona, {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        (vp.E2VPT, {"num_tokens": -1}, "integers from 0 on"),
        (vp.E2VPT, {"num_tokens": 0, "num_keys": 0}, "nothing would be learned"),
        (vp.PrefixPropagation, {"num_tokens": 0}, "num_tokens must be a positive integer"),
        (vp.PrefixPropagation, {"add": 0.0}, "use VPT"),
        (vp.LPT, {"bottleneck": 0}, "bottleneck must be a positive integer"),
        (vp.LPT, {"reads": "words"}, "reads must be"),
        (vp.IDPG, {"bottleneck": 10, "terms": 4}, "must be a multiple of terms 4"),
        (vp.IDPG, {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        (vp.PTuning, {"hidden": 0}, "hidden must be a positive width or None"),
        (vp.DecomposedPromptTuning, {"rank": 0}, "rank must be a positive integer"),
        (vp.SMoP, {"noise": -1.0}, "noise must not be negative"),
        (vp.APT, {"num_tokens": 0}, "num_tokens must be a positive integer"),
        (vp.PixelPrompt, {"width": 0}, "width must be a positive number of pixels"),
        (vp.CIAT, {"activation": "tanh"}, "activation must be one of gelu"),
        (vp.CoDA, {"reduction": 0}, "reduction must be a positive integer"),
        (vp.CoDA, {"temperature": 0.0}, "temperature must be positive and at most 4"),
    ],
    ids=repr,
)
def test_refused_options(kind, fields, sentence):
    with pytest.raises(vp.ConfigurationError, match=sentence):
        kind(**fields)


@pytest.mark.parametrize(
    ("host", "method", "sentence"),
    [
        ("vit_dynamic", vp.Mona(2), "Mona needs the grid of patches"),
        ("clip_whole", vp.Mona(2, towers="text"), "the text tower has none"),
        ("clip_whole", vp.LPT(towers="text"), "the text tower has none"),
        ("clip_whole", vp.E2VPT(towers="text"), "the text tower has no patches"),
        ("vit_cls", vp.LPT(start=3), "start must be a block of the visual tower, 0 to 2, not 3"),
        ("vit_cls", vp.PrefixPropagation(blocks=[0, 2]), "consecutive blocks"),
        ("beit", vp.CoDA(), "the attention of this tower has positions of its own"),
        ("eva_fused", vp.CoDA(), "the attention of this tower has positions of its own"),
        ("vit_cls", vp.CoDA(blocks="last:1"), "learns nothing in the last block"),
        ("vit_cls", vp.IDPG(bottleneck=5, terms=5), "terms=5 does not divide the width 32"),
        ("vit_cls", vp.PixelPrompt(width=16), "leaves nothing inside an image of 32 x 32"),
        ("vit_dynamic", vp.PixelPrompt(), "PixelPrompt needs the grid of patches"),
        *(
            ("clip_whole", kind(towers="text"), "the text tower has none")
            for kind in (vp.CoDA, vp.IDPG, vp.SMoP, vp.APT, vp.PixelPrompt, vp.DecomposedPromptTuning)
        ),
    ],
    ids=repr,
)
def test_refused_hosts(host, method, sentence):
    """In words, and before anything is changed."""
    model = BY_NAME[host].build()
    with pytest.raises(UserError, match=sentence):
        vp.attach(model, method)
    assert not hasattr(model, "peft")


def test_frames_need_pixels():
    """Patches that overlap are refused, and images of another size."""
    model = HOST.build()
    model.patch_embed.proj = torch.nn.Conv2d(3, 32, 12, stride=8, padding=2)
    with pytest.raises(vp.UnsupportedError, match="one convolution of pixels to patches"):
        vp.attach(model, vp.PixelPrompt(width=1))
    framed = vp.attach(BY_NAME["vit_dynamic"].build(), vp.PixelPrompt(width=2, **GRID))
    with pytest.raises(vp.UnsupportedError, match="images of 40 x 24 pixels, but these have 32 x 32"):
        framed(torch.zeros(1, 3, 32, 32))


def test_mona_refuses_images_of_other_sizes():
    model = vp.attach(BY_NAME["vit_dynamic"].build(), vp.Mona(2, **GRID))
    with pytest.raises(vp.UnsupportedError, match="5 x 3 patches, but there are 16"):
        model(torch.zeros(1, 3, 32, 32))
