"""Methods over trained adapters: what they take, what they keep, and what holds of them beside their formulas."""

import json
import shutil

import pytest
import timm
import torch
from conftest import distance, output_of, randomise, same_bytes
from reference.counts import D, L
from reference.hosts import HOSTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import visionpeft as vp
from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.tasks import ImageClassification

HOST = next(host for host in HOSTS if host.name == "vit_cls")
CLIP = next(host for host in HOSTS if host.name == "clip_whole")
OVER = {
    "mole": (vp.MoLE, vp.LoRA(rank=2), vp.LoRA(rank=3, alpha=6)),
    "fusion": (vp.AdapterFusion, vp.Adapter(3, placement="adapter_plus"), vp.Adapter(2, placement="adapter_plus")),
}


def trained(*methods, host=HOST, **options):
    """A host with an adapter of each method, named "a", "b" ..., off its start."""
    torch.manual_seed(0)
    model = host.build(torch.float64)
    for seed, (name, method) in enumerate(zip("abcd", methods, strict=False)):
        vp.attach(model, method, name, head=False, **options)
        randomise(model.peft[name], seed)
    return model.eval()


def output(model, host=HOST):
    return output_of(host, model, dtype=torch.float64)


@pytest.mark.parametrize("name", OVER)
def test_over_one_adapter_it_is_that_adapter(name):
    """Whatever the router or the attention says; over two it is neither."""
    cls, *methods = OVER[name]
    model = trained(*methods)
    alone = {}
    for each in "ab":
        with vp.use(model, each):
            alone[each] = output(model)
    vp.activate(model, "a")
    vp.attach(model, cls(adapters=("a",)), "over", head=False)
    assert model.peft.active == ("over",)  # it stands for its adapters, which would else act twice
    for parameter in model.peft["over"].parameters():
        if parameter.shape != (32, 32):  # the attention's V is the identity but for 1e-6
            torch.nn.init.normal_(parameter)
    assert distance(output(model), alone["a"]) < (1e-13 if name == "mole" else 1e-3)
    vp.detach(model, "over")
    vp.attach(model, cls(adapters=("a", "b")), "over", head=False)
    assert min(distance(output(model), each) for each in alone.values()) > 1e-2


@pytest.mark.parametrize("name", OVER)
def test_frozen_adapters_stay_as_they_are(name):
    """Training moves what is new and no byte of the copies; nothing is drawn in them; the originals may go."""
    cls, *methods = OVER[name]
    model = trained(*methods)
    vp.attach(model, cls(adapters=("a", "b")), "over")
    for each in "ab":
        vp.detach(model, each)
    adapter = model.peft["over"]
    frozen = {key: value.clone() for key, value in adapter.state_dict().items() if ".frozen." in key}
    assert frozen
    assert not any(".frozen." in key for key, _ in adapter.named_parameters())
    model.train()
    inputs = HOST.inputs(8, torch.float64)
    assert torch.equal(model(inputs), model(inputs))  # AdapterPlus has drop path where it is trained
    optimizer = torch.optim.AdamW(vp.trainable_parameters(model), lr=0.1)
    (model(inputs).square().sum() + vp.penalty(model)).backward()
    before = {key: value.detach().clone() for key, value in adapter.named_parameters()}
    optimizer.step()
    assert same_bytes({key: value for key, value in adapter.state_dict().items() if key in frozen}, frozen)
    unmoved = {key for key, value in adapter.named_parameters() if torch.equal(value, before[key])}
    assert not unmoved


@pytest.mark.parametrize("name", OVER)
def test_a_saved_one_needs_no_other_file(name, tmp_path):
    """It holds its adapters and names no folder; another backbone than theirs is refused as for every adapter."""
    cls, *methods = OVER[name]
    model = trained(*methods)
    vp.attach(model, cls(adapters=("a", "b")), "over")
    randomise(model.peft["over"], 5)
    vp.save(model, tmp_path / "over", "over")
    fields = json.loads((tmp_path / "over/adapter.json").read_text())["methods"][0]["fields"]
    assert fields["adapters"] == []
    assert [each["class"] for each in fields["sources"]] == [type(method).__name__ for method in methods]
    fresh = HOST.build(torch.float64).eval()
    vp.load(fresh, tmp_path / "over")
    assert torch.equal(output(fresh), output(model))


