"""8 000 nodes and 30 passes: the size of the file, and how much of them is drawn at first and when a block is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxcompress.diff import of_run
from fxcompress.history import History
from tests.diff.browser import Browser
from tests.diff.large import PASSES, large

DRAWN = 2500  # elements of the page at a time


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = large()
    assert len(run.history.graphs[0].nodes) > 8000 and len(run.passes) == PASSES == 30
    return of_run(run).save(tmp_path_factory.mktemp("large") / "diff.html")


def test_it_fits_in_a_mail(file: Path) -> None:
    """A mail takes 1.5 MB, of which a tenth is left for real names and reasons, which are longer."""
    assert file.stat().st_size <= 1.35e6


def test_its_history_survives_the_file() -> None:
    history = large().history
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history


def test_the_first_view_draws_little(file: Path, browser: Browser) -> None:
    """What a browser has to lay out decides how soon it is there: some hundred elements of 8 000 nodes and 30 passes."""
    counts = []
    for fragment in ("", "#pass=7"):
        browser.open(file, fragment)
        counts.append(browser.run("document.querySelectorAll('*').length"))
    assert min(counts) > 100 and max(counts) < DRAWN, counts
    assert browser.errors == []


def test_an_opened_block_draws_little(file: Path, browser: Browser) -> None:
    """Block in block, whichever way down the model is gone."""
    browser.open(file, "#pass=all")
    opening = """(async () => {
      const counts = [document.querySelectorAll('*').length];
      for (const path of ['', '.attention', '.attention.query', '.mlp', '.mlp.up']) {
        const key = 'r:model.layers.0' + path, all = () => [...document.querySelectorAll('#before [data-key]')];
        const find = () => all().find((e) => e.dataset.key === key);
        if (find().getAttribute('aria-expanded') === 'true') continue;
        find().dispatchEvent(new MouseEvent('click'));
        for (let i = 0; i < 1000 && find().getAttribute('aria-expanded') !== 'true'; i++) await new Promise((done) => setTimeout(done, 1));
        counts.push(document.querySelectorAll('*').length);
      }
      return counts;
    })()"""
    counts = browser.run(opening)
    assert len(counts) > 3 and len(set(counts)) > 1 and max(counts) < DRAWN, counts
    assert browser.errors == []
