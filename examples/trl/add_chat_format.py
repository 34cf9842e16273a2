"""Gives a base model ChatML, so that the command line can train it on conversations.

python examples/trl/add_chat_format.py build/demo/base build/trl/model
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_plugins import setup_chat_format


def main(source: str, target: str) -> None:
    """Reads `source` (name or path), adds template and tokens, saves to `target`."""
    model, tokenizer = setup_chat_format(
        AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
