"""Adapters that start from saved ones, and the similarity of prompts by which one is chosen."""

import pytest
import torch
from conftest import distance, output_of, randomise, same_bytes
from reference.hosts import HOSTS, lively

import visionpeft as vp
from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.tasks import ImageClassification

HOST = next(host for host in HOSTS if host.name == "vit_cls")


@pytest.fixture
def saved(tmp_path):
    """Saves an adapter of a method, off its start, and gives its folder and its output."""

    def save(method, name="source", seed=3, **options):
        model = vp.attach(HOST.build(), method, **{"head": False} | options).eval()
        randomise(model.peft["default"], seed)
        vp.save(model, tmp_path / name)
        return tmp_path / name, output_of(HOST, model), model

    return save


@pytest.mark.parametrize(
    ("source", "target", "options"),
    [
        (vp.LoRA(2, dropout=0.3), vp.LoRA(2), {}),  # what is drawn in training may differ
        ([vp.VPT(num_tokens=2), vp.BitFit()], [vp.VPT(num_tokens=2), vp.BitFit()], {"train": ["cls_token"]}),
    ],
    ids=["lora", "stacked"],
)
def test_it_starts_with_the_very_output(source, target, options, saved):
    """Bit by bit, in the same parameters, which an optimiser may hold already."""
    folder, expected, _ = saved(source, **options)
    model = vp.attach(HOST.build(), target, head=False, **options).eval()
    held = vp.trainable_parameters(model)
    assert not torch.equal(output_of(HOST, model), expected)
    vp.start_from(model, folder)
    assert torch.equal(output_of(HOST, model), expected)
    assert list(map(id, vp.trainable_parameters(model))) == list(map(id, held))
    assert list(model.peft) == ["default"]
    assert all(parameter.requires_grad for parameter in held)


def test_the_head_stays(saved):
    """The classes of the source may be others; here even their number."""
    model = HOST.build()
    model.reset_classifier(9)
    vp.attach(model, vp.LoRA(2))
    randomise(model.peft["default"])
    folder = saved(vp.LoRA(2))[0].parent / "nine"
    vp.save(model, folder)
    target = vp.attach(HOST.build(), vp.LoRA(2))
    head = {key: value.clone() for key, value in target.peft["default"].head.state_dict().items()}
    vp.start_from(target, folder)
    own, source = target.peft["default"].state_dict(), model.peft["default"].state_dict()
    assert same_bytes(dict(target.peft["default"].head.state_dict()), head)
    body = [key for key in own if not key.startswith("head.")]
    assert body
    assert all(torch.equal(own[key], source[key]) for key in body)


REFUSED = {
    "another method": (vp.SSF(), vp.LoRA(2), {}, "is SSF, from which no LoRA can start"),
    "another rank": (vp.LoRA(3), vp.LoRA(2), {}, "has rank 3 and the one that is to start 2"),
    "another scale": (vp.LoRA(2, alpha=4), vp.LoRA(2), {}, "has alpha 4 and the one that is to start None"),
    "other blocks": (vp.LoRA(2, blocks="last:1"), vp.LoRA(2), {}, "has blocks 'last:1'"),
    "more trained": (vp.LoRA(2), vp.LoRA(2), {"train": ["cls_token"]}, "trains other parameters"),
    "what it is saved as": (vp.AdaLoRA(2), vp.AdaLoRA(2), {}, "is LoRA, from which no AdaLoRA can start"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_another_adapter_is_refused(reason, saved):
    source, target, options, said = REFUSED[reason]
    folder, _, _ = saved(source)
    model = vp.attach(HOST.build(), target, head=False, **options).eval()
    vp.attach(model, vp.LinearProbe(), "other")
    before, state = (model.peft.active, list(model.peft)), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=said):
        vp.start_from(model, folder, "default")
    assert (model.peft.active, list(model.peft)) == before
    assert same_bytes(dict(model.state_dict()), state)
    with pytest.raises(ConfigurationError, match="say which one is meant"):
        vp.start_from(model, folder)


def test_another_backbone_is_refused(saved):
    folder, _, _ = saved(vp.LoRA(2))
    torch.manual_seed(77)
    model = vp.attach(lively(HOST.build()), vp.LoRA(2))
    with pytest.raises(StorageError, match="trained on other weights"):
        vp.start_from(model, folder)
    assert list(model.peft) == ["default"]


def test_the_nearest_prompts_by_formula(saved):
    """Cosines of the means over tokens, of all blocks together, also of another number of prompts and projected."""
    models = {}
    for seed, (name, method) in enumerate(
        {"two": vp.VPT(num_tokens=2), "five": vp.VPT(num_tokens=5), "narrow": vp.VPT(2, projection=6)}.items()
    ):
        folder, _, models[str(folder)] = saved(method, name, seed)
    target = vp.attach(HOST.build(), vp.VPT(num_tokens=3)).eval()
    randomise(target.peft["default"], 9)

    def mean(model):
        part, vectors = model.peft["default"].vpt.visual, []
        for index in range(3):
            prompts = part[str(index)].stream_in.prompts.detach().double()
            if "projection" in part:
                prompts = prompts @ part.projection.weight.detach().double().T + part.projection.bias.detach().double()
            vectors.append(sum(prompts) / len(prompts))
        return torch.cat(vectors)

    active = output_of(HOST, target)
    found = vp.prompt_similarity(target, list(models))
    own = mean(target)
    for folder, model in models.items():
        other = mean(model)
        assert found[folder] == pytest.approx(((own @ other) / (own.norm() * other.norm())).item(), abs=1e-6)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert len(set(found.values())) == 3
    assert torch.equal(output_of(HOST, target), active)
    (folder, _, _) = saved(vp.LoRA(2), "lora")
    with pytest.raises(ConfigurationError, match="has no prompts"):
        vp.prompt_similarity(target, [folder])
    (folder, _, _) = saved(vp.VPT(2, blocks="last:2"), "last")
    with pytest.raises(ConfigurationError, match="in other blocks"):
        vp.prompt_similarity(target, [folder])
    assert list(target.peft) == ["default"]


def test_a_task_starts_there(tmp_path):
    """As `--model.start` says; another seed would start elsewhere."""
    fields = {"backbone": "test_vit", "pretrained": False, "backbone_kwargs": {"img_size": 32}}
    names = [f"class {index}" for index in range(3)]
    source = ImageClassification(vp.LoRA(rank=2), names, **fields)
    randomise(source.adapter)
    vp.save(source.model, tmp_path)
    started, new = (
        ImageClassification(vp.LoRA(rank=2), names, start=start, **fields) for start in (str(tmp_path), None)
    )
    path = "lora.visual.0.q.B"
    assert torch.equal(started.adapter.get_parameter(path), source.adapter.get_parameter(path))
    assert torch.equal(started.adapter.head.weight, new.adapter.head.weight)
    assert distance(started.adapter.head.weight, source.adapter.head.weight) > 0.1
