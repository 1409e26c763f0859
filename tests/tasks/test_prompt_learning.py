"""PromptLearning: what is trained, when features are kept, what the learner is told and when."""

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from small_learner_runs import CLIP
from small_runs import draw_images

from visionpeft.clip.learner import Learner
from visionpeft.clip.learners import (
    IVLP,
    TCP,
    TDA,
    TPT,
    CLIPAdapter,
    CLIPLinearProbe,
    CoOp,
    KgCoOp,
    MaPLe,
    ProGrad,
    TipAdapter,
    ZeroShot,
)
from visionpeft.data import FewShot
from visionpeft.data.dataset import as_batch
from visionpeft.data.transforms import ImageTransform
from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.tasks import PromptLearning
from visionpeft.tasks.optimisation import Optimisation

NAMES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("data") / "squares", per_class=8)


def make(learner=CoOp, class_names=NAMES, options=None, **fields):
    fields = {"backbone": CLIP[1], "pretrained": False} | fields
    return PromptLearning(lambda *given: learner(*given, **(options or {})), class_names, **fields)


def data(images, **fields):
    fields = {"shots": 4, "batch_size": 4, "augmentation": "random_resized_crop", "views": 2} | fields
    return FewShot("folder", images, **fields)


def trainer(folder: Path, **options):
    options = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False} | options
    return pl.Trainer(
        default_root_dir=folder,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **options,
    )


def counted(task, monkeypatch):
    """Numbers of images that go through the image tower."""
    rows = []
    encode = task.learner.clip.encode_image

    def count(images, *args, **kwargs):
        rows.append(len(images))
        return encode(images, *args, **kwargs)

    monkeypatch.setattr(task.learner.clip, "encode_image", count)
    return rows


def test_only_the_learner_is_trained(tmp_path, images):
    task = make()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    trainer(tmp_path).fit(task, data(images))
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"learner.vectors"}
    assert not task.learner.clip.training


def test_kept_features_change_nothing(tmp_path, images, monkeypatch):
    vectors, numbers = [], []
    for cache in (True, False):
        task = make(cache_features=cache)
        rows = counted(task, monkeypatch)
        fitted = trainer(tmp_path)
        fitted.fit(task, data(images))
        vectors.append(task.learner.vectors.detach())
        numbers.append(fitted.callback_metrics["val/loss"].item())
        # 12 images in 2 views, and the 3 for validation; or 12 and 3 in each of 3 epochs
        assert sum(rows) == (12 * 2 + 3 if cache else 3 * (12 + 3))
    assert torch.allclose(*vectors, atol=1e-6)
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)


@pytest.fixture
def augmented(monkeypatch):
    """One entry for each training image that is augmented."""
    seeds, augment = [], ImageTransform.augment

    def count(self, image, *args):
        if self.augmentation != "none":
            seeds.append(args)
        return augment(self, image, *args)

    monkeypatch.setattr(ImageTransform, "augment", count)
    return seeds


@pytest.mark.parametrize("learner", [CoOp, KgCoOp, ProGrad, CLIPAdapter])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_kept_features_are_not_augmented_again(tmp_path, images, learner, workers, augmented):
    trained = []
    for withheld in (True, False):
        task = make(learner)
        if not withheld:
            task._needs_no_pixels = lambda: False
        augmented.clear()
        fitted = trainer(tmp_path)
        fitted.fit(task, data(images, num_workers=workers))
        if workers == 0:  # else they are augmented in other processes
            assert len(augmented) == (12 * 2 if withheld else 12 * 2 + 3 * 12)
        trained.append([parameter.detach() for parameter in task.trained_parameters()])
    assert all(torch.equal(*both) for both in zip(*trained, strict=True))


@pytest.mark.parametrize("learner", [CoOp, KgCoOp, ProGrad])
def test_images_are_there_for_a_loss_that_reads_them(tmp_path, images, augmented, learner):
    class Reads(learner):
        def loss(self, images, labels, features=None):
            loss, logits = super().loss(images, labels, features)
            return loss + images.mean() ** 2, logits

    task = make(Reads)
    trainer(tmp_path).fit(task, data(images))
    assert len(augmented) == 12 * 2 + 3 * 12
    assert all(parameter.isfinite().all() for parameter in task.trained_parameters())


