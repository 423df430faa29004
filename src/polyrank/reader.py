"""Readers: how texts become rows of tokens, and rows one padded batch, for each family of models.

A language reader finds where a prompt ends by the characters that each token stands for, in the text that prompt and
completion make together: tokens on the border are those that the model meets when it generates.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from polyrank.tasks import Row, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["left", "right"]
Encoded = tuple[list[int], list[int]]  # token ids, and token type ids or nothing, or the positions of words


OF_THE_BATCH = frozenset({"logits_to_keep"})  # inputs that are no rows of samples


class Reader(ABC):
    """A tokenizer, the most tokens of a text, and the side on which longer ones are cut."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_length: int, truncation: Side) -> None:
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.pad_id = _special(tokenizer.pad_token_id, "padding", "tokenizer.pad_token, for example to its eos_token")
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot tell which characters a token stands for: give a tokenizer with a "
                "tokenizer.json file"
            )

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The model's inputs (B, L)."""

    def length(self, row: Row) -> int:
        """Tokens that the model computes for a row."""
        return len(row.ids)

    def pad(self, rows: Sequence[Sequence[int | float]], fill: int, left: bool) -> Tensor:
        """(B, L), L the longest of them, at least 1."""
        width = max(1, *(len(row) for row in rows))
        out = torch.full((len(rows), width), fill)
        for k, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            out[k, place] = torch.tensor(row, dtype=torch.long)
        return out


