"""What only methods do that look at weights, gradients or inputs before they train: what they choose, and why.

The right values are gradients and inputs of the untouched timm model, in float64, and torch's own decompositions.
"""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise
from reference.hosts import HOSTS
from safetensors.torch import load_file

import visionpeft as vp
from visionpeft.adapters.measures import Measures
from visionpeft.methods.parts.entries import highest_of_rows
from visionpeft.methods.parts.measures import Place
from visionpeft.methods.parts.sparse_delta import highest, largest

HOST = {host.name: host for host in HOSTS}["vit_cls"]
IMAGES = HOST.inputs(6, torch.float64, seed=4)
LABELS = torch.tensor([0, 3, 1, 4, 4, 3])
BATCHES = [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])]
WIDTH, DEPTH, ROWS = 32, 3, {"q": slice(0, 32), "k": slice(32, 64), "v": slice(64, 96)}
NAMES = {"proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2", "norm1": "norm1", "norm2": "norm2"}


def attached(method, name="default"):
    torch.manual_seed(0)
    return vp.attach(HOST.build(torch.float64), method, name, head=False).eval()


def cross_entropy(model, images, labels):
    return F.cross_entropy(model(images), labels)


def allocated(method, batches=BATCHES, loss=lambda model, batch: cross_entropy(model, *batch)):
    return vp.allocate(attached(method), batches, loss)


def gradients(loss=cross_entropy, batches=BATCHES):
    """{name of a tensor: sum over batches of gradients} of the plain timm model, q, k and v apart."""
    model = HOST.build(torch.float64).eval().requires_grad_(True)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        found = torch.autograd.grad(loss(model, *batch), [*model.parameters()], allow_unused=True)
        for name, gradient in zip(total, found, strict=True):
            total[name] += 0 if gradient is None else gradient
    return by_layer(total)


def by_layer(tensors):
    """Tensors of timm's model under the names of layers here."""
    found = {}
    for part in ("weight", "bias"):
        for block in range(DEPTH):
            for site, rows in ROWS.items():
                found[f"visual.{block}.{site}.{part}"] = tensors[f"blocks.{block}.attn.qkv.{part}"][rows]
            for site, name in NAMES.items():
                found[f"visual.{block}.{site}.{part}"] = tensors[f"blocks.{block}.{name}.{part}"]
        found[f"visual.patch_embed.{part}"] = tensors[f"patch_embed.proj.{part}"]
        found[f"visual.norm.{part}"] = tensors[f"norm.{part}"]
    return found


def chosen(model, key):
    """{name: flat indices} of the trained entries."""
    return {
        name.removeprefix(f"{key}.").removesuffix("_index"): value.tolist()
        for name, value in model.peft["default"].state_dict().items()
        if name.endswith("_index")
    }


def of_rows(score, number):
    """Flat indices of so many largest entries of each row, by sorting it."""
    score = score.flatten(1)
    return sorted(
        row * score.shape[1] + column
        for row, values in enumerate(score.tolist())
        for column in sorted(range(len(values)), key=lambda i: -values[i])[:number]
    )


def is_matrix(name):
    return name.endswith(".weight") and "norm" not in name


# GPS


def contrastive(model, *batch):
    """The loss as its paper spells it, over ordered pairs of views."""
    views, labels = (batch[:-1] if len(batch) == 3 else batch[:1] * 2), batch[-1].tolist() * 2
    features = model.forward_head(model.forward_features(torch.cat(views)), pre_logits=True)
    unit = features / features.square().sum(1, keepdim=True).sqrt()
    total = 0
    for i in range(len(unit)):
        others = [a for a in range(len(unit)) if a != i]
        norm = sum((unit[i] @ unit[a] / 0.07).exp() for a in others)
        positive = [p for p in others if labels[p] == labels[i]]
        total = total - sum((unit[i] @ unit[p] / 0.07 - norm.log()) for p in positive) / len(positive)
    return total / len(unit)


