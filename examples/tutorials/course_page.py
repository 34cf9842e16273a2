"""A course page's program: `orpo_alpha`, `orpo_beta`, and a plain list as the dataset.

python examples/tutorials/course_page.py MODEL OUTPUT [MAX_STEPS]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_plugins import ORPOConfig, ORPOTrainer

model_name, output, *steps = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_name)
tokenizer = AutoTokenizer.from_pretrained(model_name)

dataset = [
    {
        "prompt": "What is machine learning?",
        "chosen": "A way to have a program find rules in examples, where nobody could write these rules down.",
        "rejected": "It is when machines learn.",
    },
    {
        "prompt": "How do I reset my password?",
        "chosen": "Open the sign-in page, choose 'Forgot password', and follow the link in the mail that arrives.",
        "rejected": "Please contact support.",
    },
]

orpo_config = ORPOConfig(
    output_dir=output,
    learning_rate=1e-5,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    max_steps=int(steps[0]) if steps else 1000,
    orpo_alpha=1.0,  # strength of preference optimization
    orpo_beta=0.1,  # temperature of the odds ratio
)
trainer = ORPOTrainer(model=model, args=orpo_config, train_dataset=dataset, tokenizer=tokenizer)
trainer.train()
