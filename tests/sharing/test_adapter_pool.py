"""Adapters of one backbone that come into memory when they are asked for, and make room for others."""

import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

import visionpeft as vp
from visionpeft.sharing import adapter_pool, shared_batches
from visionpeft.sharing.adapter_pool import PoolFull
from visionpeft.sharing.batch_sizes import rows_agree, sizes_that_agree

# name -> (method, number of classes): routed together, alone for their tokens, alone for the backbone's parameters
SAVED = {
    "birds": (vp.LoRA(rank=4), 5),
    "cars": (vp.LoRA(rank=2), 3),
    "cats": (vp.SSF(), 3),
    "dogs": (vp.SSF(), 4),
    "flowers": (vp.VPT(num_tokens=2, deep=True), 2),
    "pets": (vp.BitFit(), 6),
}


def backbone(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_vit", img_size=32, num_classes=7).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five adapters with heads of their own, moved away from their initial values."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, (name, (method, classes)) in enumerate(SAVED.items()):
        model = backbone()
        model.head = torch.nn.Linear(model.num_features, classes)
        vp.attach(model, method)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.peft.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        vp.save(model, folder / name, class_names=[f"{name} {index}" for index in range(classes)])
    return folder


@pytest.fixture(scope="module")
def images():
    return torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def alone(folder, images):
    """Logits (images, classes) of each adapter as the only one of a model."""
    found = {}
    for name in SAVED:
        model = backbone()
        vp.load(model, folder / name)
        with torch.inference_mode():
            found[name] = model.eval()(images)
    return found


def sizes(folder) -> dict[str, int]:
    pool = vp.AdapterPool(backbone(), folder)
    with pool.hold(SAVED) as held:
        return {adapter.name: adapter.bytes for adapter in held}


def test_rows_get_what_their_adapter_gives_alone_whatever_classes_and_methods_the_others_have(folder, images, alone):
    pool = vp.AdapterPool(backbone(), folder)
    names = ["birds", "pets", "cars", "flowers", "dogs", "birds", "cars", "flowers", "dogs", "pets"]
    logits = pool.logits(images, names)
    for row, (name, given) in enumerate(zip(names, logits, strict=True)):
        torch.testing.assert_close(given, alone[name][row], atol=1e-5, rtol=1e-5)
    assert (logits[0] - alone["birds"][5]).abs().max() > 1e-3  # another image would be noticed
    assert pool.loaded()["cars"].class_names == ["cars 0", "cars 1", "cars 2"]


def test_the_bits_of_a_row_do_not_depend_on_the_rest_of_a_batch_of_a_fixed_size(folder, images):
    pool = vp.AdapterPool(backbone(), folder, batch_size=8)
    one_by_one = {name: [pool.logits(image[None], [name])[0] for image in images] for name in SAVED}
    drawn = random.Random(0)
    for _ in range(12):
        rows = [drawn.randrange(len(images)) for _ in range(drawn.randint(2, 12))]
        names = [drawn.choice([*SAVED]) for _ in rows]
        for row, name, given in zip(rows, names, pool.logits(images[rows], names), strict=True):
            assert torch.equal(given, one_by_one[name][row])


@pytest.mark.parametrize("batch_size", [None, 4])
def test_queries_are_read_by_a_head_among_others(batch_size, folder, images, tmp_path):
    """VQT's head reads what was gathered of the whole batch, whose rows the heads of a pool compute one by one."""
    model = backbone()
    model.reset_classifier(3)
    vp.attach(model, vp.VQT(num_tokens=2))
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        expected = model.eval()(images)
    vp.save(model, tmp_path / "queries")
    places = {"queries": tmp_path / "queries", "birds": folder / "birds", "flowers": folder / "flowers"}
    pool = vp.AdapterPool(backbone(), places, batch_size=batch_size)
    names = [("queries", "birds", "queries", "flowers")[row % 4] for row in range(len(images))]
    mixed, alone = pool.logits(images, names), pool.logits(images, ["queries"] * len(images))
    for row in range(len(images)):
        torch.testing.assert_close(alone[row], expected[row], atol=1e-5, rtol=1e-5)
        if names[row] == "queries":
            torch.testing.assert_close(mixed[row], expected[row], atol=1e-5, rtol=1e-5)
            assert batch_size is None or torch.equal(mixed[row], alone[row])


def test_the_least_recently_used_makes_room_and_the_bound_holds(folder, images):
    size = sizes(folder)
    pool = vp.AdapterPool(backbone(), folder, capacity=size["birds"] + size["cars"] + size["dogs"])
    for name in ("birds", "cars", "dogs", "birds"):
        pool.logits(images[:1], [name])
    assert [*pool.loaded()] == ["cars", "dogs", "birds"]
    assert size["flowers"] < min(size["cars"], size["dogs"])  # so that one has to go each time
    pool.logits(images[:1], ["flowers"])
    assert [*pool.loaded()] == ["dogs", "birds", "flowers"]
    pool.logits(images[:1], ["cars"])
    assert [*pool.loaded()] == ["birds", "flowers", "cars"]
    assert pool.bytes == size["birds"] + size["flowers"] + size["cars"] <= pool.capacity
    assert set(pool.model.peft) == {adapter.attached for adapter in pool.loaded().values()}


def test_what_is_in_use_stays(folder, images, alone):
    size = sizes(folder)
    pool = vp.AdapterPool(backbone(), folder, capacity=size["birds"] + size["dogs"])
    with pool.hold(["birds", "dogs"]) as held:
        with pytest.raises(PoolFull, match="'cars' has"):
            pool.logits(images[:1], ["cars"])
        with pytest.raises(vp.ConfigurationError, match="in use"):
            pool.unload("birds")
        with torch.inference_mode(), vp.use(pool.model, held[0].attached):
            torch.testing.assert_close(pool.model(images), alone["birds"], atol=1e-5, rtol=1e-5)
    pool.logits(images[:1], ["cars"])
    assert "birds" not in pool.loaded()
    pool.unload("cars")
    assert "cars" not in pool.loaded()
    with pytest.raises(PoolFull, match="in all"):
        vp.AdapterPool(backbone(), folder, capacity=100).logits(images[:1], ["cars"])


def test_an_empty_pool_leaves_the_model_as_it_was(folder, images):
    model = backbone()
    before = model(images)
    pool = vp.AdapterPool(model, folder)
    pool.logits(images[:2], ["birds", "pets"])
    assert torch.equal(model(images), before)  # what is in memory does not act
    for name in pool.loaded():
        pool.unload(name)
    assert pool.bytes == 0
    assert not hasattr(model, "peft")
    assert torch.equal(model(images), before)


def test_many_threads_share_one_loading(folder, monkeypatch):
    read, counted, gate = adapter_pool.read_saved, [], threading.Event()

    def counting(place):
        counted.append(place)
        gate.wait(10)  # until all have asked
        return read(place)

    monkeypatch.setattr(adapter_pool, "read_saved", counting)
    pool = vp.AdapterPool(backbone(), folder)

    def ask(_):
        with pool.hold(["cars"]) as (held,):
            return held

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask, number) for number in range(8)]
        while pool._entries.get("cars") is None or pool._entries["cars"].users < 8:
            pass
        gate.set()
        assert len({id(each.result()) for each in asked}) == 1
    assert len(counted) == 1


