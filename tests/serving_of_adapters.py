"""Eight adapters of the embedded backbone on small images, and what they say offline."""

import asyncio
import base64
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image

import visionpeft as vp
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.data.transforms import ImageTransform
from visionpeft.serving.application import application
from visionpeft.serving.command import BACKLOG, listening, server_of
from visionpeft.serving.service import Service
from visionpeft.sharing.adapter_pool import AdapterPool

BATCH = 8
METHODS = (vp.LoRA(rank=4), vp.SSF(), vp.AdaptFormer(), vp.LoRA(rank=2, targets=("fc1",)))
NAMES = [f"task{number}" for number in range(8)]


def backbone(classes: int = 0) -> torch.nn.Module:
    return vp.create_backbone("nano_vit", img_size=32, num_classes=classes).eval()


def save_adapters(folder: Path) -> Path:
    """Adapters with heads of 3 to 10 classes, moved away from their initial values."""
    for number, name in enumerate(NAMES):
        model = backbone(classes=3 + number)
        vp.attach(model, METHODS[number % len(METHODS)])
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.peft.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        names = [f"{name} class {index}" for index in range(3 + number)]
        vp.save(model, folder / name, class_names=names, preprocessing=preprocessing_of(model))
    return folder


def draw_files(count: int) -> list[bytes]:
    """PNG files of coloured noise of different shapes."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(count):
        height, width = generator.integers(20, 60, 2)
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def offline(folder: Path, files: list[bytes], names: list[str] = NAMES, batch: int = BATCH) -> dict[tuple, dict]:
    """(adapter, number of the file) -> probability of each class, from a pool of this process, an image at a time."""
    pool = AdapterPool(backbone(), folder, batch_size=batch)
    transform = ImageTransform(preprocessing_of(pool.model), "squash")
    images = [transform.normalise(transform.prepare(Image.open(io.BytesIO(file)).convert("RGB"))) for file in files]
    found = {}
    for name in names:
        classes = vp.read_metadata(folder / name)["class_names"]
        for number, image in enumerate(images):
            (logits,) = pool.logits(image[None], [name])
            found[name, number] = dict(zip(classes, logits[None].softmax(-1)[0].tolist(), strict=True))
    return found


def start(*arguments: str | Path, folder: Path) -> tuple[subprocess.Popen, str]:
    """A process that serves, and its address; whatever else it says is in folder / "log"."""
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "visionpeft.serve", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )
    for line in process.stdout:
        if line.startswith("serving "):
            return process, line.split()[-1]
    raise AssertionError((folder / "log").read_text())


def ask(service, method, path, **options) -> httpx.Response:
    return asyncio.run(ask_all(service, [(method, path, options)]))[0]


async def ask_all(service, requests) -> list[httpx.Response]:
    transport = httpx.ASGITransport(application(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await asyncio.gather(*(client.request(method, path, **options) for method, path, options in requests))


def as_json(file: bytes, **more) -> dict:
    return {"json": {"image": base64.b64encode(file).decode(), **more}}


def refused(answer: httpx.Response, code: int, said: str) -> bool:
    assert answer.status_code == code, answer.text
    assert said in answer.json()["error"]
    assert answer.json().keys() == {"error"}
    return True


@contextmanager
def in_thread(service: Service) -> Iterator[str]:
    """The address of a service in a thread of this process."""
    socket = listening("127.0.0.1", 0)
    server = server_of(application(service), seconds=30)
    socket.listen(BACKLOG)  # whoever is told the address may connect at once
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
