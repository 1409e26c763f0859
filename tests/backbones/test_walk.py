"""Every ViT-like architecture of timm and every OpenCLIP configuration: supported, exact and live, or refused.

All others of timm have layer sites only, for which see `test_layers_only.py`.

Architectures keep their kind of block, attention, MLP, pooling and position code, and are built small.

By default one architecture runs for each set of kinds of modules (`kinds_of`), as `architectures_alike.json` has them,
and every architecture that the table does not know. All of them run, and the table is compared with the libraries, by

    pytest -m walk_all tests/backbones/test_walk.py

When a library changes what its architectures are made of, write the table anew:

    python tests/backbones/test_walk.py
"""

import copy
import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import open_clip
import pytest
import timm
import torch

import visionpeft as vp

MODULES = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "eva",
    "beit",
    "deit",
    "vitamin",
    "naflexvit",
    "qwen3_vit",
)
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8, "mlp_ratio": 4.0}
# what has no place in blocks with several attentions, or with one output projection for attention and MLP
REFUSED = {
    "ParallelThingsBlock": (vp.IA3, vp.RepAdapter, vp.PrefixTuning),
    "DiffParallelScalingBlock": (vp.IA3, vp.Adapter),
}

# library -> the architecture that runs by default -> those that are made of the same kinds of modules
ALIKE = Path(__file__).with_name("architectures_alike.json")

IDENTITY = [
    vp.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2")),
    vp.AdaptFormer(bottleneck=8, dropout=0.0),
    vp.BitFit(),
    vp.RepAdapter(bottleneck=4),
    vp.IA3(),
    vp.FacT(rank=2),
]
OTHER_METHODS = [
    vp.VPT(num_tokens=2),
    vp.SSF(),
    vp.PrefixTuning(num_tokens=2),
    vp.Adapter(bottleneck=2, placement="houlsby"),
]


def vit_like() -> list[str]:
    return sorted(name for module in MODULES for name in timm.list_models(module=module))


def walked(library: str, names: list[str]) -> list:
    """The architectures as parameters of a test; those which another one of the table stands for only in `walk_all`."""
    stood_for = {name for others in json.loads(ALIKE.read_text())[library].values() for name in others}
    return [pytest.param(name, marks=[pytest.mark.walk_all] * (name in stood_for)) for name in names]


def kinds_of(model: torch.nn.Module) -> frozenset:
    """The kinds of modules in a model: class, names of its own parameters, and names and classes of its children."""
    containers = torch.nn.ModuleList | torch.nn.Sequential | torch.nn.Identity
    return frozenset(
        (
            type(module).__qualname__,
            tuple(sorted(name for name, parameter in module._parameters.items() if parameter is not None)),
            tuple(
                sorted(
                    (name, type(child).__qualname__)
                    for name, child in module.named_children()
                    if not isinstance(child, torch.nn.ModuleList | torch.nn.Sequential)
                )
            ),
        )
        for module in model.modules()
        if not isinstance(module, containers)
    )


def alike(library: str) -> dict[str, list[str]]:
    """One library's part of the table, from the library itself."""
    groups = defaultdict(list)
    for name in vit_like() if library == "timm" else open_clip.list_models():
        with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
            model = small(name) if library == "timm" else small_clip(open_clip.get_model_config(name), patch)
        groups[kinds_of(model)].append(name)
    return {first: others for first, *others in groups.values()}


@pytest.mark.walk_all
@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_the_table_is_that_of_the_library(library):
    """Otherwise an architecture of a new kind would not run by default."""
    assert json.loads(ALIKE.read_text())[library] == alike(library)


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_the_table_names_what_there_is(library):
    """Each architecture that stands for others runs, and none is in the table twice."""
    names = vit_like() if library == "timm" else open_clip.list_models()
    table = json.loads(ALIKE.read_text())[library]
    stood_for = [name for others in table.values() for name in others]
    assert not set(stood_for) & set(table)
    assert len(stood_for) == len(set(stood_for))
    assert set(table) <= set(names)


