"""Whatever stands in a file, it is read as it says or refused by one of our errors; nothing else is ever raised."""

import copy
import csv
import json
import struct

import pytest
import torch
from conftest import randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.hosts import HOSTS
from safetensors.torch import load_file, save_file

import visionpeft as vp
from visionpeft.data.annotations import read_list, read_split_lines
from visionpeft.data.few_shot.place import Place
from visionpeft.data.few_shot.split_zhou import read_split_zhou
from visionpeft.data.image_list import ImageList
from visionpeft.data.video.annotations import (
    read_hmdb51,
    read_kinetics,
    read_something,
    read_something_classes,
    read_ucf101,
    read_video_list,
)
from visionpeft.errors import DataError, UserError

HOST = next(host for host in HOSTS if host.name == "vit_cls")
EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

AWKWARD = (
    "", " ", "0", "-1", "--5", "1.5", "٣", "²", "9" * 5000, "path", "label", "path,label", ",", '"', "'", "\n", "\r",
    "\r\n", "\t", "\0", "\x1c", "\u2028", "\ufeff", "..", "/", "../../a.png", "/a.png", "a.png", "b c.png", "é", "\\",
    "[", "]", "{", "}", ":", "1e999", "nan", "inf", "true", "null", "label,youtube_id,time_start,time_end,split",
    "x" * 200_000,
)  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.sampled_from(AWKWARD), max_size=12).map("".join),
    st.lists(st.sampled_from(AWKWARD), max_size=12).map(" ".join),
    st.lists(st.sampled_from(AWKWARD), max_size=12).map("\n".join),
    st.text(max_size=40),
).map(lambda text: text.encode("utf-8", "surrogatepass"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.sampled_from([10**9, 10**40, -(10**9), float("inf"), float("nan")])
    | st.floats(-3, 3)
    | st.sampled_from(AWKWARD[:-1])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
DEEP = b"[" * 100_000
HUGE = b"[" + b"9" * 5000 + b"]"
JSON = st.one_of(VALUES.map(lambda value: json.dumps(value).encode()), st.just(DEEP), st.just(HUGE))


def refused(error, call):
    """What a call returns, or None if it is refused by this error."""
    try:
        return call()
    except error:
        return None


# lists of data sets


@EXAMPLES
@given(content=st.one_of(TEXTS, st.binary(max_size=60), JSON), suffix=st.sampled_from([".csv", ".json", ".txt"]))
def test_lists(content, suffix, tmp_path):
    file = tmp_path / f"list{suffix}"
    file.write_bytes(content)
    for read in (read_list, read_video_list, read_kinetics, read_something_classes, lambda f: read_split_lines(f, 5)):
        rows = refused(DataError, lambda read=read: read(file))
        for row in rows or ():
            if isinstance(row, str):
                continue
            assert row.path.strip()
            assert isinstance(row.label, int | str)
    refused(DataError, lambda: read_something(file, ["a", "b"]))
    for names in (None, ["a", "b"]):
        images = refused(DataError, lambda names=names: ImageList(file, root=tmp_path, class_names=names))
        for path in images.sources["train"].paths if images is not None else ():
            assert path.resolve().is_relative_to(tmp_path.resolve())


PATHS = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2000, exclude_characters="\x7f"), min_size=1, max_size=8
)
LABELS = st.integers(-5, 5) | st.sampled_from(["cat", "a dog", "x,y", 'say "z"', "1.5", "--5", "é"])


@EXAMPLES
@given(rows=st.lists(st.tuples(PATHS.filter(lambda p: p == p.strip()), LABELS), min_size=1, max_size=5))
def test_intact_lists_are_read_as_written(rows, tmp_path):
    """CSV and both forms of JSON give back the rows."""
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    (tmp_path / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "objects.json").write_text(json.dumps([{"path": p, "label": label} for p, label in rows]))
    for name in ("a.csv", "pairs.json", "objects.json"):
        assert [(row.path, row.label) for row in read_list(tmp_path / name)] == rows


@EXAMPLES
@given(
    content=st.one_of(TEXTS, st.binary(max_size=60)), name=st.sampled_from(["classInd", "trainlist01", "testlist01"])
)
def test_split_folders(content, name, tmp_path):
    (tmp_path / "classInd.txt").write_text("1 a\n2 b\n")
    for part in ("trainlist01", "testlist01"):
        (tmp_path / f"{part}.txt").write_text("a/x.avi 1\nb/y.avi 2\n")
    (tmp_path / f"{name}.txt").write_bytes(content)
    refused(DataError, lambda: read_ucf101(tmp_path, 1))
    (tmp_path / "a_test_split1.txt").write_bytes(content)
    refused(DataError, lambda: read_hmdb51(tmp_path, 1))


SPLIT = {
    "train": [["a.jpg", 0, "cat"], ["b.jpg", 1, "dog"]],
    "val": [["c.jpg", 0, "cat"]],
    "test": [["d.jpg", 1, "dog"]],
}


@EXAMPLES
@given(data=st.data())
def test_split_zhou_files(data, tmp_path):
    """A split file in which one value is another."""
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    definition = {"title": "pets", "folder": ".", "folders": ["."], "images": ["images"], "split_file": "split.json"}
    intact = refused(UserError, lambda: read_split_zhou("pets", definition, Place(tmp_path, tmp_path), False))
    (tmp_path / "split.json").write_bytes(data.draw(st.one_of(mutations(SPLIT).map(dumped), TEXTS, JSON)))
    found = refused(UserError, lambda: read_split_zhou("pets", definition, Place(tmp_path, tmp_path), False))
    assert intact is not None
    if found is not None:
        assert len(found.class_names) == len({row.label for rows in found.rows.values() for row in rows})


