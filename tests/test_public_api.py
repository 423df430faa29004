"""What users may rely on, frozen: a change here is a change of the interface and goes into the changelog."""

import inspect
import subprocess
import sys

import polyrank
import polyrank.combine
from polyrank.mixture import MixtureLinear


def test_public_names():
    names = {
        name for name in vars(polyrank) if not name.startswith("_") and not inspect.ismodule(getattr(polyrank, name))
    }
    assert names == {"ASE", "METHODS", "Adapter", "LoRA", "Method", "MoORE", "MoORETopK", "MoRE", "adapt"}


def test_methods_by_name():
    names = """lora rslora dora pissa milora moslora melora multilora vb_lora adalora task_lora more mtl_lora moelora
    poly moore moore_topk ase c_lorae hydralora loramoe mola malora mode smora teamlora omoe conditional_mixlora moa
    mixlora emtal faded dropout fgmoe smola xlora same"""
    assert [*polyrank.METHODS] == names.split()


def test_combiners_by_name():
    names = """nash_mtl mgda pcgrad cagrad imtl_g aligned_mtl upgrad uniform uncertainty dwa rlw gls famo gradnorm
    achievement"""
    assert [*polyrank.combine.COMBINERS] == names.split()


def test_the_arguments_of_the_adapted_layer():
    """The core does not grow flags: a variant is another class."""
    assert list(inspect.signature(MixtureLinear.__init__).parameters) == [
        "self",
        "base",
        "experts",
        "router",
        "gate",
        "scale",
    ]


def test_import_brings_torch_and_little_else():
    """No transformers, no training, no command line on `import polyrank`."""
    heavy = ("transformers", "accelerate", "torchmetrics", "typer", "yaml", "rich")
    program = f"import sys, polyrank; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
