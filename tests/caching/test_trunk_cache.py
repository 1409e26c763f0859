"""The frozen trunk runs once for each image: the same numbers, never stale, bounded, whole files."""

import contextlib
import dataclasses
import os
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from conftest import distance, randomise
from reference.hosts import HOSTS
from small_runs import draw_images, results, run
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer

import visionpeft as vp
from visionpeft.caching import trunk
from visionpeft.caching.content_cache import ContentCache, FolderCache
from visionpeft.data import ImageFolder
from visionpeft.errors import ConfigurationError, StorageError, UnsupportedError
from visionpeft.files import replacing
from visionpeft.tasks import ImageClassification
from visionpeft.tasks.optimisation import Optimisation

CLASSIFIERS = [
    host for host in HOSTS if host.head_paths() and host.takes == "images" and not host.name.startswith("clip")
]
METHODS = {
    "probe": (vp.LinearProbe(), None),
    "norm": (vp.LinearProbe(), 3),  # with the final norm trained
    "last lora": (vp.LoRA(2, blocks="last:1"), 2),
    "last prompts": (vp.VPT(2, blocks="last:2"), 1),
    "last blocks": (vp.LastBlocks(1), 2),
    "last norms": (vp.SSF(blocks="last:1"), 2),
}


def build(host, name):
    """A host with a method of the last blocks, moved off its start."""
    method, _ = METHODS[name]
    model = host.build(torch.float64)
    norms = ("norm", "fc_norm")
    train = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] in norms] if name == "norm" else ()
    vp.attach(model, method, train=train[:1])
    randomise(model.peft["default"])
    return model.eval()


def gradients(model, logits):
    """Logits, and the gradients of a loss that sees all of them."""
    model.zero_grad()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (logits * weights).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.peft.named_parameters()}


def counted(cache):
    """Numbers of images that went through the trunk of a `CachedTrunk`."""
    seen, output = [], cache.trunk.output

    def count(images):
        seen.append(len(images))
        return output(images)

    cache.trunk.output = count
    return seen


@pytest.mark.parametrize("host", CLASSIFIERS, ids=repr)
@pytest.mark.parametrize("name", METHODS)
def test_outputs_and_gradients_are_those_of_the_whole_model(host, name):
    """In the first pass and in the second, in which the trunk does not run."""
    model, inputs = build(host, name), host.inputs(4, torch.float64)
    wanted, expected = gradients(model, model(inputs))
    cache = trunk.CachedTrunk(model, ContentCache())
    seen = counted(cache)
    assert cache.trunk.first == METHODS[name][1]
    for rows in ([0, 1, 2, 3], [0, 1, 2, 3]):
        found, own = gradients(model, cache(inputs[rows]))
        assert distance(found, wanted) < 1e-12
        largest = max(gradient.norm() for gradient in expected.values())
        assert all((own[n] - expected[n]).norm() <= 1e-12 * largest for n in expected)
    assert seen == [4]
    assert distance(cache(inputs[[3, 0]]).detach(), wanted[[3, 0]]) < 1e-12
    assert distance(cache(inputs[[3, 0]]).detach(), wanted[[0, 3]]) > 1e-3  # the comparison can fail


def test_the_trunk_does_not_run_again():
    """Neither its blocks nor, in front of a probe, anything else of the backbone."""
    host = next(h for h in CLASSIFIERS if h.name == "vit_cls")
    for name, runs in (("last prompts", [1, 2]), ("probe", [])):
        model, inputs = build(host, name), host.inputs(2, torch.float64)
        cache = trunk.CachedTrunk(model, ContentCache())
        wanted = cache(inputs).detach()
        calls = []
        for index, block in enumerate(model.blocks):
            block.attn.register_forward_hook(lambda *_, index=index, calls=calls: calls.append(index))
        assert torch.equal(cache(inputs).detach(), wanted)
        assert calls == runs
        assert "forward" not in {key for module in model.modules() for key in vars(module)}