@pytest.mark.parametrize("views", [1, 2])
def test_gps_trains_the_largest_gradients_of_every_row(views):
    """Of the contrastive loss; q, k and v apart; not what cross-entropy or a choice over the whole matrix gives."""
    batches = BATCHES if views == 1 else [(x, x.flip(-1), labels) for x, labels in BATCHES]
    model = allocated(vp.GPS(per_row=2), batches)
    score = {name: g.abs() for name, g in gradients(contrastive, batches).items() if is_matrix(name)}
    found = chosen(model, "gps")
    assert {name: found[name] for name in score} == {name: of_rows(each, 2) for name, each in score.items()}
    assert {name for name in found if name not in score} == {
        name.replace(".weight", ".bias") for name in score
    }  # all of them, whole
    assert all(found[name] == list(range(len(found[name]))) for name in found if name.endswith("bias"))
    others = gradients()
    assert any(found[name] != of_rows(others[name].abs(), 2) for name in score)
    one = "visual.1.fc1.weight"
    assert sorted(found[one]) != sorted(score[one].flatten().topk(len(found[one])).indices.tolist())


def test_features_of_models_without_one_head():
    """Of CLIP those of the images; a model with two heads, which read two tokens, is refused."""
    host = {host.name: host for host in HOSTS}["clip_whole"]
    images = host.inputs(4, torch.float64, seed=8)[0]
    model = vp.attach(host.build(torch.float64), vp.GPS()).eval()
    vp.allocate(model, [(images, torch.tensor([0, 1, 1, 2]))])
    plain = host.build(torch.float64).eval().requires_grad_(True)
    plain.forward_features = plain.encode_image
    plain.forward_head = lambda features, pre_logits: features
    weight = plain.visual.transformer.resblocks[1].mlp.c_fc.weight
    (score,) = torch.autograd.grad(contrastive(plain, images, torch.tensor([0, 1, 1, 2])), [weight])
    assert chosen(model, "gps")["visual.1.fc1.weight"] == of_rows(score.abs(), 1)
    two = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=5)
    with pytest.raises(vp.UnsupportedError, match=r"several heads \(head, head_dist\) are not one tensor"):
        vp.allocate(vp.attach(two, vp.GPS()), [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))])


def test_the_size_of_a_row_has_no_say():
    score = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    larger = score * torch.tensor([1.0, 100.0, 1.0, 1e-3, 1.0])[:, None]
    assert torch.equal(highest_of_rows(score, 2), highest_of_rows(larger, 2))
    assert len(highest_of_rows(score, 2)) == 10
    assert not torch.equal(highest({"w": score}, 10)["w"], highest({"w": larger}, 10)["w"])


def test_gps_without_biases_and_by_the_loss_of_the_task():
    model = allocated(vp.GPS(per_row=1, biases=False, loss="training", blocks=[1], samples=4))
    score = {name: g.abs() for name, g in gradients(batches=BATCHES[:1]).items() if is_matrix(name) and ".1." in name}
    assert chosen(model, "gps") == {name: of_rows(each, 1) for name, each in score.items()}


def test_what_gps_cannot_choose_by_is_refused():
    with pytest.raises(vp.ConfigurationError, match="one class for each image"):
        allocated(vp.GPS(), [(IMAGES, torch.rand(6, 5))])
    with pytest.raises(vp.ConfigurationError, match="have 32 entries, not 33"):
        allocated(vp.GPS(per_row=33))


# the second-order approximation, and NeuroAda


def test_second_order_takes_a_share_of_every_tensor():
    """Of the sums of gradients, which squares of them would not give."""
    model = allocated(vp.SecondOrder(density=0.05))
    score = {n: g.abs() for n, g in gradients().items() if not n.endswith("k.bias") and "patch" not in n}
    expected = {n: sorted(s.flatten().topk(int(0.05 * s.numel())).indices.tolist()) for n, s in score.items()}
    assert chosen(model, "second_order") == {name: indices for name, indices in expected.items() if indices}
    apart = [gradients(batches=[batch]) for batch in BATCHES]
    squares = {name: sum(each[name].square() for each in apart) for name in score}
    assert any(
        sorted(s.flatten().topk(int(0.05 * s.numel())).indices.tolist()) != expected[n] for n, s in squares.items()
    )


