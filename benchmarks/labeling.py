"""Label the bundled dictionary with a language model behind a real SDK, end to end. Run `python -m benchmarks.labeling`.

The model is the test server's oracle: it explains a latent by the words that are marked in its windows, and judges by what it
reads in the rendered prompts, with 5 % of its verdicts flipped. So the scores say that everything between evidence and store
works, and nothing about language models.

With `--rungs one-shot test-and-refine --control 64` the latents climb a cascade whose top rung is the agent, which the server
plays by a fixed protocol, beside best-of-N at equal tokens: what the rung costs in calls, tokens and time. Which of the two is
better with a language model it does not say; a labeling run with one does.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from language_model_server import serving

from exegete.agent.config import load_config
from exegete.agent.progress import Lines
from exegete.agent.run import run
from exegete.agent.summary import headline


def main() -> None:
    """Print the run's summary, what the server counted, and the time of labeling alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("provider", choices=["openai", "anthropic", "openai-batch", "anthropic-batch"])
    parser.add_argument("--explainer", default="combined")
    parser.add_argument("--evaluators", nargs="+", default=["detection", "fuzzing"])
    parser.add_argument("--rungs", nargs="+", default=[], help="of a cascade, in place of the explainer")
    parser.add_argument("--control", type=int, default=64, help="latents that climb every rung of it")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--floors", type=int, default=100)
    parser.add_argument("--documents", type=int)
    parser.add_argument("--store", default="out/labeling-store")
    chosen = parser.parse_args()
    os.environ.setdefault("EXEGETE_API_KEY", "none")
    with serving(answer="oracle", otherwise="never", rate=0.05) as server:
        server.keep_bodies(False)
        model = server.spec(chosen.provider, "oracle-05")
        settled = load_config(
            None,
            (),
            {
                "subject.name": "bundled",
                "dictionary.path": "bundled:demo",
                "corpus.source": "bundled",
                "corpus.documents": chosen.documents,
                "store": chosen.store,
                "models.explainer": model,
                "models.judge": model,
                "label.explainer": None if chosen.rungs else chosen.explainer,
                "cascade.rungs": chosen.rungs or None,
                "cascade.control": chosen.control if chosen.rungs else None,
                "label.evaluators": chosen.evaluators,
                "label.limit": chosen.limit,
                "label.floors": chosen.floors,
            },
        )
        begun = time.perf_counter()
        outcome = run(settled, Lines(every_s=30.0))
        for figures in outcome.figures.values():
            print("\n".join(headline(figures)))
        print(f"\n{time.perf_counter() - begun:.0f} s in all; the server's count: {server.counts()}")


if __name__ == "__main__":
    main()
