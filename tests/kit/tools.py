"""Rows in which tools are called, and chat templates for them."""

from typing import Any

from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.options import PairOptions
from tests.kit import tiny

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% for message in messages %}<|{{ message.role if message.role != 'tool' else 'user' }}|>"
    "{{ message.content }}{% for call in message.tool_calls or [] %}[{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}]{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Raises where a tool answers without having been called, and writes either a message's text or its calls.
STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('a tool answers without a call') }}{% endif %}<|{{ message.role }}|>"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}[{{ call.function.name }}]{% endfor %}"
    "{% else %}{{ message.content }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Writes what a tool answers into the turn that called it, before that turn's own text, as Gemma 4's does.
MERGED = (
    "{{ bos_token }}{% for message in messages %}{% if message.role != 'tool' %}<|{{ message.role }}|>"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}"
    "{% if message.tool_calls and not loop.last %}{{ messages[loop.index].content }}{% endif %}"
    "{{ message.content }}{% if not message.tool_calls %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Opens answers with an empty reasoning block, and keeps it only behind the last question, as Qwen 3.5's does.
REASONING = (
    "{{ bos_token }}{% set last = namespace(user=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    "<|{{ message.role if message.role != 'tool' else 'user' }}|>"
    "{% if message.role == 'assistant' and loop.index0 > last.user %}<none>{% endif %}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}{{ message.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|><none>{% endif %}"
)
TOOLS = [
    {"type": "function", "function": {"name": "order", "parameters": {"properties": {"parcel": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "refund", "parameters": {"properties": {"invoice": {"type": "number"}}}}},
]


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return turn(
        "assistant", None, tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}]
    )


# The answers are calls; the answers follow a tool's; the answers are a call, its result and a text.
ASKED = {
    "prompt": [turn("user", "order today")],
    "chosen": [call("order", parcel="desk")],
    "rejected": [call("refund", invoice=7)],
    "tools": TOOLS,
}
ANSWERED = {
    "prompt": [turn("user", "order today"), call("order", parcel="desk"), turn("tool", "parcel later", name="order")],
    "chosen": [turn("assistant", "gladly")],
    "rejected": [turn("assistant", "never")],
    "tools": TOOLS,
}
WHOLE = {
    "prompt": [turn("user", "order today")],
    "chosen": [call("order", parcel="desk"), turn("tool", "parcel later"), turn("assistant", "gladly")],
    "rejected": [call("refund", invoice=7), turn("tool", "never"), turn("assistant", "sorry")],
    "tools": TOOLS,
}


def texts(row: dict[str, Any], side: str = "chosen", template: str = TEMPLATE, **options: Any) -> tuple[str, str]:
    """(all of the text, what is labelled of it)."""
    tokenizer = tiny.tokenizer(template)
    dataset, _ = prepare_dataset([row], tokenizer, PairOptions(max_length=None, **options))
    labels = [label for label in dataset[0][f"{side}_labels"] if label != -100]
    return tokenizer.decode(dataset[0][f"{side}_input_ids"]), tokenizer.decode(labels)


def templated(row: dict[str, Any], side: str, template: str = TEMPLATE) -> str:
    messages = [{**message, "content": message["content"] or ""} for message in [*row["prompt"], *row[side]]]
    return str(tiny.tokenizer(template).apply_chat_template(messages, tools=row.get("tools"), tokenize=False))
