"""AdaLoRA's budget, importance and penalty by formula, in a plain loop, under Lightning, and resumed."""

import copy
import json
import math
import types

import pytest
import timm
import torch
from conftest import distance, randomise
from reference.hosts import HOSTS
from small_runs import arguments, draw_images, results, run

import visionpeft as vp
from visionpeft import fit
from visionpeft.methods.adalora import Triplets
from visionpeft.runs.history import EpochHistory, read_history
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.tasks import ImageClassification

HOST = next(host for host in HOSTS if host.name == "vit_cls")
METHOD = vp.AdaLoRA(rank=2, initial_rank=4, targets=("q", "v", "fc1"), start=0.2, end=0.8, interval=2)
LAYERS = 3 * 3
TOTAL = 10


def loop(model, method, steps, total=TOTAL, after=vp.after_step, first=0, optimiser=None, seen=None):
    """A plain training loop; gives the optimiser."""
    optimiser = optimiser or torch.optim.Adam(vp.trainable_parameters(model), lr=0.02)
    for step in range(first + 1, first + steps + 1):
        optimiser.zero_grad()
        inputs = HOST.inputs(4, torch.float64, seed=step)
        loss = model(inputs).square().mean() + vp.penalty(model)
        loss.backward()
        optimiser.step()
        if seen is not None:
            seen.append({n: (p.detach().clone(), p.grad.clone()) for n, p in triplets(model).items()})
        after(model, step, total)
    return optimiser


def attached(method=METHOD):
    torch.manual_seed(0)
    return vp.attach(HOST.build(torch.float64), method, head=False).eval()


def triplets(model):
    return dict(model.peft["default"].named_parameters())


def values(model):
    return {name: p for name, p in triplets(model).items() if name.endswith(".values")}


def number_of_values(model):
    return sum(int((p != 0).sum()) for p in values(model).values())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_skipped_step_leaves_no_trace_in_the_importance(bad):
    """As under fp16, where the gradient scaler skips a step whose gradients overflow in one layer."""

    def trained(overflow):
        model, step = attached(), 0
        optimiser = loop(model, METHOD, 3)
        if overflow:
            before = {name: b.clone() for name, b in model.peft["default"].named_buffers()}
            optimiser.zero_grad()
            (model(HOST.inputs(4, torch.float64, seed=9)).square().mean() + vp.penalty(model)).backward()
            next(iter(values(model).values())).grad[0] = bad
            step = 1  # the optimiser's is not made
            vp.after_step(model, 3, TOTAL)
            after = dict(model.peft["default"].named_buffers())
            assert all(torch.equal(before[n], after[n]) for n in before if not n.endswith("kept"))
        loop(model, METHOD, 6 - step, first=3 + step, optimiser=optimiser)
        return model

    model = trained(overflow=True)
    buffers = dict(model.peft["default"].named_buffers())
    assert all(b.isfinite().all() for b in buffers.values())
    spread = torch.cat([b.flatten() for n, b in buffers.items() if n.endswith("sensitivity")])
    assert spread.unique().numel() > 100  # ranks are chosen by something
    finite = trained(overflow=False)
    assert all(b.isfinite().all() for _, b in finite.peft["default"].named_buffers())


def test_under_a_gradient_scaler():
    """torch's own scaler, whose scale overflows at first: importance stays finite, and follows the steps made."""
    model = attached().float()
    optimiser = torch.optim.SGD(vp.trainable_parameters(model), lr=0.01)
    scaler, skipped = torch.amp.GradScaler("cpu", init_scale=1e37, backoff_factor=1e-4, growth_interval=100), []
    for step in range(1, TOTAL + 1):
        optimiser.zero_grad()
        loss = model(HOST.inputs(4, seed=step)).square().mean() * 1e3 + vp.penalty(model)
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimiser)
        scaler.update()
        skipped.append(scaler.get_scale() < before)
        vp.after_step(model, step, TOTAL)
    assert any(skipped)
    assert not all(skipped)
    buffers = dict(model.peft["default"].named_buffers())
    assert all(b.isfinite().all() for b in buffers.values())
    assert max(b.max() for n, b in buffers.items() if n.endswith("sensitivity")) > 0