@pytest.mark.parametrize("name", ["training_loss", "training_step"])
def test_images_are_there_for_a_task_that_reads_them(tmp_path, images, augmented, name):
    seen = []

    class Reads(PromptLearning):
        pass

    def read(self, first, *others):
        seen.append(first[0] if name == "training_step" else first)
        return getattr(PromptLearning, name)(self, first, *others)

    setattr(Reads, name, read)
    trainer(tmp_path).fit(Reads(lambda *given: CoOp(*given), NAMES, CLIP[1], False), data(images))
    assert len(augmented) == 12 * 2 + 3 * 12
    assert len(seen) == 9
    assert all(images.isfinite().all() for images in seen)


def test_images_are_there_again_after_training(tmp_path, images):
    class Keeps(FewShot):
        kept = None

        def train_dataloader(self):
            self.kept = self.kept or super().train_dataloader()
            return self.kept

    module = Keeps("folder", images, shots=4, batch_size=4, augmentation="random_resized_crop", views=2)
    trainer(tmp_path).fit(make(), module)
    assert all(batch[0].isfinite().all() for batch in module.kept)
    task = make(cache_features=False)
    trainer(tmp_path).fit(task, module)
    assert task.learner.vectors.isfinite().all()


def test_images_without_pixels_are_pinned(tmp_path, images, monkeypatch):
    """As PyTorch does it: memory of another kind with the same strides, into which is copied."""
    shapes = []

    def pin_memory(self, device=None):
        size = sum((length - 1) * stride for length, stride in zip(self.shape, self.stride(), strict=True)) + 1
        storage = torch.UntypedStorage(size * self.element_size())
        pinned = torch.empty(0, dtype=self.dtype).set_(storage, 0, self.size(), self.stride())
        shapes.append(tuple(self.shape))
        return pinned.copy_(self)

    class Pins(FewShot):
        def train_dataloader(self):
            loader = super().train_dataloader()
            loader.collate_fn = lambda batch: batch.pin_memory()
            return loader

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    task = make()
    module = Pins("folder", images, shots=4, batch_size=4, augmentation="random_resized_crop", views=2)
    trainer(tmp_path).fit(task, module)
    assert len(shapes) == 2 * 9  # images and labels of all batches
    assert all(parameter.isfinite().all() for parameter in task.trained_parameters())


def test_images_are_there_where_batches_are_converted(tmp_path, images, augmented):
    """Other tensors have no names, and are known by their pixels."""
    task = make()
    trainer(tmp_path, precision="64-true").fit(task, data(images))
    assert len(augmented) == 12 * 2 + 3 * 12
    assert all(parameter.isfinite().all() for parameter in task.trained_parameters())


