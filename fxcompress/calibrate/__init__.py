"""Calibration: feeds and where they come from."""

from fxcompress.calibrate.feed import Feed, as_feed
from fxcompress.calibrate.text import text

__all__ = ["Feed", "as_feed", "text"]