def test_methods_of_the_first_block_have_no_trunk():
    host = next(h for h in CLASSIFIERS if h.name == "vit_cls")
    embedding = vp.LoRA(2, targets=("patch_embed", "v"), blocks="last:1")
    for method, train in (
        (vp.LoRA(2), ()),
        (embedding, ()),
        (vp.FullFineTuning(), ()),
        (vp.LinearProbe(), "pos_embed"),
    ):
        with pytest.raises(ConfigurationError, match="no frozen trunk"):
            trunk.FrozenTrunk(vp.attach(host.build(), method, train=train))
    clip = next(h for h in HOSTS if h.name == "clip_whole")
    with pytest.raises(UnsupportedError, match="one head"):
        trunk.FrozenTrunk(vp.attach(clip.build(), vp.LoRA(2, blocks="last:1")))


def test_adapters_that_do_not_act_do_not_matter():
    host = next(h for h in CLASSIFIERS if h.name == "vit_cls")
    model = vp.attach(build(host, "last lora"), vp.LoRA(2), "everywhere")
    with pytest.raises(ConfigurationError):
        trunk.FrozenTrunk(model)
    vp.activate(model, "default")
    assert trunk.FrozenTrunk(model).first == 2


@pytest.mark.parametrize("change", ["in place", "replaced", "unsaid", "trained part"])
def test_changed_weights_are_noticed(change):
    """Another trunk gives other tokens; what is trained behind it does not make it another."""
    host = next(h for h in CLASSIFIERS if h.name == "vit_cls")
    model, inputs = build(host, "last lora"), host.inputs(2, torch.float64)
    cache = trunk.CachedTrunk(model, ContentCache())
    seen = counted(cache)
    before = cache(inputs).detach()
    weight = model.blocks[0].mlp.fc2.weight
    with torch.no_grad():
        if change == "in place":
            weight.mul_(-1)
        elif change == "replaced":
            model.blocks[0].mlp.fc2.weight = torch.nn.Parameter(-weight, requires_grad=False)
        elif change == "unsaid":
            weight.data.numpy()[:] *= -1
            cache.hash_again()
        else:
            randomise(model.peft["default"], seed=9)
    after = cache(inputs).detach()
    assert distance(after, model(inputs).detach()) < 1e-12
    assert distance(after, before) > 1e-3
    assert seen == ([2] if change == "trained part" else [2, 2])


@pytest.mark.parametrize("weight", ["cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.bias", "norm.weight"])
def test_a_trunk_that_is_trained_is_refused(weight):
    """Unfrozen by hand, also later. What is behind the trunk may be: it gets its gradient."""
    host = CLASSIFIERS[0]
    for name in ("last lora", "probe"):
        model, inputs = build(host, name), host.inputs(2, torch.float64)
        cached = trunk.CachedTrunk(model, ContentCache())
        cached(inputs)
        parameter = model.get_parameter(weight).requires_grad_(True)
        if name == "last lora" and weight == "norm.weight":
            (wanted,) = torch.autograd.grad(model(inputs).square().sum(), parameter)
            (found,) = torch.autograd.grad(cached(inputs).square().sum(), parameter)
            assert distance(found, wanted) < 1e-10
            continue
        with pytest.raises(ConfigurationError, match=f"{weight} has requires_grad=True"):
            cached(inputs)
        parameter.requires_grad_(False)
        cached(inputs)


def test_a_changed_image_is_another_one():
    host = next(h for h in CLASSIFIERS if h.name == "vit_cls")
    model, inputs = build(host, "last lora"), host.inputs(2, torch.float64)
    cache = trunk.CachedTrunk(model, ContentCache())
    seen = counted(cache)
    cache(inputs)
    inputs[1, 2, 31, 31] += 1e-6
    assert distance(cache(inputs).detach(), model(inputs).detach()) < 1e-14
    assert seen == [2, 1]


