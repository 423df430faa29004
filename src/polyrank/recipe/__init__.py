"""Recipes: one YAML file says what a run is. Here and in the command line are the only names and the only YAML.

A recipe is read strictly: an unknown name, a wrong type or a repeated key is an error that names the file, the key, the
reason, the nearest valid name and the cure. Written back into the run folder, it is complete.
"""

from polyrank.recipe.loading import load_examples as load_examples, load_tasks as load_tasks
from polyrank.recipe.reading import (
    RecipeError as RecipeError,
    check_recipe as check_recipe,
    read_recipe as read_recipe,
    write_recipe as write_recipe,
)
from polyrank.recipe.runs import Run as Run, load_run as load_run, run as run
from polyrank.recipe.schema import Recipe as Recipe, TaskSource as TaskSource
