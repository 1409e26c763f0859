"""Every shipped configuration parses and builds what it names, without a download."""

import json
import math

import pytest
import torch
import yaml
from small_learner_runs import CLIP
from small_runs import draw_images
from without_config import BY_DEFAULT, OVER_OTHERS

import visionpeft as vp
from visionpeft import methods
from visionpeft.clip import learners
from visionpeft.data.video.transforms import LARGEST_MAGNITUDE, MAGNITUDE_BINS, ClipAugmentation
from visionpeft.errors import ConfigurationError
from visionpeft.files import shipped
from visionpeft.runs.cli import CLI
from visionpeft.runs.command import silence
from visionpeft.runs.config_files import config_content, find_config, shipped_configs
from visionpeft.tasks import prompt_learning

CONFIGS = shipped("configs")
SHIPPED = shipped_configs()
WHOLE = [name for name in SHIPPED if name.split("_")[0] in ("vtab", "fgvc", "images")]
OF_CLIP = ("backbones/clip_rn50_openai.yaml", "backbones/clip_vit_b16_openai.yaml", "backbones/nano_clip.yaml")
OF_LEARNERS_ALONE = (OF_CLIP[0], OF_CLIP[2])
OVERLAYS = sorted(
    {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("backbones/*.yaml")} - set(OF_LEARNERS_ALONE)
)
PROTOCOLS = {
    "fewshot": (
        *("zero_shot", "linear_probe", "coop", "cocoop", "prograd", "kgcoop", "maple", "ivlp", "promptsrc", "tpt"),
        *(
            "clip_adapter",
            "tip_adapter",
            "tip_adapter_f",
            "clip_lora",
            "task_res",
            "tda",
            "clap",
            "lp_plus_plus",
            "tuned_clip",
        ),
    ),
    **dict.fromkeys(
        ("base_to_new", "cross_dataset"),
        ("zero_shot", "tpt", "coop", "cocoop", "kgcoop", "prograd", "maple", "promptsrc", "ivlp", "clip_lora", "tda"),
    ),
}
# Learners without training images, and those for whose protocol there are no published numbers.
OF_SEVERAL_CONTEXTS = ("plot", "proda")
LATER = ("tcp", "rpo", "2sfs", "dept", "provp", "dapt", "plot_plus_plus")
# learners that see several views of each test image
ON_VIEWS = ("zero", "mta", "tps", "c_tpt", "diff_tpt", "prompt_align")
PROTOCOLS = {protocol: (*names, *LATER, *ON_VIEWS, *OF_SEVERAL_CONTEXTS) for protocol, names in PROTOCOLS.items()}
WITHOUT_IMAGES = {
    f"{protocol}_{name}.yaml" for protocol in PROTOCOLS for name in ("zero_shot", "tpt", "tda", *ON_VIEWS)
}
UNPUBLISHED = {
    *("base_to_new_tpt.yaml", "base_to_new_clip_lora.yaml", "cross_dataset_ivlp.yaml", "cross_dataset_clip_lora.yaml"),
    *("base_to_new_tda.yaml", "fewshot_clap.yaml", "fewshot_lp_plus_plus.yaml", "fewshot_tuned_clip.yaml"),
    *(f"{protocol}_{name}.yaml" for protocol in PROTOCOLS for name in (*ON_VIEWS, *OF_SEVERAL_CONTEXTS)),
    *(f"{protocol}_{name}.yaml" for protocol in ("fewshot", "cross_dataset") for name in LATER),
    *(f"base_to_new_{name}.yaml" for name in ("dept", "dapt", "plot_plus_plus")),
} - {"cross_dataset_diff_tpt.yaml", "cross_dataset_prompt_align.yaml"}
WITH_A_RECIPE_OF_THEIR_OWN = (
    "TipAdapter",
    "CLIPLoRA",
    "TaskRes",
    "CLAP",
    "TunedCLIP",
    "TCP",
    "TwoStageFewShot",
)  # others have that of CoOp's trainer
LEARNERS = [f"{protocol}_{name}.yaml" for protocol, names in PROTOCOLS.items() for name in names]
WITHOUT_BENCHMARK_NUMBERS = (
    *("dora", "vera", "adalora", "krona", "kadaptation", "compacter", "mam", "unipelt", "lora_plus"),
    *("ia3", "layer_norm_tuning", "pafi", "fish_mask", "child_tuning_f", "child_tuning_d"),
)
UNPUBLISHED |= {f"{benchmark}_{name}.yaml" for benchmark in ("vtab", "fgvc") for name in WITHOUT_BENCHMARK_NUMBERS}
UNPUBLISHED |= {f"fgvc_{name}.yaml" for name in ("rep_adapter", "convpass", "fact_tt", "fact_tk")}
NAMES = (
    *WITHOUT_BENCHMARK_NUMBERS,
    *("vpt", "vpt_shallow", "lora", "adaptformer", "adapter", "adapter_plus", "ssf", "bitfit", "prefix_tuning"),
    *("linear_probe", "full", "last_blocks", "gated_vpt", "rep_adapter", "convpass", "fact_tt", "fact_tk"),
    *("spt_lora", "spt_adapter", "e2vpt", "gps"),
)
# relatives of LoRA, of which the fine-grained benchmark has no configuration
VTAB_ALONE = (
    *("pissa", "olora", "oft", "boft", "hira", "miss", "rand_lora", "gra_lora", "fourierft", "waveft", "moslora"),
    *("vblora", "ltsft", "xprompt", "pruned_bit_fit", "relora", "e2vpt_pruned", "diff_pruning", "far"),
    *("periodic_lora", "auto_lora", "selective_prompts", "fish_dip"),
    *("sora", "dy_lora", "lora_dropout", "capa_boost", "hi_wi"),
    *("eva", "lora_ga", "second_order", "neuro_ada", "sct", "binary_mask", "said"),
)
UNPUBLISHED |= {f"vtab_{name}.yaml" for name in VTAB_ALONE if name != "e2vpt_pruned"}
# networks beside the backbone, likewise
BESIDE = ("dtl", "lst", "vqt")
UNPUBLISHED |= {"vtab_lst.yaml", "vtab_vqt.yaml"}
VIDEOS = shipped_configs("video_")
VIDEO_NAMES = ("st_adapter", "aim", "linear_probe", "lora", "vpt", "adaptformer", "full")
VIDEO_SETS = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("videos/*.yaml"))
HEADS = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("heads/*.yaml"))
MASK_SETS = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("segmentation/*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Arguments that give each configuration data of its kind."""
    images = draw_images(tmp_path_factory.mktemp("data") / "photos", per_class=6)
    cub = tmp_path_factory.mktemp("fgvc") / "cub"
    cub.mkdir()
    for split in ("train", "val", "test"):
        rows = {f"{split}/{label}.png": label for label in range(200)}
        (cub / f"{split}.json").write_text(json.dumps(rows))
    return {
        "vtab": [],
        "images": ["--data.root", str(images)],
        "fgvc": ["--data.root", str(cub.parent)],
    }


def build(*arguments: str) -> CLI:
    silence()
    return CLI(list(arguments))


def test_every_method_has_a_configuration_for_each_benchmark():
    assert {f"{benchmark}_{name}.yaml" for benchmark in ("vtab", "fgvc") for name in NAMES} <= set(WHOLE)
    assert {f"vtab_{name}.yaml" for name in (*VTAB_ALONE, *BESIDE)} <= set(WHOLE)
    named = {method_of(name)["class_path"] for name in WHOLE}
    of_videos = {method_of(name)["class_path"] for name in VIDEOS}
    assert set(VIDEOS) == {f"video_{name}.yaml" for name in VIDEO_NAMES}
    assert of_videos - named == {"STAdapter", "AIM"}  # these act across frames
    assert named | of_videos == set(methods.__all__) - {"Method"} - {*BY_DEFAULT, *OVER_OTHERS}
    for name in BY_DEFAULT:
        assert method_of(f"vtab_{name.lower()}.yaml") == {"class_path": name}


def method_of(name):
    return config_content(name)["model"]["init_args"]["method"]


@pytest.mark.parametrize("name", VIDEOS)
def test_video_configuration_builds(name):
    cli = build("--config", name, "--trainer.accelerator", "cpu")
    assert cli.model.backbone_name == "nano_vit"
    (method,) = cli.model.methods
    assert type(method).__name__ == method_of(name)["class_path"]
    for field, value in method_of(name).get("init_args", {}).items():
        assert (
            list(value) == list(getattr(method, field)) if isinstance(value, list) else value == getattr(method, field)
        )
    assert type(cli.datamodule).__name__ == "Motion"
    frames = cli.datamodule.sampling.num_frames
    with torch.no_grad():
        assert cli.model.eval()(torch.zeros(1, 2, 3, frames, 32, 32)).shape == (1, 8)  # two views
    assert vp.trainable_parameters(cli.model.model)


@pytest.mark.parametrize("overlay", VIDEO_SETS)
def test_video_set_overlay(overlay):
    """The overlay's options are those of its data module, and its frames are the model's."""
    content = yaml.safe_load((CONFIGS / overlay).read_text())
    given = content["data"]
    assert content["model"]["init_args"]["num_frames"] == given["init_args"]["sampling"]["num_frames"]
    with pytest.raises(vp.DataError, match=given["init_args"]["root"]):  # parsed; the videos are not there
        build("--config", "video_aim.yaml" if "aim" in overlay else "video_st_adapter.yaml", "--config", overlay)


@pytest.mark.parametrize("overlay", MASK_SETS)
def test_overlay_of_masks(overlay):
    """The overlay's options are those of the task and of its data module; the images are not there."""
    with pytest.raises(vp.DataError, match="nowhere"):
        build("--config", "scenes_lora.yaml", "--config", overlay, "--data.root", "nowhere")


@pytest.mark.parametrize("overlay", HEADS)
def test_overlay_of_a_head(overlay):
    given = yaml.safe_load((CONFIGS / overlay).read_text())["model"]["init_args"]["head"]
    task = build("--config", "scenes_linear_probe.yaml", "--config", overlay, "--trainer.accelerator", "cpu").model
    layout = task.adapter.get_submodule("head").layout
    assert layout["class"] == given["class_path"]
    assert layout["fields"] | given["init_args"] == layout["fields"]


@pytest.mark.parametrize("overlay", [name for name in VIDEO_SETS if "aim" in name])
def test_recipe_of_aim(overlay):
    """What its authors' configurations say; the model of the overlay is built with a tiny tower in its place."""
    content = yaml.safe_load((CONFIGS / overlay).read_text())
    something = "something" in overlay
    cli = build(
        *("--config", "video_aim.yaml", "--config", overlay, "--data", "Motion", "--trainer.accelerator", "cpu"),
        *("--data.sampling.num_frames", "8", "--data.augmentation.flip", "false"),  # which Motion refuses
    )
    assert cli.model.methods == [vp.AIM(num_frames=8, num_temporal=1 + something, scale=0.5 + 0.5 * something)]
    (rate,) = {module.p for module in cli.model.model.head if isinstance(module, torch.nn.Dropout)}
    assert (rate, cli.model.label_smoothing, cli.config.trainer.max_epochs) == (
        0.5,
        0.1 * something,
        30 + 20 * something,
    )
    assert cli.model.model.head[1].weight.std().item() == pytest.approx(0.01, rel=0.1)
    recipe = cli.model.optimisation
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.decay_biases) == ("adamw", 3e-4, 0.05, True)
    assert (recipe.schedule, recipe.warmup_epochs, recipe.warmup_ratio) == ("cosine_by_epoch", 2.5, 0.1)
    augmentation = ClipAugmentation(**content["data"]["init_args"]["augmentation"])
    assert augmentation.flip
    if something:
        assert round(augmentation.magnitude / LARGEST_MAGNITUDE * (MAGNITUDE_BINS - 1)) == 7  # of 30
        assert (augmentation.randaugment, augmentation.erasing) == (4, 0.25)
    else:
        sampling = content["data"]["init_args"]["sampling"]
        assert (sampling["too_short"], sampling["placement"], sampling["stride"]) == ("loop", "centred", 16)


