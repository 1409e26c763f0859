"""Methods that change weights and nothing else: the weight each one makes, by formula, and the shapes of its tensors.

A function of CHANGES gets the weight (out, in), the fields of the method, the tensors found at the layer, all `sites`
of the tower, and answers with the new weight; the bias stays. SHAPES gives the shapes of the trained tensors of a layer
from the method, rows and columns of its weight, SHARED_SHAPES those of what a tower shares. To add a method, enter its
name in CHANGES and SHAPES.
"""

import math

import numpy as np
import torch


def counted_from_start(weight, fields, found, sites):
    """PiSSA, arXiv 2404.02948, OLoRA, 2406.01775, and LoRA-GA, 2407.05000: W + s (U V - U0 V0)."""
    rank = len(found["V"])
    scale = 1 if fields["alpha"] is None else fields["alpha"] / rank
    return weight + scale * (found["U"] @ found["V"] - found["U_start"] @ found["V_start"])


def eva(weight, fields, found, sites):
    """EVA, arXiv 2410.07170: W + s B A, with the scale of the mean rank."""
    rank = fields["rank"] if fields["adjust_scale"] else len(found["A"])
    return weight + scale_of(fields, rank) * found["B"] @ found["A"]


def cayley(upper, block):
    """(I - Q) (I + Q)^-1 for the skew-symmetric Q with this upper triangle, row by row."""
    places = [(i, j) for i in range(block) for j in range(i + 1, block)]
    Q = torch.zeros(block, block, dtype=upper.dtype)
    for value, (i, j) in zip(upper, places, strict=True):
        unit = torch.zeros_like(Q)
        unit[i, j], unit[j, i] = 1, -1
        Q = Q + value * unit
    identity = torch.eye(block, dtype=upper.dtype)
    return (identity - Q) @ torch.linalg.inv(identity + Q)


def oft(weight, fields, found, sites):
    """OFT, arXiv 2306.07280: W R with a block diagonal R of Cayley transforms."""
    return weight @ torch.block_diag(*(cayley(upper, fields["block"]) for upper in found["Q"]))


def boft(weight, fields, found, sites):
    """BOFT, arXiv 2311.06243: s * (W F_0 F_1 ...), the blocks of F_i joining halves that are 2^i halves apart."""
    half = fields["block"] // 2
    for level, of_level in enumerate(found["Q"]):
        factor = torch.zeros(weight.shape[1], weight.shape[1], dtype=weight.dtype)
        for number, upper in enumerate(of_level):
            group, place = divmod(number, 2**level)
            first = (group * 2 ** (level + 1) + place) * half
            rows = [*range(first, first + half), *range(first + 2**level * half, first + (2**level + 1) * half)]
            if level == 0:
                rows = range(number * fields["block"], (number + 1) * fields["block"])
            take = torch.eye(weight.shape[1], dtype=weight.dtype)[list(rows)]
            factor = factor + take.T @ cayley(upper, fields["block"]) @ take
        weight = weight @ factor
    return found["scale"][:, None] * weight


