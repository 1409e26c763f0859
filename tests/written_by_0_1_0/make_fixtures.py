"""How adapters/, learners/, peft_export/ and backbones/ were made with the old commit; not needed to use them.

Run in this folder: python make_fixtures.py
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

FOLDER = Path(__file__).parent
SEED = 7


@torch.no_grad()
def store(model, name, embedding_ids=None):
    """Redraw all weights a little, so that each matters, round them to bfloat16, and write them."""
    generator = torch.Generator().manual_seed(SEED)
    state = {}
    for key, parameter in sorted(model.state_dict().items()):
        if not parameter.is_floating_point() or key == "attn_mask":
            continue
        value = parameter + 0.1 * torch.randn(parameter.shape, generator=generator)
        if key == "logit_scale":
            value = torch.tensor(np.log(20.0), dtype=torch.float32)
        state[key] = value.to(torch.bfloat16).contiguous()
    if embedding_ids is not None:
        rows = state.pop("token_embedding.weight")[embedding_ids]
        state |= {"token_embedding.ids": embedding_ids, "token_embedding.rows": rows.contiguous()}
    save_file(state, FOLDER / "backbones" / f"{name}.safetensors")


def store_backbones():
    from fixture_backbones import CLASS_NAMES, CLIP_NAME, VIT

    import visionpeft as vp

    torch.manual_seed(SEED)
    store(vp.create_backbone("vit_tiny_patch16_224", pretrained=False, num_classes=5, **VIT), "vit")
    torch.manual_seed(SEED)
    clip, tokenizer = vp.create_clip(CLIP_NAME, pretrained=False)
    names = [*CLASS_NAMES, "wren", "robin"]
    texts = [t.format(n) for n in names for t in ("a photo of a {}.", "X X {}.", "{}", "a X {} .")]
    store(clip, "clip", torch.unique(tokenizer(texts)))


def images_of(number, seed):
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).half().float()


@torch.no_grad()
def randomise(tensors):
    """Move what is trained off its initial values."""
    generator = torch.Generator().manual_seed(SEED)
    for name, tensor in tensors:
        size = 0.05 if name.startswith("trained.") else 0.3
        tensor += size * torch.randn(tensor.shape, generator=generator)


def write(folder, logits, images, about, **more):
    """Images are stored in float16, which holds them exactly."""
    arrays = {"images": images.numpy().astype(np.float16), "logits": logits.detach().float().numpy(), **more}
    np.savez_compressed(folder / "expected.npz", **arrays)
    (folder / "recipe.json").write_text(json.dumps(about, indent=2) + "\n")


def make_adapters():
    from fixture_backbones import build_clip, build_clip_visual, build_vit, clip_outputs

    import visionpeft as vp
    from visionpeft.backbones.preprocessing import Preprocessing

    preprocessing = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    methods = {
        "lora_head": ("build_vit", vp.LoRA(rank=2)),
        "vpt_lora_stacked": (
            "build_vit",
            [vp.VPT(num_tokens=3, deep=True), vp.LoRA(rank=2, targets=("q", "k", "fc1"))],
        ),
        "ssf": ("build_vit", vp.SSF()),
        "adalora": ("build_vit", vp.AdaLoRA(rank=1, initial_rank=2, interval=1)),
        "pafi": ("build_vit", vp.PaFi(density=0.02)),
        # these have fields since whose defaults are not what they did then
        "unipelt": ("build_vit", vp.UniPELT(rank=2, num_tokens=3, bottleneck=4)),
        "fish_mask": ("build_vit", vp.FishMask(density=0.02)),
        "child_tuning_d": ("build_vit", vp.ChildTuning("D", share=0.05)),
        "gated_vpt": ("build_vit", vp.GatedVPT(num_tokens=3, gate=1.0)),
        "clip_lora_towers": ("build_clip", vp.LoRA(rank=2, towers=["visual", "text"])),
        "clip_visual_adaptformer": ("build_clip_visual", vp.AdaptFormer(bottleneck=4, scale="learned")),
    }
    images = images_of(3, 1)
    for name, (builder, method) in methods.items():
        folder = FOLDER / "adapters" / name
        model = {"build_vit": build_vit, "build_clip_visual": build_clip_visual}.get(builder, lambda: build_clip()[0])()
        torch.manual_seed(SEED)
        train = ["norm"] if name == "lora_head" else []
        vp.attach(model, method, train=train)
        if name in ("fish_mask", "child_tuning_d"):
            vp.allocate(model, [(images_of(10, 5), torch.arange(10) % 5)])
        if name == "adalora":
            train_adalora(model)
        else:
            randomise(model.peft["default"].named_parameters())
        model.eval()
        more = {}
        with torch.no_grad():
            if builder == "build_clip":
                tokens = build_clip()[1](["a photo of a heron.", "a photo of a buzzard.", "a photo of a red kite."])
                logits, more = clip_outputs(model, images, tokens), {"tokens": tokens.numpy()}
            else:
                logits = model(images)
        classes = None if builder == "build_clip" else [f"class {i}" for i in range(5)]
        vp.save(model, folder, class_names=classes, preprocessing=preprocessing, metadata={"note": "fixture"})
        about = {
            "written_by": "visionpeft.save", "backbone": f"fixture_backbones.{builder}()", "method": repr(method),
            "train": train, "logits": "fixture_backbones.clip_outputs" if more else "model(images)",
            "how": "six steps of AdamW" if name == "adalora" else "initial tensors plus noise of a fixed seed",
        }  # fmt: skip
        write(folder, logits, images, about, **more)


def train_adalora(model):
    import visionpeft as vp

    steps = 6
    optimizer = torch.optim.AdamW(vp.trainable_parameters(model), lr=0.05)
    for step in range(1, steps + 1):
        batch, labels = images_of(10, 100 + step), torch.arange(10) % 5
        loss = F.cross_entropy(model(batch), labels) + vp.penalty(model)
        loss.backward()
        optimizer.step()
        vp.after_step(model, step, steps)
        optimizer.zero_grad()


def make_learners():
    from fixture_backbones import CLASS_NAMES, build_clip

    import visionpeft as vp

    kinds = {
        "coop": (vp.CoOp, {"context_length": 2, "position": "middle"}),
        "maple": (vp.MaPLe, {"num_tokens": 2, "depth": 2}),
        "tip_adapter": (vp.TipAdapter, {"alpha": 1.5, "beta": 2.5}),
        "clip_lora": (vp.CLIPLoRA, {"rank": 2}),
    }
    images = images_of(3, 2)
    for name, (kind, options) in kinds.items():
        folder = FOLDER / "learners" / name
        clip, tokenizer = build_clip()
        torch.manual_seed(SEED)
        learner = kind(clip, tokenizer, CLASS_NAMES, **options)
        if kind is vp.TipAdapter:
            with torch.no_grad():
                features = F.normalize(clip.encode_image(images_of(6, 3)), dim=-1)
            learner.fit_features((features, torch.arange(6) % 3))
        else:
            randomise((n, p) for n, p in learner.named_parameters() if p.requires_grad)
        learner.eval()
        with torch.no_grad():
            logits = learner(images)
        vp.save_learner(learner, folder, metadata={"note": "fixture"})
        more = {}
        if not kind.class_bound:
            learner.set_class_names(["wren", "heron"])
            with torch.no_grad():
                more["logits_of_wren_heron"] = learner(images).numpy()
        about = {
            "written_by": "visionpeft.save_learner", "backbone": "fixture_backbones.build_clip()",
            "learner": f"{kind.__name__}({options})", "logits": "learner(images)",
        }  # fmt: skip
        write(folder, logits, images, about, **more)


def make_peft_export():
    from fixture_backbones import build_vit

    import visionpeft as vp

    folder, model, images = FOLDER / "peft_export", build_vit(), images_of(3, 4)
    torch.manual_seed(SEED)
    vp.attach(model, vp.LoRA(rank=2))
    randomise(model.peft["default"].named_parameters())
    model.eval()
    with torch.no_grad():
        logits = model(images)
    vp.export_peft(model, folder)
    about = {
        "written_by": "visionpeft.export_peft", "backbone": "fixture_backbones.build_vit()", "method": "LoRA(rank=2)",
        "logits": "model(images) of the exported model",
    }  # fmt: skip
    write(folder, logits, images, about)


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER))
    for old in ("adapters", "learners", "peft_export", "backbones"):
        shutil.rmtree(FOLDER / old, ignore_errors=True)
    (FOLDER / "backbones").mkdir()
    store_backbones()
    make_adapters()
    make_learners()
    make_peft_export()
