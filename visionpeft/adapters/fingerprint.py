"""By what a backbone's weights are recognised: hashes of its parameters without heads and adapters.

Of a model that has layer sites only, the statistics of its batch normalisations are among them.

Values are hashed as `v + 0.0` (so that -0.0 is 0.0) rounded to bfloat16, which is the same for a backbone kept in
float32 and in bfloat16, and once more rounded to float16, for one kept in that: two are compared in the precision of
the coarser one. Each part of the model (`blocks.3`, `norm`, `pos_embed`) has short hashes of its own, by
which is said what differs.
"""

import hashlib
import re
from collections import defaultdict
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn

from visionpeft.backbones.quantised import full_precision
from visionpeft.backbones.tower import Backbone
from visionpeft.backbones.whole_model import describe
from visionpeft.sites.tensor_versions import version_of

PRECISIONS = ("bfloat16", "float16")
_PROBED = 16  # values of each tensor by which a write through `.data` is noticed

# model -> (what its tensors said of themselves, the record made then)
_LAST: WeakKeyDictionary[nn.Module, tuple[list, dict]] = WeakKeyDictionary()


def fingerprint(model: nn.Module) -> str:
    """Hash of the frozen parameters: names, shapes and values rounded to bfloat16, the same from float32 and bfloat16.

    Hash: BLAKE2b with 16 bytes of, in the order of the names, name and shape as text and the rounded values.
    """
    return weights_record(model)["fingerprint"]


def weights_record(model: nn.Module, backbone: Backbone | None = None) -> dict:
    """The entries of a saved backbone's description that say which weights it has. Hashed once for unchanged weights.

    Args:
        model: the model.
        backbone: what `describe` says of it, if that is known.

    Returns:
        `fingerprint`; `fingerprint_float16`, of the values rounded to float16; `precision`, "bfloat16" or
        "float16" for a backbone kept in it, else "float32"; `parts`, by name hashes of names with shapes, of bfloat16
        and of float16 values, as three words.
    """
    parameters = _parameters(model, backbone)
    state = [(name, id(p), p.data_ptr(), version_of(p), p.dtype, p.shape) for name, p in parameters]
    state.append(_probe(parameters))
    last = _LAST.get(model)
    if last is None or last[0] != state:
        _LAST[model] = last = state, _hash_all(parameters)
    return dict(last[1])


def legacy_fingerprint(model: nn.Module) -> str:
    """The fingerprint of version 0.1, for which -0.0 is not 0.0."""
    return _hash_all(_parameters(model), plus=None)["fingerprint"]


def same_weights(model: nn.Module, saved: dict, actual: dict) -> bool:
    """Whether two records are of the same weights, compared in the precision of the coarser one."""
    kinds = {saved.get("precision"), actual["precision"]}
    if "float16" in kinds and None not in kinds:
        return "bfloat16" not in kinds and saved.get("fingerprint_float16") == actual["fingerprint_float16"]
    if saved["fingerprint"] == actual["fingerprint"]:
        return True
    return "precision" not in saved and saved["fingerprint"] == legacy_fingerprint(model)


def differences(saved: dict, actual: dict) -> str:
    """What differs between two records, in words; "" where a record of an older version does not say it."""
    theirs, ours = (_split(record.get("parts")) for record in (saved, actual))
    if theirs is None:
        return ""
    kinds = {saved.get("precision"), actual["precision"]}
    if kinds == {"bfloat16", "float16"}:
        return "one is kept in bfloat16 and one in float16, and what these share cannot be hashed"
    values = 2 if "float16" in kinds else 1
    common = [name for name in ours if name in theirs]
    sentences = {
        "missing here": [name for name in theirs if name not in ours],
        "here only": [name for name in ours if name not in theirs],
        "of another shape": [name for name in common if ours[name][0] != theirs[name][0]],
        "of other values": [
            name for name in common if ours[name][0] == theirs[name][0] and ours[name][values] != theirs[name][values]
        ],
    }
    said = [
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {what}" for what, names in sentences.items() if names
    ]
    if "pos_embed" in {name.rpartition(".")[2] for name in sentences["of another shape"]}:
        said.append("the image size may be another one")
    return "; ".join(said)


def _split(parts: object) -> dict[str, list[str]] | None:
    """The three hashes of each part; None for what this version does not write."""
    if not isinstance(parts, dict) or not all(isinstance(each, str) for each in parts.values()):
        return None
    split = {name: each.split() for name, each in parts.items()}
    return split if all(len(each) == 3 for each in split.values()) else None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _parameters(model: nn.Module, backbone: Backbone | None = None) -> list[tuple[str, nn.Parameter]]:
    backbone = backbone or describe(model)
    heads = tuple(f"{path}." for path in (*backbone.heads, *backbone.unused_heads))
    named = [(name, p) for name, p in model.named_parameters(recurse=False)]
    for part, child in model.named_children():
        named += child.named_parameters(prefix=part) if part != "peft" else ()
    if any(tower.layers_only is not None for tower in backbone.towers.values()):
        statistics = [(n, b) for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))]
        named += [(name, b) for name, b in statistics if not name.startswith("peft.")]
    return [(name, p) for name, p in sorted(named, key=lambda entry: entry[0]) if not name.startswith(heads)]


@torch.no_grad()
def _probe(parameters: list[tuple[str, nn.Parameter]]) -> list[float]:
    """Some values of each tensor; a write through `.data` changes no version, but hardly leaves all of these."""
    plain = [p.flatten() for _, p in parameters if type(p) is nn.Parameter and not p.is_meta and p.numel()]
    taken = [flat[:: max(1, len(flat) // _PROBED)][:_PROBED].to("cpu", torch.float64) for flat in plain]
    return torch.cat(taken).nan_to_num(0.5).tolist() if taken else []


def _hash_all(parameters: list[tuple[str, nn.Parameter]], plus: float | None = 0.0) -> dict:
    whole = {precision: hashlib.blake2b(digest_size=16) for precision in PRECISIONS}
    parts = defaultdict(lambda: [hashlib.blake2b(digest_size=2) for _ in range(3)])
    dtypes = set()
    for name, parameter in parameters:
        about = f"{name}{tuple(parameter.shape)}".encode()
        values = full_precision(parameter.detach())
        dtypes.add(values.dtype)
        part = parts[_part(name)]
        part[0].update(about)
        for precision, digest, own in zip(PRECISIONS, whole.values(), part[1:], strict=True):
            rounded = values.to("cpu", getattr(torch, precision))
            rounded = (rounded if plus is None else rounded + plus).contiguous()
            content = rounded.view(torch.int16).numpy().tobytes()
            digest.update(about)
            digest.update(content)
            own.update(content)
    kept = next((p for p in reversed(PRECISIONS) if getattr(torch, p) in dtypes), "float32")
    return {
        "fingerprint": whole["bfloat16"].hexdigest(),
        "fingerprint_float16": whole["float16"].hexdigest(),
        "precision": kept,
        "parts": {name: " ".join(digest.hexdigest() for digest in digests) for name, digests in parts.items()},
    }


def _part(name: str) -> str:
    """The part of the model that a parameter belongs to: up to the number of a block, or without the last word."""
    block = re.match(r".*?\.\d+(?=\.)", name)
    if block:
        return block[0]
    path, _, last = name.rpartition(".")
    return path if last in ("weight", "bias") else name
