"""Learners and runs in a service: other class names with every request, and everything a run can have learnt."""

import asyncio
import io

import pytest
import serving_of_adapters as eight
import small_label_runs
import torch
from PIL import Image
from serving_of_adapters import as_json, ask, ask_all, refused

import visionpeft as vp
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.clip.learners import CoOp
from visionpeft.data.transforms import ImageTransform
from visionpeft.serving.limits import Limits
from visionpeft.serving.service import Service, Settings
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.sharing.trained_model import open_run

LEARNERS = {"coop": vp.CoOp, "kgcoop": vp.KgCoOp, "maple": vp.MaPLe, "probe": vp.CLIPLinearProbe}
OWN = ["a cat", "a dog", "a house"]
OTHERS = ["rose", "tulip", "oak", "pine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learners")
    for number, (name, kind) in enumerate(LEARNERS.items()):
        clip, tokenizer = vp.create_clip("nano_clip")
        learner = kind(clip, tokenizer, OWN)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for tensor in learner.trained_state().values():
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
        vp.save_learner(learner, folder / name, preprocessing=preprocessing_of(clip))
    return folder


@pytest.fixture(scope="module")
def files():
    return eight.draw_files(3)


@pytest.fixture(scope="module")
def service(folder):
    service = Service([folder], Settings(max_batch=4, limits=Limits(class_names=5, texts=2)))
    assert service.remarks == []
    yield service
    service.close()


def said_alone(folder, file: bytes, names: list[str] | None) -> dict[str, float]:
    """Probabilities by a learner on a CLIP of its own."""
    learner = vp.load_learner(folder, *vp.create_clip("nano_clip"), class_names=names)
    transform = ImageTransform(preprocessing_of(learner.clip), "squash")
    image = transform.normalise(transform.prepare(Image.open(io.BytesIO(file)).convert("RGB")))
    torch.manual_seed(0)  # of the views that some draw
    with torch.inference_mode():
        return dict(zip(learner.class_names, learner(image[None]).softmax(-1)[0].tolist(), strict=True))


def by_class(answer) -> dict[str, float]:
    assert answer.status_code == 200, answer.text
    return {each["name"]: each["probability"] for each in answer.json()["classes"]}


def test_every_request_may_name_its_own_classes(service, folder, files):
    asked = [("coop", None), ("coop", OTHERS), ("maple", OTHERS), ("kgcoop", None), ("coop", OWN[:2]), ("probe", None)]
    requests = [
        ("POST", "/predict", as_json(files[number % 3], adapter=name, class_names=names))
        for number, (name, names) in enumerate(asked)
    ]
    together = asyncio.run(ask_all(service, requests * 2))
    for number, (name, names) in enumerate(asked):
        given = by_class(together[number])
        assert given == pytest.approx(said_alone(folder / name, files[number % 3], names), abs=1e-5)
        assert by_class(together[number + len(asked)]) == given
        assert by_class(ask(service, *requests[number][:2], **requests[number][2])) == given  # alone: the same bits


def test_text_features_of_the_same_names_are_kept(service, files, monkeypatch):
    counted = []
    encode = CoOp.encode_text
    monkeypatch.setattr(CoOp, "encode_text", lambda self: (counted.append(self.class_names), encode(self))[1])
    for names in (["ash", "elm"], ["ash", "elm"], ["oak", "elm"], ["ash", "elm"], ["elm", "oak"], ["oak", "elm"]):
        ask(service, "POST", "/predict", **as_json(files[0], adapter="coop", class_names=names))
    # two lists are kept: the last request comes after two others
    assert counted == [["ash", "elm"], ["oak", "elm"], ["elm", "oak"], ["oak", "elm"]]


