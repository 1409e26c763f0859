"""The weights of a DINOv2 out of an ONNX file of it, as timm names them.

The exporter keeps the names of biases and of what is read as it is, and folds the transposed matrices of linear layers
into constants without a name: the matrix of a layer is the one whose product its named bias is added to.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from visionpeft.errors import DataError

if TYPE_CHECKING:
    import onnx

# what the publisher's modules are called, and timm's, inside a block
LAYERS = {
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
VECTORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
PATCHES = "backbone.embeddings.patch_embeddings.projection"
CLASS_TOKEN = "backbone.embeddings.cls_token"
FINAL_NORM = "backbone.layernorm"


def timm_weights(model: "onnx.ModelProto", grid: int) -> dict[str, Tensor]:
    """State dict of timm's DINOv2 (without a head) from an exported one.

    Args:
        model: the file's graph, with tensors named `backbone.encoder.layer.N. ...` as Hugging Face's DINOv2 has them.
        grid: patches on a side of the images it was exported for. The position embeddings, stored for a larger grid,
            are resized to it as the file does it, bicubic and without antialiasing; timm would antialias.

    Raises:
        DataError: it is another graph.
    """
    from onnx import numpy_helper

    graph = model.graph
    named = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    matrices = _matrices_by_bias(graph, named)
    try:
        weights = {
            "cls_token": named[CLASS_TOKEN],
            "pos_embed": _positions(graph, named, grid),
            "patch_embed.proj.weight": named[f"{PATCHES}.weight"],
            "patch_embed.proj.bias": named[f"{PATCHES}.bias"],
            "norm.weight": named[f"{FINAL_NORM}.weight"],
            "norm.bias": named[f"{FINAL_NORM}.bias"],
        }
        index = 0
        while f"backbone.encoder.layer.{index}.norm1.weight" in named:
            block = f"backbone.encoder.layer.{index}"
            weights |= {f"blocks.{index}.{own}": named[f"{block}.{given}"] for given, own in VECTORS.items()}
            for given, own in LAYERS.items():
                weights[f"blocks.{index}.{own}.weight"] = matrices[f"{block}.{given}.bias"]
                weights[f"blocks.{index}.{own}.bias"] = named[f"{block}.{given}.bias"]
            biases = [f"{block}.attention.attention.{part}.bias" for part in ("query", "key", "value")]
            weights[f"blocks.{index}.attn.qkv.weight"] = torch.cat([matrices[bias] for bias in biases])
            weights[f"blocks.{index}.attn.qkv.bias"] = torch.cat([named[bias] for bias in biases])
            index += 1
    except KeyError as error:
        raise DataError(f"the ONNX file is no exported DINOv2: it has no {error.args[0]}") from None
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def output_of_backbone(graph: "onnx.GraphProto") -> str:
    """Name of the tokens (batch, tokens, width) after the last norm: what its bias is added to."""
    return next(node.output[0] for node in graph.node if f"{FINAL_NORM}.bias" in node.input)


def _matrices_by_bias(graph: "onnx.GraphProto", named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrix (out, in) of every linear layer, by the name of its bias."""
    products = {
        node.output[0]: named[node.input[1]].t()
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in named
    }
    found = {}
    for node in graph.node:
        if node.op_type == "Add" and {*node.input} & {*products}:
            (product,) = {*node.input} & {*products}
            (bias,) = {*node.input} - {product}
            found[bias] = products[product]
    return found


def _positions(graph: "onnx.GraphProto", named: Mapping[str, Tensor], grid: int) -> Tensor:
    """Position embeddings (1, 1 + grid * grid, width): the class token's is put before the patches', resized."""
    passing = ("Reshape", "Transpose", "Cast")
    source_of = {node.output[0]: node.input[0] for node in graph.node if node.op_type in passing}
    source = next(node for node in graph.node if node.op_type == "Resize" and "embeddings" in node.name).input[0]
    while source not in named:
        source = source_of[source]
    stored, width = named[source], named[CLASS_TOKEN].shape[-1]
    if stored.ndim == 3:  # (1, N, width); the exporter may have made an image (1, width, side, side) of it already
        side = round(stored.shape[1] ** 0.5)
        stored = stored.reshape(1, side, side, width).permute(0, 3, 1, 2)
    resized = F.interpolate(stored, size=(grid, grid), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    joined = [name for node in graph.node if node.op_type == "Concat" for name in node.input if name in named]
    (first,) = [named[name] for name in joined if name != CLASS_TOKEN and named[name].shape == (1, 1, width)]
    return torch.cat((first, resized), dim=1)
