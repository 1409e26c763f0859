"""The arithmetic of transformer layers, spelled out on tensors of any precision."""

import math

import torch


def linear(x, weight, bias=None):
    """y = x W^T + b over the last axis."""
    y = x @ weight.T
    return y if bias is None else y + bias


def layer_norm(x, weight, bias, eps):
    """LayerNorm over the last axis, biased variance."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def gelu(x):
    """x Phi(x), exact."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    """The tanh approximation of gelu."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    """x sigmoid(x)."""
    return x / (1 + torch.exp(-x))


def quick_gelu(x):
    """x sigmoid(1.702 x)."""
    return x / (1 + torch.exp(-1.702 * x))


def relu(x):
    """max(x, 0)."""
    return torch.where(x > 0, x, torch.zeros_like(x))


ACTIVATIONS = {
    "GELU": gelu,
    "GELUTanh": gelu_tanh,
    "SiLU": silu,
    "QuickGELU": quick_gelu,
    "ReLU": relu,
    "gelu": gelu,
    "relu": relu,
    "silu": silu,
    "quick_gelu": quick_gelu,
    "tanh": torch.tanh,
}


def activation_of(module):
    """The function of an activation module, by the name of its class."""
    name = type(module).__name__
    if name == "GELU" and getattr(module, "approximate", "none") == "tanh":
        name = "GELUTanh"
    return ACTIVATIONS[name]


def softmax(scores):
    """exp(s) / sum exp(s) over the last axis."""
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


def split_heads(x, heads):
    """(batch, tokens, heads * d) to (batch, heads, tokens, d)."""
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads).transpose(1, 2)


def join_heads(x):
    """(batch, heads, tokens, d) to (batch, tokens, heads * d)."""
    batch, heads, tokens, width = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, heads * width)


def attention(q, k, v, logit_bias=None):
    """softmax(q k^T / sqrt(d) + bias) v on (batch, heads, tokens, d)."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if logit_bias is not None:
        scores = scores + logit_bias
    return softmax(scores) @ v


def rotate(x, sin, cos, half):
    """Rotary position: pairs (x0, x1) interleaved, or (x_i, x_{i + d/2}) when `half`."""
    if half:
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.zeros_like(x)
        turned[..., 0::2] = -x[..., 1::2]
        turned[..., 1::2] = x[..., 0::2]
    return x * cos + turned * sin


def patches_of(images, size):
    """(batch, C, H, W) to (batch, patches, C * size * size), row-major patches, channel-first pixels."""
    batch, channels, height, width = images.shape
    rows, columns = height // size[0], width // size[1]
    x = images.reshape(batch, channels, rows, size[0], columns, size[1])
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * size[0] * size[1])
