"""A process that serves under load on the loopback interface: every answer is the offline one, or an error, or late."""

import asyncio
import base64
import random
import signal

import httpx
import pytest
import serving_of_adapters as eight

REQUESTS, AT_A_TIME = 1000, 32


# Requests that must be refused, and with what.
MALFORMED = (
    ({"files": {"image": b"GIF89a no image"}, "data": {"adapter": "task0"}}, 422),
    ({"files": {"image": b"x" * 1_100_000}, "data": {"adapter": "task0"}}, 413),
    ({"json": {"image": "%%%", "adapter": "task0"}}, 422),
    ({"content": b"{", "headers": {"content-type": "application/json"}}, 422),
    ({"json": {"image": "", "adapter": "../task0"}}, 404),
)


async def send(client: httpx.AsyncClient, number: int, files: list[bytes], drawn: random.Random):
    """One request: what was asked, its code, and the probabilities that came back."""
    if number % 20 == 7:
        options, code = MALFORMED[number // 20 % len(MALFORMED)]
        answer = await client.post("/predict", **options)
        return None, answer.status_code, code
    name, file = drawn.choice(eight.NAMES), drawn.randrange(len(files))
    if number % 2:
        options = {"files": {"image": files[file]}, "data": {"adapter": name, "top_k": "99"}}
    else:
        options = {"json": {"image": base64.b64encode(files[file]).decode(), "adapter": name, "top_k": 99}}
    answer = await client.post("/predict", **options)
    content = answer.json()
    if answer.status_code != 200:
        assert content.keys() == {"error"}
        return (name, file), answer.status_code, content["error"]
    return (name, file), 200, {each["name"]: each["probability"] for each in content["classes"]}


async def load(address: str, requests: int, files, middle, again=False) -> list:
    """Send requests, a number of them at a time; `middle` is called with the client when half are sent."""
    drawn, numbers, results = random.Random(0), iter(range(requests)), []

    async def worker(client):
        for number in numbers:
            if number == requests // 2:
                await middle(client)
            while True:
                try:
                    results.append(await send(client, number, files, drawn))
                    break
                except httpx.TransportError:  # only while nobody listens
                    assert again
                    await asyncio.sleep(0.1)

    limits = httpx.Limits(max_connections=AT_A_TIME)
    async with httpx.AsyncClient(base_url=address, timeout=150, limits=limits) as client:
        await asyncio.gather(*(worker(client) for _ in range(AT_A_TIME)))
    return results


def check(results: list, expected: dict, allowed: dict[tuple[str, int], str]) -> dict[int, int]:
    """Every answer is right; gives how many had which code."""
    codes: dict[int, int] = {}
    for asked, code, said in results:
        codes[code] = codes.get(code, 0) + 1
        if asked is None:
            assert code == said
        elif code == 200:
            assert said == expected[asked]
        else:
            assert allowed[asked[0], code] in said
    return codes


class Served:
    """A service in a process of its own, started when it is first needed."""

    def __init__(self, place):
        self.place, self.folder, self.files = place, eight.save_adapters(place / "adapters"), eight.draw_files(4)
        self.expected = eight.offline(self.folder, self.files)
        self.options = ["--max-batch", eight.BATCH, "--max-body-mb", 1, "--timeout", 120]
        self.processes, self.port = [], 0

    def start(self):
        process, self.address = eight.start(self.folder, "--port", self.port, *self.options, folder=self.place)
        self.port = int(self.address.rpartition(":")[2])
        self.processes.append(process)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("served"))
    served.start()
    yield served
    for process in served.processes:
        process.kill()
        process.wait()


def test_a_thousand_requests_of_eight_adapters_one_of_which_is_damaged_meanwhile(served):
    file = served.folder / "task3" / "adapter.safetensors"
    whole = file.read_bytes()

    async def damage(client):
        file.write_bytes(whole[:-100] + bytes([whole[-100] ^ 255]) + whole[-99:])
        for name in eight.NAMES[2:5]:  # so that they are read again
            while (await client.delete(f"/adapters/{name}")).status_code == 409:
                await asyncio.sleep(0.01)  # in use

    results = asyncio.run(load(served.address, REQUESTS, served.files, damage))
    file.write_bytes(whole)
    codes = check(results, served.expected, {("task3", 500): "'task3' cannot be loaded"})
    assert sum(codes.values()) == REQUESTS  # none lost
    assert codes[500] > 0  # the damage was met
    assert codes[200] + codes[500] == REQUESTS - REQUESTS // 20
    metrics = httpx.get(f"{served.address}/metrics").text
    assert f'visionpeft_requests_total{{code="200",path="/predict"}} {float(codes[200])}' in metrics
    images, batches = (
        float(metrics.split(f"visionpeft_batch_images_{what} ")[1].split()[0]) for what in ("sum", "count")
    )
    assert images / batches > 1.5  # requests did share batches


def test_a_service_that_is_killed_under_load_goes_on_where_it_is_started_again(served):
    async def everything():
        async def kill(_):
            half.set()

        half = asyncio.Event()
        sending = asyncio.create_task(load(served.address, 200, served.files, kill, again=True))
        await half.wait()
        served.processes[-1].kill()
        await asyncio.to_thread(served.processes[-1].wait)
        await asyncio.to_thread(served.start)
        return await sending

    codes = check(asyncio.run(everything()), served.expected, {})
    assert codes[200] == 200 - 200 // 20
    assert sum(codes.values()) == 200
    assert served.processes[0].returncode == -signal.SIGKILL
    served.processes[1].send_signal(signal.SIGINT)  # it also ends by itself
    assert served.processes[1].wait(30) == 0
    assert "Traceback" not in (served.place / "log").read_text()
