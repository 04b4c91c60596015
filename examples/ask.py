"""One question about a picture: `python examples/ask.py PICTURE "answer en what is this?"`."""

import sys

import edgevlm


def main(picture: str, question: str) -> None:
    with edgevlm.load() as vlm:
        print(vlm.ask(question, image=picture))


if __name__ == "__main__":
    main(*sys.argv[1:3])
