"""A type of our own in PEFT.

PEFT's types are an enum, and ``register_peft_method`` refuses a name that is not in it. A member is added in place: of
the ways that were tried it is the one that works from PEFT 0.18 on, saving included.
"""

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "POLYRANK"
PREFIX = "polyrank_"  # of everything of ours in a model; PEFT up to 0.20 finds an adapter's weights by it


def register(config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Make the type known to PEFT. A second call, as after a reload of the module, puts the new classes in.

    Raises:
        ImportError: PEFT, or another package, has a type of that name.
        RuntimeError: this Python's enums are made in another way.
    """
    if NAME not in PeftType.__members__:
        _extend(PeftType)
        register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model, prefix=PREFIX)
        return
    kind = PeftType(NAME)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if known is None or known.__module__ != config.__module__:
        raise ImportError(f"PEFT has a type {NAME} of its own ({known}): polyrank.peft cannot register beside it")
    PEFT_TYPE_TO_CONFIG_MAPPING[kind], PEFT_TYPE_TO_TUNER_MAPPING[kind] = config, model
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = PREFIX


def _extend(types: type[PeftType]) -> None:
    member = str.__new__(types, NAME)
    member._name_, member._value_ = NAME, NAME
    type.__setattr__(types, NAME, member)  # the enum's own refuses
    types._member_map_[NAME] = member
    types._member_names_.append(NAME)
    types._value2member_map_[NAME] = member
    if types(NAME) is not member or types[NAME] is not member or NAME not in list(types):
        raise RuntimeError(
            "this Python makes enums in another way, so that no type can be added to PEFT's: use polyrank.adapt, and "
            "report the versions of Python and PEFT"
        )
