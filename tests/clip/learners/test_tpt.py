"""Test-time prompt tuning against a float64 loop over images written out here."""

import math

import pytest
import torch
from clip_reference import (
    NAMES,
    clip_model,
    image_features,
    images,
    lively_,
    plain_features,
    prompt_features,
    scaled,
    tokenizer,
)

from visionpeft.clip.gradients import gradients_of
from visionpeft.clip.learners import TPT, CoOp, ZeroShot
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.clip.views import confident, draw_views, marginal_entropy
from visionpeft.errors import ConfigurationError, StorageError

CLEAN = [name.replace("_", " ") for name in NAMES]


def views(batch=3, count=20, dtype=torch.float64, seed=0):
    """Random views (batch, count, 3, 32, 32)."""
    return images(batch * count, dtype=dtype, seed=seed).unflatten(0, (batch, count))


def tuned_by_hand(clip, start, features, steps=1, selection=0.1, lr=5e-3, decay=1e-2, position="end"):
    """The tuned context for unit features (views, e) of one image, with AdamW written out."""
    context = start.clone()
    first, second = torch.zeros_like(context), torch.zeros_like(context)
    kept = None
    for step in range(1, steps + 1):
        context = context.detach().requires_grad_()
        logits = scaled(clip, features, prompt_features(clip, NAMES, context, position))
        p = logits.softmax(1)
        if kept is None:
            entropies = [-(row * row.log()).sum().item() for row in p]
            kept = sorted(range(len(p)), key=entropies.__getitem__)[: max(1, int(len(p) * selection))]
        mean = p[kept].mean(0)
        (g,) = torch.autograd.grad(-(mean * mean.log()).sum(), context)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        m, v = first / (1 - 0.9**step), second / (1 - 0.999**step)
        context = context.detach() * (1 - lr * decay) - lr * m / (v.sqrt() + 1e-8)
    return context


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("steps", [1, 3])
def test_each_image_is_tuned_as_the_formula_says(position, steps):
    learner = TPT(clip_model(), tokenizer(), NAMES, position=position, steps=steps, selection=0.3)
    start = learner.vectors.detach().clone()
    assert torch.equal(start, learner.clip.token_embedding.weight[[320, 1125, 539, 320]])
    x = views()
    logits = learner(x)
    for own, pictures in zip(logits, x, strict=True):
        f = image_features(learner.clip, pictures)
        context = tuned_by_hand(learner.clip, start, f, steps, selection=0.3, position=position)
        expected = scaled(learner.clip, f[:1], prompt_features(learner.clip, NAMES, context, position))[0]
        torch.testing.assert_close(own, expected.detach(), rtol=0, atol=1e-7)
    untuned = scaled(learner.clip, image_features(learner.clip, x[:, 0]), learner.text_features())
    assert (logits - untuned).abs().max() > 1e-3
    assert torch.equal(learner.vectors, start)


@pytest.mark.parametrize("steps", [1, 2])
def test_many_images_at_once_equal_one_by_one(steps):
    learner = TPT(clip_model(), tokenizer(), NAMES, steps=steps)
    x = views(5)
    together = learner(x)
    alone = torch.cat([learner(one[None]) for one in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(learner(x[order]), together[order], rtol=0, atol=1e-9)
    assert torch.equal(learner(x), together)


def test_first_step_moves_every_value_by_the_learning_rate():
    learner = TPT(clip_model(), tokenizer(), NAMES)
    features = learner.image_features(views(4))
    tuned = learner.tune(features)
    moved = (tuned - 0.99995 * learner.vectors.detach()).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.005), rtol=1e-3, atol=0)
    assert not torch.equal(tuned[0], tuned[1])


def test_selection_and_loss():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 64, 7, generator=generator, dtype=torch.float64)
    features = torch.randn(2, 64, 5, generator=generator, dtype=torch.float64)
    chosen = confident(features, logits, 0.1)
    assert chosen.shape == (2, 6, 5)
    for image in range(2):
        p = logits[image].softmax(1)
        entropy = -(p * p.log()).sum(1)
        expected = features[image][entropy.topk(6, largest=False).indices]
        assert torch.equal(chosen[image].sort(0).values, expected.sort(0).values)
    assert confident(features[:, :3], logits[:, :3], 0.1).shape == (2, 1, 5)
    mean = logits.softmax(2).mean(1)
    torch.testing.assert_close(marginal_entropy(logits), -(mean * mean.log()).sum(1))
    sure = torch.zeros(1, 2, 3, dtype=torch.float32)
    sure[..., 0] = 1e5
    sure.requires_grad_()
    (gradient,) = torch.autograd.grad(marginal_entropy(sure).sum(), sure)
    assert marginal_entropy(sure).item() == 0
    assert gradient.isfinite().all()
    uniform = torch.zeros(1, 4, 8)
    assert math.isclose(marginal_entropy(uniform).item(), math.log(8), rel_tol=1e-6)


