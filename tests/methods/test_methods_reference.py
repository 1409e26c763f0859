"""Every method on every host against its paper in float64 (`tests/reference`): outputs, gradients, merged weights."""

import dataclasses
import inspect

import pytest
import torch
from conftest import (
    CASES,
    MERGE_REFUSALS,
    TRAINED_ALONE,
    VIDEO_CASES,
    adapter_tensors,
    distance,
    every_pair,
    expected_output,
    saved_tensors,
    spread_pairs,
)
from reference import METHODS, edits_of, forward, merged_weights, shapes_of
from reference.hosts import HOSTS
from reference.video import VIDEO_METHODS
from shared_cells import plain, shared

import visionpeft as vp
from visionpeft.errors import UserError

MERGEABLE = [c for c in CASES if c.mergeable]


def test_cases_cover_every_public_method():
    """A new method cannot be left out of the matrix."""
    public = {m for _, m in inspect.getmembers(vp, inspect.isclass) if issubclass(m, vp.Method) and m is not vp.Method}
    assert {type(c.method) for c in [*CASES, *VIDEO_CASES]} == public


def test_reference_covers_every_method_with_modules():
    """Each method that adds tensors has its transcription."""
    alone = {"linear_probe", "full_fine_tuning", "last_blocks", "layer_norm_tuning"}
    assert {c.method.name for c in [*CASES, *VIDEO_CASES]} - alone == {*METHODS, *VIDEO_METHODS}


@pytest.mark.parametrize("host", HOSTS, ids=repr)
def test_reference_is_the_library(host):
    """With no method the transcription of a backbone is the backbone, to rounding."""
    model, inputs = host.build(torch.float64), host.inputs(dtype=torch.float64)
    with torch.no_grad():
        left, right = forward(model, inputs), model(*inputs) if host.takes == "both" else model(inputs)
    for ours, theirs in zip(*((left, right) if host.takes == "both" else ((left,), (right,))), strict=True):
        assert distance(ours, theirs) < 1e-12


@shared(every_pair(), torch.float64)
def test_output(cell, tmp_path):
    """The adapted model computes what the paper says."""
    folded = cell.case.name == "prefix_mlp"
    with torch.no_grad():
        tensors = saved_tensors(cell.model, tmp_path) if folded else adapter_tensors(cell.model)
        expected = expected_output(cell.host, cell.case, tensors, cell.host.inputs(dtype=torch.float64))
    assert distance(cell.output, expected) < 1e-11


@shared(spread_pairs([c for c in CASES if c.name not in (*TRAINED_ALONE, "prefix_mlp")]), torch.float64)
def test_gradients(cell):
    """Every tensor of the adapter gets the gradient the formula has."""
    host, case, model = cell.host, cell.case, cell.model
    inputs = host.inputs(dtype=torch.float64)
    direction = torch.randn(2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[:, None]
    tensors = {n: t for n, t in adapter_tensors(model).items() if t.requires_grad}
    (host.run(model, inputs) * direction).sum().backward()
    found = {n: t.grad for n, t in tensors.items()}
    copies = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    (expected_output(host, case, adapter_tensors(model) | copies, inputs) * direction).sum().backward()
    largest = max(t.grad.norm() for t in copies.values())
    for name, copy in copies.items():
        assert (found[name] - copy.grad).norm() < 1e-11 * largest, name


@shared(every_pair(cases=MERGEABLE), torch.float64)
def test_merged_weights(cell):
    """Merging leaves W0 + dW, the formula of the paper, in the model's own parameters."""
    host, model = cell.host, cell.model
    tensors = {n: t.detach() for n, t in adapter_tensors(model).items()}
    method = cell.case.on(host)
    if (host.name, cell.case.name) in MERGE_REFUSALS:
        with pytest.raises(UserError):
            vp.merge(model)
        return
    vp.merge(model)
    merged = dict(model.state_dict())
    vp.unmerge(model)  # for the other readers, who compare its bytes
    fields = {method.name: dataclasses.asdict(method)}
    expected = merged_weights(plain(host, torch.float64), tensors, fields)
    expected |= {n.removeprefix("trained."): t for n, t in tensors.items() if n.startswith(("head.", "trained."))}
    for name, weight in expected.items():
        if name.startswith("missing.") and name.endswith(".k"):
            continue  # adds the same to all scores of a query where keys are neither rotated nor normalised
        assert (merged[name] - weight).norm() <= 1e-12 * weight.norm(), name


MOVED = (
    *("bit_fit_no_key", "bit_fit", "lora", "lora_all", "ssf", "dora", "vera", "ada_lora", "krona", "kadaptation"),
    *("ia3", "rep_adapter", "rep_adapter_mlp", "fact", "fact_tucker"),
)


# No line of the product runs here, so two hosts are enough, one of either library: the transcriptions of the others are
# compared with the product above, both by outputs and by merged weights.
@shared(
    every_pair([h for h in HOSTS if h.name in ("vit_cls", "clip_whole")], [c for c in CASES if c.name in MOVED]),
    torch.float64,
)
def test_reference_merges_to_itself(cell):
    """The two transcriptions, edits and merged weights, agree where the merged model has a place for every bias."""
    host = cell.host
    tensors = {n: t.detach() for n, t in adapter_tensors(cell.model).items() if not n.startswith("head.")}
    method = cell.case.on(host)
    inputs = host.inputs(dtype=torch.float64)
    model = plain(host, torch.float64)
    fields = {method.name: dataclasses.asdict(method)}
    weights = merged_weights(model, tensors, fields)
    if any(name.startswith("missing.") for name in weights):
        pytest.skip("the plain model has no such bias")
    merged = forward(model, inputs, weights=weights)
    edited = forward(model, inputs, edits_of(tensors, fields, shapes_of(model)))
    for left, right in zip(*((merged, edited) if host.takes == "both" else ((merged,), (edited,))), strict=True):
        assert distance(left, right) < 1e-12
