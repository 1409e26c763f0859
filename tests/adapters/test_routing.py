"""Rows of a batch through several adapters: as data of a call, together where they are alike, and exactly.

The right values are those of each adapter alone, in float64, row by row.
"""

import copy
import pickle
import threading
import types
from _thread import start_new_thread

import pytest
import torch
from conftest import CASES, adapter_tensors, anatomy, distance, randomise
from reference.hosts import HOSTS
from test_access import in_threads

import visionpeft as vp
from visionpeft.adapters import routes, switch, together
from visionpeft.sites import routing

HOST = next(host for host in HOSTS if host.name == "vit_cls")
IMAGES = HOST.inputs(4).double()

# Their change of a weight is as large as the weight, or they are the model's own parameters, or draw or choose for each
# token, or carry something from block to block or to the head: each by itself.
ALONE = (
    *("DoRA", "PaFi", "FishMask", "SPT", "HiRA", "MiSS", "OFT", "BOFT", "RandLoRA", "FourierFT", "WaveFT", "HiWi"),
    *("LoRADropout", "AdaMix", "MixLoRA", "MoA", "HyperFormer", "DTL", "LST", "VQT", "NeuroAda"),
    *("BinaryMask", "CoDA", "SAID"),
)


def model_with(**methods):
    """A model with adapters of these names, all different, of which the last one is active."""
    model = HOST.build(torch.float64)
    for seed, (name, method) in enumerate(methods.items()):
        if seed:
            vp.activate(model, [])  # some do not act beside each other
        vp.attach(model, method, name)
        randomise(model.peft[name], seed)
        vp.activate(model, name)
    return model.eval()


def row_by_row(model, names, images=IMAGES):
    """What each adapter alone gives for its row."""
    rows = []
    for row, name in enumerate(names):
        with vp.use(model, name):
            rows.append(model(images)[row])
    return torch.stack(rows)


def routed(model, names, images=IMAGES):
    with vp.route(model, names):
        return model(images)


def groups(model, names):
    """How many groups of adapters act at each site."""
    with vp.route(model, names):
        found = model.peft.routing.current().route
        return {len(found.groups(key)) for adapter in found.adapters.values() for key in adapter.chains}


ROUTABLE = [
    case
    for case in CASES
    if type(case.method).__name__ not in ("LayerNormTuning", "FullFineTuning", "LastBlocks", "ChildTuning", "BitFit")
    and not case.method.pending
    and not case.method.stages_after
    and not case.sources  # those over adapters of their own are routed in the matrix
]


@pytest.mark.parametrize("case", ROUTABLE, ids=repr)
def test_alike_adapters_act_together(case):
    """In one group at every site, exactly, with the gradients of each alone; on all rows, on some, with one each."""
    model = model_with(a=case.method, b=case.method)
    assert groups(model, ["a", "b", "b", "a"]) <= ({1, 2} if type(case.method).__name__ in ALONE else {1})
    lengthens = bool(model.peft.routing.routes.adapters["a", True].inserted)
    for names in (["b", "a", "a", "b"], ["b", "a"], ["a", "a"] if lengthens else ["a", None, "b"]):
        images = IMAGES[: len(names)]
        with torch.no_grad():
            assert distance(routed(model, names, images), row_by_row(model, names, images)) < 1e-12
    wanted = gradients_row_by_row(model, names, images)
    with vp.route(model, names):
        parameters = trained(model)
        found = torch.autograd.grad(model(images).square().sum(), [*parameters.values()], allow_unused=True)
    for name, own in zip(parameters, found, strict=True):
        if name not in wanted:
            assert own is None or not own.any(), name
        else:
            assert (own - wanted[name]).norm() < 1e-10 * (1 + wanted[name].norm()), name


def trained(model):
    return {name: parameter for name, parameter in model.peft.named_parameters() if parameter.requires_grad}