def test_clip_tower_overlay_of_videos():
    overlay = "backbones/clip_vit_b16_openai.yaml"
    more = ["--model.backbone_kwargs", "null", "--model.pretrained", "false", "--data.num_workers", "0"]
    cli = build("--config", "video_aim.yaml", "--config", overlay, *more)
    assert cli.model.model.num_features == 768  # in front of the projection
    assert cli.model.preprocessing.input_size == (224, 224)
    assert cli.config.trainer.precision == "16-mixed"


@pytest.mark.parametrize("name", WHOLE)
def test_configuration_builds(name, data):
    cli = build("--config", name, *data[name.split("_")[0]], "--trainer.accelerator", "cpu")
    assert cli.model.backbone_name == "nano_vit.distilled"
    given = method_of(name)
    (method,) = cli.model.methods
    assert type(method).__name__ == given["class_path"]
    if cli.model.adapter.pending:
        vp.allocate(cli.model.model, [(torch.rand(2, 3, 64, 64), torch.tensor([0, 1]))])
    assert cli.model(torch.zeros(2, 3, 64, 64)).shape == (2, len(cli.datamodule.class_names))
    assert vp.trainable_parameters(cli.model.model)


@pytest.mark.parametrize("name", [name for name in SHIPPED if "/" not in name])
def test_header_says_what_a_reader_needs(name):
    header = [line for line in find_config(name).read_text().splitlines() if line.startswith("#")]
    text = " ".join(header)
    assert "python -m visionpeft.fit --config" in text
    if name.startswith(("vtab_", "fgvc_", "video_")) or name in LEARNERS:
        assert "https://arxiv.org/abs/" in text
        assert ("Published (" in text) == (name not in UNPUBLISHED)
        assert f"--config {name}" in text
        assert "easured" in text


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_backbone_overlay(overlay):
    method = "SSF" if "convnext" in overlay else "VPT"  # a ConvNeXt has no attention for prompts
    options = ("--model.pretrained", "false", "--data.num_workers", "0")
    cli = build("--config", f"vtab_{method.lower()}.yaml", "--config", overlay, *options)
    assert cli.model.backbone_name == yaml.safe_load((CONFIGS / overlay).read_text())["model"]["init_args"]["backbone"]
    assert type(cli.model.methods[0]).__name__ == method
    if "nano" not in overlay:
        assert overlay in OF_CLIP or cli.config.trainer.max_epochs == 100
        assert cli.config.trainer.precision == ("16-mixed" if overlay in OF_CLIP else "bf16-mixed")
        assert cli.datamodule.description()["sizes"]["test"] == 73_728
        assert cli.model.preprocessing.input_size == (224, 224)