def test_gradients_that_alternate_count_for_nothing():
    """+g in one batch and -g in the next: no score here, and g^2 for FISH Mask."""
    batches = [(IMAGES[:2], torch.tensor([sign, sign])) for sign in (1, -1)]

    def loss(model, batch):
        return batch[1].double().mean() * model(batch[0]).square().mean()

    with pytest.raises(vp.ConfigurationError, match="all gradients of the backbone are zero"):
        allocated(vp.SecondOrder(density=0.05), batches, loss=loss)
    assert chosen(allocated(vp.FishMask(density=0.05, among="blocks"), batches, loss=loss), "fish_mask")
    with pytest.raises(vp.ConfigurationError, match="less than one entry of every tensor"):
        allocated(vp.SecondOrder(density=1e-5))


def test_neuro_ada_trains_the_largest_weights_of_every_row():
    weights = by_layer(HOST.build(torch.float64).state_dict())
    model = attached(vp.NeuroAda(per_row=3, blocks=[0, 2]))
    wanted = {n: of_rows(w.abs(), 3) for n, w in weights.items() if is_matrix(n) and n.split(".")[1] in "02"}
    assert chosen(model, "neuro_ada") == wanted
    smallest = {name: of_rows(-weights[name].abs(), 3) for name in wanted}
    assert chosen(model, "neuro_ada") != smallest
    with pytest.raises(vp.ConfigurationError, match="have 32 entries, not 33"):
        attached(vp.NeuroAda(per_row=33))


# starts along gradients and inputs


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_lora_ga_starts_along_different_directions_of_the_gradient(alpha, tmp_path):
    """Nothing changes to the bit; the file is a LoRA of twice the rank, which depends on no data."""
    plain = HOST.build(torch.float64).eval()(IMAGES)
    method = vp.LoRAGA(rank=3, alpha=alpha, targets=("q", "fc1"), overrides={"fc1": 2})
    model = allocated(method)
    assert torch.equal(model(IMAGES), plain)
    for block in range(3):
        for site, rank in (("q", 3), ("fc1", 2)):
            module = model.peft["default"].get_submodule(f"loraga.visual.{block}.{site}")
            G = gradients()[f"visual.{block}.{site}.weight"]
            U, _, Vt = torch.linalg.svd(G)
            square = math.sqrt(len(G)) / 16  # of the common length
            one = torch.eye(rank, dtype=torch.float64)
            assert torch.allclose(module.V_start @ module.V_start.T, square * one, atol=1e-12)
            assert torch.allclose(module.U_start.T @ module.U_start, square * one, atol=1e-12)
            right = Vt[:rank].T @ Vt[:rank]
            assert torch.allclose(module.V_start.T @ module.V_start, square * right, atol=1e-9)
            left = U[:, rank : 2 * rank] @ U[:, rank : 2 * rank].T
            assert torch.allclose(module.U_start @ module.U_start.T, square * left, atol=1e-9)
            assert abs(((module.U_start @ module.V_start) * G).sum()) < 1e-9 * G.norm()
            assert abs(((U[:, :rank] @ Vt[:rank]) * G).sum()) > 0.1 * G.norm()  # with the same ones it would not be
    randomise(model.peft["default"])
    trained = model(IMAGES)
    assert not torch.allclose(trained, plain, atol=1e-2)
    vp.save(model, tmp_path / "adapter")
    loaded = HOST.build(torch.float64)
    vp.load(loaded, tmp_path / "adapter")
    (saved,) = loaded.peft["default"].methods
    assert isinstance(saved, vp.LoRA)
    assert saved.rank == 6
    assert torch.allclose(loaded.eval()(IMAGES), trained, atol=1e-12)
    with pytest.raises(vp.ConfigurationError, match="q has 32 components, so its rank cannot be 17"):
        allocated(vp.LoRAGA(rank=17))


def read_by(path):
    """What a layer of the untouched model reads (tokens, in), over all images."""
    model, seen = HOST.build(torch.float64).eval(), []
    model.get_submodule(path).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        model(IMAGES)
    return torch.cat(seen)


