"""Every architecture of timm: with sited blocks, or with layer sites that are exact and live, or refused by name.

Each architecture is built without storage and described. Of those with layer sites only, the smallest of each set of
kinds of modules (as `tests/backbones/test_walk.py` sorts them) is built with random weights, in float64 and with every
layer scale and norm away from zero, and examined on images of 64 pixels, or of its own size if it takes no others.
Sets whose smallest has more than 150 million parameters are not examined, as it is held four times. Examined is that

- LoRA on all linear layers and convolutions, BitFit and norm tuning start as the identity, and after a step compute
  what timm's own model computes with its weights changed by hand: W + B A, b + shift, the trained norms;
- SSF likewise: diag(scale) W and scale b + shift;
- every trained tensor gets a gradient, but biases that change nothing in timm's own model either;
- passes in training mode write to no statistics, and detaching leaves the model bit for bit.

    python benchmarks/layer_sites.py --output results    # goes on after a kill, family by family
    python benchmarks/layer_sites.py --architectures resnet18 regnety_002
"""

import argparse
import copy
import csv
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import visionpeft as vp
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import UserError

SMALL = 64  # pixels of the images, where an architecture takes them
DEAD = "no gradient for"
LARGEST = 150_000_000  # parameters of what is examined, which is held four times in float64
TOLERANCE = 1e-8  # relative, in float64; some norms of timm compute in float32


def without_storage(name: str) -> nn.Module:
    """The architecture on the meta device."""
    with torch.device("meta"):
        return timm.create_model(name, num_classes=3).eval()


def kinds_of(model: nn.Module) -> frozenset:
    """The kinds of modules in a model: class, what its layers are set to, own parameters and classes of its children.

    Of numbers only whether they are 1 counts, as kernel size, stride and groups decide what is computed.
    """
    kinds = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.Identity):
            continue
        own = tuple(sorted(name for name, p in module._parameters.items() if p is not None))
        children = {
            (name, type(child).__qualname__)
            for name, child in module.named_children()
            if not isinstance(child, nn.ModuleList | nn.Sequential)
        }
        settings = (getattr(module, "groups", 1) == 1, getattr(module, "kernel_size", 1) in (1, (1, 1)))
        kinds.add((type(module).__qualname__, own, tuple(sorted(children)), settings))
    return frozenset(kinds)


def lively(name: str, size: int | None, normal: bool, **options) -> tuple[nn.Module, Tensor]:
    """The architecture with random weights in float64, none of which hides what comes after it, and two images.

    With `normal` the statistics of batch normalisations are those of random images, else random. With these, sums over
    many branches grow from block to block until gates after them are all 0 or 1 and pass no gradient; with those, some
    channels hardly vary, and what does not grow here grows there.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).eval()
    shape = model.pretrained_cfg.get("input_size", (3, 224, 224)) if size is None else (3, size, size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 or parameter.numel() == max(parameter.shape):  # scales, shifts, gammas
                parameter.copy_(torch.where(parameter.abs() < 0.1, 0.5, 1.0) * (1 + 0.2 * torch.rand_like(parameter)))
        for parameter in model.parameters():
            if not parameter.any():  # a matrix that starts at zero
                parameter.normal_(0, 0.1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
        counting = [module for module in model.modules() if isinstance(module._buffers.get("running_mean"), Tensor)]
        momenta = [module.momentum for module in counting]
        for module in counting:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.train(normal).momentum = 1.0
        model.double()
        if counting and normal:
            model(torch.randn(4, *shape, dtype=torch.float64))
        for module, momentum in zip(counting, momenta, strict=True):
            module.eval().momentum = momentum
    return model, torch.randn(2, *shape, dtype=torch.float64)


def by_hand(model: nn.Module, adapter: nn.Module) -> nn.Module:
    """timm's own model with its weights changed as the tensors of an adapter say, by the formulas of the papers."""
    changed = copy.deepcopy(model)
    paths = {id(module): path for path, module in model.named_modules()}
    towers = describe(model).towers
    with torch.no_grad():
        for name, trained in adapter.trained_parameters():
            changed.get_parameter(name).copy_(trained)
        for _, placement in adapter.placements:
            layer = towers[placement.tower].layer(placement.block, placement.site)
            values, own = dict(placement.module.named_parameters()), changed.get_submodule(paths[id(layer.owner)])
            if "A" in values:
                own.weight += (values["B"] @ values["A"]).reshape(own.weight.shape)
            elif "scale" in values:
                own.weight *= values["scale"].reshape(-1, *[1] * (own.weight.ndim - 1))
                own.bias.copy_(values["scale"] * own.bias + values["shift"])
            else:
                own.bias += values["shift"]
    return changed


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """All that a model gives, in one row for each image."""
    found = model(images)
    found = found if isinstance(found, tuple | list) else [found]
    return torch.cat([each.flatten(1) for each in found], dim=1)


