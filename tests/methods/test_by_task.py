"""Methods that act on an image by its task: mixed batches, merging for a task, and what is refused."""

import threading

import pytest
import torch
from conftest import distance, randomise
from reference.arithmetic import softmax
from reference.hosts import HOSTS

import visionpeft as vp
from visionpeft.errors import ConfigurationError, UnsupportedError

HOST = next(host for host in HOSTS if host.name == "vit_cls")
TASKS = ("one", "two", "three")
MIXED = ["two", "one", "three", "two"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    method = vp.MOELoRA(experts=2, rank=4, alpha=6, dropout=0.0, tasks=TASKS)
    made = vp.attach(HOST.build(torch.float64), method).eval()
    randomise(made.peft["default"])
    return made


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, *HOST.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def for_task(model, images, task):
    with vp.of_tasks(task):
        return model(images)


def test_each_image_is_changed_as_its_task_says(model, images):
    """A mixed batch has the rows of the tasks alone, and these are apart; names may come in any order."""
    alone = {task: for_task(model, images, task) for task in TASKS}
    rows = torch.stack([alone[task][index] for index, task in enumerate(MIXED)])
    assert distance(for_task(model, images, MIXED), rows) < 1e-13
    assert min(distance(alone[a], alone[b]) for a, b in (("one", "two"), ("one", "three"), ("two", "three"))) > 1e-3


def test_the_change_of_a_layer_by_the_formula(model):
    """y + alpha / r sum_e softmax(G t)_e B_e A_e x for the task of each of two images with five tokens."""
    module = next(placement.module for _, placement in model.peft["default"].placements)
    x, y = (torch.randn(2, 5, width, dtype=torch.float64) for width in (module.A.shape[2], module.B.shape[1]))
    with torch.no_grad(), vp.of_tasks(["three", "one"]):
        found = module(x, y, None, None)
    wanted = y.clone()
    for row, task in enumerate((2, 0)):
        share = softmax(module.router.weight @ module.embedding[task])
        for e in range(2):
            wanted[row] += 6 / 4 * share[e] * x[row] @ module.A[e].T @ module.B[e].T
    assert distance(found, wanted) < 1e-13
    with torch.no_grad(), vp.of_tasks(["one", "three"]):
        assert distance(module(x, y, None, None), wanted) > 1e-3


@pytest.mark.parametrize("task", TASKS[:2])
def test_it_is_merged_for_one_task(model, images, task):
    wanted = for_task(model, images, task)
    with vp.of_tasks(task):
        vp.merge(model)
    try:
        assert not hasattr(model, "peft")
        with torch.no_grad():
            assert distance(model(images), wanted) < 1e-12
    finally:
        vp.unmerge(model)
    assert torch.equal(for_task(model, images, task), wanted)


def test_a_task_is_known_in_its_own_thread_alone(model, images):
    found = {}

    def other():
        try:
            model(images)
        except ConfigurationError as error:
            found["error"] = str(error)

    with vp.of_tasks("one"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found["error"].startswith("MOELoRA acts by the task of an image (one, two, three), which is not known here")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("tow", "was not trained for a task 'tow'; did you mean two"),
        (["one", "two", "one"], "tasks are named for 3 images, but the batch has 4"),
        ([], "of_tasks needs the name of a task"),
    ],
)
def test_tasks_that_do_not_fit(model, images, tasks, message):
    with pytest.raises(ConfigurationError, match=message):
        for_task(model, images, tasks)


