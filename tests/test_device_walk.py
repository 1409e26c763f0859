"""A training step on a GPU, walked without one: it waits for nothing, and what it copied stays there from then on.

Every listed method and learner is walked, every head and loss of the tasks, and batches with an adapter for each row. A
new one in the lists is walked without a line here.
"""

import contextlib
import functools

import lightning.pytorch as pl
import pytest
import torch
from clip_reference import WordTokenizer, clip_model, images, lively_, tokenizer
from conftest import CASES, FEW_CASES, FEW_HOSTS, MECHANISMS, VIDEO_CASES, adapted, every_pair, randomise
from device_traffic import Traffic, autocast, moved, no_values, there
from reference.hosts import HOSTS, Host, vit
from shared_cells import shared
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor

import visionpeft as vp
from visionpeft.clip import learners
from visionpeft.clip.learners import plot
from visionpeft.methods.parts.base import Method
from visionpeft.sites.tasks_of_rows import tasks_of_rows
from visionpeft.tasks import ImageClassification, PromptLearning, SemanticSegmentation, VideoClassification

BY_NAME = {host.name: host for host in HOSTS}
FAMILIES = [BY_NAME[name] for name in ("vit_cls", "eva_split", "clip_whole")]
# Every method on one family, every mechanism on all; hundreds of walks more would show the same.
PAIRS = every_pair(FAMILIES[:1], CASES) + every_pair(FAMILIES[1:], FEW_CASES)
PAIRS += [(host, case) for host in FEW_HOSTS for case in FEW_CASES if host not in FAMILIES and case.name in MECHANISMS]
PAIRS = [(host, case) for host, case in PAIRS if (host.name, case.name) != ("clip_whole", "linear_probe")]  # no head


def second_step(module, step, device="cuda"):
    """What the second of two steps moves: in the first one, what is kept may be copied to the device."""
    with Traffic(device):
        step(module)
    with Traffic(device) as traffic:
        step(module)
    return traffic.everything


@functools.cache
def of_the_library(host):
    """What the library's own forward moves in every step, such as timm the coordinates of images of any size."""
    with no_values():
        inputs = there(host.inputs())
        return second_step(moved(host.build()), lambda model: host.run(model, inputs))


def train(host, inputs, model):
    """A training step without its backward pass: gradients are there, and what the methods do with them is done."""
    output = host.run(model, inputs).float()
    output.square().mean() + vp.penalty(model, output, lambda: host.run(model, inputs).float())
    for parameter in vp.trainable_parameters(model):
        parameter.grad = torch.empty_like(parameter)
    vp.after_step(model, 1, 1)


# Methods


@shared(PAIRS)
def test_methods(cell):
    step, baseline = functools.partial(train, cell.host), of_the_library(cell.host)
    with no_values():
        model, inputs = moved(cell.model).train(), there(cell.host.inputs())
        assert second_step(model, lambda model: step(inputs, model)) == baseline


@shared(every_pair(FAMILIES[:1], FEW_CASES))
def test_methods_under_autocast(cell):
    with no_values():
        model, inputs = moved(cell.model).train(), there(cell.host.inputs())
        with autocast("cuda", torch.bfloat16):
            assert second_step(model, functools.partial(train, cell.host, inputs)) == []


@shared(every_pair(FAMILIES[:1], CASES))
def test_backward_passes_of_methods(cell):
    """Walked on the CPU, without values: nobody asks for one."""
    with no_values():
        model, inputs = moved(cell.model, "cpu").train(), there(cell.host.inputs(), "cpu")
        with Traffic("cpu", answer=0):  # on a CPU, SSF asks whether a scale is near to zero
            output = cell.host.run(model, inputs)
            loss = output.square().mean() + vp.penalty(model, output, lambda: cell.host.run(model, inputs))
        if loss.requires_grad:
            with Traffic("cpu") as traffic:
                loss.backward()
            assert traffic.everything == []


def test_routers_that_learn_of_tasks():
    """The tasks of a batch lie where its images do, as those that a run finds from labels."""
    host = BY_NAME["vit_cls"]
    model = host.build()
    for name in "ab":
        vp.attach(model, vp.LoRA(rank=2), name)
    vp.attach(model, vp.MoA(adapters=("a", "b")), "over")
    vp.activate(model, "over")
    with no_values():
        inputs, rows = there(host.inputs()), there(torch.tensor([0, 1]))
        with tasks_of_rows(("a", "b"), rows):
            assert second_step(moved(model).train(), functools.partial(train, host, inputs)) == []