def test_class_names_that_cannot_be_used_are_refused(service, files):
    cases = [
        ("coop", ["oak", "oak"], "both 'oak'"),
        ("coop", ["oak", " "], "at least one letter"),
        ("coop", ["oak " * 80, "elm"], "shorten the class name"),
        ("coop", ["oak"], "give at least two"),
        ("coop", list("abcdef"), "at most 5 classes"),
        ("probe", OTHERS, "no other class names"),
    ]
    for name, names, said in cases:
        answer = ask(service, "POST", "/predict", **as_json(files[0], adapter=name, class_names=names))
        assert refused(answer, 422, said)
    assert by_class(ask(service, "POST", "/predict", **as_json(files[0], adapter="coop"))).keys() == set(OWN)
    about = {name: ask(service, "GET", f"/adapters/{name}").json() for name in LEARNERS}
    assert [about[name]["takes_class_names"] for name in LEARNERS] == [True, True, True, False]
    assert refused(ask(service, "DELETE", "/adapters/coop"), 409, "is a learner")


def test_learners_that_attach_nothing_share_a_clip(service):
    clips = {name: service._learners[name].served.trained.model.clip for name in LEARNERS}
    assert clips["coop"] is clips["kgcoop"] is clips["probe"] is not clips["maple"]


@pytest.fixture(scope="module")
def changing(tmp_path_factory):
    """Learners that hold another one, tune themselves on each image, draw views of it, or remember it."""
    folder = tmp_path_factory.mktemp("changing")
    of_views = {"tpt": (vp.TPT, {"num_views": 4, "selection": 0.5}), "zero": (vp.ZERO, {"num_views": 4})}
    for name, (kind, options) in (of_views | {"dept": (vp.DePT, {}), "tda": (vp.TDA, {})}).items():
        clip, tokenizer = vp.create_clip("nano_clip")
        torch.manual_seed(0)
        learner = kind(clip, tokenizer, OWN, **options)
        with torch.no_grad():
            for tensor in learner.trained_state().values():
                tensor += 0.05 * torch.randn(tensor.shape)
        vp.save_learner(learner, folder / name, preprocessing=preprocessing_of(clip))
    return folder


def test_no_answer_depends_on_requests_before_it(changing, files):
    service = Service([changing], Settings(max_batch=4, limits=Limits(texts=2)))
    assert [remark.split(",")[0] for remark in service.remarks] == [
        "tda is not served: TDA answers by the images before"
    ]
    cases = {"dept": [None, OTHERS, OWN[::-1], OWN[:2], None], "tpt": [None, OTHERS, None], "zero": [None, None]}
    for learner, names in cases.items():  # of dept more lists than are kept
        asked = [("POST", "/predict", as_json(files[0], adapter=learner, class_names=each)) for each in names]
        alone = [by_class(ask(service, path, where, **options)) for path, where, options in asked]
        together = [by_class(answer) for answer in asyncio.run(ask_all(service, asked))]
        assert together == alone  # bit for bit
        assert alone[-1] == alone[0]
        for each, given in zip(names[:-1], alone[:-1], strict=True):
            assert given == pytest.approx(said_alone(changing / learner, files[0], each), abs=1e-5), (learner, each)
    service.close()


@pytest.mark.slow
def test_runs_that_have_learnt_labels_and_numbers(tmp_path, files):
    rows = small_label_runs.draw(tmp_path)
    for labels in ("several", "number"):
        options = small_label_runs.write_lists(tmp_path, rows, labels)
        run = small_label_runs.run(tmp_path / "runs", options, epochs=2)
        run.rename(run.with_name(labels))
    service = Service([tmp_path / "runs"], Settings(max_batch=2))
    for labels in ("several", "number"):
        trained = open_run(RunDirectory.existing(tmp_path / "runs" / labels))
        transform = ImageTransform(trained.preprocessing, trained.resize)
        image = transform.normalise(transform.prepare(Image.open(io.BytesIO(files[0])).convert("RGB")))
        with torch.inference_mode():
            expected = trained.answers(trained.model(image[None]))[0]
        answer = ask(service, "POST", "/predict", **as_json(files[0], adapter=labels)).json()
        assert answer["labels"] == labels
        if labels == "number":
            assert answer.keys() == {"adapter", "labels", "number"}
            assert answer["number"] == pytest.approx(expected.item(), rel=1e-6)
        else:
            given = {each["name"]: each["probability"] for each in answer["classes"]}
            assert given == pytest.approx(dict(zip(trained.class_names, expected.tolist(), strict=True)), abs=1e-5)
    service.close()
