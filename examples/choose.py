"""Multiple choice by probability: which of these answers does the model find likeliest?"""

import sys

import numpy as np

import edgevlm


def main(picture: str, question: str, *answers: str) -> None:
    with edgevlm.load() as vlm:
        scores = vlm.score(question, answers, image=picture, with_end=True)
    for answer, share in zip(answers, np.exp(scores), strict=True):
        print(f"{share:6.1%}  {answer}")


if __name__ == "__main__":
    main(*sys.argv[1:])
