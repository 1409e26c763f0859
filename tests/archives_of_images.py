"""Small archives in the layouts that are published, and a server that drops connections."""

import contextlib
import gzip
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


def png(value: int, size: int = 4) -> bytes:
    """A PNG whose pixels are `value`."""
    return encoded(np.full((size, size, 3), value % 256, np.uint8), "PNG")


def jpeg(value: int, size: int = 8) -> bytes:
    """A noisy JPEG, which re-encoding would change."""
    noise = np.random.default_rng(value).integers(0, 256, (size, size, 3), np.uint8)
    return encoded(noise, "JPEG")


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    """Pixels as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def tar(path, files: dict[str, bytes], mode: str = "w:gz"):
    """A tar archive of some files."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def zipped(path, files: dict[str, bytes]):
    """A zip archive of some files."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def norb(values: np.ndarray) -> bytes:
    """A gzipped matrix file of smallNORB."""
    kind = 0x1E3D4C55 if values.dtype == np.uint8 else 0x1E3D4C54
    sizes = [*values.shape, *[1] * (3 - values.ndim)]
    header = np.array([kind, values.ndim, *sizes], "<i4").tobytes()
    return gzip.compress(header + values.tobytes())


def entry(path, **changes) -> dict:
    """The entry of an archive in archives.json, with its checksum."""
    return {"name": path.name, "md5": hashlib.md5(path.read_bytes()).hexdigest(), **changes}


class Server(ThreadingHTTPServer):
    """Serves a folder, with ranges.

    Attributes:
        drop_after: bytes after which a connection is closed, for each of the coming requests; then none is.
        ranges: what was asked for, in order.
        ignores_ranges: answers 200 with the whole file whatever range is asked for.
    """

    def __init__(self, folder):
        self.drop_after: list[int] = []
        self.ranges: list[str | None] = []
        self.ignores_ranges = False
        self.folder = folder
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        """URL of the folder."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    """Answers one request for a file."""

    def do_GET(self):
        path = self.server.folder / self.path.lstrip("/")
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and not self.server.ignores_ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = start + self.server.drop_after.pop(0) if self.server.drop_after else None
        self.wfile.write(content[start:stop])

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def served(folder):
    """A server of a folder."""
    server = Server(folder)
    thread = threading.Thread(target=partial(server.serve_forever, 0.02), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def record_of(folder) -> dict:
    """Content of prepared.json."""
    return json.loads((folder / "prepared.json").read_text())
