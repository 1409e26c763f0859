"""Learners on disk: small, exact, bound to their CLIP, never half-loaded."""

import json
import warnings

import open_clip
import pytest
import torch
from conftest import randomise
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file, save_file

import visionpeft as vp
from visionpeft.clip import learners
from visionpeft.clip.description import read_learner
from visionpeft.clip.learners import CoOp, MaPLe, ZeroShot
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.errors import ConfigurationError, StorageError, UnsupportedError
from visionpeft.models.create_clip import create_clip

NAMES = ["red kite", "buzzard", "heron"]
TOKENIZER = open_clip.tokenizer.SimpleTokenizer()


def small_clip(seed=0, width=32):
    """A random CLIP of two blocks a tower."""
    torch.manual_seed(seed)
    vision = CLIPVisionCfg(image_size=16, patch_size=8, width=32, layers=2, head_width=16)
    text = CLIPTextCfg(context_length=77, vocab_size=49408, width=width, heads=2, layers=2)
    return CLIP(24, vision, text).eval()


def trained(clip, **options):
    """A CoOp learner away from its initial context."""
    learner = CoOp(clip, TOKENIZER, NAMES, **options).eval()
    with torch.no_grad():
        learner.vectors += torch.randn(learner.vectors.shape, generator=torch.Generator().manual_seed(5))
    return learner


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [{}, {"context_length": 3, "position": "middle"}, {"init": "a photo of a"}, {"class_specific": True}],
    ids=str,
)
def test_a_loaded_learner_computes_the_same_bits(tmp_path, images, options):
    learner = trained(small_clip(), **options)
    save_learner(learner, tmp_path / "learner", metadata={"shots": 16})
    loaded = load_learner(tmp_path / "learner", small_clip(), TOKENIZER)
    assert torch.equal(learner(images), loaded(images))
    assert read_learner(tmp_path / "learner")["metadata"] == {"shots": 16}


