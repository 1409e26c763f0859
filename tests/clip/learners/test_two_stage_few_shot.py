"""2SFS: OpenCLIP with changed weights, then a classifier that starts at its texts; and names that were not trained."""

import lightning.pytorch as pl
import pytest
import torch
from clip_reference import (
    NAMES,
    clip_model,
    cross_entropy,
    image_features,
    images,
    lively_,
    plain_features,
    scaled,
    tokenizer,
)
from small_learner_runs import CLIP
from small_runs import draw_images

import visionpeft as vp
from visionpeft.clip.learners import TwoStageFewShot, ZeroShot
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.data import FewShot
from visionpeft.tasks import PromptLearning

CLEAN = [name.replace("_", " ") for name in NAMES]
LABELS = torch.tensor([0, 2, 3])


def by_hand(learner, names):
    """Image and text features of the towers, from a plain OpenCLIP with the trained norms."""
    merged = vp.merge(learner.clip)
    f = image_features(merged, images())
    t = plain_features(merged, [f"a photo of a {name}." for name in names])
    vp.unmerge(merged)
    return f, t.detach()


def unit_rows(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def test_2sfs_is_the_formula_in_both_stages(tmp_path):
    learner = TwoStageFewShot(clip_model(), tokenizer(), NAMES, first_stage=0.5)
    zero_shot = ZeroShot(clip_model(), tokenizer(), NAMES)(images())
    torch.testing.assert_close(learner(images()), zero_shot, rtol=0, atol=1e-10)
    norms = [p for p in learner.trainable_parameters() if p is not learner.classifier]
    lively_(learner)
    loss, logits = learner.loss(images(), LABELS)
    gradients = torch.autograd.grad(loss, [*norms, learner.classifier], allow_unused=True)
    assert gradients[-1] is None
    assert all(gradient.abs().max() > 0 for gradient in gradients[:-1])
    f, t = by_hand(learner, CLEAN)
    torch.testing.assert_close(logits, scaled(learner.clip, f, t), rtol=0, atol=1e-9)

    learner.end_epoch(0, 4)  # a quarter
    assert not learner.second_stage
    learner.end_epoch(1, 4)
    assert learner.second_stage
    torch.testing.assert_close(learner.classifier.detach(), t, rtol=0, atol=1e-10)
    torch.testing.assert_close(learner(images()), logits, rtol=0, atol=1e-9)  # it starts where stage 1 ended
    with torch.no_grad():
        learner.classifier.add_(torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(t))
    learner.end_epoch(2, 4)  # does not begin again
    loss, logits = learner.loss(images(), LABELS)
    expected = scaled(learner.clip, f, unit_rows(learner.classifier))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    gradients = torch.autograd.grad(loss, [learner.classifier, *norms], allow_unused=True)
    assert set(gradients[1:]) == {None}
    (wanted,) = torch.autograd.grad(cross_entropy(expected, LABELS), learner.classifier)
    torch.testing.assert_close(gradients[0], wanted, rtol=0, atol=1e-9)

    # Names that were not trained ask the tower, and leave the logits of those that were.
    others = ["heron", CLEAN[2].upper(), "owl"]
    f, t = by_hand(learner, others)
    t[1] = unit_rows(learner.classifier.detach())[2]
    learner.set_class_names(others)
    with torch.no_grad():
        found = learner(images())
        torch.testing.assert_close(found, scaled(learner.clip, f, t), rtol=0, atol=1e-9)
        torch.testing.assert_close(found[:, 1], logits[:, 2].detach(), rtol=0, atol=1e-9)
        assert (t[1] - plain_features(learner.clip, [f"a photo of a {CLEAN[2]}."])[0]).abs().max() > 1e-2
        save_learner(learner, tmp_path)  # also with other names than those that were trained
        loaded = load_learner(tmp_path, clip_model(), tokenizer())
        assert loaded.second_stage
        assert loaded.frozen_images
        assert torch.equal(loaded(images()), found)
        loaded.set_class_names(NAMES)
        torch.testing.assert_close(loaded(images()), logits.detach(), rtol=0, atol=1e-9)


def test_dropout_of_stage_1_does_not_act_in_stage_2():
    method = vp.LoRA(rank=2, dropout=0.5, towers=["visual", "text"])
    learner = lively_(TwoStageFewShot(clip_model(), tokenizer(), NAMES, method=method)).train()
    assert not torch.equal(learner.loss(images(), LABELS)[0], learner.loss(images(), LABELS)[0])
    learner.begin_second_stage()
    assert learner.training
    assert torch.equal(learner.loss(images(), LABELS)[0], learner.loss(images(), LABELS)[0])


def test_a_run_has_both_stages_and_resumes_in_the_second(tmp_path):
    """Norms move in stage 1 alone and the classifier in stage 2 alone, in which images are run once."""
    pictures = draw_images(tmp_path / "squares", per_class=8)
    moved, encoded = [], []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer, task):
            self.before = {name: p.detach().clone() for name, p in task.learner.named_parameters() if p.requires_grad}

        def on_train_epoch_end(self, trainer, task):  # before the task's own hook begins the next stage
            now = dict(task.learner.named_parameters())
            moved.append({"classifier" in name for name, old in self.before.items() if not torch.equal(now[name], old)})
            encoded.append(rows.copy())
            rows.clear()

    def fit(epochs, **more):
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=[Watch()],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        trainer.fit(task, FewShot("folder", pictures, shots=4, batch_size=4, views=1), **more)
        return trainer

    rows = []

    def make():
        torch.manual_seed(0)
        made = PromptLearning(TwoStageFewShot, ["blue", "green", "red"], backbone=CLIP[1], pretrained=False)
        encode = made.learner.clip.encode_image
        made.learner.clip.encode_image = lambda pictures, **more: rows.append(len(pictures)) or encode(pictures, **more)
        return made

    task = make()
    trainer = fit(5)
    assert moved == [{False}, {False}, {False}, {True}, {True}]
    assert [sum(each) for each in encoded] == [12, 12, 12, 12, 0]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    moved.clear()
    fit(5)  # a further training of the same learner has both stages, too
    assert moved == [{False}, {False}, {False}, {True}, {True}]
    task = make()
    moved.clear()
    fit(6, ckpt_path=tmp_path / "last.ckpt")
    assert task.learner.second_stage
    assert moved == [{True}]


def test_several_processes_are_refused():
    task = PromptLearning(TwoStageFewShot, ["blue", "green"], backbone=CLIP[1], pretrained=False)
    task.check_before_training(FewShot(), 1)
    with pytest.raises(vp.ConfigurationError, match="2 processes wait for the gradients of all"):
        task.check_before_training(FewShot(), 2)


def test_refusals():
    with pytest.raises(vp.ConfigurationError, match="a share from 0 to 1, not 2"):
        TwoStageFewShot(clip_model(), tokenizer(), NAMES, first_stage=2)
