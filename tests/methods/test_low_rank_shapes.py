"""What only LoRA's options, starts and relatives do: their scale, what they start from, what they save."""

import math

import pytest
import torch
from conftest import adapter_tensors, distance, randomise
from reference.hosts import HOSTS
from safetensors.torch import load_file

import visionpeft as vp

HOST = {host.name: host for host in HOSTS}["vit_cls"]
INPUTS = HOST.inputs(3, torch.float64)
PLACES = [545, 566, 590, 912]  # of four coefficients of a matrix of 32 x 32 with the default seed


def output_of(model):
    with torch.no_grad():
        return model.eval()(INPUTS)


def attached(method, moved=True):
    torch.manual_seed(0)
    model = vp.attach(HOST.build(torch.float64), method, head=False)
    if moved:
        randomise(model.peft["default"])
    return model.eval()


def weight_of(model, block=0):
    return model.blocks[block].attn.qkv.weight.detach()[:32]


def change_of(method, moved=True):
    """The change of q of the first block, with the weight it is a change of."""
    model = attached(method, moved)
    before = weight_of(model).clone()
    vp.merge(model)
    return weight_of(model) - before, before


# options of LoRA


def test_rank_stabilised_scale_is_divided_by_the_root_of_the_rank():
    wanted = attached(vp.LoRA(rank=4, alpha=6 * 2, targets=("q",), overrides={"1": 1}))
    model = attached(vp.LoRA(rank=4, alpha=6, targets=("q",), overrides={"1": 1}, rank_stabilised=True))
    modules = [model.peft["default"].get_submodule(f"lora.visual.{index}.q") for index in (0, 1)]
    assert [module.scaling for module in modules] == [6 / math.sqrt(4), 6 / math.sqrt(1)]
    assert modules[0].scaling == wanted.peft["default"].get_submodule("lora.visual.0.q").scaling
    vp.combine(model, {"default": 0.5}, "halved")  # keeps the scale in B
    assert not model.peft["halved"].methods[0].rank_stabilised
    a, b = (model.peft[name].get_submodule("lora.visual.1.q") for name in ("default", "halved"))
    assert torch.allclose(b.scaling * b.B @ b.A, 0.5 * 6 * a.B @ a.A, atol=1e-14)


def test_a_scale_that_nothing_is_divided_by_is_refused():
    with pytest.raises(vp.ConfigurationError, match=r"^LoRA: rank_stabilised divides alpha"):
        vp.LoRA(rank_stabilised=True)


