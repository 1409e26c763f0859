"""Does the suite find faults that nobody chose? A sample of cosmic-ray's mutants of the mechanism and three methods.

    pip install cosmic-ray
    python tests/power/mutants.py --list                   # the sample
    python tests/power/mutants.py                          # the tests nearest to each mutant
    python tests/power/mutants.py --against ../old --write # also those of an earlier tree, and the table
    python tests/power/mutants.py 12 40 --wide             # many more tests for some of them

From each module places are drawn by a seed, and for each place one of the changes that cosmic-ray makes there: another
operator, comparison, number or constant, a negated condition, a loop without a turn, another exception. Of the places
an earlier tree has, too, `--each` are drawn, and of those it lacks `--new`, which only this tree is tried on. A place
is the same in both if the text that changes, with as many lines around it as make it single, is in each package once.

The tests nearest to the module run until the first failure. A mutant that survives may be equivalent: what is computed
is then the same; `EQUIVALENT` says why. Not part of `pytest`; a mutant takes five to thirty seconds of one processor.

What was found is in `mutants.md`, which this script writes with --write.
"""

import argparse
import ast
import dataclasses
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from changed_trees import ROOT, Outcomes, Tree, copies, failing_unchanged
from planted_faults import WIDE, WIDE_KEYWORD

RESULTS = Path(__file__).with_suffix(".md")
MATRIX = ("test_methods_reference", "test_invariants", "test_video_methods")
CELLS = "vit_cls and (lora_all or ssf or vpt_deep or vpt_shallow or houlsby or bit_fit or prefix)"

# Module -> (test files that run whole, which tests of the matrix of hosts and methods).
NEAREST = {
    "sites/blocks.py": (("test_flow", "test_block_economies"), f"{CELLS} or clip_whole and vpt"),
    "sites/masks.py": (("test_flow", "test_block_economies"), f"{CELLS} or clip_whole and vpt"),
    "sites/class_token.py": (("test_block_economies",), "vit_cls"),
    "sites/frozen_layers.py": (("test_layer_economies",), f"{CELLS} or ia3 and vit_cls"),
    "sites/layers.py": (("test_layer_economies", "test_input_merging"), CELLS),
    "sites/placement.py": (
        ("test_gated_vpt", "test_trunk_cache", "test_block_economies"),
        f"{CELLS} or stacking and vit_cls",
    ),
    "sites/stand_ins.py": (("test_access", "test_changed_model", "test_one_place"), CELLS),
    "adapters/adapters.py": (
        ("test_changed_model", "test_weight_methods", "test_allocation"),
        f"{CELLS} or refusal",
    ),
    "adapters/attached_adapter.py": (
        ("test_changed_model", "test_weight_methods", "test_allocation"),
        f"{CELLS} or refusal",
    ),
    "adapters/attach.py": (
        ("test_one_place", "test_changed_model", "test_selfcheck"),
        f"{CELLS} or refus or switching and vit_cls",
    ),
    "adapters/switch.py": (
        ("test_one_place", "test_changed_model", "test_routing"),
        f"{CELLS} or rout or switching and vit_cls",
    ),
    "adapters/install.py": (
        ("test_changed_model", "test_gated_vpt"),
        f"{CELLS} or (stacking or switching) and vit_cls or test_video_methods and routed",
    ),
    "adapters/resting.py": (("test_changed_model", "test_switching"), f"{CELLS} or switching and vit_cls"),
    "adapters/unchanged.py": (("test_changed_model",), f"{CELLS} or refusal"),
    "adapters/plan.py": (("test_changed_model", "test_gated_vpt"), f"{CELLS} or (stacking or switching) and vit_cls"),
    "adapters/key_prompts.py": (("test_block_economies",), "vpt and vit_cls"),
    "adapters/merge.py": (
        ("test_input_merging", "test_weight_methods", "test_access"),
        "merge and (vit_cls or beit or vit_pre_norm)",
    ),
    "adapters/route.py": (
        ("test_one_place", "test_routing"),
        "rout and (vit_cls or clip_whole) or routed_heads or large_batches or refusal",
    ),
    "adapters/routed_sites.py": (
        ("test_one_place", "test_routing"),
        "rout and (vit_cls or clip_whole) or routed_heads or large_batches or refusal",
    ),
    "adapters/storage.py": (("test_storage", "test_clip_storage", "test_fingerprint"), "(save or load) and vit_cls"),
    "adapters/described_tensors.py": (("test_storage", "test_clip_storage"), "save and vit_cls"),
    "adapters/fingerprint.py": (("test_storage", "test_fingerprint", "test_quantised"), "load and vit_cls"),
    "methods/lora.py": (("test_weight_methods", "test_layer_economies", "test_combine"), "lora and vit_cls"),
    "methods/ssf.py": (("test_input_merging", "test_initial_values"), "ssf and (vit_cls or vit_pre_norm)"),
    "methods/vpt.py": (("test_gated_vpt", "test_method_fields", "test_initial_values"), "vpt and vit_cls"),
    "methods/parts/deep_prompts.py": (
        ("test_gated_vpt", "test_method_fields", "test_deep_learners", "test_clip_deep_learners"),
        "vpt and (vit_cls or clip_whole)",
    ),
}