def gradients_row_by_row(model, names, images):
    """The gradients of the sum of squares, of what each adapter alone gives for its row."""
    found = {}
    for row, adapter in enumerate(names):
        with vp.use(model, adapter):
            parameters, loss = trained(model), model(images)[row].square().sum()
            if parameters:
                gradients = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        found[name] = found.get(name, 0) + gradient
    return found


def test_ranks_may_differ():
    """Zeros are added where a rank or a bottleneck is smaller, and scales are each adapter's own."""
    names = ["a", "b", None, "a"]
    for methods in (
        {"a": vp.LoRA(rank=1, alpha=4.0), "b": vp.LoRA(rank=3), "c": vp.LoRA(rank=2, targets=("q", "proj", "fc2"))},
        {"a": vp.AdaptFormer(bottleneck=2, scale=0.3, dropout=0.0), "b": vp.AdaptFormer(bottleneck=5, dropout=0.0)},
    ):
        model = model_with(**methods)
        assert groups(model, [*methods] * 2) == {1}
        for names in (["a", "b", None, "a"], ["b", "a", "b", "b"], [[*methods][-1], "a", "b", None]):
            with torch.no_grad():
                assert distance(routed(model, names), row_by_row(model, names)) < 1e-12
            assert distance(routed(model, names), row_by_row(model, names)) < 1e-12


def test_prompts_are_tokens_for_all_rows_or_for_none():
    """Keys and values alone, unless something mixes the tokens of one of the rows."""
    model = model_with(a=vp.VPT(3), b=[vp.VPT(3), vp.SSF()], c=[vp.VPT(3), vp.Convpass(2)])
    for names in (["a", "b", "b", "a"], ["a", "c", "b", "a"]):
        with torch.no_grad():
            assert distance(routed(model, names), row_by_row(model, names)) < 1e-12
        with vp.route(model, names):
            keys = [block.sites.key_prompts is not None for block in model.blocks]
        assert keys == [True] * 3 if "c" not in names else keys == [False] * 3


def test_heads_act_together(monkeypatch):
    model = model_with(a=vp.LinearProbe(), b=vp.LinearProbe(), c=vp.LoRA(rank=2))
    names, mapped = ["c", "a", "b", "a"], []
    act = together.Together.act
    monkeypatch.setattr(together.Together, "act", lambda *each: mapped.append(each) or act(*each))
    assert distance(routed(model, names), row_by_row(model, names)) < 1e-12
    assert len([each for each in mapped if isinstance(each[0].template, torch.nn.Linear)]) == 1


def write(model):
    with torch.no_grad():
        model.peft["a"].get_parameter("lora.visual.0.q.A").add_(1)


def load(model):
    state = {name: tensor + 1 for name, tensor in adapter_tensors(model, "a").items()}
    model.peft["a"].load_state_dict(state, assign=True)


def exchange(model):
    part = model.peft["a"].get_submodule("lora.visual.1.v")
    part.B = torch.nn.Parameter(part.B + 1)


def exchange_memory(model):
    for parameter in model.peft["a"].parameters():
        parameter.data = parameter.data + 1


def attach_another(model):
    vp.detach(model, "a")
    vp.attach(model, vp.LoRA(rank=2), "a")
    randomise(model.peft["a"], 7)


def round_off(model):
    model.bfloat16().double()


def write_uncounted(model):
    model.peft["a"].get_parameter("lora.visual.0.q.A").data.add_(1)


def train_uncounted(model):
    """A step of one of PyTorch's fused optimisers, none of which counts the versions of what it writes to."""
    parameters = [*model.peft["a"].parameters()]
    with torch.enable_grad(), vp.route(model, ["a", "b"]):
        model(IMAGES[:2]).square().sum().backward()
    versions = [parameter._version for parameter in parameters]
    torch.optim.AdamW(parameters, lr=0.1, fused=True).step()
    assert versions == [parameter._version for parameter in parameters]