@pytest.mark.parametrize("layers", [1, 9, 72])
def test_budget_is_the_papers_cubic_rounded_down(layers):
    method = vp.AdaLoRA(rank=4, initial_rank=12, start=0.1, end=0.6)
    first, last, total = 100, 600, 1000
    for step in (1, 50, 100):
        assert method.budget(step, total, layers) == 12 * layers
    for step in (101, 300, 599):
        rest = 1 - (step - first) / (total - first - (total - last))
        assert method.budget(step, total, layers) == math.floor(4 * layers + (12 - 4) * layers * rest**3)
    for step in (600, 601, 1000):
        assert method.budget(step, total, layers) == 4 * layers


def test_budget_is_that_of_peft():
    """Its schedule of totals, at every step; rounded to the nearest instead, about every second would differ."""
    from peft.tuners.adalora.config import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    layers, total = 72, 200
    config = AdaLoraConfig(init_r=12, target_r=8, tinit=20, tfinal=60, deltaT=10, total_step=total)
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.peft_config, allocator.init_bgt, allocator.target_bgt = config, 12 * layers, 8 * layers
    method = vp.AdaLoRA(rank=8, initial_rank=12, start=0.1, end=0.7)
    theirs = [allocator.budget_schedule(step)[0] for step in range(1, total + 1)]
    assert [method.budget(step, total, layers) for step in range(1, total + 1)] == theirs
    exact = [(12 - 8) * layers * (1 - (step - 20) / 120) ** 3 + 8 * layers for step in range(21, 140)]
    assert sum(round(value) != int(value) for value in exact) > 40


def test_penalty_is_the_mean_distance_from_orthogonal_factors():
    model = attached(vp.AdaLoRA(rank=2, initial_rank=3, targets=("q", "fc2"), orthogonality=0.3))
    randomise(model.peft["default"])
    norms = []
    for name, factor in triplets(model).items():
        if name.endswith((".P", ".Q")):
            gram = factor.T @ factor if name.endswith(".P") else factor @ factor.T
            norms.append(((gram - torch.eye(3, dtype=torch.float64)) ** 2).sum() ** 0.5)
    expected = 0.3 * sum(norms) / len(norms)
    assert len(norms) == 2 * 2 * 3
    assert vp.penalty(model).item() == pytest.approx(expected.item(), rel=1e-12)
    formula = 0.3 * sum(norm**2 for norm in norms)  # of the paper, which no published number was made with
    assert abs(vp.penalty(model).item() / formula.item() - 1) > 0.5
    assert vp.penalty(model).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert vp.penalty(model).item() == pytest.approx(expected.item(), rel=1e-12)


