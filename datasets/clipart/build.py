"""Cut a small set of classified 64-pixel drawings from the Open Clip Art Library.

    python build.py --source DIR --output DIR

The source is the folder ``usr/share/openclipart/png`` of Debian's package ``openclipart-png``. The package sorts its
drawings into folders; ``CLASSES`` says which folders and names make up a class. Copies are dropped over the whole set,
and versions of one drawing (recoloured, outlined) always share a split.
"""

import argparse
import csv
import random
import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
TRAIN, VAL, TEST = 20, 10, 25  # per class; TEST is a minimum and comes before VAL
LARGEST_CLASS = 90
VERSIONS = 4  # versions of one drawing that are kept
MOST_PIXELS = 40_000_000

# Patterns of paths below the source, without ".png". A drawing that fits several classes belongs to the first.
CLASSES = {
    "birds": """animals/birds/**/* animals/*penguin* animals/pinguino* unsorted/Anatra unsorted/Pinguino*
        unsorted/[Cc]olombo* unsorted/gabbiano* unsorted/papera unsorted/pennuto* unsorted/struzzo
        computer/icons/lemon-theme/apps/penguin computer/icons/lemon-theme/apps/pato""",
    "bugs": "animals/bugs/* animals/mosquito* animals/scorpion* unsorted/ape_miele",
    "mammals": """animals/mammals/**/* animals/armadillo* animals/bat* animals/bison* animals/sailor_monkey*
        animals/seal* unsorted/elefant* unsorted/cammello unsorted/mucca unsorted/pecorella""",
    "flags": "signs_and_symbols/flags/**/*",
    "drinks": """food/beverages/**/* food/juice* food/dairy/*milk* office/cup* unsorted/biberon computer/icons/70a030
        computer/icons/wine* signs_and_symbols/map_symbols/coffee* recreation/party/wine*""",
    "desserts": "food/desserts/* food/candied* food/cake* recreation/party/*cake* recreation/party/cone*",
    "fruit": "food/fruit/* food/*apple* food/*grape* food/watermelon*",
    "clothing": """people/clothing/[!p]* people/clothing/pimp* people/clothing/hats/* people/clothing/jewelry/*
        food/toque* recreation/party/hat* recreation/party/tophat* recreation/party/couronne* recreation/sports/*_cap_*
        recreation/sports/*helme* recreation/sports/*shoe* unsorted/calzettoni unsorted/vestito* unsorted/borsetta
        unsorted/zaino* unsorted/fiocco tools/umbrella*""",
    "meals": "food/**/* unsorted/tramezzino unsorted/Tacchino* unsorted/Cornetto",
    "plants": "plants/**/* unsorted/ros[ae]* unsorted/foglie* signs_and_symbols/map_symbols/tree*",
    "buildings": """buildings/* buildings/homes/* unsorted/Condominio unsorted/fattoria unsorted/igloo
        unsorted/aziendaVendite unsorted/grattacieli* transportation/**/lighthouse* transportation/grain*
        education/school_* signs_and_symbols/map_symbols/castle*""",
    "music": "recreation/music/*",
    "stick_figures": """people/stickmen/* recreation/sports/sport_* recreation/runner* people/man0* people/woman0*
        people/dancer_sketch* people/team_sketch*""",
    "sports": """recreation/sports/* recreation/toys/*ball* recreation/toys/*soccer* recreation/toys/surf*
        recreation/rollerblades* recreation/dartboard* recreation/*scuba* unsorted/pesistica unsorted/corridore
        people/*golf* people/roller* people/pattinat* people/water_ski* people/sport* people/io_bambina*
        people/aerobics* people/nonno_sport* people/fitness* people/future_beckham*""",
    "pictograms": "transportation/aiga-symbols/* computer/icons/hotel*",
    "signs": """transportation/roadsigns/* signs_and_symbols/[A-Z]* signs_and_symbols/hazard/* signs_and_symbols/*yves*
        signs_and_symbols/danger* signs_and_symbols/direction* signs_and_symbols/defense* signs_and_symbols/no*
        signs_and_symbols/keep* signs_and_symbols/protection* signs_and_symbols/radiations*
        signs_and_symbols/sortie* signs_and_symbols/risque* signs_and_symbols/interdiction*""",
    "vehicles": """transportation/vehicles/**/* transportation/[a-z]* unsorted/ambulanza unsorted/betoniera
        unsorted/caterpillar""",
    "sky": """signs_and_symbols/weather/* geography/astronomy/* science/astronomy/* signs_and_symbols/cloud*
        geography/*globe* geography/planet* geography/eclipse* geography/moon* geography/earth*""",
    "maps": "geography/*",
    "people": "people/* unsorted/ragazz* unsorted/signorina* unsorted/princip* unsorted/carpentiere*",
    "electronics": """electronics/**/* office/telephone/* computer/*camera* computer/*phone* computer/nikon*
        computer/tv* computer/icons/*camera* computer/icons/battery* computer/hardware/*camera*
        computer/icons/rhythmbox* computer/hardware/gameboy* recreation/tv* recreation/televis* tools/*camera*
        tools/cellular* tools/electric*
        unsorted/lamp* signs_and_symbols/battery* buildings/furniture/tele*""",
    "office": "office/* education/**/*",
    "tools": "tools/*",
    "computers": "computer/hardware/* computer/connectors/* computer/*",
    "icons": "computer/icons/lemon-theme/**/*",
    "patterns": "special/patterns/*",
}

