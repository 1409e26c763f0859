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