def test_clip_art_overlay():
    cli = build("--config", "vtab_lora.yaml", "--config", "clipart.yaml")
    assert type(cli.datamodule).__name__ == "ClipArt"
    assert len(cli.model.class_names) == len(cli.datamodule.class_names) >= 20


def test_overrides_and_stacked_methods():
    cli = build("--config", "vtab_vpt.yaml", "--model.method", "LoRA", "--model.method.rank", "4")
    # A field that both methods have keeps the value the configuration gave it.
    assert cli.model.methods == [vp.LoRA(rank=4, dropout=cli.config.model.init_args.method.init_args.dropout)]
    stacked = "[{class_path: VPT, init_args: {num_tokens: 2, dropout: 0}}, {class_path: BitFit}]"
    cli = build("--config", "vtab_vpt.yaml", "--model.method", stacked)
    assert cli.model.methods == [vp.VPT(num_tokens=2), vp.BitFit()]


def test_print_config(capsys):
    with pytest.raises(SystemExit) as exit_:
        build("--config", "vtab_vpt.yaml", "--data.task", "dsprites_ori", "--print_config")
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["init_args"]["task"] == "dsprites_ori"
    assert printed["model"]["init_args"]["method"]["class_path"].endswith("VPT")


@pytest.fixture
def small_nano_clip(monkeypatch):
    """A tiny CLIP in the place of the one whose weights are in the package."""

    def create(name, **options):
        return create_clip(CLIP[1], pretrained=False)

    create_clip = prompt_learning.create_clip
    monkeypatch.setattr(prompt_learning, "create_clip", create)