def test_threads_with_less_room_than_adapters_all_get_right_rows(folder, images, alone):
    size = sizes(folder)
    pool = vp.AdapterPool(backbone(), folder, capacity=size["birds"] + size["cars"] + size["dogs"])

    def ask(seed):
        drawn = random.Random(seed)
        for _ in range(6):
            row, name = drawn.randrange(len(images)), drawn.choice(["birds", "cars", "dogs", "flowers"])
            try:
                (given,) = pool.logits(images[row : row + 1], [name])
            except PoolFull:  # others use it all just now
                continue
            torch.testing.assert_close(given, alone[name][row], atol=1e-5, rtol=1e-5)
            assert pool.bytes <= pool.capacity
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, range(4)))


def test_a_damaged_or_foreign_adapter_fails_alone(folder, images, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(folder, root)
    file = root / "dogs" / "adapter.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + bytes(8))
    (root / "torn").mkdir()
    (root / "torn" / "adapter.safetensors").write_bytes(whole[:50])
    foreign = timm.create_model("test_vit", img_size=32, num_classes=2)
    vp.attach(foreign, vp.LoRA(rank=1))
    vp.save(foreign, root / "foreign")

    pool = vp.AdapterPool(backbone(), root)
    for name, said in (("dogs", "damaged"), ("torn", "damaged"), ("foreign", "other weights")):
        with pytest.raises(vp.StorageError, match=said):
            pool.logits(images[:1], [name])
    assert pool.bytes == 0
    assert pool.logits(images[:1], ["cars"])[0].shape == (3,)
    file.write_bytes(whole)  # repaired
    assert pool.logits(images[:1], ["dogs"])[0].shape == (4,)


def test_only_names_below_the_folder_are_read(folder, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(folder / "cars", root / "cars")
    shutil.copytree(folder / "dogs", tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    pool = vp.AdapterPool(backbone(), root)
    for name in ("../outside", str(tmp_path / "outside"), "link", "..", "", "cars/../cars", "a\0b", "absent"):
        with pytest.raises(vp.ConfigurationError, match="there is no adapter"), pool.hold([name]):
            pass
    with pool.hold(["cars"]):
        assert [*pool.loaded()] == ["cars"]


def test_adapters_may_be_named_one_by_one(folder, images):
    pool = vp.AdapterPool(backbone(), [folder / "cars", folder / "dogs"])
    assert pool.names() == ["cars", "dogs"]
    assert pool.logits(images[:1], ["dogs"])[0].shape == (4,)
    assert vp.AdapterPool(backbone(), {"autos": folder / "cars"}).logits(images[:1], ["autos"])[0].shape == (3,)
    with pytest.raises(vp.ConfigurationError, match="did you mean dogs"):
        pool.logits(images[:1], ["dog"])
    with pytest.raises(vp.ConfigurationError, match="both be called 'cars'"):
        vp.AdapterPool(backbone(), [folder / "cars", "somebody/cars"])
    with pytest.raises(vp.ConfigurationError, match="there is no folder"):
        vp.AdapterPool(backbone(), folder / "absent")


def test_a_batch_is_filled_up_to_a_size_whose_rows_have_the_bits_of_a_full_one():
    """The control is a product whose values do depend on the size of the batch."""

    def odd(images):
        return images.sum(1) + 1e-3 * (len(images) in (1, 4))

    assert sizes_that_agree(odd, torch.zeros(1, 3), 12) == {2, 8, 12}
    assert sizes_that_agree(lambda images: images, torch.zeros(1, 3), 8) == {1, 2, 4, 8}
    with pytest.warns(UserWarning, match="depend on its row"):
        sizes_that_agree(lambda images: images + torch.arange(len(images))[:, None], torch.zeros(1, 3), 4)


def test_what_has_other_bits_in_company_gets_batches_of_its_own(folder, images, monkeypatch):
    asked = []

    def never(mixed, alone, like, most):
        asked.append(most)
        return False

    monkeypatch.setattr(shared_batches, "rows_agree", never)
    ran = []
    model = backbone()
    model.register_forward_hook(lambda module, inputs, output: ran.append(len(inputs[0])))
    pool = vp.AdapterPool(model, folder, batch_size=4)
    pool.logits(images[:4], ["dogs", "cats", "birds", "dogs"])
    ran.clear()
    pool.logits(images[:4], ["dogs", "cats", "birds", "dogs"])
    assert len(ran) == 3
    assert asked == [4, 4]  # two of one kind, and two kinds
    apart = torch.arange(4.0)[:, None]
    assert rows_agree(lambda x: x * 0 + apart % 2, [lambda x: x * 0, lambda x: x * 0 + 1], torch.zeros(1, 3), 4)
    assert not rows_agree(lambda x: x * 0 + apart, [lambda x: x * 0, lambda x: x * 0 + 1], torch.zeros(1, 3), 4)


def test_sizes_are_measured_once_for_adapters_of_one_kind_and_kept_to(folder, images, monkeypatch):
    counted, ran = [], []

    def two_sizes(compute, like, most):
        counted.append(most)
        return frozenset({3, most})

    monkeypatch.setattr(shared_batches, "sizes_that_agree", two_sizes)
    monkeypatch.setattr(shared_batches, "rows_agree", lambda *_: True)
    model = backbone()
    model.register_forward_hook(lambda module, inputs, output: ran.append(len(inputs[0])))
    pool = vp.AdapterPool(model, folder, batch_size=8)
    for rows in (1, 3, 4, 8, 10):
        assert len(pool.logits(images[:rows], ["birds", "dogs"] * (rows // 2) + ["dogs"] * (rows % 2))) == rows
    assert ran == [3, 3, 8, 8, 8, 3]
    assert counted == [8, 8]  # birds and dogs
