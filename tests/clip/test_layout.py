"""Token layouts with OpenCLIP's own tokenizer, and what is refused about class names."""

import itertools
import warnings
from types import SimpleNamespace

import open_clip
import pytest
import torch
from clip_reference import NAMES, WordTokenizer, clip_model, plain_features, tokenizer

from visionpeft.clip.layout import Tokenizer, clean_class_names, slots
from visionpeft.clip.learners import IVLP, TPT, CLIPLinearProbe, CoOp, KgCoOp, MaPLe, ProGrad, ZeroShot
from visionpeft.clip.learners.coop import context_prompts
from visionpeft.data.few_shot.definitions import few_shot_class_names
from visionpeft.errors import ConfigurationError
from visionpeft.files import shipped

START, END = 49406, 49407


def taken_apart(length=77):
    return Tokenizer(tokenizer(), length)


def test_tokens_are_those_of_clip():
    parts = taken_apart()
    assert (parts.start, parts.end, parts.pad) == ((START,), END, 0)
    assert parts.contents(["a photo of a dog.", "X , person doing", ""]) == [
        (320, 1125, 539, 320, 1929, 269),
        (343, 267, 2533, 1960),
        (),
    ]
    layout = parts.layout(parts.contents(["a photo of a dog."]), ["dog"])
    assert layout.texts == ((START, 320, 1125, 539, 320, 1929, 269, END),)
    assert layout.texts[0].index(END) == 7


def test_places_of_the_context():
    parts = taken_apart()
    (end,) = context_prompts(parts, ["dog"], 16)
    assert parts.layout([end], ["dog"]).texts[0].index(END) == 19
    assert end == (*slots(16), 1929, 269)
    red, kite = parts.contents(["red kite"])[0]
    assert context_prompts(parts, ["red kite"], 5, "middle") == [(-1, -2, red, kite, -3, -4, -5, 269)]
    assert context_prompts(parts, ["red kite"], 2, "front") == [(red, kite, -1, -2, 269)]
    assert context_prompts(parts, ["dog", "dog"], 2, "end", class_specific=True) == [
        (-1, -2, 1929, 269),
        (-3, -4, 1929, 269),
    ]


def test_every_name_has_the_tokens_of_its_sentence():
    """In the prompt of a learner stand the tokens that the whole sentence has, for every name that is shipped."""
    keys = sorted(path.stem for path in (shipped("datasets") / "class_names").glob("*.json"))
    shipped_names = [clean_class_names(few_shot_class_names(key), allow_duplicates=True) for key in keys]
    longest = "2012 Lamborghini Gallardo LP 570-4 Superleggera"
    names = [longest, "F-16A/B", "it's", "café crème", "猫", *dict.fromkeys(itertools.chain(*shipped_names))]
    assert len(names) > 2000
    parts = taken_apart()
    rows = [row[: row.index(END)] for row in tokenizer()([f"X X {name}." for name in names]).tolist()]
    assert {tuple(row[:3]) for row in rows} == {(START, 343, 343)}
    for position in ("end", "middle", "front"):
        prompts = context_prompts(parts, names, 2, position)
        assert [[token for token in prompt if token >= 0] for prompt in prompts] == [row[3:] for row in rows]
    assert [[*own, 269] for own in parts.contents(names)] == [row[3:] for row in rows]
    assert len(parts.contents([longest])[0]) == 16


def test_a_full_stop_may_be_one_token_with_the_end_of_a_name():
    name = "ram (adult male sheep)"
    row = tokenizer()([f"X X {name}."])[0].tolist()
    sentence = tuple(row[3 : row.index(END)])
    assert sentence[-1] != 269
    parts = taken_apart()
    assert context_prompts(parts, [name], 2) == [(-1, -2, *sentence)]
    assert context_prompts(parts, [name], 2, "front") == [(*sentence, -1, -2)]
    clip = clip_model()
    learner = CoOp(clip, tokenizer(), [name], init="a photo of a")
    expected = plain_features(clip, [f"a photo of a {name}."])
    torch.testing.assert_close(learner.text_features(), expected, rtol=0, atol=1e-11)


