import functools
import gc
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from fxcompress.calibrate import Feed, as_feed, images, text
from fxcompress.calibrate.feed import FlatItems
from fxcompress.calibrate.text import token_ids
from fxcompress.capture import capture
from fxcompress.errors import CalibrationError
from fxcompress.signature import Inputs

TEXTS = Path(__file__).parents[1] / "tools/texts"


def items(scale: float = 1.0) -> list[dict[str, torch.Tensor]]:
    return [{"x": scale * torch.arange(6.0).view(2, 3), "t": torch.tensor(n)} for n in range(3)]


def letters(content: str, add_special_tokens: bool) -> dict[str, list[int]]:
    """A tokenizer of one token a letter, which would put 99 in front."""
    return {"input_ids": [99] * add_special_tokens + [ord(c) for c in content]}


def test_a_list_is_read_in_place_again_and_again():
    source = items()
    feed = as_feed(source)
    assert isinstance(feed, Feed)
    assert list(feed) == list(feed) == source
    assert as_feed(feed) is feed


def test_an_iterator_is_spooled():
    given = [Inputs(torch.ones(2), roles={"t": "timestep"}, t=torch.tensor(1)), (torch.zeros(2), None), {"x": torch.ones(3), "flag": True}]
    feed = as_feed(iter(given))
    for _ in range(2):
        first, second, third = list(feed)
        assert torch.equal(first.args[0], torch.ones(2))
        assert (first.kwargs, first.roles) == ({"t": torch.tensor(1)}, {"t": "timestep"})
        assert second.args[1] is None
        assert third.kwargs["flag"] is True
    assert feed.digest == as_feed(given).digest


def test_the_digest_tells_content_apart():
    def digest(*given: object) -> str:
        return as_feed(list(given)).digest

    x = torch.arange(6.0)
    others = [
        digest((x,), (x,)),
        digest({"x": x}),
        digest({"y": x}),
        digest((-x,)),
        digest((x.view(2, 3),)),
        digest((x.int(),)),
        digest((x.view(torch.int32),)),
        digest((x, None)),
        digest((x, True)),
        digest((x, 1)),
        digest(Inputs(x, roles={"x": "timestep"})),
        digest((x.bfloat16(),)),
    ]
    assert len({digest((x,)), *others}) == 1 + len(others)
    assert digest((x,)) == digest((x.clone(),)) == digest([x]) == digest((x.repeat(2)[::1][:6],))
    assert digest((x.view(2, 3).t(),)) != digest((x.view(3, 2),))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("own", [False, True])
def test_values_that_are_not_finite(value, own):
    """Told by the item and the parameter, however the call is written, in a feed of the user's own too."""
    program = scaled()
    bad = [(x["x"], x["t"]) for x in items()]
    bad[1][0][1, 2] = value
    with pytest.raises(CalibrationError) as refused:
        FlatItems(Own(bad) if own else as_feed(bad), program)
    assert str(refused.value) == (
        "a calibration item isn't finite\n  where item 1, input 'x'\n  why   1 of 6 values are inf or nan\n  do    remove the item"
    )


def test_flat_items_are_all_but_the_last():
    program = scaled()
    given = items()
    flat = FlatItems(as_feed(given), program)
    for _ in range(2):
        assert [[v.tolist() for v in item] for item in flat] == [[i["x"].tolist(), i["t"].tolist()] for i in given[:-1]]
    assert (len(flat), flat.count) == (2, 3)
    assert torch.equal(flat.probe[1], given[-1]["t"])
    one = FlatItems(as_feed(given[:1]), program)
    assert [len(list(one)), len(one), one.count] == [1, 1, 1], "the only item is both"
    assert torch.equal(one.probe[0], next(iter(one))[0])


def test_a_feed_of_the_users_own_that_is_empty():
    with pytest.raises(CalibrationError, match="the calibration feed is empty"):
        FlatItems(Own([]), scaled())


class Spent:
    """Can be read once and doesn't say so."""

    def __init__(self):
        self.left = iter(items())

    def __iter__(self):
        return self.left


def test_a_feed_that_can_be_read_only_once():
    with pytest.raises(CalibrationError, match="the calibration feed is empty"):
        FlatItems(as_feed(Spent()), scaled())


class Own:
    """A user's feed."""

    digest = "mine"

    def __init__(self, given):
        self.given = given

    def __iter__(self):
        return iter(self.given)


class Scaled(torch.nn.Module):
    def forward(self, x, t):
        return x * t


@functools.cache
def scaled():
    return capture(Scaled().eval(), {"x": torch.ones(2, 3), "t": torch.tensor(1)})


def breaks_off(after):
    yield from items()[:after]
    raise KeyError("image 7")


