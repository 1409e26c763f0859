"""Captions of drawings from their names, keywords and subjects."""

import random
import re
from collections import Counter
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

# Everyday words for the subgroups of the emoji, as singular/plural; "face" stands for "face-smiling" and so on.
SUBJECTS = {
    "face": "face/faces, smiley/smileys, emotion/emotions",
    "cat-face": "cat/cats, animal/animals, face/faces",
    "monkey-face": "monkey/monkeys, animal/animals, face/faces",
    "heart": "heart/hearts, love, symbol/symbols",
    "emotion": "emotion/emotions, symbol/symbols",
    "body-parts": "body part/body parts, body",
    "hand-prop": "hand/hands",
    "hands": "hand/hands, gesture/gestures",
    "person": "person/people, human/humans",
    "person-gesture": "person/people, gesture/gestures",
    "person-role": "person/people, worker/workers, job/jobs, profession/professions",
    "person-fantasy": "person/people, fantasy creature/fantasy creatures, character/characters",
    "person-activity": "person/people, activity/activities",
    "person-sport": "sport/sports, person/people, athlete/athletes, activity/activities",
    "person-resting": "person/people",
    "family": "person/people, family/families, couple/couples, group of people",
    "person-symbol": "person/people, pictogram/pictograms, symbol/symbols",
    "animal-mammal": "mammal/mammals, animal/animals",
    "animal-bird": "bird/birds, animal/animals",
    "animal-amphibian": "amphibian/amphibians, animal/animals",
    "animal-reptile": "reptile/reptiles, animal/animals",
    "animal-marine": "sea animal/sea animals, fish, marine animal/marine animals, animal/animals",
    "animal-bug": "bug/bugs, insect/insects, animal/animals",
    "plant-flower": "flower/flowers, plant/plants, nature",
    "plant-other": "plant/plants, tree/trees, leaf/leaves, nature",
    "food-fruit": "fruit/fruits, food",
    "food-vegetable": "vegetable/vegetables, food",
    "food-prepared": "meal/meals, dish/dishes, food",
    "food-asian": "meal/meals, dish/dishes, Asian food, food",
    "food-sweet": "dessert/desserts, sweet/sweets, food",
    "drink": "drink/drinks, beverage/beverages",
    "dishware": "dishes, tableware, kitchen tool/kitchen tools",
    "place-map": "map/maps, geography",
    "place-geographic": "landscape/landscapes, place/places, geography, nature",
    "place-building": "building/buildings, house/houses, architecture",
    "place-religious": "building/buildings, religious building/religious buildings, architecture",
    "place-other": "place/places, scene/scenes",
    "transport-ground": "vehicle/vehicles, land vehicle/land vehicles, transport, road vehicle/road vehicles",
    "transport-water": "boat/boats, ship/ships, watercraft, transport",
    "transport-air": "aircraft, vehicle/vehicles, flying machine/flying machines, transport",
    "hotel": "hotel",
    "time": "clock/clocks, time",
    "sky-weather": "sky, weather, sky and weather",
    "event": "party/parties, celebration/celebrations, holiday/holidays",
    "award-medal": "award/awards, medal/medals",
    "sport": "sport/sports, sports equipment",
    "game": "game/games, toy/toys",
    "arts-crafts": "art, craft/crafts, hobby/hobbies",
    "clothing": "clothing, clothes, piece of clothing, garment/garments, fashion",
    "sound": "sound/sounds",
    "music": "music",
    "musical-instrument": "musical instrument/musical instruments, instrument/instruments, music",
    "phone": "phone/phones, telephone/telephones, electronic device/electronic devices, electronics",
    "computer": "computer/computers, computer hardware, electronic device/electronic devices, electronics",
    "light-video": "light/lights, equipment",
    "book-paper": "book/books, paper, office, stationery",
    "money": "money, finance",
    "mail": "mail, post, letter/letters, office",
    "writing": "writing tool/writing tools, pen/pens, stationery, office",
    "office": "office, office supply/office supplies, office equipment",
    "lock": "lock/locks, security",
    "tool": "tool/tools, hand tool/hand tools",
    "science": "science, laboratory equipment, instrument/instruments",
    "medical": "medicine, medical equipment, health",
    "household": "household item/household items, furniture, home",
    "other-object": "object/objects",
    "transport-sign": "sign/signs, pictogram/pictograms, public sign/public signs, symbol/symbols",
    "warning": """sign/signs, warning sign/warning signs, road sign/road signs, traffic sign/traffic signs,
        symbol/symbols""",
    "arrow": "arrow/arrows, direction/directions, sign/signs, symbol/symbols",
    "religion": "religious symbol/religious symbols, symbol/symbols, religion",
    "zodiac": "zodiac sign/zodiac signs, symbol/symbols",
    "av-symbol": "button/buttons, symbol/symbols, player button/player buttons, icon/icons",
    "gender": "gender symbol/gender symbols, symbol/symbols",
    "math": "math symbol/math symbols, symbol/symbols",
    "punctuation": "punctuation mark/punctuation marks, symbol/symbols",
    "currency": "money, currency, symbol/symbols",
    "other-symbol": "symbol/symbols, sign/signs",
    "keycap": "key/keys, number/numbers, button/buttons",
    "alphanum": "letter/letters, text, button/buttons, character/characters",
    "geometric": "shape/shapes, geometric shape/geometric shapes",
    "flag": "flag/flags",
    "country-flag": "flag/flags, country flag/country flags, national flag/national flags",
    "subdivision-flag": "flag/flags",
    # of icon sets
    "animal": "animal/animals",
    "food": "food",
    "hand": "hand/hands, gesture/gestures",
    "electronics": "electronics, electronic device/electronic devices, device/devices",
    "cosmetics": "cosmetics, beauty product/beauty products",
    "vehicle": "vehicle/vehicles, transport",
}
STYLES = ("silhouette/silhouettes", "pattern/patterns")  # in the order of augmentation.Views.styles
ICON_STYLES = {"game-icons": "pictogram/pictograms", "maki": "pictogram/pictograms"}
SKETCHES = {"streamline-freehand-color"}
OUTLINES = {"openmoji-black"}
BLACK = {"emojione-monotone", "fluent-high-contrast", "openmoji-black", "game-icons", "maki"}

