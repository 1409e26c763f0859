"""The supernet of NOAH against methods of each size, its draws, and the evolution over its members."""

import itertools
import random

import pytest
import timm
import torch

import visionpeft as vp
from visionpeft.errors import ConfigurationError, UserError
from visionpeft.searching.evolution import Evolution
from visionpeft.searching.noah import NoahSpace
from visionpeft.searching.space import Host
from visionpeft.searching.supernet import NOAH, SlicedBottleneck, SlicedLowRank, stand_alone, use_member

WIDTH, DEPTH = 192, 3
HOSTS = {"vit_tiny_patch16_224": 32, "eva02_tiny_patch14_224": 28}
MEMBERS = [
    {"prompts": [4, 1, 0], "ranks": [2, 4, 1], "bottlenecks": [1, 0, 0]},
    {"prompts": [1, 2, 4], "ranks": [0, 0, 0], "bottlenecks": [2, 4, 2]},
    {"prompts": [0, 0, 0], "ranks": [4, 0, 0], "bottlenecks": [0, 0, 0]},
]


def small(name="vit_tiny_patch16_224"):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=HOSTS[name], depth=DEPTH, num_classes=5).eval().double()


def supernet(name="vit_tiny_patch16_224", **options):
    noah = NOAH(sizes=(1, 2, 4), **options)
    model = vp.attach(small(name), noah).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model, noah


def slice_of(name, weights, block, sizes):
    """A tensor of a method of its own, cut out of the supernet's: (its path there, the slice)."""
    *path, last = name.split(".")
    site = ".".join(path[1:])
    p, r, h = (sizes[kind][block] for kind in ("prompts", "ranks", "bottlenecks"))
    if path[0] == "vpt":
        return f"noah.{site}.prompts", slice(0, p)
    if path[0] == "lora":
        own, cut = {"A": ("down", slice(0, r)), "B": ("up", (slice(None), slice(0, r)))}[last]
        return f"noah.{site}.{own}", cut
    cuts = {"down.weight": slice(0, h), "down.bias": slice(0, h), "up.weight": (slice(None), slice(0, h))}
    return f"noah.{site}.{last}", cuts.get(f"{path[-1]}.{last}", slice(None))


@pytest.mark.parametrize("name", HOSTS)
def test_a_member_of_the_supernet_is_the_methods_of_its_sizes(name):
    model, noah = supernet(name)
    images = torch.randn(2, 3, HOSTS[name], HOSTS[name], dtype=torch.float64)
    outputs = []
    for sizes in MEMBERS:
        use_member(model.peft["default"].noah, sizes)
        model.zero_grad()
        out = model(images)
        out.square().sum().backward()
        alone = vp.attach(small(name), stand_alone(sizes, noah)).double()
        theirs, ours = dict(alone.peft["default"].named_parameters()), dict(model.peft["default"].named_parameters())
        pairs = {}
        for key, parameter in theirs.items():
            if key.startswith("head"):
                other, cut = key, slice(None)
            else:
                other, cut = slice_of(key, ours, int(key.split(".")[2]), sizes)
            pairs[key] = other, cut
            assert parameter.shape == ours[other][cut].shape, key
            parameter.data.copy_(ours[other][cut])
        expected = alone(images)
        expected.square().sum().backward()
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        for key, (other, cut) in pairs.items():
            gradient = ours[other].grad
            torch.testing.assert_close(gradient[cut], theirs[key].grad, rtol=1e-8, atol=1e-9)
            left = gradient.clone()
            left[cut] = 0
            assert not left.any(), f"{other} is trained outside of what acts"
        counted = sum(parameter.numel() for key, parameter in theirs.items() if not key.startswith("head"))
        assert counted == closed_form(sizes)
        outputs.append(out.detach())
    assert not any(torch.allclose(one, other) for one, other in itertools.pairwise(outputs))


def closed_form(sizes):
    """Values of a member: prompts p D, LoRA on two targets 4 r D, an adapter (2 D + 1) a + D."""
    prompts, ranks, bottlenecks = (sizes[kind] for kind in ("prompts", "ranks", "bottlenecks"))
    adapters = sum((2 * WIDTH + 1) * a + WIDTH * (a > 0) for a in bottlenecks)
    return WIDTH * sum(prompts) + 4 * WIDTH * sum(ranks) + adapters


