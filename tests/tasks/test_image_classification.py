"""ImageClassification: what is trained, in which mode, with which loss and metrics."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch.utils.data import DataLoader, TensorDataset

import visionpeft as vp
from visionpeft.errors import StorageError
from visionpeft.tasks import ImageClassification, SemanticSegmentation
from visionpeft.tasks.optimisation import Optimisation

NAMES = [f"class {index}" for index in range(7)]


class Random(pl.LightningDataModule):
    """28 random images of 7 classes."""

    batch_size = 8
    preprocessing = None

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(28, 3, 32, 32, generator=generator)
        self.labels = torch.arange(28) % 7

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.images, self.labels), batch_size=self.batch_size)

    test_dataloader = train_dataloader


def make(method=None, **fields):
    fields = {"backbone": "test_vit", "pretrained": False, "backbone_kwargs": {"img_size": 32, "depth": 2}} | fields
    return ImageClassification(method or vp.LoRA(rank=2), NAMES, **fields)


def trainer(folder: Path, **options):
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False} | options
    return pl.Trainer(default_root_dir=folder, enable_model_summary=False, enable_checkpointing=False, **options)


def test_only_adapter_and_head_are_trained(tmp_path):
    task = make(vp.VPT(num_tokens=2), optimisation=Optimisation(warmup_epochs=0))
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    trainer(tmp_path).fit(task, Random())
    changed = {name for name, value in task.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(("peft.", "head.")) for name in changed)
    assert {name for name in changed if name.startswith("peft.")} == {
        f"peft.{name}" for name, _ in task.model.peft.named_parameters()
    }


def test_frozen_modules_stay_in_evaluation_mode():
    task = make(
        vp.LoRA(rank=2, dropout=0.1), backbone_kwargs={"img_size": 32, "depth": 2, "proj_drop_rate": 0.1}, drop_path=0.2
    )
    task.train()
    adapter = set(task.model.peft.modules())
    training = {module for module in task.model.modules() if module.training}
    assert adapter <= training
    paths = [module for module in task.model.modules() if isinstance(module, DropPath)]
    assert paths
    assert training - adapter == set(paths)
    task.eval()
    assert not any(module.training for module in task.model.modules())


@pytest.mark.parametrize("task", [ImageClassification, SemanticSegmentation])
def test_stochastic_depth_that_nobody_asked_for_is_none(task):
    """timm makes Swin with a rate of .1; where one is given, it is active while training."""
    small = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "img_size": 32}
    images = torch.randn(2, 3, 32, 32)
    for drop_path, given in ((0.0, {}), (0.4, {}), (0.0, {"drop_path_rate": 0.4})):
        made = task(
            vp.LoRA(rank=2), ["a", "b"], "swin_tiny_patch4_window7_224", pretrained=False, drop_path=drop_path,
            backbone_kwargs=small | given,
        ).train()  # fmt: skip
        assert any(isinstance(module, DropPath) for module in made.model.modules())
        made.model.get_classifier().eval()
        made.model.peft.eval()
        passes = [made.model(images) for _ in range(6)]
        assert all(torch.equal(each, passes[0]) for each in passes) == (not drop_path and not given)


def test_an_odd_batch_is_not_mixed_and_divided_by_its_images_as_mixed_ones_are():
    """Else its class weights would not count where a device has one image of it; without mixup, as one formula says."""
    data, weights = Random(), torch.tensor([1.0, 9, 1, 1, 1, 1, 1])
    images, labels = data.images[:3], data.labels[:3]
    task = make(mixup=0.8, label_smoothing=0.1, class_weights=weights.tolist()).eval()
    wanted = torch.full((3, 7), 0.1 / 7).scatter_(1, labels[:, None], 0.9 + 0.1 / 7)
    each = -(wanted * weights * task(images).log_softmax(-1)).sum(-1)
    assert task.training_loss(images, labels)[0].item() == pytest.approx(each.mean().item(), rel=1e-5)
    alone = [task.training_loss(images[i : i + 1], labels[i : i + 1])[0].item() for i in range(3)]
    assert alone == pytest.approx(each.tolist(), rel=1e-5)
    plain = make(label_smoothing=0.1, class_weights=weights.tolist()).eval()
    plain.load_state_dict(task.state_dict())
    weighted = each.sum() / weights[labels].sum()
    assert plain.training_loss(images, labels)[0].item() == pytest.approx(weighted.item(), rel=1e-5)
    assert abs(weighted - each.mean()) > 0.1


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_a_method_that_compares_passes_is_shown_the_same_images_again(mixup):
    """The penalty is that of the logits of the training pass and of a second one of the same, mixed images."""
    data = Random()
    images, labels = data.images[:4].clone(), data.labels[:4]  # which are mixed in place
    task = make(vp.AdaMix(experts=2, bottleneck=4, init="bert"), mixup=mixup).train()
    seen = []
    task.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    task.model.register_forward_hook(lambda *call: seen.append(call[-1]))
    task.training_loss(images, labels)
    penalty = task.penalty()
    (first, p), (second, q) = (seen[:2], seen[2:])
    assert torch.equal(first, second)
    assert torch.equal(first, data.images[:4]) == (not mixup)
    assert not torch.equal(p, q)
    p, q = (z.double().softmax(dim=1) for z in (p, q))
    assert penalty.item() == pytest.approx(((p - q) * (p.log() - q.log())).sum().item() / 8, rel=1e-3)
    task.eval()
    task(images)
    assert len(seen) == 6  # nothing is compared where nothing is trained


def test_passes_are_compared_of_classes_alone():
    with pytest.raises(vp.ConfigurationError, match="AdaMix compares the class probabilities of two passes"):
        make(vp.AdaMix(), labels="several")
    assert make(vp.AdaMix(consistency=0), labels="several").objective.labels == "several"


def test_metrics_equal_their_definitions(tmp_path):
    task, data = make(), Random()
    measured = trainer(tmp_path)
    measured.test(task, data, verbose=False)
    with torch.no_grad():
        logits = task.eval()(data.images)
    top5 = (logits.topk(5).indices == data.labels[:, None]).any(1).float().mean()
    found = {name: value.item() for name, value in measured.callback_metrics.items()}
    assert found == pytest.approx(
        {
            "test/loss": F.cross_entropy(logits, data.labels).item(),
            "test/top1": (logits.argmax(1) == data.labels).float().mean().item(),
            "test/top5": top5.item(),
        },
        abs=1e-5,
    )


def test_no_top5_for_few_classes():
    task = ImageClassification(vp.BitFit(), NAMES[:5], backbone="test_vit", pretrained=False)
    assert set(task.test_metrics) == {"test/loss", "test/top1"}


def test_label_smoothing_and_mixing(tmp_path, monkeypatch):
    seen = []
    cross_entropy = F.cross_entropy

    def record(logits, targets, **options):
        seen.append((targets, options))
        return cross_entropy(logits, targets, **options)

    monkeypatch.setattr(F, "cross_entropy", record)
    data = Random()
    data.batch_size = 9  # the last batch of 28 has one image, the others an odd number
    trainer(tmp_path).fit(make(label_smoothing=0.1), data)
    assert {options["label_smoothing"] for _, options in seen} == {0.1}
    seen.clear()
    data.batch_size = 8
    trainer(tmp_path).fit(make(label_smoothing=0.1, mixup=0.8, cutmix=1.0), data)
    assert {options["label_smoothing"] for _, options in seen} == {0.0}
    for targets, _ in seen:
        assert targets.sum(1).tolist() == pytest.approx([1.0] * len(targets), abs=1e-5)
        assert targets.min() == pytest.approx(0.1 / 7, abs=1e-5)
    seen.clear()
    data.batch_size = 27
    trainer(tmp_path).fit(make(mixup=0.8), data)
    assert [targets.dtype for targets, _ in seen] == [torch.int64, torch.int64]  # odd batches are not mixed


def test_learning_rate_follows_the_steps(tmp_path):
    rates = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append([group["lr"] for group in optimizer.param_groups])

    task = make(optimisation=Optimisation(lr=1.0, head_lr=0.1, warmup_epochs=1.5))
    trainer(tmp_path, max_epochs=4, callbacks=[Watch()]).fit(task, Random())
    adapter = [max(row) for row in rates]
    head = [min(row) for row in rates]
    assert adapter[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert adapter[6] == pytest.approx(1)
    assert adapter[11] == pytest.approx(0.5)
    assert len(adapter) == 16
    assert head == pytest.approx([rate / 10 for rate in adapter])


def test_lora_plus_reaches_the_optimizer(tmp_path):
    task = make(optimisation=Optimisation(lr=0.01, lora_plus=8, warmup_epochs=0, schedule="epoch_cosine"))
    fitted = trainer(tmp_path)
    fitted.fit(task, Random())
    (optimizer,) = fitted.optimizers
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in task.adapter.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.08 if name.endswith(".B") else 0.01), name


def test_layer_decay_reaches_the_optimizer(tmp_path):
    """lr * decay ** (L - block) for L blocks, and the whole rate for the head."""
    task = make(optimisation=Optimisation(lr=0.01, layer_decay=0.5, warmup_epochs=0, schedule="epoch_cosine"))
    fitted = trainer(tmp_path)
    fitted.fit(task, Random())
    (optimizer,) = fitted.optimizers
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    depth = len(task.model.blocks)
    for name, parameter in task.adapter.named_parameters():
        distance = 0 if name.startswith("head.") else depth - int(name.split(".")[2])
        assert rates[id(parameter)] == pytest.approx(0.01 * 0.5**distance), name


def test_extra_parameters_travel_in_the_checkpoint(tmp_path):
    task = make(train=["cls_token"])
    fitted = trainer(tmp_path)
    fitted.fit(task, Random())
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert "model.peft.default.trained.cls_token" in saved
    other = make(vp.LoRA(rank=3), train=["cls_token"])
    with pytest.raises(StorageError, match=r"differ in name or shape, among them default\.lora"):
        trainer(tmp_path, max_epochs=2).fit(other, Random(), ckpt_path=tmp_path / "a.ckpt")


def test_seed_decides_the_initial_weights():
    first, again, other = (make(seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_data_is_told_the_preprocessing(tmp_path):
    task, data = make(), Random()
    trainer(tmp_path).test(task, data, verbose=False)
    assert data.preprocessing.input_size == (32, 32)


def test_one_class_is_refused():
    with pytest.raises(vp.ConfigurationError, match="at least two classes"):
        ImageClassification(vp.BitFit(), ["one"], backbone="test_vit", pretrained=False)
