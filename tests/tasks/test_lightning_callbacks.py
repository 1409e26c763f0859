"""Lightning's callbacks beside our tasks: what they promise holds, and a resumed training is the uninterrupted one."""

import copy
import math
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks as plc
from lightning.pytorch.tuner import Tuner
from small_learner_runs import CLIP  # noqa: F401  (makes OpenCLIP know the tiny CLIP)
from torch.utils.data import DataLoader, TensorDataset

import visionpeft as vp
from visionpeft.clip import learners
from visionpeft.tasks import ImageClassification, PromptLearning, VideoClassification
from visionpeft.tasks.optimisation import Optimisation

NAMES = ["blue car", "green tree", "red rose"]
RATES = Optimisation(lr=0.01, head_lr=0.02, warmup_epochs=1, weight_decay=0.1)
EPOCHS, DECAY = 4, 0.8


class Squares(pl.LightningDataModule):
    """18 images in three classes, each epoch in another order."""

    preprocessing = None

    def __init__(self, batch_size=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.batch_size = batch_size
        self.labels = torch.arange(18) % 3
        self.images = torch.randn(18, 3, 32, 32, generator=generator) + self.labels[:, None, None, None]
        self.preprocessing = None

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.images, self.labels), batch_size=self.batch_size, sampler=ByEpoch(18))

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.images, self.labels), batch_size=9)

    test_dataloader = val_dataloader


class ByEpoch(torch.utils.data.Sampler):
    """An order that is a function of the epoch."""

    def __init__(self, size):
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def image_task(method=None, **fields):
    fields = {"backbone": "test_vit", "pretrained": False, "backbone_kwargs": {"img_size": 32, "depth": 2}} | fields
    return ImageClassification(method or vp.LoRA(rank=2), NAMES, **({"optimisation": RATES} | fields))


def learner_task(learner="CoOp", **options):
    def build(clip, tokenizer, names):
        return getattr(learners, learner)(clip, tokenizer, names, **options)

    return PromptLearning(build, NAMES, "open_clip/tiny_clip", pretrained=False, optimisation=RATES)


TASKS = {
    "lora": image_task,
    "vpt with dropout": lambda: image_task(vp.VPT(num_tokens=2, deep=True, dropout=0.3)),
    "batch normalisation": lambda: image_task(vp.AdaptFormer(), head="batchnorm_linear"),
    "adalora": lambda: image_task(vp.AdaLoRA(rank=1, initial_rank=2, interval=2)),
    "chosen by the data": lambda: image_task(vp.FishMask(density=0.01)),
    "vera": lambda: image_task(vp.VeRA(rank=4)),
    "coop": learner_task,
    "clip_lora": lambda: learner_task("CLIPLoRA", rank=2),
}


class Record(pl.Callback):
    """What is trained, in float64, after each step; and at each validation what is in the task."""

    def __init__(self):
        self.weights, self.validated, self.rates = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(trained(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validated.append(trained(pl_module))


def trained(task):
    return {name: p.detach().double().clone() for name, p in task.named_parameters() if p.requires_grad}


def frozen(task):
    keys = task.trained_keys()
    return {key: value.clone() for key, value in task.state_dict().items() if key not in keys}


def trainer(folder, *callbacks, epochs=EPOCHS, keep=True, **options):
    kept = (
        [plc.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)] if keep else []
    )
    return pl.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=keep,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, *kept],
        **options,
    )


def fit(folder, task, *callbacks, resume=None, data=None, **options):
    fitted = trainer(folder, *callbacks, **options)
    fitted.fit(task, data or Squares(), ckpt_path=resume)
    return fitted


def assert_same(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


def averages(weights, decay):
    """avg = decay * avg + (1 - decay) * w, from the first weights on."""
    average = weights[0]
    for now in weights[1:]:
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in average}
    return average


