"""VideoClassification: what is trained, in which mode, how views are averaged, what is saved and refused."""

import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from small_video_runs import draw_videos
from torch.utils.data import DataLoader, TensorDataset

import visionpeft as vp
from visionpeft.data import ClipArt, FrameSampling, VideoFolder
from visionpeft.models.image_classifier import ImageClassifier
from visionpeft.models.video_views import over_views
from visionpeft.tasks import ImageClassification, VideoClassification
from visionpeft.tasks.optimisation import Optimisation

NAMES = [f"class {index}" for index in range(6)]
TINY = {"backbone": "test_vit", "pretrained": False, "backbone_kwargs": {"img_size": 32, "depth": 2}}


class RandomClips(pl.LightningDataModule):
    """12 random clips of three frames; the test has two views of each."""

    batch_size = 4
    preprocessing = None

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.views = torch.randn(12, 2, 3, 3, 32, 32, generator=generator)
        self.labels = torch.arange(12) % 6

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.views[:, 0], self.labels), batch_size=self.batch_size)

    def test_dataloader(self):
        return DataLoader(TensorDataset(self.views, self.labels), batch_size=5)


def make(method=None, **fields):
    fields = TINY | {"num_frames": 3} | fields
    return VideoClassification(method or vp.STAdapter(bottleneck=8), NAMES, **fields)


