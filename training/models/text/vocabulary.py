"""The closed vocabulary that a small text encoder learns from captions.

A vocabulary is a tuple of words and, where captions have more words than it has room for, of pieces of words ("##ing" is
one that goes on a word): what is no word of it is put together from the longest pieces, left to right (WordPiece). So the
tuple alone is the tokenizer, and it travels with checkpoints, exports and engines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from longtake.training.models.text.words import INSIDE, tokens_of, words_of
from longtake.training.models.wan.prompts import CUT_PREFIX

MOST = 4096  # words that captions bring


def vocabulary_from_texts(texts: Iterable[str], most: int = MOST) -> tuple[str, ...]:
    """The words of `texts` and of the cut prefix, sorted; of more than `most`, the frequent ones, and pieces of the others.

    Only what a text is made of is in it, so that every row of an embedding is learnt.
    """
    counts = Counter(word for text in (*texts, CUT_PREFIX) for word in words_of(text))
    if len(counts) <= most:
        return tuple(sorted(counts))
    ids = {piece: i for i, piece in enumerate(pieces_of(counts, most))}
    longest = max(map(len, ids), default=0)
    used = {token for word in counts for token in tokens_of(word, ids, longest) or ()}
    return tuple(sorted(piece for piece, token in ids.items() if token in used))


def extended(vocabulary: Sequence[str], texts: Iterable[str], most: int = MOST) -> tuple[str, ...]:
    """`vocabulary`, its tokens where they were, with the words of `texts` that it cannot say behind them: `most` at most,
    beyond which pieces of the rarer ones take their places."""
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    longest = max(map(len, ids), default=0)
    counts = Counter(word for text in texts for word in words_of(text) if tokens_of(word, ids, longest) is None)
    new = sorted(counts) if len(counts) <= most else pieces_of(counts, most)
    return (*vocabulary, *(piece for piece in new if piece not in ids))


def pieces_of(counts: Mapping[str, int], most: int) -> list[str]:
    """`most` pieces of which every word is made, long ones for frequent words, as the library `tokenizers` finds them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    signs = sorted({sign for word in counts for sign in word})
    frequent = Counter({sign: 0 for sign in signs})
    for word, count in counts.items():
        frequent.update({sign: count for sign in word})
    kept = sorted(sorted(signs, key=lambda sign: -frequent[sign])[: most // 4])
    inside = [
        INSIDE + sign for sign in kept
    ]  # told beforehand, in order: the trainer's own order changes from run to run
    trainer = trainers.WordPieceTrainer(
        vocab_size=most, initial_alphabet=kept, limit_alphabet=len(kept), special_tokens=inside, show_progress=False
    )
    found = Tokenizer(models.WordPiece(unk_token="<unk>"))  # type: ignore[call-arg, arg-type, unused-ignore]
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment, unused-ignore]
    found.train_from_iterator((" ".join([word] * count) for word, count in sorted(counts.items())), trainer)
    return sorted(found.get_vocab())[:most]