def test_images_without_pixels_are_not_taken_for_images(tmp_path, images):
    class Changed(PromptLearning):
        def __init__(self, change, **options):
            super().__init__(lambda *given: CoOp(*given), NAMES, CLIP[1], False, **options)
            self.change = change

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [self.change(batch[0]), batch[1]]

    def erased(images):
        return torch.cat([torch.zeros_like(images[..., :8]), images[..., 8:]], dim=-1)

    class Changes(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.learner.clip.visual.proj.mul_(2)

    changes = [lambda images: images.flip(3), lambda images: images.mul_(0.9), erased]
    for task, callbacks in [*((Changed(change), []) for change in changes), (make(), [Changes()])]:
        with pytest.raises(StorageError, match=r"came without pixels.*--model\.cache_features false"):
            trainer(tmp_path, callbacks=callbacks).fit(task, data(images))
    task = Changed(erased, cache_features=False)
    trainer(tmp_path, callbacks=[Changes()]).fit(task, data(images))
    assert task.learner.vectors.isfinite().all()


def test_fresh_augmentations_are_not_kept(tmp_path, images, monkeypatch):
    task = make()
    rows = counted(task, monkeypatch)
    trainer(tmp_path).fit(task, data(images, views=None))
    assert sum(rows) == 3 * 12 + 3  # validation images are never augmented
    assert len(task.cache.kept) == 3


def test_no_more_views_than_epochs_are_worked_out(tmp_path, images, monkeypatch):
    task = make()
    rows = counted(task, monkeypatch)
    trainer(tmp_path, max_epochs=1).fit(task, data(images, views=5))
    assert sum(rows) == 12 + 3


@pytest.mark.parametrize("learner", [MaPLe, IVLP, TPT])
def test_features_that_depend_on_what_is_learnt_are_not_kept(tmp_path, images, learner):
    task = make(learner, options={"num_views": 2} if learner is TPT else {})
    fitted = trainer(tmp_path, max_epochs=1)
    fitted.fit(task, data(images))
    fitted.test(task, data(images), verbose=False)
    assert not task.cache.kept


def test_metrics_equal_their_definitions(tmp_path, images):
    task, module = make(KgCoOp), data(images)
    measured = trainer(tmp_path)
    measured.test(task, module, verbose=False)
    batches = list(module.test_dataloader())
    pictures, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = task.learner(pictures)
    assert measured.callback_metrics["test/loss"].item() == pytest.approx(
        F.cross_entropy(logits, labels).item(), abs=1e-5
    )
    share = (logits.argmax(1) == labels).float().mean().item()
    assert measured.callback_metrics["test/top1"].item() == pytest.approx(share)


def test_default_recipe(tmp_path, images):
    rates, groups = [], []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])
            groups.extend(optimizer.param_groups[:1] if not groups else ())

    trainer(tmp_path, max_epochs=5, callbacks=[Watch()]).fit(make(CLIPAdapter), data(images))
    assert rates[::3] == pytest.approx([1e-5, 0.002, 0.00180902, 0.00130902, 0.00069098], rel=1e-5)
    assert rates[1::3] == rates[::3]
    assert (groups[0]["momentum"], groups[0]["weight_decay"]) == (0.9, 5e-4)


class Told(ZeroShot):
    """Records what the task tells it."""

    by_gradient = True

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.calls = []
        self.vector = torch.nn.Parameter(torch.zeros(3))

    def loss(self, images, labels, features=None):
        self.calls.append("loss")
        logits = self.classify(self.image_features(images) if features is None else features) + self.vector
        return F.cross_entropy(logits, labels), logits

    def end_epoch(self, epoch, num_epochs):
        self.calls.append(("end_epoch", epoch, num_epochs))

    def end_training(self):
        self.calls.append("end_training")
        return {"alpha": 1.5}

    def fit_features(self, train, validation=None):
        self.calls.append("fit_features")
        self.train_split, self.validation_split = train, validation
        return {}


def test_what_a_learner_is_told(tmp_path, images):
    task = make(Told)
    trainer(tmp_path, max_epochs=2).fit(task, data(images))
    steps = ["loss"] * 3
    assert task.learner.calls == [
        "fit_features",
        *steps,
        ("end_epoch", 0, 2),
        *steps,
        ("end_epoch", 1, 2),
        "end_training",
    ]
    assert task.describe()["chosen"] == {"alpha": 1.5}


@pytest.mark.parametrize("max_epochs", [-1, 10])
def test_limited_steps_have_epochs(tmp_path, images, max_epochs):
    """Also where both are limited and the steps end first: otherwise a second stage would never begin."""
    task = make(Told)
    trainer(tmp_path, max_epochs=max_epochs, max_steps=7).fit(task, data(images))
    assert (task.steps.by_epoch, task.steps.total) == ((3, 3, 3), 7)
    assert [call for call in task.learner.calls if "end_epoch" in call] == [
        ("end_epoch", epoch, 3) for epoch in range(3)
    ]


def test_dropout_is_drawn_while_training(tmp_path, images):
    modes = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            learner = pl_module.learner
            modes.append((learner.training, learner.clip.training, learner.clip.visual.training))

    trainer(tmp_path, max_epochs=2, callbacks=[Watch()]).fit(make(CLIPAdapter), data(images))
    assert set(modes) == {(True, False, False)}