def random_matrix(rows, columns, seed, letter):
    """The frozen matrix of VeRA: the upper 24 bits of PCG64 as numbers in +-sqrt(6 / columns), in float32.

    `letter` is 0 for A and 1 for B.
    """
    generator = np.random.PCG64(np.random.SeedSequence((seed, rows, columns, letter)))
    numbers = [int(generator.random_raw()) // 2**40 for _ in range(rows * columns)]
    values = [(2 * number / 2**24 - 1) * math.sqrt(6 / columns) for number in numbers]
    return torch.tensor(values, dtype=torch.float32).to(torch.float64).reshape(rows, columns)


def raw_numbers(count, *seed):
    """So many numbers of PCG64, one by one."""
    generator = np.random.PCG64(np.random.SeedSequence(seed))
    return [int(generator.random_raw()) for _ in range(count)]


def hira(weight, fields, found, sites):
    """HiRA: W + W * (B A)."""
    return weight * (1 + found["B"] @ found["A"])


def miss(weight, fields, found, sites):
    """MiSS, arXiv 2409.15371: column j changes by row j modulo r of D."""
    return weight + torch.stack([found["D"][j % len(found["D"])] for j in range(weight.shape[1])], dim=1)


def rand_lora(weight, fields, found, sites):
    """RandLoRA, arXiv 2502.00987: W + s sum_j B_j diag(l_j) A diag(g_j), transposed where there are fewer rows."""
    rank, (wide, narrow) = fields["rank"], (max(weight.shape), min(weight.shape))
    number = -(-narrow // rank)
    A = random_matrix(rank, narrow, fields["seed"], 0) * math.sqrt(narrow / 2)
    B = random_matrix(wide, number * rank, fields["seed"], 1) * math.sqrt(number * rank / 2)
    change = 0
    for j in range(number):
        left = B[:, j * rank : (j + 1) * rank] @ torch.diag(found["row_scale"][j])
        change = change + left @ A @ torch.diag(found["column_scale"][j])
    return weight + fields["scale"] * (change.T if weight.shape[0] < weight.shape[1] else change)


def gra_lora(weight, fields, found, sites):
    """GraLoRA, arXiv 2505.20355: a small low-rank change for each of k x k blocks."""
    cuts, part = fields["cuts"], fields["rank"] // fields["cuts"]
    scale = 1 if fields["alpha"] is None else fields["alpha"] / fields["rank"]
    rows = []
    for m in range(cuts):
        blocks = []
        for n in range(cuts):
            B = found["B"][m][:, n * part : (n + 1) * part]
            blocks.append(B @ found["A"][n][m * part : (m + 1) * part])
        rows.append(torch.cat(blocks, dim=1))
    return weight + scale * torch.cat(rows)


def scale_of(fields, rank):
    """alpha / rank, or 1."""
    return 1 if fields["alpha"] is None else fields["alpha"] / rank


def moelora(weight, fields, found, sites):
    """MOELoRA, arXiv 2310.18339, of one task: W + alpha / r sum_e p_e B_e A_e, p = softmax(G t), t its embedding."""
    scores = (found["router.weight"] @ found["embedding"][0]).exp()
    shares = scores / scores.sum()
    changes = [share * B @ A for share, B, A in zip(shares, found["B"], found["A"], strict=True)]
    return weight + scale_of(fields, fields["rank"]) * sum(changes)


def moslora(weight, fields, found, sites):
    """MoSLoRA, arXiv 2406.11909: W + s B M A."""
    return weight + scale_of(fields, len(found["down"])) * found["up"] @ found["mixer"] @ found["down"]


def sora(weight, fields, found, sites):
    """SoRA, arXiv 2311.11696: W + s B diag(g) A."""
    return weight + scale_of(fields, fields["rank"]) * found["up"] @ torch.diag(found["gate"]) @ found["down"]


def re_lora(weight, fields, found, sites):
    """ReLoRA, arXiv 2307.05695: W + s sum_k B_k A_k over all starts."""
    earlier = found["earlier_up"] @ found["earlier_down"]
    return weight + scale_of(fields, len(found["down"])) * (found["up"] @ found["down"] + earlier)


def auto_lora(weight, fields, found, sites):
    """AutoLoRA, arXiv 2403.09113: W + s B diag(softmax(a)) A while ranks are selected, then W + s B A."""
    shares = torch.ones(len(found["down"]), dtype=weight.dtype)
    if "selection" in found:
        shares = torch.exp(found["selection"]) / torch.exp(found["selection"]).sum()
    return weight + scale_of(fields, fields["rank"]) * found["up"] @ torch.diag(shares) @ found["down"]


def dy_lora(weight, fields, found, sites):
    """DyLoRA, arXiv 2210.07558: LoRA of the first ranks, with the scale of as many."""
    used = fields["used"] or fields["rank"]
    return weight + scale_of(fields, used) * found["up"][:, :used] @ found["down"][:used]


def lora_dropout(weight, fields, found, sites):
    """LoRA Dropout, arXiv 2404.09610, after training: LoRA."""
    return weight + scale_of(fields, len(found["A"])) * found["B"] @ found["A"]


def capa_boost(weight, fields, found, sites):
    """CapaBoost, arXiv 2407.01320: W + s sum_j (B * N_j) (A * M_j); masks by the number of the layer."""
    number = next(i for i, other in enumerate(sites.values()) if other is found)
    change = 0
    for copy in range(fields["copies"]):
        masked = []
        for letter, factor in enumerate((found["down"], found["up"])):
            raw = raw_numbers(factor.numel(), fields["seed"], number, copy, letter, *factor.shape)
            ones = [float((each // 2**40) / 2**24 < fields["density"]) for each in raw]
            masked.append(factor * torch.tensor(ones, dtype=factor.dtype).reshape(factor.shape))
        change = change + masked[1] @ masked[0]
    return weight + scale_of(fields, len(found["down"])) * change


def hi_wi(weight, fields, found, sites):
    """HiWi, arXiv 2305.16742: w + U relu(D w + d) + u for every row w."""
    hidden = [found["down.weight"] @ row + found["down.bias"] for row in weight]
    hidden = [torch.where(each > 0, each, torch.zeros_like(each)) for each in hidden]
    return weight + torch.stack([found["up.weight"] @ each + found["up.bias"] for each in hidden])


def placed(weight, fields, found):
    """A matrix like the weight with coefficients at the entries of the smallest of its random numbers."""
    rows, columns = weight.shape
    raw = raw_numbers(rows * columns, fields["seed"], rows, columns)
    chosen = sorted(sorted(range(len(raw)), key=raw.__getitem__)[: fields["number"]])
    take = torch.zeros(len(chosen), len(raw), dtype=weight.dtype)
    take[range(len(chosen)), chosen] = 1
    return (found["coefficients"] @ take).reshape(rows, columns)


def binary_mask(weight, fields, found, sites):
    """Learned masks, arXiv 2004.12406: W where a score is above 0.01, else 0; saved as bits, the highest first."""
    if "bits" in found:
        bits = [int(digit) for byte in found["bits"].tolist() for digit in f"{byte:08b}"]
        return weight * torch.tensor(bits[: weight.numel()], dtype=weight.dtype).reshape(weight.shape)
    scores = found["scores"]
    hard = torch.where(scores.detach() > 0.01, torch.ones_like(scores), torch.zeros_like(scores))
    return weight * (hard + scores - scores.detach())  # whose gradient is that of the mask


def said(weight, fields, found, sites):
    """Intrinsic SAID, arXiv 2012.13255: W + s P z, the Hadamard matrices written out, random numbers by the layer."""
    z = sites[None, "subspace"]["z"]
    layers = [each for (index, _), each in sites.items() if index is not None]
    number = next(i for i, other in enumerate(layers) if other is found)
    size = weight.numel()
    n = 2 ** math.ceil(math.log2(size))
    signs = [1.0 if raw >> 63 else -1.0 for raw in raw_numbers(len(z), fields["seed"], number, 0)]
    order = raw_numbers(n, fields["seed"], number, 1)
    order = sorted(range(n), key=order.__getitem__)
    raw = raw_numbers(3 * n, fields["seed"], number, 2)
    uniform = [(each >> shift & 0xFFFF) / 0x10000 + 2**-17 for each in raw for shift in (0, 16, 32, 48)]
    normal = torch.tensor([sum(uniform[12 * i : 12 * i + 12]) - 6 for i in range(n)], dtype=weight.dtype)
    places = torch.arange(n)
    common = places[:, None] & places
    odd = sum((common >> bit) & 1 for bit in range(n.bit_length())) % 2
    H = 1 - 2 * odd.to(weight.dtype)
    start = torch.cat([torch.tensor(signs, dtype=weight.dtype) * z, torch.zeros(n - len(z), dtype=weight.dtype)])
    mixed = H[:size] @ (normal * (H @ start)[order])
    return weight + found["scale"] * mixed.reshape(weight.shape) / (size * normal.square().sum()).sqrt()


def fourierft(weight, fields, found, sites):
    """FourierFT, arXiv 2405.03003: W + s Re(F^-1 of the coefficients), the sum over both frequencies spelled out."""
    waves = []
    for size in weight.shape:
        numbers = torch.arange(size, dtype=torch.float64)
        angle = 2 * math.pi / size * torch.outer(numbers, numbers)
        waves.append((angle.cos() / size, angle.sin() / size))
    (cos_rows, sin_rows), (cos_columns, sin_columns) = waves
    spectrum = placed(weight, fields, found)
    real = cos_rows @ spectrum @ cos_columns - sin_rows @ spectrum @ sin_columns
    return weight + fields["scale"] * real


def waveft(weight, fields, found, sites):
    """WaveFT: W + s H_rows^T F H_columns with the orthogonal Haar matrices of one level."""
    haar = []
    for size in weight.shape:
        matrix = torch.zeros(size, size, dtype=weight.dtype)
        for i in range(size // 2):
            matrix[i, 2 * i], matrix[i, 2 * i + 1] = 0.5**0.5, 0.5**0.5
            matrix[size // 2 + i, 2 * i], matrix[size // 2 + i, 2 * i + 1] = 0.5**0.5, -(0.5**0.5)
        haar.append(matrix)
    return weight + fields["scale"] * haar[0].T @ placed(weight, fields, found) @ haar[1]


def vblora(weight, fields, found, sites):
    """VB-LoRA, arXiv 2405.15179: W + B A from pieces, each the softmax over its highest logits of vectors of a bank."""
    bank = sites[None, "bank"]["vectors"]

    def piece(logits):
        chosen = sorted(range(len(logits)), key=lambda i: -logits[i].item())[: fields["top"]]
        total = sum(logits[i].exp() for i in chosen)
        return sum(logits[i].exp() / total * bank[i] for i in chosen)

    A = torch.stack([torch.cat([piece(logits) for logits in row]) for row in found["down_logits"]])
    columns = found["up_logits"].transpose(0, 1)
    B = torch.stack([torch.cat([piece(logits) for logits in column]) for column in columns], dim=1)
    return weight + B @ A


CHANGES = {
    "pissa": counted_from_start,
    "olora": counted_from_start,
    "loraga": counted_from_start,
    "eva": eva,
    "oft": oft,
    "boft": boft,
    "hira": hira,
    "miss": miss,
    "rand_lora": rand_lora,
    "gra_lora": gra_lora,
    "moslora": moslora,
    "moelora": moelora,
    "re_lora": re_lora,
    "periodic_lora": re_lora,
    "auto_lora": auto_lora,
    "sora": sora,
    "dy_lora": dy_lora,
    "loradropout": lora_dropout,
    "capa_boost": capa_boost,
    "hi_wi": hi_wi,
    "binary_mask": binary_mask,
    "said": said,
    "fourierft": fourierft,
    "waveft": waveft,
    "vblora": vblora,
}

SHAPES = {
    "pissa": lambda m, rows, columns: {"U": (rows, m.rank), "V": (m.rank, columns)},
    "olora": lambda m, rows, columns: {"U": (rows, m.rank), "V": (m.rank, columns)},
    "oft": lambda m, rows, columns: {"Q": (columns // m.block, m.block * (m.block - 1) // 2)},
    "boft": lambda m, rows, columns: {
        "Q": (m.factors, columns // m.block, m.block * (m.block - 1) // 2),
        "scale": (rows,),
    },
    "hira": lambda m, rows, columns: {"A": (m.rank, columns), "B": (rows, m.rank)},
    "miss": lambda m, rows, columns: {"D": (m.rank, rows)},
    "rand_lora": lambda m, rows, columns: {
        "row_scale": (-(-min(rows, columns) // m.rank), m.rank),
        "column_scale": (-(-min(rows, columns) // m.rank), min(rows, columns)),
    },
    "gra_lora": lambda m, rows, columns: {
        "A": (m.cuts, m.rank, columns // m.cuts),
        "B": (m.cuts, rows // m.cuts, m.rank),
    },
    "moslora": lambda m, rows, columns: {"down": (m.rank, columns), "mixer": (m.rank, m.rank), "up": (rows, m.rank)},
    "sora": lambda m, rows, columns: {"down": (m.rank, columns), "gate": (m.rank,), "up": (rows, m.rank)},
    "dy_lora": lambda m, rows, columns: {"down": (m.rank, columns), "up": (rows, m.rank)},
    "loradropout": lambda m, rows, columns: {"A": (m.rank, columns), "B": (rows, m.rank)},
    "capa_boost": lambda m, rows, columns: {"down": (m.rank, columns), "up": (rows, m.rank)},
    "hi_wi": lambda m, rows, columns: {
        "down.weight": (m.bottleneck, columns),
        "down.bias": (m.bottleneck,),
        "up.weight": (columns, m.bottleneck),
        "up.bias": (columns,),
    },
    "binary_mask": lambda m, rows, columns: {"scores": (rows, columns)},
    "said": lambda m, rows, columns: {"scale": (1,)},
    "fourierft": lambda m, rows, columns: {"coefficients": (m.number,)},
    "waveft": lambda m, rows, columns: {"coefficients": (m.number,)},
    "vblora": lambda m, rows, columns: {
        "down_logits": (m.rank, columns // m.length, m.number),
        "up_logits": (rows // m.length, m.rank, m.number),
    },
}

# name -> (name of what a tower shares, shapes of its trained tensors by method and number of target layers)
SHARED_SHAPES = {
    "vblora": ("bank", lambda m, layers: {"vectors": (m.number, m.length)}),
    "said": ("subspace", lambda m, layers: {"z": (m.dimension - layers,)}),
}


def edit_with(change):
    """The function for `methods.METHODS` of a change of weights."""

    def method(sites, fields, shape):
        def weight(pair, index, site):
            found = sites.get((index, site))
            return pair if found is None else (change(pair[0], fields, found, sites), pair[1])

        return {"weight": weight}

    return method
