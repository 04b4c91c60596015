"""Several questions about one picture, streamed; the picture is encoded once."""

import sys

import edgevlm


def main(picture: str, *questions: str) -> None:
    with edgevlm.load() as vlm, vlm.chat(image=picture) as chat:
        for question in questions:
            for piece in chat.stream(question):
                print(piece.text, end="", flush=True)
            first_ms = chat.reply.timings.first_token_ms
            print(f"\n  first token after {first_ms:.0f} ms, {chat.reply.tokens.cached} cached")


if __name__ == "__main__":
    main(*sys.argv[1:])
