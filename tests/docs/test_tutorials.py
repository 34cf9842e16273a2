"""The programs that people learn ORPO from run to their end, and do what they say."""

import ast
import importlib.util
import json
import runpy
import warnings
from pathlib import Path

import pytest
import torch

from tests.kit import tiny
from tests.kit import tutorial_programs as tutorials
from tests.kit.compare import assert_within
from tests.kit.training import trainer

pytestmark = pytest.mark.slow

DOCUMENTED = (
    "rewards/chosen rewards/rejected rewards/accuracies rewards/margins log_odds_chosen log_odds_ratio nll_loss "
    "logps/chosen logps/rejected logits/chosen logits/rejected"
)
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no")


# ---- TRL's page


def test_the_quick_start_of_trl_under_accelerate_launch(tmp_path: Path) -> None:
    model = tutorials.chat_model(tmp_path / "model")
    data = tutorials.dataset(tmp_path / "data", tutorials.conversations(32))
    said = tutorials.run(tmp_path, *ACCELERATE, str(tutorials.PROGRAMS / "trl_quick_start.py"), model, data, "out")
    assert "FutureWarning: " not in said
    logged = [entry for entry in tutorials.log_of(tmp_path / "out") if "loss" in entry]
    assert logged[0]["step"] == 10
    assert set(DOCUMENTED.split()) <= set(logged[0])


def test_the_flags_of_trls_example_script(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    model = tutorials.chat_model(tmp_path / "model")
    data = tutorials.dataset(tmp_path / "data", tutorials.conversations(32))
    flags = ["--model_name_or_path", model, "--dataset_name", data, "--num_train_epochs", "1", "--logging_steps", "2"]
    flags += ["--max_prompt_length", "64", "--eval_strategy", "steps", "--report_to", "none", "--output_dir", "out"]
    flags += ["--use_peft", "--lora_r", "4", "--load_in_4bit"]
    tutorials.run(tmp_path, *ACCELERATE, str(tutorials.PROGRAMS / "trl_script.py"), *flags)
    log = tutorials.log_of(tmp_path / "out")
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 4]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


def test_a_mixture_of_experts_adds_and_logs_its_routers_loss(tmp_path: Path) -> None:
    trained = trainer(tmp_path, model=tiny.mixture_of_experts(), max_steps=1)
    trained.train()
    metrics = next(entry for entry in trained.state.log_history if "loss" in entry)
    whole = metrics["nll_loss"] - 0.1 * metrics["log_odds_ratio"] + 0.02 * metrics["aux_loss"]
    assert_within(metrics["loss"], whole, 1e-5, "loss")


# ---- the Kaggle article

TRUTHY = [
    {
        "system": "please",
        "prompt": row["prompt"],
        "chosen": row["chosen"].strip(),
        "rejected": row["rejected"].strip(),
    }
    for row in tiny.rows(8)
]


def test_the_kaggle_article(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    model = tutorials.chat_model(tmp_path / "model")
    data = tutorials.dataset(tmp_path / "data", TRUTHY)
    said = tutorials.run(tmp_path, str(tutorials.PROGRAMS / "truthy_dpo.py"), model, data, "out")
    assert "the answers of 8 rows contained the complete conversation, so their prompt column" in said
    assert "was left out and no prompt is trained twice" in said
    assert [entry["step"] for entry in tutorials.log_of(tmp_path / "out") if "loss" in entry] == [1, 2]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 16


def test_its_templated_rows_are_trained_as_the_conversations_that_they_were() -> None:
    pytest.importorskip("peft")
    from orpo_plugins.data.row_tokenizer import RowTokenizer
    from orpo_plugins.options import PairOptions

    tokenizer = tiny.tokenizer()
    article = runpy.run_path(str(tutorials.PROGRAMS / "truthy_dpo.py"), {"tokenizer": tokenizer})
    read = RowTokenizer(tokenizer, PairOptions(max_length=1024, max_prompt_length=512))
    for index, row in enumerate(TRUTHY):
        templated = read(article["format_chat_template"](dict(row)), index)
        question = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["prompt"]}]
        answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
        assert templated.pair == read({"prompt": question, **answers}, index).pair
        assert templated.repaired


# ---- "Fine-tune Llama 3 with ORPO"


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, what it said) of one run of the program."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("llama3")
    model = tutorials.base_model(folder / "base")
    rows = [{"prompt": row["chosen"][-2]["content"], **row} for row in tutorials.conversations(44)]
    data = tutorials.dataset(folder / "data", rows)
    program = tutorials.program("llama3_orpo.py", folder)
    return folder, tutorials.run(folder, program, model, data, "new")


def test_the_llama_3_article_translates_its_arguments(llama3: tuple[Path, str]) -> None:
    assert llama3[1].count("evaluation_strategy is now eval_strategy: eval_strategy='steps' is used") == 1


def test_the_llama_3_article_evaluates_at_shares_of_its_steps(llama3: tuple[Path, str]) -> None:
    log = tutorials.log_of(llama3[0] / "results")
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4, 6]  # 0.2 of 6 steps, rounded up
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_the_llama_3_article_reports_to_wandb(llama3: tuple[Path, str]) -> None:
    if not importlib.util.find_spec("wandb"):
        pytest.skip("wandb is not installed")
    assert list((llama3[0] / "wandb").glob("offline-run-*/*.wandb"))


def test_the_llama_3_article_saves_an_adapter_with_its_dropout_and_the_new_tokens(llama3: tuple[Path, str]) -> None:
    config = json.loads((llama3[0] / "new" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    assert "<|im_start|>" in (llama3[0] / "new" / "tokenizer.json").read_text()


def test_the_merged_model_has_the_adapter_models_log_probabilities(llama3: tuple[Path, str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from orpo_plugins import setup_chat_format

    folder = llama3[0]
    base, tokenizer = (cls.from_pretrained(folder / "base") for cls in (AutoModelForCausalLM, AutoTokenizer))
    model, tokenizer = setup_chat_format(base, tokenizer)
    adapted = PeftModel.from_pretrained(model.float(), folder / "new").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "new-merged", dtype=torch.float32).eval()
    messages = tutorials.conversations(1)[0]["chosen"]
    text = AutoTokenizer.from_pretrained(folder / "new-merged").apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected, found = (one(input_ids=ids).logits.log_softmax(-1) for one in (adapted, merged))
        with adapted.disable_adapter():
            without = adapted(input_ids=ids).logits.log_softmax(-1)
    assert_within(found, expected, 1e-3, "log-probabilities of the merged model")  # it was merged in fp16
    assert not torch.equal(without, expected)


# ---- the course page


def test_the_course_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tutorials.PROGRAMS / "course_page.py"
    model = tutorials.chat_model(tmp_path / "model")
    monkeypatch.setattr("sys.argv", [str(program), model, str(tmp_path / "out"), "3"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = runpy.run_path(str(program))["trainer"]
    told = [str(warning.message) for warning in said if "orpo_" in str(warning.message)]
    assert told == [
        "orpo_alpha is now beta: beta=1.0 is used",
        "orpo_beta is now odds_temperature: odds_temperature=0.1 is used",
    ]
    assert (run.orpo_options.beta, run.orpo_options.odds_temperature) == (1.0, 0.1)
    assert run.state.global_step == 3


# ---- all of them


def test_every_program_says_how_it_is_called() -> None:
    for path in tutorials.PROGRAMS.glob("*.py"):
        opening = ast.get_docstring(ast.parse(path.read_text()))
        assert opening is not None
        assert f"examples/tutorials/{path.name} " in opening