def distance(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Norm of the difference, relative to the norm of a third tensor."""
    return ((found - expected).norm() / scale.norm().clamp_min(1e-300)).item()


def examine(name: str, size: int | None = None, normal: bool = False, **options) -> str | None:
    """What is wrong with the layer sites of an architecture, or None; at its own image size, or another one.

    `normal` is for `lively`, `options` for `timm.create_model`.
    """
    model, images = lively(name, size, normal, **options)
    groups = {group for _, layer in describe(model).towers["visual"].all_layers() for group in layer.groups}
    targets = tuple(sorted(groups & {"all", "grouped"}))
    with torch.no_grad():
        base = outputs(model, images)
    statistics = {key: value.clone() for key, value in model.named_buffers()}
    stacks = [[vp.LoRA(rank=2, targets=targets), vp.BitFit(), vp.LayerNormTuning()], [vp.SSF(std=0.0)]]
    for methods in stacks if any(p.ndim == 1 for p in model.parameters()) else stacks[:1]:
        vp.attach(model, methods)
        adapter = model.peft["default"]
        with torch.no_grad():
            if not distance(outputs(model, images), base, base) <= TOLERANCE:
                return "not the identity at the start"
            for parameter in adapter.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        found = outputs(model, images)
        parameters = {key: parameter for key, parameter in adapter.named_parameters() if parameter.requires_grad}
        found.square().sum().backward()
        dead = [key for key, p in parameters.items() if p.grad is None or not p.grad.any()]
        if dead and not void(model, adapter, dead, images, base):
            return f"{DEAD} {len(dead)} tensors, such as {dead[0]}"
        heads = {path: copy.deepcopy(adapter.get_submodule(path)) for path in adapter.head_paths}
        with vp.use(model, None):
            changed = by_hand(unadapted(model), adapter)
        for path, head in heads.items():
            changed.set_submodule(path, head)
        with torch.no_grad():
            expected = outputs(changed, images)
            if not distance(found, expected, expected - base) <= TOLERANCE:
                return f"not the model changed by hand: {distance(found, expected, expected - base):.1e}"
            model.train()
            outputs(model, images)
            model.eval()
        vp.detach(model)
        if any(not torch.equal(value, statistics[key]) for key, value in model.named_buffers()):
            return "statistics were written to"
        with torch.no_grad():
            if not torch.equal(outputs(model, images), base):
                return "not the same after detaching"
    return None


def void(model: nn.Module, adapter: nn.Module, dead: list[str], images: Tensor, base: Tensor) -> bool:
    """Whether all of these are changes of a bias or a weight that change nothing in timm's own model either.

    So it is before a softmax over positions, to which the same is then added everywhere (`GlobalContext`), and with the
    queries of all tokens but the class token in the last block, where that is all that is read (MViTv2).
    """
    with vp.use(model, None):
        own = unadapted(model)
        paths = {id(module): path for path, module in model.named_modules()}
        tower = describe(model).towers["visual"]
    changes = {f"{adapter.method_keys[i]}.{p.block}.{p.site}": p for i, p in adapter.placements}
    for key in dead:
        method, _, *place, last = key.split(".")
        placement = changes.get(f"{method}.{place[0] if len(place) > 1 else None}.{place[-1]}")
        if placement is None:
            return False
        layer = own.get_submodule(paths[id(tower.layer(placement.block, placement.site).owner)])
        with torch.no_grad():
            changed = layer.bias if last == "shift" else layer.weight
            changed += torch.randn_like(changed)
    with torch.no_grad():
        return distance(outputs(own, images), base, base) <= TOLERANCE


def unadapted(model: nn.Module) -> nn.Module:
    """A copy of a model without its adapters."""
    peft = model._modules.pop("peft")
    try:
        return copy.deepcopy(model)
    finally:
        model._modules["peft"] = peft


def described(name: str) -> dict:
    """What an architecture is without storage: sited, layers or refused, with its kinds of modules and size."""
    row = {"architecture": name, "family": timm.model_entrypoint(name).__module__.rpartition(".")[2]}
    try:
        model = without_storage(name)
        tower = describe(model).towers["visual"]
    except UserError as error:
        return row | {"verdict": f"refused: {error}"}
    except Exception as error:
        return row | {"verdict": f"not built: {type(error).__name__}: {str(error)[:200]}"}
    row |= {"parameters": sum(p.numel() for p in model.parameters())}
    if tower.layers_only is None:
        return row | {"verdict": "sited blocks"}
    sites = Counter(layer.kind for _, layer in tower.all_layers())
    own = len(tower.unreached)
    return row | {"verdict": "layers", "kinds": kinds_of(model), "blocks": tower.depth, "unreached": own} | sites


def main() -> None:
    """Walk over what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=timm.list_models())
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="which of how many parts of the families")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    by_family = defaultdict(list)
    for name in args.architectures:
        by_family[timm.model_entrypoint(name).__module__].append(name)
    args.output.mkdir(parents=True, exist_ok=True)
    table = args.output / f"layer_sites_{args.part[0]}.csv"
    rows = list(csv.DictReader(table.open())) if table.is_file() else []  # of an interrupted walk
    walked = {row["family"] for row in rows}
    for family in sorted(by_family)[args.part[0] :: args.part[1]]:
        if family.rpartition(".")[2] in walked:
            continue
        rows += walk(by_family[family])
        write(rows, table)
    print(Counter(row["verdict"].split(":")[0] for row in rows))


