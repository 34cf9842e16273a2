"""ORPO with a stock transformers.Trainer.

python examples/demo/prepare.py --model tiny       # a tiny model, in build/demo/base
python examples/trainer/stock_trainer.py           # any causal LM: --model <name or path>
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from orpo_plugins import ORPOCollator, ORPOLoss, fuse_head, setup_chat_format

DEMO = Path(__file__).parents[1] / "demo"


def main() -> None:
    """Trains on the demo's customer-service answers and reports how often the better one is preferred."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/demo/base")
    parser.add_argument("--output_dir", default="build/stock_trainer")
    parser.add_argument("--max_steps", type=int, default=60)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    if tokenizer.chat_template is None:
        model, tokenizer = setup_chat_format(model, tokenizer)
    data = load_dataset("json", data_files={"train": str(DEMO / "train.jsonl"), "test": str(DEMO / "held_out.jsonl")})
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=20,
            remove_unused_columns=False,
            report_to="none",
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=ORPOCollator(tokenizer, max_length=1024),
        compute_loss_func=ORPOLoss(beta=0.1),
    )
    fuse_head(trainer)  # no logits in memory, exact pair weights, ORPO's metrics
    trainer.train()
    print(f"the better answer is preferred in {trainer.evaluate()['eval_rewards/accuracies']:.0%} of held-out pairs")


if __name__ == "__main__":
    main()
