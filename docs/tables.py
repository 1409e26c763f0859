"""The tables of methods and learners in README.md and in these pages, made from the classes themselves.

`python docs/tables.py --write` fills what stands between `<!-- methods:begin -->` and `<!-- methods:end -->`, and so
for the other names of `PAGES`; `--check` fails if that would change something. What there is comes from
`visionpeft.methods.__all__` and `visionpeft.clip.learners.__all__`, what it does from the first line of its docstring,
and where it acts, how much it trains and whether it merges from attaching it to a ViT-B/16 with random weights. So a
new method or learner appears with `--write` and without an edit.
"""

import argparse
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import timm
import torch

import visionpeft as vp
from visionpeft import methods
from visionpeft.adapters.trained import selection_parameters
from visionpeft.clip import learners
from visionpeft.sites import Order, order_of

ROOT = Path(__file__).parents[1]

# further settings of a method or learner that are worth a line of their own in the long tables
VARIANTS = {
    "VPT": ["VPT(num_tokens=100, deep=False)"],
    "Adapter": ['Adapter(8, placement="houlsby")', 'Adapter(8, placement="adapter_plus")'],
    "FacT": ['FacT(rank=32, decomposition="tk")'],
    "Compacter": ['Compacter(bottleneck=24, placement="pfeiffer")'],
    "ChildTuning": ['ChildTuning("D", share=0.1)'],
    "STAdapter": ['STAdapter(positions=("before_mlp",))', 'STAdapter(positions=("before_attention", "before_mlp"))'],
    "CoOp": ['CoOp(init="a photo of a")'],
}

# methods over trained adapters of other methods, and two of those
OVER = {"MoA": "LoRA()", "MoLE": "LoRA()", "AdapterFusion": "Adapter()"}

# in the order in which tokens meet them; sites that are not listed come last
SITES = (
    *("patch_embed", "tokens", "norm_pre", "stream_in", "norm1", "attn_in", "q", "k", "v", "q_norm", "k_norm", "kv"),
    *("proj", "attn_out", "stream_mid", "norm2", "mlp_in", "fc1", "hidden", "fc2", "mlp_out", "stream_out", "norm"),
)

# What another method that needs no data trains does not depend on weights: it is attached to a model without any.
READS_WEIGHTS = ("PaFi",)

ON_LAYERS = (Order.WEIGHT, Order.RENEW, Order.OUTPUT)


@dataclass(frozen=True)
class Line:
    """One setting of a method or learner.

    Args:
        name: the class.
        call: how it is written.
        changes: of a method, what it changes, in a few words that many methods share.
        does: the first sentence of its docstring.
        acts_at: of a method, its sites, or the parameters of the backbone that it trains.
        trained: number of trained values without the head.
        last: of a method "yes" or "no", whether it merges; of a learner, whether it takes new class names.
    """

    name: str
    call: str
    changes: str
    does: str
    acts_at: str
    trained: str
    last: str


def calls_of(names: Iterable[str], base: type, module) -> list[tuple[str, str]]:
    """(class, call) of everything in a public list but its base class, each with its defaults and its variants."""
    found = [name for name in names if isinstance(value := getattr(module, name), type) and value is not base]
    found.sort(key=str.lower)
    return [(name, call) for name in found for call in (f"{name}()", *VARIANTS.get(name, ()))]


def first_sentence(kind: type) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join(inspect.getdoc(kind).split("\n\n")[0].split()).replace("|", "\\|")


