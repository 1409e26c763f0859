"""Templates and class names as shipped."""

import open_clip
import pytest

from visionpeft.clip import learners
from visionpeft.clip.templates import check_templates, template_sets, templates
from visionpeft.data import dataset_template
from visionpeft.data.few_shot.definitions import few_shot_class_names, few_shot_datasets, find_few_shot
from visionpeft.errors import ConfigurationError

# classes, train, val, test
SIZES = {
    "imagenet": (1000, 1_281_167, None, 50_000),
    "caltech101": (100, 4_128, 1_649, 2_465),
    "oxford_pets": (37, 2_944, 736, 3_669),
    "stanford_cars": (196, 6_509, 1_635, 8_041),
    "oxford_flowers": (102, 4_093, 1_633, 2_463),
    "food101": (101, 50_500, 20_200, 30_300),
    "fgvc_aircraft": (100, 3_334, 3_333, 3_333),
    "sun397": (397, 15_880, 3_970, 19_850),
    "dtd": (47, 2_820, 1_128, 1_692),
    "eurosat": (10, 13_500, 5_400, 8_100),
    "ucf101": (101, 7_639, 1_898, 3_783),
    "imagenetv2": (1000, None, None, 10_000),
    "imagenet_sketch": (1000, None, None, 50_889),
    "imagenet_a": (200, None, None, 7_500),
    "imagenet_r": (200, None, None, 30_000),
}
# label and name, from published split files and annotations
KNOWN = {
    "caltech101": {0: "face", 1: "leopard", 2: "motorbike", 3: "accordion", 4: "airplane", 99: "yin yang"},
    "oxford_pets": {0: "abyssinian", 1: "american bulldog", 36: "yorkshire terrier"},
    "stanford_cars": {0: "2000 AM General Hummer SUV", 13: "2012 Audi TTS Coupe", 195: "2012 smart fortwo Convertible"},
    "oxford_flowers": {0: "pink primrose", 76: "passion flower", 101: "blackberry lily"},
    "food101": {0: "apple pie", 100: "waffles"},
    "fgvc_aircraft": {0: "707-320", 72: "F-16A/B", 99: "Yak-42"},
    "sun397": {0: "abbey", 8: "outdoor apartment building", 396: "youth hostel"},
    "dtd": {0: "banded", 30: "polka-dotted", 46: "zigzagged"},
    "eurosat": {0: "Annual Crop Land", 3: "Highway or Road", 9: "Sea or Lake"},
    "ucf101": {0: "Apply Eye Makeup", 20: "Clean And Jerk", 36: "Handstand Pushups", 100: "Yo Yo"},
}


def test_definitions():
    definitions = few_shot_datasets()
    assert {key: tuple(definitions[key][k] for k in ("classes", "train", "val", "test")) for key in SIZES} == SIZES
    assert set(definitions) - set(SIZES) == {"clipart", "drawings"}


@pytest.mark.parametrize("key", list(SIZES))
def test_class_names(key):
    names = few_shot_class_names(few_shot_datasets()[key]["class_names"])
    assert len(names) == SIZES[key][0]
    if isinstance(names, dict):
        assert list(names) == sorted(names)
        names = list(names.values())
    assert all(name and name == name.strip() and "_" not in name for name in names)
    for label, name in KNOWN.get(key, {}).items():
        assert names[label] == name
    if key in KNOWN:
        assert len(set(names)) == len(names)


def test_imagenet_names_are_openais_and_subsets_agree():
    names = few_shot_class_names("imagenet")
    assert list(names.values()) == list(open_clip.IMAGENET_CLASSNAMES)
    assert names["n01440764"] == "tench"
    assert names["n15075141"] == "toilet paper"
    for subset in ("imagenet_a", "imagenet_r"):
        assert few_shot_class_names(subset).items() < names.items()
    assert "n01443537" in few_shot_class_names("imagenet_r")  # goldfish
    assert "n01440764" not in few_shot_class_names("imagenet_a")


