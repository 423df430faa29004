"""Examples: what goes in and what should come out, before any tokenizer."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

# A text, a pair of texts, a list of words, a conversation ((role, content), ...), or (prompt, (option, ...)).
Text: TypeAlias = "str | tuple[Text, ...]"
# A label name, several, a tag for each word, a number, a completion, the index of an option; None where it is missing.
Label: TypeAlias = str | float | tuple[str, ...] | None


@dataclass(frozen=True)
class Examples:
    """Texts and their labels, in step; a label of None is missing and takes no part in losses or scores."""

    texts: Sequence[Text] = ()
    labels: Sequence[Label] = ()

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise ValueError(f"{len(self.texts)} texts but {len(self.labels)} labels: give one label for each text")

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Iterable[int]) -> "Examples":
        rows = list(rows)
        return Examples([self.texts[i] for i in rows], [self.labels[i] for i in rows])

    def labelled(self) -> "Examples":
        """Those whose label is not missing."""
        return self.select(i for i, label in enumerate(self.labels) if label is not None)

    def split(self, share: float) -> tuple["Examples", "Examples"]:
        """(the others, `share` of the different texts), by the SHA-256 of the text: equal texts stay together."""
        keys = [hashlib.sha256(plain(text).encode()).digest() for text in self.texts]
        ranked = sorted(set(keys))
        chosen = set(ranked[: round(share * len(ranked))])
        sides = ([i for i, key in enumerate(keys) if (key in chosen) == side] for side in (False, True))
        first, second = (self.select(rows) for rows in sides)
        return first, second

    def sample(self, size: int, seed: str) -> "Examples":
        """At most `size` of them, in their order."""
        if size >= len(self):
            return self
        return self.select(sorted(random.Random(seed).sample(range(len(self)), size)))


def plain(text: Text) -> str:
    """What two texts share that count as the same: without regard to case and white space."""
    return " ".join(text.casefold().split()) if isinstance(text, str) else "\0".join(plain(part) for part in text)


def shown(text: Text, size: int = 60) -> str:
    """A text on one line, for people: its parts with bars between them, cut at `size` characters."""

    def flat(text: Text) -> str:
        return " ".join(text.split()) if isinstance(text, str) else " | ".join(flat(part) for part in text)

    line = flat(text)
    return line if len(line) <= size else f"{line[: size - 3]}..."
