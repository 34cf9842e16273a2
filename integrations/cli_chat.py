"""`orpo-plugins chat`: talk to a trained model in the terminal.

orpo-plugins chat --model_name_or_path OUTPUT        a model's folder or name, or the folder of an adapter

Each line is a message.  `clear` begins a new conversation; `exit` or the end of the input ends the program.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from orpo_plugins.data.chat_id_pairs import gives_chats_as_ids
from orpo_plugins.data.encoder_decoder_pairs import encoded_alone
from orpo_plugins.errors import ConfigError, missing_extra
from orpo_plugins.models.head import is_encoder_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_EMBEDDINGS = ("embed", "wte", "lm_head")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How answers are generated."""

    system: str | None = None
    """A system message that every conversation begins with."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 0.7
    """Temperature of sampling; 0 always takes the likeliest token."""
    top_p: float = 0.9
    """Samples only from the likeliest tokens whose probabilities sum up to this."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if self.temperature < 0:
            raise ConfigError(f"--temperature is {self.temperature}: it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top_p is {self.top_p}: it must be above 0 and at most 1")

    def generation(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {"max_new_tokens": self.max_new_tokens, **sampling}


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="orpo-plugins chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True, help="a model, or an adapter with its base model")
    parser.add_argument("--system", help="a system message that every conversation begins with")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer, in tokens (512)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token (0.7)")
    parser.add_argument("--top_p", type=float, default=0.9, help="share of probability that is sampled from (0.9)")
    parser.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16, float16")
    parser.add_argument("--device", help="cpu, cuda, ...; default: the accelerator where there is one")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow models that ship Python code")
    return parser


def main(arguments: list[str]) -> int:
    """Loads the model and answers until the input ends; returns the exit status."""
    given = make_parser().parse_args(arguments)
    options = ChatOptions(
        system=given.system,
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
    )
    model, tokenizer = load(
        given.model_name_or_path, dtype=given.dtype, device=given.device, trust_remote_code=given.trust_remote_code
    )
    try:
        chat(model, tokenizer, typed_lines(sys.stdin), options)
    except KeyboardInterrupt:
        print()
    return 0


def typed_lines(stream: TextIO) -> Iterator[str]:
    """Lines of a stream; prints `> ` before each one in a terminal."""
    while True:
        if stream.isatty():
            print("> ", end="", flush=True)
        line = stream.readline()
        if not line:
            return
        yield line


def load(
    name: str, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, "Tokenizer"]:
    """(model in eval mode on its device, tokenizer) from a model's name or folder, or from an adapter's folder.

    Raises `ConfigError` where no model is found under the name, `MissingExtraError` for an adapter without peft.
    """
    import torch

    from orpo_plugins.integrations import hf_tokenizer as text_tokenizer

    if device is None:
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    arguments = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = text_tokenizer.load(name, trust_remote_code=trust_remote_code)
        if (Path(name) / "adapter_config.json").is_file():
            model = _with_adapter(name, arguments)
        else:
            model = _base(name, arguments)
    except OSError as error:
        raise ConfigError(f"no model can be loaded from {name!r}: {error}") from error
    return model.to(device).eval(), tokenizer


def _base(name: str, arguments: dict[str, Any]) -> Any:
    """The model, in the class that its config asks for: as a causal LM, BART would lose its encoder silently."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(name, trust_remote_code=arguments["trust_remote_code"])
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(name, **arguments)


def _with_adapter(folder: str, arguments: dict[str, Any]) -> Any:
    """The base model with an adapter; its embeddings are resized to those saved with the adapter."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise missing_extra("peft", "peft") from error
    base = _base(str(PeftConfig.from_pretrained(folder).base_model_name_or_path), arguments)
    rows = _embeddings_in(folder)
    if rows and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)  # overwritten in the next line
    return PeftModel.from_pretrained(base, folder)


def _embeddings_in(folder: str) -> int:
    """The number of tokens of the embeddings that are saved with an adapter; 0 where none are."""
    from safetensors import safe_open

    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        return 0
    with safe_open(str(path), framework="pt") as tensors:
        names = [name for name in tensors.keys() if "lora_" not in name]  # noqa: SIM118  # it is no mapping
        return max(
            (tensors.get_slice(name).get_shape()[0] for name in names if any(part in name for part in _EMBEDDINGS)),
            default=0,
        )


def chat(
    model: Any,
    tokenizer: "Tokenizer",
    lines: Iterable[str],
    options: ChatOptions | None = None,
    *,
    output: TextIO | None = None,
) -> list[dict[str, str]]:
    """Answers each line, token by token, and returns the last conversation.

    Without a chat template each line is a text by itself, which the model continues.

    Args:
        model, tokenizer: a causal LM or encoder-decoder model of transformers and its tokenizer.
        lines: messages; `clear` and `exit` are commands, empty lines are skipped.
        options: how to generate.
        output: where answers are written; default: standard output.
    """
    options = ChatOptions() if options is None else options
    output = sys.stdout if output is None else output
    opening = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(opening)
    has_template = _has_chats(tokenizer)
    if not has_template:
        print("The tokenizer has no chat template: each line is continued as plain text.", file=output)
    for line in (text.strip() for text in lines):
        if line == "exit":
            break
        if line == "clear":
            messages = list(opening)
        elif line:
            messages = [*(messages if has_template else opening), {"role": "user", "content": line}]
            messages.append({"role": "assistant", "content": answer(model, tokenizer, messages, options, output)})
    return messages


def answer(
    model: Any, tokenizer: "Tokenizer", messages: list[dict[str, str]], options: ChatOptions, output: TextIO
) -> str:
    """The next message, written to `output` as it is generated."""
    import torch
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(text, end="\n" if stream_end else "", file=output, flush=True)

    encoder = is_encoder_decoder(model)
    known = _prompt(tokenizer, messages, encoder=encoder)
    ids = torch.tensor([known], device=model.device)
    with torch.no_grad():
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            eos_token_id=_ends(model, tokenizer),
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **options.generation(),
        )
    start = 0 if encoder else ids.shape[1]
    return str(tokenizer.decode(generated[0, start:], skip_special_tokens=True))


def _has_chats(tokenizer: "Tokenizer") -> bool:
    return tokenizer.chat_template is not None or gives_chats_as_ids(tokenizer)


def _prompt(tokenizer: "Tokenizer", messages: list[dict[str, str]], *, encoder: bool) -> list[int]:
    """The token ids that the model continues, made as in training."""
    if gives_chats_as_ids(tokenizer):
        said = [message for message in messages if message["content"]]  # mistral-common refuses an empty answer
        return list(tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False))
    if _has_chats(tokenizer):
        text: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    else:
        text = "\n".join(message["content"] for message in messages)
    if encoder:  # which reads the prompt as a text of its own
        return encoded_alone(tokenizer, [text])[0]
    # A chat template has written the special tokens already.
    return list(tokenizer(text, add_special_tokens=not _has_chats(tokenizer))["input_ids"])


def _ends(model: Any, tokenizer: "Tokenizer") -> list[int]:
    """Every token that ends an answer: the config of a base model may lack the end of a turn."""
    known = model.generation_config.eos_token_id
    own = known if isinstance(known, list) else [known]
    return sorted({token for token in [tokenizer.eos_token_id, *own] if token is not None})
