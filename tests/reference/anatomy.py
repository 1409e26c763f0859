"""Where the matrices and norms of a plain model lie in its state_dict, and how its blocks compute."""

from .arithmetic import activation_of
from .block import Address, Block


def addresses_of(model, tower, prefix=""):
    """{(block index or None, site): Address} of one tower of a plain model."""
    name = type(model).__name__
    if name in ("CLIP", "CustomTextCLIP"):
        if tower == "visual":
            return addresses_of(model.visual, tower, prefix + "visual.")
        return (
            addresses_of(model.text, tower, prefix + "text.")
            if name == "CustomTextCLIP"
            else text_addresses(model, prefix)
        )
    if name == "TimmModel":
        return addresses_of(model.trunk, tower, prefix + "trunk.")
    if name == "TextTransformer":
        return text_addresses(model, prefix)
    if type(model).__module__.startswith("open_clip"):
        found = {(None, "patch_embed"): Address(prefix + "conv1.weight")}
        for site, module in (("norm_pre", "ln_pre"), ("norm", "ln_post")):
            found[None, site] = norm_address(prefix + module)
        blocks = model.transformer.resblocks
        make, path = open_clip_block, prefix + "transformer.resblocks."
    else:
        found = {
            (None, "patch_embed"): Address(prefix + "patch_embed.proj.weight", prefix + "patch_embed.proj.bias"),
            (None, "norm_pre"): norm_address(prefix + "norm_pre"),
            (None, "norm"): norm_address(prefix + "norm"),
            (None, "fc_norm"): norm_address(prefix + "fc_norm"),
        }
        blocks, make, path = model.blocks, timm_block, prefix + "blocks."
    for index, block in enumerate(blocks):
        for site, address in make(block, f"{path}{index}.").addresses.items():
            found[index, site] = address
    return found


def shapes_of(model):
    """{tower: {"depth": blocks, "heads": of the attention, "prefix": tokens before the patches, or the start of text,
    "grid": of patches, "class_token_alone": whether nothing else is read after the blocks}}.
    """
    if hasattr(model, "visual"):
        return shapes_of(model.visual) | {"text": size_of(getattr(model, "text", model).transformer.resblocks)}
    if hasattr(model, "trunk"):
        return shapes_of(model.trunk)
    if hasattr(model, "token_embedding"):
        return {"text": size_of(model.transformer.resblocks)}
    if hasattr(model, "transformer"):
        alone = model.pool_type == "tok"
        return {"visual": size_of(model.transformer.resblocks) | {"grid": model.grid_size, "class_token_alone": alone}}
    grid = model.patch_embed.grid_size
    alone = model.global_pool == "token" and getattr(model, "attn_pool", None) is None
    more = {"prefix": model.num_prefix_tokens, "grid": grid, "class_token_alone": alone}
    return {"visual": size_of(model.blocks) | more}


def size_of(blocks):
    """Depth and heads of some blocks, after one token of another kind."""
    return {"depth": len(blocks), "heads": blocks[0].attn.num_heads, "prefix": 1}


def text_addresses(model, prefix):
    """Addresses of an OpenCLIP text tower, on its own or unpacked on a CLIP."""
    found = {(None, "norm"): norm_address(prefix + "ln_final")}
    for index, block in enumerate(model.transformer.resblocks):
        for site, address in open_clip_block(block, f"{prefix}transformer.resblocks.{index}.").addresses.items():
            found[index, site] = address
    return found


def norm_address(path):
    """A norm's weight and bias."""
    return Address(path + ".weight", path + ".bias")


def eps_of(module):
    """The eps of a LayerNorm; None for an identity or an absent module."""
    return getattr(module, "eps", None)


def norms_of(modules, path, names):
    """({site: eps}, {site: Address}) of those of the named norms that exist."""
    eps, addresses = {}, {}
    for site, name in names.items():
        module = modules
        for part in name.split("."):
            module = getattr(module, part, None)
        if eps_of(module):
            eps[site], addresses[site] = module.eps, norm_address(path + name)
    return eps, addresses