# What a downloaded file says of its sources is checked like everything else in it.
EDITED = {
    "a method that is not taken": ([{"class": "SSF", "fields": {}}], "sources are of LoRA"),
    "a field that is not there": ([{"class": "LoRA", "fields": {"path": "/"}}] * 2, "path"),
    "a value that does not fit": ([{"class": "LoRA", "fields": {"rank": -1}}] * 2, "rank must be"),
    "no fields": ([{"class": "LoRA"}], "sources are of LoRA"),
    "another rank": ([{"class": "LoRA", "fields": {"rank": 1}}] * 2, "do not fit"),
    "one too few": ([{"class": "LoRA", "fields": {"rank": 2}}], "do not fit"),
}


@pytest.mark.parametrize("reason", EDITED)
def test_edited_sources_are_refused(reason, tmp_path):
    model = trained(*OVER["mole"][1:])
    vp.attach(model, vp.MoLE(adapters=("a", "b")), "over", head=False)
    vp.save(model, tmp_path, "over")
    path = tmp_path / "adapter.safetensors"
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["visionpeft"])
    description["methods"][0]["fields"]["sources"], said = EDITED[reason]
    save_file(load_file(path), path, metadata={"visionpeft": json.dumps(description)})
    (tmp_path / "adapter.json").unlink()
    fresh = HOST.build(torch.float64)
    with pytest.raises(StorageError, match=said):
        vp.load(fresh, tmp_path)
    assert not hasattr(fresh, "peft")


