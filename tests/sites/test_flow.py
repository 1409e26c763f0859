"""One pass of tokens through a block: in which order branches end that end at one site."""

import torch

from visionpeft.sites import Sites


class Doubling:
    """A branch whose end doubles the tokens."""

    def __call__(self, x):
        return x

    def join(self, x, delta):
        return 2 * x


class Adding:
    """A branch whose end adds one."""

    def __call__(self, x):
        return torch.ones_like(x)


def test_the_last_branch_to_start_ends_first():
    """Branches are nested: what started within another is ended before it."""
    x = torch.full((1, 2, 3), 5.0)
    for branches, expected in (([Doubling(), Adding()], 12.0), ([Adding(), Doubling()], 11.0)):
        sites = Sites(num_prefix_tokens=1, causal=False)
        sites.branches["stream_in"] = tuple((module, "stream_out") for module in branches)
        at = sites.enter()
        assert torch.equal(at("stream_in", x), x)
        assert torch.equal(at("stream_out", x), torch.full_like(x, expected))