def test_every_configuration_of_a_learner_is_known():
    kinds = set(SHIPPED) - set(WHOLE) - {"clipart.yaml"}
    assert {name for name in kinds if name.startswith(tuple(PROTOCOLS))} == set(LEARNERS)
    named = {learner_of(name)["class_path"] for name in LEARNERS}
    assert named == {name for name in learners.__all__ if is_learner(getattr(learners, name))}


def is_learner(value):
    return isinstance(value, type) and issubclass(value, learners.Learner) and value is not learners.Learner


def learner_of(name):
    return config_content(name)["model"]["init_args"]["learner"]


@pytest.mark.parametrize("name", LEARNERS)
def test_configuration_of_a_learner_builds(name, small_nano_clip):
    # The tiny CLIP has two blocks.
    options = [name for name in learner_of(name).get("init_args", {}) if name.startswith("depth")]
    depth = [part for option in options for part in (f"--model.learner.{option}", "2")]
    cli = build("--config", name, *depth, "--trainer.accelerator", "cpu")
    assert cli.model.backbone_name == "nano_clip.distilled"
    learner, given = cli.model.learner, learner_of(name)
    assert type(learner).__name__ == given["class_path"]
    for option, value in given.get("init_args", {}).items():
        if option not in (*options, "allow_duplicates", "method"):
            assert learner.options[option] == value
    assert learner.allow_duplicates == name.startswith("cross_dataset")  # ImageNet has two names twice
    description = cli.datamodule.description()
    assert description["task"] == "clipart"
    assert description["class_subset"] == ("base" if name.startswith("base_to_new") else "all")
    assert ("train" in description["sizes"]) == (name not in WITHOUT_IMAGES)
    # Learners that have nothing to train by gradient steps say so in the number of epochs.
    trains = learner.by_gradient
    assert (cli.config.trainer.max_epochs > 0) == trains
    if trains and type(learner).__name__ not in WITH_A_RECIPE_OF_THEIR_OWN:
        recipe, decay = cli.model.optimisation, 1e-3 if name == "base_to_new_provp.yaml" else 5e-4
        assert (recipe.optimizer, recipe.schedule, recipe.weight_decay, recipe.decay_all, recipe.warmup_epochs) == (
            *("sgd", "epoch_cosine", decay, True, 1),
        )
    with torch.no_grad():
        # Tip-Adapter has seen no images yet, and PromptAlign knows nothing of a source.
        if not isinstance(learner, learners.TipAdapter | learners.PromptAlign):
            assert cli.model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, len(cli.datamodule.class_names))


