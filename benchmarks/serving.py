"""Requests a second of one process with many adapters, of PEFT in the same server, and of one process for each adapter.

    python benchmarks/serving.py --adapters 8 --requests 160 --rounds 3

LoRA of rank 8 on query and value with a head of its own for each adapter, random images over HTTP on the loopback
interface, 32 requests at a time, adapters drawn at random. All servers are the same code (visionpeft.serving); PEFT's
has a lane that computes a mixed batch by `adapter_names`, with the heads applied row by row as here. PEFT reaches a
fused projection as a whole, so its LoRA changes the key, too. The servers are started first and take turns. Prints
requests a second of the clock, and for each second of CPU time of the servers, which other work on the machine does not
disturb; and the memory that belongs to the servers (proportional set size).
"""

import argparse
import asyncio
import io
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import numpy as np
import timm
import torch
from measuring import table
from PIL import Image
from safetensors.torch import save_file

import visionpeft as vp
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.serving.application import application
from visionpeft.serving.command import listening, server_of
from visionpeft.serving.limits import Limits
from visionpeft.serving.service import Service, Settings

CLASSES, RANK, AT_A_TIME = 20, 8, 32


class PeftLane:
    """The adapters of a service as PEFT computes them: one model with all of them, and a name for each row."""

    def __init__(self, lane, names: list[str]):
        import peft

        model = timm.create_model(lane.pool.model.pretrained_cfg["architecture"], num_classes=0)
        model.load_state_dict({k: v for k, v in lane.pool.model.state_dict().items() if k in model.state_dict()})
        config = peft.LoraConfig(r=RANK, target_modules=["qkv"], init_lora_weights=False)
        self.model = peft.get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            self.model.add_adapter(name, config)
        self.model.eval()
        self.heads = {name: torch.nn.Linear(model.num_features, CLASSES) for name in names}
        self.rows = lane.pool.batch_size

    def compute(self, jobs: list) -> list[torch.Tensor]:
        """The answer of each job."""
        missing = self.rows - len(jobs)
        images = [job.about.transform.normalise(job.image) for job in jobs]
        names = [job.name for job in jobs]
        with torch.inference_mode():
            batch = torch.stack(images + images[-1:] * missing)
            features = self.model(batch, adapter_names=names + names[-1:] * missing)
            rows = [self.heads[name](row[None])[0] for name, row in zip(names, features, strict=False)]
            return [job.about.answer(row) for job, row in zip(jobs, rows, strict=True)]


def serve(kind: str, places: list[Path], checkpoint: Path, batch: int) -> None:
    """Serve in this process; prints the address."""
    service = Service(places, Settings(max_batch=batch, checkpoint=checkpoint, limits=Limits(seconds=600)))
    if kind == "peft":
        (lane,) = service._lanes.values()
        lane.compute = PeftLane(lane, service.names()).compute
    socket = listening("127.0.0.1", 0)
    print(f"http://127.0.0.1:{socket.getsockname()[1]}", flush=True)
    server_of(application(service), seconds=600).run(sockets=[socket])


def prepare(folder: Path, architecture: str, adapters: int) -> tuple[list[Path], Path]:
    """Adapters with random weights, and the file with those of their backbone."""
    torch.manual_seed(0)
    checkpoint = folder / "backbone.safetensors"
    save_file(timm.create_model(architecture, num_classes=0).state_dict(), checkpoint)
    places = [folder / f"adapter{number}" for number in range(adapters)]
    for place in places:
        model = vp.create_backbone(architecture, checkpoint=checkpoint, num_classes=CLASSES)
        vp.attach(model, vp.LoRA(rank=RANK, targets=("q", "v")))
        with torch.no_grad():
            for parameter in model.peft.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        vp.save(model, place, class_names=[str(i) for i in range(CLASSES)], preprocessing=preprocessing_of(model))
    return places, checkpoint


def cpu_seconds(processes: list[subprocess.Popen]) -> float:
    """CPU time that processes have used."""
    fields = [Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split() for process in processes]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def memory(processes: list[subprocess.Popen]) -> int:
    """Megabytes that belong to processes; what several share is divided among them."""
    rolled = [Path(f"/proc/{process.pid}/smaps_rollup").read_text() for process in processes]
    return sum(int(text.split("Pss:")[1].split()[0]) for text in rolled) // 1024


async def ask(addresses: dict[str, str], files: list[bytes], requests: int) -> float:
    """Send requests, 32 at a time; gives the seconds it took."""
    drawn, numbers = random.Random(0), iter(range(requests))
    limits = httpx.Limits(max_connections=AT_A_TIME)

    async def worker() -> None:
        for _ in numbers:
            name = drawn.choice([*addresses])
            form = {"files": {"image": drawn.choice(files)}, "data": {"adapter": name}}
            (await client.post(f"{addresses[name]}/predict", **form)).raise_for_status()

    loop = asyncio.get_running_loop()
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        before = loop.time()
        await asyncio.gather(*(worker() for _ in range(AT_A_TIME)))
        return loop.time() - before


def start(kind: str, places: list[Path], options: argparse.Namespace, checkpoint: Path) -> tuple:
    """A server process and its address."""
    command = [sys.executable, __file__, "--serve", kind, *map(str, places), "--checkpoint", str(checkpoint)]
    process = subprocess.Popen([*command, "--batch", str(options.batch)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("http://"):
            return process, line.strip()
    raise SystemExit(f"the server of {kind} has ended")


def compare(options: argparse.Namespace) -> list[dict]:
    """A row for each way to serve."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 224, 224, 3), dtype=np.uint8)
    files = []
    for each in pixels:
        file = io.BytesIO()
        Image.fromarray(each).save(file, "JPEG")
        files.append(file.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        places, checkpoint = prepare(Path(folder), options.model, options.adapters)
        ways: dict[str, tuple[list, dict]] = {}
        for label, kind in (("one process, visionpeft", "visionpeft"), ("one process, PEFT adapter_names", "peft")):
            process, address = start(kind, places, options, checkpoint)
            ways[label] = [process], {place.name: address for place in places}
        started = [start("visionpeft", [place], options, checkpoint) for place in places]
        addresses = {place.name: address for place, (_, address) in zip(places, started, strict=True)}
        ways[f"{len(places)} processes, one for each adapter"] = [process for process, _ in started], addresses
        try:
            seconds: dict[str, list] = {label: [] for label in ways}
            for number in range(options.rounds + 1):
                for label, (processes, addresses) in ways.items():
                    before = cpu_seconds(processes)
                    wall = asyncio.run(ask(addresses, files, options.requests if number else AT_A_TIME))
                    if number:  # the first round warms up
                        seconds[label].append((wall, cpu_seconds(processes) - before))
            return [
                {
                    "server": label,
                    "requests/s": f"{options.requests / statistics.median(wall for wall, _ in seconds[label]):.1f}",
                    "requests/CPU s": f"{options.requests / statistics.median(cpu for _, cpu in seconds[label]):.1f}",
                    "MB": memory(processes),
                }
                for label, (processes, _) in ways.items()
            ]
        finally:
            for processes, _ in ways.values():
                for process in processes:
                    process.kill()
                    process.wait()


def main() -> None:
    """Serve in this process, or start servers and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        kind, *places = options.serve
        serve(kind, [Path(place) for place in places], options.checkpoint, options.batch)
    else:
        print(table(compare(options)))


if __name__ == "__main__":
    main()
