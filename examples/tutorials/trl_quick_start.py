"""The quick start of TRL's ORPO page.  Only the import line and the names of model and dataset differ from the page.

python examples/tutorials/trl_quick_start.py MODEL DATASET OUTPUT
accelerate launch examples/tutorials/trl_quick_start.py MODEL DATASET OUTPUT
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_plugins import ORPOConfig, ORPOTrainer

model_name, dataset_name, output = sys.argv[1:]

model = AutoModelForCausalLM.from_pretrained(model_name)
tokenizer = AutoTokenizer.from_pretrained(model_name)
train_dataset = load_dataset(dataset_name, split="train")  # chosen, rejected: message lists, the prompt inside both

training_args = ORPOConfig(output_dir=output, logging_steps=10)
trainer = ORPOTrainer(model=model, args=training_args, processing_class=tokenizer, train_dataset=train_dataset)
trainer.train()
