"""A compiled network: the same training with the same keys, one graph, and a sentence where there can be none."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import visionpeft as vp
from visionpeft.costs.saved_bytes import saved_bytes, storages
from visionpeft.errors import ConfigurationError
from visionpeft.tasks import ImageClassification, SemanticSegmentation, VideoClassification, compiling
from visionpeft.tasks.optimisation import Optimisation

NAMES = ["a", "b", "c"]
SMALL = {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2}
OPTIONS = {"backbone": "vit_tiny_patch16_224", "pretrained": False, "backbone_kwargs": SMALL}
RATES = Optimisation(lr=0.01, warmup_epochs=0)
IMAGES = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make(compile=True, method=None, **options):
    return ImageClassification(method or vp.LoRA(2), NAMES, optimisation=RATES, compile=compile, **OPTIONS | options)


def loader():
    """Batches of 4 and 3: a graph of one size, then one of any."""
    return DataLoader(TensorDataset(IMAGES, torch.arange(7) % 3), batch_size=4)


def train(task, folder, resumed=None):
    """Two epochs; the folder has a checkpoint of each."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    every = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=folder, num_sanity_val_steps=0, callbacks=[every], **quiet
    )
    trainer.fit(task, loader(), ckpt_path=resumed)
    return trainer


def trained(task):
    return {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}


@pytest.fixture
def graphs(monkeypatch):
    """How many operations each graph has, with a compiler that runs them as they are."""
    seen = []

    def run_as_it_is(graph, _):
        seen.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", run_as_it_is)
    torch._dynamo.reset()
    return seen


def test_training_is_that_of_the_plain_model(graphs, tmp_path):
    """Losses and weights, from a checkpoint on, too, which a plain model reads and writes alike."""
    plain, compiled = make(compile=False), make()
    keys = list(plain.state_dict())
    expected = train(plain, tmp_path / "plain").test(plain, loader(), verbose=False)[0]
    assert graphs == []  # nothing is compiled that was not asked for
    found = train(compiled, tmp_path / "compiled").test(compiled, loader(), verbose=False)[0]
    assert 2 <= len(graphs) <= 4  # training and measuring, each with batches of 4 and then of any size
    assert list(compiled.state_dict()) == keys
    assert expected == pytest.approx(found, abs=1e-6)
    wanted = trained(plain)
    assert not torch.equal(wanted["model.peft.default.head.weight"], trained(make())["model.peft.default.head.weight"])
    saved = tmp_path / "compiled" / "epoch=0.ckpt"
    for task in (compiled, make(), make(compile=False)):
        if task is not compiled:
            train(task, tmp_path / f"again {task.compiled}", saved)
        for name, value in trained(task).items():
            torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-5)
    assert set(torch.load(saved)["state_dict"]) == {key for key in keys if key.startswith("model.peft.")}


def test_passes_that_do_not_come_again_are_not_compiled(graphs):
    """The look at one image before training; the first batch of it is."""
    task = make()
    task.check_before_training(pl.LightningDataModule())
    assert graphs == []
    task(IMAGES[:2])
    assert len(graphs) == 1


def test_memory_is_spared_as_without_a_compiler(monkeypatch):
    """What `torch.compile` alone makes of the same model keeps outputs of norms and activations."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager_decomp_partition")  # partitioned alike, without making code
    method = vp.LoRA(2, targets=("q", "k", "v", "proj", "fc1", "fc2"))

    def kept(compile):
        torch._dynamo.reset()
        model = make(compile=False, method=method, class_token_only=False).train().model
        compile(model)
        return saved_bytes(lambda: model(IMAGES).sum(), storages(model) | {IMAGES.untyped_storage().data_ptr()})[0]

    plain = kept(lambda model: None)
    assert kept(compiling.compile_in_place) < 1.02 * plain
    assert kept(lambda model: model.compile(backend=compiling.BACKEND, fullgraph=True)) > 1.2 * plain


def test_masks_are_compiled(graphs):
    """One graph gives loss, gradients and running statistics as the head that is computed again does."""
    head = vp.LinearSegmentation(dropout=0.0)
    labels = torch.randint(-1, 3, (4, 32, 32), generator=torch.Generator().manual_seed(1))
    seen = []
    for compile in (False, True):
        task = SemanticSegmentation(vp.LoRA(2), NAMES, head=head, compile=compile, **OPTIONS).train()
        loss, found = task.training_loss(IMAGES[:4], labels)
        loss.backward()
        gradients = [p.grad for p in vp.trainable_parameters(task.model)]
        seen.append([loss.detach(), found, *gradients, *task.adapter.get_submodule("head").buffers()])
        assert len(graphs) == compile
    for plain, compiled in zip(*seen, strict=True):
        torch.testing.assert_close(compiled, plain)
    with pytest.raises(ConfigurationError, match="changes with each training step"):
        SemanticSegmentation(vp.LoRA(2), NAMES, head=vp.PMT(), compile=True, **OPTIONS)


def test_clips_are_compiled(graphs):
    task = VideoClassification(vp.STAdapter(bottleneck=4), NAMES, num_frames=2, compile=True, **OPTIONS).eval()
    clips = torch.randn(2, 3, 2, 32, 32)
    with torch.no_grad():
        found = task(clips)
        assert len(graphs) == 1
        views = task(clips.unsqueeze(1))  # one view: the log of its probabilities
        with task.uncompiled():
            torch.testing.assert_close(task(clips), found, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(views, found.log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_what_breaks_a_graph_is_said(graphs):
    task = make()
    task.model.blocks[0].register_forward_hook(lambda module, inputs, output: torch._dynamo.graph_break())
    with pytest.raises(ConfigurationError, match=r"cannot be compiled as one graph.*leave compile out") as raised:
        task(IMAGES)
    assert "\n" not in str(raised.value)
    plain = make(compile=False)
    plain.model.blocks[0].register_forward_hook(lambda module, inputs, output: torch._dynamo.graph_break())
    assert plain(IMAGES).shape == (7, 3)


def test_compile_and_cache_exclude_each_other():
    with pytest.raises(ConfigurationError, match="leave one of the two out"):
        make(method=vp.LinearProbe(), cache="memory")
    assert make(compile=False, method=vp.LinearProbe(), cache="memory").trunk is not None


def test_a_missing_compiler_is_refused_before_training(monkeypatch):
    import torch._inductor.config

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with monkeypatch.context() as patched:
        patched.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
        with pytest.raises(ConfigurationError, match=r"C\+\+ compiler"):
            make()
    with monkeypatch.context() as patched:
        patched.setattr("torch.utils._triton.has_triton", lambda: False)
        with pytest.raises(ConfigurationError, match="Triton"):
            compiling.check_device(torch.device("cuda"))
        compiling.check_device(torch.device("cpu"))
