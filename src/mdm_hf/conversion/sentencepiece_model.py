"""A fast tokenizer of ours back to a SentencePiece `.model` that gives the same ids; the way there is
`training.tokenizer.to_fast_tokenizer`."""

import base64
import json
import math
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..training.tokenizer import BOS, CONTROL_TOKENS, EOS, PAD, UNK, to_fast_tokenizer


# What the fast tokenizer does, as the flags of a SentencePiece model have it.
FLAGS = (
    ("normalizer_spec", "add_dummy_prefix", True),
    ("normalizer_spec", "remove_extra_whitespaces", True),
    ("normalizer_spec", "escape_whitespaces", True),
    ("trainer_spec", "byte_fallback", True),
    ("trainer_spec", "treat_whitespace_as_suffix", False),
)
SPECIAL = (PAD, BOS, EOS, UNK, *CONTROL_TOKENS.values())


def from_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a `.model` with our control tokens.

    Args:
        path: The `.model`.

    Raises:
        ValueError: it is not whole, no unigram model, or has other control tokens.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    format: Any = sentencepiece_model_pb2
    try:
        proto = format.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"Got {path}, which is no SentencePiece model ({error}); need one, whole.") from error
    pieces = [piece.piece for piece in proto.pieces]
    if proto.trainer_spec.model_type != format.TrainerSpec.UNIGRAM or tuple(pieces[: len(SPECIAL)]) != SPECIAL:
        raise ValueError(
            f"Got {path}, no unigram model that begins with the control tokens {', '.join(SPECIAL[:6])}, ...; need "
            "one made by `mdm_hf.training.tokenizer.train_sentencepiece`: a model's ids begin with them."
        )
    for spec, flag, needed in FLAGS:
        if (given := getattr(getattr(proto, spec), flag)) != needed:
            raise ValueError(
                f"Got {path} with {spec}.{flag} {given}; the fast tokenizer does as with {needed}, and would give "
                "other ids; need a model trained so."
            )
    if wrong := [piece.piece for piece in proto.pieces if not math.isfinite(piece.score)]:
        raise ValueError(f"Got {path} with a score of {wrong[0]!r} that is not finite; need it whole.")
    kinds = format.ModelProto.SentencePiece
    if other := [p.piece for p in proto.pieces if p.type in (kinds.USER_DEFINED, kinds.UNUSED)]:
        raise ValueError(f"Got {path} with {other[0]!r}, a user-defined or unused piece; need a model without such.")
    if not proto.normalizer_spec.precompiled_charsmap or proto.denormalizer_spec.precompiled_charsmap:
        raise ValueError(
            f"Got {path} with the normaliser {proto.normalizer_spec.name!r}; need one with a table of characters for "
            "encoding and none for decoding, as nmt_nfkc has it."
        )
    try:
        return to_fast_tokenizer(proto.SerializeToString())
    except Exception as error:  # tokenizers raises nothing narrower for tables that it cannot read
        raise ValueError(f"Got {path}, which is damaged ({error}); need it whole.") from error


def to_sentencepiece(folder: Path) -> bytes:
    """The serialised SentencePiece model of a folder's tokenizer.json.

    Args:
        folder: With tokenizer.json.

    Raises:
        ValueError: there is none, or it is not of the kind that `to_fast_tokenizer` makes.
    """
    from sentencepiece import sentencepiece_model_pb2

    format: Any = sentencepiece_model_pb2
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"Got {folder} without tokenizer.json; need a folder with a tokenizer; name that.")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = [(piece, float(score)) for piece, score in held["model"]["vocab"]]
        if wrong := [one for one in vocabulary if not isinstance(one[0], str) or not math.isfinite(one[1])]:
            raise TypeError(f"{wrong[0]!r} is no text with a finite score")
        "".join(piece for piece, _ in vocabulary).encode()  # half a character cannot be
        steps = held["normalizer"]["normalizers"]
        charsmap = base64.b64decode(next(one["precompiled_charsmap"] for one in steps if one["type"] == "Precompiled"))
        is_ours = held["model"]["type"] == "Unigram" and held["model"]["byte_fallback"]
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"Got {path}, no tokenizer of ours ({type(error).__name__}: {error}); need one.") from error
    if not is_ours or tuple(piece for piece, _ in vocabulary[: len(SPECIAL)]) != SPECIAL:
        raise ValueError(f"Got {path}, no unigram model with bytes and the control tokens first; need one of ours.")
    proto, kinds = format.ModelProto(), format.ModelProto.SentencePiece
    for number, (piece, score) in enumerate(vocabulary):
        is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        kind = kinds.UNKNOWN if piece == UNK else kinds.CONTROL if number < len(SPECIAL) else kinds.NORMAL
        proto.pieces.add(piece=piece, score=0.0 if is_byte else score, type=kinds.BYTE if is_byte else kind)
    proto.trainer_spec.model_type = format.TrainerSpec.UNIGRAM
    proto.trainer_spec.vocab_size = len(vocabulary)
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.control_symbols.extend(CONTROL_TOKENS.values())
    for name, piece in (("pad", PAD), ("bos", BOS), ("eos", EOS), ("unk", UNK)):
        setattr(proto.trainer_spec, f"{name}_id", SPECIAL.index(piece))
        setattr(proto.trainer_spec, f"{name}_piece", piece)
    proto.normalizer_spec.name = "nmt_nfkc"
    proto.normalizer_spec.precompiled_charsmap = charsmap
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = True
    proto.normalizer_spec.escape_whitespaces = True
    return proto.SerializeToString()
