"""Text to packed blocks: what is read, what a block holds, in which order, and that attention stays in a document."""

from __future__ import annotations

import gzip
import json
import lzma
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.data.documents import DataError, Source, read_documents
from minitron.data.packing import BlockStream, PackedBlocks, collate, split_documents
from minitron.data.token_cache import TokenCache, open_cache, tokenize

BOS, EOS = 256, 257


class ByteTokenizer:
    """One token per byte; bos and eos after them."""

    bos_token_id: int | None = BOS
    eos_token_id: int | None = EOS

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> SimpleNamespace:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[list(t.encode()) for t in text])

    def __len__(self) -> int:
        return 258

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(258)}


def cache_of(documents: list[list[int]]) -> TokenCache:
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    starts = np.cumsum([0, *map(len, documents)])
    return TokenCache(tokens, starts, np.array([len(d) for d in documents]), "test")


# --- reading -----------------------------------------------------------------------------------------------------


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "", "two\nlines"))
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(rows.encode()))
    (tmp_path / "d.txt").write_text("plain")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.md").write_text("# mark")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    read = [list(read_documents(path)) for path in Source(str(tmp_path)).files()]
    assert read == [["one", "two\nlines"]] * 3 + [["plain"], ["# mark"]]
    assert len(Source(str(tmp_path / "*.jsonl*")).files()) == 3
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"id": [1, 2, 3], "body": ["one", "", "two\nlines"]})
    parquet.write_table(table, tmp_path / "f.parquet")
    with pyarrow.output_stream(str(tmp_path / "g.jsonl.zst"), compression="zstd") as sink:
        sink.write(rows.replace("text", "body").encode())
    with pyarrow.ipc.new_file(str(tmp_path / "h.arrow"), table.schema) as sink:
        sink.write_table(table)
    for name in ("f.parquet", "g.jsonl.zst", "h.arrow"):
        assert list(read_documents(tmp_path / name, "body")) == ["one", "two\nlines"], name


def test_data_sets_saved_to_disk_are_read_in_their_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [f"text {i}" for i in range(50)]
    data = datasets.Dataset.from_dict({"text": texts})
    data.select(range(49, -1, -1)).save_to_disk(str(tmp_path / "d"), num_shards=3)
    (tmp_path / "d" / "cache-123.arrow").write_bytes(b"left by map")
    files = Source(str(tmp_path / "d")).files()
    assert len(files) == 3
    assert [text for path in files for text in read_documents(path)] == texts[::-1]
    both = datasets.DatasetDict({"train": data, "test": data})
    both.save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(DataError, match=r"several splits; name one, as in .*/dict/test$"):
        Source(str(tmp_path / "dict")).files()
    assert len(Source(str(tmp_path / "dict" / "train")).files()) == 1


def test_the_field_of_the_text_can_be_named_and_is_part_of_the_cache(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "one", "body": "other"}) + "\n")
    first = tokenize(Source(str(file)), ByteTokenizer(), tmp_path / "cache")
    second = tokenize(Source.parse(str(file), "body"), ByteTokenizer(), tmp_path / "cache")
    assert first.tokens.tolist() == [BOS, *b"one", EOS]
    assert second.tokens.tolist() == [BOS, *b"other", EOS]
    with pytest.raises(DataError, match=r"a.jsonl, line 1: .* field 'txt'; the object has the fields: text, body$"):
        tokenize(Source.parse(str(file), "txt"), ByteTokenizer(), tmp_path / "cache")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl.zst"])
