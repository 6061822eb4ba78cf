"""`lk.load("text")`: which text it is, its tokens, and the windows that a language model is trained on."""

from __future__ import annotations

import json
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

import labkit as lk
from labkit.errors import DataNotFound
from labkit.training.batches import Stream, one_pass
from labkit.training.text import TextData

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def text(tmp_path):
    """A file of a thousand characters."""
    path = tmp_path / "letters.txt"
    path.write_text((ALPHABET * 40)[:1000])
    return path


class Guess(nn.Module):
    """Which token follows which."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.table(x)  # [rows, positions, tokens]
        return scores


# ---------------------------------------------------------------- tokens


def test_characters_are_numbered_in_their_order_and_come_back(text):
    data = lk.load("text", text, context=10)
    assert data.vocab == tuple(ALPHABET) and data.vocab_size == 26
    assert data.encode("bad").tolist() == [1, 0, 3] and data.encode("bad").dtype == torch.int64
    assert data.decode(data.encode("hello")) == data.decode([7, 4, 11, 11, 14]) == "hello"
    assert data.decode(data.train[:30]) == (ALPHABET * 2)[:30]
    with pytest.raises(ValueError, match="'!' does not occur in the text"):
        data.encode("hi!")
    with pytest.raises(ValueError, match="26 is no token: there are 26, from 0 to 25"):
        data.decode([0, 26])
    with pytest.raises(ValueError, match="the tokens of one text"):
        data.decode(torch.zeros(2, 3, dtype=torch.int64))


def test_characters_of_both_texts_beyond_one_byte_have_numbers(tmp_path):
    (tmp_path / "train.txt").write_text("aé" * 50, encoding="utf-8")
    (tmp_path / "valid.txt").write_text("a😀" * 50, encoding="utf-8")
    data = lk.load("text", tmp_path, context=5)
    assert data.vocab == ("a", "é", "😀")
    assert data.decode(data.test[:4]) == "a😀a😀"


def test_any_file_is_bytes(tmp_path):
    path = tmp_path / "noise.txt"
    path.write_bytes(b"\xff\xfe\r\n" * 30)
    data = lk.load("text", path, tokens="bytes", context=5)
    assert (data.vocab_size, data.vocab[10], data.train.dtype) == (256, b"\n", torch.uint8)
    assert data.train[:4].tolist() == [255, 254, 13, 10]
    assert data.decode(data.encode("é")) == "é" and data.decode([0xC3]) == "�"
    with pytest.raises(ValueError, match=r"noise\.txt: byte 0 is no UTF-8.*tokens='bytes'"):
        lk.load("text", path)


def words() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({"?": 0, "to": 1, "be": 2, "or": 3, "not": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


class Lists:
    """A tokenizer of no library that is known."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 7 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join("abcdefg"[number] for number in ids)


@pytest.mark.parametrize(
    "wrap", [lambda made: made, lambda made: transformers.PreTrainedTokenizerFast(tokenizer_object=made)]
)
def test_a_tokenizer_of_tokenizers_or_transformers_makes_the_tokens(tmp_path, wrap):
    (tmp_path / "play.txt").write_text("to be or not to be\n" * 100)
    data = lk.load("text", tmp_path / "play.txt", tokens=wrap(words()), context=8)
    assert data.train[:6].tolist() == [1, 2, 3, 4, 1, 2]
    assert (data.vocab_size, data.vocab[1:]) == (5, ("to", "be", "or", "not"))
    assert data.decode(data.encode("not to be")) == "not to be"


def test_so_does_any_object_that_encodes_and_decodes(text):
    data = lk.load("text", text, tokens=Lists(), context=8)
    assert (data.vocab_size, data.vocab) == (7, tuple("abcdefg"))
    assert data.decode(data.encode("a")) == "g"


def test_many_tokens_take_four_bytes_each(text):
    class Wide(Lists):
        n_vocab = 50_000

        def encode(self, text: str) -> list[int]:
            return [49_999] * len(text)

    data = lk.load("text", text, tokens=Wide(), context=8)
    assert (data.train.dtype, data.vocab_size) == (torch.int32, 50_000)
    assert data.train_x.dtype == torch.int64 and int(data.train_x[0, 0]) == 49_999


# ---------------------------------------------------------------- splits


def test_of_one_text_the_end_is_for_testing(text):
    data = lk.load("text", text, context=10)
    assert (len(data.train), len(data.test), data.name) == (900, 100, "letters")
    assert data.decode(data.test[:3]) == (ALPHABET * 40)[900:903]
    assert data.splits == ("the text but its end", "the last 0.1 of the text")
    quarter = lk.load("text", text, context=10, test_share=0.25)
    assert (len(quarter.train), len(quarter.test)) == (750, 250)
    assert "training: 750 tokens of the text but its end; testing: 250" in repr(quarter)


def wikitext(folder, *splits: str, form: str = "{}.txt"):
    for split in splits:
        (folder / form.format(split)).write_text(f"= {split} =\n" * 30)
    (folder / "README.txt").write_text("From elsewhere.")
    return folder