def test_chosen_views_stay_chosen():
    learner = TPT(clip_model(), tokenizer(), NAMES, steps=3, lr=0.5, selection=0.5)
    features = learner.image_features(views(1, 8))
    context = learner.tune(features)[0]
    expected = tuned_by_hand(
        learner.clip, learner.vectors.detach(), features[0], steps=3, lr=0.5, selection=0.5, position="end"
    )
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-6)


def test_learning_rate_zero_is_zero_shot():
    learner = TPT(clip_model(), tokenizer(), NAMES, lr=0.0)
    zero_shot = ZeroShot(clip_model(), tokenizer(), NAMES)
    torch.testing.assert_close(learner(views()), zero_shot(views()[:, 0]), rtol=0, atol=1e-10)
    expected = plain_features(learner.clip, [f"a photo of a {name}." for name in CLEAN])
    torch.testing.assert_close(learner.text_features(), expected, rtol=0, atol=1e-11)


def test_starts_from_a_coop_prompt(tmp_path):
    clip = clip_model()
    coop = lively_(CoOp(clip, tokenizer(), NAMES, context_length=3, position="middle"))
    learner = TPT(clip, tokenizer(), NAMES, context=coop)
    assert learner.num_tuned == 3 * 32
    assert learner.position == "middle"
    torch.testing.assert_close(learner.text_features(), coop.text_features(), rtol=0, atol=1e-12)
    from_tensor = TPT(clip, tokenizer(), NAMES, context=coop.vectors.detach(), position="middle")
    assert torch.equal(from_tensor(views()), learner(views()))
    save_learner(learner, tmp_path)
    loaded = load_learner(tmp_path, clip_model(), tokenizer())
    assert torch.equal(loaded(views()), learner(views()))
    assert loaded.options == learner.options
    coop.vectors.data.zero_()
    assert learner.vectors.abs().max() > 0.1


def test_first_text_features_are_worked_out_once():
    learner = TPT(clip_model(), tokenizer(), NAMES)
    calls = []
    run = learner.text.encode
    learner.text.encode = lambda *args, **options: calls.append(torch.is_grad_enabled()) or run(*args, **options)
    x = views(6)
    for one in x:
        learner(one[None])
    assert calls == [True] + [False] * 6  # with a graph for the first image, then to predict each
    kept = learner.tune(learner.image_features(x))
    for change in ("vectors", "names", "weights", "precision"):
        before = calls.count(True)
        if change == "vectors":
            learner.vectors.data.mul_(1.01)
        elif change == "names":
            learner.set_class_names(["heron", "owl", "cat"])
        elif change == "weights":
            learner.clip.ln_final.weight.mul_(1.5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=change == "precision"):
            other = learner.tune(learner.image_features(x))
        assert calls.count(True) == before + 1, change
        assert not torch.equal(other, kept)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_kept_graph_gives_the_gradient_of_a_fresh_one(chunk_size):
    learner = TPT(clip_model(), tokenizer(), NAMES)
    learner.chunk_size = chunk_size
    start, graph = learner._first_texts()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        upstream = torch.randn(graph.shape, generator=generator, dtype=torch.float64)
        (kept,) = gradients_of(learner.text, graph, [start], upstream, keep_graph=True)
        learner._kept.clear()
        fresh_start, fresh = learner._first_texts()
        assert fresh is not graph
        assert torch.equal(kept, gradients_of(learner.text, fresh, [fresh_start], upstream)[0])
    learner._kept.clear()


