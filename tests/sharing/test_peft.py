"""Adapters go to HF peft and come back with equal logits; where peft is wrong, they are refused."""

import copy
import errno
import json
import os
import sys
import warnings

import peft
import pytest
import torch
from conftest import randomise
from reference.hosts import HOSTS
from safetensors.torch import load_file, save_file

import visionpeft as vp

HOST = {host.name: host for host in HOSTS}
EVERYWHERE = ["qkv", "q_proj", "k_proj", "v_proj", "attn.proj", "fc1", "fc1_g", "fc1_x", "fc2"]
CONFIGURATIONS = {
    "plain": dict(r=2, lora_alpha=6, target_modules=EVERYWHERE),
    "whole_modules": dict(r=2, target_modules=["fc1", "fc1_g", "fc1_x"], modules_to_save=["head", "fc2"]),
    "expression": dict(r=3, target_modules=r"blocks\.[02]\.mlp\.fc.*"),
    "patterns": dict(
        r=2, target_modules=EVERYWHERE, rank_pattern={r"blocks\.1\..*\.fc2": 5, "proj": 1}, alpha_pattern={"fc2": 3}
    ),
    "rank_stabilised": dict(r=3, lora_alpha=2, use_rslora=True, target_modules=EVERYWHERE, rank_pattern={"fc2": 2}),
    "some_layers": dict(r=2, target_modules=EVERYWHERE, layers_to_transform=[0, 2], layers_pattern="blocks"),
    "dora": dict(r=2, lora_alpha=3, use_dora=True, target_modules=EVERYWHERE, rank_pattern={"fc1": 3}),
    "excluded": dict(r=2, target_modules=EVERYWHERE, exclude_modules=["blocks.0.mlp.fc1", "blocks.0.mlp.fc1_g", "fc2"]),
}


