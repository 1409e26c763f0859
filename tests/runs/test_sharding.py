"""`--trainer.strategy fsdp2`: the backbone is in parts on two devices, and everything else is as on one."""

import json

import lightning.pytorch as pl
import pytest
import torch
from process_runs import alone, furthest, together
from small_learner_runs import learner_arguments
from small_runs import arguments, draw_splits
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import visionpeft as vp
from visionpeft import fit
from visionpeft.runs import sharding
from visionpeft.tasks import ImageClassification

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
SHARDED = ["--trainer.strategy", "fsdp2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images to train on, 9 to select on and 9 to test: one process has a batch more of them than the other."""
    return draw_splits(tmp_path_factory.mktemp("images"), train=8, val=3, test=3)


def fit_and_count(given):
    """Train, and print how many numbers of the blocks are here, and how many they have."""
    shard = sharding.shard

    def counted(task, device, processes):
        names = shard(task, device, processes)
        held = [parameter for name, parameter in task.named_parameters() if name in set(names)]
        assert not any(parameter.requires_grad for parameter in held)
        whole = {name for name, parameter in task.named_parameters() if type(parameter.data) is torch.Tensor}
        assert {name for name in whole if ".blocks." in name and ".peft." not in name} == set()
        here = sum(parameter.to_local().numel() for parameter in held)
        print("PARTS", here, sum(parameter.numel() for parameter in held), flush=True)
        return names

    sharding.shard = counted
    return fit.main(given)


@pytest.mark.slow
def test_a_sharded_backbone_trains_as_a_whole_one(tmp_path, images):
    """Losses, test numbers and weights to 1e-6; each process holds half; files are those of one device."""
    given = [*arguments(images, epochs=2), "--global_batch", "4"]
    two = together(tmp_path / "two", [*given, *SHARDED], function=fit_and_count)
    one = alone(tmp_path / "one", given)
    assert furthest(two, one) < 1e-6
    said = "".join(path.read_text() for path in tmp_path.glob("two/*.txt")).splitlines()
    parts = [line.split()[1:] for line in said if line.startswith("PARTS")]
    assert len(parts) == 2
    assert all(0.49 < int(here) / int(whole) < 0.51 for here, whole in parts)
    described = [json.loads((run / "adapter" / "adapter.json").read_text()) for run in (two, one)]
    assert described[0]["backbone"] == described[1]["backbone"]  # with the fingerprint of the whole backbone
    # The checkpoint holds ordinary tensors, all of them whole, and one device goes on from it.
    kept = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (two, one)]
    assert {name: tensor.shape for name, tensor in kept[0].items()} == {n: t.shape for n, t in kept[1].items()}
    assert all(type(tensor) is torch.Tensor for tensor in kept[0].values())
    longer = ["--trainer.max_epochs", "3"]
    on_one = ["--trainer.devices", "1", "--trainer.strategy", "auto"]
    assert fit.main(["--resume", str(two), *longer, *on_one]) == 0
    assert fit.main(["--resume", str(one), *longer]) == 0
    assert furthest(two, one) < 1e-6
    # The negative control: other batches make another training.
    assert furthest(alone(tmp_path / "other", [*given[:-1], "8", *longer]), one) > 1e-3


@pytest.mark.slow
def test_trained_copies_and_recomputed_blocks(tmp_path, images):
    """Every weight has a trained copy in the place of its sharded original, and blocks are computed twice."""
    given = [*arguments(images, epochs=1), "--model.method", "FullFineTuning", "--model.recompute", "block"]
    given += ["--global_batch", "4", "--model.optimisation.optimizer", "sgd", "--model.optimisation.lr", "0.01"]
    assert furthest(together(tmp_path / "two", [*given, *SHARDED]), alone(tmp_path / "one", given)) < 1e-6


TWO = ["--trainer.devices", "2", *SHARDED]
AVERAGE = ["--trainer.callbacks", "EMAWeightAveraging"]
REFUSED = {
    "one device": (SHARDED, "shares a backbone among devices, and there is one"),
    "a method that sees data first": (
        [*TWO, "--model.method", "SPT"],
        "SPT chooses what it trains by",
    ),
    "cache": (
        [*TWO, "--model.cache", "memory", "--model.method.blocks", "last:1", "--data.augmentation", "none"],
        "leave one of the two out",
    ),
    "average": ([*TWO, *AVERAGE], "EMAWeightAveraging keeps a copy of the whole backbone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sharded_is_refused_at_once(tmp_path, images, capsys, case):
    options, words = REFUSED[case]
    assert fit.main([*arguments(images), *options, "--output", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_learner_is_refused(tmp_path, images, capsys):
    assert fit.main([*learner_arguments(images / "train"), *TWO, "--output", str(tmp_path / "runs")]) == 2
    assert "is a learner; leave it out" in capsys.readouterr().err


def test_quantised_weights_are_refused():
    task = ImageClassification(vp.LoRA(rank=2), ["one", "two"], backbone="test_vit", pretrained=False)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="fsdp2", logger=False, enable_checkpointing=False)
    sharding.check_sharding(trainer, task)
    quantize_(task.model, Int8WeightOnlyConfig(), lambda module, name: name == "blocks.0.mlp.fc1")
    with pytest.raises(vp.ConfigurationError, match="cannot share out quantised weights"):
        sharding.check_sharding(trainer, task)