def test_eva_starts_along_the_inputs_of_every_layer():
    """Orthonormal rows that leave the least of X; ranks by the share they explain, of all layers together."""
    model = allocated(vp.EVA(rank=3, rho=2.5, targets=("q", "v", "fc1", "proj")))
    method, adapter = model.peft["default"].methods[0], model.peft["default"]
    paths = {"q": "attn.qkv", "v": "attn.qkv", "fc1": "mlp.fc1", "proj": "attn.proj"}
    shares = []
    for block in range(3):
        for site, path in paths.items():
            X = read_by(f"blocks.{block}.{path}")
            values = torch.linalg.svdvals(X)
            shares += [(s.item(), f"visual.{block}.{site}") for s in (values**2 / (values**2).sum())[:7]]
            if (rank := method.ranks.get(f"visual.{block}.{site}", 0)) == 0:
                continue
            A = adapter.get_submodule(f"eva.visual.{block}.{site}").A.detach()
            assert len(A) == rank <= 7
            assert torch.allclose(A @ A.T, torch.eye(rank, dtype=torch.float64), atol=1e-10)
            left = (X - X @ A.T @ A).square().sum()
            assert torch.allclose(left, values[rank:].square().sum(), rtol=1e-8)
            other = torch.linalg.qr(torch.randn(WIDTH, rank, dtype=torch.float64))[0]
            assert (X - X @ other @ other.T).square().sum() > 1.05 * left
    best = sorted(shares, key=lambda each: -each[0])[: 3 * 12]
    for place in {place for _, place in shares}:
        assert abs(method.ranks.get(place, 0) - sum(each == place for _, each in best)) <= 1  # q and v explain as much
    assert sum(method.ranks.values()) == 3 * 12
    assert len(set(method.ranks.values())) > 1
    assert {m.scaling for m in adapter.modules() if hasattr(m, "scaling")} == {1.0}


def test_options_of_eva():
    """rho = 1 shares nothing out; whitened rows have a length; the scale is that of the mean rank, or of its own."""
    model = allocated(vp.EVA(rank=2, rho=1.0, whiten=True, alpha=6.0, samples=None))
    assert set(model.peft["default"].methods[0].ranks.values()) == {2}
    A = model.peft["default"].get_submodule("eva.visual.1.v").A
    values = torch.linalg.svdvals(read_by("blocks.1.attn.qkv"))[:2]
    assert torch.allclose(A.norm(dim=1), values**-0.5, rtol=1e-8)
    for adjust in (True, False):
        model = allocated(vp.EVA(rank=2, alpha=6.0, adjust_scale=adjust, targets=("q", "proj")))
        modules = [m for m in model.peft["default"].modules() if hasattr(m, "scaling")]
        assert {m.scaling * (2 if adjust else len(m.A)) for m in modules} == {6.0}
        assert len({len(m.A) for m in modules}) > 1


def test_eva_is_combined_and_loaded(tmp_path):
    model = allocated(vp.EVA(rank=2, alpha=6.0, targets=("q", "proj")))
    randomise(model.peft["default"])
    expected = model(IMAGES)
    vp.save(model, tmp_path / "adapter")
    loaded = HOST.build(torch.float64)
    vp.load(loaded, tmp_path / "adapter")
    assert torch.equal(loaded.eval()(IMAGES), expected)
    vp.combine(loaded, {"default": 1.0}, "copy")
    assert torch.allclose(loaded(IMAGES), expected, atol=1e-10)


# salient channels


def sizes_of(seen):
    """Mean over classes of the L2 norm of each channel over the patches of a class (channels,)."""
    of_classes = [seen[label == LABELS][:, 1:].square().sum((0, 1)).sqrt() for label in set(LABELS.tolist())]
    return sum(of_classes) / len(of_classes)


