"""The PEFT bridge: every method as one PEFT type, POLYRANK.

Importing this module registers the type; without it PEFT answers a saved adapter with ``KeyError: 'POLYRANK'``.

    import polyrank.peft
    model = peft.get_peft_model(model, polyrank.peft.PolyrankConfig(method="more", tasks=["news", "mood"]))
    model(**batch, task_id=task_id)

The layers, routes and files' frozen parts are Polyrank's own; here stands only what PEFT asks of a method: where the
weights lie so that its files hold them (``layer``), when they are put in and taken out (``model``), how a forward's
tasks reach them (``adapters``).
"""

from .adapters import Handle as Handle, handle as handle, on as on
from .config import PolyrankConfig as PolyrankConfig
from .layer import PolyrankLayer as PolyrankLayer
from .model import PolyrankModel as PolyrankModel
from .register import register as register

register(PolyrankConfig, PolyrankModel)
