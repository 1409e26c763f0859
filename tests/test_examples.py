"""The examples run, and the README's lines are true."""

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
from visionpeft.data import ClipArt
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


def test_readme_lines(tmp_path, monkeypatch):
    """The README's Python, pasted, with random weights in place of a download."""
    create = timm.create_model

    def small(name, pretrained, **options):
        return create(name, depth=2, embed_dim=48, num_heads=2, **options)

    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.chdir(tmp_path)
    block, _ = python_blocks((ROOT / "README.md").read_text())
    script = tmp_path / "readme.py"
    script.write_text(block)
    names = runpy.run_path(str(script))
    plain = small("vit_base_patch16_224.augreg_in21k", False, num_classes=100).eval()
    plain.load_state_dict(torch.load("merged.pth", weights_only=True))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(plain(images), names["model"].eval()(images))


def test_readme_lines_on_clip(tmp_path, monkeypatch):
    """The README's Python on CLIP, pasted, with nano_clip in place of a download."""
    monkeypatch.setattr(
        open_clip, "create_model_and_transforms", lambda name, pretrained: (vp.create_clip("nano_clip")[0], None, None)
    )
    monkeypatch.chdir(tmp_path)
    _, block = python_blocks((ROOT / "README.md").read_text())
    (tmp_path / "readme.py").write_text(block)
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 0, 1])
    given = {"batches": [(images, labels)] * 2, "images": images}
    names = runpy.run_path(str(tmp_path / "readme.py"), init_globals=given)
    assert names["learner"].class_names == ["red kite", "buzzard", "heron"]
    assert sum(file.stat().st_size for file in (tmp_path / "prompt").iterdir()) < 2**14


def test_readme_learner_counts():
    """The README's column of values a learner trains is what building it on ViT-B/16 gives."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+\(.*?\))` \|[^|]*\| ([\d,]+) \|", text, flags=re.MULTILINE)
    rows = [(call, count) for call, count in rows if call.partition("(")[0] in vp.clip.__all__]
    assert len(rows) == 12
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    for call, count in rows:
        with torch.device("meta"):
            clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"))
        name, _, options = call.partition("(")
        learner = getattr(vp, name)(clip, tokenizer, ["cat", "dog"], **eval(f"dict({options}"))
        tuned = getattr(learner, "num_tuned", None)
        trained = sum(parameter.numel() for parameter in learner.trainable_parameters()) if tuned is None else tuned
        assert trained == int(count.replace(",", "")), call


def test_readme_counts():
    """The README's column of trained parameters is what attaching to ViT-B/16 gives."""
    rows = re.findall(r"^\| `(\w+\(.*?\))` \|.*?\| ([\d,]+) \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    rows = [(call, count) for call, count in rows if call.partition("(")[0] not in vp.clip.__all__]
    assert len(rows) >= 13
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=10)
    shown = torch.randn(2, 3, 224, 224), torch.tensor([0, 1])
    for call, count in rows:
        vp.attach(model, eval(call, {name: getattr(vp, name) for name in vp.__all__}))
        if model.peft["default"].pending:
            torch.nn.init.normal_(model.head.weight, std=0.02)
            vp.allocate(model, [shown])
        assert vp.summary(model).adapter == int(count.replace(",", "")), call
        vp.detach(model)
