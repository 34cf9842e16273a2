"""`orpo-plugins chat`: talk to a trained model in the terminal.

orpo-plugins chat --model_name_or_path OUTPUT        a model's folder or name, or the folder of an adapter
orpo-plugins chat --model_name_or_path OUTPUT --compare [BASE]        the base model's answers on the left

Each line is a message.  `clear` begins a new conversation; `exit` or the end of the input ends the program.
"""

import argparse
import io
import itertools
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A model that answers, and what it has heard and said."""

    model: Any
    tokenizer: "Tokenizer"
    while_answering: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered for each answer; the base of an adapter is the same model with the adapter switched off."""
    messages: list[dict[str, str]] = field(default_factory=list)

    def begin(self, options: ChatOptions) -> None:
        """Forgets the conversation."""
        self.messages[:] = [{"role": "system", "content": options.system}] if options.system else []

    def reply(self, line: str, options: ChatOptions, output: TextIO) -> str:
        """The answer to the next line, also written to `output` as it is generated."""
        if not _has_chats(self.tokenizer):  # each line is a text by itself
            self.begin(options)
        self.messages.append({"role": "user", "content": line})
        with self.while_answering():
            text = answer(self.model, self.tokenizer, self.messages, options, output)
        self.messages.append({"role": "assistant", "content": text})
        return text


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="orpo-plugins chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True, help="a model, or an adapter with its base model")
    parser.add_argument(
        "--compare",
        nargs="?",
        const="",
        metavar="BASE",
        help="show the base model's answers beside the others; an adapter knows its base, of any other model name it",
    )
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
    loading = {"dtype": given.dtype, "device": given.device, "trust_remote_code": given.trust_remote_code}
    model, tokenizer = load(given.model_name_or_path, **loading)
    lines = typed_lines(sys.stdin)
    try:
        if given.compare is None:
            chat(model, tokenizer, lines, options)
        else:
            tuned = Speaker(model=model, tokenizer=tokenizer)
            compare(base_of(tuned, given.compare, **loading), tuned, lines, options)
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
    speaker = Speaker(model=model, tokenizer=tokenizer)
    if not _has_chats(tokenizer):
        print("The tokenizer has no chat template: each line is continued as plain text.", file=output)
    for line in _messages(lines, [speaker], options):
        speaker.reply(line, options, output)
    return speaker.messages


def compare(
    base: Speaker,
    tuned: Speaker,
    lines: Iterable[str],
    options: ChatOptions | None = None,
    *,
    output: TextIO | None = None,
) -> None:
    """Writes both models' answers to each line side by side, once both are there.  Each goes on from its own answers.

    Args:
        base, tuned: the speaker of the left and of the right column.
        lines, options, output: as in `chat`.
    """
    options = ChatOptions() if options is None else options
    output = sys.stdout if output is None else output
    for line in _messages(lines, [base, tuned], options):
        answers = [speaker.reply(line, options, io.StringIO()) for speaker in (base, tuned)]
        print(side_by_side(*answers, width=shutil.get_terminal_size().columns), file=output, flush=True)


def base_of(tuned: Speaker, name: str = "", **loading: Any) -> Speaker:
    """The model to compare with: the one called `name`, or without a name the base of an adapter.

    Raises `ConfigError` without a name where `tuned` has no adapter.
    """
    adapters = getattr(tuned.model, "peft_config", None)
    own = str(next(iter(adapters.values())).base_model_name_or_path) if adapters else None
    if own is not None and (not name or Path(name) == Path(own)):
        return Speaker(model=tuned.model, tokenizer=tuned.tokenizer, while_answering=tuned.model.disable_adapter)
    if not name:
        raise ConfigError("--compare: this model has no adapter and does not name its base: --compare BASE")
    model, tokenizer = load(name, **loading)
    return Speaker(model=model, tokenizer=tokenizer)


def side_by_side(left: str, right: str, *, width: int, titles: tuple[str, str] = ("base", "tuned")) -> str:
    """Two texts in columns below their titles, `width` characters together."""
    column = max(20, (width - 3) // 2)
    columns = [
        [title, "-" * column, *(part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""])]
        for title, text in zip(titles, (left, right), strict=True)
    ]
    lines = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(f"{first:<{column}} | {second}".rstrip() for first, second in lines)


def _messages(lines: Iterable[str], speakers: list[Speaker], options: ChatOptions) -> Iterator[str]:
    """The lines to answer; obeys `clear` and `exit`."""
    for speaker in speakers:
        speaker.begin(options)
    for line in (text.strip() for text in lines):
        if line == "exit":
            return
        if line == "clear":
            for speaker in speakers:
                speaker.begin(options)
        elif line:
            yield line


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
