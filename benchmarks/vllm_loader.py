"""Whether vLLM's own LoRA loader takes what polyrank exports: its Python files run on a CPU, no engine is started.

    pip download --no-deps vllm && unzip vllm-*.whl 'vllm/*.py' -d /somewhere      (or an environment that has vLLM)
    python benchmarks/vllm_loader.py --make exports                                 (with polyrank)
    python benchmarks/vllm_loader.py --vllm /somewhere exports/*                    (with vLLM's files)

The second command exports every method that is a LoRA from a tiny Llama; the third prints, for each folder, the rank,
the scaling and the layers that vLLM read, and compares B A with the tensors of the file.
"""

import argparse
import sys
from pathlib import Path


def make(folder: Path) -> None:
    import torch
    import transformers

    from polyrank import adapt
    from polyrank.methods import METHODS

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    settings = {"moore_topk": {"router": "task", "k": 6}, "vb_lora": {"vector_length": 4, "num_vectors": 100}}
    inputs = {"input_ids": torch.randint(3, 97, (2, 9))}
    for name, kind in METHODS.items():
        method = kind(**settings.get(name, {}))
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=97, **sizes)).eval()
        try:
            adapter = adapt(model, method, tasks=["a", "b"])
            with torch.no_grad():
                for p in adapter.parameters():
                    p.add_(0.1 * torch.randn_like(p))
            print(adapter.export(folder / name, "b", inputs=inputs).folder)
        except ValueError as error:
            print(f"{name}: no LoRA ({error})"[:120])


def read(folders: list[Path]) -> None:
    import torch
    from safetensors.torch import load_file
    from vllm.config.lora import LoRAConfig
    from vllm.lora import lora_model
    from vllm.lora.peft_helper import PEFTHelper

    lora_model.PIN_MEMORY = False  # there is no GPU to copy to

    ends = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for folder in folders:
        helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=2048)
        helper.validate_legal(LoRAConfig(max_lora_rank=helper.r))
        found = lora_model.LoRAModel.from_local_checkpoint(
            str(folder), ends, helper, lora_model_id=1, device="cpu", dtype=torch.float32
        )
        given = load_file(folder / "adapter_model.safetensors")
        for name, layer in found.loras.items():
            a, b = (given[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB")
            assert torch.equal(layer.lora_b @ layer.lora_a, b @ a), f"{folder}: {name} was read otherwise"
        print(f"{folder.name}: rank {helper.r}, scaling {helper.vllm_lora_scaling_factor}, {len(found.loras)} layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--make", type=Path, metavar="FOLDER")
    parser.add_argument("--vllm", type=Path, metavar="FOLDER", help="where vLLM's Python files are")
    given = parser.parse_args()
    if given.vllm is not None:
        sys.path.insert(0, str(given.vllm))
    if given.make is not None:
        make(given.make)
    if given.folders:
        read(given.folders)


main()