# adapters


def mutations(value):
    """The value with something else in one place of it."""

    @st.composite
    def mutated(draw):
        result = copy.deepcopy(value)
        here = result
        while True:
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            key = draw(st.sampled_from(keys))
            deeper = isinstance(here[key], dict | list) and len(here[key]) > 0
            if not deeper or draw(st.integers(0, 4)) == 0:
                break
            here = here[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add"]))
        if action == "drop" and isinstance(here, dict):
            del here[key]
        elif action == "add" and isinstance(here, dict):
            here[draw(st.text(max_size=6))] = draw(VALUES)
        else:
            here[key] = draw(VALUES)
        return result

    return mutated()


def dumped(value):
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A folder that `save` wrote, its description, its tensors and the logits."""
    folder = tmp_path_factory.mktemp("ours")
    methods = [vp.LoRA(rank=2, alpha=3, overrides={"last:1/q": 1}), vp.VPT(num_tokens=2), vp.Adapter(bottleneck=2)]
    model = vp.attach(HOST.build(), methods, train=("norm",))
    randomise(model.peft["default"])
    vp.save(model.eval(), folder, class_names=["a", "b", "c", "d", "e"])
    with torch.no_grad():
        return folder, vp.read_metadata(folder), load_file(folder / "adapter.safetensors"), model(HOST.inputs())


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    """A folder in the format of peft, its configuration and tensors."""
    folder = tmp_path_factory.mktemp("peft") / "theirs"
    model = vp.attach(HOST.build(), vp.LoRA(rank=2, alpha=3, targets=("q", "v", "fc1"), overrides={"fc1": 3}))
    randomise(model.peft["default"])
    vp.export_peft(model, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    return folder, json.loads((folder / "adapter_config.json").read_text()), tensors


def load(read, folder):
    """The logits of a fresh backbone with the adapter, or None if it is refused and the backbone is as it was."""
    model = HOST.build()
    if refused(UserError, lambda: read(model, folder)) is None:
        assert not hasattr(model, "peft")
        return None
    with torch.no_grad():
        return model.eval()(HOST.inputs())


@EXAMPLES
@given(data=st.data())
def test_changed_descriptions(ours, data, tmp_path):
    """A description changed in one place, alike in both files, is refused, or followed as it stands."""
    _, described, tensors, _ = ours
    text = dumped(data.draw(mutations(described))).decode()
    save_file(tensors, tmp_path / "adapter.safetensors", metadata={"visionpeft": text})
    (tmp_path / "adapter.json").write_text(text)
    load(vp.load, tmp_path)


@EXAMPLES
@given(content=st.one_of(TEXTS, JSON, st.binary(max_size=60)))
def test_any_description(ours, content, tmp_path):
    """What is no description is refused, in the header and beside it."""
    folder, _, tensors, _ = ours
    (tmp_path / "adapter.safetensors").write_bytes((folder / "adapter.safetensors").read_bytes())
    (tmp_path / "adapter.json").write_bytes(content)
    assert load(vp.load, tmp_path) is None
    (tmp_path / "adapter.json").unlink()
    text = content.decode("utf-8", "replace").replace("\0", "")
    save_file(tensors, tmp_path / "adapter.safetensors", metadata={"visionpeft": text})
    assert load(vp.load, tmp_path) is None


def damaged(data, whole):
    """Bytes of a safetensors file with some of its header changed, or cut, or with more behind them."""
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    position = data.draw(st.integers(0, end - 1))
    change = data.draw(st.binary(min_size=1, max_size=4))
    kind = data.draw(st.sampled_from(["overwrite", "insert", "cut", "append", "start"]))
    if kind == "overwrite":
        return whole[:position] + change + whole[position + len(change) :]
    if kind == "insert":
        return whole[:position] + change + whole[position:]
    if kind == "append":
        return whole + change
    return whole[:position] if kind == "cut" else change + whole[len(change) :]


@EXAMPLES
@given(data=st.data())
def test_damaged_adapters(ours, data, tmp_path):
    """A damaged header is refused, or what it says is still the same."""
    folder, _, _, logits = ours
    (tmp_path / "adapter.json").write_bytes((folder / "adapter.json").read_bytes())
    (tmp_path / "adapter.safetensors").write_bytes(damaged(data, (folder / "adapter.safetensors").read_bytes()))
    found = load(vp.load, tmp_path)
    assert found is None or torch.equal(found, logits)


@pytest.mark.parametrize("kind", [b"I32", b"U32"])
def test_integers_in_the_place_of_numbers(ours, kind, tmp_path):
    """Four bytes read as an integer are another number."""
    folder, *_ = ours
    whole = (folder / "adapter.safetensors").read_bytes()
    (tmp_path / "adapter.safetensors").write_bytes(whole.replace(b'"F32"', b'"' + kind + b'"', 1))
    assert load(vp.load, tmp_path) is None


@EXAMPLES
@given(data=st.data())
def test_changed_adapters_of_peft(theirs, data, tmp_path):
    """A configuration changed in one place is refused or followed; a damaged header is refused."""
    folder, config, tensors = theirs
    changed = data.draw(st.one_of(mutations(config).map(dumped), JSON, TEXTS))
    (tmp_path / "adapter_config.json").write_bytes(changed)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    load(vp.import_peft, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(damaged(data, whole))
    load(vp.import_peft, tmp_path)
