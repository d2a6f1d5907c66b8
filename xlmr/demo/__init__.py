"""The embedded demo: a small XLM-R of twelve languages, made by this package from a generated text."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
HELD_OUT = Path(__file__).parent / "heldout.tsv"
