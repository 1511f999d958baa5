"""Building a corpus takes no more memory for a longer one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PEAK = """
import sys, threading, time
from types import SimpleNamespace
from pathlib import Path
import numpy as np
from exegete.tools import corpus_recurrence
from exegete.tools.corpus import build_corpus
from exegete.tools.corpus_readers import Source
rng, count, peak = np.random.default_rng(0), int(sys.argv[1]), [0]
def watch():
    while True:  # what is in memory and not a mapped file, in KB
        status = Path("/proc/self/status").read_text()
        peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]))
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
corpus_recurrence._WINDOWS_A_FILE = 20_000  # so that both corpora need several files
Source.documents = lambda self: (" ".join(map(str, rng.integers(3, 60000, 500))) for _ in range(count))
Source.identity = lambda self: "x"
words = SimpleNamespace(name="w", bos=1, special_tokens=frozenset({1}), max_context=512, tokenizer_digest="d",
    pieces=range(60000), encode=lambda texts: [[int(w) for w in t.split()] for t in texts])
print(build_corpus("x", words, Path(sys.argv[2]), seed=0).counts["tokens"], peak[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to tell mapped files from memory")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    def peak_kb(count: int) -> int:
        command = [sys.executable, "-c", PEAK, str(count), str(tmp_path / f"c{count}")]
        tokens, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        assert int(tokens) > 500 * count
        return int(peak)

    # The smaller one fills a batch of contexts (8,192) already. Peaks of one size differ by 5 %; the 8 million tokens
    # that the larger one has more would add 40 %, were they ever all in memory.
    assert peak_kb(24_000) < peak_kb(8_000) * 1.15