@pytest.mark.parametrize("views", [None, 1, 3])
def test_features_that_are_fitted(tmp_path, images, views):
    task, module = make(Told), data(images, views=views)
    trainer(tmp_path, max_epochs=1).fit(task, module)
    features, labels = task.learner.train_split
    assert labels.tolist() == module.sources["train"].labels
    dataset = module.dataset("train")
    with torch.no_grad():
        by_view = [
            task.learner.image_features(torch.stack([dataset[index, view][0] for index in range(12)]))
            for view in ([1] if views is None else range(views))  # epoch 0 is that of the training
        ]
    expected = by_view[0] if len(by_view) == 1 else torch.stack(by_view, dim=1)
    assert torch.allclose(features, expected, atol=1e-5)
    validation, names = task.learner.validation_split
    assert (len(validation), names.tolist()) == (3, module.sources["val"].labels)


def test_no_validation_split(tmp_path, images):
    task, module = make(Told), data(images)
    del module.sources["val"]
    trainer(tmp_path, max_epochs=1).fit(task, module)
    assert task.learner.validation_split is None


@pytest.mark.parametrize("fixed", [None, 2])
def test_what_tip_adapter_is_fitted_on(tmp_path, images, fixed):
    """Not normalised, of ten augmentations that no epoch shows again, or of the data's fixed ones."""
    task, module = make(Told), data(images, views=fixed, crop_area=(0.5, 1.0))
    task.learner.fits_raw_features, task.learner.fitted_views = True, 10
    trainer(tmp_path, max_epochs=2).fit(task, module)
    features, labels = task.learner.train_split
    augmented = module.dataset("train")
    assert augmented.transform._random.transforms[0].scale == (0.5, 1.0)
    epochs = range(2, 12) if fixed is None else range(2)
    pictures = [torch.stack([augmented[index, epoch][0] for index in range(12)]) for epoch in epochs]
    with torch.no_grad():
        expected = torch.stack([task.learner.clip.eval().encode_image(each) for each in pictures], dim=1)
    assert labels.tolist() == list(augmented.source.labels)
    assert torch.allclose(features, expected, atol=1e-5)
    lengths = expected.norm(dim=-1)
    assert (lengths - 1).abs().min() > 0.01  # what is normalised would differ
    assert (task.learner.validation_split[0].norm(dim=-1) - 1).abs().max() < 1e-5


def test_what_was_published_for_the_data_set_is_taken(images):
    module = FewShot("folder", images, shots=4)
    module.images.about["task"] = "dtd"
    task = make(TipAdapter)
    task.connect(module)
    assert (task.learner.alpha.item(), task.learner.max_alpha) == (2, 13)
    task = make(TipAdapter)
    task.connect(FewShot("folder", images, shots=4))  # nothing is known of it
    assert task.describe().get("published") is None
    assert (round(task.learner.alpha.item(), 5), task.learner.max_alpha) == (1.17, 3)


def test_words_of_tcp_are_those_of_the_data_set(images):
    module = FewShot("folder", images, shots=4)
    task = make(TCP)
    task.connect(module)
    assert task.learner.words == "{}."
    module.images.about["task"] = "dtd"
    task.connect(module)
    assert task.describe()["published"] == {"tcp": {"words": "{} texture."}}
    task = make(partial(TCP, words="{}!"))
    task.connect(module)
    assert task.learner.words == "{}!"


@pytest.mark.parametrize("learner", [ZeroShot, TipAdapter, CLIPLinearProbe])
def test_training_without_gradient_steps(tmp_path, images, learner):
    task = make(learner)
    fitted = trainer(tmp_path)
    fitted.fit(task, data(images))
    assert fitted.current_epoch == fitted.global_step == 0
    fitted.test(task, data(images), verbose=False)
    assert fitted.callback_metrics["test/loss"].isfinite()


def test_fitting_needs_a_data_module(tmp_path):
    with pytest.raises(ConfigurationError, match="give a data module"):
        trainer(tmp_path).fit(make(TipAdapter), train_dataloaders=[(torch.zeros(1, 3, 32, 32), torch.zeros(1).long())])


def test_a_filled_cache_is_tested_in_half_precision(tmp_path, images):
    task = make(TipAdapter)
    features = F.normalize(torch.randn(6, task.learner.text.num_features), dim=-1)
    task.learner.fit_features((features, torch.arange(6) % 3))
    half = trainer(tmp_path, precision="16-true")
    half.test(task, data(images, shots=0), verbose=False)
    assert task.learner.keys.dtype == torch.float16
    assert half.callback_metrics["test/loss"].isfinite()


