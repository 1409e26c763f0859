"""What a choice costs: counted formulas against what `visionpeft.summary` measures and prints."""

import subprocess
import sys

import pytest
import timm
import torch

import visionpeft as vp
from visionpeft.costs.cost import measure
from visionpeft.summary import main as summarise

WIDTH, DEPTH, TOKENS, CLASSES = 192, 12, 197, 10


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES)


def forward_of_backbone(tokens: int) -> int:
    """Multiply-adds of a ViT with four times as wide MLPs on `tokens` tokens, 196 of which are patches of 16 pixels."""
    block = tokens * WIDTH * 12 * WIDTH + 2 * tokens * tokens * WIDTH
    return 196 * 3 * 16 * 16 * WIDTH + DEPTH * block + WIDTH * CLASSES


def test_multiply_adds_and_file(backbone):
    cost = measure(backbone, vp.LoRA(rank=4, targets=("q", "v")), batch_size=2, rounds=1)
    added = DEPTH * 2 * TOKENS * 2 * WIDTH * 4
    assert cost.backbone_gflops * 1e9 == forward_of_backbone(TOKENS)
    assert cost.gflops * 1e9 == forward_of_backbone(TOKENS) + added
    assert cost.counts.adapter == DEPTH * 2 * 2 * WIDTH * 4
    assert 4 * cost.counts.trainable < cost.file < 4 * cost.counts.trainable + 40_000
    assert cost.merged == "yes"
    assert cost.step > cost.forward > 0


def test_full_fine_tuning_keeps_more_than_a_linear_probe(backbone):
    probe = measure(backbone, vp.LinearProbe(), batch_size=1, rounds=1)
    vp.detach(backbone)
    full = measure(backbone, vp.FullFineTuning(), batch_size=1, rounds=1)
    # The head keeps its input and the softmax; a block keeps at least q, k, v and the MLP's hidden tokens.
    assert probe.saved < 4 * (TOKENS * WIDTH + 10 * WIDTH)
    assert full.saved > DEPTH * 4 * TOKENS * 7 * WIDTH


def test_method_that_chooses_by_data(backbone):
    """The budget is a share of all parameters, and the head's are counted in it."""
    whole = sum(parameter.numel() for parameter in backbone.parameters())
    cost = measure(backbone, vp.FishMask(density=0.01), batch_size=2, rounds=1)
    head = WIDTH * CLASSES + CLASSES
    assert cost.counts.adapter == cost.counts.indices == round(0.01 * whole) - head
    assert cost.file > 4 * cost.counts.trainable + 4 * cost.counts.indices


def test_what_cannot_be_merged_says_why(backbone):
    cost = measure(backbone, vp.VPT(num_tokens=2), batch_size=1, rounds=1)
    assert cost.merged.startswith("no: VPT")


def test_command(capsys):
    options = "--backbone test_vit --method LoRA --method.rank 2 --batch_size 1 --rounds 1"
    assert summarise(options.split()) == 0
    printed = capsys.readouterr().out
    for part in ("trained values", "multiply-adds of an image", "kept for backward", "forwards of the", "mergeable"):
        assert part in printed


def test_module_runs_without_remarks():
    command = [sys.executable, "-m", "visionpeft.summary", "--backbone", "test_vit", "--method", "BitFit"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--backbone test_vit", "name a method"),
        ("--method LoRaA", "did you mean LoRA"),
        ("--method LoRA --method.rang 3", "no option 'rang'"),
        ("--method LoRA --rounds 0", "--rounds must be at least 1"),
        ("--method LoRA --backbone test_vitt", "no backbone 'test_vitt'"),
        ("--method LoRA --backbone resnet18", "ResNet"),
    ],
)
def test_bad_choices_are_one_sentence(arguments, said, capsys):
    assert summarise(arguments.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
