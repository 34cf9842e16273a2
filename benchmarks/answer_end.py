"""What a second EOS changes: log odds and accuracy of a chat model on held-out pairs, with and without `repeat_eos`.

    python benchmarks/answer_end.py --gguf path/to/SmolLM2-135M-Instruct.Q4_1.gguf --data path/to/politeness.json

The answers are those of the last 100 rows, written with the model's chat template.  Writes
benchmarks/results/answer_end.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measure import about, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_plugins import ORPOCollator, orpo_forward


def measure(gguf: Path, data: Path, rows: int) -> dict[str, Any]:
    """Means over the pairs, by `repeat_eos`."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = "<|im_end|>"  # its end of turn; the file names the beginning of a turn
    held_out = [
        {
            "prompt": [{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}".strip()}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in json.loads(data.read_text())[-rows:]
    ]
    result: dict[str, Any] = {**about("torch", "transformers"), "model": gguf.stem, "rows": rows}
    for repeat_eos in (False, True):
        collator = ORPOCollator(tokenizer, layout="shared", model=model, repeat_eos=repeat_eos, show_example=False)
        outputs = []
        with torch.no_grad():
            for start in range(0, rows, 10):
                outputs.append(orpo_forward(model, collator(held_out[start : start + 10])))
        chosen, rejected, odds = (
            torch.cat([getattr(output, name) for output in outputs])
            for name in ("chosen_logps", "rejected_logps", "log_odds_chosen")
        )
        lengths = torch.cat([output.metrics["chosen_lengths"] for output in outputs])
        result["repeated" if repeat_eos else "first"] = {
            "accuracy": (chosen > rejected).float().mean().item(),
            "log_odds": odds.mean().item(),
            "absolute_log_odds": odds.abs().mean().item(),
            "chosen_logps": chosen.mean().item(),
            "rejected_logps": rejected.mean().item(),
            "chosen_tokens": lengths.mean().item(),
            "pairs": odds.tolist(),
        }
    one, other = (torch.tensor(result[name].pop("pairs")) for name in ("first", "repeated"))
    result["pairs_that_change_sides"] = int(((one > 0) != (other > 0)).sum())
    result["mean_absolute_difference"] = (one - other).abs().mean().item()
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100)
    arguments = parser.parse_args()
    result = measure(arguments.gguf, arguments.data, arguments.rows)
    save("answer_end", result)
    print(result)


if __name__ == "__main__":
    main()
