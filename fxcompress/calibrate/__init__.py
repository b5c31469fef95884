"""Calibration: feeds and where they come from."""

from fxcompress.calibrate.feed import Feed, as_feed
from fxcompress.calibrate.images import images
from fxcompress.calibrate.text import text
from fxcompress.calibrate.trajectory import Guidance, Sampler, recorded, trajectory

__all__ = ["Feed", "Guidance", "Sampler", "as_feed", "images", "recorded", "text", "trajectory"]