class Clips(Host):
    """A host that takes clips of three frames."""

    def inputs(self, batch=2, dtype=torch.float32, seed=0):
        """Random clips."""
        return torch.randn(batch, 3, 3, *self.size, dtype=dtype)


CLIPS = Clips("clips", lambda: vp.VideoClassifier(vit(), num_frames=3, num_classes=5))


@pytest.mark.parametrize("case", VIDEO_CASES, ids=repr)
def test_methods_of_clips(case):
    with no_values():
        inputs = there(CLIPS.inputs())
    model = adapted(CLIPS, case)
    with no_values():
        assert second_step(moved(model).train(), functools.partial(train, CLIPS, inputs)) == []


# A batch with an adapter for each row


ROUTED = {
    "tokens": [vp.Adapter(bottleneck=4), vp.AdaptFormer(bottleneck=4)],
    "weights": [vp.LoRA(rank=2), vp.IA3()],
    "prompts": [vp.VPT(num_tokens=2), vp.VPT(num_tokens=2)],
    "keys": [vp.PrefixTuning(num_tokens=2), vp.PrefixTuning(num_tokens=2)],
}


@pytest.mark.parametrize("methods", ROUTED.values(), ids=ROUTED)
@pytest.mark.parametrize("host", [BY_NAME["vit_cls"], BY_NAME["eva_split"], CLIPS], ids=repr)
def test_routed_batches(host, methods):
    model = host.build()
    for name, method in zip("ab", methods, strict=True):
        vp.attach(model, method, name)
        randomise(model.peft[name])
    prompts = any(isinstance(method, vp.VPT | vp.PrefixTuning) for method in methods)
    with no_values():
        model, inputs = moved(model), there(host.inputs(4))
        with vp.route(model, ["a", "b", "a" if prompts else None, "a"]):
            assert second_step(model, lambda model: host.run(model, inputs)) == []


# Learners


OPTIONS = {
    "CoOp": [{}, {"class_specific": True, "position": "middle"}],
    "TipAdapter": [{}, {"train_keys": True}],
    "DePT": [{"host_options": {"context_length": 4}}],  # the shortest tower reads 12 tokens
    "PromptSRC": [{"template": ["a photo of a {}.", "art of the {}."]}],  # and not sixty
    "CLIPLinearProbe": [{}, {"solver": "gradient"}],
    **{name: [{"num_views": 4}] for name in ("TPT", "CTPT", "TPS", "ZERO", "MTA")},
    "DiffTPT": [{"num_views": 4, "steps": 2}],
    "ProDA": [{"num_contexts": 8}],
    "PromptAlign": [{"num_views": 4, "weight": 0.0}],  # which has no statistics of a source here
}
LEARNERS = [(name, options) for name in learners.__all__ if name != "Learner" for options in OPTIONS.get(name, [{}])]
KINDS = ("autocast", "in chunks", "in full", "siglip")
# Every learner as it is, and in one of the other ways; each of them several learners go.
WAYS = [(*learner, "plain") for learner in LEARNERS]
WAYS += [(*learner, KINDS[index % len(KINDS)]) for index, learner in enumerate(LEARNERS)]


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch):
    """Of an iteration that is walked a hundred times alike, three show what it moves."""
    monkeypatch.setattr(plot, "ITERATIONS", 3)


@pytest.fixture
def without_autograd(monkeypatch):
    """Gradients inside a loss are tensors of the right shape: PyTorch computes none on a device that is not there.

    Those of tensors with values, from which a learner is fitted before the walk, are computed.
    """
    computed = torch.autograd.grad

    def empty(outputs, inputs, *further, **options):
        if not isinstance(outputs, FakeTensor):
            return computed(outputs, inputs, *further, **options)
        return tuple(torch.empty_like(each) for each in ([inputs] if isinstance(inputs, torch.Tensor) else inputs))

    monkeypatch.setattr(torch.autograd, "grad", empty)


def built(name, options, kind="plain"):
    """A learner that has seen what it is fitted on."""
    torch.manual_seed(0)
    short = kind == "siglip"  # which reads twelve tokens
    # texts of two lengths: each further one takes the same steps
    if short and name in ("CoOp", "ProGrad", "PLOT", "ProDA", "DAPT"):
        options = {"context_length": 4} | options
    names = ["dog", "kite", "car", "cat"] if short else ["dog", "red kite", "car", "blue cat"]
    learner = getattr(learners, name)(
        clip_model(kind, torch.float32), WordTokenizer() if short else tokenizer(), names, **options
    )
    learner.fit_features((torch.nn.functional.normalize(torch.randn(4, 64), dim=-1), torch.arange(4)))
    return lively_(learner).train()