def test_what_needs_one_task_is_refused(model, images):
    before = for_task(model, images, "two")
    with vp.of_tasks(MIXED), pytest.raises(ConfigurationError, match="merged as it is for one task"):
        vp.merge(model)
    with pytest.raises(ConfigurationError, match="which is not known here"):
        vp.merge(model)
    refused = pytest.raises(UnsupportedError, match="by the task of an image, which a route does not hand on")
    with refused, vp.route(model, ["default"] * 4):
        pass
    assert torch.equal(for_task(model, images, "two"), before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 12}, "rank 12 must be a positive multiple of the 8 experts"),
        ({"experts": 0}, "experts must be a positive integer"),
        ({"tasks": ("a", "a")}, "one name twice"),
        ({"tasks": ("a/b",)}, "letters, digits"),
    ],
)
def test_fields(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        vp.MOELoRA(**fields)


# MoA: one LoRA of several for an image


@pytest.fixture(scope="module")
def routed():
    """A model with MoA over two LoRAs, which stay attached, and no dropout or other chance."""
    made = HOST.build(torch.float64)
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        vp.activate(made, []) if seed else None
        vp.attach(made, vp.LoRA(rank=2 + seed, alpha=6), name, head=False)
        randomise(made.peft[name])
    vp.activate(made, [])
    torch.manual_seed(2)
    vp.attach(made, vp.MoA(adapters=("a", "b"), tasks=("x", "y")), "over", head=False)
    return made


def layers(model):
    return [placement.module for _, placement in model.peft["over"].placements]


@torch.no_grad()
def alone(model, images, name):
    with vp.use(model, name):
        return model.eval()(images)


class Certain(torch.nn.Module):
    """Stands for a router that always says the same."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return torch.eye(2, dtype=x.dtype)[self.number].expand(len(x), 2)


def test_routers_that_are_right_give_the_adapter_of_the_task(routed, images, monkeypatch):
    """In use the router decides, of an image as a whole; while training the task does, whatever the router says."""
    wanted = {name: alone(routed, images, name) for name in ("a", "b")}
    assert distance(wanted["a"], wanted["b"]) > 1e-3
    vp.activate(routed, "over")
    with torch.no_grad():
        with vp.of_tasks(["y", "x", "x", "y"]):
            found = routed.train()(images)
        rows = [wanted["b"][0], wanted["a"][1], wanted["a"][2], wanted["b"][3]]
        assert distance(found, torch.stack(rows)) < 1e-13
        for number, name in enumerate(("a", "b")):
            for module in layers(routed):
                monkeypatch.setitem(module._modules, "router", Certain(number))
            assert distance(routed.eval()(images), wanted[name]) < 1e-13


def test_the_loss_of_the_routers(routed, images):
    """The mean over layers and images of -log softmax(G mean token)[task], times the factor."""
    vp.activate(routed, "over")
    seen = []
    hooks = [
        each.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0].detach(), module.router.weight)))
        for each in layers(routed)
    ]
    with torch.no_grad():
        for module in layers(routed):
            module.router.weight.normal_()
    with vp.of_tasks(["y", "x", "x", "y"]):
        routed.train()(images)
    for hook in hooks:
        hook.remove()
    tasks = (1, 0, 0, 1)
    losses = []
    for x, weight in seen:
        shares = softmax(x.mean(dim=1) @ weight.T)
        losses += [-shares[row, task].log() for row, task in enumerate(tasks)]
    found = vp.penalty(routed)
    assert torch.allclose(found, torch.stack(losses).mean(), rtol=1e-12)
    (gradient,) = torch.autograd.grad(found, [layers(routed)[0].router.weight])
    assert gradient.abs().max() > 1e-6
    with pytest.raises(ConfigurationError, match="routers learn from the tasks of images"):
        vp.penalty(routed)
    routed.train()(images)  # the task is not known
    with pytest.raises(ConfigurationError, match="routers learn from the tasks of images"):
        vp.penalty(routed)


def test_there_is_a_task_for_each_adapter(routed):
    assert routed.peft["over"].methods[0].tasks == ("x", "y")
    with pytest.raises(ConfigurationError, match=r"there are 2 adapters for 3 tasks \(x, y, z\)"):
        vp.MoA(adapters=("a", "b"), tasks=("x", "y", "z"))
    with pytest.raises(ConfigurationError, match="routing must not be negative"):
        vp.MoA(routing=-1.0)


# HyperFormer: one network generates the adapters of all tasks


def test_the_adapters_of_tasks_share_a_network(images):
    """Mixed rows are those of the tasks alone; a row of another place has another adapter from the same network."""
    torch.manual_seed(0)
    model = vp.attach(HOST.build(torch.float64), vp.HyperFormer(bottleneck=2, embedding=4, tasks=TASKS)).eval()
    randomise(model.peft["default"])
    alone = {task: for_task(model, images, task) for task in TASKS}
    rows = torch.stack([alone[task][index] for index, task in enumerate(MIXED)])
    assert distance(for_task(model, images, MIXED), rows) < 1e-13
    assert distance(alone["one"], alone["two"]) > 1e-3
    with pytest.raises(ConfigurationError, match="HyperFormer acts by the task of an image"):
        model(images)
    with pytest.raises(ConfigurationError, match="embedding must be a positive integer"):
        vp.HyperFormer(embedding=0)