def made_by_peft(host, folder, kind=peft.LoraConfig, change=lambda name, value: None, **options):
    """The logits of a model of peft whose adapter, moved off its initial values, is saved in a folder."""
    torch.manual_seed(2)
    model = peft.get_peft_model(host.build(), kind(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
                change(name, parameter)
    model.save_pretrained(folder)
    with torch.no_grad():
        return host.run(model, host.inputs())


def read_by_peft(host, folder, change=lambda model: model):
    """The logits of peft for an exported folder; a remark about its keys is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(change(host.build()), folder).eval()
    with torch.no_grad():
        return host.run(model, host.inputs())


def output(host, model):
    with torch.no_grad():
        return host.run(model.eval(), host.inputs())


def close(left, right):
    return torch.allclose(left, right, rtol=1e-5, atol=1e-5)


# from peft


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("host", [HOST["vit_cls"], HOST["vit_swiglu"]], ids=repr)
def test_import(host, name, tmp_path):
    expected = made_by_peft(host, tmp_path / "theirs", **CONFIGURATIONS[name])
    model = host.build()
    plain = output(host, model)
    assert vp.import_peft(model, tmp_path / "theirs", "mine") == "mine"
    assert close(output(host, model), expected)
    assert not torch.allclose(expected, plain, atol=1e-2)
    vp.detach(model)
    assert torch.equal(output(host, model), plain)


@pytest.mark.parametrize("name", ["eva_split", "eva_rope_mixed", "eva_grouped", "vit_qk_norm", "vit_res_post"])
def test_import_on_other_backbones(name, tmp_path):
    host = HOST[name]
    targets = [target for target in EVERYWHERE if target != "qkv" or name.startswith("vit")]
    targets = [t for t in targets if any(m.endswith(f".{t}") for m, _ in host.build().named_modules())]
    targets = [f"blocks.{i}.{part}.{t}" for i in range(3) for t in targets for part in ("attn", "mlp")]
    expected = made_by_peft(
        host, tmp_path / "theirs", r=2, target_modules=[t.replace("attn.attn", "attn") for t in targets]
    )
    model = host.build()
    vp.import_peft(model, tmp_path / "theirs")
    assert close(output(host, model), expected)


TOWER = r"visual\.transformer\.resblocks\.\d\.mlp\.c_(fc|proj)"
BIASES = {
    "all": (peft.LoraConfig, dict(r=2, target_modules=["qkv", "fc1", "fc1_g"], bias="all")),
    "all_beside_whole_modules": (
        peft.LoraConfig,
        dict(r=2, target_modules=["qkv"], bias="all", modules_to_save=["head", "norm1"]),
    ),
    "of_changed_layers": (peft.LoraConfig, dict(r=2, target_modules=["qkv", "attn.proj", "fc2"], bias="lora_only")),
    "of_every_linear_layer": (peft.LoraConfig, dict(r=2, target_modules="all-linear", bias="lora_only")),
    "dora": (peft.LoraConfig, dict(r=2, use_dora=True, target_modules=["fc2"], bias="all")),
    "miss": (peft.MissConfig, dict(r=2, target_modules=["fc2", "attn.proj"], bias="miss_only")),
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("host", [HOST["vit_cls"], HOST["vit_swiglu"], HOST["clip_whole"]], ids=repr)
def test_biases_come_from_peft_and_go_there(host, name, tmp_path):
    kind, options = BIASES[name]
    if host.name == "clip_whole":
        if name in ("all_beside_whole_modules", "of_every_linear_layer"):
            pytest.skip("it has no head, and peft is wrong in its attention")
        options = options | {"target_modules": TOWER}
    expected = made_by_peft(host, tmp_path / "theirs", kind, **options)
    model = host.build()
    plain = output(host, model)
    vp.import_peft(model, tmp_path / "theirs")
    assert close(output(host, model), expected)
    # what is trained from here on are the biases that peft trained
    theirs = peft.get_peft_model(host.build(), kind(**options))
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad and n.endswith("bias")}
    trained = {n.removeprefix("base_model.model.").replace(".base_layer.", ".") for n in trained}
    trained = {n.replace(".modules_to_save.default.", ".").replace(".original_module.", ".") for n in trained}
    ours = {n.removeprefix("trained.") for n in model.peft["default"].state_dict() if n.endswith("bias")}
    assert ours == trained
    assert trained
    vp.export_peft(model, tmp_path / "again")
    assert close(read_by_peft(host, tmp_path / "again"), expected)
    vp.merge(model)
    assert close(output(host, model), expected)
    vp.unmerge(model)
    vp.detach(model)
    assert torch.equal(output(host, model), plain)


def test_biases_that_the_option_does_not_name_are_refused(tmp_path):
    made_by_peft(HOST["vit_cls"], tmp_path / "theirs", r=2, target_modules=["qkv"], bias="all")
    path = tmp_path / "theirs/adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"bias": "lora_only"}))
    refused(tmp_path / "theirs", "blocks.0.attn.proj.bias is not expected in .* by .*bias='lora_only'")
    path.write_text(json.dumps(content | {"bias": "none"}))
    refused(tmp_path / "theirs", "blocks.0.attn.proj.bias is not expected in .* by .*bias='none'")
    path.write_text(json.dumps(content | {"bias": "some"}))
    refused(tmp_path / "theirs", "bias is 'some', but must be none, all or")


def test_a_part_of_the_biases_has_no_option_in_peft(tmp_path):
    model = vp.attach(HOST["vit_cls"].build(), vp.LoRA(rank=2), train=["blocks.0.norm1.bias"])
    with pytest.raises(vp.UnsupportedError, match=r"peft trains whole modules, not blocks\.0\.norm1's bias alone"):
        vp.export_peft(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def query_one(name, value):
    """(IA)^3 as its paper has it scales keys and values, but a fused qkv has scales of queries, too."""
    if "attn.qkv" in name:
        value[: len(value) // 3] = 1


IA3_TARGETS = {"target_modules": ["qkv", "k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}


@pytest.mark.parametrize("name", ["vit_cls", "vit_swiglu", "eva_split", "eva_grouped"])
def test_import_of_ia3(name, tmp_path):
    host = HOST[name]
    options = IA3_TARGETS | {"modules_to_save": ["head"]}
    expected = made_by_peft(host, tmp_path / "theirs", peft.IA3Config, query_one, **options)
    model = host.build()
    vp.import_peft(model, tmp_path / "theirs")
    assert close(output(host, model), expected)
    assert [type(method) for method in model.peft["default"].methods] == [vp.IA3]
    vp.export_peft(model, tmp_path / "again")
    assert close(read_by_peft(host, tmp_path / "again"), expected)


@pytest.mark.parametrize(
    ("options", "change", "sentence"),
    [
        (IA3_TARGETS, lambda name, value: None, "scales the output of q in blocks.0.attn.qkv"),
        ({"target_modules": ["fc2"], "feedforward_modules": []}, query_one, "scales the output of fc2"),
        ({"target_modules": ["fc1"], "feedforward_modules": ["fc1"]}, query_one, "scales the input of fc1"),
    ],
)
def test_ia3_that_scales_something_else_is_refused(options, change, sentence, tmp_path):
    made_by_peft(HOST["vit_cls"], tmp_path / "theirs", peft.IA3Config, change, **options)
    refused(tmp_path / "theirs", sentence)


def test_import_of_the_patch_projection(tmp_path):
    host = HOST["vit_cls"]
    expected = made_by_peft(host, tmp_path / "theirs", r=2, lora_alpha=3, target_modules=["patch_embed.proj", "qkv"])
    model = host.build()
    vp.import_peft(model, tmp_path / "theirs")
    assert close(output(host, model), expected)


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_import_on_clip(tower, tmp_path):
    host = HOST["clip_whole"]
    root = {"visual": r"visual\.transformer", "text": "transformer"}[tower]
    expected = made_by_peft(host, tmp_path / "theirs", r=2, target_modules=rf"{root}\.resblocks\.\d\.mlp\.c_(fc|proj)")
    model = host.build()
    vp.import_peft(model, tmp_path / "theirs")
    assert close(output(host, model), expected)
    vp.export_peft(model, tmp_path / "again")
    assert close(read_by_peft(host, tmp_path / "again"), expected)


def test_import_shares_nothing(tmp_path):
    """One A of a fused qkv becomes three of the same values, so that there are 2 r d more parameters in each block."""
    host = HOST["vit_cls"]
    made_by_peft(host, tmp_path / "theirs", r=2, target_modules=["qkv"])
    theirs = sum(value.numel() for value in load_file(tmp_path / "theirs" / "adapter_model.safetensors").values())
    model = host.build()
    vp.import_peft(model, tmp_path / "theirs")
    assert model.peft["default"].num_parameters() == theirs + 3 * 2 * 2 * 32
    parts = model.peft["default"].lora.visual["0"]
    assert torch.equal(parts.q.A, parts.v.A)
    assert parts.q.A.data_ptr() != parts.v.A.data_ptr()


def test_imported_head_of_other_classes(tmp_path):
    host = HOST["vit_cls"]
    expected = made_by_peft(host, tmp_path / "theirs", r=2, target_modules=["fc1"], modules_to_save=["head"])
    model = host.build()
    model.reset_classifier(9)
    vp.import_peft(model, tmp_path / "theirs")
    assert close(output(host, model), expected)
    assert any(p is model.head.weight for p in vp.trainable_parameters(model))


KASA = peft.tuners.lora.KasaConfig()
BEGINNINGS = {
    "gaussian": dict(r=3, init_lora_weights="gaussian"),
    "orthogonal": dict(r=4, init_lora_weights="orthogonal"),
    "mica": dict(r=3, init_lora_weights="mica"),
    "pissa": dict(r=3, lora_alpha=5, init_lora_weights="pissa", rank_pattern={"fc1": 2, "attn.proj": 50}),
    "pissa_rank_stabilised": dict(r=3, init_lora_weights="pissa", use_rslora=True),
    "pissa_dora": dict(r=3, init_lora_weights="pissa", use_dora=True),
    "pissa_dropout": dict(r=3, init_lora_weights="pissa", lora_dropout=0.5),
    "olora": dict(r=3, lora_alpha=5, init_lora_weights="olora"),
    "olora_dora": dict(r=3, init_lora_weights="olora", use_dora=True),
    "kasa": dict(r=3, lora_alpha=5, kasa_config=KASA),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_import_of_what_began_with_a_part_of_the_weights(name, tmp_path):
    """PiSSA, OLoRA and KaSA change the backbone in peft; here it stays, and the logits are peft's own."""
    host = HOST["vit_cls"]
    targets = ["qkv", "attn.proj", "fc1"]
    expected = made_by_peft(host, tmp_path / "theirs", target_modules=targets, **BEGINNINGS[name])
    assert close(read_by_peft(host, tmp_path / "theirs"), expected)  # of a backbone that peft decomposes once more
    model = host.build()
    plain, weights = output(host, model), copy.deepcopy(model.state_dict())
    vp.import_peft(model, tmp_path / "theirs")
    assert close(output(host, model), expected)
    assert not torch.allclose(expected, plain, atol=1e-2)
    changed = BEGINNINGS[name].get("init_lora_weights") in ("pissa", "olora") or "kasa_config" in BEGINNINGS[name]
    adapter = model.peft["default"]
    assert {m.dropout.p for m in adapter.modules() if hasattr(m, "scaling")} == {0.0}
    assert {len(m.A) for path, m in adapter.named_modules() if path.endswith(".q")} == (
        {6} if changed else {BEGINNINGS[name]["r"]}
    )
    vp.save(model, tmp_path / "ours")
    again = host.build()
    vp.load(again, tmp_path / "ours")
    assert torch.equal(output(host, again), output(host, model))
    vp.detach(model)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    if changed:  # the factors alone are not the adapter
        config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
        tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
        tensors = {key: value for key, value in tensors.items() if "lora_diag" not in key}
        plainly = config | {"init_lora_weights": True, "kasa_config": None}
        (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(plainly))
        save_file(tensors, tmp_path / "theirs" / "adapter_model.safetensors")
        if "attn.proj" not in config["rank_pattern"]:
            vp.import_peft(model, tmp_path / "theirs")
            assert not torch.allclose(output(host, model), expected, atol=1e-2)


EVA = peft.tuners.lora.EvaConfig(rho=3.0)


def test_import_of_eva_as_peft_starts_it(tmp_path):
    """With the ranks that peft has shared out, which leave a layer without any; the change is peft's own."""
    host = HOST["vit_cls"]
    torch.manual_seed(2)
    targets = ["qkv", "attn.proj", "fc1", "fc2"]
    config = peft.LoraConfig(r=1, lora_alpha=3, target_modules=targets, init_lora_weights="eva", eva_config=EVA)
    with pytest.warns(UserWarning, match="low_cpu_mem_usage"):
        model = peft.get_peft_model(host.build(), config).eval()
    functions = dict(forward_fn=lambda model, images: model(images), show_progress_bar=False)
    functions |= dict(prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None)
    peft.initialize_lora_eva_weights(model, [host.inputs(6, seed=seed) for seed in range(2)], **functions)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        expected = host.run(model, host.inputs())
    model.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["rank_pattern"]
    ours = host.build()
    vp.import_peft(ours, tmp_path / "theirs")
    assert close(output(host, ours), expected)
    adapter = ours.peft["default"]
    assert len({len(m.A) for m in adapter.modules() if hasattr(m, "scaling")}) > 1
    assert len({path for path, m in adapter.named_modules() if hasattr(m, "scaling")}) < 3 * 6


@pytest.mark.parametrize("method", [vp.EVA(rank=2, alpha=3, targets=("q", "v", "proj")), vp.LoRAGA(rank=2, alpha=3)])
def test_export_of_what_starts_by_data(method, tmp_path):
    host = HOST["vit_cls"]
    torch.manual_seed(3)
    model = vp.attach(host.build(), method)
    vp.allocate(model, [(host.inputs(4, seed=8), torch.tensor([0, 1, 2, 3]))])
    randomise(model.peft["default"])
    expected = output(host, model)
    vp.export_peft(model, tmp_path / "ours")
    assert close(read_by_peft(host, tmp_path / "ours"), expected)
    again = host.build()
    vp.import_peft(again, tmp_path / "ours")
    assert close(output(host, again), expected)


def test_pissa_of_several_iterations_is_refused(tmp_path):
    """peft's own model differs at each reload; converted where it was trained, the adapter comes over exactly."""
    host = HOST["vit_cls"]
    folder, config = tmp_path / "theirs", dict(r=3, target_modules=["fc1", "fc2"], init_lora_weights="pissa_niter_2")
    torch.manual_seed(2)
    trained = peft.get_peft_model(host.build(), peft.LoraConfig(**config)).eval()
    trained.peft_config["default"].init_lora_weights = True  # as peft's documentation has it, so that it is not redrawn
    trained.save_pretrained(tmp_path / "initial")
    trained.peft_config["default"].init_lora_weights = "pissa_niter_2"
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        expected = host.run(trained, host.inputs())
    trained.save_pretrained(folder)
    torch.manual_seed(3)
    assert not torch.allclose(read_by_peft(host, folder), expected, atol=1e-2)
    refused(folder, "draws the part that it takes out of the weights anew at each reload")
    trained.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    model = host.build()
    vp.import_peft(model, tmp_path / "converted")
    assert close(output(host, model), expected)


def test_lily_is_refused(tmp_path):
    """The logits of an image depend on the others in its batch, which no method here does."""
    host = HOST["vit_cls"]
    torch.manual_seed(2)
    model = peft.get_peft_model(host.build(), peft.LilyConfig(r=2, target_modules=["fc1"], num_B=2, stride_A=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
        images = host.inputs(3)
        assert not torch.allclose(model(images)[:1], model(images[:1]), atol=1e-3)
        plain = host.build()
        assert torch.allclose(plain(images)[:1], plain(images[:1]), atol=1e-5)
    model.save_pretrained(tmp_path / "theirs")
    refused(
        tmp_path / "theirs",
        "LILY, which is not imported, because it weighs .* so that logits depend on",
    )


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa", "r": 8}], ids=str)
def test_import_of_every_linear_layer(options, tmp_path):
    """`all-linear` of a timm ViT includes the head, which peft changes like any other layer."""
    host = HOST["vit_cls"]
    expected = made_by_peft(host, tmp_path / "theirs", target_modules="all-linear", **({"r": 2} | options))
    model = host.build()
    plain = output(host, model)
    head = model.head.weight.detach().clone()
    vp.import_peft(model, tmp_path / "theirs")
    assert close(output(host, model), expected)
    vp.export_peft(model, tmp_path / "again")
    assert close(read_by_peft(host, tmp_path / "again"), expected)
    vp.save(model, tmp_path / "ours")
    again = host.build()
    vp.load(again, tmp_path / "ours")
    assert close(output(host, again), expected)
    vp.detach(model)
    assert torch.equal(output(host, model), plain)
    assert torch.equal(model.head.weight, head)


def test_patterns_whose_order_the_file_has_lost_are_refused(tmp_path):
    """peft takes the first pattern that matches and sorts them in the file, so that it reads another scale itself."""
    host, folder = HOST["vit_cls"], tmp_path / "theirs"
    patterns = {"fc2": 1, r"blocks\.0\..*": 20}
    options = dict(r=2, target_modules=["fc1", "fc2"], alpha_pattern=patterns)
    expected = made_by_peft(host, folder, **options)
    assert [*json.loads((folder / "adapter_config.json").read_text())["alpha_pattern"]] == [*reversed(patterns)]
    assert not torch.allclose(read_by_peft(host, folder), expected, atol=1e-2)
    refused(folder, r"and 'fc2' of alpha_pattern match blocks.0.mlp.fc2, and peft sorts them")
    # as the sentence has it, and where all that match mean the same
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"blocks.0.*.fc2": 1, r"blocks\.0\.mlp\.fc1": 20, "fc2": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = host.build()
    vp.import_peft(model, folder)
    assert close(output(host, model), expected)


def test_modules_trained_whole_within_others_are_refused(tmp_path):
    """peft trains a copy of each and writes both under one name, so that it does not read the folder itself."""
    host, folder = HOST["vit_cls"], tmp_path / "theirs"
    made_by_peft(host, folder, r=2, target_modules=["fc1"], modules_to_save=["blocks.0", "blocks.0.norm2"])
    with pytest.raises(KeyError, match="norm2"):
        read_by_peft(host, folder)
    refused(folder, "trains blocks.0.norm2 whole and blocks.0 around it")


def test_import_of_a_change_of_the_head_alone(tmp_path):
    host = HOST["vit_cls"]
    expected = made_by_peft(host, tmp_path / "theirs", r=2, target_modules=["head"])
    model = host.build()
    vp.import_peft(model, tmp_path / "theirs")
    assert close(output(host, model), expected)
    with pytest.raises(vp.UnsupportedError, match="changes no layer but its head"):
        vp.export_peft(model, tmp_path / "again")
    other = host.build()
    other.reset_classifier(9)
    with pytest.raises(vp.StorageError, match=r"lora_B of head .* is \(5, 2\) instead of \(9, 2\)"):
        vp.import_peft(other, tmp_path / "theirs")


# to peft

METHODS = {
    "query_value": vp.LoRA(rank=2, alpha=6),
    "all": vp.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2")),
    "overrides": vp.LoRA(rank=2, alpha=3, targets=("q", "v", "fc2"), overrides={"q": 3, "last:1": 1}),
    "last_block": vp.LoRA(rank=2, targets=("k", "fc1"), blocks="last:1", dropout=0.1),
    "patch_embed": vp.LoRA(rank=2, alpha=5, targets=("patch_embed", "v")),
    "dora": vp.DoRA(rank=2, alpha=3, targets=("q", "v", "fc1"), overrides={"q": 1}),
    "pissa": vp.PiSSA(rank=2, alpha=3, targets=("q", "v", "fc1"), overrides={"q": 1}),
    "stabilised": vp.LoRA(rank=2, alpha=3, overrides={"q": 3}, rank_stabilised=True, train_A=False),
    "ia3": vp.IA3(),
    "ia3_values": vp.IA3(targets=("v", "hidden"), blocks="last:2"),
    "two": [vp.LoRA(rank=2), vp.LoRA(rank=3, alpha=1, targets=("v", "fc1"))],
    "two_dora": [vp.DoRA(rank=2), vp.DoRA(rank=3, alpha=1, targets=("k", "fc1"))],
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("host", [HOST["vit_cls"], HOST["vit_swiglu"], HOST["vit_avg"]], ids=repr)
def test_export(host, name, tmp_path):
    model = vp.attach(host.build(), METHODS[name])
    randomise(model.peft["default"])
    expected = output(host, model)
    vp.export_peft(model, tmp_path / "ours")
    assert close(read_by_peft(host, tmp_path / "ours"), expected)
    again = host.build()
    vp.import_peft(again, tmp_path / "ours")
    assert close(output(host, again), expected)


def test_export_of_head_and_whole_modules(tmp_path):
    host = HOST["vit_cls"]
    model = host.build()
    model.reset_classifier(4)
    vp.attach(model, vp.LoRA(rank=2), train=("blocks.1.mlp.fc2", "patch_embed.proj"))
    randomise(model.peft["default"])
    vp.export_peft(model, tmp_path / "ours")

    def four_classes(plain):
        plain.reset_classifier(4)
        return plain

    assert close(read_by_peft(host, tmp_path / "ours", four_classes), output(host, model))


def test_import_then_export_gives_the_same_tensors(tmp_path):
    """What was one A in peft is one A again."""
    host = HOST["vit_cls"]
    made_by_peft(host, tmp_path / "theirs", r=2, target_modules=["qkv", "fc2"], modules_to_save=["head"])
    model = host.build()
    vp.import_peft(model, tmp_path / "theirs")
    vp.export_peft(model, tmp_path / "ours")
    left, right = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_peft_is_not_needed(tmp_path, monkeypatch):
    host = HOST["vit_cls"]
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError):
        import peft  # noqa: F401
    model = vp.attach(host.build(), vp.LoRA(rank=2))
    vp.export_peft(model, tmp_path / "ours")
    vp.import_peft(host.build(), tmp_path / "ours")


# where peft is wrong


@pytest.mark.parametrize(
    ("name", "targets", "sentence"),
    [
        ("beit", ("q",), "peft cannot adapt blocks.0.attn.qkv: .* never calls it"),
        ("eva_fused", ("v",), "never calls it"),
        ("clip_whole", ("q",), r"visual.transformer.resblocks.0.attn: .*adds the change of out_proj twice"),
        ("clip_whole", ("proj",), "adds the change of out_proj twice"),
        ("clip_custom", ("q",), "no form for the class Attention"),
    ],
)
def test_export_refuses_where_peft_is_wrong(name, targets, sentence, tmp_path):
    model = vp.attach(HOST[name].build(), vp.LoRA(rank=2, targets=targets))
    with pytest.raises(vp.UnsupportedError, match=sentence):
        vp.export_peft(model, tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "target"), [("beit", "qkv"), ("clip_whole", "attn.out_proj")])
def test_import_refuses_where_peft_is_wrong(name, target, tmp_path):
    host = HOST[name]
    made_by_peft(host, tmp_path / "theirs", r=2, target_modules=[target])
    model = host.build()
    with pytest.raises(vp.UnsupportedError, match="peft cannot adapt"):
        vp.import_peft(model, tmp_path / "theirs")
    assert not hasattr(model, "peft")


def test_peft_is_dead_where_we_say_so(tmp_path):
    """The reason of the refusal: with random A and B on BEiT's qkv peft's logits are the plain ones."""
    host = HOST["beit"]
    logits = made_by_peft(host, tmp_path / "theirs", r=2, target_modules=["qkv"])
    assert torch.equal(logits, output(host, host.build()))


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        (vp.VPT(num_tokens=2), {}, "peft has no VPT"),
        ([vp.LoRA(rank=2), vp.SSF()], {}, "peft has no SSF"),
        ([vp.LoRA(rank=2), vp.IA3()], {}, "is one method, not LoRA and IA3"),
        (vp.LoRA(rank=2, targets=("fc2",)), {"train": ("blocks.1.mlp.fc2",)}, "does not adapt blocks.1.mlp.fc2"),
        (vp.LoRA(rank=2), {"train": ("cls_token",)}, "whole modules, not the model's cls_token"),
        (vp.LoRA(rank=2), {"train": ("blocks.0.norm1.bias",)}, "whole modules, not blocks.0.norm1's bias"),
        (vp.LoRA(rank=2), {"train": ("norm",)}, "by the end of their names, and norm would also be patch_embed.norm"),
    ],
)
def test_export_refuses_what_peft_has_not(method, options, sentence, tmp_path):
    model = vp.attach(HOST["vit_cls"].build(), method, **options)
    with pytest.raises(vp.UnsupportedError, match=sentence):
        vp.export_peft(model, tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []


# other changes of weights, in their own forms

CHANGES = {
    "hira": (peft.HiraConfig, dict(r=3, target_modules=EVERYWHERE), vp.HiRA(rank=2, targets=("q", "v", "fc2"))),
    "miss": (peft.MissConfig, dict(r=5, target_modules=EVERYWHERE), vp.MiSS(rank=5, targets=("q", "v", "fc2"))),
    "oft": (
        peft.OFTConfig,
        dict(oft_block_size=4, target_modules=EVERYWHERE, use_cayley_neumann=False),
        vp.OFT(block=4, targets=("proj", "fc1")),
    ),
    "boft": (
        peft.BOFTConfig,
        dict(boft_block_size=4, target_modules=["qkv", "fc2"]),
        vp.BOFT(block=4, factors=1, targets=("proj", "fc2")),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_changes_come_from_peft_and_go_there(name, tmp_path):
    """Of a fused qkv, too: what peft changes as a whole, acts at q, k and v here, and becomes one again."""
    host = HOST["vit_cls"]
    kind, options, method = CHANGES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that of BOFT's missing extension
        expected = made_by_peft(host, tmp_path / "theirs", kind, **options)
        model = host.build()
        plain = output(host, model)
        vp.import_peft(model, tmp_path / "theirs")
        assert close(output(host, model), expected)
        assert not torch.allclose(expected, plain, atol=1e-2)
        assert {type(each) for each in model.peft["default"].methods} == {type(method)}
        vp.export_peft(model, tmp_path / "again")
    assert close(output_of_peft(host, tmp_path / "again"), expected)
    own = vp.attach(host.build(), method)
    randomise(own.peft["default"])
    vp.export_peft(own, tmp_path / "ours")
    assert close(output_of_peft(host, tmp_path / "ours"), output(host, own))


def output_of_peft(host, folder):
    """Likewise, with peft's own remarks about compiled extensions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(host.build(), folder).eval()
        with torch.no_grad():
            return host.run(model, host.inputs())


def test_factors_of_boft_are_those_of_peft(tmp_path, monkeypatch):
    """With its compiled extension peft takes several factors; what that computes is written out here."""
    layer = sys.modules["peft.tuners.boft.layer"]
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)

    def block_diagonals(blocks):
        return torch.stack([torch.block_diag(*each) for each in blocks])

    monkeypatch.setattr(layer.FastBlockDiag, "apply", block_diagonals)
    host = HOST["vit_cls"]
    options = dict(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["qkv", "fc2"])
    expected = made_by_peft(host, tmp_path / "theirs", peft.BOFTConfig, **options)
    model = host.build()
    vp.import_peft(model, tmp_path / "theirs")
    assert {(each.block, each.factors) for each in model.peft["default"].methods} == {(4, 3)}
    assert close(output(host, model), expected)
    vp.export_peft(model, tmp_path / "ours")
    assert close(output_of_peft(host, tmp_path / "ours"), expected)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (vp.OFT(block=4, targets=("q", "v")), "peft turns what blocks.0.attn.qkv reads as a whole, so it has no form"),
        (vp.OFT(block=4, targets=("q", "k", "v")), "are not turned all alike"),
        ([vp.MiSS(rank=4), vp.MiSS(rank=8)], "one rank of MiSS, not 4 and 8"),
        ([vp.DoRA(rank=2), vp.DoRA(rank=1, targets=("v",))], "two changes of DoRA act on the same rows"),
        (vp.GraLoRA(rank=4), "peft has no GraLoRA"),
    ],
)
def test_export_refuses_changes_that_peft_cannot_make(method, sentence, tmp_path):
    model = vp.attach(HOST["vit_cls"].build(), method)
    randomise(model.peft["default"])
    with pytest.raises(vp.UnsupportedError, match=sentence):
        vp.export_peft(model, tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        (peft.OFTConfig, dict(oft_block_size=4), "only use_cayley_neumann=False is imported"),
        (peft.OFTConfig, dict(oft_block_size=4, use_cayley_neumann=False, block_share=True), "block_share=True"),
        (peft.MissConfig, dict(r=4, init_weights="bat"), "another form of MiSS"),
        (peft.HiraConfig, dict(r=4, hira_dropout=0.1), "hira_dropout=0.1 is not supported"),
        (peft.C3AConfig, dict(block_size=4), "C3A, which is not imported; LoRA, DoRA, IA3, HiRA"),
    ],
)
def test_other_forms_of_changes_are_refused(kind, options, sentence, tmp_path):
    made_by_peft(HOST["vit_cls"], tmp_path / "theirs", kind, target_modules=["fc1"], **options)
    refused(tmp_path / "theirs", sentence)


# damaged and foreign files


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "theirs"
    made_by_peft(HOST["vit_cls"], folder, r=2, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    return folder


def refused(folder, sentence):
    """The folder is refused in these words and the model stays as it was."""
    model, twin = HOST["vit_cls"].build(), HOST["vit_cls"].build()
    with pytest.raises(vp.StorageError, match=sentence) as caught:
        vp.import_peft(model, folder)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "peft")
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert all(p.requires_grad for p in model.parameters())


def changed(theirs, folder, config=None, tensors=lambda tensors: None, drop=()):
    """A copy of peft's folder with other fields and tensors."""
    folder.mkdir()
    content = json.loads((theirs / "adapter_config.json").read_text()) | (config or {})
    values = load_file(theirs / "adapter_model.safetensors")
    tensors(values)
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in content.items() if k not in drop}))
    save_file(values, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"r": 3}, r"lora_A of blocks.0.attn.qkv .* is \(2, 32\) instead of \(3, 32\)"),
        ({"r": "2"}, "r is '2', but must be a positive integer"),
        ({"r": True}, "must be a positive integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"bias": "all"}, "blocks.0.attn.proj.bias is missing"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"from_the_future": 1}, "from_the_future=1 is not supported"),
        (
            {"init_lora_weights": "lora_ga"},
            "changed the weights of the backbone in a way .*; convert it in the process",
        ),
        ({"init_lora_weights": "corda"}, "changed the weights of the backbone in a way .*; convert it in the process"),
        ({"init_lora_weights": "pissa_niter_4"}, "anew at each reload"),
        ({"init_lora_weights": "pissa", "kasa_config": {"beta": 1}}, "only one of them"),
        ({"kasa_config": {"beta": 1}}, "has lora_A, lora_B for blocks.0.attn.qkv instead of lora_A, lora_B, lora_diag"),
        ({"peft_type": "LOHA"}, "is of peft_type LOHA"),
        ({"peft_type": None}, "lacks peft_type"),
        ({"target_modules": None}, "lacks target_modules"),
        ({"target_modules": ["qkv"]}, "has tensors for blocks.0.mlp.fc1, .* does not target"),
        ({"target_modules": ["qkv", "fc1", "fc2"]}, "has no tensors for blocks.0.mlp.fc2"),
        ({"target_modules": "(qkv"}, "is not a regular expression"),
        ({"rank_pattern": {"*": 2}}, "is not a regular expression"),
        ({"rank_pattern": {"fc1": 0}}, "rank_pattern is"),
        ({"modules_to_save": ["norm", "head"]}, "norm.bias is missing"),
        ({"modules_to_save": None}, "head.bias is not expected"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "has tensors for blocks.1"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_changed_configuration(theirs, tmp_path, config, sentence):
    refused(changed(theirs, tmp_path / "copy", config), sentence)


def rename(values, old, new):
    for key in [key for key in values if old in key]:
        values[key.replace(old, new)] = values.pop(key)


def without(values, name):
    del values[f"base_model.model.{name}"]


def put(values, name, value):
    values[f"base_model.model.{name}"] = value


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (lambda v: without(v, "blocks.0.attn.qkv.lora_B.weight"), "has lora_A for blocks.0.attn.qkv instead of"),
        (lambda v: rename(v, "blocks.2.mlp", "blocks.7.mlp"), "changes blocks.7.mlp.fc1, which is no linear layer"),
        (lambda v: rename(v, "mlp.fc1", "mlp.fc2"), "has no tensors for blocks.0.mlp.fc1"),
        (lambda v: put(v, "norm.weight", torch.ones(32)), "norm.weight is not expected"),
        (lambda v: put(v, "head.weight", torch.ones(5, 31)), "no linear head"),
        (lambda v: put(v, "head.bias", torch.ones(4)), r"head.bias .* is \(4,\) for 5 classes"),
        (lambda v: without(v, "head.bias"), "head.bias is missing"),
        (lambda v: put(v, "head.lora_A.weight", torch.ones(2, 32)), "has tensors for head, .* does not target"),
        (lambda v: rename(v, "base_model.model.", ""), "peft does not write"),
        (lambda v: put(v, "blocks.0.mlp.fc1.lora_A.weight", torch.ones(2, 32, dtype=torch.int8)), "of type torch.int8"),
        (lambda v: v.clear(), "changes no layer"),
    ],
    ids=[
        "no_B",
        "other_block",
        "other_layer",
        "extra",
        "head_in",
        "head_bias",
        "half_head",
        "lora_head",
        "prefix",
        "int",
        "none",
    ],
)
def test_changed_tensors(theirs, tmp_path, tensors, sentence):
    refused(changed(theirs, tmp_path / "copy", tensors=tensors), sentence)


