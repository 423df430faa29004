"""The speed suite.

    OMP_NUM_THREADS=1 python -m benchmarks.speed docs/results

writes docs/results/speed_<processor>_<date>.md, .json and .svg; about half an hour on one core. `--only` takes
sections, and a page of the same day keeps what the others found; `--quick` takes fewer rounds and sizes, for a look.
"""

import argparse
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from . import layers, models, page
from .comparing import Findings

SECTIONS: dict[str, Callable[[Findings, bool], None]] = {
    "pairs": layers.pairs,
    "memory": layers.memory,
    "steps": models.six_layers,
    "dispatch": layers.rule,
    "growth": layers.growth,
    "real": models.real,
    "answers": models.answers,
    "merging": models.merging,
    "loading": models.loading,
    "grid": layers.grid,
    "compiled": models.compiled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the page goes; without it, it is printed")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=1, help="more than one: wall-clock time, on a quiet machine")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    found = Findings()
    for name in given.only:
        print(name, flush=True)
        SECTIONS[name](found, given.quick)
        if given.folder is not None:
            print(page.save(found, given.folder), flush=True)  # what is there is kept if a later section fails
    if given.folder is None:
        print(page.written(found, page.machine()))


if __name__ == "__main__":
    main()