class LastTwoEpochs(plc.WeightAveraging):
    """Equal weights after each of the last two epochs."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None and epoch_idx >= EPOCHS - 2


EMAS = [(name, True) for name in TASKS] + [("batch normalisation", False), ("adalora", False)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "use_buffers"), EMAS)
def test_ema_is_the_average_of_what_is_trained(tmp_path, name, use_buffers):
    """Tested, saved and validated are the averages; the frozen tensors stay to the bit; resuming changes nothing."""

    def ema():
        return plc.EMAWeightAveraging(decay=DECAY, use_buffers=use_buffers)

    task, record = TASKS[name](), Record()
    before = frozen(task) if name != "chosen by the data" else None
    fit(tmp_path / "whole", task, ema(), record)
    expected = averages(record.weights, DECAY)
    assert_same(trained(task), expected, 1e-6)
    assert any((expected[key] - record.weights[-1][key]).abs().max() > 1e-4 for key in expected)
    assert_same(record.validated[-1], expected, 1e-6)
    if before is not None:
        assert_same(frozen(task), before)
    files = sorted((tmp_path / "whole").glob("*.ckpt"))
    saved = torch.load(files[-1], weights_only=True)["state_dict"]
    assert saved.keys() == task.trained_keys()
    assert_same({key: saved[key].double() for key in expected}, expected, 1e-6)
    plain = TASKS[name]()
    fit(tmp_path / "plain", plain)
    plain_size = max(file.stat().st_size for file in (tmp_path / "plain").glob("*.ckpt"))
    assert files[-1].stat().st_size < 2.5 * plain_size

    for epoch in (1, EPOCHS - 1):
        again = TASKS[name]()
        fit(tmp_path / f"resumed {epoch}", again, ema(), resume=tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert_same(again.state_dict(), task.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_ema_of_videos(tmp_path):
    def video_task():
        options = {
            "pretrained": False,
            "backbone_kwargs": {"img_size": 32, "depth": 2},
            "num_frames": 2,
            "optimisation": RATES,
        }
        return VideoClassification(vp.STAdapter(bottleneck=4), NAMES, "test_vit", **options)

    data = Squares()
    data.images = torch.stack((data.images, data.images.flip(-1)), dim=2)
    task, record = video_task(), Record()
    before = frozen(task)
    fit(tmp_path / "whole", task, plc.EMAWeightAveraging(decay=DECAY), record, data=data)
    assert_same(trained(task), averages(record.weights, DECAY), 1e-6)
    assert_same(frozen(task), before)
    again = video_task()
    checkpoint = tmp_path / "whole" / "epoch=1.ckpt"
    fit(tmp_path / "resumed", again, plc.EMAWeightAveraging(decay=DECAY), data=data, resume=checkpoint)
    assert_same(again.state_dict(), task.state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "clip_lora"])
def test_lightning_alone_changes_what_is_frozen(tmp_path, name, monkeypatch):
    """The control of the test above: decay * w + (1 - decay) * w is another w."""
    monkeypatch.setattr("visionpeft.tasks.task.average_trained_only", lambda callbacks: None)
    task = TASKS[name]()
    before = frozen(task)
    fit(tmp_path, task, plc.EMAWeightAveraging(decay=DECAY), keep=False)
    with pytest.raises(AssertionError):
        assert_same(frozen(task), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "vpt with dropout", "batch normalisation", "chosen by the data", "coop"])
def test_equal_weights_by_the_base_class(tmp_path, name):
    """`WeightAveraging` as its documentation has it: a mean of the last two epochs' weights."""
    task, record = TASKS[name](), Record()
    fit(tmp_path / "whole", task, LastTwoEpochs(), record)
    steps = len(record.weights) // EPOCHS
    ends = record.weights[steps - 1 :: steps]
    expected = {key: (ends[-2][key] + ends[-1][key]) / 2 for key in ends[-1]}
    assert_same(trained(task), expected, 1e-6)
    again = TASKS[name]()
    fit(tmp_path / "resumed", again, LastTwoEpochs(), resume=tmp_path / "whole" / "epoch=2.ckpt")
    assert_same(again.state_dict(), task.state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "vpt with dropout", "batch normalisation", "adalora", "coop"])
def test_stochastic_weight_averaging(tmp_path, name):
    """The mean of the weights at the beginning of each epoch from the third on."""

    def swa():
        return plc.StochasticWeightAveraging(0.005, swa_epoch_start=3, annealing_epochs=1)

    task, record = TASKS[name](), Record()
    before = frozen(task)
    fit(tmp_path / "whole", task, swa(), record)
    steps = 5
    ends = record.weights[steps - 1 : (EPOCHS - 1) * steps : steps]
    expected = {key: (ends[-2][key] + ends[-1][key]) / 2 for key in ends[-1]}
    assert_same(trained(task), expected, 1e-6)
    assert_same(frozen(task), before)
    plain = TASKS[name]()
    fit(tmp_path / "plain", plain)
    files = sorted((tmp_path / "whole").glob("*.ckpt"))
    plain_size = max(file.stat().st_size for file in (tmp_path / "plain").glob("*.ckpt"))
    assert files[-1].stat().st_size < 2.5 * plain_size
    for file in files:
        again = TASKS[name]()
        fit(tmp_path / f"resumed {file.stem}", again, swa(), resume=file)
        assert_same(again.state_dict(), task.state_dict())


