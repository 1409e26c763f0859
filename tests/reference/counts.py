"""Trained numbers on ViT-B/16 without a head, as papers publish them or as closed forms: one table of all methods."""

import visionpeft as vp

D, L = 768, 12
BLOCK = 12 * D * D + 13 * D

PUBLISHED = [
    (vp.LinearProbe(), 0),
    (vp.BitFit(key_bias=True), 102_912),
    (vp.VPT(num_tokens=10, deep=True), 92_160),
    (vp.VPT(num_tokens=50, deep=True), 460_800),
    (vp.VPT(num_tokens=100, deep=False), 76_800),
    (vp.VPT(num_tokens=10, deep=True, projection=64), 57_600),
    (vp.Adapter(bottleneck=8, placement="houlsby"), 313_536),
    (vp.Adapter(bottleneck=8, placement="pfeiffer"), 156_768),
    (vp.Adapter(bottleneck=8, placement="adapter_plus"), 165_984),
    (vp.AdaptFormer(bottleneck=64), 1_189_632),
    (vp.AdaptFormer(bottleneck=8), 156_768),
    (vp.LoRA(rank=8, targets=("q", "v")), 294_912),
    (vp.LoRA(rank=8, targets=("q", "k", "v")), 442_368),
    (vp.SSF(), 205_824),
    (vp.PrefixTuning(num_tokens=10), 2 * L * 10 * D),
    (vp.PaFi(density=0.005), round(0.005 * L * (12 * D * D + 8 * D))),
    (vp.LastBlocks(2), 2 * BLOCK + 2 * D),
    (vp.GatedVPT(num_tokens=100), 76_823),
    (vp.IA3(), 6 * D * L),
    (vp.RepAdapter(bottleneck=8, groups=2), 239_808),
    (vp.RepAdapter(bottleneck=8, groups=2, positions=("attention",)), 119_904),
    (vp.Convpass(bottleneck=8), 327_552),
    (vp.Convpass(bottleneck=8, positions=("attention",)), 163_776),
    (vp.FacT(rank=4), 8_448),
    (vp.FacT(rank=16), 61_440),
    (vp.FacT(rank=16, decomposition="tk"), 30_976),
    (vp.FacT(rank=32, decomposition="tk"), 86_528),
    (vp.DoRA(rank=8), 313_344),
    (vp.VeRA(rank=256), 24_576),
    (vp.AdaLoRA(initial_rank=12), 1_991_520),
    (vp.KronA(), 38_400),
    (vp.KAdaptation(), 36_928),
    (vp.Compacter(), 57_088),
    (vp.Compacter(placement="pfeiffer"), 28_576),
    (vp.MAM(), 1_742_592),
    (vp.UniPELT(), 1_410_672),
    (vp.MoLORA(targets=("q", "v")), 1_658_880),
    (vp.MoLORA(), L * 10 * (4 * (4 * 2 * D + 2 * 5 * D) + 4 * D + D + 4 * D)),
    (vp.MoV(), 936_960),
    (vp.MoV(experts=1), 6 * D * L + L * (2 * 64 + 4 * D)),
]
