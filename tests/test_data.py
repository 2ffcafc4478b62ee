"""Tests for lora_from_scratch/data.py and files.py."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_from_scratch import data
from lora_from_scratch.data import (
    DATASETS,
    batches,
    load_data,
    token_windows,
)
from lora_from_scratch.files import cache_folder, read_sums, write_sums

ALL = [(name, part) for name, d in DATASETS.items() for part in d.parts]


class LetterTokenizer:
    """One token a letter; 0 ends a text."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens, verbose):
        """Return the code points of the text."""
        assert not add_special_tokens and not verbose
        return [ord(letter) for letter in text]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Return a copy of the data folder that ``load_data`` reads instead."""
    folder = tmp_path / "data"
    shutil.copytree(data.FOLDER, folder)
    for name, dataset in DATASETS.items():
        if dataset.folder == data.FOLDER:
            monkeypatch.setitem(DATASETS, name, replace(dataset, folder=folder))
    return folder


@pytest.mark.parametrize(("name", "part"), ALL)
def test_every_row_has_the_fields_of_its_record(name, part):
    rows = load_data(name, part)
    assert rows
    for row in rows:
        assert set(row) == set(DATASETS[name].fields)
        assert row.get("text", "x").strip() == row.get("text", "x") != ""


def test_kjv_parts_share_no_book_and_hardly_a_phrase():
    def eights(rows):
        words = [re.findall(r"[a-z']+", row["text"].lower()) for row in rows]
        return {tuple(w[i : i + 8]) for w in words for i in range(len(w) - 7)}

    train = load_data("kjv", "train")
    validation = load_data("kjv", "validation")
    assert not {r["book"] for r in train} & {r["book"] for r in validation}
    ours = eights(validation)
    assert len(ours & eights(train)) < 0.002 * len(ours)


def test_kjv_has_its_first_and_last_verse_and_no_verse_numbers():
    train = load_data("kjv", "train")
    assert train[0]["text"].startswith("In the beginning God created the hea")
    assert train[-1]["text"].endswith("books that should be written. Amen.")
    assert not any(re.search(r"\d", row["text"]) for row in train)
    assert 600_000 < sum(len(row["text"]) for row in train) < 700_000


def test_topics_are_balanced_and_parts_are_disjoint():
    parts = {p: load_data("topics", p) for p in ("train", "test")}
    for rows in parts.values():
        counts = [sum(r["label"] == k for r in rows) for k in range(7)]
        assert counts == [len(rows) // 7] * 7
    assert not {r["text"] for r in parts["train"]} & {
        r["text"] for r in parts["test"]
    }
    assert len(DATASETS["topics"].labels) == 7


def test_every_token_of_an_address_has_a_known_tag():
    for part in ("train", "test"):
        for row in load_data("addresses", part):
            assert len(row["tokens"]) == len(row["tags"])
            assert set(row["tags"]) <= set(DATASETS["addresses"].labels)


def test_questions_are_answered_by_their_context():
    for part, n in (("train", 1500), ("test", 300)):
        rows = load_data("qa", part)
        assert len(rows) == n
        for row in rows:
            assert row["question"].endswith("?")
            assert len(row["context"]) <= 340
            assert row["answers"] == list(dict.fromkeys(row["answers"]))
            assert all(answer in row["context"] for answer in row["answers"])


def test_questions_of_one_article_are_in_one_part():
    articles, contexts = (
        [{row[field] for row in load_data("qa", p)} for p in ("train", "test")]
        for field in ("article", "context")
    )
    assert not articles[0] & articles[1] and not contexts[0] & contexts[1]
    assert [len(a) for a in articles] == [39, 8]


def test_contexts_are_whole_sentences_around_the_answer(monkeypatch):
    from tools import make_data

    first, middle = "Alpha began.", "Dr. Beta of the U.S. Army went on."
    last = "Gamma said no. Delta ended it!"
    text = f"{first} {middle}  {last}"
    start = text.index("Beta")

    def cut(limit):
        monkeypatch.setattr(make_data, "CONTEXT", limit)
        return make_data.cut_context(text, start, start + len("Beta of"))

    assert cut(len(middle) - 1) is None
    assert cut(len(middle)) == middle  # no end after "Dr." or "U.S."
    assert cut(len(f"{first} {middle}")) == f"{first} {middle}"
    assert cut(len(text) - 1) == text.removesuffix(" Delta ended it!")
    assert cut(len(text)) == text
    over_two = text.index("U.S."), text.index("Gamma") + 5
    assert make_data.cut_context(text, *over_two) == text


def test_held_out_text_covers_the_five_domains():
    domains = {row["domain"] for row in load_data("held_out", "test")}
    assert domains == {"sotu", "moby", "wordnet", "austen", "wikipedia"}


def test_licences_lie_beside_the_data():
    names = {path.name for path in data.FOLDER.iterdir()}
    assert {
        "NOTICE.md",
        "WORDNET-LICENSE.txt",
        "USADDRESS-LICENSE.txt",
        "SQUAD-LICENSE.txt",
    } <= names


def test_every_bundled_file_is_in_the_sums():
    on_disk = {path.name for path in data.FOLDER.glob("*.jsonl")}
    assert set(read_sums(data.FOLDER, "")) == on_disk


def test_unknown_set_and_unknown_part_are_errors():
    with pytest.raises(ValueError, match="no data set 'bible'.*kjv"):
        load_data("bible", "train")
    with pytest.raises(ValueError, match="no part 'test'.*validation"):
        load_data("kjv", "test")


def test_a_changed_byte_is_an_error_that_names_the_file(copied):
    path = copied / "wn_test.jsonl"
    path.write_bytes(path.read_bytes().replace(b"the", b"teh", 1))
    with pytest.raises(RuntimeError, match="wn_test.jsonl is damaged"):
        load_data("topics", "test")
    assert load_data("topics", "train")  # the others still load


def test_a_missing_file_is_an_error(copied):
    (copied / "wn_test.jsonl").unlink()
    with pytest.raises(RuntimeError, match="wn_test.jsonl is missing"):
        load_data("topics", "test")


def test_missing_or_damaged_sums_are_errors(copied):
    (copied / "SHA256SUMS").write_text("0123\n")
    with pytest.raises(RuntimeError, match="SHA256SUMS is damaged"):
        load_data("kjv", "train")
    (copied / "SHA256SUMS").unlink()
    with pytest.raises(RuntimeError, match="SHA256SUMS is missing"):
        load_data("kjv", "train")


def test_sums_have_the_format_of_sha256sum(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"")
    write_sums(tmp_path, ["b.txt"])
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert (tmp_path / "SHA256SUMS").read_text() == f"{empty}  b.txt\n"


def test_cache_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/lora_from_scratch")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("USERPROFILE", "/home/someone")  # Windows
    assert cache_folder() == Path("/home/someone/.cache/lora_from_scratch")


def test_windows_are_the_texts_in_order_with_an_end_after_each():
    windows = token_windows(LetterTokenizer(), ["abcd", "ef", "ghi"], 5)
    # abcd0 ef0gh, and i0 does not fill a third
    expected = [[97, 98, 99, 100, 0], [101, 102, 0, 103, 104]]
    assert windows.tolist() == expected
    assert windows.dtype == torch.long


def test_windows_need_length_text_and_an_end():
    tokenizer = LetterTokenizer()
    with pytest.raises(ValueError, match="length must be at least 2, got 1"):
        token_windows(tokenizer, ["abc"], 1)
    with pytest.raises(ValueError, match="4 tokens do not fill"):
        token_windows(tokenizer, ["abc"], 5)
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        token_windows(tokenizer, ["abc"], 2)


def first(n_batches, seed, n=7, batch_size=3):
    generator = torch.Generator().manual_seed(seed)
    stream = batches(torch.arange(n).view(n, 1), batch_size, generator)
    return torch.stack(list(itertools.islice(stream, n_batches)))


def test_batches_use_each_example_once_before_any_twice():
    for epoch in first(6, seed=0).view(3, 6):
        assert len(set(epoch.tolist())) == 6


def test_batches_repeat_with_the_seed_and_differ_between_epochs():
    assert torch.equal(first(6, seed=0), first(6, seed=0))
    assert not torch.equal(first(6, seed=0), first(6, seed=1))
    epochs = first(6, seed=0).view(3, 6)
    assert not torch.equal(epochs[0], epochs[1])


def test_batches_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first(3, seed=1)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("batch_size", [0, -1, 8])
def test_batch_size_out_of_range_is_an_error_at_once(batch_size):
    with pytest.raises(ValueError, match=r"batch_size must be in 1\.\.7"):
        batches(torch.zeros(7, 2), batch_size, torch.Generator())


def test_the_page_shows_the_tables_of_the_code():
    from tools.make_data import PAGE, page_text

    text = PAGE.read_text("utf-8")
    assert page_text(text) == text, "run: python tools/make_data.py page"


def test_json_lines_are_in_utf_8_without_escapes():
    for path in data.FOLDER.glob("*.jsonl"):
        lines = path.read_text("utf-8").splitlines()
        assert all(isinstance(json.loads(line), dict) for line in lines)
        assert path.read_bytes().count(b"\r") == 0
