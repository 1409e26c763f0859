"""HiRA, MiSS, OFT and BOFT: what peft keeps for one module, and what acts at its layer sites here."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Backbone
from visionpeft.errors import StorageError, UnsupportedError
from visionpeft.methods.boft import BOFT
from visionpeft.methods.hira import HiRA
from visionpeft.methods.miss import MiSS
from visionpeft.methods.oft import OFT
from visionpeft.methods.parts.base import Method
from visionpeft.sharing.peft_config import PeftConfig
from visionpeft.sharing.peft_lora import check_halves, check_shapes, one_change
from visionpeft.sharing.peft_modules import Part, PeftModule

Changes = Sequence[tuple[PeftModule, list[tuple[slice, nn.Module]]]]


class ChangeFormat:
    """Base of the formats: how the tensors of one module of peft become those of its layer sites, and back."""

    @abstractmethod
    def shapes(self, tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Shapes by name that the tensors of a weight (rows, columns) must have; sizes are read from the tensors."""

    @abstractmethod
    def state(self, tensors: Mapping[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
        """The tensors of the module that acts on these rows."""

    @abstractmethod
    def sizes(self, state: Mapping[str, torch.Tensor], columns: int) -> tuple[int, int]:
        """The two numbers that a method is made with."""

    @abstractmethod
    def method(self, sizes: tuple[int, int], targets: tuple[str, ...], blocks: str | list[int], tower: str) -> Method:
        """The method that places what acts at these targets."""

    def split(
        self, config: PeftConfig, module: PeftModule, tensors: dict[str, torch.Tensor], what: str
    ) -> Iterator[Part]:
        """The change of one module at each of its layer sites.

        Raises:
            StorageError: a tensor is missing, not expected, or of another shape than this backbone says.
        """
        weight = module.module.weight
        if weight.dim() != 2:
            raise StorageError(f"{what} changes {module.path} by {config.peft_type}, which acts on linear layers only")
        check_shapes(tensors, self.shapes(tensors, *weight.shape), module.path, what)
        for site, layer in module.layers.items():
            state = self.state(tensors, slice(None) if layer.rows is None else layer.rows)
            first, second = self.sizes(state, weight.shape[1])
            yield Part((module.tower, module.block, site), layer.target, state, first, second)

    def methods(self, config: PeftConfig, backbone: Backbone, parts: list[Part], what: str) -> Iterator[Method]:
        """Methods that together place every part: one for each pair of sizes and set of blocks.

        Raises:
            StorageError: the halves of a gated MLP, which are one target, are not changed alike.
        """
        check_halves(backbone, parts, what)
        spread = defaultdict(set)
        for part in parts:
            tower, block, _ = part.place
            spread[tower, part.target, (part.rank, part.alpha)].add(block)
        groups = defaultdict(list)
        for (tower, target, sizes), blocks in spread.items():
            groups[tower, sizes, frozenset(blocks)].append(target)
        for (tower, sizes, blocks), targets in groups.items():
            every = len(blocks) == backbone.towers[tower].depth
            yield self.method(sizes, tuple(targets), "all" if every else sorted(blocks), tower)


class HiRAFormat(ChangeFormat):
    """W0 * (B A): A for all rows of a module, B by rows."""

    def shapes(self, tensors, rows, columns):
        """A (rank, in) and B (out, rank)."""
        rank = len(tensors.get("hira_A", ()))
        return {"hira_A": (rank, columns), "hira_B": (rows, rank)}

    def state(self, tensors, rows):
        """A copy of A, and the rows of B."""
        return {"A": tensors["hira_A"], "B": tensors["hira_B"][rows]}

    def sizes(self, state, columns):
        """The rank."""
        return len(state["A"]), 0

    def method(self, sizes, targets, blocks, tower):
        """HiRA of this rank."""
        return HiRA(sizes[0], targets, blocks, tower)

    def join(self, changes: Changes) -> tuple[dict[str, torch.Tensor], dict]:
        """One change for each module, all of one rank, because peft's HiRA reads `rank_pattern` and does not follow it.

        Changes of some rows, with A of their own, are put one after another. What a module does not use of the rank has
        zeros in B.
        """
        joined = {module.path: one_change(module, parts) for module, parts in changes}
        rank = max(len(A) for A, _, _ in joined.values())
        tensors = {}
        for path, (A, B, _) in joined.items():
            unused = rank - len(A)
            tensors[f"{path}.hira_A"] = A.repeat(-(-rank // len(A)), 1)[:rank]
            tensors[f"{path}.hira_B"] = nn.functional.pad(B, (0, unused))
        return tensors, {"r": rank}


class MiSSFormat(ChangeFormat):
    """D (rank, out) for all shards of the input."""

    def shapes(self, tensors, rows, columns):
        """D (rank, out)."""
        return {"miss_block": (len(tensors.get("miss_block", ())), rows)}

    def state(self, tensors, rows):
        """The columns of D for these rows of the weight."""
        return {"D": tensors["miss_block"][:, rows]}

    def sizes(self, state, columns):
        """The rank."""
        return len(state["D"]), 0

    def method(self, sizes, targets, blocks, tower):
        """MiSS of this rank."""
        return MiSS(sizes[0], targets, blocks, tower)

    def join(self, changes: Changes) -> tuple[dict[str, torch.Tensor], dict]:
        """D of each module, zero for rows that are not changed."""
        rank = one_size({len(part.D) for _, parts in changes for _, part in parts}, "rank of MiSS")
        tensors = {}
        for module, parts in changes:
            D = parts[0][1].D.detach().new_zeros(rank, len(module.module.weight))
            for rows, part in parts:
                D[:, rows] += part.D.detach()
            tensors[f"{module.path}.miss_block"] = D
        return tensors, {"r": rank, "bias": "none"}


class OFTFormat(ChangeFormat):
    """Q of the rotation, whose sign is the other one in peft: it turns the input by R^T and not by R."""

    def shapes(self, tensors, rows, columns):
        """Upper triangles (n, block (block - 1) / 2)."""
        number = max(1, len(tensors.get("oft_R", ())))
        block = columns // number
        return {"oft_R": (columns // max(1, block), block * (block - 1) // 2)}

    def state(self, tensors, rows):
        """A copy of all blocks for each site."""
        return {"Q": -tensors["oft_R"]}

    def sizes(self, state, columns):
        """The rows of a block."""
        return columns // len(state["Q"]), 0

    def method(self, sizes, targets, blocks, tower):
        """OFT with such blocks."""
        return OFT(sizes[0], targets, blocks, tower)

    def join(self, changes: Changes) -> tuple[dict[str, torch.Tensor], dict]:
        """The one rotation of each module."""
        block = one_size({part.block for _, parts in changes for _, part in parts}, "block of OFT")
        tensors = {f"{module.path}.oft_R.weight": -one_rotation(module, parts) for module, parts in changes}
        fields = {"oft_block_size": block, "r": 0, "bias": "none", "use_cayley_neumann": False}
        return tensors, fields


class BOFTFormat(ChangeFormat):
    """Q of the factors, in peft as whole blocks and with the other sign, and the scale of rows."""

    def shapes(self, tensors, rows, columns):
        """Blocks (factors, n, block, block) and a scale (out, 1)."""
        R = tensors.get("boft_R", torch.zeros(0))
        factors, block = (len(R), R.shape[-1]) if R.dim() == 4 else (1, 1)
        return {"boft_R": (factors, columns // max(1, block), block, block), "boft_s": (rows, 1)}

    def state(self, tensors, rows):
        """A copy of all factors, of whose blocks only the skew part acts, and the scale of these rows."""
        R = tensors["boft_R"]
        skew = 0.5 * (R.transpose(-1, -2) - R)
        upper = torch.triu_indices(R.shape[-1], R.shape[-1], 1)
        return {"Q": skew[..., upper[0], upper[1]], "scale": tensors["boft_s"][rows, 0]}

    def sizes(self, state, columns):
        """The rows of a block and the number of factors."""
        return columns // state["Q"].shape[1], len(state["Q"])

    def method(self, sizes, targets, blocks, tower):
        """BOFT with such factors."""
        return BOFT(*sizes, targets, blocks, tower)

    def join(self, changes: Changes) -> tuple[dict[str, torch.Tensor], dict]:
        """The one rotation of each module, and the scales of its rows."""
        every = {(part.block, len(part.Q)) for _, parts in changes for _, part in parts}
        block, factors = one_size(every, "block and number of factors of BOFT")
        upper, tensors = torch.triu_indices(block, block, 1), {}
        for module, parts in changes:
            Q = one_rotation(module, parts)
            R = Q.new_zeros(*Q.shape[:2], block, block)
            R[..., upper[0], upper[1]] = -Q
            tensors[f"{module.path}.boft_R"] = R - R.transpose(-1, -2)
            scale = Q.new_ones(len(module.module.weight), 1)
            for rows, part in parts:
                scale[rows, 0] = part.scale.detach().to(scale)
            tensors[f"{module.path}.boft_s"] = scale
        fields = {"boft_block_size": block, "boft_block_num": 0, "boft_n_butterfly_factor": factors, "bias": "none"}
        return tensors, fields


def one_size(sizes: set, what: str):
    """The only one of some sizes.

    Raises:
        UnsupportedError: there are several.
    """
    if len(sizes) != 1:
        found = " and ".join(map(str, sorted(sizes)))
        raise UnsupportedError(f"an adapter of peft has one {what}, not {found}; export them one by one")
    return next(iter(sizes))


def one_rotation(module: PeftModule, parts: list[tuple[slice, nn.Module]]) -> torch.Tensor:
    """Q of what peft turns as a whole.

    Raises:
        UnsupportedError: only some of the rows of the module are turned, or not all alike.
    """
    first = parts[0][1].Q.detach().cpu()
    alike = all(torch.equal(part.Q.detach().cpu(), first) for _, part in parts)
    if len(parts) != len(module.layers) or not alike:
        raise UnsupportedError(
            f"peft turns what {module.path} reads as a whole, so it has no form for {', '.join(module.layers)} that "
            "are not turned all alike; merge the adapter, or keep it in this library's own format"
        )
    return first


# by peft_type
CHANGES = {"HIRA": HiRAFormat(), "MISS": MiSSFormat(), "OFT": OFTFormat(), "BOFT": BOFTFormat()}