class Dataset:
    """Read by index; the second item can't be."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1:
            raise OSError("truncated")
        if index == 3:
            raise IndexError
        return items()[index]

    def __iter__(self):
        return (self[i] for i in range(len(self)))


@pytest.mark.parametrize(
    ("feed", "place", "why", "cause"),
    [
        (lambda: breaks_off(2), "item 2", "KeyError: 'image 7'", KeyError),
        (lambda: breaks_off(0), "item 0", "KeyError: 'image 7'", KeyError),
        (Dataset, "item 1", "OSError: truncated", OSError),
    ],
    ids=["a generator", "at once", "a dataset"],
)
def test_a_feed_that_fails_on_the_way(feed, place, why, cause, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(CalibrationError) as refused:
        as_feed(feed())
    assert str(refused.value) == (f"the calibration feed failed\n  where {place}\n  why   {why}\n  do    mend the feed; try list(feed)")
    assert type(refused.value.__cause__) is cause
    del refused
    gc.collect()
    assert list(tmp_path.iterdir()) == [], "what was spooled is gone"


def test_a_feed_that_fails_when_it_is_read_again():
    reads = []

    class Second(Own):
        def __iter__(self):
            reads.append(1)
            return iter(items()) if len(reads) < 3 else breaks_off(1)

    program = scaled()
    flat = FlatItems(as_feed(Second(None)), program)
    list(flat)
    with pytest.raises(CalibrationError, match="the calibration feed failed\n  where item 1\n"):
        list(flat)


def test_errors_of_the_feeds_own_and_interrupts_pass():
    def stops(error):
        yield items()[0]
        raise error

    with pytest.raises(CalibrationError, match=r"^mine$"):
        as_feed(stops(CalibrationError("mine")))
    with pytest.raises(KeyboardInterrupt):
        as_feed(stops(KeyboardInterrupt()))


@pytest.mark.parametrize("empty", [[], iter([])])
def test_empty(empty):
    with pytest.raises(CalibrationError, match="the calibration feed is empty"):
        as_feed(empty)


def test_what_is_no_feed():
    with pytest.raises(CalibrationError, match="calibration needs several items"):
        as_feed(items()[0])
    with pytest.raises(CalibrationError, match="calibration needs several items"):
        as_feed(torch.ones(3, 2))
    with pytest.raises(CalibrationError, match="calibration can't be iterated"):
        as_feed(7)
    with pytest.raises(CalibrationError) as refused:
        as_feed([(torch.ones(1), object())])
    assert (refused.value.where, refused.value.why) == ("item 0, [1]", "got object")


def test_text_is_cut_into_rows():
    feed = text(letters, "abcdefghijklm", length=3, items=2, batch=2)
    assert [item["input_ids"].tolist() for item in feed] == [
        [[97, 98, 99], [100, 101, 102]],
        [[103, 104, 105], [106, 107, 108]],
    ]
    assert next(iter(feed))["input_ids"].dtype == torch.int64


def test_a_path_is_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("häh", encoding="utf-8")
    assert token_ids(letters, tmp_path / "a.txt").tolist() == [104, 228, 104]


def test_a_text_that_is_too_short():
    with pytest.raises(CalibrationError) as refused:
        text(letters, "a.txt", length=4, items=3, batch=2)
    assert str(refused.value) == (
        "the text is too short\n"
        "  why   it has 5 tokens; 3 items of 2 x 4 need 24\n"
        "  do    pass a longer text (a file is given as a pathlib.Path), fewer items or a smaller length"
    )


def test_one_row_of_an_expanded_tensor_is_hashed_as_its_content():
    assert as_feed([torch.tensor(666).expand(1)]).digest == as_feed([torch.tensor([666])]).digest


def test_images_come_in_batches():
    x = torch.randn(7, 1, 2, 2)
    found = list(images(x, batch=3, limit=5, name="x"))
    assert [item["x"].shape[0] for item in found] == [3, 2]
    assert torch.equal(torch.cat([item["x"] for item in found]), x[:5])


def test_a_folder_of_images_is_read_by_name(tmp_path):
    for name, level in (("b.png", 20), ("a.png", 10), ("c.PNG", 30)):
        Image.new("L", (2, 2), level).save(tmp_path / name, format="png")
    (tmp_path / "notes.txt").write_text("no image")
    (item,) = images(tmp_path, lambda image: torch.tensor(image.getpixel((0, 0))))
    assert item["pixel_values"].tolist() == [[10] * 3, [20] * 3, [30] * 3]


def test_images_that_cannot_be_read(tmp_path):
    with pytest.raises(CalibrationError, match="images can't be read") as error:
        images(tmp_path, torch.tensor)
    assert error.value.why == "0 image files, a preparation"
    with pytest.raises(CalibrationError, match="empty"):
        images(torch.zeros(0, 1, 2, 2))
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(CalibrationError, match="an image can't be read"):
        images(tmp_path, torch.tensor)
    with pytest.raises(CalibrationError) as error:
        images(tmp_path)
    assert error.value.why == "1 image files, no preparation"
