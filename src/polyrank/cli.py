"""The command `polyrank`. Heavy imports stand inside the commands, so that the help comes at once."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="polyrank",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adapt one frozen pretrained model to many tasks at once with a mixture of low-rank experts.\n\n"
    "Start with [bold]polyrank quickstart[/]: six text tasks, five minutes on two CPU cores.",
)

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the recipe; may be repeated. Example: --set training.steps=50",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished run in the same folder.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]


@contextmanager
def user_errors() -> Iterator[None]:
    """A user's error is one message and exit code 2; training that diverged is 1, that signal n stopped 128 + n."""
    from polyrank.assets import AssetError
    from polyrank.checkpoint import CheckpointError, Interrupted
    from polyrank.recipe import RecipeError
    from polyrank.train import Diverged

    try:
        yield
    except (RecipeError, AssetError, CheckpointError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except Diverged as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except Interrupted as stop:
        typer.echo(f"{stop}; go on with: polyrank train {stop.folder / 'recipe.yaml'} --resume", err=True)
        raise typer.Exit(128 + stop.signum) from stop
    except KeyboardInterrupt as stop:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from stop


def quiet_libraries() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"polyrank {version('polyrank')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    method: Annotated[str, typer.Option(help="A name that `polyrank methods` lists.")] = "moore",
    seed: Annotated[int, typer.Option(min=0, help="Of the data samples, the adapter and the order.")] = 0,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Several seeds: also prints mean and deviation.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="Built-in name, folder, or hub name of an encoder.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: a new one in runs/.")] = None,
    settings: Settings = None,
    overwrite: Overwrite = False,
) -> None:
    """Adapt a small model to six text tasks and compare it with the frozen model.

    [bold]polyrank quickstart[/]

    [bold]polyrank quickstart --method more --set method.rank=16[/]

    [bold]polyrank quickstart --seeds 0,1,2[/]
    """
    with user_errors():
        from polyrank.quickstart import Choices, quickstart
        from polyrank.recipe import RecipeError

        parts = [part.strip() for part in (seeds or str(seed)).split(",")]
        if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
            raise RecipeError(
                f"--seeds {seeds!r}: write different whole numbers with commas, for example --seeds 0,1,2"
            )
        quiet_libraries()
        choices = Choices(method, model, steps, out, tuple(settings or ()))
        quickstart(choices, [int(part) for part in parts], Console(), overwrite=overwrite)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; runs keep theirs as RUN/recipe.yaml.")],
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: the recipe's.")] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Load everything, take a few steps, say what it would cost; write nothing."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest checkpoint in the folder, if there is one."),
    ] = False,
) -> None:
    """Train what a recipe describes, and write a run folder.

    A recipe needs a model, a method and tasks; everything else has a default:

    [dim]model: minilm[/]
    [dim]method: {name: moore}[/]
    [dim]tasks: \\[newsgroups, {name: mood, train: mood-train.csv, test: mood-test.csv}][/]
    [dim]out: runs/mine[/]

    [bold]polyrank train recipe.yaml --set method.name=more --set training.steps=200[/]

    [bold]polyrank train recipe.yaml --dry-run[/]

    Ctrl-C saves the state and stops; after that, or a power cut:

    [bold]polyrank train recipe.yaml --resume[/]
    """
    with user_errors():
        from polyrank.recipe import read_recipe, run
        from polyrank.recipe.card import show

        quiet_libraries()
        changed = read_recipe(recipe, settings or ())
        if out is None and resume and (recipe.parent / "metrics.jsonl").is_file():
            out = recipe.parent  # the recipe of a run folder goes on there, whatever the working directory
        if out is not None:
            changed = changed.model_copy(update={"out": str(out)})
        console = Console()
        if dry_run:
            from polyrank.recipe.plan import lines, plan

            console.print("\n".join(lines(plan(changed))), highlight=False, markup=False, soft_wrap=True)
            return
        finished = run(changed, overwrite=overwrite, resume=resume, progress=console.is_terminal)
        show(finished, console)


@app.command()
def init(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Your .jsonl and .csv files, or folders that hold them.")
    ],
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe from your files; asks nothing, and says what it guessed.

    mood-train.jsonl and mood-test.jsonl make one task; a file alone is tested on a fifth of its texts.

    [bold]polyrank init my-data/[/]
    """
    with user_errors():
        from polyrank.recipe import RecipeError, read_recipe
        from polyrank.recipe.init import propose

        if out.exists():
            raise RecipeError(f"{out} exists: choose another name with --out, or move it away")
        text, said = propose(files, out.parent)
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"{out} cannot be written: {error.strerror}") from error
        read_recipe(out)
        for line in said:
            typer.echo(line)
        typer.echo(f"wrote {out}; next: polyrank train {out} --dry-run")


@app.command("eval")
def evaluate(run: RunFolder, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Score a run again, from its files, on the test examples of its recipe.

    [bold]polyrank eval runs/quickstart-moore[/]
    """
    with user_errors():
        from rich.table import Table

        from polyrank.evaluate import evaluate, mean
        from polyrank.recipe import load_run, load_tasks

        quiet_libraries()
        loaded = load_run(run)
        console = Console()
        tests = {task.name: task.test for task in load_tasks(loaded.recipe).tasks}
        size = loaded.recipe.training.eval_batch_size
        scores = evaluate(loaded.model, tests, batch_size=size, progress=console.is_terminal)
        metrics = {task.name: task.metric for task in loaded.model.tasks}
        if as_json:
            typer.echo(json.dumps({"tasks": scores, "metrics": metrics, "mean": mean(scores)}))
            return
        table = Table("task", "metric", "score, %")
        for name, value in [*scores.items(), ("mean", mean(scores))]:
            table.add_row(name, metrics.get(name, ""), f"{100 * value:.1f}")
        console.print(table)