@pytest.mark.parametrize("form", ["{}.txt", "wiki.{}.tokens", "wiki-{}-00001.raw"])
def test_texts_that_are_called_like_splits_are_the_splits(tmp_path, form):
    data = lk.load("text", wikitext(tmp_path, "train", "valid", "test", form=form), context=10)
    assert data.splits == ("train", "valid")
    assert data.decode(data.train[:9]) == "= train =" and data.decode(data.test[:9]) == "= valid ="
    other = lk.load("text", tmp_path, context=10, splits=("train", "test"))
    assert other.decode(other.test[:8]) == "= test ="


def test_two_splits_of_which_none_is_for_training_are_named_as_what_they_are(tmp_path, caplog):
    folder = wikitext(tmp_path, "valid", "test")
    data = lk.load("text", folder, context=np.int64(10))  # type: ignore[call-overload]
    assert data.splits == ("valid", "test") and isinstance(data.context, int)
    assert "has no text called train: this is trained on valid, and tested on test" in caplog.text
    assert lk.load("text", folder, splits=("test", "valid"), context=10).splits == ("test", "valid")
    assert "training: 300 tokens of valid; testing: 270 of test" in repr(data)


def test_a_folder_may_hold_folders_of_texts_or_texts_without_splits(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "a" / split).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "a" / split / f"{number}.txt").write_text(f"{split}{number}\n" * 20)
    data = lk.load("text", tmp_path / "a", context=5)
    assert data.splits == ("train", "val") and "train1" in data.decode(data.train)
    (tmp_path / "b").mkdir()
    for number in range(2):
        (tmp_path / "b" / f"{number}.md").write_text(f"{number}" * 50)
    (tmp_path / "b" / "LICENSE.md").write_text("free")
    assert lk.load("text", tmp_path / "b", context=5).decode(lk.load("text", tmp_path / "b", context=5).train[:51]) == (
        "0" * 50 + "1"
    )


def test_tables_have_a_column_of_text(tmp_path):
    lines = [{"text": f"line {number}", "title": "t", "n": 1} for number in range(50)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = lk.load("text", tmp_path, context=5)
    assert data.decode(data.train[:14]) == "line 0\nline 1\n"
    titles = lk.load("text", tmp_path, context=5, columns=["title"])
    assert titles.decode(titles.test[:4]) == "t\nt\n"
    with pytest.raises(ValueError, match="no column of text called 'n'; it has text, title"):
        lk.load("text", tmp_path, columns=["n"])
    assert lk.load("text", tmp_path / "train.jsonl", context=5).splits[1] == "the last 0.1 of the text"


def test_a_name_is_looked_for_at_the_hub(monkeypatch, tmp_path):
    asked = []
    rows = {"text": ["", " = Title = \n", "A sentence .\n"] * 10}
    splits = {split: datasets.Dataset.from_dict(rows) for split in ("train", "validation", "test")}

    def load_dataset(*names: str) -> Any:
        asked.append(names)
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_dataset", load_dataset)
        data = lk.load("text", "Salesforce/wikitext", subset="wikitext-2-raw-v1", context=5)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]
    assert (data.name, data.splits) == ("wikitext", ("train", "validation"))
    assert data.decode(data.train[:12]) == "\n = Title = "
    with pytest.raises(DataNotFound, match=r"cannot be reached.*train\.txt and valid\.txt"):
        lk.load("text", "Salesforce/wikitext")


def test_without_a_name_it_is_pythons_reference():
    data = lk.load("text")
    assert (data.name, data.context) == ("python", 64)
    assert len(data.train) > 100_000 and data.vocab_size < 256
    assert "Assert statements are a convenient way" in data.decode(data.train[:2000])


# ---------------------------------------------------------------- windows


def test_windows_begin_anywhere_and_y_is_one_token_later(text):
    data = lk.load("text", text, context=10)
    batches = [Stream(data, 16, seed=3) for _ in range(2)]
    first, again = (stream.next() for stream in batches)
    (x,) = first.inputs
    assert x.shape == first.target.shape == (16, 10) and x.dtype == first.target.dtype == torch.int64
    assert torch.equal((x + 1) % 26, first.target), "the alphabet goes on"
    assert torch.equal(x, again.inputs[0]), "the same seed"
    assert batches[0].length == 6, "as many windows as fit beside each other, (900 - 1) // 10, by 16"
    assert len({int(row[0]) for row in x}) > 8
    assert not torch.equal(x, Stream(data, 16, seed=4).next().inputs[0])