def like_gemma(folder, words=("dog", "photo", "of", "a", "red", "kite")):
    """SigLIP 2's tokenizer with a small vocabulary: no "▁" before the first word of a text (transformers 5.24.0)."""
    transformers = pytest.importorskip("transformers")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(set("".join(words)))])}
    merges = []
    for word in words:
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    for word in words:
        merges.append(("▁", word))
        vocabulary.setdefault(f"▁{word}", len(vocabulary))
    ends = {"padding_side": "right", "add_bos_token": False, "add_eos_token": True}
    transformers.GemmaTokenizer(vocab=vocabulary, merges=merges, **ends).save_pretrained(folder)
    return open_clip.tokenizer.HFTokenizer(str(folder), context_length=12, clean="canonicalize")


def test_words_that_are_other_tokens_at_the_start_of_a_text(tmp_path):
    """Of SigLIP 2 a class name after a context is what it is in a sentence, "▁dog" and not "dog"."""
    tokenize, names = like_gemma(tmp_path), ["dog", "red kite"]
    parts = Tokenizer(tokenize, 12)
    sentence, photo = parts.contents(["a photo of a red kite.", "a photo of a"])
    assert sentence[: len(photo)] == photo
    assert parts.contents(["red kite"])[0] != sentence[4:]  # its negative control
    assert parts.following(["red kite"]) == [sentence[4:]]
    assert context_prompts(parts, ["red kite"], 2) == [(-1, -2, *sentence[4:])]
    assert context_prompts(parts, ["red kite"], 1, "middle") == context_prompts(parts, ["red kite"], 1, "front")
    assert context_prompts(parts, ["red kite"], 1, "front") == [(*parts.contents(["red kite"])[0], -1)]

    def texts(build, **options):
        return build(clip_model("siglip"), tokenize, names, **options).text_features()

    expected = texts(ZeroShot, template="a photo of a {}.")
    for build, options in {
        CoOp: {"init": "a photo of a"},
        KgCoOp: {},
        TPT: {},
        ProGrad: {"context_length": 4},
        MaPLe: {"depth": 1},
        IVLP: {"depth_text": 1, "num_text": 4},
    }.items():
        torch.testing.assert_close(texts(build, **options), expected, rtol=0, atol=1e-11)
    padded = ProGrad(clip_model("siglip"), tokenize, names, context_length=6)
    torch.testing.assert_close(padded.vectors[2:], padded.text.embed(parts.following(["a photo of a"])[0]))


def test_no_start_token_and_an_end_that_is_also_the_padding():
    tokenize = WordTokenizer()
    parts = Tokenizer(tokenize, 12)
    assert (parts.start, parts.end, parts.pad) == ((), 1, 1)
    (content,) = parts.contents(["a photo of a dog."])
    assert [*content, 1] == tokenize(["a photo of a dog."], context_length=7)[0].tolist()


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50-quickgelu", "ViT-L-14"])
def test_other_tokenizers_of_openclip(name):
    assert Tokenizer(open_clip.get_tokenizer(name), 77).start == (START,)


def test_names_are_cleaned():
    assert clean_class_names(["Yo_Yo", "  red   kite ", "Ménagerie"]) == ["Yo Yo", "red kite", "Ménagerie"]
    assert clean_class_names(("missile", "missile"), allow_duplicates=True) == ["missile", "missile"]


def test_names_beyond_ascii_work():
    names = ["naïve café", "猫", "Übergröße", "🙂"]
    clip = clip_model()
    learner = ZeroShot(clip, tokenizer(), names)
    expected = plain_features(clip, [f"a photo of a {name}." for name in names])
    torch.testing.assert_close(learner.text_features(), expected, rtol=0, atol=1e-11)


def test_case_does_not_matter_to_the_features():
    clip = clip_model()
    upper, lower = (CoOp(clip, tokenizer(), names, init="a photo of a") for names in (["DOG"], ["dog"]))
    assert torch.equal(upper.text_features(), lower.text_features())


