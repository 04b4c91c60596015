"""Drawn scenes, the questions that can be asked of them, and how right the answers are."""