def test_frozen_a_stays_and_is_saved(tmp_path):
    """B alone moves, and starts from the very A of LoRA; the file has A, so that it does not depend on a seed."""
    model = attached(vp.LoRA(rank=2, train_A=False), moved=False)
    other = attached(vp.LoRA(rank=2), moved=False)
    before, own = adapter_tensors(model), adapter_tensors(other)
    assert all(torch.equal(before[name], own[name]) for name in own)
    frozen = {name: tensor.clone() for name, tensor in before.items() if name.endswith(".A")}
    assert frozen
    assert not any(tensor.requires_grad for name, tensor in before.items() if name in frozen)
    optimiser = torch.optim.SGD(vp.trainable_parameters(model), lr=0.1)
    model(INPUTS).square().sum().backward()
    optimiser.step()
    after = adapter_tensors(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert all(tensor.abs().sum() > 0 for name, tensor in after.items() if name.endswith(".B"))
    vp.save(model, tmp_path / "adapter")
    assert frozen.keys() < load_file(tmp_path / "adapter" / "adapter.safetensors").keys()
    loaded = HOST.build(torch.float64)
    vp.load(loaded, tmp_path / "adapter")
    assert torch.equal(output_of(loaded), output_of(model))


# starts from the weight


def start_of(method):
    """s B0 A0 of q of the first block, and its weight."""
    model = attached(method, moved=False)
    module = model.peft["default"].get_submodule(f"{method.name}.visual.0.q")
    return module.scaling * module.U_start @ module.V_start, weight_of(model), module


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_pissa_takes_the_largest_singular_values(alpha):
    part, weight, module = start_of(vp.PiSSA(rank=3, alpha=alpha))
    values = torch.linalg.svdvals(weight)
    assert torch.allclose(torch.linalg.svdvals(weight - part)[:-3], values[3:], rtol=1e-10)
    assert torch.allclose(torch.linalg.svdvals(part)[:3], values[:3], rtol=1e-10)
    # both factors share the values evenly
    assert torch.allclose(module.U_start.norm(dim=0), module.V_start.norm(dim=1), rtol=1e-10)
    other, _, _ = start_of(vp.OLoRA(rank=3, alpha=alpha))
    assert not torch.allclose(torch.linalg.svdvals(weight - other)[:-3], values[3:], rtol=1e-2)


def test_olora_takes_the_first_columns():
    part, weight, module = start_of(vp.OLoRA(rank=3))
    assert (weight - part)[:, :3].norm() < 1e-12 * weight.norm()
    assert (weight - part)[:, 3:].norm() > 0.1 * weight.norm()
    assert torch.allclose(module.U_start.T @ module.U_start, torch.eye(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("kind", [vp.PiSSA, vp.OLoRA])
def test_a_start_changes_nothing_and_is_saved_as_lora(kind, tmp_path):
    """To the bit at the start; the file is a LoRA of twice the rank with the same output, bit by bit."""
    method = kind(rank=2, alpha=3, targets=("q", "fc2"), overrides={"1/q": 1})
    model = HOST.build(torch.float32)
    images = HOST.inputs(2)
    plain = model.eval()(images).detach()
    vp.attach(model, method, head=False)
    assert torch.equal(model(images), plain)
    randomise(model.peft["default"])
    trained = model(images).detach()
    assert not torch.allclose(trained, plain, atol=1e-2)
    vp.save(model, tmp_path / "adapter")
    loaded = HOST.build(torch.float32)
    vp.load(loaded, tmp_path / "adapter")
    (saved,) = loaded.peft["default"].methods
    assert saved == vp.LoRA(rank=4, alpha=6, targets=("q", "fc2"), overrides={"1/q": 2})
    assert torch.equal(loaded.eval()(images), trained)


def test_a_part_larger_than_the_weight_is_refused():
    model = HOST.build()
    for method, sentence in ((vp.PiSSA(rank=33), "PiSSA: q has 32 components"), (vp.OLoRA(rank=33), "OLoRA: q has 32")):
        with pytest.raises(vp.ConfigurationError, match=f"^{sentence}"):
            vp.attach(model, method)
    with pytest.raises(vp.ConfigurationError, match=r"^PiSSA: alpha must be positive"):
        vp.PiSSA(alpha=-1.0)


# rotations


@pytest.mark.parametrize(
    "method", [vp.OFT(block=8, targets=("q",)), vp.BOFT(block=4, factors=4, targets=("q",))], ids=["oft", "boft"]
)
def test_a_rotation_keeps_lengths_angles_and_singular_values(method):
    """W W^T is W0 W0^T wherever Q is; of BOFT but for the scale of the rows. LoRA of the same size fails it."""
    model = attached(method)
    before = weight_of(model).clone()
    scale = getattr(model.peft["default"].get_submodule(f"{method.name}.visual.0.q"), "scale", torch.ones(32).double())
    vp.merge(model)
    after = weight_of(model) / scale.detach()[:, None]
    assert torch.allclose(after @ after.T, before @ before.T, atol=1e-12)
    assert not torch.allclose(after, before, atol=1e-2)
    change, before = change_of(vp.LoRA(rank=8, targets=("q",)))
    after = before + change
    assert not torch.allclose(after @ after.T, before @ before.T, atol=1e-2)


def test_each_factor_of_boft_doubles_what_a_feature_reaches():
    """R itself, read off a weight that is the identity."""
    for factors in (1, 2, 3, 4):
        module = vp.BOFT(block=4, factors=factors, targets=("q",))
        model = attached(module)
        rotation = model.peft["default"].get_submodule("boft.visual.0.q")
        torch.nn.init.ones_(rotation.scale)
        R, _ = rotation.merge(torch.eye(32, dtype=torch.float64), None)
        reached = {int(n) for n in (R.abs() > 1e-12).sum(1)}
        assert reached == {4 * 2 ** (factors - 1)}


def test_rotations_that_do_not_fit_are_refused():
    for method, sentence in (
        (vp.OFT(block=5), "OFT: q reads 32 features, which blocks of 5 do not divide"),
        (vp.BOFT(block=4, factors=5), "BOFT: q reads 32 features, but 5 factors with blocks of 4 connect groups of 64"),
    ):
        with pytest.raises(vp.ConfigurationError, match=f"^{sentence}"):
            vp.attach(HOST.build(), method)
    with pytest.raises(vp.ConfigurationError, match="blocks of an even size"):
        vp.BOFT(block=3, factors=2)


# other changes of weights


def test_hira_leaves_zeros_and_goes_beyond_its_rank():
    torch.manual_seed(0)
    model = HOST.build(torch.float64)
    model.blocks[0].attn.qkv.weight.data[3, 5] = 0
    before = weight_of(model).clone()
    vp.attach(model, vp.HiRA(rank=2, targets=("q",)), head=False)
    randomise(model.peft["default"])
    vp.merge(model)
    change = weight_of(model) - before
    assert change[3, 5] == 0
    assert torch.linalg.matrix_rank(change) > 2
    assert torch.linalg.matrix_rank(change / before.where(before != 0, torch.ones(()))) <= 3  # B A, and the one hole


def test_miss_sees_the_sum_of_shards_alone():
    model = attached(vp.MiSS(rank=8, targets=("q",)))
    module = model.peft["default"].get_submodule("miss.visual.0.q")
    x, y = torch.randn(2, 32, dtype=torch.float64), torch.zeros(2, 32, dtype=torch.float64)
    moved = x.clone()
    moved[:, 3] -= 0.7
    moved[:, 8 + 3] += 0.7  # the same place of the next shard
    assert torch.allclose(module(x, y, None, None), module(moved, y, None, None), atol=1e-12)
    moved[:, 8 + 4] += 0.7
    assert not torch.allclose(module(x, y, None, None), module(moved, y, None, None), atol=1e-2)


def test_randlora_has_full_rank_and_saves_vectors_alone(tmp_path):
    model = attached(vp.RandLoRA(rank=8, targets=("q",)))
    vp.save(model, tmp_path / "adapter")
    names = {name.rpartition(".")[2] for name in load_file(tmp_path / "adapter" / "adapter.safetensors")}
    assert names == {"row_scale", "column_scale"}
    loaded = HOST.build(torch.float64)
    vp.load(loaded, tmp_path / "adapter")
    assert torch.equal(output_of(loaded), output_of(model))
    change, _ = change_of(vp.RandLoRA(rank=8, targets=("q",)))
    assert torch.linalg.matrix_rank(change) == 32
    assert torch.linalg.matrix_rank(change_of(vp.LoRA(rank=8, targets=("q",)))[0]) == 8


def test_one_cut_of_gralora_is_lora_and_more_have_a_higher_rank():
    one, two = vp.GraLoRA(rank=4, cuts=1, alpha=8, targets=("q",)), vp.GraLoRA(rank=4, cuts=2, targets=("q",))
    lora = attached(vp.LoRA(rank=4, alpha=8, targets=("q",)))
    model = attached(one)
    for index in range(3):
        ours = model.peft["default"].get_submodule(f"gra_lora.visual.{index}.q")
        theirs = lora.peft["default"].get_submodule(f"lora.visual.{index}.q")
        theirs.A.data, theirs.B.data = ours.A.detach()[0], ours.B.detach()[0]
    assert distance(output_of(model), output_of(lora)) < 1e-12
    change, _ = change_of(two)
    assert torch.linalg.matrix_rank(change) == 8
    for rows in (slice(0, 16), slice(16, 32)):
        assert [int(torch.linalg.matrix_rank(change[rows, c])) for c in (slice(0, 16), slice(16, 32))] == [2, 2]


def test_a_frequency_of_zero_adds_one_constant_and_mirrors_do_the_same():
    model = attached(vp.FourierFT(number=1, scale=32.0, targets=("q",)), moved=False)
    module = model.peft["default"].get_submodule("fourierft.visual.0.q")
    changes = {}
    for name, (row, column) in {"zero": (0, 0), "one": (3, 5), "mirror": (29, 27), "other": (3, 27)}.items():
        module.places.fill_(row * 32 + column)
        changes[name], _ = module.merge(torch.zeros(32, 32, dtype=torch.float64), None)
    value = module.coefficients.item() / 32
    assert torch.allclose(changes["zero"], torch.full((32, 32), value, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(changes["one"], changes["mirror"], atol=1e-14)
    assert not torch.allclose(changes["one"], changes["other"], atol=1e-4)


def test_a_wavelet_changes_four_entries_and_keeps_lengths():
    change, _ = change_of(vp.WaveFT(number=5, scale=1.0, targets=("q",)))
    model = attached(vp.WaveFT(number=5, scale=1.0, targets=("q",)))
    coefficients = model.peft["default"].get_submodule("waveft.visual.0.q").coefficients
    assert 0 < int((change.abs() > 1e-9).sum()) <= 20
    assert change.norm().item() == pytest.approx(coefficients.norm().item(), rel=1e-9)
    dense, _ = change_of(vp.FourierFT(number=5, scale=1.0, targets=("q",)))
    assert int((dense.abs() > 1e-12).sum()) > 1000


def test_places_are_pinned():
    """Of a saved adapter only the coefficients are in the file, so the places must never move."""
    model = attached(vp.FourierFT(number=4, targets=("q",)), moved=False)
    module = model.peft["default"].get_submodule("fourierft.visual.0.q")
    assert module.places.tolist() == PLACES
    other = attached(vp.FourierFT(number=4, seed=1, targets=("q",)), moved=False)
    assert other.peft["default"].get_submodule("fourierft.visual.0.q").places.tolist() != PLACES


def test_values_without_sense_are_refused_of_changes():
    build = HOST.build()
    for method, sentence in (
        (vp.MiSS(rank=33), "MiSS: q reads 32 features, so its rank cannot be 33"),
        (vp.GraLoRA(rank=3, cuts=3), "GraLoRA: q maps 32 to 32 features, which 3 cuts do not divide"),
        (vp.FourierFT(number=1025), "FourierFT: q has 1024 entries, so number cannot be 1025"),
    ):
        with pytest.raises(vp.ConfigurationError, match=f"^{sentence}"):
            vp.attach(build, method)
    for make, sentence in (
        (lambda: vp.GraLoRA(rank=3, cuts=2), "GraLoRA: rank must be a positive multiple of cuts"),
        (lambda: vp.RandLoRA(scale=0.0), "RandLoRA: scale must not be 0"),
        (lambda: vp.DyLoRA(rank=2, lowest=3), "DyLoRA: lowest must be from 1 to rank"),
        (lambda: vp.DyLoRA(rank=2, used=3), "DyLoRA: used must be from 1 to rank"),
        (lambda: vp.SoRA(threshold=-1.0), "SoRA: threshold must not be negative"),
        (lambda: vp.CapaBoost(density=0.0), "CapaBoost: density must be above 0"),
        (lambda: vp.HiWi(bottleneck=0), "HiWi: bottleneck must be a positive integer"),
    ):
        with pytest.raises(vp.ConfigurationError, match=f"^{sentence}"):
            make()


# relatives of LoRA


def test_moslora_with_the_identity_is_lora():
    model = attached(vp.MoSLoRA(rank=3, alpha=6, targets=("q",)))
    lora = attached(vp.LoRA(rank=3, alpha=6, targets=("q",)))
    for index in range(3):
        ours = model.peft["default"].get_submodule(f"moslora.visual.{index}.q")
        theirs = lora.peft["default"].get_submodule(f"lora.visual.{index}.q")
        ours.mixer.data.copy_(torch.eye(3))
        theirs.A.data, theirs.B.data = ours.down.detach(), ours.up.detach()
    assert distance(output_of(model), output_of(lora)) < 1e-12


def test_sora_shrinks_gates_and_saves_the_ranks_that_are_left(tmp_path):
    """1.5 thresholds become half a threshold, where the published code makes them zero."""
    model = attached(vp.SoRA(rank=4, alpha=8, threshold=0.1, targets=("q", "v")))
    modules = [m for m in model.peft["default"].modules() if hasattr(m, "gate")]
    for module in modules:
        module.gate.data.copy_(torch.tensor([0.15, -0.15, 0.05, -0.05]))
    vp.after_step(model, 1, 10)
    wanted = torch.tensor([0.05, -0.05, 0.0, 0.0], dtype=torch.float64)
    assert all(torch.allclose(module.gate, wanted, atol=1e-8) for module in modules)
    vp.save(model, tmp_path / "adapter")
    loaded = HOST.build(torch.float64)
    vp.load(loaded, tmp_path / "adapter")
    assert loaded.peft["default"].get_submodule("lora.visual.0.q").A.shape == (2, 32)
    assert distance(output_of(loaded), output_of(model)) < 1e-12


def test_dylora_trains_the_ranks_of_the_step_and_is_cut_to_any(tmp_path):
    method = vp.DyLoRA(rank=4, lowest=2, alpha=8, targets=("q",), seed=3)
    model = attached(method).train()
    module = model.peft["default"].get_submodule("dy_lora.visual.0.q")
    drawn = {method.rank_of_step(step) for step in range(40)}
    assert drawn == {2, 3, 4}
    for step in range(6):
        model.zero_grad()
        model(INPUTS).square().sum().backward()
        rank = method.rank_of_step(step)
        assert (module.down.grad[:rank].norm(dim=1) > 0).all()
        assert not module.down.grad[rank:].any()
        assert not module.up.grad[:, rank:].any()
        vp.after_step(model, step + 1, 6)
    model.eval()
    for rank in (1, 3, 4):
        for each in model.peft["default"].modules():
            if hasattr(each, "use"):
                each.use(rank)
        lora = attached(vp.LoRA(rank=rank, alpha=8, targets=("q",)))
        for index in range(3):
            ours = model.peft["default"].get_submodule(f"dy_lora.visual.{index}.q")
            theirs = lora.peft["default"].get_submodule(f"lora.visual.{index}.q")
            theirs.A.data, theirs.B.data = ours.down.detach()[:rank], ours.up.detach()[:, :rank]
        assert distance(output_of(model), output_of(lora)) < 1e-12
    with pytest.raises(ValueError, match="there are 4 ranks"):
        module.use(5)


def test_dylora_merges_the_rank_that_is_used_in_any_mode():
    model = attached(vp.DyLoRA(rank=4, used=3, alpha=8, seed=3))
    found = output_of(model)
    for module in model.peft["default"].modules():
        if hasattr(module, "draw"):
            module.draw(1)
    model.train()
    vp.merge(model)
    assert all(module.training for module in model.modules())
    assert distance(output_of(model.eval()), found) < 1e-10
    vp.unmerge(model)
    assert output_of(model).equal(found)
    with torch.no_grad():  # negative control: in training it is another rank
        assert distance(model.train()(INPUTS), found) > 1e-3


def test_lora_dropout_masks_features_for_the_whole_batch():
    """One draw of input and output features; LoRA's dropout draws each token's features anew."""
    torch.manual_seed(0)
    model = attached(vp.LoRADropout(rank=3, targets=("q",))).train()
    module = model.peft["default"].get_submodule("loradropout.visual.0.q")
    x, y = torch.eye(32, dtype=torch.float64), torch.zeros(32, 32, dtype=torch.float64)
    weight = torch.zeros(32, 32, dtype=torch.float64)
    change = module(x, y, weight, None).T  # the drawn change itself
    whole = (module.B @ module.A).detach()
    kept_out, kept_in = change.abs().sum(1) > 0, change.abs().sum(0) > 0
    assert 8 < int(kept_out.sum()) < 24
    assert 8 < int(kept_in.sum()) < 24
    drawn = 4 * whole * kept_out[:, None] * kept_in
    assert torch.allclose(change, drawn, atol=1e-12)
    model.eval()
    assert torch.allclose(module(x, y, weight, None).T, whole, atol=1e-12)
    mean = torch.stack([module.train()(x, y, weight, None).T for _ in range(2000)]).mean(0)
    assert distance(mean, whole) < 0.1


def test_masks_of_ones_make_capaboost_so_many_loras():
    wanted, _ = change_of(vp.CapaBoost(rank=2, copies=3, density=1.0, targets=("q",)))
    model = attached(vp.CapaBoost(rank=2, copies=3, density=1.0, targets=("q",)))
    module = model.peft["default"].get_submodule("capa_boost.visual.0.q")
    assert torch.allclose(wanted, 3 * module.up @ module.down, atol=1e-12)
    masked, _ = change_of(vp.CapaBoost(rank=2, copies=3, density=0.5, targets=("q",)))
    assert torch.linalg.matrix_rank(masked) == 6
    assert torch.linalg.matrix_rank(wanted) == 2


def test_a_few_numbers_of_vectors_and_weights_are_all_of_vblora():
    """From the bank, the places of the two highest logits and their softmax the change is made again."""
    model = attached(vp.VBLoRA(rank=2, number=6, length=8, targets=("q",)))
    bank = model.peft["default"].get_parameter("vblora.visual.bank.vectors").detach()
    module = model.peft["default"].get_submodule("vblora.visual.0.q")
    factors = []
    for logits in (module.down_logits.detach(), module.up_logits.detach().transpose(0, 1)):
        chosen = logits.argsort(-1, descending=True)[..., :2]
        first = 1 / (1 + (logits.gather(-1, chosen[..., 1:]) - logits.gather(-1, chosen[..., :1])).exp())
        factors.append((first * bank[chosen[..., 0]] + (1 - first) * bank[chosen[..., 1]]).flatten(1))
    change, _ = change_of(vp.VBLoRA(rank=2, number=6, length=8, targets=("q",)))
    assert torch.allclose(change, factors[1].T @ factors[0], atol=1e-12)
    with pytest.raises(vp.ConfigurationError, match=r"^VBLoRA: q maps 32 to 32 features, which a length of 5 does not"):
        vp.attach(HOST.build(), vp.VBLoRA(length=5))
    with pytest.raises(vp.ConfigurationError, match=r"^VBLoRA: top must be from 2 to number"):
        vp.VBLoRA(top=1)