Texts = Annotated[
    list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; without any, lines from standard input.")
]
OneTask = Annotated[str | None, typer.Option(help="One task; default: every task of the run.")]
TextFile = Annotated[
    Path | None, typer.Option(help="A file with one text per line, or a .jsonl, .csv or .parquet file of rows.")
]


@app.command()
def predict(
    run: RunFolder,
    texts: Texts = None,
    task: OneTask = None,
    file: TextFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per answer, with all probabilities.")
    ] = False,
) -> None:
    """Let a run answer: labels, numbers, tags, options, or generated text, as each task has it.

    [bold]polyrank predict runs/quickstart-moore --task movies "A quiet, wonderful film."[/]

    [bold]cat headlines.txt | polyrank predict runs/quickstart-moore --task sarcasm --json[/]

    Rows of a data file are read by the columns of the run's recipe, and a line is put into its template. Tabs stand
    between the two texts of a pair, and between a question and its options.
    """
    with user_errors():
        from polyrank.evaluate import predict
        from polyrank.recipe import load_run
        from polyrank.recipe.asking import as_texts, chosen_tasks, read_questions, shows_probability
        from polyrank.tasks import shown

        quiet_libraries()
        questions = read_questions(texts or [], file)
        loaded = load_run(run)
        size = loaded.recipe.training.eval_batch_size
        everything = [(one, as_texts(loaded, one, questions)) for one in chosen_tasks(loaded, task)]
        for one, asked in everything:
            for text, found in zip(asked, predict(loaded.model, asked, one.name, batch_size=size), strict=True):
                if as_json:
                    entry = {"task": one.name, "text": text, "answer": found.answer}
                    entry |= {"probabilities": found.probabilities} if found.probabilities else {}
                    typer.echo(json.dumps(entry, ensure_ascii=False))
                    continue
                answer = found.answer
                said = " ".join(map(str, answer)) if isinstance(answer, tuple) else shown(str(answer), 10_000)
                sure = [f"{found.probabilities[str(answer)]:.3f}"] if shows_probability(one) else []
                typer.echo("\t".join([one.name, said, *sure, shown(text, 10_000)]))


@app.command()
def generate(
    run: RunFolder,
    texts: Texts = None,
    task: OneTask = None,
    file: TextFile = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    beams: Annotated[int, typer.Option(min=1, help="Width of the beam search; 1 is greedy.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help="Sample at this temperature instead of searching.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per answer.")] = False,
) -> None:
    """Let a run of a language model write after a prompt, as it stands, under one task or under each.

    [bold]polyrank generate runs/mine --task summary "A long text ..." --beams 4[/]

    [bold]polyrank generate runs/mine "Once upon a time" --temperature 0.8[/]
    """
    with user_errors():
        import torch

        from polyrank.models import LanguageModel
        from polyrank.recipe import RecipeError, load_run
        from polyrank.recipe.asking import chosen_tasks, read_questions

        quiet_libraries()
        prompts = [text for text in read_questions(texts or [], file) if isinstance(text, str)]
        if not prompts:
            raise RecipeError("generate takes plain texts; rows of a data file go to: polyrank predict RUN --file FILE")
        loaded = load_run(run)
        model = loaded.model
        if not isinstance(model, LanguageModel):
            raise RecipeError(f"{run} has tasks with heads, which write no text: ask it with polyrank predict {run}")
        sampling = {} if temperature is None else {"do_sample": True, "temperature": temperature}
        torch.manual_seed(seed)
        for one in chosen_tasks(loaded, task):
            ids = torch.full((len(prompts),), model.index(one.name))
            answers = model.generate(prompts, ids, max_new_tokens=max_new_tokens, num_beams=beams, **sampling)
            for prompt, answer in zip(prompts, answers, strict=True):
                entry = {"task": one.name, "prompt": prompt, "text": answer}
                typer.echo(json.dumps(entry, ensure_ascii=False) if as_json else f"[{one.name}] {answer}")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, with which editors complete and check them.

    [bold]polyrank schema > recipe.schema.json[/]

    then, as the first line of a recipe:

    [dim]# yaml-language-server: $schema=recipe.schema.json[/]
    """
    from polyrank.recipe.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method, with its whole header.")] = None) -> None:
    """List the methods, their papers and their fields with defaults.

    [bold]polyrank methods moore[/]
    """
    with user_errors():
        from inspect import signature

        from rich.table import Table

        from polyrank.methods import METHODS
        from polyrank.recipe import RecipeError
        from polyrank.recipe.schema import nearest

        if name is not None and name not in METHODS:
            raise RecipeError(f"unknown method {name!r}{nearest(name, METHODS)}")
        if name is not None:
            typer.echo((sys.modules[METHODS[name].__module__].__doc__ or "").strip() + "\n")
        table = Table("method", "paper", "fields and defaults", show_lines=True)
        for key, kind in METHODS.items() if name is None else [(name, METHODS[name])]:
            title = (sys.modules[kind.__module__].__doc__ or key).strip().splitlines()[0]
            table.add_row(key, title, "\n".join(str(field) for field in signature(kind).parameters.values()))
        Console().print(table, markup=False)


def main() -> None:
    """The entry point of the command."""
    app()
