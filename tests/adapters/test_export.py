"""Adapted and merged models leave PyTorch: `torch.export` with a free batch size, and ONNX in onnxruntime."""

import io

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import CASES, FEW_CASES, adapted, distance
from reference.hosts import HOSTS, shallow

import visionpeft as vp

HOST = {host.name: shallow(host, 2) for host in HOSTS}
CASE = {case.name: case for case in CASES}
EXPORTED = [(HOST["vit_cls"], case) for case in CASES if case in FEW_CASES or case.name in ("vpt_shallow", "ada_lora")]
EXPORTED += [(HOST[name], CASE[case]) for name in ("beit", "eva_split") for case in ("vpt_deep", "lora_all", "ssf")]
FREE = ({0: torch.export.Dim("batch")},)


def exported(host, model, dtype=torch.float32):
    """The program of a model for batches of any size."""
    return torch.export.export(model, (host.inputs(2, dtype),), dynamic_shapes=FREE)


def output(host, model, inputs):
    with torch.no_grad():
        return host.run(model, inputs)


@pytest.mark.parametrize(("host", "case"), EXPORTED, ids=repr)
def test_attached_models_export(host, case):
    """Every kind of method exports as it is attached, and the program computes the same for other batch sizes."""
    model = adapted(host, case, torch.float64)
    program = exported(host, model, torch.float64).module()
    for batch in (2, 5):
        inputs = host.inputs(batch, torch.float64, seed=batch)
        assert distance(output(host, program, inputs), output(host, model, inputs)) < 1e-12


def test_exported_program_holds_the_adapter():
    """Of an adapter that is switched off nothing is left in the program; of one that acts, its numbers are."""
    host = HOST["vit_cls"]
    model = adapted(host, CASE["adapt_former"])
    active = exported(host, model).module()
    vp.disable(model)
    plain = exported(host, model).module()
    inputs = host.inputs(3)
    assert torch.equal(output(host, plain, inputs), output(host, host.build(), inputs))
    assert distance(output(host, active, inputs), output(host, plain, inputs)) > 1e-3


@pytest.mark.parametrize("case", ["lora_all", "ssf"])
def test_a_route_is_exported_and_goes_on(case):
    """What an export makes of the rows is no tensor: kept for the route, it ended every later pass with an error."""
    host, names = HOST["vit_cls"], ["default", None, "default", None]
    model, inputs = adapted(host, CASE[case], torch.float64), HOST["vit_cls"].inputs(4, torch.float64)
    with vp.route(model, names):
        programs = [torch.export.export(model, (inputs,)).module() for _ in range(2)]
        expected = output(host, model, inputs)
    with vp.route(model, names):
        assert torch.equal(output(host, model, inputs), expected)
    with vp.use(model, None):
        assert distance(expected[1::2], output(host, model, inputs)[1::2]) < 1e-12
    assert distance(expected[::2], output(host, model, inputs)[::2]) < 1e-12
    for program in programs:
        assert distance(output(host, program, inputs), expected) < 1e-12


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_a_route_is_not_traced_by_torchscript():
    """A trace keeps the rows and takes batches of any size; it ended in an error about shapes that were tensors."""
    host = HOST["vit_cls"]
    model, inputs = adapted(host, CASE["lora_all"]), host.inputs(2)
    with vp.route(model, ["default", None]), pytest.raises(vp.UnsupportedError, match=r"use torch\.export"):
        torch.jit.trace(model, inputs)
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs)
        assert distance(traced(inputs), output(host, model, inputs)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora_all", "ssf", "vpt_deep", "adapt_former", "prefix"])
def test_onnx(name, tmp_path):
    """onnxruntime gives the same logits: of a merged model where there is one, and of an attached one else."""
    host, case = HOST["vit_cls"], CASE[name]
    model = adapted(host, case)
    inputs = host.inputs(3)
    expected = output(host, model, inputs)
    if case.mergeable:
        vp.merge(model)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (host.inputs(2),), path, dynamo=True, dynamic_shapes=FREE, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["LoRA", "HyperFormer", "OFT", "BOFT", "FourierFT", "RepAdapter"])
def test_the_older_export_to_onnx(name):
    """It has no operator for what some methods compute, whose merged weights it takes."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=1).eval()
    vp.attach(model, getattr(vp, name)())
    if name not in ("LoRA", "HyperFormer"):
        with pytest.raises(torch.onnx.errors.UnsupportedOperatorError):
            torch.onnx.export(model, (torch.rand(2, 3, 32, 32),), io.BytesIO(), dynamo=False)
        vp.merge(model)
    file = io.BytesIO()
    torch.onnx.export(model, (torch.rand(2, 3, 32, 32),), file, dynamo=False)
    assert file.tell() > 0
