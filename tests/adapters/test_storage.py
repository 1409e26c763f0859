"""What is written is complete and atomic, and what is damaged, edited or foreign is refused in one sentence."""

import errno
import hashlib
import json
import os

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import visionpeft as vp
from visionpeft.backbones.preprocessing import Preprocessing


def build(seed=0, **options):
    torch.manual_seed(seed)
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 3} | options
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, and the model it came from."""
    model = vp.attach(build(), [vp.LoRA(rank=2), vp.VPT(num_tokens=2)], train=("cls_token",))
    with torch.no_grad():
        for parameter in vp.trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    preprocessing = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3)
    names = ["cat", "dog", "owl"]
    vp.save(model, tmp_path / "adapter", class_names=names, preprocessing=preprocessing, metadata={"note": "x"})
    return tmp_path / "adapter", model


def test_description(saved):
    folder, _ = saved
    described = vp.read_metadata(folder)
    assert json.loads((folder / "adapter.json").read_text()) == described | {"sha256": sha256_of(folder)}
    assert [m["class"] for m in described["methods"]] == ["LoRA", "VPT"]
    assert described["methods"][0]["fields"]["rank"] == 2
    assert described["class_names"] == ["cat", "dog", "owl"]
    assert described["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert described["backbone"]["architecture"].startswith("vit_tiny_patch16_224")
    assert described["metadata"] == {"note": "x"}
    assert set(described["versions"]) == {"visionpeft", "torch", "timm", "open_clip_torch"}


def test_equal_adapters_are_equal_files(saved, tmp_path):
    """Of which safetensors 0.8.0 takes no care itself: several words of metadata stand in another order each time."""
    folder, model = saved
    about = {
        "class_names": ["cat", "dog", "owl"],
        "preprocessing": Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3),
        "metadata": {"note": "x"},
    }
    for turn in range(8):
        vp.save(model, tmp_path / str(turn), **about)
        for name in ("adapter.safetensors", "adapter.json"):
            assert (tmp_path / str(turn) / name).read_bytes() == (folder / name).read_bytes()


def test_counts_that_a_profiler_leaves_are_not_saved(saved, tmp_path):
    """thop counts in buffers, and takes them away again only from modules that it knows: the file could not be read."""
    folder, model = saved
    before = model.state_dict()
    for module in model.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))
    assert len(model.state_dict()) > len(before)  # as if `profile(model, inputs=(IMAGES,))` had been called
    vp.save(model, tmp_path / "profiled")
    assert (
        load_file(tmp_path / "profiled/adapter.safetensors").keys() == load_file(folder / "adapter.safetensors").keys()
    )
    other = build()
    vp.load(other, tmp_path / "profiled")
    assert torch.equal(other(IMAGES), model(IMAGES))
    vp.load(model, folder, "clean")  # a profiled backbone is the same one


@pytest.mark.parametrize("num_classes", [3, 0, 1000])
@torch.no_grad()
def test_load_brings_the_head(saved, num_classes):
    folder, model = saved
    other = build(num_classes=3)
    other.reset_classifier(num_classes)
    vp.load(other, folder, name="mine")
    assert torch.equal(other(IMAGES), model(IMAGES))
    vp.detach(other)
    assert other(IMAGES).shape[-1] == (num_classes or 32)


def test_size_is_that_of_the_tensors(saved):
    folder, model = saved
    values = sum(p.numel() for p in model.peft["default"].parameters())
    assert (folder / "adapter.safetensors").stat().st_size < 4 * values + 8192


def refuse(folder, sentence, model=None):
    model = model or build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(vp.StorageError, match=sentence):
        vp.load(model, folder)
    assert not hasattr(model, "peft")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def rewrite(folder, change):
    """Write the adapter again with a changed description."""
    file = folder / "adapter.safetensors"
    described, tensors = vp.read_metadata(folder), load_file(file)
    change(described, tensors)
    save_file(tensors, file, metadata={"visionpeft": json.dumps(described)})
    (folder / "adapter.json").write_text(json.dumps(described))


def sha256_of(folder):
    """The hash of the tensors that the format asks for, from the bytes of the file."""
    whole = (folder / "adapter.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    digest = hashlib.sha256()
    kinds = {"F32": "torch.float32"}
    for name, entry in sorted(json.loads(whole[8:start]).items()):
        if name != "__metadata__":
            first, stop = entry["data_offsets"]
            digest.update(f"{name} {kinds[entry['dtype']]} {tuple(entry['shape'])}\n".encode())
            digest.update(whole[start + first : start + stop])
    return digest.hexdigest()


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("with_copy", [True, False])
def test_damaged_tensors(saved, place, with_copy):
    """One bit of one tensor is another."""
    folder, _ = saved
    file = folder / "adapter.safetensors"
    whole = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    whole[start + int(place * (len(whole) - 1 - start))] ^= 1
    file.write_bytes(whole)
    if not with_copy:
        (folder / "adapter.json").unlink()
    refuse(folder, "adapter.safetensors is damaged: its tensors")
    with pytest.raises(vp.StorageError, match="is damaged"):
        vp.read_metadata(folder)


@torch.no_grad()
def test_without_a_hash(saved):
    """What was written without one, by another tool say, is read as it stands."""
    folder, model = saved
    rewrite(folder, lambda described, tensors: None)
    assert "sha256" not in (folder / "adapter.json").read_text()
    other = build()
    vp.load(other, folder)
    assert torch.equal(other(IMAGES), model(IMAGES))


@torch.no_grad()
def test_a_save_interrupted_between_the_files(saved):
    """The tensors are new, the copy of the description is that of the old ones: what is there is whole."""
    folder, model = saved
    old = (folder / "adapter.json").read_text()
    described = vp.read_metadata(folder)
    about = {"class_names": described["class_names"], "metadata": described["metadata"]}
    model.peft["default"].get_parameter("lora.visual.0.q.B").add_(1)
    vp.save(model, folder, preprocessing=Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3), **about)
    assert (folder / "adapter.json").read_text() != old
    (folder / "adapter.json").write_text(old)
    other = build()
    vp.load(other, folder)
    assert torch.equal(other(IMAGES), model(IMAGES))


def test_truncated(saved):
    folder, _ = saved
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse(folder, "is damaged")


def test_not_ours(saved):
    folder, _ = saved
    save_file({"x": torch.zeros(1)}, folder / "adapter.safetensors")
    refuse(folder, "not written by visionpeft")


def test_empty_folder(tmp_path):
    refuse(tmp_path, "holds no adapter.safetensors")


def test_edited_json(saved):
    folder, _ = saved
    described = json.loads((folder / "adapter.json").read_text())
    described["methods"][0]["fields"]["rank"] = 3
    (folder / "adapter.json").write_text(json.dumps(described))
    refuse(folder, "does not describe")
    (folder / "adapter.json").unlink()
    vp.load(build(), folder)


def change_shape(described, tensors):
    tensors["lora.visual.0.q.A"] = torch.zeros(3, 32)


def drop_tensor(described, tensors):
    del tensors["lora.visual.1.v.B"]


def add_tensor(described, tensors):
    tensors["lora.visual.9.q.A"] = torch.zeros(2, 32)


def own_method(described, tensors):
    described["methods"][0]["class"] = "MyOwnIdea"  # a list of all ours would say nothing


def unknown_method(described, tensors):
    described["methods"][0]["class"] = "LoRAA"


def unknown_field(described, tensors):
    described["methods"][0]["fields"]["speed"] = 3


def wrong_type(described, tensors):
    described["methods"][0]["fields"]["rank"] = "os.system"


def other_format(described, tensors):
    described["format"] = 99


def endless_rank(described, tensors):
    described["methods"][0]["fields"]["rank"] = 10**15


def endless_head(described, tensors):
    described["heads"]["head"]["arguments"]["in_features"] = 10**15


def worded_head(described, tensors):
    described["heads"]["head"]["arguments"]["bias"] = "no"


def numbered_classes(described, tensors):
    described["class_names"] = [1, 2, 3]


def odd_preprocessing(described, tensors):
    described["preprocessing"]["mean"] = "grey"


def short_preprocessing(described, tensors):
    del described["preprocessing"]["mean"]


def unnamed_preprocessing(described, tensors):
    described["preprocessing"] = list(described["preprocessing"].values())


def drop_two(described, tensors):
    del tensors["lora.visual.1.v.A"], tensors["lora.visual.1.v.B"]


def nameless_head(described, tensors):
    described["heads"][""] = {"class": "Identity", "arguments": {}}


def foreign_head(described, tensors):
    described["heads"]["head"] = {"class": "Upsample", "arguments": {}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (change_shape, r"lora.visual.0.q.A is \(3, 32\) instead of \(2, 32\)"),
        (drop_tensor, "lora.visual.1.v.B is missing$"),
        (drop_two, r"lora.visual.1.v.A is missing \(and 1 more\)$"),
        (add_tensor, "lora.visual.9.q.A is not expected$"),
        (unknown_method, "near names are LoRA"),
        (own_method, "'MyOwnIdea' this version does not have; a method of your own must be imported first$"),
        (unknown_field, "do not fit this version"),
        (wrong_type, "do not fit this version"),
        (other_format, "format 99"),
        (foreign_head, "head"),
        (endless_rank, "cannot be made"),
        (endless_head, "can build"),
        (worded_head, "can build"),
        (nameless_head, "cannot be made"),
        (numbered_classes, "not what save writes"),
        (odd_preprocessing, "not what save writes"),
        (short_preprocessing, "not what save writes"),
        (unnamed_preprocessing, "not what save writes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_tampered(saved, change, sentence):
    folder, _ = saved
    rewrite(folder, change)
    refuse(folder, sentence)


def test_other_weights(saved):
    folder, _ = saved
    refuse(folder, "other weights", build(seed=1))
    vp.load(build(seed=1), folder, check_fingerprint=False)


def test_other_shape_of_the_same_architecture(saved):
    folder, _ = saved
    with pytest.raises(vp.StorageError, match="do not fit"):
        vp.load(build(depth=3), folder, check_fingerprint=False)


def test_other_architecture(saved):
    folder, _ = saved
    other = timm.create_model("deit3_small_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=32)
    refuse(folder, "belongs to vit_tiny_patch16_224", other)


def test_bfloat16_backbone_is_the_same_backbone(saved):
    folder, _ = saved
    vp.load(build().bfloat16(), folder)


UNREADABLE = {
    "names that are numbers": ({"class_names": [1, 2, 3]}, r"a list with a text for each class, not \[1, 2, 3\]"),
    "one text": ({"class_names": "abc"}, "a list with a text for each class, not 'abc'"),
    "too few names": ({"class_names": ["a", "b"]}, "has 2 names, and the head of the adapter 3 outputs"),
    "timm's own dict": ({"preprocessing": {"mean": (0.5, 0.5, 0.5)}}, "needs a Preprocessing, as preprocessing_of"),
    "one channel": ({"preprocessing": Preprocessing((32, 32), (0.5,), (0.5,))}, "three each for mean and std"),
    "a tensor": ({"metadata": {"accuracy": torch.tensor(0.5)}}, r"as JSON \(Object of type Tensor .*tensor\.item\(\)"),
    "a list": ({"metadata": ["note"]}, "metadata needs names with values"),
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_what_could_not_be_read_again_is_not_written(reason, saved, tmp_path):
    """Names that are numbers were written, and the folder was then refused by `load`, as not what `save` writes."""
    _, model = saved
    options, sentence = UNREADABLE[reason]
    with pytest.raises(vp.ConfigurationError, match=sentence):
        vp.save(model, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_names_may_be_any_sequence_of_texts(saved, tmp_path):
    _, model = saved
    for number, names in enumerate((("a", "b", "c"), dict.fromkeys("abc").keys(), np.array(["a", "b", "c"]))):
        vp.save(model, tmp_path / str(number), class_names=names)
        vp.load(build(), tmp_path / str(number))
        assert vp.read_metadata(tmp_path / str(number))["class_names"] == ["a", "b", "c"]


def test_a_folder_that_cannot_be_made(saved, tmp_path):
    _, model = saved
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(vp.StorageError, match="cannot be made"):
            vp.save(model, folder)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("check", [True, False])
def test_a_model_without_values_is_refused(saved, check):
    """Built within `torch.device("meta")`: nothing could be compared, and nothing would be loaded."""
    folder, _ = saved
    with torch.device("meta"):
        model = build()
    with pytest.raises(vp.StorageError, match=r"tensors without values \(device 'meta'\).*load its weights first"):
        vp.load(model, folder, check_fingerprint=check)
    vp.attach(model, vp.LoRA(rank=2))
    with pytest.raises(vp.UnsupportedError, match="has no values"):
        vp.save(model, folder)


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_full_disk_keeps_the_old_adapter(saved, monkeypatch, failing):
    folder, model = saved
    old = {file.name: file.read_bytes() for file in folder.iterdir()}
    with torch.no_grad():
        for parameter in vp.trainable_parameters(model):
            parameter.add_(1.0)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync" if failing == "write" else "replace", full)
    with pytest.raises(vp.StorageError, match="No space left on device"):
        vp.save(model, folder)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == old
    vp.load(build(), folder)


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.json"])
def test_files_of_others_are_not_replaced(name, tmp_path):
    """A tensor file without our description, and a JSON file that is none of ours; what save wrote is replaced."""
    model = vp.attach(vp.create_backbone("nano_vit", num_classes=3), vp.LoRA(rank=2))
    if name.endswith(".json"):
        (tmp_path / name).write_text('{"adapter": "of a laptop"}')
    else:
        save_file({"weight": torch.ones(2)}, tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(vp.StorageError, match="was not written by visionpeft"):
        vp.save(model, tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, before)]
    for _ in range(2):
        vp.save(model, tmp_path / "new")
    (tmp_path / "new" / "adapter.safetensors").unlink()  # its description alone is still ours
    vp.save(model, tmp_path / "new")
