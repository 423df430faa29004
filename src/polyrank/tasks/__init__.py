"""Tasks: the data, the loss, the score and the head of each. They know nothing of adapters."""

from polyrank.tasks.base import (
    MISSING as MISSING,
    Prediction as Prediction,
    Row as Row,
    Task as Task,
    check_names as check_names,
)
from polyrank.tasks.examples import Examples as Examples, Label as Label, Text as Text, plain as plain, shown as shown
from polyrank.tasks.heads import (
    Classification as Classification,
    HeadTask as HeadTask,
    MultiLabel as MultiLabel,
    Regression as Regression,
)
from polyrank.tasks.language import (
    Generation as Generation,
    LanguageTask as LanguageTask,
    MultipleChoice as MultipleChoice,
)
from polyrank.tasks.words import TokenClassification as TokenClassification

KINDS: dict[str, type[Task]] = {
    task.kind: task
    for task in (Classification, MultiLabel, Regression, TokenClassification, Generation, MultipleChoice)
}