def method_lines(public: Sequence[str] | None = None, module=methods) -> list[Line]:
    """Every method attached to a ViT-B/16, and taken off again.

    Args:
        public: names of methods; by default those that the package has.
        module: where they are found.
    """
    made = functools.cache(models)
    lines = []
    for name, call in calls_of(module.__all__ if public is None else public, vp.Method, module):
        method = eval(call, dict(vars(module)))
        chooses = bool(method.pending or method.stages_after or name in READS_WEIGHTS)
        # Whether it merges is not a question of depth, and merging takes longer than all else.
        shallow = attached(name, method, module, *made(2, "cpu", chooses))
        merges = mergeable(shallow)
        vp.detach(shallow)
        model = attached(name, method, module, *made(12, "cpu" if chooses else "meta", chooses))
        of_clips = ", on clips" if isinstance(model, vp.VideoClassifier) else ""
        trained = counted(model, method)
        changes = "clips" if of_clips else what_it_changes(model, merges)
        does = first_sentence(type(method))
        lines.append(Line(name, call, changes, does, acts_at(model) + of_clips, trained, merges))
        vp.detach(model)
    return lines


def models(depth: int, device: str, any_size: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A ViT-B/16 with a head that reads it, which timm starts at zero, and a classifier of clips on it.

    Those that take images of any size have the same parameters, and a few small patches to show cost little.
    """
    torch.manual_seed(0)
    with torch.device(device):
        plain = timm.create_model("vit_base_patch16_224", num_classes=10, depth=depth, dynamic_img_size=any_size)
        torch.nn.init.normal_(plain.head.weight, std=0.02)
        return plain, vp.VideoClassifier(plain, num_frames=8, num_classes=10)


def attached(name: str, method: vp.Method, module, images: torch.nn.Module, clips: torch.nn.Module) -> torch.nn.Module:
    """The model of images with a method attached, or that of clips if it acts across their frames; shown an image if
    the method needs data, and in its last stage.
    """
    torch.manual_seed(0)  # what a method chooses must not depend on which others come before it
    sources = ("a", "b") if name in OVER else ()
    for source in sources:
        vp.attach(images, eval(OVER[name], dict(vars(module))), source, head=False)
    method = replace(method, adapters=sources) if sources else method
    try:
        model = vp.attach(images, method)
    except vp.UnsupportedError:
        model = vp.attach(clips, method)
    for source in sources:
        vp.detach(images, source)
    if model.peft["default"].pending:
        vp.allocate(model, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))])
    # What is trained in stages is counted in its last one; any values do to choose by.
    for _ in vp.stages(model, [(torch.randn(1, 3, 32, 32), torch.tensor([0]))]):
        if any(each.stages_after for each in model.peft["default"].methods):
            for parameter in vp.trainable_parameters(model):
                torch.nn.init.normal_(parameter.data)
            for place, parameter in enumerate(selection_parameters(model)):
                parameter.data += place  # gates differ; the shares of the ranks of a layer stay equal
    return model


def counted(model: torch.nn.Module, method: vp.Method) -> str:
    """How many values the attached method trains, the head left out."""
    # How much of a budget can be spent depends on the data.
    budget = getattr(method, "budget", None)
    return f"budget {budget:,}" if isinstance(budget, int) else f"{vp.summary(model).adapter:,}"


def what_it_changes(model: torch.nn.Module, merges: str) -> str:
    """What the adapter of a model changes: one of a few kinds."""
    placements = [placement for _, placement in model.peft["default"].placements]
    if not placements:
        return "the model's own parameters"
    if any(p.site in ("stream_in", "kv") and getattr(p.module, "num_tokens", 0) > 0 for p in placements):
        return "prompts, alone or with others"
    if merges == "yes" or all(order_of(placement.module) in ON_LAYERS for placement in placements):
        return "weights of layers, or what leaves them"
    return "tokens"


def acts_at(model: torch.nn.Module) -> str:
    """Where the adapter of a model acts: sites, with an arrow to where a branch is added, and trained parameters."""
    adapter = model.peft["default"]
    (tower,) = vp.describe(model).towers.values()
    branches = {(p.site, p.add) for _, p in adapter.placements if p.add}
    sites = {p.site for _, p in adapter.placements if not p.add} - {site for branch in branches for site in branch}
    places = sorted({*branches, *((site, "") for site in sites)}, key=lambda place: (*map(met, place), place))
    parts = [f"`{site}` → `{add}`" if add else f"`{site}`" for site, add in places]
    layers = {layer.site for _, layer in tower.all_layers()}
    if not branches and sites in (layers, layers - {"patch_embed"}):
        parts = ["every layer and norm"] + ["but `patch_embed`"] * (sites < layers)
    elif not branches and sites == {layer.site for _, layer in tower.all_layers() if layer.kind == "linear"}:
        parts = ["every linear layer"]
    names = [name.removeprefix(f"{tower.path}.") for name, _ in adapter.trained_parameters()]
    if names:
        parts.append(("and " if parts else "") + parameters_in_words(names, tower.parameter_names()))
    return " ".join(parts) or "the head"


def met(site: str) -> int:
    """When tokens meet a site; none, at once."""
    return SITES.index(site) + 1 if site in SITES else len(SITES) + 1 if site else 0


def parameters_in_words(names: Sequence[str], every: Sequence[str]) -> str:
    """Some of the parameters of a tower: every one, all of one name, all of a few parts, or those of some layers."""
    if set(names) == set(every):
        return "every parameter"
    if set(names) == {name for name in every if not name.startswith("blocks.")}:
        return "all outside the blocks"
    if len(names) == 1:
        return f"`{names[0]}`"
    leaves = {name.rpartition(".")[2] for name in names}
    if len(leaves) == 1:
        return f"every `{leaves.pop()}`"
    parts = list(dict.fromkeys(re.match(r"(blocks\.\d+|\w+)", name)[0] for name in names))
    if len(parts) <= 3 and {name for name in every if name.startswith(tuple(f"{part}." for part in parts))} <= {*names}:
        return " ".join(f"`{part}`" for part in parts)
    layers = list(dict.fromkeys(name.split(".")[-2] for name in names))
    return "weight and bias of " + " ".join(f"`{layer}`" for layer in layers)


def mergeable(model: torch.nn.Module) -> str:
    """Whether the adapter can be merged: tried, and undone."""
    try:
        vp.unmerge(vp.merge(model))
    except vp.UnsupportedError:
        return "no"
    return "yes"


def learner_lines(public: Sequence[str] | None = None, module=learners) -> list[Line]:
    """Every learner on a CLIP ViT-B/16 without memory, with two class names and with three."""
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    lines = []
    for name, call in calls_of(module.__all__ if public is None else public, vp.Learner, module):
        options = eval("dict(" + call.partition("(")[2])
        built = []
        for classes in (["cat", "dog"], ["cat", "dog", "owl"]):
            with torch.device("meta"):
                clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"))
            built.append(getattr(module, name)(clip, tokenizer, classes, **options))
        new_names = "no" if built[0].class_bound else "yes"
        lines.append(Line(name, call, "", first_sentence(type(built[0])), "", trained_values(*built), new_names))
    return lines


def trained_values(two: vp.Learner, three: vp.Learner) -> str:
    """How many values a learner learns, from one with two classes and one with three."""

    def count(learner: vp.Learner) -> int:
        own = sum(parameter.numel() for parameter in learner.parameters() if parameter.requires_grad)
        return getattr(learner, "num_tuned", own)

    each = count(three) - count(two)
    if not each:
        return f"{count(two):,}"
    rest = count(two) - 2 * each
    return f"classes x {each:,}" + (f" + {rest:,}" if rest else "")


def markdown(lines: list[Line], columns: dict[str, Callable[[Line], str]]) -> str:
    """A table; columns whose head ends in a colon are flush right."""
    heads = [head.removesuffix(":") for head in columns]
    rules = ["---:" if head.endswith(":") else "---" for head in columns]
    rows = [[cell(line) for cell in columns.values()] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rules, *rows))


def defaults_alone(lines: list[Line]) -> list[Line]:
    """The first line of each class."""
    return [line for line in lines if line.call == f"{line.name}()"]


def together(lines: list[Line], head: str, key: Callable[[Line], tuple[str, ...]]) -> str:
    """A table with a row for all methods or learners of one kind, each with how many values it trains."""
    rows = {}
    for line in defaults_alone(lines):
        rows.setdefault(key(line), []).append(f"`{line.name}` {line.trained}")
    kinds = [head, "| --- " * (head.count("|") - 1) + "|"]
    return "\n".join([*kinds, *(f"| {' | '.join(kind)} | {', '.join(rows[kind])} |" for kind in sorted(rows))])


def short_methods(lines: list[Line]) -> str:
    """The methods for the README."""
    return together(lines, "| changes | merges | methods |", lambda line: (line.changes, line.last))


def long_methods(lines: list[Line]) -> str:
    """The methods and their variants, with what they do."""
    columns = {
        "method": lambda line: f"`{line.call}`",
        "does": lambda line: line.does,
        "acts at": lambda line: line.acts_at,
        "trained on ViT-B/16, without head:": lambda line: line.trained,
        "mergeable": lambda line: line.last,
    }
    return markdown(lines, columns)


def short_learners(lines: list[Line]) -> str:
    """The learners for the README."""
    return together(lines, "| new class names | learners |", lambda line: (line.last,))


def long_learners(lines: list[Line]) -> str:
    """The learners and their variants, with what they do."""
    columns = {
        "learner": lambda line: f"`{line.call}`",
        "does": lambda line: line.does,
        "trained on ViT-B/16:": lambda line: line.trained,
        "new class names": lambda line: line.last,
    }
    return markdown(lines, columns)


def directives() -> str:
    """A mkdocstrings directive for every public function and class that is no method, learner or error.

    They go by the module that defines them: the lazy top level has no definitions that could be read.
    """
    shown = {*methods.__all__, *learners.__all__} - {"Method", "Learner"}
    found = [
        (name, value)
        for name in sorted(vp.__all__, key=str.lower)
        if name not in shown and (value := inspect.unwrap(getattr(vp, name)))
    ]
    return "\n".join(f"::: {value.__module__}.{name}" for name, value in found if not is_error(value))


def is_error(value: object) -> bool:
    """Whether it is one of the errors, which have a page of their own."""
    return isinstance(value, type) and issubclass(value, vp.UserError)


# what each file shows between `<!-- NAME:begin -->` and `<!-- NAME:end -->`
PAGES = {
    "README.md": {"methods": short_methods, "learners": short_learners},
    "docs/methods.md": {"methods": long_methods},
    "docs/learners.md": {"learners": long_learners},
    "docs/functions.md": {"functions": lambda lines: directives()},
}


def filled(text: str, name: str, table: str) -> str:
    """The text with a table between its two marks.

    Raises:
        ValueError: the text lacks a mark, or has one twice.
    """
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", flags=re.DOTALL)
    changed, number = pattern.subn(lambda found: f"{found[1]}{table}\n{found[2]}", text)
    if number != 1:
        raise ValueError(f"one pair of marks <!-- {name}:begin --> and <!-- {name}:end --> is needed, found {number}")
    return changed


def main(arguments: list[str] | None = None) -> int:
    """Check or write the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="fail if a table is not what the classes say")
    what.add_argument("--write", action="store_true", help="write the tables")
    write = parser.parse_args(arguments).write
    lines = {"methods": method_lines(), "learners": learner_lines(), "functions": []}
    stale = 0
    for page, tables in PAGES.items():
        path = ROOT / page
        text = changed = path.read_text(encoding="utf-8")
        for name, table in tables.items():
            changed = filled(changed, name, table(lines[name]))
        if changed == text:
            continue
        stale += 1
        if write:
            path.write_text(changed, encoding="utf-8")
        print(f"{page}: {'written' if write else 'its tables are old; run python docs/tables.py --write'}")
    return 0 if write else min(stale, 1)


if __name__ == "__main__":
    sys.exit(main())
