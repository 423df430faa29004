"""LoRAs that PEFT trained and saved, as the bank of a mixture."""

import json

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

import tiny
from polyrank import adapt
from polyrank.methods import MoA, TaskLoRA
from polyrank.recipe import RecipeError, load_run, read_recipe, run
from test_models import CONFIGS, batch
from test_recipe import save_examples

TASKS = ("a", "b")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers


def theirs(folder, family, seed, **fields):
    """A LoRA that PEFT saved, and what the model with it gives."""
    torch.manual_seed(0)
    model = CONFIGS[family]()
    config = LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **{"target_modules": ["query", "value"]} | fields)
    torch.manual_seed(seed)
    model = get_peft_model(model, config).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(**batch(family)).last_hidden_state


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 9}}]
)
def test_each_task_is_the_lora_that_peft_computes(fields, tmp_path):
    want = [theirs(tmp_path / task, "bert", seed, **fields) for seed, task in enumerate(TASKS, 1)]
    torch.manual_seed(0)
    model = CONFIGS["bert"]().eval()
    adapter = adapt(model, TaskLoRA(rank=4), tasks=TASKS, targets=["query", "key", "value"])  # key: no LoRA has it
    adapter.load_bank({task: tmp_path / task for task in TASKS})
    assert (want[0] - want[1]).abs().max() > 1e-2
    for task, y in zip(TASKS, want, strict=True):
        with torch.no_grad(), adapter.on(task):
            assert_close(model(**batch("bert")).last_hidden_state, y, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    theirs(tmp_path / "a", "bert", 1)
    torch.manual_seed(0)
    model = CONFIGS["bert"]()
    for method, targets, said in (
        (MoA(rank=4), ["query"], "leaves out"),
        (MoA(rank=2), ["query", "value"], "rank 3"),
    ):
        adapter = adapt(model, method, tasks=TASKS, targets=targets)
        before = {key: p.clone() for key, p in adapter.state_dict().items()}
        with pytest.raises(ValueError, match=said):
            adapter.load_bank({"a": tmp_path / "a"})
        assert_close(adapter.state_dict(), before, atol=0, rtol=0)
        adapter.remove()
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    adapter = adapt(model, MoA(rank=4), tasks=TASKS, targets=["query", "value"])
    with pytest.raises(ValueError, match="use_dora"):
        adapter.load_bank({"a": tmp_path / "a"})


def test_a_recipe_trains_the_router_over_a_bank_that_is_there(tmp_path):
    tiny.save_model(tmp_path / "model")
    for task in tiny.tasks(24):
        save_examples(tmp_path / f"{task.name}.jsonl", task.train)
    for seed, name in enumerate(("mood", "pet")):
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["query"], init_lora_weights=False)
        torch.manual_seed(seed)
        get_peft_model(tiny.backbone(), config).save_pretrained(tmp_path / f"{name}-lora")
    recipe = {
        "model": "model",
        "method": {"name": "xlora", "rank": 2},
        "targets": ["query", "value"],
        "tasks": [{"name": n, "train": f"{n}.jsonl"} for n in ("mood", "pet")],
        "bank": {n: f"{n}-lora" for n in ("mood", "pet")},
        "max_length": 16,
        "training": {"steps": 2, "batch_size": 8},
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    finished = run(read_recipe(tmp_path / "r.yaml"), progress=False)
    assert not (tmp_path / "run" / "bank").exists()
    state = load_run(finished.folder).adapter.state_dict()
    rows = [p for key, p in state.items() if ".query.experts.lora_B.rows." in key]
    assert rows and all(p.abs().max() > 0 for p in rows)
    assert all(not p.any() for key, p in state.items() if ".value.experts.lora_B.rows." in key)
    for change, said in (({"bank": {"mood": "mood-lora"}}, "name each once"), ({"method": "lora"}, "moa or xlora")):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe | change))
        with pytest.raises(RecipeError, match=said):
            read_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe | {"bank": {"mood": "mood-lora", "pet": "nowhere"}}))
    with pytest.raises(RecipeError, match="nowhere"):
        run(read_recipe(tmp_path / "r.yaml", [f"out={tmp_path / 'other'}"]), progress=False)
    assert not (tmp_path / "other").exists()
