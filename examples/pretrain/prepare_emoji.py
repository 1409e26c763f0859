"""Turn installed npm emoji and icon packages into one folder of small RGBA images and tables of their names.

Every emoji is drawn once per design family (Noto, Twemoji, OpenMoji, Fluent, EmojiOne), so the families are several
hand-made pictures of one named thing. OpenMoji's table supplies the names, groups and keywords of all of them. Skin
tone variants are left out; transparency is kept, so that training can choose the background.

    python prepare_emoji.py --source node_modules --output emoji

writes ``emoji/<family>/<code>.png`` and ``emoji/emoji.csv`` with the columns path, family, code, name, group,
subgroup and keywords (separated by ``;``). With ``--icons``, drawings of named things from icon sets follow in
``emoji/icons.csv``, with the same columns; a subgroup is given where the set sorts its icons by subject.
"""

import argparse
import csv
import io
import json
import re
from pathlib import Path

import resvg_py
from PIL import Image

STANDARD_GROUPS = {
    "smileys-emotion",
    "people-body",
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
    "symbols",
    "flags",
}
FILE_FAMILIES = {  # files named by code point
    "noto": "emoji-datasource-google/img/google/64",
    "twemoji": "emoji-datasource-twitter/img/twitter/64",
    "openmoji": "openmoji/color/svg",
    "openmoji-black": "openmoji/black/svg",
}
NAMED_FAMILIES = {  # files named by the emoji's English name
    "fluent": "fluentui-emoji/icons/modern",
    "fluent-flat": "fluentui-emoji/icons/flat",
    "fluent-high-contrast": "fluentui-emoji/icons/high-contrast",
}
ICONIFY_FAMILIES = {  # one JSON file of SVG bodies per family, keyed by English name
    "noto-v1": "@iconify-json/noto-v1",
    "emojione": "@iconify-json/emojione",
    "emojione-v1": "@iconify-json/emojione-v1",
    "emojione-monotone": "@iconify-json/emojione-monotone",
}

ICON_SETS = {  # what the categories of an icon set are among the subgroups; icons of other categories are left out
    "icon-park": {
        "Animals": "animal",
        "Arrows": "arrow",
        "Build": "place-building",
        "Clothes": "clothing",
        "Constellation": "zodiac",
        "Emoji": "face-smiling",
        "Energy": "",
        "Foods": "food",
        "Game": "game",
        "Hands": "hand",
        "Hardware": "electronics",
        "Health": "medical",
        "Industry": "tool",
        "Life": "household",
        "Makeups": "cosmetics",
        "Money": "money",
        "Office": "office",
        "Others": "",
        "Peoples": "person",
        "Safe": "",
        "Sports": "sport",
        "Time": "time",
        "Travel": "",
        "Weather": "sky-weather",
        "Baby": "",
    },
    "streamline-emojis": {
        "Activity": "",
        "Animals Nature": "",
        "Flags": "country-flag",
        "Food Drink": "food",
        "Objects": "",
        "Smiley People": "",
        "Travel Places": "",
    },
    "streamline-freehand-color": {
        "Business": "office",
        "ComputersDevicesElectronics": "electronics",
        "Content": "",
        "Design": "",
        "EmailMessages": "mail",
        "ImagesPhotography": "",
        "InternetNetworksServers": "computer",
        "MoneyPaymentsFinance": "money",
        "MusicVideoEntertainment": "",
        "PhonesMobileDevices": "phone",
        "ShoppingEcommerce": "",
        "Wayfinding": "transport-sign",
        "WorkOfficeCompanies": "office",
    },
    "streamline-plump-color": {
        "ComputerDevices": "electronics",
        "Culture": "",
        "Entertainment": "",
        "FoodDrink": "food",
        "Health": "medical",
        "ImagesPhotography": "",
        "Mail": "mail",
        "MapTravel": "",
        "MoneyShopping": "",
        "NatureEcology": "",
        "Phone": "phone",
        "Shipping": "",
        "WorkEducation": "",
    },
    "streamline-ultimate-color": {
        "ArrowsDiagrams": "arrow",
        "ComputersDevicesElectronics": "electronics",
        "Content": "office",
        "Emails": "mail",
        "EntertainmentEventsHobbies": "",
        "FilesFolders": "office",
        "FoodDrinks": "food",
        "HealthBeauty": "",
        "ImagesPhotography": "",
        "InternetNetworksServers": "computer",
        "MapsNavigation": "place-map",
        "MoneyPaymentsFinance": "money",
        "MusicAudio": "music",
        "PhonesMobileDevices": "phone",
        "Science": "science",
        "ShippingDelivery": "",
        "ShoppingEcommerce": "",
        "Sports": "sport",
        "Transportation": "vehicle",
        "Wayfinding": "transport-sign",
        "Weather": "sky-weather",
        "WorkOfficeCompanies": "office",
    },
    "flat-color-icons": {},
    "game-icons": {},
    "maki": {},
}
ICON_WORDS = r"\d+|one|two|three|four|five|six|flat|fill|alt|r"  # endings of names that number versions of an icon


