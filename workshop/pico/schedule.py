"""Pico's training schedule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Steps of the three phases and the learning rates. The rates fall to zero over the last
    ``decay`` share.
    """

    vision_steps: int = 1600
    packed_steps: int = 2400
    true_steps: int = 800
    vision_pictures: int = 64
    packed_pictures: int = 48
    true_pictures: int = 48
    lr: float = 2e-3
    muon_lr: float = 0.016
    vision_share: float = 0.6  # of the rates above, once the decoder is trained too
    inherited: float | None = None  # of the decoder's rates, for weights that were there before
    true_every: int = 5  # in the packed phase: how often a step has the true mask
    word_share: float = 0.05  # of the pictures
    object_share: float = 0.25
    head_weight: float = 0.5  # of the patch targets, once there are answers to learn
    referent_weight: float = 0.3  # of what nouns, captions and boxes refer to
    decay: float = 0.9
    shards: int = 140

    @property
    def total(self) -> int:
        """All steps."""
        return self.vision_steps + self.packed_steps + self.true_steps

    def phase(self, step: int) -> tuple[str, int]:
        """The phase of a step and the step at which it ends."""
        ends = (self.vision_steps, self.vision_steps + self.packed_steps, self.total)
        for mode, end in zip(("vision", "packed", "true"), ends, strict=True):
            if step < end:
                return mode, end
        raise ValueError(f"step {step} is past the end ({self.total})")

    def rates(self, step: int) -> tuple[float, float, float]:
        """Factors on the rates of the encoder, of the decoder and of layers and heads that are new
        to the model.
        """
        warm = min(1.0, (step + 1) / 100)
        if step < self.vision_steps and self.inherited is None:
            return warm, 0.3, warm
        if step < self.vision_steps:
            return warm * min(1.0, 1.4 * (1 - step / self.vision_steps)), 0.0, warm
        fall = min(1.0, (self.total - step) / (self.decay * (self.total - self.vision_steps)))
        into = step - self.vision_steps + 1
        new = fall * min(1.0, into / 50)
        if self.inherited is None:
            return fall * self.vision_share, new, new
        # Heads that know nothing yet would only spoil what was there before.
        settled = min(1.0, max(0.0, into / 50 - 1))
        return fall * self.vision_share, fall * self.inherited * settled, new


# From trained weights, with a new last layer in the encoder and a new third one in the decoder: the
# encoder's learns alone what is beside what, then the decoder to say it. What comes before these
# layers stays as it is.
CONTINUED = Schedule(
    vision_steps=600,
    packed_steps=1500,
    true_steps=150,
    vision_pictures=96,
    packed_pictures=32,
    true_pictures=32,
    muon_lr=0.02,
    vision_share=0.0,
    inherited=0.25,
    true_every=8,
    word_share=0.0,
    referent_weight=0.5,
    decay=0.7,
)


@dataclass(frozen=True)
class ReadingSchedule:
    """Steps and learning rates of the two parts; the rates fall to zero in a straight line."""

    letter_steps: int = 20000
    letter_pictures: int = 96
    letter_muon_lr: float = 0.01
    letter_lr: float = 2e-3
    shown_steps: int = 800  # how long heads are shown their neighbours, less and less
    spelling_steps: int = 500
    words: int = 32
    scenes: int = 16
    spelling_muon_lr: float = 0.01
    spelling_lr: float = 4e-3
    decay: float = 0.1  # of the matrices that Muon trains: no norm holds what is new
    page_shards: int = 38
    word_shards: int = 8  # more of them, as often misread as any: the decoder's
    scene_shards: int = 12
