"""What one forward knows: which task each sample belongs to, which tokens count, and what the layers leave behind."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

NO_TASK = (
    "this method routes by task and none was given: call the model with task_ids=<LongTensor (B,)>, or wrap the call "
    "in `with adapter.on('task'):` (in a PEFT model task_id=, and polyrank.peft.on(model, 'task'))"
)

Note = tuple[str, Tensor]  # layer name, what it left


@dataclass
class Route:
    """What one forward knows: tasks, masks, and the notes of its layers."""

    task_ids: Tensor | None = None  # (B,), or (B, L) where requests are flattened into rows
    task: int | None = None  # the one task of all samples, where that is known without waiting for the device
    batch: int | None = None  # samples in this forward; None outside the root's forward
    masks: dict[str, Tensor | None] = field(default_factory=dict)  # stream -> (B, L), nonzero where a token counts
    notes: dict[str, list[Note]] = field(default_factory=dict)  # kind -> notes, in the order of the layers
    prompt: dict[str, Tensor] | None = None  # layer name -> pooled prompt (B, I); kept for decoding within on()
    continues: bool = False  # a decoding step: the prompt is in the cache, not in this forward
    modality_ids: Tensor | None = None  # (B, L): which kind of token (text, image, ...) each one is
    once: dict[str, Tensor] = field(default_factory=dict)  # what is computed once for all layers of this forward
    heard: bool = True  # whether its layers leave notes and count; not where another forward of these samples does

    def ids(self, x: Tensor, layer: str = "") -> Tensor:
        """Task ids that broadcast over the leading dimensions of ``x`` (..., I), the input of a layer.

        Ids are one per sample. Where the model folded more into dimension 0 (windows, beams, returned sequences) each
        id is repeated by the integer ratio.

        Raises:
            ValueError: no task was given, or the sizes do not fit.
        """
        if self.task_ids is None:
            raise ValueError(NO_TASK)
        ids, leading = _beside(self.task_ids, x), x.shape[:-1]
        if ids.ndim == 2:
            if ids.shape != leading:
                raise ValueError(
                    f"task_ids {tuple(ids.shape)} are one per token, but the layer's tokens are {tuple(leading)}"
                )
            return ids
        if len(leading) == 0 or leading[0] % len(ids):
            raise ValueError(
                f"{layer}: {len(ids)} task_ids do not fit a layer input of shape {tuple(x.shape)}: its first dimension "
                "must be the batch, or a multiple of it (windows, beams); give one id per sample, and leave out layers "
                "that read something else, such as a table of positions"
            )
        if leading[0] != len(ids):
            ids = ids.repeat_interleave(leading[0] // len(ids))
        return ids.view(-1, *[1] * (len(leading) - 1))

    def mask(self, x: Tensor, stream: str) -> Tensor | None:
        """The mask (B, L) over the tokens of ``x`` (B, L, I), or None where every token counts."""
        if stream not in self.masks:
            raise ValueError(
                "a router or loss that pools tokens ran outside the model's own forward and does not know the padding: "
                "use adapter.on(task, attention_mask=mask)"
            )
        mask = self.masks[stream]
        if mask is None:
            return None
        tokens = x.numel() // x.shape[-1]
        if tokens == self.batch:  # one token a sample (a pooled vector, a decoding step): nothing of it is padding
            return None
        if mask.ndim != 2 or mask.numel() != tokens:
            raise ValueError(
                f"the {stream} mask has shape {tuple(mask.shape)}, but the layer sees {tokens} tokens in an input of "
                f"shape {tuple(x.shape)}: pooling needs one (B, L) mask entry per token"
            )
        return mask

    def modalities(self, x: Tensor, layer: str = "") -> Tensor:
        """The modality of each token of ``x`` (B, L, I): ids (B, L).

        Raises:
            ValueError: none were given, or the sizes do not fit.
        """
        ids = self.modality_ids
        if ids is None:
            raise ValueError(
                f"{layer}: this method tells modalities apart and none were given: set its modalities to 0, or call "
                "the model with modality_ids=<LongTensor (B, L)>, one id for each token"
            )
        if ids.shape != x.shape[:-1]:
            raise ValueError(
                f"{layer}: modality_ids {tuple(ids.shape)} do not fit a layer that reads {tuple(x.shape[:-1])} tokens: "
                "give one id for each token (B, L), and leave out layers that read something else, such as a pooler, "
                "with exclude="
            )
        return _beside(ids, x)

    def pool(self, x: Tensor, stream: str) -> Tensor:
        """Masked mean (B, I) over the tokens of each sample of ``x`` (..., I). A sample without a token gives 0."""
        mask = self.mask(x, stream)
        if self.task_ids is not None and self.task_ids.ndim == 2:
            raise ValueError(
                "ids of each token flatten several requests into a row: a router or loss that pools cannot"
            )
        batch = self.batch if self.batch is not None else (len(mask) if mask is not None else x.shape[0])
        if x.shape[0] % batch:
            raise ValueError(
                f"a batch of {batch} does not fit a layer input of shape {tuple(x.shape)}: cannot pool by sample"
            )
        rows = x.reshape(batch, -1, x.shape[-1])  # (B, L, I): windows of a sample stand together
        if mask is None:
            return rows.mean(1)
        weights = mask.reshape(batch, 1, -1).to(x.device, torch.float32)
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1)
        return torch.bmm(weights.to(x.dtype), rows).squeeze(1)  # no tokens x width temporary


def _beside(ids: Tensor, x: Tensor) -> Tensor:
    """ids on the device of x. Those that come from the host need not wait for the device; the other way they must."""
    return ids.to(x.device, non_blocking=x.device.type != "cpu")
