"""Load what was exported in a process that cannot import polyrank, and compare its outputs with those that are saved.

python without_polyrank.py FOLDER [FOLDER ...]      each with export/, base/, given.safetensors: inputs and outputs
"""

import json
import sys
from pathlib import Path

sys.modules["polyrank"] = None  # an import of it raises

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


def outputs(model, inputs):
    with torch.no_grad():
        found = model.eval()(**inputs)
    return found.logits if "logits" in found else found.last_hidden_state


def main() -> None:
    worst = {}
    for folder in map(Path, sys.argv[1:]):
        given = load_file(folder / "given.safetensors")
        inputs = {key.removeprefix("input."): value for key, value in given.items() if key.startswith("input.")}
        kind = getattr(transformers, json.loads((folder / "base" / "config.json").read_text())["architectures"][0])
        if (folder / "export" / "adapter_config.json").exists():
            import peft

            model = peft.PeftModel.from_pretrained(kind.from_pretrained(folder / "base"), folder / "export")
        else:
            model = kind.from_pretrained(folder / "export")
        y = outputs(model, inputs)
        worst[folder.name] = float((y - given["output"]).abs().max() / max(1.0, float(given["output"].abs().max())))
    print(json.dumps(worst))


main()