EQUIVALENT = {
    "sites/placement.py: @dataclass(frozen=True) -> @dataclass(frozen=False)": "nothing writes to a placement",
    "adapters/route.py: classes = {part.shape[-1] for _, part in results} -> "
    "classes = {part.shape[+1] for _, part in results}": ("logits have two dimensions"),
}

# Written because mutants of the sample of seed 0 had survived, so that for a comparison of suites they do not count.
ASKED_FOR = (
    *("test_second_derivatives_behind_frozen_adapters", "test_large_batches_are_routed", "test_methods_are_values"),
    *("test_tampered[short_preprocessing-]", "test_tampered[drop_tensor-]", "test_the_head_does_not_count_as"),
    *("test_initial_values", "test_deep_prompts_are_counted_from_zero", "test_low_rank_beside_a_layer_of_another"),
    "test_blocks_in_which_nothing_acts_are_the_users",
)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of the package.

    Attributes:
        module: the module of this tree.
        line: number of the line there.
        operator: cosmic-ray's name of the change.
        was: the changed line without indentation.
        becomes: what it becomes.
        old: text that is once in the package.
        new: what takes its place.
    """

    module: str
    line: int
    operator: str
    was: str
    becomes: str
    old: str
    new: str

    @property
    def key(self) -> str:
        """What it is recognised by while other lines change."""
        return f"{self.module}: {self.was} -> {self.becomes}"


def places(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """Line and column of everything that cosmic-ray changes, with the names and the counts of its changes there."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    annotated = list(_annotations(source))
    nodes = list(ast_nodes(get_ast(source)))
    changes = defaultdict(list)
    for name in sorted(operator_names()):
        if name.rpartition("/")[2].startswith("Variable"):  # needs arguments
            continue
        operator = get_operator(name)()
        found = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(found):
            if not any(first <= start < last for first, last in annotated):
                changes[start].append((name, occurrence))
    return changes


