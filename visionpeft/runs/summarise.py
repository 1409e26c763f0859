"""`python -m visionpeft.summary --backbone vit_base_patch16_224 --method VPT`: what a choice costs, before training."""

import torch
from rich.console import Console

from visionpeft.costs.cost import measure
from visionpeft.errors import ConfigurationError
from visionpeft.methods import Method
from visionpeft.models.create import create_backbone
from visionpeft.runs.cli import Parser
from visionpeft.runs.explain import user_error


def summarise(arguments: list[str]) -> None:
    """Build the backbone with random weights, measure the method on it, and print the table."""
    parser = Parser(prog="python -m visionpeft.summary", description="What a method costs on a backbone.")
    parser.add_argument("--backbone", type=str, default="vit_base_patch16_224", help="name as for create_backbone")
    parser.add_argument("--backbone_kwargs", type=dict, default={}, help="further arguments of it, {img_size: 384}")
    parser.add_argument(
        "--method", type=Method | list[Method], default=None, help="a method, or a list of stacked ones"
    )
    parser.add_argument("--num_classes", type=int, default=100, help="outputs of the head")
    parser.add_argument("--batch_size", type=int, default=8, help="images in a batch")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of the times")
    parser.add_argument("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu")
    parsed = parser.parse_args(arguments)
    try:
        options = parser.instantiate(parsed)
    except ValueError as error:
        raise user_error(error) or error from None
    if not options.method:
        raise ConfigurationError("name a method, such as --method LoRA --method.rank 8")
    for name in ("num_classes", "batch_size", "rounds"):
        if options[name] < 1:
            raise ConfigurationError(f"--{name} must be at least 1, not {options[name]}")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise ConfigurationError(f"--device {options.device}: this machine has no usable CUDA GPU; use cpu")
    torch.manual_seed(0)
    model = create_backbone(
        options.backbone, pretrained=False, num_classes=options.num_classes, **options.backbone_kwargs
    )
    cost = measure(model, options.method, batch_size=options.batch_size, rounds=options.rounds, device=options.device)
    console = Console()
    console.print(cost.counts, highlight=False)
    console.print(cost, highlight=False)