def test_a_saved_context_takes_a_few_kilobytes(tmp_path):
    save_learner(trained(small_clip(), context_length=4), tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 6000
    (tensor,) = load_file(tmp_path / "learner.safetensors").values()
    assert tensor.shape == (4, 32)


def test_new_class_names_on_loading(tmp_path, images):
    learner = trained(small_clip())
    save_learner(learner, tmp_path)
    new = ["wren", "robin", "great spotted woodpecker", "owl"]
    loaded = load_learner(tmp_path, small_clip(), TOKENIZER, class_names=new)
    learner.set_class_names(new)
    assert loaded.class_names == new
    assert torch.equal(learner(images), loaded(images))


def test_a_context_for_each_class_takes_no_other_classes(tmp_path):
    save_learner(trained(small_clip(), class_specific=True), tmp_path)
    with pytest.raises(ConfigurationError, match="each of its 3 classes"):
        load_learner(tmp_path, small_clip(), TOKENIZER, class_names=["wren", "robin"])


@pytest.mark.parametrize("other", [small_clip(seed=1), small_clip(width=64)], ids=["weights", "width"])
def test_a_prompt_of_another_clip_is_refused(tmp_path, other):
    save_learner(trained(small_clip()), tmp_path)
    with pytest.raises(StorageError, match="trained on other weights"):
        load_learner(tmp_path, other, TOKENIZER)


def test_what_is_no_clip_is_refused(tmp_path):
    save_learner(trained(small_clip()), tmp_path)
    with pytest.raises(UnsupportedError, match="needs an OpenCLIP model"):
        load_learner(tmp_path, torch.nn.Linear(2, 2), TOKENIZER)


def edit(folder, change):
    """Change the description in the header of the tensors and in its copy."""
    description = json.loads((folder / "learner.json").read_text())
    change(description)
    tensors = load_file(folder / "learner.safetensors")
    save_file(tensors, folder / "learner.safetensors", metadata={"visionpeft": json.dumps(description)})
    (folder / "learner.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d["learner"].update({"class": "Popen"}), "does not have"),
        (lambda d: d["learner"].update({"class": "Learner"}), "does not have"),
        (lambda d: d["learner"]["options"].update(depth=3), "do not fit this version"),
        (lambda d: d["learner"]["options"].update(context_length=5), "do not fit its description"),
        (lambda d: d.update(format=99), "has format 99"),
        (lambda d: d.pop("class_names"), "lacks one of"),
        (lambda d: d.update(class_names=[1, 2]), "not what save_learner writes"),
    ],
)
def test_an_edited_description_is_refused(tmp_path, change, sentence):
    save_learner(trained(small_clip()), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(StorageError, match=sentence):
        load_learner(tmp_path, small_clip(), TOKENIZER)


def test_damaged_tensors_are_refused(tmp_path):
    """One bit of what was learnt is another."""
    save_learner(trained(small_clip()), tmp_path)
    path = tmp_path / "learner.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(StorageError, match="is damaged: its tensors"):
        load_learner(tmp_path, small_clip(), TOKENIZER)


def test_damaged_files_are_refused(tmp_path):
    save_learner(trained(small_clip()), tmp_path)
    path = tmp_path / "learner.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StorageError, match="damaged"):
        load_learner(tmp_path, small_clip(), TOKENIZER)
    with pytest.raises(StorageError, match=r"holds no learner\.safetensors"):
        load_learner(tmp_path / "nowhere", small_clip(), TOKENIZER)


def test_an_interrupted_save_is_noticed(tmp_path):
    save_learner(trained(small_clip()), tmp_path)
    copy = json.loads((tmp_path / "learner.json").read_text())
    (tmp_path / "learner.json").write_text(json.dumps(copy | {"class_names": ["a", "b", "c"]}))
    with pytest.raises(StorageError, match="edited, or a save was interrupted"):
        load_learner(tmp_path, small_clip(), TOKENIZER)


def test_zero_shot_is_saved_with_its_template(tmp_path, images):
    learner = ZeroShot(small_clip(), TOKENIZER, NAMES, template=["art of a {}.", "{}"])
    save_learner(learner, tmp_path)
    loaded = load_learner(tmp_path, small_clip(), TOKENIZER)
    assert loaded.templates == ("art of a {}.", "{}")
    with torch.no_grad():
        assert torch.equal(learner(images), loaded(images))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("ViT-B-16", {}, "open_clip/<model>/<tag>"),
        ("open_clip/ViT-B-16/openai", {}, "use open_clip/ViT-B-16-quickgelu/openai"),
        ("open_clip/ViT-B-61/openai", {}, "did you mean"),
        ("open_clip/ViT-B-16/nothing", {}, "has no weights 'nothing'"),
        ("open_clip/ViT-B-16", {}, "name the weights"),
        ("nano_clip", {"pretrained": False}, "nano_clip takes no further arguments"),
    ],
)
def test_wrong_names_of_clip_models(name, options, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        create_clip(name, **options)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(StorageError, match="no checkpoint file"):
        create_clip("open_clip/ViT-B-32", checkpoint=tmp_path / "none.pt")


def test_learners_that_attach_to_the_towers(tmp_path, images):
    learner = MaPLe(small_clip(), TOKENIZER, NAMES, depth=2).eval()
    randomise(learner.clip.peft["maple"])
    save_learner(learner, tmp_path)
    clip = small_clip()
    loaded = load_learner(tmp_path, clip, TOKENIZER, class_names=["owl", "wren"])
    learner.set_class_names(["owl", "wren"])
    with torch.no_grad():
        assert torch.equal(learner(images), loaded(images))


def test_a_refused_load_leaves_the_clip_as_it_was(tmp_path):
    save_learner(MaPLe(small_clip(), TOKENIZER, NAMES, depth=2), tmp_path)
    clip = small_clip()
    with pytest.raises(ConfigurationError, match="no class names"):
        load_learner(tmp_path, clip, TOKENIZER, class_names=[])
    assert not hasattr(clip, "peft")
    edit(tmp_path, lambda d: d["learner"]["options"].update(depth=1))
    with pytest.raises(StorageError, match="do not fit its description"):
        load_learner(tmp_path, clip, TOKENIZER)
    assert not hasattr(clip, "peft")


def test_refused_class_names_leave_the_clip_as_it_was():
    clip = small_clip()
    for names in ([], ["owl", "owl"], "owl"):
        with pytest.raises(ConfigurationError):
            CoOp(clip, TOKENIZER, names)
    assert all(parameter.requires_grad for parameter in clip.parameters())


def test_two_learners_on_one_clip_do_not_disturb_each_other(images):
    clip = small_clip()
    coop = CoOp(clip, TOKENIZER, NAMES)
    maple = MaPLe(clip, TOKENIZER, NAMES, depth=2)
    with pytest.raises(ConfigurationError, match="now act the adapters maple, and it was built with no adapters"):
        coop(images)
    before = maple(images)
    with vp.use(clip, None):
        assert coop(images).shape == (2, 3)
        with pytest.raises(ConfigurationError, match="now act no adapters"):
            maple(images)
    assert torch.equal(maple(images), before)


def test_a_learner_on_an_adapted_clip(tmp_path, images):
    def adapted(seed=3):
        clip = small_clip()
        torch.manual_seed(seed)
        vp.attach(clip, vp.LoRA(rank=2, towers=["visual", "text"]), name="drawings")
        randomise(clip.peft["drawings"])
        return clip

    learner = trained(adapted())
    save_learner(learner, tmp_path)
    with torch.no_grad():
        assert torch.equal(learner(images), load_learner(tmp_path, adapted(), TOKENIZER)(images))
        assert not torch.equal(learner(images), trained(small_clip())(images))
    with pytest.raises(StorageError, match="with drawings adapters acting, and this one has none"):
        load_learner(tmp_path, small_clip(), TOKENIZER)


@pytest.mark.parametrize("name", ["TPT", "CTPT", "DiffTPT", "PromptAlign"])
def test_what_starts_from_a_saved_learner_needs_the_adapters_it_was_trained_with(tmp_path, name):
    def clip_with(adapter):
        clip = small_clip()
        if adapter:
            torch.manual_seed(3)
            vp.attach(clip, vp.LoRA(rank=2, towers=["visual", "text"]), name=adapter)
            randomise(clip.peft[adapter])
        return clip

    def start(clip):
        given = {"maple": str(tmp_path), "weight": 0.0} if name == "PromptAlign" else {"context": str(tmp_path)}
        return getattr(learners, name)(clip, TOKENIZER, NAMES, **given)

    source = CoOp if name != "PromptAlign" else MaPLe
    options = {"init": "a photo of a"} if source is CoOp else {"depth": 2}
    for trained_with, offered in (("drawings", None), (None, "drawings"), ("drawings", "photos")):
        learner = source(clip_with(trained_with), TOKENIZER, NAMES, **options)
        save_learner(learner, tmp_path)
        clip = clip_with(offered)
        with pytest.raises(StorageError, match=f"with {trained_with or 'no'} adapters acting, and this one has"):
            start(clip)
        learned = learner.trained_state()
        own = start(clip_with(trained_with)).trained_state()
        assert own.keys() == learned.keys()
        assert all(torch.equal(value, learned[key]) for key, value in own.items())


def test_words_the_clip_never_saw_are_named():
    clip, tokenizer = create_clip("nano_clip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner = CoOp(clip, tokenizer, ["bird", "fruit"])
    with pytest.warns(UserWarning, match="never trained on words of 'antidisestablishmentarianism'"):
        learner.set_class_names(["bird", "antidisestablishmentarianism"])
