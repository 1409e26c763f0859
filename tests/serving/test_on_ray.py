"""The service on a Ray cluster of this machine: the answers of one process, and adapters that stay where they are."""

import asyncio
import os
import sys
import time

import httpx
import pytest
import serving_of_adapters as eight
from serving_of_adapters import refused

ray = pytest.importorskip("ray", reason="Ray is not installed")
serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed")


@pytest.mark.slow
def test_two_replicas_answer_as_one_process_and_keep_their_adapters(tmp_path):
    from visionpeft.serving.on_ray import MODELS, ray_application
    from visionpeft.serving.service import Settings

    folder, files = eight.save_adapters(tmp_path / "adapters"), eight.draw_files(2)
    expected = eight.offline(folder, files, eight.NAMES[:3])
    path = os.pathsep.join(filter(None, (os.getcwd(), *sys.path)))
    # Ray kills a proxy that is not ready within 5 seconds, which it is not where other tests run at the same time.
    patience = {f"RAY_SERVE_PROXY_{check}_TIMEOUT_S": "60" for check in ("READY_CHECK", "HEALTH_CHECK")}
    environment = {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | patience}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        with eight.listening("127.0.0.1", 0) as free:
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(ray_application([folder], Settings(max_batch=eight.BATCH), replicas=2))
        asyncio.run(answers(f"http://127.0.0.1:{port}", files, expected))

        ask = serve.get_deployment_handle(MODELS, app_name="default").ask
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for number in range(8):
                form = {"files": {"image": files[0]}, "data": {"adapter": "task6"}}
                assert client.post("/predict", **form).status_code == 200
                time.sleep(0 if number else 2)  # until Ray has told who has it
        # Which replica says it, chance decides; one has the adapter, and the other has not.
        listed = [{each["name"]: each["loaded"] for each in ask.remote("adapters").result()} for _ in range(30)]
        assert {each["task6"] for each in listed} == {True, False}
    finally:
        serve.shutdown()
        ray.shutdown()


async def answers(address: str, files: list[bytes], expected: dict) -> None:
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:

        async def check(number: int) -> None:
            name, file = eight.NAMES[number % 3], number % 2
            form = {"files": {"image": files[file]}, "data": {"adapter": name, "top_k": "99"}}
            answer = await client.post("/predict", **form)
            assert answer.status_code == 200, answer.text
            assert {each["name"]: each["probability"] for each in answer.json()["classes"]} == expected[name, file]

        await asyncio.gather(*map(check, range(24)))
        form = {"files": {"image": files[0]}, "data": {"adapter": "absent"}}
        assert refused(await client.post("/predict", **form), 404, "there is no adapter 'absent'")
        form = {"files": {"image": b"no image"}, "data": {"adapter": "task0"}}
        assert refused(await client.post("/predict", **form), 422, "not one Pillow can read")
        assert (await client.post("/adapters", json={"name": "task5"})).status_code == 204
        assert refused(await client.delete("/adapters/absent"), 404, "no adapter 'absent' is in memory")
        assert (await client.get("/adapters/task5")).json()["labels"] == "classes"
        assert (await client.get("/health")).json()["status"] == "ok"
        assert "visionpeft_requests_total" in (await client.get("/metrics")).text
