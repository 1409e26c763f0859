"""Sharing on the Hugging Face Hub: what is uploaded, the card, and loading from the Hub's own cache."""

import json
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import safetensors.torch
import torch
from huggingface_hub import HfApi, ModelCard
from small_runs import draw_images, run
from timm.data import resolve_model_data_config

import visionpeft as vp
from visionpeft import push
from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.sharing import hub as sharing
from visionpeft.sharing import trained_model
from visionpeft.sharing.described_backbone import _allowed, described_arguments
from visionpeft.sharing.run_directory import RunDirectory

REPO = "somebody/small-birds"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Collects what would be uploaded, by file name."""
    uploads = SimpleNamespace(files={}, repo=None)

    def create_repo(self, repo_id, *, private, exist_ok):
        uploads.repo = repo_id

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
        uploads.files |= {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return uploads


def adapted(**method):
    torch.manual_seed(0)
    model = vp.create_backbone("nano_vit", num_classes=3)
    vp.attach(model, vp.LoRA(rank=2, **method))
    for parameter in vp.trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def images_for(model):
    return torch.randn(2, *resolve_model_data_config(model)["input_size"])


def as_cached(files: dict[str, bytes], cache) -> None:
    """Lay files out as the Hub's cache does after a download of the main branch."""
    commit = "0" * 40
    folder = cache / f"models--{REPO.replace('/', '--')}"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    for name, content in files.items():
        (folder / "snapshots" / commit / name).write_bytes(content)


def test_a_pushed_model_comes_back_from_the_cache(hub, tmp_path):
    model = adapted()
    address = vp.push_to_hub(model, REPO, class_names=["wren", "robin", "owl"])
    assert hub.repo == REPO
    assert REPO in address
    assert set(hub.files) == {"adapter.safetensors", "adapter.json", "README.md"}
    as_cached(hub.files, tmp_path)
    trained = vp.from_pretrained(REPO, cache_dir=tmp_path, local_files_only=True)
    images = images_for(model)
    torch.testing.assert_close(trained.model(images), model(images), rtol=0, atol=0)
    assert trained.class_names == ["wren", "robin", "owl"]
    assert not trained.model.training


def test_the_description_that_is_uploaded_is_that_of_the_tensors(hub, tmp_path):
    """Also where its copy in the folder was deleted, as a sentence of ours advises after an interrupted save."""
    vp.save(adapted(), tmp_path)
    written = (tmp_path / "adapter.json").read_bytes()
    (tmp_path / "adapter.json").unlink()
    vp.push_to_hub(tmp_path, REPO)
    assert hub.files["adapter.json"] == written