def test_penalty_at_the_start_is_the_published_one():
    """On the shapes of ViT-B/16: .214 with the weight .1, where the sum of squared norms would be 71.1."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", depth=1)  # every block has the same shapes
    vp.attach(model, vp.AdaLoRA(rank=8, initial_rank=12, orthogonality=0.1), head=False)
    assert vp.penalty(model).item() == pytest.approx(0.214, abs=0.002)
    grams = [p.T @ p if n.endswith(".P") else p @ p.T for n, p in triplets(model).items() if n[-1] in "PQ"]
    formula = 12 * 0.1 * sum((gram - torch.eye(12)).square().sum() for gram in grams)
    assert formula.item() == pytest.approx(71.1, abs=1.0)


def test_change_and_penalty_are_those_of_peft():
    """peft's module with the same factors, scaled by alpha / initial rank, and its penalty and gradients."""
    import peft

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(32, 32)).double()
    config = peft.AdaLoraConfig(
        init_r=3, target_r=2, lora_alpha=6, lora_dropout=0.0, target_modules=["0"], orth_reg_weight=0.3, total_step=9
    )
    theirs = peft.get_peft_model(layer, config)
    of_theirs = {n.rpartition(".lora_")[2][0]: p for n, p in theirs.named_parameters() if ".lora_" in n}
    model = vp.attach(HOST.build(torch.float64), vp.AdaLoRA(2, 3, ("q",), alpha=6, blocks=0, orthogonality=0.3))
    module = next(m for m in model.peft["default"].modules() if isinstance(m, Triplets))
    randomise(model.peft["default"])
    with torch.no_grad():
        of_theirs["A"].copy_(module.Q)
        of_theirs["E"].copy_(module.values[:, None])
        of_theirs["B"].copy_(module.P)
    x = torch.randn(5, 32, dtype=torch.float64)
    plain = torch.nn.functional.linear(x, layer[0].base_layer.weight, layer[0].base_layer.bias)
    ours = module(x, plain, None, None)
    assert distance(ours, theirs(x)) < 1e-5  # peft divides by rank + 1e-5
    assert distance(ours - plain, theirs(x) - plain) < 1e-5
    assert distance(ours - plain, (theirs(x) - plain) / 2) > 0.1  # which a scale of 1 would give

    wrapped = peft.get_peft_model(Scored(), config)
    named = {n.rpartition(".lora_")[2][0]: p for n, p in wrapped.named_parameters() if ".lora_" in n}
    with torch.no_grad():
        for name, tensor in of_theirs.items():
            named[name].copy_(tensor)
    penalty = wrapped.base_model(x).loss  # nothing but the penalty
    assert vp.penalty(model).item() == pytest.approx(penalty.item(), rel=1e-12)
    vp.penalty(model).backward()
    penalty.backward()
    assert torch.allclose(module.P.grad, named["B"].grad, rtol=1e-10, atol=1e-14)
    assert torch.allclose(module.Q.grad, named["A"].grad, rtol=1e-10, atol=1e-14)


class Scored(torch.nn.Sequential):
    """A model whose loss is zero, to which peft adds its penalty."""

    def __init__(self):
        super().__init__(torch.nn.Linear(32, 32).double())

    def forward(self, x):
        """An output with a loss."""
        super().forward(x)
        return types.SimpleNamespace(loss=torch.zeros((), dtype=torch.float64))


def test_alpha_is_saved_in_the_factors(tmp_path):
    """The folded LoRA has ranks of its own and no alpha, and computes the same."""
    model = attached(vp.AdaLoRA(rank=2, initial_rank=4, targets=("q", "v", "fc1"), interval=2, alpha=12))
    loop(model, METHOD, TOTAL)
    inputs = HOST.inputs(4, torch.float64, seed=99)
    vp.save(model, tmp_path)
    fresh = HOST.build(torch.float64)
    vp.load(fresh, tmp_path)
    assert distance(fresh.eval()(inputs), model(inputs)) < 1e-13
    assert distance(HOST.build(torch.float64).eval()(inputs), model(inputs)) > 1e-3


def test_penalty_is_that_of_the_active_adapters():
    model = attached()
    vp.attach(model, vp.LoRA(rank=2), "plain", head=False)
    assert vp.penalty(model) > 0
    vp.activate(model, "plain")
    assert vp.penalty(model) == 0
    vp.after_step(model, 1, 2)  # nothing to do, and no gradients needed


def expected_choice(seen, method, budget):
    """The importance of section 3.2 followed over all steps so far: which triplets are among the best `budget`."""
    smooth, vary = {}, {}
    for step in seen:
        for name, (parameter, gradient) in step.items():
            now = (parameter * gradient).abs()
            smooth[name] = method.beta1 * smooth.get(name, torch.zeros_like(now)) + (1 - method.beta1) * now
            change = (now - smooth[name]).abs()
            vary[name] = method.beta2 * vary.get(name, torch.zeros_like(now)) + (1 - method.beta2) * change
    scores = {}
    for name in smooth:
        if not name.endswith(".values"):
            continue
        stem = name.removesuffix("values")
        of_values, of_P, of_Q = (smooth[stem + part] * vary[stem + part] for part in ("values", "P", "Q"))
        for i in range(len(of_values)):
            scores[name, i] = of_values[i] + of_P[:, i].sum() / len(of_P) + of_Q[i].sum() / of_Q.shape[1]
    best = sorted(scores, key=lambda key: -scores[key])[:budget]
    return {key: key in best for key in scores}


