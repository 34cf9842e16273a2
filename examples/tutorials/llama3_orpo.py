"""The article "Fine-tune Llama 3 with ORPO": QLoRA, evaluation, saving, and merging the adapter into the base model.

python examples/tutorials/llama3_orpo.py BASE_MODEL DATASET NEW_MODEL

The import line and the names of model and dataset differ from the article; in place of `push_to_hub` the merged
model is saved to NEW_MODEL-merged.
"""

import os
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from orpo_plugins import ORPOConfig, ORPOTrainer, setup_chat_format

if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8:
    attn_implementation, torch_dtype = "flash_attention_2", torch.bfloat16
else:
    attn_implementation, torch_dtype = "eager", torch.float16


def format_chat_template(row):
    """Both conversations as text, prompt included."""
    row["chosen"] = tokenizer.apply_chat_template(row["chosen"], tokenize=False)
    row["rejected"] = tokenizer.apply_chat_template(row["rejected"], tokenize=False)
    return row


if __name__ == "__main__":
    base_model, dataset_name, new_model = sys.argv[1:]

    bnb_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch_dtype,
        bnb_4bit_use_double_quant=True,
    )
    peft_config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=["up_proj", "down_proj", "gate_proj", "k_proj", "q_proj", "v_proj", "o_proj"],
    )
    tokenizer = AutoTokenizer.from_pretrained(base_model)  # a base model's: it has no chat template
    model = AutoModelForCausalLM.from_pretrained(
        base_model,
        quantization_config=bnb_config,
        device_map="auto",
        attn_implementation=attn_implementation,
    )
    model, tokenizer = setup_chat_format(model, tokenizer)
    model = prepare_model_for_kbit_training(model)

    dataset = load_dataset(dataset_name, split="all")  # chosen, rejected: message lists; prompt: string
    dataset = dataset.shuffle(seed=42).select(range(min(1000, len(dataset))))
    dataset = dataset.map(format_chat_template, num_proc=os.cpu_count())
    dataset = dataset.train_test_split(test_size=0.01)

    orpo_args = ORPOConfig(
        learning_rate=8e-6,
        beta=0.1,
        lr_scheduler_type="linear",
        max_length=1024,
        max_prompt_length=512,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=4,
        optim="paged_adamw_8bit",
        num_train_epochs=1,
        evaluation_strategy="steps",
        eval_steps=0.2,
        logging_steps=1,
        warmup_steps=10,
        report_to="wandb",
        output_dir="./results/",
    )
    trainer = ORPOTrainer(
        model=model,
        args=orpo_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        peft_config=peft_config,
        tokenizer=tokenizer,
    )
    trainer.train()
    trainer.save_model(new_model)

    # The adapter onto the base model in half precision.
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    model = AutoModelForCausalLM.from_pretrained(
        base_model,
        low_cpu_mem_usage=True,
        return_dict=True,
        torch_dtype=torch.float16,
        device_map="auto",
    )
    model, tokenizer = setup_chat_format(model, tokenizer)
    model = PeftModel.from_pretrained(model, new_model)
    model = model.merge_and_unload()
    model.save_pretrained(f"{new_model}-merged")
    tokenizer.save_pretrained(f"{new_model}-merged")