def test_consecutive_windows_come_once_an_epoch(text):
    data = lk.load("text", text, context=10, windows="consecutive")
    stream = Stream(data, 16, seed=0)
    epochs = [torch.cat([stream.next().inputs[0] for _ in range(6)]) for _ in range(2)]
    assert all(sorted(epoch.tolist()) == sorted(data.train_x.tolist()) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_a_run_goes_on_at_its_place_in_the_text(text):
    data = lk.load("text", text, context=10)
    stream = Stream(data, 16, seed=0)
    for _ in range(8):
        stream.next()
    place = stream.state_dict()
    other = Stream(data, 16, seed=7)
    other.load_state_dict(place)
    for _ in range(8):
        assert torch.equal(stream.next().inputs[0], other.next().inputs[0])


def test_all_of_the_text_for_testing_is_measured_in_order(text):
    data = lk.load("text", text, context=10)
    batches = list(one_pass(data, 4))
    assert torch.equal(torch.cat([batch.inputs[0] for batch in batches]), data.test_x)
    assert torch.equal(torch.cat([batch.target for batch in batches]), data.test_y)
    assert torch.equal(data.test_y[-1], data.test[81:91])


def test_fit_and_evaluate_take_it_as_it_is(text):
    data = lk.load("text", text, context=10)
    torch.manual_seed(0)
    model = Guess(data.vocab_size)
    before = lk.evaluate(model, data, metric="perplexity")
    run = lk.fit(model, data, epochs=10, lr=0.3, trainers=2, validate=data, metrics=["accuracy", "perplexity"]).wait()
    assert run.total_steps == 20 and len(run.validations) == 10
    assert run.validations[-1].metrics["accuracy"] == 1.0
    assert before > 20 > 2 > run.validations[-1].metrics["perplexity"]
    assert run.evaluate(data, metric="loss") == pytest.approx(
        lk.evaluate(model, data.test_x, data.test_y, metric="loss")
    )


def test_as_many_positions_as_tokens_are_no_riddle(tmp_path):
    (tmp_path / "b.txt").write_bytes(bytes(range(256)) * 30)
    data = lk.load("text", tmp_path / "b.txt", tokens="bytes", context=256)
    model = Guess(256)
    with torch.no_grad():
        model.table.weight.copy_(20 * torch.eye(256).roll(1, 1))  # that the next byte is the next number
    assert lk.evaluate(model, data) == 1.0
    assert lk.evaluate(model, data, metric="perplexity") < 1.001
    assert lk.fit(model, data, steps=1, batch_size=4, loss=lk.losses.cross_entropy).wait().loss < 0.001


def test_a_model_that_returns_no_score_for_each_position_is_told_so(text):
    class Pooled(Guess):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(1)

    with pytest.raises(ValueError, match=r"returned \[64, 26\] for y \[64, 10\]: scores \[rows, positions, classes\]"):
        lk.fit(Pooled(26), lk.load("text", text, context=10), steps=1).wait()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 0}, "context=0: how many positions"),
        ({"context": True}, "context=True"),
        ({"context": 100}, "the last 0.1 of the text has 100 tokens, and a window takes 100 and the one after"),
        ({"tokens": "character"}, "did you mean 'characters'"),
        ({"tokens": 5}, "tokens=5: one of characters, bytes, or a tokenizer"),
        ({"tokens": Lists}, "or a tokenizer, with encode and decode"),
        ({"windows": "any"}, "one of random, consecutive"),
        ({"splits": "train"}, "the names of two"),
        ({"splits": ("train", "train")}, "the names of two"),
        ({"splits": ("train", "valid")}, "has none called 'train'; it has none"),
        ({"test_share": 1.5}, "between 0 and 1"),
        ({"label": "y"}, "leave label out"),
        ({"columns": "text"}, "a list with the one column"),
    ],
)
def test_what_cannot_be_is_refused(text, options, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        lk.load("text", text, **options)


@pytest.mark.parametrize("tokens", ["characters", "bytes", Lists()])
def test_an_empty_text_has_no_windows(tmp_path, tokens):
    (tmp_path / "nothing.txt").write_text("")
    with pytest.raises(ValueError, match="the text but its end has 0 tokens"):
        lk.load("text", tmp_path / "nothing.txt", tokens=tokens)


def test_a_share_and_a_split_for_testing_are_one_too_many(tmp_path):
    with pytest.raises(ValueError, match=r"has a text for testing already \(valid\)"):
        lk.load("text", wikitext(tmp_path, "train", "valid"), test_share=0.1)


@pytest.mark.parametrize("name", ["nothing.txt", "./nothing", "some/nothing.md"])
def test_a_path_to_no_text_is_said_to_be_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataNotFound, match="there is no file or folder"):
        lk.load("text", name)
    with pytest.raises(DataNotFound, match=r"no text in .*: it has no \.txt"):
        lk.load("text", tmp_path)


def test_options_of_text_are_of_text_only():
    with pytest.raises(ValueError, match=r"context: for text only, lk\.load\('text', 'digits', context=…\)"):
        lk.load("digits", context=5)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"a text is loaded with lk\.load\('text', 'plays\.txt'\)"):
        lk.load("plays.txt")


def test_the_overloads_say_what_comes_back(text):
    data: TextData = lk.load("text", text)
    assert isinstance(data, TextData)