def test_choices_follow_the_importance():
    model, seen, checked = attached(), [], []

    def after(model, step, total):
        before = {name: p.detach().clone() for name, p in values(model).items()}
        vp.after_step(model, step, total)
        first, last = 2, 8
        if (first <= step < last and step % 2 == 0) or step == last:
            checked.append(step)
            kept = expected_choice(seen, METHOD, METHOD.budget(step, total, LAYERS))
            for name, p in values(model).items():
                expected = [v if kept[name, i] else 0.0 for i, v in enumerate(before[name].tolist())]
                assert p.tolist() == expected
        elif step < last:
            assert all(torch.equal(before[name], p) for name, p in values(model).items())

    optimiser = loop(model, METHOD, TOTAL, after=after, seen=seen)
    assert checked == [2, 4, 6, 8]
    assert number_of_values(model) == LAYERS * METHOD.rank
    ranks = {int((p != 0).sum()) for p in values(model).values()}
    assert len(ranks) > 1  # the budget went to some layers more than to others
    assert optimiser.param_groups[0]["lr"] == 0.02


def test_the_last_choice_is_final_and_earlier_ones_are_not():
    model, kept = attached(), []

    def after(model, step, total):
        vp.after_step(model, step, total)
        kept.append({name: (p != 0).tolist() for name, p in values(model).items()})

    loop(model, METHOD, TOTAL, after=after)
    assert kept[7] == kept[8] == kept[9]
    assert sum(sum(row) for row in kept[4].values()) == 4 * LAYERS  # between two choices all have a value again
    assert sum(sum(row) for row in kept[5].values()) < 4 * LAYERS


@pytest.mark.parametrize(
    ("total", "start", "end"),
    [(2, 0.5, 0.6), (5, 0.1, 0.14), (4, 0.0, 0.05), (1, 0.0, 0.3), (5, 0.2, 1.0)],
    ids=["in one step", "in the first step", "before the first step", "one step", "to the end"],
)
def test_a_short_training_ends_at_the_final_rank(total, start, end):
    """However few steps lie between start and end: rounded, they may be the same step, or before the first."""
    method = vp.AdaLoRA(rank=1, initial_rank=3, targets=("q", "v"), start=start, end=end, interval=2)
    model = attached(method)
    loop(model, method, total, total)
    assert number_of_values(model) == 6
    assert method.budget(total, total, 6) == 6


def test_without_after_step_nothing_is_pruned():
    """What the other tests find is the work of `after_step`."""
    model = attached()
    loop(model, METHOD, TOTAL, after=lambda *_: None)
    assert number_of_values(model) == 4 * LAYERS


def test_gradients_that_are_gone_are_missed():
    model = attached()
    with pytest.raises(vp.ConfigurationError, match=r"between optimizer.step\(\) and zero_grad\(\)"):
        vp.after_step(model, 1, 10)
    with pytest.raises(vp.ConfigurationError, match="step 11 is none of the steps 1 to 10"):
        vp.after_step(model, 11, 10)