@pytest.mark.parametrize("position", ["stream_mid", "mlp_out", "qv"])
def test_sct_takes_the_largest_channels_and_leaves_the_others(position):
    """Of classes that count alike, without the class token; what is not chosen stays, bit by bit."""
    places = {
        "stream_mid": {"stream_mid": ("norm2", slice(None))},
        "mlp_out": {"fc2": ("mlp.fc2", slice(None))},
        "qv": {"q": ("attn.qkv", ROWS["q"]), "v": ("attn.qkv", ROWS["v"])},
    }
    plain, seen = HOST.build(torch.float64).eval(), {}
    for block in range(DEPTH):
        for site, (path, rows) in places[position].items():

            def see(module, inputs, output, key=(block, site), rows=rows):
                seen[key] = (inputs[0] if key[1] == "stream_mid" else output)[..., rows]

            plain.blocks[block].get_submodule(path).register_forward_hook(see)
    with torch.no_grad():
        plain(IMAGES)
    model = allocated(vp.SCT(channels=6, position=position))
    for (block, site), x in seen.items():
        module = model.peft["default"].get_submodule(f"sct.visual.{block}.{site}")
        wanted = sorted(sizes_of(x).topk(6).indices.tolist())
        assert module.channels.tolist() == wanted
        y = module(x) if site == "stream_mid" else module(None, x, None, None)
        others = [channel for channel in range(WIDTH) if channel not in wanted]
        assert torch.equal(y[..., others], x[..., others])
        assert (y[..., wanted] != x[..., wanted]).any()
    if position != "stream_mid":
        randomise(model.peft["default"])
        output = model(IMAGES)
        assert not torch.allclose(vp.merge(model)(IMAGES), HOST.build(torch.float64).eval()(IMAGES), atol=1e-2)
        assert torch.allclose(model(IMAGES), output, rtol=0, atol=1e-11)


def test_classes_count_alike():
    """The mean of norms over classes, 1.5 and 2, and not the norm over all images, 3 and 2.8."""

    class Sizes:
        def sizes(self, places, samples):
            return dict.fromkeys(places, torch.tensor([[3.0, 2.0], [0.0, 2.0]]))

    towers = [*vp.describe(HOST.build()).towers.values()]
    _, tensors = vp.SCT(channels=1).allocate(towers, Sizes())
    assert {tuple(each.tolist()) for each in tensors.values()} == {(1,)}


def test_channels_follow_a_permutation_of_the_backbone():
    """With the channels of the residual stream permuted, so is S."""
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))
    chosen = []
    for permute in (False, True):
        torch.manual_seed(0)
        model = HOST.build(torch.float64)
        if permute:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith(("qkv.weight", "fc1.weight", "head.weight")):
                        parameter.copy_(parameter[:, order])
                    elif not name.endswith(("qkv.bias", "fc1.bias", "head.bias")):
                        dim = -1 if name in ("cls_token", "pos_embed") else 0
                        parameter.copy_(parameter.index_select(dim, order))
        vp.attach(model, vp.SCT(channels=4), head=False)
        vp.allocate(model, BATCHES)
        chosen.append([m.channels for m in model.peft["default"].modules() if hasattr(m, "channels")])
    for before, after in zip(*chosen, strict=True):
        assert sorted(order[after].tolist()) == before.tolist()
    assert any(before.tolist() != after.tolist() for before, after in zip(*chosen, strict=True))


def test_what_sct_refuses():
    with pytest.raises(vp.ConfigurationError, match=r"visual.0.stream_mid has 32 channels, not 33"):
        allocated(vp.SCT(channels=33))
    model = allocated(vp.SCT(channels=4))
    with pytest.raises(vp.UnsupportedError):
        vp.merge(model)
    vp.combine(model, {"default": 1.0}, "other")
    model.peft["other"].get_submodule("sct.visual.0.stream_mid").channels.add_(1)
    with pytest.raises(vp.ConfigurationError, match="act on other channels"):
        vp.combine(model, {"default": 0.5, "other": 0.5}, "both")


# learned masks