def test_a_table_with_another_column_or_damage_is_refused(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / f"a.{kind}"
    table = pyarrow.table({"id": [1, 2], "body": ["x" * 4000, "y" * 4000]})
    if kind == "parquet":
        parquet.write_table(table, path)
    elif kind == "arrow":
        with pyarrow.ipc.new_stream(str(path), table.schema) as sink:
            sink.write_table(table)
    else:
        with pyarrow.output_stream(str(path), compression="zstd") as sink:
            sink.write(b'{"id": 1, "body": "x"}\n' * 2000)
    with pytest.raises(DataError, match=r"a\..*(no column 'text'; the columns are: id, body|the fields: id, body)"):
        list(read_documents(path))
    if kind != "jsonl.zst":
        with pytest.raises(DataError, match=r"row 1: expected a string in the column 'id'; found 1"):
            list(read_documents(path, "id"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"damaged or cut short"):
        list(read_documents(path, "body"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\xff\x00abc", "a.txt: not UTF-8 text"),
        ("a.txt", b"abc\x00def", "a.txt: holds NUL bytes"),
        ("a.txt", b"  \n", "a.txt: no text in it"),
        ("a.jsonl", b"", "a.jsonl: no text in it"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "a.jsonl, line 2: expected an object with a string"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl, line 1: expected an object with a string"),
        ("a.jsonl", b'{"text": "x', "a.jsonl, line 1: not JSON"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz: damaged"),
        ("a.jsonl.xz", b"not xz", "a.jsonl.xz: damaged"),
        ("a.pdf", b"%PDF", "a.pdf: unknown kind of text file"),
    ],
)
def test_bad_text_is_refused_with_a_sentence(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="^" + str(tmp_path)) as error:
        tokenize(Source(str(tmp_path / name)), ByteTokenizer(), tmp_path / "cache")
    assert says in str(error.value)
    assert not list((tmp_path / "cache").glob("*"))  # nothing half made stays


def test_missing_text_and_wrong_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no text file there"):
        Source(str(tmp_path / "none")).files()
    assert Source.parse("a/b.txt:2.5") == Source("a/b.txt", 2.5)
    assert Source.parse("c:/a.txt") == Source("c:/a.txt")
    with pytest.raises(DataError, match="must be greater than 0"):
        Source.parse("a.txt:0")


# --- token cache -------------------------------------------------------------------------------------------------


def test_cache_holds_each_document_between_bos_and_eos_and_is_made_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    texts = ["hello", "", "na\u00efve"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cache = tokenize(Source(str(file)), ByteTokenizer(), tmp_path / "cache")
    assert cache.tokens.dtype == np.uint16
    assert cache.tokens.tolist() == [BOS, *b"hello", EOS, BOS, *"na\u00efve".encode(), EOS]
    assert cache.text_bytes.tolist() == [5, 6]
    assert cache.starts.tolist() == [0, 7, 15]
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    tokenize(Source(str(file)), ByteTokenizer(), tmp_path / "cache")
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    file.write_text(json.dumps({"text": "other"}))
    assert tokenize(Source(str(file)), ByteTokenizer(), tmp_path / "cache").num_documents == 1


def test_damaged_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    tokenize(Source(str(tmp_path / "a.txt")), ByteTokenizer(), tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    content = (folder / "tokens.bin").read_bytes()
    for damaged in (content[:-2], content[:-1] + b"\7", b""):
        (folder / "tokens.bin").write_bytes(damaged)
        with pytest.raises(DataError, match="delete this folder"):
            open_cache(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(DataError, match="damaged token cache"):
        open_cache(folder)


def test_split_is_a_partition_and_the_same_each_time() -> None:
    cache = cache_of([[1, 2]] * 50)
    kept, held = split_documents(cache, 0.1, seed=3, name="a.txt")
    assert len(held) == 5
    assert sorted([*kept, *held]) == list(range(50))
    assert split_documents(cache, 0.1, seed=3, name="a.txt")[1].tolist() == held.tolist()
    with pytest.raises(DataError, match=r"a.txt: held-out share 0.999 leaves no document"):
        split_documents(cache, 0.999, seed=3, name="a.txt")


# --- packing -----------------------------------------------------------------------------------------------------

lengths_and_block = st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(2, 17))


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different, so that each can be told where it went."""
    starts = np.cumsum([0, *lengths])
    return [list(range(a, b)) for a, b in pairwise(starts)]


@given(lengths_and_block, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_token_but_the_first_of_a_document_is_predicted_once(case: tuple[list[int], int], seed: int) -> None:
    lengths, block = case
    documents = numbered(lengths)
    if max(lengths) < 2:
        with pytest.raises(DataError, match="nothing to predict"):
            PackedBlocks(cache_of(documents), block, seed=seed)
        return
    packed = PackedBlocks(cache_of(documents), block, seed=seed)
    batch = collate([packed.pieces(i) for i in range(len(packed))], block, pad=65000)
    ids, labels, positions = batch.input_ids.numpy(), batch.labels.numpy(), batch.position_ids.numpy()
    scored = labels != -100
    assert sorted(labels[scored]) == sorted(token for document in documents for token in document[1:])
    assert batch.num_items == batch.num_scored == packed.num_scored == scored.sum()
    assert (ids[scored] == labels[scored]).all()
    # A scored token stands right behind the one before it in its document, in position too; a first one never.
    rows, columns = np.nonzero(scored)
    assert (ids[rows, columns - 1] == ids[rows, columns] - 1).all()
    assert (positions[rows, columns] == positions[rows, columns - 1] + 1).all()
    assert (positions[:, 0] == 0).all()


@given(st.lists(st.integers(2, 16), min_size=1, max_size=200))
@settings(max_examples=40, deadline=None)
def test_documents_that_fit_are_never_cut_and_blocks_are_few(lengths: list[int]) -> None:
    packed = PackedBlocks(cache_of(numbered(lengths)), 16)
    pieces = [piece for i in range(len(packed)) for piece in packed.pieces(i)]
    assert sorted(map(len, pieces)) == sorted(lengths)
    assert all(sum(map(len, packed.pieces(i))) <= 16 for i in range(len(packed)))
    # Best fit decreasing is known to need at most 11/9 of the least number of blocks, plus one.
    assert len(packed) <= 11 / 9 * -(-sum(lengths) // 16) + max(1, sum(length > 8 for length in lengths))


def test_each_document_goes_into_the_fullest_block_that_holds_it() -> None:
    """If each went into the emptiest block, the 4 would join the 5, and the 2 would need a third block."""
    for order in ([6, 5, 4, 3, 2], [2, 3, 4, 5, 6], [4, 2, 6, 3, 5]):
        packed = PackedBlocks(cache_of(numbered(order)), 10)
        assert sorted(sorted(map(len, packed.pieces(i))) for i in range(len(packed))) == [[2, 3, 5], [4, 6]]


def test_every_process_counts_the_labels_of_the_whole_step() -> None:
    stream = BlockStream([(PackedBlocks(cache_of(numbered([9, 5, 13, 2, 16, 3])), 16), 1.0)], seed=0)
    (whole,) = stream.batches(0, 4, 4)
    shares = [stream.batches(0, 4, 2, share=(number, 2))[0] for number in (0, 1)]
    assert [batch.num_items for batch in shares] == [whole.num_scored] * 2
    assert sum(batch.num_scored for batch in shares) == whole.num_scored


def test_packing_depends_on_the_seed_alone() -> None:
    cache = cache_of(numbered([5, 7, 3, 9, 4, 4, 4, 12] * 5))
    first, again, other = (PackedBlocks(cache, 16, seed=seed) for seed in (0, 0, 1))

    def content(packed: PackedBlocks) -> list[list[list[int]]]:
        return [[piece.tolist() for piece in packed.pieces(i)] for i in range(len(packed))]

    assert content(first) == content(again)
    assert content(first) != content(other)


# --- order -------------------------------------------------------------------------------------------------------


def test_an_epoch_takes_each_source_by_its_weight_and_without_repetition() -> None:
    sizes, weights = [10, 7, 8], [1.0, 2.0, 0.5]
    packed = [PackedBlocks(cache_of(numbered([4] * size)), 4) for size in sizes]
    stream = BlockStream(list(zip(packed, weights, strict=True)), seed=5)
    assert len(stream) == 10 + 14 + 4
    epochs = [[stream.locate(e * len(stream) + i) for i in range(len(stream))] for e in range(2)]
    for epoch in epochs:
        counts = Counter(epoch)
        assert all(counts[0, i] == 1 for i in range(10))
        assert all(counts[1, i] == 2 for i in range(7))
        assert sum(counts[2, i] for i in range(8)) == 4
    # Half of the third source in one epoch, the other half in the next.
    assert Counter(x for epoch in epochs for x in epoch if x[0] == 2) == {(2, i): 1 for i in range(8)}
    assert epochs[0] != epochs[1]


def test_any_place_of_the_stream_is_the_same_however_it_is_reached() -> None:
    packed = PackedBlocks(cache_of(numbered([4] * 9)), 4)
    stream = BlockStream([(packed, 1.0)], seed=1)
    walked = [stream.locate(i) for i in range(60)]
    for place in (59, 3, 31, 0, 44):
        assert BlockStream([(packed, 1.0)], seed=1).locate(place) == walked[place]
    halves = [*stream.batches(8, 2, 2), *stream.batches(10, 2, 2)]
    (whole,) = stream.batches(8, 4, 4)
    assert torch.equal(torch.cat([b.input_ids for b in halves]), whole.input_ids)
    parts = stream.batches(8, 4, 1)
    assert [p.num_items for p in parts] == [whole.num_items] * 4


# --- attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_does_not_cross_documents(attention: str) -> None:
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    model = NemotronForCausalLM(config).eval()
    documents = [torch.randint(4, 64, (n,)).tolist() for n in (9, 5, 13, 2, 16, 3)]
    packed = PackedBlocks(cache_of(documents), 16)
    alone = {}
    with torch.no_grad():
        for document in documents:
            alone[tuple(document)] = model(torch.tensor([document])).logits[0]
        batch = collate([packed.pieces(i) for i in range(len(packed))], 16)
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    compared = 0
    for row in range(len(packed)):
        at = 0
        for piece in packed.pieces(row):
            expected = alone[tuple(piece.tolist())]
            torch.testing.assert_close(logits[row, at : at + len(piece)], expected, rtol=1e-5, atol=1e-5)
            at += len(piece)
            compared += 1
    assert compared == len(documents)


def test_indices_name_blocks_the_same_in_every_epoch_and_batch() -> None:
    first = PackedBlocks(cache_of(numbered([5] * 7)), 8)
    second = PackedBlocks(cache_of(numbered([6] * 4)), 8)
    stream = BlockStream([(first, 1.0), (second, 1.0)], seed=3)
    everything = [*map(first.pieces, range(len(first))), *map(second.pieces, range(len(second)))]
    seen = []
    for batch in stream.batches(0, 2 * len(stream), 3):
        assert batch.indices is not None
        seen += batch.indices.tolist()
        for row, place in zip(batch.input_ids, batch.indices.tolist(), strict=True):
            assert torch.equal(row, collate([everything[place]], 8).input_ids[0])
    assert sorted(seen) == sorted([*range(len(everything)), *range(len(everything))])