REFUSED = {
    "none": (vp.MoLE, (), {"adapters": ()}, "MoLE: it needs trained adapters"),
    "unknown": (vp.MoLE, (vp.LoRA(2),), {"adapters": ("z",)}, "MoLE: there is no adapter 'z' .* attached are: a"),
    "no adapter at all": (vp.MoLE, (), {"adapters": ("z",)}, "attached are: none"),
    "named twice": (vp.MoLE, (vp.LoRA(2),), {"adapters": ("a", "a")}, "adapters names one of them twice"),
    "another method": (vp.MoLE, (vp.LoRA(2), vp.SSF()), {}, "it takes adapters of LoRA, but 'b' is SSF"),
    "no bottleneck": (
        vp.AdapterFusion,
        (vp.Adapter(2), vp.LoRA(2)),
        {},
        "adapters of Adapter or AdaptFormer, but 'b' is LoRA",
    ),
    "several methods": (vp.MoLE, ([vp.LoRA(2), vp.SSF()],), {}, "adapter 'a' has several methods"),
    "other targets": (vp.MoLE, (vp.LoRA(2), vp.LoRA(2, targets=("q", "k"))), {}, "not all at k of block 0"),
    "other blocks": (vp.MoLE, (vp.LoRA(2), vp.LoRA(2, blocks="last:2")), {}, "not all at q of block 0"),
    "other placement": (
        vp.AdapterFusion,
        (vp.Adapter(2), vp.AdaptFormer(2)),
        {},
        "AdapterFusion: its adapters act at different places",
    ),
    "after scaling": (vp.AdapterFusion, (vp.Adapter(2, after_scaling=True),), {}, "after_scaling"),
    "patches": (vp.MoLE, (vp.LoRA(2, targets=("patch_embed",)),), {}, "patch_embed is a convolution"),
    "sources given": (vp.MoLE, (vp.LoRA(2),), {"adapters": (), "sources": []}, "sources are found, not given"),
    "negative": (vp.MoLE, (), {"balance": -1}, "balance must not be negative"),
    "cold": (vp.AdapterFusion, (), {"temperature": 0}, "temperature must be positive"),
    "no penalty": (vp.AdapterFusion, (), {"regularisation": -1}, "regularisation must not be negative"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_fit_together_is_refused(reason):
    """In one sentence; the adapters act as before."""
    cls, methods, fields, said = REFUSED[reason]
    model = trained(*methods)
    before = output(model), getattr(getattr(model, "peft", None), "active", None)
    with pytest.raises(ConfigurationError, match=said) as refused:
        vp.attach(model, cls(**{"adapters": tuple("abcd"[: len(methods)])} | fields), "over")
    assert len(str(refused.value).splitlines()) == 1
    assert torch.equal(output(model), before[0])
    assert getattr(getattr(model, "peft", None), "active", None) == before[1]


def test_adapters_that_train_the_backbone_are_refused():
    model = trained(vp.LoRA(2), train=["cls_token"])
    with pytest.raises(ConfigurationError, match="adapter 'a' trains 'cls_token'"):
        vp.attach(model, vp.MoLE(adapters=("a",)), "over")


def test_towers_are_those_of_the_adapters():
    """Both, if they act on both; not some of them."""
    model = trained(vp.LoRA(2, towers=["visual", "text"]), vp.LoRA(2, towers=["text", "visual"]), vp.LoRA(2), host=CLIP)
    with pytest.raises(ConfigurationError, match="different towers"):
        vp.attach(model, vp.MoLE(adapters=("a", "c")), "over")
    with pytest.raises(ConfigurationError, match="towers are those of its adapters"):
        vp.attach(model, vp.MoLE(adapters=("a", "b"), towers="text"), "over")
    vp.attach(model, vp.MoLE(adapters=("a", "b")), "over")
    assert {placement.tower for _, placement in model.peft["over"].placements} == {"visual", "text"}


def test_adalora_and_adamix_count_as_what_they_are_saved_as():
    model = trained(vp.AdaLoRA(2, initial_rank=3, targets=("q", "v")), vp.LoRA(2))
    vp.attach(model, vp.MoLE(adapters=("a", "b")), "over")
    assert [entry["class"] for entry in model.peft["over"].methods[0].sources] == ["LoRA", "LoRA"]
    model = trained(vp.AdaMix(2, bottleneck=3), vp.Adapter(2))
    vp.attach(model, vp.AdapterFusion(adapters=("a", "b")), "over")
    assert [entry["class"] for entry in model.peft["over"].methods[0].sources] == ["Adapter", "Adapter"]


# penalties


def test_balance_of_gates():
    """balance * the mean over layers of -sum_n log mean share, token by token; not of a pass in evaluation mode."""
    model = trained(*OVER["mole"][1:])
    vp.attach(model, vp.MoLE(adapters=("a", "b"), balance=0.3), "over", head=False)
    randomise(model.peft["over"])
    output(model)
    with pytest.raises(ConfigurationError, match="pass in training mode"):
        vp.penalty(model)
    shares = []
    for _, placement in model.peft["over"].placements:
        placement.module.router.register_forward_hook(lambda *call: shares.append(call[-1]))
    model.train()
    HOST.run(model, HOST.inputs(dtype=torch.float64))
    found = vp.penalty(model)
    terms = []
    for each in shares:
        tokens = each.flatten(0, 1)
        means = [sum(token[n] for token in tokens) / len(tokens) for n in range(2)]
        terms.append(-sum(torch.log(mean) for mean in means))
    assert len(terms) == 6
    assert abs(found.item() - 0.3 * (sum(terms) / len(terms)).item()) < 1e-12


def test_fusion_starts_at_the_mean_and_is_held_there():
    """Q = K = 0 and V = I give the mean of the adapters; the penalty is 0 at V = I, and sum |V - I|^2 elsewhere."""
    model = trained(*OVER["fusion"][1:])
    block, read = model.blocks[0], []
    changes = [model.peft[name].adapter.visual["0"].stream_out for name in "ab"]
    vp.attach(model, vp.AdapterFusion(adapters=("a", "b"), regularisation=0.5), "over", head=False)
    places = [placement.module for _, placement in model.peft["over"].placements]
    start = vp.penalty(model).item()
    assert start == pytest.approx(0.5 * 3 * 32 * 31 * 1e-12, rel=1e-6)  # three blocks, all but the diagonal
    with torch.no_grad():
        for place in places:
            place.value.weight.copy_(torch.eye(32))
        assert vp.penalty(model) == 0
        for place in places:
            for layer in (place.query, place.key):
                layer.weight.zero_()
                layer.bias.zero_()
        places[0].register_forward_hook(lambda _, inputs, given: read.append((inputs[0], given)))
        output(model)
        (x, given), *_ = read
        expected = x + sum(change.eval()(x) - x for change in changes) / 2
        assert distance(given, expected) < 1e-13
        places[0].value.weight[2, 3] = 4.0
        assert vp.penalty(model).item() == pytest.approx(0.5 * 16)
    assert block.training is False


@pytest.mark.parametrize("name", OVER)
def test_the_order_of_the_adapters_is_of_no_importance(name):
    """For MoLE with its gates put in the other order."""
    cls, *methods = OVER[name]
    model = trained(*methods)
    outputs = []
    for names in (("a", "b"), ("b", "a")):
        torch.manual_seed(7)
        vp.attach(model, cls(adapters=names), "over", head=False)
        for parameter in model.peft["over"].parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()), std=0.3)
        if name == "mole" and names == ("b", "a"):
            for parameter in model.peft["over"].parameters():
                parameter.data = parameter.data.unflatten(1, (2, -1)).flip(0, 1).flatten(1)
        outputs.append(output(model))
        vp.detach(model, "over")
    assert distance(*outputs) < 1e-12


