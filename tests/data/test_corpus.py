"""Reading, splitting, tokenising and packing text: deterministic, and one clear line where something is wrong."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch

from effcore.data import PackedTokens, byte_tokenizer, is_byte_tokenizer, load_corpus
from effcore.data.byte_tokenizer import END_OF_DOCUMENT, encode_bytes
from effcore.data.corpus import held_out
from effcore.data.packing import document_positions, spread
from effcore.errors import InputError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCORE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def folder_of(path, texts):
    path.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize("text", ["plain", "héllo  wörld\n\t", "\x00\x7f\x80", "日本語 🙂", "<|end|x", " leading", ""])
def test_byte_tokenizer_is_the_bytes_and_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode()) == encode_bytes(text).tolist()
    assert tokenizer.decode(ids) == text


def test_byte_tokenizer_loads_without_effcore(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert is_byte_tokenizer(again) and again("é\n")["input_ids"] == [0xC3, 0xA9, 0x0A]


def test_standard_library_is_the_default(tokenizer):
    corpus = load_corpus(None, tokenizer)
    assert corpus.files > 300 and len(corpus.train) > 3_000_000
    assert 0.01 < len(corpus.validation) / len(corpus.train) < 0.2
    assert corpus.bytes_per_token == pytest.approx(1, abs=1e-3)


def test_folder_is_split_by_file_and_documents_end(tokenizer, tmp_path):
    texts = {f"part{i}/file{i}.txt": f"document number {i}\n" for i in range(40)}
    corpus = load_corpus(folder_of(tmp_path / "text", texts), tokenizer, validation_fraction=0.3)
    expected: dict[bool, list[int]] = {True: [], False: []}
    for name in sorted(texts, key=lambda n: (n.split("/")[0], n)):
        expected[held_out(name, 0.3)] += [*texts[name].encode(), END_OF_DOCUMENT]
    assert corpus.train.tolist() == expected[False]
    assert corpus.validation.tolist() == expected[True]


def test_split_does_not_move_files_when_others_arrive(tmp_path):
    names = [f"file{i}" for i in range(2000)]
    share = sum(held_out(name, 0.1) for name in names) / len(names)
    assert 0.07 < share < 0.13
    assert all(held_out(name, 0.2) for name in names if held_out(name, 0.1))


def test_one_of_a_few_files_is_held_out(tokenizer, tmp_path):
    texts = {f"{name}.txt": f"file {name}" for name in "abc"}
    corpus = load_corpus(folder_of(tmp_path / "few", texts), tokenizer, validation_fraction=1e-6)
    assert (len(corpus.train), len(corpus.validation)) == (14, 7)


def test_single_text_file_holds_out_its_end(tokenizer, tmp_path):
    lines = [f"line {i:05d}\n" for i in range(2000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    corpus = load_corpus(tmp_path / "a.txt", tokenizer, validation_fraction=0.1)
    train, validation = (
        bytes(part[part < 256].astype(np.uint8)).decode() for part in (corpus.train, corpus.validation)
    )
    assert train + validation == "".join(lines)
    assert len(validation) / len(train + validation) == pytest.approx(0.1, abs=0.01)
    assert train.endswith("\n")


def test_long_files_arrive_in_pieces_and_whole(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("effcore.data.sources.PIECE_BYTES", 64)
    text = "".join(f"zeile {i} größer\n" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    corpus = load_corpus(tmp_path / "a.txt", tokenizer, validation_fraction=0.2)
    both = np.concatenate([corpus.train, corpus.validation])
    assert bytes(both[both < 256].astype(np.uint8)).decode() == text
    assert (both == END_OF_DOCUMENT).sum() == 2  # the file's end, and the cut


def test_jsonl_and_parquet_say_the_same(tokenizer, tmp_path):
    rows = [f"row {i} with text" for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps({"text": row, "n": i}) for i, row in enumerate(rows)))
    parquet.write_table(arrow.table({"text": rows}), tmp_path / "rows.parquet")
    lines = load_corpus(tmp_path / "rows.jsonl", tokenizer, validation_fraction=0.3)
    table = load_corpus(tmp_path / "rows.parquet", tokenizer, validation_fraction=0.3)
    for corpus in (lines, table):
        together = np.concatenate([corpus.train, corpus.validation])
        assert len(together) == sum(len(row) + 1 for row in rows)
        assert len(corpus.validation)


def test_binary_and_hidden_files_are_left_out(tokenizer, tmp_path):
    folder = folder_of(tmp_path / "mix", {f"{i}.txt": f"text {i}" * 9 for i in range(30)} | {".secret": "x" * 99})
    (folder / "image.bin").write_bytes(bytes(range(256)) * 4)
    corpus = load_corpus(folder, tokenizer, validation_fraction=0.3)
    assert (corpus.files, corpus.skipped) == (30, 1)


def test_cache_is_used_and_noticed_to_be_old(tokenizer, tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "text", {f"{i}.txt": f"text {i} " * 20 for i in range(30)})
    first = load_corpus(folder, tokenizer, validation_fraction=0.3)
    with monkeypatch.context() as patch:
        patch.setattr("effcore.data.corpus._build", None)  # would fail if called
        again = load_corpus(folder, tokenizer, validation_fraction=0.3)
    assert again.fingerprint == first.fingerprint
    assert isinstance(again.train, np.memmap)
    (folder / "0.txt").write_text("other")
    assert load_corpus(folder, tokenizer, validation_fraction=0.3).fingerprint != first.fingerprint


def test_a_build_that_fails_leaves_nothing_behind(tokenizer, tmp_path):
    folder = folder_of(tmp_path / "text", {f"{i}.txt": "fine " * 20 for i in range(30)} | {"z.jsonl": "not json"})
    with pytest.raises(InputError, match=r"z\.jsonl, line 1: not valid JSON"):
        load_corpus(folder, tokenizer, validation_fraction=0.3)
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_tokenizers_are_used(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2, "</s>": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?")
    (tmp_path / "w.txt").write_text("a b c\n" * 100)
    corpus = load_corpus(tmp_path / "w.txt", words, validation_fraction=0.1)
    assert corpus.train[:4].tolist() == [0, 1, 2, 0] and corpus.train[-1] == 3
    assert corpus.bytes_per_token == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "missing", "no such file or folder"),
        (lambda p: folder_of(p / "empty", {}), "holds no files with text"),
        (lambda p: folder_of(p, {"e.txt": ""}) / "e.txt", "the file is empty"),
        (
            lambda p: folder_of(p, {"o.jsonl": '{"body": "x"}\n'}) / "o.jsonl",
            r"line 1: expected a string in field 'text', got only \['body'\]",
        ),
        (lambda p: folder_of(p, {"l.jsonl": '"x"\n'}) / "l.jsonl", "line 1: expected an object"),
        (lambda p: folder_of(p, {"p.parquet": "nope, not parquet"}) / "p.parquet", "not a parquet file"),
        (lambda p: folder_of(p / "one", {"a.txt": "x"}), "no text is left for"),
    ],
)
def test_bad_data_is_named_in_one_line(tokenizer, tmp_path, make, words):
    with pytest.raises(InputError, match=words) as caught:
        load_corpus(make(tmp_path), tokenizer, validation_fraction=0.001)
    assert "\n" not in str(caught.value)


def test_wrong_encoding_and_wrong_column(tokenizer, tmp_path):
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1") * 50)
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 0xf6"):
        load_corpus(tmp_path / "latin.txt", tokenizer)
    parquet.write_table(arrow.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(InputError, match="must hold strings, got int64"):
        load_corpus(tmp_path / "n.parquet", tokenizer)
    with pytest.raises(InputError, match="expected a column 'body'"):
        load_corpus(tmp_path / "n.parquet", tokenizer, text_field="body")


def test_damaged_cache_is_named(tokenizer, tmp_path):
    folder = folder_of(tmp_path / "text", {f"{i}.txt": f"text {i} " * 20 for i in range(30)})
    corpus = load_corpus(folder, tokenizer, validation_fraction=0.3)
    (tmp_path / "cache" / corpus.fingerprint / "train.bin").write_bytes(b"\0" * 10)
    with pytest.raises(InputError, match="is damaged"):
        load_corpus(folder, tokenizer, validation_fraction=0.3)


def test_packing_covers_each_window_once_an_epoch_in_a_seeded_order():
    tokens = np.arange(103, dtype=np.uint16)
    data = PackedTokens(tokens, 10, samples=25, seed=3)
    first = [data[i]["input_ids"][0].item() // 10 for i in range(20)]
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10))
    assert first[:10] != first[10:] != list(range(10))
    again = PackedTokens(tokens, 10, samples=25, seed=3)
    assert [again.window_of(i) for i in (17, 3, 24)] == [data.window_of(i) for i in (17, 3, 24)]  # any order of access
    assert data[0]["input_ids"].dtype == torch.int64 and data[0]["input_ids"].shape == (10,)
    with pytest.raises(IndexError):
        data[25]
    assert PackedTokens(tokens, 10)[2]["labels"].tolist() == list(range(20, 30))


def test_packing_refuses_too_little_text():
    with pytest.raises(InputError, match="9 tokens, fewer than one window of 10"):
        PackedTokens(np.zeros(9, dtype=np.uint16), 10)


def test_positions_begin_anew_behind_each_end():
    ids = torch.tensor([7, 7, 9, 1, 9, 9, 2, 2])
    assert document_positions(ids, 9).tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    item = PackedTokens(ids.numpy(), 8, end_of_document=9)[0]
    assert item["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 0, 1]


def test_spread_is_even_and_bounded():
    assert spread(100, 5).tolist() == [0, 25, 50, 74, 99]
    assert spread(3, 9).tolist() == [0, 1, 2]
