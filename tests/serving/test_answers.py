"""What a service answers, in this process: right predictions, and the right refusal of everything else."""

import asyncio
import base64
import io
import pickle
import re
import shutil
import struct
import threading
import time
import zlib
from pathlib import Path

import pytest
import serving_of_adapters as eight
import torch
from PIL import Image
from serving_of_adapters import as_json, ask, ask_all, refused

import visionpeft as vp
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.data.transforms import ImageTransform
from visionpeft.serving.application import application
from visionpeft.serving.command import server_of
from visionpeft.serving.limits import Limits
from visionpeft.serving.refusals import Refusal
from visionpeft.serving.service import Service, Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return eight.save_adapters(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def files():
    return eight.draw_files(4)


@pytest.fixture(scope="module")
def expected(folder, files):
    return eight.offline(folder, files, eight.NAMES[:3])


@pytest.fixture(scope="module")
def service(folder):
    limits = Limits(body=200_000, pixels=10_000, seconds=20, class_names=20)
    service = Service([folder], Settings(max_batch=eight.BATCH, limits=limits))
    assert service.remarks == []
    yield service
    service.close()


def test_both_forms_of_a_request_give_the_offline_prediction(service, files, expected):
    ways = [
        ("POST", "/predict", {"files": {"image": files[1]}, "data": {"adapter": "task1", "top_k": "4"}}),
        ("POST", "/predict", as_json(files[1], adapter="task1", top_k=4)),
    ]
    for answer in asyncio.run(ask_all(service, ways)):
        assert answer.status_code == 200, answer.text
        content = answer.json()
        assert (content["adapter"], content["labels"]) == ("task1", "classes")
        assert {each["name"]: each["probability"] for each in content["classes"]} == expected["task1", 1]
        shares = [each["probability"] for each in content["classes"]]
        assert shares == sorted(shares, reverse=True)
    top = ask(service, "POST", "/predict", **as_json(files[1], adapter="task1", top_k=2)).json()["classes"]
    assert top == content["classes"][:2]


def test_the_offline_prediction_is_that_of_the_adapter_alone(folder, files, expected):
    """An oracle without a pool: one adapter on one model, one image."""
    model = eight.backbone()
    vp.load(model, folder / "task2")
    transform = ImageTransform(preprocessing_of(model), "squash")
    image = transform.normalise(transform.prepare(Image.open(io.BytesIO(files[0])).convert("RGB")))
    with torch.inference_mode():
        probabilities = model.eval()(image[None]).softmax(-1)[0]
    torch.testing.assert_close(probabilities, torch.tensor([*expected["task2", 0].values()]), atol=1e-5, rtol=1e-4)


def test_requests_of_many_adapters_share_batches(service, files, expected):
    before = service.metrics.images._sum.get()
    names = [eight.NAMES[number % 3] for number in range(12)]
    requests = [
        ("POST", "/predict", as_json(files[number % 4], adapter=name, top_k=99)) for number, name in enumerate(names)
    ]
    for number, (name, answer) in enumerate(zip(names, asyncio.run(ask_all(service, requests)), strict=True)):
        assert {each["name"]: each["probability"] for each in answer.json()["classes"]} == expected[name, number % 4]
    assert service.metrics.images._sum.get() - before == 12
    text = ask(service, "GET", "/metrics").text
    assert 'visionpeft_requests_total{code="200",path="/predict"}' in text
    told = dict(line.split() for line in text.splitlines() if line.startswith(("visionpeft_ad", "visionpeft_waiting")))
    pool = next(iter(service._lanes.values())).pool
    assert float(told["visionpeft_waiting"]) == 0
    assert float(told["visionpeft_adapters_loaded"]) == len(pool.loaded()) >= 3
    assert float(told["visionpeft_adapter_bytes"]) == pool.bytes > 0
    buckets = [line for line in text.splitlines() if line.startswith("visionpeft_batch_images_bucket")]
    assert float(buckets[0].split()[-1]) < float(buckets[-1].split()[-1])  # not all alone


def test_what_cannot_be_answered_is_refused_with_the_right_code(service, files):
    bomb = png_of(100_000, 100_000)
    image = base64.b64encode(files[0]).decode()
    cases = [
        ({"files": {"image": b"no image"}, "data": {"adapter": "task0"}}, 422, "not one Pillow can read"),
        ({"files": {"image": files[0][:200]}, "data": {"adapter": "task0"}}, 422, "cannot be decoded"),
        ({"files": {"image": bomb}, "data": {"adapter": "task0"}}, 413, "pixels"),
        ({"files": {"image": bytes(200_001)}, "data": {"adapter": "task0"}}, 413, "larger than 200,000 bytes"),
        ({"files": {"image": bytes(900_001)}, "data": {"adapter": "task0"}}, 413, "larger than 200,000 bytes"),
        ({"files": {"image": files[0]}, "data": {"adapter": "task"}}, 404, "did you mean task"),
        ({"files": {"image": files[0]}, "data": {"adapter": "../task0"}}, 404, "there is no adapter"),
        ({"files": {"image": files[0]}}, 422, "say which one"),
        ({"files": {"image": files[0]}, "data": {"adapter": "task0", "top_k": "0"}}, 422, "top_k"),
        ({"files": {"image": files[0]}, "data": {"adapter": "task0", "colour": "1"}}, 422, "'colour'"),
        ({"files": {"image": files[0]}, "data": {"adapter": "task0", "class_names": ["a", "b"]}}, 422, "its own"),
        ({"data": {"adapter": "task0"}}, 415, "multipart"),
        ({"files": {"picture": files[0]}, "data": {"adapter": "task0"}}, 422, "no file called image"),
        ({"content": b"--", "headers": {"content-type": "multipart/form-data"}}, 422, "form cannot be read"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 422, "Invalid JSON"),
        ({"json": {"image": "http://127.0.0.1/a.png", "adapter": "task0"}}, 422, "URLs are not fetched"),
        ({"json": {"image": image, "adapter": "task0", "url": "x"}}, 422, "url"),
        ({"json": {"adapter": "task0"}}, 422, "image"),
        ({"content": files[0], "headers": {"content-type": "image/png"}}, 415, "application/json"),
    ]
    answers = asyncio.run(ask_all(service, [("POST", "/predict", options) for options, _, _ in cases]))
    for (_, code, said), answer in zip(cases, answers, strict=True):
        assert refused(answer, code, said)
    assert refused(ask(service, "GET", "/predict"), 405, "another method")
    assert refused(ask(service, "GET", "/passwd"), 404, "no such path")
    assert ask(service, "POST", "/predict", **as_json(files[0], adapter="task0")).status_code == 200


def png_of(width: int, height: int) -> bytes:
    """A PNG of one colour that is small as a file; only its header is ever looked at."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_adapters_are_listed_loaded_and_forgotten(service, files):
    listed = {each["name"]: each for each in ask(service, "GET", "/adapters").json()}
    assert [*listed] == eight.NAMES
    about = ask(service, "GET", "/adapters/task7").json()
    assert about["class_names"] == [f"task7 class {index}" for index in range(10)]
    assert not about["takes_class_names"]
    assert ask(service, "POST", "/adapters", json={"name": "task7"}).status_code == 204
    listed = {each["name"]: each for each in ask(service, "GET", "/adapters").json()}
    assert listed["task7"]["loaded"]
    assert listed["task7"]["bytes"] == service._lanes[next(iter(service._lanes))].pool.loaded()["task7"].bytes
    assert ask(service, "DELETE", "/adapters/task7").status_code == 204
    assert refused(ask(service, "DELETE", "/adapters/task7"), 404, "no adapter 'task7' is in memory")
    assert refused(ask(service, "POST", "/adapters", json={"name": "../../etc"}), 404, "there is no adapter")
    assert refused(ask(service, "GET", "/adapters/absent"), 404, "there is no adapter")
    assert refused(ask(service, "POST", "/adapters", json={"names": "x"}), 422, "name")


def test_health_page_and_description(service):
    assert ask(service, "GET", "/health").json()["status"] == "ok"
    page = ask(service, "GET", "/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text  # nothing from elsewhere
    paths = ask(service, "GET", "/openapi.json").json()["paths"]
    assert {"/predict", "/adapters", "/adapters/{name}", "/health", "/metrics"} == paths.keys()
    assert {*paths["/predict"]["post"]["requestBody"]["content"]} == {"application/json", "multipart/form-data"}
    assert ask(service, "GET", "/docs").status_code == 404


def test_a_full_queue_a_model_that_hangs_and_the_end_are_said(folder, files):
    service = Service([folder], Settings(max_batch=1, max_wait=0, limits=Limits(queue=3, seconds=3)))
    lane, gate = next(iter(service._lanes.values())), threading.Event()
    compute = lane.compute
    lane.compute = lambda jobs: (gate.wait(60), compute(jobs))[1]
    request = ("POST", "/predict", as_json(files[0], adapter="task0"))
    answers = asyncio.run(ask_all(service, [request] * 5))
    assert sorted(answer.status_code for answer in answers) == [429, 429, 504, 504, 504]  # two were not taken
    assert {answer.json()["error"].split(";")[0] for answer in answers} == {
        "3 requests are being answered already",
        "the prediction was not ready within 3 seconds",
    }
    time.sleep(0.5)  # the batch began after the request came
    assert refused(ask(service, "GET", "/health"), 503, "has not answered")
    gate.set()
    service.batches.close()
    assert service.batches.waiting() == 0  # those that came too late were not computed
    assert refused(ask(service, *request[:2], **request[2]), 503, "being stopped")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_tells_when_nothing_is_computed_any_more(folder, files):
    service = Service([folder], Settings(limits=Limits(seconds=2)))
    assert ask(service, "GET", "/health").status_code == 200

    def end(jobs):
        raise SystemExit

    next(iter(service._lanes.values())).compute = end
    assert ask(service, "POST", "/predict", **as_json(files[0], adapter="task0")).status_code == 504
    assert refused(ask(service, "GET", "/health"), 503, "thread of the models has ended; start the service again")
    service.close()


def test_a_service_says_what_it_does_not_serve(folder, files, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(folder / "task0", root / "good")
    shutil.copytree(folder / "task1", root / "bad")
    (root / "bad" / "adapter.safetensors").write_bytes(b"pickle?")
    (root / "empty").mkdir()
    service = Service([root], Settings(max_batch=2))
    assert len(service.remarks) == 1
    assert service.remarks[0].startswith("bad is not served: ")
    assert refused(ask(service, "POST", "/predict", **as_json(files[0], adapter="bad")), 500, "'bad' cannot be loaded")
    assert str(tmp_path) not in ask(service, "POST", "/predict", **as_json(files[0], adapter="bad")).text
    # with others in its batch it fails alone
    pairs = [("POST", "/predict", as_json(files[0], adapter=name)) for name in ("bad", "good", "bad", "good")]
    assert [answer.status_code for answer in asyncio.run(ask_all(service, pairs))] == [500, 200, 500, 200]

    shutil.copytree(folder / "task3", root / "later")  # is found
    assert ask(service, "POST", "/predict", **as_json(files[0], adapter="later")).status_code == 200

    request = ("POST", "/predict")
    shutil.rmtree(root / "later")  # replaced by another one after it was loaded
    shutil.copytree(folder / "task4", root / "later")
    assert ask(service, "DELETE", "/adapters/later").status_code == 204
    answer = ask(service, *request, **as_json(files[0], adapter="later", top_k=99)).json()
    assert {each["name"] for each in answer["classes"]} == {f"task4 class {index}" for index in range(7)}

    shutil.rmtree(root / "later")  # and read again after its classes had been read
    shutil.copytree(folder / "task5", root / "later")
    next(iter(service._lanes.values())).pool.unload("later")
    assert refused(ask(service, *request, **as_json(files[0], adapter="later")), 503, "was replaced")
    answer = ask(service, *request, **as_json(files[0], adapter="later", top_k=99)).json()
    assert {each["name"] for each in answer["classes"]} == {f"task5 class {index}" for index in range(8)}

    shutil.rmtree(root / "later")  # and gone
    next(iter(service._lanes.values())).pool.unload("later")
    assert refused(ask(service, *request, **as_json(files[0], adapter="later")), 404, "any more")

    other = vp.create_backbone("nano_vit", img_size=64)  # another backbone, which is made for nobody
    vp.attach(other, vp.LoRA())
    vp.save(other, root / "other")
    assert refused(ask(service, *request, **as_json(files[0], adapter="other")), 422, "has not loaded")
    service.close()

    with pytest.raises(vp.ConfigurationError, match="no folder"):
        Service([tmp_path / "absent"])
    with pytest.raises(vp.ConfigurationError, match="can be served"):
        Service([root / "empty"])
    with pytest.raises(vp.ConfigurationError, match="'good'"):
        Service([root, root / "good"])


def test_a_connection_is_kept_for_longer_than_clients_and_load_balancers_keep_it(service):
    """Idle for 60 seconds with nginx (keepalive_timeout of upstreams) and AWS's load balancer, 5 with httpx."""
    assert server_of(application(service), seconds=30).config.timeout_keep_alive > 60


def test_refusals_survive_the_way_between_processes():
    error = pickle.loads(pickle.dumps(Refusal(404, "there is none")))
    assert (error.code, str(error)) == (404, "there is none")


def test_what_the_documentation_shows(tmp_path, monkeypatch, capsys):
    """Its Python as it stands, with a service at another address."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    *offline, online = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {}
    for block in offline:
        exec(block, names)
    assert [len(row) for row in names["logits"]] == [3, 2, 3]
    with eight.in_thread(Service(["adapters"])) as address:
        assert online.count("http://127.0.0.1:8000") == 1
        exec(online.replace("http://127.0.0.1:8000", address), names)
    assert "'adapter': 'pets', 'labels': 'classes'" in capsys.readouterr().out