def test_state_dict_resumes_the_loop():
    whole = attached()
    loop(whole, METHOD, TOTAL)
    part = attached()
    optimiser = loop(part, METHOD, 5)
    resumed = attached()
    resumed.load_state_dict(part.state_dict())
    own = torch.optim.Adam(vp.trainable_parameters(resumed), lr=0.02)
    own.load_state_dict(optimiser.state_dict())
    loop(resumed, METHOD, 5, first=5, optimiser=own)
    states = [model.peft["default"].state_dict() for model in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_saved_as_lora_of_the_ranks_that_are_left(tmp_path):
    model = attached()
    loop(model, METHOD, TOTAL)
    inputs = HOST.inputs(4, torch.float64, seed=99)
    output = model(inputs)
    vp.save(model, tmp_path)
    fresh = HOST.build(torch.float64)
    vp.load(fresh, tmp_path)
    assert distance(fresh.eval()(inputs), output) < 1e-13
    (method,) = fresh.peft["default"].methods
    assert isinstance(method, vp.LoRA)
    found = {
        name.removeprefix("lora.").removesuffix(".A"): len(p) for name, p in triplets(fresh).items() if ".A" in name
    }
    expected = {
        name.removeprefix("ada_lora.").removesuffix(".values"): max(1, int((p != 0).sum()))
        for name, p in values(model).items()
    }
    assert found == expected
    description = json.loads((tmp_path / "adapter.json").read_text())
    assert description["methods"][0]["class"] == "LoRA"


@pytest.mark.parametrize(
    "method",
    [
        vp.AdaLoRA(rank=1, initial_rank=3, targets=("reduction", "fc2")),
        vp.SoRA(rank=3, threshold=0.5, targets=("reduction", "fc2")),
    ],
    ids=["AdaLoRA", "SoRA"],
)
def test_ranks_between_stages_are_saved(method, tmp_path):
    """A layer before a stage has the number of the stage in its name, which is no index of a block."""
    torch.manual_seed(0)
    options = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 2, 4)}
    made = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **options)
    model = vp.attach(copy.deepcopy(made), method, head=False)
    optimiser = torch.optim.Adam(vp.trainable_parameters(model), lr=0.02)
    for step in range(1, 4):
        optimiser.zero_grad()
        (model(torch.randn(2, 3, 32, 32)).square().mean() + vp.penalty(model)).backward()
        optimiser.step()
        vp.after_step(model, step, 3)
    vp.save(model, tmp_path)
    vp.load(made, tmp_path)
    (saved,) = made.peft["default"].methods
    assert any(rank < 3 for rank in saved.overrides.values())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = made.eval()(images), model.eval()(images)
        assert distance(found, expected) < 1e-5
        vp.disable(model)
        assert distance(model(images), expected) > 1e-4


@pytest.mark.parametrize("steps", [0, 3])
def test_saved_while_all_triplets_act(tmp_path, steps):
    """Before and between choices no triplet is dropped, and the loaded adapter computes the same bits."""
    model = attached()
    loop(model, METHOD, steps)
    inputs = HOST.inputs(4, torch.float64, seed=99)
    vp.save(model, tmp_path)
    fresh = HOST.build(torch.float64)
    vp.load(fresh, tmp_path)
    assert torch.equal(fresh.eval()(inputs), model(inputs))
    assert all(len(p) == 4 for name, p in triplets(fresh).items() if name.endswith(".A"))


def test_saved_from_two_towers_and_beside_lora(tmp_path):
    """Layers of two towers get one rank, and the names of two LoRAs do not collide."""
    host = next(host for host in HOSTS if host.name == "clip_whole")
    model = host.build(torch.float64)
    adaptive = vp.AdaLoRA(rank=1, initial_rank=3, targets=("q", "fc1"), towers=["visual", "text"])
    vp.attach(model, [vp.LoRA(rank=2, targets=("v",)), adaptive])
    randomise(model.peft["default"])
    with torch.no_grad():
        layer = model.peft["default"].ada_lora.visual["0"]["q"]
        layer.kept[0] = layer.values[0] = 0
    model.eval()
    inputs = host.inputs(dtype=torch.float64)
    vp.save(model, tmp_path)
    fresh = host.build(torch.float64)
    vp.load(fresh, tmp_path)
    assert distance(host.run(fresh.eval(), inputs), host.run(model, inputs)) < 1e-13
    assert set(fresh.peft["default"].method_keys) == {"lora", "lora_1"}