def _annotations(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    # a change of a type that nobody reads is no fault
    for node in ast.walk(ast.parse(source)):
        for each in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(each, ast.expr):
                yield (each.lineno, each.col_offset), (each.end_lineno, each.end_col_offset)


def mutant_of(module: str, source: str, name: str, occurrence: int, trees: list[Tree]) -> tuple[Mutant, bool] | None:
    """A change as one of a text that is single in the package, and whether it is single in every other one, too."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    mutated = mutate_code(source, get_operator(name)(), occurrence)
    before, after = source.splitlines(keepends=True), mutated.splitlines(keepends=True)
    first = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
    if first is None:
        return None
    last = next(i for i, (a, b) in enumerate(zip(before[::-1], after[::-1], strict=False)) if a != b)
    stop, new_stop = len(before) - last, len(after) - last
    here = None
    for around in range(6):
        start, more = max(0, first - around), min(around, last)
        old, new = "".join(before[start : stop + more]), "".join(after[start : new_stop + more])
        counts = [len(tree.holding(old)) for tree in trees]
        if counts[0] != 1:
            continue
        said = [" ".join(" ".join(lines).split()) for lines in (before[first:stop], after[first:new_stop])]
        here = here or Mutant(module, first + 1, name.rpartition("/")[2], *said, old, new)
        if counts == [1] * len(trees):
            return dataclasses.replace(here, old=old, new=new), True
    return here and (here, len(trees) == 1)


def draw(trees: list[Tree], each: int, new: int, seed: int) -> list[tuple[Mutant, bool]]:
    """The sample: of every module `each` mutants that all trees have, and `new` ones that only the first has."""
    sample = []
    for module in NEAREST:
        chance = random.Random(f"{seed} {module}")
        source = (trees[0].folder / "visionpeft" / module).read_text()
        found = [changes for _, changes in sorted(places(source).items())]
        chance.shuffle(found)
        wanted = {True: each, False: new if len(trees) > 1 else 0}
        for changes in found:
            if not any(wanted.values()):
                break
            made = mutant_of(module, source, *chance.choice(changes), trees)
            if made is not None and wanted[made[1]]:
                wanted[made[1]] -= 1
                sample.append(made)
    return sorted(sample, key=lambda made: (list(NEAREST).index(made[0].module), made[0].line))


def find(mutant: Mutant, tree: Tree, wide: bool, limit: float) -> list[str]:
    """The first test of a tree that notices a mutant, or an empty list if none does."""
    whole, cells = NEAREST[mutant.module]
    with tree.changed(mutant.old, mutant.new):
        found = tree.failures((*whole, *MATRIX), " or ".join((*whole, cells)), limit)
        if wide and not found:
            found = tree.failures(WIDE, WIDE_KEYWORD, limit)
    return found


def main(
    numbers: list[int], against: Path | None, each: int, new: int, seed: int, listed: bool, wide: bool, write: bool,
    limit: float, keep: Path | None,
) -> None:  # fmt: skip
    outcomes = Outcomes(keep)
    with copies(ROOT, against) as trees:
        sample = draw(trees, each, new, seed)
        chosen = [(number, *made) for number, made in enumerate(sample, 1) if number in numbers or not numbers]
        rows: list[tuple[int, Mutant, list[list[str] | None]]] = []
        for number, mutant, everywhere in chosen:
            print(f"{number} {mutant.module}:{mutant.line} {mutant.operator}{'' if everywhere else ' (here only)'}")
            print(f"    {mutant.was}\n    {mutant.becomes}", flush=True)
            columns: list[list[str] | None] = []
            for index, tree in enumerate(trees if not listed else []):
                if index > 0 and not everywhere:
                    columns.append(None)
                    continue
                started = time.monotonic()
                key = f"{tree.root.name} {mutant.key} {wide}"
                columns.append(outcomes.of(key, lambda m=mutant, t=tree: find(m, t, wide, limit)))
                found = ", ".join(columns[-1]) or "SURVIVED"
                print(f"    in {tree.root.name}: {found} ({time.monotonic() - started:.0f} s)", flush=True)
            rows.append((number, mutant, columns))
        if listed:
            return
        for index, tree in enumerate(trees):
            found = [test for _, _, columns in rows for test in columns[index] or ()]
            if wrong := failing_unchanged(tree, found):
                raise SystemExit(f"these tests of {tree.root} fail without a change, too: {', '.join(wrong)}")
    if write:
        options = f"--each {each} --new {new} --seed {seed}"
        RESULTS.write_text(table(rows, options, len(trees) > 1))


def table(rows: list[tuple[int, Mutant, list[list[str] | None]]], options: str, compared: bool) -> str:
    """What was found, as a page."""
    common = [(mutant, columns) for _, mutant, columns in rows if None not in columns]
    alone = [(mutant, columns) for _, mutant, columns in rows if None in columns]
    lines = ["# Mutants", "", f"cosmic-ray {version('cosmic-ray')}, `python tests/power/mutants.py {options}`.", ""]
    real = [columns for mutant, columns in common if mutant.key not in EQUIVALENT]
    lines.append(f"{len(common)} mutants, of which {len(common) - len(real)} compute the same as before (equivalent).")
    if compared:
        killed = [[bool(found) for found in columns] for columns in real]
        for said, pair in (
            ("found by the tests of both trees", [True, True]),
            ("found here and not in the earlier tree", [True, False]),
            ("found in the earlier tree and not here", [False, True]),
            ("found by neither", [False, False]),
        ):
            lines.append(f"- {said}: {killed.count(pair)}")
        new = [(mutant, columns) for mutant, columns in alone if mutant.key not in EQUIVALENT]
        lines += ["", f"Of {len(new)} mutants of text that the earlier tree has not, the tests find "]
        lines[-1] += f"{sum(bool(columns[0]) for _, columns in new)}."
        if len(alone) > len(new):
            lines[-1] += f" Another {len(alone) - len(new)} are equivalent."
        asked = [sum(map(_was_asked_for, each)) for each in (real, [columns for _, columns in new])]
        lines += ["", f"{asked[0]} and {asked[1]} of these are found here by tests that were written because they had "]
        before = [sum(column[i] for column in killed) for i in (0, 1)]
        lines[-1] += (
            f"survived. Without these tests it is {before[0] - asked[0]} here and {before[1]} in the earlier tree."
        )
        lines += ["", "Tried were the tests nearest to each module, and not the whole of either suite."]
    heads = ["", "place", "line", "becomes", "found first by", *(["in the earlier tree by"] if compared else [])]
    lines += ["", f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
    for number, mutant, columns in rows:
        cells = [str(number), f"{mutant.module}:{mutant.line}", _code(mutant.was), _code(mutant.becomes)]
        equivalent = EQUIVALENT.get(mutant.key)
        for found in columns:
            if found is None:
                cells.append("not there")
            elif found:
                cells.append(_code(found[0]))
            else:
                cells.append(f"equivalent: {equivalent}" if equivalent else "nothing")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _was_asked_for(columns: list[list[str] | None]) -> bool:
    return any(name in found for name in ASKED_FOR for found in columns[0] or ())


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="mutants of the sample; all by default")
    parser.add_argument("--against", type=Path, help="another working tree, whose tests are tried on the same mutants")
    parser.add_argument("--each", type=int, default=4, help="mutants of each module")
    parser.add_argument("--new", type=int, default=1, help="further mutants of text that the other tree lacks")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--list", action="store_true", dest="listed", help="say which they are, and run no test")
    parser.add_argument("--wide", action="store_true", help="try many more tests where the nearest find nothing")
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--limit", type=float, default=900, help="seconds for the nearest tests of one mutant")
    parser.add_argument("--keep", type=Path, help="JSON file of outcomes, with which a stopped run can be continued")
    main(**vars(parser.parse_args()))
