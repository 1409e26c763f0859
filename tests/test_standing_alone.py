"""The library needs torch, timm and safetensors alone, and its public names are where they are said to be."""

import ast
import subprocess
import sys
from pathlib import Path

import visionpeft as vp
from visionpeft import heads, methods
from visionpeft.clip import learners

# Runs a script in a process in which some modules are not installed.
WITHOUT = """
import importlib.machinery as machinery, sys, warnings

class Without(machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is machinery.PathFinder else finder for finder in sys.meta_path]
warnings.simplefilter("ignore")
"""
LAB = (
    *("open_clip", "lightning", "pytorch_lightning", "jsonargparse", "torchmetrics", "tensorboard"),
    *("av", "matplotlib", "pandas", "rich"),
)
# DESIGN, section 6, on a timm model
USE = """
import timm, torch, visionpeft as vp

model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3)
images = torch.randn(2, 3, 32, 32)
vp.attach(model, vp.VPT(num_tokens=2, deep=True))
vp.attach(model, vp.LoRA(rank=2, targets=("q", "v")), name="pets")
assert vp.trainable_parameters(model)
print(vp.summary(model))
vp.save(model, "adapter", name="pets")
with vp.use(model, "pets"):
    model(images)
with vp.route(model, ["pets", None]):
    model(images)
vp.detach(model)
vp.load(model, "adapter")
vp.unmerge(vp.merge(model))
vp.save_pretrained(model, "shared")
vp.detach(model)
vp.create_backbone("nano_vit")
vp.VideoClassifier(model, num_frames=2, num_classes=3)
vp.DensePredictor("nano_vit", vp.LinearSegmentation(layers=2), classes=3, method=vp.LoRA())(torch.randn(1, 3, 32, 40))
print("complete")
"""


def run(script, folder, without=()):
    """What a script prints in a process of its own, in which modules may be missing."""
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=tuple(without)) + script],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_timm_models_need_torch_timm_and_safetensors_alone(tmp_path):
    """The negative control, in the same process: a learner does need OpenCLIP, and it is really missing."""
    script = USE + "try: vp.CoOp\nexcept ModuleNotFoundError as error: print(error.name)"
    assert run(script, tmp_path, LAB).endswith("complete\nopen_clip\n")


def test_a_name_brings_no_more_than_it_needs(tmp_path):
    script = "import sys, visionpeft as vp\nprint('torch' in sys.modules)\nvp.attach, vp.LoRA, vp.save, vp.summary\n"
    script += f"print([name for name in {LAB} if name in sys.modules and name != 'rich'])"
    # `timm` imports no module of the lab; whether the Hub's client brings `rich` is its own affair
    assert run(script, tmp_path) == "False\n[]\n"


def test_it_imports_without_fcntl(tmp_path):
    """As on Windows: the commands import, too, and a folder can be claimed by another kind of lock."""
    script = """
sys.modules["fcntl"] = None
import visionpeft.fit, visionpeft.protocol, visionpeft.runs.fit, visionpeft.protocols.protocol
from pathlib import Path
from visionpeft.files import claim
with claim(Path("lock")) as mine, claim(Path("lock")) as others:
    print(mine, others)
"""
    assert run(script, tmp_path) == "True False\n"


def test_public_names_are_complete():
    """`__all__`, `dir()`, star imports and what type checkers see are the same names, and each of them is there."""
    names = set(vp.__all__)
    assert names == set(dir(vp))
    assert {*methods.__all__, *learners.__all__, "attach", "save", "create_clip", "from_pretrained"} <= names
    for name in names:
        assert getattr(vp, name) is not None
    star = {}
    exec("from visionpeft import *", star)
    assert names <= star.keys()
    assert names == names_for_type_checkers()


def names_for_type_checkers():
    """The names of the block that only type checkers read."""
    tree = ast.parse(Path(vp.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    modules = (heads, methods, learners)
    lists = {module.__name__: module.__all__ for module in modules}
    names = set()
    for statement in block.body:
        for alias in statement.names:
            names |= set(lists[statement.module]) if alias.name == "*" else {alias.asname}
    return names


def test_no_module_at_the_top_hides_a_function(tmp_path):
    """Only `visionpeft.summary` is a command and a function; it is both, in any order of imports."""
    top = {path.stem for path in Path(vp.__file__).parent.iterdir()}
    assert top & set(vp.__all__) == {"summary"}
    script = (
        "import inspect, visionpeft.summary, visionpeft as vp\n"
        "assert inspect.unwrap(vp.summary).__module__ == 'visionpeft.costs.counts'\n"
    ) + USE
    assert run(script, tmp_path).endswith("complete\n")


def test_an_unknown_name_is_no_name():
    assert not hasattr(vp, "NoSuchMethod")
    assert not hasattr(vp, "no_such_function")