def test_views_are_classified_in_inference_mode(tmp_path, images):
    task = make(TPT, options={"selection": 0.5})
    measured = trainer(tmp_path, inference_mode=True)
    measured.test(task, data(images, test_views=4, test_batch_size=2), verbose=False)
    assert measured.callback_metrics["test/loss"].isfinite()
    with torch.inference_mode():
        views = torch.randn(2, 4, 3, 32, 32)
        assert torch.equal(task(views), task.learner(views))


@pytest.mark.parametrize("cache_features", [True, False])
@pytest.mark.parametrize("views", [None, 4])
def test_a_stream_of_images_or_views_is_what_the_learner_makes_of_it(tmp_path, images, views, cache_features):
    task = make(TDA, options={"selection": 0.5}, cache_features=cache_features)
    trainer(tmp_path).test(task, data(images, shots=0, test_views=views, test_batch_size=2), verbose=False)
    batches = torch.randn(3, 2, *([views] if views else []), 3, 32, 32)
    alone = TDA(task.learner.clip, task.tokenizer, NAMES, selection=0.5)
    features = [alone.image_features(batch) for batch in batches]
    for _ in range(2):
        task.learner.reset()
        alone.reset()
        for number, batch in enumerate(batches):
            assert torch.equal(task.eval()(batch), alone.classify(features[number]))
            assert task.learner.num_seen == 2 * number + 2


def test_template_of_the_data(tmp_path, images):
    class Styled(FewShot):
        def template_for(self, style):
            return {"zero_shot": "a drawing of {}.", "kgcoop": "{} it is"}[style]

    for learner, options, templates in (
        (ZeroShot, {}, ("a drawing of {}.",)),
        (ZeroShot, {"template": "my {}"}, ("my {}",)),
        (KgCoOp, {}, ("{} it is",)),
        (CoOp, {}, ()),
    ):
        task = make(learner, options=options)
        task.connect(Styled("folder", images, shots=4))
        assert task.learner.templates == templates
        assert task.describe()["template"] == (list(templates) or None)


def test_data_is_told_the_preprocessing(tmp_path, images):
    task, module = make(), data(images)
    task.connect(module)
    assert module.preprocessing == task.preprocessing
    assert module.preprocessing.input_size == (32, 32)


@pytest.mark.parametrize(
    ("learner", "keys"),
    [
        (CoOp, {"vectors"}),
        (ZeroShot, set()),
        (CLIPAdapter, {"adapter.0.weight", "adapter.2.weight"}),
        (TipAdapter, {"alpha", "beta", "keys", "labels"}),
    ],
)
def test_checkpoints_keep_what_is_learnt(learner, keys):
    assert make(learner).trained_keys() == {f"learner.{key}" for key in keys}


def test_checkpoints_keep_adapters_of_the_towers(tmp_path, images):
    task = make(MaPLe)
    assert len(task.trained_keys()) == sum(1 for _ in task.learner.trainable_parameters())
    assert all(key.startswith("learner.clip.peft.") for key in task.trained_keys())
    fitted = trainer(tmp_path, max_epochs=1)
    fitted.fit(task, data(images))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == task.trained_keys()
    with pytest.raises(StorageError, match="differ in name or shape"):
        trainer(tmp_path, max_epochs=2).fit(make(), data(images), ckpt_path=tmp_path / "a.ckpt")