@pytest.mark.parametrize("overlay", OF_CLIP)
def test_clip_overlay_of_learners(overlay, small_nano_clip):
    cli = build("--config", "fewshot_coop.yaml", "--config", overlay)
    assert cli.model.backbone_name == yaml.safe_load((CONFIGS / overlay).read_text())["model"]["init_args"]["backbone"]
    alone = build("--config", "fewshot_coop.yaml")
    assert cli.config.trainer.max_epochs == alone.config.trainer.max_epochs
    assert cli.model.optimisation == alone.model.optimisation
    assert cli.datamodule.batch_size == alone.datamodule.batch_size
    if "nano" not in overlay:
        assert cli.config.trainer.precision == "16-mixed"


def test_learner_and_method_configurations_do_not_mix(capsys):
    with pytest.raises(vp.ConfigurationError, match="PromptLearning"):
        build("--config", "fewshot_coop.yaml", "--model.method", "LoRA")


def test_promptsrc_across_data_sets_has_its_own_recipe():
    """The authors' `..._cross_datasets.yaml`; from base to new classes it is another."""
    across, to_new = (config_content(f"{protocol}_promptsrc.yaml") for protocol in ("cross_dataset", "base_to_new"))
    options, others = (each["model"]["init_args"]["learner"]["init_args"] for each in (across, to_new))
    assert (options["depth_text"], options["depth_visual"], across["trainer"]["max_epochs"]) == (3, 3, 20)
    assert "depth_text" not in others
    assert to_new["trainer"]["max_epochs"] == 20

    def shares(mean, std):
        weights = [math.exp(-((epoch - mean) ** 2) / (2 * std**2)) for epoch in range(1, 21)]
        return [weight / sum(weights) for weight in weights]

    # Mean 6 and std 10 take many epochs in, mean 15 and std 1 few.
    assert max(shares(options["average_mean"], options["average_std"])) == pytest.approx(0.06278, abs=1e-5)
    assert max(shares(others["average_mean"], others["average_std"])) == pytest.approx(0.39894, abs=1e-5)