def test_randomness_in_the_trunk_is_refused():
    host = next(h for h in CLASSIFIERS if h.name == "vit_cls")
    model = build(host, "last lora")
    model.blocks[0].drop_path1 = DropPath(0.5).eval()
    cache = trunk.CachedTrunk(model, ContentCache())
    cache(host.inputs(2, torch.float64))
    model.blocks[0].drop_path1.train()
    with pytest.raises(ConfigurationError, match="DropPath"):
        cache(host.inputs(2, torch.float64, seed=1))


@pytest.mark.parametrize("dropout", [{"pos_drop_rate": 0.5}, {"patch_drop_rate": 0.5}])
def test_randomness_in_front_of_the_blocks_is_refused(dropout):
    model = VisionTransformer(32, 8, embed_dim=32, depth=3, num_heads=2, num_classes=4, **dropout)
    cache = trunk.CachedTrunk(vp.attach(model, vp.LoRA(2, blocks="last:1")), ContentCache())
    with pytest.raises(ConfigurationError, match="Dropout is at work"):
        cache(torch.randn(2, 3, 32, 32))


def test_other_adapters_are_refused():
    """The trunk is that of the adapters that acted when it was made, also where every image is known."""
    host = next(h for h in CLASSIFIERS if h.name == "vit_cls")
    model, inputs = build(host, "last lora"), host.inputs(2, torch.float64)
    cache = trunk.CachedTrunk(model, ContentCache())
    cache(inputs)
    vp.attach(model, vp.LoRA(2, blocks="first:1"), "early")
    with pytest.raises(ConfigurationError, match="other adapters act"):
        cache(inputs)


def test_models_of_the_same_weights_do_not_share_tokens():
    """Neither the number of heads nor the activation is told by the weights."""
    kept, inputs, logits = ContentCache(), torch.randn(2, 3, 32, 32), []
    for options in ({"num_heads": 2}, {"num_heads": 4}, {"num_heads": 2, "act_layer": "quick_gelu"}):
        torch.manual_seed(0)
        model = VisionTransformer(32, 8, embed_dim=32, depth=3, num_classes=4, **options).eval()
        randomise(model)
        vp.attach(model, vp.LoRA(2, blocks="last:1"))
        logits.append((trunk.CachedTrunk(model, kept)(inputs), model(inputs)))
    for cached, plain in logits:
        assert distance(cached.detach(), plain.detach()) < 1e-5
    assert distance(logits[0][1].detach(), logits[1][1].detach()) > 1e-3


def test_economies_change_the_tokens_that_are_kept():
    host = next(h for h in CLASSIFIERS if h.name == "vit_cls")
    model, inputs = build(host, "norm"), host.inputs(3, torch.float64)
    cache = trunk.CachedTrunk(vp.economise(model, class_token_only=True), ContentCache())
    cache(inputs[:1])
    vp.economise(model)
    assert distance(cache(inputs).detach(), model(inputs).detach()) < 1e-12


# where it is kept


def squares(images):
    """One row of 64 bytes for each image."""
    return images.flatten(1)[:, :8] ** 2


@pytest.fixture(params=["memory", "disk"])
def make(request, tmp_path):
    """Makes a cache of a number of bytes; those on disk share a folder."""
    return ContentCache if request.param == "memory" else lambda size: FolderCache(tmp_path / "kept", size)


def pictures(count, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_what_is_kept_is_bounded(make):
    """A full cache still gives the right rows, and those of other sources make room."""
    row = 64 if make is ContentCache else 144  # a file has a header
    cache, images, seen = make(3 * row), pictures(5), []

    def work_out(images):
        seen.append(len(images))
        return squares(images)

    for _ in range(2):
        assert torch.equal(cache.rows("a", images, work_out), squares(images))
    assert cache.full
    assert cache.bytes <= 3 * row
    assert seen == [5, 2]
    assert torch.equal(cache.rows("b", images[:3], work_out), squares(images[:3]))
    assert not cache.full
    assert cache.bytes <= 3 * row
    cache.rows("b", images[:3], work_out)
    assert seen == [5, 2, 3]


def test_a_folder_serves_the_next_process(tmp_path):
    """Rows are found again, and what another process has kept counts."""
    images = pictures(3)
    FolderCache(tmp_path / "kept").rows("a", images, squares)
    again = FolderCache(tmp_path / "kept")
    assert again.bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) > 3 * 64
    found = again.rows("a", images, lambda images: pytest.fail("worked out again"))
    assert torch.equal(found, squares(images))
    assert FolderCache(tmp_path / "kept", again.bytes).rows("b", images, squares).shape == (3, 8)