# What does not belong to the class of its folder, shows mostly text, or is broken.
REJECTED = """**/duck_yellow_ii* **/stylized_yoga* **/tux_didier* animals/birds/contour_bat* animals/birds/mirjam*
    animals/birds/turkey* animals/mammals/cat_scra* animals/mammals/s[kq]*_peterm* computer/icons/hotel_icon_col*
    computer/virus* electronics/saku* food/chef* food/fruit/champignon* food/fruit/kallisti* food/fruit/slate*
    food/fruit/straw_tote* food/fruit/turkey* food/meatgrinder* food/mix_cucina* geography/*gps*
    geography/*umbrella* geography/ayers* geography/basque* geography/calebasse* geography/garmin* geography/gps*
    geography/mount* geography/spyglass* geography/symbol* geography/teide* geography/war_drum* office/cross_hand*
    office/mili* office/telephone/numero_verde* people/*_hand_print* people/clothing/**/jacob*
    people/clothing/guanti* people/safety_pin* plants/**/bowsaw* plants/**/bypass* plants/**/christmas_ball*
    plants/human* signs_and_symbols/flags/**/*_01 signs_and_symbols/flags/**/*map* signs_and_symbols/flags/*ampel*
    signs_and_symbols/flags/semaphore/* signs_and_symbols/hazard/*frog* signs_and_symbols/hazard/poison*
    signs_and_symbols/weather/tsunami* transportation/*_sign* transportation/airplane transportation/anchor*
    transportation/bambi transportation/little_tan* transportation/roadsigns/nws* transportation/roadsigns/stop"""


def matching(source: Path, patterns: str) -> set[Path]:
    """The drawings that fit one of the patterns."""
    return {path for pattern in patterns.split() for path in source.glob(f"{pattern}.png")}