def lively(task):
    """The task after training, as far as it matters here: nothing is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.trained_parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return task


def trainer(folder: Path, **options):
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False} | options
    return pl.Trainer(default_root_dir=folder, enable_model_summary=False, enable_checkpointing=False, **options)


@pytest.mark.parametrize("method", [vp.STAdapter(bottleneck=8), vp.AIM(num_frames=3), vp.LoRA(rank=2)])
def test_only_adapter_and_head_are_trained(method, tmp_path):
    task = make(method, optimisation=Optimisation(warmup_epochs=0), dropout=0.0)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    trainer(tmp_path).fit(task, RandomClips())
    changed = {name for name, value in task.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("peft.default.head.") for name in changed)
    assert any(name.startswith(f"peft.default.{method.name}") for name in changed)
    norm = ("backbone.norm.",) if isinstance(method, vp.AIM) else ()  # AIM trains the final norm
    assert all(name.startswith(("peft.", "head.", *norm)) for name in changed)


def test_modes_while_training():
    task = make(backbone_kwargs={"img_size": 32, "depth": 2, "proj_drop_rate": 0.1}, drop_path=0.2, dropout=0.3)
    task.train()
    dropped = [module for module in task.model.peft.modules() if isinstance(module, torch.nn.Dropout)]
    assert [module.p for module in dropped] == [0.3]
    assert dropped[0].training
    assert not any(module.training for module in task.model.modules() if isinstance(module, torch.nn.LayerNorm))
    clips = torch.randn(2, 3, 3, 32, 32)
    assert not torch.equal(task(clips), task(clips))
    task.eval()
    assert torch.equal(task(clips), task(clips))


def test_views_are_averaged_as_probabilities(tmp_path):
    """What the test reports is computed here from each view by itself, in float64."""
    task, data = lively(make(dropout=0.0)), RandomClips()
    (found,) = trainer(tmp_path).test(task, data, verbose=False)
    task.eval()
    with torch.no_grad():
        logits = [task.model(view).double().tolist() for view in data.views.unbind(1)]
    loss, right = 0.0, 0
    for number, label in enumerate(data.labels.tolist()):
        rows = [[math.exp(value) for value in view[number]] for view in logits]
        probabilities = [sum(row[c] / sum(row) for row in rows) / len(rows) for c in range(len(NAMES))]
        loss -= math.log(probabilities[label]) / len(data.labels)
        right += probabilities[label] == max(probabilities)
    assert found["test/loss"] == pytest.approx(loss, rel=1e-5)
    assert found["test/top1"] == pytest.approx(right / len(data.labels))
    mean = torch.stack([torch.tensor(view) for view in logits]).mean(0)
    assert abs(F.cross_entropy(mean, data.labels).item() - loss) > 1e-4  # not the mean of logits


def test_average_of_extreme_views_is_finite():
    views = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]])  # one video, two views
    averaged = over_views(lambda logits: logits, views)
    assert averaged.softmax(-1)[0].tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_label_smoothing_and_gradients():
    task, data = lively(make(dropout=0.0, label_smoothing=0.2)), RandomClips()
    clips, labels = data.views[:4, 0], data.labels[:4]
    loss, logits = task.training_loss(clips, labels)
    log_probabilities = logits.double().log_softmax(-1)
    expected = -0.8 * log_probabilities[range(4), labels].mean() - 0.2 * log_probabilities.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    trained = {id(parameter) for parameter in task.trained_parameters()}
    assert all(parameter.grad is not None for parameter in task.trained_parameters())
    assert all(parameter.grad is None for parameter in task.parameters() if id(parameter) not in trained)


def test_at_the_start_the_mean_of_image_features_is_classified():
    """Until something is learnt the model is the image backbone with a head on the mean over frames."""
    task = make(vp.AIM(num_frames=3), dropout=0.0).eval()
    torch.manual_seed(0)
    image = vp.create_backbone("test_vit", pretrained=False, img_size=32, depth=2).eval()
    clips = RandomClips().views[:2, 0]
    with torch.no_grad():
        features = torch.stack([image(frame) for frame in clips.unbind(2)]).mean(0)
        linear = task.adapter.get_submodule("head")[1]
        expected = features @ linear.weight.T + linear.bias
        assert torch.allclose(task(clips), expected, atol=1e-5)


def test_save_and_load(tmp_path):
    data = VideoFolder(draw_videos(tmp_path / "films", per_class=6), sampling=FrameSampling(num_frames=3))
    task, other = lively(make()), make()
    task.connect(data)
    task.save(tmp_path / "adapter", data)
    metadata = vp.read_metadata(tmp_path / "adapter")
    assert metadata["class_names"] == NAMES
    assert metadata["metadata"]["data"]["sampling"]["num_frames"] == 3
    clips = RandomClips().views[:2, 0]
    assert not torch.allclose(task.eval()(clips), other.eval()(clips), atol=1e-3)
    other.load(tmp_path / "adapter")
    assert torch.equal(task.eval()(clips), other.eval()(clips))


def test_image_tower_of_a_clip(tmp_path, monkeypatch):
    import open_clip

    open_clip.add_model_config(Path(__file__).parents[1] / "clip_configs")
    task = make(backbone="open_clip/tiny_clip", backbone_kwargs={})
    assert isinstance(task.model.backbone, ImageClassifier)
    assert task.preprocessing.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert task(torch.randn(2, 3, 3, 32, 32)).shape == (2, 6)


def test_data_of_another_kind_is_refused(tmp_path):
    with pytest.raises(vp.ConfigurationError, match="VideoClassification takes videos, but ClipArt holds images"):
        make().connect(ClipArt())
    data = VideoFolder(draw_videos(tmp_path / "films", per_class=6))
    image = ImageClassification(vp.LoRA(), NAMES, **TINY)
    with pytest.raises(vp.ConfigurationError, match="use VideoClassification"):
        image.connect(data)
    with pytest.raises(vp.ConfigurationError, match=r"clips of 8 frames .* the model takes 3"):
        make().connect(data)


def test_stacked_methods_and_description():
    task = make([vp.STAdapter(bottleneck=8), vp.BitFit()])
    assert task.label == "STAdapter+BitFit"
    described = task.describe()
    assert [each["class"] for each in described["method"]] == ["STAdapter", "BitFit"]
    head = task.model.num_features * 6 + 6
    assert described["parameters"]["trainable"] == described["parameters"]["adapter"] + head
    assert described["backbone"]["name"] == "test_vit"
