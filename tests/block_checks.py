"""The check of blocks at attach, once in a process for each kind of block: it is most of what attaching costs here.

The models of the tests are made anew thousands of times, of the same few classes. A kind is what the check depends on
but for the values of weights; a block that is refused is checked again the next time. `test_selfcheck` has every block
checked, as users have.
"""

from visionpeft.adapters import selfcheck

every_time = selfcheck._check_block
_sound = set()


def once(block, tower, used):
    """Check a block of a tower as at attach, unless one of its kind was found sound with the same sites."""
    classes, _, settings = selfcheck._state(block)
    of_tower = tower.num_prefix_tokens, tower.causal  # the widths of layers are in what the block says of itself
    kind = selfcheck.kind_of(block.module, settings), tuple(classes), of_tower, frozenset(used)
    if kind not in _sound:
        every_time(block, tower, used)
        _sound.add(kind)
