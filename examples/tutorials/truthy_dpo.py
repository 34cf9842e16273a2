"""The Kaggle article on Llama 3, ORPO and truthy-dpo, with PEFT and bitsandbytes where it has Unsloth.

python examples/tutorials/truthy_dpo.py MODEL DATASET OUTPUT

Unsloth's `FastLanguageModel` is replaced by the calls that it stands for, and `PatchDPOTrainer()`, which patches a
class of TRL that is not involved here, is left out; docs/how-to/migrate.md says what was tried.
"""

import os
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from orpo_plugins import ORPOConfig, ORPOTrainer

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def format_chat_template(row):
    """The article's map: both answers become whole chats, while the prompt stays raw ("/n" is the article's)."""
    question = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["prompt"]}]
    chosen = [*question, {"role": "assistant", "content": row["chosen"]}]
    rejected = [*question, {"role": "assistant", "content": row["rejected"]}]
    prompt = row["system"] + "/n" + row["prompt"]
    row["chosen"] = tokenizer.apply_chat_template(chosen, tokenize=False)
    row["rejected"] = tokenizer.apply_chat_template(rejected, tokenize=False)
    row["prompt"] = prompt
    return row


if __name__ == "__main__":
    model_name, dataset_name, output = sys.argv[1:]

    tokenizer = AutoTokenizer.from_pretrained(model_name)
    dataset = load_dataset(dataset_name)  # columns: system, prompt, chosen, rejected (strings)
    dataset = dataset.map(format_chat_template, num_proc=os.cpu_count())

    model = AutoModelForCausalLM.from_pretrained(
        model_name, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=PROJECTIONS)
    )

    orpo_trainer = ORPOTrainer(
        model=model,
        train_dataset=dataset["train"],
        tokenizer=tokenizer,
        args=ORPOConfig(
            output_dir=output,
            max_prompt_length=512,
            max_length=1024,
            logging_steps=1,
            per_device_train_batch_size=2,
            remove_unused_columns=False,
            gradient_accumulation_steps=2,
            optim="paged_adamw_8bit",
            lr_scheduler_type="cosine",
            gradient_checkpointing=True,
            beta=0.1,
            num_train_epochs=1,
            fp16=torch.cuda.is_available(),  # the article writes True; half precision needs an accelerator
            do_eval=False,
        ),
    )
    orpo_trainer.train()
    orpo_trainer.save_model(output)