def test_pickle_is_refused(theirs, tmp_path):
    folder = changed(theirs, tmp_path / "copy")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, "a pickle that can run code")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_files(theirs, tmp_path, file):
    folder = changed(theirs, tmp_path / "copy")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[:-20])
    refused(folder, "is damaged")
    (folder / file).unlink()
    refused(folder, f"holds no {file}")


def test_another_backbone(theirs):
    model = HOST["dinov3"].build()
    with pytest.raises(vp.StorageError, match="was made for a VisionTransformer, not for a Eva"):
        vp.import_peft(model, theirs)
    assert not hasattr(model, "peft")


def test_import_beside_another_adapter(theirs, tmp_path):
    host = HOST["vit_cls"]
    alone = host.build()
    vp.import_peft(alone, theirs)
    model = vp.attach(host.build(), vp.VPT(num_tokens=2))
    vp.import_peft(model, theirs, "theirs")
    assert torch.equal(output(host, model), output(host, alone))
    with pytest.raises(vp.ConfigurationError, match="already attached"):
        vp.import_peft(model, theirs, "theirs")
    with pytest.raises(vp.ConfigurationError, match="say which one"):
        vp.export_peft(model, tmp_path / "ours")
    vp.export_peft(model, tmp_path / "ours", "theirs")
    assert close(read_by_peft(host, tmp_path / "ours"), output(host, model))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, failing):
    model = vp.attach(HOST["vit_cls"].build(), vp.LoRA(rank=2))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(vp.StorageError, match="No space left on device"):
        vp.export_peft(model, tmp_path / "ours")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_export_deletes_nothing_of_others(tmp_path, monkeypatch, failing):
    """Also what has the name that a folder in the making used to have."""
    model = vp.attach(HOST["vit_cls"].build(), vp.LoRA(rank=2))
    mine = tmp_path / f".ours.{os.getpid()}"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(vp.StorageError, match="No space left"):
            vp.export_peft(model, tmp_path / "ours")
    assert [path.name for path in tmp_path.rglob("*")] == [mine.name, "notes.txt"]
    vp.export_peft(model, tmp_path / "ours")
    assert (tmp_path / "ours" / "adapter_config.json").is_file()
    assert (mine / "notes.txt").read_text() == "mine"


def test_export_never_overwrites(theirs, tmp_path):
    model = vp.attach(HOST["vit_cls"].build(), vp.LoRA(rank=2))
    folder = changed(theirs, tmp_path / "copy")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(vp.StorageError, match="not empty"):
        vp.export_peft(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_original_model_is_untouched_by_export(tmp_path):
    host = HOST["vit_cls"]
    model = vp.attach(host.build(), vp.LoRA(rank=2))
    randomise(model.peft["default"])
    before, state = output(host, model), copy.deepcopy(model.state_dict())
    vp.export_peft(model, tmp_path / "ours")
    assert torch.equal(output(host, model), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
