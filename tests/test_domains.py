"""The texts are what their card says: files, bytes, words and hashes; four domains, calibrated and judged on different documents."""

import hashlib
import re

from tools.domains import CALIBRATION, EVALUATION, TEXTS

CARD = (TEXTS / "README.md").read_text(encoding="utf-8")
FILES = [*CALIBRATION.values(), *EVALUATION.values()]


def test_four_domains_of_two_documents_within_a_megabyte():
    assert list(CALIBRATION) == list(EVALUATION) == ["prose", "scripture", "code", "documentation"]
    assert len(set(FILES)) == 8
    assert sorted(f.name for f in TEXTS.glob("*.txt")) == sorted(f.name for f in FILES)
    assert sum(f.stat().st_size for f in FILES) <= 1e6


def test_the_card_has_words_bytes_and_hash_of_every_file():
    hashes = dict(reversed(line) for line in re.findall(r"^([0-9a-f]{64})  (\S+)$", CARD, re.MULTILINE))
    for file in FILES:
        content = file.read_bytes()
        (row,) = [line for line in CARD.splitlines() if f"| `{file.name}` |" in line]
        words, size = (int(cell.replace(" ", "")) for cell in row.split("|")[-4:-2])
        assert (words, size) == (len(content.decode().split()), len(content))
        assert hashes[file.name] == hashlib.sha256(content).hexdigest()
        use = "calibration" if file in CALIBRATION.values() else "evaluation"
        assert f"| {use} |" in row


def test_no_passage_of_fifty_words_stands_in_both():
    for domain in CALIBRATION:
        first, second = (_passages(files[domain].read_text(encoding="utf-8")) for files in (CALIBRATION, EVALUATION))
        assert len(first) > 5000
        assert not first & second


def _passages(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 50]) for i in range(len(words) - 49)}