def code_key(name: str) -> str:
    """Code points in lower case without the variation selector, which the families use inconsistently."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def slug(name: str) -> str:
    """An emoji's English name the way the packages spell it in file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("’", "").replace("'", "")).strip("-")


def rasterize(svg: str, size: int) -> Image.Image:
    """Draw an SVG document as an RGBA image of at most ``size`` pixels a side."""
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))))


def file_images(folder: Path, key) -> dict:
    """Map ``key(file stem)`` to a function that reads the image at a size."""

    def reader(path: Path):
        if path.suffix == ".svg":
            return lambda size: rasterize(path.read_text(), size)
        return lambda size: Image.open(path)

    return {key(path.stem): reader(path) for path in sorted(folder.iterdir()) if path.suffix in {".png", ".svg"}}


def svg_reader(body: str, width: int, height: int):
    """A function that draws the body of an SVG document at a size."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return lambda size: rasterize(f'<svg {names} viewBox="0 0 {width} {height}">{body}</svg>', size)


def iconify_images(folder: Path) -> dict:
    """Map English names to functions that draw the icons of an Iconify package."""
    icons = json.loads((folder / "icons.json").read_text())
    side = icons.get("width", 64)

    def reader(body: str):
        return svg_reader(body, side, side)

    bodies = {name: icon["body"] for name, icon in icons["icons"].items()}
    for alias, icon in icons.get("aliases", {}).items():
        bodies.setdefault(alias, bodies.get(icon["parent"]))
    # older names of the country flags read "flag-for-italy", newer ones "flag-italy"
    return {name.replace("flag-for-", "flag-"): reader(body) for name, body in bodies.items() if body}


def square(image: Image.Image, size: int) -> Image.Image:
    """Centre an image on a transparent square of ``size`` pixels."""
    image = image.convert("RGBA")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas


def emoji_names(table: Path) -> list[dict]:
    """Rows of OpenMoji's table: the standard emoji without skin tone variants."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["group"] in STANDARD_GROUPS and not row["skintone"]]
    return [
        {
            "code": code_key(row["hexcode"]),
            "name": row["annotation"],
            "group": row["group"],
            "subgroup": row["subgroups"],
            "keywords": ";".join(word.strip() for word in row["tags"].split(",")),
        }
        for row in rows
    ]


def icon_rows(folder: Path, family: str, categories: dict) -> list[tuple[dict, object]]:
    """Rows of the table for an icon set of Iconify, with functions that draw the icons."""
    icons = json.loads((folder / "icons.json").read_text())
    category_of = {}
    if categories:
        for category, names in json.loads((folder / "metadata.json").read_text())["categories"].items():
            category_of |= dict.fromkeys(names, category)
    rows = []
    for icon_name, icon in icons["icons"].items():
        if categories and category_of.get(icon_name) not in categories:
            continue
        words = icon_name.split("-")
        while len(words) > 1 and re.fullmatch(ICON_WORDS, words[-1]):
            words.pop()
        row = {
            "code": f"{family}:{icon_name}",
            "name": " ".join(words),
            "group": "icons",
            "subgroup": categories.get(category_of.get(icon_name), ""),
            "keywords": ";".join(sorted({word for word in words if len(word) > 2})),
        }
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        rows.append((row, svg_reader(icon["body"], width, height)))
    return rows


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows as a CSV file with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the node_modules folder")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--icons", action="store_true", help="draw the icon sets as well")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    args = parser.parse_args()

    families = {family: file_images(args.source / path, code_key) for family, path in FILE_FAMILIES.items()}
    families |= {family: file_images(args.source / path, str) for family, path in NAMED_FAMILIES.items()}
    families |= {family: iconify_images(args.source / path) for family, path in ICONIFY_FAMILIES.items()}
    names = emoji_names(args.source / "openmoji/data/openmoji.csv")
    rows = []
    for family, images in families.items():
        folder = args.output / family
        folder.mkdir(parents=True, exist_ok=True)
        before = len(rows)
        for emoji in names:
            draw = images.get(emoji["code"] if family in FILE_FAMILIES else slug(emoji["name"]))
            if draw is None:
                continue
            path = folder / f"{emoji['code']}.png"
            square(draw(args.size), args.size).save(path)
            rows.append({"path": path.relative_to(args.output).as_posix(), "family": family, **emoji})
        print(f"{family}: {len(rows) - before} images", flush=True)
    write_table(args.output / "emoji.csv", rows)

    rows = []
    for family, categories in ICON_SETS.items() if args.icons else ():
        folder = args.output / family
        folder.mkdir(parents=True, exist_ok=True)
        before = len(rows)
        for row, draw in icon_rows(args.source / f"@iconify-json/{family}", family, categories):
            path = folder / f"{row['code'].partition(':')[2]}.png"
            square(draw(args.size), args.size).save(path)
            rows.append({"path": path.relative_to(args.output).as_posix(), "family": family, **row})
        print(f"{family}: {len(rows) - before} images", flush=True)
    if rows:
        write_table(args.output / "icons.csv", rows)


if __name__ == "__main__":
    main()
