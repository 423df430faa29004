"""Polyrank inside the Trainer of transformers and TRL: the task of each row, losses, steps and checkpoints.

class MyTrainer(PolyrankTrainerMixin, Trainer): ...        # or Seq2SeqTrainer, or TRL's SFTTrainer
MyTrainer(model, args, adapter=adapter, train_dataset=rows)  # rows have a column "task"
"""

import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.19"):  # since then a Trainer says how it scales its loss
    raise ImportError(
        f"polyrank.hf needs transformers 5.19 or newer, this is {transformers.__version__}: "
        "pip install -U 'transformers>=5.19'"
    )

from .checkpoints import load_checkpoint as load_checkpoint
from .collator import TaskCollator as TaskCollator
from .trainer import PolyrankTrainerMixin as PolyrankTrainerMixin