def sizes_now(model):
    part = model.peft["default"].noah
    kinds = {"ranks": SlicedLowRank, "bottlenecks": SlicedBottleneck}
    return {kind: [module.size for module in part.modules() if isinstance(module, cls)] for kind, cls in kinds.items()}


def test_every_step_draws_a_member_and_a_resumed_training_goes_on_with_it():
    model, noah = supernet(depths=(1, 3), seed=5)
    assert set(sizes_now(model)["ranks"]) == {4}  # outside of training the largest acts
    model.peft.train()
    seen = []
    for step in range(40):
        if step:
            vp.after_step(model, step, 40)
        drawn = noah.drawn(step, DEPTH)
        assert sizes_now(model) == {
            "ranks": [r for r in drawn["ranks"] for _ in "qv"],
            "bottlenecks": drawn["bottlenecks"],
        }
        seen.append(drawn)
    every = {size for member in seen for kind in member.values() for size in kind}
    assert every == {0, 1, 2, 4}
    assert {sum(size > 0 for size in member["prompts"]) for member in seen} == {1, 3}
    assert seen[0] != seen[1]
    again, _ = supernet(depths=(1, 3), seed=5)
    again.load_state_dict(model.state_dict())
    again.peft.train()
    assert sizes_now(again) == sizes_now(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sizes": (1, 1)}, "sizes must be different positive integers"),
        ({"sizes": (0, 1)}, "sizes must be different positive integers"),
        ({"sizes": ()}, "sizes must be different positive integers"),
        ({"used": {"prompts": [1]}}, "used must give"),
        ({"depths": (7,)}, "has no member here"),
    ],
)
def test_what_is_no_supernet_is_refused(options, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        vp.attach(small(), NOAH(**options))


def test_the_supernet_is_attached_alone():
    model = vp.attach(small(), [NOAH(sizes=(1, 2)), vp.Mona(bottleneck=2)]).double()
    with pytest.raises(UserError, match="train the supernet by itself"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.float64))


# Evolution


def played(rounds, score):
    """Members in order, and their scores."""
    found, members = [], next(rounds, None)
    while members:
        scores = [score(member) for member in members]
        found += zip(members, scores, strict=True)
        try:
            members = rounds.send(scores)
        except StopIteration:
            break
    return found


def judged(limit, seed=0):
    """A search of 16 trials whose score favours wide adapters in late blocks."""
    host = Host(NoahSpace(sizes=(1, 2, 4)), small(), limit)
    return played(
        host.space.rounds(host, 16, seed), lambda member: sum(i * h for i, h in enumerate(member["bottlenecks"]))
    )


def test_evolution_respects_the_limit_and_follows_from_the_seed():
    found = judged(6000)
    members = [member for member, _ in found]
    assert len({str(member) for member in members}) == len(members) == 16
    assert max(map(closed_form, members)) <= 6000
    assert max(closed_form(member) for member, _ in judged(None)) > 6000  # most of the space is larger
    assert judged(6000) == found
    assert sum(score for _, score in found[-4:]) > sum(score for _, score in found[:4])


def test_a_space_that_is_smaller_than_the_budget_is_judged_whole():
    chance = random.Random(0)
    evolution = Evolution(
        lambda chance: chance.randrange(6),
        lambda chance, one, other: one,
        lambda chance, one: chance.randrange(6),
        lambda chance, one: max(0, one - 1),
        lambda member: member <= 3,
    )
    assert sorted(member for member, _ in played(evolution.rounds(50, 3), lambda member: chance.random())) == [
        0,
        1,
        2,
        3,
    ]


def test_a_limit_below_the_smallest_member_is_refused():
    host = Host(NoahSpace(sizes=(1, 2, 4)), small(), 1000)
    least = closed_form({kind: [1, 0, 0] for kind in ("prompts", "ranks", "bottlenecks")})
    assert host.count(host.space.smallest(host)) == least == 1537
    with pytest.raises(
        ConfigurationError, match="no member with at most 1,000 values on this backbone: the smallest has"
    ):
        host.check()
    Host(host.space, host.model, least).check()