def test_a_mask_leaves_weights_or_zeros(tmp_path):
    """Merged and loaded, every weight is the backbone's or zero; the file has one bit for each."""
    method = vp.BinaryMask(masked=0.3, targets=("q", "fc1"))
    model = attached(method)
    scores = model.peft["default"].get_submodule("binary_mask.visual.0.q").scores
    assert scores.min() >= -0.02
    assert scores.max() <= 0.03 / 0.3 - 0.02
    assert (scores <= 0.01).double().mean().item() == pytest.approx(0.3, abs=0.05)  # of 1,024
    output = model(IMAGES)
    with torch.no_grad():
        scores[scores > 0.01] *= 50  # only the side counts
        scores[scores <= 0.01] -= 50
    assert torch.equal(model(IMAGES), output)
    mask = scores.detach() > 0.01
    vp.save(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"bits"}
    assert sum(t.numel() for t in tensors.values()) == DEPTH * (32 * 32 + 64 * 32) // 8
    loaded = HOST.build(torch.float64)
    before = loaded.blocks[0].attn.qkv.weight.detach().clone()
    vp.load(loaded, tmp_path / "adapter")
    assert torch.allclose(loaded.eval()(IMAGES), output, rtol=0, atol=1e-12)
    vp.save(loaded, tmp_path / "again")
    assert all(torch.equal(t, tensors[n]) for n, t in load_file(tmp_path / "again" / "adapter.safetensors").items())
    vp.merge(loaded)
    after = loaded.blocks[0].attn.qkv.weight.detach()
    assert torch.equal(after[:32], torch.where(mask, before[:32], torch.zeros_like(before[:32])))
    assert torch.equal(after[32:], before[32:])
    assert not torch.equal(after, before)


def test_a_mask_that_keeps_all_changes_nothing():
    plain = HOST.build(torch.float64).eval()(IMAGES)
    model = attached(vp.BinaryMask(masked=0.0))
    assert torch.equal(model(IMAGES), plain)
    model(IMAGES).square().sum().backward()
    for module in model.peft["default"].modules():
        if hasattr(module, "scores"):
            assert module.scores.grad.any()
    vp.combine(model, {"default": 1.0}, "other")
    model.peft["other"].get_submodule("binary_mask.visual.0.q").bits[0] ^= 1
    with pytest.raises(vp.ConfigurationError, match="different masks cannot be combined"):
        vp.combine(model, {"default": 0.5, "other": 0.5}, "both")


# a random subspace


def test_the_gradient_in_the_subspace_is_that_of_finite_differences():
    """Which one published transform divides by its length; lengths are kept on average, by every projection."""
    model = attached(vp.SAID(dimension=200, targets=("q", "fc1")))
    randomise(model.peft["default"])
    z = model.peft["default"].get_submodule("said.visual.subspace").z
    weights = [m for m in model.peft["default"].modules() if hasattr(m, "signs")]

    def loss():
        return model(IMAGES).square().sum()

    loss().backward()
    for place in (0, 77, 193):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                z[place] += step
                values.append(loss().item())
                z[place] -= step
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(z.grad[place].item(), rel=1e-5, abs=1e-6)
    changes = [m.change(z, None).detach() / m.scale.detach() for m in weights]
    assert len(changes) == 2 * DEPTH
    assert sum(c.square().sum() for c in changes).item() == pytest.approx(6 * z.square().sum().item(), rel=0.1)
    assert len({round(c[0, 0].item(), 9) for c in changes}) == 6  # each has a projection of its own
    with pytest.raises(vp.ConfigurationError, match="leaves nothing for z beside 6 scales"):
        attached(vp.SAID(dimension=6))
    with pytest.raises(vp.ConfigurationError, match="z has 1994 numbers, more than the 1024 of the smallest weight"):
        attached(vp.SAID(dimension=2000))


def test_projections_are_pinned():
    """The file holds coordinates alone, so the projections must never move."""
    module = attached(vp.SAID(dimension=20)).peft["default"].get_submodule("said.visual.0.q")
    assert module.signs[:5].tolist() == [1, -1, -1, -1, 1]
    assert module.permutation[:3].tolist() == [727, 263, 742]
    assert module.normal[:2].tolist() == [0.7276458740234375, 0.488128662109375]
    assert module.normal.mean().abs() < 0.1
    assert module.normal.std().item() == pytest.approx(1, abs=0.1)


# what is measured


