"""The examples run, and the README's lines are true."""

import csv
import importlib
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from PIL import Image
from small_video_runs import draw_videos

import visionpeft as vp
from visionpeft.data import ClipArt, ComposedScenes
from visionpeft.data.video import motion_scenes as motion

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example as its own command line does, from the folder of the test; gives what it prints.

    In this process, because importing takes longer than most of the examples; one of them has a process of its own.
    """
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def few_drawings(monkeypatch):
    """Every sixth of the embedded drawings in each split: what an example does with the others is the same."""
    create = ClipArt.__init__

    def small(self, *arguments, **options):
        create(self, *arguments, **options)
        for split, source in self.sources.items():
            self.sources[split] = source.subset(range(0, len(source), 6))

    monkeypatch.setattr(ClipArt, "__init__", small)


def run_alone(name, *arguments, folder):
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / name), *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_plain_training_loop(few_drawings, run, tmp_path):
    output = run("plain_training_loop.py", "--epochs", 3, "--output", "merged.pth")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert losses[-1] < losses[0]
    merged = torch.load(tmp_path / "merged.pth", weights_only=True)
    plain = vp.create_backbone("nano_vit", num_classes=len(merged["head.bias"]))
    assert merged.keys() == plain.state_dict().keys()


def test_serve_many_adapters(tmp_path):
    assert run_alone("serve_many_adapters.py", folder=tmp_path).count("differs from") == 6


@pytest.mark.slow
def test_export_onnx(run, tmp_path):
    method = vp.AdaptFormer(bottleneck=4)
    vp.save(vp.attach(vp.create_backbone("nano_vit", num_classes=5), method), tmp_path / "adapter")
    output = run("export_onnx.py", "adapter", "--output", "m.onnx")
    assert "AdaptFormer (adapter 'default') cannot be merged" in output
    assert (tmp_path / "m.onnx").is_file()


@pytest.mark.slow
def test_own_dataset(run, tmp_path):
    for number, colour in enumerate(("red", "blue")):
        (tmp_path / "photos" / colour).mkdir(parents=True)
        for index in range(12):
            Image.new("RGB", (40, 40 + index + number), colour).save(tmp_path / "photos" / colour / f"{index}.png")
    run("own_dataset.py", "photos", "--epochs", 2)
    assert vp.read_metadata(tmp_path / "adapter")["class_names"] == ["blue", "red"]


@pytest.mark.slow
def test_few_shot_own_folder(run, tmp_path):
    for colour in ("red", "blue"):
        (tmp_path / "photos" / colour).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (40 + index, 40), colour).save(tmp_path / "photos" / colour / f"{index}.png")
    names = "a red square, a blue square, a dog"
    output = run("few_shot_own_folder.py", "photos", "--epochs", 2, "--new-names", names)
    assert output.count("photos/red") == output.count("photos/blue") == 8
    assert vp.read_learner(tmp_path / "prompt")["class_names"] == ["blue", "red"]


@pytest.mark.slow
def test_compare_methods(few_drawings, run, tmp_path):
    arguments = ("--output", "r/table.csv", "--seeds", 2, "--epochs", 1, "--methods", "linear probe")
    output = run("compare_methods.py", *arguments)
    assert output.splitlines()[-1].startswith("| linear probe | 0 |")
    rows = (tmp_path / "r" / "table.csv").read_text()
    run("compare_methods.py", *arguments)
    assert (tmp_path / "r" / "table.csv").read_text() == rows  # finished runs are not repeated


def test_method_picture(tmp_path, monkeypatch):
    """Drawn from the table of docs/results.md, number by number; a method is best for its cost if none is cheaper."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    picture = importlib.import_module("method_picture")
    picture.main(picture.ROOT / "benchmarks" / "results" / "embedded_tasks.csv", tmp_path / "methods.png")
    assert Image.open(tmp_path / "methods.png").size[0] > 1000
    with (ROOT / "benchmarks" / "results" / "embedded_tasks.csv").open(newline="") as file:
        rows = [list(row.values()) for row in csv.DictReader(file)]
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("±", "| ").replace(",", "")
    in_page = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert len(rows) == 34
    assert all(row in in_page for row in rows)
    methods = picture.read(ROOT / "benchmarks" / "results" / "embedded_tasks.csv")
    for cost in picture.COSTS:
        best = {
            line.method
            for line in methods.itertuples()
            if not any(
                other[cost] <= methods[cost][line.Index] and other["accuracy"] > line.accuracy
                for other in methods.to_dict("records")
            )
        }
        assert set(picture.best_for_its_cost(methods, cost)["method"]) == best


