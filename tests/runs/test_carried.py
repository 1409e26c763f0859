"""A run that begins with saved adapters has copies of them: it is resumed and tested without those, even elsewhere."""

import json
import shutil

import pytest
import torch
from small_runs import arguments, draw_images, results

import visionpeft as vp
from visionpeft import evaluate, fit
from visionpeft.runs.carried import with_carried


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("data") / "squares", per_class=5)


def save_lora(folder, seed):
    torch.manual_seed(0)
    model = vp.attach(
        vp.create_backbone("test_vit", pretrained=False, img_size=32, depth=2, num_classes=3), vp.LoRA(rank=2)
    )
    torch.manual_seed(seed)
    for parameter in model.peft["default"].parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    vp.save(model, folder)
    return str(folder)


FROM = {
    "mole": lambda sources: ["--model.method", "MoLE", "--model.method.adapters", json.dumps(sources)],
    "start": lambda sources: ["--model.method", "LoRA", "--model.method.rank", "2", "--model.start", sources[0]],
}


@pytest.mark.parametrize("name", FROM)
def test_a_run_stands_alone(tmp_path, images, name):
    sources = [save_lora(tmp_path / f"source{seed}", seed) for seed in (1, 2)]
    command = [*arguments(images, epochs=1), "--data.val_fraction", "0.2", *FROM[name](sources)]
    assert fit.main([*command, "--output", str(tmp_path / "runs")]) == 0
    (made,) = (tmp_path / "runs").iterdir()
    run = made.rename(tmp_path / "elsewhere")
    before = results(run)["test"]
    for source in sources:
        shutil.rmtree(source)
    assert evaluate.main([str(run)]) == 0
    assert json.loads((run / "evaluation.json").read_text())["test"] == before
    (run / "results.json").unlink()
    assert fit.main(["--resume", str(run)]) == 0
    assert results(run)["test"] == before
    shutil.rmtree(run / "carried")
    assert evaluate.main([str(run)]) == 2


def test_what_was_not_copied_keeps_its_name(tmp_path):
    (tmp_path / "names.json").write_text('{"a": "0"}')
    content = {"model": {"init_args": {"method": [{"class_path": "MoLE", "init_args": {"adapters": ["a", "b"]}}]}}}
    found = with_carried(content, tmp_path)["model"]["init_args"]["method"][0]["init_args"]["adapters"]
    assert found == [str(tmp_path / "0"), "b"]