def test_seed_decides_the_first_values():
    first, again, other = (make(seed=seed).learner.vectors for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_first_values_do_not_depend_on_how_the_clip_was_made():
    first, other = (make(backbone=f"open_clip/{name}").learner.vectors for name in ("tiny_clip", "other_tiny_clip"))
    assert torch.equal(first, other)


def test_class_chunks_have_the_same_gradient():
    gradients = []
    for chunk in (None, 2):
        task = make(chunk_size=chunk, class_names=["a", "b c", "d e f", "g", "h"])
        loss, _ = task.training_loss(torch.ones(2, 3, 32, 32), torch.tensor([0, 3]))
        loss.backward()
        gradients.append(task.learner.vectors.grad)
    assert torch.allclose(*gradients, rtol=0, atol=1e-5 * gradients[0].abs().max().item())


def test_saved_and_loaded(tmp_path, images):
    task, module = make(MaPLe), data(images)
    trainer(tmp_path, max_epochs=1).fit(task, module)
    task.save(tmp_path / "learner", module)
    other = make(MaPLe, class_names=["x", "y", "z", "w"])
    other.load(tmp_path / "learner")
    assert other.learner.class_names == ["x", "y", "z", "w"]
    other.learner.set_class_names(NAMES)
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(other(pictures), task.eval()(pictures), atol=1e-6)


def test_refusals():
    with pytest.raises(ConfigurationError, match="at least two classes"):
        make(class_names=["one"])
    with pytest.raises(ConfigurationError, match="chunk_size must be at least 1"):
        make(chunk_size=0)
    with pytest.raises(ConfigurationError, match="are both 'a b'"):
        make(class_names=["a b", "a_b"])


def test_nothing_to_train_is_no_error_of_the_optimiser(tmp_path, images):
    task = make(ZeroShot, optimisation=Optimisation())
    assert isinstance(task.learner, Learner)
    assert task.configure_optimizers() is None


def test_an_order_that_matters_is_recorded_and_repeated(tmp_path, images):
    """An online learner begins anew with each test, in the order that the data says."""
    task, tester = make(TDA, seed=3), trainer(tmp_path)
    module = data(images, shots=0, views=None, test_order="shuffled")
    measured = [tester.test(task, module, verbose=False)[0]["test/loss"] for _ in range(2)]
    assert measured[0] == measured[1]
    assert task.learner.num_seen == len(module.sources["test"])
    assert task.describe()["stream"] == {"order": module.description()["test_order"]}
    listed = data(images, shots=0, views=None)
    assert "test_order" not in listed.description()
    assert listed.sources["test"].paths != module.sources["test"].paths
    assert sorted(listed.sources["test"].paths) == sorted(module.sources["test"].paths)
    assert tester.test(task, listed, verbose=False)[0]["test/loss"] != measured[0]
    assert task.describe()["stream"] == {"order": "listed"}
    assert "stream" not in make(ZeroShot).describe()
    with pytest.raises(ConfigurationError, match="choose listed or shuffled"):
        data(images, test_order="random")


def test_an_order_that_matters_and_cannot_be_repeated_is_refused(tmp_path, images):
    loader = data(images, shots=0, views=None)
    loader.preprocessing = make(TDA).preprocessing
    dataset = loader.dataset("test")
    for learner in (TDA, ZeroShot):
        shuffled = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=as_batch)
        if learner is ZeroShot:
            trainer(tmp_path).test(make(learner), dataloaders=shuffled, verbose=False)
            continue
        with pytest.raises(ConfigurationError, match="shuffles them in a way that is not recorded"):
            trainer(tmp_path).test(make(learner), dataloaders=shuffled, verbose=False)
        with pytest.raises(ConfigurationError, match="shuffles them in a way that is not recorded"):
            trainer(tmp_path).predict(make(learner), dataloaders=shuffled)
    every = range(len(dataset))
    by_chance = [
        torch.utils.data.SubsetRandomSampler(every),
        torch.utils.data.WeightedRandomSampler([1.0] * len(every), len(every)),
        torch.utils.data.DistributedSampler(dataset, num_replicas=1, rank=0),
    ]
    for sampler in by_chance:
        drawn = torch.utils.data.DataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=as_batch)
        with pytest.raises(ConfigurationError, match="shuffles them in a way that is not recorded"):
            trainer(tmp_path).test(make(TDA), dataloaders=drawn, verbose=False)
    ready = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1, in_order=False, collate_fn=as_batch)
    with pytest.raises(ConfigurationError, match="as its workers are ready; leave out in_order=False"):
        trainer(tmp_path).test(make(TDA), dataloaders=ready, verbose=False)
    for sampler in (
        None,
        torch.utils.data.SequentialSampler(dataset),
        torch.utils.data.DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=False),
    ):
        ordered = torch.utils.data.DataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=as_batch)
        assert trainer(tmp_path).predict(make(TDA), dataloaders=ordered)
