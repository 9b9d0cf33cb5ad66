"""The example that makes a folder of emoji faces."""

import io
import json
import runpy
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "emoji_faces.py"
KINDS = {
    "smile.png": ("face-smiling", True),
    "ghost.png": ("face-costume", True),
    "drawn-by-others.png": ("face-smiling", False),
    "cat.png": ("animal-mammal", True),
}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    emoji = [
        {"subcategory": kind, "image": name, "has_img_google": there}
        for name, (kind, there) in KINDS.items()
    ]
    files = {"emoji.json": json.dumps(emoji).encode()}
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:32] = (250, 200, 50, 255)  # the lower half is transparent
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    files |= {f"img/google/64/{name}": file.getvalue() for name in KINDS}
    path = tmp_path / "emoji.tgz"
    with tarfile.open(path, "w:gz") as package:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return path


def test_faces_are_on_grey_and_nothing_else_is_there(archive: Path, tmp_path: Path) -> None:
    assert runpy.run_path(str(EXAMPLE))["main"](archive, tmp_path / "faces") == 1
    (face,) = (tmp_path / "faces").iterdir()
    assert face.name == "smile.png"
    with Image.open(face) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:32] == (250, 200, 50)).all()
    assert (pixels[32:] == 128).all()


def test_a_folder_that_exists_is_left_alone(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    with pytest.raises(FileExistsError):
        runpy.run_path(str(EXAMPLE))["main"](archive, tmp_path / "faces")
    assert not list((tmp_path / "faces").iterdir())