CHANGES = (write, load, exchange, exchange_memory, attach_another, round_off, write_uncounted, train_uncounted)


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_stacked_follows_the_adapters(change):
    model, names = model_with(a=vp.LoRA(rank=2), b=vp.LoRA(rank=2)), ["a", "b", "b", "a"]
    with torch.no_grad():
        before = routed(model, names)
        assert torch.equal(routed(model, names), before)
        change(model)
        found = routed(model, names)
        assert distance(found, row_by_row(model, names)) < 1e-12
        assert distance(found, before) > 1e-6


WITHIN = (write, load, exchange_memory)  # what can be done to adapters of a route that is open


@pytest.mark.parametrize("change", WITHIN)
def test_what_was_stacked_follows_the_adapters_within_a_route(change):
    model, names = model_with(a=vp.LoRA(rank=2), b=vp.LoRA(rank=2)), ["a", "b", "b", "a"]
    with torch.no_grad(), vp.route(model, names):
        before = model(IMAGES)
        change(model)
        found = model(IMAGES)
    assert distance(found, row_by_row(model, names)) < 1e-12
    assert distance(found, before) > 1e-6


def test_without_versions_it_would_be_stale(monkeypatch):
    """Negative control of the test before this one."""
    model, names = model_with(a=vp.LoRA(rank=2), b=vp.LoRA(rank=2)), ["a", "b", "b", "a"]
    monkeypatch.setattr(together, "_same", lambda *_: True)
    with torch.no_grad(), vp.route(model, names):
        before = model(IMAGES)
        write(model)
        assert torch.equal(model(IMAGES), before)
    assert distance(before, row_by_row(model, names)) > 1e-6


def test_kept_beyond_its_route_it_would_be_stale(monkeypatch):
    """Negative control of the changes that count no versions."""
    model, names = model_with(a=vp.LoRA(rank=2), b=vp.LoRA(rank=2)), ["a", "b", "b", "a"]
    monkeypatch.setattr(together.Together, "let_go", lambda _: None)
    with torch.no_grad():
        before = routed(model, names)
        write_uncounted(model)
        assert torch.equal(routed(model, names), before)
        assert distance(before, row_by_row(model, names)) > 1e-6


