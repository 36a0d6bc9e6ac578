"""The tokenizer of a dataset: the teacher's own, or a byte-level BPE trained here.

A trained one is a Hugging Face tokenizer folder (`AutoTokenizer.from_pretrained` reads it) with 256 bytes, BOS, EOS and
merges learned from the training documents, so that it spells every text and never needs an unknown token.
Text is only text: the name of a special token inside a document is spelled, never read as that token.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from noise.folder import Folder
from noise.identity import Identity
from noise.seal import TOKENIZER_FILES
from noise.storage import DatasetError, canonical_json, read_json, sha256_file, sha256_text, write_json
from pipeline import config
from pipeline.corpus import Corpus

BOS, EOS = "<|bos|>", "<|eos|>"


class Tokenizer:
    """Ids of documents, with the special tokens that packing needs."""

    def __init__(self, folder: Path):
        """Raises DatasetError when the folder holds no tokenizer, or one without EOS."""
        self.folder = folder
        if not folder.is_dir():
            raise DatasetError(f"there is no tokenizer at {folder}; make it with `python -m pipeline tokenizer`, or set tokenizer.path")
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(f"{folder} holds no tokenizer that can be read: {str(error).strip().splitlines()[0]}") from None
        if self._tokenizer.eos_token_id is None:
            raise DatasetError(f"the tokenizer at {folder} has no EOS token, which ends every document; set one in its tokenizer_config.json")
        self.eos: int = self._tokenizer.eos_token_id
        self.bos: int = self._tokenizer.bos_token_id if self._tokenizer.bos_token_id is not None else self.eos
        self._tokenizer.model_max_length = int(1e30)  # rows are cut by packing, not by the tokenizer

    def __len__(self) -> int:
        return len(self._tokenizer)

    def encode(self, texts: Iterable[str], batch: int = 64) -> Iterator[list[int]]:
        """Token ids of each text, without special tokens."""
        pending: list[str] = []
        for text in texts:
            pending.append(text)
            if len(pending) == batch:
                yield from self._encode(pending)
                pending = []
        if pending:
            yield from self._encode(pending)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]  # type: ignore[no-any-return]

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def ids(self) -> set[int]:
        """Every id that stands for something; between them and above there can be holes."""
        return set(self._tokenizer.get_vocab().values())

    def special_ids(self) -> set[int]:
        added = self._tokenizer.added_tokens_decoder
        return set(self._tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}

    def identity(self) -> dict[str, Any]:
        """What decides the tokens: a hash of the tokenizer's rules, its size and the special tokens."""
        return {"sha256": tokenizer_hash(self.folder), "length": len(self), "bos": self.bos, "eos": self.eos, "special_tokens_in_text": "spelled"}


def tokenizer_hash(folder: Path) -> str:
    """sha256 of tokenizer.json without its padding and truncation, which do not change the tokens; else of all its files."""
    path = folder / "tokenizer.json"
    if path.exists():
        rules = {name: value for name, value in read_json(path).items() if name not in ("padding", "truncation")}
        return sha256_text(canonical_json(rules))
    return sha256_text(canonical_json({name: sha256_file(folder / name) for name in TOKENIZER_FILES if (folder / name).exists()}))


def copy_tokenizer(source: Path, dataset: Folder, identity: Identity) -> None:
    """The tokenizer's files, in a dataset's own folder. Raises DatasetError where one that is there already makes it another tokenizer."""
    there = dataset.sizes("tokenizer")
    for name in TOKENIZER_FILES:
        if (source / name).exists() and name not in there:
            dataset.put(f"tokenizer/{name}", (source / name).read_bytes())
    check_tokenizer(dataset, identity)


def check_tokenizer(dataset: Folder, identity: Identity, way_out: str = "move it away and run again, or name another folder") -> None:
    """Raises DatasetError where tokenizer/ is not the identity's; where there is neither, nothing is to be checked."""
    expected, there = identity.get("tokenizer"), [name for name in TOKENIZER_FILES if name in dataset.sizes("tokenizer")]
    if isinstance(expected, dict) and there and tokenizer_hash(dataset.fetched("tokenizer")) != expected.get("sha256"):
        path = dataset.path(f"tokenizer/{there[0]}")
        raise DatasetError(f"{path} is not the tokenizer of this dataset: its hash is not the identity's; {way_out}")


def find_tokenizer(recipe: config.Work) -> Path:
    """The folder to read the tokenizer from. Raises DatasetError when neither the recipe nor the teacher names one."""
    if recipe.tokenizer.path is not None:
        own = Path(recipe.teacher.model or "")
        path = Path(recipe.tokenizer.path)
        if (own / "tokenizer.json").exists() and (path / "tokenizer.json").exists() and tokenizer_hash(own) != tokenizer_hash(path):
            raise DatasetError(
                f"the teacher {own} has a tokenizer of its own, other than tokenizer.path {path}: set --tokenizer.path null to take the teacher's"
            )
        return path
    if recipe.teacher.model is None:
        raise DatasetError("there is no tokenizer: set tokenizer.path, or teacher.model to take the teacher's own")
    from pipeline.teacher import locate

    return locate(recipe.teacher)[0]


def train(recipe: config.Recipe, corpus: Corpus, log: Any) -> Path:
    """Train on the training documents, unless the folder already holds what this would make.

    Raises DatasetError when the folder holds a tokenizer of other text or size.
    """
    assert recipe.tokenizer.path is not None
    if recipe.corpus.ids_field is not None:
        raise DatasetError(f"corpus.ids_field is {recipe.corpus.ids_field!r}: ids have a tokenizer already; name it in tokenizer.path")
    folder = Path(recipe.tokenizer.path)
    origin = {
        "vocab_size": recipe.tokenizer.vocab_size,
        "text_field": recipe.corpus.text_field,
        "held_out": recipe.corpus.held_out,
        "files": [asdict(file) for file in corpus.files],
    }
    if recipe.corpus.clean_up != "none":
        origin["clean_up"] = recipe.corpus.clean_up
    if (folder / "tokenizer.json").exists():
        _check_origin(folder, origin)
        log(f"{folder} is up to date")
        return folder
    chosen = corpus.of_split("train" if recipe.corpus.held_out else "all")
    texts = [document.text for document in chosen.documents()]
    if not texts:
        raise chosen.nothing_found()
    write_json(folder / "origin.json", origin)
    _save(_train_bpe(texts, recipe.tokenizer.vocab_size), folder)
    trained = Tokenizer(folder)
    tokens = sum(map(len, trained.encode(texts)))
    characters = sum(map(len, texts))
    log(
        f"{folder}: {len(trained)} entries from {len(texts):,} documents, {characters:,} characters = {tokens:,} tokens "
        f"({characters / tokens:.2f} a token)"
    )
    return folder


def _check_origin(folder: Path, origin: dict[str, Any]) -> None:
    from noise.identity import differences

    if not (folder / "origin.json").exists():
        raise DatasetError(
            f"{folder} holds a tokenizer that was not made here; choose another tokenizer.path, or use it with plan and extract as it is"
        )
    changed = differences(json.loads(json.dumps(origin)), read_json(folder / "origin.json"))
    if changed:
        raise DatasetError(
            f"{folder} holds a tokenizer of other settings: {'; '.join(changed)}; choose another tokenizer.path, or delete that folder"
        )


def _train_bpe(texts: list[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


def _save(backend: Any, folder: Path) -> None:
    """Write the folder; tokenizer.json, whose presence means done, appears last."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "unfinished.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS).save_pretrained(str(unfinished))
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "tokenizer.json"):
        path.replace(folder / path.name)
    unfinished.rmdir()