def test_the_longest_prompt_fits_and_one_token_more_does_not():
    clip = clip_model()
    fits = " ".join(["word"] * 58)  # 58 + 16 + full stop, start and end = 77
    assert CoOp(clip, tokenizer(), [fits]).layout.texts[0][-1] == END
    with pytest.raises(ConfigurationError, match="has 78 tokens, 16 of them learned context, and this CLIP reads 77"):
        CoOp(clip, tokenizer(), [fits + " word"])
    with pytest.raises(ConfigurationError, match="shorten the class name or the template"):
        ZeroShot(clip, tokenizer(), [" ".join(["word"] * 71)])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no class names"),
        (None, "no class names"),
        (["caf\u00e9", "cafe\u0301"], "as the same tokens"),
        (["dog", "a &amp; b", "a & b"], "'a &amp; b' and 'a & b' as the same tokens"),
        ("dog", "not the one text 'dog'"),
        (["dog", ""], "class name 1 is ''"),
        (["_ "], "class name 0 is '_ '"),
        (["dog", "\u200b\ufeff_"], "class name 1 is '\\u200b\\ufeff_'"),
        (["\u200d\ufe0f"], "class name 0 is"),
        (["dog", None], "class name 1 is None"),
        (["dog", "cat", "Dog"], "class names 0 and 2 are both 'Dog'"),
        (["red_kite", "red  kite"], "class names 0 and 1 are both 'red kite'"),
    ],
)
def test_refused_names(names, message):
    with pytest.raises(ConfigurationError) as caught:
        CoOp(clip_model(), tokenizer(), names)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("allow_duplicates", [False, True])
def test_a_name_of_which_the_tokenizer_reads_nothing(allow_duplicates):
    """Those of SigLIP leave out punctuation; a linear probe reads no names."""
    letters_only = open_clip.SimpleTokenizer(clean="canonicalize")
    more = {"allow_duplicates": allow_duplicates}
    with pytest.raises(ConfigurationError, match="reads nothing of the class name '\\?'; write it in words"):
        ZeroShot(clip_model(), letters_only, ["dog", "?"], **more)
    learner = ZeroShot(clip_model(), letters_only, ["dog", "question mark"], **more)
    with pytest.raises(ConfigurationError, match="reads nothing"):
        learner.set_class_names(["-"])
    assert learner.class_names == ["dog", "question mark"]
    assert CLIPLinearProbe(clip_model(), letters_only, ["C", "C++", "?"], **more).class_names == ["C", "C++", "?"]
    assert ZeroShot(clip_model(), tokenizer(), ["dog", "?"], **more).class_names == ["dog", "?"]


class KnowsFewWords(WordTokenizer):
    """As those of Hugging Face are wrapped, with one token for every word outside the vocabulary."""

    def __init__(self, unknown):
        super().__init__()
        self.tokenizer = SimpleNamespace(unk_token_id=unknown)

    def __call__(self, texts, context_length=12):
        self.ids |= {"\u732b": 55}
        return super().__call__(texts, context_length)


def test_a_name_that_the_tokenizer_does_not_know():
    """A text of its one token for the unknown says nothing of the class; of some tokenizers that is the end token."""
    clip = clip_model("siglip")
    with pytest.warns(UserWarning, match="never trained on words of '\u732b'; expect little"):
        ZeroShot(clip, KnowsFewWords(55), ["dog", "\u732b", "red kite"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ZeroShot(clip, KnowsFewWords(55), ["dog", "red kite"])
        ZeroShot(clip, KnowsFewWords(1), ["dog", "\u732b"])


@pytest.mark.parametrize("wrong", [None, "ViT-B-16", 7, open_clip.SimpleTokenizer, len, lambda texts: texts])
def test_what_is_no_tokenizer(wrong):
    with pytest.raises(ConfigurationError, match="tokenizer") as caught:
        CoOp(clip_model(), wrong, NAMES)
    assert "open_clip.get_tokenizer" in str(caught.value)


def test_duplicates_may_be_allowed():
    learner = CoOp(clip_model(), tokenizer(), ["missile", "sunglasses", "missile"], allow_duplicates=True)
    texts = learner.text_features()
    torch.testing.assert_close(texts[0], texts[2], rtol=0, atol=1e-12)
    with pytest.raises(ConfigurationError) as caught:
        CoOp(clip_model(), tokenizer(), ["missile", "missile"])
    assert "allow_duplicates=True (--model.learner.allow_duplicates true)" in str(caught.value)
