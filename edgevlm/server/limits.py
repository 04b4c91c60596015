"""Limits of one request and of all requests together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of what clients may ask for.

    body_bytes: a request's body, pictures and videos included, and each of those from a URL.
    pictures, pixels: the pictures and videos of a request, and the width times height of a picture
        or of a video's frame.
    requests: answers that run or wait at the same time, over all models.
    seconds: the time of one request, waiting included.
    upload_seconds: the time that its body has to arrive in, and its videos to be read.
    image_urls: True where pictures and videos are fetched from http and https addresses.
    """

    body_bytes: int = 50 << 20
    pictures: int = 16
    pixels: int = 50_000_000
    requests: int = 16
    seconds: float = 600.0
    upload_seconds: float = 60.0
    image_urls: bool = False

    @property
    def pixels_together(self) -> int:
        """Pixels of all pictures of a request: they are in memory at the same time."""
        return 2 * self.pixels