@pytest.mark.slow
def test_own_videos(run, tmp_path):
    draw_videos(tmp_path / "clips", per_class=6)
    arguments = ("--epochs", 1, "--num-frames", 3, "--predict", tmp_path / "clips" / "red")
    output = run("own_videos.py", "clips", *arguments)
    assert output.count("clips/red") == 6
    assert vp.read_metadata(tmp_path / "adapter")["class_names"] == ["blue", "green", "red"]


@pytest.mark.slow
def test_compare_video_methods(tmp_path, monkeypatch, capsys):
    for split, scenes in {"train": 2, "val": 1, "test": 1}.items():
        monkeypatch.setitem(motion.SCENES, split, scenes)
    script = runpy.run_path(str(ROOT / "examples" / "compare_video_methods.py"))
    methods = ["linear probe on the mean of frames", "AIM, two temporal adapters"]
    arguments = {"output": tmp_path / "r" / "t.csv", "seeds": [0], "epochs": 1, "methods": methods}
    script["main"](**arguments, root=str(tmp_path / "videos"))
    rows = (tmp_path / "r" / "t.csv").read_text()
    assert len(rows.splitlines()) == 3
    script["main"](**arguments, root=str(tmp_path / "videos"))
    assert (tmp_path / "r" / "t.csv").read_text() == rows  # finished runs are not repeated
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(" | ")[0] for line in table] == [f"| {name}" for name in methods]


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def python_with(page, words):
    """The one block of Python in a page that holds these words."""
    (block,) = [block for block in python_blocks((ROOT / page).read_text(encoding="utf-8")) if words in block]
    return block


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_readme_lines(page, tmp_path, monkeypatch):
    """The first Python of the README and of the documentation, pasted, with random weights in place of a download."""
    create = timm.create_model

    def small(name, pretrained, **options):
        return create(name, depth=2, embed_dim=48, num_heads=2, **options)

    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.chdir(tmp_path)
    block = python_with(page, "timm.create_model")
    script = tmp_path / "readme.py"
    script.write_text(block)
    names = runpy.run_path(str(script))
    plain = small("vit_base_patch16_224.augreg_in21k", False, num_classes=100).eval()
    plain.load_state_dict(torch.load("merged.pth", weights_only=True))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(plain(images), names["model"].eval()(images))


@pytest.mark.parametrize("page", ["README.md", "docs/learners.md"])
def test_readme_lines_on_clip(page, tmp_path, monkeypatch):
    """The Python on CLIP of the README and of the documentation, pasted, with nano_clip in place of a download."""
    monkeypatch.setattr(
        open_clip, "create_model_and_transforms", lambda name, pretrained: (vp.create_clip("nano_clip")[0], None, None)
    )
    monkeypatch.chdir(tmp_path)
    block = python_with(page, "create_model_and_transforms")
    (tmp_path / "readme.py").write_text(block)
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 0, 1])
    given = {"batches": [(images, labels)] * 2, "images": images}
    names = runpy.run_path(str(tmp_path / "readme.py"), init_globals=given)
    assert names["learner"].class_names == ["red kite", "buzzard", "heron"]
    assert sum(file.stat().st_size for file in (tmp_path / "prompt").iterdir()) < 2**14


def test_comparison_of_segmentation_methods(run, monkeypatch, tmp_path):
    """The rate with the best validation is taken for all seeds, and what is there is not trained again."""
    create = ComposedScenes.__init__

    def small(self, train, side, size, **options):
        create(self, train=train, val=1, test=2, side=32, size=32, test_batch_size=2, **options)

    monkeypatch.setattr(ComposedScenes, "__init__", small)
    options = ("--output", "scenes.csv", "--scenes", "8", "--methods", "head alone", "--seeds", "3", "4")
    printed = run("compare_segmentation_methods.py", *options)
    with open("scenes.csv") as file:
        rows = list(csv.DictReader(file))
    first = [row for row in rows if row["seed"] == "3"]
    best = max(first, key=lambda row: float(row["val"]))
    assert [row["lr"] for row in rows] == ["0.001", "0.003", "0.01", best["lr"]]
    assert f"| head alone | 0 | {float(best['lr']):g} | 2 |" in printed
    monkeypatch.setattr(ComposedScenes, "__init__", None)  # nothing is left to be trained
    assert f"| head alone | 0 | {float(best['lr']):g} | 2 |" in run("compare_segmentation_methods.py", *options)


def test_segment_by_names(run):
    printed = run("segment_by_names.py", "--images", 1, "--size", 64)
    rows = re.findall(r"^\| (.+) \| ([\d.]+) \| ([\d.]+) \|$", printed, flags=re.MULTILINE)
    assert [row[0] for row in rows] == ["CLIP as it is", "MaskCLIP", "SCLIP", "ClearCLIP"]
    assert all(0 < float(score) <= 100 for row in rows for score in row[1:])
    assert len({row[1:] for row in rows}) > 1
