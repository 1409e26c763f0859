"""The two lists of the matrix, hosts and cases, and what its tests share."""

import dataclasses
import gc
import itertools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share the machine, and tiny models gain nothing

gc.disable()  # until all is imported and collected: what is made until then stays to the end

import block_checks
import pytest
import shared_cells
import torch

# also for the tests, which take what they share from here
from observing import anatomy as anatomy
from observing import base_state as base_state
from observing import distance as distance
from observing import loss_of as loss_of
from observing import output_of as output_of
from observing import same_bytes as same_bytes
from reference import edits_of, forward, shapes_of, trained_weights
from reference.hosts import HOSTS
from safetensors.torch import load_file

import visionpeft as vp
from visionpeft import methods
from visionpeft.adapters import selfcheck
from visionpeft.errors import UserError

selfcheck._check_block = block_checks.once

if not torch.cuda.is_available():
    # PyTorch looks for GPUs at every operation without values and every optimiser step, in drivers until it is told
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def one_thread():
    """Torch computes in one thread: a process that is forked must find no others running."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cell(request):
    """A model with a method attached that the tests of one cell of the matrix share and only read."""
    return shared_cells.cell_of(request.param, adapted)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items[:] = shared_cells.in_cells(items)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    result = yield
    keep_what_is_there()
    gc.set_threshold(10_000, 20, 20)  # Lightning and our protocols ask for collections themselves, often enough
    gc.enable()
    return result


def keep_what_is_there():
    """What is there now need not be searched by every later collection of garbage; most of it stays to the end."""
    gc.collect()
    gc.freeze()


_begun = set()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.path not in _begun:  # the files before it imported libraries and filled caches
        _begun.add(item.path)
        keep_what_is_there()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.has_failed = getattr(item, "has_failed", False) or report.failed
    return report


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    shared_cells.leave(item, nextitem, item.has_failed)


# methods that must be told the grid of a model for images of any size
ON_A_GRID = vp.Convpass | vp.DTL | vp.Mona | vp.DecomposedPromptTuning | vp.PixelPrompt


@dataclasses.dataclass(frozen=True)
class Case:
    """A method with small sizes, and what the paper promises of it.

    Attributes:
        name: shown in the name of a test.
        method: the method.
        identity: attaching it changes nothing.
        mergeable: it can be merged into the weights.
        image_only: of two towers it acts on that of the images.
        relative: it acts at the sites of another case (`lora_all`, `dora`, `pfeiffer`, `houlsby`, `pafi`, `prefix`,
            `vpt_deep` ...), with another formula, so that three hosts are enough where a property is tested on all.
        sources: the methods of trained adapters that it is over, which are attached before it under its names.
    """

    name: str
    method: vp.Method
    identity: bool = False
    mergeable: bool = False
    image_only: bool = False
    relative: bool = False
    sources: tuple[vp.Method, ...] = ()

    def __repr__(self):
        return self.name

    def sources_on(self, host):
        """The methods of its sources for a host."""
        return [dataclasses.replace(self, method=source, sources=()).on(host) for source in self.sources]

    def on(self, host):
        """The method for a host: on both towers where it has both; prompts in text have no patch size to start from."""
        changes = {}
        chooses = "towers" in {field.name for field in dataclasses.fields(self.method)} and not self.sources
        if host.takes == "both" and chooses and not self.image_only:
            changes["towers"] = ["visual", "text"]
        if "text" in host.towers and isinstance(self.method, vp.VPT | vp.GatedVPT | vp.XPrompt):
            changes["init"] = "normal"
        if isinstance(self.method, ON_A_GRID) and host.name in ("vit_dynamic", "dinov3"):
            changes["grid"] = tuple(side // 8 for side in host.size)  # these take images of any size
        return dataclasses.replace(self.method, **changes)


EVERY_MATRIX = ("q", "k", "v", "proj", "fc1", "fc2")

CASES = [
    Case("linear_probe", vp.LinearProbe(), identity=True, mergeable=True),
    Case("full", vp.FullFineTuning(), identity=True, mergeable=True),
    Case("last_block", vp.LastBlocks(1), identity=True, mergeable=True),
    Case("bit_fit_no_key", vp.BitFit(key_bias=False), identity=True, mergeable=True),
    Case("bit_fit", vp.BitFit(), identity=True, mergeable=True),
    Case("vpt_shallow", vp.VPT(num_tokens=3, deep=False)),
    Case("vpt_deep", vp.VPT(num_tokens=3, deep=True)),
    Case("vpt_projected", vp.VPT(num_tokens=2, deep=True, projection=6), relative=True),
    Case("vpt_last", vp.VPT(num_tokens=2, deep=True, blocks="last:2")),
    Case("houlsby", vp.Adapter(bottleneck=4, placement="houlsby")),
    Case(
        "houlsby_learned",
        vp.Adapter(bottleneck=3, placement="houlsby", scale="learned", activation="silu"),
        relative=True,
    ),
    Case("pfeiffer", vp.Adapter(bottleneck=4, placement="pfeiffer")),
    Case("houlsby_scaled", vp.Adapter(bottleneck=4, placement="houlsby", after_scaling=True), relative=True),
    Case("parallel", vp.Adapter(bottleneck=4, placement="parallel")),
    Case("pre", vp.Adapter(bottleneck=4, placement="pre")),
    Case("adapter_plus", vp.Adapter(bottleneck=4, placement="adapter_plus")),
    Case("adapter_zero", vp.Adapter(bottleneck=4, placement="pfeiffer", init="lora"), identity=True, relative=True),
    Case("adapt_former", vp.AdaptFormer(bottleneck=8), identity=True),
    Case("adapt_former_learned", vp.AdaptFormer(bottleneck=8, scale="learned"), identity=True, relative=True),
    Case("lora", vp.LoRA(rank=2), identity=True, mergeable=True, relative=True),
    Case("lora_all", vp.LoRA(rank=2, alpha=6, targets=EVERY_MATRIX), identity=True, mergeable=True),
    Case("ssf", vp.SSF(), mergeable=True),
    Case("pafi", vp.PaFi(density=0.05), identity=True, mergeable=True),
    Case("fish_mask", vp.FishMask(density=0.05, samples=3), identity=True, mergeable=True, relative=True),
    Case("ltsft", vp.LTSFT(density=0.05), identity=True, mergeable=True, relative=True),
    Case("diff_pruning", vp.DiffPruning(density=0.05), mergeable=True, relative=True),
    Case("fish_dip", vp.FishDip(0.05, samples=2, renewals=1), mergeable=True, relative=True),
    Case("far", vp.FAR(share=0.2), identity=True, mergeable=True, relative=True),
    Case("pruned_bit_fit", vp.PrunedBitFit(density=0.3, samples=3), identity=True, mergeable=True, relative=True),
    Case("child_f", vp.ChildTuning("F", share=0.6), identity=True, mergeable=True),
    Case("child_d", vp.ChildTuning("D", share=0.1, samples=3), identity=True, mergeable=True, relative=True),
    Case("spt", vp.SPT(budget=1500, rank=2), identity=True, mergeable=True, relative=True),
    Case("spt_adapter", vp.SPT(budget=1500, rank=2, structure="adapter"), identity=True, relative=True),
    Case("prefix", vp.PrefixTuning(num_tokens=3)),
    Case("prefix_mlp", vp.PrefixTuning(num_tokens=2, mlp=5), relative=True),
    Case("xprompt_deep", vp.XPrompt(3, token_share=0.7, pieces=8, samples=3, deep=True), relative=True),
    Case("vpt_gated", vp.GatedVPT(num_tokens=3, gate=0.5)),
    Case("vpt_gated_first", vp.GatedVPT(num_tokens=2, gate=-1.0, blocks="first:2"), relative=True),
    Case("ia3", vp.IA3(), identity=True, mergeable=True),
    Case("layer_norm_tuning", vp.LayerNormTuning(), identity=True, mergeable=True),
    Case("rep_adapter", vp.RepAdapter(bottleneck=4, scale=0.5), identity=True, mergeable=True),
    Case(
        "rep_adapter_mlp", vp.RepAdapter(3, groups=1, positions=("mlp",)), identity=True, mergeable=True, relative=True
    ),
    Case("convpass", vp.Convpass(bottleneck=4), identity=True, image_only=True),
    Case(
        "convpass_mlp",
        vp.Convpass(3, scale=2.0, positions=("mlp",), init="xavier"),
        identity=True,
        image_only=True,
        relative=True,
    ),
    Case("fact", vp.FacT(rank=3, scale=0.5), identity=True, mergeable=True, relative=True),
    Case(
        "fact_tucker", vp.FacT(2, "tk", targets=("k", "v", "fc1", "fc2")), identity=True, mergeable=True, relative=True
    ),
    Case("dora", vp.DoRA(rank=2, alpha=6, targets=EVERY_MATRIX), identity=True, mergeable=True),
    Case("vera", vp.VeRA(rank=5, targets=EVERY_MATRIX, seed=3), identity=True, mergeable=True, relative=True),
    Case("ada_lora", vp.AdaLoRA(rank=2, initial_rank=3, alpha=6), identity=True, mergeable=True, relative=True),
    Case("pissa", vp.PiSSA(rank=2, alpha=6, targets=EVERY_MATRIX), identity=True, mergeable=True, relative=True),
    Case("olora", vp.OLoRA(rank=2, alpha=3), identity=True, mergeable=True, relative=True),
    Case("lora_ga", vp.LoRAGA(rank=2, alpha=6), identity=True, mergeable=True, relative=True),
    Case("eva", vp.EVA(rank=2, alpha=6, targets=("q", "v", "fc1")), identity=True, mergeable=True, relative=True),
    Case("gps", vp.GPS(per_row=2, loss="training"), identity=True, mergeable=True, relative=True),
    Case("second_order", vp.SecondOrder(density=0.05), identity=True, mergeable=True, relative=True),
    Case("neuro_ada", vp.NeuroAda(per_row=2), identity=True, mergeable=True, relative=True),
    Case("sct", vp.SCT(channels=5), relative=True),
    Case("sct_qv", vp.SCT(channels=4, position="qv"), mergeable=True, relative=True),
    Case("binary_mask", vp.BinaryMask(masked=0.3, targets=("q", "v", "fc2")), mergeable=True, relative=True),
    Case("said", vp.SAID(dimension=40, seed=2), identity=True, mergeable=True, relative=True),
    Case("oft", vp.OFT(block=4, targets=("q", "v", "proj")), identity=True, mergeable=True, relative=True),
    Case("boft", vp.BOFT(block=4, factors=2, targets=("k", "proj")), identity=True, mergeable=True, relative=True),
    Case("hira", vp.HiRA(rank=3, targets=("q", "v", "fc2")), identity=True, mergeable=True, relative=True),
    Case("vb_lora", vp.VBLoRA(rank=2, number=5, length=4), mergeable=True, relative=True),
    Case("miss", vp.MiSS(rank=5, targets=EVERY_MATRIX), identity=True, mergeable=True, relative=True),
    Case(
        "rand_lora",
        vp.RandLoRA(rank=6, scale=2.0, targets=("q", "fc1", "fc2")),
        identity=True,
        mergeable=True,
        relative=True,
    ),
    Case(
        "gra_lora",
        vp.GraLoRA(rank=4, cuts=2, alpha=6, targets=("q", "v", "proj")),
        identity=True,
        mergeable=True,
        relative=True,
    ),
    Case("fourierft", vp.FourierFT(number=9, scale=40.0), mergeable=True, relative=True),
    Case("waveft", vp.WaveFT(number=9, scale=3.0), identity=True, mergeable=True, relative=True),
    Case("moslora", vp.MoSLoRA(rank=3, alpha=6), identity=True, mergeable=True, relative=True),
    Case("sora", vp.SoRA(rank=3, alpha=6), identity=True, mergeable=True, relative=True),
    Case("dy_lora", vp.DyLoRA(rank=3, used=2, alpha=6), identity=True, mergeable=True, relative=True),
    Case("lora_dropout", vp.LoRADropout(rank=2, alpha=6), identity=True, mergeable=True, relative=True),
    # after a restart it is no identity, as what was trained before it acts on
    Case("relora", vp.ReLoRA(rank=2, alpha=6, restarts=1), mergeable=True, relative=True),
    Case("periodic_lora", vp.PeriodicLoRA(rank=2, restarts=1, unloaded=0.4), mergeable=True, relative=True),
    Case("auto_lora", vp.AutoLoRA(3, alpha=6), identity=True, mergeable=True, image_only=True, relative=True),
    Case("capa_boost", vp.CapaBoost(rank=2, alpha=6), identity=True, mergeable=True, relative=True),
    Case("hi_wi", vp.HiWi(bottleneck=3), identity=True, mergeable=True, relative=True),
    Case("krona", vp.KronA(targets=EVERY_MATRIX, scale=0.7), identity=True, mergeable=True, relative=True),
    Case("krona_shape", vp.KronA(shape=(4, 8)), identity=True, mergeable=True, relative=True),
    Case(
        "kadaptation",
        vp.KAdaptation(terms=4, rank=2, targets=EVERY_MATRIX),
        identity=True,
        mergeable=True,
        relative=True,
    ),
    Case("compacter", vp.Compacter(bottleneck=8, terms=2, rank=2), relative=True),
    Case(
        "compacter_pfeiffer",
        vp.Compacter(bottleneck=8, terms=4, placement="pfeiffer", activation="silu"),
        relative=True,
    ),
    Case("mam", vp.MAM(num_tokens=3, bottleneck=8), relative=True),
    Case("unipelt", vp.UniPELT(rank=2, alpha=6, num_tokens=3, bottleneck=4)),
    Case(
        "unipelt_values",
        vp.UniPELT(rank=2, num_tokens=2, bottleneck=3, prefix_gate="values", activation="gelu", init="lora"),
        relative=True,
    ),
    Case("molora", vp.MoLORA(experts=3, rank=2, alpha=6), identity=True, relative=True),
    Case("mov", vp.MoV(experts=3), identity=True, relative=True),
    Case("moelora", vp.MOELoRA(experts=3, rank=6, alpha=6), identity=True, mergeable=True, relative=True),
    Case("mole", vp.MoLE(adapters=("s0", "s1")), relative=True, sources=(vp.LoRA(rank=2), vp.LoRA(3, alpha=6))),
    Case("hyper_former", vp.HyperFormer(bottleneck=3, embedding=5), relative=True),
    Case(
        "moa",
        vp.MoA(adapters=("s0", "s1"), routing=0.0),  # that its routers learn of tasks, tests of its own see
        relative=True,
        sources=(vp.LoRA(rank=2), vp.LoRA(3, alpha=6)),
    ),
    Case(
        "adapter_fusion",
        vp.AdapterFusion(adapters=("s0", "s1", "s2"), temperature=2.0),
        relative=True,
        sources=(vp.Adapter(bottleneck=2), vp.Adapter(3, activation="relu", scale="learned"), vp.Adapter(2, scale=0.5)),
    ),
    Case("mix_lora", vp.MixLoRA(experts=3, rank=2, alpha=6), identity=True),
    Case("dtl", vp.DTL(first=1), identity=True, image_only=True),
    Case("dtl_plus", vp.DTL(3, 1.5, first=0, convolution=True), identity=True, image_only=True, relative=True),
    Case("lst", vp.LST(ratio=4), image_only=True),
    Case("lst_dropped", vp.LST(2, temperature=0.7, dropped=(0, 2)), image_only=True, relative=True),
    Case("vqt", vp.VQT(2), image_only=True),
    Case("ada_mix", vp.AdaMix(experts=3, bottleneck=4, shared_up=False), relative=True),
    Case("mona", vp.Mona(bottleneck=4), image_only=True, relative=True),
    Case("e2vpt", vp.E2VPT(num_tokens=2, num_keys=3), image_only=True, relative=True),
    Case(
        "e2vpt_pruned",
        vp.E2VPT(3, 2, token_share=0.7, piece_share=0.6, pieces=8, samples=3),
        image_only=True,
        relative=True,
    ),
    Case("prefix_propagation", vp.PrefixPropagation(num_tokens=3, keep=0.7, add=1.5), relative=True),
    Case("selective_prompts", vp.SelectivePrompts(num_tokens=2), image_only=True, relative=True),
    Case("lpt", vp.LPT(num_tokens=3, bottleneck=4), image_only=True, relative=True),
    Case("idpg", vp.IDPG(num_tokens=3, bottleneck=4, terms=2), image_only=True, relative=True),
    Case("ptuning", vp.PTuning(num_tokens=3, hidden=4), relative=True),
    Case("decomposed", vp.DecomposedPromptTuning(3, rank=2, alpha=3.0), identity=False, image_only=True, relative=True),
    Case("smop", vp.SMoP(experts=3, num_tokens=2), image_only=True, relative=True),
    Case("apt", vp.APT(num_tokens=3), image_only=True, relative=True),
    Case("pixel_prompt", vp.PixelPrompt(width=5), image_only=True, relative=True),
    Case("ciat", vp.CIAT(bottleneck=4), relative=True),
    Case("coda", vp.CoDA(bottleneck=4, reduction=3, temperature=0.5), image_only=True, relative=True),
]


def can_be_merged(method):
    """Whether a method can be merged into a small ViT."""
    model = vp.attach(HOSTS[0].build(), method)
    try:
        vp.merge(model)
    except vp.UnsupportedError:
        return False
    return True


# methods for clips, which models of single images refuse
VIDEO_CASES = [
    Case("st_adapter", vp.STAdapter(bottleneck=6)),  # at the start the norm of the mean, not the mean of norms
    Case(
        "st_adapter_both",
        vp.STAdapter(5, positions=("before_attention", "before_mlp"), norm_of_mean=False),
        identity=True,
    ),
    Case("st_adapter_spatial", vp.STAdapter(4, kernel=(3, 3, 3), positions=("before_mlp",))),
    Case("aim", vp.AIM(num_frames=3), identity=True),
    Case("aim_two", vp.AIM(num_frames=3, num_temporal=2, scale=1.0, ratio=0.5), identity=True),
]

# a listed method without a small case of its own is tested as it is by default
NAMED = {type(case.method) for case in [*CASES, *VIDEO_CASES]}
UNNAMED = [getattr(methods, name) for name in methods.__all__ if name != "Method"]
CASES += [
    Case(method.__name__.lower(), method(), mergeable=can_be_merged(method()))
    for method in UNNAMED
    if method not in NAMED
]

# one host of each block and attention class, and one case of each method: for the dearer invariants
FEW_HOSTS = [h for h in HOSTS if h.name in ("vit_cls", "vit_res_post", "beit", "eva_split", "dinov3", "clip_whole")]
FEW_NAMES = (
    *("bit_fit", "vpt_deep", "houlsby", "adapt_former", "lora_all", "ssf", "prefix", "pafi", "dora", "unipelt"),
    *("vpt_gated", "ia3", "rep_adapter", "convpass"),
)
FEW_CASES = [c for c in CASES if c.name in FEW_NAMES]
# trained parameters, prompts, tokens, branches, weights, outputs, keys and values
MECHANISMS = ("bit_fit", "vpt_deep", "houlsby", "adapt_former", "lora_all", "ssf", "prefix")
# these add no module: they train the head or parameters of the backbone themselves
TRAINED_ALONE = ("linear_probe", "full", "last_block", "child_f", "layer_norm_tuning")

TWO = ("vit_cls", "clip_whole")

# the only cells attach may refuse, and why
REFUSALS: dict[tuple[str, str], str] = {
    (host.name, "linear_probe"): "CLIP has no classification head to train" for host in HOSTS if not host.head_paths()
}
REFUSALS |= {("clip_text", name): "text has no patches to convolve" for name in ("convpass", "convpass_mlp")}
REFUSALS |= {("clip_text", name): "text has no patches" for name in ("dtl", "dtl_plus", "lst", "lst_dropped")}
OF_IMAGES = (
    "coda",
    "mona",
    "e2vpt",
    "e2vpt_pruned",
    "selective_prompts",
    "lpt",
    "idpg",
    "decomposed",
    "smop",
    "apt",
    "pixel_prompt",
)
REFUSALS |= {("clip_text", name): "words are not patches" for name in OF_IMAGES}
WITH_POSITIONS = ("beit", "eva_fused", "eva_split", "eva_post_norm", "eva_rope_mixed", "eva_grouped", "dinov3")
REFUSALS |= {(host, "coda"): "positions in the attention are those of all patches" for host in WITH_POSITIONS}

REFUSALS |= {
    (host.name, "vqt"): "what queries get is read by a classification head" for host in HOSTS if not host.head_paths()
}

NO_KEY_BIAS = "keys are rotated, so their shift matters, and the architecture has no bias for them"
MERGE_REFUSALS = {
    ("eva_fused", "ssf"): NO_KEY_BIAS,
    ("eva_split", "ssf"): NO_KEY_BIAS,
    ("eva_post_norm", "ssf"): NO_KEY_BIAS,
    ("dinov3", "ssf"): "neither queries, keys nor values have a bias",
    ("eva_rope_mixed", "ssf"): "patches have neither a bias nor a position embedding",
    ("dinov3", "rep_adapter"): "neither queries, keys nor values have a bias",
}
ROTATED = ("eva_fused", "eva_split", "eva_post_norm", "video_eva")
MERGE_REFUSALS |= {(host, "rep_adapter"): NO_KEY_BIAS for host in ROTATED}


def cells(hosts=HOSTS, cases=CASES):
    """Parametrise a test over hosts and cases."""

    def decorate(test):
        test = pytest.mark.parametrize("case", cases, ids=repr)(test)
        return pytest.mark.parametrize("host", hosts, ids=repr)(test)

    return decorate


def spread(cases=CASES):
    """Parametrise a test over a part of the matrix: a case of each mechanism on every host, every case on two hosts,
    its relatives on one of these.
    """
    return pytest.mark.parametrize(("host", "case"), spread_pairs(cases), ids=repr)


def every_pair(hosts=HOSTS, cases=CASES):
    """Every (host, case); of relatives the two hosts of `spread` and a third one, another for each relative."""
    third = {case.name: hosts[index % len(hosts)] for index, case in enumerate(case for case in cases if case.relative)}
    return [
        (host, case)
        for host, case in itertools.product(hosts, cases)
        if not case.relative or host.name in TWO or host is third[case.name]
    ]


def spread_pairs(cases=CASES):
    """The (host, case) pairs of `spread`."""
    one = {case.name: TWO[index % 2] for index, case in enumerate(case for case in CASES if case.relative)}
    hosts_of = {c.name: (one[c.name],) if c.relative else TWO for c in cases}
    found = [(h, c) for h in HOSTS for c in cases if h.name in hosts_of[c.name] or c.name in MECHANISMS]
    return found + [(h, c) for h in FEW_HOSTS for c in FEW_CASES if c in cases and (h, c) not in found]


def attach(model, host, case, name="default", **options):
    """`vp.attach` of a case; where the table says that it is refused, sees that it is and skips the test."""
    if (host.name, case.name) in REFUSALS:
        with pytest.raises(UserError):
            vp.attach(model, case.on(host), name, **options)
        pytest.skip(REFUSALS[host.name, case.name])
    active = model.peft.active if hasattr(model, "peft") else ()
    names = case.method.adapters if case.sources else ()
    for seed, (source, method) in enumerate(zip(names, case.sources_on(host), strict=True)):
        vp.attach(model, method, source, head=False)
        randomise(model.peft[source], seed)
    vp.attach(model, case.on(host), name, **options)
    for source in names:
        vp.detach(model, source)
    if names:
        assert model.peft.active == (*active, name)
    if model.peft[name].pending:
        show_data(host, model, name)
    to_last_stage(host, model, name)
    return model


def show_data(host, model, name="default"):
    """Show random inputs to a method that chooses by them."""
    vp.allocate(model, *_random_data(host, model), name)


def to_last_stage(host, model, name="default"):
    """Move the tensors of a method that is trained in stages off their values in each of them but the last."""
    for stage in vp.stages(model, *_random_data(host, model), name):
        if any(method.stages_after for method in model.peft[name].methods):
            randomise(model.peft[name], stage)


def _random_data(host, model):
    """Batches of random inputs, and a loss."""
    inputs = host.inputs(4, next(model.parameters()).dtype, seed=8)
    batch = inputs if host.takes == "both" else (inputs,)
    return [batch], lambda model, batch: host.run(model, batch if host.takes == "both" else batch[0]).square().mean()


def adapted(host, case, dtype=torch.float32, seed=1, name="default"):
    """A host with a case attached, all of its tensors moved off their initial values, in eval mode."""
    torch.manual_seed(seed)
    model = attach(host.build(dtype), host, case, name)
    randomise(model.peft[name], seed)
    return model.eval()


@torch.no_grad()
def randomise(adapter, seed=1):
    """Move every tensor of an adapter by noise, not by a constant, which LayerNorm would remove."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        size = 0.05 if name.startswith("trained.") else 0.3
        parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def adapter_tensors(model, name="default"):
    """The tensors of an adapter by name, with their gradients."""
    return dict(model.peft[name].state_dict(keep_vars=True))


def saved_tensors(model, folder):
    """The tensors of an adapter as they are written to a file, where parts used only for training are folded away."""
    vp.save(model, folder / "adapter")
    return load_file(folder / "adapter" / "adapter.safetensors")


def expected_output(host, case, tensors, inputs):
    """What the reference computes for a case with these tensors on a fresh host, in float64."""
    plain = shared_cells.plain(host, torch.float64)
    method = case.on(host)
    fields = dataclasses.asdict(method) | (
        {"sources": [*map(dataclasses.asdict, case.sources)]} if case.sources else {}
    )
    edits = edits_of(tensors, {method.name: fields}, shapes_of(plain))
    output = forward(plain, inputs, edits, trained_weights(plain.state_dict(), tensors))
    return torch.cat(output[:2], dim=-1) if host.takes == "both" else output