def test_training_within_an_open_route():
    """Measured, trained by an optimiser that counts no versions, and measured again."""
    model, names = model_with(a=vp.LoRA(rank=2), b=vp.LoRA(rank=2)), ["a", "b", "b", "a"]
    with vp.route(model, names):
        parameters = [parameter for name in ("a", "b") for parameter in model.peft[name].parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
        for _ in range(2):
            with torch.no_grad():
                measured = model(IMAGES)
            logits = model(IMAGES)
            assert distance(measured, logits) < 1e-12
            logits.square().sum().backward()
            optimizer.step()
    assert distance(measured, row_by_row(model, names)) > 1e-6


def test_it_is_stacked_once_in_a_route(monkeypatch):
    model, names, made = model_with(a=vp.LoRA(rank=2), b=vp.LoRA(rank=2)), ["a", "b", "b", "a"], []
    stack = together.Together._stack
    monkeypatch.setattr(together.Together, "_stack", lambda *each: made.append(each) or stack(*each))
    with torch.no_grad(), vp.route(model, names):
        model(IMAGES)
        once = len(made)
        model(IMAGES)
    assert once == len(made) == 2 * len(model.blocks) + 1  # q and v of each block, and the head
    routed(model, names)  # whose gradients each forward computes
    assert len(made) == 2 * once


def test_few_routes_are_kept():
    """The rows of the last ones, and nothing stacked."""
    model = model_with(a=vp.LoRA(rank=1), b=vp.LoRA(rank=1))
    with torch.no_grad():
        for number in range(routes.MOST_KEPT + 5):
            routed(model, [*f"{number:07b}".replace("0", "a").replace("1", "b")], HOST.inputs(7).double())
    kept = model.peft.routing.routes
    assert len(kept.routes) == routes.MOST_KEPT
    assert not any(t._kept for each in kept.routes.values() for g in each._groups.values() for t in g[0].together)


def test_hooks_see_each_adapter():
    model, names, seen = (
        model_with(a=vp.AdaptFormer(dropout=0.0), b=vp.AdaptFormer(dropout=0.0)),
        ["a", "b", "b", "a"],
        [],
    )
    right = row_by_row(model, names)
    routed(model, names)
    part = model.peft["b"].get_submodule("adapt_former.visual.1.stream_mid")
    part.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    assert distance(routed(model, names), right) < 1e-12
    assert seen == [2]


# As data of a call


def answers_of_threads(model, rounds=15):
    """How many answers of threads with routes of their own, and of one without, are right, of how many."""
    routes = [["a", "b", "b", "a"], ["b", "b", "a", "c"], None]
    with torch.no_grad():
        expected = [row_by_row(model, names or ["c"] * 4) for names in routes]
    together, right, failed = threading.Barrier(len(routes), timeout=60), [], []

    def work(names, wanted):
        try:
            with torch.no_grad():
                for _ in range(rounds):
                    if names is None:
                        together.wait()
                        right.append(distance(model(IMAGES), wanted) < 1e-12)
                        together.wait()
                        continue
                    with vp.route(model, names):
                        together.wait()  # all of them are within their routes
                        right.append(distance(model(IMAGES), wanted) < 1e-12)
                        together.wait()
        except Exception as error:
            failed.append(error)
            together.abort()

    in_threads(*(lambda each=each: work(*each) for each in zip(routes, expected, strict=True)))
    return sum(right), rounds * len(routes), failed


def test_each_thread_has_its_own_route():
    """At the same time, and a thread outside of any computes with the active adapter."""
    right, every, failed = answers_of_threads(model_with(a=vp.LoRA(rank=2), b=vp.SSF(), c=vp.LoRA(rank=2)))
    assert not failed
    assert right == every


def test_a_route_that_all_threads_see_is_noticed(monkeypatch):
    """The negative control: as if a route were the model's and not the context's."""
    shared = types.SimpleNamespace(value=())
    shared.get = lambda: shared.value

    def put(value):
        before, shared.value = shared.value, value
        return before

    shared.set, shared.reset = put, put
    monkeypatch.setattr(routing, "OPEN", shared)
    monkeypatch.setattr(switch, "OPEN", shared)
    right, every, failed = answers_of_threads(model_with(a=vp.LoRA(rank=2), b=vp.SSF(), c=vp.LoRA(rank=2)), rounds=5)
    assert failed or right < every


def test_opening_a_route_changes_nothing():
    """No class and no attribute of a module, once the model is ready for these adapters."""
    model = model_with(a=vp.LoRA(rank=2), b=vp.LoRA(rank=2))
    active = model(IMAGES)
    with torch.no_grad():
        routed(model, ["a", "b", "b", "a"])
        before = [(type(module), dict(vars(module))) for module in model.modules()]
        for names in (["b", "b"], ["a", None, "b", "b"]):
            with vp.route(model, names):
                assert [(type(module), dict(vars(module))) for module in model.modules()] == before
        assert [(type(module), dict(vars(module))) for module in model.modules()] == before
    assert torch.equal(model(IMAGES), active)
    with vp.use(model, None):
        assert anatomy(model) == anatomy(vp.disable(copy.deepcopy(model)))


def test_attaching_and_detaching_beside_a_route():
    """Whoever changes the model waits for the forward in a route, and the next route is as exact."""
    model, names = model_with(a=vp.LoRA(rank=2), b=vp.LoRA(rank=2)), ["a", "b", "b", "a"]
    with torch.no_grad():
        expected = row_by_row(model, names)
    right, failed, stop = [], [], threading.Event()

    def serve():
        try:
            with torch.no_grad():
                while not stop.is_set():
                    right.append(distance(routed(model, names), expected) < 1e-12)
        except Exception as error:
            failed.append(error)

    def change():
        try:
            for index in range(8):
                vp.attach(model, [vp.SSF(), vp.LoRA(rank=1), vp.Adapter(bottleneck=2)][index % 3], "new", head=False)
                vp.detach(model, "new")
        except Exception as error:
            failed.append(error)
        stop.set()

    in_threads(serve, serve, change)
    assert not failed
    assert len(right) > 2
    assert all(right)


def test_changes_within_a_route():
    """What changes the model within a route leaves the route what it was; an adapter it names cannot be taken off."""
    model, names = model_with(a=vp.LoRA(rank=2), b=vp.LoRA(rank=2)), ["a", "b", "b", "a"]
    expected, alone = row_by_row(model, names), row_by_row(model, ["a"] * 4)
    with vp.route(model, names):
        with vp.use(model, "a"):
            assert distance(model(IMAGES), alone) < 1e-12
        assert distance(model(IMAGES), expected) < 1e-12
        vp.attach(model, vp.SSF(), "c")
        assert distance(model(IMAGES), expected) < 1e-12
        vp.activate(model, "a")
        assert distance(model(IMAGES), expected) < 1e-12
        with pytest.raises(vp.ConfigurationError, match="named by a route that is open"):
            vp.detach(model, "b")
        vp.detach(model, "c")
        assert distance(model(IMAGES), expected) < 1e-12
    assert distance(model(IMAGES), alone) < 1e-12


@pytest.mark.parametrize("made", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_not_routed(made):
    model, names = model_with(a=vp.LoRA(rank=2), b=vp.VPT(num_tokens=2)), ["a"] * 4
    active = model(IMAGES)
    with vp.route(model, names):
        twin = made(model)
        assert torch.equal(twin(IMAGES), active)
    assert torch.equal(twin(IMAGES), active)
    assert distance(routed(twin, names), row_by_row(model, names)) < 1e-12
    assert anatomy(vp.detach(twin)) == anatomy(HOST.build(torch.float64).eval())


def gradients_in_thread_of_pytorch(model, names, recompute):
    """Gradients from a backward pass in a thread without context, as PyTorch has for each GPU."""
    vp.economise(model, recompute=recompute)
    done, found = threading.Event(), {}

    def backward(loss):
        try:
            parameters = [*vars_of(model).values()]
            found["gradients"] = torch.autograd.grad(loss, parameters)
        except Exception as error:
            found["error"] = error
        done.set()

    with vp.route(model, names):
        start_new_thread(backward, (model(IMAGES).square().sum(),))
        assert done.wait(60)
    return found


def vars_of(model):
    return {name: p for name, p in model.peft.named_parameters() if ".q." in name}


@pytest.mark.parametrize("recompute", ["block", "mlp"])
def test_activations_are_computed_again_by_the_route(recompute):
    model, names = model_with(a=vp.LoRA(rank=2), b=vp.LoRA(rank=2)), ["a", "b", "b", "a"]
    with vp.route(model, names):
        wanted = torch.autograd.grad(model(IMAGES).square().sum(), [*vars_of(model).values()])
    found = gradients_in_thread_of_pytorch(model, names, recompute)
    for own, right in zip(found["gradients"], wanted, strict=True):
        assert distance(own, right) < 1e-10


def test_without_a_route_they_would_be_others(monkeypatch):
    """Negative control of the test before this one."""
    model, names = model_with(a=vp.LoRA(rank=2), b=vp.LoRA(rank=2)), ["a", "b", "b", "a"]
    with vp.route(model, names):
        wanted = torch.autograd.grad(model(IMAGES).square().sum(), [*vars_of(model).values()])
    monkeypatch.setattr(routing.Routing, "_of_backward", lambda self: None)
    found = gradients_in_thread_of_pytorch(model, names, "block")
    assert "error" in found or distance(found["gradients"][0], wanted[0]) > 1e-6


def test_compiled_models_follow_the_route():
    """In one graph, with the adapters apart."""
    model = model_with(a=vp.LoRA(rank=2), b=vp.AdaptFormer(bottleneck=2, dropout=0.0))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        with vp.route(model, ["a", "b", None, "a"]):
            assert distance(compiled(IMAGES), model(IMAGES)) < 1e-12
        assert distance(compiled(IMAGES), model(IMAGES)) < 1e-12
