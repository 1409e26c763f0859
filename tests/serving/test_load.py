"""A process that serves under load on the loopback interface: every answer is the offline one, or an error, or late."""

import asyncio
import base64
import random
import signal
import time

import httpx
import pytest
import serving_of_adapters as eight

REQUESTS, AT_A_TIME = 1000, 32


@pytest.fixture(scope="module")
def files():
    return eight.draw_files(4)


@pytest.fixture
def folder(tmp_path):
    return eight.save_adapters(tmp_path / "adapters")


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


async def load(address: str, requests: int, files, middle=lambda: None, again=False) -> list:
    """Send requests, a number of them at a time; `middle` is called when half are sent."""
    drawn, numbers, results = random.Random(0), iter(range(requests)), []

    async def worker(client):
        for number in numbers:
            if number == requests // 2:
                middle()
            while True:
                try:
                    results.append(await send(client, number, files, drawn))
                    break
                except httpx.TransportError:  # only while nobody listens
                    assert again
                    await asyncio.sleep(0.1)

    limits = httpx.Limits(max_connections=AT_A_TIME)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
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


def test_a_thousand_requests_of_eight_adapters_one_of_which_is_damaged_meanwhile(folder, files, tmp_path):
    expected = eight.offline(folder, files)
    # Room for about half of them, so that they come and go, and the damage is met.
    size = max((folder / name / "adapter.safetensors").stat().st_size for name in eight.NAMES) / 2**20
    options = ["--port", 0, "--max-batch", eight.BATCH, "--capacity-mb", 4 * size, "--max-body-mb", 1]
    process, address = eight.start(folder, *options, folder=tmp_path)

    def damage():
        file = folder / "task3" / "adapter.safetensors"
        content = bytearray(file.read_bytes())
        content[-100] ^= 255
        file.write_bytes(content)

    try:
        results = asyncio.run(load(address, REQUESTS, files, damage))
        codes = check(results, expected, {("task3", 500): "'task3' cannot be loaded"})
        assert sum(codes.values()) == REQUESTS  # none lost
        assert codes[500] > 0  # the damage was met
        assert codes[200] + codes[500] == REQUESTS - REQUESTS // 20
        metrics = httpx.get(f"{address}/metrics").text
        assert f'visionpeft_requests_total{{code="200",path="/predict"}} {float(codes[200])}' in metrics
        images, batches = (
            float(metrics.split(f"visionpeft_batch_images_{what} ")[1].split()[0]) for what in ("sum", "count")
        )
        assert images / batches > 1.5  # requests did share batches
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()


def test_a_service_that_is_killed_under_load_goes_on_where_it_is_started_again(folder, files, tmp_path):
    names = eight.NAMES
    expected = eight.offline(folder, files, names)
    options = ["--max-batch", eight.BATCH, "--max-body-mb", 1]
    process, address = eight.start(folder, "--port", 0, *options, folder=tmp_path)
    port, started = address.rpartition(":")[2], [process]

    async def everything():
        killed = asyncio.Event()
        sending = asyncio.create_task(load(address, 300, files, killed.set, again=True))
        await killed.wait()
        started[-1].kill()
        started[-1].wait()
        again, _ = await asyncio.to_thread(eight.start, folder, "--port", port, *options, folder=tmp_path)
        started.append(again)
        return await sending

    try:
        before = time.monotonic()
        results = asyncio.run(everything())
        assert time.monotonic() - before < 120
        codes = check(results, expected, {})
        assert codes[200] == 300 - 300 // 20
        assert sum(codes.values()) == 300
        assert process.returncode == -signal.SIGKILL
    finally:
        for each in started:
            each.kill()
            each.wait()