# {} is the phrase, {a} the phrase with its article
TEMPLATES = {
    "{}": 4,
    "a photo of a {}.": 5,
    "a photo of {a}": 1,
    "a photo of the {}.": 1,
    "a drawing of {a}": 2,
    "a drawing of {a}.": 1,
    "{a}": 2,
    "clip art of {a}": 2,
    "an illustration of {a}": 1,
    "a picture of {a}.": 1,
    "an image of {a}": 1,
    "an icon of {a}": 1,
    "a cartoon of {a}": 1,
    "a cartoon {}": 1,
    "a small picture of {a}": 1,
    "a sketch of {a}.": 1,
    "a rendition of {a}.": 1,
    "art of the {}.": 1,
    "the {}": 1,
    "this is {a}.": 1,
    "a {} emoji": 1,
    "{a}, drawn": 1,
    "graphic of {a}": 1,
}


def with_article(phrase: str) -> str:
    """The phrase after "a" or "an"."""
    return f"{'an' if phrase[:1] in 'aeiou' else 'a'} {phrase}"


def plural(phrase: str) -> str:
    """The regular plural of a phrase."""
    if phrase.endswith("s"):
        return phrase
    if re.search("[^aeiou]y$", phrase):
        return phrase[:-1] + "ies"
    return phrase + ("es" if re.search("(x|z|ch|sh)$", phrase) else "s")