ACCUMULATION = {0: 4, 1: 1, 2: 2}
SCHEDULES = {
    "lora": lambda: image_task(),
    "adalora": lambda: image_task(vp.AdaLoRA(rank=1, initial_rank=2, interval=2, dropout=0.0)),
}


def by_hand(model, accumulation, epochs, batch_size=4):
    """The same training without Lightning: AdamW, a warm-up over the first epoch, then half a cosine to 0."""
    of_epoch = [accumulation[max(start for start in accumulation if start <= epoch)] for epoch in range(epochs)]
    steps = [math.ceil(math.ceil(18 / batch_size) / over) for over in of_epoch]
    head = {id(p) for p in model.peft["default"].head_parameters()}
    groups = [
        {"params": [p], "lr": 0.02 if id(p) in head else 0.01, "weight_decay": 0.1 if p.ndim > 1 else 0.0}
        for p in vp.trainable_parameters(model)
    ]
    peaks = [group["lr"] for group in groups]
    optimiser = torch.optim.AdamW(groups)
    data, step = Squares(), 0
    model.eval().peft.train()
    for epoch, over in enumerate(of_epoch):
        order = torch.randperm(18, generator=torch.Generator().manual_seed(epoch)).split(batch_size)
        for index, rows in enumerate(order):
            loss = F.cross_entropy(model(data.images[rows]), data.labels[rows]) + vp.penalty(model)
            (loss / over).backward()
            if (index + 1) % over and index + 1 < len(order):
                continue
            warm, total = steps[0], sum(steps)
            factor = (step + 1) / warm
            if step >= warm:
                factor = (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = factor * peak
            optimiser.step()
            step += 1
            vp.after_step(model, step, total)
            optimiser.zero_grad()
    assert step == sum(steps)
    return {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULES)
def test_accumulation_changes_between_epochs(tmp_path, name):
    """Warm-up, cosine and the budget of AdaLoRA follow the steps that are made: 2, 5, 3 and 3, as without Lightning."""
    task = SCHEDULES[name]()
    expected = by_hand(copy.deepcopy(task.model), ACCUMULATION, EPOCHS)
    fitted = fit(tmp_path / "whole", task, plc.GradientAccumulationScheduler(dict(ACCUMULATION)))
    assert fitted.global_step == 2 + 5 + 3 + 3
    assert task.steps.by_epoch == (2, 5, 3, 3)
    assert_same({key: value.float() for key, value in trained(task).items()}, expected, 1e-5)
    even = by_hand(SCHEDULES[name]().model, {0: 1}, EPOCHS)
    assert any(not torch.allclose(even[key], expected[key], atol=1e-3) for key in expected)  # the test can fail
    for epoch in range(EPOCHS - 1):
        again = SCHEDULES[name]()
        callback = plc.GradientAccumulationScheduler(dict(ACCUMULATION))
        fit(tmp_path / f"resumed {epoch}", again, callback, resume=tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert_same(again.state_dict(), task.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_accumulation_of_a_learner_whose_rate_changes_with_the_epochs(tmp_path):
    """In each epoch 0.5 lr (1 + cos(pi (epoch - 1) / epochs)), however many steps it makes."""
    task, record = learner_task(), Record()
    task.optimisation = Optimisation(optimizer="sgd", lr=0.2, schedule="epoch_cosine", warmup_epochs=1)
    fit(tmp_path, task, plc.GradientAccumulationScheduler(dict(ACCUMULATION)), record)
    rates = [1e-5, *(0.1 * (1 + math.cos(math.pi * epoch / EPOCHS)) for epoch in range(3))]
    expected = [rate for rate, steps in zip(rates, (2, 5, 3, 3), strict=True) for _ in range(steps)]
    assert [rate for (rate,) in record.rates] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore")
def test_a_limit_of_steps(tmp_path):
    """The schedule ends at the limit, and an epoch is as long as it is."""
    task, record = image_task(), Record()
    fit(tmp_path, task, record, epochs=-1, max_steps=8)
    assert task.steps.by_epoch == (5, 5)
    warm = [(step + 1) / 5 for step in range(5)]
    cosine = [(1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]
    assert [min(row) for row in record.rates] == pytest.approx([0.01 * factor for factor in warm + cosine])


@pytest.mark.filterwarnings("ignore")
def test_early_stopping_ends_a_training_once(tmp_path):
    """Resumed, a training that had been stopped stays as it is, and one before that stops where it did."""

    def stopping():  # nothing is an improvement
        return plc.EarlyStopping("val/loss", min_delta=1e9, patience=2)

    task = image_task()
    fitted = fit(tmp_path / "whole", task, stopping(), epochs=8)
    assert fitted.current_epoch == 3
    for epoch in range(3):
        again = image_task()
        resumed = fit(
            tmp_path / f"{epoch}", again, stopping(), epochs=8, resume=tmp_path / "whole" / f"epoch={epoch}.ckpt"
        )
        assert resumed.current_epoch == 3
        assert_same(again.state_dict(), task.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_early_stopping_of_averages(tmp_path):
    task = image_task()
    callbacks = [plc.EarlyStopping("val/loss", min_delta=1e9, patience=1), plc.EMAWeightAveraging(decay=DECAY)]
    record = Record()
    fit(tmp_path, task, *callbacks, record, epochs=8)
    assert_same(trained(task), averages(record.weights, DECAY), 1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "adalora", "coop", "chosen by the data"])
def test_watching_changes_nothing(tmp_path, name):
    """Monitors and a timer write and stop, and leave the training as it is without them."""
    plain, watched = TASKS[name](), TASKS[name]()
    fit(tmp_path / "plain", plain)
    callbacks = [
        plc.LearningRateMonitor(logging_interval="step", log_weight_decay=True, log_momentum=True),
        plc.Timer(duration={"hours": 1}),
        plc.ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=2),
        plc.DeviceStatsMonitor(cpu_stats=False),
        plc.RichModelSummary(),
        plc.LambdaCallback(on_train_start=lambda *_: None),
        plc.OnExceptionCheckpoint(tmp_path),
    ]
    logger = pl.loggers.CSVLogger(tmp_path / "csv")
    fitted = pl.Trainer(
        default_root_dir=tmp_path,
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=logger,
        callbacks=callbacks,
        log_every_n_steps=2,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    fitted.fit(watched, Squares())
    assert_same(watched.state_dict(), plain.state_dict())
    logged = (tmp_path / "csv" / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "lr-AdamW" in logged
    assert "train/device/batches_per_sec" in logged or "train|device|batches_per_sec" in logged
    assert watched.trainer.callbacks
    assert callbacks[1].time_elapsed("train") > 0


@pytest.mark.filterwarnings("ignore")
def test_a_timer_that_is_up_stays_up(tmp_path):
    task = image_task()
    fitted = fit(tmp_path / "whole", task, plc.Timer(timedelta(milliseconds=1), interval="epoch"), epochs=3)
    assert fitted.current_epoch == 1
    files = sorted((tmp_path / "whole").glob("*.ckpt"))
    again = image_task()
    resumed = fit(
        tmp_path / "again", again, plc.Timer(timedelta(milliseconds=1), interval="epoch"), epochs=3, resume=files[-1]
    )
    assert resumed.current_epoch == fitted.current_epoch


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "adalora", "coop", "chosen by the data"])
def test_the_tuner_finds_a_learning_rate_and_leaves_the_task(tmp_path, name):
    task = TASKS[name]()
    before = copy.deepcopy(task.state_dict()) if name != "chosen by the data" else None
    found = Tuner(trainer(tmp_path, keep=False, epochs=30)).lr_find(task, Squares(), num_training=40)
    assert len(found.results["lr"]) > 10
    assert task.optimisation.lr == task.lr == pytest.approx(found.suggestion())
    assert task.lr != 0.01
    if before is not None:
        assert_same(task.state_dict(), before)
    record = Record()
    fit(tmp_path / "then", task, record, keep=False)
    assert max(row[0] for row in record.rates) == pytest.approx(task.lr)


@pytest.mark.filterwarnings("ignore")
def test_the_found_rate_is_that_of_the_batch(tmp_path):
    """With a rate that is scaled by the batch size, the optimiser gets what was found."""
    task = image_task(optimisation=Optimisation(lr=0.01, scale_lr_by_batch=256, warmup_epochs=0))
    found = Tuner(trainer(tmp_path, keep=False, epochs=30)).lr_find(task, datamodule=Squares(), num_training=40)
    record = Record()
    fit(tmp_path / "then", task, record, keep=False)
    assert record.rates[0][0] == pytest.approx(found.suggestion())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "adalora", "coop"])
def test_the_tuner_finds_a_batch_size_and_leaves_the_task(tmp_path, name):
    task, data = TASKS[name](), Squares(batch_size=2)
    before = copy.deepcopy(task.state_dict())
    size = Tuner(trainer(tmp_path, keep=False)).scale_batch_size(task, datamodule=data, steps_per_trial=1, max_trials=3)
    assert size == data.batch_size == 8
    assert_same(task.state_dict(), before)
    record = Record()
    fit(tmp_path / "then", task, record, data=data, keep=False)
    assert task.steps.by_epoch == (3,) * EPOCHS
    assert len(record.rates) == 3 * EPOCHS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_searching_callbacks_leave_the_training_of_what_they_found(tmp_path, name):
    """The schedule is made again for the batch size and the rate that were found."""
    task, data, record = TASKS[name](), Squares(batch_size=2), Record()
    finder = plc.BatchSizeFinder(steps_per_trial=1, max_trials=3)
    fit(tmp_path / "found", task, finder, record, data=data)
    expected, given = TASKS[name](), Record()
    fit(tmp_path / "given", expected, given, data=Squares(batch_size=8))
    assert record.rates == given.rates
    assert_same(task.state_dict(), expected.state_dict())

    task, record = TASKS[name](), Record()
    finder = plc.LearningRateFinder(num_training_steps=18)
    fit(tmp_path / "rate", task, finder, record)
    expected, given = TASKS[name](), Record()
    expected.lr = finder.optimal_lr.suggestion()
    fit(tmp_path / "given rate", expected, given)
    assert record.rates == given.rates
    assert_same(task.state_dict(), expected.state_dict())


REFUSED = {
    "two averages": (image_task, [plc.EMAWeightAveraging(), LastTwoEpochs()], "both average"),
    "pruning": (image_task, [plc.ModelPruning("l1_unstructured", amount=0.5)], "ModelPruning"),
    "fine-tuning": (image_task, [plc.BackboneFinetuning()], "stays frozen"),
    "nothing trained": (lambda: learner_task("ZeroShot"), [plc.EMAWeightAveraging()], "nothing by gradient steps"),
    "an average of its own": (lambda: learner_task("PromptSRC"), [plc.EMAWeightAveraging()], "average_mean to null"),
    "scaled rate": (
        lambda: image_task(optimisation=Optimisation(scale_lr_by_batch=256)),
        [plc.GradientAccumulationScheduler({1: 2})],
        "scale_lr_by_batch",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(tmp_path, name):
    make, callbacks, sentence = REFUSED[name]
    task = make()
    before = copy.deepcopy(task.state_dict())
    with pytest.raises(vp.ConfigurationError, match=sentence):
        fit(tmp_path, task, *callbacks, keep=False)
    assert_same(task.state_dict(), before)


@pytest.mark.filterwarnings("ignore")
def test_frozen_statistics_are_not_taken_anew(tmp_path):
    """StochasticWeightAveraging resets every batch normalisation; one of the backbone would stay so."""
    task = image_task()
    task.model.patch_embed.norm = torch.nn.Sequential()
    task.model.patch_embed.norm.add_module("frozen", torch.nn.BatchNorm1d(4))
    task.model.patch_embed.norm.frozen.running_mean += 1
    with pytest.raises(vp.ConfigurationError, match="frozen is frozen"):
        fit(tmp_path, task, plc.StochasticWeightAveraging(0.01, swa_epoch_start=1), keep=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("finder", [plc.BatchSizeFinder, plc.LearningRateFinder])
def test_searching_again_when_resuming_is_refused(tmp_path, finder):
    """Lightning would begin again at epoch 0 with the weights of the checkpoint."""
    fit(tmp_path, image_task(), epochs=2)
    with pytest.raises(vp.ConfigurationError, match="forgets the checkpoint"):
        fit(tmp_path, image_task(), finder(), resume=tmp_path / "epoch=0.ckpt")
