"""Rewords errors and warnings for an Axolotl config: `layout='padded'` becomes `orpo_layout: padded`.

Messages of this package write options as in Python, `name='value'`, and give advice for Python programs.  Inside
`yaml_words()`, errors and log lines name the YAML keys instead.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator

from orpo_plugins.errors import ORPOError
from orpo_plugins.integrations.axolotl_arguments import KEYS

YAML_KEYS = {
    **{key.removeprefix("orpo_"): key for key in KEYS},
    "beta": "orpo_alpha",
    "max_length": "sequence_len",
    "attn_implementation": "attn_implementation",
    "modules_to_save": "lora_modules_to_save",
    "target_modules": "lora_target_modules",
}
"""The name of an option in messages: the YAML key that sets it."""
NESTED = {"output_router_logits": "overrides_of_model_config", "llm_int8_skip_modules": "bnb_config_kwargs"}
"""A setting of a model or of its quantization: the YAML key whose mapping holds it."""
_WORDS = {"True": "true", "False": "false", "None": "null"}

_VALUE = r"'[^']*'|True|False|None|-?\d[\w.+-]*|\[[^\]]*\]"
_ASSIGNED = re.compile(rf"(?<![\w.])({'|'.join([*YAML_KEYS, *NESTED])})=({_VALUE})")
_NAMED = re.compile(rf"(?<![\w.'=])({'|'.join(name for name in YAML_KEYS if '_' in name)})\b(?!=)")
# These are also everyday words; they are options only where a value follows.
_FOLLOWED = re.compile(r"\b(kernel|layout|beta)(?= '| is -?\d)")


def _assigned(found: re.Match[str]) -> str:
    name, value = found[1], _WORDS.get(found[2], found[2].replace("'", ""))
    return f"{NESTED[name]}: {{{name}: {value}}}" if name in NESTED else f"{YAML_KEYS[name]}: {value}"


def _fields(found: re.Match[str]) -> str:
    renames = re.findall(r"\('([^']*)', '([^']*)'\)", found[1])
    keys = ", ".join(f"field_{name}: {column}" for column, name in renames)
    return f"Set {keys} for this dataset."


_PHRASES: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"Did you mean dataset((?:\.rename_column\('[^']*', '[^']*'\))+)\?": _fields,
    r"If the prompt is in the answers: dataset\.remove_columns\((\[[^\]]*\])\)": (
        r"If the prompt is in the answers, take \1 out of the file"
    ),
    r"Make it a string \(dataset\.cast_column\([^()]*\('string'\)\), or str\(\.\.\.\) where rows are dicts\)": (
        "Make it a string in the file"
    ),
    r"or set template_strings=False": "or set orpo_template_strings: false, without type: chat_template",
    r"Rename columns, or register": "Name the columns with field_prompt, field_chosen, field_rejected or "
    "field_messages, or register",
    r"set tokenizer\.chat_template, or call model, tokenizer = orpo_plugins\.setup_chat_format\(model, tokenizer\) "
    r"first": "set chat_template, to chatml for one",
    r"set another tokenizer\.chat_template": "set another chat_template",
    r"([sS])et tokenizer\.eos_token to": r"\1et special_tokens: {eos_token: ...} to",
    r" of its vocabulary, or call (orpo_plugins\.setup_chat_format)?": " of its vocabulary",
    r"orpo_plugins\.setup_chat_format$": "",
    r"set tokenizer\.pad_token and eos_token": "set special_tokens: {pad_token: ..., eos_token: ...}",
    r"set model\.config\.router_aux_loss_coef": "set overrides_of_model_config: {router_aux_loss_coef: ...}",
    r"make it with ORPOCollator\(\.\.\., ([^()]*)\)": r"set \1",
}
"""Advice for Python programs, as a pattern: the advice for configs."""


def in_yaml(message: str) -> str:
    """The message with YAML keys instead of options, and with advice for a config."""
    for pattern, words in _PHRASES.items():
        message = re.sub(pattern, words, message)
    message = _ASSIGNED.sub(_assigned, message)
    return re.compile(f"{_NAMED.pattern}|{_FOLLOWED.pattern}").sub(lambda found: YAML_KEYS[found[0]], message)


class _InYaml(logging.Filter):
    """Rewords the text of records, but not their arguments, which may hold a user's text."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = in_yaml(str(record.msg))
        return True


_FILTER = _InYaml()


@contextlib.contextmanager
def yaml_words() -> Iterator[None]:
    """Rewords errors of this package that leave the block, and log lines inside of it.  Also a decorator."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("orpo_plugins.")]
    reworded = [logger for logger in map(logging.getLogger, names) if _FILTER not in logger.filters]
    for logger in reworded:
        logger.addFilter(_FILTER)
    try:
        yield
    except ORPOError as error:
        error.args = (in_yaml(str(error)), *error.args[1:])
        raise
    finally:
        for logger in reworded:
            logger.removeFilter(_FILTER)
