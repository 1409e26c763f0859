"""Does the suite find faults? Each planted fault is a textual change of the package which some test must notice.

    python tests/power/planted_faults.py                      # every fault
    python tests/power/planted_faults.py lora_scale ssf_shift # some of them
    python tests/power/planted_faults.py --against ../old     # with another working tree and its tests beside this one
    python tests/power/planted_faults.py --wide               # where the nearest tests find nothing, many more

For each fault the text of the package is changed, which must occur exactly once in it, and the tests nearest to the fault
run until the first failure. With --wide all tests of the mechanism, the methods and storage run for each fault that
survives these, which takes minutes for each. At the end every test that failed runs without a fault, and must pass. Not
part of `pytest`: one tree takes about ten minutes of one processor.

What was found is in `planted_faults.md`, which this script writes with --write.
"""

# ruff: noqa: E501, a fault is easier to read in lines as long as those of the package

import argparse
import dataclasses
import time
from pathlib import Path

from changed_trees import ROOT, Outcomes, Tree, copies, failing_unchanged

RESULTS = Path(__file__).with_suffix(".md")
WIDE = (
    *("test_invariants", "test_selfcheck", "test_methods_reference", "test_counts", "test_storage", "test_combine"),
    *("test_allocation", "test_block_economies", "test_layer_economies", "test_gated_vpt", "test_weight_methods"),
    *("test_input_merging", "test_clip_storage", "test_addressing", "test_flow", "test_fingerprint", "test_one_place"),
    *("test_access", "test_changed_model", "test_layer_decay", "test_method_fields", "test_quantised"),
)
# of the matrix of hosts and methods the smallest host, of everything else all
WIDE_KEYWORD = "not compile and (vit_cls or not (test_invariants or test_methods_reference))"


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change of the source that makes it wrong.

    Attributes:
        name: a word for it.
        says: what is wrong then.
        old: text that occurs once in the package.
        new: what takes its place.
        tests: names of test files that are nearest to it.
        keyword: which of their tests to run first, as pytest's -k.
        elsewhere: the same change of other trees, in which the text reads otherwise.
    """

    name: str
    says: str
    old: str
    new: str
    tests: tuple[str, ...] = ("test_invariants", "test_methods_reference")
    keyword: str = ""
    elsewhere: tuple[tuple[str, str], ...] = ()


FAULTS = [
    # beside the backbone
    Fault(
        "carried_cut_off", "tokens beside which something is carried are cut off from what is trained before them",
        "            self.states = carriers.enter(x, carried)", "            x = x.detach()\n            self.states = carriers.enter(x, carried)",
        ("test_side_paths",),
    ),
    Fault(
        "queries_ask_themselves", "queries attend to each other and not to the tokens of the block",
        "        return self.borrowed.kv\n", "        return k, v\n",
        ("test_vqt",),
    ),
    Fault(
        "asked_scale", "the gradient of a query forgets the scale of its attention",
        "grad_q = grad_scores @ k * q.shape[-1] ** -0.5", "grad_q = grad_scores @ k",
        ("test_vqt",), "gradients",
    ),
    Fault(
        "gathered_again", "a block that is computed again in the backward pass brings its features a second time",
        "if not in_backward():", "if True:",
        ("test_vqt",), "pooled",
    ),
    Fault(
        "lst_everything_kept", "all that a side block makes is kept for the backward pass",
        "kept = torch.is_grad_enabled() and not traced()", "kept = False",
        ("test_side_paths",), "kept",
    ),
    Fault(
        "dtl_late", "DTL adds one block too late",
        "adds = index >= first", "adds = index > first",
        ("test_side_paths",), "dtl",
    ),
    # blocks whose tokens are the pixels of a map
    Fault(
        "map_turned", "what reads the grid of a map is told columns and rows",
        "return module(x, self.grid) if", "return module(x, self.grid[::-1]) if",
        ("test_maps",), "grid",
    ),
    Fault(
        "windows_mixed", "prompts of each sample go to the windows of others",
        "x.repeat_interleave(windows // len(x), dim=0)", "x.repeat(windows // len(x), 1, 1, 1)",
        ("test_windows",), "mixed",
    ),
    Fault(
        "one_kind_of_block", "a shifted block is taken for one that is not",
        "return all(map(_is_setting, value)) if isinstance(value, tuple) else isinstance", "return isinstance",
        ("test_windows",), "shifted",
    ),
    # methods
    Fault(
        "lora_scale", "LoRA's own product has its scale twice",
        "z = self.scaling * F.linear(self.dropout", "z = self.scaling * self.scaling * F.linear(self.dropout",
        ("test_methods_reference", "test_weight_methods", "test_layer_economies"), "lora or dora or dropout",
    ),
    Fault(
        "lora_said_scale", "LoRA tells the frozen layer a scale of one",
        "return None if drawn else (self.A, self.B, self.scaling)", "return None if drawn else (self.A, self.B, 1.0)",
        keyword="lora and vit_cls",
    ),
    Fault(
        "lora_merge_scale", "merging LoRA forgets alpha / rank",
        "return weight + self.scaling * (self.B.to(weight)", "return weight + (self.B.to(weight)",
        keyword="lora_all and vit_cls",
    ),
    Fault(
        "lora_alpha", "alpha is divided by the largest rank and not by that of the layer",
        "return self.alpha / (math.sqrt(rank) if self.rank_stabilised else rank)",
        "return self.alpha / (math.sqrt(rank) if self.rank_stabilised else self.rank)",
        ("test_weight_methods",), "alpha",
    ),
    Fault(
        "ssf_shift", "SSF multiplies its shift by its scale",
        "return scale_shift(y, self.scale, self.shift)", "return scale_shift(y, self.scale, self.scale * self.shift)",
        keyword="ssf and vit_cls",
    ),
    Fault(
        "ssf_site", "SSF leaves out the final norm",
        "in (*EMBEDDING, *tower.final_norms)", "in EMBEDDING",
        ("test_counts", "test_methods_reference"), "ssf or SSF",
    ),
    Fault(
        "ssf_merge_bias", "merging SSF does not scale the bias",
        "shift if bias is None else scale * bias + shift", "shift if bias is None else bias + shift",
        keyword="ssf and vit_cls",
    ),
    Fault(
        "ia3_bias", "merging IA3 does not scale the bias",
        "None if bias is None else scale * bias\n", "bias\n",
        keyword="ia3 and vit_cls",
    ),
    Fault(
        "ia3_input", "merging IA3 scales rows and not columns of fc2",
        "return weight * self.scale.to(weight), bias", "return weight * self.scale.to(weight).flip(0), bias",
        keyword="ia3 and vit_cls",
    ),
    Fault(
        "adapter_serial", "a serial adapter forgets its input",
        "delta = (self.scale * self.drop_path(self.up(h))).to(x.dtype)\n        return x + delta if self.serial else delta",
        "delta = (self.scale * self.drop_path(self.up(h))).to(x.dtype)\n        return delta",
        keyword="houlsby and vit_cls or adapter and vit_cls",
    ),
    Fault(
        "prefix_values", "the re-parameterised prefix gives its keys as values",
        "return prepend(keys, k), prepend(values, v)\n\n    def folded", "return prepend(keys, k), prepend(keys, v)\n\n    def folded",
        keyword="prefix_mlp",
    ),
    Fault(
        "gate_sign", "the gate keeps what it should change",
        "mixed = (before + self.logit.sigmoid() * (after - before))",
        "mixed = (after + self.logit.sigmoid() * (before - after))",
        keyword="vpt_gated and vit_cls",
    ),
    Fault(
        "temperature", "the temperature multiplies keys",
        "return (k / (self.temperature - excess)).to(k.dtype), v", "return (k * (self.temperature - excess)).to(k.dtype), v",
        keyword="vpt_gated and vit_cls",
    ),
    Fault(
        "dora_bias", "DoRA scales the bias with the weight",
        "changed = y * factor if bias is None else torch.addcmul((1 - factor) * bias, y, factor)", "changed = y * factor",
        keyword="dora and vit_cls",
    ),
    Fault(
        "vpt_bound", "the paper's bound for prompts with one channel instead of three",
        "math.sqrt(6 / (3 * height * breadth + (projection or", "math.sqrt(6 / (height * breadth + (projection or",
        ("test_methods_reference", "test_method_fields", "test_weight_methods", "test_gated_vpt"),
        "vpt or bound or start or initial",
    ),
    Fault(
        "sparse_transposed", "indices of sparse changes count columns first",
        "return values.new_zeros(shape).flatten().scatter(0, index.long(), values).view(shape)",
        "return values.new_zeros(shape).flatten().scatter(0, index.long(), values).view(*shape[::-1]).t().reshape(shape)"
        " if len(shape) == 2 else values.new_zeros(shape).scatter(0, index.long(), values)",
        keyword="pafi and vit_cls",
    ),
    Fault(
        "sparse_bias", "merging a sparse change forgets the bias",
        "return weight, bias + self.dense(\"bias\").to(bias) if self.has(\"bias\") else bias", "return weight, bias",
        keyword="pafi and vit_cls or fish and vit_cls",
    ),
    Fault(
        "prompts_before_cls", "VPT inserts its prompts before the class token",
        "        at = tower.num_prefix_tokens\n        spans", "        at = 0\n        spans",
        keyword="vpt_deep",
    ),
    # sites
    Fault(
        "mask_prefix", "attention biases take prompts to be one token earlier",
        'return widened(mask, self.extra_tokens, self.num_prefix_tokens, self.causal)', 'return widened(mask, self.extra_tokens, self.num_prefix_tokens - 1, self.causal)',
        keyword="vpt and beit",
        elsewhere=(("extra, at = self.extra_tokens, self.num_prefix_tokens", "extra, at = self.extra_tokens, self.num_prefix_tokens - 1"),),
    ),
    Fault(
        "causal_prompts", "a prompt of a causal tower sees prompts behind it",
        "rows[..., at : at + extra].masked_fill_(future, closed)", "pass",
        keyword="vpt_deep and clip or vpt_shallow and clip",
    ),
    Fault(
        "site_twice", "modules at a token site act twice",
        "for module in self.sites.acting.get(site, ()):\n            x = self.act(module, x)",
        "for module in 2 * self.sites.acting.get(site, ()):\n            x = self.act(module, x)",
        keyword="vit_cls",
    ),
    Fault(
        "branch_at_once", "branches that end at a site do not see each other's order",
        "for module, delta in reversed(self.carried.pop(site, ())):", "for module, delta in self.carried.pop(site, ()):",
        tests=("test_flow",),
    ),
    Fault(
        "first_patch", "prompts count as patches",
        "return self.num_prefix_tokens + self.extra_tokens", "return self.num_prefix_tokens",
        ("test_invariants", "test_methods_reference", "test_convpass", "test_block_economies"),
        "convpass or stacking or located or vpt_gated",
    ),
    Fault(
        "stream_mid", "a timm block has stream_mid on the attention branch",
        'x = at("stream_mid", self.sites.followed(x) + self.drop_path1(self.ls1(h)))\n        h = at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", self.norm2(x))), x))',
        'h = self.sites.followed(x) + self.drop_path1(self.ls1(at("stream_mid", h)))\n        x = h\n        h = at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", self.norm2(x))), x))',
        keyword="vit_cls and pre or vit_cls and adapt_former or vit_cls and parallel",
    ),
    Fault(
        "class_token_mask", "with the class token alone the mask keeps all rows",
        "return mask if mask is None or self.kept is None else mask[..., self.kept, :]", "return mask",
        ("test_block_economies",), "class_token",
    ),
    Fault(
        "scale_shift_gradient", "the gradient of SSF's scale forgets the shift",
        "        result, scale, shift = ctx.saved_tensors\n", "        result, scale, shift = ctx.saved_tensors\n        shift = 0 * shift\n",
        keyword="ssf and vit_cls",
    ),
    Fault(
        "linear_gradient_rows", "the gradient of B sums over the wrong scale",
        "grad_zs = [scaling * (b.to(z.dtype).t() @ part.t())", "grad_zs = [(b.to(z.dtype).t() @ part.t())",
        keyword="lora_all and vit_cls",
    ),
    # adapters
    Fault(
        "not_frozen", "the backbone stays trainable",
        "        model.requires_grad_(False)\n    peft: Adapters = model.peft", "    peft: Adapters = model.peft",
        ("test_invariants",), "gradients and vit_cls or base and vit_cls",
    ),
    Fault(
        "base_written", "trained copies of the backbone's parameters are the parameters themselves",
        'nn.Parameter(value.to(training_dtype(value), copy=True))', 'nn.Parameter(value.to(training_dtype(value)))',
        ("test_invariants",), "bit_fit and vit_cls or full and vit_cls or extra_parameters",
        elsewhere=(("nn.Parameter(_trainable(backbone.model, name).detach().clone())", "nn.Parameter(_trainable(backbone.model, name).detach())"),),
    ),
    Fault(
        "head_shared", "the head is trained in place",
        'nest(self, path, own_copy(backbone.model.get_submodule(path)))', 'nest(self, path, backbone.model.get_submodule(path).requires_grad_(True))',
        ("test_invariants",), "vit_cls",
        elsewhere=(("nest(self, path, copy.deepcopy(backbone.model.get_submodule(path)).requires_grad_(True))", "nest(self, path, backbone.model.get_submodule(path).requires_grad_(True))"),),
    ),
    Fault(
        "detach_class", "detaching leaves the attribute of the sites",
        'ATTRIBUTES = ("sites", "acting",', 'ATTRIBUTES = ("acting",',
        ("test_invariants",), "detach and vit_cls",
        elsewhere=(('for attribute in ("sites", "acting", "entering", "forward_intermediates"):', 'for attribute in ("acting", "entering", "forward_intermediates"):'),),
    ),
    Fault(
        "detach_trainable", "detaching leaves the backbone frozen",
        '        parameter.requires_grad_(name in trainable)\n', '        parameter.requires_grad_(False)\n',
        ("test_invariants",), "detach and vit_cls",
        elsewhere=(("        parameter.requires_grad_(parameter_name in trainable)\n", "        parameter.requires_grad_(False)\n"),),
    ),
    Fault(
        "unmerge", "unmerging gives back the merged weights",
        "    reattach(model)\n    install(model)\n    return model\n", "    reattach(model)\n    model.peft.replaced.clear()\n    install(model)\n    return model\n",
        ("test_invariants", "test_methods_reference"), "merge and vit_cls",
    ),
    Fault(
        "merge_sink", "a shift that goes into the position embedding is put there, not added",
        "value(owner, name)[index] += new_bias", "value(owner, name)[index] = new_bias",
        keyword="merge",
    ),
    Fault(
        "merge_void", "merging refuses shifts of keys that change nothing",
        "elif new_bias is not None and not layer.shift_is_void:", "elif new_bias is not None:",
        keyword="merge",
    ),
    Fault(
        "merge_bias_rows", "merging writes the bias of the queries for all three",
        "bias_rows = bias if layer.bias_rows is None else bias[layer.bias_rows]",
        "bias_rows = bias if layer.bias_rows is None else bias[: layer.bias_rows.stop - layer.bias_rows.start]",
        keyword="merge and vit_cls",
    ),
    Fault(
        "route_index", "routing gives the rows of the first group to the next sample",
        "members = [number[self.names[sample]] for sample in samples]",
        "members = [number[self.names[samples[place - 1]]] for place in range(len(samples))]",
        ("test_invariants",), "routed",
    ),
    Fault(
        "disabled_head", "a switched-off adapter keeps its head",
        'next((name for name in reversed(peft.chosen) if path in peft[name].head_paths), None)', 'next((name for name in reversed([*peft]) if path in peft[name].head_paths), None)',
        ("test_switching", "test_invariants"), "switching or disable or exception or head",
        elsewhere=(("        with_head = [adapter for adapter in peft.active if path in peft[adapter].head_paths]", "        with_head = [adapter for adapter in peft if path in peft[adapter].head_paths]"),),
    ),
    Fault(
        "order", "what acts at a site follows the order of attaching",
        "return {key: [module for _, module in sorted(acting, key=lambda e: e[0])] for key, acting in entries.items()}",
        "return {key: [module for _, module in acting] for key, acting in entries.items()}",
        ("test_invariants",), "stacking",
    ),
    Fault(
        "key_prompts_norm", "prompts that are keys are normalised twice",
        "prompts = self.block.attention_input(prompts, UNSEEN)",
        "prompts = self.block.attention_input(self.block.attention_input(prompts, UNSEEN), UNSEEN)",
        keyword="vpt_deep",
    ),
    Fault(
        "key_prompts_entrance", "what acts on tokens behind the prompts' entrance leaves prompts that are keys alone",
        "        for module in self.at_entrance:\n            prompts = module(prompts)\n", "",
        ("test_block_economies",), "prompts_as_keys and stream",
    ),
    Fault(
        "forward_intermediates", "shallow prompts leak into intermediate features",
        '        refuse_intermediates(swaps, tower, SHALLOW)\n    elif', '        pass\n    elif',
        ("test_invariants",), "intermediates",
    ),
    # the self-check
    Fault(
        "selfcheck_drift", "a block that computes something else is accepted",
        "if not drift <= TOLERANCE:", "if False:",
        ("test_selfcheck",), "",
    ),
    Fault(
        "selfcheck_reach", "a dead site is accepted",
        "        if not probe.shifts or any(id(shift) not in live for shift in probe.shifts):", "        if False:",
        ("test_selfcheck",),
        elsewhere=(("        if not effect > 0:", "        if False:"),),
    ),
    # storage
    Fault(
        "fingerprint", "an adapter loads on any weights",
        '    if not same:\n        reason = differences', '    if False:\n        reason = differences',
        ("test_invariants", "test_storage"), "load",
        elsewhere=(('if actual["fingerprint"] is not None and saved["fingerprint"] != actual["fingerprint"]:', "if False:"),),
    ),
    Fault(
        "fingerprint_names", "the fingerprint does not see values",
        '            digest.update(content)\n            own.update(content)\n', '            own.update(content)\n',
        ("test_invariants", "test_storage"), "load",
        elsewhere=(("        digest.update(values.view(torch.int16).numpy().tobytes())\n", "        values.view(torch.int16)\n"),),
    ),
    Fault(
        "hash", "damaged tensors are loaded",
        "if recorded is not None and recorded != _hash_of(tensors):", "if False:",
        ("test_storage", "test_clip_storage"), "",
    ),
    Fault(
        "saved_heads", "the head of an adapter is not saved",
        "tensors = {key: value for key, value in adapter.state_dict().items() if not key.startswith(own)}",
        "tensors = {key: value for key, value in adapter.state_dict().items() if not key.startswith((*own, \"head.\"))}",
        ("test_invariants", "test_storage"), "save or load",
    ),
]  # fmt: skip


def find(fault: Fault, tree: Tree, wide: bool) -> list[str] | None:
    """The first test of a tree that notices a fault, an empty list if none does, or None if the tree lacks its text."""
    texts = [(fault.old, fault.new), *fault.elsewhere]
    present = [(old, new) for old, new in texts if len(tree.holding(old)) == 1]
    if not present:
        return None
    started = time.monotonic()
    with tree.changed(*present[0]):
        found = tree.failures(fault.tests, fault.keyword)
        if wide and not found:
            found = tree.failures(WIDE, WIDE_KEYWORD)
    print(f"{fault.name}: {', '.join(found) or 'SURVIVED'} ({time.monotonic() - started:.0f} s)", flush=True)
    return found


def main(names: list[str], against: Path | None, wide: bool, write: bool, keep: Path | None) -> None:
    faults = [fault for fault in FAULTS if fault.name in names or not names]
    outcomes = Outcomes(keep)
    columns = []
    with copies(ROOT, against) as trees:
        if lost := [fault.name for fault in faults if len(trees[0].holding(fault.old)) != 1]:
            raise SystemExit(f"the package does not hold the text of these faults exactly once: {', '.join(lost)}")
        for tree in trees:
            column = [
                outcomes.of(f"{tree.root.name} {fault.name}", lambda f=fault, t=tree: find(f, t, wide))
                for fault in faults
            ]
            if wrong := failing_unchanged(tree, [test for found in column for test in found or ()]):
                raise SystemExit(f"these tests of {tree.root} fail without a fault, too: {', '.join(wrong)}")
            killed, present = sum(map(bool, column)), sum(found is not None for found in column)
            print(f"{tree.root}: {killed} of {present} killed")
            columns.append((f"{killed} of {present}", column))
    if write:
        lines = ["# Planted faults", "", f"The tests find {columns[0][0]} planted faults."]
        lines += [f"Those of the earlier tree find {summary}." for summary, _ in columns[1:]]
        heads = ["fault", "what is wrong", "found first by", *["in the earlier tree by" for _ in columns[1:]]]
        lines += ["", f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
        for index, fault in enumerate(faults):
            cells = [said(column[index]) for _, column in columns]
            lines.append(f"| {' | '.join([fault.name, fault.says, *cells])} |")
        RESULTS.write_text("\n".join(lines) + "\n")


def said(found: list[str] | None) -> str:
    """An outcome as a cell of the table."""
    if found is None:
        return "not there to be changed"
    return f"`{found[0]}`" if found else "nothing"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="faults to plant; all by default")
    parser.add_argument("--against", type=Path, help="another working tree, whose tests are tried on the same faults")
    parser.add_argument("--wide", action="store_true", help="try many more tests where the nearest find nothing")
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--keep", type=Path, help="JSON file of outcomes, with which a stopped run can be continued")
    main(**vars(parser.parse_args()))
