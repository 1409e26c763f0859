"""Methods that are trained in stages: what they choose, what goes back to the start, and what the last stage trains."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import distance, randomise
from reference import edits_of, forward, shapes_of, trained_weights
from reference.hosts import HOSTS

import visionpeft as vp
from visionpeft.methods.diff_pruning import hard_concrete

VIT = next(host for host in HOSTS if host.name == "vit_cls")
IMAGES, LABELS = VIT.inputs(6, torch.float64, seed=4), torch.tensor([0, 3, 1, 4, 4, 2])


def train(model, rate=0.1, steps=3):
    """A few steps of gradient descent on whatever is trained."""
    trained = vp.trainable_parameters(model)
    for _ in range(steps):
        loss = F.cross_entropy(model(IMAGES), LABELS)
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= rate * gradient


def in_stages(method, batches=None):
    """A small ViT with a method that was trained in all its stages, and its outputs before each of them."""
    model, before = vp.attach(VIT.build(torch.float64), method).eval(), []
    for _ in vp.stages(model, batches):
        before.append(model(IMAGES).detach())
        train(model)
    return model, before


# LT-SFT


def fine_tuned(masks=None, rate=0.1, steps=3, only=None):
    """A plain ViT trained by torch alone: its values before and after; outside of the masks weights do not move."""
    model = VIT.build(torch.float64).eval()
    named = dict(model.named_parameters())
    trained = {name: p for name, p in named.items() if name not in ("cls_token", "pos_embed")}
    if only is not None:
        trained = {name: p for name, p in trained.items() if name.endswith(only) or name.startswith("head.")}
    before = {name: p.detach().clone() for name, p in trained.items()}
    for _ in range(steps):
        gradients = torch.autograd.grad(F.cross_entropy(model(IMAGES), LABELS), list(trained.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
                free = 1.0 if masks is None or name.startswith("head.") else masks[name]
                parameter -= rate * gradient * free
    return model, before


def test_lt_sft_trains_what_full_fine_tuning_moves_most():
    """Two trainings by torch itself, with a mask between them by a sort over all entries, are what the stages do."""
    full, before = fine_tuned()
    moved = {n: (p.detach() - before[n]).abs() for n, p in full.named_parameters() if n in before}
    moved = {name: each for name, each in moved.items() if not name.startswith("head.")}
    number = round(0.03 * sum(p.numel() for n, p in full.named_parameters() if not n.startswith("head.")))
    threshold = torch.cat([each.flatten() for each in moved.values()]).sort(descending=True).values[number - 1]
    masks = {name: (each >= threshold).double() for name, each in moved.items()}
    assert sum(int(mask.sum()) for mask in masks.values()) == number
    sparse, _ = fine_tuned(masks)

    model, outputs = in_stages(vp.LTSFT(density=0.03))
    assert torch.equal(*outputs)  # the second training starts bit by bit where the first did, head and all
    assert model.peft["default"].num_parameters() == number
    distance = (model(IMAGES) - sparse(IMAGES)).abs().max()
    assert distance < 1e-10
    assert (model(IMAGES) - full(IMAGES)).abs().max() > 1e-3 > distance  # nor has it gone on from the first stage
    vp.merge(model)
    changed = {n: (p.detach() != before[n]).double() for n, p in model.named_parameters() if n in masks}
    assert all(torch.equal(changed[name], mask) for name, mask in masks.items())


def test_lt_sft_counts_all_parameters():
    """0.5 % of 85,798,656 are 428,993; K is taken of the towers together, class token and positions counted."""
    assert round(0.005 * 85_798_656) == 428_993
    plain = VIT.build()
    total = sum(p.numel() for n, p in plain.named_parameters() if not n.startswith("head."))
    layers = total - plain.cls_token.numel() - plain.pos_embed.numel()
    model = vp.attach(plain, vp.LTSFT(density=0.1))
    assert model.peft["default"].num_parameters() == layers
    for stage in vp.stages(model):
        if stage == 1:
            train(model.double())
    assert model.peft["default"].num_parameters() == round(0.1 * total)


# XPrompt


def importances(model):
    """Of tokens and pieces: mean absolute gradients in gates before them, of the transcription of the backbone."""
    plain = VIT.build(torch.float64)
    tensors = {name: value.detach() for name, value in model.peft["default"].state_dict().items()}
    prompts, weights = tensors["xprompt.visual.0.stream_in.prompts"], with_head(plain, tensors)
    tokens, pieces = torch.zeros(len(prompts)), torch.zeros(len(prompts), 4)
    signed = torch.zeros(len(prompts))
    for image, label in zip(IMAGES, LABELS, strict=True):
        gamma = torch.ones(len(prompts), 1, dtype=torch.float64, requires_grad=True)
        zeta = torch.ones(len(prompts), 4, dtype=torch.float64, requires_grad=True)
        gated = gamma * (zeta.repeat_interleave(prompts.shape[1] // 4, dim=1) * prompts)
        edits = edits_of({"vpt.visual.0.stream_in.prompts": gated}, {"vpt": {"deep": False}}, shapes_of(plain))
        loss = -torch.log_softmax(forward(plain, image[None], edits, weights)[0], dim=0)[label]
        found = torch.autograd.grad(loss, (gamma, zeta))
        tokens, pieces, signed = tokens + found[0][:, 0].abs(), pieces + found[1].abs(), signed + found[0][:, 0]
    return tokens, pieces, signed


def with_head(plain, tensors):
    """The weights of a backbone with the head of an adapter."""
    heads = {name: value for name, value in tensors.items() if name.startswith("head.")}
    return trained_weights(plain.state_dict(), heads)


def test_xprompt_keeps_the_most_important_tokens_and_pieces_and_starts_again():
    torch.manual_seed(2)
    method = vp.XPrompt(num_tokens=12, pieces=4, samples=6)
    model = vp.attach(VIT.build(torch.float64), method).eval()
    stages = vp.stages(model, [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])])
    next(stages)
    start = model.peft["default"].state_dict()["xprompt.visual.0.stream_in.prompts"].clone()
    train(model)
    tokens, pieces, signed = importances(model)
    assert next(stages) == 2

    kept = sorted(tokens.argsort(descending=True)[:6].tolist())
    assert kept != sorted(signed.argsort(descending=True)[:6].tolist())  # what means of signed gradients would keep
    ranked = sorted(pieces[kept].flatten().argsort(descending=True)[:12].tolist())
    found = model.peft["default"].state_dict()
    assert found["xprompt.visual.0.stream_in.piece_index"].tolist() == ranked
    assert torch.equal(found["xprompt.visual.0.stream_in.pieces"], start[kept].view(24, -1)[ranked])
    assert model.peft["default"].num_parameters() == 12 * start.shape[1] // 4

    # removed tokens are attended by none; those that are only zero would be
    dense = torch.zeros(24, start.shape[1] // 4, dtype=torch.float64)
    dense[ranked] = found["xprompt.visual.0.stream_in.pieces"]
    dense, plain, outputs = dense.view(6, -1), VIT.build(torch.float64), []
    for prompts in (dense, torch.cat([dense, torch.zeros_like(dense)])):
        edits = edits_of({"vpt.visual.0.stream_in.prompts": prompts}, {"vpt": {"deep": False}}, shapes_of(plain))
        outputs.append(forward(plain, IMAGES, edits, with_head(plain, found)))
    assert (model(IMAGES) - outputs[0]).abs().max() < 1e-10
    assert (model(IMAGES) - outputs[1]).abs().max() > 1e-3
    assert next(stages, None) is None


def test_xprompt_counts():
    """round(.5 * 16 * round(.5 * 20)) pieces of 48 channels on ViT-B/16."""
    assert vp.XPrompt().pieces_kept * 768 // 16 == 3_840
    method = vp.XPrompt(num_tokens=5, token_share=0.7, piece_share=0.3, pieces=8, deep=True)
    assert (method.tokens_kept, method.pieces_kept) == (4, 10)


def test_xprompt_needs_data_and_equal_pieces():
    model = vp.attach(VIT.build(torch.float64), vp.XPrompt(num_tokens=4, pieces=4))
    with pytest.raises(vp.ConfigurationError, match="XPrompt: it chooses by gradients: give stages batches"):
        list(vp.stages(model))
    with pytest.raises(vp.DataError, match="no batch of training data was shown"):
        list(vp.stages(model, []))
    assert model.peft["default"].methods[0].stages_after == 1
    with pytest.raises(vp.ConfigurationError, match="channels, which are not 7 equal pieces"):
        vp.attach(VIT.build(), vp.XPrompt(pieces=7))


# E2VPT


def gate_gradients(model, fields):
    """Sums over samples of absolute gradients in gates before tokens and pieces, of every block, and of signed ones."""
    plain, pieces = VIT.build(torch.float64), fields["pieces"]
    tensors = {name: value.detach() for name, value in model.peft["default"].state_dict().items()}
    prompts = {name: value for name, value in tensors.items() if name.endswith("stream_in.prompts")}
    sums = {
        name: [torch.zeros(len(p)), torch.zeros(len(p), pieces), torch.zeros(len(p))] for name, p in prompts.items()
    }
    for image, label in zip(IMAGES, LABELS, strict=True):
        gates = {
            name: (torch.ones(len(p), 1).double(), torch.ones(len(p), pieces).double()) for name, p in prompts.items()
        }
        flat = [gate.requires_grad_() for pair in gates.values() for gate in pair]
        gated = {
            name: gamma * (zeta.repeat_interleave(prompts[name].shape[1] // pieces, dim=1) * prompts[name])
            for name, (gamma, zeta) in gates.items()
        }
        edits = edits_of(tensors | gated, {"e2vpt": fields}, shapes_of(plain))
        logits = forward(plain, image[None], edits, with_head(plain, tensors))[0]
        found = iter(torch.autograd.grad(-torch.log_softmax(logits, dim=0)[label], flat))
        for total in sums.values():
            gamma, zeta = next(found)[:, 0], next(found)
            total[0] += gamma.abs()
            total[1] += zeta.abs()
            total[2] += gamma
    return sums


def test_e2vpt_prunes_the_prompts_of_each_block_and_starts_again():
    torch.manual_seed(3)
    method = vp.E2VPT(num_tokens=4, num_keys=2, token_share=0.5, piece_share=0.7, pieces=8, samples=6)
    model = vp.attach(VIT.build(torch.float64), method).eval()
    stages = vp.stages(model, [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])])
    next(stages)
    start = {name: value.clone() for name, value in model.peft["default"].state_dict().items()}
    train(model)
    gradients, signed = gate_gradients(model, dataclasses.asdict(method)), 0
    assert next(stages) == 2
    found = model.peft["default"].state_dict()
    for name, (tokens, pieces, with_sign) in gradients.items():
        kept = sorted(tokens.argsort(descending=True)[:2].tolist())
        signed += kept == sorted(with_sign.argsort(descending=True)[:2].tolist())
        ranked = [sorted(pieces[token].argsort(descending=True)[:6].tolist()) for token in kept]
        index = [8 * place + piece for place, each in enumerate(ranked) for piece in each]
        path = name.removesuffix("prompts")
        assert found[f"{path}piece_index"].tolist() == index
        assert torch.equal(found[f"{path}pieces"], start[name][kept].view(16, -1)[index])
    assert signed < len(gradients)  # as published, other tokens would stay in some block
    for name, value in start.items():
        assert name.endswith("stream_in.prompts") or torch.equal(
            found[name], value
        )  # keys, values and the head as well
    assert model.peft["default"].num_parameters() == 3 * (2 * 6 * 4 + 2 * 2 * 32)
    train(model)
    assert next(stages, None) is None


def test_e2vpt_keeps_a_token_and_four_pieces():
    method = vp.E2VPT(token_share=0.05, piece_share=0.05)
    assert (method.tokens_kept, method.pieces_kept) == (1, 4)
    assert vp.E2VPT().stages_after == 0
    with pytest.raises(vp.ConfigurationError, match="E2VPT: there are no prompts to prune"):
        vp.E2VPT(num_tokens=0, token_share=0.5)
    with pytest.raises(vp.ConfigurationError, match="channels, which are not 7 equal pieces"):
        vp.attach(VIT.build(), vp.E2VPT(piece_share=0.5, pieces=7))


# FAR


def test_far_trains_the_neurons_that_priming_moves_most():
    """Two trainings by torch itself, with masks of rows and columns between them, are what the stages do."""
    full, before = fine_tuned(only=("fc1.weight", "fc1.bias", "fc2.weight"))
    changed = {name: (p.detach() - before[name]).abs() for name, p in full.named_parameters() if name in before}
    masks = {}
    for block in range(3):
        first, bias, second = (
            changed[f"blocks.{block}.mlp.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight")
        )
        sizes = torch.stack([first[j].sum() + bias[j] + second[:, j].sum() for j in range(len(bias))])
        chosen = torch.zeros(len(bias)).double()
        chosen[sizes.argsort(descending=True)[: round(0.1 * len(bias))]] = 1
        masks[f"blocks.{block}.mlp.fc1.weight"] = chosen[:, None].expand_as(first)
        masks[f"blocks.{block}.mlp.fc1.bias"] = chosen
        masks[f"blocks.{block}.mlp.fc2.weight"] = chosen.expand_as(second)
    sparse, _ = fine_tuned(masks, only=("fc1.weight", "fc1.bias", "fc2.weight"))

    model, outputs = in_stages(vp.FAR(share=0.1))
    assert torch.equal(*outputs)
    assert model.peft["default"].num_parameters() == 3 * round(0.1 * 64) * (2 * 32 + 1)
    assert distance(model(IMAGES), sparse(IMAGES)) < 1e-10
    assert distance(model(IMAGES), full(IMAGES)) > 1e-3


def test_far_splits_the_neurons_of_a_gated_mlp():
    """A neuron has a row in each half of fc1: without them, and its column of fc2, its change is gone."""
    host = next(host for host in HOSTS if host.name == "eva_fused")
    model = vp.attach(host.build(torch.float64), vp.FAR(share=0.1))
    for stage in vp.stages(model):
        if stage == 1:
            randomise(model.peft["default"])
    found = model.peft["default"].state_dict()
    hidden = model.blocks[0].mlp.fc2.in_features
    for block in range(len(model.blocks)):
        rows, columns = (found[f"far.visual.{block}.{site}.index"] for site in ("fc1", "fc2"))
        assert torch.equal(rows, torch.cat([columns, columns + hidden]))


# PeriodicLoRA


def test_periodic_lora_unloads_a_share_and_keeps_the_rest():
    """Logits are equal about a restart; as published by others, with both factors shrunk, they would not be."""
    method = vp.PeriodicLoRA(rank=2, restarts=1, unloaded=0.4, targets=("q",))
    model = vp.attach(VIT.build(torch.float64), method).eval()
    stages = vp.stages(model)
    next(stages)
    train(model)
    module = model.peft["default"].get_submodule("periodic_lora.visual.0.q")
    before, up, down = model(IMAGES).detach(), module.up.detach().clone(), module.down.detach().clone()
    next(stages)
    assert distance(model(IMAGES), before) < 1e-12
    module = model.peft["default"].get_submodule("periodic_lora.visual.0.q")
    assert distance(module.earlier_up @ module.earlier_down, 0.4 * up @ down) < 1e-15
    assert torch.equal(module.down, down)
    assert distance(module.up, 0.6 * up) < 1e-15
    with torch.no_grad():
        module.down.mul_(0.6)
    assert distance(model(IMAGES), before) > 1e-4
    assert vp.PeriodicLoRA(unloaded=1.0).stages_after == 3


# FISH-DIP


def squares_of(model, number):
    """{name: sum of squared gradients} of the samples with the largest losses, in a plain model."""
    named = dict(model.named_parameters())
    losses = [F.cross_entropy(model(image[None]), label[None]) for image, label in zip(IMAGES, LABELS, strict=True)]
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    for loss in sorted(losses, key=lambda loss: -loss.item())[:number]:
        for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            sums[name] += gradient.square()
    return sums


def test_fish_dip_chooses_by_hard_samples_and_keeps_what_has_left():
    """The merged model is a plain one: its own gradients say what is next, and only that moves."""
    batches = [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])]
    model = vp.attach(VIT.build(torch.float64), vp.FishDip(0.02, among="blocks", samples=2, renewals=2)).eval()
    with pytest.raises(vp.ConfigurationError, match="FishDip waits for data before its first stage"):
        next(vp.stages(model, batches))
    vp.allocate(model, batches)
    masks, before, touched = [], None, {}
    for _ in vp.stages(model, batches):
        if before is not None:
            assert distance(model(IMAGES), before) < 1e-12
        plain, weights = VIT.build(torch.float64).eval(), dict(model.peft["default"].state_dict())
        with torch.no_grad():
            for name, value in merged(model).items():
                plain.get_parameter(name).copy_(value)
        scores = {name: s for name, s in squares_of(plain, 2).items() if name.startswith(("blocks.", "norm."))}
        for name in [name for name in scores if "qkv.bias" in name]:
            scores[name][32:64] = -1  # key biases are no candidates
        number = round(0.02 * sum(int((s >= 0).sum()) for s in scores.values()))
        threshold = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[number - 1]
        chosen = {name: s >= threshold for name, s in scores.items()}
        assert model.peft["default"].num_parameters() == number
        old = merged(model)
        train(model)
        moved = {name: value != old[name] for name, value in merged(model).items() if name in chosen}
        assert all(torch.equal(moved[name], mask) for name, mask in chosen.items())
        touched = {name: mask | touched.get(name, False) for name, mask in chosen.items()}
        masks.append(torch.cat([mask.flatten() for mask in chosen.values()]))
        before = model(IMAGES).detach()
    assert len(masks) == 3
    assert not torch.equal(masks[0], masks[1])
    left = {name: value for name, value in weights.items() if name.endswith("_before")}
    assert left  # some have left, and have kept their values
    method, part = model.peft["default"].methods[0].fold(model.peft["default"].fish_dip)
    assert sum(method.entries.values()) == sum(int(mask.sum()) for mask in touched.values())
    assert method.before is None
    assert {name.rpartition("_")[2] for name, _ in part.named_buffers()} == {"index"}


def merged(model):
    """The weights of a model with its adapter merged, head included."""
    vp.merge(model)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items() if "peft" not in name}
    vp.unmerge(model)
    return weights | {n: v.clone() for n, v in model.peft["default"].state_dict().items() if n.startswith("head.")}


# Diff pruning


def stretched(logits, uniform):
    """min(1, max(0, 3 s - 1.5)) with s = 1 / (1 + exp(-(log u - log(1 - u) + a)))."""
    s = 1 / (1 + torch.exp(-(torch.log(uniform / (1 - uniform)) + logits)))
    return torch.minimum(torch.tensor(1.0), torch.maximum(torch.tensor(0.0), 3 * s - 1.5))


def test_gates_of_diff_pruning_are_closed_and_open_as_often_as_they_should():
    """Exactly 1 with probability sigmoid(a - log 5), exactly 0 with sigmoid(-a); the gradient is the formula's."""
    torch.manual_seed(1)
    for logit in (0.4, 5.0):
        drawn = hard_concrete(torch.full((200_000,), logit, dtype=torch.float64), drawn=True)
        expected = [1 / (1 + math.exp(-(logit - math.log(5)))), 1 / (1 + math.exp(logit))]
        found = [(drawn == value).double().mean().item() for value in (1.0, 0.0)]
        assert all(abs(a - b) < 3e-3 for a, b in zip(found, expected, strict=True))
    uniform = torch.full((), 0.5).double()
    logits = torch.tensor([-2.0, -0.5, 0.1, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(hard_concrete(logits, drawn=False).sum(), logits)[0]
    assert torch.equal(hard_concrete(logits, drawn=False), stretched(logits, uniform))
    s = 1 / (1 + torch.exp(-logits))
    assert distance(ours, torch.where((s > 0.5) & (s < 2.5 / 3), 3 * s * (1 - s), 0.0)) < 1e-15


@pytest.mark.parametrize("structured", [False, True])
def test_diff_pruning_keeps_the_largest_changes_where_they_are(structured):
    """Beside a plain ViT with the weights w0 + z w of a formula; what is kept goes on from z w, the head as well."""
    method = vp.DiffPruning(density=0.03, structured=structured, penalty_weight=0.01)
    plain = VIT.build(torch.float64).eval()
    model = vp.attach(VIT.build(torch.float64), method).eval()
    total = sum(p.numel() for n, p in plain.named_parameters() if not n.startswith("head."))
    changed = total - plain.cls_token.numel() - plain.pos_embed.numel() - 3 * 32  # key biases
    tensors = sum(1 + 2 * (".qkv." in n) for n, _ in plain.named_parameters() if n.startswith(("bl", "patch", "norm")))
    groups = structured * (tensors - 3)
    adapter = model.peft["default"]
    assert adapter.num_parameters() == 2 * changed + groups
    stages = vp.stages(model)
    next(stages)
    expected = 0.01 * (changed + groups) / (1 + math.exp(-5))
    assert abs(vp.penalty(model).item() - expected) < 1e-6 * expected
    with torch.no_grad():
        generator = torch.Generator().manual_seed(4)
        for name, parameter in adapter.named_parameters():
            gate = name.endswith(("_gate", "_group"))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (-5 + noise) if gate else 0.05 * noise
    uniform = torch.full((), 0.5).double()
    values, changes = adapter.state_dict(), {}
    for name in [each for each in values if each.endswith((".weight", ".bias")) and not each.startswith("head.")]:
        change = stretched(values[f"{name}_gate"], uniform) * values[name]
        changes[name] = change * (stretched(values[f"{name}_group"], uniform) if structured else 1)
    number = min(round(0.03 * total), sum(int((each != 0).sum()) for each in changes.values()))
    threshold = torch.cat([each.abs().flatten() for each in changes.values()]).sort(descending=True).values[number - 1]
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            head = name.startswith("head.")
            parameter.copy_(values[name] if head else parameter + of_sites(changes, name, parameter))
    assert distance(model(IMAGES), plain(IMAGES)) < 1e-11
    model.train()
    assert distance(model(IMAGES), plain(IMAGES)) > 1e-3  # there gates are drawn
    model.eval()
    head = values["head.weight"].clone()

    assert next(stages) == 2
    found = model.peft["default"].state_dict()
    assert model.peft["default"].num_parameters() == number
    for name, change in changes.items():
        kept = change.abs() >= threshold
        assert kept.any() == (name in found)
        if kept.any():
            assert distance(found[name], change[kept]) < 1e-15
            assert torch.equal(found[f"{name}_index"], kept.flatten().nonzero()[:, 0].int())
    assert torch.equal(found["head.weight"], head)
    assert vp.penalty(model) == 0
    assert next(stages, None) is None


def of_sites(changes, name, like):
    """The change of a parameter of a plain ViT, given those of the sites of its layers."""
    path, _, part = name.rpartition(".")
    prefix = "diff_pruning.visual"
    if name.endswith(("cls_token", "pos_embed")):
        return torch.zeros_like(like)
    if path.endswith("qkv"):
        block = path.split(".")[1]
        rows = [changes.get(f"{prefix}.{block}.{site}.{part}") for site in "qkv"]
        return torch.cat([torch.zeros(32).double() if each is None else each for each in rows])
    for own, site in (("patch_embed.proj", "patch_embed"), ("blocks.", ""), ("attn.", ""), ("mlp.", "")):
        path = path.replace(own, site)
    return changes[f"{prefix}.{path}.{part}"]


# U-BitFit and S-BitFit


def bias_scores(rate=0.1, steps=3):
    """{name: sum over samples of |shift * gradient|} of the biases of a plain ViT that torch alone has trained."""
    model = VIT.build(torch.float64).eval()
    trained = {n: p for n, p in model.named_parameters() if n.endswith("bias") or n.startswith("head.")}
    before = {name: p.detach().clone() for name, p in trained.items()}
    for _ in range(steps):
        gradients = torch.autograd.grad(F.cross_entropy(model(IMAGES), LABELS), list(trained.values()))
        with torch.no_grad():
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                parameter -= rate * gradient
    scores = {name: torch.zeros_like(p) for name, p in trained.items() if not name.startswith("head.")}
    for image, label in zip(IMAGES, LABELS, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        for name, gradient in zip(scores, torch.autograd.grad(loss, [trained[n] for n in scores]), strict=True):
            scores[name] += ((trained[name].detach() - before[name]) * gradient).abs()
    # the sites are those of the sited block: q, k and v apart, of which keys have no gradient
    found = {}
    for name, score in scores.items():
        if name.endswith("qkv.bias"):
            q, _, v = score.chunk(3)
            block = name.split(".")[1]
            found |= {f"visual.{block}.q.bias": q, f"visual.{block}.v.bias": v}
        else:
            for own, site in (("patch_embed.proj", "patch_embed"), ("blocks.", ""), ("attn.", ""), ("mlp.", "")):
                name = name.replace(own, site)
            found[f"visual.{name}"] = score
    return found


def kept_biases(model):
    return {
        key.removeprefix("pruned_bit_fit.").removesuffix("_index"): value.tolist()
        for key, value in model.peft["default"].state_dict().items()
        if key.endswith("_index")
    }


def test_bit_fit_is_pruned_by_what_the_loss_would_lose():
    scores = bias_scores()
    pool = sum(score.numel() for score in scores.values())
    ranked = sorted(((v, n, i) for n, s in scores.items() for i, v in enumerate(s.tolist())), reverse=True)
    expected = {}
    for _, name, index in ranked[: round(0.1 * pool)]:
        expected.setdefault(name, []).append(index)
    model, outputs = in_stages(vp.PrunedBitFit(samples=6), [(IMAGES, LABELS)])
    assert kept_biases(model) == {name: sorted(indices) for name, indices in expected.items()}
    assert torch.equal(*outputs)

    model, _ = in_stages(vp.PrunedBitFit(samples=6, structured=True), [(IMAGES, LABELS)])
    best = sorted(scores, key=lambda name: scores[name].sum(), reverse=True)[: round(0.1 * len(scores))]
    assert kept_biases(model) == {name: [*range(len(scores[name]))] for name in best}


def test_bit_fit_is_pruned_in_rounds():
    """To the root of the density after the first of two; what has gone does not come back."""
    model, kept = vp.attach(VIT.build(torch.float64), vp.PrunedBitFit(density=0.04, rounds=2, samples=6)).eval(), []
    for _ in vp.stages(model, [(IMAGES, LABELS)]):
        kept.append({(name, index) for name, indices in kept_biases(model).items() for index in indices})
        train(model)
    pool, first, second = kept
    plain = vp.attach(VIT.build(), vp.BitFit(key_bias=False))
    assert len(pool) == plain.peft["default"].num_parameters()
    assert (len(first), len(second)) == (round(0.2 * len(pool)), round(0.04 * len(pool)))
    assert second < first < pool


# ReLoRA


def test_relora_grows_beyond_its_rank_and_goes_on_from_where_it_was(tmp_path):
    model = vp.attach(VIT.build(torch.float64), vp.ReLoRA(rank=2, alpha=4, restarts=2, targets=("q",))).eval()
    module, downs, after = lambda: model.peft["default"].get_submodule("re_lora.visual.0.q"), [], None
    for stage in vp.stages(model):
        assert after is None or (model(IMAGES) - after).abs().max() < 1e-12
        assert not module().up.any()
        earlier = module().earlier_up.clone()
        assert earlier.shape[1] == 2 * (stage - 1)
        downs.append(module().down.detach().clone())
        train(model)
        # in the published code B and a trained scale are both zero after a restart, and neither moves again
        assert module().up.any()
        assert not torch.equal(module().down, downs[-1])
        assert torch.equal(module().earlier_up, earlier)
        after = model(IMAGES).detach()
    assert stage == 3
    assert torch.linalg.matrix_rank(torch.cat(downs)) == 6  # drawn anew each time
    weight = model.blocks[0].attn.qkv.weight[:32].detach().clone()
    vp.save(model, tmp_path / "adapter")
    vp.merge(model)
    assert torch.linalg.matrix_rank(model.blocks[0].attn.qkv.weight[:32] - weight, rtol=1e-9) == 6
    loaded = VIT.build(torch.float64)
    vp.load(loaded, tmp_path / "adapter")
    assert loaded.peft["default"].methods == (vp.LoRA(rank=6, alpha=12, targets=("q",)),)
    assert (loaded.eval()(IMAGES) - after).abs().max() < 1e-6  # saved in float32


# What is refused


def test_a_first_stage_that_moves_nothing_leaves_nothing_to_choose():
    model = vp.attach(VIT.build(), vp.LTSFT())
    before = model(IMAGES.float())
    with pytest.raises(vp.ConfigurationError, match=r"^LTSFT: its first stage has moved no weight to choose by$"):
        list(vp.stages(model))
    assert torch.equal(model(IMAGES.float()), before)


def test_one_method_in_stages_at_a_time():
    with pytest.raises(vp.ConfigurationError, match="LTSFT and LTSFT are both trained in stages"):
        next(vp.stages(vp.attach(VIT.build(), [vp.LTSFT(), vp.LTSFT()])))
    with pytest.raises(vp.ConfigurationError, match="LTSFT is trained in stages and FishMask waits for data"):
        next(vp.stages(vp.attach(VIT.build(), [vp.LTSFT(), vp.FishMask()])))


def test_any_other_method_has_one_stage():
    model = vp.attach(VIT.build(), vp.LoRA(rank=2))
    adapter = model.peft["default"]
    assert list(vp.stages(model)) == [1]
    assert model.peft["default"] is adapter
    vp.attach(model, vp.LoRA(rank=2), "second")
    with pytest.raises(vp.ConfigurationError, match="say which one is trained with name="):
        next(vp.stages(model))
