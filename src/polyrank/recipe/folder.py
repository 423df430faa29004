"""A run folder: what may stand in it, and that one run at a time writes there.

RUN/recipe.yaml  bank/  metrics.jsonl  checkpoints/  adapter/  heads/  forgetting.json  results.json

The last says: complete.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from polyrank.checkpoint import FOLDER as CHECKPOINTS, checkpoints
from polyrank.recipe.reading import RecipeError, read_recipe, write_recipe
from polyrank.recipe.schema import Recipe
from polyrank.training import HARMLESS, TRACKERS

# "complete" goes first
BANK = "bank"  # what each task was trained with alone, for a method that mixes the results
FORGETTING = "forgetting.json"  # of tasks in sequence
FILES = ("results.json", "recipe.yaml", "metrics.jsonl", CHECKPOINTS, BANK, "adapter", "heads", TRACKERS, FORGETTING)
LOCK = ".lock"


def check_folder(folder: Path, overwrite: bool, resume: bool) -> None:
    """Refuse, before any work, a folder that holds results, an unfinished run, or something that is no run.

    Raises:
        RecipeError: with the cure.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or any(
        entry.name not in FILES for entry in folder.iterdir() if not entry.name.startswith(".")
    ):
        raise RecipeError(f"{folder} exists and is no run folder: choose another with --out")
    if overwrite or resume:
        return
    if (folder / "results.json").exists():
        raise RecipeError(
            f"{folder} already holds a finished run: choose another with --out, or replace it with --overwrite"
        )
    if saved := checkpoints(folder):
        raise RecipeError(
            f"{folder} holds an unfinished run, saved at step {saved[-1][0]}: go on with --resume, choose another "
            "folder with --out, or replace it with --overwrite"
        )
    if (folder / BANK).exists():
        raise RecipeError(
            f"{folder} holds an unfinished run, whose tasks are being trained alone first: go on with --resume, choose "
            "another folder with --out, or replace it with --overwrite"
        )


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder is this process's own meanwhile; one that was made for it and stayed empty is removed again.

    Raises:
        RecipeError: another run is at work there, or the folder cannot be made.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(
            f"{folder}: another run is writing there: wait for it, or choose another with --out"
        ) from None
    except OSError as error:
        raise RecipeError(f"{folder} cannot be written: {error.strerror}: choose another folder with --out") from error
    try:
        yield
    finally:
        if made and all(entry.name == LOCK for entry in folder.iterdir()):
            (folder / LOCK).unlink(missing_ok=True)
            lock.release()
            for place in made:
                if any(place.iterdir()):
                    break
                place.rmdir()
        lock.release()


def check_same(recipe: Recipe, folder: Path) -> None:
    """A run goes on only with the recipe that it was started with.

    Raises:
        RecipeError: the first difference.
    """
    apart = {"out": True, "training": set(HARMLESS)}
    before, now = (one.model_dump(exclude=apart) for one in (read_recipe(folder / "recipe.yaml"), recipe))
    for key in before.keys() | now.keys():
        if before[key] != now[key]:
            raise RecipeError(
                f"{folder} was started with another {key}: go on with `polyrank train {folder / 'recipe.yaml'} "
                "--resume`, or start anew in another folder with --out"
            )


def start_folder(recipe: Recipe, folder: Path) -> None:
    """Empty the folder of an earlier run, and write the complete recipe: first, so that a full disk loses nothing."""
    write_recipe(recipe, folder / ".recipe.yaml")
    sweep(folder)
    for name in FILES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (folder / ".recipe.yaml").replace(folder / "recipe.yaml")


def sweep(folder: Path) -> None:
    """Remove what a killed process left aside; the folder is claimed."""
    for left in (*folder.glob(".*.part"), *folder.glob(".*.old")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