def clean(phrase: str) -> str:
    """A phrase in lower case without marks, or nothing if no word is left."""
    phrase = phrase.lower().replace("’", "'")
    if phrase.startswith("flag: "):
        phrase = phrase.removeprefix("flag: ") + " flag"
    phrase = re.sub(r"[^a-z0-9' -]+", " ", phrase)
    return " ".join(phrase.split())


def words_of(subgroup: str) -> list[list[str]]:
    """The subjects of a subgroup, each as its forms."""
    entries = SUBJECTS.get(subgroup, SUBJECTS.get(subgroup.split("-")[0], ""))
    return [entry.strip().lower().split("/") for entry in entries.split(",") if entry]


@dataclass
class Drawing:
    """What can be said about the drawings of one code; phrases are given by their numbers.

    Args:
        name: the name.
        subjects: general words.
        keywords: other words.
    """

    name: int
    subjects: list[int]
    keywords: list[int]


class Captions:
    """Phrases for drawings, and which phrase is true for which drawing.

    Args:
        table: rows with the columns code, family, name, group, subgroup and keywords.
    """

    def __init__(self, table: pd.DataFrame):
        self.forms: list[list[str]] = []  # of each phrase: singular and plural
        self.number: dict[str, int] = {}
        rows = table.drop_duplicates("code")
        self.codes = {code: index for index, code in enumerate(rows["code"])}
        emoji = rows[rows["group"] != "icons"]
        self.subject_words = {self.add(form) for key in SUBJECTS for form in words_of(key)}
        self.icon_words = {self.add(style.split("/")) for style in [*ICON_STYLES.values(), "icon/icons"]}
        self.subject_words |= self.icon_words
        self.styles = [self.add(style.split("/")) for style in STYLES]

        words = Counter(word for name in rows["name"] for word in set(clean(name).split(" ")))
        subgroup_of = dict(zip(map(clean, emoji["name"]), emoji["subgroup"], strict=True))
        heads = emoji.assign(head=[clean(name).split(" ")[-1] for name in emoji["name"]])
        heads = heads[~heads["subgroup"].str.contains("flag|symbol")].groupby("head")["subgroup"]
        head_of = {head: groups.mode()[0] for head, groups in heads if groups.nunique() == 1}
        self.drawings = []
        for row in rows.itertuples():
            name = clean(row.name)
            subgroups = {row.subgroup}
            subjects = []
            if row.group == "icons":  # words that no other name has are left out, since every token costs memory
                name = " ".join(word for word in name.split(" ") if words[word] > 1) or name
                subgroups |= {subgroup_of.get(name, ""), head_of.get(name.split(" ")[-1], "")}
                subjects = [self.add(ICON_STYLES.get(row.family, "icon/icons").split("/"))]
            subjects += [self.add(form) for subgroup in sorted(subgroups) for form in words_of(subgroup)]
            keywords = [clean(word) for word in row.keywords.split(";")]
            keywords = [self.add([word, plural(word)]) for word in keywords if re.fullmatch("[a-z][a-z' -]{2,}", word)]
            drawing = Drawing(self.add([name, plural(name)]), sorted(set(subjects)), [])
            drawing.keywords = sorted(set(keywords) - {drawing.name} - set(subjects))
            self.drawings.append(drawing)

        # so are keywords of a single drawing, and plurals of rare ones
        count = Counter(number for drawing in self.drawings for number in {drawing.name, *drawing.keywords})
        for drawing in self.drawings:
            drawing.keywords = [number for number in drawing.keywords if count[number] > 1]
        for number, forms in enumerate(self.forms):
            if count[number] < 4 and number not in self.subject_words | set(self.styles):
                del forms[1:]
        self.used = self.subject_words | set(self.styles)
        self.used |= {number for drawing in self.drawings for number in (drawing.name, *drawing.keywords)}

        shape = len(self.drawings), len(self.forms)
        self.true, self.unknown = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for index, drawing in enumerate(self.drawings):
            self.true[index, [drawing.name, *drawing.subjects, *drawing.keywords]] = True
        icons = torch.tensor((rows["group"] == "icons").to_numpy(copy=True))
        many = self.true[~icons].sum(0) >= 5
        subject = torch.zeros(shape[1], dtype=torch.bool)
        subject[sorted(self.subject_words)] = True
        sorted_by_subject = torch.tensor([len(drawing.subjects) > 1 for drawing in self.drawings])
        # an icon may well show what only emoji are described with
        self.unknown[icons] = (many | subject) & ~(subject & sorted_by_subject[icons, None])
        self.unknown[:, sorted(self.icon_words)] = False
        self.unknown &= ~self.true

    def add(self, forms: list[str]) -> int:
        """The number of a phrase, given as singular and plural; known phrases keep theirs."""
        if forms[0] not in self.number:
            self.number[forms[0]] = len(self.forms)
            self.forms.append(list(dict.fromkeys(forms)))
            for form in forms[1:]:
                self.number.setdefault(form, self.number[forms[0]])
        return self.number[forms[0]]

    def text(self, phrase: int, family: str = "", template: str | None = None) -> str:
        """A phrase in a random form and template."""
        forms = self.forms[phrase]
        many = len(forms) > 1 and random.random() < (0.45 if phrase in self.subject_words else 0.1)
        words = forms[1] if many else forms[0]
        if template is None:
            template = random.choices(list(TEMPLATES), list(TEMPLATES.values()))[0]
            if family and random.random() < 0.12:
                kinds = ["a {} emoji"]
                kinds += ["a black and white drawing of {a}"] * (family in BLACK)
                kinds += ["an outline of {a}", "a line drawing of {a}"] * (family in OUTLINES)
                kinds += ["a hand-drawn {}", "a sketch of {a}"] * (family in SKETCHES)
                template = random.choice(kinds)
        return template.replace("{a}", words if many else with_article(words)).replace("{}", words)

    def sample(self, code: int, family: str, styles: Tensor, long: bool = False) -> tuple[str, int]:
        """A caption of a drawing, and the number of the phrase that decides for which drawings it is true."""
        drawing = self.drawings[code]
        for style, number in enumerate(self.styles):
            if styles[style] and random.random() < 0.6:
                if random.random() < 0.5:
                    return self.text(number), number
                return self.text(drawing.name, template=f"a {self.forms[number][0]} of {{a}}"), drawing.name
        if long:
            words = [self.text(number, template="{}") for number in drawing.keywords + drawing.subjects]
            words = random.sample(words, random.randint(0, min(len(words), 12)))
            words.insert(random.randint(0, len(words)), self.text(drawing.name, template=random.choice(["{}", "{a}"])))
            start = random.choice(["", "", "a drawing: ", "a drawing of ", "this picture shows ", "keywords: "])
            return f"{start}{', '.join(words)}{random.choice(['', '.'])}", drawing.name
        kind = random.random()
        subjects = drawing.subjects if kind < 0.05 else [n for n in drawing.subjects if n not in self.icon_words]
        if subjects and kind < 0.35:
            number = random.choice(subjects)
        elif drawing.keywords and kind < 0.55:
            number = random.choice(drawing.keywords)
        elif subjects and kind < 0.62:
            subject = self.forms[random.choice(subjects)][0]
            template = random.choice(["{}, a type of *.", "{a} *", "a photo of a {}, a type of *.", "*: {}", "{}, *"])
            return self.text(drawing.name, template=template.replace("*", subject)), drawing.name
        else:
            number = drawing.name
        return self.text(number, family), number

    def all_texts(self) -> list[str]:
        """Texts that together hold every word of any caption."""
        texts = [form for number in sorted(self.used) for form in self.forms[number]]
        texts += [template.format("", a="a an") for template in TEMPLATES]
        texts += ["a black and white drawing, an outline, a line drawing, a hand-drawn sketch of, a type of: . ,"]
        return [*texts, "a drawing: this picture shows, keywords: a silhouette of patterns icons"]