def read_drawing(path: Path) -> Image.Image | None:
    """The drawing on white, cut to its content and centred on a square, or None if there is nothing to see."""
    with Image.open(path) as image:
        if image.width * image.height > MOST_PIXELS:
            return None
        image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    image = canvas.convert("RGB")
    rows, columns = np.nonzero((np.asarray(image) < 240).any(2))
    if len(rows) < 100:
        return None
    image = image.crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    if min(image.size) < 16 or max(image.size) > 4 * min(image.size):
        return None
    scale = (SIZE - 4) / max(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return square if np.asarray(square, float).std() > 12 else None


def blocks(pixels: np.ndarray, side: int) -> np.ndarray:
    """Means over blocks, (64, 64, channels) to (side, side, channels)."""
    step = SIZE // side
    return pixels.reshape(side, step, side, step, -1).mean((1, 3))


def unit(values: np.ndarray) -> np.ndarray:
    """Centred and scaled to length one, so that a dot product is a correlation."""
    values = values.ravel() - values.mean()
    return values / (np.linalg.norm(values) + 1e-6)


class Drawing:
    """A picture with what is needed to recognise other versions of it."""

    def __init__(self, path: Path, label: str, image: Image.Image):
        self.path, self.label, self.image = path, label, image
        self.name = re.sub(r"[^a-z0-9]+", "_", path.stem.lower()).strip("_")
        # the same drawing in colour and in outline
        self.drawing_name = re.sub(r"_(b_?w|black|outline|shaded)(?=_|$)", "", self.name)
        pixels = np.asarray(image, dtype=np.float32)
        down, right = np.diff(pixels, axis=0, append=pixels[-1:]), np.diff(pixels, axis=1, append=pixels[:, -1:])
        steps = np.abs(down) + np.abs(right)
        self.thumbnail = blocks(pixels, 16)
        self.shades = unit(self.thumbnail.mean(2))
        self.edges = unit(blocks(np.sqrt(np.minimum(steps.max(2), 100)), 32))

    def is_copy(self, other: "Drawing") -> bool:
        """Same file name in another folder, or nearly the same pixels."""
        return self.name == other.name or np.abs(self.thumbnail - other.thumbnail).mean() < 10

    def is_version(self, other: "Drawing") -> bool:
        """Same name, nearly the same edges (recoloured), or nearly the same shades and similar edges."""
        if self.drawing_name == other.drawing_name:
            return True
        edges = self.edges @ other.edges
        likely = 0.74 if self.label == other.label else 0.8
        return edges > likely or (edges > 0.5 and self.shades @ other.shades > 0.93)


def collect(source: Path, generator: random.Random) -> list[list[Drawing]]:
    """The drawings to keep, in groups of versions of one drawing."""
    groups: list[list[Drawing]] = []
    taken = matching(source, REJECTED)
    for label, patterns in CLASSES.items():
        paths = sorted(matching(source, patterns) - taken)
        taken.update(paths)
        generator.shuffle(paths)
        count = 0
        for path in paths:
            image = read_drawing(path)
            if image is None or count == LARGEST_CLASS:
                continue
            drawing = Drawing(path, label, image)
            related = [group for group in groups if any(drawing.is_version(other) for other in group)]
            versions = [other for group in related for other in group]
            if len(versions) >= VERSIONS or any(drawing.is_copy(v) or v.label != label for v in versions):
                continue
            groups = [group for group in groups if group not in related] + [[*versions, drawing]]
            count += 1
    return groups


def split(groups: list[list[Drawing]], generator: random.Random) -> dict[str, list[Drawing]]:
    """Fill train, then the minimum of test, then val, then test again, never dividing a group."""
    sizes = {label: sum(drawing.label == label for group in groups for drawing in group) for label in CLASSES}
    wanted = {(label, "train"): TRAIN for label in CLASSES}
    wanted |= {(label, "val"): min(VAL, sizes[label] - TRAIN - TEST) for label in CLASSES}
    splits: dict[str, list[Drawing]] = {"train": [], "val": [], "test": []}
    generator.shuffle(groups)
    for group in groups:
        label = group[0].label
        name = next((name for name in ("train", "val") if wanted[label, name] >= len(group)), "test")
        if name != "test":
            wanted[label, name] -= len(group)
        splits[name] += group
    return splits


def main() -> None:
    """Build the set from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="usr/share/openclipart/png of the unpacked package")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write images and tables to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None  # a few drawings are enormous; they are skipped by their size

    generator = random.Random(args.seed)
    splits = split(collect(args.source, generator), generator)
    shutil.rmtree(args.output / "images", ignore_errors=True)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, drawings in splits.items():
        with (args.output / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label"])
            for drawing in sorted(drawings, key=lambda drawing: (drawing.label, drawing.name)):
                path = Path("images") / drawing.label / f"{drawing.name}.png"
                (args.output / path.parent).mkdir(parents=True, exist_ok=True)
                drawing.image.save(args.output / path, optimize=True)
                writer.writerow([path.as_posix(), drawing.label])
        print(name, {label: sum(drawing.label == label for drawing in drawings) for label in CLASSES})


if __name__ == "__main__":
    main()