def test_named_sets():
    assert {name: len(members) for name, members in template_sets().items()} == {
        "photo": 1,
        "openai_imagenet_80": 80,
        "promptsrc_60": 60,
        "simple_7": 7,
        "tip_7": 7,
        "task_res_8": 8,
    }
    assert templates("photo") == ["a photo of a {}."]
    for name, functions in (
        ("openai_imagenet_80", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("promptsrc_60", open_clip.OPENAI_IMAGENET_TEMPLATES[:60]),
        ("simple_7", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        assert [template.format("cat") for template in templates(name)] == [function("cat") for function in functions]
    assert templates("tip_7")[0] == "itap of a {}."
    assert templates("task_res_8") == [*templates("tip_7"), "a photo of a {}."]
    assert all(check_templates(members) == tuple(members) for members in template_sets().values())
    assert check_templates("tip_7") == tuple(templates("tip_7"))


def test_dataset_templates():
    expected = {
        "oxford_pets": ("a photo of a {}, a type of pet.", "a type of pet, a photo of a {}."),
        "oxford_flowers": ("a photo of a {}, a type of flower.", "a type of flower, a photo of a {}."),
        "fgvc_aircraft": ("a photo of a {}, a type of aircraft.", "a type of aircraft, a photo of a {}."),
        "dtd": ("{} texture.", "a texture of {}."),
        "eurosat": ("a centered satellite photo of {}.",) * 2,
        "food101": ("a photo of {}, a type of food.", "a type of food, a photo of {}."),
        "ucf101": ("a photo of a person doing {}.",) * 2,
    }
    for key in SIZES:
        plain = ("a photo of a {}.",) * 2
        assert (dataset_template(key), dataset_template(key, "prograd")) == expected.get(key, plain)
    assert dataset_template("dtd", "kgcoop") == "a photo of a {}, a type of texture."
    assert dataset_template("food101", "kgcoop") == "a photo of {}, a type of food."


# What learners' authors take for a data set where it is another than the zero-shot template.
OF_LEARNERS = {
    ("LPPlusPlus", "TipAdapter"): {"imagenet": "tip_7"},
    ("CLAP", "TaskRes"): {"imagenet": "task_res_8"},
    ("TDA",): {
        **dict.fromkeys(["imagenet", "imagenetv2", "imagenet_a", "caltech101", "stanford_cars", "sun397"], "tip_7"),
        **dict.fromkeys(["imagenet_r", "imagenet_sketch"], "openai_imagenet_80"),
    },
    ("TCP",): {
        "dtd": "a photo of a {}, a type of texture.",
        "fgvc_aircraft": "a photo of an aircraft {}.",
        "food101": "a photo of a {}, a type of food.",
    },
    ("KgCoOp",): {"dtd": "a photo of a {}, a type of texture."},
    ("ProGrad", "ProVP"): {key: dataset_template(key, "prograd") for key in SIZES},
    ("CLIPAdapter", "ZeroShot", "RPO", "PromptSRC"): {},
}


@pytest.mark.parametrize("names", OF_LEARNERS)
@pytest.mark.parametrize("key", SIZES)
def test_each_learner_reads_what_its_authors_read(names, key):
    for name in names:
        style = getattr(learners, name).template_style
        assert dataset_template(key, style) == OF_LEARNERS[names].get(key, dataset_template(key))
        assert check_templates(dataset_template(key, style))


def test_aliases():
    for name in ("Caltech101", "caltech-101", "CALTECH101"):
        assert find_few_shot(name) == "caltech101"
    assert find_few_shot("DescribableTextures") == "dtd"
    assert find_few_shot("Flowers102") == find_few_shot("OxfordFlowers") == "oxford_flowers"
    assert dataset_template("FGVCAircraft") == dataset_template("fgvc_aircraft")
    owners = {}
    for key, entry in few_shot_datasets().items():
        for spelling in (key, entry["title"], *entry["aliases"]):
            assert owners.setdefault(spelling.lower(), key) == key


def test_refusals():
    with pytest.raises(ConfigurationError, match=r"'openai_80' has no .* did you mean openai_imagenet_80"):
        templates("openai_80")
    with pytest.raises(ConfigurationError, match="unknown few-shot data set 'eurosatt': did you mean eurosat"):
        dataset_template("eurosatt")
    with pytest.raises(ConfigurationError, match="unknown style 'coop' of template"):
        dataset_template("dtd", "coop")
    for template in ("{} and {}", ["a {name}"], ["a photo of a {}.", "a photo"]):
        with pytest.raises(ConfigurationError, match=r"must hold \{\} exactly once"):
            check_templates(template)
    with pytest.raises(ConfigurationError, match="at least one template"):
        check_templates([])
