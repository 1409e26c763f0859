"""Lightning's callbacks beside our tasks: what they promise holds, and a resumed training is the uninterrupted one."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks as plc
from lightning.pytorch.tuner import Tuner
from small_learner_runs import CLIP  # noqa: F401  (makes OpenCLIP know the tiny CLIP)
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import visionpeft as vp
from visionpeft.clip import learners
from visionpeft.tasks import ImageClassification, PromptLearning
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
    fields = {"backbone": "test_vit", "pretrained": False, "backbone_kwargs": {"img_size": 32}} | fields
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
    "chosen by the data": lambda: image_task(vp.FishMask(keep=0.01)),
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
    kept = [plc.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)] if keep else []
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("use_buffers", [True, False])
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