def test_damaged_and_half_written_files_are_worked_out_again(tmp_path):
    images = pictures(2)
    cache = FolderCache(tmp_path / "kept")
    cache.rows("a", images, squares)
    first, second = sorted(tmp_path.rglob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-5])
    second.write_bytes(b"")
    assert torch.equal(cache.rows("a", images, squares), squares(images))
    assert torch.equal(cache.rows("a", images, lambda images: pytest.fail("not mended")), squares(images))


def test_a_killed_writer_leaves_no_half_file(tmp_path):
    """The process dies before its file is complete: nothing is there under its name."""
    code = f"""
import os, torch
from visionpeft.caching.content_cache import FolderCache
os.replace = lambda *_: os._exit(1)
FolderCache({str(tmp_path / "kept")!r}).rows("a", torch.ones(1, 3), lambda images: images)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1
    assert not list(tmp_path.rglob("*.safetensors"))
    cache = FolderCache(tmp_path / "kept")
    assert torch.equal(cache.rows("a", torch.ones(1, 3), lambda images: 2 * images), torch.full((1, 3), 2.0))


def test_a_full_disk_only_costs_time(tmp_path, monkeypatch):
    def fail(*_):
        raise StorageError("no space")

    monkeypatch.setattr("visionpeft.caching.content_cache.write_whole", fail)
    cache = FolderCache(tmp_path / "kept")
    assert torch.equal(cache.rows("a", pictures(2), squares), squares(pictures(2)))
    assert cache.full


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        FolderCache(tmp_path / "file" / "kept")


def tree(folder):
    """Everything below a folder: what a link points to, or the bytes of a file."""
    return {
        path.relative_to(folder): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def test_a_full_cache_deletes_only_its_own_rows(tmp_path):
    """The folder is the user's: photos, other safetensors files and links in it outlive any number of full caches."""
    home, images = tmp_path / "home", pictures(3)
    for path in ("photos/cat.jpg", "photos/raw/dog.jpg", "models/model.safetensors", f"{'0' * 32}/weights.safetensors"):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_bytes(b"mine" * 1000)
    before = tree(home)
    FolderCache(home, 3 * 144).rows("a", images, squares)
    rows = home / "visionpeft-rows"
    (own,) = [path for path in rows.iterdir() if path.is_dir()]
    # Beside the rows themselves: a foreign file in a source's folder, and a link with the name of a source.
    (own / "notes.txt").write_text("mine")
    (rows / ("f" * 32)).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / f"{'1' * 32}.safetensors").write_bytes(b"mine")
    for source in "bcde":
        cache = FolderCache(home, 3 * 144)
        cache.rows(source, images, squares)
        assert not cache.full
    after = tree(home)
    assert {path: after.get(path) for path in before} == before
    assert (own / "notes.txt").read_text() == "mine"
    assert (tmp_path / "elsewhere" / f"{'1' * 32}.safetensors").read_bytes() == b"mine"
    # The negative control: rows of other sources did make room.
    assert [path for path in own.iterdir() if path.suffix == ".safetensors"] == []
    assert len(list(rows.glob(f"[!f]*/{'[0-9a-f]' * 32}.safetensors"))) == 3


WRITER = """
import sys, torch
from visionpeft.caching.content_cache import FolderCache
folder, name = sys.argv[1:]
cache = FolderCache(folder, 20 * 136)
print("ready", flush=True)
sys.stdin.readline()
images = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(int(name)), dtype=torch.float64)
for image in images:
    cache.rows(name, image[None], lambda rows: rows.flatten(1)[:, :8])
"""