@pytest.mark.parametrize("content", [b"no tensors", safetensors.torch.save({"a": torch.zeros(2)})])
def test_what_save_did_not_write_is_not_uploaded(content, hub, tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(content)
    with pytest.raises(StorageError, match=r"damaged|not written by visionpeft"):
        vp.push_to_hub(tmp_path, REPO)
    assert not hub.files


def test_a_folder_and_a_model_that_is_already_there(tmp_path):
    model = adapted()
    vp.save_pretrained(model, tmp_path / "birds")
    assert "birds" in (tmp_path / "birds" / "README.md").read_text()
    other = vp.create_backbone("nano_vit", num_classes=3)
    trained = vp.from_pretrained(tmp_path / "birds", other)
    assert trained.model is other
    images = images_for(model)
    torch.testing.assert_close(other(images), model(images), rtol=0, atol=0)
    assert trained.preprocessing is None


def test_the_card_names_method_backbone_and_classes(tmp_path):
    vp.save_pretrained(adapted(alpha=4.0), tmp_path, repo_id=REPO, class_names=["wren", "robin", "a|b"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "visionpeft"
    assert card.data.pipeline_tag == "image-classification"
    assert "lora" in card.data.tags
    for part in ("LoRA", "rank=2, alpha=4.0", "nano_vit", "wren, robin", f'from_pretrained("{REPO}")'):
        assert part in card.text


def test_the_card_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    vp.save_pretrained(adapted(), tmp_path, repo_id="someone/first")
    before = (tmp_path / "README.md").read_bytes()

    def full(path, content):
        if path.name == "README.md":
            raise StorageError("the disk is full")

    monkeypatch.setattr("visionpeft.sharing.hub.write_whole", full)
    with pytest.raises(StorageError, match="disk is full"):
        vp.save_pretrained(adapted(), tmp_path, repo_id="someone/second")
    assert (tmp_path / "README.md").read_bytes() == before


@pytest.mark.parametrize("changed", [False, True])
def test_a_page_of_the_users_stays(changed, tmp_path):
    """A README.md written by hand, or a card that was edited; one that nobody touched follows what is saved."""
    readme = tmp_path / "README.md"
    if changed:
        vp.save_pretrained(adapted(), tmp_path, repo_id="someone/first")
        readme.write_text(readme.read_text().replace("trained with", "trained by me with"))
    else:
        readme.write_text("# My project\n")
    mine = readme.read_bytes()
    with pytest.warns(UserWarning, match="stays as it is"):
        vp.save_pretrained(adapted(), tmp_path, repo_id="someone/second")
    assert readme.read_bytes() == mine
    readme.unlink()
    for name in ("third", "fourth"):
        vp.save_pretrained(adapted(), tmp_path, repo_id=f"someone/{name}")
        assert f"# {name}\n" in readme.read_text()


def test_the_card_of_a_run_has_its_result(hub, tmp_path, capsys):
    finished = run(tmp_path / "runs", draw_images(tmp_path / "squares"), epochs=1, figures=True)
    capsys.readouterr()
    assert push.main([str(finished), REPO]) == 0
    assert f"huggingface.co/{REPO}" in capsys.readouterr().out
    text = hub.files["README.md"].decode()
    results = RunDirectory.existing(finished).read_results()
    card = ModelCard(text)
    (evaluation,) = card.data.eval_results
    assert evaluation.metric_value == pytest.approx(100 * results["test"]["top1"], abs=0.005)
    assert results["reported"] in text
    assert f"{results['parameters']['trainable']:,}" in text
    assert not any(name.endswith((".ckpt", ".yaml", ".png")) for name in hub.files)


def test_a_timm_backbone_is_the_base_model(tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit.r160_in1k", num_classes=3)
    vp.attach(model, vp.LoRA(rank=2))
    vp.save_pretrained(model, tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "timm/test_vit.r160_in1k"
    with pytest.raises(ConfigurationError, match="model="):
        vp.from_pretrained(tmp_path)


def test_an_embedded_backbone_is_not_on_the_hub(tmp_path):
    model = vp.attach(vp.create_backbone("nano_vit.distilled", num_classes=3), vp.LoRA(rank=2))
    vp.save_pretrained(model, tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None
    again = vp.from_pretrained(tmp_path).model
    assert again.backbone_source["name"] == "nano_vit.distilled"


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("no such/name/at all", ConfigurationError, "neither a folder nor a repository"),
        ("nobody/nothing", ConfigurationError, "not to be had from the Hub"),
    ],
)
def test_what_is_nowhere_is_refused(source, error, said, tmp_path):
    with pytest.raises(error, match=said):
        vp.from_pretrained(source, cache_dir=tmp_path, local_files_only=True)


def test_a_folder_without_anything_trained_is_refused(hub, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(StorageError, match=r"neither adapter\.safetensors nor learner"):
        vp.push_to_hub(tmp_path, REPO)
    assert hub.repo is None


def test_class_names_beside_a_folder_are_refused(hub, tmp_path):
    vp.save_pretrained(adapted(), tmp_path)
    with pytest.raises(ConfigurationError, match="class_names= belongs to a model"):
        vp.push_to_hub(tmp_path, REPO, class_names=["a", "b", "c"])


class ClientError(Exception):
    """Like those of the Hub's HTTP client, which are no OSError."""


@pytest.mark.parametrize("failure", [OSError, ClientError])
def test_a_failed_upload_is_one_sentence(monkeypatch, failure):
    def create_repo(self, repo_id, **options):
        raise failure("connection refused")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    with pytest.raises(ConfigurationError, match="could not be uploaded"):
        vp.push_to_hub(adapted(), REPO)


def test_a_learner_comes_back_with_new_classes(tmp_path):
    clip, tokenizer = vp.create_clip("nano_clip")
    learner = vp.CoOp(clip, tokenizer, ["cat", "dog"], context_length=2)
    vp.save_pretrained(learner, tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "zero-shot-image-classification"
    trained = vp.from_pretrained(tmp_path, class_names=["owl", "wren", "robin"])
    assert trained.class_names == ["owl", "wren", "robin"]
    learner.set_class_names(["owl", "wren", "robin"])
    images = torch.randn(2, 3, *trained.model.clip.visual.image_size)
    torch.testing.assert_close(trained.model(images), learner.eval()(images))


def described(folder, model, **source):
    """What `save` writes of a model whose backbone says this of itself."""
    model.backbone_source = model.backbone_source | source
    vp.save(model, folder, class_names=["wren", "robin", "owl"])
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"kwargs": {"checkpoint_path": "weights.pth"}}, "checkpoint_path"),
        ({"kwargs": {"cache_dir": "somewhere"}}, "cache_dir"),
        ({"kwargs": {"pretrained_cfg": {"file": "weights.pth"}}}, "pretrained_cfg"),
        ({"kwargs": {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x"}}}, "pretrained_cfg_overlay"),
        ({"kwargs": {"weights_only": False}}, "weights_only"),
        ({"kwargs": {"scriptable": True}}, "scriptable"),
        ({"kwargs": {"features_only": True}}, "features_only"),
        ({"kwargs": {"act_layer": "a/b"}}, "act_layer"),
        ({"checkpoint": "weights.safetensors"}, "no path is taken from a description"),
        ({"name": "local-dir:somewhere"}, "no path is taken from a description"),
    ],
)
def test_a_download_chooses_what_the_model_is_and_nothing_else(source, said, tmp_path, monkeypatch):
    """Refused before anything is created; the same files without it come back."""
    monkeypatch.setattr(trained_model, "create_backbone", lambda *_, **__: pytest.fail("created"))
    as_cached(described(tmp_path / "saved", adapted(), **source), tmp_path / "cache")
    with pytest.raises(ConfigurationError, match=said) as raised:
        vp.from_pretrained(REPO, cache_dir=tmp_path / "cache", local_files_only=True)
    assert "model=" in str(raised.value)
    monkeypatch.undo()
    as_cached(described(tmp_path / "right", adapted(), kwargs={"drop_path_rate": 0.1}), tmp_path / "again")
    trained = vp.from_pretrained(REPO, cache_dir=tmp_path / "again", local_files_only=True)
    assert trained.class_names == ["wren", "robin", "owl"]
    # With a model of their own, people need nothing of what the description says.
    model = vp.create_backbone("nano_vit", num_classes=3)
    assert vp.from_pretrained(REPO, model, cache_dir=tmp_path / "cache", local_files_only=True).model is model


@pytest.mark.parametrize("kind", ["adapter", "learner"])
def test_a_file_of_weights_is_named_by_the_user(kind, hub, tmp_path, monkeypatch):
    """A folder records where the weights were. They are read from there for a run of the user's own alone."""
    recorded, given, other = (tmp_path / f"{name}.safetensors" for name in ("recorded", "given", "other"))
    torch.manual_seed(3)
    if kind == "adapter":
        model = vp.create_backbone("test_vit", pretrained=False, num_classes=2)
    else:
        open_clip.add_model_config(Path(__file__).parents[1] / "clip_configs")
        model, _ = vp.create_clip("open_clip/tiny_clip", pretrained=False)
    for path in (recorded, given):
        safetensors.torch.save_file({key: value.clone() for key, value in model.state_dict().items()}, path)
    drawn = {key: torch.randn_like(v) if v.is_floating_point() else v for key, v in model.state_dict().items()}
    safetensors.torch.save_file(drawn, other)
    if kind == "adapter":
        model = vp.create_backbone("test_vit", checkpoint=recorded, num_classes=2)
        trained = vp.attach(model, vp.LoRA(rank=2)).eval()
        images = torch.randn(2, 3, 160, 160)
    else:
        clip, tokenizer = vp.create_clip("open_clip/tiny_clip", checkpoint=recorded)
        trained = vp.CoOp(clip, tokenizer, ["cat", "dog"], context_length=2).eval()
        images = torch.randn(2, 3, *clip.visual.image_size)
    options = {"class_names": ["cat", "dog"]} if kind == "adapter" else {}
    vp.save_pretrained(trained, tmp_path / "folder", **options)
    card, written = (tmp_path / "folder" / "README.md").read_text(), (tmp_path / "folder" / f"{kind}.json").read_text()
    assert 'checkpoint="recorded.safetensors"' in card
    assert str(tmp_path) not in card
    assert str(recorded) in written  # which is where `evaluate` and `predict` find it on this machine
    vp.push_to_hub(tmp_path / "folder", REPO)
    assert not any(str(tmp_path).encode() in content for content in hub.files.values())
    assert "recorded.safetensors" in hub.files[f"{kind}.json"].decode()
    with monkeypatch.context() as patch:
        patch.setattr(trained_model, "create_backbone", not_called)
        patch.setattr("visionpeft.models.create_clip.create_clip", not_called)
        with pytest.raises(ConfigurationError, match=r"no path is taken from a description.*checkpoint='recorded"):
            vp.from_pretrained(tmp_path / "folder")
    again = vp.from_pretrained(tmp_path / "folder", checkpoint=given)
    assert torch.equal(again.model(images), trained(images))
    with pytest.raises(StorageError, match="other weights"):
        vp.from_pretrained(tmp_path / "folder", checkpoint=other)
    with pytest.raises(StorageError, match="there is no checkpoint file"):
        vp.from_pretrained(tmp_path / "folder", checkpoint="")
    with pytest.raises(ConfigurationError, match="leave it out"):
        vp.from_pretrained(tmp_path / "folder", trained, checkpoint=given)
    own = trained_model.open_saved(tmp_path / "folder", own=True)  # as of a run directory
    assert torch.equal(own.model(images), trained(images))


def not_called(*_, **__):
    pytest.fail("created")


@pytest.mark.parametrize("key", ["jit", "cache_dir", "pretrained_image_path", "pretrained_text_path", "weights_only",
                                 "pretrained_hf", "device", "text_cfg", "vision_cfg"])  # fmt: skip
def test_open_clip_takes_no_argument_that_loads(key):
    source = {"name": "open_clip/ViT-B-32/openai", "pretrained": True, "checkpoint": None}
    with pytest.raises(ConfigurationError, match=key):
        described_arguments({"backbone": {"source": source | {"kwargs": {key: "x"}}}}, "the CLIP", False)
    right = described_arguments(
        {"backbone": {"source": source | {"kwargs": {"force_image_size": 96}}}}, "the CLIP", False
    )
    assert right == source | {"force_image_size": 96}


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"])
def test_arguments_that_may_be_set_are_those_of_the_model(name):
    allowed = _allowed(name)
    assert {"img_size", "drop_path_rate", "in_chans"} <= allowed
    assert not any(word in key for key in allowed for word in ("checkpoint", "cache", "cfg", "weights_only"))


@pytest.mark.parametrize("change", [{"pretrained": "weights.pth"}, {"kwargs": []}, {"name": 3}, {"checkpoint": 1}])
def test_a_description_of_another_type_is_one_sentence(change, tmp_path):
    described(tmp_path, adapted())
    description = json.loads((tmp_path / "adapter.json").read_text())
    description["backbone"]["source"] |= change
    with pytest.raises(StorageError, match="lacks one of name, pretrained"):
        described_arguments(description, "the model", True)


def test_exactly_what_is_read_is_downloaded(tmp_path, monkeypatch):
    asked = {}

    def download(repo, **options):
        asked.update(options)
        return tmp_path

    monkeypatch.setattr(sharing, "snapshot_download", download)
    vp.save(adapted(), tmp_path)
    vp.from_pretrained(REPO)
    assert sorted(asked["allow_patterns"]) == [
        "adapter.json", "adapter.safetensors", "learner.json", "learner.safetensors",
    ]  # fmt: skip