def test_inputs_and_sizes_are_those_of_the_untouched_model():
    """Second moments over all tokens; norms over the patches of each class, the class token left out."""
    model = attached(vp.LoRAGA())
    adapter = model.peft["default"]
    adapter.placements = []
    measures = Measures(model, "default", BATCHES, lambda model, batch: model(batch[0]).sum(), 0)
    places = [Place("visual", 1, site) for site in ("q", "k", "fc2")]
    moments = measures.inputs(places, None)
    for place, path in zip(places, ("attn.qkv", "attn.qkv", "mlp.fc2"), strict=True):
        X = read_by(f"blocks.1.{path}")
        assert torch.allclose(moments[place], X.T @ X, rtol=1e-10)
    assert moments[places[0]] is moments[places[1]]
    places = [Place("visual", 0, "stream_mid"), Place("visual", 2, "v")]
    sizes = measures.sizes(places, None)
    plain, seen = HOST.build(torch.float64).eval(), []
    plain.blocks[0].norm2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    plain.blocks[2].attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output[..., 64:]))
    with torch.no_grad():
        plain(IMAGES)
    for place, x in zip(places, seen, strict=True):
        wanted = torch.stack([x[label == LABELS][:, 1:].square().sum((0, 1)).sqrt() for label in (0, 1, 3, 4)])
        found = sizes[place]
        assert torch.allclose(found.sort(0).values, wanted.sort(0).values, rtol=1e-10)
        assert not torch.allclose(found.sum(0), wanted.sum(0) + x[:, 0].abs().mean(0), rtol=1e-3)
    assert adapter.placements == []


@pytest.mark.parametrize(
    "method",
    [vp.GPS(entries={"visual.0.q.weight": 3}), vp.EVA(ranks={"visual.0.q": 2}), vp.LoRAGA(measured=True)],
    ids=["gps", "eva", "lora_ga"],
)
def test_what_is_found_is_not_to_be_given(method):
    with pytest.raises(vp.ConfigurationError, match="found, not given; leave them out"):
        vp.attach(HOST.build(), method)


# counts on ViT-B/16


class Weights:
    """Says that gradients are the weights themselves, and that layers read anything."""

    head_values = 0

    def gradients(self, candidates, samples, loss=None, training=False):
        return {name: candidate.values.detach() for name, candidate in candidates.items()}

    def inputs(self, places, samples):
        return dict.fromkeys(places, torch.eye(768))

    def sizes(self, places, samples):
        return dict.fromkeys(places, torch.ones(1, 768))


def test_counts_of_methods_that_see_data():
    model = timm.create_model("vit_base_patch16_224", num_classes=100)
    towers = [*vp.describe(model).towers.values()]

    def entries(method):
        return method.allocate(towers, Weights())[0].entries

    assert sum(entries(vp.GPS(per_row=15)).values()) == 1_339_392
    assert sum(entries(vp.GPS()).values()) == 167_424
    assert sum(entries(vp.SecondOrder()).values()) == 425_130
    for position, count in (("stream_mid", 111_744), ("mlp_out", 111_744), ("qv", 223_488)):
        method, _ = vp.SCT(position=position).allocate(towers, Weights())
        placed = [placement.module for placement in method.place(towers[0])]
        assert sum(p.numel() for module in placed for p in module.parameters()) == count
    with torch.device("meta"):
        placed = [placement.module for placement in vp.BinaryMask().place(towers[0])]
    assert sum(p.numel() for module in placed for p in module.parameters()) == 84_934_656
    ranks = vp.EVA().allocate(towers, Weights())[0].ranks
    assert sum(ranks.values()) * 2 * 768 == 294_912


@pytest.mark.parametrize(
    "kind", ["normal", "few different", "nearly all zero", "ascending", "the sampled ones largest"]
)
def test_largest_of_many(kind):
    """A full sort says which values are the largest; a sample that is far from all of them changes nothing."""
    generator, count, number = torch.Generator().manual_seed(0), 200_000, 5_000
    values = torch.randn(count, generator=generator)
    if kind == "few different":
        values = torch.randint(0, 9, (count,), generator=generator).float()
    elif kind == "nearly all zero":
        values = values.relu() * (torch.rand(count, generator=generator) < 0.01)
    elif kind == "ascending":
        values = values.sort().values
    elif kind == "the sampled ones largest":
        values[:: number // 256] += 100
    chosen = largest(values, number)
    assert len(chosen.unique()) == number
    assert torch.equal(values[chosen].sort().values, values.sort().values[-number:])