class HeadReader(Reader):
    """For models with heads: texts, pairs and lists of words, padded on the right, so that positions begin at 0."""

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Of each text or pair of texts; of a pair that is too long, the longer part is cut."""
        out: list[Encoded] = [([], [])] * len(texts)
        for pairs in (False, True):  # a tokenizer takes a batch of one or of the other
            rows = [i for i, text in enumerate(texts) if isinstance(text, tuple) == pairs]
            if not rows:
                continue
            sides = [(texts[i][0], texts[i][1]) if pairs else (texts[i], "") for i in rows]
            firsts, seconds = ([str(side[k]) for side in sides] for k in (0, 1))
            self.tokenizer.truncation_side = self.truncation
            found = self.tokenizer(firsts, seconds if pairs else None, truncation=True, max_length=self.max_length)
            types = found.get("token_type_ids")
            for k, i in enumerate(rows):
                out[i] = (found["input_ids"][k], types[k] if pairs and types is not None else [])
        return out

    def encode_words(self, texts: Sequence[Text]) -> list[Encoded]:
        """Of each list of words: token ids, and the position of each word's first token, as far as words were kept.

        A word without a token of its own (a lone control character) takes the position before it.
        """
        if not texts:
            return []
        self.tokenizer.truncation_side = "right"
        joined = [" ".join(str(word) for word in words) for words in texts]
        found = self.tokenizer(joined, truncation=True, max_length=self.max_length, return_offsets_mapping=True)
        out = []
        for k, ids in enumerate(found["input_ids"]):
            owners = [i for i, word in enumerate(texts[k]) for _ in range(len(word) + 1)]  # of each character
            first: dict[int, int] = {}
            for position, (start, stop) in enumerate(found["offset_mapping"][k]):
                if stop > start:  # its last character tells: the first may be the blank before
                    first.setdefault(owners[stop - 1], position)
            kept = len(texts[k]) if len(ids) < self.max_length else max(first, default=-1) + 1
            marks: list[int] = []
            for word in range(kept):
                marks.append(first.get(word, marks[-1] if marks else 0))
            out.append((ids, marks))
        return out

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """input_ids, attention_mask; token_type_ids where a row is a pair; words (B, W), the
        positions of the words that are asked about, -1 where there is none."""
        inputs = {
            "input_ids": self.pad([row.ids for row in rows], self.pad_id, left=False),
            "attention_mask": self.pad([[1] * len(row.ids) for row in rows], 0, left=False),
        }
        if any(row.types for row in rows):
            inputs["token_type_ids"] = self.pad([row.types or [0] * len(row.ids) for row in rows], 0, left=False)
        if any(row.marks for row in rows):
            inputs["words"] = self.pad([row.marks for row in rows], -1, left=False)
        return inputs


class LanguageReader(Reader):
    """For language models: prompts with completions. A prompt too long is cut, a completion only where it must be."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_length: int, truncation: Side) -> None:
        super().__init__(tokenizer, max_length, truncation)
        self.end_id = _special(tokenizer.eos_token_id, "end-of-text", "tokenizer.eos_token")
        self.special = set(tokenizer.all_special_ids)

    @abstractmethod
    def rows(self, prompts: Sequence[Text], completions: Sequence[str | None], *, end: bool) -> list[Row]:
        """A row for each prompt; where there is a completion its tokens are the target, with the end token if `end`."""

    def written(self, prompt: Text, completion: str | None) -> tuple[str, str, bool]:
        """The prompt and the completion as the model reads them, and whether they are a rendered conversation.

        A space joins a prompt and its completion unless one of them has white space there. A conversation is written
        by the tokenizer's chat template, with the marks that end a turn in the completion.
        """
        if isinstance(prompt, str):
            head = prompt.rstrip()  # a blank at the border belongs to the token that follows it
            border = prompt[len(head) :]
            if not border and prompt and completion and not completion[0].isspace():
                border = " "
            return head, "" if completion is None else border + completion, False
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template, and the examples are conversations: give a model with one, or "
                "write prompts and completions"
            )
        turns = [{"role": str(role), "content": str(content)} for role, content in prompt]
        head = self._rendered(turns, add_generation_prompt=True)
        if completion is None:
            return head, "", True
        whole = self._rendered([*turns, {"role": "assistant", "content": completion}], add_generation_prompt=False)
        if not whole.startswith(head):
            raise ValueError(
                "the tokenizer's chat template writes a conversation otherwise once it is answered, so that its prompt "
                "cannot be told from its completion: write prompts and completions instead"
            )
        return head, whole[len(head) :], True

    def _rendered(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            written = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise ValueError(f"the tokenizer's chat template refuses turns of {roles}: {error}") from error
        return str(written)

    def cut(self, prompt: list[int], room: int) -> list[int]:
        """At most `room` tokens of a prompt; what begins every text, such as a begin token, stays."""
        if len(prompt) <= room:
            return prompt
        if self.truncation == "right":
            return prompt[:room]
        lead = next((i for i, token in enumerate(prompt) if token not in self.special), 0)
        return prompt[: min(lead, room)] + prompt[len(prompt) - max(0, room - lead) :]


class CausalReader(LanguageReader):
    """For decoders: the completion follows its prompt, padded on the left, so that all completions end together."""

    def rows(self, prompts: Sequence[Text], completions: Sequence[str | None], *, end: bool) -> list[Row]:
        written = [self.written(prompt, said) for prompt, said in zip(prompts, completions, strict=True)]
        out: list[Row | None] = [None] * len(written)
        for rendered in (False, True):
            chosen = [i for i, (_, _, chat) in enumerate(written) if chat == rendered]
            if not chosen:
                continue
            texts = [written[i][0] + written[i][1] for i in chosen]
            found = self.tokenizer(texts, add_special_tokens=not rendered, return_offsets_mapping=True)
            for k, i in enumerate(chosen):
                spans, border = found["offset_mapping"][k], len(written[i][0])
                ids = list(found["input_ids"][k])
                while len(ids) > 1 and spans[len(ids) - 1][0] == spans[len(ids) - 1][1]:
                    ids.pop()  # an end that the tokenizer adds by itself
                start = next((at for at, (_, stop) in enumerate(spans[: len(ids)]) if stop > border), len(ids))
                if completions[i] is None:
                    out[i] = Row(self.cut(ids, self.max_length))
                else:
                    out[i] = self._row(ids, max(start, 1), end)  # nothing can be said about the first token
        return [row for row in out if row is not None]

    def _row(self, ids: list[int], start: int, end: bool) -> Row:
        if end and self.end_id in ids[start:]:
            ids = ids[: ids.index(self.end_id, start) + 1]  # templates may write more after it
        elif end:
            ids = [*ids, self.end_id]
        target = ids[start:][: self.max_length - 1]
        prompt = self.cut(ids[:start], self.max_length - len(target))
        return Row(prompt + target, target, cut=len(target) < len(ids) - start)

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """input_ids, attention_mask, position_ids, prompt_mask (B, L); targets (B, K); logits_to_keep (K,).

        Logits are needed at the K positions before the last K tokens; `targets` says which of them have a label.
        """
        mask = self.pad([[1] * len(row.ids) for row in rows], 0, left=True)
        width, longest = mask.shape[1], max(1, *(len(row.target) for row in rows))
        prompts = self.pad(
            [[1] * (len(row.ids) - len(row.target)) + [0] * len(row.target) for row in rows], 0, left=True
        )
        targets = torch.tensor([[k >= longest - len(row.target) for k in range(longest)] for row in rows])
        return {
            "input_ids": self.pad([row.ids for row in rows], self.pad_id, left=True),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "prompt_mask": prompts,
            "targets": targets,
            "logits_to_keep": torch.arange(width - longest - 1, width - 1).clamp(min=0),
        }


class Seq2SeqReader(LanguageReader):
    """For encoder-decoders: the prompt goes into the encoder, the completion comes out of the decoder."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_length: int, truncation: Side, start_id: int) -> None:
        """start_id: the token that the decoder begins with."""
        super().__init__(tokenizer, max_length, truncation)
        self.start_id = start_id

    def length(self, row: Row) -> int:
        return len(row.ids) + len(row.target)

    def rows(self, prompts: Sequence[Text], completions: Sequence[str | None], *, end: bool) -> list[Row]:
        """With its end token, as the decoder was trained, whatever `end` says."""
        if not prompts:
            return []
        heads = [self.written(prompt, None)[0] for prompt in prompts]
        self.tokenizer.truncation_side = self.truncation
        ids = self.tokenizer(heads, truncation=True, max_length=self.max_length)["input_ids"]
        self.tokenizer.truncation_side = "right"
        said = [completion or "" for completion in completions]
        targets = self.tokenizer(text_target=said, truncation=True, max_length=self.max_length)["input_ids"]
        return [
            Row(source, [] if completion is None else target, cut=len(target) >= self.max_length)
            for source, target, completion in zip(ids, targets, completions, strict=True)
        ]

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """input_ids, attention_mask (B, L); decoder_input_ids, decoder_attention_mask, targets (B, K)."""
        targets = self.pad([[1] * len(row.target) for row in rows], 0, left=False)
        return {
            "input_ids": self.pad([row.ids for row in rows], self.pad_id, left=False),
            "attention_mask": self.pad([[1] * len(row.ids) for row in rows], 0, left=False),
            "decoder_input_ids": self.pad([[self.start_id, *row.target[:-1]] for row in rows], self.pad_id, left=False),
            "decoder_attention_mask": self.pad([[1] * max(1, len(row.target)) for row in rows], 0, left=False),
            "targets": targets.bool(),
        }


def _special(found: object, what: str, cure: str) -> int:
    if not isinstance(found, int):
        raise ValueError(f"the tokenizer has no {what} token: set {cure}, or write it into its tokenizer_config.json")
    return found
