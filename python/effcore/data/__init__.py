"""Text for language models: read, tokenised once into a cache on disk, split by file, packed to one length.

tokenizer = byte_tokenizer()
corpus = load_corpus(None, tokenizer)                     # the Python standard library's sources
corpus = load_corpus("notes/", tokenizer)                 # a text file, a folder, .jsonl or .parquet
train = PackedTokens(corpus.train, length=512, samples=10_000, seed=0)
"""

from __future__ import annotations

from effcore.data.byte_tokenizer import byte_tokenizer, is_byte_tokenizer
from effcore.data.corpus import Corpus, load_corpus
from effcore.data.packing import PackedTokens

__all__ = ["Corpus", "PackedTokens", "byte_tokenizer", "is_byte_tokenizer", "load_corpus"]
