"""What a finished run says: eval, predict, generate."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from polyrank.cli.app import RunFolder, app, as_recipe_errors, quiet_libraries, user_errors


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
        with as_recipe_errors():
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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest written answer, in tokens.")] = 64,
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
            with as_recipe_errors():
                answers = predict(loaded.model, asked, one.name, batch_size=size, max_new_tokens=max_new_tokens)
            for text, found in zip(asked, answers, strict=True):
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
        model, size = loaded.model, loaded.recipe.training.eval_batch_size
        if not isinstance(model, LanguageModel):
            raise RecipeError(f"{run} has tasks with heads, which write no text: ask it with polyrank predict {run}")
        sampling = {} if temperature is None else {"do_sample": True, "temperature": temperature}
        torch.manual_seed(seed)
        for one in chosen_tasks(loaded, task):
            ids = torch.full((len(prompts),), model.index(one.name))
            answers: list[str] = []
            for start in range(0, len(prompts), size):
                part = slice(start, start + size)
                with as_recipe_errors():
                    answers += model.generate(
                        prompts[part], ids[part], max_new_tokens=max_new_tokens, num_beams=beams, **sampling
                    )
            for prompt, answer in zip(prompts, answers, strict=True):
                entry = {"task": one.name, "prompt": prompt, "text": answer}
                typer.echo(json.dumps(entry, ensure_ascii=False) if as_json else f"[{one.name}] {answer}")
