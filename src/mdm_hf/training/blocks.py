"""Long answers in blocks that fit the text canvas: what a model learns to write texts of any length from."""

from collections.abc import Callable


def split_text(text: str, size: int, count: Callable[[str], int]) -> list[str]:
    """`text` in pieces of at most `size` tokens, cut between words; a piece that is full is followed by another one.

    Args:
        count: Number of tokens of a word, as they are in the midst of a text.
    """
    pieces: list[list[str]] = [[]]
    room = size
    for word in text.split():
        needed = count(word)
        if needed > room and pieces[-1]:
            pieces.append([])
            room = size
        pieces[-1].append(word)
        room -= needed
    if room == 0:  # that it ends here needs a place to be said
        pieces.append([])
    return [" ".join(piece) for piece in pieces]


def in_blocks(messages: list[dict], split: Callable[[str], list[str]]) -> list[dict]:
    """The conversation with each answer of one long text as several messages, of a block each."""
    blocks: list[dict] = []
    for message in messages:
        parts = message["content"]
        is_text = message["role"] == "assistant" and len(parts) == 1 and parts[0]["type"] == "text"
        pieces = split(parts[0]["text"]) if is_text else []
        if len(pieces) < 2:
            blocks.append(message)
            continue
        for i, piece in enumerate(pieces):
            part = {"type": "text", "text": piece} | ({"continues": True} if i < len(pieces) - 1 else {})
            blocks.append({"role": "assistant", "content": [part]})
    return blocks