def test_the_bound_holds_for_all_processes_together(tmp_path):
    """Two processes that both began with an empty folder fill it once, not twice."""
    folder = tmp_path / "kept"
    command = [sys.executable, "-c", WRITER, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, name], **pipes) for name in "12"]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    most = 0
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        with contextlib.suppress(FileNotFoundError):  # a source made room while we looked
            most = max(most, len(list(folder.rglob("*.safetensors"))))
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    kept = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    row = 136  # 64 bytes and a header
    assert kept == 20 * row
    assert 0 < most <= 20
    assert FolderCache(folder).bytes == kept


def test_what_a_killed_writer_left_is_counted_and_removed(tmp_path):
    """A sum that says too much is counted again, and a half-written row goes."""
    cache = FolderCache(tmp_path, 3 * 144)
    cache.rows("a", pictures(2), squares)
    (source,) = cache._sources()
    with contextlib.suppress(FileNotFoundError), replacing(source / f"{'0' * 32}.safetensors") as half:
        pass
    half.write_bytes(b"half")
    (source / f".{'1' * 32}.safetensors.17").write_bytes(b"half")  # named by the number of a process, as in 0.1.0
    (cache.folder / "bytes").write_text(str(3 * 144))
    cache.rows("a", pictures(3, seed=1)[:1], squares)
    assert not cache.full
    assert sorted(path.suffix for path in source.iterdir()) == [".safetensors"] * 3


def test_a_folder_that_may_only_be_read_still_gives_its_rows(tmp_path, monkeypatch):
    FolderCache(tmp_path).rows("a", pictures(1), squares)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    cache = FolderCache(tmp_path)
    assert cache.bytes == 136
    assert torch.equal(cache.rows("a", pictures(1), lambda images: pytest.fail("not found")), squares(pictures(1)))
    assert torch.equal(cache.rows("a", pictures(2, seed=1), squares), squares(pictures(2, seed=1)))
    assert cache.full


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("no flock")  # as filelock does where the system call is not there

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(StorageError, match="without locks"):
        FolderCache(tmp_path)


def test_rows_from_inference_mode_can_be_trained_on(make):
    cache = make(10**6)
    with torch.inference_mode():
        cache.rows("a", pictures(2), squares)
    weight = torch.ones(8, requires_grad=True, dtype=torch.float64)
    (cache.rows("a", pictures(2), squares) * weight).sum().backward()
    assert weight.grad is not None


# the task


def task(classes, method=None, **fields):
    fields = {"backbone": "test_vit", "pretrained": False, "backbone_kwargs": {"img_size": 32}} | fields
    recipe = Optimisation(lr=0.01, warmup_epochs=0)
    return ImageClassification(method or vp.LoRA(2, blocks="last:2"), classes, optimisation=recipe, **fields)


