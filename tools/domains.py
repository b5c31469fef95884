"""The four domains that language models are calibrated and judged on: what each document is stands in tools/texts/README.md."""

from pathlib import Path

TEXTS = Path(__file__).parent / "texts"
CALIBRATION = {
    "prose": TEXTS / "persuasion.txt",
    "scripture": TEXTS / "genesis.txt",
    "code": TEXTS / "argparse_py.txt",
    "documentation": TEXTS / "logging_cookbook_rst.txt",
}
EVALUATION = {
    "prose": TEXTS / "moby_dick.txt",
    "scripture": TEXTS / "acts.txt",
    "code": TEXTS / "tarfile_py.txt",
    "documentation": TEXTS / "regex_rst.txt",
}
