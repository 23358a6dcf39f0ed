"""A tokenizer whose tokens are bytes: no training, no files, no unknown token.

Token b is the byte b; 256 ends a document (``eos``, also ``bos``) and 257 pads. It is an ordinary
``PreTrainedTokenizerFast``: a checkpoint saved with it loads through ``AutoTokenizer`` without effcore.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_DOCUMENT = 256
PAD = 257
VOCAB_SIZE = 258


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in that byte-level BPE (GPT-2) uses for each byte, with the byte as its token."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + offset): byte for offset, byte in enumerate(rest)})
    return alphabet


def byte_tokenizer(max_length: int = 1 << 20) -> PreTrainedTokenizerFast:
    """The byte tokenizer; ``max_length`` is the longest input that it accepts without a warning, in tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|end|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokenizer`` is this one, so that encoding is a copy of the bytes (1000 times as fast)."""
    if len(tokenizer) != VOCAB_SIZE or tokenizer.eos_token_id != END_OF_DOCUMENT:
        return False
    vocab = tokenizer.get_vocab()
    return all(vocab.get(symbol) == byte for symbol, byte in _byte_alphabet().items())


def encode_bytes(text: str) -> np.ndarray:
    """Tokens of ``text`` as uint8 [bytes of its UTF-8 form]; equal to what the byte tokenizer gives, without it."""
    return np.frombuffer(text.encode("utf-8", errors="surrogatepass"), dtype=np.uint8)