def walk(names: list[str]) -> list[dict]:
    """One row for each architecture of a family; the smallest of each set of kinds of modules is examined."""
    rows, groups = [], defaultdict(list)
    for name in names:
        rows.append(described(name))
        if "kinds" in rows[-1]:
            groups[rows[-1].pop("kinds")].append(rows[-1])
        elif rows[-1]["verdict"] != "sited blocks":
            print(name, rows[-1]["verdict"], flush=True)
    for group in groups.values():
        smallest = min(group, key=lambda row: row["parameters"])
        first, number = smallest["architecture"], smallest["parameters"]
        start = time.process_time()
        verdict = verdict_of(first) if number <= LARGEST else f"not examined: {number:,} parameters"
        for row in group:
            row |= {"verdict": verdict, "examined": first}
        print(first, f"for {len(group)}", verdict, f"{time.process_time() - start:.0f} s", flush=True)
    return rows


def verdict_of(name: str) -> str:
    """ "exact and live", or what is wrong with an architecture: on small images, or else on those of its own size.

    It has to be exact however it was made lively, and live in one way.
    """
    for size in (SMALL, None):
        for normal in (False, True):
            try:
                fault = examine(name, size, normal)
            except Exception as error:  # it may not take small images
                fault = f"{type(error).__name__}: {str(error)[:300]}"
                break
            if fault is None:
                return "exact and live"
            if not fault.startswith(DEAD):
                return f"WRONG: {fault}"
    return f"WRONG: {fault}"


def write(rows: list[dict], path: Path) -> None:
    """The rows as a table."""
    names = [
        "architecture",
        "family",
        "parameters",
        "blocks",
        "linear",
        "conv",
        "norm",
        "unreached",
        "verdict",
        "examined",
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