def dtd_of_16_shots(root):
    """The layout of DTD with as many images as 16 shots take, which nobody opens."""
    folder = root / "dtd"
    (folder / "images").mkdir(parents=True)
    rows = [[f"{label}_{number}.jpg", label, f"texture {label}"] for label in range(47) for number in range(16)]
    others = {split: [[f"{split}_{row[1]}.jpg", *row[1:]] for row in rows[::16]] for split in ("val", "test")}
    for path, *_ in rows + others["val"] + others["test"]:
        (folder / "images" / path).touch()
    (folder / "split_zhou_DescribableTextures.json").write_text(json.dumps({"train": rows} | others))
    return root


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        # 47 * 16 = 752 images. Published: 3 steps of 256 in each of 20 epochs, of which 2 would be whole.
        ("fewshot_tip_adapter_f.yaml", 60),
        *((f"{protocol}_clip_lora.yaml", 10 * 24) for protocol in PROTOCOLS),
        # On CoOp's trainer the incomplete batch is left out: 23 steps of 32.
        ("fewshot_coop.yaml", 50 * 23),
    ],
)
def test_steps_of_a_learner_on_dtd(name, steps, tmp_path, small_nano_clip):
    cli = build(
        *("--config", name, "--data.dataset", "dtd", "--data.root", str(dtd_of_16_shots(tmp_path))),
        *("--data.classes", "all", "--trainer.accelerator", "cpu"),
    )
    cli.datamodule.preprocessing = cli.model.preprocessing
    batches = cli.datamodule.train_dataloader()
    assert cli.config.trainer.max_epochs * len(batches) == steps
    last = list(batches.batch_sampler)[-1]
    assert len(last) == (cli.datamodule.batch_size if name == "fewshot_coop.yaml" else 752 % cli.datamodule.batch_size)


@pytest.mark.parametrize("name", shipped_configs("multi_task_"))
def test_configuration_of_several_tasks_builds(name):
    method = method_of(name)
    if method["class_path"] == "MoA":  # needs trained adapters, one for each task
        with pytest.raises(ConfigurationError, match="MoA: it needs trained adapters"):
            build("--config", name)
        return
    cli = build("--config", name, "--trainer.accelerator", "cpu")
    assert cli.model.tasks == cli.datamodule.tasks == {"clipart": 26, "drawings": 39, "dsprites_loc": 16}
    assert type(cli.model.methods[0]).__name__ == method["class_path"]
    assert {split: len(source) for split, source in cli.datamodule.sources.items()} == {
        **{"train": 520 + 384 + 800, "val": 247 + 62 + 200, "test": 1103 + 351 + 2000}
    }