def test_merges_and_combines_as_low_rank_changes():
    model = attached()
    loop(model, METHOD, TOTAL)
    inputs = HOST.inputs(4, torch.float64, seed=99)
    output = model(inputs)
    vp.combine(model, {"default": 1.0}, "copy", head=False)
    assert distance(model(inputs), output) < 1e-12
    vp.activate(model, "default")
    vp.merge(model)
    assert distance(model(inputs), output) < 1e-12


# under Lightning

OPTIONS = [
    *("--model.method", "AdaLoRA", "--model.method.rank", "2", "--model.method.initial_rank", "4"),
    *("--model.method.targets", "[q, v]", "--model.method.interval", "2", "--model.method.start", "0.2"),
    *("--model.method.dropout", "0.2", "--model.method.orthogonality", "0.5"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("data") / "squares")


def ranks_of(run_directory):
    description = vp.read_metadata(RunDirectory(run_directory).adapter)
    (method,) = description["methods"]
    assert method["class"] == "LoRA"
    return method["fields"]["rank"], method["fields"]["overrides"]


def state_of(run_directory):
    return torch.load(RunDirectory(run_directory).last_checkpoint, weights_only=True)["state_dict"]


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def test_a_run_prunes_by_itself_and_resumes(tmp_path, images, monkeypatch):
    """No callback, no user code: the run ends with the target rank, and an interrupted one with the same numbers."""
    torch.set_num_threads(1)
    whole = run(tmp_path / "whole", images, *OPTIONS, epochs=5)
    state = state_of(whole)
    ranks = [int((value != 0).sum()) for key, value in state.items() if key.endswith(".values")]
    assert sum(ranks) == 2 * len(ranks)
    assert all(value.sum() > 0 for key, value in state.items() if key.endswith("sensitivity"))
    original = EpochHistory.on_train_epoch_end

    def fail_in_third_epoch(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise ZeroDivisionError
        return original(self, trainer, pl_module)

    with monkeypatch.context() as patch:
        patch.setattr(EpochHistory, "on_train_epoch_end", fail_in_third_epoch)
        with pytest.raises(ZeroDivisionError):
            fit.main([*arguments(images, *OPTIONS, epochs=5), "--output", str(tmp_path / "parts")])
    (part,) = (tmp_path / "parts").iterdir()
    assert fit.main(["--resume", str(part)]) == 0
    assert results(part)["test"] == results(whole)["test"]
    assert without_seconds(read_history(part / "metrics.csv")) == without_seconds(read_history(whole / "metrics.csv"))
    resumed = state_of(part)
    assert resumed.keys() == state.keys()
    assert all(torch.equal(resumed[key], state[key]) for key in state)
    assert ranks_of(part) == ranks_of(whole)


def test_steps_are_counted_over_accumulated_batches(tmp_path, images, monkeypatch):
    counted = []
    after = vp.AdaLoRA.after_step

    def count(self, part, step, total_steps):
        counted.append((step, total_steps))
        after(self, part, step, total_steps)

    monkeypatch.setattr(vp.AdaLoRA, "after_step", count)
    # 30 images: training has some batches of 8 in an epoch, each two of which make a step.
    run(tmp_path, images, *OPTIONS, "--trainer.accumulate_grad_batches", "2", epochs=3)
    total = counted[-1][1]
    assert counted == [(step, total) for step in range(1, total + 1)]
    assert total > 3


def test_the_penalty_is_in_the_gradient_and_not_in_the_measured_loss():
    task = ImageClassification(
        vp.AdaLoRA(rank=1, initial_rank=2, targets=("q",), orthogonality=2.0),
        ["a", "b", "c"],
        backbone="test_vit",
        pretrained=False,
        backbone_kwargs={"img_size": 32},
    )
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    measured = []
    task._measure = lambda metrics, loss, logits, labels, counts: measured.append(loss.item())
    loss = task.training_step((images, labels), 0)
    assert loss.item() == pytest.approx(measured[0] + vp.penalty(task.model).item(), rel=1e-5)
    assert vp.penalty(task.model) > 1
