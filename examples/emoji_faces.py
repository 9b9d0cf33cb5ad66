"""Make a folder of emoji faces, 64 x 64, to learn the model ``faces`` from.

    npm pack emoji-datasource-google@16.0.0
    python examples/emoji_faces.py emoji-datasource-google-16.0.0.tgz faces

The pictures are Google's Noto Emoji (Apache License 2.0). Faces in costume, such as the ghost, are
left out. What is transparent becomes grey, the mean of U(-1, 1) from which chains start: white, at
the bound of [-1, 1], would have to be reached by every pixel of the background.
"""

import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image

GREY = (128, 128, 128, 255)


def main(archive: Path, out: Path) -> int:
    """Write the faces of the archive as PNG files into ``out``; return how many there are."""
    out.mkdir(parents=True)
    n = 0
    with tarfile.open(archive) as package:

        def read(name: str) -> bytes:
            file = package.extractfile(f"package/{name}")
            assert file is not None, f"{name} is not a file"
            return file.read()

        for emoji in json.loads(read("emoji.json")):
            kind = emoji["subcategory"]
            if kind.startswith("face-") and kind != "face-costume" and emoji["has_img_google"]:
                picture = Image.open(io.BytesIO(read(f"img/google/64/{emoji['image']}")))
                grey = Image.new("RGBA", picture.size, GREY)
                face = Image.alpha_composite(grey, picture.convert("RGBA")).convert("RGB")
                face.save(out / Path(emoji["image"]).name)
                n += 1
    return n


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2])), "faces")