def batch_for(learner, device):
    """Images and labels; a learner that would draw views gets them."""
    views = getattr(learner, "num_views", None)
    seen = images(2, torch.float32) if views is None else images(2 * views, torch.float32).unflatten(0, (2, views))
    return there((seen, torch.arange(2)), device)


@pytest.mark.parametrize(("name", "options", "kind"), WAYS, ids=str)
@pytest.mark.usefixtures("without_autograd")
def test_learners(name, options, kind):
    learner = built(name, options, "siglip" if kind == "siglip" else "plain")
    learner.chunk_size, learner.fast_text = 2 if kind == "in chunks" else None, kind != "in full"
    with no_values():
        learner, batch = moved(learner), batch_for(learner, "cuda")
        with autocast("cuda", torch.bfloat16) if kind == "autocast" else contextlib.nullcontext():
            found = second_step(learner, lambda learner: learner.loss(*batch))
    # TPT and its kin have no training steps, and ask whether the context they start from is that of the kept features.
    assert len(found) <= (name in ("TPT", "CTPT", "DiffTPT")), found


@pytest.mark.parametrize(("name", "options"), LEARNERS, ids=str)
@pytest.mark.usefixtures("without_autograd")
def test_evaluation_of_learners(name, options):
    """Once in a batch it is asked whether what is trained is still what text features were kept of."""
    learner = built(name, options).eval()
    with no_values():
        learner, (seen, _) = moved(learner), batch_for(learner, "cuda")
        with torch.no_grad():
            found = second_step(learner, lambda learner: learner(seen))
    assert len(found) <= 1, found
    assert all("waited for" in each for each in found)


@pytest.mark.parametrize(("name", "options"), LEARNERS, ids=str)
def test_backward_passes_of_learners(name, options):
    """Walked on the CPU, without values: nobody asks for one, nor makes a tensor of numbers after the first step."""
    learner = built(name, options)
    if not learner.trainable_parameters():
        pytest.skip("nothing is trained by gradients")
    with no_values():
        learner, batch = moved(learner, "cpu"), batch_for(learner, "cpu")

        def step(learner):
            loss, _ = learner.loss(*batch)
            if loss.requires_grad:
                loss.backward()

        found = second_step(learner, step, "cpu")
    if name in (
        "PLOT",
        "PLOTPlusPlus",
    ):  # on the CPU alone, which has the answer at once, is it asked if T stands still
        found = [each for each in found if "waited for" not in each]
    assert found == []


# Tasks: heads, losses, metrics


IMAGES = {"backbone": "test_vit", "pretrained": False, "backbone_kwargs": {"img_size": 32, "depth": 2}}
CLASSES = [f"class {index}" for index in range(7)]
TASKS = {
    **{
        head: functools.partial(ImageClassification, vp.LoRA(rank=2), CLASSES, head=head, **IMAGES)
        for head in ("linear", "batchnorm_linear", "layernorm_linear")
    },
    "smoothing": functools.partial(ImageClassification, vp.VPT(), CLASSES, label_smoothing=0.1, **IMAGES),
    "mixup": functools.partial(ImageClassification, vp.VPT(), CLASSES, mixup=0.8, cutmix=1.0, **IMAGES),
    "economies": functools.partial(
        ImageClassification, vp.LoRA(rank=2), CLASSES, class_token_only=True, recompute="mlp", drop_path=0.1, **IMAGES
    ),
    "adalora": functools.partial(ImageClassification, vp.AdaLoRA(), CLASSES, **IMAGES),
    "clips": functools.partial(VideoClassification, vp.STAdapter(bottleneck=4), CLASSES, num_frames=3, **IMAGES),
    "prompts": functools.partial(PromptLearning, learners.CoOp, CLASSES, cache_features=False),
    "masks": functools.partial(SemanticSegmentation, vp.LoRA(rank=2), CLASSES, window=24, stride=16, **IMAGES),
}


