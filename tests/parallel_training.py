"""Run by the test in two processes: three steps on a tiny ViT, alone, replicated (DDP) and sharded (FSDP2)."""

import dataclasses
from datetime import timedelta

import torch
import torch.distributed as dist
from conftest import CASES, randomise
from reference.hosts import HOSTS
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import visionpeft as vp
from visionpeft.adapters import gradient_masks

NAMES = ("vpt_deep", "lora_all", "ssf", "adapt_former", "prefix", "bit_fit", "dora", "ia3")
KINDS = ("alone", "ddp", "fsdp")
STEPS, BATCH = 3, 4
HOST = next(host for host in HOSTS if host.name == "vit_cls")


def build(case):
    """A ViT with a method whose tensors are off their initial values; dropout would draw other rows in each process."""
    torch.manual_seed(0)
    without_dropout = {"dropout": 0.0} if hasattr(case.method, "dropout") else {}
    model = vp.attach(HOST.build(torch.float64), dataclasses.replace(case.method, **without_dropout))
    randomise(model.peft["default"])
    return model.train()


def arrange(model, kind):
    """The model as it is called: itself, replicated, or sharded per block after attaching."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(case, kind, rank, processes):
    """Losses of the whole batch, the logits after the last step, and the adapter's tensors."""
    model = build(case)
    before = frozen(model)
    arranged = arrange(model, kind)
    optimiser = torch.optim.SGD(vp.trainable_parameters(model), lr=0.05, momentum=0.9)
    mine = slice(0, BATCH) if kind == "alone" else slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    losses = []
    for step in range(STEPS):
        images, labels = HOST.inputs(BATCH, torch.float64, step), torch.arange(BATCH) % 5
        loss = torch.nn.functional.cross_entropy(arranged(images[mine]), labels[mine])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        mean = loss.detach().clone()
        if kind != "alone":
            dist.all_reduce(mean)
            mean /= processes
        losses.append(mean)
    with torch.no_grad():
        logits = arranged.eval()(HOST.inputs(BATCH, torch.float64, 9))
    after = frozen(model)
    unchanged = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    adapter = {name: whole(value) for name, value in model.peft["default"].state_dict().items()}
    if kind == "fsdp":
        gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            twin = build(case).eval()
            twin.load_state_dict(gathered)
            with torch.no_grad():
                torch.testing.assert_close(twin(HOST.inputs(BATCH, torch.float64, 9)), logits)
    return {"losses": torch.stack(losses), "logits": logits, "frozen": torch.tensor(unchanged)} | adapter


def frozen(model):
    """The backbone's parameters."""
    return {name: whole(value) for name, value in model.named_parameters() if not value.requires_grad}


def whole(value):
    """A tensor with the parts of all processes."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def refusals():
    """What a sharded model says when its adapters are to be changed."""
    model = build(next(case for case in CASES if case.name == "lora_all"))
    arrange(model, "fsdp")
    said = []
    for act in (vp.disable, vp.merge, vp.detach, lambda model: vp.attach(model, vp.VPT(num_tokens=2), "more")):
        try:
            act(model)
        except vp.UnsupportedError as error:
            said.append(str(error))
    model(HOST.inputs(2, torch.float64))
    return said


def child_tuning(kind, rank, processes, common=True):
    """The trained tensors after steps of Child-Tuning F, with another state of the generator in each process."""
    torch.manual_seed(0)
    model = vp.attach(HOST.build(torch.float64), vp.ChildTuning("F", share=0.5)).train()
    arranged = arrange(model, kind)
    optimiser = torch.optim.SGD(vp.trainable_parameters(model), lr=0.05, momentum=0.9)
    mine = slice(0, BATCH) if kind == "alone" else slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    torch.manual_seed(rank)
    agreed = gradient_masks._common_seed
    if not common:  # as each process would draw for itself
        gradient_masks._common_seed = lambda device: int(torch.randint(2**62, (1,)))
    for step in range(STEPS):
        images, labels = HOST.inputs(BATCH, torch.float64, step), torch.arange(BATCH) % 5
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(arranged(images[mine]), labels[mine]).backward()
        optimiser.step()
    gradient_masks._common_seed = agreed
    kept = torch.tensor([[(g != 0).sum(), g.numel()] for g in map(local, vp.trainable_parameters(model))]).sum(0)
    tensors = {name: whole(value) for name, value in model.peft["default"].state_dict().items()}
    return tensors | {"share": kept[0] / kept[1]}


def local(parameter):
    """The gradient of a parameter that this process holds."""
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def in_one_of(processes, rank, folder):
    """Train every method in every way and write what came out; in the folder the processes meet."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=120),
    )
    cases = [case for case in CASES if case.name in NAMES]
    results = {(case.name, kind): train(case, kind, rank, processes) for case in cases for kind in KINDS}
    child = {kind: child_tuning(kind, rank, processes) for kind in KINDS}
    child["apart"] = child_tuning("ddp", rank, processes, common=False)
    torch.save({"results": results, "child": child, "refusals": refusals()}, folder / f"{rank}.pt")
    dist.destroy_process_group()
    return 0