def timm_block(block, path, **more):
    """Block of timm's `Block`, `ResPostBlock`, `EvaBlock`, `EvaBlockPostNorm` and BEiT's `Block`."""
    attn, mlp = block.attn, block.mlp
    names = {"norm1": "norm1", "norm2": "norm2", "q_norm": "attn.q_norm", "k_norm": "attn.k_norm"}
    eps, addresses = norms_of(block, path, names | {"attn_norm": "attn.norm", "mlp_norm": "mlp.norm"})
    kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
    if attn.qkv is not None:
        width = attn.qkv.weight.shape[0] // 3
        for number, site in enumerate("qkv"):
            rows = slice(number * width, (number + 1) * width)
            if getattr(attn, "q_bias", None) is not None:
                bias = None if site == "k" else f"{path}attn.{site}_bias"
                addresses[site] = Address(f"{path}attn.qkv.weight", bias, rows)
            else:
                addresses[site] = Address(f"{path}attn.qkv.weight", f"{path}attn.qkv.bias", rows, rows)
    else:
        for site in "qkv":
            addresses[site] = Address(f"{path}attn.{site}_proj.weight", f"{path}attn.{site}_proj.bias")
    matrices = {"proj": "attn.proj", "fc2": "mlp.fc2"}
    split = hasattr(mlp, "fc1_g")
    matrices |= {"fc1_g": "mlp.fc1_g", "fc1_x": "mlp.fc1_x"} if split else {"fc1": "mlp.fc1"}
    for site, name in matrices.items():
        addresses[site] = Address(f"{path}{name}.weight", f"{path}{name}.bias")
    if split:
        kind = "split"
    elif hasattr(mlp, "gate_last"):
        kind = "gate_last" if mlp.gate_last else "gate_first"
    else:
        kind = "plain"
    scales = []
    for number in (1, 2):
        if getattr(block, f"gamma_{number}", None) is not None:
            scales.append(f"{path}gamma_{number}")
        elif hasattr(getattr(block, f"ls{number}", None), "gamma"):
            scales.append(f"{path}ls{number}.gamma")
        else:
            scales.append(None)
    return Block(
        addresses=addresses,
        eps=eps,
        heads=attn.num_heads,
        kv_heads=kv_heads,
        activation=activation_of(mlp.act),
        norm_after="Post" in type(block).__name__,
        mlp=kind,
        scales=tuple(scales),
        **more,
    )


def open_clip_block(block, path, **more):
    """Block of OpenCLIP's `ResidualAttentionBlock` and `CustomResidualAttentionBlock`."""
    attn = block.attn
    names = {"norm1": "ln_1", "norm2": "ln_2", "q_norm": "attn.ln_q", "k_norm": "attn.ln_k"}
    names |= {"attn_norm": "attn.ln_inner", "attn_branch_norm": "ln_attn", "mlp_norm": "mlp.ln"}
    eps, addresses = norms_of(block, path, names)
    width = attn.in_proj_weight.shape[0] // 3
    for number, site in enumerate("qkv"):
        rows = slice(number * width, (number + 1) * width)
        addresses[site] = Address(f"{path}attn.in_proj_weight", f"{path}attn.in_proj_bias", rows, rows)
    for site, name in {"proj": "attn.out_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}.items():
        addresses[site] = Address(f"{path}{name}.weight", f"{path}{name}.bias")
    return Block(
        addresses=addresses,
        eps=eps,
        heads=attn.num_heads,
        kv_heads=attn.num_heads,
        activation=activation_of(block.mlp.gelu),
        scales=tuple(f"{path}ls_{n}.gamma" if hasattr(getattr(block, f"ls_{n}"), "gamma") else None for n in (1, 2)),
        head_scale=f"{path}attn.head_scale" if getattr(attn, "head_scale", None) is not None else None,
        **more,
    )