# counts and the command line


def test_counts_on_vit_b16():
    """By the closed forms, and the frozen values are not among them."""
    model = timm.create_model("vit_base_patch16_224", num_classes=10)
    for name, method in {"a": vp.LoRA(8), "b": vp.LoRA(4), "c": vp.Adapter(8), "d": vp.Adapter(4)}.items():
        vp.attach(model, method, name, head=False)
    vp.disable(model)
    for method, count in (
        (vp.MoLE(adapters=("a", "b")), 73_728),
        (vp.AdapterFusion(adapters=("c", "d")), 21_252_096),
    ):
        assert count in (L * 2 * 2 * 2 * D, L * (3 * D * D + 2 * D))
        vp.attach(model, method, "over", head=False)
        assert vp.summary(model).adapter == sum(p.numel() for p in vp.trainable_parameters(model)) == count
        vp.detach(model, "over")


def test_a_task_is_over_folders(tmp_path):
    """As `--model.method.adapters` names them; what it saves needs them no more; a foreign folder changes nothing."""
    fields = {"backbone": "test_vit", "pretrained": False, "backbone_kwargs": {"img_size": 32}}
    names = [f"class {index}" for index in range(3)]
    folders = []
    for number in range(2):
        task = ImageClassification(vp.LoRA(rank=2 + number), names, **fields)
        randomise(task.adapter, number)
        folders.append(str(tmp_path / f"run.{number}"))
        vp.save(task.model, folders[-1])
    over = ImageClassification(vp.MoLE(adapters=tuple(folders)), names, **fields)
    assert list(over.model.peft) == ["default"]
    assert over.model.peft.active == ("default",)
    assert over.describe()["method"][0]["fields"]["adapters"] == tuple(folders)
    expected = load_file(f"{folders[1]}/adapter.safetensors")
    frozen = over.adapter.state_dict()["mole.visual.3.v.frozen.1.B"]
    assert torch.equal(frozen, expected["lora.visual.3.v.B"])
    vp.save(over.model, tmp_path / "over")
    for folder in folders:
        shutil.rmtree(folder)
    over.load(tmp_path / "over")
    assert torch.equal(over.adapter.state_dict()["mole.visual.3.v.frozen.1.B"], frozen)
    with pytest.raises(StorageError, match="holds no adapter"):
        ImageClassification(vp.MoLE(adapters=tuple(folders)), names, **fields)
