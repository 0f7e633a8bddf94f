"""Score hidden codes with lm-evaluation-harness, through the plain model and through compressed caches, offline.

pip install lm-eval
python examples/lm_eval_codes.py                        # SmolLM2-135M-Instruct, Python's help topics
python examples/lm_eval_codes.py --preset quant max

A code is hidden in a text; one task has it chosen among four, the other has it said.  The tasks are written to a folder
as files of lm-eval, which is how tasks of your own look.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # before anything reads them

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from nexusquant_cache import PRESETS
from nexusquant_cache.evaluation import load_model, python_topics
from nexusquant_cache.evaluation.lm_eval import NexusQuantLM
from nexusquant_cache.presets import preset_name

HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}}\\n\\nThe code of the north gate is"
"""
CHOOSE = """\
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SAY = """\
output_type: generate_until
doc_to_target: code
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 10, do_sample: false}
filter_list: [{name: code, filter: [{function: regex, regex_pattern: '(\\d{6})'}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write_tasks(folder: Path, count: int, characters: int) -> None:
    """Write the texts, and the two tasks that ask for their codes."""
    words = " ".join(python_topics().split())
    draw = random.Random(0)  # noqa: S311 - no secrets
    rows = []
    for number in range(count):
        text = words[number * characters :][:characters]
        place = text.index(" ", draw.randrange(characters // 2))
        code, *wrong = (str(draw.randrange(100_000, 1_000_000)) for _ in range(4))
        hidden = f"{text[:place]} The code of the north gate is {code}.{text[place:]}"
        rows.append({"text": hidden, "code": code, "choices": [code, *wrong]})
    data = folder / "codes.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    for name, rest in (("choose_code", CHOOSE), ("say_code", SAY)):
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, data=data) + rest, encoding="utf-8")


def main() -> None:
    """Print what was chosen and said rightly, and what the caches held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, a GGUF file or a name on the model hub")
    parser.add_argument(
        "--preset", nargs="+", type=preset_name, default=["balanced"], choices=PRESETS, help="presets (balanced)"
    )
    parser.add_argument("--count", type=int, default=4, help="texts (%(default)s)")
    parser.add_argument("--characters", type=int, default=4000, help="of each text (%(default)s)")
    given = parser.parse_args()
    loaded = load_model(given.model)
    options = {"pretrained": loaded.model, "tokenizer": loaded.tokenizer, "batch_size": 1}
    with tempfile.TemporaryDirectory() as name:
        write_tasks(Path(name), given.count, given.characters)
        tasks = TaskManager(include_path=name, include_defaults=False)
        for preset in (None, *given.preset):
            model = HFLM(**options) if preset is None else NexusQuantLM(preset=preset, **options)
            found = lm_eval.simple_evaluate(model, tasks=["choose_code", "say_code"], task_manager=tasks)
            chosen, said = found["results"]["choose_code"]["acc,none"], found["results"]["say_code"]["exact_match,code"]
            held = found["config"].get("nexusquant", {"compression_factor": 1.0})
            less = held["compression_factor"]
            print(f"{preset or 'hf'}: chosen {chosen:.2f}, said {said:.2f}, {less:.1f} times fewer bytes")


if __name__ == "__main__":
    main()