def walked(task, folder, interval):
    """The task on the device, with a trainer that reads it so seldom."""
    task = moved(task).train()
    task.trainer = pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, log_every_n_steps=interval, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    task.log = lambda *_, **__: None  # Lightning keeps the metric until the epoch is over
    return task


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_tasks(make, tmp_path):
    """Training steps read the device once in a logging interval, and batches of the validation do not."""
    task = make()
    size = task.preprocessing.input_size
    frames = [3] if isinstance(task, VideoClassification) else []
    with no_values():
        labels = torch.zeros(4, *size, dtype=torch.int64) if isinstance(task, SemanticSegmentation) else torch.arange(4)
        batch = there((torch.empty(4, 3, *frames, *size), labels))
        task = walked(task, tmp_path, interval=3)
        found = []
        for index in range(7):
            with Traffic(answer=-1) as traffic:
                task.training_step(batch, index)
            found.append(traffic)
        assert [len(traffic.reads) for traffic in found[1:]] == [0, 1, 0, 0, 1, 0]
        assert [traffic.copies + traffic.strangers for traffic in found[1:]] == [[]] * 6
        task.eval()
        with torch.no_grad():  # learners ask whether they have changed
            found = second_step(task, lambda task: task.validation_step(batch, 0))
        assert len(found) <= isinstance(task, PromptLearning), found


HEADS = (
    vp.LinearSegmentation(layers=4),
    vp.SETR(),
    vp.Segmenter(),
    vp.DPT(),
    vp.UPerNet(),
    vp.PMT(depth=2),
    vp.EoMT(depth=1),
)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_heads_for_masks(head):
    maps = head.number_of_maps or 4
    through_blocks = isinstance(head, vp.EoMT)
    module = vp.DensePredictor(vit(), head, 3, vp.LoRA(rank=2)) if through_blocks else head.make(8, maps, 3)
    with no_values():
        inputs = there(torch.empty(2, 3, 32, 32) if through_blocks else torch.empty(2, maps, 8, 4, 6))
        assert second_step(moved(module).train(), lambda module: module(inputs)) == []


# What the walk must not overlook


class Sin(torch.nn.Module):
    """Does at each block what no training step should."""

    tokenwise = True

    def __init__(self, sin):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.kept = torch.arange(1)
        self.sin = sin

    def forward(self, x):
        """Map tokens (batch, tokens, width) to the same shape."""
        return getattr(self, self.sin)(x) * self.scale

    def asks_for_a_number(self, x):
        return x if x.abs().max() < 1e6 else x * 0

    def asks_for_an_item(self, x):
        return x * (1 if x[0, 0, 0].item() else 0)

    def indexes_with_a_list(self, x):
        return x[[*range(len(x))]]

    def makes_a_tensor(self, x):
        return x * torch.tensor([1.0], device=x.device)

    def keeps_an_index_on_the_host(self, x):
        return torch.cat([x[self.kept], x[1:]])

    def writes_a_number(self, x):
        x = x.clone()
        x[torch.arange(1, device=x.device)] = 0
        return x

    def moves_to_the_host(self, x):
        return x + x.cpu().mean().to(x.device)

    def computes_on_the_host(self, x):
        return x * (torch.ones(3) * 2).sum().to(x.device)


SINS = [name for name in vars(Sin) if "_" in name.strip("_") and not name.startswith("_")]


@pytest.mark.parametrize("sin", SINS)
def test_the_walk_sees(sin):
    model = vp.attach(vit(), vp.Adapter(bottleneck=4))
    site = model.blocks[0].sites.acting
    site["stream_in"] = (Sin(sin),)
    with no_values():
        inputs = there(torch.empty(2, 3, 32, 32))
        assert second_step(moved(model), lambda model: model(inputs)) != []


@pytest.mark.parametrize("shape", ["nonzero", "masked"])
def test_a_shape_that_depends_on_values_is_refused(shape):
    with no_values(), Traffic():
        x = torch.empty(3, device="cuda")
        operation = {"nonzero": x.nonzero, "masked": lambda: x[x > 0]}[shape]
        with pytest.raises(DynamicOutputShapeException):
            operation()


def test_a_tensor_of_the_host_among_those_of_the_device_is_refused():
    with no_values(), Traffic(), pytest.raises(RuntimeError, match="same device"):
        torch.empty(3, device="cuda") + torch.empty(3)


def test_every_method_is_walked():
    from visionpeft import methods

    walked = {type(case.method) for case in [*CASES, *VIDEO_CASES]}
    assert walked == {getattr(methods, name) for name in methods.__all__} - {Method}


def test_every_head_is_walked():
    from visionpeft import heads

    # Not those of torchvision's detectors, which choose boxes by numbers that have come back from the device.
    of_masks = {name for name in heads.__all__ if not issubclass(getattr(heads, name), heads.DetectionHead)}
    assert {type(head).__name__ for head in HEADS} == of_masks - {"DenseHead"}
