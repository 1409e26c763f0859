"""What a training step of each CLIP learner costs: trained values, seconds, bytes kept for backward.

A step is loss, backward and SGD on a batch of images, in float32, on 100 classes. Learners whose image tower is frozen
are also measured with kept image features, as a run without random augmentation trains them. The learners take turns.

    python benchmarks/learners.py --output results
    python benchmarks/learners.py --device cuda --batch-size 32 --rounds 10
"""

import argparse
import copy
import statistics
from pathlib import Path

import open_clip
import torch
from measuring import clock, saved_bytes, storages, table, write

import visionpeft as vp
from visionpeft.data.few_shot.definitions import few_shot_class_names

LEARNERS = {
    "CLIPLinearProbe": {"solver": "gradient"},
    "CLIPAdapter": {},
    "CoOp": {},
    "KgCoOp": {},
    "ProGrad": {},
    "CoCoOp": {},
    "IVLP": {},
    "MaPLe": {},
    "PromptSRC": {},
    "CLIPLoRA": {},
}


class Step:
    """One training step of a learner."""

    def __init__(self, name: str, options: dict, clip, tokenizer, class_names: list[str], images, labels):
        self.name = name
        self.clip = copy.deepcopy(clip)
        self.learner = getattr(vp, name)(self.clip, tokenizer, class_names, **options).train()
        self.images, self.labels = images, labels
        self.optimizer = torch.optim.SGD(self.learner.trainable_parameters(), lr=1e-4)
        self.features = self.learner.image_features(images) if self.learner.frozen_images else None
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

    def run(self, kept: bool) -> torch.Tensor:
        """A step, with kept image features or from the images."""
        loss, _ = self.learner.loss(self.images, self.labels, self.features if kept else None)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def turns(self) -> list[bool]:
        """The kinds of step there are."""
        return [False] if self.features is None else [False, True]

    def row(self, saved: dict[bool, int]) -> dict:
        """The row of the table."""
        count = sum(parameter.numel() for parameter in self.learner.trainable_parameters())
        row = {"learner": self.name, "trained": f"{count:,}"}
        for kept, words in ((False, "step from images"), (True, "step, features kept")):
            times = self.seconds[kept]
            row[words] = f"{statistics.median(times):.2f} s, {saved[kept] / 2**20:,.0f} MiB" if times else "-"
        return row


def main() -> None:
    """Measure all learners in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="an OpenCLIP model; its weights are random")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clip = open_clip.create_model(args.model, pretrained=None, device=args.device).eval()
    tokenizer = open_clip.get_tokenizer(args.model)
    images = torch.randn(args.batch_size, 3, *clip.visual.image_size, device=args.device)
    labels = torch.arange(args.batch_size, device=args.device)
    names = few_shot_class_names("caltech101")
    steps = [Step(name, options, clip, tokenizer, names, images, labels) for name, options in LEARNERS.items()]
    saved = {step.name: {} for step in steps}
    for turn in range(args.rounds + 1):
        for step in steps:
            for kept in step.turns():
                if turn == 0:  # warms up, too
                    saved[step.name][kept], _ = saved_bytes(lambda s=step, k=kept: s.run(k), storages(step.learner))
                    continue
                before = clock(args.device)
                step.run(kept)
                step.seconds[kept].append(clock(args.device) - before)
    rows = [step.row(saved[step.name]) for step in steps]
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / "learners.csv", rows)
    (args.output / "learners.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