@pytest.mark.parametrize("kind", ["plain", "custom"])
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 6])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_fast_text_and_chunks_tune_alike(kind, chunk_size, position):
    learner = TPT(clip_model(kind), tokenizer(), NAMES, steps=2, position=position)
    learner.fast_text = False
    expected = learner(views())
    learner.fast_text, learner.chunk_size = True, chunk_size
    torch.testing.assert_close(learner(views()), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_callers_need_no_gradients(mode):
    learner = TPT(clip_model(), tokenizer(), NAMES)
    expected = learner(views())
    fresh = TPT(clip_model(), tokenizer(), NAMES)
    with mode():
        x = views()
        logits = fresh(x)
        loss, again = fresh.loss(x, torch.tensor([0, 1, 2]))
    assert not logits.requires_grad
    assert not loss.requires_grad
    assert torch.equal(logits, expected)
    assert torch.equal(again, expected)
    assert fresh.vectors.grad is None
    assert torch.equal(fresh(views()), expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_tunes(half):
    learner = TPT(clip_model(dtype=torch.float32), tokenizer(), NAMES, steps=2)
    exact = learner(views(dtype=torch.float32))
    with torch.autocast("cpu", dtype=half):
        logits = learner(views(dtype=torch.float32))
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 0.5


def test_views_can_be_drawn_here():
    learner = TPT(clip_model(dtype=torch.float32), tokenizer(), NAMES, num_views=16)
    x = images(3, dtype=torch.float32)
    torch.manual_seed(0)
    drawn = draw_views(x, 16)
    assert drawn.shape == (3, 16, 3, 32, 32)
    assert torch.equal(drawn[:, 0], x)
    assert len({one.flatten()[:8].sum().item() for one in drawn[0]}) == 16
    assert drawn.min() >= x.min() - 1e-5
    assert drawn.max() <= x.max() + 1e-5
    expected = learner(drawn)
    torch.manual_seed(0)
    assert torch.equal(learner(x), expected)
    ramp = torch.arange(32.0).expand(1, 3, 32, 32)
    rising = [bool(view[0, 0, -1] > view[0, 0, 0]) for view in draw_views(ramp, 200)[0, 1:]]
    assert 0.35 < sum(rising) / 199 < 0.65  # half of them are flipped


def test_views_pass_the_image_tower_a_few_at_a_time(monkeypatch):
    """On a CPU; what is computed is what all of them at once give."""
    learner = TPT(clip_model(), tokenizer(), NAMES)
    passes = []
    learner.clip.visual.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    x = views(2, 10)
    whole = learner(x)
    assert passes == [20]
    monkeypatch.setattr("visionpeft.clip.views.PIXELS_AT_A_TIME", 3 * 32 * 32)
    torch.testing.assert_close(learner(x), whole, rtol=0, atol=1e-9)
    assert passes[1:] == [3] * 6 + [2]
    monkeypatch.setattr("visionpeft.clip.views.PIXELS_AT_A_TIME", 1)  # fewer pixels than one image has
    learner(x[:1, :2])
    assert passes[8:] == [1, 1]


def test_new_class_names():
    learner = TPT(clip_model(), tokenizer(), NAMES)
    learner(views())
    learner.set_class_names(["heron", "passion flower"])
    fresh = TPT(clip_model(), tokenizer(), ["heron", "passion flower"])
    assert torch.equal(learner(views()), fresh(views()))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda learner: learner(torch.zeros(2, 4, 1, 32, 32)), "convert gray images to RGB"),
        (lambda learner: learner(torch.zeros(3, 32, 32)), "views (batch, views, 3, height, width)"),
        (lambda learner: learner.classify(torch.zeros(2, 64)), "several views"),
        (lambda learner: learner(torch.zeros(2, 4, 3, 16, 16)), "images are 16 x 16, and this CLIP takes 32 x 32"),
        (lambda learner: TPT(learner.clip, tokenizer(), NAMES, steps=0), "at least one step"),
        (lambda learner: TPT(learner.clip, tokenizer(), NAMES, steps=1.5), "TPT: steps must be an integer, not 1.5"),
        (lambda learner: TPT(learner.clip, tokenizer(), NAMES, selection=0), "between 0 and 1"),
        (lambda learner: TPT(learner.clip, tokenizer(), NAMES, position="back"), "'end' or 'middle' or 'front'"),
        (lambda learner: TPT(learner.clip, tokenizer(), NAMES, context=3), "the folder of a saved one, not 3"),
        (lambda learner: TPT(learner.clip, tokenizer(), NAMES, context=torch.zeros(4, 16)), "(vectors, 32)"),
        (lambda learner: TPT(learner.clip, tokenizer(), NAMES, context=torch.zeros(2, 4, 32)), "shared by all classes"),
    ],
)
def test_refusals_are_one_clear_sentence(act, message):
    learner = TPT(clip_model(), tokenizer(), NAMES)
    with pytest.raises(ConfigurationError) as caught:
        act(learner)
    assert message in str(caught.value)


def test_starts_from_a_saved_coop(tmp_path):
    """The context of a CoOp learner on disk, with its position, is where every image starts."""
    clip = clip_model()
    coop = CoOp(clip, tokenizer(), NAMES, context_length=3, position="middle")
    save_learner(coop, tmp_path / "coop")
    tpt = TPT(clip, tokenizer(), NAMES, context=str(tmp_path / "coop"))
    assert torch.equal(tpt.vectors, coop.vectors)
    assert tpt.position == "middle"
    save_learner(tpt, tmp_path / "tpt")
    assert torch.equal(load_learner(tmp_path / "tpt", clip, tokenizer()).vectors, coop.vectors)
    with pytest.raises(StorageError, match="can start from a CoOp learner"):
        TPT(clip, tokenizer(), NAMES, context=str(tmp_path / "tpt"))