def small(name: str) -> torch.nn.Module:
    """The architecture with its own options but few and narrow blocks."""
    return create_small(timm.create_model, name, {"num_classes": 3})


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Undo near-zero layer scales and heads, which would hide every effect."""
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 or "in_proj" in name or "head" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        if "gamma" in name or ".ls" in name:
            parameter.data.fill_(1.0)
    return model.eval()


def assert_exact_and_live(model: torch.nn.Module, run, towers: list[str]) -> None:
    """Methods that start as the identity change nothing; afterwards every tensor has an effect on the output."""
    with torch.no_grad():
        base = run(model)
    refused = sum((REFUSED.get(type(module).__name__, ()) for module in model.modules()), ())
    for methods, identity in ((IDENTITY, True), (OTHER_METHODS, False)):
        for method in filter(lambda method: isinstance(method, refused), methods):
            with pytest.raises(vp.UnsupportedError, match=r"have no layer|which do not have it"):
                vp.attach(model, method)
        methods = [replace_towers(method, towers) for method in methods if not isinstance(method, refused)]
        vp.attach(model, methods)
        if identity:
            with torch.no_grad():
                assert (run(model) - base).norm() <= 1e-5 * base.norm()
        parameters = dict(model.peft["default"].named_parameters())
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        output = run(model)
        assert (output - base).norm() > 1e-4 * base.norm()
        output.square().sum().backward()
        # A shift of all keys is the same for every score of a query unless keys are rotated or normalised.
        dead = [
            n for n, p in parameters.items() if not n.endswith("k.shift") and not (p.grad is not None and p.grad.any())
        ]
        assert not dead, f"no gradient reaches {dead}"
        vp.detach(model)
        with torch.no_grad():
            assert torch.equal(run(model), base)


def replace_towers(method: vp.Method, towers: list[str]) -> vp.Method:
    options = {"init": "normal"} if isinstance(method, vp.VPT) else {}
    return dataclasses.replace(method, towers=towers, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", walked("timm", vit_like()))
def test_timm(name):
    torch.manual_seed(0)
    model = lively(small(name))
    images = torch.randn(2, 3, *image_size(model))
    assert_exact_and_live(model, lambda m: m(images), ["visual"])


@pytest.mark.slow
@pytest.mark.parametrize("name", walked("open_clip", open_clip.list_models()))
def test_open_clip(name, monkeypatch):
    torch.manual_seed(0)
    config = open_clip.get_model_config(name)
    trunk = config["vision_cfg"].get("timm_model_name")
    if not is_supported(config["vision_cfg"], trunk):
        with torch.device("meta"):
            model = small_clip(config, monkeypatch)
        tower = vp.describe(model).towers["visual"]
        # Those in stages are in `test_walk_of_stages`.
        assert (tower.layers_only is None) == bool(tower.stages) == (trunk or "").startswith(("convnext", "swin"))
        if tower.layers_only:
            with pytest.raises(vp.UnsupportedError, match="needs sited blocks"):
                vp.attach(model, vp.VPT())
        return
    model = lively(small_clip(config, monkeypatch))
    images = torch.randn(2, 3, *image_size(getattr(model.visual, "trunk", model.visual)))
    text = torch.randint(3, 90, (2, 8))
    text[:, -1] = END_OF_TEXT

    def run(clip):
        return torch.cat((clip.encode_image(images).flatten(), clip.encode_text(text).flatten()))

    assert_exact_and_live(model, run, ["visual", "text"])


END_OF_TEXT = 99


def image_size(model: torch.nn.Module) -> tuple[int, int]:
    """The input size of a timm model or of OpenCLIP's own image tower."""
    embed = getattr(model, "patch_embed", None)
    return getattr(model, "image_size", (32, 32)) if embed is None else embed.img_size or (32, 32)


def is_supported(vision: dict, trunk: str | None) -> bool:
    if trunk is None:
        return isinstance(vision["layers"], int)
    return timm.model_entrypoint(trunk.partition(".")[0]).__module__.rpartition(".")[2] in MODULES


def small_clip(config: dict, monkeypatch) -> torch.nn.Module:
    """An OpenCLIP configuration with its own options but few and narrow blocks.

    Text towers of Hugging Face would have to be downloaded; OpenCLIP's own stands in for them.
    """
    config = copy.deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    trunk = vision.get("timm_model_name")
    create = timm.create_model
    if trunk is not None and is_supported(vision, trunk):
        monkeypatch.setattr(timm, "create_model", lambda name, **options: create_small(create, name, options))
        vision["image_size"] = 32
    elif trunk is None and isinstance(vision["layers"], int):
        vision |= {"layers": 2, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 8}
    if "hf_model_name" in text:
        text = {"output_tokens": "multimodal_cfg" in config}
    few = {"layers": 2, "width": 32, "heads": 2, "vocab_size": 100, "context_length": 8, "eos_id": END_OF_TEXT}
    config["text_cfg"] = text | few
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 1, "width": 32, "heads": 2, "vocab_size": 100, "context_length": 8}
    custom = config.pop("custom_text", False)
    cls = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return cls(**config)


def create_small(create, name: str, options: dict) -> torch.nn.Module:
    """`timm.create_model` with the small sizes that this architecture accepts."""
    for small_options in small_choices():
        try:
            return create(name, **options, **small_options)
        except (TypeError, AssertionError, RuntimeError, ValueError) as error:
            reason = error
    raise AssertionError(f"{name} cannot be built small: {reason}")


def small_choices() -> list[dict]:
    """Small sizes, then without those that hybrids and multi-stage stems fix themselves."""
    fixed = ((), ("patch_size",), ("embed_dim", "num_heads", "patch_size"), ("patch_size", "img_size"))
    choices = [{key: value for key, value in SMALL.items() if key not in drop} for drop in fixed]
    return [*choices, {**SMALL, "num_kv_heads": (1, 2)}]


if __name__ == "__main__":
    ALIKE.write_text(json.dumps({library: alike(library) for library in ("timm", "open_clip")}, indent=1) + "\n")
