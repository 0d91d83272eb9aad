"""README.md of an exported folder: what the model is and scored, and how it is loaded; nothing of this machine."""

import json

from core.config import chosen
from core.model.params import count, param_table
from core.plain import flattened
from core.weights.subject import Exported

TAGS = {"hf": "transformers", "mlx-lm": "mlx"}
"""Format -> the library that a hub names."""
LOADING = {
    "safetensors": """from safetensors.numpy import load_file

weights = load_file("model.safetensors")  # by the names of the model's table; config.json has its settings""",
    "hf": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
inputs = tokenizer("She was", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, do_sample=False)[0]))""",
    "mlx-lm": """from mlx_lm import generate, load

model, tokenizer = load("FOLDER", trust_remote_code=True)
print(generate(model, tokenizer, tokenizer.encode("She was"), max_tokens=64))""",
}


def card(subject: Exported, form: str, files: dict[str, str], unconverted: str | None) -> str:
    """Return the text of README.md; `files`: name -> what it is; `unconverted`: why there is no tokenizer.json."""
    model, score = subject.model, subject.score
    head = ["pipeline_tag: text-generation", "tags: [skc-lab]"]
    head += [f"library_name: {TAGS[form]}"] if form in TAGS else []
    storage = sorted({row.rule for row in param_table(model).values()})
    rows = {
        "parameters": f"{count(model):,}", "artifact": f"{subject.artifact.size:,} bytes, sha256 {subject.sha256}",
        "storage": ", ".join(storage), "score": "not recorded" if score is None else _score(score),
        "audit": subject.audit, "vocabulary": f"{model.vocab:,}, BOS {model.bos}",
        "trained on rows of": f"{subject.seq:,} tokens", "licence": "none is given here: yours to choose",
    }  # fmt: skip
    settings = flattened(chosen(model))
    lines = [
        "---",
        *head,
        "---",
        "",
        f"# {subject.name}",
        "",
        "A language model of skc-lab, exported from its artifact.",
    ]
    lines += ["", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    lines += [
        "Its weights are the artifact's, decoded: what was scored. `config.json` has the settings of the model; those",
        "that are not the defaults:",
        "",
    ]
    lines += [f"* `{name} = {json.dumps(value)}`" for name, value in settings.items()] or ["* none"]
    lines += ["", "## How to load it", "", "```python", LOADING[form], "```", ""]
    if form == "hf":
        lines += [
            "`trust_remote_code` runs `modeling_skc.py`, which imports torch, numpy and transformers alone: read it.",
            "Its decoding state is `state`, no list of keys and values; padding, on either side, is not read.", "",
        ]  # fmt: skip
    elif form == "mlx-lm":
        lines += ["`trust_remote_code` runs `model.py`, which imports mlx and numpy alone: read it.", ""]
    if form != "safetensors":
        lines += [
            "A text begins with BOS, which the tokenizer puts in front; the model ends a text by writing another BOS.",
            "",
        ]
    if unconverted is not None:
        lines += [f"There is no tokenizer.json: {unconverted}.", ""]
    lines += ["## Files", "", *(f"* `{name}`: {what}" for name, what in files.items())]
    return "\n".join(lines) + "\n"


def _score(score: dict) -> str:
    """Return a recorded score in words."""
    rule = {"table": "by the tokenizer's byte table", "raw": "of the raw text"}[score["byte_rule"]]
    error = f" ± {score['error']:.4f}" if score.get("error") is not None else ""
    plugins = f", with {', '.join(score['plugins'])}" if score.get("plugins") else ""
    learned = f", learning while being scored: {score['adaptation']}" if score.get("adaptation") else ""
    what = "" if score["full"] else f" (an estimate: {score['documents']:,} of {score['total_documents']:,} documents)"
    return f"{score['bpb']:.4f}{error} bits per byte {rule}, {score['targets']:,} tokens{what}{plugins}{learned}"
