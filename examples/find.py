"""Find things and draw their boxes: `python examples/find.py PICTURE OUT.png circle star`."""

import sys

import edgevlm
from edgevlm.drawing import draw
from edgevlm.image import read_image


def main(picture: str, out: str, *objects: str) -> None:
    rgb = read_image(picture)
    with edgevlm.load() as vlm:
        boxes = vlm.detect(objects, image=rgb)
    for box in boxes:
        print(f"{box.label}: {box.x0:.0f} {box.y0:.0f} {box.x1:.0f} {box.y1:.0f}")
    draw(rgb, boxes).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