class Losses(pl.Callback):
    """Collects the loss of every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append(outputs["loss"].item())


def fit(folder, data, module, epochs=3):
    losses = Losses()
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        default_root_dir=folder, max_epochs=epochs, enable_model_summary=False, callbacks=[losses], **options
    )
    trainer.fit(module, datamodule=data)
    scores = {key: value.item() for key, value in trainer.callback_metrics.items()}
    scores |= trainer.test(module, datamodule=data, verbose=False)[0]
    return losses.steps, scores


@pytest.mark.parametrize("method", [vp.LoRA(2, blocks="last:2", dropout=0.3), vp.LinearProbe()], ids=["lora", "probe"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_run_with_a_cache_has_the_losses_of_one_without(tmp_path, method, where):
    """In training, validation and test; and the trunk saw every image once."""
    images = draw_images(tmp_path / "images")
    cached = None
    found = []
    for cache in (None, "memory" if where == "memory" else str(tmp_path / "kept")):
        data = ImageFolder(str(images), batch_size=8, augmentation="none", val_fraction=0.2, test_fraction=0.2, seed=1)
        cached = task(data.class_names, method, cache=cache)
        seen = counted(cached.trunk) if cache else []
        found.append(fit(tmp_path, data, cached))
    (losses, scores), (own, own_scores) = found
    assert own == pytest.approx(losses, rel=1e-4)
    assert own_scores == pytest.approx(scores, rel=1e-4)
    sizes = {split: len(source) for split, source in data.sources.items()}
    assert sum(seen) == sum(sizes.values())
    assert len(set(losses)) > 3


def test_fixed_views_are_kept_each(tmp_path):
    """With two views of every image, which come round, the trunk runs twice for each; without a number it refuses."""
    images = draw_images(tmp_path / "images", per_class=4)
    options = {"batch_size": 4, "seed": 1, "augmentation": "crop_flip", "val_fraction": 0.25, "test_fraction": 0.25}
    found = []
    for cache in (None, "memory"):
        data = ImageFolder(str(images), views=2, **options)
        module = task(data.class_names, cache=cache)
        seen = counted(module.trunk) if cache else []
        found.append(fit(tmp_path, data, module, epochs=5)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    sizes = {split: len(source) for split, source in data.sources.items()}
    assert sum(seen) == 2 * sizes["train"] + sizes["val"] + sizes["test"]
    data = ImageFolder(str(images), **options)
    with pytest.raises(ConfigurationError, match="augments images anew"):
        fit(tmp_path, data, task(data.class_names, cache="memory"))


@pytest.mark.parametrize("name", ["drop_path", "mixup", "cutmix"])
def test_what_makes_images_others_each_time_is_refused(name):
    with pytest.raises(ConfigurationError, match=name):
        task(["a", "b"], cache="memory", **{name: 0.1})


def test_methods_without_a_trunk_are_refused():
    with pytest.raises(ConfigurationError, match="no frozen trunk"):
        task(["a", "b"], vp.LoRA(2), cache="memory")


def test_a_small_cache_changes_nothing(tmp_path):
    """What does not fit is worked out each time."""
    images = draw_images(tmp_path / "images", per_class=4)
    found = []
    for cache in (None, "memory"):
        data = ImageFolder(
            str(images), batch_size=4, augmentation="none", val_fraction=0.25, test_fraction=0.25, seed=1
        )
        module = task(data.class_names, cache=cache, cache_mib=0)
        found.append(fit(tmp_path, data, module, epochs=2)[0])
    assert module.trunk.cache.full
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_loading_keeps_the_options(tmp_path):
    """An adapter read in the place of the trained one runs behind the same trunk, with the same economies."""
    images = draw_images(tmp_path / "images", per_class=4)
    data = ImageFolder(str(images), batch_size=4, augmentation="none", val_fraction=0.25, test_fraction=0.25, seed=1)
    module = task(data.class_names, cache="memory", class_token_only=False, recompute="mlp")
    fit(tmp_path, data, module, epochs=1)
    module.eval()
    batch = torch.randn(2, 3, 32, 32)
    wanted = module(batch).detach()
    module.save(tmp_path / "adapter", data)
    module.load(tmp_path / "adapter")
    assert dataclasses.asdict(module.model.peft.economies)["recompute"] == "mlp"
    module.eval()
    torch.testing.assert_close(module(batch).detach(), wanted)


def test_the_command_line_has_the_options(tmp_path):
    """A whole run with all of them scores what the plain one does."""
    images = draw_images(tmp_path / "images", per_class=6)
    last = ["--model.method.blocks", "last:1", "--data.augmentation", "none"]
    more = ["--model.cache", str(tmp_path / "kept"), "--model.recompute", "mlp"]
    plain = results(run(tmp_path / "plain", images, *last))
    cheap = results(run(tmp_path / "cheap", images, *last, *more))
    assert list((tmp_path / "kept").rglob("*.safetensors"))
    assert cheap["test"] == pytest.approx(plain["test"], rel=1e-4)
